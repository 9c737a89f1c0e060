"""Service by client, as the clients see it: who was served how much, and who may be compared.

Clients are compared at moments when all of them have demand: an index over clients of which only
one wants anything says nothing. So the steady window is cut into steps, and the clients with most
demand are taken as long as all of them have it in at least half of the steps.

Dimension key: R requests  M messages  C clients  K steps of the window
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from jaxserve.report.recorder import REASONS, Recorder
from jaxserve.report.report import Cell, rounded
from jaxserve.report.request_table import RequestTable
from jaxserve.schedulers.jain import jain

NUM_STEPS: Final = 200
LEAST_TOGETHER: Final = 0.5
"""Share of the window's steps in which all compared clients have demand."""
MOST_CLIENTS: Final = 1000
"""Clients that have rows and are compared: those with most demand."""
# Of a step, so that rounding does not end a demand.
_WHOLE: Final = 0.999


@dataclass(frozen=True, slots=True)
class Compared:
    """`num` clients that had demand together, in a `share` of the window: Jain's index of their
    service by weight, and the most beyond the least."""

    num: int
    share: float
    jain: float | None
    gap: float


@dataclass(frozen=True, slots=True)
class ClientService:
    """Clients are ids, by most demand first. `demand` compares those that have an unfinished
    request, `backlog` those that have one without a token; None: no two of them together."""

    clients_C: np.ndarray
    demand_C: np.ndarray
    input_C: np.ndarray
    cached_C: np.ndarray
    output_C: np.ndarray
    weight_C: np.ndarray
    w_in: float | int
    w_out: float | int
    demand: Compared | None
    backlog: Compared | None
    notes: tuple[str, ...]

    @property
    def all_C(self) -> np.ndarray:
        return self.w_in * self.input_C + self.w_out * self.output_C

    @property
    def uncached_C(self) -> np.ndarray:
        return self.w_in * (self.input_C - self.cached_C) + self.w_out * self.output_C


def served(
    recorder: Recorder,
    table: RequestTable,
    window: tuple[float, float],
    *,
    w_in: float | int,
    w_out: float | int,
) -> ClientService:
    """What the clients were served in the window, and how evenly."""
    edges_K = np.linspace(*window, NUM_STEPS + 1)
    num = len(recorder.client_names)
    demanded = _covered(table.client_R, table.sent_R, table.left_R, edges_K, num)
    # A request that ends without a token waited up to its end.
    started_R = np.where(np.isnan(table.first_R), table.left_R, table.first_R)
    waited = _covered(table.client_R, table.sent_R, started_R, edges_K, num)
    step_s = edges_K[1] - edges_K[0]
    clients_C = np.array(sorted(demanded, key=lambda id: (-demanded[id].sum(), id)), np.int64)
    notes = ()
    if len(clients_C) > MOST_CLIENTS:
        notes = (f"The {MOST_CLIENTS} of {num} clients with most demand have rows.",)
        clients_C = clients_C[:MOST_CLIENTS]
    place_of = np.full(num, -1, np.int64)
    place_of[clients_C] = np.arange(len(clients_C))
    parts = _tokens(table, place_of, edges_K, len(clients_C))
    weight_C = np.array(recorder.client_weights)[clients_C] if num else np.zeros(0)
    service_CK = w_in * (parts[0] - parts[1]) + w_out * parts[2]
    share_CK = service_CK / weight_C[:, None]
    never_K = np.zeros(NUM_STEPS)  # waited: its requests began before the window did
    covered = [
        np.stack([each.get(id, never_K) for id in clients_C]) / step_s
        if num and len(clients_C)
        else np.zeros((0, NUM_STEPS))
        for each in (demanded, waited)
    ]
    return ClientService(
        clients_C=clients_C,
        demand_C=covered[0].mean(axis=1),
        input_C=parts[0].sum(axis=1),
        cached_C=parts[1].sum(axis=1),
        output_C=parts[2].sum(axis=1),
        weight_C=weight_C,
        w_in=w_in,
        w_out=w_out,
        demand=compare(share_CK, covered[0] >= _WHOLE),
        backlog=compare(share_CK, covered[1] >= _WHOLE),
        notes=notes,
    )


def compare(share_CK: np.ndarray, demand_CK: np.ndarray) -> Compared | None:
    """Of clients' service by weight and whether they had demand, step by step: those that had it
    together. None if no two had."""
    most_first = np.argsort(-demand_CK.sum(axis=1), kind="stable")
    together = np.ones(demand_CK.shape[1], bool)
    chosen: list[int] = []
    for client in most_first:
        joined = together & demand_CK[client]
        if joined.mean() < LEAST_TOGETHER:
            break
        together = joined
        chosen.append(int(client))
    if len(chosen) < 2:
        return None
    shares = share_CK[chosen][:, together].sum(axis=1)
    return Compared(
        num=len(chosen),
        share=float(together.mean()),
        jain=jain(shares.tolist()),
        gap=float(shares.max() - shares.min()),
    )


