"""The Debian package: `tox -e deb`, or `python -m tests.release.debian [SUITE]... [--out DIR]`.

Debian's own Python packages are too old for vmdedup (docs/install.md), so each suite gets a
package with a Python environment of its own in /usr/lib/vmdedup: wheels from the package index
for the suite's Python, which stays Debian's. Nothing is fetched when it is installed.

Owns the file tree that is packed; packing it, and the order of the maintainer scripts, are
debhelper's (configs/debian). Works in a temporary folder. Needs the package index, debhelper
and dpkg-dev; lintian looks at the result where it is installed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from tests.release.man import write_man_pages
from tests.release.package import ROOT, build_from, clean_environment, copy_source, project

_CONFIGS = ROOT / "configs"
_PRIVATE = Path("usr/lib/vmdedup")
_INSTALLED_ELSEWHERE = ("debian", "vmdedup.service", "sysctl.d", "sysusers.d", "tmpfiles.d")
_PLATFORMS = ("linux_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64")
_COMMAND = "from vmdedup.cli.main import main; main()"
_COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/vmdedup",
    "zsh": "usr/share/zsh/vendor-completions/_vmdedup",
    "fish": "usr/share/fish/vendor_completions.d/vmdedup.fish",
}
_ENVIRONMENT = """\
home = /usr/bin
include-system-site-packages = true
"""
"""With Debian's python3-libvirt, which matches its library."""
_LINK = "gcc -shared -s"
"""Links our own library without symbols, and without a path of the Python that builds it."""
_LAUNCHER = """\
#!/usr/lib/vmdedup/bin/python3 -I
import sys

from vmdedup.cli.main import main

sys.exit(main())
"""
_IN_THE_UNIT = {
    "/usr/local/bin/": "/usr/bin/",
    "Documentation=man:qemu-system-x86_64(1)": "Documentation=man:vmdedup(1) man:vmdedup.toml(5)",
}
_CHANGELOG = """\
vmdedup ({version}) {suite}; urgency=medium

  * /usr/share/doc/vmdedup/changelog.gz has what changed.

 -- The vmdedup authors <vmdedup@example.org>  {date}
"""


@dataclass(frozen=True)
class Suite:
    """A release of Debian, and the Python that it has."""

    name: str
    number: int
    python: str
    next_python: str

    @property
    def version(self) -> str:
        """The package's version: higher for a later suite, for who upgrades."""
        return f"{project()['version']}-1~deb{self.number}"

    @property
    def depends(self) -> str:
        """On exactly this Python: the wheels are for no other."""
        return f"python3 (>= {self.python}), python3 (<< {self.next_python})"


_SUITES = (Suite("bookworm", 12, "3.11", "3.12"), Suite("trixie", 13, "3.13", "3.14"))
SUITES = {suite.name: suite for suite in _SUITES}


class PackageError(Exception):
    """The package cannot be built, or is not as it must be."""


def builder_missing() -> str | None:
    """Which program is not here; None when all are."""
    for program in ("dh", "dpkg-buildpackage"):
        if shutil.which(program) is None:
            return f"no {program} on this machine: apt-get install debhelper"
    return None


def build_package(suite: Suite, out: Path) -> Path:
    """The suite's package, in the folder `out`. Raises PackageError."""
    with tempfile.TemporaryDirectory(prefix="vmdedup-deb-") as name:
        work = Path(name)
        source = copy_source(work / "source")
        build_from(source, work / "wheel", "--wheel", isolated=False, LDSHARED=_LINK)
        (wheel,) = (work / "wheel").glob("*.whl")
        tree = work / "package"
        _fill(tree / "root", wheel, suite, work)
        write_man_pages(tree / "man")
        add_packaging(tree / "debian", suite)
        _run("dpkg-buildpackage", "--build=binary", "--no-sign", cwd=tree)
        (built,) = work.glob("*.deb")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(built, out))


