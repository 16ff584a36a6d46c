"""`python -m tests.platforms PLATFORM… --seconds N`: a course, and its figures as JSON.

To be run inside a world of its own (tests/platforms/world.py), by tests and soak.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from tests.platforms.course import PLATFORMS, Course


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.platforms", description=__doc__)
    parser.add_argument("platforms", nargs="+", choices=PLATFORMS)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--long", action="store_true", help="the daemon is also killed")
    given = parser.parse_args()
    with Course(given.platforms, seed=given.seed) as course:
        figures = course.run(given.seconds, long=given.long)
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()