def client_rows(
    recorder: Recorder, table: RequestTable, sent_R: np.ndarray, service: ClientService
) -> Iterator[dict[str, Cell]]:
    """Rows of `CLIENT_COLUMNS`, by name."""
    rows_of = _by_client(table.client_R, np.flatnonzero(sent_R))
    names = recorder.client_names
    places = sorted(range(len(service.clients_C)), key=lambda at: names[service.clients_C[at]])
    ttft_R, tpot_R, e2e_R = table.ttft_R, table.tpot_R, table.e2e_R
    all_C, uncached_C = service.all_C, service.uncached_C
    failures = [REASONS.index(reason) for reason in ("deadline", "error", "refused")]
    for place in places:
        client = int(service.clients_C[place])
        rows = rows_of.get(client, np.zeros(0, np.int64))
        reasons = table.reason_R[rows]
        done = rows[table.completed_R[rows]]
        ttft, tpot, e2e = (
            values[~np.isnan(values)] for values in (ttft_R[done], tpot_R[done], e2e_R[done])
        )
        yield {
            "client": names[client],
            "weight": float(service.weight_C[place]),
            "requests": len(rows),
            "completed": len(done),
            "failed": int(np.isin(reasons, failures).sum()),
            "aborted": int((reasons == REASONS.index("abort")).sum()),
            "demand": rounded(float(service.demand_C[place]), 4),
            "input_tokens": int(service.input_C[place]),
            "cached_tokens": int(service.cached_C[place]),
            "output_tokens": int(service.output_C[place]),
            "service": rounded(float(all_C[place])),
            "service_uncached": rounded(float(uncached_C[place])),
            "ttft_mean_s": _mean(ttft),
            "ttft_p50_s": _percentile(ttft, 50),
            "ttft_p99_s": _percentile(ttft, 99),
            "tpot_mean_s": _mean(tpot),
            "e2e_p50_s": _percentile(e2e, 50),
            "e2e_p99_s": _percentile(e2e, 99),
        }


def overlap_before(begin: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Time of all intervals together before each edge."""

    def before(starts: np.ndarray) -> np.ndarray:
        starts = np.sort(starts)
        sums = np.concatenate([[0.0], np.cumsum(starts)])
        num = np.searchsorted(starts, edges)
        return num * edges - sums[num]

    return before(begin) - before(end[np.isfinite(end)])


def _by_client(client_R: np.ndarray, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Those of the rows that are of each client."""
    order = rows[np.argsort(client_R[rows], kind="stable")]
    clients, starts = np.unique(client_R[order], return_index=True)
    parts = np.split(order, starts[1:])
    return dict(zip(clients.tolist(), parts, strict=True)) if len(clients) else {}


def _covered(
    client_R: np.ndarray, begin_R: np.ndarray, end_R: np.ndarray, edges_K: np.ndarray, num: int
) -> dict[int, np.ndarray]:
    """Seconds of each step in which each client has one of the intervals or more, for those that
    have any."""
    found = {}
    for client, rows in _by_client(client_R, np.arange(len(client_R))).items():
        begin, end = begin_R[rows], end_R[rows]
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], np.maximum.accumulate(end[order])
        apart = np.flatnonzero(begin[1:] > end[:-1])  # where the intervals so far end, a new begins
        begin = np.concatenate([begin[:1], begin[apart + 1]])
        end = np.concatenate([end[apart], end[-1:]])
        covered = np.diff(overlap_before(begin, end, edges_K))
        if covered.any():
            found[client] = covered
    return found


def _tokens(
    table: RequestTable, place_of: np.ndarray, edges_K: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input, cached and output tokens by client and step; a prompt counts at its first token."""
    steps = len(edges_K) - 1

    def table_of(client: np.ndarray, time: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        step = np.searchsorted(edges_K, time, side="right") - 1
        place = place_of[client] if len(place_of) else np.zeros(0, np.int64)
        inside = (step >= 0) & (step < steps) & (place >= 0) & ~np.isnan(time)
        flat = np.bincount(place[inside] * steps + step[inside], tokens[inside], num * steps)
        return flat.reshape(num, steps)

    client_M = table.client_R[table.request_M]
    return (
        table_of(table.client_R, table.first_R, table.prompt_R),
        table_of(table.client_R, table.first_R, table.cached_R),
        table_of(client_M, table.time_M, table.tokens_M),
    )


def _mean(values: np.ndarray) -> float | None:
    return rounded(float(values.mean())) if len(values) else None


def _percentile(values: np.ndarray, percent: int) -> float | None:
    return rounded(float(np.percentile(values, percent))) if len(values) else None
