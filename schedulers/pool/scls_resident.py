"""SCLS with KV that stays between slices. Ours; the paper (arXiv 2406.13511) only names the idea.

A request keeps its pages on the instance that ran it, its holder, so that its next slice computes
no prompt again. Whenever an instance has nothing to run, it gets a round: all its resident requests
and new ones, oldest first, each to the idle instance whose round then ends first, as far as pages
go. A round is cut into batches by dynamic programming over their lengths; a batch costs the prefill
of its new rows and the decode of all, each at their mean length (`lengths=longest`: padded). That
is a heuristic here: with resident rows and memory counted by sums, batches of neighbours in length
need not be best (papers.md 1.4).

Pages are leased for a round before it begins: a slice ahead for each row. When they run short,
resident requests drop theirs, the one that has not run for longest first (of equals the newest);
they are computed again when their turn by arrival comes. A resident request moves, which costs
the same, only if that lets it end its slice earlier by `move_gain` times that cost, by estimate.
Nothing waits for an interval: new rows join at the end of any slice.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..parameters import at_least, not_negative, require
from .batching import cheapest_mixed_cuts
from .memory_rule import MemoryRule
from .planner import BasePlanner, PoolSetup
from .request import Batch, PoolRequest, Ran


@dataclass(frozen=True, slots=True)
class SclsResidentParameters:
    """`lengths`: a batch is estimated by the mean of its rows, for a device that does not pad, or
    by the longest. `lookahead` slices of every row must fit before a new one joins others, so that
    residents seldom drop their pages; `most_moves` bounds a plan."""

    zeta: float = 0.9
    lengths: Literal["mean", "longest"] = "mean"
    lookahead: int = 2
    move_gain: float = 1.0
    most_moves: int = 64

    def __post_init__(self) -> None:
        require(0 < self.zeta <= 1, "zeta", self.zeta, "a number in (0, 1]")
        at_least("lookahead", self.lookahead, 1)
        not_negative("move_gain", self.move_gain)
        at_least("most_moves", self.most_moves, 0)


@dataclass(slots=True)
class _Sizes:
    """Of some rows: how many, their tokens and the longest. The longest stays when rows go."""

    rows: int = 0
    tokens: int = 0
    longest: int = 0

    @classmethod
    def of(cls, requests: Iterable[PoolRequest]) -> "_Sizes":
        sizes = cls()
        for request in requests:
            sizes.add(request.length)
        return sizes

    def add(self, length: int) -> None:
        self.rows += 1
        self.tokens += length
        self.longest = max(self.longest, length)

    def remove(self, length: int) -> None:
        self.rows -= 1
        self.tokens -= length


@dataclass(slots=True)
class _Round:
    """What an idle instance runs next; `fresh` are the rows that prefill."""

    rows: dict[int, PoolRequest] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    drops: list[int] = field(default_factory=list)
    sizes: _Sizes = field(default_factory=_Sizes)
    fresh_sizes: _Sizes = field(default_factory=_Sizes)

    def add(self, request: PoolRequest, *, fresh: bool) -> None:
        self.rows[request.number] = request
        self.sizes.add(request.length)
        if fresh:
            self.fresh.add(request.number)
            self.fresh_sizes.add(request.length)

    def remove(self, request: PoolRequest) -> None:
        """A row that does not prefill goes elsewhere."""
        del self.rows[request.number]
        self.sizes.remove(request.length)


class SclsResident(BasePlanner):
    """See above. `statistics().held_pages` counts leases of batches that were sent, too."""

    def __init__(self, parameters: SclsResidentParameters, setup: PoolSetup):
        rule = MemoryRule.share(setup.memory, parameters.zeta, "pages", setup.max_rows)
        super().__init__(setup, rule, slice_len=setup.slice_len)
        self._parameters = parameters
        self._waiting: list[tuple[float, int]] = []
        self._residents: list[dict[int, PoolRequest]] = [{} for _ in range(setup.instances)]
        self._leases: list[dict[int, int]] = [{} for _ in range(setup.instances)]
        self._held = [0] * setup.instances
        self._sizes_of: dict[int, tuple[_Sizes, _Sizes]] = {}
        self._news = False

    def arrived(self, request: PoolRequest) -> None:
        super().arrived(request)
        bisect.insort(self._waiting, (request.arrival_s, request.number))
        self._news = True

    def left(self, number: int) -> None:
        request = self._pool.get(number)
        super().left(number)
        if request is None:
            return
        if request.holder is None:
            del self._waiting[bisect.bisect_left(self._waiting, (request.arrival_s, number))]
        else:
            self._forget(request)
        self._news = True

    def ran(self, batch: Batch, what: Ran) -> None:
        super().ran(batch, what)
        del self._sizes_of[batch.ticket]
        for number in batch.rows:
            request = self._pool.get(number)
            if request is None:
                self._lease(batch.instance, number, 0)
                continue
            request.holder = batch.instance
            self._residents[batch.instance][number] = request
            self._lease(batch.instance, number, self._pages(request, 0))
        self._news = True

    def predict_s(self, batch: Batch, steps: int) -> float:
        sizes, fresh_sizes = self._sizes_of[batch.ticket]
        return self._mixed_s(sizes, fresh_sizes, steps)

    def due_s(self, now_s: float) -> float | None:
        return now_s if self._news and self._pool and self._loads.idle() else None

    def plan(self, now_s: float) -> list[Batch]:
        self._news = False
        rounds = {instance: self._residents_of(instance) for instance in self._loads.idle()}
        self._let_in(rounds)
        self._move(rounds)
        batches = []
        for instance, round_ in rounds.items():
            batches += self._batches(instance, round_)
        return batches

    # ------------------------------------------------------------------------------- memory

    def _held_pages(self) -> tuple[int, ...]:
        return tuple(self._held)

    def _most_tokens(self, request: PoolRequest) -> int:
        return request.prompt_tokens + request.max_output

    def _pages(self, request: PoolRequest, ahead: int) -> int:
        """That it needs when it has made so many tokens more, or all that it may."""
        ahead = min(ahead, request.max_output - request.made)
        return -(-(request.length + ahead) // self._rule.memory.page_size)

    def _lease(self, instance: int, number: int, pages: int) -> None:
        """Request `number` holds so many pages of `instance` from now on."""
        leases = self._leases[instance]
        self._held[instance] += pages - leases.pop(number, 0)
        if pages:
            leases[number] = pages

    def _forget(self, request: PoolRequest) -> None:
        """A pooled resident request gives its pages back."""
        assert request.holder is not None
        del self._residents[request.holder][request.number]
        self._lease(request.holder, request.number, 0)
        request.holder = None

    def _free(self, instance: int) -> int:
        return self._rule.memory.num_pages - self._held[instance]

    # -------------------------------------------------------------------------------- rounds

    def _residents_of(self, instance: int) -> _Round:
        """A round of its resident requests, each on pages for the slice; who finds none waits."""
        round_ = _Round()
        residents = list(self._residents[instance].values())
        need = sum(self._pages(request, self._slice_len) for request in residents)
        need -= self._rule.memory.num_pages
        residents.sort(key=lambda request: (-request.last_ran, request.arrival_s, request.number))
        while need > 0:
            dropped = residents.pop()
            need -= self._pages(dropped, self._slice_len)
            self._forget(dropped)
            bisect.insort(self._waiting, (dropped.arrival_s, dropped.number))
            round_.drops.append(dropped.number)
        for request in residents:
            self._lease(instance, request.number, self._pages(request, self._slice_len))
            round_.add(request, fresh=False)
        return round_

    def _let_in(self, rounds: dict[int, _Round]) -> None:
        """New requests, oldest first; the first that fits nowhere keeps those behind it out."""
        ahead = (self._parameters.lookahead - 1) * self._slice_len
        # What rows that are there may grow by in the slices after this one.
        growth = {
            instance: sum(
                self._pages(request, self._slice_len + ahead)
                - self._pages(request, self._slice_len)
                for request in round_.rows.values()
            )
            for instance, round_ in rounds.items()
        }
        free = {instance: self._free(instance) for instance in rounds}
        ends_s = {instance: self._ends_with_one(round_) for instance, round_ in rounds.items()}
        taken = 0
        for _, number in self._waiting:
            request = self._pool[number]
            pages = self._pages(request, self._slice_len)
            later = self._pages(request, self._slice_len + ahead) - pages
            fitting = [
                (ends_s[instance](request.length), instance)
                for instance, round_ in rounds.items()
                if free[instance] >= pages + (growth[instance] + later if round_.rows else 0)
                and len(round_.rows) < self._setup.max_rows
            ]
            if not fitting:
                break
            _, instance = min(fitting)
            self._lease(instance, number, pages)
            free[instance] -= pages
            growth[instance] += later
            rounds[instance].add(request, fresh=True)
            ends_s[instance] = self._ends_with_one(rounds[instance])
            taken += 1
        del self._waiting[:taken]

    def _mixed_s(self, sizes: _Sizes, fresh: _Sizes, steps: int) -> float:
        """Estimated seconds of rows of which the `fresh` prefill."""
        prefill_s = 0.0
        if fresh.rows:
            prefill_s = self.time.prefill.seconds(fresh.rows, self._length(fresh))
        return prefill_s + self.time.decode_s(sizes.rows, self._length(sizes), steps)

    def _length(self, sizes: _Sizes) -> int:
        mean = self._parameters.lengths == "mean"
        return round(sizes.tokens / sizes.rows) if mean else sizes.longest

    def _ends_s(self, round_: _Round) -> float:
        """Estimated seconds of a round with rows, as one batch."""
        return self._mixed_s(round_.sizes, round_.fresh_sizes, self._slice_len)

    def _ends_with_one(self, round_: _Round) -> Callable[[int], float]:
        """The same with one more row, which prefills, by its length; until the round changes.

        In closed form, for a plan asks for every request and instance.
        """
        sizes, fresh, steps = round_.sizes, round_.fresh_sizes, self._slice_len
        rows, fresh_rows = sizes.rows + 1, fresh.rows + 1
        tokens, fresh_tokens = sizes.tokens, fresh.tokens
        longest, fresh_longest = sizes.longest, fresh.longest
        prefill, decode = self.time.prefill, self.time.decode
        per_fresh = prefill.rows_length * fresh_rows + prefill.length
        per_token = steps * (decode.rows_length * rows + decode.length)
        once_s = prefill.seconds(fresh_rows, 0) + self.time.decode_s(rows, 0, steps)
        mean = self._parameters.lengths == "mean"

        def ends_s(length: int) -> float:
            if mean:
                at, fresh_at = (tokens + length) / rows, (fresh_tokens + length) / fresh_rows
                at, fresh_at = round(at), round(fresh_at)
            else:
                at, fresh_at = max(longest, length), max(fresh_longest, length)
            return once_s + per_fresh * fresh_at + per_token * at

        return ends_s

    def _move(self, rounds: dict[int, _Round]) -> None:
        """Resident requests go where they end their slice so much earlier that it is worth it."""
        for _ in range(self._parameters.most_moves):
            source = self._latest(rounds)
            if source is None:
                return
            ends_s, holder, request = source
            pages = self._pages(request, self._slice_len)
            others = [it for it in rounds if it != holder and self._free(it) >= pages]
            if not others:
                return
            ends_there_s = {it: self._ends_with_one(rounds[it])(request.length) for it in others}
            there = min(others, key=ends_there_s.__getitem__)
            recompute_s = self.time.prefill.seconds(1, request.length)
            gain_s = ends_s - ends_there_s[there]
            if gain_s <= self._parameters.move_gain * recompute_s:
                return
            self._forget(request)
            if holder in rounds:
                rounds[holder].remove(request)
            self._lease(there, request.number, pages)
            rounds[there].add(request, fresh=True)

    def _latest(self, rounds: dict[int, _Round]) -> tuple[float, int, PoolRequest] | None:
        """Of all instances with pooled residents the one whose residents end their next slice last:
        when, which instance, and its resident that is cheapest to move."""
        found = []
        for instance, load_s in enumerate(self._loads.seconds()):
            residents = self._residents[instance]
            if not residents:
                continue
            if instance in rounds:
                if len(rounds[instance].rows) < 2:
                    continue
                ends_s = self._ends_s(rounds[instance])
            else:
                sizes = _Sizes.of(residents.values())
                ends_s = load_s + self._mixed_s(sizes, _Sizes(), self._slice_len)
            found.append((ends_s, -instance))
        if not found:
            return None
        ends_s, instance = max(found)
        shortest = min(self._residents[-instance].values(), key=lambda it: (it.length, it.number))
        return ends_s, -instance, shortest

    def _batches(self, instance: int, round_: _Round) -> Iterable[Batch]:
        """The round as batches, dispatched."""
        if not round_.rows:
            return
        rows = sorted(round_.rows.values(), key=lambda it: (it.length, it.arrival_s, it.number))
        ends = cheapest_mixed_cuts(
            np.array([request.length for request in rows]),
            np.array([request.number in round_.fresh for request in rows]),
            self.time,
            by_mean=self._parameters.lengths == "mean",
            most_rows=self._setup.max_rows,
            steps=self._slice_len,
        )
        drops = tuple(round_.drops)
        for begin, end in zip([0, *ends], ends, strict=False):
            yield self._send(instance, rows[begin:end], round_.fresh, drops)
            drops = ()

    def _send(
        self, instance: int, rows: Sequence[PoolRequest], fresh: set[int], drops: tuple[int, ...]
    ) -> Batch:
        prefills = [request for request in rows if request.number in fresh]
        for request in rows:
            self._residents[instance].pop(request.number, None)
        sizes = _Sizes.of(rows), _Sizes.of(prefills)
        batch = self._dispatch(
            instance,
            rows,
            steps=min(self._slice_len, max(it.max_output - it.made for it in rows)),
            estimate_s=self._mixed_s(*sizes, self._slice_len),
            prefills=prefills,
            drops=drops,
        )
        self._sizes_of[batch.ticket] = sizes
        return batch
