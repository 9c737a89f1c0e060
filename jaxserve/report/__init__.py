"""The report on a run, live or simulated: what was measured, defined once, shown in many forms."""
