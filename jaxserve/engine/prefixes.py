"""What requests share of the KV pool: keys of prompts, and pages that are left for others to find.

Knows requests and page keys. Who gets pages, and when they change hands, is for `pages.py`.
"""

from collections.abc import Callable

from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.sequence import Job, Sequence
from jaxserve.request import Request
from jaxserve.schedulers.pages import PagePool
from jaxserve.schedulers.prefix_tree import NO_PARENT, Match, page_keys

OutputKeys = Callable[[Sequence, range], list[bytes]]
"""Keys of a row's pages at these places, all behind those that its request came with."""


class Prefixes:
    """The prefix cache as the engine uses it; pages of output are named by their tokens, unless
    `output_keys` says otherwise."""

    def __init__(self, config: CoreConfig, pool: PagePool, output_keys: OutputKeys | None = None):
        self._config, self._pool = config, pool
        self._output_keys = self._hashed if output_keys is None else output_keys

    def lookup_keys(self, request: Request) -> tuple[bytes, ...]:
        """Keys of the pages that a prompt could find cached; its last token runs anyway."""
        if not self._shares(request):
            return ()
        return request.page_keys[: (request.prompt.size - 1) // self._config.page_size]

    def num_cached(self, job: Job) -> int:
        """How many of a job's pages are cached."""
        job.num_cached = self._pool.tree.num_matched(job.page_keys, guess=job.num_cached)
        return job.num_cached

    def match(self, job: Job) -> Match | None:
        """The pages of a job that are cached; None where nothing is shared."""
        if not job.page_keys:
            return None
        return self._pool.tree.match(job.page_keys, guess=job.num_cached)

    def share_prompt(self, row: Sequence) -> None:
        """The row's prompt is dispatched: whoever is dispatched later may read its pages."""
        request = row.job.request
        if row.lease is None or not self._shares(request) or not request.page_keys:
            return
        whole = request.prompt.size // self._config.page_size
        self._pool.insert(row.lease, request.page_keys[:whole])

    def remember(self, row: Sequence) -> None:
        """Put the full pages of what the row has computed, and the host accepted, into the tree."""
        request, size = row.job.request, self._config.page_size
        if row.lease is None or row.sample < 0 or not self._shares(request):
            return
        # A decoding row's newest token has no key and value yet; a prefill has up to `computed`.
        whole = (row.length - 1 if row.started else row.computed) // size
        if whole <= row.lease.num_shared:
            return
        keys = list(request.page_keys[:whole])
        if whole > len(keys):
            keys += self._output_keys(row, range(len(keys), whole))
        self._pool.insert(row.lease, keys)

    def _hashed(self, row: Sequence, places: range) -> list[bytes]:
        request, size = row.job.request, self._config.page_size
        assert request.scope is not None
        return page_keys(
            row.tokens(places.start * size)[: len(places) * size],
            page_size=size,
            scope=request.scope,
            model=self._config.model_key,
            parent=request.page_keys[places.start - 1] if places.start else NO_PARENT,
        )

    def _shares(self, request: Request) -> bool:
        return self._config.prefix_cache and request.scope is not None
