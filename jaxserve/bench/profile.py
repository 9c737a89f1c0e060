"""`jaxserve profile`: a serving-time profile of this device, or one computed from a data sheet.

The report goes to stdout, progress to stderr. Exit codes: 0 done, 2 something the user can mend,
130 interrupted.
"""

import os
import sys
from typing import Final

from rich.console import Console
from rich.table import Table

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.flags import Settings
from jaxserve.models.computed_profile import compute_profile
from jaxserve.models.profile import Profile
from jaxserve.models.sources import load_model_config, parse_source
from jaxserve.schedulers.estimators.fitted_time import FitError
from jaxserve.server.logs import set_up_logging
from jaxserve.server.progress import ProgressDisplay
from jaxserve.server_config import LogConfig, ProfileConfig

EXIT_INTERRUPTED: Final = 130
NOISY: Final = 0.1
"""Mean distance of identical slices from which on a machine is called noisy."""


def main(settings: Settings) -> int:
    """Make a profile; returns the exit code. Raises ConfigError for what the user can mend."""
    config, engine = settings.record(ProfileConfig), settings.record(EngineConfig)
    set_up_logging(settings.record(LogConfig).log_level)
    if engine.executor != "jax":
        raise ConfigError(f"executor: got {engine.executor!r}; allowed: jax, which has a device")
    console = Console()
    if config.computed:
        profile = _computed(config, engine)
    else:
        progress = ProgressDisplay(Console(stderr=True))
        try:
            profile = _measured(config, engine, progress, console)
        except KeyboardInterrupt:
            print("jaxserve: interrupted; no profile was written", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            progress.close()
    profile.save(config.output)
    report(profile, console)
    print(f"wrote {config.output}, key {profile.key}")
    return 0


def _computed(config: ProfileConfig, engine: EngineConfig) -> Profile:
    if engine.dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"dtype: got {engine.dtype!r}; allowed: bfloat16 with --computed")
    num_devices = 1 if engine.mesh == "auto" else int(engine.mesh.removeprefix("tp="))
    return compute_profile(
        load_model_config(parse_source(engine.model)),
        device=config.device,
        num_devices=num_devices,
        page_size=engine.cache.page_size,
        kv_dtype=engine.cache.kv_dtype,
    )


def _measured(
    config: ProfileConfig, engine: EngineConfig, display: ProgressDisplay, console: Console
) -> Profile:
    """Build what serving builds, measure it, and say what was done."""
    from jaxserve.engine.build import build_jax, serving_buckets
    from jaxserve.engine.measure_host import read_live
    from jaxserve.engine.measured_profile import live_error, measure_profile, with_live_host

    live = read_live(config.live_log) if config.live_log else []
    source = parse_source(engine.model)
    load_s = os.getloadavg()[0]
    executor, info, _ = build_jax(engine, source, load_model_config(source), display.show)
    done = measure_profile(
        engine,
        executor,
        info,
        buckets=serving_buckets(engine),
        seconds=60 * config.minutes,
        progress=display.show,
    )
    display.close()
    console.print(
        f"{done.num_slices} slices of {done.num_points} kinds in {done.seconds:.0f} s,"
        f" of {info.programs} programs, page size {info.page_size}; load before {load_s:.1f}"
    )
    profile = done.profile
    if live:
        _say(console, "live slices, device", live_error(profile, live))
        profile = with_live_host(profile, live)
    if profile.spread > NOISY:
        print(
            f"jaxserve: this machine is noisy: identical slices differ by {profile.spread:.0%};"
            " measure again when it is quieter, or pin the command to a core",
            file=sys.stderr,
        )
    return profile


def report(profile: Profile, console: Console) -> None:
    """Print what a profile is of and how far off it is."""
    pages = f", {profile.num_pages} KV pages" if profile.num_pages else ""
    console.print(
        f"{profile.kind}: {profile.model_name} in {profile.precision} on {profile.num_devices} x"
        f" {profile.device}, page size {profile.page_size}{pages}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("errors", "mean", "largest", "points", box=None, pad_edge=False)
    errors = profile.errors
    rows = {
        "repeated identical slices": errors.spread,
        "slices held out": errors.held_out,
        "slices out of range": errors.out_of_range,
        "bilinear prefill": errors.prefill,
        "bilinear decode step": errors.decode,
    }
    for name, error in rows.items():
        if error is not None:
            table.add_row(name, f"{error.mean:.1%}", f"{error.largest:.1%}", str(error.num_points))
    console.print(table, highlight=False)
    for note in profile.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def _say(console: Console, what: str, error: FitError) -> None:
    text = f"{what}: mean {error.mean:.1%}, largest {error.largest:.1%} of {error.num_points}"
    console.print(text, highlight=False)
