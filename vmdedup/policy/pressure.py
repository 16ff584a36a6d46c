"""Merge only while memory is short: ksmtuned's main control.

Pure. Owns the one decision whether merging is wanted at the memory available
now. Promises hysteresis: merging begins below the threshold and ends
only above threshold plus hysteresis. Refuses to read anything by itself.

ksmtuned starts KSM when free memory falls below KSM_THRES_COEF percent (20 by
default) of the host's, and stops it at once above that. Here the two edges
lie apart, because merged pages stay merged: merging raises the available
memory that the decision looks at.
"""

from __future__ import annotations

from vmdedup.errors import UsageError


def decide(
    active: bool,
    available_bytes: int,
    total_bytes: int,
    threshold_percent: int,
    hysteresis_percent: int,
) -> bool:
    """Whether to merge from now on, given whether we do (`active`).

    `available_bytes` and `total_bytes` are MemAvailable and MemTotal of the host
    (or limit less use, and limit, of a cgroup). Threshold 0 turns the policy off:
    always merge. Raises UsageError for values that no host has.
    """
    if total_bytes <= 0 or available_bytes < 0:
        raise UsageError(
            f"memory of {available_bytes} bytes available of {total_bytes} makes no sense"
        )
    if threshold_percent == 0:
        return True
    # In whole hundredths of bytes: no rounding, so both edges are exact.
    edge_percent = threshold_percent + (hysteresis_percent if active else 0)
    below = available_bytes * 100 < edge_percent * total_bytes
    on_upper_edge = active and available_bytes * 100 == edge_percent * total_bytes
    return below or on_upper_edge
