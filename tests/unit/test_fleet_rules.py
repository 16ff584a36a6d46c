"""A plan's groups as rules: what each product's own schema or parser says of them.

Kubernetes' schemas come from a package. Those of Proxmox VE and nova do not; what their sources
demand stands here in our words, with the place it is from.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from typing import Any

import pytest

from tests.harness.skips import require
from vmdedup.hosts.documents import Group, GroupedVm
from vmdedup.hosts.rules import as_rules

pytestmark = pytest.mark.unit

THERE = "/var/run/qemu-server/{}.qmp"


def groups(*monitors: str | None) -> list[Group]:
    vms = [GroupedVm(vm=f"vm{n}\n", qmp=qmp) for n, qmp in enumerate(monitors)]
    return [Group(host="a", vms=vms)]


def test_rules_for_kubevirt_are_a_pods_by_kubernetes_schema() -> None:
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    lines = as_rules(groups(None, None), "kubevirt").splitlines()
    patches = [json.loads(line) for line in lines if not line.startswith("#")]
    assert len(patches) == len(lines) / 2 == 2
    for patch in patches:
        template = patch["spec"]["template"]
        pod: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **template["metadata"]},
            "spec": {**template["spec"], "containers": [{"name": "x", "image": "x"}]},
        }
        kubernetes_validate.validate(pod, "1.30", strict=True)
        (preferred,) = pod["spec"]["affinity"]["podAffinity"].values()
        selector = preferred[0]["podAffinityTerm"]["labelSelector"]["matchLabels"]
        assert selector.items() <= pod["metadata"]["labels"].items()


def parsed_as_proxmox(text: str) -> dict[str, dict[str, str]]:
    """The rules by their id, as Proxmox VE 9 reads `rules.cfg`.

    pve-common, PVE/SectionConfig.pm (parse_config): `#` lines are no lines; an empty one ends a
    section; `word value` lines, indented or not, are its properties.
    pve-ha-manager, PVE/HA/Rules.pm (parse_section_header): `TYPE: ID`, where the id is a
    pve-configid, PVE/JSONSchema.pm; resources are ids as in PVE/HA/Tools.pm.
    """
    rules: dict[str, dict[str, str]] = {}
    section: dict[str, str] | None = None
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        if not line.strip():
            section = None
        elif section is None:
            header = re.fullmatch(r"(\S+):\s*(\S+)\s*", line)
            assert header, line
            assert header[1] == "resource-affinity"
            assert re.fullmatch(r"(?i)[a-z][a-z0-9_-]+", header[2])
            assert header[2] not in rules
            section = rules[header[2]] = {}
        else:
            name, value = re.fullmatch(r"\s*(\S+)\s+(.*\S)\s*", line).groups()  # type: ignore[union-attr]
            assert name not in section
            section[name] = value
    for rule in rules.values():
        # PVE/HA/Rules/ResourceAffinity.pm: both properties are needed, and two resources.
        assert rule.keys() == {"affinity", "resources"}
        assert rule["affinity"] in ("positive", "negative")
        ids = rule["resources"].split(",")
        assert len(set(ids)) == len(ids) >= 2
        for each in ids:
            # PVE/JSONSchema.pm (pve-vmid) has 100 to 999999999.
            assert re.fullmatch(r"vm:[1-9][0-9]{2,8}", each)
    return rules


def test_rules_for_proxmox_have_the_vmids_that_are_known() -> None:
    text = as_rules(groups(THERE.format(101), None, THERE.format(100)), "proxmox")
    assert text == (
        "# no VMID known: vm1?\nresource-affinity: vmdedup-1\n\taffinity positive\n"
        "\tresources vm:100,vm:101\n\n"
    )
    several = [
        *groups(THERE.format(101), None, THERE.format(100)),
        *groups(None, THERE.format(7000)),
        *groups(THERE.format(200), THERE.format(999999999)),
        *groups(THERE.format("099"), THERE.format(300)),
    ]
    found = parsed_as_proxmox(as_rules(several, "proxmox"))
    assert {name: rule["resources"] for name, rule in found.items()} == {
        "vmdedup-1": "vm:100,vm:101",
        "vmdedup-3": "vm:200,vm:999999999",
    }


NOVA_GROUP: dict[str, Any] = {
    "type": "object",
    "required": ["name", "policies"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^\S(.*\S)?$"},
        "policies": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {"enum": ["anti-affinity", "affinity", "soft-anti-affinity", "soft-affinity"]},
        },
    },
}
"""A new server group from microversion 2.15 on; before it there are no soft policies.

nova/api/openstack/compute/schemas/server_groups.py"""


def test_rules_for_nova_are_groups_that_it_knows() -> None:
    require(None if importlib.util.find_spec("jsonschema") else "jsonschema is not installed")
    jsonschema = importlib.import_module("jsonschema")
    text = as_rules(groups(None, None) * 2, "nova")
    assert "# vm0?, vm1?" in text
    commands = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    assert len(commands) == 2
    for number, words in enumerate(commands, 1):
        openstack, version, *verb, policy_option, policy, name = words
        assert (openstack, verb) == ("openstack", ["server", "group", "create"])
        assert policy_option == "--policy"
        assert (name, policy) == (f"vmdedup-{number}", "soft-affinity")
        jsonschema.validate({"name": name, "policies": [policy]}, NOVA_GROUP)
        microversion = re.fullmatch(r"--os-compute-api-version=2\.(\d+)", version)
        assert microversion
        # From 2.64 on it is `policy`, and the client sends that by itself.
        assert 15 <= int(microversion[1]) < 64
        # nova/api/openstack/compute/schemas/scheduler_hints.py: at most 255 characters.
        assert f"--hint group=ID-OF-{name} " in text
