"""The table of generators by name, and the workloads they make."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice, repeat
from types import MappingProxyType
from typing import Any, Final

from jaxserve.errors import ConfigError
from jaxserve.schedulers.parameters import explain, require
from jaxserve.schedulers.policy import not_found, read_options
from jaxserve.workload.generators.sessions import Chat, LongContextQa, TreeOfThoughts
from jaxserve.workload.generators.single import FairMix, Independent, Judge, SharedPrefix
from jaxserve.workload.generators.streams import MOST_PARTS, Purpose, Streams
from jaxserve.workload.generators.traffic import (
    client_names,
    client_rates,
    parse_weights,
    starts_s,
)
from jaxserve.workload.generators.turns import Turn
from jaxserve.workload.work import Work, Workload


@dataclass(frozen=True, slots=True)
class Mix:
    """Generators with their options, joined by "+": each is a part with its own clients."""

    parts: str = "chat rate=4 clients=3 + shared_prefix rate=8 clients=3 + judge rate=4 clients=2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """One generator. `parameters` is a record as `turns.py` describes; `gives` says what its
    requests have: prefixes, sessions (all may have clients)."""

    name: str
    summary: str
    parameters: type
    gives: tuple[str, ...] = ()


_GENERATORS: Final = (
    Generator(
        name="independent",
        summary="prompts that share nothing",
        parameters=Independent,
    ),
    Generator(
        name="shared_prefix",
        summary="each prompt begins with one of many texts, some far more often than others (Zipf)",
        parameters=SharedPrefix,
        gives=("prefixes",),
    ),
    Generator(
        name="fair_mix",
        summary="shared_prefix with 16 clients, prompts of about 512 tokens and outputs of 128",
        parameters=FairMix,
        gives=("prefixes",),
    ),
    Generator(
        name="chat",
        summary="conversations: each prompt holds the one before and its answer",
        parameters=Chat,
        gives=("prefixes", "sessions"),
    ),
    Generator(
        name="long_context_qa",
        summary="several questions in a row about one long document of a few",
        parameters=LongContextQa,
        gives=("prefixes", "sessions"),
    ),
    Generator(
        name="judge",
        summary="one item at a time, put to several judges at once behind a common rubric",
        parameters=Judge,
        gives=("prefixes",),
    ),
    Generator(
        name="tree_of_thoughts",
        summary="a problem, thoughts about it, thoughts about the best of them",
        parameters=TreeOfThoughts,
        gives=("prefixes", "sessions"),
    ),
    Generator(
        name="mix",
        summary="several of the others beside each other, each with clients of its own",
        parameters=Mix,
        gives=("prefixes", "sessions"),
    ),
)
GENERATORS: Final[Mapping[str, Generator]] = MappingProxyType(
    {generator.name: generator for generator in _GENERATORS}
)


def describe() -> list[str]:
    """All generators in a few lines each, for people."""
    lines = []
    for generator in GENERATORS.values():
        lines.append(f"{generator.name}: {generator.summary}")
        if generator.gives:
            lines.append(f"  gives: {', '.join(generator.gives)}")
        lines.append(f"  parameters: {', '.join(explain(generator.parameters))}")
    return lines


def generate(
    name: str, options: Sequence[str] = (), *, num_requests: int = 1000, seed: int = 0
) -> Workload:
    """The workload of a generator; `options` are such as "rate=8".

    Nothing but the requests that are under way is held. Raises ConfigError for a name, a parameter
    or a value that does not exist.
    """
    if num_requests < 1:
        raise ConfigError(f"num_requests: got {num_requests}; allowed: 1 or more")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed: got {seed}; allowed: 0 to 2**63 - 1")
    try:
        parts = _parts(name, options, seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    first = parts[0]
    longest_tokens = max(part.parameters.longest_tokens() for part in parts)
    has = {given for part in parts for given in part.generator.gives}
    settings = [*options] or ["defaults"]

    def requests() -> Iterator[Work]:
        return islice(_requests(parts), num_requests)

    return Workload(
        name=name,
        requests=requests,
        num_requests=num_requests,
        block_size=first.parameters.block_size if "prefixes" in has else 0,
        has_clients=sum(part.parameters.clients for part in parts) > 1,
        has_sessions="sessions" in has,
        rate=math.fsum(rate for part in parts for rate in client_rates(part.parameters)),
        longest_tokens=longest_tokens,
        described={"generator": name, "options": " ".join(settings), "seed": str(seed)},
    )


def check_generator(name: str, options: Sequence[str]) -> None:
    """Raises ConfigError for what `generate` would refuse."""
    generate(name, options)


@dataclass(frozen=True, slots=True)
class _Part:
    generator: Generator
    parameters: Any
    streams: Streams
    prefix: str = ""


def _parts(name: str, options: Sequence[str], seed: int) -> list[_Part]:
    generator = _find(name)
    parameters = _parameters(generator, options)
    if not isinstance(parameters, Mix):
        return [_Part(generator, parameters, Streams(seed))]
    texts = [text.split() for text in parameters.parts.split("+")]
    require(
        all(texts) and len(texts) <= MOST_PARTS,
        "parts",
        parameters.parts,
        f'1 to {MOST_PARTS} parts such as "chat rate=4 clients=3 + judge rate=1"',
    )
    parts = []
    for number, (inner, *inner_options) in enumerate(texts):
        require(inner != "mix", "parts", inner, "any generator but mix itself")
        generator = _find(inner)
        prefix = f"{inner}-{number + 1}:"
        streams = Streams(seed, number)
        parts.append(_Part(generator, _parameters(generator, inner_options), streams, prefix))
    sizes = [part.parameters.block_size for part in parts]
    require(len(set(sizes)) == 1, "block_size", sizes, "the same in all parts of a mix")
    return parts


def _find(name: str) -> Generator:
    if name not in GENERATORS:
        raise ValueError(not_found("workload", name, GENERATORS))
    return GENERATORS[name]


def _parameters(generator: Generator, options: Sequence[str]) -> Any:
    return read_options("workload", generator.parameters, options)


# One request before it has a number: (arrival, client of all parts, count of the client, turn,
# session). No two agree in the first three, so that tuples can be merged as they are.
_Event = tuple[float, int, int, Turn, str | None]


def _events(
    part: _Part, starts: Iterator[list[Turn]], client: int, rank: int, rate: float, name: str
) -> Iterator[_Event]:
    """One client's requests by arrival. Starts overlap, so their later turns wait in a heap."""
    ahead: list[_Event] = []
    counter = count()
    named = "sessions" in part.generator.gives
    times_s = starts_s(part.parameters, part.streams, client, rate)
    for number, (start_s, turns) in enumerate(zip(times_s, starts, strict=False)):
        while ahead and ahead[0][0] <= start_s:
            yield heapq.heappop(ahead)
        session = f"{name}/{number}" if named else None
        yield start_s, rank, next(counter), turns[0], session
        for turn in turns[1:]:
            event = (start_s + turn.offset_s, rank, next(counter), turn, session)
            heapq.heappush(ahead, event)


