"""Whether the installed numpy runs on this processor, asked before a verb imports it.

NumPy's wheels from 2.4 on are built for x86-64-v2. On a lesser processor (`kvm64`) importing
one ends the process by SIGILL, without a word. Owns that question and the line printed
instead. Costs a read of /proc/cpuinfo. Only a lesser processor makes it try the import, in
a process of its own, because an older numpy runs there.
"""

from __future__ import annotations

import sys

from vmdedup.errors import UnsupportedError
from vmdedup.linux.processor import X86_64_V2, processor_flags


def require_numpy_runs() -> None:
    """Raise UnsupportedError if importing numpy would end this process."""
    try:
        flags = processor_flags()
    except OSError:  # no /proc: the code that needs it gives a better message
        return
    missing = sorted(X86_64_V2 - flags) if flags else []
    if missing and _import_dies():
        raise UnsupportedError(
            "x86-64-v2",
            f"the installed numpy does not run on this processor, which lacks {', '.join(missing)};"
            " give this host another one (QEMU's Nehalem will do, kvm64 will not), or install"
            " 'numpy<2.4'",
        )


def _import_dies() -> bool:
    """Whether a signal ends a process that imports numpy."""
    import subprocess

    tried = subprocess.run(
        [sys.executable, "-P", "-c", "import numpy"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return tried.returncode < 0
