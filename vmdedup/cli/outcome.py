"""A verb's output and end: documents, lines of complaint, exit codes.

Owns stdout's promise (`--json` prints exactly one document, everything else goes
to stderr) and the meaning of the exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from vmdedup.cli.streams import give_up
from vmdedup.errors import VmdedupError
from vmdedup.report.files import write_file

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

    from vmdedup.models import VmList

DONE = 0
"""At least one VM was served."""
FAILURE = 1
USAGE = 2
BELOW = 3
"""`assert`, `report --fail-under`, `--baseline`: outside a limit; `doctor`: memory is short."""

Document = TypeVar("Document", bound="BaseModel")


def complain(line: str) -> None:
    """Print one line on stderr. A reader that is gone, or a full disk, is no failure."""
    try:
        print(f"vmdedup: {line}", file=sys.stderr)
    except OSError:
        give_up(2)


def put(text: str, output: Path | None) -> None:
    """Write the text to stdout, or to a file. Raises UsageError."""
    if output is None:
        sys.stdout.write(text)
    else:
        write_file(output, text)


def about(name: str, pid: int | None, reason: str | None) -> str:
    """A line about one VM, as VmError words it."""
    where = name if pid is None else f"{name} (pid {pid})"
    return f"{where}: {reason or 'no reason known'}"


def require_any(found: VmList) -> None:
    """Raise VmdedupError if not a single VM was found."""
    if not found.vms:
        raise VmdedupError(
            "no running QEMU found on this host (name a VM's socket with --qmp PATH)"
        )


def refusals(found: VmList) -> list[str]:
    """A line for each VM that was not attached to for merging."""
    return [about(vm.name, vm.pid, vm.reason) for vm in found.vms if not vm.mergeable]


def finish(
    document: Document,
    show: Callable[[Document], None],
    *,
    as_json: bool,
    served: bool,
    complaints: Iterable[str] = (),
) -> int:
    """Print the document and the complaints; returns the exit code.

    A text report already has its complaints in it. If it is not printed, or
    is JSON, they are lines on stderr.
    """
    if as_json:
        print(document.model_dump_json(indent=2))
    elif served:
        show(document)
    if as_json or not served:
        for line in complaints:
            complain(line)
    return DONE if served else FAILURE
