"""Which VMs there are, and which of them can be attached to.

Owns the search: QEMU processes of this host with the QMP sockets of their command
lines, or the sockets that the user names (globs). Promises a row for every VM found,
with the reason if its monitor is taken or it has none. Reads /proc and connects to
monitors; changes nothing in a VM.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vmdedup.attach.choice import choose_monitors
from vmdedup.attach.cmdline import vm_name
from vmdedup.attach.config_file import whole_command_line
from vmdedup.attach.identity import VmIdentity, identify
from vmdedup.attach.monitor import Monitor, one_line
from vmdedup.attach.monitor_loop import MonitorLoop
from vmdedup.attach.owners import is_ours
from vmdedup.attach.qmp import CONNECT_TIMEOUT_S, QmpMonitor
from vmdedup.attach.shared_qmp import SharedQmpMonitor
from vmdedup.errors import AttachError, VmdedupError, VmError
from vmdedup.linux.process import Process
from vmdedup.linux.unix_sockets import sockets_with_clients
from vmdedup.settings import MonitorUse

_QEMU_NAMES = ("qemu-system", "qemu-kvm")
_PARALLEL = 16


@dataclass(frozen=True)
class Candidate:
    """A VM to attach to: its sockets in order of preference, or why it has none."""

    name: str
    pid: int | None
    sockets: tuple[Path, ...]
    reason: str | None = None
    foreign: tuple[Path, ...] = ()
    """Sockets over which other programs manage the VM, if it has no other: used only in turns."""


@dataclass(frozen=True)
class Unreachable:
    """A VM that was found but could not be attached to."""

    name: str
    pid: int | None
    reason: str
    uuid: str | None = None
    """UUID of the libvirt domain."""


@dataclass(frozen=True)
class Attachment:
    """An attached VM: monitor, pinned process, identity. Close it."""

    monitor: Monitor
    process: Process
    identity: VmIdentity

    def close(self) -> None:
        """Release the monitor and the process; the VM is not touched. Idempotent."""
        self.monitor.close()
        self.process.close()


@dataclass
class Found:
    """The VMs that `attach_all` reached, and those that it did not."""

    attached: list[Attachment] = field(default_factory=list)
    unreachable: list[Unreachable] = field(default_factory=list)


def expand(patterns: Sequence[str]) -> list[Candidate]:
    """Candidates for `--qmp` arguments, in order, each socket once.

    A pattern that matches nothing stays unexpanded: connecting to it gives the error.
    """
    found: dict[Path, Candidate] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []
        sockets = [path for path in matches if _is_socket(path)]
        for path in map(Path, sockets or [pattern]):
            found.setdefault(path, Candidate(str(path), None, (path,)))
    return list(found.values())


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def running_qemus() -> list[Candidate]:
    """One candidate for each visible QEMU process of this host, by pid."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    return [found for pid in pids if (found := _candidate(pid)) is not None]


def _candidate(pid: int) -> Candidate | None:
    """The QEMU at `pid`; `None` if it is another program, or gone."""
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        if not any(name in program for name in _QEMU_NAMES):
            return None
        line = whole_command_line(pid)
    except OSError:
        return None
    arguments = line.arguments
    if arguments == [""]:
        return None
    name = one_line(vm_name(arguments) or f"pid {pid}", 120)
    choice = choose_monitors(arguments, partial(_is_lost, pid))
    sockets, foreign = (
        tuple(_seen_from_here(pid, path) for path in paths)
        for paths in (choice.sockets, choice.foreign)
    )
    reason = choice.reason
    if reason is not None and line.unread is not None and not choice.knows_monitors:
        remedy = "restart it, or name its socket (--qmp)"
        reason = f"its monitors are not known: {line.unread}; {remedy}"
    return Candidate(name, pid, sockets, reason, foreign)


def _is_lost(pid: int, path: str) -> bool:
    """Whether a relative path leads nowhere any more. The kernel knows it as it was bound."""
    return not path.startswith("/") and not _seen_from_here(pid, path).exists()


