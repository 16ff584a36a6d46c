"""Builds, installs and shows a release: what a user gets, before he gets it.

`tox -e release`. As root or with sudo rights to trace VMs, on a machine that
images/setup.sh has prepared: the last step boots VMs. Ends with exit code 1 at
the first thing that is not as it must be. Leaves nothing behind; `--keep DIR`
keeps wheel and sdist there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.release.package import ROOT, Built, build, clean_environment, problems, project

_VERBS = (
    "from typer.main import get_command; from vmdedup.cli.main import app;"
    "print(*get_command(app).commands)"
)
_PLACE = "import vmdedup; print(vmdedup.__file__)"


class ReleaseError(Exception):
    """The release is not as it must be."""


def main() -> None:
    """All steps, the quick ones first."""
    parser = argparse.ArgumentParser(prog="python -m tests.release")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put wheel and sdist there")
    parser.add_argument("--no-demo", action="store_true", help="boot no VMs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmdedup-release-") as name:
        folder = Path(name)
        say("the changelog names this version")
        require_changelog()
        say("wheel and sdist, built in environments of their own")
        built = build(folder, isolated=True)
        require(not (found := problems(built)), "; ".join(found))
        say("twine reads their metadata")
        run(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.from_sdist)
        say("installed into an empty environment")
        command = install(folder / "venv", built.from_sdist)
        require_teaches(command)
        say("installed by pipx")
        require_pipx(folder / "pipx", built.from_sdist)
        if not given.no_demo:
            say("the demo, with what was installed")
            run("bash", ROOT / "images/build.sh", "tiny")
            run("bash", ROOT / "images/build.sh", "bare")
            run(command.with_name("python"), ROOT / "images/demo.py", command, shown=True)
        if given.keep is not None:
            keep(built, given.keep)
    say(f"vmdedup {project()['version']} can be released")


def require_changelog() -> None:
    """The newest released version of the changelog is the project's."""
    version = str(project()["version"])
    text = (ROOT / "docs/CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", text, re.M)
    require(
        newest is not None and newest[1] == version,
        f"docs/CHANGELOG.md: the newest version is not {version}, or has no date",
    )


def install(folder: Path, wheel: Path) -> Path:
    """The wheel with all it requires in a new environment; its `vmdedup`."""
    venv.create(folder, with_pip=True)
    command = folder / "bin/vmdedup"
    run(folder / "bin/pip", "install", "--quiet", wheel)
    run(folder / "bin/pip", "check")
    place = Path(run(folder / "bin/python", "-I", "-c", _PLACE).strip())
    require(place.is_relative_to(folder), f"vmdedup is imported from {place}")
    return command


def require_teaches(command: Path) -> None:
    """Version, help, each verb's help, and the completion of three shells."""
    version = run(command, "--version").strip()
    require(version == f"vmdedup {project()['version']}", f"--version says {version!r}")
    verbs = run(command.with_name("python"), "-I", "-c", _VERBS).split()
    summary = run(command, "--help")
    for verb in verbs:
        require(verb in summary, f"--help does not name {verb}")
        require("Examples:" in run(command, verb, "--help"), f"{verb} --help has no example")
    for shell in ("bash", "zsh", "fish"):
        script = run(command, environment={"_VMDEDUP_COMPLETE": f"source_{shell}"})
        require("vmdedup" in script, f"no completion for {shell}")


def require_pipx(folder: Path, wheel: Path) -> None:
    """`pipx install` of the wheel into directories of its own, and away again."""
    places = {
        "PIPX_HOME": str(folder / "home"),
        "PIPX_BIN_DIR": str(folder / "bin"),
        "PIPX_MAN_DIR": str(folder / "man"),
    }
    pipx = (sys.executable, "-m", "pipx")
    run(*pipx, "install", "--python", sys.executable, wheel, environment=places)
    version = run(folder / "bin/vmdedup", "--version").strip()
    require(version == f"vmdedup {project()['version']}", f"pipx's vmdedup says {version!r}")
    run(*pipx, "uninstall", "vmdedup", environment=places)
    require(not (folder / "bin/vmdedup").exists(), "pipx uninstall left vmdedup")


def keep(built: Built, folder: Path) -> None:
    """Wheel and sdist, where they were asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (built.sdist, built.from_sdist):
        shutil.copy2(file, folder)
        print(folder / file.name, flush=True)


def run(
    *words: str | os.PathLike[str],
    shown: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run a command away from the checkout; what it printed. `shown`: to the terminal."""
    command = [str(word) for word in words]
    done = subprocess.run(
        command,
        stdout=None if shown else subprocess.PIPE,
        stderr=None if shown else subprocess.STDOUT,
        text=True,
        check=False,
        cwd="/",
        env=clean_environment(**environment),
    )
    require(
        done.returncode == 0,
        f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout or ''}",
    )
    return done.stdout or ""


def require(holds: bool, otherwise: str) -> None:
    """Raises ReleaseError."""
    if not holds:
        raise ReleaseError(otherwise)


def say(text: str) -> None:
    """What comes next."""
    print(f"release: {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ReleaseError, RuntimeError) as error:
        sys.exit(f"release: failed: {error}")
    except KeyboardInterrupt:
        sys.exit("release: interrupted")
