"""Trust domains: who is in which, and that stores of two never meet."""

from __future__ import annotations

import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmdedup.attach.identity import VmIdentity
from vmdedup.core.rmap import FIRST_SLOT
from vmdedup.errors import RefusedError
from vmdedup.policy.domains import NONE, domain_of
from vmdedup.settings import DomainRule
from vmdedup.store.stable_store import StableStore
from vmdedup.units import PAGE_BYTES

pytestmark = pytest.mark.property

NAMES = st.sampled_from(["web-1", "web-2", "db", "*", ""])
PATTERNS = st.sampled_from(["*", "web-*", "db", "[", "?b"])
CGROUPS = st.lists(st.sampled_from(["/", "/machine.slice/web", "/user.slice"]), max_size=2)
DOMAINS = st.text(min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and "/" not in name and not name.startswith("uid:")
)
RULES = st.builds(
    DomainRule,
    name=PATTERNS,
    uid=st.none() | st.sampled_from([0, 107]),
    cgroup=st.none() | st.sampled_from(["/machine.slice/*", "/*", "/"]),
    domain=DOMAINS | st.just(NONE),
)
VMS = st.builds(
    VmIdentity,
    name=NAMES,
    pid=st.just(1),
    start_ticks=st.just(1),
    socket_path=st.none(),
    uid=st.sampled_from([0, 107, 108]),
    qemu_version=st.just((7, 2, 0)),
    excluded_thread_ids=st.just(frozenset[int]()),
    cgroups=CGROUPS.map(tuple),
)


def first_match(vm: VmIdentity, rules: list[DomainRule]) -> str:
    for rule in rules:
        named = fnmatchcase(vm.name, rule.name)
        owned = rule.uid is None or rule.uid == vm.uid
        grouped = rule.cgroup is None or any(fnmatchcase(c, rule.cgroup) for c in vm.cgroups)
        if named and owned and grouped:
            return rule.domain
    return f"uid:{vm.uid}"


@given(VMS, st.lists(RULES, max_size=5))
def test_the_first_rule_that_matches_in_everything_decides(
    vm: VmIdentity, rules: list[DomainRule]
) -> None:
    expected = first_match(vm, rules)
    if expected == NONE:
        with pytest.raises(RefusedError):
            domain_of(vm, rules)
    else:
        assert domain_of(vm, rules) == expected


@settings(max_examples=40)
@given(st.lists(st.tuples(DOMAINS, st.integers(1, 255)), min_size=1, max_size=8))
def test_a_store_holds_the_pages_of_its_domain_and_no_other(pages: list[tuple[str, int]]) -> None:
    """Any names, also such as a file system could take for one another."""
    expected: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="vmdedup-test-", dir="/dev/shm") as folder:
        directory = Path(folder) / "stores"
        for domain, byte in pages:
            with StableStore(directory, domain) as store:
                content = np.full((1, PAGE_BYTES), byte, dtype=np.uint8)
                store.publish(content, np.array([byte], dtype=np.uint64))
            expected[domain] = expected.get(domain, b"") + bytes([byte]) * PAGE_BYTES
        files = set()
        for domain, content_bytes in expected.items():
            with StableStore(directory, domain) as store:
                assert store.path.parent == directory
                assert store.path.read_bytes()[FIRST_SLOT * PAGE_BYTES :] == content_bytes
                files.add((store.device, store.inode))
        assert len(files) == len(expected)
