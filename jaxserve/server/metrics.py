"""What /metrics says: the front end's own counts, and the engine's as its statistics give them.

Knows names, labels and Prometheus' text format. Knows no socket: who serves the page asks the
replica for its statistics and calls `exposition`. docs/metrics.md lists every metric.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxserve.histogram import INFINITY, Histogram, decades
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.request import FinishReason
from jaxserve.server.answer import Answer
from jaxserve.server.request_log import RequestRecord

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
PREFIX: Final = "jaxserve_"
OK: Final = "OK"
MOST_CLIENTS: Final = 100
"""Those with most service; further ones are not shown. A label per name that requests make up would
be too many, and to sum them up as one would make a counter that goes back."""

REJECTIONS: Final = {
    "INVALID_ARGUMENT": "bad_request",
    "UNAUTHENTICATED": "unauthenticated",
    "NOT_FOUND": "unknown_model",
    "RESOURCE_EXHAUSTED": "queue_full",
    "UNAVAILABLE": "not_ready",
    "UNIMPLEMENTED": "not_built",
}
"""Why a request was refused, by the code of its answer."""

CODES: Final = (*REJECTIONS, "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")
"""What a request may end with but OK. They are shown from the start, so that rates begin at 0."""

# ---------------------------------------------------------------------------- what is exported

_HISTOGRAM_HELP: Final = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": (
        "Time per token within a sample: k tokens that come g after those before are k values of"
        " g/k. The tokens that come first are not among them."
    ),
    "delivery_gap_seconds": "Time between two deliveries of tokens to one sample.",
    "request_time_per_output_token_seconds": (
        "From a request's first token to its end, by the further tokens of a sample."
    ),
    "e2e_request_latency_seconds": "From a request's arrival to its end, however it ended.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Output tokens of a request, all samples together.",
    "request_params_n": "Samples that a request asked for.",
    "request_params_max_tokens": "The max_tokens of a request that gave one.",
}
_FRONTEND_COUNTER_HELP: Final = {
    "prompt_tokens": "Prompt tokens of requests that ended.",
    "prompt_tokens_cached": "Those of the prompt tokens that the prefix cache had.",
    "generation_tokens": "Output tokens received, when they came.",
    "aborts": "Requests that their client, or the Abort call, ended early.",
}
_LABELLED_COUNTER_HELP: Final = {
    "request_success": (
        "finished_reason",
        "Samples of requests that were answered, by how they ended.",
    ),
    "admission_rejections": (
        "reason",
        "Requests refused before their first token, by front end or engine.",
    ),
    "request_errors": ("code", "Requests that ended with an error, by gRPC code."),
}
_ENGINE_HISTOGRAM_HELP: Final = {
    "slice_steps": "Decode steps run by a slice.",
    "slice_seconds": "Time that the device was busy with a slice.",
    "scheduling_seconds": "The host's work around a slice: parsing, planning, dispatching.",
    "request_queue_time_seconds": "From a request's arrival to the first slice that runs it.",
    "request_prefill_time_seconds": "From the first slice that runs a request to its first token.",
    "request_decode_time_seconds": "From a request's first token to its end, unless aborted.",
}
_ENGINE_GAUGES: Final = {
    "num_requests_running": ("running", "Requests that hold rows."),
    "num_requests_waiting": ("waiting", "Requests in the queue."),
    "clients_known": (
        "clients_known",
        "Clients that are remembered: of the last hour, and at most 1000 without requests.",
    ),
    "clients_backlogged": (
        "clients_backlogged",
        "Clients with waiting requests whose service is compared.",
    ),
    "service_window_seconds": (
        "service_window_seconds",
        "Time for which all of these have had waiting requests at every moment.",
    ),
    "service_gap_tokens": (
        "service_gap_tokens",
        "Most service beyond the least among these in that time, in priced tokens by weight.",
    ),
    "service_gap_bound_tokens": (
        "service_gap_bound_tokens",
        "What the order promises that the gap never exceeds; missing if it promises nothing.",
    ),
    "jain_service": (
        "jain_service",
        "Jain's index of that service, 1 is even; missing if fewer than two clients had demand.",
    ),
}
_CLIENT_COUNTER_HELP: Final = {
    "client_service_tokens": (
        "Service in priced tokens: all prompt tokens priced, or those alone that were not cached."
    ),
    "client_tokens": "Prompt tokens computed, prompt tokens found cached, and output tokens.",
}
_ENGINE_COUNTERS: Final = {
    "num_preemptions": ("preemptions", "Times that a request lost its rows to others."),
    "prefix_cache_queries": ("prefix_query_tokens", "Tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hit_tokens", "Tokens found in the prefix cache."),
    "prefill_tokens": ("prefill_tokens", "Prompt tokens run, those run again too."),
    "recomputed_tokens": ("recomputed_tokens", "Tokens run again after a preemption."),
    "slices": ("slices", "Slices dispatched."),
    "slice_row_steps": ("row_steps", "Rows times steps of all slices."),
    "slice_idle_row_steps": (
        "slice_idle_row_steps",
        "Row-steps that ran no prompt and made no token that counts.",
    ),
    "scheduler_cpu_seconds": ("host_s", "Time of the host's work around slices."),
}
_OTHER_HELP: Final = {
    "engine_up": "1 while the engine answers, else 0; then all that is the engine's is missing.",
    "num_requests_live": "Requests that the front end is answering.",
    "kv_cache_usage_perc": "Share of KV pages that running requests hold, 0 to 1.",
    "cache_config_info": "The KV cache's shape, in labels.",
    "engine_restarts": "Engine processes before this one.",
    "compiles": "Programs compiled, at start-up and while serving (there should be none).",
    "client_deficit": "Priced tokens a client has credit for, below 0 if overdrawn (dlpm alone).",
}


class RequestMetrics:
    """The front end's counts since its start. All methods belong to one event loop.

    It is the observer of every `Answer`; the service calls `ended` or `refused` once a request.
    """

    def __init__(self) -> None:
        self.inter_token_latency_seconds = Histogram(decades(-4, 1))
        self.delivery_gap_seconds = Histogram(decades(-3, 2))
        self.time_to_first_token_seconds = Histogram(decades(-3, 2))
        self.request_time_per_output_token_seconds = Histogram(decades(-4, 1))
        self.e2e_request_latency_seconds = Histogram(decades(-2, 3))
        self.request_prompt_tokens = Histogram(decades(0, 6))
        self.request_generation_tokens = Histogram(decades(0, 6))
        self.request_params_n = Histogram(decades(0, 2))
        self.request_params_max_tokens = Histogram(decades(0, 6))
        self.prompt_tokens = self.prompt_tokens_cached = self.generation_tokens = 0
        self.aborts = 0
        self.request_success = {
            reason.value: 0
            for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)
        }
        self.admission_rejections = dict.fromkeys(REJECTIONS.values(), 0)
        self.request_errors = dict.fromkeys(CODES, 0)

    def on_tokens(self, count: int, gap_s: float | None) -> None:
        """DeliveryObserver: a sample's tokens came."""
        self.generation_tokens += count
        if gap_s is not None:
            self.delivery_gap_seconds.observe(gap_s)
            self.inter_token_latency_seconds.observe(gap_s / count, count)

    def refused(self, record: RequestRecord) -> None:
        """A request ended before it had an Answer, with the code in its complete record."""
        self._count_error(record)
        if record.code in REJECTIONS:
            self.admission_rejections[REJECTIONS[record.code]] += 1

    def ended(self, record: RequestRecord, answer: Answer) -> None:
        """A request that had an Answer ended; its record is complete, times and tokens too."""
        if record.first_token_s is None and record.code in REJECTIONS:
            self.refused(record)  # by the engine
            return
        self._count_error(record)
        self._count_end(record)
        self.prompt_tokens += record.prompt_tokens
        self.prompt_tokens_cached += record.cached_tokens
        self.request_prompt_tokens.observe(record.prompt_tokens)
        self.request_generation_tokens.observe(record.completion_tokens)
        params = answer.request.params
        self.request_params_n.observe(params.n)
        if params.max_tokens is not None:
            self.request_params_max_tokens.observe(params.max_tokens)
        self.e2e_request_latency_seconds.observe(record.total_s)
        if record.first_token_s is not None:
            self.time_to_first_token_seconds.observe(record.first_token_s)
            further = record.completion_tokens / record.samples - 1
            if further > 0:
                per_token_s = (record.total_s - record.first_token_s) / further
                self.request_time_per_output_token_seconds.observe(per_token_s)

    def _count_error(self, record: RequestRecord) -> None:
        if record.code != OK:
            self.request_errors[record.code] = self.request_errors.get(record.code, 0) + 1

    def _count_end(self, record: RequestRecord) -> None:
        aborted = FinishReason.ABORT.value in record.finish
        self.aborts += aborted or record.code == "CANCELLED"
        for reason in record.finish if record.code == OK else ():
            self.request_success[reason] = self.request_success.get(reason, 0) + 1


