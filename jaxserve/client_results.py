"""What the clients return: frozen records, and how messages become them. Knows no channel."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import REASON_FROM_PROTO
from jaxserve.request import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sample ended, and which stop string or token id ended it, if one did."""

    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted. `completion_tokens` is over all samples."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one message added to one sample.

    `finish` comes on a sample's last chunk, `usage` on the request's last, `prompt_logprobs` on its
    first (None stands for the first prompt token).
    """

    request_id: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole continuation."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `text` and `finish` are those of the first sample."""

    request_id: str
    samples: tuple[Sample, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def finish(self) -> Finish:
        return self.samples[0].finish


@dataclass(frozen=True, slots=True)
class Aborted:
    """Which ids were ended, and which no live request had."""

    aborted: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    model: str
    source: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_tokenizer: bool
    has_chat_template: bool
    sampling_defaults: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    version: str
    schema: str
    state: str
    platform: str
    device_kind: str
    num_devices: int
    uptime_s: float
    kv_pages: int
    page_size: int
    num_programs: int
    configuration: Mapping[str, str]
    kernels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ServedTokens:
    """Prompt tokens computed, prompt tokens found cached, and output tokens; none twice."""

    computed: int
    cached: int
    output: int


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """What one client asked for and got.

    `num_requests` and the tokens after it are of requests that ended since the server started.
    `served` is what the present engine process ran, `service` its price and `service_uncached` its
    price without cached tokens. `credit` is None where the scheduler keeps none; `bound`, on how
    far the service of clients that wait may be apart, is None where it promises none.
    """

    client: str
    weight: float
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    served: ServedTokens
    service: float
    service_uncached: float
    credit: float | None
    bound: float | None


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """One replica's numbers by name; `clients` where they were asked for."""

    replica: str
    engine_restarts: int
    values: Mapping[str, float]
    clients: tuple[ClientStatistics, ...] = ()


def chunk_from_proto(message: pb.GenerateResponse) -> Chunk:
    return Chunk(
        request_id=message.request_id,
        sample=message.sample,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        finish=_finish(message.finish) if message.HasField("finish") else None,
        usage=_usage(message.usage) if message.HasField("usage") else None,
        prompt_logprobs=_prompt_logprobs(message.prompt_logprobs),
    )


def completion_from_proto(message: pb.GenerateOnceResponse) -> Completion:
    samples = (
        Sample(
            text=sample.text,
            token_ids=tuple(sample.token_ids),
            finish=_finish(sample.finish),
            logprobs=_logprobs(sample.logprobs),
        )
        for sample in message.samples
    )
    return Completion(
        request_id=message.request_id,
        samples=tuple(samples),
        usage=_usage(message.usage),
        prompt_logprobs=_prompt_logprobs(message.prompt_logprobs),
    )


def model_info_from_proto(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        model=message.model,
        source=message.source,
        vocab_size=message.vocab_size,
        max_context=message.max_context,
        eos_token_ids=tuple(message.eos_token_ids),
        num_parameters=message.num_parameters,
        dtype=message.dtype,
        num_layers=message.num_layers,
        num_heads=message.num_heads,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        has_tokenizer=message.has_tokenizer,
        has_chat_template=message.has_chat_template,
        sampling_defaults=dict(message.sampling_defaults),
    )


def server_info_from_proto(message: pb.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=message.version,
        schema=message.schema,
        state=message.state,
        platform=message.platform,
        device_kind=message.device_kind,
        num_devices=message.num_devices,
        uptime_s=message.uptime_s,
        kv_pages=message.kv_pages,
        page_size=message.page_size,
        num_programs=message.num_programs,
        configuration=dict(message.configuration),
        kernels=dict(message.kernels),
    )


def statistics_from_proto(message: pb.GetStatisticsResponse) -> list[ReplicaStatistics]:
    return [
        ReplicaStatistics(
            replica=replica.replica,
            engine_restarts=replica.engine_restarts,
            values=dict(replica.values),
            clients=tuple(map(_client_statistics, replica.clients)),
        )
        for replica in message.replicas
    ]


def _client_statistics(message: pb.ClientStatistics) -> ClientStatistics:
    return ClientStatistics(
        client=message.client,
        weight=message.weight,
        num_requests=message.num_requests,
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
        served=ServedTokens(
            computed=message.served.computed,
            cached=message.served.cached,
            output=message.served.output,
        ),
        service=message.service,
        service_uncached=message.service_uncached,
        credit=message.credit if message.has_credit else None,
        bound=message.bound or None,
    )


def _finish(message: pb.Finish) -> Finish:
    reason = REASON_FROM_PROTO[message.reason]
    assert reason is not None
    return Finish(
        reason=reason,
        stop_string=message.stop_string if message.HasField("stop_string") else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        message=message.message,
    )


def _usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def _logprobs(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(_logprob(message) for message in messages)


def _prompt_logprobs(messages: Iterable[pb.PromptLogprob]) -> tuple[TokenLogprob | None, ...]:
    return tuple(
        _logprob(message.value) if message.HasField("value") else None for message in messages
    )


def _logprob(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((other.token_id, other.logprob) for other in message.top)
    return TokenLogprob(message.token_id, message.logprob, top)
