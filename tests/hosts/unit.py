"""The shipped unit, installed in a host: what a test does with it, and what it sees of it.

Owns `vmdedup.service` and `/etc/vmdedup.toml` of the host; both as shipped but for the lines
that a test adds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from tests.harness.host import Host
from tests.harness.serial import GuestError
from tests.hosts.inner import InnerVm

_WAIT_S = 300.0
UNIT = "vmdedup.service"
_TRAP = "/usr/bin/python3 /payload/inside/trap.py"
_COMMAND = "run --config /etc/vmdedup.toml"
_DROP_IN = f"/etc/systemd/system/{UNIT}.d/test.conf"


class Unit:
    """vmdedup as systemd runs it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._said_before = len(host.journal(UNIT).splitlines())

    def install(self, *, settings: str = "", service: str = "") -> None:
        """The files of configs/, with lines added to the settings and to `[Service]`."""
        self.host.run(
            "cp /payload/configs/vmdedup.service /etc/systemd/system/;"
            " cp /payload/configs/default.toml /etc/vmdedup.toml;"
            f" rm -rf $(dirname {_DROP_IN}) /run/vmdedup/trap*"
        )
        if settings:
            text = self.host.run("cat /etc/vmdedup.toml")
            self.host.write("/etc/vmdedup.toml", f"{settings}\n{text}")
        if service:
            self.host.write(_DROP_IN, f"[Service]\n{service}\n")
        self.host.run("systemctl daemon-reload")

    def set_trap(self, step: str, action: str) -> None:
        """Have the next engine `wait` or `kill` itself and its guardian at a fault point, once."""
        self.host.run("rm -f /run/vmdedup/trapped")
        self.host.write("/run/vmdedup/trap", f"{step} {action}")
        self.host.write(
            _DROP_IN.replace("test", "trap"),
            f"[Service]\nExecStart=\nExecStart={_TRAP} {_COMMAND}\n",
        )
        self.host.run("systemctl daemon-reload")

    def limit_memory(self, most: str) -> None:
        """What the unit's processes may use together, from now on; they cannot swap."""
        limits = f"MemoryMax={most} MemorySwapMax=0"
        self.host.run(f"systemctl set-property --runtime {UNIT} {limits}", within_s=_WAIT_S)

    def wait_trapped(self) -> None:
        """Until an engine has got to that point."""
        self.wait(
            lambda: self.host.ask("test -e /run/vmdedup/trapped").code == 0,
            "no engine has got to the fault point",
        )

    def open_trap(self) -> None:
        """Let an engine that waits there go on."""
        self.host.run("rm -f /run/vmdedup/trapped")

    def systemctl(self, *words: str) -> None:
        """`systemctl WORDS vmdedup`, which must succeed."""
        self.host.run(f"systemctl {' '.join(words)} {UNIT}", within_s=_WAIT_S)

    def start(self) -> None:
        """Start it, and wait until the daemon answers."""
        self.systemctl("start")
        self.wait_answers()

    def end(self) -> None:
        """Stop it, thawed first, and forget how it ended."""
        self.host.ask(f"systemctl thaw {UNIT}; systemctl stop {UNIT}", within_s=_WAIT_S)
        self.host.ask(f"systemctl reset-failed {UNIT}")

    @property
    def main_pid(self) -> int:
        """The engine's pid; 0 while none runs."""
        return int(self.properties("MainPID")["MainPID"])

    def properties(self, *names: str) -> dict[str, str]:
        return self.host.properties(UNIT, *names)

    def processes(self) -> dict[int, str]:
        """Every process of vmdedup, in the unit or out of it: pid to command line."""
        listed = self.host.run("ps -e -o pid=,args= | grep '[v]mdedup[ ._]' || true")
        rows = (line.split(maxsplit=1) for line in listed.splitlines())
        return {int(pid): args for pid, args in rows if "qemu-system" not in args}

    def verb(self, *words: str) -> Any:
        """What a verb says, as JSON."""
        return json.loads(self.host.run(f"vmdedup {' '.join(words)} --json", within_s=_WAIT_S))

    def journal(self) -> str:
        """What the unit, and systemd of it, have said since this object was made."""
        return "\n".join(self.host.journal(UNIT).splitlines()[self._said_before :])

    def wait(self, condition: Callable[[], bool], what: str, within_s: float = _WAIT_S) -> None:
        """Until `condition` holds; GuestError with the unit's journal where it never does."""
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                raise GuestError(f"{what}\n{self.journal()[-4000:]}")
            time.sleep(0.5)

    def api(self, path: str) -> Any:
        """What the daemon's API answers to a GET; None where none answers."""
        done = self.host.ask(f"python3 -S /payload/inside/api.py {path}")
        return None if done.code else json.loads(done.out)

    def answers(self) -> bool:
        """Whether the daemon that runs now answers."""
        health = self.api("/v1/health")
        return health is not None and health["engine"]["engine_pid"] == self.main_pid

    def wait_answers(self) -> None:
        """Until it does."""
        self.wait(self.answers, "the daemon does not answer")

    def wait_all_gone(self) -> None:
        """Until no process of vmdedup is left; the guardian's end is not waited for by systemd."""
        self.wait(lambda: not self.processes(), "some process of it is left")

    def wait_restarted(self, before: int) -> None:
        """Until systemd has started another engine than the one of pid `before`, and it answers."""
        self.wait(lambda: self.main_pid not in (0, before), "systemd has not started it again")
        self.wait_answers()

    def wait_merged(self, *vms: InnerVm, pages: int = 200) -> None:
        """Until each VM's kernel maps so many pages from a store."""
        self.wait(
            lambda: all(vm.store_pages() >= pages for vm in vms),
            "the VMs are not merged",
        )

    def wait_followed(self, *vms: InnerVm) -> None:
        """Until the daemon that runs now follows these VMs; GuestError where it refuses one."""
        wanted = {vm.name for vm in vms}

        def are_followed() -> bool:
            rows = (self.api("/v1/vms") or {"vms": []})["vms"]
            if refused := [row["reason"] for row in rows if not row["mergeable"]]:
                raise GuestError(f"refused: {refused}")
            return wanted <= {row["name"] for row in rows}

        self.wait(are_followed, "the VMs are not followed")
