"""What the report's plots show, thinned to a size that does not grow with the run. Draws nothing.

Dimension key: R requests  M messages  T bins of time
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from jaxserve.report.clients import ClientService, overlap_before
from jaxserve.report.recorder import Recorder
from jaxserve.report.report import Number
from jaxserve.report.request_table import RequestTable
from jaxserve.report.slice_log import SECONDS_EDGES

NUM_BINS: Final = 240
MOST_LINES: Final = 7
"""Clients that have a line of their own; the rest share one."""
MOST_LANES: Final = 16
MOST_BARS: Final = 1200
"""Replicas, and slices, of the plot of single slices."""
MOST_STRIPS: Final = 64
"""Rows of the heat strip; of more replicas, some share one."""


def make_series(
    recorder: Recorder,
    table: RequestTable,
    service: ClientService,
    *,
    window: tuple[float, float],
    limits: Mapping[str, Number],
) -> dict[str, Any]:
    """Series by name; those that have nothing to show are left out."""
    end_s = max(table.end_s, float(recorder.slices.last_end_s.max(initial=0.0)))
    if not end_s:
        return {}
    edges_T = np.linspace(0.0, end_s, NUM_BINS + 1)
    gaps = table.gap_M[~np.isnan(table.gap_M)]
    places = np.searchsorted(SECONDS_EDGES, gaps, side="right")
    found = {
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
        "window": _short([window[0], min(window[1], end_s)]),
        "timeline": _timeline(table, edges_T),
        "clients": _clients(recorder, table, service, edges_T),
        "gap": _gap(recorder),
        "busy": _busy(recorder),
        "slice_s": _log_bars(recorder.slices.by_seconds),
        "slice_steps": _step_bars(recorder.slices.by_steps),
        "delivery_gap_s": _log_bars(np.bincount(places, minlength=len(SECONDS_EDGES) + 1)),
        "gantt": _gantt(recorder),
    }
    return {name: series for name, series in found.items() if series is not None}


def _short(values: Any, digits: int = 5) -> list[Number]:
    """As plain numbers of few digits; None for nan."""
    return [None if value != value else float(f"{value:.{digits}g}") for value in values]


def _timeline(table: RequestTable, edges_T: np.ndarray) -> dict[str, Any]:
    """Means over each bin: requests per second sent, requests without and with a first token,
    tokens per second."""
    width_s = edges_T[1]

    def rate(times: np.ndarray, tokens: np.ndarray | None = None) -> list[Number]:
        some = ~np.isnan(times)
        counts, _ = np.histogram(
            times[some], edges_T, weights=None if tokens is None else tokens[some]
        )
        return _short(counts / width_s)

    def mean(begin: np.ndarray, end: np.ndarray) -> list[Number]:
        return _short(np.maximum(np.diff(overlap_before(begin, end, edges_T)) / width_s, 0.0))

    left_R = table.left_R
    started = ~np.isnan(table.first_R)
    return {
        "t": _short(edges_T[:-1] + width_s / 2),
        "arrivals": rate(table.sent_R),
        "waiting": mean(table.sent_R, np.where(started, table.first_R, left_R)),
        "streaming": mean(table.first_R[started], left_R[started]),
        "output": rate(table.time_M, table.tokens_M),
        "input": rate(table.first_R, table.prompt_R),
    }


def _clients(
    recorder: Recorder, table: RequestTable, service: ClientService, edges_T: np.ndarray
) -> dict[str, Any] | None:
    """Service by weight since the run's start, at both prices, of those with most of it."""
    num = len(recorder.client_names)
    if num < 2:
        return None
    prompt = np.bincount(table.client_R, table.prompt_R, num)
    output = np.bincount(table.client_R, table.output_R, num)
    biggest = np.argsort(-(service.w_in * prompt + service.w_out * output), kind="stable")
    most = MOST_LINES if num > MOST_LINES + 1 else num
    line_of = np.full(num, most)
    line_of[biggest[:most]] = np.arange(most)
    weight = np.array(recorder.client_weights)
    names = [recorder.client_names[client] for client in biggest[:most]]
    names += [f"mean of {num - most} others"] if num > most else []
    share = 1 / weight
    share[biggest[most:]] /= max(num - most, 1)

    def curve(client: np.ndarray, time: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        inside = ~np.isnan(time)
        client, time, tokens = client[inside], time[inside], tokens[inside] * share[client[inside]]
        bins = np.minimum(np.searchsorted(edges_T, time, side="left"), NUM_BINS)
        flat = np.bincount(
            line_of[client] * (NUM_BINS + 1) + bins, tokens, len(names) * (NUM_BINS + 1)
        )
        return np.cumsum(flat.reshape(len(names), NUM_BINS + 1), axis=1)

    inputs = curve(table.client_R, table.first_R, table.prompt_R.astype(np.float64))
    cached = curve(table.client_R, table.first_R, table.cached_R.astype(np.float64))
    outputs = curve(
        table.client_R[table.request_M], table.time_M, table.tokens_M.astype(np.float64)
    )
    every = slice(None, None, 2)
    priced = {
        "all": service.w_in * inputs + service.w_out * outputs,
        "uncached": service.w_in * (inputs - cached) + service.w_out * outputs,
    }
    return {
        "t": _short(edges_T[every]),
        "names": names,
        **{name: [_short(line[every]) for line in lines] for name, lines in priced.items()},
    }


def _gap(recorder: Recorder) -> dict[str, Any] | None:
    """The largest gap of all replicas in each bin, and the bound of the same order then."""
    rows = recorder.fairness_log.samples()
    if not len(rows):
        return None
    width_s = max(float(rows[-1, 1]), 1e-9) / NUM_BINS
    bins = np.minimum((rows[:, 1] / width_s).astype(np.int64), NUM_BINS - 1)
    order = np.lexsort((-rows[:, 2], bins))
    _, first = np.unique(bins[order], return_index=True)
    top = rows[order[first]]
    return {"t": _short(top[:, 1]), "gap": _short(top[:, 2]), "bound": _short(top[:, 3])}


def _busy(recorder: Recorder) -> dict[str, Any] | None:
    """Share of each bin in which each replica was busy, in percent."""
    share = recorder.slices.busy_share
    if not share.size:
        return None
    num = len(share)
    together = -(-num // MOST_STRIPS)
    starts = np.arange(0, num, together)
    sizes = np.minimum(num - starts, together)
    strips = np.add.reduceat(share, starts, axis=0) / sizes[:, None]
    names = [
        str(start) if size == 1 else f"{start} to {start + size - 1}"
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
    ]
    percent = np.rint(np.clip(strips, 0.0, 1.0) * 100).astype(int)
    return {"bin_s": recorder.slices.bin_s, "names": names, "percent": percent.tolist()}


def _log_bars(counts: np.ndarray) -> dict[str, Any] | None:
    """Counts between `SECONDS_EDGES`, without empty ends; what is beyond them is left out."""
    inner = counts[1:-1]
    some = np.flatnonzero(inner)
    if not len(some):
        return None
    low, high = int(some[0]), int(some[-1]) + 1
    return {
        "edges": _short(SECONDS_EDGES[low : high + 1]),
        "counts": inner[low:high].tolist(),
    }


def _step_bars(counts: np.ndarray) -> dict[str, Any] | None:
    """Counts of slices by steps: 0, 1, 2 and then between powers of two."""
    if not counts.any():
        return None
    edges = [0, 1, 2]
    while edges[-1] < len(counts):
        edges.append(edges[-1] * 2)
    sums = [int(counts[low:high].sum()) for low, high in zip(edges, edges[1:], strict=False)]
    first = next(place for place, count in enumerate(sums) if count)
    return {"edges": edges[first:], "counts": sums[first:]}


def _gantt(recorder: Recorder) -> dict[str, Any] | None:
    """The first slices of the first replicas, one by one."""
    kept = recorder.slices.kept
    chosen = np.flatnonzero(kept["replica"] < MOST_LANES)[:MOST_BARS]
    if not len(chosen):
        return None
    return {
        "replica": kept["replica"][chosen].astype(int).tolist(),
        "begin": _short(kept["begin_s"][chosen], 7),
        "end": _short(kept["end_s"][chosen], 7),
        **{
            name: kept[column][chosen].astype(int).tolist()
            for name, column in (
                ("steps", "steps"),
                ("rows", "rows"),
                ("prefill", "prefill_tokens"),
                ("output", "output_tokens"),
                ("pad", "pad_tokens"),
            )
        },
    }
