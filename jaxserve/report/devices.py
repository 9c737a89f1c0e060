"""What replicas and their devices did: load, slices, a row for each. Knows no request.

All of it is of the whole run: a replica's counters do not know the steady window.
"""

from typing import Any, Final

import numpy as np

from jaxserve.report.recorder import Recorder
from jaxserve.report.report import Cell, Number, plain

MOST_REPLICAS: Final = 2000
"""Replicas that have rows."""


def load(recorder: Recorder, run_s: float) -> dict[str, Number]:
    """How busy the replicas were, and how evenly; `run_s` is the run's time."""
    totals, num = recorder.slices.totals, recorder.slices.num_replicas
    if not num:
        return dict.fromkeys(
            ("replicas", "utilisation", "ct_std_s", "busy_cv", "busy_max_over_mean", "tokens_cv")
        )
    busy_s = totals["busy_s"]
    tokens = totals["prefill_tokens"] + totals["output_tokens"]
    several = num > 1
    mean_s = float(busy_s.mean())
    return {
        "replicas": int((totals["slices"] > 0).sum()),
        "utilisation": mean_s / run_s if run_s else None,
        "ct_std_s": float(recorder.slices.last_end_s.std()) if several else None,
        "busy_cv": _variation(busy_s) if several else None,
        "busy_max_over_mean": float(busy_s.max()) / mean_s if several and mean_s else None,
        "tokens_cv": _variation(tokens) if several else None,
    }


def _variation(values: np.ndarray) -> float | None:
    mean = float(values.mean())
    return float(values.std()) / mean if mean else None


def device(recorder: Recorder) -> dict[str, Number]:
    """Slices, and what they ran in vain."""
    totals = {name: float(column.sum()) for name, column in recorder.slices.totals.items()}
    num = recorder.slices.num_slices
    counted = [each["preemptions"] for each in recorder.replicas.values() if "preemptions" in each]
    return {
        "slices": num or None,
        "slice_steps": totals["steps"] / num if num else None,
        "slice_rows": totals["rows"] / num if num else None,
        "slice_s": totals["busy_s"] / num if num else None,
        "slice_max_s": recorder.slices.max_s if num else None,
        "preemptions": sum(counted) if counted else None,
        "pad_tokens": totals["pad_tokens"] if num else None,
        "invalid_tokens": totals["invalid_tokens"] if num else None,
    }


def replica_rows(recorder: Recorder, run_s: float) -> list[dict[str, Cell]]:
    """Rows of `REPLICA_COLUMNS`, by name."""
    totals = recorder.slices.totals
    last_end_s = recorder.slices.last_end_s
    rows = []
    for replica in range(min(recorder.slices.num_replicas, MOST_REPLICAS)):
        of = {name: float(column[replica]) for name, column in totals.items()}
        worst = recorder.fairness_log.worst.get(replica)
        num = of["slices"]
        row: dict[str, Any] = {
            "replica": str(replica),
            "slices": int(num),
            "busy": of["busy_s"] / run_s if run_s else None,
            "slice_steps": of["steps"] / num if num else None,
            "slice_rows": of["rows"] / num if num else None,
            **{
                name: int(of[name])
                for name in ("prefill_tokens", "output_tokens", "pad_tokens", "invalid_tokens")
            },
            "preemptions": recorder.replicas.get(replica, {}).get("preemptions"),
            "last_end_s": float(last_end_s[replica]),
            "gap": None if worst is None else worst.gap,
            "bound": None if worst is None else worst.bound,
            "order_jain": None if worst is None else worst.jain,
        }
        rows.append({name: plain(value) for name, value in row.items()})
    return rows
