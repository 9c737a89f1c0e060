"""The peers' side of the benchmark without the peers: workload, weights, protocol and report."""

import subprocess
import sys

import numpy as np
import pytest

from jaxserve.bench.peers.protocol import DecodeResult, Meter, WorkloadResult, emit, parse
from jaxserve.bench.peers.report import format_report
from jaxserve.bench.peers.run import REQUIREMENTS, require_modules
from jaxserve.bench.peers.weights import gguf_tensor
from jaxserve.bench.peers.workload import make_requests
from jaxserve.errors import ConfigError
from jaxserve.models.config import SHAPES
from jaxserve.models.hf_layout import hf_shapes
from jaxserve.models.random_weights import hf_state_dict

TINY = SHAPES["tiny"]


def test_workload_is_the_one_that_was_asked_for():
    requests = make_requests(4096)
    assert requests == make_requests(4096)
    prompts = np.array([len(request.prompt_ids) for request in requests])
    outputs = np.array([request.output_tokens for request in requests])
    assert len(requests) == 512
    for lengths, median in ((prompts, 74), (outputs, 90)):
        assert lengths.min() >= 8 and lengths.max() <= 512
        assert np.median(lengths) == pytest.approx(median, rel=0.15)
    assert max(max(request.prompt_ids) for request in requests) < 4096


@pytest.mark.parametrize("name", ["llama-14m", "tiny", "llama3-8b"])
def test_weights_count_up_to_the_model(name: str):
    shapes = hf_shapes(SHAPES[name])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == SHAPES[name].num_parameters
    assert ("lm_head.weight" in shapes) is not SHAPES[name].tied_embeddings


def test_a_tensor_depends_on_its_name_and_the_seed_alone():
    weights = hf_state_dict(TINY, seed=3)
    assert np.array_equal(
        weights["model.embed_tokens.weight"],
        hf_state_dict(TINY, seed=3)["model.embed_tokens.weight"],
    )
    q0, q1 = (weights[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not np.array_equal(q0, q1)
    assert q0.dtype == np.float32 and q0.std() == pytest.approx(0.02, rel=0.1)


def test_gguf_interleaves_the_halves_of_each_query_head():
    rows = np.arange(TINY.num_heads * TINY.head_dim, dtype=np.float32)
    weight = np.repeat(rows[:, None], TINY.width, axis=1)
    name, permuted = gguf_tensor("model.layers.1.self_attn.q_proj.weight", weight, config=TINY)
    assert name == "blk.1.attn_q.weight"
    # 16 channels per head: 0 pairs with 8, 1 with 9, ...; the second head starts at 16
    assert permuted[:4, 0].tolist() == [0, 8, 1, 9]
    assert permuted[16:18, 0].tolist() == [16, 24]


def test_results_survive_the_wire_and_chatter_is_passed_over(capsys: pytest.CaptureFixture[str]):
    sent = (
        WorkloadResult(
            peer="p", mode="greedy", useful_tokens=10, wall_s=2.0, window_tokens_per_s=6.0
        ),
        DecodeResult(peer="p", rows=16, context=128, tokens_per_s=3.5),
    )
    for result in sent:
        emit(result)
    lines = ["Loading weights: 100%", "{}", *capsys.readouterr().out.splitlines()]
    assert tuple(result for line in lines if (result := parse(line))) == sent


def test_the_window_leaves_out_ramp_and_tail():
    clock = iter([0.0]).__next__
    meter = Meter(clock)
    for second in range(1, 11):  # one slow token, eighty fast ones, a slow tail
        meter.add(10, at_s=10.0 + second)
    result = meter.result("p", "greedy", config={})
    assert (result.useful_tokens, result.wall_s) == (100, 20.0)
    assert result.window_tokens_per_s == pytest.approx(10.0)


def test_report_takes_the_best_run_and_compares_it_with_ours():
    def run(peer: str, wall_s: float) -> WorkloadResult:
        return WorkloadResult(
            peer=peer, mode="greedy", useful_tokens=1000, wall_s=wall_s, window_tokens_per_s=1.0
        )

    decode = DecodeResult(peer="llama.cpp", rows=64, context=512, tokens_per_s=3200.0)
    text = format_report(
        [run("llama.cpp", 4.0), run("llama.cpp", 2.0), run("jaxserve", 1.0), decode]
    )
    (line,) = [line for line in text.splitlines() if line.startswith("greedy  llama.cpp")]
    assert line.split()[2:] == ["500", "1", "2.0", "2", "2.00"]
    (line,) = [line for line in text.splitlines() if line.startswith("64")]
    assert line.split() == ["64", "512", "llama.cpp", "3,200", "20.00", "-"]


def test_a_python_without_the_packages_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REQUIREMENTS, "no_such_module", "no-such-package==1")
    with pytest.raises(ConfigError, match="-m pip install .*'no-such-package==1'"):
        require_modules(sys.executable)


def test_the_parts_that_run_in_the_peers_python_load_no_jax():
    modules = ("protocol", "run", "report", "weights", "workload")
    imports = "; ".join(f"import jaxserve.bench.peers.{module}" for module in modules)
    code = f"{imports}; import sys; print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
