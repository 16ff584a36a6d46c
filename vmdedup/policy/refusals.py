"""The kinds of reason for not merging a VM: a fixed set, for labels and filters.

Imports nothing: the API server needs these names and not the table behind them.
`policy.hazards` has a row of the same key for each but the last five.
"""

from __future__ import annotations

REFUSALS = (
    "balloon-without-file",
    "pinned-device",
    "vhost-user",
    "other-mapper",
    "second-mapping",
    "pinned-drive",
    "gpu-blob",
    "9p-remote",
    "pinned-memory",
    "registered-buffers",
    "confidential",
    "nested",
    "record-replay",
    "colo",
    "debugger",
    "shadow-stack",
    "seccomp",
    "ignore-shared",
    "own-userfault",
    "userfault-in-use",
    "migration",
    "halted",
    "kernel-ksm",
    "virtio-mem",
    "preallocated",
    "hv-balloon",
    "persistent-memory",
    "ivshmem",
    "backend-nature",
    "domain",
    "no-memory",
    "unreachable",
    "other-engine",
    "other",
)
"""`domain`: the VM's trust domain is `none`; `no-memory`: none of its memory may be merged;
`unreachable`: it cannot be attached to; `other-engine`: another vmdedup works on it, or with
its domain's store."""
