"""Every error vmdedup raises, as one tree.

    VmdedupError
    ├── UsageError             the request itself makes no sense (exit code 2)
    ├── RuntimeBusyError       another engine has the runtime directory
    ├── StoreError             the stable store cannot be made, grown or read
    │   └── StoreBusyError     another engine works with it
    ├── BorderError            numbers to be handed to the kernel by address are wrong
    ├── UnsupportedError       the kernel or machine lacks a needed feature
    └── VmError                one VM; the others go on
        ├── AttachError        its monitor or process cannot be reached
        ├── RefusedError       it must not be merged (hazard, policy)
        ├── VmGoneError        it ended, or is not the process it was
        ├── MonitorError       its monitor answered an error or nothing
        ├── InjectionError     running a system call inside it was not possible
        └── MergeError         a stage of merge or unmerge failed
            ├── DisturbedError the VM has changed since it was examined
            ├── DrainPostponedError its requests in flight do not end soon
            ├── StuckError     a page of its memory does not come when it is read
            └── UnprotectedError a device would write pages that are merged in a pause

Each message is one line for the user: the failure, the VM, the reason, the remedy.
Each error carries its facts as attributes too. Failure is always raised, never
returned as `None`.
"""

from __future__ import annotations


class VmdedupError(Exception):
    """Base of all; `str()` is the one line shown to the user."""


class UsageError(VmdedupError):
    """The request makes no sense; nothing was touched."""


class RuntimeBusyError(VmdedupError):
    """Another engine works with the same runtime directory; nothing was touched."""


class StoreError(VmdedupError):
    """The stable store cannot be created, extended or read."""


class StoreBusyError(StoreError):
    """Another engine works with the store of that trust domain; nothing was touched."""


class BorderError(VmdedupError):
    """Numbers that were to be handed to the kernel, or to machine code, by address are wrong.

    Nothing was done with them. Our own computation cannot be relied on.
    """

    def __init__(self, found: str) -> None:
        super().__init__(
            f"wrong numbers: {found}; nothing was done with them. Report it, or run on another"
            " CPU where this one is emulated (QEMU 7.2 emulates AVX2 wrongly: docs/kernels.md)"
        )


class UnsupportedError(VmdedupError):
    """The kernel or machine lacks a needed feature.

    `feature` is its name in the kernel's documentation.
    """

    def __init__(self, feature: str, message: str) -> None:
        super().__init__(message)
        self.feature = feature


class VmError(VmdedupError):
    """A failure of one VM; every other VM goes on.

    `vm` is the VM's name (or socket, while no name is known), `reason` the
    part of the line after it, `pid` the process if known.
    """

    def __init__(self, vm: str, reason: str, *, pid: int | None = None) -> None:
        where = f"{vm} (pid {pid})" if pid is not None else vm
        super().__init__(f"{where}: {reason}")
        self.vm = vm
        self.reason = reason
        self.pid = pid


class AttachError(VmError):
    """The VM's monitor or process cannot be reached; nothing was touched."""


class RefusedError(VmError):
    """The VM must not be merged: a hazard or a policy; nothing was touched.

    `key` is the kind of reason, one of `policy.refusals.REFUSALS`.
    """

    def __init__(self, vm: str, reason: str, *, pid: int | None = None, key: str = "other") -> None:
        super().__init__(vm, reason, pid=pid)
        self.key = key


class VmGoneError(VmError):
    """The VM's process ended, or its pid now belongs to another process."""


class MonitorError(VmError):
    """The monitor answered with an error, or not in time.

    `command` is the QMP command, `error_class` QEMU's error class ("" if none), `unanswered`
    whether no answer has come. The VM then stays attached, and is asked again later.
    """

    def __init__(
        self,
        vm: str,
        command: str,
        reason: str,
        *,
        pid: int | None = None,
        error_class: str = "",
        unanswered: bool = False,
    ) -> None:
        super().__init__(vm, f"monitor command {command}: {reason}", pid=pid)
        self.command = command
        self.error_class = error_class
        self.unanswered = unanswered


class InjectionError(VmError):
    """No system call could be run inside the process.

    Raised before anything ran (`started` False: the target is unchanged), or
    after a batch was launched whose end was not seen in time (`started` True:
    it completes by itself; read its effects from the kernel again).
    """

    def __init__(
        self, vm: str, reason: str, *, pid: int | None = None, started: bool = False
    ) -> None:
        super().__init__(vm, reason, pid=pid)
        self.started = started


class MergeError(VmError):
    """A stage of merging or unmerging failed; `phase` names it.

    The guest's memory is intact: pages that were not remapped are unchanged.
    """

    def __init__(self, vm: str, phase: str, reason: str, *, pid: int | None = None) -> None:
        super().__init__(vm, f"{phase}: {reason}", pid=pid)
        self.phase = phase


class DisturbedError(MergeError):
    """The VM's devices or its state have changed since it was examined; examine it again."""


class DrainPostponedError(MergeError):
    """Requests in flight do not end, or not soon; nothing was drained, the VM runs on."""


class StuckError(MergeError):
    """Copying the VM's memory does not end; see `linux.bounded`.

    `began_now`: this copy goes on using the memory passed to it, for an unknown time.
    Else an earlier copy has not ended, and nothing was begun.
    """

    def __init__(self, vm: str, pid: int, *, began_now: bool) -> None:
        reason = (
            "its memory cannot be read: a page of it does not come; merging goes on when it does"
        )
        super().__init__(vm, "read", reason, pid=pid)
        self.began_now = began_now


class UnprotectedError(MergeError):
    """The VM must be paused, its pages cannot be protected, and a device writes in pauses."""
