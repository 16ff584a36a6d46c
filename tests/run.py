"""Runs pytest: most tests side by side, then those alone that change or measure the host.

`python -m tests.run [pytest arguments]`. Most tests wait for VMs, so that four of
them keep two processors busy. A few that fail are named and tried once more, with the
machine to themselves, and that counts: a starved VM is no defect. Not so those of kind
`chaos`: what they look for shows once in many runs. The end names each test that failed,
so that those which often need a second try are seen. Exits with the first failure's code.

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
_MESSAGE_WIDTH = 160


class _Failures:
    """A plugin: the tests that failed, of what, and whether one of them gets no second try."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.are_final = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.tests.setdefault(report.nodeid, message.partition("\n")[0][:_MESSAGE_WIDTH])
            self.are_final |= "chaos" in report.keywords

    def may_be_disturbances(self) -> bool:
        """Whether the busy machine may be what they failed of."""
        return not self.are_final and 0 < len(self.tests) <= _MOST_DISTURBED


class _SecondTries:
    """The tests that failed, and how those of them ended that were tried twice."""

    def __init__(self) -> None:
        self._failed: dict[str, str] = {}
        self._failed_again: dict[str, bool] = {}

    def run(self, arguments: list[str]) -> int:
        """Run pytest, and once more what failed of a busy machine; the exit code that counts."""
        failures = _Failures()
        code = pytest.main([_DURATIONS, *arguments], plugins=[failures])
        self._failed |= failures.tests
        if code == pytest.ExitCode.TESTS_FAILED and failures.may_be_disturbances():
            print("\nonce more, alone:", *failures.tests, sep="\n  ", flush=True)
            again = _Failures()
            code = pytest.main(["-p", "no:xdist", *failures.tests], plugins=[again])
            self._failed_again |= {test: test in again.tests for test in failures.tests}
        return int(code)

    def lines(self) -> Iterator[str]:
        """How many second tries there were; each test that failed, how it ended, and of what."""
        failed_again = sum(self._failed_again.values())
        yield f"second tries: {len(self._failed_again)}, failed again: {failed_again}"
        words = {None: "failed", True: "failed again", False: "passed"}
        for test, message in self._failed.items():
            yield f"  {words[self._failed_again.get(test)]}: {test}: {message}"


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
