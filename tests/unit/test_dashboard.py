"""What the dashboard is made of: figures that add up, bounded, each VM told from the others."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.service.engine import CONTROLS, listing, sharing, vm_report
from vmdedup.accounting.sharing_report import whereabouts
from vmdedup.api import dashboard
from vmdedup.api.dashboard.document import MATRIX_VMS, Charts, detail_of, state_of
from vmdedup.core.rmap import KNOWN, OWN, STILL, UNSHARED
from vmdedup.guest.mapping_state import MappingState
from vmdedup.ipc.protocol import ControlValues, EngineHealth, Snapshot
from vmdedup.linux.pagemap import PRESENT, SWAPPED
from vmdedup.models import FindingListing, Matrix, VmList, VmReport
from vmdedup.report.parts import FUNNEL_NOTES, funnel_parts
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.unit

ASSETS = Path(dashboard.__file__).with_name("assets")


def snapshot(vms: list[VmReport], pages: list[list[int]] | None = None) -> Snapshot:
    report = sharing(vms)
    if pages is not None:
        matrix = Matrix(vms=[vm.name for vm in vms[: len(pages)]], pages=pages)
        report = report.model_copy(update={"matrix": matrix})
    return Snapshot(
        unix_s=1.0,
        report=report,
        vms=VmList(vms=[listing(vm.name).model_copy(update={"pid": vm.pid}) for vm in vms]),
        controls=ControlValues(values=CONTROLS),
        health=EngineHealth(engine_pid=1, started_unix_s=0, passes=1),
    )


def test_the_parts_of_each_bar_are_all_of_its_ram() -> None:
    vms = [vm_report("web"), vm_report("db", pid=2, merged=100)]
    state = state_of(snapshot(vms), "1", None)
    assert [sum(row.parts_bytes) for row in state.vms] == [vm.ram_bytes for vm in vms]
    assert all(len(row.parts_bytes) == len(state.parts) for row in state.vms)
    assert state.saved_bytes == sum(row.saved_bytes for row in state.vms)
    assert state.charts is None


def test_huge_and_cold_pages_are_told_of_the_host_and_of_each_vm() -> None:
    known = snapshot([vm_report("web"), vm_report("db", pid=2)])
    state = state_of(known, "1", None)
    told = {fact.name: fact.value for fact in state.facts}
    assert {name: told[name] for name in told if "huge" in name or "cold" in name} == {
        "huge pages": "14",
        "huge pages split": "4",
        "pages kept in huge pages": "256",
        "given back by cold pages": "6.0 MiB",
        "cold pages that come back soon": "1.0/s",
    }
    rows = [(row.huge_pages, row.pages_kept_in_huge, row.cold_pages) for row in state.vms]
    assert rows == [(7, 128, 1024)] * 2
    host: dict[str, float | None] = {
        "huge_pages": 0,
        "huge_pages_split": 0,
        "pages_kept_in_huge": None,
        "cold_pages": 0,
    }
    host |= {"cold_bytes_saved": 0, "cold_refaults_per_s": 0.0}
    without = known.report.model_copy(update={"host": known.report.host.model_copy(update=host)})
    plain = state_of(known.model_copy(update={"report": without}), "1", None).facts
    assert not [fact for fact in plain if "huge" in fact.name or "cold" in fact.name]


def test_vms_of_one_name_are_told_apart() -> None:
    vms = [vm_report("web (pid 8)", pid=6), vm_report("web", pid=7), vm_report("web", pid=8)]
    known = snapshot(vms, [[9, 3, 1], [3, 5, 2], [1, 2, 4]])
    keys = [row.key for row in state_of(known, "1", None).vms]
    assert keys == ["web (pid 8)", "web (pid 7)", "web (pid 8)'"]
    found = [detail_of(known, key) for key in keys]
    assert [each.report.pid for each in found if each] == [6, 7, 8]
    last = detail_of(known, "8")
    assert last is not None
    assert (last.key, last.report.pid) == (keys[2], 8)
    assert [(each.key, each.pages) for each in last.partners] == [(keys[1], 2), (keys[0], 1)]
    by_name = detail_of(known, "web")
    assert by_name is not None
    assert by_name.report.pid == 7
    assert detail_of(known, "nobody") is None


def test_the_funnel_has_every_page_once() -> None:
    vm = vm_report("web").model_copy(
        update={
            "unique_pages": 900,
            "volatile_pages": 30,
            "swapped_pages": 4,
            "absent_pages": 60_000,
            "deferred_pages": 700,
        }
    )
    parts = funnel_parts(vm)
    assert sum(parts.values()) * PAGE_BYTES == vm.ram_bytes
    assert list(parts) == [name for name in FUNNEL_NOTES if name != "other domain"]
    assert (parts["deferred"], parts["unique"], parts["merged"]) == (700, 900, 3000)
    detail = detail_of(snapshot([vm]), "web")
    assert detail is not None
    assert {step.name: step.pages for step in detail.funnel} == parts


def test_a_page_that_was_unique_and_has_changed_counts_once() -> None:
    unique, changed = KNOWN | STILL | UNSHARED, KNOWN
    flags = np.array([unique, changed, changed, 0, changed, unique], dtype=np.uint8)
    state = MappingState(
        slot=np.array([OWN, OWN, OWN, OWN, OWN, 4], dtype=np.int32),
        store=np.zeros(6, dtype=np.uint8),
        categories=np.array([PRESENT, PRESENT, PRESENT, 0, SWAPPED, PRESENT], dtype=np.uint8),
        stores=(),
        process_vmas=1,
        ram_vmas=1,
    )
    assert whereabouts(state, flags) == {
        "absent_pages": 1,
        "swapped_pages": 1,
        "unique_pages": 1,
        "volatile_pages": 2,
    }
    unscanned = whereabouts(state, None)
    assert unscanned["unique_pages"] is None
    assert unscanned["absent_pages"] == 1


def test_a_detail_has_the_vms_own_listing() -> None:
    known = snapshot([vm_report("web", pid=7), vm_report("web", pid=8, status="refused")])
    finding = FindingListing(key="vfio", verdict="refuse", reason="device keeps the old page")
    second = known.vms.vms[1].model_copy(update={"findings": [finding], "qemu_version": "10.0.0"})
    known = known.model_copy(update={"vms": VmList(vms=[known.vms.vms[0], second])})
    detail = detail_of(known, "web (pid 8)")
    assert detail is not None
    assert (detail.findings, detail.qemu_version) == ([finding], "10.0.0")


def test_the_heat_map_is_that_of_those_who_share_most() -> None:
    number = 3 * MATRIX_VMS
    pages = [[min(i, j) for j in range(number)] for i in range(number)]
    known = snapshot([vm_report(f"vm{at}", pid=at + 1) for at in range(number)], pages)
    state = state_of(known, "1", Charts(script="plotly.min.js", sheet_ids=[]))
    first = number - MATRIX_VMS
    assert state.matrix.vms == [f"vm{at}" for at in range(first, number)]
    assert state.matrix.pages[0] == [first] * MATRIX_VMS
    assert state.matrix_of_vms == number
    detail = detail_of(known, "vm0")
    assert detail is not None
    assert detail.partners == []


class Tags(HTMLParser):
    """What a page refers to, and what its policy would refuse."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.refused: list[str] = []
        self.script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.script = tag in ("script", "style")
        for name, value in attrs:
            if name in ("src", "href"):
                self.refers.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "style" or name.startswith("on"):
                self.refused.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self.script and data.strip():
            self.refused.append(data)
        self.script = False


def test_the_page_needs_nothing_that_its_policy_refuses() -> None:
    page = Tags((ASSETS / "dashboard.html").read_text())
    assert page.refused == []
    assert len(page.ids) == len(set(page.ids))
    scripts = "".join(path.read_text() for path in ASSETS.glob("*.js"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", scripts
    )
    assert set(re.findall(r'byId\("([\w-]+)"\)', scripts)) <= set(page.ids)
    own = {path.name for path in ASSETS.iterdir()} | {"page.css", "figures.js"}
    names = {at for at in page.refers if not at.startswith(("#", "/"))}
    assert names <= own
    assert set(re.findall(r'from "\./([\w.]+)"', scripts)) <= own
