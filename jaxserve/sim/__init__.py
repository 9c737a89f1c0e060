"""The simulator: the engine core and the router on a virtual clock, over modelled devices."""
