"""What /metrics says of requests and of the engine, and that docs/metrics.md says the same."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.config import SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.scripted import ScriptedExecutor
from jaxserve.errors import JaxserveError
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import REASON_TO_PROTO
from jaxserve.request import FinishReason, Limits, Request, SamplingParams
from jaxserve.schedulers.events import Admit, Arrive, Enact, Tick
from jaxserve.schedulers.order.dlpm import Dlpm, DlpmParameters
from jaxserve.schedulers.service_meter import ServiceMeter
from jaxserve.server.answer import Answer
from jaxserve.server.convert import client_to_proto
from jaxserve.server.metrics import (
    CODES,
    CONTENT_TYPE,
    MOST_CLIENTS,
    OK,
    RequestMetrics,
    exposition,
)
from jaxserve.server.request_log import RequestRecord

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(jaxserve_\w+)(?:\{[\w,]+\})?` \| (\w+) \| (.+) \|$", re.MULTILINE)
ALWAYS = {"model_name": "tiny", "engine": "replica-0"}


class Calls:
    """Row control that nobody needs here."""

    def abort(self, request_id, *, sample, reason, keep_tokens): ...

    def limit_row(self, request_id, *, sample, max_steps): ...


def make_answer(metrics: RequestMetrics, **params) -> Answer:
    request = Request(
        request_id="r", prompt=np.arange(30, dtype=np.int32), params=SamplingParams(**params)
    )
    return Answer(
        request, Calls(), make_detokenizer=None, token_text=str, once=False, observer=metrics
    )


def feed(answer: Answer, *slices: int, sample: int = 0, finish: FinishReason | None = None) -> None:
    """Slices of so many tokens, some milliseconds apart; the last one ends the sample."""
    for place, count in enumerate(slices):
        last = finish is not None and place == len(slices) - 1
        end = REASON_TO_PROTO[finish] if last else pb.FINISH_REASON_UNSPECIFIED
        answer.on_delta(
            pb.RowDelta(sample=sample, token_ids=[5] * count, finish=end, cached_tokens=16)
        )
        time.sleep(0.004)


def record_of(answer: Answer, **fields) -> RequestRecord:
    """As the service writes it at the end of a request that took 2 s, 0.5 s to its first token."""
    usage = answer.usage
    measured = dict(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        samples=answer.request.params.n,
        finish=answer.finish_reasons,
        first_token_s=None if answer.first_token_at_s is None else 0.5,
        total_s=2.0,
    )
    return refusal(**{"code": OK, **measured, **fields})


def refusal(code: str, **fields) -> RequestRecord:
    return RequestRecord(
        request_id="r", method="Generate", model="", client="", peer="", code=code, **fields
    )


def read(metrics: RequestMetrics, replica: pb.ReplicaStatistics | None = None) -> dict:
    """Every sample of the page by name and further labels."""
    page = exposition(metrics, replica, model_name="tiny", engine="replica-0", num_live=3)
    samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert {name: labels.pop(name) for name in ALWAYS} == ALWAYS
            samples[sample.name.removeprefix("jaxserve_"), *labels.values()] = sample.value
    return samples


def test_tokens_of_a_delivery_share_its_gap():
    metrics = RequestMetrics()
    answer = make_answer(metrics, n=2, max_tokens=64)
    feed(answer, 3, 4, 1, finish=FinishReason.LENGTH)
    feed(answer, 2, 8, sample=1, finish=FinishReason.STOP)
    metrics.ended(record_of(answer), answer)
    page = read(metrics)
    assert page["generation_tokens_total",] == 18
    assert page["delivery_gap_seconds_count",] == 3
    assert page["delivery_gap_seconds_sum",] >= 3 * 0.004
    # Of the tokens but those that came first, each its part of the same time.
    assert page["inter_token_latency_seconds_count",] == 13
    assert page["inter_token_latency_seconds_sum",] == pytest.approx(
        page["delivery_gap_seconds_sum",]
    )
    assert page["request_success_total", "length"] == page["request_success_total", "stop"] == 1
    assert page["time_to_first_token_seconds_sum",] == 0.5
    assert page["e2e_request_latency_seconds_sum",] == 2.0
    assert page["request_time_per_output_token_seconds_sum",] == 1.5 / 8
    assert (page["prompt_tokens_total",], page["prompt_tokens_cached_total",]) == (30, 16)
    assert page["request_generation_tokens_bucket", "10.0"] == 0
    assert page["request_generation_tokens_bucket", "20.0"] == 1
    assert page["request_params_n_sum",] == 2 and page["request_params_max_tokens_sum",] == 64
    assert page["num_requests_live",] == 3 and page["engine_up",] == 0


def test_what_is_dropped_after_a_stop_string_is_not_counted(tokenizer):
    metrics = RequestMetrics()
    ids = tokenizer.encode("a. b. c. d.").tolist()
    request = Request(
        request_id="r", prompt=np.array([1], np.int32), params=SamplingParams(stop=("b.",))
    )
    answer = Answer(
        request,
        Calls(),
        make_detokenizer=lambda: tokenizer.detokenizer([]),
        token_text=tokenizer.token_text,
        once=False,
        observer=metrics,
    )
    answer.on_delta(pb.RowDelta(token_ids=ids))
    assert answer.complete
    assert read(metrics)["generation_tokens_total",] == answer.usage.completion_tokens < len(ids)


def test_requests_are_counted_by_how_they_end():
    metrics = RequestMetrics()
    for code in ("INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED"):
        metrics.refused(refusal(code))
    waiting = make_answer(metrics)
    metrics.ended(record_of(waiting, code="RESOURCE_EXHAUSTED"), waiting)  # by the engine
    left = make_answer(metrics)
    feed(left, 2)
    metrics.ended(record_of(left, code="CANCELLED"), left)
    late = make_answer(metrics)
    metrics.ended(record_of(late, code="DEADLINE_EXCEEDED"), late)
    lost = make_answer(metrics)
    feed(lost, 2)
    metrics.ended(record_of(lost, code="UNAVAILABLE"), lost)
    aborted = make_answer(metrics)
    aborted.end(FinishReason.ABORT)  # by the Abort call
    metrics.ended(record_of(aborted), aborted)
    page = read(metrics)
    rejected = {key[1]: n for key, n in page.items() if key[0] == "admission_rejections_total"}
    assert {reason for reason, n in rejected.items() if n} == {
        "bad_request",
        "unknown_model",
        "queue_full",
    }
    errors = {key[1]: n for key, n in page.items() if key[0] == "request_errors_total"}
    assert errors["CANCELLED"] == 2 and errors["UNAVAILABLE"] == errors["DEADLINE_EXCEEDED"] == 1
    assert page["aborts_total",] == 2 and page["request_success_total", "abort"] == 1
    assert page["e2e_request_latency_seconds_count",] == 4
    assert page["time_to_first_token_seconds_count",] == 2


def test_every_error_that_a_request_can_meet_is_shown_from_the_start():
    assert {kind.grpc_code for kind in JaxserveError.__subclasses__()} <= {
        *CODES,
        "FAILED_PRECONDITION",  # of flags and files, before there are requests
    }
    page = read(RequestMetrics())
    assert all(page["request_errors_total", code] == 0 for code in CODES)


def served_statistics() -> pb.ReplicaStatistics:
    """Of a core that served three requests, two with one prefix, a slice and 10 ms at a time."""
    core = EngineCore(
        CoreConfig(
            limits=Limits(vocab_size=97, max_context=256, max_samples=4),
            model_key="m",
            num_pages=40,
            page_size=8,
            tile=8,
            scheduler=SchedulerConfig(max_rows=2, slicing="fixed", slice_steps=4, overlap=False),
        )
    )
    device, now_s = ScriptedExecutor(vocab_size=97), 100.0
    for name, max_tokens in (("a", 10), ("b", 2), ("c", 6)):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        prompt = np.arange(12, dtype=np.int32)
        core.submit(Request(request_id=name, prompt=prompt, params=params), now_s)
    while not core.idle:
        plan = core.next_slice(now_s)
        assert plan is not None
        now_s += 0.01
        core.complete(device.wait(device.dispatch(plan)), now_s)
    values = core.statistics().values()
    return pb.ReplicaStatistics(replica="replica-0", values=values, engine_restarts=2)


def test_the_engine_shows_as_its_statistics_say():
    page = read(RequestMetrics(), served_statistics())
    assert page["engine_up",] == 1 and page["engine_restarts_total",] == 2
    assert page["num_requests_running",] == page["num_requests_waiting",] == 0
    # Rows: a and b, 4 steps; a and c; a's last 2 tokens, c's last 2. b's last 2 steps were idle.
    assert page["slices_total",] == page["slice_steps_count",] == 3
    assert page["slice_steps_sum",] == 10 and page["slice_steps_bucket", "2.0"] == 1
    assert page["slice_row_steps_total",] == 20 and page["slice_idle_row_steps_total",] == 2
    assert page["slice_seconds_sum",] == pytest.approx(0.010)
    assert page["request_queue_time_seconds_count",] == 3
    assert page["request_queue_time_seconds_sum",] == pytest.approx(0.01)  # c waited for b
    assert page["request_prefill_time_seconds_sum",] == pytest.approx(0.03)
    assert page["request_decode_time_seconds_sum",] == pytest.approx(0.02 + 0 + 0.01)
    assert page["prefill_tokens_total",] == 36
    assert page["kv_cache_usage_perc",] == 0 and page["cache_config_info", "8", "40"] == 1
    assert page["compiles_total", "startup"] == page["compiles_total", "serving"] == 0


def test_an_engine_that_says_less_shows_less():
    page = read(RequestMetrics(), pb.ReplicaStatistics(values={"running": 3.0}))
    assert page["num_requests_running",] == 3 and page["engine_up",] == 1
    assert ("slices_total",) not in page and ("kv_cache_usage_perc",) not in page


def shared_statistics(*names: str) -> pb.ReplicaStatistics:
    """Of clients that were let in one after the other, with 10 tokens of prompt; all wait again."""
    meter = ServiceMeter(Dlpm(DlpmParameters(quantum=100.0)))
    for number, name in enumerate((*names, *names)):
        meter.on(Arrive(number, name, 0, 100.0, 10, 5, 1))
    for number in range(len(names)):
        assert meter.next() is not None
        meter.on(Admit(number, 10 - number))
        meter.on(Enact([(number, 10 - number, 0)]))
    meter.on(Tick(102.5))
    clients = [client_to_proto(client, bound=1.0) for client in meter.clients()]
    return pb.ReplicaStatistics(values=meter.values(), clients=clients)


def test_service_is_shown_by_client_and_as_a_gap():
    page = read(RequestMetrics(), shared_statistics("ann", "bob"))
    kinds = {"computed": 9, "cached": 1, "output": 0}
    assert {kind: page["client_tokens_total", "bob", kind] for kind in kinds} == kinds
    assert page["client_service_tokens_total", "ann", "uncached"] == 10
    assert page["client_service_tokens_total", "bob", "uncached"] == 9
    assert page["client_service_tokens_total", "bob", "all"] == 10
    assert (page["client_deficit", "ann"], page["client_deficit", "bob"]) == (90, 91)
    assert (page["clients_known",], page["clients_backlogged",]) == (2, 2)
    assert (page["service_window_seconds",], page["service_gap_tokens",]) == (2.5, 1)
    assert page["service_gap_bound_tokens",] == 2 * (100 + 10)
    assert page["jain_service",] == pytest.approx(19**2 / (2 * (100 + 81)))


def test_a_client_cannot_write_metrics_by_its_name():
    names = ['x"} 1\njaxserve_up 1\n', "x\\n", "x\n", "\r\x00\u2028é🙂", '"', "\\"]
    page = read(RequestMetrics(), shared_statistics(*names))
    assert {key[1] for key in page if key[0] == "client_deficit"} == set(names)
    assert not any("up" == key[0] for key in page)


def test_only_so_many_clients_are_shown():
    statistics = shared_statistics(*map(str, range(9)))
    statistics.clients.extend(pb.ClientStatistics(client=f"small-{n}") for n in range(200))
    page = read(RequestMetrics(), statistics)
    shown = {key[1] for key in page if key[0] == "client_service_tokens_total"}
    assert len(shown) == MOST_CLIENTS and {*map(str, range(9))} < shown


def test_the_document_lists_what_is_exported():
    statistics = served_statistics()
    statistics.MergeFrom(shared_statistics("ann", "bob"))
    page = exposition(
        RequestMetrics(), statistics, model_name="tiny", engine="r", num_live=0
    ).decode()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE))
    meanings = dict(re.findall(r"^# HELP (\w+) (.+)$", page, re.MULTILINE))
    exported = {(name, kind, meanings[name]) for name, kind in types.items()}
    assert {name for name, _, _ in exported} == set(meanings)
    assert sorted(ROW.findall(DOC.read_text())) == sorted(exported)
    assert CONTENT_TYPE.startswith("text/plain")
