"""`vmdedup verify`: is every merged page still what was published, and nothing left over?"""

from __future__ import annotations

from vmdedup.cli.options import AsJson, Domains, Qmp, make_settings
from vmdedup.cli.outcome import FAILURE, finish, refusals, require_any


def verify(qmp: Qmp = None, domains: Domains = None, as_json: AsJson = False) -> int:
    """Check merged pages against their checksums; look for leftovers.

    Every merged page must be what was published; exit code 1 when one is not.
    """
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(make_settings(domains=domains)) as dedup:
        found = dedup.attach(qmp or (), merging=False)
        require_any(found)
        checked = dedup.verify()
    from vmdedup.report.text import show_verification

    code = finish(
        checked,
        show_verification,
        as_json=as_json,
        served=bool(checked.vms),
        complaints=refusals(found),
    )
    return code if checked.ok else FAILURE
