"""The sampling kernel beside XLA's path: what is wrong is told, by vocabulary, kind and row.

Dimension key: B rows  V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.bench import sampling_kernel
from jaxserve.bench.sampling_kernel import KINDS, TINY
from jaxserve.kernels import sampling

B, V = TINY.rows, 65


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    """Spoils what the kernel returns."""

    def break_(spoil):
        right = sampling.sample

        def sample(logits_BV, params, position_B, active_B, *, backend):
            token_B, finite_B = right(logits_BV, params, position_B, active_B, backend="xla")
            if backend == "xla":
                return token_B, finite_B
            return spoil(token_B, finite_B, params)

        monkeypatch.setattr(sampling, "sample", sample)

    return break_


def test_the_kernel_is_right_and_both_are_timed():
    cases = list(sampling_kernel.check(B, [V]))
    assert [(case.vocabulary, case.kind, case.wrong) for case in cases] == [
        (V, kind, ()) for kind in KINDS
    ]
    kinds = ["greedy", "top_p 0.9"]
    timed = list(sampling_kernel.measure(B, V, kinds, budget_s=0.0))
    assert [row.kind for row in timed] == kinds
    assert all(row.kernel_s and row.xla_s and not row.note for row in timed)


def test_a_wrong_kernel_is_told_by_its_rows(broken):
    broken(lambda token_B, finite_B, params: (jnp.where(params.top_k_B > 0, 0, token_B), finite_B))
    wrong = {case.kind: case.wrong for case in sampling_kernel.check(B, [V])}
    assert [kind for kind, told in wrong.items() if told] == ["top_k 50", "top_k 1000"]
    assert wrong["top_k 50"][0].startswith("row 0: got token 0, wanted ")


def test_rows_without_a_token_and_inactive_ones_are_among_those_checked(broken):
    broken(lambda token_B, finite_B, params: (token_B, jnp.ones_like(finite_B)))
    told = [case.wrong for case in sampling_kernel.check(B, [V])]
    said = "row 5: logits are usable: got True, wanted False"
    assert all(said in each for each in told)
    rows = sampling_kernel._odd_rows(KINDS["top_k 50"], B, V)
    assert np.flatnonzero(~np.asarray(rows.active_B)).tolist() == [6]
    x_BV = np.asarray(rows.logits_BV)
    assert [len(np.unique(x_BV[b])) < V for b in (0, 2, 4)] == [False, True, True]
    assert np.isinf(x_BV).sum(axis=1)[3] > V / 2


def test_a_kernel_that_fails_is_told_and_leaves_the_rest(broken):
    def fail(token_B, finite_B, params):
        raise NotImplementedError("no such vocabulary\nand a long trace")

    broken(fail)
    said = "NotImplementedError: no such vocabulary"
    assert {case.wrong for case in sampling_kernel.check(B, [V])} == {(said,)}
    timed = list(sampling_kernel.measure(B, V, ["greedy"], budget_s=0.0))
    assert timed == [sampling_kernel.Timed("greedy", note=said)]


@pytest.mark.parametrize("kind", ["top_p 0.9", "top_p 0.9, flat"])
def test_nuclei_are_small_or_large_as_their_kind_says(kind: str):
    temperature, _, top_p, _ = KINDS[kind].filter
    x_BV = KINDS[kind].spread * jax.random.normal(jax.random.key(0), (4, 128_256)) / temperature
    p_BV = np.sort(np.asarray(jax.nn.softmax(x_BV)), axis=1)[:, ::-1]
    sizes = (np.cumsum(p_BV, axis=1) < top_p).sum(axis=1)
    assert (sizes > 10_000).all() if "flat" in kind else (sizes < sampling.NARROW).all()
