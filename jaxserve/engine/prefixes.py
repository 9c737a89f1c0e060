"""What requests share of the KV pool: keys of prompts, and pages that are left for others to find.

Knows requests and page keys. Who gets pages, and when they change hands, is for `pages.py`.
"""

from jaxserve.engine.core_config import CoreConfig
from jaxserve.engine.sequence import Job, Sequence
from jaxserve.request import Request
from jaxserve.schedulers.pages import PagePool
from jaxserve.schedulers.prefix_tree import page_keys


class Prefixes:
    """The prefix cache as the engine uses it."""

    def __init__(self, config: CoreConfig, pool: PagePool):
        self._config, self._pool = config, pool

    def lookup_keys(self, request: Request) -> tuple[bytes, ...]:
        """Keys of the pages that a prompt could find cached; its last token runs anyway."""
        if not self._shares(request):
            return ()
        return request.page_keys[: (request.prompt.size - 1) // self._config.page_size]

    def num_cached(self, job: Job) -> int:
        """How many of a job's pages are cached."""
        return self._pool.tree.num_matched(job.page_keys)

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
        assert request.scope is not None
        # A decoding row's newest token has no key and value yet; a prefill has up to `computed`.
        whole = (row.length - 1 if row.started else row.computed) // size
        if whole <= row.lease.num_shared:
            return
        keys = list(request.page_keys[:whole])
        if whole > len(keys):
            first = len(keys)
            tokens = row.tokens(first * size)[: (whole - first) * size]
            parent = {"parent": keys[-1]} if keys else {}
            keys += page_keys(
                tokens,
                page_size=size,
                scope=request.scope,
                model=self._config.model_key,
                **parent,
            )
        self._pool.insert(row.lease, keys)

    def _shares(self, request: Request) -> bool:
        return self._config.prefix_cache and request.scope is not None
