"""VMs as Proxmox VE, Incus and KubeVirt start them; each with a guest that checks its memory.

Owns the QEMUs and what lies in their folders. They run inside a world of the tests' own
(`tests/platforms/world.py`), so that places are the platforms' real ones, and ends
with it: a daemonized QEMU has no parent that could end it. Words of the command lines are from
`qm showcmd` and from the sources of Incus (driver_qemu_templates); left out is what needs a
network, another file of the platform's, or a patch of its QEMU's (`-id`).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import NAMESPACE_DNS, uuid5

from tests.harness.disk import write_image
from tests.harness.images import image
from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import PRIVATE_DIR, Domain, Libvirtd
from tests.harness.monitor import qmp
from tests.harness.serial import GuestError, Serial
from tests.harness.talk import Talk
from vmdedup.closing import Closing

MIB = 96
INCUS_UID = 996
PAGE_POISON_OFF = ["-global", "virtio-balloon-device.page-poison=off"]
_PARAMETERS = {"mib": 8, "rewrite_per_s": 128, "check_per_s": 8192}
_EVERY_ORDER = "page_reporting.page_reporting_order=0"
_START_S, _END_S = 180, 10

PROXMOX_FOLDER = Path("/var/run/qemu-server")
INCUS_FOLDER = Path("/run/incus")


def _guest(seed: int, kernel: str = "", **parameters: int) -> list[str]:
    """What QEMU boots: a guest that reports free pages of every size, if it reports any."""
    boot = image("tiny")
    chosen = _PARAMETERS | parameters | {"seed": seed}
    line = boot.command_line(chosen, _EVERY_ORDER, kernel)
    return ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", line]


class Daemonized(Talk, Closing):
    """A QEMU that has gone into the background by itself (`-daemonize`).

    Who derives from it sets `serial` before.
    """

    def __init__(self, name: str, words: Sequence[str], pidfile: Path) -> None:
        self.name = name
        self._timeout_s = _START_S
        command = ["qemu-system-x86_64", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self._said = done.stderr
        if done.returncode:
            raise GuestError(f"{name} did not start: {self._said}")
        self.pid = int(pidfile.read_text())

    @property
    def alive(self) -> bool:
        try:
            return b"qemu-system" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False

    def state(self) -> str:
        return "running" if self.alive else "ended"

    def transcript(self) -> str:
        return "\n".join([self._said, *self.serial.text().splitlines()[-10:]])

    def close(self) -> None:
        """End it at once. Idempotent."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # in a pid namespace its orphans are ours
            os.waitpid(self.pid, 0)
        assert becomes_true(lambda: not self.alive, _END_S)


_PROXMOX_LINE = """
-name 'pve{number},debug-threads=on' -no-shutdown
-chardev 'socket,id=qmp,path={stem}.qmp,server=on,wait=off' -mon 'chardev=qmp,mode=control'
-chardev 'socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5'
-mon 'chardev=qmp-event,mode=control' -pidfile {stem}.pid -daemonize
-smbios 'type=1,uuid={uuid}' -smp '1,sockets=1,cores=1,maxcpus=1' -nodefaults
-boot 'menu=on,strict=on,reboot-timeout=1000' -vnc 'unix:{stem}.vnc,password=on' -m {mib}
-device 'pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e' -device 'vmgenid,guid={uuid}'
-device 'piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2'
-device 'usb-tablet,id=tablet,bus=uhci.0,port=1'
-chardev 'socket,id=serial0,path={stem}.serial0,server=on,wait=off,logfile={stem}.log'
-device 'isa-serial,chardev=serial0' -device 'VGA,id=vga,bus=pci.0,addr=0x2'
-chardev 'socket,path={stem}.qga,server=on,wait=off,id=qga0'
-device 'virtio-serial,id=qga0,bus=pci.0,addr=0x8'
-device 'virtserialport,chardev=qga0,name=org.qemu.guest_agent.0'
-device 'virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on'
-drive 'file={disk},if=none,id=drive-virtio0,format=raw,cache=none,aio=io_uring,detect-zeroes=on'
-device 'virtio-blk-pci,drive=drive-virtio0,id=virtio0,bus=pci.0,addr=0xa,bootindex=100'
-machine 'type=pc' -accel tcg,tb-size=64
"""


