"""Ansible's inventories: each host with its variables.

Owns the two forms, YAML and INI. Variables of groups count in YAML, where a host has those of the
groups around it; in INI they are not looked at. Refuses what it does not understand, ranges of
hosts among it, in one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmdedup.errors import UsageError, VmdedupError

Variables = dict[str, Any]

_MOST_ENTRIES = 100_000
"""Most groups and hosts: aliases make a few lines of YAML into endless ones."""
_MOST_DEEP = 20
_GROUP = {"hosts", "vars", "children"}


def from_ini(path: Path, text: str) -> dict[str, Variables]:
    """The hosts of an INI inventory: `name ansible_host=… ansible_user=… ansible_port=…`.

    Groups do not matter; a host may be in several. Raises UsageError, ValueError.
    """
    hosts: dict[str, Variables] = {}
    is_hosts = True
    for number, line in enumerate(text.splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0].startswith("["):
            is_hosts = ":" not in words[0]  # [group:vars] and [group:children] have no hosts
            continue
        if not is_hosts:
            continue
        name, *pairs = words
        if "[" in name:
            raise UsageError(f"{path}:{number}: {name}: ranges of hosts are not understood")
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        hosts.setdefault(name, {}).update(values)
    return hosts


def from_yaml(path: Path, text: str) -> dict[str, Variables]:
    """The hosts of a YAML inventory: groups of `hosts`, `vars` and `children`.

    Of a host in several groups, the variables of the last one count. Raises UsageError, and
    VmdedupError without PyYAML.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise VmdedupError(
            f"{path}: reading YAML needs PyYAML: pip install 'vmdedup[fleet]'"
        ) from error
    try:
        groups = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    hosts: dict[str, Variables] = {}
    for number, (name, variables) in enumerate(_hosts_in(str(path), groups, {})):
        if number > _MOST_ENTRIES:
            raise UsageError(f"{path}: over {_MOST_ENTRIES} hosts and groups")
        if name is not None:
            hosts.setdefault(name, {}).update(variables)
    return hosts


def _hosts_in(
    where: str, groups: Any, inherited: Variables, depth: int = 0
) -> Iterator[tuple[str | None, Variables]]:
    """Each host with all its variables, and `None` for each group."""
    if depth == _MOST_DEEP:
        raise UsageError(f"{where}: over {_MOST_DEEP} groups in one another")
    for group, content in _items(where, groups):
        here = f"{where}: {group}"
        if unknown := dict(_items(here, content)).keys() - _GROUP:
            raise UsageError(f"{here}: {min(unknown)}: a group has hosts, vars and children")
        parts = content or {}
        own = inherited | dict(_items(f"{here}: vars", parts.get("vars")))
        yield None, own
        for name, variables in _items(f"{here}: hosts", parts.get("hosts")):
            if "[" in name:
                raise UsageError(f"{here}: {name}: ranges of hosts are not understood")
            yield name, own | dict(_items(f"{here}: hosts: {name}", variables))
        yield from _hosts_in(f"{here}: children", parts.get("children"), own, depth + 1)


def _items(where: str, mapping: Any) -> list[tuple[str, Any]]:
    if not isinstance(mapping, dict | None):
        raise UsageError(f"{where}: not a mapping, as Ansible has it")
    return [(str(name), value) for name, value in (mapping or {}).items()]
