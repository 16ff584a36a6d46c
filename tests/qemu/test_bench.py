"""The benchmark as a process, on tiny guests: its figures, and what it leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.benchmark import ksm, results
from tests.benchmark.errors import BenchError
from tests.benchmark.gauge import descendants
from tests.benchmark.guests import sweep
from tests.harness.images import REPOSITORY, image
from tests.harness.kernel import becomes_true

pytestmark = [pytest.mark.qemu, pytest.mark.alone]

BENCH = [sys.executable, "-m", "tests.benchmark"]
SMALL = ["--vms", "2", "--workloads", "tiny", "--mem", "96", "--settle", "1", "--window", "1"]


@pytest.fixture(autouse=True)
def _ksm_of_our_own() -> Iterator[None]:
    if not ksm.DIRECTORY.exists():
        pytest.skip("this kernel has no KSM")
    if ksm.counters().pages_shared:
        pytest.skip("KSM is in use on this host")
    before = ksm.read_settings()
    yield
    assert ksm.read_settings() == before


def left_behind() -> list[str]:
    """Directories of benchmarks."""
    places = (Path("/tmp"), Path("/dev/shm"))
    return [str(path) for place in places for path in place.glob("vmdedup-bench-*")]


def is_guest(pid: int) -> bool:
    try:
        return b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False


@contextmanager
def running(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A benchmark that has come as far as running KSM."""
    image("tiny")
    command = [*BENCH, *SMALL, "--settle", "60", "--contender", results.KSM_FULL, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as bench:
        try:
            assert bench.stderr is not None
            for line in bench.stderr:
                if "settle" in line:
                    break
            yield bench
        finally:
            bench.kill()


def test_both_save_what_can_be_saved_and_the_figures_hang_together() -> None:
    image("tiny")
    wanted = [results.KSM_FULL_ZERO, results.OURS_RAM]
    names = [word for name in wanted for word in ("--contender", name)]
    done = subprocess.run(
        [*BENCH, *SMALL, *names, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    courses = {course["contender"]: course for course in found["courses"]}
    assert list(courses) == wanted
    for course in courses.values():
        assert 0 < course["saved_pages"] <= course["bound_pages"] < course["held_pages"]
        assert course["saved_vs_bound"] > 0.98, course
        assert course["remained_pages"] == pytest.approx(0, abs=100)
        reached = [course[key]["cpu_s"] for key in ("to_50", "to_90")]
        assert 0 < reached[0] <= reached[1] <= course["settled"]["cpu_s"]
        walls, cpus, _ = zip(*course["timeline"], strict=True)
        assert list(walls) == sorted(walls)
        assert list(cpus) == sorted(cpus)
    ours = courses[results.OURS_RAM]
    assert ours["stops"] == 0
    assert ours["gate_ms"]["count"] > 0
    assert ours["steady"]["passes"] > ours["steady_at_defaults"]["passes"]
    assert ours["steady"]["cpu_share"] > ours["steady_at_defaults"]["cpu_share"] > 0
    assert found["ratios"]["saved_vs_bound_ram"] == ours["saved_vs_bound"]
    saved = [point["saved_bytes"] for point in found["budget"]]
    assert saved == sorted(saved)
    assert saved[-1] > 0
    assert not left_behind()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ksm_is_put_back_and_no_guest_stays_however_it_ends(number: signal.Signals) -> None:
    steered = ksm.DIRECTORY / "pages_to_scan"
    before = steered.read_text()
    steered.write_text("123")
    try:
        with running("--progress") as bench:
            guests = [pid for pid in descendants(bench.pid) if is_guest(pid)]
            assert len(guests) == 2
            steered.write_text("7")
            bench.send_signal(number)
            bench.wait(30)
        assert becomes_true(lambda: steered.read_text() == "123\n")
        assert becomes_true(lambda: not any(is_guest(pid) for pid in guests))
        sweep()
        assert not left_behind()
    finally:
        steered.write_text(before)


def test_a_second_one_at_the_same_time_is_refused() -> None:
    with ksm.KsmSettings(), pytest.raises(BenchError, match="another benchmark"):
        ksm.KsmSettings()
