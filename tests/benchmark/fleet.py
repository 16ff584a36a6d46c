"""Times of `vmdedup fleet similar` and `plan` for hosts that do not exist.

    python -m tests.benchmark.fleet [HOSTS]…

Twenty VMs of 16 GiB on each host, from a tree of images: 20 bases, 10 images of each. A VM has
the contents of its base (1.5 GiB), of its image (1 GiB) and some of its own (2 GiB). Sketches are
at 1/1024 and drawn directly, as hashes are random numbers.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

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

Result = TypeVar("Result")


def marks(kind: int, number: int, length: int) -> npt.NDArray[np.uint64]:
    """The marks of a base, an image, or a VM."""
    random = np.random.default_rng([kind, number])
    return random.integers(0, 1 << 60, length, dtype=np.uint64) | DEPTH


def vm(host: str, number: int, image: int) -> SketchedVm:
    """One VM of an image."""
    mark = np.unique(
        np.concatenate(
            [marks(1, image // IMAGES, BASE), marks(2, image, IMAGE), marks(3, number, OWN)]
        )
    )
    sketch = Sketch("00", RATE, mark, np.ones(len(mark), dtype=np.uint32))
    present_bytes = len(mark) * RATE * 4096
    return SketchedVm(host, f"vm{number}", "ci", None, present_bytes, 16 << 30, sketch, None)


def answers_of(hosts: int) -> list[Answer]:
    """What so many hosts would say; VMs of all images are spread at random."""
    image = np.random.default_rng(1).integers(0, BASES * IMAGES, hosts * VMS).tolist()
    found = []
    for index in range(hosts):
        name = f"host{index:04d}"
        numbers = range(index * VMS, (index + 1) * VMS)
        vms = [vm(name, number, image[number]) for number in numbers]
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


def measure(hosts: int) -> None:
    print(f"{hosts} hosts, {hosts * VMS} VMs", flush=True)
    answers = timed("made up", lambda: answers_of(hosts))
    inventory = Inventory(hosts=[answer.host for answer in answers])
    vms = [each for answer in answers for each in answer.vms]
    table = timed("Arrow and DuckDB", lambda: SketchTable(as_table(vms)))
    found = timed("similar", lambda: similarity(table, [], alike=0.5, most_pairs=20))
    print(f"  {len(found.kinds)} kinds")
    best = timed("plan", lambda: plan(table, inventory, answers, [], worth_percent=10))
    print(
        f"  {len(best.moves)} moves of {size(best.moved_bytes)} save {size(best.saved_bytes)}"
        f" ± {size(best.error_bytes)}; bound {size(best.most_bytes)}, by name"
        f" {size(best.by_name_bytes)}, at random {size(best.random_bytes)}",
        flush=True,
    )


if __name__ == "__main__":
    for count in [int(word) for word in sys.argv[1:]] or [125, 250, 500, 1000]:
        # A process each, so that each has a peak of its own.
        process = multiprocessing.Process(target=measure, args=(count,))
        process.start()
        process.join()
