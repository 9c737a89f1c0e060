"""The table of SCLS against its baselines, simulated: what is run, on what device, what is counted.

Set-up after the paper's, as far as it is known (papers.md 1.10): 8 instances of LLaMA2-13B on
A100-80GB, lengths cut to 1,024 prompt and 1,024 output tokens. Everything runs as `jaxserve
simulate` runs it, by the committed profile, which is computed: nothing here was measured on an
A100.
"""

import statistics
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.profile import Profile, find_profile
from jaxserve.report.recorder import Recorder
from jaxserve.schedulers.estimators.bilinear import Bilinear
from jaxserve.schedulers.estimators.fitted_time import FitError
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.roofline_time import RooflineTime
from jaxserve.schedulers.pool.catalog import make_pool
from jaxserve.schedulers.pool.planner import PoolSetup
from jaxserve.schedulers.pool.request import PoolRequest
from jaxserve.schedulers.presets import fill_fleet_preset
from jaxserve.sim.run import Deployment, simulate
from jaxserve.sim_config import SimConfig
from jaxserve.workload.feed import Feed
from jaxserve.workload.readers import read_trace
from jaxserve.workload.scaling import scaled
from jaxserve.workload.work import Workload

PROFILE: Final = "a100-llama2-13b-bf16"
REPLICAS: Final = 8
MOST_INPUT: Final = 1024
MOST_OUTPUT: Final = 1024
SLICE_LENS: Final = (16, 32, 64, 128, 256, 512, 1024)
STEPS: Final = ("so", "pm", "ab", "lb")
ZETA: Final = 0.9
MOST_ROWS: Final = 512
PUBLISHED: Final = "+315.8 % at most over SLS and ILS (arXiv 2406.13511)"


def profile_of(*, overhead_s: float = 0.0, noise: float = 0.0) -> Profile:
    """The committed profile with so many seconds more in every step, as slow engines have, and
    slices that scatter by `noise` (relative distance from the median)."""
    profile = find_profile(PROFILE)
    assert isinstance(profile.time, RooflineTime)
    assumed = profile.time.assumed
    slower = replace(assumed, step_s=assumed.step_s + overhead_s)

    def later(model: Bilinear) -> Bilinear:
        return replace(model, fixed=model.fixed + overhead_s)

    estimate = profile.bilinear
    return replace(
        profile,
        time=replace(profile.time, assumed=slower),
        bilinear=replace(estimate, prefill=later(estimate.prefill), decode=later(estimate.decode)),
        errors=replace(profile.errors, spread=FitError(noise, noise, 0)),
    )


def safe_rows(profile: Profile) -> int:
    """B of SLS unless given, and the cap of ILS: rows that fit whatever they make."""
    assert profile.num_pages is not None
    return int(ZETA * profile.num_pages * profile.page_size) // (MOST_INPUT + MOST_OUTPUT)


@dataclass(frozen=True, slots=True)
class Windows:
    """A trace from which windows are cut."""

    path: str
    arrivals_s: Sequence[float]

    @classmethod
    def of(cls, path: str) -> "Windows":
        return cls(path, [work.arrival_s for work in read_trace(path).requests()])

    def window(self, *, count: int, rate: float, seed: int) -> Workload:
        """`count` requests in a row from a random place of the trace, at `rate` requests/s, cut to
        the longest allowed."""
        count = min(count, len(self.arrivals_s))
        last = len(self.arrivals_s) - count
        first = int(np.random.default_rng(seed).integers(0, last + 1))
        trace = read_trace(self.path, from_s=self.arrivals_s[first])
        window = scaled(
            trace,
            num_requests=min(count, trace.num_requests),
            rate=rate,
            most_prompt=MOST_INPUT,
            most_output=MOST_OUTPUT,
            max_tokens=MOST_OUTPUT,
        )
        requests = list(window.requests())  # read once, run by every policy
        return replace(window, requests=lambda: iter(requests))


