"""A live engine's run once more, from its event log: does the simulator decide as the engine did?

`jaxserve.engine.event_log.replay` feeds a core every call that the live core saw. Here it gets what
came from outside alone: when requests and aborts came, when the host took its turns, when slices
were done, and what each request made. Driver, core and device are simulated around that.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.clock import VirtualClock
from jaxserve.config import record_from_dict
from jaxserve.engine.buckets import Buckets, make_buckets
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.event_log import plan_to_json, read_events, request_from_json
from jaxserve.engine.plan import SlicePlan, SliceResult
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.request import FinishReason
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.sim.agenda import Agenda
from jaxserve.sim.host import After
from jaxserve.sim.modelled import ModelledExecutor, ModelledSlice, Outputs
from jaxserve.sim.replica import Command, SimulatedReplica


@dataclass(slots=True)
class Recorded:
    """What came from outside, and what the live engine made of it: plans and results as in the log.

    `commands` are (time, what was asked), `turns` the times at which the host planned.
    """

    config: CoreConfig
    commands: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    done_s: dict[int, float] = field(default_factory=dict)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=Outputs)


def read_recorded(path: str | Path) -> Recorded:
    """An event log. Raises ConfigError naming file, line and fault, and where seeds repeat."""
    events = read_events(path)
    recorded = Recorded(record_from_dict(CoreConfig, next(events)["config"]))
    seed_in: dict[int, int] = {}  # by slot
    seeds: dict[int, list[int | None]] = {}  # by slice, of its rows
    prompts: dict[int, int] = {}
    for event in events:
        now_s = event["now_s"]
        match event["event"]:
            case "submit" | "abort" | "limit":
                recorded.commands.append((now_s, event))
            case "slice":
                recorded.turns.append(now_s)
                plan = event["plan"]
                if plan is None:
                    continue
                recorded.plans.append(plan)
                for row in plan["rows"]:
                    if "start" in row:
                        start = row["start"]
                        if start["seed"] in recorded.outputs.end_length:
                            raise ConfigError(
                                f"{path}: two requests have seed {start['seed']}; allowed: a log"
                                " whose requests all have seeds of their own, which tell them apart"
                            )
                        seed_in[row["slot"]] = start["seed"]
                        prompts[start["seed"]] = len(start["prompt"])
                seeds[plan["number"]] = [_seed(row, seed_in) for row in plan["rows"]]
            case "complete":
                result = event["result"]
                recorded.done_s[result["number"]] = now_s
                recorded.results[result["number"]] = result
                _note_outputs(recorded.outputs, result, seeds.pop(result["number"]), prompts)
    return recorded


def _seed(row: dict[str, Any], seed_in: dict[int, int]) -> int | None:
    """Whose row it is; nobody's while its prompt is not at its end."""
    return None if "chunk" in row and "start" not in row else seed_in[row["slot"]]


def _note_outputs(
    outputs: Outputs, result: dict[str, Any], seeds: list[int | None], prompts: dict[int, int]
) -> None:
    for place, seed in enumerate(seeds):
        if seed is None:
            continue
        made = outputs.tokens[seed] = [*outputs.tokens.get(seed, ()), *result["tokens"][place]]
        if result["codes"][place]:
            outputs.end_length[seed] = prompts[seed] + len(made)


class _RecordedHost:
    """Takes its turns when the live host did."""

    def __init__(self, recorded: Recorded):
        self._turns, self._results = recorded.turns, recorded.results

    def turn_s(self, now_s: float, after: After, plan: SlicePlan | None) -> float:
        find = bisect_right if after is After.DISPATCH else bisect_left
        place = find(self._turns, now_s)
        return self._turns[place] if place < len(self._turns) else now_s

    def again_s(self, now_s: float) -> float | None:
        place = bisect_right(self._turns, now_s)
        return self._turns[place] if place < len(self._turns) else None

    def host_s(self, number: int, worked_s: float) -> float:
        live = self._results.get(number)
        return worked_s if live is None else live["host_s"]


class _RecordedTime:
    """No model: the device says what was measured."""

    def slice_s(self, shape: SliceShape) -> float:
        return 0.0

    def host_s(self, shape: SliceShape) -> float:
        return 0.0


class _RecordedDevice:
    """Decides what a slice does as the modelled device does; it is done when the live one was."""

    def __init__(self, recorded: Recorded, clock: VirtualClock):
        config = recorded.config
        scheduler = config.scheduler
        buckets = make_buckets(scheduler.max_rows, -(-scheduler.max_prefill_tokens // config.tile))
        self._recorded = recorded
        self._clock = clock
        self._device = ModelledExecutor(
            _RecordedTime(),
            recorded.outputs,
            clock,
            buckets=Buckets(buckets, tile=config.tile),
            vocab_size=config.limits.vocab_size,
        )

    def dispatch(self, plan: SlicePlan) -> ModelledSlice:
        ticket = self._device.dispatch(plan)
        live = self._recorded.results.get(plan.number)
        if live is not None:
            ticket.ready_s = max(ticket.begin_s, self._recorded.done_s[plan.number])
            for name in ("slice_s", "rows_run", "prefill_run"):
                setattr(ticket.result, name, live[name])
        return ticket

    def wait(self, ticket: ModelledSlice) -> SliceResult:
        return ticket.result

    def delay(self, seconds: float, tickets: Sequence[ModelledSlice]) -> None:
        raise AssertionError("what was measured is not delayed again")


def rerun(recorded: Recorded) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs (plan of the live engine, plan of the simulated one), as JSON, in order of dispatch."""
    agenda = Agenda()
    plans: list[dict[str, Any]] = []

    def make_device(clock: VirtualClock) -> _Noting:
        return _Noting(_RecordedDevice(recorded, clock), plans)

    replica = SimulatedReplica(
        EngineCore(recorded.config),
        make_device,
        _RecordedHost(recorded),
        agenda,
        on_deltas=lambda deltas: None,
        on_refusal=lambda request_id, error: None,
        on_slice=lambda plan, ticket: None,
    )
    for at_s, event in recorded.commands:
        agenda.at(at_s, replica.command, _command(event, at_s))
    while agenda.run(1):
        pass
    yield from zip(recorded.plans, plans, strict=False)


class _Noting:
    """A device whose plans are kept, as they were when they were dispatched."""

    def __init__(self, device: _RecordedDevice, plans: list[dict[str, Any]]):
        self._device, self._plans = device, plans

    def dispatch(self, plan: SlicePlan) -> ModelledSlice:
        self._plans.append(plan_to_json(plan))
        return self._device.dispatch(plan)

    def wait(self, ticket: ModelledSlice) -> SliceResult:
        return self._device.wait(ticket)

    def delay(self, seconds: float, tickets: Sequence[ModelledSlice]) -> None:
        self._device.delay(seconds, tickets)


def _command(event: dict[str, Any], at_s: float) -> Command:
    """A logged command. The host takes those that have come together one after the other: `at_s` is
    when it took this one."""

    def submit(core: EngineCore, now_s: float) -> None:
        try:
            core.submit(request_from_json(event["request"]), at_s)
        except JaxserveError:
            pass  # it was refused then, too

    def abort(core: EngineCore, now_s: float) -> None:
        core.abort(
            event["request_id"],
            sample=event["sample"],
            reason=FinishReason(event["reason"]),
            keep_tokens=event["keep_tokens"],
        )

    def limit(core: EngineCore, now_s: float) -> None:
        core.limit_row(event["request_id"], event["sample"], event["max_steps"])

    return {"submit": submit, "abort": abort, "limit": limit}[event["event"]]
