"""What every test runs under: one platform, strict arrays, repeatable property tests.

Arrays are made strict through the environment, before anything imports JAX: so tests of the
schedulers start without it, and processes that a test starts are as strict as the test itself.
"""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

_PLATFORM = os.environ.get("JAXSERVE_TEST_PLATFORM", "cpu")
_PLATFORMS = ("cpu", "gpu", "tpu")

# A developer's own settings decide nothing here, and no test reads what an earlier run compiled: a
# cache hides what fails to compile.
for _name in [n for n in os.environ if n.startswith("JAXSERVE_")] + ["JAX_COMPILATION_CACHE_DIR"]:
    os.environ.pop(_name, None)

os.environ["JAX_PLATFORMS"] = "cpu" if _PLATFORM == "cpu" else f"{_PLATFORM},cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"  # for tests of tensor parallelism
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# No deadline in either: the first example of a jitted function compiles it.
settings.register_profile(
    "default",
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "full",
    max_examples=2000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")  # --hypothesis-profile=full comes later and wins


def pytest_configure() -> None:
    if _PLATFORM not in _PLATFORMS:
        raise pytest.UsageError(
            f"JAXSERVE_TEST_PLATFORM must be one of {', '.join(_PLATFORMS)}, got {_PLATFORM!r}"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for platform in ("gpu", "tpu"):
            if item.get_closest_marker(platform) and platform != _PLATFORM:
                reason = f"needs a {platform}; try JAXSERVE_TEST_PLATFORM={platform}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def write_profile(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes a profile of a named shape whose slices take `step_s` a step, and returns its path."""

    def write(shape: str, *, step_s: float) -> str:
        from jaxserve.models.config import SHAPES
        from jaxserve.models.profile import MEASURED, Errors, ModelShape, Profile
        from jaxserve.schedulers.estimators.bilinear import Bilinear, BilinearTime
        from jaxserve.schedulers.estimators.fitted_time import Curve, FitError, FittedTime

        nothing = FitError(0.0, 0.0, 1)
        path = tmp_path_factory.mktemp("profile") / f"{shape}.json"
        Profile(
            kind=MEASURED,
            model_name=shape,
            model=ModelShape.of(SHAPES[shape]),
            device="cpu",
            num_devices=1,
            precision="float32",
            page_size=16,
            num_pages=None,
            kernels={},
            versions={},
            date="2026-11-21",
            host_overlaps=True,
            time=FittedTime(
                dispatch_s=0.0,
                step_s=Curve((1,), (step_s,)),
                attended_s=0.0,
                prompt_step_s=step_s,
            ),
            bilinear=BilinearTime(Bilinear(0.0, 0.0, 0.0, step_s), Bilinear(0.0, 0.0, 0.0, step_s)),
            errors=Errors(prefill=nothing, decode=nothing),
        ).save(path)
        return str(path)

    return write
