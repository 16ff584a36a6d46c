"""What is installed: wheel and sdist, from this tree, into an environment of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.release.__main__ import require_changelog
from tests.release.package import ROOT, Built, build, clean_environment, problems, project

pytestmark = pytest.mark.command


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("package"), isolated=False)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    into = ["--python", str(folder / "bin/python")]
    command = [sys.executable, "-m", "pip", *into, "install", "--no-deps", "--no-index"]
    subprocess.run([*command, "--quiet", str(built.from_sdist)], check=True)
    return folder


def run(installed: Path, program: str, *words: str) -> str:
    """What the program prints; what it requires comes from the environment of the tests."""
    done = subprocess.run(
        [installed / "bin" / program, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=installed,
        env=clean_environment(PYTHONPATH=sysconfig.get_path("platlib")),
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_wheel_and_sdist_have_all_of_it_and_nothing_else(built: Built) -> None:
    assert problems(built) == []


def test_a_module_that_is_left_out_is_noticed(built: Built, tmp_path: Path) -> None:
    """The check itself: a wheel without its typing marker does not pass."""
    poorer = tmp_path / built.wheel.name
    with zipfile.ZipFile(built.wheel) as whole, zipfile.ZipFile(poorer, "w") as less:
        for name in whole.namelist():
            if name != "vmdedup/py.typed":
                less.writestr(name, whole.read(name))
    found = problems(Built(built.source, built.sdist, poorer, poorer))
    assert found == ["wheel: lacks ['vmdedup/py.typed'], has besides []"]


def test_an_installed_wheel_is_the_command(installed: Path) -> None:
    where = run(installed, "python", "-c", "import vmdedup; print(vmdedup.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert run(installed, "vmdedup", "--version") == f"vmdedup {project()['version']}\n"
    assert "Where to begin:" in run(installed, "vmdedup", "--help")
    assert '"SharingReport"' in run(installed, "vmdedup", "schema", "report")
    share = installed / "share"
    for name in ("vmdedup/vmdedup.service", "vmdedup/container/Containerfile"):
        assert (share / name).is_file()
    assert (share / "doc/vmdedup/CHANGELOG.md").is_file()


def test_there_is_one_version_and_the_changelog_has_it() -> None:
    assert version("vmdedup") == project()["version"]
    require_changelog()
    named = {
        found
        for folder in ("docs", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".yaml")
        for found in re.findall(r"\bvmdedup[-:](\d+\.\d+\.\d+)", path.read_text())
    }
    assert named == {project()["version"]}
