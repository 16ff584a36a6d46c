"""Wheel and sdist: built from what belongs in them, and looked into.

Owns what of the repository a build needs. Builds from a copy: setuptools leaves a
`build` folder behind, and takes modules that are long gone out of an old one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SOURCE = ("pyproject.toml", "README.md", "LICENSE", "vmdedup", "configs", "docs")


@dataclass(frozen=True)
class Built:
    """An sdist, the wheel made from it, and the wheel made from the tree itself."""

    source: Path
    sdist: Path
    from_sdist: Path
    wheel: Path


def project() -> dict[str, object]:
    """`[project]` of pyproject.toml."""
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def copy_source(to: Path) -> Path:
    """The repository's part that is built, as it is now, in the new folder `to`."""
    to.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.so")
    for name in _SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)
    return to


def build(folder: Path, *, isolated: bool) -> Built:
    """Build in `folder`. Isolated: with build tools of its own, from the package index."""
    source = copy_source(folder / "source")
    build_from(source, folder / "dist", isolated=isolated)
    build_from(source, folder / "direct", "--wheel", isolated=isolated)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (from_sdist,) = (folder / "dist").glob("*.whl")
    (wheel,) = (folder / "direct").glob("*.whl")
    return Built(source, sdist, from_sdist, wheel)


def build_from(source: Path, out: Path, *options: str, isolated: bool, **environment: str) -> None:
    """Build what `options` say, or sdist and wheel, with this added to the environment.

    Raises RuntimeError.
    """
    how = [] if isolated else ["--no-isolation"]
    command = [sys.executable, "-m", "build", "--outdir", str(out), *how, *options, str(source)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=clean_environment(**environment),
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}")
    if "Deprecat" in done.stdout or "SetuptoolsWarning" in done.stdout:
        raise RuntimeError(f"the build warns:\n{done.stdout}")


def clean_environment(**added: str) -> dict[str, str]:
    """Ours without settings and without this checkout on Python's path."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if "VMDEDUP" not in name and name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    return kept | added


def wheel_files(wheel: Path) -> dict[str, str]:
    """Name and digest of each file in a wheel, but for the list that has the digests itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith(".dist-info/RECORD")
        }


def sdist_names(sdist: Path) -> set[str]:
    """The files of an sdist, without its top folder."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def tree(source: Path, folder: str) -> set[str]:
    """All files below a folder of the source."""
    return {
        str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()
    }


def _compiled(names: set[str]) -> set[str]:
    """What is installed of these: of each C source the module that it becomes."""
    sources = {name for name in names if name.endswith(".c")}
    return names - sources | {f"{name.removesuffix('.c')}.abi3.so" for name in sources}


def problems(built: Built) -> list[str]:
    """What is wrong with the content of wheel and sdist, a line each."""
    found = []
    files, again = wheel_files(built.wheel), wheel_files(built.from_sdist)
    if files != again:
        different = sorted(name for name, _ in files.items() ^ again.items())
        found.append(f"a wheel from the sdist differs from one from the tree: {different}")
    inside = {name for name in files if name.startswith("vmdedup/")}
    if inside != (wanted := _compiled(tree(built.source, "vmdedup"))):
        found.append(
            f"wheel: lacks {sorted(wanted - inside)}, has besides {sorted(inside - wanted)}"
        )
    beside = {name.split("/")[0] for name in files} - {"vmdedup"}
    if not all(name.endswith((".dist-info", ".data")) for name in beside):
        found.append(f"wheel: installs {sorted(beside)} beside the package")
    share = {name.partition("/data/share/")[2] for name in files if "/data/share/" in name}
    wanted = {f"vmdedup/{name.removeprefix('configs/')}" for name in tree(built.source, "configs")}
    wanted |= {f"doc/vmdedup/{name.removeprefix('docs/')}" for name in tree(built.source, "docs")}
    if share != wanted:
        found.append(
            f"wheel: share/ lacks {sorted(wanted - share)}, has besides {sorted(share - wanted)}"
        )
    wanted = {"LICENSE", "README.md", "pyproject.toml"}
    for folder in ("vmdedup", "configs", "docs"):
        wanted |= tree(built.source, folder)
    if missing := wanted - sdist_names(built.sdist):
        found.append(f"sdist: lacks {sorted(missing)}")
    return found
