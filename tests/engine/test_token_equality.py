"""In float32 a request's tokens depend on nothing but the request."""

import pytest

from jaxserve.bench.equality import Cell, EqualityCheck, Grid

SHORT = Grid(model="random:tiny", num_prompts=12, max_tokens=24, steps=(1, 4, 0), rows=(1, 8))
PARALLEL = Grid(model="random:tiny", num_prompts=12, max_tokens=24, steps=(4,), rows=(8,))
FULL = Grid(
    model="random:tiny", num_prompts=64, max_tokens=256, steps=(1, 4, 16, 64, 0), rows=(1, 16, 64)
)


@pytest.fixture(scope="module")
def check() -> EqualityCheck:
    return EqualityCheck(SHORT)


@pytest.mark.parametrize("cell", list(SHORT.cells()), ids=str)
def test_tokens_equal_a_full_recompute(check: EqualityCheck, cell: Cell) -> None:
    check.run(cell)


@pytest.fixture(scope="module")
def parallel_check() -> EqualityCheck:
    return EqualityCheck(PARALLEL, mesh="tp=2")


@pytest.mark.parametrize("cell", list(PARALLEL.cells()), ids=str)
def test_tensor_parallel_tokens_equal_a_full_recompute(
    parallel_check: EqualityCheck, cell: Cell
) -> None:
    parallel_check.run(cell)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
def test_tokens_equal_a_full_recompute_over_the_whole_grid(mesh: str, capsys) -> None:
    check = EqualityCheck(FULL, mesh=mesh)
    with capsys.disabled():
        cells, tokens = check.run_all(print)
        print(f"{mesh}: {cells} cells, {tokens} tokens compared, all equal")