class Outcome(Recorder):
    """What a run came to: sums and gaps alone, for a table has hundreds of runs."""

    def __init__(self) -> None:
        super().__init__(keep_rows=False, keep_slices=0)
        self.sent_s: dict[int, float] = {}
        self.heard_s: dict[int, float] = {}
        self.first_s, self.gaps_s, self.responses_s = array("d"), array("d"), array("d")
        self.busy_s: dict[int, float] = {}
        self.ends_s: dict[int, float] = {}
        self.tokens = self.pad_tokens = self.invalid_tokens = self.prefill_tokens = 0
        self.slice_rows = array("d")

    def sent(self, work: Any, at_s: float) -> None:
        self.sent_s[work.number] = at_s

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        before_s = self.heard_s.get(number)
        if before_s is None:
            self.first_s.append(at_s - self.sent_s[number])
        else:
            self.gaps_s.append(at_s - before_s)
        self.heard_s[number] = at_s

    def ended(
        self,
        number: int,
        at_s: float,
        reason: str,
        cached_tokens: int,
        *,
        replica: int | None = None,
        queue_s: float | None = None,
    ) -> None:
        assert reason in ("stop", "length"), f"request {number} ended by {reason}"
        self.responses_s.append(at_s - self.sent_s[number])

    def slice(
        self,
        replica: int,
        begin_s: float,
        end_s: float,
        *,
        steps: int,
        rows: int,
        prefill_tokens: int,
        output_tokens: int,
        pad_tokens: int = 0,
        invalid_tokens: int = 0,
    ) -> None:
        self.busy_s[replica] = self.busy_s.get(replica, 0.0) + end_s - begin_s
        self.ends_s[replica] = end_s
        self.tokens += output_tokens
        self.prefill_tokens += prefill_tokens
        self.pad_tokens += pad_tokens
        self.invalid_tokens += invalid_tokens
        self.slice_rows.append(rows)

    def summary(self) -> dict[str, float]:
        """The numbers of a line: requests/s, seconds, tokens a request; CT STD in seconds, CV of
        the instances' busy time."""
        count, last_s = len(self.responses_s), max(self.ends_s.values())
        errors = [it["estimator_error"] for it in self.replicas.values() if "estimator_error" in it]
        busy_s = [self.busy_s.get(replica, 0.0) for replica in range(REPLICAS)]
        ends_s = [self.ends_s.get(replica, 0.0) for replica in range(REPLICAS)]
        summary = {
            "requests_per_s": count / last_s,
            "tokens_per_s": self.tokens / last_s,
            "mean_s": statistics.fmean(self.responses_s),
            "p95_s": float(np.quantile(self.responses_s, 0.95)),
            "ttft_s": statistics.fmean(self.first_s),
            "gap_p99_s": float(np.quantile(self.gaps_s, 0.99)) if self.gaps_s else 0.0,
            "pad_per_request": self.pad_tokens / count,
            "invalid_per_request": self.invalid_tokens / count,
            "prefill_per_request": self.prefill_tokens / count,
            "rows_per_batch": statistics.fmean(self.slice_rows),
            "ct_std_s": statistics.pstdev(ends_s),
            "busy_cv": statistics.pstdev(busy_s) / statistics.fmean(busy_s),
            "preemptions": sum(it.get("preemptions", 0) for it in self.replicas.values()) / count,
        }
        return summary | ({"estimator_error": statistics.fmean(errors)} if errors else {})


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table; `slice_len` 0: it has none."""

    name: str
    slice_len: int = 0

    def run(
        self, workload: Workload, profile: Profile, *, sls_rows: int = 0, seed: int = 0
    ) -> Outcome:
        """`sls_rows` is B of sls, 0: `safe_rows`."""
        outcome = Outcome()
        deployment = self.deployment(profile, sls_rows=sls_rows, seed=seed)
        simulate(workload, Feed(workload), deployment, outcome)
        return outcome

    def deployment(self, profile: Profile, *, sls_rows: int, seed: int) -> Deployment:
        """What the preset says, and what the paper's set-up says beside it."""
        preset, _, step = self.name.partition(" ")
        settings = fill_fleet_preset(preset.removesuffix("_free"), {})
        options = {
            "sls": (
                f"max_input={MOST_INPUT}",
                f"max_output={MOST_OUTPUT}",
                f"batch_size={sls_rows}",
                f"zeta={ZETA}",
            ),
            "scls": (f"step={step}", f"zeta={ZETA}"),
            "scls_resident": (f"zeta={ZETA}",),
        }
        pool = settings.pop("pool", "")
        settings.pop("pool_options", ())
        scheduler = SchedulerConfig(
            **settings,
            slice_steps=self.slice_len or 1,
            max_rows=safe_rows(profile) if self.name == "ils" else MOST_ROWS,
            max_waiting=10**7,
            max_waiting_tokens=10**12,
            queue_timeout_s=0.0,
        )
        cache = CacheConfig(page_size=profile.page_size, prefix_cache=False)
        sim = SimConfig(
            profile=PROFILE,
            noise=1.0,
            replicas=REPLICAS,
            routing="round_robin",
            pool=pool,
            pool_options=options.get(preset, ()),
            seed=seed,
        )
        engine = EngineConfig(cache=cache, scheduler=scheduler)
        return Deployment(engine=engine, sim=sim, profile=profile)


def measure(
    case: Case, workloads: Mapping[int, Workload], profile: Profile, *, sls_rows: int = 0
) -> dict[str, Any]:
    """A line: means over the workloads by seed, and the spread of the throughput."""
    lines = [
        case.run(workload, profile, sls_rows=sls_rows, seed=seed).summary()
        for seed, workload in workloads.items()
    ]
    line: dict[str, Any] = {"policy": case.name, "slice_len": case.slice_len}
    line |= {name: statistics.fmean(each[name] for each in lines) for name in lines[0]}
    by_seed = [each["requests_per_s"] for each in lines]
    return line | {"by_seed": by_seed, "spread": statistics.pstdev(by_seed)}


def cases(slice_lens: Sequence[int]) -> list[Case]:
    """sls, both ils, then each step of the ladder and the resident form by slice length."""
    fixed = [Case("sls"), Case("ils"), Case("ils_free")]
    names = [*(f"scls {step}" for step in STEPS), "scls_resident"]
    return fixed + [Case(name, slice_len) for name in names for slice_len in slice_lens]


def planning_s(
    profile: Profile, pool: str, *options: str, requests: int = 5000, slice_len: int = 128
) -> float:
    """Seconds of one `plan` of a planner whose pool has so many requests, the best of five."""
    assert profile.num_pages is not None
    memory = KvMemory(profile.num_pages, profile.page_size, 1)
    setup = PoolSetup(instances=REPLICAS, memory=memory, time=profile.bilinear, slice_len=slice_len)
    prompts = np.random.default_rng(0).lognormal(6, 1, requests).astype(int).tolist()
    took_s = []
    for _ in range(5):
        planner = make_pool(pool, options, setup)
        for number, prompt in enumerate(prompts):
            length = min(MOST_INPUT, max(1, prompt))
            planner.arrived(PoolRequest(number, 0.0, length, MOST_OUTPUT))
        begin_s = time.perf_counter()
        planner.plan(0.0)
        took_s.append(time.perf_counter() - begin_s)
    return min(took_s)
