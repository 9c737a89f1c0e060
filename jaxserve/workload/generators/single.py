"""Requests that stand alone: what each prompt shares with others, and how long it is.

Knows no arrivals.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxserve.schedulers.parameters import not_negative, require
from jaxserve.workload.generators.lengths import Lengths
from jaxserve.workload.generators.streams import SHARED, Purpose, Streams, zipf
from jaxserve.workload.generators.traffic import Traffic, check_traffic
from jaxserve.workload.generators.turns import Starts, Turn, drawn, whole


@dataclass(frozen=True, slots=True)
class Independent(Traffic):
    """Prompts that share nothing."""

    prompt: str = "lognormal:512,0.8,16,4096"
    output: str = "lognormal:128,0.8,1,1024"

    def __post_init__(self) -> None:
        check_traffic(self)
        self.lengths()

    def lengths(self) -> tuple[Lengths, Lengths]:
        return Lengths.parse("prompt", self.prompt), Lengths.parse("output", self.output)

    def requests_per_start(self) -> float:
        return 1.0

    def longest_tokens(self) -> int:
        return sum(lengths.most for lengths in self.lengths())

    def texts(self, streams: Streams) -> Starts:
        prompt, output = self.lengths()

        def starts(client: int) -> Iterator[list[Turn]]:
            prompts = drawn(streams, client, Purpose.PROMPT, prompt)
            outputs = drawn(streams, client, Purpose.OUTPUT, output)
            return ([Turn(0.0, *lengths, ())] for lengths in zip(prompts, outputs, strict=True))

        return starts


@dataclass(frozen=True, slots=True)
class SharedPrefix(Traffic):
    """Each prompt is one of `prefixes` texts of `prefix` tokens and then `own` tokens.

    Which one is drawn by Zipf's law with exponent `zipf`. `owner` client: each client has so many
    prefixes of its own.
    """

    prefixes: int = 64
    zipf: float = 1.0
    owner: Literal["all", "client"] = "all"
    prefix: str = "uniform:256,512"
    own: str = "lognormal:128,0.8,8,1024"
    output: str = "lognormal:128,0.8,1,1024"

    def __post_init__(self) -> None:
        check_traffic(self)
        require(1 <= self.prefixes <= 10**6, "prefixes", self.prefixes, "1 to 1000000")
        not_negative("zipf", self.zipf)
        self.lengths()

    def lengths(self) -> tuple[Lengths, Lengths, Lengths]:
        prefix = Lengths.parse("prefix", self.prefix)
        return prefix, Lengths.parse("own", self.own), Lengths.parse("output", self.output)

    def requests_per_start(self) -> float:
        return 1.0

    def longest_tokens(self) -> int:
        prefix, own, output = self.lengths()
        return whole(prefix.most, self.block_size) * self.block_size + own.most + output.most

    def texts(self, streams: Streams) -> Starts:
        prefix, own, output = self.lengths()
        choose = zipf(self.prefixes, self.zipf)
        size = self.block_size

        def make_prefixes(client: int) -> list[tuple[int, ...]]:
            blocks = streams.blocks(client)
            lengths = prefix.draw(streams.rng(client, Purpose.TEXTS), self.prefixes).tolist()
            return [blocks.take(whole(tokens, size)) for tokens in lengths]

        common = make_prefixes(SHARED) if self.owner == "all" else []

        def starts(client: int) -> Iterator[list[Turn]]:
            prefixes = common or make_prefixes(client)
            chosen = streams.values(client, Purpose.CHOICE, choose)
            owns = drawn(streams, client, Purpose.PROMPT, own)
            outputs = drawn(streams, client, Purpose.OUTPUT, output)
            for choice, own_tokens, made in zip(chosen, owns, outputs, strict=True):
                blocks = prefixes[choice]
                yield [Turn(0.0, len(blocks) * size + own_tokens, made, blocks)]

        return starts


@dataclass(frozen=True, slots=True)
class FairMix(SharedPrefix):
    """SharedPrefix as it is used to measure fair and prefix-aware policies."""

    rate: float = 32.0
    clients: int = 16
    own: str = "uniform:64,192"
    output: str = "lognormal:128,0.6,8,768"


@dataclass(frozen=True, slots=True)
class Judge(Traffic):
    """One item at a time, put to `judges` at once: `rubric` tokens that all requests share, the
    item, and a question of each judge's own."""

    rubric: int = 512
    judges: int = 4
    item: str = "lognormal:512,0.6,64,4096"
    question: str = "uniform:16,48"
    output: str = "uniform:4,64"

    def __post_init__(self) -> None:
        check_traffic(self)
        require(1 <= self.rubric <= 10**8, "rubric", self.rubric, "1 to 1e8")
        require(1 <= self.judges <= 1000, "judges", self.judges, "1 to 1000")
        self.lengths()

    def lengths(self) -> tuple[Lengths, Lengths, Lengths]:
        item, question = Lengths.parse("item", self.item), Lengths.parse("question", self.question)
        return item, question, Lengths.parse("output", self.output)

    def requests_per_start(self) -> float:
        return float(self.judges)

    def longest_tokens(self) -> int:
        item, question, output = self.lengths()
        shared = whole(self.rubric, self.block_size) + whole(item.most, self.block_size)
        return shared * self.block_size + question.most + output.most

    def texts(self, streams: Streams) -> Starts:
        item, question, output = self.lengths()
        rubric = streams.blocks(SHARED).take(whole(self.rubric, self.block_size))

        def starts(client: int) -> Iterator[list[Turn]]:
            fresh = streams.blocks(client)
            questions = drawn(streams, client, Purpose.TURNS, question)
            outputs = drawn(streams, client, Purpose.OUTPUT, output)
            for item_tokens in drawn(streams, client, Purpose.PROMPT, item):
                blocks = rubric + fresh.take(whole(item_tokens, self.block_size))
                tokens = len(blocks) * self.block_size
                yield [
                    Turn(0.0, tokens + next(questions), next(outputs), blocks)
                    for _ in range(self.judges)
                ]

        return starts
