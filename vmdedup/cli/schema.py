"""`vmdedup schema`: the JSON schemas of everything that `--json` prints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vmdedup.cli.outcome import DONE
from vmdedup.errors import UsageError


def schema(
    document: Annotated[
        str, typer.Argument(metavar="DOCUMENT", help="Name of the document; `all` for all of them.")
    ] = "report",
) -> int:
    """Print the JSON schema of a document of --json or of the API."""
    from vmdedup import models
    from vmdedup.ipc import protocol

    published: dict[str, type[models.Model]] = {
        "report": models.SharingReport,
        "vms": models.VmList,
        "analysis": models.ContentAnalysis,
        "plan": models.MergePlan,
        "funnel": models.Funnel,
        "unmerged": models.Unmerged,
        "judgement": models.Judgement,
        "verification": models.Verification,
        "controls": protocol.ControlValues,
        "registration": protocol.Registration,
        "events": protocol.EventList,
        "health": protocol.Health,
        "history": models.History,
        "sketch": models.VmSketch,
        "sources": models.ContentSources,
    }
    if document != "all" and document not in published:
        raise UsageError(f"no document {document!r} (there are: {', '.join(published)}, all)")
    schemas = {name: model.model_json_schema() for name, model in published.items()}
    print(json.dumps(schemas if document == "all" else schemas[document], indent=2))
    return DONE
