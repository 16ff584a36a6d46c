"""The advisor on simulated hosts: bounded, on target, steady, never starving.

`Host` is the physics a scan obeys: batches of pages_to_scan pages with a sleep
after each, so many CPU seconds a page, a batch and a scan. `ksm` is KSM's own
rule on the same hosts, for what it does that ours must not.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmdedup.controls import Controls
from vmdedup.policy.advisor import Advice, Scan, advise, hurry, readvise, start

pytestmark = pytest.mark.unit

ROUNDS = 12
"""Scans within which the target must be met from any pages_to_scan in the limits."""


@dataclass(frozen=True)
class Host:
    """What a scan costs here; `stretch` is wall time per CPU time (others run too)."""

    pages: int
    page_cpu_s: float = 1e-6
    batch_cpu_s: float = 1e-4
    scan_cpu_s: float = 0.05
    stretch: float = 1.0

    def scan(self, controls: Controls, pages_to_scan: int, new_pages: int = 0) -> Scan:
        batches = max(1, math.ceil(self.pages / pages_to_scan))
        cpu_s = self.scan_cpu_s + batches * self.batch_cpu_s + self.pages * self.page_cpu_s
        slept_s = batches * controls.sleep_millisecs / 1000
        return Scan(
            pages_scanned=self.pages,
            covered_pages=self.pages,
            new_pages=new_pages,
            scan_s=cpu_s * self.stretch + slept_s,
            slept_s=slept_s,
            cpu_s=cpu_s,
        )


def settled_at(pages_to_scan: int) -> Advice:
    return Advice(pages_to_scan, 0.0, catching_up=False, settled_pages_to_scan=pages_to_scan)


def run(
    host: Host, controls: Controls, advice: Advice, rounds: int
) -> tuple[list[Scan], list[Advice]]:
    scans, advices = [], [advice]
    for _ in range(rounds):
        scans.append(host.scan(controls, advices[-1].pages_to_scan))
        advices.append(advise(advices[-1], scans[-1], controls))
    return scans, advices


def period_s(scan: Scan, after: Advice) -> float:
    return scan.scan_s + after.rest_s


def least_period_s(host: Host, controls: Controls) -> float:
    """The shortest that a scan can be here: at the most pages, within the CPU limit."""
    fastest = host.scan(controls, controls.advisor_max_pages_to_scan)
    return max(fastest.scan_s, fastest.cpu_s * 100 / controls.advisor_max_cpu)


def cpu_percent(scan: Scan, after: Advice) -> float:
    return 100 * scan.cpu_s / period_s(scan, after)


HOSTS = {
    "four tiny VMs, little written": Host(pages=5_000),
    "nothing written": Host(pages=0),
    "four tiny VMs, everything read": Host(pages=185_000),
    "64 GiB": Host(pages=16 << 20, scan_cpu_s=1.0),
    "64 GiB, a page is dear": Host(pages=16 << 20, page_cpu_s=5e-6),
    "a slow box": Host(pages=1 << 20, page_cpu_s=2e-5, batch_cpu_s=2e-3, scan_cpu_s=2.0),
    "a crowded box": Host(pages=4 << 20, stretch=4.0),
    "dear batches": Host(pages=2 << 20, batch_cpu_s=0.02),
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
@pytest.mark.parametrize("target_s", [2, 20, 200])
@pytest.mark.parametrize("begin", ["min", "max", "start"])
def test_it_reaches_the_target_or_a_limit_and_stays(host: Host, target_s: int, begin: str) -> None:
    controls = Controls(advisor_target_scan_time=target_s)
    first = {
        "min": settled_at(controls.advisor_min_pages_to_scan),
        "max": settled_at(controls.advisor_max_pages_to_scan),
        "start": start(controls),
    }[begin]
    scans, advices = run(host, controls, first, rounds=120)
    for scan, after in list(zip(scans, advices[1:], strict=True))[ROUNDS:]:
        assert cpu_percent(scan, after) <= controls.advisor_max_cpu * 1.0001
        if least_period_s(host, controls) <= target_s:
            assert target_s / 1.2 <= period_s(scan, after) <= target_s * 1.2
        elif after.pages_to_scan < controls.advisor_max_pages_to_scan:
            # Out of reach: then as fast as the CPU limit allows.
            assert cpu_percent(scan, after) >= controls.advisor_max_cpu / 1.25
    last = [advice.pages_to_scan for advice in advices[-10:]]
    assert max(last) <= min(last) * 1.02


HOST = st.builds(
    Host,
    pages=st.one_of(st.integers(0, 1000), st.integers(1000, 1 << 25)),
    page_cpu_s=st.floats(1e-8, 5e-5),
    batch_cpu_s=st.floats(0, 0.01),
    scan_cpu_s=st.floats(0, 5),
    stretch=st.floats(1, 5),
)
CONTROLS = st.builds(
    lambda least, span, **others: Controls(
        advisor_min_pages_to_scan=least, advisor_max_pages_to_scan=least + span, **others
    ),
    least=st.integers(1, 2000),
    span=st.integers(0, 60_000),
    advisor_target_scan_time=st.integers(1, 400),
    advisor_max_cpu=st.integers(5, 100),
    sleep_millisecs=st.one_of(st.just(0), st.just(20), st.integers(0, 50)),
)
CHANCE = st.floats(0, 1)


def somewhere(controls: Controls, chance: float) -> Advice:
    least, most = controls.advisor_min_pages_to_scan, controls.advisor_max_pages_to_scan
    return settled_at(round(least + chance * (most - least)))


@given(HOST, CONTROLS, CHANCE)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_on_a_steady_host_the_pace_moves_one_way_and_stops(
    host: Host, controls: Controls, chance: float
) -> None:
    _, advices = run(host, controls, somewhere(controls, chance), rounds=300)
    paces = [advice.pages_to_scan for advice in advices]
    # Batches are whole: where a scan has few of them, its time moves in steps of one.
    batches = max(1, host.pages // paces[-1])
    if batches >= 40:
        steps = [after - before for before, after in pairwise(paces)]
        rounding = 1 + max(paces) / 1000
        assert not (max(steps) > rounding and min(steps) < -rounding), paces[:20]
        tail = paces[-50:]
        assert max(tail) - min(tail) <= max(2, 0.02 * max(tail)), tail


SCAN = st.builds(
    Scan,
    pages_scanned=st.integers(0, 1 << 40),
    covered_pages=st.integers(0, 1 << 40),
    new_pages=st.integers(0, 1 << 40),
    scan_s=st.floats(0, 1e7),
    slept_s=st.floats(0, 1e7),
    cpu_s=st.floats(0, 1e7),
)


@given(st.lists(st.tuples(SCAN, st.booleans()), max_size=12), CONTROLS, CHANCE)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_whatever_is_measured_the_limits_hold(
    history: list[tuple[Scan, bool]], controls: Controls, chance: float
) -> None:
    advice = somewhere(controls, chance)
    least, most = controls.advisor_min_pages_to_scan, controls.advisor_max_pages_to_scan
    for scan, vm_came in history:
        advice = advise(hurry(advice, controls) if vm_came else advice, scan, controls)
        assert least <= advice.pages_to_scan <= most
        assert advice.settled_pages_to_scan is None or (
            least <= advice.settled_pages_to_scan <= most
        )
        by_cpu_s = scan.cpu_s * 100 / controls.advisor_max_cpu
        # Never starves: the next scan begins when target and CPU limit allow it.
        assert 0 <= advice.rest_s <= max(controls.advisor_target_scan_time, by_cpu_s)
        assert scan.scan_s + advice.rest_s >= by_cpu_s * 0.9999
        if not advice.catching_up:
            assert scan.scan_s + advice.rest_s >= controls.advisor_target_scan_time * 0.9999


@given(st.integers(200_000, 8 << 20), st.integers(10, 100), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_noise_is_not_amplified(pages: int, target_s: int, seed: int) -> None:
    """Scans that vary by a fifth: so may the pace and the period, and on average they fit."""
    rng = random.Random(seed)
    controls = Controls(advisor_target_scan_time=target_s)
    host = Host(pages, page_cpu_s=5e-7)
    quiet = run(host, controls, start(controls), 40)[1][-1]
    advice, noise = quiet, 0.2
    paces, periods = [], []
    for _ in range(400):
        noisy = replace(host, pages=round(pages * math.exp(rng.gauss(0, noise))))
        scan = noisy.scan(controls, advice.pages_to_scan)
        advice = advise(advice, scan, controls)
        paces.append(math.log(advice.pages_to_scan))
        periods.append(period_s(scan, advice))
    spread = _deviation(paces)
    assert spread <= 1.2 * noise
    assert target_s <= sum(periods) / len(periods) <= 1.25 * target_s
    # An oscillation would show as neighbours on opposite sides.
    mean = sum(paces) / len(paces)
    if spread > noise / 10:
        neighbours = [(a - mean) * (b - mean) for a, b in pairwise(paces)]
        assert sum(neighbours) / len(neighbours) > -0.2 * spread**2


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def test_a_vm_that_comes_is_caught_up_with_at_the_cpu_limit_then_it_is_quiet() -> None:
    controls = Controls()
    before, after = Host(pages=185_000), Host(pages=285_000)
    advice = run(before, controls, start(controls), 20)[1][-1]
    pace = advice.pages_to_scan

    took_s = 0.0
    advice = hurry(advice, controls)
    assert (advice.catching_up, advice.rest_s) == (True, 0.0)
    for new_pages in (100_000, 0):
        scan = after.scan(controls, advice.pages_to_scan, new_pages)
        assert scan.scan_s < 2
        advice = advise(advice, scan, controls)
        took_s += scan.scan_s
        if new_pages:
            assert advice.catching_up
            assert advice.rest_s < 1
            assert cpu_percent(scan, advice) <= controls.advisor_max_cpu * 1.0001
    assert took_s < controls.advisor_target_scan_time / 5
    assert not advice.catching_up

    scans, advices = run(after, controls, advice, 10)
    assert all(pace <= one.pages_to_scan < 3 * pace for one in advices[1:])
    assert cpu_percent(scans[-1], advices[-1]) < 2
    assert period_s(scans[-1], advices[-1]) == pytest.approx(20, rel=0.2)


def test_new_memory_makes_it_hurry_without_being_told() -> None:
    controls = Controls()
    advice = settled_at(1000)
    booting = advise(advice, Host(185_000).scan(controls, 1000, new_pages=20_000), controls)
    assert booting.catching_up
    assert booting.pages_to_scan > 20 * 1000
    assert booting.settled_pages_to_scan == 1000
    little = advise(advice, Host(185_000).scan(controls, 1000, new_pages=2_000), controls)
    assert not little.catching_up


def test_after_a_hurry_the_pace_from_before_is_resumed() -> None:
    """The scan after a hurry has little to read, since little time went by."""
    controls = Controls()
    advice = hurry(settled_at(7000), controls)
    advice = advise(advice, Host(50_000).scan(controls, 30_000, new_pages=40_000), controls)
    advice = advise(advice, Host(100).scan(controls, advice.pages_to_scan), controls)
    assert not advice.catching_up
    assert advice.pages_to_scan == 7000


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_vms_that_come_and_go_for_ever(seed: int) -> None:
    """Whatever comes, `ROUNDS` quiet scans later the target is held again."""
    rng = random.Random(seed)
    controls = Controls()
    advice = start(controls)
    pages = 50_000
    for _ in range(15):
        vm_pages = rng.randrange(10_000, 400_000)
        comes = rng.random() < 0.6
        pages = pages + vm_pages if comes else max(1000, pages - vm_pages)
        new_pages = vm_pages if comes else 0
        if comes and rng.random() < 0.5:
            advice = hurry(advice, controls)
        for round_ in range(ROUNDS + 2):
            host = Host(pages, page_cpu_s=rng.uniform(0.9e-6, 1.1e-6))
            scan = host.scan(controls, advice.pages_to_scan, new_pages if round_ == 0 else 0)
            advice = advise(advice, scan, controls)
            assert cpu_percent(scan, advice) <= controls.advisor_max_cpu * 1.0001
        assert not advice.catching_up
        assert period_s(scan, advice) == pytest.approx(20, rel=0.2)


@dataclass(frozen=True)
class Ksm:
    """KSM's rule in its whole numbers, with what it keeps between scans."""

    pages_to_scan: int
    change: int = 0
    scan_s: int = 0

    def after(self, scan: Scan, controls: Controls) -> Ksm:
        scan_s = max(1, int(scan.scan_s))
        percent = max(1, int(scan.cpu_s * 100) // scan_s)
        factor = max(1, controls.advisor_target_scan_time * 100 // scan_s)
        ratio = max(1, scan_s * 100 // (self.scan_s or scan_s))
        change = (70 * self.change + 30 * ratio) // 100
        pages = self.pages_to_scan * 100 // factor * change // 100
        price = max(1, self.pages_to_scan // percent)
        pages = max(min(pages, price * controls.advisor_max_cpu), price * 10)
        return Ksm(min(pages, controls.advisor_max_pages_to_scan), change, scan_s)


def run_ksm(host: Host, controls: Controls, rounds: int) -> list[int]:
    paces = [Ksm(controls.advisor_min_pages_to_scan)]
    for _ in range(rounds):
        scan = host.scan(controls, paces[-1].pages_to_scan)
        paces.append(paces[-1].after(scan, controls))
    return [one.pages_to_scan for one in paces]


def test_where_ksms_rule_starves_ours_keeps_the_minimum() -> None:
    """Pages so dear that 10% CPU is less than advisor_min_pages_to_scan."""
    controls = Controls()
    host = Host(pages=20_000, page_cpu_s=2e-4)
    theirs = run_ksm(host, controls, 20)
    assert theirs[-1] < controls.advisor_min_pages_to_scan / 2

    scans, advices = run(host, controls, settled_at(500), 20)
    assert all(advice.pages_to_scan >= 500 for advice in advices)
    assert cpu_percent(scans[-1], advices[-1]) <= controls.advisor_max_cpu


def test_where_ksms_rule_hunts_ours_stands_still() -> None:
    """Cheap pages, few: 10% CPU is more than the target needs, and counted in whole percent."""
    controls = Controls(advisor_target_scan_time=200)
    host = Host(pages=185_000)
    theirs = run_ksm(host, controls, 60)[-20:]
    assert max(theirs) > 1.3 * min(theirs)
    ours = [one.pages_to_scan for one in run(host, controls, settled_at(5000), 60)[1]][-20:]
    assert len(set(ours)) == 1


def test_by_hand_the_pace_is_the_one_given_and_means_what_it_means_in_ksm() -> None:
    controls = Controls(advisor_mode="none", pages_to_scan=100)
    advice = start(controls)
    assert (advice.pages_to_scan, advice.rest_s, advice.catching_up) == (100, 0.0, False)
    spared = replace(Host(0).scan(controls, 100), covered_pages=100_000)
    advice = advise(advice, spared, controls)
    assert advice.pages_to_scan == 100
    assert spared.scan_s + advice.rest_s == pytest.approx(100_000 / 100 * 0.02)
    all_read = Host(100_000).scan(controls, 100)
    assert advise(advice, all_read, controls).rest_s == 0


def test_without_sleeps_the_rest_alone_keeps_the_limits() -> None:
    controls = Controls(sleep_millisecs=0, advisor_target_scan_time=1, advisor_max_cpu=10)
    scans, advices = run(Host(185_000), controls, settled_at(500), 5)
    assert [one.pages_to_scan for one in advices[1:]] == [30_000] * 5
    assert cpu_percent(scans[-1], advices[-1]) == pytest.approx(10)


def test_changed_controls_count_at_once() -> None:
    advice = Advice(20_000, 15.0, catching_up=False, settled_pages_to_scan=20_000)
    narrow = Controls(advisor_max_pages_to_scan=1000, advisor_target_scan_time=3)
    assert readvise(advice, narrow) == Advice(
        1000, 3.0, catching_up=False, settled_pages_to_scan=1000
    )
    assert readvise(advice, Controls(advisor_mode="none")).pages_to_scan == 1000
    by_hand = start(Controls(advisor_mode="none", pages_to_scan=1))
    again = readvise(by_hand, Controls())
    assert again.pages_to_scan == Controls().advisor_min_pages_to_scan
    scan = Host(4 << 20).scan(Controls(), again.pages_to_scan)
    assert advise(again, scan, Controls()).settled_pages_to_scan is not None
