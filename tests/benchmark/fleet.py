"""`vmdedup fleet similar` and `plan` for hosts that do not exist, embedded and on Dask.

    python -m tests.benchmark.fleet [--lost PERCENT] [--workers N] [HOSTS]…

Twenty VMs of 16 GiB on each host, from a tree of images: 20 bases, 10 images of each. A VM has
the contents of its base (1.5 GiB), of its image (1 GiB) and some of its own (2 GiB). Sketches are
at 1/1024 and drawn directly, as hashes are random numbers. With `--lost` each VM has rewritten so
much of its base and image, at random: then no two VMs have the same contents in common.

DuckDB groups them in this process, then on a Dask cluster of N processes on loopback (2; 0: not
at all). Fails if the answers differ. Times are of the clock, and in brackets of processors, of
the workers too; growth is of those. Memory is the most that the coordinator has had, made-up
sketches included, and the most of all workers together.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.service.engine import sharing, vm_report
from vmdedup.core.sketch import Sketch
from vmdedup.hosts.alike import similarity
from vmdedup.hosts.ask import Answer, SketchedVm
from vmdedup.hosts.inventory import HostEntry, Inventory
from vmdedup.hosts.planning import plan
from vmdedup.hosts.sketch_table import SketchTable, as_table
from vmdedup.report.words import size

RATE = 1024
VMS, BASES, IMAGES = 20, 20, 10
GIB_PAGES = 1 << 18
BASE, IMAGE, OWN = (int(gib * GIB_PAGES) // RATE for gib in (1.5, 1, 2))
DEPTH = np.uint64(15 << 60)

STEPS = ("grouped", "similar", "plan")


class Measured(NamedTuple):
    """One engine on one fleet."""

    hosts: int
    engine: str
    answer: str
    """Both documents."""
    clock_s: Sequence[float]
    """Of `STEPS`."""
    cpu_s: Sequence[float]
    peak_bytes: int
    workers_bytes: int


def marks(kind: int, number: int, length: int) -> npt.NDArray[np.uint64]:
    """The marks of a base, an image, or a VM."""
    random = np.random.default_rng([kind, number])
    return random.integers(0, 1 << 60, length, dtype=np.uint64) | DEPTH


def vm(host: str, number: int, image: int, lost: float) -> SketchedVm:
    """One VM of an image, of which it has lost this part."""
    shared = np.concatenate([marks(1, image // IMAGES, BASE), marks(2, image, IMAGE)])
    kept = shared[np.random.default_rng([4, number]).random(len(shared)) >= lost]
    mark = np.unique(np.concatenate([kept, marks(3, number, OWN)]))
    sketch = Sketch("00", RATE, mark, np.ones(len(mark), dtype=np.uint32))
    present_bytes = len(mark) * RATE * 4096
    return SketchedVm(host, f"vm{number}", "ci", None, present_bytes, 16 << 30, sketch, None)


def answers_of(hosts: int, lost: float = 0) -> list[Answer]:
    """What so many hosts would say; VMs of all images are spread at random."""
    image = np.random.default_rng(1).integers(0, BASES * IMAGES, hosts * VMS).tolist()
    found = []
    for index in range(hosts):
        name = f"host{index:04d}"
        numbers = range(index * VMS, (index + 1) * VMS)
        vms = [vm(name, number, image[number], lost) for number in numbers]
        rows = [
            vm_report(each.name).model_copy(
                update={"ram_bytes": each.ram_bytes, "present_bytes": each.present_bytes}
            )
            for each in vms
        ]
        host = HostEntry(name=name, url=f"/run/{name}", max_vms=VMS + 2)
        found.append(Answer(host, sharing(rows), vms))
    return found


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def grouping(workers: int) -> Iterator[Any]:
    """What groups the marks: `None` for this process, or Dask's workers."""
    if not workers:
        yield None
        return
    from vmdedup.hosts.cluster import grouped_on

    cluster = importlib.import_module("distributed").LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    with cluster, grouped_on(cluster.scheduler_address) as group:
        yield group


