"""The state that all sessions of an engine share, and errors for the system's refusals."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vmdedup.errors import MergeError
from vmdedup.guardian.guardian import Guardian
from vmdedup.guardian.runtime_dir import RuntimeDirectory
from vmdedup.settings import Settings
from vmdedup.vm.attached_vm import AttachedVm


@dataclass(frozen=True)
class Host:
    """The state that all sessions of an engine share."""

    settings: Settings
    guardian: Guardian
    runtime: RuntimeDirectory
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when merging should end soon: after the current gate."""


@contextmanager
def told_as_merge_error(vm: AttachedVm, phase: str) -> Iterator[None]:
    """Report the system's refusals in the block (no descriptor, no memory) as the VM's errors.

    Raises MergeError instead of OSError, VmGoneError if the VM's process has ended.
    """
    try:
        yield
    except OSError as error:
        vm.process.require_alive()
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{error.strerror or error}; vmdedup tries again later"
        raise MergeError(vm.name, phase, reason, pid=vm.pid) from error
