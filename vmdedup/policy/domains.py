"""Trust domains: whose pages may share one store.

Pure. Pages of VMs in different domains never share, because who can measure
the time of a write can tell that a page was shared (a side channel: he learns
that somebody else in the domain has that page). By default the domain is the
uid of the QEMU process; rules give names to VMs where one uid runs them all, as
under libvirt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmdedup.attach.identity import VmIdentity
from vmdedup.errors import RefusedError
from vmdedup.settings import DomainRule

NONE = "none"
"""Domain of a rule: these VMs are never merged."""
ZERO_ONLY = "zero-only"
"""Domain of a rule: only zero pages are merged, which needs no store and shares nothing."""


def domain_of(vm: VmIdentity, rules: Sequence[DomainRule] = ()) -> str:
    """The VM's trust domain: that of the first rule that matches, else `uid:<uid>`.

    May be ZERO_ONLY. RefusedError where the rule says NONE.
    """
    for rule in rules:
        if rule.matches(vm.name, vm.uid):
            if rule.domain == NONE:
                raise RefusedError(vm.name, "trust domain none: never merged", pid=vm.pid)
            return rule.domain
    return f"uid:{vm.uid}"


def crowded_default_domains(
    vms: Iterable[VmIdentity], rules: Sequence[DomainRule] = ()
) -> dict[str, list[str]]:
    """Default domains that hold several VMs, with their names: worth a warning.

    One uid for all VMs (libvirt) says nothing about who trusts whom.
    """
    held: dict[str, list[str]] = {}
    for vm in vms:
        if not any(rule.matches(vm.name, vm.uid) for rule in rules):
            held.setdefault(f"uid:{vm.uid}", []).append(vm.name)
    return {domain: names for domain, names in held.items() if len(names) > 1}
