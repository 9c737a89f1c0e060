"""The pass of papers.md 3.2, written as it stands there, beside the one that keeps indices."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.schedulers.events import Admit, Arrive, Enact, Event, Misfit, Tick
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.toy_engine import ToyEngine, Work


class PlainDlpm:
    """Sorts everybody in each pass and walks down. For runs without preemptions and aborts."""

    def __init__(self, known: DlpmParameters):
        self.known = known
        self.credit: dict[str, float] = {}
        self.engine: ToyEngine | None = None  # which holds the queue, and knows the matches
        self.pass_: Iterator[int] = iter(())
        self.named: int | None = None
        self.fitted = False
        self.client_of: dict[int, str] = {}

    def on(self, event: Event) -> None:
        match event:
            case Tick():
                self.pass_, self.named = self.walk(), None
            case Arrive(number=number, client=client):
                newcomer = self.known.new_client_credit == "quantum"
                self.credit.setdefault(client, self.known.quantum if newcomer else 0.0)
                self.client_of[number] = client
            case Admit(number=number, num_extend_tokens=extend):
                self.credit[self.client_of[number]] -= self.known.w_in * extend
                self.fitted, self.named = True, None
            case Misfit():
                self.fitted = False
            case Enact(ran=ran):
                for number, _, made in ran:
                    self.credit[self.client_of[number]] -= self.known.w_out * made
            case _:
                pass

    def next(self) -> int | None:
        self.named = next(self.pass_, None)
        return self.named

    def waiting(self) -> Iterator[int]:
        return iter(self.by_match())

    def running(self) -> list[int]:
        assert self.engine is not None
        return list(self.engine.running)

    def walk(self) -> Iterator[int]:
        return self.mid_pass() if self.known.refill_when == "mid_pass" else self.end_of_pass()

    def end_of_pass(self) -> Iterator[int]:
        misfits: set[int] = set()
        while True:
            admitted = False
            for number in self.by_match():
                if self.credit[self.client_of[number]] <= 0 or number in misfits:
                    continue
                yield number
                if self.fitted:
                    admitted = True
                elif self.known.misfit == "stop":
                    return
                else:
                    misfits.add(number)
            if not admitted and (misfits.issuperset(self.by_match()) or not self.refill()):
                return

    def mid_pass(self) -> Iterator[int]:
        for number in self.by_match():
            client = self.client_of[number]
            if self.credit[client] <= 0:
                self.refill()
            if self.credit[client] > 0:
                yield number
                if not self.fitted and self.known.misfit == "stop":
                    return

    def by_match(self) -> list[int]:
        assert self.engine is not None
        works = self.engine.waiting.values()
        return [w.number for w in sorted(works, key=lambda w: (-self.match(w), w.number))]

    def match(self, work: Work) -> int:
        assert self.engine is not None
        return self.engine.match(work)

    def refill(self) -> bool:
        """Unless an active client has credit: rounds of a quantum, until one has."""
        assert self.engine is not None
        works = list(self.engine.waiting.values())
        if self.known.refill_scope == "queued_or_running":
            works += self.engine.running.values()
        active = {work.client for work in works}
        if any(self.credit[client] > 0 for client in active):
            return False
        while not any(self.credit[client] > 0 for client in active):
            for client, credit in self.credit.items():
                if credit <= 0:
                    self.credit[client] += self.known.quantum
        return True


TURNS = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.lists(st.sampled_from("xyz"), max_size=3),
            st.integers(1, 8),
        ),
        max_size=5,
    ),
    min_size=5,
    max_size=20,
)
KNOWN = st.builds(
    DlpmParameters,
    quantum=st.sampled_from([1.0, 3.0, 10.0, 40.0]),
    refill_scope=st.sampled_from(["queued", "queued_or_running"]),
    new_client_credit=st.sampled_from(["0", "quantum"]),
    charge_at=st.sampled_from(["admit", "enacted"]),
    refill_when=st.sampled_from(["end_of_pass", "mid_pass"]),
    misfit=st.sampled_from(["stop", "skip"]),
    max_skips=st.just(10**6),
)


@given(
    turns=TURNS,
    known=KNOWN,
    slots=st.integers(1, 5),
    room=st.sampled_from([0, 20, 30]),
    evicted=st.sampled_from([b"", b"x", b"y"]),
)
def test_every_pass_is_the_one_of_the_paper(turns, known, slots, room, evicted) -> None:
    plain = PlainDlpm(known)
    engines = [ToyEngine(order, slots, room=room) for order in (Dlpm(known), plain)]
    plain.engine = engines[1]
    number = 0
    for turn in turns:
        for client, pages, output in turn:
            number += 1
            for engine in engines:
                engine.arrive(Work(number, client, tuple(pages), output))
        assert engines[0].fill() == engines[1].fill()
        assert engines[0].misfits == engines[1].misfits
        assert engines[0].order.credits() == plain.credit
        for engine in engines:
            engine.step()
            if evicted in engine.cached:
                engine.evict(evicted)
