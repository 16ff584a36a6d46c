"""Files given with -readconfig: what their sections are on a command line."""

from __future__ import annotations

import pytest

from vmdedup.attach.cmdline import qmp_monitors, share_folders, vm_name
from vmdedup.attach.config_file import UnreadConfigError, as_options, with_files

pytestmark = pytest.mark.unit

INCUS = """
# Machine
[machine]
type = "q35"
accel = "kvm"

[name]
guest = "web"

# Qemu control
[chardev "monitor"]
backend = "socket"
path = "/run/incus/web/qemu.monitor"
server = "on"
wait = "off"

[mon]
chardev = "monitor"
mode = "control"

[object "mem0"]
qom-type = "memory-backend-memfd"
size = "1024M"
share = "on"

[fsdev "config"]
fsdriver = "local"
security_model = "none"
readonly = "on"
path = "/var/lib/incus/a,b/config"
"""


def test_monitors_name_and_folders_of_a_file() -> None:
    arguments = ["qemu-system-x86_64", *as_options(INCUS), "-S"]
    assert vm_name(arguments) == "web"
    (monitor,) = qmp_monitors(arguments)
    assert (monitor.path, monitor.reason) == ("/run/incus/web/qemu.monitor", None)
    assert share_folders(arguments) == {"config": "/var/lib/incus/a,b/config"}


@pytest.mark.parametrize("option", ["-readconfig", "--readconfig"])
def test_a_file_stands_in_its_place_and_one_that_cannot_be_read_stays(option: str) -> None:
    def read(path: str) -> str:
        if path == "/lost":
            raise UnreadConfigError("cannot be read")
        return '[name]\n guest = "b"\n'

    words = ["-name", "a", option, "/there", option, "/lost", "-name", "c"]
    whole = with_files(words, read)
    named = ["-name", "a", "-name", "guest=b", "-readconfig", "/lost", "-name", "c"]
    assert whole.arguments == named
    assert whole.unread == "its configuration file /lost cannot be read"
    assert vm_name(with_files(words[:-2], read).arguments) == "b"
    assert with_files(["-name", "a"], read).unread is None


@pytest.mark.parametrize(
    "text",
    ["", "[", "[]", '["x"]', "no section = 1", '[a "b]\nc = "d"', "\0", '[a]\nb = c\n= "d"', "# x"],
)
def test_what_is_no_section_or_no_value_is_passed_over(text: str) -> None:
    assert as_options(text) in ([], ["-a", ""])
