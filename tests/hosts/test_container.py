"""The container image, built and run by podman as docs/install.md says, on real VMs.

Each scenario (`container.py`) has a world of its own, where the container finds the VMs by itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.skips import require
from tests.hosts.container import SCENARIOS
from tests.platforms.world import run_inside, world_missing
from tests.release.container import build_image, builder_missing

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, built once."""
    require(world_missing() or builder_missing())
    path = tmp_path_factory.mktemp("image") / "image.tar"
    build_image(path)
    return path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_documented_container(archive: Path, scenario: str) -> None:
    code, said, log = run_inside("tests.hosts.container", str(archive), scenario)
    assert code == 0, said + log
