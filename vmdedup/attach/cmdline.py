"""QEMU command lines: the monitors and the name that they configure.

Pure: takes the arguments, returns values. Knows the option syntax of QEMU
(docs/system/invocation; commas are doubled inside values) and the spellings of
a QMP monitor. Returns a monitor that vmdedup cannot use with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_LIBVIRTS_DEVICE = "charmonitor"
"""Id of the character device over which libvirt talks to QEMU (src/qemu/qemu_command.c)."""


@dataclass(frozen=True)
class MonitorOption:
    """One QMP monitor of a command line: its socket's path, or why vmdedup cannot use it."""

    path: str | None
    reason: str | None = None
    device_id: str | None = None
    """Id of its character device, `None` if it was given none."""


def split_options(text: str) -> dict[str, str]:
    """`a,b=c,d=x,,y` as {"": "a", "b": "c", "d": "x,y"}; later words without `=` are `on`."""
    fields: dict[str, str] = {}
    for index, word in enumerate(_fields(text)):
        key, equals, value = word.partition("=")
        if equals:
            fields[key] = value
        elif index == 0:
            fields[""] = word
        else:
            fields[word] = "on"
    return fields


def _fields(text: str) -> Iterator[str]:
    """Fields between single commas, with doubled commas undone."""
    field, position = "", 0
    while position < len(text):
        if text[position] != ",":
            field += text[position]
        elif text[position + 1 : position + 2] == ",":
            field += ","
            position += 1
        else:
            yield field
            field = ""
        position += 1
    yield field


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option without dashes, its argument) for every option that has an argument."""
    for option, value in itertools.pairwise(arguments):
        if option.startswith("-"):
            yield option.lstrip("-"), value


def vm_name(arguments: Sequence[str]) -> str | None:
    """The VM's name from `-name`; `None` when there is none."""
    name = None
    for option, value in _options(arguments):
        if option == "name":
            fields = split_options(value)
            name = fields.get("guest") or fields.get("") or name
    return name


def qmp_monitors(arguments: Sequence[str]) -> list[MonitorOption]:
    """Every QMP monitor on the command line, in order."""
    devices = _devices(arguments)
    found: list[MonitorOption] = []
    for option, value in _options(arguments):
        if option in ("qmp", "qmp-pretty"):
            if value.startswith("chardev:"):
                found.append(_of_device(devices.get(value.removeprefix("chardev:"))))
            else:
                found.append(_of_legacy(value))
        elif option == "mon":
            fields = split_options(value)
            if fields.get("mode") == "control":
                found.append(_of_device(devices.get(fields.get("chardev", fields.get("", "")))))
    return found


def human_monitors(arguments: Sequence[str]) -> list[str]:
    """Every human monitor on the command line, in order: `unix:PATH`, `tcp:HOST:PORT`, `stdio`…"""
    devices = _devices(arguments)
    found: list[str] = []
    for option, value in _options(arguments):
        if option == "monitor" and value not in ("none", "null"):
            name = value.removeprefix("chardev:")
            found.append(_where(devices, name) if name != value else value.partition(",")[0])
        elif option == "mon":
            fields = split_options(value)
            if fields.get("mode", "readline") == "readline":
                found.append(_where(devices, fields.get("chardev", fields.get("", ""))))
        elif option == "serial" and value.startswith("mon:"):
            found.append(value.partition(",")[0])
    return found


def _where(devices: Mapping[str, Mapping[str, str]], name: str) -> str:
    fields = devices.get(name, {})
    return f"unix:{fields['path']}" if "path" in fields else fields.get("", name)


def network_ids(arguments: Sequence[str]) -> list[str]:
    """Ids of the network backends (`-netdev`)."""
    return [
        split_options(value).get("id", "")
        for name, value in _options(arguments)
        if name == "netdev"
    ]


def _devices(arguments: Sequence[str]) -> dict[str, dict[str, str]]:
    """The character devices, by their ids."""
    return {
        fields["id"]: fields
        for option, value in _options(arguments)
        if option == "chardev" and "id" in (fields := split_options(value))
    }


def _of_legacy(text: str) -> MonitorOption:
    """The monitor that `unix:PATH,server=on,wait=off` and its relatives describe."""
    kind, colon, _ = text.partition(":")
    fields = split_options(text)
    if colon and kind == "unix":
        return _socket({**fields, "path": fields.get("", "").removeprefix("unix:")})
    return MonitorOption(None, f"its QMP monitor is not a unix socket ({kind})")


def _of_device(fields: dict[str, str] | None) -> MonitorOption:
    if fields is None:
        return MonitorOption(None, "its QMP monitor names no character device")
    if fields.get("") != "socket" and fields.get("backend") != "socket":
        return MonitorOption(None, f"its QMP monitor is not a unix socket ({fields.get('', '?')})")
    return _socket(fields)


def _socket(fields: dict[str, str]) -> MonitorOption:
    if "fd" in fields:
        whose = "was handed over as a descriptor (managed by another program)"
        if fields.get("id") == _LIBVIRTS_DEVICE:
            whose = "is libvirt's: name that libvirt (--libvirt URI, or [libvirt] uri)"
        return MonitorOption(None, f"its QMP monitor {whose}")
    if "path" not in fields or not fields["path"]:
        return MonitorOption(None, "its QMP monitor is not a unix socket (TCP)")
    if fields.get("abstract") == "on":
        return MonitorOption(None, "its QMP monitor is an abstract socket")
    if fields.get("server", "off") not in ("on", "yes", "true", "y"):
        return MonitorOption(None, "its QMP monitor connects out instead of listening")
    return MonitorOption(fields["path"], device_id=fields.get("id"))


def share_folders(arguments: Sequence[str]) -> dict[str, str]:
    """Folders that 9p exports to the guest (`-fsdev`, `-virtfs`), by the id that devices name.

    Only the driver `local` counts.
    """
    found = {}
    for option, value in _options(arguments):
        if option in ("fsdev", "virtfs"):
            fields = split_options(value)
            # softmmu/vl.c: QEMU knows a virtfs without an id by its tag
            name = fields.get("id") or fields.get("mount_tag")
            kind = fields.get("") or fields.get("fsdriver")
            if name and kind == "local" and "path" in fields:
                found[name] = fields["path"]
    return found
