"""Trust domains: whose pages may share one store.

Pure. Pages of VMs in different domains never share, because who can measure
the time of a write can tell that a page was shared (a side channel: he learns
that somebody else in the domain has that page). By default the domain is the
uid of the QEMU process; rules give names to VMs where one uid runs them all, as
under libvirt. A VM's name is what its QEMU says; its uid and its cgroup are what the
kernel says, and so what to tell VMs apart by whose QEMU may lie.
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

    A trust domain in the VM's own policy comes before the rules, but a rule that says
    NONE before both. May be ZERO_ONLY. RefusedError where it must not be merged.
    """
    own = vm.policy
    if own.exclude or own.trust_domain == NONE:
        reason = own.problem or "excluded by the policy in its metadata"
        raise RefusedError(vm.name, reason, pid=vm.pid, key="domain")
    for rule in rules:
        if rule.matches(vm.name, vm.uid, vm.cgroups):
            if rule.domain == NONE:
                reason = "trust domain none: never merged"
                raise RefusedError(vm.name, reason, pid=vm.pid, key="domain")
            return own.trust_domain or rule.domain
    return own.trust_domain or f"uid:{vm.uid}"


def crowded_default_domains(
    vms: Iterable[VmIdentity], rules: Sequence[DomainRule] = ()
) -> dict[str, list[str]]:
    """Default domains that hold several VMs, with their names: worth a warning.

    One uid for all VMs (libvirt) says nothing about who trusts whom.
    """
    held: dict[str, list[str]] = {}
    for vm in vms:
        named = vm.policy.trust_domain is not None
        if not named and not any(rule.matches(vm.name, vm.uid, vm.cgroups) for rule in rules):
            held.setdefault(f"uid:{vm.uid}", []).append(vm.name)
    return {domain: names for domain, names in held.items() if len(names) > 1}
