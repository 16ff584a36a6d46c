"""A bare VM inside a host: started by its systemd, it checks its own memory.

Owns nothing outside the host; goes with it. `Talk` waits on its serial port's log, which is
read through the host's agent.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.harness.host import Host
from tests.harness.serial import Serial
from tests.harness.talk import Talk

FOLDER = "/run/vms"
_QEMU = (
    "qemu-system-x86_64 -name {name} -display none -nodefaults -no-user-config -no-reboot"
    " -accel tcg,tb-size=32 -m {mib}M -machine pc,memory-backend=ram0"
    " -object memory-backend-{backend},id=ram0,size={mib}M,merge=on"
    " -qmp unix:{folder}/{name}.qmp,server=on,wait=off"
    " -qmp unix:{folder}/{name}.own,server=on,wait=off"
    " -serial file:{folder}/{name}.log -kernel /payload/guest.elf -append '{parameters}'"
)


class _LogInHost(Serial):
    def __init__(self, host: Host, log: str) -> None:
        super().__init__(Path(log), Path(log))
        self._host = host

    def text(self) -> str:
        """All whole lines, but of the status, of which there are many, only the last."""
        log = self._log
        shown = f"grep -v checks= {log}; grep 'checks=.*held=.' {log} | tail -n 1"
        return self._host.ask(shown).out.replace("\r", "")


class InnerVm(Talk):
    """A running bare VM in `host`, with a unit of its own there: `vm-NAME.service`.

    `backend`: its memory backend's type and properties, but for size and merge.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        *,
        memory_mib: int = 16,
        backend: str = "memfd,share=on",
        **parameters: int,
    ) -> None:
        self.name = name
        self.unit = f"vm-{name}"
        self.serial = _LogInHost(host, f"{FOLDER}/{name}.log")
        self._host = host
        self._timeout_s = 600
        words = " ".join(f"vmdedup.{key}={value}" for key, value in parameters.items())
        given = {"name": name, "mib": memory_mib, "backend": backend, "folder": FOLDER}
        command = _QEMU.format(**given, parameters=words)
        host.run(f"mkdir -p {FOLDER}; systemd-run --quiet --unit={self.unit} {command}")
        self.pid = int(host.properties(self.unit, "MainPID")["MainPID"])

    @property
    def alive(self) -> bool:
        """Whether the very QEMU that was started still runs."""
        return self._host.properties(self.unit, "MainPID")["MainPID"] == str(self.pid)

    def end(self) -> None:
        """Stop its unit, and forget what it has said."""
        self._host.ask(f"systemctl stop {self.unit}; rm -f {FOLDER}/{self.name}.*")

    def state(self) -> str:
        return "running" if self.alive else "QEMU ended"

    def transcript(self) -> str:
        return self._host.journal(self.unit)[-1000:] + self.serial.text()[-1000:]

    def run_state(self) -> str:
        """`query-status` of the monitor that is left to the test; raises where it is silent."""
        asked = f"python3 /payload/inside/monitor.py {FOLDER}/{self.name}.own query-status"
        return str(json.loads(self._host.run(asked))["status"])

    def store_pages(self) -> int:
        """Pages that its kernel maps from a store."""
        maps = self._host.run(f"grep '[.]store$' /proc/{self.pid}/maps || true")
        spans = [line.split()[0].split("-") for line in maps.splitlines()]
        return sum((int(end, 16) - int(start, 16)) // 4096 for start, end in spans)

    def assert_unharmed(self) -> None:
        """It runs, and has checked all of its memory once more, which was right."""
        self.wait_passes(1)
        assert (self.errors, self.serial.complaints()) == (0, [])
