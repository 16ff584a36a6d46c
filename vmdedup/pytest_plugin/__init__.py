"""pytest plugin: merge the VMs of a test run, get the typed report, and check rules for it.

    # conftest.py
    pytest_plugins = ["vmdedup.pytest_plugin"]          # or: pytest -p vmdedup.pytest_plugin

    @pytest.fixture
    def vmdedup_vms(my_vms):
        return [vm.qmp_path for vm in my_vms]           # QMP sockets, or globs

    @pytest.mark.vmdedup(min_saved="30%", max_stops=0)
    def test_sharing(vmdedup):
        assert vmdedup.converged

Owns the options, and which fixtures and hooks pytest sees. Opt-in: there is no entry point, so
that pytest loads nothing of vmdedup unless a suite asks for it.
"""

from __future__ import annotations

import pytest

from vmdedup.pytest_plugin.fixtures import (
    SCOPES,
    vmdedup,
    vmdedup_broken,
    vmdedup_merged,
    vmdedup_vms,
)
from vmdedup.pytest_plugin.marker import (
    MARKER,
    pytest_itemcollected,
    pytest_runtest_call,
    pytest_runtest_setup,
)
from vmdedup.pytest_plugin.summary import pytest_terminal_summary

__all__ = [
    "pytest_addoption",
    "pytest_configure",
    "pytest_itemcollected",
    "pytest_runtest_call",
    "pytest_runtest_setup",
    "pytest_terminal_summary",
    "vmdedup",
    "vmdedup_broken",
    "vmdedup_merged",
    "vmdedup_vms",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, and the ini options."""
    group = parser.getgroup("vmdedup", "merging the memory of VMs")
    group.addoption(
        "--vmdedup-qmp",
        action="append",
        metavar="PATH",
        help="QMP socket (or glob) of a VM for the fixture vmdedup; repeatable",
    )
    group.addoption(
        "--vmdedup-artefacts",
        metavar="DIR",
        help="folder for each test's report, as JSON and as an HTML page",
    )
    parser.addini("vmdedup_qmp", "QMP sockets or globs for the fixture vmdedup", type="args")
    parser.addini("vmdedup_artefacts", "as --vmdedup-artefacts, below the root directory")
    parser.addini("vmdedup_scope", f"scope of the fixture vmdedup: {', '.join(SCOPES)}")
    parser.addini("vmdedup_timeout", "seconds that merging may take", default="120")
    parser.addini(
        "vmdedup_strict",
        "whether a VM that is not merged fails the test",
        type="bool",
        default=True,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)
