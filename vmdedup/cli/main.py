"""The `vmdedup` command.

Owns the list of verbs and the exit codes: 0 if at least one VM was served; 1 on failure;
2 if the request makes no sense; 3 if the sharing is outside a limit that was given, or `doctor`
finds memory short.
Promises one line on stderr for every failure and never a traceback, unless VMDEDUP_DEBUG
asks for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vmdedup.cli import (
    analyze,
    assertions,
    attach,
    bridge,
    doctor,
    events,
    explain,
    fleet,
    get,
    history,
    merge,
    register,
    report,
    resume,
    run,
    schema,
    set,
    top,
    unmerge,
    verify,
    vms,
)
from vmdedup.cli.outcome import DONE, FAILURE, USAGE, complain
from vmdedup.cli.processor import require_numpy_runs
from vmdedup.cli.streams import give_up, prepare_streams
from vmdedup.cli.teach import (
    BEFORE,
    EXAMPLES,
    MERGING,
    SCRIPTS,
    SHARED,
    STEERING,
    TaughtCommand,
    TaughtGroup,
)
from vmdedup.errors import UsageError, VmdedupError
from vmdedup.linux import capabilities

_COMMAND_LINE_ERROR: Any = typer.BadParameter.__base__
"""The class of every error in the arguments themselves; typer names only some of them."""

_WITHOUT_NUMPY: tuple[Callable[..., int], ...] = (resume.resume, schema.schema, bridge.bridge)

_HERE_ONLY = (analyze, doctor, explain, resume, run, verify)
"""Modules of verbs that look at their own host, and ask no daemon."""

_ABOUT_HERE = ("qmp", "libvirt", "domains", "mask", "runtime_dir", "state_dir", "replay")
"""Options that are about this host."""

app = typer.Typer(
    name="vmdedup",
    help="Merge the identical memory of running QEMU VMs, live; report what they share.",
    cls=TaughtGroup,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vmdedup {version('vmdedup')}")
        raise typer.Exit()


@app.callback()
def _common(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print each step on stderr.")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="URL",
            help="The daemon of another host: ssh://[user@]host[:port], or https://host[:port] to"
            " read only (else VMDEDUP_HOST).",
            show_default=False,
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    from vmdedup.cli.logs import log_to_stderr

    if named := host or os.environ.get("VMDEDUP_HOST"):
        from vmdedup.client import require_url

        require_url(named)
        os.environ["VMDEDUP_HOST"] = named  # for the verb, and for the library in it
    # Capabilities belong to threads, and no verb has started one yet.
    capabilities.keep_only(capabilities.ENGINE)
    context.call_on_close(log_to_stderr(verbose=verbose))


class _InterruptedError(Exception):
    """Ctrl-C, carried past typer, which would turn it into an exit code of its own."""


def _verb(command: Callable[..., int]) -> Callable[..., None]:
    """`command` with its returned exit code in typer's form."""
    from functools import wraps

    @wraps(command)
    def call(*arguments: Any, **options: Any) -> None:
        try:
            _require_right_host(command, options)
            if command not in _WITHOUT_NUMPY:
                require_numpy_runs()
            code = command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error
        finally:
            paused = resume.lines_about_paused(options)
            for line in paused:
                complain(line)
        changes_vms = command in (run.run, unmerge.unmerge)
        raise typer.Exit(FAILURE if paused and changes_vms and code == DONE else code)

    return call


def _require_right_host(command: Callable[..., int], options: dict[str, Any]) -> None:
    """Raise UsageError for a verb or option that is about this host, if another is named."""
    host = os.environ.get("VMDEDUP_HOST")
    if not host:
        return
    is_asked = command is explain.explain and options.get("contents")
    if command.__module__ in {module.__name__ for module in _HERE_ONLY} and not is_asked:
        raise UsageError(
            f"{command.__name__} looks at the host it runs on, not at {host} (--host or"
            " VMDEDUP_HOST): run it there"
        )
    for name in _ABOUT_HERE:
        if options.get(name):
            option = "domain" if name == "domains" else name.replace("_", "-")
            raise UsageError(f"--{option} is about this host, and --host names {host}: use one")


def _add(
    group: str, name: str, command: Callable[..., int], cls: type[TaughtCommand] = TaughtCommand
) -> None:
    """Add a verb to its group of the help."""
    app.command(name, cls=cls, rich_help_panel=group, epilog=EXAMPLES.get(name))(_verb(command))


_add(BEFORE, "doctor", doctor.doctor)
_add(BEFORE, "vms", vms.vms)
_add(BEFORE, "analyze", analyze.analyze, analyze.InOrder)
_add(MERGING, "run", run.run)
_add(MERGING, "merge", merge.merge)
_add(MERGING, "unmerge", unmerge.unmerge)
_add(MERGING, "resume", resume.resume)
_add(SHARED, "report", report.report)
_add(SHARED, "assert", assertions.assert_sharing)
_add(SHARED, "explain", explain.explain)
_add(SHARED, "verify", verify.verify)
_add(SHARED, "top", top.top)
_add(SHARED, "events", events.events)
_add(SHARED, "history", history.history)
_add(SHARED, "fleet", fleet.fleet)
_add(STEERING, "get", get.get)
_add(STEERING, "set", set.set_controls)
_add(STEERING, "register", register.register)
_add(STEERING, "unregister", register.unregister)
_add(STEERING, "attach", attach.attach)
_add(STEERING, "detach", attach.detach)
_add(SCRIPTS, "schema", schema.schema)
_add(SCRIPTS, "bridge", bridge.bridge)


def main() -> None:
    """Run the command of sys.argv and exit with its code."""
    prepare_streams()
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _not_printed(error)
    sys.exit(code)


def _run() -> int:
    try:
        code = app(prog_name="vmdedup", standalone_mode=False)
    except (_COMMAND_LINE_ERROR, UsageError) as error:
        complain(_usage_line(error))
        return USAGE
    except VmdedupError as error:
        return _failed(error, str(error))
    except (_InterruptedError, KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return FAILURE
    except Exception as error:
        if isinstance(error, OSError) and error.filename == "stdout":
            return _not_printed(error)
        hint = "VMDEDUP_DEBUG=1 shows where"
        return _failed(error, f"unexpected {type(error).__name__}: {error} ({hint})")
    return DONE if code is None else int(code)


def _usage_line(error: Exception) -> str:
    if isinstance(error, UsageError):
        return _one_line(str(error))
    formatted: str = error.format_message()  # type: ignore[attr-defined]
    return f"{_one_line(formatted)} (see vmdedup --help)"


def _failed(error: Exception, line: str) -> int:
    if os.environ.get("VMDEDUP_DEBUG"):
        import traceback

        traceback.print_exception(error)
    complain(_one_line(line))
    return FAILURE


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _not_printed(error: OSError) -> int:
    """Exit code if output cannot be printed: its reader is gone, or there is no space left."""
    give_up(1)
    if not isinstance(error, BrokenPipeError):
        complain(f"{error.filename}: {error.strerror}")
    return FAILURE
