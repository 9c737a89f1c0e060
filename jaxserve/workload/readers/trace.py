"""A trace file as a workload: checked to its end before anything runs, then read as it is needed.

Knows rows, not formats: those are in the table `FORMATS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Final

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.schedulers.policy import not_found
from jaxserve.workload.readers import azure, jaxserve_jsonl, mooncake
from jaxserve.workload.readers.lines import Lines, Unquoted
from jaxserve.workload.readers.row import Format, Head, Row
from jaxserve.workload.work import Work, Workload

FORMATS: Final = MappingProxyType(
    {each.FORMAT.name: each.FORMAT for each in (jaxserve_jsonl, mooncake, azure)}
)
CLIENT_FROM: Final = ("auto", "client", "session", "none")
ANONYMOUS: Final = "anonymous"
_NO_BLOCK: Final = -1
_JITTER_STREAM: Final = 0


def read_trace(
    path: str,
    *,
    trace_format: str = "auto",
    client_from: str = "auto",
    jitter_s: float = 0.0,
    seed: int = 0,
    from_s: float = 0.0,
    until_s: float | None = None,
) -> Workload:
    """The trace at `path`, plain or gzip.

    `client_from` auto: clients of the trace, else its sessions, else none. `jitter_s`: a uniform
    delay of up to so much is added to each arrival, for stamps that are coarse (3 s in Mooncake's);
    turns of a session keep their order. Only arrivals in [`from_s`, `until_s`) are kept, and
    counted from `from_s`. A turn whose `think_s` the trace does not say thinks as long as passed
    between it and the turn before.

    Raises ConfigError with file, line and field for the first thing in it that is not allowed.
    """
    if client_from not in CLIENT_FROM:
        allowed = ", ".join(CLIENT_FROM)
        raise ConfigError(f"client_from: got {client_from!r}; allowed: {allowed}")
    lines = Lines(path)
    trace = _Trace(lines, _format(lines, trace_format), from_s, until_s)
    facts = trace.survey()
    if client_from == "auto":
        client_from = "client" if facts.clients else "session" if facts.sessions else "none"
    if client_from == "client" and not facts.clients:
        hint = "session" if facts.sessions else "none"
        raise ConfigError(f"client_from: got 'client', which {path} does not say; allowed: {hint}")
    if client_from == "session" and not facts.sessions:
        hint = "client" if facts.clients else "none"
        raise ConfigError(f"client_from: got 'session', which {path} lacks; allowed: {hint}")
    head = trace.head
    described = {"trace": path, **head.described, "clients": _CLIENTS_ARE[client_from]}
    if jitter_s:
        described["jitter"] = f"up to {jitter_s:g} s, seed {seed}"
    if from_s or until_s is not None:
        described["cut out"] = f"{from_s:g} s to {'the end' if until_s is None else until_s} "
    return Workload(
        name=head.name,
        requests=lambda: trace.requests(client_from, jitter_s, seed),
        num_requests=facts.num_requests,
        block_size=head.block_size if facts.blocks else 0,
        has_clients=client_from != "none",
        has_sessions=facts.sessions,
        rate=facts.rate,
        longest_tokens=facts.longest_tokens,
        described=described,
    )


_CLIENTS_ARE: Final = {"client": "of the trace", "session": "its sessions", "none": "not known"}


def _format(lines: Lines, name: str) -> Format:
    if name != "auto":
        if name not in FORMATS:
            raise ConfigError(not_found("trace_format", name, ("auto", *FORMATS)))
        return FORMATS[name]
    number, first = lines.first()
    for each in FORMATS.values():
        if each.matches(first):
            return each
    known = "; ".join(f"{each.name} ({each.summary})" for each in FORMATS.values())
    raise lines.error(number, "line", first.decode(errors="replace"), known)


@dataclass(slots=True)
class _Facts:
    num_requests: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    clients: bool = False
    sessions: bool = False
    blocks: bool = False
    longest_tokens: int = 0

    @property
    def rate(self) -> float:
        span_s = self.last_s - self.first_s
        return (self.num_requests - 1) / span_s if span_s > 0 else 0.0


class _Trace:
    def __init__(self, lines: Lines, told: Format, from_s: float, until_s: float | None):
        self._lines = lines
        self._format = told
        self._from_s = from_s
        self._until_s = until_s
        self.head: Head = told.head(lines)

    def survey(self) -> _Facts:
        """Reads and checks the whole file. Raises ConfigError."""
        facts = _Facts()
        parents: dict[int, int] = {}
        rows = self._checked(self._format.rows(self._lines), parents)
        for number, row in enumerate(self._inside(rows)):
            if number == 0:
                facts.first_s = row.arrival_s
            facts.num_requests += 1
            facts.last_s = row.arrival_s
            facts.clients |= row.client is not None
            facts.sessions |= row.session is not None
            facts.blocks |= bool(row.block_hashes)
            facts.longest_tokens = max(facts.longest_tokens, row.prompt_tokens + row.output_tokens)
        if not facts.num_requests:
            where = "" if not self._from_s and self._until_s is None else " in the window"
            raise ConfigError(
                f"trace: got {self._lines.path!r}, which has no requests{where}; allowed: 1 or more"
            )
        return facts

    def _inside(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            after = self._until_s is not None and row.arrival_s >= self._until_s
            if row.arrival_s >= self._from_s and not after:
                row.arrival_s -= self._from_s
                yield row

    def _checked(
        self, numbered: Iterator[tuple[int, Row]], parents: dict[int, int]
    ) -> Iterator[Row]:
        """Laws between fields and between rows. `parents` learns the block before each block."""
        arrival, _, _, hashes = self._format.fields
        size = self.head.block_size
        last_s = 0.0
        for number, row in numbered:
            if row.arrival_s < last_s:
                allowed = f"{last_s:g} or later, as on the line before; try to sort by it"
                raise self._lines.error(number, arrival, row.arrival_s, allowed)
            last_s = row.arrival_s
            blocks = row.block_hashes
            if blocks:
                most = -(-row.prompt_tokens // size) if size else 0
                if len(blocks) > most:
                    got = Unquoted(f"{len(blocks)} blocks")
                    allowed = (
                        f"at most {most}, blocks of {size} tokens in a prompt of"
                        f" {row.prompt_tokens}"
                        if size
                        else "none, for meta.block_size is not set"
                    )
                    raise self._lines.error(number, hashes, got, allowed)
                before = (_NO_BLOCK, *blocks[:-1])
                if tuple(map(parents.setdefault, blocks, before)) != before:
                    raise self._broken_chain(number, blocks, before, parents)
            yield row

    def _broken_chain(
        self, number: int, blocks: tuple[int, ...], before: tuple[int, ...], parents: dict[int, int]
    ) -> ConfigError:
        pairs = zip(blocks, before, strict=True)
        block, got = next((block, was) for block, was in pairs if parents[block] != was)
        words = [
            "at the beginning" if was == _NO_BLOCK else f"behind {was}"
            for was in (got, parents[block])
        ]
        return self._lines.error(
            number,
            self._format.fields[3],
            Unquoted(f"block {block} {words[0]}"),
            f"{words[1]}, as earlier: an id stands for the whole prompt up to its end; try to"
            " number the blocks by all tokens before them",
        )

    def requests(self, client_from: str, jitter_s: float, seed: int) -> Iterator[Work]:
        rows = self._inside(row for _, row in self._format.rows(self._lines))
        if jitter_s:
            rows = _jittered(rows, jitter_s, seed)
        last_turn_s: dict[str, float] = {}
        for number, row in enumerate(rows):
            client = row.client if client_from == "client" else None
            session, think_s = row.session, row.think_s
            if session is not None:
                before_s = last_turn_s.get(session)
                if think_s is None and before_s is not None:
                    think_s = row.arrival_s - before_s
                last_turn_s[session] = row.arrival_s
                if client_from == "session":
                    client = session
            yield Work(
                number=number,
                arrival_s=row.arrival_s,
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                max_tokens=max(row.max_tokens or 0, row.output_tokens),
                client=ANONYMOUS if client is None else client,
                weight=1.0 if row.weight is None else row.weight,
                blocks=row.block_hashes or (),
                session=session,
                priority=row.priority or 0,
                deadline_s=row.deadline_s,
                abort_s=row.abort_s,
                think_s=think_s,
            )


def _jittered(rows: Iterator[Row], jitter_s: float, seed: int) -> Iterator[Row]:
    """Rows by their new arrivals; only those within a delay of each other are held."""
    stream = np.random.SeedSequence(seed, spawn_key=(_JITTER_STREAM,))
    rng = np.random.default_rng(stream)
    last_turn_s: dict[str, float] = {}
    ahead: list[tuple[float, int, Row]] = []
    for number, row in enumerate(rows):
        while ahead and ahead[0][0] <= row.arrival_s:
            yield heappop(ahead)[2]
        at_s = row.arrival_s + jitter_s * rng.random()
        if row.session is not None:
            at_s = max(at_s, last_turn_s.get(row.session, 0.0))
            last_turn_s[row.session] = at_s
        row.arrival_s = at_s
        heappush(ahead, (at_s, number, row))
    while ahead:
        yield heappop(ahead)[2]
