"""A libvirtd of the tests' own, and domains on it.

    with Libvirtd() as libvirtd, libvirtd.domain("web") as domain:
        domain.wait_ready()

The daemon runs in a mount and network namespace of its own, where its directories
(/run/libvirt, /var/lib/libvirt, /etc/libvirt and so on) are private: neither a
host's libvirtd nor its domains, networks or firewall are touched. Its settings are
libvirt's defaults: QEMU as libvirt-qemu, in a mount namespace with a private /dev,
with seccomp. Its socket lies in a directory that everyone sees. It needs no systemd.

`Libvirtd(pod=True)` is as KubeVirt has one in each pod: a pid namespace too, libvirt's session
daemon and QEMU as uid 107, and a socket that is seen only through /proc/PID/root.

Owns the processes, the directory and every domain started; all of it is gone after
`close()`. /dev/kvm is accessible to QEMU inside only. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

from tests.harness.images import Guest, image
from tests.harness.serial import POLL_S, GuestError, Serial
from tests.harness.talk import Talk
from vmdedup.closing import Closing

_START_S = 30.0
_PRIVATE = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "etc": "/etc/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
_UID, _POD_UID = 64055, 107
"""libvirt-qemu's on Debian, where the package allocates it; qemu's in KubeVirt's pods."""

_NAMESPACE = """
set -e
cd "$1"
for pair in $2; do mount --bind "${pair%%:*}" "${pair#*:}"; done
for name in passwd group; do mount --bind "$name" "/etc/$name"; done
[ ! -e kvm ] || mount --bind kvm /dev/kvm
mkdir -p huge && mount -t hugetlbfs -o "uid=$4" none huge
[ -z "$3" ] || { mkdir -p "$3" && mount -t tmpfs -o "uid=$4" none "$3"; }
touch ready
[ -n "$3" ] || exec sleep infinity
sleep infinity # in a pod the shell stays, as the one that reaps orphans
exit
"""

_POD_HOME = ["HOME=/", "XDG_RUNTIME_DIR=/run", "XDG_CONFIG_HOME=/etc"]
_POD_HOME += ["XDG_CACHE_HOME=/var/cache", "XDG_DATA_HOME=/var/lib"]
"""A session's folders, in the places of the system's."""

PRIVATE_DIR = "/run/kubevirt-private"
"""A folder that each pod has for itself; outside tests a host has none of that name."""

_LIBVIRTD_CONF = """
unix_sock_dir = "{sockets}"
unix_sock_group = "{group}"
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
log_outputs = "3:file:{base}/libvirtd.log"
"""

# No virtlogd, and no name in a cgroup that a host's libvirtd could also choose.
_QEMU_CONF = """
stdio_handler = "file"
cgroup_controllers = []
hugetlbfs_mount = "{base}/huge"
"""

_DOMAIN = """
<domain type='{type}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  {metadata}
  {maximum}
  <memory unit='MiB'>{mib}</memory>
  {memtune}
  <memoryBacking>{backing}</memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>{initrd}
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/>{features}</features>
  <cpu>{cpu}</cpu>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='{usb}'/>
    <serial type='unix'>
      <source mode='bind' path='{serial}.sock'/>
      <log file='{serial}.log' append='on'/>
      <target port='0'/>
    </serial>
    {balloon}
    {devices}
  </devices>
  {commandline}
</domain>
"""


