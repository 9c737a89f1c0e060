"""One replica in virtual time: the engine core, and what driver and device do around it.

The host does one thing at a time. It takes commands, plans and dispatches until the core has enough
in flight; it hands on what became known; it waits for the oldest slice and parses it. What arrives
while it is busy or waits is seen when it next takes commands. That is `jaxserve/engine/driver.py`,
turn by turn.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxserve.clock import VirtualClock
from jaxserve.engine.core import EngineCore
from jaxserve.engine.plan import SlicePlan, SliceResult
from jaxserve.errors import JaxserveError
from jaxserve.request import Delta, Request
from jaxserve.sim.agenda import Agenda
from jaxserve.sim.host import After, Host
from jaxserve.sim.modelled import ModelledSlice

OnDeltas = Callable[[Sequence[Delta]], None]
OnRefusal = Callable[[str, JaxserveError], None]
OnSlice = Callable[[SlicePlan, ModelledSlice], None]

Command = Callable[[EngineCore, float], None]


@runtime_checkable
class Device(Protocol):
    """An executor in virtual time."""

    def dispatch(self, plan: SlicePlan) -> ModelledSlice: ...

    def wait(self, ticket: ModelledSlice) -> SliceResult: ...

    def delay(self, seconds: float, tickets: Sequence[ModelledSlice]) -> None: ...


class SimulatedReplica:
    """A core, its device and its host; `host_overlaps`: they do not share a core.

    `make_device` gets the replica's own clock, which runs ahead of the agenda while the host is
    busy. `on_slice` hears of every slice once it is parsed, `on_deltas` of what became known to
    the host, `on_refusal` of requests that the core refused. `received` counts requests.
    """

    def __init__(
        self,
        core: EngineCore,
        make_device: Callable[[VirtualClock], Device],
        host: Host,
        agenda: Agenda,
        *,
        host_overlaps: bool = True,
        on_deltas: OnDeltas,
        on_refusal: OnRefusal,
        on_slice: OnSlice,
    ):
        self.core = core
        self.received = 0
        self._clock = VirtualClock()
        self._device = make_device(self._clock)
        self._host, self._agenda, self._host_overlaps = host, agenda, host_overlaps
        self._on_deltas, self._on_refusal, self._on_slice = on_deltas, on_refusal, on_slice
        self._mailbox: list[Command] = []
        self._flights: deque[tuple[SlicePlan, ModelledSlice]] = deque()
        self._host_s = 0.0  # worked since the last slice was waited for
        self._idle = True
        self._down = False

    def submit(self, request: Request) -> None:
        """A request arrives."""
        self.command(lambda core, now_s: self._submit(core, request, now_s))

    def abort(self, request_id: str) -> None:
        """Somebody ends a request; it may be over."""

        def command(core: EngineCore, now_s: float) -> None:
            core.abort(request_id)

        self.command(command)

    def command(self, command: Command) -> None:
        """Something is asked of the core: command(core, now_s), when the host takes it."""
        self._mailbox.append(command)
        if self._idle:
            self._idle = False
            self._agenda.at(self._host.turn_s(self._agenda.now(), After.IDLE, None), self._turn)

    def stop(self) -> None:
        """The process is gone, with all it had."""
        self._down = True

    def _submit(self, core: EngineCore, request: Request, now_s: float) -> None:
        self.received += 1
        try:
            core.submit(request, now_s)
        except JaxserveError as error:
            self._on_refusal(request.request_id, error)

    def _turn(self) -> None:
        """The host is free: it takes commands, then plans and dispatches, or reports and waits."""
        if self._down:
            return
        now_s = self._agenda.now()
        if self._mailbox:
            commands, self._mailbox = self._mailbox, []
            for command in commands:
                command(self.core, now_s)
        while (plan := self.core.next_slice(now_s)) is not None:
            turn_s = self._clock.t = self._until(now_s, After.DISPATCH, plan)
            self._flights.append((plan, self._device.dispatch(plan)))
            if not self._agenda.reaches(turn_s):
                self._agenda.at(turn_s, self._turn)
                return
            now_s = turn_s  # and nothing has come
        deltas = self.core.take_deltas()
        if deltas:
            self._on_deltas(deltas)
        self._wait(now_s)

    def _until(self, now_s: float, after: After, plan: SlicePlan) -> float:
        """The host is busy until then; where it works on the device's core, what runs is done
        later."""
        turn_s = self._host.turn_s(now_s, after, plan)
        self._host_s += turn_s - now_s
        if self._flights and not self._host_overlaps:
            ready_s = self._flights[-1][1].ready_s
            if ready_s > now_s and turn_s > now_s:
                busy_s = min(ready_s, turn_s) - now_s
                self._device.delay(busy_s, [ticket for _, ticket in self._flights])
        return turn_s

    def _wait(self, now_s: float) -> None:
        if self._flights:
            ready_s = max(now_s, self._flights[0][1].ready_s)
            again_s = self._host.again_s(now_s)
            if again_s is not None and again_s < ready_s:
                self._agenda.at(again_s, self._turn)
            else:
                self._agenda.at(ready_s, self._parse)
            return
        self._idle = True
        expiry_s = self.core.next_expiry_s() if self.core.jobs else None
        if expiry_s is not None:
            self._agenda.at(max(now_s, expiry_s), self._expire)

    def _expire(self) -> None:
        """A deadline or time-out has passed while nothing else happened."""
        if self._idle and not self._down:
            self._idle = False
            self._turn()

    def _parse(self) -> None:
        """The oldest slice is done."""
        if self._down:
            return
        plan, ticket = self._flights.popleft()
        now_s = self._clock.t = self._agenda.now()
        result = self._device.wait(ticket)
        result.host_s, self._host_s = self._host.host_s(plan.number, self._host_s), 0.0
        self.core.complete(result, now_s)
        self._on_slice(plan, ticket)
        turn_s = self._until(now_s, After.PARSE, plan)
        if self._agenda.reaches(turn_s):
            self._turn()
        else:
            self._agenda.at(turn_s, self._turn)
