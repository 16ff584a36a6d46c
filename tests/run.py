"""Runs pytest: most tests side by side, then those alone that change or measure the host.

`python -m tests.run [pytest arguments]`. Most tests wait for VMs, so that four of
them keep two processors busy. Exits with the first failure's code.
"""

from __future__ import annotations

import sys

import pytest

_SIDE_BY_SIDE = ["-n", "4", "--dist", "worksteal", "-m", "not alone"]
_ALONE = ["-m", "alone"]
_DURATIONS = "--durations=10"


def main() -> int:
    """Both runs; the exit code."""
    given = sys.argv[1:]
    codes = [pytest.main([_DURATIONS, *how, *given]) for how in (_SIDE_BY_SIDE, _ALONE)]
    nothing = pytest.ExitCode.NO_TESTS_COLLECTED
    failed = [code for code in codes if code not in (pytest.ExitCode.OK, nothing)]
    if not failed and all(code == nothing for code in codes):
        failed = [nothing]
    return int(failed[0]) if failed else 0


if __name__ == "__main__":
    sys.exit(main())
