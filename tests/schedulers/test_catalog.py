"""What people are told of policies."""

import pytest

from jaxserve.schedulers.catalog import ADMISSIONS, ORDERS, describe, find_order


def test_the_nearest_name_may_be_an_alias() -> None:
    with pytest.raises(ValueError, match="got 'efd'; allowed: fcfs, .*; did you mean 'edf'"):
        find_order("efd")


def test_parameters_are_told_as_they_are_set() -> None:
    told = " ".join(describe(ORDERS["dlpm"]))
    assert "misfit=stop (stop|skip)" in told and "recharge_recompute=false" in told
    assert "lift=true, idle_lift=true" in " ".join(describe(ORDERS["vtc"]))
    assert "u=0.7," in " ".join(describe(ADMISSIONS["past_future"]))
