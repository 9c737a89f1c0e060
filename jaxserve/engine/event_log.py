"""What went into a core and what it planned, one JSON object a line, so that it can be replayed.

One schema, `jaxserve.events/2`. Every line has `event` and `now_s`:
    open      schema, and the core's configuration
    submit    a request
    abort, limit
    slice     a plan, or null when there was nothing to run (planning may still change things)
    complete  a slice's result
Replaying the inputs (submit, abort, limit, complete) into a fresh core gives the same plans.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxserve.config import record_from_dict
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan, SliceResult
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.request import FinishReason, Request, SamplingParams

SCHEMA = "jaxserve.events/2"


class EventLog:
    """Appends events to a file; `close` or process end leaves whole lines."""

    def __init__(self, path: str, config: CoreConfig):
        self._file: TextIO = open(path, "w", buffering=1 << 16)
        self._write("open", 0.0, schema=SCHEMA, config=dataclasses.asdict(config))

    def submit(self, now_s: float, request: Request) -> None:
        self._write("submit", now_s, request=request_to_json(request))

    def abort(
        self,
        now_s: float,
        request_id: str,
        sample: int,
        reason: FinishReason,
        keep_tokens: int | None,
    ) -> None:
        fields = {"sample": sample, "reason": reason.value, "keep_tokens": keep_tokens}
        self._write("abort", now_s, request_id=request_id, **fields)

    def limit(self, now_s: float, request_id: str, sample: int, max_steps: int) -> None:
        self._write("limit", now_s, request_id=request_id, sample=sample, max_steps=max_steps)

    def slice(self, now_s: float, plan: SlicePlan | None) -> None:
        self._write("slice", now_s, plan=None if plan is None else plan_to_json(plan))

    def complete(self, now_s: float, result: SliceResult) -> None:
        self._write("complete", now_s, result=result_to_json(result))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: str, now_s: float, **fields: Any) -> None:
        json.dump({"event": event, "now_s": now_s, **fields}, self._file, separators=(",", ":"))
        self._file.write("\n")


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events of a log, in order. Raises ConfigError naming file, line and fault."""
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                event = json.loads(line)
                if number == 1 and event.get("schema") != SCHEMA:
                    raise ValueError(f"schema is {event.get('schema')!r}, wanted {SCHEMA!r}")
            except (ValueError, AttributeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
            yield event


def replay(events: Iterator[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Feed a log's inputs to a fresh core; yields pairs (plan logged, plan made) as JSON."""
    core = EngineCore(record_from_dict(CoreConfig, next(events)["config"]))
    for event in events:
        now_s = event["now_s"]
        match event["event"]:
            case "submit":
                try:
                    core.submit(request_from_json(event["request"]), now_s)
                except JaxserveError:
                    pass  # it was refused then, too
            case "abort":
                core.abort(
                    event["request_id"],
                    sample=event["sample"],
                    reason=FinishReason(event["reason"]),
                    keep_tokens=event["keep_tokens"],
                )
            case "limit":
                core.limit_row(event["request_id"], event["sample"], event["max_steps"])
            case "slice":
                plan = core.next_slice(now_s)
                yield event["plan"], None if plan is None else plan_to_json(plan)
            case "complete":
                core.complete(result_from_json(event["result"]), now_s)
                core.take_deltas()


def request_to_json(request: Request) -> dict[str, Any]:
    fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    fields["prompt"] = request.prompt.tolist()
    fields["params"] = params_to_json(request.params)
    fields["page_keys"] = [key.hex() for key in request.page_keys]
    return fields


def request_from_json(fields: dict[str, Any]) -> Request:
    fields = dict(fields)
    fields["prompt"] = np.array(fields["prompt"], np.int32)
    fields["params"] = params_from_json(fields["params"])
    fields["page_keys"] = tuple(bytes.fromhex(key) for key in fields["page_keys"])
    return Request(**fields)


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """Only what differs from the defaults, so that plans stay small."""
    default = SamplingParams()
    names = [f.name for f in dataclasses.fields(params)]
    return {
        name: dict(value) if name == "logit_bias" else value
        for name in names
        if (value := getattr(params, name)) != getattr(default, name)
    }


def params_from_json(fields: dict[str, Any]) -> SamplingParams:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(k): v for k, v in fields["logit_bias"].items()}
    return SamplingParams(**fields)


def plan_to_json(plan: SlicePlan) -> dict[str, Any]:
    return {
        "number": plan.number,
        "steps": plan.steps,
        "quorum": plan.quorum,
        "copies": [list(copy) for copy in plan.copies],
        "rows": [_row_to_json(row) for row in plan.rows],
    }


def _row_to_json(row: RowPlan) -> dict[str, Any]:
    fields: dict[str, Any] = {"slot": row.slot, "steps": row.steps, "cover": row.cover}
    fields["pages"] = list(row.pages)
    if row.chunk is not None:
        fields["chunk"] = {"start": row.chunk.start, "tokens": row.chunk.tokens.tolist()}
    if row.start is not None:
        start = row.start
        fields["start"] = {
            "params": params_to_json(start.params),
            "seed": start.seed,
            "max_length": start.max_length,
            "prompt": start.prompt.tolist(),
            "made": list(start.made),
        }
    return fields


def plan_from_json(fields: dict[str, Any]) -> SlicePlan:
    return SlicePlan(
        number=fields["number"],
        steps=fields["steps"],
        quorum=fields["quorum"],
        rows=tuple(_row_from_json(row) for row in fields["rows"]),
        copies=tuple((source, target) for source, target in fields["copies"]),
    )


def _row_from_json(fields: dict[str, Any]) -> RowPlan:
    chunk, start = fields.get("chunk"), fields.get("start")
    return RowPlan(
        slot=fields["slot"],
        steps=fields["steps"],
        cover=fields["cover"],
        pages=fields["pages"],
        chunk=Chunk(np.array(chunk["tokens"], np.int32), chunk["start"]) if chunk else None,
        start=RowStart(
            params=params_from_json(start["params"]),
            seed=start["seed"],
            max_length=start["max_length"],
            prompt=np.array(start["prompt"], np.int32),
            made=tuple(start["made"]),
        )
        if start
        else None,
    )


def result_to_json(result: SliceResult) -> dict[str, Any]:
    """Without log-probabilities, which no plan depends on."""
    return {
        "number": result.number,
        "steps_run": result.steps_run,
        "tokens": result.tokens,
        "codes": result.codes,
        "slice_s": result.slice_s,
        "host_s": result.host_s,
        "rows_run": result.rows_run,
        "prefill_run": result.prefill_run,
    }


def result_from_json(fields: dict[str, Any]) -> SliceResult:
    return SliceResult(**fields)
