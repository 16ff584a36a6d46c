"""Saved memory over time, all contenders in one picture (SVG or PNG, by the file's name)."""

from __future__ import annotations

from pathlib import Path

from tests.benchmark.errors import BenchError
from tests.benchmark.results import BenchResult
from vmdedup.units import MIB, PAGE_BYTES

_SUFFIXES = (".svg", ".png")


def require_plot(path: Path) -> None:
    """BenchError now, and not after minutes of measuring, if `path` cannot be drawn."""
    if path.suffix not in _SUFFIXES:
        raise BenchError(f"--plot {path}: the name must end in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"--plot {path}: no such directory")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError(
            "--plot needs matplotlib: run it by tox -e bench, or pip install -e '.[test]'"
        ) from error


def plot(result: BenchResult, path: Path) -> None:
    """Draw the first run of each contender; time is logarithmic, KSM's defaults take minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for course in result.courses:
        if course.run != 0:
            continue
        wall_s = [max(point[0], 0.01) for point in course.timeline]
        saved = [point[2] * PAGE_BYTES / MIB for point in course.timeline]
        axes.step(wall_s, saved, where="post", label=f"{course.contender} ({course.backend})")
    bound = max(course.bound_pages for course in result.courses) * PAGE_BYTES / MIB
    axes.axhline(bound, color="grey", linestyle=":", label="exact bound")
    axes.set_xscale("log")
    axes.set_xlabel("seconds since the merge began")
    axes.set_ylabel("memory saved, MiB")
    axes.set_title(f"{len(result.workloads)} guests of {result.vm_mib} MiB, frozen")
    axes.legend(fontsize="small")
    figure.savefig(path)