def _fill(root: Path, wheel: Path, suite: Suite, work: Path) -> None:
    """All files of the package but those that debhelper places."""
    site = root / _PRIVATE / f"lib/python{suite.python}/site-packages"
    _pip("install", f"{wheel}[top]", "--target", str(site), "--no-compile", suite=suite)
    _pip("download", _plotly(), "--no-deps", "--dest", str(work), suite=suite)
    _add_charts(next(work.glob("plotly-*.whl")), site)
    shutil.rmtree(site / "bin")
    for tests in [*site.rglob("tests"), *site.rglob("*.a")]:
        _remove(tests)
    shutil.move(site / "share", root / "usr/share")
    configs = root / "usr/share/vmdedup"
    _write(root / "etc/vmdedup.toml", (configs / "default.toml").read_text())
    sysctl = "sysctl.d/60-vmdedup.conf"
    _write(root / "usr/lib" / sysctl, _without_advice((configs / sysctl).read_text()))
    for name in _INSTALLED_ELSEWHERE:
        _remove(configs / name)
    programs = root / _PRIVATE / "bin"
    _write(root / _PRIVATE / "pyvenv.cfg", _ENVIRONMENT)
    _write(programs / "vmdedup", _LAUNCHER).chmod(0o755)
    (programs / "python3").symlink_to(f"../../../bin/python{suite.python}")
    (root / "usr/bin").mkdir()
    (root / "usr/bin/vmdedup").symlink_to("../lib/vmdedup/bin/vmdedup")
    for shell, path in _COMPLETIONS.items():
        _write(root / path, _run(sys.executable, "-c", _COMMAND, complete=f"source_{shell}"))


def _add_charts(wheel: Path, site: Path) -> None:
    """Plotly's JavaScript alone: nothing else of it is used, and it has 1,500 files."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == "plotly/package_data/plotly.min.js" or re.search(r"\.dist-info/", name):
                archive.extract(name, site)


def _plotly() -> str:
    """The requirement of the extra `html`."""
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    return str(extras["html"][0])


def add_packaging(debian: Path, suite: Suite) -> None:
    """configs/debian, and what debhelper takes from other files of configs/."""
    shutil.copytree(_CONFIGS / "debian", debian)
    text = _CHANGELOG.format(version=suite.version, suite=suite.name, date=formatdate())
    _write(debian / "changelog", text)
    unit = _without_advice((_CONFIGS / "vmdedup.service").read_text())
    for shipped, packaged in _IN_THE_UNIT.items():
        unit = unit.replace(shipped, packaged)
    _write(debian / "vmdedup.service", unit)
    for kind in ("tmpfiles", "sysusers"):
        text = (_CONFIGS / f"{kind}.d/vmdedup.conf").read_text()
        _write(debian / f"vmdedup.{kind}", _without_advice(text))
    control = (debian / "control").read_text()
    _write(debian / "control", control.replace("${vmdedup:Python}", suite.depends))


def _without_advice(text: str) -> str:
    """Without the first comment's lines that say where to copy the file."""
    return re.sub(r"\A(# .*Copy to .*\n#\n|# .*copy to .*\n(?:# then.*\n)?)", "", text)


def _pip(action: str, *words: str, suite: Suite) -> None:
    command = [sys.executable, "-m", "pip", action, *words, "--quiet", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--implementation", "cp"]
    command += ["--python-version", suite.python]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    _run(*command)


def _run(*command: str, cwd: Path | None = None, complete: str | None = None) -> str:
    """What the command printed. Raises PackageError."""
    added = {} if complete is None else {"_VMDEDUP_COMPLETE": complete, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=clean_environment(**added),
    )
    if done.returncode != 0:
        raise PackageError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def look(package: Path) -> None:
    """Have lintian look at a package. Raises PackageError where it has something to say."""
    if shutil.which("lintian") is None:
        print("deb: lintian is not installed here: not looked at", flush=True)
        return
    _run("lintian", "--fail-on", "error,warning", "--allow-root", str(package))


def main() -> None:
    """The packages of the suites that are named, or of all."""
    parser = argparse.ArgumentParser(prog="python -m tests.release.debian")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=" or ".join(SUITES))
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR")
    given = parser.parse_args()
    if missing := builder_missing():
        raise PackageError(missing)
    for name in given.suites or SUITES:
        if name not in SUITES:
            raise PackageError(f"no suite {name!r}: {' or '.join(SUITES)}")
        package = build_package(SUITES[name], given.out)
        look(package)
        print(f"deb: {package} ({package.stat().st_size / (1 << 20):.0f} MiB)", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (PackageError, RuntimeError) as error:
        sys.exit(f"deb: failed: {error}")
