"""Times of `vmdedup fleet similar` and `plan` for hosts that do not exist.

    python -m tests.benchmark.fleet [--lost PERCENT] [--workers N] [HOSTS]…

Twenty VMs of 16 GiB on each host, from a tree of images: 20 bases, 10 images of each. A VM has
the contents of its base (1.5 GiB), of its image (1 GiB) and some of its own (2 GiB). Sketches are
at 1/1024 and drawn directly, as hashes are random numbers. With `--lost` each VM has rewritten so
much of its base and image, at random: then no two VMs have the same contents in common. With
`--workers` they are grouped on a Dask cluster of so many processes on loopback as well.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tests.service.engine import sharing, vm_report
from vmdedup.core.sketch import Sketch
from vmdedup.hosts.alike import similarity
from vmdedup.hosts.ask import Answer, SketchedVm
from vmdedup.hosts.documents import FleetSimilarity
from vmdedup.hosts.inventory import HostEntry, Inventory
from vmdedup.hosts.planning import plan
from vmdedup.hosts.sketch_table import SketchTable, as_table
from vmdedup.report.words import size

RATE = 1024
VMS, BASES, IMAGES = 20, 20, 10
GIB_PAGES = 1 << 18
BASE, IMAGE, OWN = (int(gib * GIB_PAGES) // RATE for gib in (1.5, 1, 2))
DEPTH = np.uint64(15 << 60)

Result = TypeVar("Result")


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


def timed(what: str, work: Callable[[], Result]) -> Result:
    began, cpu = time.monotonic(), time.process_time()
    result = work()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(
        f"  {what}: {time.monotonic() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU,"
        f" at most {size(peak_bytes)} so far",
        flush=True,
    )
    return result


def measure(hosts: int, lost: float, workers: int) -> None:
    print(f"{hosts} hosts, {hosts * VMS} VMs, {100 * lost:g}% lost", flush=True)
    answers = timed("made up", lambda: answers_of(hosts, lost))
    inventory = Inventory(hosts=[answer.host for answer in answers])
    vms = [each for answer in answers for each in answer.vms]
    sketches = timed("Arrow", lambda: as_table(vms))
    table = timed("DuckDB", lambda: SketchTable(sketches))
    found = timed("similar", lambda: similarity(table, [], alike=0.5, most_pairs=20))
    print(f"  {len(found.kinds)} kinds of {len(table.classes)} classes")
    if workers:
        print(f"  the same by Dask: {found == on_dask(sketches, workers)}")
    best = timed("plan", lambda: plan(table, inventory, answers, [], worth_percent=10))
    print(
        f"  {len(best.moves)} moves of {size(best.moved_bytes)} save {size(best.saved_bytes)}"
        f" ± {size(best.error_bytes)}; bound {size(best.most_bytes)}, by name"
        f" {size(best.by_name_bytes)}, at random {size(best.random_bytes)}",
        flush=True,
    )


def on_dask(sketches: Any, workers: int) -> FleetSimilarity:
    """What workers on loopback find."""
    from vmdedup.hosts.cluster import grouped_on

    cluster = importlib.import_module("distributed").LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    with cluster, grouped_on(cluster.scheduler_address) as group:
        table = timed("Dask started", lambda: SketchTable(sketches, group))
        return timed("similar on Dask", lambda: similarity(table, [], alike=0.5, most_pairs=20))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hosts", type=int, nargs="*", default=[125, 250, 500, 1000])
    parser.add_argument("--lost", type=float, default=0, metavar="PERCENT")
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    for count in given.hosts:
        # A process each, so that each has a peak of its own.
        work = (count, given.lost / 100, given.workers)
        process = multiprocessing.Process(target=measure, args=work)
        process.start()
        process.join()
