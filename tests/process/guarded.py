"""A victim with a guard: what a batch in it holds while it runs."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.process.victims import Victim
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.linux.syscalls import NR

RECVMSG = 47


class Setting:
    """A victim, and a pipe whose write end stands for the userfaultfd: `held` by whom?"""

    def __init__(self, program: Path, pass_fds: tuple[int, ...] = ()) -> None:
        self.mailbox, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.victim = Victim(program, pass_fds=(theirs.fileno(), *pass_fds))
        self.their_mailbox = theirs.fileno()
        theirs.close()
        self.read_end, self.write_end = os.pipe()

    def close(self) -> None:
        self.victim.__exit__(None, None, None)
        self.mailbox.close()
        os.close(self.read_end)
        self.forget()

    def forget(self) -> None:
        """Close our own copy of what is guarded."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    @property
    def is_held(self) -> bool:
        """Whether any process has the guarded descriptor."""
        poll = select.poll()
        poll.register(self.read_end, 0)
        return not poll.poll(0)

    def wait_until_let_go(self) -> None:
        poll = select.poll()
        poll.register(self.read_end, 0)
        assert poll.poll(10_000), "somebody still holds it"

    @contextmanager
    def session(self, die_at: str = "", times: int = 1) -> Iterator[tuple[RemoteThread, Guard]]:
        """A session with a guard; once it is open, killed when it reaches `die_at` so often."""
        is_open, left = False, times

        def fault(step: str) -> None:
            nonlocal left
            if is_open and step == die_at:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        victim = self.victim
        with (
            RemoteThread("victim", victim.pid, victim.worker, fault_point=fault) as remote,
            Guard(self.write_end) as guard,
        ):
            guard.lent(self.lend(remote, guard.theirs))
            is_open = True
            yield remote, guard

    def lend(self, remote: RemoteThread, fd: int) -> int:
        """Our descriptor into the victim, as a monitor would pass it."""
        socket.send_fds(self.mailbox, [b"x"], [fd])
        page = remote.call(NR.MMAP, 0, 4096, 3, 0x22, (1 << 64) - 1, 0)
        message = struct.pack("<QQQQQQQQQ", 0, 0, page + 56, 1, page + 80, 24, 0, page + 72, 1)
        with open(f"/proc/{self.victim.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(page)
            memory.write(message)
            remote.call(RECVMSG, self.their_mailbox, page, 0)
            memory.seek(page + 96)
            number = int.from_bytes(memory.read(4), "little")
        remote.call(NR.MUNMAP, page, 4096)
        return number
