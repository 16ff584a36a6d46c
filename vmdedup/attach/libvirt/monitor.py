"""A VM's monitor by way of libvirt.

Owns `LibvirtMonitor`: QMP commands through libvirt's monitor pass-through, so that
there is never a second monitor, descriptors through its `WithFiles`, events from
the link. Promises what `Monitor` does, and that `cont` resumes only what this
monitor's own `stop` has paused. For a suspended domain libvirt reports that the user
paused it; for one stopped over the monitor it reports an unknown reason. Pausing uses
`stop` and not virDomainSuspend for just that difference.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from vmdedup.attach import replies
from vmdedup.attach.lent_fds import fresh_fdset, take_back_stale
from vmdedup.attach.libvirt.domain_xml import DomainWords
from vmdedup.attach.libvirt.link import (
    DomainEvent,
    LibvirtLink,
    LinkDownError,
    UnansweredError,
    bindings,
)
from vmdedup.attach.libvirt.processes import qemu_of
from vmdedup.attach.libvirt.status_file import StatusFile
from vmdedup.attach.monitor import COMMAND_TIMEOUT_S, Monitor, one_line
from vmdedup.attach.silence import Silence
from vmdedup.errors import AttachError, MonitorError, VmGoneError
from vmdedup.linux.process import read_process_id

_STATE_WAIT_S = 1.0
"""Longest wait, after the answer to `stop`, for libvirt to learn of it."""
_STATE_POLL_S = 0.001
_DEATH_WAIT_MS = 1000
_MAX_ANSWER = 64 << 20
_SUSPENDED = "somebody else suspended it meanwhile"


@dataclass
class _Pause:
    """A pause of ours, and the state of the domain's status file when it had begun."""

    generation: int
    """The link's generation: a restarted daemon saves the file at moments of its own."""
    file: StatusFile
    saves_per_command: int = 0
    sent: int = 0
    """Commands sent by the time the pause had begun."""
    content: bytes | None = None


