"""The texts of `--help` beside the options: groups of verbs, examples, first steps.

Owns the titles of the groups and an example or two for each verb. Promises lines
that fit 80 columns and appear exactly as written here.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

BEFORE = "Before merging"
MERGING = "Merging"
SHARED = "Reports"
STEERING = "Steering the daemon"
SCRIPTS = "For scripts"

EXAMPLES = {
    "doctor": """
vmdedup doctor                             this host and each of its VMs
vmdedup doctor --qmp /run/vms/web.qmp      one VM
vmdedup doctor --libvirt qemu:///system    libvirt's domains
""",
    "vms": """
vmdedup vms                                every QEMU of this host
vmdedup vms --qmp '/run/vms/*.qmp' --json  these, as JSON
""",
    "analyze": """
vmdedup analyze                            would merging be worth it?
vmdedup analyze --ram-file a.img --ram-file b.img
""",
    "run": """
vmdedup run --config /etc/vmdedup.toml     the daemon, until SIGTERM
vmdedup run --dry-run                      only say what would be merged
vmdedup run --until-converged --progress   merge all there is, report, end
vmdedup run --libvirt qemu:///system       the daemon for libvirt's domains
""",
    "merge": """
vmdedup merge                              all VMs of the daemon
vmdedup merge web database --timeout 60    these two, a minute at most
""",
    "resume": """
vmdedup resume                             after a kill in a pause
""",
    "unmerge": """
vmdedup unmerge web                        one VM, until `vmdedup merge web`
vmdedup unmerge                            all VMs
""",
    "report": """
vmdedup report                             a table
vmdedup report -o sharing.html             a page that works offline
vmdedup report --fail-under 30%            for CI: exit code 3 if less
vmdedup report --compare KSM               what would KSM save?
vmdedup report --json | jq .host.saved_bytes
""",
    "assert": """
vmdedup assert --min-saved 30% --max-stops 0
vmdedup assert --max-broken-pages 1000 --since before.json
vmdedup assert --from report.json --max-gate-ms 20 --json
""",
    "explain": """
vmdedup explain web                        why is not more of it saved?
vmdedup explain --contents --known /images/debian.qcow2
""",
    "verify": """
vmdedup verify                             exit code 1 if a page is wrong
""",
    "top": """
vmdedup top                                ? shows the keys, q quits
vmdedup top --interval 10 --sort breaks
vmdedup top --replay 1h                    the last hour, sample by sample
""",
    "events": """
vmdedup events                             everything since the daemon began
vmdedup events --follow --json             as it happens, one JSON a line
""",
    "history": """
vmdedup history                            the last hour, as a table
vmdedup history --since 7d --format csv > saved.csv
vmdedup history --vm web --since 30d -o web.parquet
""",
    "fleet": """
vmdedup fleet report --hosts hosts.toml    what is saved on all of them
vmdedup fleet similar --hosts hosts.toml   which VMs are alike
vmdedup fleet plan --hosts hosts.toml -o plan.html
vmdedup fleet place web --hosts hosts.toml --json
""",
    "get": """
vmdedup get                                all controls
vmdedup get run                            one value
""",
    "set": """
vmdedup set run=0                          stop scanning, keep the merges
vmdedup set run=2                          unmerge everything
vmdedup set advisor_mode=none pages_to_scan=5000
""",
    "register": """
vmdedup register web ram0                  a backend that is merge=off
vmdedup register web ram0 --offset 0 --length 1073741824
""",
    "unregister": """
vmdedup unregister web ram0                unmerge it, and leave it alone
""",
    "attach": """
vmdedup attach /run/vms/web.qmp            by its QMP socket
vmdedup attach web                         a libvirt domain by its name
""",
    "detach": """
vmdedup detach web                         before a device is plugged in, say
""",
    "schema": """
vmdedup schema                             the report's schema
vmdedup schema all                         all schemas, by name
""",
    "bridge": """
vmdedup bridge                             run by --host elsewhere
""",
}
"""Command lines of each verb; the text far to the right explains each."""

BEGIN = """
vmdedup doctor                             can merging work on this host?
vmdedup run --dry-run                      what would be merged?
vmdedup run --until-converged              merge it, report, end
vmdedup report                             what is shared now?
vmdedup unmerge                            every page back to its own memory
"""

READ_ON = "Settings, controls, hazards, security: README.md and docs/ of the source."
CODES = "Exit codes: 0 done, 1 failure, 2 wrong usage, 3 outside a limit you gave."


class TaughtCommand(TyperCommand):
    """A verb whose help ends with its examples: `epilog` has them, which would be rewrapped."""

    def __init__(self, name: str | None, *, epilog: str | None = None, **given: Any) -> None:
        super().__init__(name, **given)
        self.examples = epilog

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the base's help, then the examples."""
        super().format_help(ctx, formatter)
        if self.examples:
            formatter.write(titled("Examples", self.examples))


class TaughtGroup(TyperGroup):
    """The command itself: its help ends with where to begin, and with the exit codes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the base's help, then the first steps."""
        super().format_help(ctx, formatter)
        formatter.write(titled("Where to begin", BEGIN))
        formatter.write("\n `vmdedup VERB --help` has the verb's options and examples.\n")
        formatter.write(f" {CODES}\n {READ_ON}\n")


def titled(title: str, lines: str) -> str:
    """A title and the lines below it, with the help's own margin."""
    return "\n".join([f" {title}:", *(f"   {line}" for line in lines.strip().splitlines()), ""])
