"""What the Debian package is packed by: files of configs/ in their places, scripts that parse.

The package itself is built by `tox -e deb` and lives through `tests/hosts/test_debian_package.py`.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from tests.release.debian import SUITES, Suite, add_packaging
from tests.release.package import ROOT, project

pytestmark = pytest.mark.unit

SCRIPTS = ("postinst", "prerm", "postrm")


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> Suite:
    return SUITES[request.param]


@pytest.fixture
def debian(suite: Suite, tmp_path: Path) -> Path:
    """The folder that debhelper works by."""
    add_packaging(tmp_path / "debian", suite)
    return tmp_path / "debian"


def test_the_unit_is_the_shipped_one_for_the_package_s_command(debian: Path) -> None:
    unit = (debian / "vmdedup.service").read_text()
    shipped = (ROOT / "configs/vmdedup.service").read_text()
    assert unit.startswith("[Unit]\n")
    assert "Documentation=man:vmdedup(1)" in unit
    places = [text.replace("/usr/local/bin/", "/usr/bin/") for text in (shipped, unit)]
    own, packaged = (
        [line for line in text.splitlines() if "Documentation" not in line] for text in places
    )
    assert own[2:] == packaged
    assert re.findall(r"^Exec\w+=(/usr/bin/vmdedup \w+)", unit, re.M) == [
        "/usr/bin/vmdedup run",
        "/usr/bin/vmdedup resume",
    ]


@pytest.mark.parametrize("kind", ["tmpfiles", "sysusers"])
def test_a_file_in_its_place_does_not_say_where_to_copy_it(debian: Path, kind: str) -> None:
    text = (debian / f"vmdedup.{kind}").read_text()
    assert "opy to" not in text
    assert (ROOT / f"configs/{kind}.d/vmdedup.conf").read_text().endswith(text)


def test_it_depends_on_the_python_of_its_suite(debian: Path, suite: Suite) -> None:
    control = (debian / "control").read_text()
    assert f"python3 (>= {suite.python}), python3 (<< {suite.next_python})" in control
    assert "${vmdedup" not in control


def test_the_version_is_the_projects_and_grows_with_the_suite(debian: Path, suite: Suite) -> None:
    newest = (debian / "changelog").read_text().partition("\n")[0]
    assert newest == f"vmdedup ({suite.version}) {suite.name}; urgency=medium"
    assert suite.version.startswith(f"{project()['version']}-")
    versions = [each.version for each in SUITES.values()]
    for older, newer in itertools.pairwise(versions):
        subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_maintainer_scripts_parse_and_end_at_an_error(debian: Path, script: str) -> None:
    text = (debian / f"vmdedup.{script}").read_text()
    assert text.startswith("#!/bin/sh\nset -e\n")
    assert text.count("#DEBHELPER#") == 1
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
