"""The dashboard in a real browser: shown, driven by keys, offline, in light, dark and narrow.

With VMDEDUP_PICTURES=DIRECTORY screenshots of what was tested are left there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.browser import Page, browser_missing
from tests.harness.capabilities import root_missing
from tests.harness.kernel import becomes_true
from tests.harness.vm import Backend
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import Directories, assert_unharmed, free_port, merged, monitors, running
from tests.service.engine import ScriptedEngine
from vmdedup.report.shipped import plotly_path
from vmdedup.report.words import size

EVIL = "guest=<img src=x onerror=document.title='owned'>"
"""QEMU's own way to say that a name has a comma or an equals sign in it."""
EVIL_NAME = EVIL.removeprefix("guest=")

LINK = "a[data-key]"
SHOWN_NAMES = "[...document.querySelectorAll('#vm-table tbody a')].map((a) => a.textContent)"
CHARTS = "document.querySelectorAll('.figure .main-svg').length"
DETAIL = "!document.getElementById('detail').hidden"
TOO_WIDE = (
    "document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('*')]"
    ".filter((each) => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest("
    "'.scroll, svg')).map((each) => each.id || each.outerHTML.slice(0, 80))"
)
"""What makes the page scroll sideways."""

OTHER_ANSWERS = """
window.olderMs = 0;
const real = window.fetch;
const changed = {
  "state.json": (state) => ({ ...state, charts: null }),
  "/v1/health": (health) => ({ ...health, snapshot_age_ms: health.snapshot_age_ms + olderMs }),
};
window.fetch = async (...asked) => {
  const answer = await real(...asked);
  const change = changed[asked[0]];
  return change ? new Response(JSON.stringify(change(await answer.json()))) : answer;
};
"""
"""What a server without Plotly answers, and one that has heard nothing for `olderMs`."""


@pytest.fixture
def page(tmp_path: Path, need: Callable[[str | None], None]) -> Iterator[Page]:
    need(browser_missing())
    need(None if plotly_path() else "plotly is not installed")
    with Page(tmp_path / "profile") as browser:
        browser.resize(1200, 900)
        yield browser


def picture(page: Page, name: str, *, whole: bool = True) -> None:
    if folder := os.environ.get("VMDEDUP_PICTURES"):
        page.picture(Path(folder) / f"{name}.png", whole=whole)


def asked_for(page: Page, words: str) -> bool:
    page.value("0")  # what the browser has told is taken in with an answer
    return any(words in address for address in page.requests)


def tab_to(page: Page, selector: str, most: int = 60) -> None:
    """Press Tab until the focus is on such an element."""
    for _ in range(most):
        page.press("Tab")
        if page.value(f"document.activeElement.matches({selector!r})"):
            return
    raise AssertionError(f"{selector}: not reached by Tab")


def funnel(page: Page) -> dict[str, int]:
    rows = page.value(
        "[...document.querySelectorAll('#funnel-table tbody tr')]"
        ".map((row) => [row.cells[0].textContent, row.cells[1].textContent])"
    )
    return {name: int(pages.replace(",", "")) for name, pages in rows}


