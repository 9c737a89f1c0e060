"""In float32 a request's tokens depend on nothing but the request."""

import pytest

from jaxserve.bench.equality import Cell, EqualityCheck, Grid, make_mixed_requests

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


@pytest.mark.parametrize("fixture", ["check", "parallel_check"])
def test_no_kind_of_request_makes_a_served_engine_compile(fixture: str, request) -> None:
    """Every cell above says so of its requests; here with log-probabilities, biases and forks."""
    check: EqualityCheck = request.getfixturevalue(fixture)
    cell = Cell(steps=4, rows=8, prefix_hit=False, preempted=True, chunked=True)
    statistics = check.serve(cell, make_mixed_requests(3))
    assert statistics.finished == statistics.received and statistics.preemptions
    assert statistics.prefix and statistics.prefix.hit_tokens


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
def test_tokens_equal_a_full_recompute_over_the_whole_grid(mesh: str, capsys) -> None:
    check = EqualityCheck(FULL, mesh=mesh)
    with capsys.disabled():
        cells, tokens = check.run_all(print)
        print(f"{mesh}: {cells} cells, {tokens} tokens compared, all equal")