class LibvirtMonitor(Monitor):
    """The monitor of the running domain `uuid`. Raises AttachError, MonitorError, VmGoneError."""

    def __init__(
        self, link: LibvirtLink, uuid: str, name: str, *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> None:
        self.vm = name
        self.silence = Silence()
        self.uuid = uuid
        self._domain_name = name
        self._link = link
        self._timeout_s = timeout_s
        self._pidfd = -1
        self._pid = 0
        self._closed = False
        self._pause: _Pause | None = None
        """Our pause of the domain, while it lasts."""
        self._sent = 0
        """Commands sent so far."""
        self._counting = threading.RLock()
        """Held for each command, and while a pause begins or ends: a command of another thread
        whose save is counted on the wrong side would look like somebody's suspend."""
        self._has_cleaned = False
        self._version = self.query("query-version", replies.VersionReply).qemu.as_tuple()
        self._pid = self._find_process()
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError as error:
            raise VmGoneError(self.vm, "the VM's process ended", pid=self._pid) from error
        link.listen(uuid, self)

    @property
    def address(self) -> str:
        """How another process of ours finds the domain: the URI and the UUID."""
        return f"{self._link.uri}#{self.uuid}"

    @property
    def outage(self) -> str | None:
        """Why libvirt, or the domain through it, cannot be asked now; `None` while it can."""
        reason = self._link.outage
        if reason is not None:
            return f"libvirt: {reason}; merged pages stay merged"
        return self.silence.reason

    @property
    def peer_pid(self) -> int:
        """QEMU's process id."""
        return self._pid

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""
        return self._version

    def _find_process(self) -> int:
        """QEMU's pid: the process of its first vCPU's thread, which QEMU itself names."""
        cpus = self.query("query-cpus-fast", replies.CpusFast)
        if not cpus:
            raise AttachError(self.vm, "its QEMU has no CPU yet")
        pid = qemu_of(self._link.uri, self.uuid, cpus[0].thread_id)
        if pid is None:
            elsewhere = "its process cannot be seen from here (another pid namespace)"
            raise AttachError(self.vm, elsewhere)
        return pid

    # --- commands --------------------------------------------------------------------

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> object:
        """Run a QMP command through libvirt; see `Monitor.execute`."""
        return self._execute(command, arguments, None, timeout_s)

    def add_fd(self, fd: int, opaque: str, fdset_id: int | None = None) -> tuple[int, int]:
        """Pass a copy of `fd`; (fd set id, number inside QEMU).

        The monitor outlives our process, and the sets with it: sets of a killed predecessor
        are removed first.
        """
        if not self._has_cleaned:
            take_back_stale(self)
            self._has_cleaned = True
        maker = read_process_id(os.getpid())
        wanted = fresh_fdset() if fdset_id is None else fdset_id
        label = f"{opaque}@{maker.pid}.{maker.start_ticks}"
        arguments = {"fdset-id": wanted, "opaque": label}
        answer = self._execute("add-fd", arguments, fd, self._timeout_s)
        try:
            added = replies.AddedFdReply.validate_python(answer)
        except ValidationError as error:
            raise MonitorError(self.vm, "add-fd", "unexpected reply", pid=self._pid) from error
        return added.fdset_id, added.fd

    def events(self) -> list[dict[str, Any]]:
        """Events that the link received for this domain since the last call, by QMP's names."""
        return [
            {"event": _qmp_name(event), "data": {"detail": event.detail}}
            for event in self._link.heard(self)
        ]

    @property
    def tells_of_changes(self) -> bool:
        """True: every device change and migration goes through libvirt, which reports it."""
        return True

    def close(self) -> None:
        """Release the monitor; libvirt's own stays open. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._forget_pause()
        self._link.forget(self)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        fd: int | None,
        timeout_s: float,
    ) -> object:
        self._require_open(command)
        message: dict[str, object] = {"execute": command}
        if arguments is not None:
            message["arguments"] = dict(arguments)
        text = json.dumps(message)
        _, libvirt_qemu = bindings()

        def ask(domain: Any) -> str:
            if fd is None:
                return str(libvirt_qemu.qemuMonitorCommand(domain, text, 0))
            return str(libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, [fd], 0)[0])

        with self._counting:
            self._sent += 1
            answer = self._ask(command, ask, timeout_s)
        return self._result(command, answer)

    def _require_open(self, command: str) -> None:
        if self._closed:
            raise MonitorError(self.vm, command, "the monitor was closed", pid=self._pid or None)
        # The UUID may belong to another process by now, if the domain was restarted.
        self._raise_if_gone(wait_ms=0)
        self.require_answering(command)

    def _ask(self, command: str, work: Any, timeout_s: float) -> Any:
        """`work(domain)`; its failures are raised as a monitor's."""
        libvirt, _ = bindings()
        pid = self._pid or None
        try:
            return self._link.call_domain(self.uuid, work, timeout_s)
        except UnansweredError as error:
            self._raise_if_gone(wait_ms=0)
            self.silence.note(command, timeout_s, error.is_over)
            reason = f"no answer within {timeout_s:g} s"
            raise MonitorError(self.vm, command, reason, pid=pid, unanswered=True) from error
        except LinkDownError as error:
            self._raise_if_gone(wait_ms=0)
            raise MonitorError(self.vm, command, str(error), pid=pid) from error
        except libvirt.libvirtError as error:
            code = error.get_error_code()
            if code in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                self._raise_if_gone(wait_ms=_DEATH_WAIT_MS)
                if not pid:
                    raise VmGoneError(self.vm, "the domain is not running") from error
            self._raise_if_gone(wait_ms=0)
            raise MonitorError(self.vm, command, one_line(str(error)), pid=pid) from error

    def _result(self, command: str, text: str) -> object:
        pid = self._pid or None
        try:
            reply = json.loads(text) if len(text) <= _MAX_ANSWER else None
        except (ValueError, RecursionError):
            reply = None
        if isinstance(reply, dict) and "error" in reply:
            try:
                error = replies.ErrorReply.validate_python(reply["error"])
            except ValidationError as problem:
                raise MonitorError(self.vm, command, "unexpected reply", pid=pid) from problem
            raise MonitorError(
                self.vm,
                command,
                one_line(error.description) or "failed",
                pid=pid,
                error_class=one_line(error.error_class, 64) or "GenericError",
            )
        if not isinstance(reply, dict) or "return" not in reply:
            raise MonitorError(self.vm, command, "unexpected reply", pid=pid)
        return reply["return"]

    def _raise_if_gone(self, wait_ms: int) -> None:
        if self._pidfd < 0:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(wait_ms):
            raise VmGoneError(self.vm, "the VM's process ended", pid=self._pid)

    # --- pausing ---------------------------------------------------------------------

    def stop(self) -> None:
        """Pause the domain; remembers whether it was us, for `cont`."""
        with self._counting:
            self._stop()

    def _stop(self) -> None:
        self._forget_pause()
        pause = _Pause(self._link.generation, StatusFile(self._link.uri, self._domain_name))
        # Also if `stop` is not answered in time: it may have paused the domain.
        self._pause = pause
        pause.file.saves()
        self.status()
        pause.saves_per_command = pause.file.saves()
        self._link.expect(self.uuid, "suspended")
        try:
            super().stop()
        except MonitorError:
            self._link.expect(self.uuid, "suspended", -1)
            raise
        libvirt, _ = bindings()
        deadline = time.monotonic() + _STATE_WAIT_S
        while (state := self._state())[0] != libvirt.VIR_DOMAIN_PAUSED:
            # libvirt learns of it by QEMU's STOP event, a moment after our answer.
            if time.monotonic() > deadline:
                break
            time.sleep(_STATE_POLL_S)
        pause.file.saves()
        pause.content, pause.sent = pause.file.content(), self._sent
        if _is_suspended(state):
            self._forget_pause()

    def cont(self) -> None:
        """Let the domain run on, unless somebody else has suspended it by now.

        The same holds if somebody is saving, dumping or migrating it. The domain then stays
        paused, and an event says so.
        """
        with self._counting:
            why = self._not_ours()
            self._forget_pause()
            if why is None:
                self._run_on()
                return
        self._link.tell(DomainEvent("left-paused", self.uuid, self._domain_name, why))

    def _run_on(self) -> None:
        self._link.expect(self.uuid, "resumed")
        try:
            super().cont()
        except MonitorError:
            self._link.expect(self.uuid, "resumed", -1)
            raise

    def _forget_pause(self) -> None:
        if self._pause is not None:
            self._pause.file.close()
            self._pause = None

    def _not_ours(self) -> str | None:
        """Why we must not resume the domain; `None` if we may."""
        pause = self._pause
        if pause is None:
            return "somebody else suspended it in the same moment"
        if (why := self._taken_over()) is not None:
            return why
        commands = self._sent - pause.sent
        saves = pause.file.saves() - commands * pause.saves_per_command
        is_same = pause.generation == self._link.generation
        if is_same and saves > 0 and pause.file.content() == pause.content:
            return _SUSPENDED
        return None

    def _taken_over(self) -> str | None:
        """Why somebody else needs the domain to stay paused, by libvirt's account."""
        if _is_suspended(self._state()):
            return _SUSPENDED
        if self.has_job():
            return "somebody else began to save, dump or migrate it meanwhile"
        return None

    def has_job(self) -> bool:
        """Whether a job needs the domain to stay as it is; a backup copies from running ones."""
        libvirt, _ = bindings()
        job = self._ask("domjobinfo", lambda domain: domain.jobStats(), self._timeout_s)
        is_backup = job.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        return job["type"] != libvirt.VIR_DOMAIN_JOB_NONE and not is_backup

    def resume_left_paused(self) -> None:
        """Resume a domain that a dead engine's note names, if it is still paused by us."""
        if self._taken_over() is None:
            self._run_on()

    def in_own_words(self, key: str, reason: str) -> str:
        """The reason with the element of the domain XML behind it."""
        xml = self._ask("dumpxml", lambda domain: domain.XMLDesc(0), self._timeout_s)
        try:
            return DomainWords(xml).tell(key, reason)
        except ValueError:
            return reason

    def _state(self) -> list[int]:
        """virDomainState and its reason."""
        return list(self._ask("domstate", lambda domain: domain.state(), self._timeout_s))


def _is_suspended(state: list[int]) -> bool:
    """Whether libvirt knows why the domain is paused: a monitor's `stop` then did not do it."""
    libvirt, _ = bindings()
    paused = libvirt.VIR_DOMAIN_PAUSED
    return state[0] == paused and state != [paused, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN]


def _qmp_name(event: DomainEvent) -> str:
    """The name of the QMP event behind it, or one that stands for it."""
    if event.kind == "qmp":
        return event.detail.partition(" ")[0]
    return "DEVICE_DELETED" if event.kind == "device" else event.kind.upper()
