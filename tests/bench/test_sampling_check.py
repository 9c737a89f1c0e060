"""What two ways of sampling may differ in, and what is called wrong.

Dimension key: B rows  V vocabulary
"""

import numpy as np
import pytest

from jaxserve.bench.sampling_check import Filter, reference_weights, wrong_rows

ALL: Filter = (1.0, 0, 1.0, 0.0)
HALF_V = np.log([0.5, 1e-9, 0.25, 0.25]).astype(np.float32)  # boundaries at 0.5 and 0.75
YES = np.array([True])


def wrong(got: int, want: int, u: float, row: Filter = ALL, *, finite=YES, active=YES) -> list[str]:
    u_B, tokens = np.array([u]), (np.array([got]), np.array([want]))
    return list(wrong_rows(HALF_V[None], [row], active, u_B, (tokens[0], finite), (tokens[1], YES)))


def test_a_draw_at_a_boundary_may_go_to_the_next_kept_token():
    assert not wrong(2, 3, 0.75) and not wrong(3, 2, 0.75 + 5e-6)
    assert not wrong(0, 2, 0.5, (1.0, 3, 1.0, 0.0))  # what lies between is not kept
    assert not wrong(1, 1, 0.5)


@pytest.mark.parametrize(
    "got,want,u,row",
    [
        (2, 3, 0.7501, ALL),  # not at the boundary
        (0, 2, 0.5, ALL),  # the second is kept, too
        (0, 3, 0.5, (1.0, 3, 1.0, 0.0)),  # neighbours of neighbours
        (0, 1, 0.5, (1.0, 3, 1.0, 0.0)),  # not kept
        (2, 0, 0.5, (0.0, 0, 1.0, 0.0)),  # greedy
        (2, 0, 0.5, (1.0, 1, 1.0, 0.0)),
        (-1, 0, 0.5, ALL),  # no ids
        (4, 0, 0.5, ALL),
    ],
)
def test_any_other_token_is_wrong(got: int, want: int, u: float, row: Filter):
    assert wrong(got, want, u, row) == [f"row 0: got token {got}, wanted {want}"]


def test_inactive_rows_draw_nothing_and_usable_logits_are_told_alike():
    assert wrong(2, 3, 0.75, active=~YES)
    assert wrong(2, 2, 0.75, finite=~YES) == ["row 0: logits are usable: got False, wanted True"]


def test_a_nucleus_keeps_all_that_tie_with_its_last_token():
    x_V = np.log(np.float32([0.2, 0.4, 0.2, 0.2]))
    kept = [reference_weights(x_V, (1.0, 0, top_p, 0.0)) > 0 for top_p in (0.3, 0.5)]
    assert np.array(kept).tolist() == [[False, True, False, False], [True] * 4]
