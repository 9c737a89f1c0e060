"""How a run is measured. Knows no data, and loads no numpy: flags name these."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request must meet to be part of the goodput; None: anything goes."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def given(self) -> dict[str, float]:
        named = {"TTFT": self.ttft_s, "TPOT": self.tpot_s, "E2E": self.e2e_s}
        return {name: limit for name, limit in named.items() if limit is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How a run is measured.

    `window` is the steady window; without one it begins `warmup_s` after the first request was sent
    and ends `cooldown_s` before the last one was, each a tenth of that time if unset. `w_in` and
    `w_out` are prices of tokens.
    """

    window: tuple[float, float] | None = None
    warmup_s: float | None = None
    cooldown_s: float | None = None
    limits: Limits = Limits()
    w_in: float = 1.0
    w_out: float = 2.0
