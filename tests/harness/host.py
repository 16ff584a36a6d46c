"""A whole host in a VM: a Debian that systemd runs, with QEMU and vmdedup installed in it.

    with Host() as host:
        host.run("systemctl start vmdedup")
        print(host.journal("vmdedup"))

Owns the QEMU process, its disk (an overlay: nothing a test does outlives it) and its
folder. A second disk brings what changes with the checkout: vmdedup as pip installs it,
configs/ and the bare guest. Commands go through the second serial port to an agent that
runs as root (images/host/agent), one at a time; no network is needed. Ends QEMU by its
pid on every path; it also ends with the thread that started it.

Emulated, so that a KVM that runs no stock kernel is enough: minutes, not seconds. The CPU
is SandyBridge because QEMU 7.2 emulates AVX2 wrongly (docs/kernels.md): numpy sorts wrongly.
"""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.harness.images import REPOSITORY, image
from tests.harness.serial import GuestError
from tests.release.package import copy_source
from vmdedup.closing import Closing

BOOT_S = 600.0
COMMAND_S = 180.0
_END_GRACE_S = 5
_KILLED = 128 + signal.SIGKILL
"""The exit code that a shell makes of it: the kernel's log may tell by whom."""
_ANSWER_GRACE_S = 60.0
"""What the agent itself may take beside the command, on a host that is busy."""
_CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on"
    " cryptomgr.notests nokaslr systemd.show_status=false systemd.journald.storage=volatile"
)
_PREPARE = """
set -e
mount -o ro /dev/vdb /payload
cp -a /payload/site/. "$(echo /usr/local/lib/python3.*/dist-packages)/"
"""


