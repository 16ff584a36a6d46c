"""`vmdedup analyze`: exact content counts of VMs and RAM images, read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmdedup.cli.options import AsJson, Mask, Qmp, ShowProgress, make_settings
from vmdedup.cli.outcome import DONE, FAILURE, complain
from vmdedup.cli.teach import TaughtCommand
from vmdedup.errors import VmdedupError

if TYPE_CHECKING:
    from vmdedup.accounting.analyze import Source

ORDER = "vmdedup.order"
"""Key of the context's `meta` under which `InOrder` leaves the options' names."""


class InOrder(TaughtCommand):
    """A command that remembers in which order its options were given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse like the base; leave each option's name, once per occurrence, in `ctx.meta`."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[ORDER] = [parameter.name for parameter in order]
        return super().parse_args(ctx, args)


def analyze(
    context: typer.Context,
    qmp: Qmp = None,
    ram_file: Annotated[
        list[str] | None,
        typer.Option(
            "--ram-file",
            metavar="FILE",
            help="Raw RAM image on disk; repeatable, counted in the order of all arguments.",
            show_default=False,
        ),
    ] = None,
    mask: Mask = None,
    progress: ShowProgress = None,
    as_json: AsJson = False,
) -> int:
    """Count zero, distinct and duplicate pages; change nothing.

    Exact counts: an upper bound of what merging can save.
    """
    from vmdedup.accounting import analyze as analysis
    from vmdedup.report.progress import progress_line

    settings = make_settings(mask=mask)
    sources = in_order(context.meta[ORDER], qmp or [], ram_file or [])
    warnings: list[str] = []
    with progress_line(progress) as line:
        counts = analysis.analyze(
            sources,
            settings=settings,
            progress=lambda at: line.update(f"reading {at.name}", at.done_pages, at.total_pages),
            warn=warnings.append,
        )
    for warning in warnings:
        complain(warning)
    if not counts.vms and not sources and not warnings:
        raise VmdedupError(
            "no running QEMU found on this host (name --qmp PATH or --ram-file FILE)"
        )
    if as_json:
        print(counts.model_dump_json(indent=2))
    elif counts.vms:
        from vmdedup.report.text import show_analysis

        show_analysis(counts)
    return DONE if counts.vms else FAILURE


def in_order(order: list[str], qmp: list[str], ram_file: list[str]) -> list[Source]:
    """The values of both options in the order in which they were given."""
    from vmdedup.accounting.analyze import ImageSource, QmpSource

    patterns, paths = iter(qmp), iter(ram_file)
    sources: list[Source] = []
    for name in order:
        if name == "qmp":
            sources.append(QmpSource(next(patterns)))
        elif name == "ram_file":
            sources.append(ImageSource(next(paths)))
    return sources
