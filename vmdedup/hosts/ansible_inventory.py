"""Ansible's inventories: each host with its variables.

Owns the two forms, YAML and INI. Variables of groups count in YAML, with Ansible's order: the
host's own, then those of the innermost group; of groups as deep, the last by name. In INI they
are not looked at. Refuses what it does not understand, ranges of hosts among it, in one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmdedup.errors import UsageError, VmdedupError

Variables = dict[str, Any]

_Rank = tuple[int, str]
"""Of a variable's value: depth and name of the group that it is of. The highest one counts."""
_Ranked = dict[str, tuple[_Rank, Any]]

_MOST_ENTRIES = 100_000
"""Most groups and hosts: aliases make a few lines of YAML into endless ones."""
_MOST_DEEP = 20
_OF_HOST: _Rank = (_MOST_DEEP + 1, "")
_ALL = "all"
"""The group that each host is in."""
_GROUP = {"hosts", "vars", "children"}
_READ = ("ansible_", "vmdedup_")
"""How the variables begin that are looked at; an inventory may have any number of others."""


def from_ini(path: Path, text: str) -> dict[str, Variables]:
    """The hosts of an INI inventory: `name ansible_host=… ansible_user=… ansible_port=…`.

    Groups do not matter; a host may be in several. Raises UsageError.
    """
    hosts: dict[str, Variables] = {}
    is_hosts = True
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        if not words:
            continue
        if words[0].startswith("["):
            # [group:vars] and [group:children] have no hosts.
            is_hosts = not any(":" in word for word in words)
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

    Raises UsageError, and VmdedupError without PyYAML.
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
    hosts: dict[str, _Ranked] = {}
    whole = dict(_items(str(path), groups)).get(_ALL)
    everywhere = _vars(f"{path}: {_ALL}", whole, (0, _ALL))
    for number, (name, variables) in enumerate(_hosts_in(str(path), groups, everywhere)):
        if number > _MOST_ENTRIES:
            raise UsageError(f"{path}: over {_MOST_ENTRIES} hosts and groups")
        if name is not None:
            hosts[name] = _merged(hosts.get(name, {}), variables)
    return {
        name: {variable: value for variable, (_, value) in variables.items()}
        for name, variables in hosts.items()
    }


def _hosts_in(
    where: str, groups: Any, inherited: _Ranked, depth: int = 0
) -> Iterator[tuple[str | None, _Ranked]]:
    """Each host with the variables that it has here, and `None` for each group."""
    if depth == _MOST_DEEP:
        raise UsageError(f"{where}: over {_MOST_DEEP} groups in one another")
    for group, content in _items(where, groups):
        here = f"{where}: {group}"
        if unknown := dict(_items(here, content)).keys() - _GROUP:
            raise UsageError(f"{here}: {min(unknown)}: a group has hosts, vars and children")
        rank = (0 if group == _ALL else depth + 1, group)
        own = _merged(inherited, _vars(here, content, rank))
        yield None, own
        parts = content or {}
        for name, variables in _items(f"{here}: hosts", parts.get("hosts")):
            if "[" in name:
                raise UsageError(f"{here}: {name}: ranges of hosts are not understood")
            yield name, _merged(own, _ranked(f"{here}: hosts: {name}", variables, _OF_HOST))
        yield from _hosts_in(f"{here}: children", parts.get("children"), own, depth + 1)


def _vars(where: str, group: Any, rank: _Rank) -> _Ranked:
    """What a group says of its hosts."""
    return _ranked(f"{where}: vars", dict(_items(where, group)).get("vars"), rank)


def _ranked(where: str, variables: Any, rank: _Rank) -> _Ranked:
    """The variables that are looked at; one without a value is none."""
    return {
        name: (rank, value)
        for name, value in _items(where, variables)
        if value is not None and name.startswith(_READ)
    }


def _merged(one: _Ranked, other: _Ranked) -> _Ranked:
    """Of each variable the value of the higher rank; of equal ones the other's."""
    merged = dict(one)
    for name, value in other.items():
        merged[name] = max(value, merged.get(name, value), key=lambda it: it[0])
    return merged


def _items(where: str, mapping: Any) -> list[tuple[str, Any]]:
    if not isinstance(mapping, dict | None):
        raise UsageError(f"{where}: not a mapping, as Ansible has it")
    return [(str(name), value) for name, value in (mapping or {}).items()]
