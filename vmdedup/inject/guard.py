"""A descriptor that QEMU holds only while a batch runs.

Owns the hand-over of a descriptor of ours to a batch of calls inside QEMU: mostly our
userfaultfd, and the device that one is made from (`remap.take_userfaultfd`). Pages stay
write-protected while any copy of the userfaultfd is open. Our own copy alone is not enough:
killed right after a launch, we would lift the protection while the launched calls still
run. A copy that stays in QEMU is no solution either: if we are killed before a launch, its
guests would wait for ever.

So the batch's first step receives the copy over a socket, and its last step closes
it (see `stub`). The copy is sent only after the launch:

- killed before the launch: nothing was sent, our copy was the only one;
- killed between launch and sending: the batch reads the end of the stream and
  begins no call;
- killed after sending: the batch takes the copy, runs to its end under
  protection, and closes it.

A thread that is kept waits here for the next batch's copy. It resumes its own work on
anything else: a byte without a copy, or the stream's end, which our death causes.

Promises that each batch gets one copy or none. Refuses nothing.
"""

from __future__ import annotations

import os
import socket
import weakref
from contextlib import suppress

from vmdedup.closing import Closing

_open: weakref.WeakSet[Guard] = weakref.WeakSet()


class Guard(Closing):
    """Hands copies of `fd` to batches. A context manager; does not own `fd`.

    `theirs` is the end of the socket that the target needs; `lent` notes its number there.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.number = -1
        """Descriptor number of the socket inside the target; `-1` before it was lent."""
        self._owed = False
        _open.add(self)

    def close(self) -> None:
        """Close our ends: a batch that still waits begins no call."""
        self._ours.close()
        self._theirs.close()

    @property
    def theirs(self) -> int:
        """The descriptor to lend to the target."""
        return self._theirs.fileno()

    @property
    def ours(self) -> int:
        """The descriptor over which copies are sent."""
        return self._ours.fileno()

    def lent(self, number: int) -> None:
        """Note that the target has its end, as descriptor `number`."""
        self.number = number
        self._theirs.close()

    def owe(self) -> None:
        """Note that a batch is about to be launched that waits for its copy."""
        self._owed = True

    def give(self) -> None:
        """Send the copy to the batch that was just launched."""
        try:
            socket.send_fds(self._ours, [b"\0"], [self._fd])
        except OSError:
            self.withdraw()
        self._owed = False

    def dismiss(self) -> None:
        """Release a kept thread, which waits for another batch."""
        with suppress(OSError):  # it has ended
            self._ours.send(b"\0")

    def withdraw(self) -> None:
        """End the wait of a batch that did not get its copy; the guard cannot be used again."""
        if self._owed:
            self._owed = False
            self._ours.close()


def _close_in_child() -> None:  # uncovered: coverage.py writes nothing in a forked child
    for guard in list(_open):
        guard.close()


os.register_at_fork(after_in_child=_close_in_child)
