"""From a recorder to a report: the numbers of `definitions.py`. Knows no form that it is shown in.

Dimension key: R requests  M messages (deliveries)
"""

import math
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from jaxserve.report.clients import ClientService, client_rows, served
from jaxserve.report.definitions import PERCENTILES
from jaxserve.report.devices import MOST_REPLICAS, device, load, replica_rows
from jaxserve.report.options import Limits, MeasureOptions
from jaxserve.report.recorder import REASONS, UNFINISHED, Recorder
from jaxserve.report.report import (
    MOST_ROWS,
    QUANTILES,
    About,
    Distribution,
    Number,
    Report,
    plain,
    rounded,
)
from jaxserve.report.request_table import RequestTable, join
from jaxserve.report.series import make_series
from jaxserve.schedulers.jain import jain

TRIMMED_SHARE: Final = 0.1
"""Of the time in which requests are sent, at either end, that the steady window leaves out."""
LEAST_REQUESTS: Final = 20
"""In a window that nobody asked for; with fewer the whole run is measured."""


def measure(recorder: Recorder, about: About, options: MeasureOptions | None = None) -> Report:
    """The report on what was recorded up to now."""
    options = options or MeasureOptions()
    table = join(recorder)
    begin_s, end_s, why = steady_window(table, options)
    sent_R = (table.sent_R >= begin_s) & (table.sent_R < end_s)
    service = served(recorder, table, (begin_s, end_s), w_in=options.w_in, w_out=options.w_out)
    distributions = _latencies(table, sent_R & table.completed_R)
    numbers: dict[str, Number] = {
        **_outcomes(table, sent_R),
        **_throughput(table, begin_s, end_s),
        "hit_rate": _hit_rate(table, sent_R & table.completed_R),
        **_goodput(table, sent_R, options.limits, end_s - begin_s),
        **_fairness(recorder, table, sent_R, service),
        **load(recorder, table.end_s),
        **device(recorder),
    }
    measured = {
        "window": f"{begin_s:.4g} s to {end_s:.4g} s of {table.end_s:.4g} s",
        "which is": why,
        "limits": _limits_text(options.limits),
        "prices": f"{options.w_in:g} a prompt token, {options.w_out:g} an output token",
        "TTFT and E2E": "from when a request was due (open loop) or sent (closed loop), so that"
        " queueing in the client counts",
        "TPOT": "(E2E - TTFT) / (output tokens - 1)",
        "ITL": "per token, not per message: tokens that come together have gaps of 0",
        "percentiles": PERCENTILES,
    }
    return Report(
        about=about,
        measured=measured,
        numbers={name: plain(value) for name, value in numbers.items()},
        distributions=distributions,
        clients=tuple(client_rows(recorder, table, sent_R, service)),
        replicas=tuple(replica_rows(recorder, table.end_s)),
        series=make_series(
            recorder, table, service, window=(begin_s, end_s), limits=asdict(options.limits)
        ),
        notes=tuple(_notes(recorder, table, service)),
        rows=_rows(recorder, table) if recorder.keep_rows else None,
        slices={name: column.tolist() for name, column in recorder.slices.kept.items()},
    )


def steady_window(table: RequestTable, options: MeasureOptions) -> tuple[float, float, str]:
    """Begin, end (left out) and why it is so."""
    run_end_s = max(float(np.nextafter(table.end_s, math.inf)), 1e-6)
    if options.window is not None:
        return *options.window, "as asked for"
    if not len(table):
        return 0.0, run_end_s, "the whole run; nothing was sent"
    first_s, last_s = float(table.sent_R.min()), float(table.sent_R.max())
    asked = options.warmup_s is not None or options.cooldown_s is not None
    part_s = TRIMMED_SHARE * (last_s - first_s)
    warmup_s = part_s if options.warmup_s is None else options.warmup_s
    cooldown_s = part_s if options.cooldown_s is None else options.cooldown_s
    begin_s, end_s = first_s + warmup_s, last_s - cooldown_s
    if asked and begin_s < end_s:
        return (
            begin_s,
            end_s,
            f"without the first {warmup_s:.6g} s and last {cooldown_s:.6g} s of"
            " the time in which requests are sent",
        )
    if asked:
        return 0.0, run_end_s, "the whole run: the warm-up asked for leaves nothing"
    within = int(((table.sent_R >= begin_s) & (table.sent_R < end_s)).sum())
    if last_s - first_s < TRIMMED_SHARE * (table.end_s - first_s):
        return 0.0, run_end_s, "the whole run: requests are sent nearly all at once"
    if within < LEAST_REQUESTS:
        return 0.0, run_end_s, "the whole run, as it is short"
    return (
        begin_s,
        end_s,
        "without the first and the last tenth of the time in which requests are sent",
    )


