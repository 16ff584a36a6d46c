"""A plan's groups in the words of what starts VMs: Proxmox VE, KubeVirt, OpenStack nova.

Owns the three forms. Promises rules that only prefer, where the product can prefer; Proxmox VE's
positive affinity binds. Refuses nothing: VMs whose id the product needs and that is not known
are named in a comment.

    proxmox   sections for /etc/pve/ha/rules.cfg (Proxmox VE 9), by the VMID in the monitor's path
    kubevirt  a patch of each VirtualMachine: a label, and a preferred pod affinity to it
    nova      a server group with the policy soft-affinity, which microversion 2.15 has first, and
              the hint for `server create`
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from vmdedup.hosts.documents import Group

_LABEL = "vmdedup/alike"
_VMID = re.compile(r"/([1-9][0-9]{2,8})\.qmp$")


def as_rules(groups: Sequence[Group], form: str) -> str:
    """The groups in this form, ending in a newline."""
    write = {"proxmox": _proxmox, "kubevirt": _kubevirt, "nova": _nova}[form]
    return "".join(write(number, group) for number, group in enumerate(groups, 1)) or "\n"


def _proxmox(number: int, group: Group) -> str:
    ids = []
    unknown = []
    for vm in group.vms:
        found = _VMID.search(vm.qmp or "")
        ids += [f"vm:{found[1]}"] if found else []
        unknown += [] if found else [_plain(vm.vm)]
    lines = [f"# no VMID known: {', '.join(unknown)}"] if unknown else []
    if len(ids) > 1:
        lines += [
            f"resource-affinity: vmdedup-{number}",
            "\taffinity positive",
            f"\tresources {','.join(sorted(ids))}",
        ]
    return "\n".join(lines) + "\n\n"


def _kubevirt(number: int, group: Group) -> str:
    labels = {_LABEL: f"group-{number}"}
    patch = {
        "spec": {
            "template": {
                "metadata": {"labels": labels},
                "spec": {"affinity": {"podAffinity": preferred_affinity(labels)}},
            }
        }
    }
    return "".join(
        f"# {_plain(vm.vm)}: kubectl patch vm NAME --type merge -p '…'\n{json.dumps(patch)}\n"
        for vm in group.vms
    )


def preferred_affinity(labels: dict[str, str]) -> dict[str, Any]:
    """The pod affinity that prefers nodes with pods of these labels."""
    term = {
        "labelSelector": {"matchLabels": labels},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "podAffinityTerm": term}
        ]
    }


def _nova(number: int, group: Group) -> str:
    names = ", ".join(_plain(vm.vm) for vm in group.vms)
    return (
        f"# {names}\n"
        "openstack --os-compute-api-version=2.15 server group create"
        f" --policy soft-affinity vmdedup-{number}\n"
        f"# then: openstack server create --hint group=ID-OF-vmdedup-{number} …\n"
    )


def _plain(text: str) -> str:
    """A VM's name on one line of a comment."""
    return "".join(c if c.isprintable() else "?" for c in text)