def exposition(
    metrics: RequestMetrics,
    replica: pb.ReplicaStatistics | None,
    *,
    model_name: str,
    engine: str,
    num_live: int,
) -> bytes:
    """The page, as `CONTENT_TYPE` says. `replica` is None while the engine does not answer.

    `model_name` and `engine` (the replica's name) are the labels of all; `num_live` requests are
    being answered. What an engine does not report is left out.
    """
    labels = {"model_name": model_name, "engine": engine}
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(metrics, replica, labels, num_live))
    return generate_latest(registry)


def _of_client(name: str, client: pb.ClientStatistics) -> dict[str, float | int]:
    """A counter of a client by kind."""
    if name == "client_service_tokens":
        return {"all": client.service, "uncached": client.service_uncached}
    served = client.served
    return {"computed": served.computed, "cached": served.cached, "output": served.output}


class _Page(Collector):
    """One page's metrics, in the order of the tables above."""

    def __init__(
        self,
        metrics: RequestMetrics,
        replica: pb.ReplicaStatistics | None,
        labels: Mapping[str, str],
        num_live: int,
    ):
        self._metrics = metrics
        self._replica = replica
        self._names, self._labels = list(labels), list(labels.values())
        self._num_live = num_live

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, text in _HISTOGRAM_HELP.items():
            yield self._histogram(name, text, getattr(metrics, name))
        for name, text in _FRONTEND_COUNTER_HELP.items():
            yield self._counter(name, text, getattr(metrics, name))
        for name, (label, text) in _LABELLED_COUNTER_HELP.items():
            yield self._labelled_counter(name, text, label, getattr(metrics, name))
        yield self._other(self._gauge, "num_requests_live", self._num_live)
        yield self._other(self._gauge, "engine_up", int(self._replica is not None))
        if self._replica is not None:
            yield from self._engine(self._replica)

    def _engine(self, replica: pb.ReplicaStatistics) -> Iterator[Metric]:
        values = dict(replica.values)
        for name, text in _ENGINE_HISTOGRAM_HELP.items():
            histogram = Histogram.from_flat(name, values)
            if histogram is not None:
                yield self._histogram(name, text, histogram)
        for make, table in ((self._gauge, _ENGINE_GAUGES), (self._counter, _ENGINE_COUNTERS)):
            for name, (key, text) in table.items():
                if key in values:
                    yield make(name, text, values[key])
        if "pool_total" in values:
            yield from self._cache(values)
        yield self._other(self._counter, "engine_restarts", replica.engine_restarts)
        if "compiles_serving" in values:
            compiles = {when: values[f"compiles_{when}"] for when in ("startup", "serving")}
            yield self._labelled_counter("compiles", _OTHER_HELP["compiles"], "when", compiles)
        yield from self._clients(replica.clients[:MOST_CLIENTS])

    def _clients(self, clients: Sequence[pb.ClientStatistics]) -> Iterator[Metric]:
        """Names are the clients' own words: the library escapes them."""
        for name, text in _CLIENT_COUNTER_HELP.items():
            names = [*self._names, "client", "kind"]
            family = CounterMetricFamily(PREFIX + name, text, labels=names)
            for client in clients:
                for kind, value in _of_client(name, client).items():
                    family.add_metric([*self._labels, client.client, kind], value)
            yield family
        text = _OTHER_HELP["client_deficit"]
        family = GaugeMetricFamily(PREFIX + "client_deficit", text, labels=[*self._names, "client"])
        for client in clients:
            if client.has_credit:
                family.add_metric([*self._labels, client.client], client.credit)
        yield family

    def _cache(self, values: Mapping[str, float]) -> Iterator[Metric]:
        total, unused = values["pool_total"], values["pool_free"] + values["pool_evictable"]
        yield self._other(self._gauge, "kv_cache_usage_perc", 1 - unused / total)
        shape = {"block_size": values["page_size"], "num_gpu_blocks": total}
        info = GaugeMetricFamily(
            PREFIX + "cache_config_info",
            _OTHER_HELP["cache_config_info"],
            labels=[*self._names, *shape],
        )
        info.add_metric([*self._labels, *(str(int(value)) for value in shape.values())], 1)
        yield info

    def _other(
        self, make: Callable[[str, str, float | int], Metric], name: str, value: float | int
    ) -> Metric:
        return make(name, _OTHER_HELP[name], value)

    def _gauge(self, name: str, text: str, value: float | int) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=self._names)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float | int) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=self._names)
        family.add_metric(self._labels, value)
        return family

    def _labelled_counter(
        self, name: str, text: str, label: str, values: Mapping[str, float | int]
    ) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[*self._names, label])
        for what, value in values.items():
            family.add_metric([*self._labels, what], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=self._names)
        buckets: list[Any] = [
            ("+Inf" if bound == INFINITY else repr(bound), total)
            for bound, total in histogram.cumulative()
        ]
        family.add_metric(self._labels, buckets, histogram.sum)
        return family