def describe(values: np.ndarray, *, zeros: int = 0) -> Distribution | None:
    """What is told of values, and of so many zeros beside them; None of none."""
    values = np.sort(values)
    num = len(values) + zeros
    if not num:
        return None

    def at(quantile: float) -> float:
        place = quantile * (num - 1) - zeros  # in `values`; below 0 among the zeros
        low = math.floor(place)
        below = float(values[low]) if low >= 0 else 0.0
        above = float(values[min(low + 1, len(values) - 1)]) if low >= -1 and len(values) else 0.0
        return below + (above - below) * (place - low)

    statistics = {
        "mean": float(values.sum()) / num,
        **{f"p{percent}": at(percent / 100) for percent in (50, 90, 95, 99)},
        "max": float(values[-1]) if len(values) else 0.0,
    }
    return Distribution(
        num=num,
        statistics={name: float(f"{value:.9g}") for name, value in statistics.items()},
        curve=tuple(float(f"{at(quantile):.5g}") for quantile in QUANTILES),
    )


def _latencies(table: RequestTable, chosen_R: np.ndarray) -> dict[str, Distribution]:
    chosen_M = chosen_R[table.request_M]
    gap_M = table.gap_M[chosen_M]
    gap_M = gap_M[~np.isnan(gap_M)]
    tpot_R = table.tpot_R[chosen_R]
    queue_R = table.queue_R[chosen_R]
    # Of k tokens in a message, k - 1 come with the one before them; so do those of a first message.
    together = int(table.tokens_M[chosen_M].sum()) - int(chosen_M.sum())
    ttft_R, e2e_R = table.ttft_R[chosen_R], table.e2e_R[chosen_R]
    found = {
        "ttft_s": describe(ttft_R[~np.isnan(ttft_R)]),
        "tpot_s": describe(tpot_R[~np.isnan(tpot_R)]),
        "itl_s": describe(gap_M, zeros=together),
        "delivery_gap_s": describe(gap_M),
        "e2e_s": describe(e2e_R[~np.isnan(e2e_R)]),
        "queue_s": describe(queue_R[~np.isnan(queue_R)]),
    }
    return {name: each for name, each in found.items() if each is not None}


def _outcomes(table: RequestTable, sent_R: np.ndarray) -> dict[str, Number]:
    counts = dict.fromkeys(REASONS, 0)
    for place, reason in enumerate(REASONS):
        counts[reason] = int((table.reason_R[sent_R] == place).sum())
    return {
        "requests": int(sent_R.sum()),
        "completed": counts["stop"] + counts["length"],
        "errors": counts["error"],
        "refused": counts["refused"],
        "deadline": counts["deadline"],
        "aborted": counts["abort"],
        "unfinished": int((table.reason_R[sent_R] == UNFINISHED).sum()),
    }


def _throughput(table: RequestTable, begin_s: float, end_s: float) -> dict[str, Number]:
    length_s = end_s - begin_s
    if length_s <= 0:
        return dict.fromkeys(
            ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s", "total_tokens_per_s")
        )

    def within(times: np.ndarray) -> np.ndarray:
        return (times >= begin_s) & (times < end_s)

    done = int((within(table.end_R) & table.completed_R).sum())
    inputs = int(table.prompt_R[within(table.first_R)].sum())
    outputs = int(table.tokens_M[within(table.time_M)].sum())
    return {
        "requests_per_s": done / length_s,
        "input_tokens_per_s": inputs / length_s,
        "output_tokens_per_s": outputs / length_s,
        "total_tokens_per_s": (inputs + outputs) / length_s,
    }


def _hit_rate(table: RequestTable, chosen_R: np.ndarray) -> float | None:
    prompt = int(table.prompt_R[chosen_R].sum())
    return int(table.cached_R[chosen_R].sum()) / prompt if prompt else None


