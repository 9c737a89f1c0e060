"""The table of SCLS against its baselines, simulated: what is run, on what device, what is counted.

Set-up after the paper's, as far as it is known (papers.md 1.10): 8 instances of LLaMA2-13B on
A100-80GB, lengths cut to 1,024 prompt and 1,024 output tokens. The device is a roofline of data
sheet numbers; nothing here was measured on one.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from jaxserve.report.recorder import Recorder
from jaxserve.schedulers.estimators.bilinear import BilinearFit, fit_bilinear
from jaxserve.schedulers.estimators.memory import KvMemory
from jaxserve.schedulers.estimators.serving_time import SliceShape
from jaxserve.sim.capped_ils import IlsConfig, simulate_ils
from jaxserve.sim.pool import PoolConfig, simulate_pool
from jaxserve.workload.feed import Feed
from jaxserve.workload.work import Work, Workload

REPLICAS: Final = 8
MOST_INPUT: Final = 1024
MOST_OUTPUT: Final = 1024
SLICE_LENS: Final = (16, 32, 64, 128, 256, 512, 1024)
STEPS: Final = ("so", "pm", "ab", "lb")
ZETA: Final = 0.9
Arrival = tuple[float, int, int]
"""Of a trace: seconds, prompt tokens, output tokens."""

PUBLISHED: Final = "+315.8 % at most over SLS and ILS (arXiv 2406.13511)"


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of padded batches and of continuous slices from data sheet numbers.

    A step takes what reading the weights takes, or computing its rows, whichever is longer, and
    reading their KV. Defaults: LLaMA2-13B in bf16 (40 layers, width 5120) on an A100-80GB: 2.0 TB/s
    and 312 TFLOP/s by data sheet, of which `bandwidth_share` and `compute_share` are assumed to be
    reached. `overhead_s` is a step's launch on the device, `dispatch_s` the host's work for a
    dispatch.
    """

    parameters: float = 13.0e9
    layers: int = 40
    width: int = 5120
    bytes_per_number: int = 2
    bandwidth: float = 2.0e12
    flops: float = 312e12
    bandwidth_share: float = 0.8
    compute_share: float = 0.6
    overhead_s: float = 1e-3
    dispatch_s: float = 2e-3

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.width * self.bytes_per_number

    @property
    def weights_s(self) -> float:
        return self.parameters * self.bytes_per_number / (self.bandwidth * self.bandwidth_share)

    @property
    def token_s(self) -> float:
        """To compute a token of a prompt or a row."""
        return 2 * self.parameters / (self.flops * self.compute_share)

    @property
    def kv_s(self) -> float:
        """To read the KV of a token of context."""
        return self.kv_bytes_per_token / (self.bandwidth * self.bandwidth_share)

    @property
    def pair_s(self) -> float:
        """Of attention between two tokens of a prompt."""
        return 4 * self.layers * self.width / (self.flops * self.compute_share)

    def prefill_s(self, rows: int, length: int) -> float:
        pairs = rows * length * (length + 1) / 2
        compute_s = rows * length * self.token_s + pairs * self.pair_s
        return self.overhead_s + max(self.weights_s, compute_s)

    def step_s(self, rows: int, length: int) -> float:
        compute_s = max(self.weights_s, rows * self.token_s)
        return self.overhead_s + compute_s + rows * length * self.kv_s

    def padded_s(self, rows: int, length: int, steps: int) -> float:
        """Prefill of `length` tokens of each row, then `steps` steps."""
        return (
            self.dispatch_s
            + self.prefill_s(rows, length)
            + steps * self.step_s(rows, 0)
            + rows * (steps * length + steps * (steps + 1) / 2) * self.kv_s
        )


@dataclass(frozen=True, slots=True)
class PaddedRoofline:
    """A `PaddedTime`."""

    roofline: Roofline

    def slice_s(self, rows: int, length: int, steps: int) -> float:
        return self.roofline.padded_s(rows, length, steps)


