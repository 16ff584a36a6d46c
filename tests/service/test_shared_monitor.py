"""The daemon with `monitor = "shared"`: a tool that needs the only monitor never waits too long."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.monitor import qmp
from tests.harness.tool import Tool
from tests.service.conftest import PRIVATE, SHARED, Start
from tests.service.daemon import (
    Directories,
    assert_unharmed,
    merged,
    monitors,
    running,
    store_pages,
)

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]


def test_a_tool_works_beside_the_daemon(directories: Directories, start: Start) -> None:
    vms = [start(SHARED), start(PRIVATE), start(SHARED)]
    directories.write('monitor = "shared"\n')
    with ExitStack() as exits:
        tools = [exits.enter_context(Tool(vm.qmp_path)) for vm in vms]
        daemon = exits.enter_context(running(directories, *monitors(*vms)))
        merged(daemon, *vms)
        assert [row.monitor for row in daemon.client.vms().vms] == ["shared"] * 3
        assert directories.verb("vms").stdout.count("shared") == 3
        # A hazard that comes while nobody is connected is found.
        by_file = {"capability": "x-ignore-shared", "state": True}
        qmp(vms[0].test_qmp_path, "migrate-set-capabilities", capabilities=[by_file])
        assert becomes_true(lambda: store_pages(vms[0]) == 0, 30)
        assert daemon.row_of(vms[1])[0]
        directories.verb("unmerge")
        assert sum(map(store_pages, vms)) == 0
        assert_unharmed(*vms)
    for tool in tools:
        assert tool.failures == []
        assert tool.answered > 0
