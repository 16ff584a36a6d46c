"""A QMP socket that others use as well: connect, ask, leave.

Owns the *turns* on such a socket. QEMU serves one client at a time; the others wait in its
queue. So the monitor is connected only for a turn: it begins with the first command, ends
when no command follows at once, and is never longer than `MOST_HELD_S`. Promises that this
bound holds for everything: a command that QEMU does not answer is left behind, and so is a
`turn` block that takes too long. Clients are served in the order in which they come, so a
client that came meanwhile is served before the next turn begins.

Between turns no event is heard, and QEMU before 10 closes the descriptors that were lent to
it. `misses_events` and `connection` tell callers.

What a `kill -9` leaves: nothing. The kernel closes the connection, QEMU serves the next
client. The answer to a command that was left behind goes to the client that QEMU then serves
(QEMU: monitor/qmp.c: monitor_qmp_event drops queued commands, but not the running one).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient

from vmdedup.attach import monitor_loop as event_loop
from vmdedup.attach.qmp import QmpMonitor
from vmdedup.attach.qmp_client import BusyError, converse
from vmdedup.errors import AttachError, MonitorError, VmGoneError

T = TypeVar("T")

LINGER_S = 0.02
"""Pause after a command until the turn ends: most commands follow the one before at once."""
TURN_S = 1.0
"""No command is begun in a turn that is older, except in a `turn` block."""
MOST_HELD_S = 3.5
"""A turn ends after so long, whatever is still under way. Proxmox's tools wait for 5 s."""
_MARGIN_S = 0.1
_LEAST_ANSWER_S = 0.2
_GREETING_S = 1.0
"""Longest wait for others to leave the socket."""
_DISCONNECT_S = 0.5
_DEATH_WAIT_MS = 1000
"""As for any monitor: a process closes its files a moment before it counts as ended."""
_BUSY_PAUSE_S = 1.0
"""Pause before a socket on which somebody else stays is tried again."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 30.0
"""Pause before a QEMU that did not answer is asked again; it doubles each time."""


class SharedQmpMonitor(QmpMonitor):
    """The monitor of a VM, used in turns; else as `QmpMonitor`. Made by `connect`."""

    def __init__(
        self,
        vm: str,
        client: QMPClient,
        loop: asyncio.AbstractEventLoop,
        *,
        peer: tuple[int, int],
        owned: bool,
        token: str,
        socket_path: Path | None,
    ) -> None:
        self._one_at_a_time = threading.RLock()
        self._state = threading.Lock()
        """Guards the fields below; never held while anything is waited for."""
        self._turn = 0
        """The number of the turn under way, or of the last one."""
        self._is_open = False
        self._is_busy = False
        self._blocks = 0
        """`turn` blocks that are entered."""
        self._began_at = self._used_at = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self.longest_turn_s = 0.0
        """The longest turn so far, from the greeting to the moment the socket was left."""
        super().__init__(
            vm, client, loop, peer=peer, owned=owned, token=token, socket_path=socket_path
        )
        self._began()

    @property
    def misses_events(self) -> bool:
        """True: nothing is heard between turns."""
        return True

    @property
    def connection(self) -> int:
        """The number of the turn under way, `-1` between turns."""
        with self._state:
            return self._turn if self._is_open else -1

    @property
    def turn_left_s(self) -> float:
        """Seconds until the turn under way ends at the latest; `0` between turns."""
        with self._state:
            if not self._is_open:
                return 0.0
            return max(0.0, self._began_at + MOST_HELD_S - time.monotonic())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn for all commands of the block, unless that takes longer than a turn may."""
        with self._one_at_a_time:
            self._join("turn", afresh=True)
            with self._state:
                self._blocks += 1
                self._is_busy = False
        try:
            yield
        finally:
            with self._state:
                self._blocks -= 1
                self._used_at = time.monotonic()

    def close(self) -> None:
        """Leave the socket for good. Idempotent."""
        with self._state:
            was_open, self._is_open = self._is_open, False
            if was_open:
                self._note_length()
        super().close()

    # --- turns ------------------------------------------------------------------------

    def _call(
        self, command: str, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float
    ) -> T:
        if self._turn == 0:  # asked while this is being made: connected already
            return super()._call(command, work, timeout_s)
        with self._one_at_a_time:
            left_s = self._join(command)
            try:
                answer = super()._call(command, work, min(timeout_s, left_s))
            except MonitorError as error:
                # QEMU's own refusals are answers here: this one has not come.
                self._leave()
                if error.unanswered:
                    raise
                self._note_unanswered(command, 0.0, bool)
                reason = f"{error.reason}, or its turn on the shared monitor was over"
                raise MonitorError(
                    self.vm, command, reason, pid=self._pid, unanswered=True
                ) from error
            except BaseException:
                self._leave()
                raise
            self._pause_s = _FIRST_PAUSE_S
            with self._state:
                self._is_busy = False
                self._used_at = time.monotonic()
                is_over = self._blocks == 0 and self._used_at - self._began_at >= TURN_S
            if is_over:
                self._leave()
            return answer

    def _join(self, command: str, *, afresh: bool = False) -> float:
        """Begin a turn unless one is under way; the seconds left for an answer.

        `afresh`: rather begin a new turn than join one that has lasted for a while.
        """
        with self._state:
            age_s = time.monotonic() - self._began_at
            if self._is_open and (self._blocks or age_s < (TURN_S / 2 if afresh else TURN_S)):
                self._is_busy = True
                return max(_LEAST_ANSWER_S, MOST_HELD_S - _MARGIN_S - age_s)
        self._leave()
        self._begin(command)
        return MOST_HELD_S - _MARGIN_S

    def _begin(self, command: str) -> None:
        if self._closed:
            raise MonitorError(self.vm, command, "the monitor was closed", pid=self._pid)
        self.require_answering(command)
        assert self.socket_path is not None
        began_at = time.monotonic()
        means = (self._loop, self._token, self._events)
        try:
            client, peer = converse(self.vm, self.socket_path, *means, _GREETING_S)
        except AttachError as error:
            reason = f"others use its monitor {self.socket_path}; it is asked when they have left"
            if not isinstance(error, BusyError):
                self._raise_if_gone(wait_ms=_DEATH_WAIT_MS)
                reason = f"its monitor {self.socket_path} cannot be used: {error.reason}"
            waited_s = time.monotonic() - began_at
            self._note_pause(command, waited_s, _BUSY_PAUSE_S, reason)
            raise MonitorError(self.vm, command, reason, pid=self._pid, unanswered=True) from error
        if peer[0] != self._pid:
            self._disconnect(client)
            raise VmGoneError(self.vm, "the VM's process ended", pid=self._pid)
        self._client = client
        self._began(is_busy=True)

    def _began(self, *, is_busy: bool = False) -> None:
        with self._state:
            self._turn += 1
            self._is_open, self._is_busy = True, is_busy
            self._began_at = self._used_at = time.monotonic()
            watching = self._watch(self._turn, self._client)
        asyncio.run_coroutine_threadsafe(watching, self._loop)

    async def _watch(self, turn: int, client: QMPClient) -> None:
        """End the turn when it is idle, or has lasted too long."""
        while True:
            await asyncio.sleep(LINGER_S / 2)
            with self._state:
                if self._turn != turn or not self._is_open:
                    return
                now = time.monotonic()
                idle = not (self._is_busy or self._blocks) and now - self._used_at >= LINGER_S
                if not idle and now - self._began_at < MOST_HELD_S:
                    continue
                self._is_open = False
                self._note_length()
            await _leave(client)
            return

    def _leave(self) -> None:
        """End the turn under way, if there is one."""
        with self._state:
            was_open, self._is_open, self._is_busy = self._is_open, False, False
            if was_open:
                self._note_length()
        if was_open:
            self._disconnect(self._client)

    def _disconnect(self, client: QMPClient) -> None:
        with contextlib.suppress(Exception):  # a broken connection reports itself here again
            event_loop.call(self._loop, _leave(client), 2 * _DISCONNECT_S)

    def _note_length(self) -> None:
        self.longest_turn_s = max(self.longest_turn_s, time.monotonic() - self._began_at)

    def _note_unanswered(self, command: str, waited_s: float, is_over: Callable[[], bool]) -> None:
        # The socket is left, so a late answer is never heard: ask again after a while.
        self._note_pause(command, waited_s, self._pause_s)
        self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)

    def _note_pause(
        self, command: str, waited_s: float, pause_s: float, reason: str | None = None
    ) -> None:
        again_at = time.monotonic() + pause_s
        self.silence.note(command, waited_s, lambda: time.monotonic() >= again_at, reason)


async def _leave(client: QMPClient) -> None:
    """Disconnect; at once if QEMU does not read what is still to be sent."""
    writer = client._writer
    try:
        await asyncio.wait_for(client.disconnect(), _DISCONNECT_S)
    except Exception:  # a connection that broke reports itself here again
        if writer is not None:
            writer.transport.abort()