def _requests(parts: Sequence[_Part]) -> Iterator[Work]:
    lines, names, weights, ends = [], [], [], []
    for part in parts:
        traffic = part.parameters
        per_start = traffic.requests_per_start()
        starts = traffic.texts(part.streams)
        rates = client_rates(traffic)
        named = zip(client_names(traffic, part.prefix), cycle(parse_weights(traffic.weights)))
        for client, (name, weight) in zip(range(traffic.clients), named, strict=False):
            rate = rates[client] / per_start
            lines.append(_events(part, starts(client), client, len(names), rate, name))
            names.append(name)
            weights.append(weight)
            ends.append(_patience(part, client))
    for number, (arrival_s, rank, _, turn, session) in enumerate(heapq.merge(*lines)):
        deadline_s, abort_s = next(ends[rank])
        yield Work(
            number=number,
            arrival_s=arrival_s,
            prompt_tokens=turn.prompt_tokens,
            output_tokens=turn.output_tokens,
            max_tokens=turn.output_tokens,
            client=names[rank],
            weight=weights[rank],
            blocks=turn.blocks,
            session=session,
            deadline_s=deadline_s,
            abort_s=abort_s,
            think_s=turn.think_s,
        )


def _patience(part: _Part, client: int) -> Iterator[tuple[float | None, float | None]]:
    """Deadline and abort of each request of a client."""
    traffic = part.parameters
    deadline_s = traffic.deadline_s or None
    if not traffic.aborts:
        return repeat((deadline_s, None))

    def draw(rng, size):
        after_s = rng.exponential(traffic.abort_s, size)
        after_s[rng.random(size) >= traffic.aborts] = math.nan
        return after_s

    drawn = part.streams.values(client, Purpose.ABORTS, draw)
    return ((deadline_s, None if math.isnan(after_s) else after_s) for after_s in drawn)