@dataclass(frozen=True, slots=True)
class ContinuousRoofline:
    """A `SliceTime`: prompts are computed in the first step, beside the rows."""

    roofline: Roofline

    def slice_s(self, shape: SliceShape) -> float:
        roofline = self.roofline
        compute_s = (shape.rows + shape.prefill_tokens) * roofline.token_s
        compute_s += shape.prefill_attended_tokens * roofline.pair_s
        first_s = roofline.overhead_s + max(roofline.weights_s, compute_s)
        later_s = (shape.steps - 1) * roofline.step_s(shape.rows, 0)
        return first_s + later_s + shape.attended_tokens * roofline.kv_s

    def host_s(self, shape: SliceShape) -> float:
        return self.roofline.dispatch_s


def estimate_of(roofline: Roofline) -> BilinearFit:
    """The bilinear model that planners plan by, fitted to the roofline."""

    def points(rows: Sequence[int], lengths: Sequence[int], seconds: Any) -> list[Any]:
        return [(n, length, seconds(n, length)) for n in rows for length in lengths]

    fitted = (1, 2, 4, 8, 16, 32, 64, 128), (32, 128, 512, 1024, 2048)
    held_out = (3, 12, 48, 96), (64, 300, 800, 1500)
    return fit_bilinear(
        points(*fitted, roofline.prefill_s),
        points(*fitted, roofline.step_s),
        held_out_prefill=points(*held_out, roofline.prefill_s),
        held_out_decode=points(*held_out, roofline.step_s),
        most_rows=512,
        steps=max(SLICE_LENS),
    )


@dataclass(frozen=True, slots=True)
class Device:
    """All that one instance is."""

    roofline: Roofline
    estimate: BilinearFit
    memory: KvMemory
    sls_rows: int = 0

    @classmethod
    def a100_13b(cls, *, overhead_s: float = 1e-3, sls_rows: int = 0) -> "Device":
        """80 GB without weights and 4 GB for everything else is KV memory; zeta comes on top.

        `sls_rows` is B of sls, 0: `safe_rows`.
        """
        roofline = Roofline(overhead_s=overhead_s)
        free = 80e9 - roofline.parameters * roofline.bytes_per_number - 4e9
        memory = KvMemory.within(
            int(free), 1.0, page_size=16, bytes_per_token=roofline.kv_bytes_per_token
        )
        return cls(roofline, estimate_of(roofline), memory, sls_rows)

    @property
    def safe_rows(self) -> int:
        """B of SLS unless given, and the cap of ILS: rows that fit whatever they make."""
        return int(ZETA * self.memory.num_tokens) // (MOST_INPUT + MOST_OUTPUT)


class Outcome(Recorder):
    """What a run came to: sums alone, for a table has hundreds of runs."""

    def __init__(self) -> None:
        super().__init__(keep_rows=False, keep_slices=0)
        self.sent_s: dict[int, float] = {}
        self.responses_s: list[float] = []
        self.last_s = 0.0
        self.tokens = self.pad_tokens = self.invalid_tokens = self.prefill_tokens = 0
        self.batches = self.rows = 0

    def sent(self, work: Work, at_s: float) -> None:
        self.sent_s[work.number] = at_s

    def delivered(self, number: int, at_s: float, num_tokens: int) -> None:
        pass

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
        assert reason in ("stop", "length"), reason
        self.responses_s.append(at_s - self.sent_s[number])
        self.last_s = max(self.last_s, at_s)

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
        self.tokens += output_tokens
        self.prefill_tokens += prefill_tokens
        self.pad_tokens += pad_tokens
        self.invalid_tokens += invalid_tokens
        self.batches += 1
        self.rows += rows

    def summary(self) -> dict[str, float]:
        """The numbers of a line: requests/s, seconds, tokens a request, CT STD in seconds."""
        count = len(self.responses_s)
        errors = [it["estimator_error"] for it in self.replicas.values() if "estimator_error" in it]
        ends_s = [it["last_end_s"] for it in self.replicas.values()]
        summary = {
            "requests_per_s": count / self.last_s,
            "tokens_per_s": self.tokens / self.last_s,
            "mean_s": statistics.fmean(self.responses_s),
            "p95_s": float(np.quantile(self.responses_s, 0.95)),
            "pad_per_request": self.pad_tokens / count,
            "invalid_per_request": self.invalid_tokens / count,
            "prefill_per_request": self.prefill_tokens / count,
            "rows_per_batch": self.rows / self.batches,
            "ct_std_s": statistics.pstdev(ends_s),
        }
        return summary | ({"estimator_error": statistics.fmean(errors)} if errors else {})