def nameless(page: Page) -> list[str]:
    """What a screen reader would have no name for."""
    nodes = page.tell("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "searchbox", "radio", "img", "image", "region", "table"}
    return [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node.get("role", {}).get("value") in roles - {"table"}
        and not node.get("name", {}).get("value")
    ]


@pytest.mark.qemu
def test_real_vms_in_a_real_browser(
    directories: Directories, start: Start, page: Page, need: Callable[[str | None], None]
) -> None:
    need(root_missing())
    vms = [start(SHARED, name="web"), start(PRIVATE, name="database"), start(SHARED, name=EVIL)]
    legacy = start(Backend("memfd", merge=False, mib=16), name="legacy")
    port = free_port()
    directories.write(f"api_tcp_port = {port}\nhistory_interval_s = 1\n")
    base = f"http://127.0.0.1:{port}/"
    with running(directories, *monitors(*vms, legacy)) as daemon:
        merged(daemon, *vms[:2])
        page.open(base)
        page.wait(f"{CHARTS} > 0")
        page.wait("document.querySelector('#time-line .main-svg') !== null")
        for drawn in ("bars", "heat-map", "durations"):
            page.wait(f"document.querySelector('#{drawn} .main-svg') !== null")

        def saved_as_reported() -> bool:
            told = size(daemon.client.report().host.saved_bytes)
            lead: str = page.value("document.getElementById('lead').textContent")
            return lead.startswith(f"{told} saved of ")

        assert becomes_true(saved_as_reported, 60)
        page.wait(f"{SHOWN_NAMES}.length === 4")
        assert "merge=off" in page.value("document.getElementById('notes').textContent")
        assert set(page.value(SHOWN_NAMES)) == {"web", "database", EVIL_NAME, "legacy"}
        assert page.value("document.images.length") == 0
        assert nameless(page) == []
        picture(page, "light")
        page.value("document.querySelector('[name=range]:checked').focus()")
        page.press("ArrowRight")
        assert becomes_true(lambda: asked_for(page, "since_s=86400"), 30)
        by_keyboard(page, daemon.client.report().vms[0].ram_bytes)
        by_address(page, base)
        dark_and_narrow(page)
        assert page.complaints == []
        assert page.requests
        assert [at for at in page.requests if not at.startswith((base, "data:"))] == []
        assert page.value("document.title").startswith("vmdedup: ")
    comes_back(page, directories, monitors(*vms, legacy))
    assert_unharmed(*vms)


def by_keyboard(page: Page, ram_bytes: int) -> None:
    """Filter, choose, look, leave, sort; no mouse."""
    page.value("document.body.focus()")
    tab_to(page, "#filter")
    for letter in "web":
        page.press(letter)
    assert page.value(SHOWN_NAMES) == ["web"]
    assert page.value("document.getElementById('filtered').textContent") == "1 of 4"
    tab_to(page, LINK)
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    page.wait(f"{DETAIL} && document.querySelector('#funnel .main-svg') !== null")
    assert page.value("document.activeElement.id") == "detail-title"
    page.wait("document.querySelector('#vm-time-line .main-svg') !== null")
    assert page.value("document.querySelectorAll('#vm-time-line .lines path').length") >= 2
    assert page.value("location.hash") == "#vm=web"
    parts = funnel(page)
    assert sum(parts.values()) == ram_bytes // 4096
    assert parts["merged"] > 200
    assert "database" in page.value("document.getElementById('partners').textContent")
    picture(page, "detail")
    page.press("Escape")
    page.wait(f"!({DETAIL})")
    assert page.value("document.activeElement.textContent") == "web"
    page.value("document.getElementById('filter').value = ''")
    page.value("document.getElementById('filter').dispatchEvent(new Event('input'))")
    page.value("document.querySelector('#vm-table th button').focus()")
    orders = []
    for _ in range(2):
        page.press("Enter")
        orders.append(page.value(SHOWN_NAMES))
    assert orders[0] == orders[1][::-1]
    assert orders[0][-2:] == ["legacy", "web"]
    assert page.value("document.querySelector('#vm-table th').ariaSort") == "descending"


def by_address(page: Page, base: str) -> None:
    """A link to one VM, whose name is no harmless one."""
    page.open("about:blank")
    page.open(f"{base}dashboard/")
    page.value(f"location.hash = '#vm=' + encodeURIComponent({EVIL_NAME!r})")
    page.value("location.reload()")
    page.wait(f"document.readyState === 'complete' && {DETAIL}")
    page.wait("document.querySelector('#funnel .main-svg') !== null")
    assert page.value("document.getElementById('detail-title').textContent") == EVIL_NAME
    assert page.value("document.images.length") == 0


def dark_and_narrow(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#funnel .xtick text')).fill"
    light = page.value(paper), page.value(ink)
    page.prefer(prefers_color_scheme="dark")
    page.wait(f"{paper} !== {light[0]!r} && {ink} !== {light[1]!r}")
    picture(page, "dark")
    page.resize(360, 740)
    page.wait("document.getElementById('bars').clientWidth < 360")
    assert becomes_true(lambda: page.value(TOO_WIDE) == [], 20), page.value(TOO_WIDE)
    page.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.wait("document.querySelectorAll('#matrix-figures td').length > 0")
    assert becomes_true(lambda: page.value(TOO_WIDE) == [], 20), page.value(TOO_WIDE)
    overlap = page.value(
        "[...document.querySelectorAll('.figure')].some((each) => each.offsetParent"
        " && each.querySelector('.main-svg')"
        " && each.querySelector('.main-svg').clientHeight > each.clientHeight + 1)"
    )
    assert not overlap
    picture(page, "phone")


def comes_back(page: Page, directories: Directories, options: list[str]) -> None:
    """The daemon is away, and the page says so; it is there again, and the page has noticed."""
    away = "document.getElementById('away')"
    # At first its API server may still answer, that the engine has ended.
    page.wait(f"!{away}.hidden && {away}.textContent.includes('does not answer')")
    picture(page, "away", whole=False)
    with running(directories, *options) as daemon:
        page.value("document.getElementById('retry').click()")
        page.wait(f"{away}.hidden")
        pid = daemon.process.pid
        page.wait(f"document.getElementById('about').textContent.includes('engine {pid},')")


@pytest.mark.process
def test_hundreds_of_vms_and_no_charts(own_tcp_engine: ScriptedEngine, page: Page) -> None:
    """The page stays usable with many VMs, and without Plotly; it rests while it is hidden."""
    engine = own_tcp_engine
    base = f"http://127.0.0.1:{engine.api.tcp_port}/dashboard/"
    page.tell("Page.addScriptToEvaluateOnNewDocument", source=OTHER_ANSWERS)
    engine.names = []
    engine.push()
    page.open(base)
    page.wait("!document.getElementById('empty').hidden")
    assert "-qmp unix:" in page.value("document.getElementById('empty').textContent")
    picture(page, "empty")

    engine.names = [f"vm{number}" for number in range(300)]
    engine.push()
    page.wait(f"{SHOWN_NAMES}.length === 300")
    assert page.value("!document.getElementById('no-charts').hidden")
    assert "vmdedup[html]" in page.value("document.getElementById('no-charts').textContent")
    assert page.value("document.querySelectorAll('#matrix-figures tbody tr').length") == 40
    assert page.value("document.querySelectorAll('#ram-figures tbody tr').length") == 300
    page.value("document.getElementById('filter').focus()")
    for letter in "vm29":
        page.press(letter)
    assert page.value(SHOWN_NAMES) == ["vm29", *(f"vm29{digit}" for digit in range(10))]
    # A row that a reader stands on stays the one while figures come in.
    page.value("document.querySelectorAll('#vm-table tbody a')[3].focus()")
    engine.names.remove("vm290")
    engine.push()
    page.wait(f"{SHOWN_NAMES}.length === 10")
    assert page.value("document.activeElement.textContent") == "vm292"

    huge_and_cold(page)

    banners = "document.getElementById('banners').textContent"
    assert page.value(banners) == ""
    page.value("olderMs = 600000")
    page.wait(f"{banners}.includes('10 min old')")
    page.value("olderMs = 0")
    engine.controls["run"] = 0
    engine.push()
    page.wait(f"{banners}.includes('run=0') && !{banners}.includes('old')")

    hide(page, True)
    # What was under way may end; left alone it asks every two seconds.
    assert becomes_true(lambda: is_quiet(page), 30)
    engine.names = ["new"]
    engine.push()
    hide(page, False)
    page.value("document.getElementById('filter').value = ''")
    page.wait(f"{SHOWN_NAMES}.join() === 'new'")
    assert page.complaints == []


def huge_and_cold(page: Page) -> None:
    """The host's figures, a VM's row and its own part tell of huge pages and of cold pages."""
    told = facts(page, "facts")
    assert told["huge pages"] == f"{299 * 7:,}"
    assert told["cold pages that come back soon"] == "149.5/s"
    row = page.value(
        "[...document.querySelectorAll('#vm-table th')].map((head, number) => [head.textContent,"
        " document.querySelector('#vm-table tbody tr').cells[number].textContent])"
    )
    assert {"huge": "7", "kept": "128", "cold": "1,024"}.items() <= dict(row).items()
    page.value("location.hash = '#vm=vm292'")
    page.wait(f"{DETAIL} && document.getElementById('detail-title').textContent === 'vm292'")
    own = {
        "huge pages": "7",
        "huge pages split": "2",
        "pages kept in huge pages": "128",
        "cold pages": "1,024",
        "given back by cold pages": "3.0 MiB, 0.5/s come back soon",
    }
    assert own.items() <= facts(page, "detail-facts").items()
    page.value("document.getElementById('close-detail').click()")
    page.wait(f"!({DETAIL})")


def facts(page: Page, name: str) -> dict[str, str]:
    rows = f"[...document.querySelectorAll('#{name} div')]"
    return dict(page.value(f"{rows}.map((row) => [...row.children].map((it) => it.textContent))"))


def is_quiet(page: Page) -> bool:
    asked = len(page.requests)
    time.sleep(2.5)
    page.value("0")
    return len(page.requests) == asked


def hide(page: Page, hidden: bool) -> None:
    """Say that the tab is hidden, or shown again."""
    value = str(hidden).lower()
    page.value(
        f"Object.defineProperty(document, 'hidden', {{ configurable: true, value: {value} }})"
    )
    page.value("document.dispatchEvent(new Event('visibilitychange'))")
