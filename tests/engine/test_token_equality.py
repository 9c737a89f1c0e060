"""In float32 a request's tokens depend on nothing but the request."""

import pytest

from jaxserve.bench.equality import Cell, EqualityCheck, Grid

SHORT = Grid(model="random:tiny", num_prompts=12, max_tokens=24, steps=(1, 4, 0), rows=(1, 8))
FULL = Grid(
    model="random:tiny", num_prompts=64, max_tokens=256, steps=(1, 4, 16, 64, 0), rows=(1, 16, 64)
)


@pytest.fixture(scope="module")
def check() -> EqualityCheck:
    return EqualityCheck(SHORT)


@pytest.mark.parametrize("cell", list(SHORT.cells()), ids=str)
def test_tokens_equal_a_full_recompute(check: EqualityCheck, cell: Cell) -> None:
    check.run(cell)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_tokens_equal_a_full_recompute_over_the_whole_grid(capsys) -> None:
    check = EqualityCheck(FULL)
    with capsys.disabled():
        cells, tokens = check.run_all(print)
        print(f"{cells} cells, {tokens} tokens compared, all equal")
