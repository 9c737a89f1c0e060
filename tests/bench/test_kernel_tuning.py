import importlib.util
from pathlib import Path

from jaxserve.bench.kernel_tuning import descend, write_rows
from jaxserve.kernels import block_sizes
from jaxserve.kernels.block_sizes import (
    DecodeBlocks,
    GpuBlocks,
    TileBlocks,
    TpuBlocks,
    gpu_blocks,
    tpu_blocks,
)

BLOCKS = GpuBlocks(DecodeBlocks(64, 512, 16, 264, 4, 5), TileBlocks(32, 64, 8, 3))


def load(path):
    spec = importlib.util.spec_from_file_location("jaxserve.kernels.tuned", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_written_into_the_table_are_found_and_the_rest_stays(tmp_path):
    path, before = tmp_path / "block_sizes.py", Path(block_sizes.__file__).read_text()
    path.write_text(before)
    on_tpu = TpuBlocks(block_bytes=1 << 19, ring=6, cores=2)
    rows = {
        ("NVIDIA H200", 128, 64, "bfloat16"): BLOCKS,
        ("TPU v6 lite", 64, 128, "int8"): on_tpu,
    }
    write_rows(rows, path)
    tuned = load(path)
    found = tuned.tpu_blocks("TPU v6 lite", head_dim=64, page_size=128, dtype="int8")
    assert tuple(found) == tuple(on_tpu)
    found = tuned.gpu_blocks("NVIDIA H200", head_dim=128, page_size=64, dtype="bfloat16")
    assert tuple(map(tuple, found)) == tuple(map(tuple, BLOCKS))
    begin = before.index("# tuned rows begin")
    end = before.index("# tuned rows end")
    after = path.read_text()
    assert after.startswith(before[:begin]) and after.endswith(before[end:])


def test_a_shape_without_a_row_gets_the_default():
    default = block_sizes.default_gpu_blocks("abacus", 128, "int8")
    assert gpu_blocks("abacus", head_dim=128, page_size=64, dtype="int8") == default
    default = block_sizes.default_tpu_blocks("TPU v5")
    assert tpu_blocks("TPU v5", head_dim=128, page_size=64, dtype="int8") == default
    assert default.cores == 2 and block_sizes.default_tpu_blocks("abacus").cores == 1


def test_one_field_after_another_leads_to_the_least_cost():
    def cost(tile):
        if tile.num_warps == 16:
            raise ValueError("does not fit")
        return float(abs(tile.step_keys - 64) + abs(tile.rows - 128) * tile.num_warps)

    choices = {"num_warps": (2, 4, 16), "step_keys": (32, 64, 128), "rows": (64, 128)}
    best, least = descend(TileBlocks(16, 32, 8, 2), choices, cost)
    assert (best.step_keys, best.rows, least) == (64, 128, 0)
