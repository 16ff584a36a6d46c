"""`python -m tests.soak --minutes 10`: soak, print the figures, exit 1 when something is wrong.

With `--platforms` the VMs are those of Proxmox VE, KubeVirt and Incus, in a world of their own.
With `--cold` cold pages go to zram, which nothing else may use meanwhile.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.platforms.course import Figures as CourseFigures
from tests.platforms.world import run_inside, world_missing
from tests.soak.soak import Soak

_TOGETHER = ("proxmox", "kubevirt", "incus")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long")
    parser.add_argument("--vms", type=int, default=5, help="VMs at a time")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random")
    parser.add_argument("--platforms", action="store_true", help="VMs as platforms start them")
    parser.add_argument("--cold", action="store_true", help="page cold pages out to zram too")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    figures = _platforms(given) if given.platforms else _random(given)
    for name, value in asdict(figures).items():
        print(f"{name:>24}: {value}")
    if problems := figures.problems():
        print("\n".join(problems))
        sys.exit(1)


def _random(given: Any) -> Any:
    with (
        tempfile.TemporaryDirectory(prefix="vmdedup-soak-") as folder,
        Soak(Path(folder), vms=given.vms, seed=given.seed, cold=given.cold) as soak,
    ):
        return soak.run(given.minutes * 60, report_every_s=30)


def _platforms(given: Any) -> CourseFigures:
    if reason := world_missing():
        sys.exit(reason)
    words = ["--long", "--seconds", str(given.minutes * 60), "--seed", str(given.seed)]
    code, said, _ = run_inside("tests.platforms", *_TOGETHER, *words, silent=False)
    if code:
        sys.exit(code)
    return CourseFigures(**json.loads(said.splitlines()[-1]))


if __name__ == "__main__":
    main()