def missing() -> str | None:
    """Why no libvirtd can be run here, None when it can."""
    for program in ("libvirtd", "virsh", "unshare", "nsenter"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{program} is not installed"
    if find_spec("libvirt") is None:
        return "libvirt's Python binding is not installed"
    return None


class Libvirtd(Closing):
    """A running libvirtd. Raises GuestError where it does not start."""

    def __init__(self, *, pod: bool = False) -> None:
        self._is_pod = pod
        self._uid = _POD_UID if pod else _UID
        self.base = Path(tempfile.mkdtemp(prefix="libvirtd-"))
        self._exits = contextlib.ExitStack()
        self._exits.callback(shutil.rmtree, self.base, ignore_errors=True)
        self._daemon: subprocess.Popen[bytes] | None = None
        try:
            self._prepare()
            self._namespace = self._enter_namespace()
            place, sockets = "system", str(self.base / "sock")
            if pod:
                place, sockets = "session", f"/proc/{self._namespace}/root/run/libvirt"
            self.uri = f"qemu:///{place}?socket={sockets}/libvirt-sock"
            self._exits.callback(self._end_domains)
            self.start()
            self._exits.callback(self.kill)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the daemon and all its domains, remove its directories. Idempotent."""
        self._exits.close()

    # ---- its world ----

    def _prepare(self) -> None:
        self.base.chmod(0o755)
        for name, place in _PRIVATE.items():
            (self.base / name).mkdir()
            if not Path(place).exists():
                Path(place).mkdir(parents=True)
                self._exits.callback(self._remove_folder, place)
        (self.base / "sock").mkdir()
        (self.base / "files").mkdir()
        os.chown(self.base / "files", self._uid, self._uid)
        sockets = "/run/libvirt" if self._is_pod else self.base / "sock"
        daemon = _LIBVIRTD_CONF.format(
            base=self.base, sockets=sockets, group="libvirt-qemu" if self._is_pod else "root"
        )
        (self.base / "etc/libvirtd.conf").write_text(daemon)
        (self.base / "etc/qemu.conf").write_text(_QEMU_CONF.format(base=self.base))
        uid = self._uid
        self._write_names("passwd", f"libvirt-qemu:x:{uid}:{uid}::/:/usr/sbin/nologin")
        self._write_names("group", f"libvirt-qemu:x:{uid}:")
        if self._is_pod:
            for each in (self.base, *(self.base / name for name in _PRIVATE)):
                os.chown(each, uid, uid)
        if Path("/dev/kvm").exists():
            # Else libvirt's probing takes a minute: QEMU's user must be allowed to open it.
            os.mknod(self.base / "kvm", 0o020666, Path("/dev/kvm").stat().st_rdev)
            (self.base / "kvm").chmod(0o666)

    def _write_names(self, file: str, line: str) -> None:
        """/etc/passwd or group with libvirt-qemu of this uid, whatever the host's is."""
        kept = [
            each
            for each in Path("/etc", file).read_text().splitlines()
            if not each.startswith("libvirt-qemu:")
        ]
        (self.base / file).write_text("\n".join([*kept, line]) + "\n")

    @staticmethod
    def _remove_folder(place: str) -> None:
        with contextlib.suppress(OSError):
            Path(place).rmdir()

    def _enter_namespace(self) -> int:
        """The pid of a process that holds the namespaces."""
        pairs = " ".join(f"{name}:{place}" for name, place in _PRIVATE.items())
        pod = ["--pid", "--fork", "--kill-child", "--mount-proc"] if self._is_pod else []
        private = [PRIVATE_DIR, str(self._uid)] if self._is_pod else ["", "0"]
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *("unshare", "--mount", "--net", "--propagation", "private", *pod, "--"),
                *("sh", "-c", _NAMESPACE, "sh", str(self.base), pairs, *private),
            ],
            stdin=subprocess.DEVNULL,
        )

        def end() -> None:
            process.kill()
            process.wait()

        self._exits.callback(end)
        wait_for((self.base / "ready").exists, "no private namespaces", process)
        if not self._is_pod:
            return process.pid
        return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())

    # ---- the daemon ----

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = ["nsenter", "-t", str(self._namespace), "-m", "-n"]
        command += ["-p", "--"] if self._is_pod else ["--"]
        command += ["setpriv", "--pdeathsig", "KILL"]
        if self._is_pod:
            command += [f"--reuid={self._uid}", f"--regid={self._uid}", "--clear-groups"]
        command += ["--", "env", *(_POD_HOME if self._is_pod else []), "/usr/sbin/libvirtd"]
        command += ["--config", "/etc/libvirt/libvirtd.conf"]
        command += ["--pid-file", str(self.base / "libvirtd.pid")]
        with (self.base / "out").open("ab") as out:
            self._daemon = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        wait_for(lambda: self._virsh("version").returncode == 0, "no libvirtd", self._daemon)

    @property
    def pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.pid

    def kill(self) -> None:
        """SIGKILL, as a crash would; domains run on."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    @property
    def is_running(self) -> bool:
        return self._daemon is not None and self._daemon.poll() is None

    def has(self, domain: Domain) -> bool:
        """Whether it calls this domain running."""
        return domain.uuid in self.virsh("list", "--uuid").split()

    def revive(self) -> None:
        """Start it again if it does not run."""
        if not self.is_running:
            self.start()

    def end(self) -> None:
        """SIGTERM, as an upgrade would; domains run on."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(_START_S)
            self._daemon = None

    @contextlib.contextmanager
    def hung(self) -> Any:
        """The daemon stands still in the block."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def log(self) -> str:
        """The last lines of its log."""
        file = self.base / "libvirtd.log"
        return (
            "\n".join(file.read_text(errors="replace").splitlines()[-10:]) if file.exists() else ""
        )

    def _virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "-c", self.uri, *words], capture_output=True, text=True, check=False
        )

    def virsh(self, *words: str) -> str:
        """What `virsh` prints; it must succeed."""
        done = self._virsh(*words)
        assert done.returncode == 0, f"virsh {' '.join(words)}: {done.stderr}\n{self.log()}"
        return done.stdout.strip()

    # ---- domains ----

    def domain(self, name: str, **options: Any) -> Domain:
        """Start a domain; see `Domain`."""
        return Domain(self, name, **options)

    @property
    def _pids(self) -> Path:
        return self.base / ("run/qemu/run" if self._is_pod else "run/qemu")

    def qemu_pid(self, name: str) -> int | None:
        """The QEMU of a running domain."""
        file = self._pids / f"{name}.pid"
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            return self._seen_from_here(pid) if self._is_pod else pid
        return None

    def _seen_from_here(self, pid: int) -> int | None:
        """The pid of a process of the pod, by the one that it has there."""
        namespace = os.readlink(f"/proc/{self._namespace}/ns/pid")
        for each in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(each / "ns/pid") == namespace:
                    record = (each / "status").read_text()
                    if int(record.partition("NSpid:")[2].splitlines()[0].split()[-1]) == pid:
                        return int(each.name)
        return None

    def _end_domains(self) -> None:
        for file in self._pids.glob("*.pid"):
            pid = self.qemu_pid(file.stem)
            with contextlib.suppress(OSError):
                if pid and b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


class Domain(Talk, Closing):
    """A domain that was started; its guest as `Vm`'s. A context manager.

    `backing` is what <memoryBacking> holds, `devices` further devices, `metadata` a
    policy element, `balloon` the memballoon. `define` makes it persistent. `words` go onto
    QEMU's command line, `kernel` onto the guest's.
    """

    def __init__(
        self,
        libvirtd: Libvirtd,
        name: str,
        *,
        guest: Guest = "bare",
        accel: Literal["qemu", "kvm"] = "qemu",
        mib: int = 16,
        backing: str = "<source type='memfd'/><access mode='shared'/>",
        devices: str = "",
        balloon: str = "<memballoon model='none'/>",
        memtune: str = "",
        maximum: str = "",
        metadata: str = "",
        cpu: str = "",
        machine: str = "pc",
        parameters: Mapping[str, int] | None = None,
        usb: str = "none",
        define: bool = False,
        words: Sequence[str] = (),
        kernel: str = "",
        timeout_s: float = 60,
    ) -> None:
        self.name = name
        self._libvirtd = libvirtd
        self._timeout_s = timeout_s
        place = libvirtd.base / "files" / name
        self.serial = Serial(place.with_suffix(".log"), place.with_suffix(".sock"))
        # libvirt gives its QEMU's user whatever it hands over: never the repository's files.
        boot = image(guest)
        files = [boot.kernel, *([boot.initrd] if boot.initrd else [])]
        files = [Path(shutil.copy(file, f"{place}-{file.name}")) for file in files]
        self.xml = _DOMAIN.format(
            type=accel,
            name=name,
            metadata=f"<metadata>{metadata}</metadata>" if metadata else "",
            maximum=maximum,
            mib=mib,
            memtune=memtune,
            backing=backing,
            machine=machine,
            kernel=files[0],
            initrd=f"<initrd>{files[1]}</initrd>" if boot.initrd else "",
            cmdline=boot.command_line(parameters or {"mib": 4}, kernel),
            commandline=_command_line_xml(words),
            features="<tcg><tb-cache unit='MiB'>32</tb-cache></tcg>" if accel == "qemu" else "",
            cpu=cpu,
            serial=place,
            usb=usb,
            balloon=balloon,
            devices=devices,
        )
        if not cpu:
            self.xml = self.xml.replace("<cpu></cpu>", "")
        description = place.with_suffix(".xml")
        description.write_text(self.xml)
        self._is_defined = define
        if define:
            libvirtd.virsh("define", str(description))
            libvirtd.virsh("start", name)
        else:
            libvirtd.virsh("create", str(description))
        self.uuid = libvirtd.virsh("domuuid", name)
        self.pid = self._pid_now()

    def _pid_now(self) -> int:
        pid = self._libvirtd.qemu_pid(self.name)
        if pid is None:
            raise GuestError(f"{self.name}: it did not start\n{self._libvirtd.log()}")
        return pid

    def started_again(self) -> None:
        """Take note that it runs in a new process: it was restored, or started anew."""
        self.pid = self._pid_now()

    def virsh(self, verb: str, *words: str) -> str:
        """`virsh VERB DOMAIN WORDS…`."""
        return self._libvirtd.virsh(verb, self.name, *words)

    def run_state(self) -> str:
        """What `virsh domstate` says."""
        return self.virsh("domstate")

    def qmp(self, command: str, **arguments: object) -> str:
        """A QMP command, by virsh."""
        sent = {"execute": command, "arguments": arguments}
        return self.virsh("qemu-monitor-command", json.dumps(sent))

    @property
    def alive(self) -> bool:
        return b"qemu-system" in _command_line(self.pid)

    def state(self) -> str:
        return "running" if self.alive else "ended"

    def transcript(self) -> str:
        log = self._libvirtd.base / "log/qemu" / f"{self.name}.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join([*said.splitlines()[-5:], *self.serial.text().splitlines()[-10:]])

    def close(self) -> None:
        """End it, at once."""
        with contextlib.suppress(ProcessLookupError):
            if self.alive:
                os.kill(self.pid, signal.SIGKILL)
        wait_for(lambda: not self.alive, f"{self.name} does not end")
        if self._libvirtd.is_running:
            wait_for(lambda: not self._libvirtd.has(self), f"{self.name} stays in libvirt's list")
            if self._is_defined:
                self._libvirtd._virsh("undefine", self.name, "--managed-save")


def _command_line_xml(words: Sequence[str]) -> str:
    """The element as a hook of the user adds it."""
    arguments = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in words)
    return f"<qemu:commandline>{arguments}</qemu:commandline>" if words else ""


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(
    condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until `condition` holds. Raises GuestError."""
    deadline = time.monotonic() + _START_S
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            raise GuestError(what)
        time.sleep(POLL_S)