def measure(hosts: int, lost: float, workers: int, told: SimpleQueue[Measured]) -> None:
    """Tell what one engine finds, and what it takes."""
    answers = answers_of(hosts, lost)
    inventory = Inventory(hosts=[answer.host for answer in answers])
    sketches = as_table([each for answer in answers for each in answer.vms])
    with grouping(workers) as group:

        def of_workers(what: Callable[[], float]) -> float:
            return sum(group.args[0].run(what).values()) if workers else 0

        def now() -> tuple[float, float]:
            return time.monotonic(), time.process_time() + of_workers(time.process_time)

        times = [now()]
        table = SketchTable(sketches, group)
        kinds = len(table.classes), int(table.contents.sum())
        times.append(now())
        found = similarity(table, [], alike=0.5, most_pairs=20)
        times.append(now())
        best = plan(table, inventory, answers, [], worth_percent=10)
        times.append(now())
        workers_bytes = int(of_workers(peak_bytes))
    print(
        f"{hosts} hosts, {hosts * VMS} VMs, {100 * lost:g}% lost: {len(found.kinds)} kinds,"
        f" {kinds[0]} classes of {kinds[1]} sampled contents, {len(best.moves)} moves of"
        f" {size(best.moved_bytes)} save {size(best.saved_bytes)} ± {size(best.error_bytes)}; bound"
        f" {size(best.most_bytes)}, by name {size(best.by_name_bytes)}, at random"
        f" {size(best.random_bytes)}",
        flush=True,
    )
    told.put(
        Measured(
            hosts,
            f"{workers} Dask workers" if workers else "embedded",
            found.model_dump_json() + best.model_dump_json(),
            [after - before for (before, _), (after, _) in pairwise(times)],
            [after - before for (_, before), (_, after) in pairwise(times)],
            peak_bytes(),
            workers_bytes,
        )
    )


def measured(hosts: int, lost: float, workers: int) -> Measured:
    """In a process of its own, so that it has a peak of its own."""
    told: SimpleQueue[Measured] = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=measure, args=(hosts, lost, workers, told))
    process.start()
    while process.is_alive() and told.empty():
        time.sleep(0.1)
    if told.empty():
        sys.exit(f"{hosts} hosts: no result, see above")
    found = told.get()
    process.join()
    return found


def show(runs: Sequence[Measured]) -> None:
    """A row for each run, then how times grow from the smallest fleet to the largest."""
    print(f"| hosts | engine | {' | '.join(STEPS)} | memory | of workers |\n" + "|---" * 7 + "|")
    for run in runs:
        both = zip(run.clock_s, run.cpu_s, strict=True)
        times = " | ".join(f"{clock:.1f} s ({cpu:.1f})" for clock, cpu in both)
        memory = f"{size(run.peak_bytes)} | {size(run.workers_bytes)}"
        print(f"| {run.hosts} | {run.engine} | {times} | {memory} |")
    for engine in dict.fromkeys(run.engine for run in runs):
        first, *_, last = sorted(run for run in runs if run.engine == engine)
        if first.hosts < last.hosts:
            powers = [
                math.log(after / before) / math.log(last.hosts / first.hosts)
                for before, after in zip(first.cpu_s, last.cpu_s, strict=True)
            ]
            told = ", ".join(f"{s} {p:.2f}" for s, p in zip(STEPS, powers, strict=True))
            print(f"{engine}: grows with the hosts to the power of: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hosts", type=int, nargs="*", default=[100, 300, 1000])
    parser.add_argument("--lost", type=float, default=0, metavar="PERCENT")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    runs: list[Measured] = []
    for count in given.hosts:
        both = [measured(count, given.lost / 100, each) for each in sorted({0, given.workers})]
        if len({run.answer for run in both}) > 1:
            sys.exit(f"{count} hosts: Dask's answer is another than this process's")
        runs += both
    show(runs)


if __name__ == "__main__":
    main()
