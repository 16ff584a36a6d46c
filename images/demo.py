"""The demo itself: boots, merges, proves, unmerges. Run it through demo.sh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.harness.capabilities import kvm_missing  # noqa: E402
from tests.harness.serial import GuestError  # noqa: E402
from tests.harness.vm import Backend, Vm  # noqa: E402

VMDEDUP = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / ".venv/bin/vmdedup")
"""The command that is shown: this checkout's, or the one that is named."""
PASSES = 2
"""Whole walks over its memory that each guest must do after the merge."""


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def vmdedup(verb: str, vms: list[Vm], *options: str) -> None:
    command = [VMDEDUP, verb]
    command += [word for vm in vms for word in ("--qmp", str(vm.qmp_path))]
    print(f"$ vmdedup {verb} {' '.join(options)} --qmp …", flush=True)
    subprocess.run([*command, *options], check=True)


def boot(exits: ExitStack) -> list[Vm]:
    no_kvm = kvm_missing()
    if no_kvm is not None:
        print(f"the bare guest runs without KVM: {no_kvm}")
    small = {"mib": 24}
    vms = [
        exits.enter_context(vm)
        for vm in (
            Vm(name="web", backend=Backend("memfd", share=True), parameters=small),
            Vm(name="database", backend=Backend("ram", share=False), parameters=small),
            Vm(name="cache", backend=Backend("file", share=True), parameters=small),
            Vm(
                "bare",
                name="bare-kvm" if no_kvm is None else "bare",
                accel="kvm" if no_kvm is None else "tcg",
                backend=Backend("memfd", share=False, mib=32),
                parameters={"mib": 4},
            ),
        )
    ]
    for vm in vms:
        print(f"{vm.name}: {vm.wait_ready()}", flush=True)
    return vms


def require_unharmed(vms: list[Vm], when: str) -> None:
    harmed = False
    for vm in vms:
        vm.wait_passes(PASSES)
        status = vm.status()
        harmed |= vm.errors != 0
        print(f"{vm.name}: {status.checks} checks, {status.rewrites} rewrites, {vm.errors} errors")
    if harmed:
        raise SystemExit(f"demo failed: a guest found wrong memory {when}")


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    with ExitStack() as exits:
        runtime = Path(tempfile.mkdtemp(prefix="demo-"))
        exits.callback(shutil.rmtree, runtime)
        store = Path("/dev/shm") / f"vmdedup-demo-{os.getpid()}"
        exits.callback(shutil.rmtree, store, ignore_errors=True)
        os.environ["VMDEDUP_RUNTIME_DIR"] = str(runtime)
        os.environ["VMDEDUP_STORE_DIR"] = str(store)
        say("Four VMs boot; each fills memory, keeps checking it and rewrites some")
        vms = boot(exits)
        vmdedup("vms", vms)
        say("Merging, live")
        vmdedup("run", vms, "--until-converged", "--progress")
        say(f"The guests check their memory, {PASSES} whole passes each")
        require_unharmed(vms, "after the merge")
        vmdedup("verify", vms)
        say("A fresh process reads back from the kernel what is shared now")
        vmdedup("report", vms)
        vmdedup("explain", vms, "web")
        say("Unmerging: every page back on its own memory")
        vmdedup("unmerge", vms)
        require_unharmed(vms, "after the unmerge")
        say("Done: merged, reported, unmerged, and no guest found a wrong byte")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("demo interrupted; the VMs were ended") from None
    except (subprocess.CalledProcessError, GuestError, OSError) as error:
        raise SystemExit(f"demo failed: {error}") from error
