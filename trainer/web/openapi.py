"""The OpenAPI document that /docs shows: bodies, examples and error answers."""

from __future__ import annotations

import json
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, RootModel
from starlette.exceptions import HTTPException

from trainer.contract.disk import DiskProblem
from trainer.contract.errors import AnalysisUnavailable, Conflict, InvalidRequest, NotFound
from trainer.contract.inspection import InspectRequest
from trainer.contract.prompts import PromptChange, PromptRequest
from trainer.contract.tunes import CheckRequest, TuneChange, TuneRequest
from trainer.names import DEMO_BRANCH
from trainer.studio.packs import PackRequest
from trainer.web.bodies import Malformed

RETRY_AFTER = "10"  # seconds, where the database is in use by another program


class Error(BaseModel):
    """An error answer other than 422."""

    error: str


class Problems(RootModel[dict[str, list[str]]]):
    """The errors of each field."""


class Done(BaseModel):
    message: str


PHOTO_URLS = [f"https://example.com/rex-{number}.jpg" for number in range(1, 5)]
EXAMPLES: dict[type[BaseModel], dict[str, object]] = {  # of bodies, for readers of the OpenAPI page
    TuneRequest: {
        "title": "Rex - 1234-6789", "name": "dog", "branch": DEMO_BRANCH, "image_urls": PHOTO_URLS,
        "characteristics": {"colour": "brown"},
        "prompts_attributes": [{"text": "ohwx dog, {{colour}}, on a beach", "num_images": 2}],
    },
    TuneChange: {"title": "Rex, retired", "characteristics": {"colour": "grey"}},
    CheckRequest: {"name": "dog", "image_urls": PHOTO_URLS},
    PromptRequest: {"text": "ohwx dog in the snow", "num_images": 2, "seed": 7},
    PromptChange: {"pack_id": 260},
    InspectRequest: {"name": "man", "file_url": "https://example.com/john-1.jpg"},
    PackRequest: {"title": "Rex for the shop", "name": "dog", "branch": DEMO_BRANCH, "image_urls": PHOTO_URLS},
}  # fmt: skip
REFUSED = {
    400: "The body cannot be read",
    401: "A key is needed",
    403: "From another site's page, or under a name that is not this app's",
    404: "Not found",
    405: "Not with this method",
    409: "Not possible in the current state",
    413: "The body is too large",
    414: "The address is too long",
    415: "The body is of another type",
    422: "The errors of all fields at once",
    429: "Too many wrong keys",
    431: "The headers are too large",
    503: "Not possible now",
    507: "Not enough room on the disk",
}
REFUSALS: dict[int | str, dict[str, object]] = {
    status: {"model": Problems if status == 422 else Error, "description": why} for status, why in REFUSED.items()
}


def add_error_answers(app: FastAPI) -> None:
    def error(status: int) -> Callable[[Request, Exception], JSONResponse]:
        return lambda _request, problem: JSONResponse({"error": str(problem)}, status)

    def invalid(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, InvalidRequest)
        return JSONResponse(problem.problems, 422)

    def http(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, HTTPException)
        return JSONResponse({"error": str(problem.detail)}, problem.status_code, headers=problem.headers)

    def arguments(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, RequestValidationError)
        if any(entry["loc"][0] == "path" for entry in problem.errors()):
            return JSONResponse({"error": "not found"}, 404)
        return JSONResponse({str(entry["loc"][-1]): [entry["msg"]] for entry in problem.errors()}, 422)

    app.add_exception_handler(InvalidRequest, invalid)
    app.add_exception_handler(NotFound, error(404))
    app.add_exception_handler(Conflict, error(409))

    def disk(_request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, DiskProblem)
        content = {"error": problem.as_refusal()}
        return JSONResponse(content, 507) if problem.full else JSONResponse(content, 503, {"Retry-After": RETRY_AFTER})

    app.add_exception_handler(DiskProblem, disk)
    app.add_exception_handler(AnalysisUnavailable, error(503))
    app.add_exception_handler(Malformed, error(400))
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, arguments)
    app.add_exception_handler(Exception, lambda _request, _problem: JSONResponse({"error": "internal error"}, 500))


def body_schema(root: str, model: type[BaseModel]) -> dict[str, dict[str, object]]:
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    body = {"type": "object", "required": [root], "properties": {root: schema}, "additionalProperties": False}
    wrapped = json.loads(
        json.dumps(body).replace('"#/$defs/PromptRequest"', '"#/properties/tune/properties/prompts_attributes/items"')
    )
    if "PromptRequest" in definitions:
        wrapped["properties"][root]["properties"]["prompts_attributes"]["items"] = definitions["PromptRequest"]
    kinds: dict[str, dict[str, object]] = {
        kind: {"schema": wrapped} for kind in ("application/json", "multipart/form-data")
    }
    kinds["application/json"]["example"] = {root: EXAMPLES[model]}
    return kinds


def flat_body(model: type[BaseModel]) -> dict[str, dict[str, object]]:
    """As `body_schema`, for a body whose fields are under no root."""
    kinds: dict[str, dict[str, object]] = {
        kind: {"schema": model.model_json_schema()} for kind in ("application/json", "multipart/form-data")
    }
    kinds["application/json"]["example"] = EXAMPLES[model]
    return kinds
