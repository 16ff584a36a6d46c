"""Memory hot-plug as libvirt and KubeVirt do it: virtio-mem of a domain, resized by virsh."""

from __future__ import annotations

import json

import pytest

from tests.harness.kernel import becomes_true, our_pages, ram_areas
from tests.harness.libvirtd import Domain, Libvirtd
from tests.libvirt.conftest import Start
from tests.libvirt.domains import assert_unharmed, following, merge, wait_attached
from tests.qemu.hot_memory import MOVABLE, held_bytes
from tests.service.daemon import Directories

pytestmark = pytest.mark.libvirt

_MIB = 96
_POOL_MIB = 256
_PLUGGED_MIB = 16
_MAXIMUM = "<maxMemory slots='4' unit='MiB'>1024</maxMemory>"
_CPU = f"<numa><cell id='0' cpus='0' memory='{_MIB}' unit='MiB'/></numa>"
_POOL = f"""
<memory model='virtio-mem'>
  <target>
    <size unit='MiB'>{_POOL_MIB}</size>
    <node>0</node>
    <block unit='MiB'>2</block>
    <requested unit='MiB'>0</requested>
  </target>
</memory>
"""


def test_blocks_come_and_go_while_the_domain_is_merged(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    domain = start(
        "hot",
        guest="tiny",
        mib=_MIB,
        maximum=_MAXIMUM,
        cpu=_CPU,
        devices=_POOL,
        kernel=MOVABLE,
        parameters={"rewrite_per_s": 64, "check_per_s": 4096},
    )
    (pool,) = ram_areas(domain.pid, [_POOL_MIB])
    with following(directories, libvirtd) as daemon:
        wait_attached(daemon, domain)
        for _ in range(2):
            resize(domain, _PLUGGED_MIB)
            assert int(domain.ask("keep 12", "kept=")) == 12
            merge(daemon, domain)
            assert becomes_true(lambda: our_pages(domain.pid, pool) > 500, 60)
            assert int(domain.ask("look", "wrong=")) == 0
            domain.ask("end", "ended")
            resize(domain, 0)
            assert becomes_true(lambda: not our_pages(domain.pid, pool), 60)
            assert becomes_true(lambda: not held_bytes(domain.pid, pool), 60)
    assert_unharmed(domain)


def resize(domain: Domain, mib: int) -> None:
    """Have libvirt ask the guest for so much, and wait until it is so."""
    domain.virsh("update-memory-device", "--requested-size", f"{mib}MiB")
    assert becomes_true(lambda: plugged_mib(domain) == mib, 60)


def plugged_mib(domain: Domain) -> int:
    (device,) = json.loads(domain.qmp("query-memory-devices"))["return"]
    return int(device["data"]["size"]) >> 20
