"""Command lines and configuration files as users of other products publish them.

What vmdedup says of each VM: by which socket it is attached to, and why not. Names, paths and
uuids are replaced, and what says nothing about monitors is left out; each row says where its
like was published.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import pytest

from vmdedup.attach.choice import choose_monitors
from vmdedup.attach.cmdline import vm_name
from vmdedup.attach.config_file import with_files

pytestmark = pytest.mark.unit

LIBVIRT = "its QMP monitor is libvirt's: name that libvirt (--libvirt URI, or [libvirt] uri)"
OWN = "-qmp unix:PATH,server=on,wait=off"


@dataclass(frozen=True)
class Published:
    """A command line, and what vmdedup says of it."""

    source: str
    line: str
    name: str | None
    sockets: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    reason: str | None = None
    """The beginning of the reason."""
    remedy: str = ""
    files: tuple[tuple[str, str], ...] = ()
    """Paths and contents of files given with -readconfig."""


def proxmox(reconnect: str) -> str:
    return f"""/usr/bin/kvm -id 103 -name 'web,debug-threads=on' -no-shutdown
        -chardev 'socket,id=qmp,path=/var/run/qemu-server/103.qmp,server=on,wait=off'
        -mon 'chardev=qmp,mode=control'
        -chardev 'socket,id=qmp-event,path=/var/run/qmeventd.sock,{reconnect}'
        -mon 'chardev=qmp-event,mode=control' -pidfile /var/run/qemu-server/103.pid -daemonize
        -smp '4,sockets=1,cores=4,maxcpus=4' -nodefaults
        -vnc 'unix:/var/run/qemu-server/103.vnc,password=on' -cpu host,+kvm_pv_eoi -m 4096
        -device 'virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on'"""


PVE_SOCKET = "/var/run/qemu-server/103.qmp"
PVE_REASON = f"its only QMP socket {PVE_SOCKET} is Proxmox VE's: use it in turns"

PUBLISHED = {
    "Proxmox VE 8": Published(
        "qm showcmd, a report about QEMU 8.2 on the linux-raid list",
        proxmox("reconnect=5"),
        "web",
        foreign=(PVE_SOCKET,),
        reason=PVE_REASON,
        remedy='monitor = "shared"',
    ),
    "Proxmox VE 9": Published(
        "qm showcmd of pve-qemu 10.1, in notes of a user",
        proxmox("reconnect-ms=5000")
        + """ -object '{"id":"throttle-drive-scsi0","limits":{},"qom-type":"throttle-group"}'""",
        "web",
        foreign=(PVE_SOCKET,),
        reason=PVE_REASON,
        remedy='monitor = "shared"',
    ),
    "Proxmox VE with q35": Published(
        "qm showcmd --pretty, notes on passing through a graphics card",
        proxmox("reconnect=5") + " -readconfig /usr/share/qemu-server/pve-q35-4.0.cfg",
        "web",
        foreign=(PVE_SOCKET,),
        reason=PVE_REASON,
        files=(
            (
                "/usr/share/qemu-server/pve-q35-4.0.cfg",
                '[device "ehci"]\n  driver = "ich9-usb-ehci1"\n  bus = "pcie.0"\n',
            ),
        ),
    ),
    "Proxmox VE before 6.2": Published(
        "a thread on qemu-devel about migration from 3.0 to 4.0",
        """/usr/bin/kvm -name clone
        -chardev 'socket,id=qmp,path=/var/run/qemu-server/101.qmp,server,nowait'
        -mon 'chardev=qmp,mode=control'
        -chardev 'socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5'
        -mon 'chardev=qmp-event,mode=control' -daemonize -m 4096""",
        "clone",
        foreign=("/var/run/qemu-server/101.qmp",),
        reason="its only QMP socket /var/run/qemu-server/101.qmp is Proxmox VE's",
    ),
    "Proxmox VE with --args": Published(
        "as docs/deployments.md had it",
        proxmox("reconnect=5") + " -qmp unix:/run/vms/103.qmp,server=on,wait=off",
        "web",
        sockets=("/run/vms/103.qmp",),
    ),
    "KubeVirt": Published(
        "ps in a virt-launcher pod, KubeVirt's user guide",
        """/usr/libexec/qemu-kvm -name guest=default_web,debug-threads=on -S -object
        '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/run/kubevirt-private/libvirt/qemu/lib/domain-1-default_web/master-key.aes"}'
        -machine pc-q35-rhel9.2.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,acpi=on
        -accel kvm -m size=131072k -no-user-config -nodefaults
        -chardev socket,id=charmonitor,fd=20,server=on,wait=off
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc""",
        "default_web",
        reason=LIBVIRT,
    ),
    "nova": Published(
        "a table of command lines in a test of an inventory agent",
        """/usr/bin/qemu-system-x86_64 -name guest=instance-0000002a,debug-threads=on -S
        -object secret,id=masterKey0,format=raw,file=/var/lib/libvirt/qemu/domain-3/master-key.aes
        -machine pc-i440fx-4.0,accel=kvm,usb=off,dump-guest-core=off -m 16384
        -smbios 'type=1,manufacturer=OpenStack Foundation,product=OpenStack Nova,version=20.2.1'
        -no-user-config -nodefaults -chardev socket,id=charmonitor,fd=26,server,nowait
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew""",
        "instance-0000002a",
        reason=LIBVIRT,
    ),
    "virt-manager": Published(
        "ps on a desktop, in notes of a user",
        """/usr/bin/qemu-system-x86_64 -name guest=fedora,debug-threads=on -S
        -machine pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm
        -m 3048 -object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":3196059648}'
        -no-user-config -nodefaults -chardev socket,id=charmonitor,fd=30,server=on,wait=off
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew
        -chardev socket,id=charchannel0,fd=32,server=on,wait=off""",
        "fedora",
        reason=LIBVIRT,
    ),
    "libvirt before 4.0": Published(
        "ps on Ubuntu 16.04, in notes of a user",
        """qemu-system-x86_64 -enable-kvm -name old -S -machine pc-i440fx-xenial,accel=kvm,usb=off
        -realtime mlock=off -no-user-config -nodefaults
        -chardev socket,id=charmonitor,path=/var/lib/libvirt/qemu/domain-old/monitor.sock,server
        -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc,driftfix=slew""",
        "old",
        foreign=("/var/lib/libvirt/qemu/domain-old/monitor.sock",),
        reason="its only QMP socket /var/lib/libvirt/qemu/domain-old/monitor.sock is libvirt's",
    ),
    "LXD": Published(
        "an issue of LXD, with the file that it makes",
        """/snap/lxd/current/bin/qemu-system-x86_64 -S -name web -daemonize -cpu host -nographic
        -serial chardev:console -nodefaults -no-reboot -no-user-config
        -sandbox on,obsolete=deny,elevateprivileges=allow,spawn=deny,resourcecontrol=deny
        -readconfig /var/snap/lxd/common/lxd/logs/web/qemu.conf
        -pidfile /var/snap/lxd/common/lxd/logs/web/qemu.pid""",
        "web",
        foreign=("/var/snap/lxd/common/lxd/logs/web/qemu.monitor",),
        reason="its only QMP socket /var/snap/lxd/common/lxd/logs/web/qemu.monitor is Incus' or",
        files=(
            (
                "/var/snap/lxd/common/lxd/logs/web/qemu.conf",
                """# Memory
