"""The query parameters of REST: the pages and filters of lists; unknown names are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query, Request
from pydantic import BeforeValidator, Field

from trainer.contract.errors import InvalidRequest, nearest

MOST = 120  # rows in one answer
T = TypeVar("T")


def blank_is_none(value: object) -> object:
    return None if value == "" else value


SQL_INTEGERS = Query(ge=0, lt=2**63)
Limit = Annotated[int, Query(ge=1, le=MOST)]
OptionalLimit = Annotated[Annotated[int, Field(ge=1, le=MOST)] | None, BeforeValidator(blank_is_none)]
Offset = Annotated[int, SQL_INTEGERS]
BeforeId = Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(blank_is_none)]
Filter = Annotated[str | None, BeforeValidator(blank_is_none)]  # an empty value filters nothing


def check_query(request: Request) -> None:
    """Raises InvalidRequest for query parameters that the call does not have.

    Routes outside the OpenAPI document are left alone: links to files carry marks for caches.
    """
    route = request.scope["route"]
    if not route.include_in_schema:
        return
    known = [parameter.alias for parameter in route.dependant.query_params]
    allowed = f"this call has {', '.join(known)}" if known else "this call has no query parameters"
    if unknown := [name for name in dict.fromkeys(request.query_params) if name not in known]:
        raise InvalidRequest({name: [f"unknown query parameter{nearest(name, known)}; {allowed}"] for name in unknown})


def row_id(row: dict[str, object]) -> object:
    return row.get("id")


def page_of(
    rows: Sequence[T],
    id_of: Callable[[T], object] | None,
    limit: int | None,
    offset: int = 0,
    before_id: int | None = None,
) -> list[T]:
    """One page of a list that is in memory. before_id: the rows after the one with this id, in any order of ids.

    id_of: None for rows without ids. Raises InvalidRequest if no row has the id `before_id`.
    """
    start = 0
    if before_id is not None and id_of is not None:
        ids = [id_of(row) for row in rows]
        if before_id not in ids:
            raise InvalidRequest(
                {"before_id": [f"{before_id} is not in this list; send the id of the last row you got"]}
            )
        start = ids.index(before_id) + 1
    return list(rows[start:][offset:][:limit])
