"""A batch of requests through the engine alone: core, dispatch thread and executor; no server.

Knows what a driver is given and what it reports.
"""

import threading
from collections.abc import Sequence

import numpy as np

from jaxserve.bench.peers.protocol import Meter, WorkloadResult
from jaxserve.bench.peers.report import OURS
from jaxserve.bench.peers.workload import Request as Wanted
from jaxserve.clock import MonotonicClock
from jaxserve.config import EngineConfig
from jaxserve.engine.build import core_config
from jaxserve.engine.core import EngineCore, Rejection
from jaxserve.engine.driver import EngineDriver
from jaxserve.engine.executor import Executor
from jaxserve.models.info import ModelInfo
from jaxserve.request import Delta, Request, SamplingParams
from jaxserve.schedulers.estimators.serving_time import UNMEASURED_S


def run_batch(
    config: EngineConfig,
    executor: Executor,
    info: ModelInfo,
    wanted: Sequence[Wanted],
    *,
    dispatch_s: float = UNMEASURED_S,
) -> WorkloadResult:
    """Greedy, every output as long as asked for, from the first submission to the last token.
    `dispatch_s` is what an engine measures when it starts.

    Raises RuntimeError when a request is refused or the engine fails.
    """
    core = EngineCore(core_config(config, info.config, info.num_pages, dispatch_s))
    left, meter, over = len(wanted), Meter(), threading.Event()
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        over.set()

    def take(number: int, deltas: Sequence[Delta], rejections: Sequence[Rejection]) -> None:
        nonlocal left
        for delta in deltas:
            meter.add(len(delta.tokens))
            left -= delta.finish is not None
        for rejection in rejections:
            fail(rejection.error)
        if not left:
            over.set()

    driver = EngineDriver(
        core, executor, MonotonicClock(), info=info, on_report=take, on_failure=fail
    )
    driver.start()
    for number, each in enumerate(wanted):
        params = SamplingParams(temperature=0.0, max_tokens=each.output_tokens, ignore_eos=True)
        prompt = np.array(each.prompt_ids, np.int32)
        driver.submit(Request(request_id=str(number), prompt=prompt, params=params))
    over.wait()
    driver.stop()
    if failures:
        raise RuntimeError("the batch did not run to its end") from failures[0]
    return meter.result(OURS, "greedy", config={"rows": config.scheduler.max_rows})
