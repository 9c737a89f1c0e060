"""`jaxserve generate`: one prompt to stdout, as it comes, from a server or from an engine in here.

Text goes to stdout and ends with a newline; everything else goes to stderr. A model without
tokenizer prints token ids. Exit codes: 0 done, 1 the answer failed, 2 bad input, 130 interrupted.
"""

import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console

from jaxserve.config import EngineConfig
from jaxserve.errors import BadRequest, ConfigError, InternalError, JaxserveError
from jaxserve.flags import Settings
from jaxserve.request import Delta, FinishReason, Request, SamplingParams
from jaxserve.server.answer import Answer
from jaxserve.server.convert import report_to_proto
from jaxserve.server.logs import set_up_logging
from jaxserve.server.model_text import ModelText, load_model_text
from jaxserve.server.progress import ProgressDisplay
from jaxserve.server.tokenizer import Tokenizer
from jaxserve.server_config import GenerateConfig, LogConfig

if TYPE_CHECKING:
    from jaxserve.engine.core import Rejection
    from jaxserve.engine.driver import EngineDriver

EXIT_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130
REQUEST_ID: Final = "generate"


def main(settings: Settings) -> int:
    """Print one answer; returns the exit code. Raises ConfigError for what the user can mend."""
    config = _read_prompt(settings.record(GenerateConfig))
    # In the environment it may stand for other calls.
    if not config.server and "api_key" in settings.given(GenerateConfig):
        raise ConfigError("--api_key is for a server; leave it out without --server")
    settings.record(SamplingParams)  # raises what is wrong with the flags' types
    sampling = settings.values(SamplingParams)
    try:
        if config.server:
            pieces = answer_of_server(config, sampling, model=_model_for_server(settings))
        else:
            set_up_logging(settings.record(LogConfig).log_level)
            pieces = answer_of_engine(config, sampling, settings.record(EngineConfig))
        return asyncio.run(_print_all(pieces))
    except ConfigError:
        raise
    except JaxserveError as error:
        print(f"jaxserve: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, BadRequest) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the text has had enough; the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _read_prompt(config: GenerateConfig) -> GenerateConfig:
    if config.prompt != "-":
        return config
    try:
        return dataclasses.replace(config, prompt=sys.stdin.buffer.read().decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt: stdin is not UTF-8 at byte {error.start}") from None


def _model_for_server(settings: Settings) -> str:
    """The model to ask a server for. Raises ConfigError for flags that shape an engine."""
    given = settings.given(EngineConfig)
    foreign = [name for name in given if name != "model"]
    if foreign:
        raise ConfigError(f"--{foreign[0]} is the server's to set; leave it out with --server")
    return settings.by_name["model"].value if "model" in given else ""


async def _print_all(pieces: AsyncIterator[str]) -> int:
    async for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
    return 0


def _spaced(token_ids: Sequence[int]) -> str:
    return "".join(f"{token} " for token in token_ids)


async def answer_of_server(
    config: GenerateConfig, sampling: Mapping[str, Any], *, model: str
) -> AsyncIterator[str]:
    """The text, or the token ids, that the server at `config.server` answers.

    `sampling` are the fields that the command line sets; the server fills in the model's defaults.
    """
    from jaxserve.client import AsyncClient  # gRPC, which an engine in here does without

    async with AsyncClient(config.server, api_key=config.api_key) as client:
        has_text = bool(config.prompt) or (await client.model_info(model)).has_tokenizer
        chunks = client.generate(
            config.prompt or config.prompt_ids,
            sampling=sampling,
            timeout_s=config.timeout_s,
            model=model,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk.text if has_text else _spaced(chunk.token_ids)


def answer_of_engine(
    config: GenerateConfig, sampling: Mapping[str, Any], engine: EngineConfig
) -> AsyncIterator[str]:
    """The same from an engine in this process, built at once for one row at a time."""
    # JAX takes a second to load, which `--server` should not cost.
    from jaxserve.engine.build import build_engine
    from jaxserve.models.sources import load_model_config, parse_source
    from jaxserve.models.text_files import read_text_files

    text = load_model_text(read_text_files(engine.model))
    max_context = load_model_config(parse_source(engine.model)).max_context
    request = _make_request(config, sampling, text, max_context=max_context)
    local = _LocalAnswer(request, text.tokenizer)
    scheduler = dataclasses.replace(engine.scheduler, max_rows=1)
    progress = ProgressDisplay(Console(stderr=True))
    try:
        driver = build_engine(
            dataclasses.replace(engine, scheduler=scheduler),
            on_report=local.on_report,
            on_failure=local.on_failure,
            progress=progress.show,
        )
    finally:
        progress.close()
    return local.run(driver, timeout_s=config.timeout_s)


def _make_request(
    config: GenerateConfig, sampling: Mapping[str, Any], text: ModelText, *, max_context: int
) -> Request:
    if config.prompt and text.tokenizer is None:
        raise BadRequest("prompt", config.prompt, "--token_ids, since the model has no tokenizer")
    if config.prompt and text.tokenizer is not None:
        prompt = text.tokenizer.encode(config.prompt)
    else:
        prompt = np.asarray(config.prompt_ids, np.int64)
    params = text.sampling_params(sampling, room=max_context - prompt.size)
    return Request(request_id=REQUEST_ID, prompt=prompt, params=params)


class _LocalAnswer:
    """Joins one `Answer` to a driver in this process, as a link joins them across a socket."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self._has_text = tokenizer is not None
        self._driver: EngineDriver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        prompt = request.prompt.tolist()
        self._answer = Answer(
            request,
            self,
            make_detokenizer=None if tokenizer is None else lambda: tokenizer.detokenizer(prompt),
            token_text=str if tokenizer is None else tokenizer.token_text,
            once=False,
        )

    async def run(self, driver: "EngineDriver", *, timeout_s: float) -> AsyncIterator[str]:
        """Start `driver`, give out the answer, stop it."""
        self._driver, self._loop = driver, asyncio.get_running_loop()
        driver.start()
        try:
            now_s = time.monotonic()
            driver.submit(
                dataclasses.replace(
                    self._answer.request, arrived_s=now_s, deadline_s=now_s + timeout_s
                )
            )
            while messages := await self._answer.next_messages():
                for message in messages:
                    yield message.text if self._has_text else _spaced(message.token_ids)
        finally:
            driver.abort(REQUEST_ID)
            driver.stop()

    # RowControl, for the answer.

    def abort(
        self, request_id: str, *, sample: int, reason: FinishReason, keep_tokens: int | None
    ) -> None:
        assert self._driver is not None
        self._driver.abort(request_id, sample=sample, reason=reason, keep_tokens=keep_tokens)

    def limit_row(self, request_id: str, *, sample: int, max_steps: int) -> None:
        assert self._driver is not None
        self._driver.limit_row(request_id, sample, max_steps)

    # From the dispatch thread.

    def on_report(
        self, dispatch: int, deltas: Sequence[Delta], rejections: "Sequence[Rejection]"
    ) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._take, dispatch, deltas, rejections)

    def on_failure(self, error: BaseException) -> None:
        assert self._loop is not None
        failure = InternalError(f"the engine failed: {error}", error_id="none")
        self._loop.call_soon_threadsafe(self._answer.on_failure, failure)

    def _take(
        self, dispatch: int, deltas: Sequence[Delta], rejections: "Sequence[Rejection]"
    ) -> None:
        for delta in report_to_proto(dispatch, deltas, (), attempts={REQUEST_ID: 0}).deltas:
            self._answer.on_delta(delta)
        for rejection in rejections:
            self._answer.on_failure(rejection.error)
