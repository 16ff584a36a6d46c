"""Runs pytest: most tests side by side, then those alone that change or measure the host.

`python -m tests.run [pytest arguments]`. Most tests wait for VMs, so that four of
them keep two processors busy. A few that fail are named and tried once more, with the
machine to themselves, and that counts: a starved VM is no defect. Not so those of kind
`chaos`: what they look for shows once in many runs. The end names each second try, so
that tests which often need one are seen. Exits with the first failure's code.

VMDEDUP_COVERAGE=1 also measures which statements and branches ran.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

_SIDE_BY_SIDE = ["-n", "4", "--dist", "worksteal", "-m", "not alone and not hosts and not kernels"]
_ALONE = ["-m", "alone"]
_DURATIONS = "--durations=10"
_MOST_DISTURBED = 8
"""More failures than this are no accident."""


class _Failures:
    """A plugin: the tests that failed, and whether one of them gets no second try."""

    def __init__(self) -> None:
        self.tests: dict[str, None] = {}
        self.are_final = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = None
            self.are_final |= "chaos" in report.keywords

    def may_be_disturbances(self) -> bool:
        """Whether the busy machine may be what they failed of."""
        return not self.are_final and 0 < len(self.tests) <= _MOST_DISTURBED


class _SecondTries:
    """The tests that were tried twice, and those of them that failed again."""

    def __init__(self) -> None:
        self._tests: list[str] = []
        self._failed_again: set[str] = set()

    def run(self, arguments: list[str]) -> int:
        """Run pytest, and once more what failed of a busy machine; the exit code that counts."""
        failures = _Failures()
        code = pytest.main([_DURATIONS, *arguments], plugins=[failures])
        if code == pytest.ExitCode.TESTS_FAILED and failures.may_be_disturbances():
            print("\nonce more, alone:", *failures.tests, sep="\n  ", flush=True)
            again = _Failures()
            code = pytest.main(["-p", "no:xdist", *failures.tests], plugins=[again])
            self._tests += failures.tests
            self._failed_again |= again.tests.keys()
        return int(code)

    def lines(self) -> Iterator[str]:
        """How many there were, and each with how it ended."""
        yield f"second tries: {len(self._tests)}, failed again: {len(self._failed_again)}"
        for test in self._tests:
            yield f"  {'failed again' if test in self._failed_again else 'passed'}: {test}"


def main() -> int:
    """All runs; the exit code."""
    if not os.environ.get("VMDEDUP_COVERAGE"):
        return _run_all(sys.argv[1:])
    from tests.branch_coverage import measured

    with measured():
        return _run_all(["-p", "tests.worker_coverage", *sys.argv[1:]])


def _run_all(given: list[str]) -> int:
    tries = _SecondTries()
    codes = [tries.run([*how, *given]) for how in (_SIDE_BY_SIDE, _ALONE)]
    print("", *tries.lines(), sep="\n", flush=True)
    nothing = pytest.ExitCode.NO_TESTS_COLLECTED
    failed = [code for code in codes if code not in (pytest.ExitCode.OK, nothing)]
    if not failed and all(code == nothing for code in codes):
        failed = [nothing]
    return int(failed[0]) if failed else 0


if __name__ == "__main__":
    sys.exit(main())
