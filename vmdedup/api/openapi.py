"""The API's operations, and the OpenAPI document that is made from them.

Owns the definition and description of an operation: its input and its answer are pydantic
models, whose JSON schemas become the document's. Promises that the document has every
operation and every status of each. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.responses import Response

from vmdedup.ipc.protocol import ErrorKind
from vmdedup.models import Model, Unmerged

JSON = "application/json"
_VERSION = "3.1.0"
_SCHEMAS = "#/components/schemas/{model}"

Content = dict[str, Any]


class Query(BaseModel):
    """Base of what may stand in a query; what is not known is passed over."""

    model_config = ConfigDict(frozen=True)


class Problem(Model):
    """The body of every error."""

    error: str
    kind: ErrorKind
    unmerged: Unmerged | None = Field(
        default=None, description="if `unfinished`: the pages unmerged, and those left"
    )


@dataclass(frozen=True)
class Operation:
    """One method of one path. The docstring of `call` says what it does.

    `takes`: the input of `call`, from the query of a GET, from the body of others; `None`
    for none. `may_be_empty`: a missing body means the model's defaults. `gives`: the
    answer, `None` for text. `problems`: the statuses of its errors.
    """

    method: Literal["GET", "POST", "PUT"]
    path: str
    tag: str
    call: Callable[[Any], Awaitable[Response]]
    gives: type[Model] | None
    problems: Collection[int]
    takes: type[BaseModel] | None = None
    may_be_empty: bool = False

    @property
    def name(self) -> str:
        """Unique among operations."""
        return f"{self.method.lower()}_{self.path.rsplit('/', 1)[-1].replace('-', '_')}"

    @property
    def takes_query(self) -> bool:
        """Whether its input is the query."""
        return self.method == "GET"


def document(operations: Sequence[Operation], *, version: str) -> Content:
    """The OpenAPI document of these operations."""
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Problem, "serialization")]
    for each in operations:
        if each.takes is not None and not each.takes_query:
            wanted.append((each.takes, "validation"))
        if each.gives is not None:
            wanted.append((each.gives, "serialization"))
    references, schemas = models_json_schema(wanted, ref_template=_SCHEMAS)
    paths: dict[str, Content] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = {
            "tags": [each.tag],
            "operationId": each.name,
            "summary": each.call.__doc__,
            **_input(each, references),
            "responses": _responses(each, references),
        }
    return {
        "openapi": _VERSION,
        "info": {
            "title": "vmdedup",
            "summary": "Merge the identical memory of running QEMU VMs, and see what they share.",
            "version": version,
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _input(operation: Operation, references: dict[Any, Content]) -> Content:
    takes = operation.takes
    if takes is None:
        return {}
    if operation.takes_query:
        query = takes.model_json_schema()
        parameters = [
            {
                "name": name,
                "in": "query",
                "required": name in query.get("required", ()),
                "description": schema.pop("description", ""),
                "schema": schema,
            }
            for name, schema in query["properties"].items()
        ]
        return {"parameters": parameters}
    schema = references[takes, "validation"]
    if operation.may_be_empty:
        schema = {"anyOf": [schema, {"type": "null"}]}
    body = {"required": not operation.may_be_empty, "content": {JSON: {"schema": schema}}}
    return {"requestBody": body}


def _responses(operation: Operation, references: dict[Any, Content]) -> Content:
    content = {"text/plain": {"schema": {"type": "string"}}}
    if operation.gives is not None:
        content = {JSON: {"schema": references[operation.gives, "serialization"]}}
    problem = {JSON: {"schema": references[Problem, "serialization"]}}
    responses = {
        str(status): {"description": "Refused: the reason in one line", "content": problem}
        for status in sorted(operation.problems)
    }
    return {"200": {"description": "Done", "content": content}, **responses}
