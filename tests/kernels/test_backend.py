import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.kernels.backend import is_interpreted, resolve, target_platform


def test_auto_takes_the_fastest_backend_of_the_platform():
    assert resolve("auto", platform="cpu") == "cpu"
    assert resolve("auto", platform="gpu") == "pallas_gpu"
    assert resolve("auto", platform="tpu") == "pallas_tpu"


def test_pallas_is_the_platforms_own_and_a_cpu_has_none():
    assert resolve("pallas", platform="gpu") == "pallas_gpu"
    assert resolve("pallas", platform="tpu") == "pallas_tpu"
    with pytest.raises(ValueError, match=r"'pallas' does not run on 'cpu'; .*'pallas_gpu', 'pall"):
        resolve("pallas", platform="cpu")


def test_pallas_kernels_are_interpreted_on_a_cpu_and_refused_on_the_wrong_accelerator():
    for name in ("pallas_gpu", "pallas_tpu"):
        assert resolve(name, platform="cpu") == name and is_interpreted(name, platform="cpu")
        assert not is_interpreted(name, platform=name.removeprefix("pallas_"))
    assert not is_interpreted("cpu", platform="cpu")
    with pytest.raises(ValueError, match="'pallas_gpu' does not run on 'tpu'"):
        resolve("pallas_gpu", platform="tpu")


def test_a_named_backend_is_never_replaced():
    assert resolve("reference", platform="cpu") == "reference"
    with pytest.raises(ValueError, match=r"'cpu' does not run on 'gpu'; try auto or one of"):
        resolve("cpu", platform="gpu")


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(ValueError, match=r"'mystery'.*try auto or one of \['cpu', 'pallas_gpu'"):
        resolve("mystery", platform="cpu")
    with pytest.raises(ValueError, match="no kernel backend for platform 'abacus'"):
        resolve("auto", platform="abacus")


@pytest.mark.parametrize(("spelling", "platform"), [("cuda", "gpu"), ("tpu", "tpu")])
def test_the_target_is_the_mesh_that_is_traced_for(spelling, platform):
    there = AbstractMesh((), (), abstract_device=AbstractDevice("a device", None, spelling))
    assert target_platform() == jax.default_backend()
    with jax.sharding.use_abstract_mesh(there):
        assert target_platform() == platform
        assert resolve("auto") == f"pallas_{platform}"
