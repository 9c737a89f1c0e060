"""What a client asked for into a judged `Request`: tokens, defaults, seed and page keys.

Knows what a deployment accepts. Knows no dialect, no stream and no engine.
"""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from jaxserve.config import CacheConfig
from jaxserve.errors import BadRequest, UnknownModel
from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.request import Limits, Request, SamplingParams, check_request
from jaxserve.schedulers.prefix_tree import page_keys, prefix_scope
from jaxserve.server.identity import MAX_NAME_CHARS, Caller
from jaxserve.server.model_text import ModelText

THREAD_CHARS: Final = 16_384
"""Longer texts are encoded in a thread (some 5 ms on a 2024 core), so that streams go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as its dialect read it: nothing judged, nothing filled in.

    `prompt` is a text or token ids, int64 [T]; None if there was neither. `sampling` holds the
    fields of `SamplingParams` that were given. `client` is what the request says about itself.
    `detokenize` None means: text if the model has a tokenizer. `add_special_tokens` is about text.
    """

    prompt: str | np.ndarray | None
    sampling: Mapping[str, Any]
    model: str = ""
    request_id: str = ""
    client: str = ""
    priority: int = 0
    detokenize: bool | None = None
    add_special_tokens: bool = True
    cache_salt: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Intake:
    """Makes requests for one model. `described` is what its replica says of itself."""

    described: pb.DescribeResponse
    text: ModelText
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

    async def make_request(self, ask: Ask, caller: Caller) -> Request:
        """The request with every default filled in. Raises BadRequest and UnknownModel."""
        self.check_model(ask.model)
        priority = caller.priority(ask.priority)
        ids = await self._prompt(ask)
        request = Request(
            request_id=ask.request_id or uuid.uuid4().hex,
            prompt=ids,
            params=self._sampling(ask, num_prompt_tokens=ids.size),
            client=caller.client,
            weight=caller.weight,
            priority=priority,
        )
        check_request(request, self.limits)
        # Judged as int64, so that an id beyond int32 is shown as it was sent.
        prompt = ids.astype(np.int32)
        scope = self._scope(ask, caller.client)
        keys = () if scope is None else self._page_keys(prompt, scope)
        return replace(request, prompt=prompt, scope=scope, page_keys=keys)

    def wants_text(self, ask: Ask) -> bool:
        """Whether the answer carries text: unless switched off, if the model has a tokenizer."""
        return self.text.tokenizer is not None if ask.detokenize is None else ask.detokenize

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """Ids of `text`, int32 [T], without holding up the event loop."""
        tokenizer = self.text.need_tokenizer("text", text)
        if len(text) < THREAD_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def _prompt(self, ask: Ask) -> np.ndarray:
        if ask.prompt is None:
            raise BadRequest("prompt", "nothing", "text or token_ids")
        if not isinstance(ask.prompt, str):
            return ask.prompt
        if not ask.prompt:
            raise BadRequest("text", "", "at least one character")
        ids = await self.encode(ask.prompt, add_special_tokens=ask.add_special_tokens)
        return ids.astype(np.int64)

    def _sampling(self, ask: Ask, *, num_prompt_tokens: int) -> SamplingParams:
        room = self.limits.max_context - num_prompt_tokens
        params = self.text.sampling_params(ask.sampling, room=room)
        if ask.detokenize:
            self.text.need_tokenizer("detokenize", True)
        if params.stop and not self.wants_text(ask):
            raise BadRequest("stop", list(params.stop), "none where the answer is token ids only")
        return params

    def _scope(self, ask: Ask, client: str) -> str | None:
        """Who may share pages with the request; None when nobody may."""
        # Prompt log-probabilities need every prompt position computed, so cached pages are no use.
        if not self.cache.prefix_cache or ask.sampling.get("prompt_logprobs") is not None:
            return None
        try:
            scope = prefix_scope(self.cache.prefix_scope, client=client, group=ask.group)
        except ValueError:
            allowed = "a name, because this server runs with --prefix_scope=group"
            raise BadRequest("group", ask.group, allowed) from None
        if ask.cache_salt:
            # The length in front keeps scope and salt apart, whatever characters they hold.
            scope = f"{len(scope)}:{scope}{ask.cache_salt}"
        return scope

    def _page_keys(self, prompt: np.ndarray, scope: str) -> tuple[bytes, ...]:
        size = self.described.server.page_size
        return tuple(page_keys(prompt, page_size=size, scope=scope, model=self.model))
