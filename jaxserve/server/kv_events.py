"""The prefix tree's events as messages. Knows the tree's records; knows no stream.

Batches are bounded, since a snapshot of a large pool would not fit into one message. The events of
a snapshot all carry the number of the last event that it contains; only its first batch is marked
`snapshot`, which tells the reader to forget what it knew.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Final, Protocol, runtime_checkable

from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.schedulers.prefix_tree import (
    NO_PARENT,
    Cleared,
    Gap,
    KvEvent,
    Removed,
    Resumed,
    Snapshot,
    Stored,
)

EVENTS_PER_BATCH: Final = 4096


@runtime_checkable
class EventSource(Protocol):
    """A prefix tree, as far as it is asked here."""

    def events_since(self, seq: int) -> Resumed | Gap: ...

    def snapshot(self) -> Snapshot: ...


def kv_event_batches(
    tree: EventSource, *, after: int | None, replica: str
) -> tuple[int | None, list[pb.KvEventBatch]]:
    """What follows event `after`, and the number to ask for next.

    A snapshot when `after` is None, when events since then are not kept any more, and when the
    number is of another engine's life.
    """
    found = None if after is None else tree.events_since(after)
    if found is None or isinstance(found, Gap):
        snapshot = tree.snapshot()
        return snapshot.seq, _batches(_snapshot_events(snapshot), replica, is_snapshot=True)
    events = [_event(event) for event in found.events]
    return found.events[-1].seq if events else after, _batches(events, replica, is_snapshot=False)


def _batches(
    events: Sequence[pb.KvEvent], replica: str, *, is_snapshot: bool
) -> list[pb.KvEventBatch]:
    if not events:
        return [pb.KvEventBatch(replica=replica, snapshot=True)] if is_snapshot else []
    batches = []
    for start in range(0, len(events), EVENTS_PER_BATCH):
        part = list(islice(events, start, start + EVENTS_PER_BATCH))
        batches.append(
            pb.KvEventBatch(
                replica=replica,
                first_sequence=part[0].sequence,
                events=part,
                snapshot=is_snapshot and start == 0,
            )
        )
    return batches


def _snapshot_events(snapshot: Snapshot) -> list[pb.KvEvent]:
    return [
        pb.KvEvent(
            sequence=snapshot.seq, stored=pb.KvStored(parent_key=_parent(parent), keys=[key])
        )
        for parent, key in snapshot.pages
    ]


def _event(event: KvEvent) -> pb.KvEvent:
    match event:
        case Stored(seq, parent, keys):
            stored = pb.KvStored(parent_key=_parent(parent), keys=keys)
            return pb.KvEvent(sequence=seq, stored=stored)
        case Removed(seq, keys):
            return pb.KvEvent(sequence=seq, removed=pb.KvRemoved(keys=keys))
        case Cleared(seq):
            return pb.KvEvent(sequence=seq, cleared=pb.KvCleared())


def _parent(key: bytes) -> bytes:
    """On the wire a first page has no parent."""
    return b"" if key == NO_PARENT else key
