"""KSM and vmdedup on the same guests, measured in one go: `tox -e bench`.

    tox -e bench                                       all contenders, about ten minutes
    tox -e bench -- --runs 3 --plot saved.svg          medians of three, and a picture
    tox -e bench -- --simulate                         no VMs: the core, up to 256 GiB
    tox -e bench -- --vma-costs                        no VMs: what mappings cost
    python -m tests.benchmark --json > figures.json    the same without tox's own lines

Needs root. KSM's settings are changed meanwhile and put back, also when this is killed.
Exit codes: 0 measured, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.benchmark import course
from tests.benchmark.budget import VmaCosts, costs
from tests.benchmark.plot import plot, require_plot
from tests.benchmark.results import BenchResult
from tests.benchmark.simulate import SIZES, Growth, simulate
from tests.benchmark.table import show_bench, show_costs, show_growth
from tests.harness.serial import GuestError
from vmdedup.errors import VmdedupError
from vmdedup.report.console import make_console
from vmdedup.report.progress import progress_line

Figures = BenchResult | Growth | VmaCosts


def main() -> None:
    """Measure what sys.argv asks for, and print it."""
    parser = _parser()
    given = parser.parse_args()
    if given.contender == ["list"]:
        print("\n".join(course.ALL))
        return
    if refusal := _refusal(given):
        parser.error(refusal)
    try:
        with _ending_on_sigterm(), progress_line(given.progress) as line:
            figures = _measure(given, lambda what: line.update(what, 0, 0))
        _show(figures, as_json=given.json)
    except KeyboardInterrupt:
        sys.exit("benchmark: interrupted")
    except (OSError, VmdedupError, GuestError) as error:
        sys.exit(f"benchmark: failed: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vms", type=_at_least(1, int), default=4, metavar="N", help="guests (4)")
    add("--mem", type=_at_least(64, int), default=384, metavar="MIB", help="of each (384)")
    add(
        "--workloads",
        type=lambda words: [word.strip() for word in words.split(",") if word.strip()],
        default="idle,nginx,python,redis",
        metavar="LIST",
        help="what the guests do, in turn: idle, nginx, python, redis (all four); or tiny",
    )
    add("--runs", type=_at_least(1, int), default=1, metavar="N", help="medians of N are shown (1)")
    add(
        "--contender",
        action="append",
        metavar="NAME",
        help="only this one; repeatable; `list` prints their names (all)",
    )
    add(
        "--settle",
        type=_at_least(0, float),
        default=20.0,
        metavar="S",
        help="seconds that the guests settle (20)",
    )
    add(
        "--window",
        type=_at_least(1, float),
        default=15.0,
        metavar="S",
        help="seconds that the steady state is watched (15)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw saved memory over time: .svg or .png")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument(
        "--simulate",
        action="store_true",
        help="only the core, on made-up digests, up to 256 GiB",
    )
    alone.add_argument(
        "--vma-costs",
        action="store_true",
        help="only what mappings cost, up to 260,000 of them",
    )
    add("--most-pages", type=int, metavar="N", help="with --simulate: no size above")
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="on stderr (if that is a terminal)",
    )
    add("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def _at_least(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """A parser of numbers of this kind, which refuses smaller ones."""

    def number(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word}: give a number ({kind.__name__})") from None
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{word}: {least} is the least")
        return value

    return number


def _refusal(given: argparse.Namespace) -> str | None:
    """What is wrong with options of which each alone would do."""
    unknown = [name for name in given.contender or () if name not in course.ALL]
    if unknown:
        return f"--contender {unknown[0]}: there are {'; '.join(course.ALL)}"
    if not given.workloads:
        return "--workloads: name at least one"
    if given.simulate and given.most_pages is not None and given.most_pages < SIZES[0]:
        return f"--most-pages: the smallest size is {SIZES[0]}"
    return None


def _measure(given: argparse.Namespace, tell: Callable[[str], None]) -> Figures:
    if given.simulate:
        most = SIZES[-1] if given.most_pages is None else given.most_pages
        return simulate([size for size in SIZES if size <= most], tell)
    if given.vma_costs:
        return costs(tell)
    if given.plot is not None:
        require_plot(given.plot)
    kinds = given.workloads
    options = course.Options(
        workloads=tuple(kinds[number % len(kinds)] for number in range(given.vms)),
        mib=given.mem,
        runs=given.runs,
        settle_s=given.settle,
        window_s=given.window,
        contenders=tuple(given.contender or course.ALL),
    )
    result = course.bench(options, tell)
    if given.plot is not None:
        plot(result, given.plot)
    return result


def _show(figures: Figures, *, as_json: bool) -> None:
    if as_json:
        print(figures.model_dump_json(indent=2))
        return
    console = make_console()
    match figures:
        case BenchResult():
            show_bench(figures, console)
        case Growth():
            show_growth(figures, console)
        case VmaCosts():
            show_costs(figures, console)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does: guests are ended, settings put back.

    If the whole process group was told to end, the measured processes end meanwhile;
    that is no failure of its own.
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
    except (OSError, VmdedupError, GuestError) as error:
        if told:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
