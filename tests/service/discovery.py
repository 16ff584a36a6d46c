"""A daemon that is told of no socket finds the VMs of its host; run in a namespace of its own.

Run as a program by test_access.py: whatever QEMU the machine has besides must not be
touched by a test. Prints one line when all went well, else fails.
"""

from __future__ import annotations

from contextlib import ExitStack

from tests.harness.kernel import becomes_true
from tests.harness.vm import Vm
from tests.service.conftest import PRIVATE, QUIET, SHARED
from tests.service.daemon import Directories, assert_unharmed, merged, running


def main() -> None:
    """Two VMs before the daemon, one after, one that ends."""
    with ExitStack() as exits:
        directories = exits.enter_context(Directories())

        def start(seed: int) -> Vm:
            backend = PRIVATE if seed % 2 else SHARED
            parameters = {"seed": seed, **QUIET}
            vm = Vm("bare", name=f"vm{seed}", backend=backend, parameters=parameters)
            exits.callback(vm.close)
            vm.wait_ready()
            return vm

        vms = [start(1), start(2)]
        daemon = exits.enter_context(running(directories))
        assert becomes_true(lambda: daemon.names() == {"vm1", "vm2"}, 30), daemon.names()
        merged(daemon, *vms)
        vms.append(start(3))
        assert becomes_true(lambda: daemon.names() == {"vm1", "vm2", "vm3"}, 30), daemon.names()
        merged(daemon, *vms)
        vms.pop(0).kill()
        assert becomes_true(lambda: daemon.names() == {"vm2", "vm3"}, 30), daemon.names()
        assert_unharmed(*vms)
        daemon.end()
    print("found, merged, followed")


if __name__ == "__main__":
    main()
