"""The list of hosts: a TOML file, or an inventory as Ansible has it (YAML or INI).

Owns the files' rules; `ansible_inventory` reads Ansible's. Promises that each host has a name
of its own: a second one of a name is kept as a row that says so. Refuses what it does not
understand, in one line that names it.
"""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vmdedup.client import require_url
from vmdedup.errors import UsageError
from vmdedup.hosts.ansible_inventory import Variables, from_ini, from_yaml
from vmdedup.ssh import SCHEME, is_remote

_MOST_HOSTS = 10_000
_MOST_BYTES = 16 << 20

Patterns = Annotated[list[str], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HostEntry(_Strict):
    """One host: `url` is `ssh://[user@]host[:port]`, `https://host[:port]`, or a socket's path."""

    name: str = Field(min_length=1, max_length=256)
    url: str = Field(min_length=1, max_length=4096)
    ram_gib: float | None = Field(default=None, gt=0, description="memory for VMs, GiB")
    headroom_percent: float = Field(default=10, ge=0, lt=100, description="part of it left free")
    max_vms: int | None = Field(default=None, ge=0)

    @property
    def room_bytes(self) -> float:
        """Memory that VMs may take if nothing were shared; infinite if it is not said."""
        if self.ram_gib is None:
            return float("inf")
        return self.ram_gib * (1 << 30) * (1 - self.headroom_percent / 100)


class Inventory(_Strict):
    """The hosts, and which VMs must or must not be on one host, by patterns of their names."""

    hosts: list[HostEntry] = Field(min_length=1, max_length=_MOST_HOSTS)
    together: list[Patterns] = []
    apart: list[Patterns] = []

    def again(self) -> set[int]:
        """Numbers of the hosts whose name another one before them has."""
        first: dict[str, int] = {}
        return {
            number
            for number, host in enumerate(self.hosts)
            if first.setdefault(host.name, number) != number
        }


def read_inventory(path: Path) -> Inventory:
    """The inventory in a file, TOML or YAML by its ending, otherwise INI. Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"{path}: over {_MOST_BYTES >> 20} MiB: not a list of hosts")
        found = Inventory.model_validate(_parsed(path, content.decode()))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise UsageError(f"{path}: {where}: {problem['msg']}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: too many values in one another") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    for host in found.hosts:
        try:
            if is_remote(host.url):
                require_url(host.url)
        except UsageError as error:
            raise UsageError(f"{path}: host {host.name}: {error}") from error
    return found


def _parsed(path: Path, text: str) -> dict[str, Any]:
    """Raises UsageError, ValueError."""
    if path.suffix == ".toml":
        return tomllib.loads(text)
    variables = from_yaml(path, text) if path.suffix in (".yml", ".yaml") else from_ini(path, text)
    return {"hosts": [_entry(name, values) for name, values in variables.items()]}


def _entry(name: str, variables: Variables) -> dict[str, Any]:
    """A host by its variables: `ansible_host`, `_user`, `_port`, and ours with `vmdedup_`."""
    user = f"{variables['ansible_user']}@" if "ansible_user" in variables else ""
    port = f":{variables['ansible_port']}" if "ansible_port" in variables else ""
    host = str(variables.get("ansible_host", name))
    if host.count(":") > 1 and "[" not in host:
        host = f"[{host}]"  # an address of IPv6
    entry = {"name": name, "url": f"{SCHEME}{user}{host}{port}"}
    for key in HostEntry.model_fields.keys() - {"name"}:
        if f"vmdedup_{key}" in variables:  # a role may have others
            entry[key] = variables[f"vmdedup_{key}"]
    return entry


def matches(patterns: list[str], name: str) -> bool:
    """Whether any of the patterns is one for this name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
