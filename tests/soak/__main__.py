"""`python -m tests.soak --minutes 10`: soak, print the figures, exit 1 when something is wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.soak.soak import Soak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long")
    parser.add_argument("--vms", type=int, default=5, help="VMs at a time")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vmdedup-soak-") as folder,
        Soak(Path(folder), vms=given.vms, seed=given.seed) as soak,
    ):
        figures = soak.run(given.minutes * 60, report_every_s=30)
    for name, value in asdict(figures).items():
        print(f"{name:>24}: {value}")
    if problems := figures.problems():
        print("\n".join(problems))
        sys.exit(1)


if __name__ == "__main__":
    main()
