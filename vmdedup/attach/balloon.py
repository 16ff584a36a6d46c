"""How much of a VM's memory its balloon has taken.

Owns the questions and the meaning of their answers. Promises an amount only: QEMU does not
record which pages the balloon took (hw/virtio/virtio-balloon.c). Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def balloon_of(answers: Sequence[Any]) -> Balloon | None:
    """The balloon by the answers to `QUESTIONS`; `None` if the VM has none."""
    left, size, devices = answers
    if left is None or size is None:
        return None
    # QEMU counts DIMMs, and no other memory devices (get_current_ram_size).
    plugged = sum(each.data.size for each in devices if each.type == "dimm")
    return Balloon(size.base_memory + plugged, left.actual)