def window_of(
    lengths: Sequence[Arrival], *, name: str, count: int, rate: float, seed: int
) -> Workload:
    """`count` requests in a row from a random place of a trace, cut to the longest allowed. Its
    gaps are scaled to `rate` requests/s in the mean, each stretched by up to a half either way."""
    rng = np.random.default_rng(seed)
    count = min(count, len(lengths))
    first = int(rng.integers(0, len(lengths) - count + 1))
    chosen = lengths[first : first + count]
    gaps = np.diff([arrival_s for arrival_s, _, _ in chosen], prepend=chosen[0][0])
    gaps = gaps * rng.uniform(0.5, 1.5, count)
    arrivals = np.cumsum(gaps) * (count / rate / max(1e-9, gaps.sum()))
    work = [
        Work(
            number=number,
            arrival_s=float(arrival_s),
            prompt_tokens=min(prompt, MOST_INPUT),
            output_tokens=min(output, MOST_OUTPUT),
            max_tokens=MOST_OUTPUT,
        )
        for number, (arrival_s, (_, prompt, output)) in enumerate(
            zip(arrivals, chosen, strict=True)
        )
    ]

    def requests() -> Iterator[Work]:
        return iter(work)

    return Workload(name=name, requests=requests, num_requests=count)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table; `slice_len` 0: it has none."""

    name: str
    slice_len: int

    def run(self, workload: Workload, device: Device, *, noise: float, seed: int) -> Outcome:
        outcome = Outcome()
        if self.name.startswith("ils"):
            capped = self.name == "ils"
            config = IlsConfig(
                memory=KvMemory.within(
                    device.memory.num_tokens, ZETA, page_size=1, bytes_per_token=1
                ),
                slice_time=ContinuousRoofline(device.roofline),
                replicas=REPLICAS,
                max_rows=device.safe_rows if capped else 512,
                reserve="max" if capped else "prompt",
            )
            simulate_ils(Feed(workload), config, outcome)
            return outcome
        pool = {"sls": "static", "scls_resident": "scls_resident"}.get(self.name, "scls")
        options = {
            "static": (
                f"max_input={MOST_INPUT}",
                f"max_output={MOST_OUTPUT}",
                f"batch_size={device.sls_rows}",
                f"zeta={ZETA}",
            ),
            "scls": (f"step={self.name.removeprefix('scls ')}", f"zeta={ZETA}"),
            "scls_resident": (f"zeta={ZETA}",),
        }[pool]
        config = PoolConfig(
            memory=device.memory,
            estimate=device.estimate.time,
            pool=pool,
            pool_options=options,
            replicas=REPLICAS,
            padded_time=PaddedRoofline(device.roofline),
            slice_time=ContinuousRoofline(device.roofline),
            slice_len=self.slice_len or MOST_OUTPUT,
            noise=noise,
            seed=seed,
        )
        simulate_pool(Feed(workload), config, outcome)
        return outcome


def measure(
    case: Case,
    lengths: Sequence[Arrival],
    device: Device,
    *,
    trace: str,
    count: int,
    rates: Mapping[int, float],
    noise: float,
) -> dict[str, Any]:
    """A line: means over seeds, each at its rate of `rates`, and the spread of the throughput."""
    lines = []
    for seed, rate in rates.items():
        workload = window_of(lengths, name=trace, count=count, rate=rate, seed=seed)
        lines.append(case.run(workload, device, noise=noise, seed=seed).summary())
    line: dict[str, Any] = {"trace": trace, "policy": case.name, "slice_len": case.slice_len}
    line |= {name: statistics.fmean(each[name] for each in lines) for name in lines[0]}
    by_seed = [each["requests_per_s"] for each in lines]
    return line | {"by_seed": by_seed, "spread": statistics.pstdev(by_seed)}


def cases(slice_lens: Sequence[int]) -> list[Case]:
    """sls, both ils, then each step of the ladder and the resident form by slice length."""
    fixed = [Case("sls", 0), Case("ils", 0), Case("ils_free", 0)]
    names = [*(f"scls {step}" for step in STEPS), "scls_resident"]
    return fixed + [Case(name, slice_len) for name in names for slice_len in slice_lens]