[memory]
size = "10240M"

[object "mem0"]
qom-type = "memory-backend-memfd"
size = "10240M"
share = "on"

# Qemu control
[chardev "monitor"]
backend = "socket"
path = "/var/snap/lxd/common/lxd/logs/web/qemu.monitor"
server = "on"
wait = "off"

[mon]
chardev = "monitor"
mode = "control"

# Console
[chardev "console"]
backend = "socket"
path = "/var/snap/lxd/common/lxd/logs/web/qemu.console"
server = "on"
wait = "off"
""",
            ),
        ),
    ),
    "Incus": Published(
        "the template in its source",
        """/opt/incus/bin/qemu-system-x86_64 -S -name db -nodefaults -no-user-config
        -readconfig /run/incus/db/qemu.conf""",
        "db",
        foreign=("/run/incus/db/qemu.monitor",),
        reason="its only QMP socket /run/incus/db/qemu.monitor is Incus' or LXD's",
        files=(
            (
                "/run/incus/db/qemu.conf",
                '[chardev "monitor"]\nbackend = "socket"\npath = "/run/incus/db/qemu.monitor"\n'
                'server = "on"\nwait = "off"\n\n[mon]\nchardev = "monitor"\nmode = "control"\n',
            ),
        ),
    ),
    "GNS3": Published(
        "an issue of gns3-server, from its log",
        """/usr/bin/qemu-system-x86_64 -name spine -m 2048M -smp cpus=1 -enable-kvm -boot order=d
        -drive file=/srv/gns3/hda_disk.qcow2,if=ide,index=0,media=disk
        -serial telnet:127.0.0.1:5010,server,nowait -monitor tcp:127.0.0.1:40527,server,nowait
        -net none -device e1000,mac=0c:00:00:00:00:00,netdev=gns3-0
        -netdev socket,id=gns3-0,udp=127.0.0.1:10001,localaddr=127.0.0.1:10000""",
        "spine",
        reason="it has no QMP monitor, only a human one (tcp:127.0.0.1:40527), and a running QEMU",
        remedy=f"add {OWN} to the node's options in GNS3",
    ),
    "quickemu": Published(
        "a script that quickemu wrote, in notes of a user",
        """qemu-system-x86_64 -name ubuntu,process=ubuntu
        -machine q35,smm=off,vmport=off,accel=kvm -m 16G -device virtio-balloon
        -pidfile ubuntu/ubuntu.pid -fsdev local,id=fsdev0,path=/home/me,security_model=mapped-xattr
        -device virtio-9p-pci,fsdev=fsdev0,mount_tag=Public-me
        -monitor unix:ubuntu/ubuntu-monitor.socket,server,nowait
        -serial unix:ubuntu/ubuntu-serial.socket,server,nowait""",
        "ubuntu",
        reason="it has no QMP monitor, only a human one (unix:ubuntu/ubuntu-monitor.socket)",
        remedy=f'quickemu --extra_args "{OWN}"',
    ),
    "quickemu 3": Published(
        "an issue of quickemu about its monitor",
        "qemu-system-x86_64 -name win,process=win -m 8G -monitor none -serial mon:stdio",
        "win",
        reason="it has no QMP monitor, only a human one (mon:stdio)",
        remedy=OWN,
    ),
    "lima": Published(
        "a script made from lima's log",
        """qemu-system-x86_64 -m 4096 -cpu host
        -chardev socket,id=char-serial,path=/home/me/.lima/default/serial.sock,server=on,wait=off
        -serial chardev:char-serial
        -chardev socket,id=char-qmp,path=/home/me/.lima/default/qmp.sock,server=on,wait=off
        -qmp chardev:char-qmp -name lima-default -pidfile /home/me/.lima/default/qemu.pid""",
        "lima-default",
        foreign=("/home/me/.lima/default/qmp.sock",),
        reason="its only QMP socket /home/me/.lima/default/qmp.sock is lima's",
        remedy='monitor = "shared"',
    ),
    "Ganeti": Published(
        "the sockets as its design documents name them",
        """/usr/bin/qemu-system-x86_64 -enable-kvm -name web.example -m 4096 -daemonize
        -monitor unix:/run/ganeti/kvm-hypervisor/ctrl/web.example.monitor,server,nowait
        -qmp unix:/run/ganeti/kvm-hypervisor/ctrl/web.example.qmp,server,nowait
        -qmp unix:/run/ganeti/kvm-hypervisor/ctrl/web.example.kvmd,server,nowait""",
        "web.example",
        foreign=(
            "/run/ganeti/kvm-hypervisor/ctrl/web.example.qmp",
            "/run/ganeti/kvm-hypervisor/ctrl/web.example.kvmd",
        ),
        reason="its only QMP socket /run/ganeti/kvm-hypervisor/ctrl/web.example.qmp is Ganeti's",
    ),
    "podman machine": Published(
        "the machine's configuration file, in an issue of podman",
        """/usr/bin/qemu-system-x86_64 -m 2048 -smp 1
        -qmp unix:/run/user/1000/podman/qmp_podman-machine-default.sock,server=on,wait=off
        -netdev socket,id=vlan,fd=3 -device virtio-net-pci,netdev=vlan -device virtio-serial""",
        None,
        foreign=("/run/user/1000/podman/qmp_podman-machine-default.sock",),
        reason="its only QMP socket /run/user/1000/podman/qmp_podman-machine-default.sock is",
    ),
    "a script with both monitors": Published(
        "a launcher of a test tool",
        """qemu-system-x86_64 -enable-kvm -m 8192 -nic none
        -qmp unix:/srv/vm/qmp.sock,server=on,wait=off
        -monitor unix:/srv/vm/monitor.sock,server,nowait -daemonize""",
        None,
        sockets=("/srv/vm/qmp.sock",),
    ),
    "a script without any": Published(
        "as QEMU's own documentation begins",
        "qemu-system-x86_64 -enable-kvm -m 2048 linux.img",
        None,
        reason="it has no QMP monitor (start it with",
        remedy=OWN,
    ),
}


@pytest.mark.parametrize("platform", PUBLISHED)
def test_what_is_said_of_a_published_command_line(platform: str) -> None:
    row = PUBLISHED[platform]
    line = with_files(shlex.split(row.line), dict(row.files).__getitem__)
    assert line.unread is None
    choice = choose_monitors(line.arguments)
    assert vm_name(line.arguments) == row.name
    assert (choice.sockets, choice.foreign) == (row.sockets, row.foreign)
    assert (choice.reason is None) == (row.reason is None)
    assert (choice.reason or "").startswith(row.reason or "")
    assert row.remedy in (choice.reason or "")
    assert "\n" not in (choice.reason or "")


def test_our_socket_comes_first_and_anothers_is_left() -> None:
    line = shlex.split(proxmox("reconnect=5"))
    line += ["-qmp", "unix:/srv/other.qmp,server=on", "-qmp", "unix:/srv/vmdedup.qmp,server=on"]
    line += ["-chardev", "socket,id=for-vmdedup,path=/srv/third.qmp,server=on"]
    line += ["-mon", "chardev=for-vmdedup,mode=control"]
    choice = choose_monitors(line)
    assert choice.sockets == ("/srv/vmdedup.qmp", "/srv/third.qmp", "/srv/other.qmp")
    assert choice.foreign == ()
