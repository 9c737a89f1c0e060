"""A GenerateRequest into a judged `Request`: identity, tokens, seed and page keys.

Knows what a deployment accepts. Knows no stream and no engine.
"""

import asyncio
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from jaxserve.config import CacheConfig
from jaxserve.errors import BadRequest, UnknownModel
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.proto.convert import sampling_from_proto
from jaxserve.request import Limits, Request, SamplingParams, check_request
from jaxserve.schedulers.prefix_tree import page_keys, prefix_scope
from jaxserve.server.tokenizer import Tokenizer

CLIENT_KEY: Final = "x-jaxserve-client"
ANONYMOUS: Final = "anonymous"
MAX_NAME_CHARS: Final = 128
THREAD_CHARS: Final = 16_384
"""Longer texts are encoded in a thread (some 5 ms on a 2024 core), so that streams go on."""


@dataclass(frozen=True, slots=True)
class Intake:
    """Makes requests for one model. `described` is what its replica says of itself."""

    described: pb.DescribeResponse
    tokenizer: Tokenizer | None
    cache: CacheConfig

    @property
    def model(self) -> str:
        return self.described.model.model

    @property
    def limits(self) -> Limits:
        model = self.described.model
        return Limits(model.vocab_size, model.max_context, self.described.max_samples)

    def check_model(self, name: str) -> None:
        """Raises UnknownModel for any name but the model's own and the empty one."""
        if name not in ("", self.model):
            shown = repr(name[:MAX_NAME_CHARS])
            raise UnknownModel(f"model: got {shown}; this server has {self.model!r}")

    async def make_request(
        self, message: pb.GenerateRequest, metadata: Mapping[str, str]
    ) -> Request:
        """The request with every default filled in. Raises BadRequest and UnknownModel."""
        self.check_model(message.model)
        client = identify(message, metadata)
        params = self._sampling(message)
        ids = await self._prompt(message)
        request = Request(
            request_id=message.request_id or uuid.uuid4().hex,
            prompt=ids,
            params=params,
            client=client,
            priority=message.priority,
        )
        check_request(request, self.limits)
        # Judged as int64, so that an id beyond int32 is shown as it was sent.
        prompt = ids.astype(np.int32)
        scope = self._scope(message, client)
        keys = () if scope is None else self._page_keys(prompt, scope)
        return replace(request, prompt=prompt, scope=scope, page_keys=keys)

    def wants_text(self, message: pb.GenerateRequest) -> bool:
        """Whether the answer carries text: unless switched off, if the model has a tokenizer."""
        if not message.HasField("detokenize"):
            return self.tokenizer is not None
        return message.detokenize

    def need_tokenizer(self, field: str, got: object) -> Tokenizer:
        """The tokenizer. Raises BadRequest naming the field that needs it if there is none."""
        if self.tokenizer is None:
            raise BadRequest(field, got, f"token ids only: model {self.model!r} has no tokenizer")
        return self.tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """Ids of `text`, int32 [T], without holding up the event loop."""
        tokenizer = self.need_tokenizer("text", text)
        if len(text) < THREAD_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def _prompt(self, message: pb.GenerateRequest) -> np.ndarray:
        match message.WhichOneof("prompt"):
            case "token_ids":
                return np.asarray(message.token_ids.ids, np.int64)
            case "text" if message.text:
                return (await self.encode(message.text)).astype(np.int64)
            case "text":
                raise BadRequest("text", "", "at least one character")
        raise BadRequest("prompt", "nothing", "text or token_ids")

    def _sampling(self, message: pb.GenerateRequest) -> SamplingParams:
        params = sampling_from_proto(message.sampling)
        if message.detokenize:
            self.need_tokenizer("detokenize", True)
        if params.stop and not self.wants_text(message):
            raise BadRequest("stop", list(params.stop), "none where the answer is token ids only")
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        return params

    def _scope(self, message: pb.GenerateRequest, client: str) -> str | None:
        """Who may share pages with the request; None when nobody may."""
        # Prompt log-probabilities need every prompt position computed, so cached pages are no use.
        if not self.cache.prefix_cache or message.sampling.HasField("prompt_logprobs"):
            return None
        try:
            scope = prefix_scope(self.cache.prefix_scope, client=client, group=message.group)
        except ValueError:
            allowed = "a name, because this server runs with --prefix_scope=group"
            raise BadRequest("group", message.group, allowed) from None
        if message.cache_salt:
            # The length in front keeps scope and salt apart, whatever characters they hold.
            scope = f"{len(scope)}:{scope}{message.cache_salt}"
        return scope

    def _page_keys(self, prompt: np.ndarray, scope: str) -> tuple[bytes, ...]:
        size = self.described.server.page_size
        return tuple(page_keys(prompt, page_size=size, scope=scope, model=self.model))


def identify(message: pb.GenerateRequest, metadata: Mapping[str, str]) -> str:
    """The party that fairness is owed to: the metadata's word, then the message's, or nobody."""
    client = metadata.get(CLIENT_KEY) or message.client or ANONYMOUS
    if len(client) > MAX_NAME_CHARS:
        raise BadRequest("client", client, f"at most {MAX_NAME_CHARS} characters")
    return client
