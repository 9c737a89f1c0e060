"""What generated requests look like: their lengths, what they share, and what follows what.

Knows no arrivals. Each content is a record of parameters with `texts`, a function from a client to
its endless starts. What several requests share is a whole number of blocks, rounded up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxserve.schedulers.parameters import not_negative, positive, require
from jaxserve.workload.generators.lengths import Lengths
from jaxserve.workload.generators.streams import SHARED, Purpose, Streams, zipf
from jaxserve.workload.generators.traffic import Traffic, check_traffic


class Turn(NamedTuple):
    """One request of a start, sent `offset_s` after it in an open loop."""

    offset_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    think_s: float | None = None


Starts = Callable[[int], Iterator[list[Turn]]]
"""starts(client): the turns of each of its starts, endless."""


def whole(tokens: int, block_size: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // block_size)


def _drawn(streams: Streams, client: int, purpose: Purpose, lengths: Lengths) -> Iterator[int]:
    return streams.values(client, purpose, lengths.draw)


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
            prompts = _drawn(streams, client, Purpose.PROMPT, prompt)
            outputs = _drawn(streams, client, Purpose.OUTPUT, output)
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
            owns = _drawn(streams, client, Purpose.PROMPT, own)
            outputs = _drawn(streams, client, Purpose.OUTPUT, output)
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
class Chat(Traffic):
    """Conversations of `turns` requests behind a common prompt of `system` tokens (0: none).

    Each prompt is the one before, its answer, and a message of `user` tokens. A message follows the
    answer after `think_s` on average (exponential); an open loop counts from the prompt before
    instead, and does not wait for the answer.
    """

    system: int = 256
    turns: str = "uniform:2,6"
    user: str = "lognormal:64,0.8,4,512"
    output: str = "lognormal:128,0.8,1,1024"
    think_s: float = 20.0

    def __post_init__(self) -> None:
        check_traffic(self)
        require(0 <= self.system <= 10**8, "system", self.system, "0 to 1e8")
        positive("think_s", self.think_s)
        self.lengths()

    def lengths(self) -> tuple[Lengths, Lengths, Lengths]:
        turns = Lengths.parse("turns", self.turns)
        return turns, Lengths.parse("user", self.user), Lengths.parse("output", self.output)

    def requests_per_start(self) -> float:
        return self.lengths()[0].average()

    def longest_tokens(self) -> int:
        turns, user, output = self.lengths()
        system = whole(self.system, self.block_size) * self.block_size
        return system + turns.most * (user.most + output.most)

    def texts(self, streams: Streams) -> Starts:
        turns, user, output = self.lengths()
        system = streams.blocks(SHARED).take(whole(self.system, self.block_size))

        def starts(client: int) -> Iterator[list[Turn]]:
            fresh = streams.blocks(client)
            users = _drawn(streams, client, Purpose.PROMPT, user)
            outputs = _drawn(streams, client, Purpose.OUTPUT, output)
            thinks = _thinking(streams, client, self.think_s)
            for num_turns in _drawn(streams, client, Purpose.TURNS, turns):
                session = []
                blocks, prompt, offset_s, think_s = system, len(system) * self.block_size, 0.0, None
                for _ in range(num_turns):
                    prompt += next(users)
                    # The last block is cut short by the prompt's end and goes on in the next turn.
                    blocks += fresh.take(whole(prompt, self.block_size) - len(blocks))
                    made = next(outputs)
                    session.append(Turn(offset_s, prompt, made, blocks, think_s))
                    prompt += made
                    think_s = next(thinks)
                    offset_s += think_s
                yield session

        return starts


def _thinking(streams: Streams, client: int, mean_s: float) -> Iterator[float]:
    return streams.values(client, Purpose.THINK, lambda rng, n: rng.exponential(mean_s, n))


@dataclass(frozen=True, slots=True)
class LongContextQa(Traffic):
    """`questions` in a row about one of `documents`, which is drawn by Zipf's law.

    A prompt is the document (`document` tokens) and the question; earlier answers are not in it.
    `think_s` is as in Chat.
    """

    documents: int = 16
    zipf: float = 1.0
    document: str = "lognormal:8192,0.5,1024,32768"
    questions: str = "uniform:2,5"
    question: str = "uniform:16,64"
    output: str = "lognormal:96,0.6,8,512"
    think_s: float = 10.0

    def __post_init__(self) -> None:
        check_traffic(self)
        require(1 <= self.documents <= 10**6, "documents", self.documents, "1 to 1000000")
        not_negative("zipf", self.zipf)
        positive("think_s", self.think_s)
        self.lengths()

    def lengths(self) -> tuple[Lengths, Lengths, Lengths, Lengths]:
        names = ("document", "questions", "question", "output")
        document, questions, question, output = (
            Lengths.parse(name, getattr(self, name)) for name in names
        )
        return document, questions, question, output

    def requests_per_start(self) -> float:
        return self.lengths()[1].average()

    def longest_tokens(self) -> int:
        document, _, question, output = self.lengths()
        whole_document = whole(document.most, self.block_size) * self.block_size
        return whole_document + question.most + output.most

    def texts(self, streams: Streams) -> Starts:
        document, questions, question, output = self.lengths()
        shared, rng = streams.blocks(SHARED), streams.rng(SHARED, Purpose.TEXTS)
        documents = [
            shared.take(whole(tokens, self.block_size))
            for tokens in document.draw(rng, self.documents).tolist()
        ]
        choose = zipf(self.documents, self.zipf)

        def starts(client: int) -> Iterator[list[Turn]]:
            chosen = streams.values(client, Purpose.CHOICE, choose)
            asked = _drawn(streams, client, Purpose.PROMPT, question)
            outputs = _drawn(streams, client, Purpose.OUTPUT, output)
            thinks = _thinking(streams, client, self.think_s)
            for number in _drawn(streams, client, Purpose.TURNS, questions):
                blocks = documents[next(chosen)]
                tokens = len(blocks) * self.block_size
                session = [Turn(0.0, tokens + next(asked), next(outputs), blocks)]
                offset_s = 0.0
                for _ in range(number - 1):
                    think_s = next(thinks)
                    offset_s += think_s
                    prompt = tokens + next(asked)
                    session.append(Turn(offset_s, prompt, next(outputs), blocks, think_s))
                yield session

        return starts


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
            questions = _drawn(streams, client, Purpose.TURNS, question)
            outputs = _drawn(streams, client, Purpose.OUTPUT, output)
            for item_tokens in _drawn(streams, client, Purpose.PROMPT, item):
                blocks = rubric + fresh.take(whole(item_tokens, self.block_size))
                tokens = len(blocks) * self.block_size
                yield [
                    Turn(0.0, tokens + next(questions), next(outputs), blocks)
                    for _ in range(self.judges)
                ]

        return starts


@dataclass(frozen=True, slots=True)
class TreeOfThoughts(Traffic):
    """A problem, `branch` thoughts about it, `branch` more about each of the `keep` best, and so
    on, `depth` levels deep.

    A prompt is the problem behind `system` tokens that all share, and the thoughts that lead to it,
    each to the end of its last block. Which thoughts are best is drawn. A level follows the one
    before after `step_s`; loop=sessions asks for one thought after the other.
    """

    system: int = 256
    problem: str = "uniform:64,256"
    thought: str = "uniform:64,256"
    branch: int = 3
    keep: int = 2
    depth: int = 3
    step_s: float = 5.0

    def __post_init__(self) -> None:
        check_traffic(self)
        require(0 <= self.system <= 10**8, "system", self.system, "0 to 1e8")
        require(1 <= self.branch <= 100, "branch", self.branch, "1 to 100")
        allowed = f"1 to {self.branch}, of so many thoughts on the first level"
        require(1 <= self.keep <= self.branch, "keep", self.keep, allowed)
        require(1 <= self.depth <= 100, "depth", self.depth, "1 to 100")
        positive("step_s", self.step_s)
        self.lengths()

    def lengths(self) -> tuple[Lengths, Lengths]:
        return Lengths.parse("problem", self.problem), Lengths.parse("thought", self.thought)

    def requests_per_start(self) -> float:
        return float(self.branch * (1 + self.keep * (self.depth - 1)))

    def longest_tokens(self) -> int:
        problem, thought = self.lengths()
        texts = (self.system, problem.most, *[thought.most] * (self.depth - 1))
        blocks = sum(whole(tokens, self.block_size) for tokens in texts)
        return blocks * self.block_size + thought.most

    def texts(self, streams: Streams) -> Starts:
        problem, thought = self.lengths()
        system = streams.blocks(SHARED).take(whole(self.system, self.block_size))

        def starts(client: int) -> Iterator[list[Turn]]:
            fresh = streams.blocks(client)
            thoughts = _drawn(streams, client, Purpose.OUTPUT, thought)
            rng = streams.rng(client, Purpose.CHOICE)
            for tokens in _drawn(streams, client, Purpose.PROMPT, problem):
                root = system + fresh.take(whole(tokens, self.block_size))
                yield self._tree(root, thoughts, fresh.take, rng)

        return starts

    def _tree(
        self,
        root: tuple[int, ...],
        thoughts: Iterator[int],
        take: Callable[[int], tuple[int, ...]],
        rng: np.random.Generator,
    ) -> list[Turn]:
        turns: list[Turn] = []
        kept = [root]
        for level in range(self.depth):
            made = []
            for blocks in kept:
                for _ in range(self.branch):
                    think_s = 0.0 if made else self.step_s
                    turn = Turn(
                        level * self.step_s,
                        len(blocks) * self.block_size,
                        next(thoughts),
                        blocks,
                        think_s if turns else None,
                    )
                    turns.append(turn)
                    made.append(turn)
            best = sorted(rng.choice(len(made), self.keep, replace=False).tolist())
            kept = [
                made[i].blocks + take(whole(made[i].output_tokens, self.block_size)) for i in best
            ]
        return turns
