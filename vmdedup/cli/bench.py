"""`vmdedup bench`: KSM and vmdedup on the same guests, measured in one go."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from vmdedup.cli.options import AsJson, ShowProgress
from vmdedup.cli.outcome import DONE, Document
from vmdedup.errors import UsageError, VmdedupError

if TYPE_CHECKING:
    from rich.console import Console

    from vmdedup.bench.course import Options


def bench(
    vms: Annotated[int, typer.Option("--vms", metavar="N", min=1, help="Guests.")] = 4,
    mem: Annotated[
        int, typer.Option("--mem", metavar="MIB", min=64, help="Memory of each, MiB.")
    ] = 384,
    workloads: Annotated[
        str,
        typer.Option(
            "--workloads",
            metavar="LIST",
            help="What the guests do, in turn: idle, nginx, python, redis; or tiny.",
        ),
    ] = "idle,nginx,python,redis",
    runs: Annotated[
        int, typer.Option("--runs", metavar="N", min=1, help="Repeat; medians are shown.")
    ] = 1,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            metavar="NAME",
            help="Only this one; repeatable. --contender list names them.",
            show_default=False,
        ),
    ] = None,
    settle_s: Annotated[
        float, typer.Option("--settle", metavar="S", min=0, help="Let the guests settle.")
    ] = 20.0,
    window_s: Annotated[
        float, typer.Option("--window", metavar="S", min=1, help="Watch the steady state.")
    ] = 15.0,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Where the guests are (images/build.sh debian builds them).",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw saved memory over time: .svg or .png (needs the bench extra).",
            show_default=False,
        ),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Only the core, on made-up digests, up to 256 GiB.")
    ] = False,
    most_pages: Annotated[
        int | None,
        typer.Option(
            "--most-pages", metavar="N", help="With --simulate: no size above.", show_default=False
        ),
    ] = None,
    vma_costs: Annotated[
        bool, typer.Option("--vma-costs", help="Only what mappings cost, up to 260,000 of them.")
    ] = False,
    progress: ShowProgress = None,
    as_json: AsJson = False,
) -> int:
    """Measure KSM and vmdedup on the same guests; root, takes minutes.

    KSM's settings are changed meanwhile and put back, also when this is killed.
    """
    if simulate and vma_costs:
        raise UsageError("give one of --simulate and --vma-costs, not both")
    if simulate:
        return _simulate(most_pages, progress=progress, as_json=as_json)
    if vma_costs:
        return _vma_costs(progress=progress, as_json=as_json)
    from vmdedup.bench import course
    from vmdedup.bench.guests import default_images

    if contenders == ["list"]:
        print("\n".join(course.ALL))
        return DONE
    unknown = [name for name in contenders or () if name not in course.ALL]
    if unknown:
        raise UsageError(f"--contender {unknown[0]}: there are {'; '.join(course.ALL)}")
    kinds = [word.strip() for word in workloads.split(",") if word.strip()]
    if not kinds:
        raise UsageError("--workloads: name at least one")
    options = course.Options(
        images=images or default_images(),
        workloads=tuple(kinds[number % len(kinds)] for number in range(vms)),
        mib=mem,
        runs=runs,
        settle_s=settle_s,
        window_s=window_s,
        contenders=tuple(contenders or course.ALL),
    )
    return _bench(options, plot, progress=progress, as_json=as_json)


def _bench(options: Options, plot: Path | None, *, progress: bool | None, as_json: bool) -> int:
    from vmdedup.bench import course
    from vmdedup.bench.plot import plot as draw
    from vmdedup.bench.plot import require_plot
    from vmdedup.bench.table import show_bench

    if plot is not None:
        require_plot(plot)
    with _progress(progress) as tell:
        result = course.bench(options, tell)
    if plot is not None:
        draw(result, plot)
    return _show(result, show_bench, as_json=as_json)


def _simulate(most_pages: int | None, *, progress: bool | None, as_json: bool) -> int:
    from vmdedup.bench.simulate import SIZES, simulate
    from vmdedup.bench.table import show_growth

    sizes = [size for size in SIZES if most_pages is None or size <= most_pages]
    if not sizes:
        raise UsageError(f"--most-pages: the smallest size is {SIZES[0]}")
    with _progress(progress) as tell:
        growth = simulate(sizes, tell)
    return _show(growth, show_growth, as_json=as_json)


def _vma_costs(*, progress: bool | None, as_json: bool) -> int:
    from vmdedup.bench.budget import costs
    from vmdedup.bench.table import show_costs

    with _progress(progress) as tell:
        found = costs(tell)
    return _show(found, show_costs, as_json=as_json)


def _show(document: Document, show: Callable[[Document, Console], None], *, as_json: bool) -> int:
    if as_json:
        print(document.model_dump_json(indent=2))
        return DONE
    from vmdedup.report.console import make_console

    show(document, make_console())
    return DONE


@contextmanager
def _progress(wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """Progress on stderr, and an orderly end on SIGTERM."""
    from vmdedup.report.progress import progress_line

    with _ending_on_sigterm(), progress_line(wanted) as line:
        yield lambda what: line.update(what, 0, 0)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does: guests are ended, settings put back.

    Where the whole process group was told to end, processes that are measured are gone
    meanwhile; that is no failure of its own.
    """
    told = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = True
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    except (OSError, VmdedupError) as error:
        if told:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
