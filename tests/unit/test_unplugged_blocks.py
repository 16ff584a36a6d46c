"""Which blocks two states of a VM prove to be unplugged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vmdedup.core.rmap import FIRST_SLOT, OWN, ZERO
from vmdedup.guest.mapping_state import MappingState
from vmdedup.linux.pagemap import FILE, PFNZERO, PRESENT, SWAPPED
from vmdedup.vm.unplugged_blocks import Blocks, UnpluggedBlocks

pytestmark = pytest.mark.unit

STORE = FIRST_SLOT
SHOWN = PRESENT | FILE


def state(*pages: tuple[int, int]) -> MappingState:
    """A state of pages, each a slot and its categories."""
    slot = np.array([slot for slot, _ in pages], dtype=np.int32)
    categories = np.array([found for _, found in pages], dtype=np.uint8)
    return MappingState(slot, np.zeros(len(pages), dtype=np.uint8), categories, (), 0, 0)


def proved(
    before: MappingState, now: MappingState, *, share: bool = False, since: tuple[int, int] = (0, 0)
) -> list[bool]:
    """The blocks of two pages that are proved after these two states."""
    blocks = UnpluggedBlocks(len(now.slot))
    devices = [Blocks(slice(0, len(now.slot)), 2, share)]
    blocks.compare(None, before, devices, since[0])
    blocks.compare(before, now, devices, since[1])
    return [bool(block.all()) for block in blocks.pages.reshape(-1, 2)]


@pytest.mark.parametrize(
    "mapped", [(STORE, SHOWN), (STORE, 0), (ZERO, 0), (ZERO, PRESENT | PFNZERO)]
)
def test_a_block_that_has_lost_all_its_own_pages_is_unplugged(mapped: tuple[int, int]) -> None:
    before = state((OWN, PRESENT), mapped, (OWN, SWAPPED), mapped)
    assert proved(before, state((OWN, 0), mapped, (OWN, 0), mapped)) == [True, True]
    # One of them is still there, in whatever form.
    for left in (PRESENT, SWAPPED, PRESENT | PFNZERO):
        assert proved(before, state((OWN, left), mapped, (OWN, 0), mapped)) == [False, True]


def test_what_proves_nothing() -> None:
    own, merged = (OWN, PRESENT), (STORE, 0)
    gone = (OWN, 0)
    nothing = [False]
    assert proved(state(gone, merged), state(gone, merged)) == nothing  # had none of its own
    assert proved(state(merged, merged), state(merged, merged)) == nothing  # was merged whole
    assert proved(state(own, merged), state((STORE, 0), merged)) == nothing  # was merged since
    assert proved(state(merged, merged), state(gone, merged)) == nothing  # was mapped back since
    assert proved(state(own, merged), state(gone, (STORE, PRESENT))) == nothing  # was written since
    for foreign in (PRESENT | FILE, PRESENT | PFNZERO, FILE):  # never its own
        assert proved(state((OWN, foreign), merged), state(gone, merged)) == nothing
    assert proved(state((OWN, FILE), merged), state(gone, merged), share=True) == [True]


def test_pages_merged_since_may_have_been_written_after_the_block_was_plugged_again() -> None:
    before = state((OWN, PRESENT), (STORE, 0), (OWN, PRESENT), (STORE, 0))
    now = state((OWN, 0), (STORE, 0), (OWN, 0), (STORE, 0))
    blocks = UnpluggedBlocks(4)
    devices = [Blocks(slice(0, 4), 2, share=True)]
    blocks.compare(None, before, devices, 0)
    blocks.merging(np.array([1]))  # written, and merged onto the same slot again
    blocks.compare(before, now, devices, 0)
    assert blocks.pages.tolist() == [False, False, True, True]
    blocks.compare(now, now, devices, 0)  # what has proved it is gone
    assert blocks.pages.tolist() == [False, False, True, True]
    blocks.merging(np.array([3]))
    blocks.compare(now, now, devices, 0)
    assert not blocks.pages.any()


def test_a_device_that_was_removed_may_have_been_a_balloon() -> None:
    before, now = state((OWN, PRESENT), (STORE, 0)), state((OWN, 0), (STORE, 0))
    assert proved(before, now) == [True]
    assert proved(before, now, since=(0, 1)) == [False]
    blocks = UnpluggedBlocks(2)
    blocks.compare(None, before, [], 0)
    blocks.compare(before, now, [], 0)  # beside a balloon
    assert not blocks.pages.any()


def test_a_block_stays_unplugged_until_it_has_pages_again() -> None:
    gone, merged = (OWN, 0), (STORE, 0)
    states = [state((OWN, PRESENT), merged), state(gone, merged), state(gone, merged)]
    blocks = UnpluggedBlocks(2)
    devices = [Blocks(slice(0, 2), 2, share=True)]
    blocks.compare(None, states[0], devices, 0)
    for before, now in itertools.pairwise(states):
        blocks.compare(before, now, devices, 0)
        assert blocks.pages.all()
    blocks.compare(states[-1], state((OWN, PRESENT), merged), devices, 0)
    assert not blocks.pages.any()