def _goodput(
    table: RequestTable, sent_R: np.ndarray, limits: Limits, length_s: float
) -> dict[str, Number]:
    asked = int((sent_R & (table.reason_R != REASONS.index("abort"))).sum())
    if not limits.given or not asked:
        return {"goodput_share": None, "goodput_per_s": None}
    good_R = sent_R & table.completed_R
    for values, limit in (
        (table.ttft_R, limits.ttft_s),
        (table.tpot_R, limits.tpot_s),
        (table.e2e_R, limits.e2e_s),
    ):
        if limit is not None:
            good_R &= ~(values > limit)  # nan, such as a single token's TPOT, exceeds nothing
    good = int(good_R.sum())
    return {"goodput_share": good / asked, "goodput_per_s": good / length_s}


def _fairness(
    recorder: Recorder, table: RequestTable, sent_R: np.ndarray, service: ClientService
) -> dict[str, Number]:
    chosen_R = sent_R & table.completed_R & ~np.isnan(table.ttft_R)
    counts = np.bincount(table.client_R[chosen_R], minlength=len(recorder.client_names))
    sums = np.bincount(table.client_R[chosen_R], table.ttft_R[chosen_R], len(counts))
    waits = (sums[counts > 0] / counts[counts > 0]).tolist()
    worst = recorder.fairness_log.worst.values()
    largest = max(worst, key=lambda each: each.gap, default=None)
    demand, backlog = service.demand, service.backlog
    return {
        "jain_service": None if demand is None else demand.jain,
        "jain_service_clients": None if demand is None else demand.num,
        "jain_backlogged": None if backlog is None else backlog.jain,
        "jain_backlogged_clients": None if backlog is None else backlog.num,
        "jain_wait": jain(waits) if len(waits) > 1 else None,
        "jain_wait_clients": len(waits) if len(waits) > 1 else None,
        "fleet_gap": None if backlog is None else backlog.gap,
        "service_gap": None if largest is None else largest.gap,
        "service_gap_bound": None if largest is None else largest.bound,
        "gap_over_bound": max(
            (each.over_bound for each in worst if each.over_bound is not None), default=None
        ),
        "order_jain": min((each.jain for each in worst if each.jain is not None), default=None),
    }


def _notes(recorder: Recorder, table: RequestTable, service: ClientService) -> list[str]:
    notes = list(service.notes)
    if table.num_strange:
        notes.append(
            f"{table.num_strange} deliveries and ends of requests that were never sent were left"
            " out."
        )
    kept, num = len(recorder.slices.kept["replica"]), recorder.slices.num_slices
    if kept < num:
        notes.append(
            f"The first {kept} of {num} slices are kept one by one, for the Chrome trace; totals"
            " and plots over the run have all of them."
        )
    if recorder.slices.num_replicas > MOST_REPLICAS:
        notes.append(f"The first {MOST_REPLICAS} replicas have rows.")
    if recorder.keep_rows and len(table) > MOST_ROWS:
        notes.append(f"The first {MOST_ROWS} of {len(table)} requests have rows.")
    if recorder.fairness_log.thinned:
        notes.append(
            "Of the orders' service windows the plot has some, the largest gaps among them; the"
            " numbers are of all."
        )
    return notes


def _rows(recorder: Recorder, table: RequestTable) -> dict[str, list[Any]]:
    """A row for each request, by column; times from the run's start, None for what never was."""
    some = slice(0, MOST_ROWS)
    names = np.array(recorder.client_names, dtype=object)
    reasons = np.array([*REASONS, "unfinished"], dtype=object)
    times = {
        "sent_s": table.sent_R,
        "first_s": table.first_R,
        "last_s": table.last_R,
        "end_s": table.end_R,
        "ttft_s": table.ttft_R,
        "tpot_s": table.tpot_R,
        "e2e_s": table.e2e_R,
        "queue_s": table.queue_R,
    }
    return {
        "number": table.number_R[some].tolist(),
        "client": names[table.client_R[some]].tolist() if len(names) else [],
        "reason": reasons[table.reason_R[some]].tolist(),
        "prompt_tokens": table.prompt_R[some].tolist(),
        "cached_tokens": table.cached_R[some].tolist(),
        "output_tokens": table.output_R[some].tolist(),
        "messages": table.messages_R[some].tolist(),
        "replica": [None if place < 0 else place for place in table.replica_R[some].tolist()],
        **{
            name: [rounded(value, 9) for value in column[some].tolist()]
            for name, column in times.items()
        },
    }


def _limits_text(limits: Limits) -> str:
    if not limits.given:
        return "none, so no goodput"
    return ", ".join(f"{name} at most {limit:g} s" for name, limit in limits.given.items())
