"""Requests that follow one another: conversations, questions about a document, thoughts.

Knows no arrivals.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxserve.schedulers.parameters import not_negative, positive, require
from jaxserve.workload.generators.lengths import Lengths
from jaxserve.workload.generators.streams import SHARED, Purpose, Streams, zipf
from jaxserve.workload.generators.traffic import Traffic, check_traffic
from jaxserve.workload.generators.turns import Starts, Turn, drawn, thinking, whole


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
            users = drawn(streams, client, Purpose.PROMPT, user)
            outputs = drawn(streams, client, Purpose.OUTPUT, output)
            thinks = thinking(streams, client, self.think_s)
            for num_turns in drawn(streams, client, Purpose.TURNS, turns):
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
            asked = drawn(streams, client, Purpose.PROMPT, question)
            outputs = drawn(streams, client, Purpose.OUTPUT, output)
            thinks = thinking(streams, client, self.think_s)
            for number in drawn(streams, client, Purpose.TURNS, questions):
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
            thoughts = drawn(streams, client, Purpose.OUTPUT, thought)
            rng = streams.rng(client, Purpose.CHOICE)
            for tokens in drawn(streams, client, Purpose.PROMPT, problem):
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
