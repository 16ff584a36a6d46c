"""`vmdedup resume`: let VMs run on that a vmdedup, ended since, had paused.

Refuses to import what it does not need, above all models and settings: systemd gives it
TimeoutStopSec, on a host that may be starved, while VMs stand still.
"""

from __future__ import annotations

from typing import Any

from vmdedup.cli.options import Config, RuntimeDir
from vmdedup.cli.outcome import DONE, FAILURE, about, complain
from vmdedup.cli.service import runtime_folder


def resume(runtime_dir: RuntimeDir = None, config: Config = None) -> int:
    """Resume VMs that a killed vmdedup had left paused.

    The guardian does that by itself, unless it was killed as well. The systemd
    unit runs this verb each time the service has ended. A VM that somebody else
    paused stays paused. Exit code 1 if a VM does not answer.
    """
    from vmdedup.guardian.resume import resume_noted

    done = resume_noted(runtime_folder(runtime_dir, config))
    for vm in done.settled:
        print(f"{vm}: not paused by vmdedup any more")
    for vm in done.elsewhere:
        print(f"{vm}: another process is resuming it")
    for vm in done.unreached:
        complain(f"{vm}: its monitor does not answer, it stays paused; try again")
    return FAILURE if done.unreached else DONE


def lines_about_paused(options: dict[str, Any]) -> list[str]:
    """A line for each VM that stands still because of a vmdedup that has ended.

    `options` are the verb's; `runtime_dir` among them says where to look.
    """
    from vmdedup.guardian.resume import left_paused

    path = runtime_folder(options.get("runtime_dir"))
    ended = "a vmdedup that has ended left it paused: run `vmdedup resume`"
    silent = (
        "vmdedup paused it, and its monitor does not answer; the guardian resumes it when it does"
    )
    return [
        about(note.vm, note.pid, ended if note.engine_pid else silent)
        for _, note in left_paused(path)
    ]
