"""What the front end knows about a model's text: tokenizer, chat template, sampling defaults."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxserve.errors import BadRequest
from jaxserve.models.text_files import TextFiles
from jaxserve.request import SamplingParams
from jaxserve.server.chat_template import ChatTemplate
from jaxserve.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """`sampling_defaults` are fields of `SamplingParams` that requests leave open."""

    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    sampling_defaults: Mapping[str, float | int] = field(default_factory=dict)

    def need_tokenizer(self, field: str, got: object) -> Tokenizer:
        """The tokenizer. Raises BadRequest naming the field that needs it if there is none."""
        if self.tokenizer is None:
            raise BadRequest(field, got, "token ids only: the model has no tokenizer")
        return self.tokenizer

    def need_template(self, field: str, got: object) -> ChatTemplate:
        """The chat template. Raises BadRequest naming the field that needs it if there is none."""
        if self.template is None:
            allowed = "nothing: the model has no chat template; give one with --chat_template"
            raise BadRequest(field, got, allowed)
        return self.template

    def sampling_params(self, given: Mapping[str, Any], *, room: int) -> SamplingParams:
        """The parameters of a request that sets the fields `given`.

        The model's defaults fill in the others, as far as `room`, the tokens that the context has
        left, allows; a seed is drawn.
        """
        params = SamplingParams(**{**self.sampling_defaults, **given})
        if "max_tokens" not in given and params.max_tokens is not None and room > 0:
            params = replace(params, max_tokens=min(params.max_tokens, room))
        return params if params.seed is not None else replace(params, seed=secrets.randbits(63))


def load_model_text(files: TextFiles, *, with_defaults: bool = True) -> ModelText:
    """What the files say. Raises ConfigError for damaged ones.

    Without `with_defaults` the model's sampling defaults do not count.
    """
    template = files.chat_template
    return ModelText(
        tokenizer=None if files.tokenizer is None else Tokenizer.load(files.tokenizer),
        template=None if template is None else ChatTemplate(template, files.special_tokens),
        sampling_defaults=files.sampling_defaults if with_defaults else {},
    )
