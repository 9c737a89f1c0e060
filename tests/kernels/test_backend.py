import pytest

from jaxserve.kernels.backend import resolve


def test_auto_takes_the_fastest_backend_of_the_platform():
    assert resolve("auto", platform="cpu") == "cpu"
    assert resolve("auto", platform="gpu") == "xla"
    assert resolve("auto", platform="tpu") == "xla"


def test_a_named_backend_is_never_replaced():
    assert resolve("reference", platform="cpu") == "reference"
    with pytest.raises(ValueError, match=r"'cpu' does not run on 'gpu'; try auto or one of"):
        resolve("cpu", platform="gpu")


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(ValueError, match=r"'mystery'.*try auto or one of \['cpu', 'xla'"):
        resolve("mystery", platform="cpu")
    with pytest.raises(ValueError, match="no kernel backend for platform 'abacus'"):
        resolve("auto", platform="abacus")
