"""Trust domains: whose pages may share one store.

Pure. Pages of VMs in different domains never share, because a guest can detect
sharing by timing its writes: a side channel that tells it that another VM of the
domain has that page. By default the domain is the uid of the QEMU process. Rules
name domains for VMs that all run under one uid, as with libvirt. A VM's name comes
from its QEMU; its uid and its cgroup come from the kernel, so rules for QEMUs that
may lie should use these.
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
    """The VM's trust domain: that of the first rule that matches, otherwise `uid:<uid>`.

    A trust domain in the VM's own policy precedes the rules, but a rule that says
    NONE precedes both. May be ZERO_ONLY. Raises RefusedError if it must not be merged.
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

    One uid for all VMs (libvirt) does not tell which of them trust each other.
    """
    held: dict[str, list[str]] = {}
    for vm in vms:
        named = vm.policy.trust_domain is not None
        if not named and not any(rule.matches(vm.name, vm.uid, vm.cgroups) for rule in rules):
            held.setdefault(f"uid:{vm.uid}", []).append(vm.name)
    return {domain: names for domain, names in held.items() if len(names) > 1}
