"""Prefix-tree events as batches: snapshots first, consecutive numbers after, bounded messages."""

import pytest

from jaxserve.proto import jaxserve_v1_pb2 as pb
from jaxserve.schedulers.prefix_tree import (
    NO_PARENT,
    Cleared,
    Gap,
    Removed,
    Resumed,
    Snapshot,
    Stored,
)
from jaxserve.server import kv_events


class Tree:
    """Holds the events it is given, the first of them numbered 1."""

    def __init__(self, *events, first=1, pages=()):
        self.events, self.first, self.pages = events, first, pages

    def events_since(self, seq):
        last = self.first + len(self.events) - 1
        if not self.first - 1 <= seq <= last:
            return Gap(self.first, last)
        return Resumed(tuple(self.events[seq - self.first + 1 :]))

    def snapshot(self):
        return Snapshot(self.first + len(self.events) - 1, tuple(self.pages))


def key(number):
    return bytes([number]) * 16


EVENTS = (
    Stored(1, NO_PARENT, (key(1), key(2))),
    Stored(2, key(2), (key(3),)),
    Removed(3, (key(3),)),
)


def batches(tree, after):
    return kv_events.kv_event_batches(tree, after=after, replica="r")


def test_events_keep_their_numbers_and_a_first_page_has_no_parent():
    after, (batch,) = batches(Tree(*EVENTS, Cleared(4)), 0)
    assert after == 4 and batch.first_sequence == 1 and not batch.snapshot
    assert [event.sequence for event in batch.events] == [1, 2, 3, 4]
    assert batch.events[0].stored == pb.KvStored(keys=[key(1), key(2)])
    assert batch.events[1].stored.parent_key == key(2)
    assert batch.events[2].removed.keys == [key(3)]
    assert batch.events[3].WhichOneof("event") == "cleared"


def test_nothing_new_is_no_batch():
    assert batches(Tree(*EVENTS), 3) == (3, [])


@pytest.mark.parametrize("after", [None, 1, 99])
def test_who_cannot_resume_gets_a_snapshot(after):
    tree = Tree(*EVENTS[2:], first=3, pages=[(NO_PARENT, key(1)), (key(1), key(2))])
    after, (batch,) = batches(tree, after)
    assert after == 3 and batch.snapshot
    assert [event.stored.keys[0] for event in batch.events] == [key(1), key(2)]


def test_an_empty_snapshot_still_says_forget():
    after, (batch,) = batches(Tree(), None)
    assert after == 0 and batch.snapshot and not batch.events
    assert batches(Tree(), after) == (0, [])


def test_a_long_snapshot_comes_in_parts_of_which_the_first_is_marked(monkeypatch):
    monkeypatch.setattr(kv_events, "EVENTS_PER_BATCH", 2)
    tree = Tree(*EVENTS, pages=[(NO_PARENT, key(number)) for number in range(5)])
    _, parts = batches(tree, None)
    assert [(len(part.events), part.snapshot) for part in parts] == [
        (2, True),
        (2, False),
        (1, False),
    ]
    assert {event.sequence for part in parts for event in part.events} == {3}
