"""What a domain's XML says: the element behind a finding, and the policy in it."""

from __future__ import annotations

import pytest

from vmdedup.attach.identity import VmIdentity, VmPolicy
from vmdedup.attach.libvirt.domain_xml import DomainWords, parse_policy
from vmdedup.attach.libvirt.link import LibvirtLink
from vmdedup.errors import RefusedError, UsageError
from vmdedup.policy.domains import crowded_default_domains, domain_of
from vmdedup.settings import DomainRule

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("xml", "key", "element"),
    [
        (
            "<devices><hostdev mode='subsystem' type='pci'/></devices>",
            "pinned-device",
            "<hostdev mode='subsystem' type='pci'>",
        ),
        (
            "<devices><interface type='vdpa'/></devices>",
            "pinned-device",
            "<interface type='vdpa'>",
        ),
        (
            "<devices><interface type='bridge'/><interface type='vhostuser'/></devices>",
            "vhost-user",
            "<interface type='vhostuser'>",
        ),
        (
            "<devices><filesystem type='mount'><driver type='virtiofs'/></filesystem></devices>",
            "other-mapper",
            "<filesystem><driver type='virtiofs'/>",
        ),
        (
            "<devices><memballoon model='virtio' freePageReporting='on'/></devices>",
            "free-page-reporting",
            "<memballoon freePageReporting='on' model='virtio'>",
        ),
        (
            "<devices><video><model type='virtio' blob='on'/></video></devices>",
            "gpu-blob",
            "<video><model blob='on' type='virtio'/>",
        ),
        ("<devices><memory model='virtio-mem'/></devices>", "virtio-mem", "<memory model="),
        (
            "<memoryBacking><allocation mode='immediate'/></memoryBacking>",
            "preallocated",
            "<allocation mode='immediate'>",
        ),
        ("<launchSecurity type='sev'/>", "confidential", "<launchSecurity type='sev'>"),
    ],
)
def test_a_finding_is_told_by_its_element(xml: str, key: str, element: str) -> None:
    told = DomainWords(f"<domain>{xml}</domain>").tell(key, "why")
    assert told.startswith("why (in the domain XML: ")
    assert element in told


@pytest.mark.parametrize(
    ("reason", "inside", "element"),
    [
        ("merge=off", "<nosharepages/>", "<memoryBacking><nosharepages/>"),
        ("huge pages of 2048 KiB", "<hugepages/>", "<memoryBacking><hugepages/>"),
        ("locked memory (…)", "<locked/>", "<memoryBacking><locked/>"),
        (
            "prealloc=on keeps",
            "<allocation mode='immediate'/>",
            "<memoryBacking><allocation mode='immediate'/>",
        ),
    ],
)
def test_a_backends_refusal_is_told_by_its_element(reason: str, inside: str, element: str) -> None:
    words = DomainWords(f"<domain><memoryBacking>{inside}</memoryBacking></domain>")
    assert words.element_of("", reason) == element
    assert DomainWords("<domain/>").tell("", reason) == reason


def test_what_no_element_stands_behind_is_told_as_it_is() -> None:
    words = DomainWords("<domain><devices><memballoon model='virtio'/></devices></domain>")
    assert words.tell("free-page-reporting", "why") == "why"
    assert words.tell("debugger", "why") == "why"
    with pytest.raises(ValueError, match="XML"):
        DomainWords("<domain>")


@pytest.mark.parametrize(
    ("xml", "policy"),
    [
        (None, VmPolicy()),
        ("<policy/>", VmPolicy()),
        ("<policy trust-domain='shop' priority='-3'/>", VmPolicy("shop", False, -3)),
        (
            "<v:policy xmlns:v='urn:vmdedup:policy:1' exclude='yes'/>",
            VmPolicy(exclude=True),
        ),
        ("<policy trust-domain='zero-only'/>", VmPolicy("zero-only")),
        ("<policy cold='never'/>", VmPolicy(cold_never=True)),
        ("<policy cold='auto' priority='7'/>", VmPolicy(priority=7)),
    ],
)
def test_a_policy_is_read(xml: str | None, policy: VmPolicy) -> None:
    assert parse_policy(xml) == policy


@pytest.mark.parametrize(
    ("xml", "named"),
    [
        ("<policy trust-domian='shop'/>", "trust-domian"),
        ("<policy exclude='perhaps'/>", "perhaps"),
        ("<policy priority='high'/>", "priority"),
        ("<policy cold='often'/>", "often"),
        ("<policy priority='99999'/>", "priority"),
        ("<policy trust-domain='a/b'/>", "trust-domain"),
        ("<policy trust-domain='uid:0'/>", "trust-domain"),
        ("<other/>", "other"),
        ("<policy", "XML"),
    ],
)
def test_a_policy_that_is_not_understood_excludes_and_says_why(xml: str, named: str) -> None:
    found = parse_policy(xml)
    assert found.exclude
    assert found.problem is not None
    assert named in found.problem


NO_POLICY = VmPolicy()


def _vm(name: str, policy: VmPolicy = NO_POLICY) -> VmIdentity:
    return VmIdentity(name, 1, 1, None, 64055, (7, 2, 0), frozenset(), policy=policy)


def test_the_metadata_come_before_the_rules_but_none_before_both() -> None:
    rules = (DomainRule(name="web*", domain="web"), DomainRule(name="no*", domain="none"))
    assert domain_of(_vm("web1", VmPolicy("shop")), rules) == "shop"
    assert domain_of(_vm("web1"), rules) == "web"
    assert domain_of(_vm("db", VmPolicy("shop")), rules) == "shop"
    for vm in (
        _vm("no1", VmPolicy("shop")),
        _vm("a", VmPolicy("none")),
        _vm("a", VmPolicy("", True)),
    ):
        with pytest.raises(RefusedError):
            domain_of(vm, rules)


def test_domains_that_only_their_uid_joins_are_warned_of() -> None:
    vms = [_vm("a"), _vm("b"), _vm("c", VmPolicy("shop")), _vm("web1")]
    rules = (DomainRule(name="web*", domain="web"),)
    assert crowded_default_domains(vms, rules) == {"uid:64055": ["a", "b"]}


@pytest.mark.parametrize("uri", ["qemu+ssh://elsewhere/system", "test:///default", "lxc:///"])
def test_only_a_qemu_libvirt_of_this_host_is_taken(uri: str) -> None:
    with pytest.raises(UsageError, match="libvirt URI"):
        LibvirtLink(uri)