def _seen_from_here(pid: int, path: str) -> Path:
    """`path` of process `pid`: relative to its directory, and in its root if that differs."""
    if not path.startswith("/"):
        try:
            path = os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
        except OSError:
            return Path(path)
    inside = f"/proc/{pid}/root{path}"
    try:
        if not os.path.exists(path) or not os.path.samefile(path, inside):
            return Path(inside if os.path.exists(inside) else path)
    except OSError:
        return Path(path)
    return Path(path)


def attach(
    candidate: Candidate,
    loop: MonitorLoop,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    use: MonitorUse = "own",
) -> Attachment:
    """Attach by the candidate's first free socket; if none is free, raise the first's error.

    `use`: whether the connection is kept, or the socket used in turns. One that was made for
    vmdedup is kept always.
    """
    sockets = candidate.sockets or (candidate.foreign if use == "shared" else ())
    if not sockets:
        reason = candidate.reason or "no QMP monitor"
        raise AttachError(candidate.name, reason, pid=candidate.pid)
    if len(sockets) > 1 and candidate.pid is not None:
        served = sockets_with_clients(candidate.pid)
        sockets = tuple(sorted(sockets, key=partial(_is_served, candidate.pid, served)))
    errors: list[VmError] = []
    for path in sockets:
        try:
            return _attach_socket(path, candidate.pid, loop, timeout_s, use)
        except VmError as error:
            errors.append(error)
    raise AttachError(candidate.name, errors[0].reason, pid=candidate.pid or errors[0].pid)


def _is_served(pid: int, served: frozenset[str], socket_path: Path) -> bool:
    """Whether a client has the socket; the kernel knows its path as it was bound by `pid`."""
    path = str(socket_path).removeprefix(f"/proc/{pid}/root")
    return path in served or any(
        path.endswith(f"/{each}") for each in served if not each.startswith(("/", "@"))
    )


def _attach_socket(
    path: Path,
    expected_pid: int | None,
    loop: MonitorLoop,
    timeout_s: float,
    use: MonitorUse,
) -> Attachment:
    kind = QmpMonitor if use == "own" or is_ours(str(path)) else SharedQmpMonitor
    monitor = kind.connect(path, loop, timeout_s=timeout_s)
    try:
        if expected_pid is not None and monitor.peer_pid != expected_pid:
            reason = f"its socket {path} belongs to another process"
            raise AttachError(str(path), reason, pid=expected_pid)
        process = Process(monitor.vm, monitor.peer_pid)
        try:
            return Attachment(monitor, process, identify(monitor, process, socket_path=path))
        except BaseException:
            process.close()
            raise
    except BaseException:
        monitor.close()
        raise


def attach_all(
    patterns: Sequence[str],
    loop: MonitorLoop,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    use: MonitorUse = "own",
) -> Found:
    """Attach to every VM of `--qmp` patterns; without patterns, to every QEMU of this host.

    Waits for busy monitors side by side. Attaches once to a VM that it meets
    through two sockets.
    """
    candidates = expand(patterns) if patterns else running_qemus()
    found = Found()
    if not candidates:
        return found
    with ThreadPoolExecutor(min(_PARALLEL, len(candidates))) as pool:
        results = list(pool.map(lambda one: _attempt(one, loop, timeout_s, use), candidates))
    known: set[int] = set()
    for result in results:
        if isinstance(result, Unreachable):
            found.unreachable.append(result)
        elif result.identity.pid in known:
            result.close()
        else:
            known.add(result.identity.pid)
            found.attached.append(result)
    return found


def _attempt(
    candidate: Candidate, loop: MonitorLoop, timeout_s: float, use: MonitorUse
) -> Attachment | Unreachable:
    try:
        return attach(candidate, loop, timeout_s=timeout_s, use=use)
    except VmError as error:
        return Unreachable(candidate.name, error.pid, error.reason)
    except VmdedupError as error:
        return Unreachable(candidate.name, candidate.pid, str(error))
