"""How much of a VM's memory its balloon has taken, and what virtio-mem has not plugged.

Owns the questions and the meaning of their answers. Promises amounts only: QEMU does not
record which pages the balloon took (hw/virtio/virtio-balloon.c), and does not tell which
blocks are plugged (hw/virtio/virtio-mem.c). Reads only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmdedup.attach import replies
from vmdedup.attach.monitor import Question
from vmdedup.units import PAGE_BYTES

QUESTIONS: Sequence[Question[Any]] = (
    Question("query-balloon", replies.BalloonReply, None),
    Question("query-memory-size-summary", replies.MemorySizeReply, None),
    Question("query-memory-devices", replies.MemoryDevices, []),
)


@dataclass(frozen=True)
class Balloon:
    """A balloon: the RAM that it is measured against, and how much of it the guest keeps."""

    ram_bytes: int
    actual_bytes: int

    @property
    def pages(self) -> int:
        """Pages that the balloon has taken from the guest."""
        return max(0, self.ram_bytes - self.actual_bytes) // PAGE_BYTES


@dataclass(frozen=True)
class Taken:
    """The memory of a VM that its guest does not have now."""

    balloon: Balloon | None = None
    """`None` if it has no balloon."""
    unplugged_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes that are not plugged, by the backend of each virtio-mem device."""


def taken_of(answers: Sequence[Any]) -> Taken:
    """What the answers to `QUESTIONS` say."""
    unplugged = {
        each.data.memdev.rsplit("/", 1)[-1]: max(0, each.data.max_size - each.data.size)
        for each in answers[2]
        if each.type == "virtio-mem"
    }
    return Taken(_balloon_of(answers), unplugged)


def _balloon_of(answers: Sequence[Any]) -> Balloon | None:
    left, size, devices = answers
    if left is None or size is None:
        return None
    # QEMU counts DIMMs, and no other memory devices (get_current_ram_size).
    plugged = sum(each.data.size for each in devices if each.type == "dimm")
    return Balloon(size.base_memory + plugged, left.actual)
