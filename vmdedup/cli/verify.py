"""`vmdedup verify`: is every merged page still what was published, and nothing left over?"""

from __future__ import annotations

from typing import Annotated

import typer

from vmdedup.cli.options import WHICH, AsJson, Domains, Qmp, make_settings
from vmdedup.cli.outcome import FAILURE, finish, refusals, require_any

ReadSwapped = Annotated[
    bool,
    typer.Option(
        "--read-swapped",
        help="Also check store pages that are swapped out, which swaps them in.",
        rich_help_panel=WHICH,
    ),
]


def verify(
    qmp: Qmp = None,
    domains: Domains = None,
    read_swapped: ReadSwapped = False,
    as_json: AsJson = False,
) -> int:
    """Check merged pages against their checksums; look for leftovers.

    Exit code 1 if a merged page differs from the page that was published.
    """
    from vmdedup.deduplicator import Deduplicator

    with Deduplicator(make_settings(domains=domains)) as dedup:
        found = dedup.attach(qmp or (), merging=False)
        require_any(found)
        checked = dedup.verify(read_swapped=read_swapped)
    from vmdedup.report.text import show_verification

    code = finish(
        checked,
        show_verification,
        as_json=as_json,
        served=bool(checked.vms),
        complaints=[*refusals(found), *checked.gone],
    )
    return code if checked.ok else FAILURE
