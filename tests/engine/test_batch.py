"""What is packed on one side of the door is what is read on the other."""

import numpy as np
import pytest

from jaxserve.engine.batch import (
    DECODE,
    FIELD,
    IDLE,
    START,
    BatchShape,
    Bucket,
    Packer,
    split,
)
from jaxserve.engine.buckets import make_buckets, row_buckets, tile_buckets
from jaxserve.engine.plan import Chunk, RowPlan, RowStart, SlicePlan
from jaxserve.request import SamplingParams

SHAPE = BatchShape(tile=4, table_pages=6, step_buffer=8, max_rows=8)
BUCKETS = (Bucket(2, 0), Bucket(8, 0), Bucket(8, 2), Bucket(8, 4))


def start(prompt: np.ndarray, **params) -> RowStart:
    return RowStart(SamplingParams(**params), 2**32 - 1, 40, prompt, ())


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_rows_go_longest_first_and_chunks_fill_tiles() -> None:
    prompt = ids(*range(6))
    rows = (
        RowPlan(3, 5, 16, [7, 8], Chunk(prompt, 0), start(prompt, temperature=0.5, top_k=9)),
        RowPlan(1, 0, 24, [1, 2, 4], Chunk(ids(20, 21, 22), 8)),
    )
    bucket, buffer, order = Packer(SHAPE, BUCKETS, num_pages=9, page_size=8).pack(
        SlicePlan(1, 5, 2, rows)
    )
    assert bucket == Bucket(8, 4) and order.tolist() == [1, 0]
    header, records, stop, tables, tiles, tokens = split(buffer, bucket, SHAPE)
    assert header.tolist() == [5, 2, 0, 0]
    assert records[:2, FIELD["kind"]].tolist() == [IDLE, START]
    assert records[2:, FIELD["slot"]].tolist() == [8] * 6  # padding: out of range
    assert tables[0, :3].tolist() == [1, 2, 4] and tables[1, :2].tolist() == [7, 8]
    assert tiles[:3].tolist() == [[1, 0, 4], [1, 4, 2], [0, 8, 3]]
    assert tokens[0:2].reshape(-1)[:6].tolist() == list(range(6))
    assert records[1, FIELD["sample_from"]] == 4 + 1  # the prompt's last token
    assert records[1, FIELD["seed"]] == -1 and (stop == -1).all()
    assert records[1, FIELD["temperature"]].view(np.float32) == np.float32(0.5)


def test_a_decoding_row_keeps_its_record_and_grows_its_table() -> None:
    packer, prompt = Packer(SHAPE, BUCKETS, num_pages=9, page_size=8), ids(1, 2)
    pages = [5]
    first = RowPlan(2, 1, 8, pages, Chunk(prompt, 0), start(prompt, stop_token_ids=(3, 4)))
    packer.pack(SlicePlan(1, 1, 1, (first,)))
    pages += [0, 3]
    bucket, buffer, _ = packer.pack(SlicePlan(2, 4, 1, (RowPlan(2, 4, 24, pages),)))
    _, records, stop, tables, _, _ = split(buffer, bucket, SHAPE)
    assert bucket == Bucket(2, 0)
    assert records[0, FIELD["kind"]] == DECODE and records[0, FIELD["steps"]] == 4
    assert tables[0, :3].tolist() == [5, 0, 3] and stop[0, :2].tolist() == [3, 4]


def test_a_plan_that_no_program_holds_is_an_error() -> None:
    rows = tuple(RowPlan(0, 1, 8, [0], Chunk(ids(1), 0)) for _ in range(5))
    with pytest.raises(ValueError, match="5 rows and 5 prompt tiles fits no program"):
        Packer(SHAPE, BUCKETS, num_pages=9, page_size=8).bucket(SlicePlan(1, 1, 1, rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RowPlan(1, 1, 8, [9]), r"slot 1: pages \[9\], the pool has 9"),
        (RowPlan(1, 1, 8, [0, -1]), r"slot 1: pages \[0, -1\], the pool has 9"),
        (RowPlan(2, 1, 8, list(range(7))), "slot 2: 7 pages, a page table has 6"),
        (RowPlan(2, 1, 17, [3, 4]), "slot 2: 17 tokens on pages for 16"),
        (RowPlan(0, 1, 8, [3], Chunk(ids(1, 2), 7)), "slot 0: 9 tokens on pages for 8"),
    ],
)
def test_what_would_reach_outside_the_pool_or_a_rows_pages_is_an_error(row, message) -> None:
    packer = Packer(SHAPE, BUCKETS, num_pages=9, page_size=8)
    with pytest.raises(ValueError, match=message):
        packer.pack(SlicePlan(1, 1, 1, (RowPlan(5, 1, 8, [2]), row)))


def test_a_deployment_has_few_programs_and_they_hold_every_plan() -> None:
    assert row_buckets(64) == [1, 8, 16, 32, 64] and row_buckets(1) == [1]
    assert tile_buckets(16) == [4, 8, 16] and tile_buckets(1) == [1]
    for rows, tiles in ((1, 1), (8, 16), (64, 16), (100, 32), (256, 64)):
        buckets = make_buckets(rows, tiles)
        assert len(buckets) <= 38, "two more copy pages and set extras: 40 in all"
        assert Bucket(rows, 0) in buckets and Bucket(rows, tiles) in buckets
