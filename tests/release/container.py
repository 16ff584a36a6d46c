"""The container image: `tox -e container`, or `python -m tests.release.container [--out DIR]`.

Builds the shipped configs/container/Containerfile with podman, from this checkout, and saves the
image as an archive for `podman load`. No registry is asked: the base is a minimal Debian that
images/build.sh makes from the mirrors of this machine, under the name that the Containerfile has
for it. pip's settings are mounted for the build alone, and are not in the image.

Works in a temporary folder with a podman storage of its own. Needs root, podman, mmdebstrap, a
Debian mirror and a package index.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.harness.host import build_missing
from tests.harness.images import REPOSITORY
from tests.harness.pages import page
from tests.harness.podman import Podman, podman_missing
from tests.release.package import ROOT, copy_source, project

IMAGE = f"vmdedup:{project()['version']}"
_CONTAINERFILE = ROOT / "configs/container/Containerfile"
_BASE = REPOSITORY / ".cache/images/base/root.tar"
_BUILD_S = 1800.0
_PIP_SETTINGS = ("cert", "index-url", "proxy", "trusted-host")
"""Those that may be needed to reach the package index; folders of this machine are left out."""


def builder_missing() -> str | None:
    """Why the image cannot be built on this machine; None where it can. Makes the base."""
    return podman_missing() or build_missing(guest="base")


def build_image(archive: Path) -> None:
    """Save the image to a new file. Ask `builder_missing` before. Raises AssertionError."""
    (base,) = set(re.findall(r"^FROM (\S+)", _CONTAINERFILE.read_text(), re.M))
    with tempfile.TemporaryDirectory(prefix="vmdedup-image-") as name, Podman() as podman:
        folder = Path(name)
        source = copy_source(folder / "source")
        podman.run("import", _BASE, base)
        command = ["build", "--pull-never", "--network=host", "--isolation=chroot"]
        command += [f"--volume={each}" for each in _pip_volumes(folder)]
        command += [f"--file={_CONTAINERFILE}", f"--tag={IMAGE}"]
        podman.run(*command, source, within_s=_BUILD_S)
        podman.run("save", "--output", archive, IMAGE)


def documented_run() -> list[str]:
    """The words of the `podman run` in docs/install.md."""
    blocks = page("docs/install.md").blocks
    (text,) = [block.text for block in blocks if block.text.startswith("podman run")]
    return shlex.split(text.replace("\\\n", " "), comments=True)


def _pip_volumes(folder: Path) -> list[str]:
    """What pip is to find while the image is built: its settings, and the certificate file."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", said, re.M))
    settings = folder / "pip.conf"
    kept = [f"{name} = {found[name]}" for name in _PIP_SETTINGS if name in found]
    settings.write_text("\n".join(["[global]", *kept, ""]))
    files = [(str(settings), "/etc/pip.conf")]
    files += [(found["cert"], found["cert"])] if "cert" in found else []
    return [f"{source}:{target}:ro" for source, target in files]


def main() -> None:
    """The image as a compressed archive in a folder."""
    parser = argparse.ArgumentParser(prog="python -m tests.release.container")
    parser.add_argument("--out", type=Path, default=Path("dist"), metavar="DIR")
    given = parser.parse_args()
    if missing := builder_missing():
        sys.exit(f"container: failed: {missing}")
    given.out.mkdir(parents=True, exist_ok=True)
    packed = given.out / f"vmdedup-{project()['version']}-container.tar.gz"
    with tempfile.TemporaryDirectory(prefix="vmdedup-image-") as name:
        archive = Path(name) / "image.tar"
        build_image(archive)
        with archive.open("rb") as whole, gzip.open(packed, "wb", compresslevel=6) as small:
            shutil.copyfileobj(whole, small)
        sizes = f"{archive.stat().st_size >> 20} MiB, {packed.stat().st_size >> 20} MiB packed"
    print(f"container: {packed}: {IMAGE}, {sizes}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"container: failed: {error}")