def build_missing(series: str = "", *, guest: str = "host") -> str | None:
    """Why no such host can be had on this machine; None when its image is there.

    Builds the image, which takes some minutes and a download the first time. `series`: of
    its kernel; `guest`: itself, both as images/build.sh knows them.
    """
    built = subprocess.run(
        [REPOSITORY / "images" / "build.sh", guest, *([series] if series else [])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if built.returncode == 0:
        return None
    told = built.stderr.strip().splitlines()
    return f"no image of a host: {told[-1] if told else f'exit code {built.returncode}'}"


def make_payload(folder: Path, *, add: Callable[[Path], None] | None = None) -> Path:
    """The second disk in `folder`: vmdedup of this checkout, configs/, the bare guest, and what
    tests run in the host (tests/hosts/inside). `add` puts more into the folder it is given.
    """
    content = folder / "payload"
    source = copy_source(folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", content / "site", source], check=True)
    shutil.rmtree(content / "site" / "bin")
    shutil.copytree(REPOSITORY / "configs", content / "configs")
    shutil.copytree(REPOSITORY / "tests" / "hosts" / "inside", content / "inside")
    shutil.copy(image("bare").kernel, content / "guest.elf")
    if add is not None:
        add(content)
    disk = folder / "payload.img"
    subprocess.run(
        ["mke2fs", "-qF", "-t", "ext4", "-O", "^has_journal", "-d", content, disk, "256M"],
        check=True,
    )
    return disk


@dataclass(frozen=True)
class Done:
    """A command that has ended in the host."""

    code: int
    out: str
    err: str


class Host(Closing):
    """A running host, its agent listening. Raises GuestError where it does not come up.

    `payload` is what `make_payload` made. Ask `build_missing` before, of the same `series` and
    `guest`. `prepare` is what bash does in it first: else vmdedup is installed.
    """

    def __init__(
        self,
        payload: Path,
        *,
        series: str = "",
        guest: str = "host",
        memory_mib: int = 3072,
        cpu: str = "SandyBridge",
        prepare: str = _PREPARE,
    ) -> None:
        self._asked = 0
        self._received = b""
        with ExitStack() as stack:
            self._folder = Path(tempfile.mkdtemp(prefix="host-"))
            stack.callback(shutil.rmtree, self._folder)
            self._process = self._start(payload, series, guest, memory_mib, cpu)
            stack.callback(self._end)
            self._agent = stack.enter_context(socket.socket(socket.AF_UNIX))
            self._connect()
            self._line(BOOT_S)  # its `ready`
            self._stack = stack.pop_all()
        try:
            self.run(prepare)
        except BaseException:
            self.close()
            raise

    def _start(
        self, payload: Path, series: str, guest: str, memory_mib: int, cpu: str
    ) -> subprocess.Popen[bytes]:
        images = REPOSITORY / ".cache" / "images"
        kernel = images / (f"host-kernel-{series}" if series else "host-kernel")
        overlay = self._folder / "disk.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*create, "-b", images / guest / "disk", overlay], check=True)
        command = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-system-x86_64"]
        command += ["-name", "vmdedup-host", "-display", "none", "-nodefaults", "-no-user-config"]
        command += ["-no-reboot", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", cpu]
        command += ["-smp", "2", "-m", str(memory_mib), "-append", _CMDLINE]
        command += ["-kernel", str(kernel / "vmlinuz"), "-initrd", str(kernel / "initrd")]
        command += ["-drive", f"file={overlay},if=virtio,format=qcow2,cache=unsafe"]
        command += ["-drive", f"file={payload},if=virtio,format=raw,readonly=on"]
        command += ["-serial", f"file:{self._folder / 'console'}"]
        command += ["-serial", f"unix:{self._folder / 'agent'},server=on,wait=off"]
        with (self._folder / "qemu.log").open("wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _connect(self) -> None:
        deadline = time.monotonic() + COMMAND_S
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                self._agent.connect(str(self._folder / "agent"))
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._failed("QEMU did not start")
            time.sleep(0.05)

    def _failed(self, what: str) -> GuestError:
        said = [(self._folder / name) for name in ("qemu.log", "console")]
        texts = [file.read_text(errors="replace")[-2000:] for file in said if file.exists()]
        return GuestError("\n".join([f"host: {what}", *texts]))

    def _line(self, timeout_s: float) -> str:
        """The agent's next line."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            self._agent.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                more = self._agent.recv(1 << 16)
            except TimeoutError:
                raise self._failed(f"nothing from the agent for {timeout_s:.0f} s") from None
            if not more:
                raise self._failed("QEMU ended")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()

    def ask(self, command: str, *, within_s: float = COMMAND_S) -> Done:
        """Run a bash command as root and wait for its end, whatever its exit code.

        A command that takes longer than `within_s` is ended, with exit code 124.
        """
        self._asked += 1
        encoded = base64.b64encode(command.encode()).decode()
        self._agent.settimeout(COMMAND_S)
        self._agent.sendall(f"{self._asked} {within_s:.0f} {encoded}\n".encode())
        while True:
            words = self._line(within_s + _ANSWER_GRACE_S).split(" ")
            if words[0] == str(self._asked):  # else a late answer to one that was given up
                out, err = (
                    base64.b64decode(word[1:]).decode(errors="replace") for word in words[2:]
                )
                return Done(int(words[1]), out, err)

    def run(self, command: str, *, within_s: float = COMMAND_S) -> str:
        """As `ask`; what it printed. Raises GuestError where its exit code is not 0."""
        done = self.ask(command, within_s=within_s)
        if done.code:
            said = done.out + done.err
            if done.code == _KILLED:
                said += self.ask("dmesg | tail -n 20").out
            raise GuestError(f"host: {command}: exit code {done.code}\n{said}")
        return done.out

    def write(self, path: str, text: str) -> None:
        """Put a small file there."""
        self.run(f"mkdir -p $(dirname {path}); printf %s {shlex.quote(text)} >{path}")

    def journal(self, unit: str) -> str:
        """What a unit, and systemd of it, have said since boot."""
        return self.run(f"journalctl --no-pager --output=short-monotonic --unit={unit}")

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit, as `systemctl show` has them."""
        shown = self.run(f"systemctl show --property={','.join(names)} {unit}")
        return dict(re.findall(r"^(\w+)=(.*)$", shown, re.M))

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End QEMU and remove its files; again is harmless."""
        self._stack.close()