class Proxmox(Daemonized):
    """One monitor, which Proxmox's tools use with a connection for each command."""

    def __init__(
        self, number: int, disks: Path, *, kernel: str = "", page_poison: bool = True
    ) -> None:
        stem = PROXMOX_FOLDER / str(number)
        self.qmp_path = Path(f"{stem}.qmp")
        PROXMOX_FOLDER.mkdir(exist_ok=True)
        line = _PROXMOX_LINE.format(
            number=number,
            stem=stem,
            uuid=uuid5(NAMESPACE_DNS, str(number)),
            mib=MIB,
            disk=write_image(disks / f"vm-{number}-disk-0.raw"),
        )
        words = shlex.split(line) + _guest(number, kernel, dma=1, dma_mib=2)
        words += [] if page_poison else PAGE_POISON_OFF
        self.serial = Serial(Path(f"{stem}.log"), Path(f"{stem}.serial0"))
        super().__init__(f"pve{number}", words, Path(f"{stem}.pid"))

    def balloon_to(self, mib: int) -> None:
        """As Proxmox's own service does, over the one monitor."""
        qmp(self.qmp_path, "balloon", value=mib << 20)


_INCUS_FILE = """
# Machine
[machine]
graphics = "off"
type = "q35"
accel = "tcg"
usb = "off"

[global]
driver = "ICH9-LPC"
property = "disable_s3"
value = "1"

[boot-opts]
strict = "on"

# Console
[chardev "console"]
backend = "socket"
path = "{folder}/qemu.console"
server = "on"
wait = "off"
logfile = "{folder}/qemu.log"

# Memory
[memory]
size = "{mib}M"

[object "mem0"]
qom-type = "memory-backend-memfd"
size = "{mib}M"
share = "on"

[numa]
type = "node"
nodeid = "0"
memdev = "mem0"

[smp-opts]
cpus = "1"

# Qemu control
[chardev "monitor"]
backend = "socket"
path = "{folder}/qemu.monitor"
server = "on"
wait = "off"

[mon]
chardev = "monitor"
mode = "control"

# Balloon driver
[device "qemu_pcie0"]
driver = "pcie-root-port"
bus = "pcie.0"
addr = "1.0"
multifunction = "on"
port = "16"
chassis = "16"

[device "qemu_balloon"]
driver = "virtio-balloon-pci"
bus = "qemu_pcie0"
addr = "00.0"
"""


_INCUS_LINE = """
-S -name {name} -uuid {uuid} -daemonize -nographic -serial chardev:console -nodefaults
-no-user-config
-sandbox on,obsolete=deny,elevateprivileges=allow,spawn=allow,resourcecontrol=deny
-readconfig {folder}/qemu.conf -pidfile {folder}/qemu.pid -chroot {folder}/root -runas {uid}:{uid}
"""


class Incus(Daemonized):
    """Monitor and memory in a configuration file, another root, a uid of its own."""

    def __init__(self, number: int) -> None:
        name = f"incus{number}"
        folder = INCUS_FOLDER / name
        (folder / "root").mkdir(parents=True)
        (folder / "qemu.conf").write_text(_INCUS_FILE.format(folder=folder, mib=MIB))
        self.qmp_path = folder / "qemu.monitor"
        self.serial = Serial(folder / "qemu.log", folder / "qemu.console")
        uuid = uuid5(NAMESPACE_DNS, name)
        line = _INCUS_LINE.format(name=name, uuid=uuid, folder=folder, uid=INCUS_UID)
        super().__init__(name, shlex.split(line) + _guest(100 + number), folder / "qemu.pid")

    def resume(self) -> None:
        """It starts paused, and Incus resumes it over its monitor."""
        qmp(self.qmp_path, "cont")


KUBEVIRT_SOCKET = f"{PRIVATE_DIR}/vmdedup.qmp"


def kubevirt(
    pod: Libvirtd, number: int, *, own_socket: bool, page_poison: bool = True, kernel: str = ""
) -> Domain:
    """A domain in a pod, as virt-launcher defines it.

    `own_socket`: with the second monitor that a hook sidecar adds.
    """
    words = ["-qmp", f"unix:{KUBEVIRT_SOCKET},server=on,wait=off"] if own_socket else []
    if not page_poison:
        words += PAGE_POISON_OFF
    return pod.domain(
        f"default_vm{number}",
        guest="tiny",
        mib=MIB,
        machine="q35",
        parameters=_PARAMETERS | {"seed": 200 + number},
        balloon="<memballoon model='virtio-non-transitional' freePageReporting='on'/>",
        words=words,
        kernel=f"{_EVERY_ORDER} {kernel}",
        timeout_s=_START_S,
    )


Machine = Daemonized | Domain


def number_said(vm: Talk, command: str, answer: str) -> int:
    """What the tiny guest says to a command of its own."""
    return int(vm.ask(command, answer))
