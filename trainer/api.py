"""REST: routes, bodies and errors. No rules."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi import Path as UrlPath
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, RootModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from trainer import __version__
from trainer.files import PARTIAL
from trainer.jobs import Jobs, Mark
from trainer.links import open_link
from trainer.packs import SLUG, PackRequest
from trainer.schema import (
    PICTURES,
    Callback,
    CannotLook,
    Check,
    CheckRequest,
    Conflict,
    InvalidRequest,
    NotFound,
    Prompt,
    PromptRequest,
    Tune,
    TuneChange,
    TuneRequest,
    Upload,
    untold,
)

MAX_FIELDS = 5000
MAX_JSON_BYTES = 2**20
KEY = re.compile(r"(\w+)((?:\[[\w-]{0,64}\])*)")
NUMBER = re.compile("[0-9]+")  # `isdigit` and `\d` know more digits than `int` does
Slug = Annotated[str, UrlPath(pattern=f"^{SLUG.pattern}$")]
SqlInteger = Annotated[int, Query(ge=0, lt=2**63)]


CALLS = ("/tunes", "/prompts", "/photos/", "/gallery/", "/presets", "/packs", "/p/")  # begin their paths


class Malformed(Exception):
    """A body that cannot be read. Answered with 400."""


class Error(BaseModel):
    """Every refusal but 422."""

    error: str


class Problems(RootModel[dict[str, list[str]]]):
    """What is wrong with each field."""


class Done(BaseModel):
    message: str


PHOTO_URLS = [f"https://example.com/rex-{number}.jpg" for number in range(1, 5)]
EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {  # of bodies, for whoever reads the OpenAPI page
    TuneRequest: {
        "title": "Rex - 1234-6789", "name": "dog", "branch": "fast", "image_urls": PHOTO_URLS,
        "characteristics": {"colour": "brown"},
        "prompts_attributes": [{"text": "ohwx dog, {{colour}}, on a beach", "num_images": 2}],
    },
    TuneChange: {"title": "Rex, retired", "characteristics": {"colour": "grey"}},
    CheckRequest: {"name": "dog", "image_urls": PHOTO_URLS},
    PromptRequest: {"text": "ohwx dog in the snow", "num_images": 2, "seed": 7},
    PackRequest: {"title": "Rex for the shop", "name": "dog", "branch": "fast", "image_urls": PHOTO_URLS},
}  # fmt: skip
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The body cannot be read"},
    401: {"model": Error, "description": "A key is needed"},
    403: {"model": Error, "description": "From another site's page, or under a name that is not this app's"},
    404: {"model": Error, "description": "There is no such thing"},
    405: {"model": Error, "description": "Not with this method"},
    409: {"model": Error, "description": "Not in this state"},
    413: {"model": Error, "description": "The body is too large"},
    414: {"model": Error, "description": "The address is too long"},
    415: {"model": Error, "description": "The body is of another type"},
    422: {"model": Problems, "description": "What is wrong with each field, all at once"},
    429: {"model": Error, "description": "Too many wrong keys"},
    431: {"model": Error, "description": "The headers are too large"},
    503: {"model": Error, "description": "Not possible at the moment"},
}


def create_app(jobs: Jobs) -> FastAPI:
    """All REST routes over the shared verbs."""
    app = FastAPI(title="Tunebooth", version=__version__, redirect_slashes=False, responses=REFUSALS)
    app.add_middleware(JsonSuffix)
    _add_error_answers(app)

    tune_body = {"requestBody": {"content": _body_schema("tune", TuneRequest)}}
    prompt_body = {"requestBody": {"content": _body_schema("prompt", PromptRequest)}}

    @app.post("/tunes", status_code=201, response_model=Tune, responses={200: {"model": Tune}}, openapi_extra=tune_body)
    async def create_tune(request: Request) -> JSONResponse:
        """Create a tune and queue it. 200 where the title has one already."""
        async with sent_tune(request, jobs) as (data, uploads):
            mark = await run_in_threadpool(read_mark, request, data, uploads)
            tune, created = await run_in_threadpool(jobs.create_tune, data, uploads, untold, mark)
        return JSONResponse(tune.model_dump(), 201 if created else 200)

    @app.post("/photos/check", openapi_extra={"requestBody": {"content": _body_schema("tune", CheckRequest)}})
    async def check_photos(request: Request) -> Check:
        """A verdict for each photo, as a tune with these parameters would give it; nothing is kept."""
        async with sent_tune(request, jobs) as (data, uploads):
            return await run_in_threadpool(jobs.check_photos, data, uploads)

    @app.get("/tunes")
    def list_tunes(
        limit: Annotated[int, Query(ge=1, le=120)] = 20,
        offset: SqlInteger = 0,
        before_id: SqlInteger | None = None,
        title: str | None = None,
        branch: str | None = None,
        model_type: str | None = None,
    ) -> list[Tune]:
        """Tunes, newest first."""
        return jobs.list_tunes(limit, offset, before_id, title, branch, model_type)

    @app.get("/tunes/{tune_id}")
    def get_tune(tune_id: int) -> Tune:
        return jobs.get_tune(tune_id)

    @app.patch("/tunes/{tune_id}", openapi_extra={"requestBody": {"content": _body_schema("tune", TuneChange)}})
    async def change_tune(tune_id: int, request: Request) -> Tune:
        """Change title, class name, auto_extend or characteristics."""
        data = await read_body(request, "tune", 0, None)
        return await run_in_threadpool(jobs.change_tune, tune_id, data)

    @app.delete("/tunes/{tune_id}")
    def delete_tune(tune_id: int) -> Done:
        """Remove a tune, its prompts and its files; a running one is stopped first."""
        jobs.delete_tune(tune_id)
        return Done(message="Tune successfully deleted")

    @app.post("/tunes/{tune_id}/cancel")
    def cancel_tune(tune_id: int) -> Tune:
        return jobs.cancel_tune(tune_id)

    @app.post("/tunes/{tune_id}/resume")
    def resume_tune(tune_id: int) -> Tune:
        return jobs.resume_tune(tune_id)

    answers: dict[int | str, dict[str, Any]] = {
        307: {"description": "Leads to the file"},
        202: {"model": Done, "description": "It is being made; ask again"},
    }

    @app.get("/tunes/{tune_id}/model", status_code=307, responses=answers, response_model=None)
    def get_model(tune_id: int, wanted: Annotated[str | None, Query(alias="format")] = None) -> Response:
        """Leads to the trained file; in another `format` once that is made: kohya, diffusers, embeddings, bundled,
        checkpoint, faceid, as far as the model type has it."""
        link = jobs.model_link(tune_id, wanted)
        if link is None:
            waiting = Done(message=f"the model is being made into {wanted}; ask again in a moment")
            return JSONResponse(waiting.model_dump(), 202, {"Retry-After": "5"})
        return RedirectResponse(link)

    @app.post("/tunes/{tune_id}/prompts", status_code=201, openapi_extra=prompt_body)
    async def create_prompt(tune_id: int, request: Request) -> Prompt:
        """Render a prompt with a tune; with its base's id where the text has `<lora:ID:WEIGHT>`."""
        async with sent(request, jobs, "prompt", len(PICTURES)) as data:
            mark = await run_in_threadpool(read_mark, request, data, [])
            return await run_in_threadpool(jobs.create_prompt, tune_id, data, untold, mark)

    @app.get("/tunes/{tune_id}/prompts")
    def list_tune_prompts(
        tune_id: int, limit: Annotated[int, Query(ge=1, le=120)] = 20, offset: SqlInteger = 0
    ) -> list[Prompt]:
        return jobs.list_prompts(tune_id, limit, offset)

    @app.get("/prompts")
    def list_prompts(limit: Annotated[int, Query(ge=1, le=120)] = 20, offset: SqlInteger = 0) -> list[Prompt]:
        return jobs.list_prompts(None, limit, offset)

    @app.get("/prompts/{prompt_id}")
    def get_prompt(prompt_id: int) -> Prompt:
        return jobs.get_prompt(prompt_id)

    @app.get("/tunes/{tune_id}/prompts/{prompt_id}")
    def get_tune_prompt(tune_id: int, prompt_id: int) -> Prompt:
        prompt = jobs.get_prompt(prompt_id)
        if prompt.tune_id != tune_id:
            raise NotFound(f"tune {tune_id} has no prompt {prompt_id}")
        return prompt

    @app.delete("/prompts/{prompt_id}")
    def delete_prompt(prompt_id: int) -> Done:
        """Remove a prompt and its pictures; one that renders is stopped first."""
        jobs.delete_prompt(prompt_id)
        return Done(message="Prompt successfully deleted")

    @app.delete("/tunes/{tune_id}/prompts/{prompt_id}")
    def delete_tune_prompt(tune_id: int, prompt_id: int) -> Done:
        jobs.delete_prompt(prompt_id, tune_id)
        return Done(message="Prompt successfully deleted")

    @app.post("/prompts/{prompt_id}/duplicate", status_code=201, openapi_extra=prompt_body)
    async def duplicate_prompt(prompt_id: int, request: Request) -> Prompt:
        """Render a prompt again; the body, which may be empty, says what is to be different."""
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if not has_body:
            return await run_in_threadpool(jobs.duplicate_prompt, prompt_id, {}, untold, read_mark(request, {}, []))
        async with sent(request, jobs, "prompt", len(PICTURES)) as data:
            mark = await run_in_threadpool(read_mark, request, data, [])
            return await run_in_threadpool(jobs.duplicate_prompt, prompt_id, data, untold, mark)

    @app.get("/tunes/{tune_id}/callbacks")
    def list_callbacks(tune_id: int) -> list[Callback]:
        """What was posted, or is still to be, to the callbacks of a tune and its prompts; newest first."""
        jobs.get_tune(tune_id)  # or there is none
        return jobs.list_callbacks(tune_id)

    @app.post("/tunes/{tune_id}/callbacks")
    def send_callbacks_again(tune_id: int) -> list[Callback]:
        """Post all of them once more."""
        return jobs.send_callbacks_again(tune_id)

    @app.get("/gallery/tunes")
    def list_base_tunes(branch: str | None = None) -> list[dict[str, Any]]:
        """Base models that a tune can start from."""
        return jobs.list_base_tunes(branch)

    @app.get("/packs")
    def list_packs() -> list[dict[str, Any]]:
        """Packs: settings and prompts for a purpose."""
        return jobs.list_packs()

    @app.get("/p/{slug}")
    def get_pack(slug: Slug) -> dict[str, Any]:
        return jobs.get_pack(slug)

    pack_body = {"requestBody": {"content": _body_schema("tune", PackRequest)}}

    @app.post("/p/{slug}/tunes", status_code=201, responses={200: {"model": Tune}}, openapi_extra=pack_body)
    async def create_pack_tune(slug: Slug, request: Request, response: Response) -> Tune:
        """Create a tune with a pack's settings and prompts; with `tune_ids` render its prompts with a tune."""
        async with sent_tune(request, jobs) as (data, uploads):
            mark = await run_in_threadpool(read_mark, request, data, uploads)
            tune, created = await run_in_threadpool(jobs.create_pack_tune, slug, data, uploads, untold, mark)
        response.status_code = 201 if created else 200
        return tune

    @app.post("/tunes/{tune_id}/pack", status_code=201)
    def save_pack(tune_id: int, title: str | None = None) -> dict[str, Any]:
        """Make a pack of a tune's settings and prompts, under its own title or another."""
        return jobs.save_pack(tune_id, title)

    @app.get("/presets")
    def list_presets() -> list[str]:
        return jobs.list_presets()

    @app.get("/files/{path:path}", include_in_schema=False)
    def get_file(path: str, signature: str = "", expires: int = 0) -> FileResponse:
        file = open_link(jobs.settings, path, expires, signature)
        if file is None:
            raise NotFound("this link is wrong, over, or its file is gone")
        model = file.suffix in (".safetensors", ".zip")
        name = f"tune-{path.partition('/')[0]}-{file.name}" if model else file.name
        picture = file.suffix in (".png", ".jpg")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}
        return FileResponse(
            file, filename=name, content_disposition_type="inline" if picture else "attachment", headers=headers
        )

    return app


@asynccontextmanager
async def sent(request: Request, jobs: Jobs, root: str, max_files: int) -> AsyncIterator[dict[str, Any]]:
    """The object under `root` of a request; its files, which are Uploads in it, are gone afterwards."""
    work = jobs.settings.outputs / "incoming" / f"{PARTIAL}upload-{uuid.uuid4().hex[:12]}"
    try:
        yield await read_body(request, root, max_files, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@asynccontextmanager
async def sent_tune(request: Request, jobs: Jobs) -> AsyncIterator[tuple[dict[str, Any], list[Upload]]]:
    """The object `tune` of a request, and the files of its `images`."""
    max_files = jobs.settings.max_images + len(PICTURES) * jobs.settings.max_prompts
    async with sent(request, jobs, "tune", max_files) as data:
        uploads = data.pop("images", None) or []
        if not isinstance(uploads, list) or not all(isinstance(upload, Upload) for upload in uploads):
            message = "must be files in multipart/form-data; addresses go into image_urls"
            raise InvalidRequest({"images": [message]})
        yield data, uploads


def read_mark(request: Request, data: dict[str, Any], uploads: list[Upload]) -> Mark | None:
    """The header `Idempotency-Key` with a digest of what is asked for. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        raise InvalidRequest({"Idempotency-Key": ["must be 1 to 255 visible ASCII characters, as a UUID is"]})
    asked = json.dumps(data, sort_keys=True, default=lambda upload: [upload.name, _sha256(upload.path).hex()])
    digest = hashlib.sha256(request.url.path.encode() + asked.encode())
    for upload in uploads:
        digest.update(upload.name.encode() + _sha256(upload.path))
    return Mark(key, digest.hexdigest())


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class JsonSuffix:
    """`/tunes/1.json` is `/tunes/1`, everywhere but in files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith(".json") and path.startswith(CALLS):
            scope = {**scope, "path": path.removesuffix(".json")}
        await self._app(scope, receive, send)


async def read_body(request: Request, root: str, max_files: int, work: Path | None) -> dict[str, Any]:
    """The object under `root` in a JSON, multipart or urlencoded body; files are written into `work`.

    work None: of a file only its name is kept.

    Raises Malformed for a body that cannot be read, InvalidRequest for one without the object.
    """
    packed = request.headers.get("content-encoding", "identity")
    if packed != "identity":
        raise HTTPException(415, f"send the body as it is, not as {packed}")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        data = parse_json(await request.body())
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        data = await _read_form(request, max_files, work)
    else:
        raise HTTPException(415, "send application/json, multipart/form-data or application/x-www-form-urlencoded")
    unknown = [name for name in data if name != root]
    if unknown:
        raise InvalidRequest({name: [f"unknown parameter; everything goes under {root}"] for name in unknown})
    inner = data.get(root)
    if not isinstance(inner, dict):
        raise InvalidRequest({root: ["is required, and must be an object"]})
    if isinstance(inner.get("characteristics"), str) and inner["characteristics"].strip():
        inner["characteristics"] = parse_json(inner["characteristics"].encode(), "characteristics")
    return {name: value for name, value in inner.items() if not (name == "characteristics" and not value)}


def parse_json(body: bytes, what: str = "the body") -> dict[str, Any]:
    """A JSON object; refuses doubled names, and numbers that JSON does not have."""

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise Malformed(f"{what} gives a name twice")
        return seen

    def no_constant(name: str) -> Any:
        raise Malformed(f"{what} has {name}, which is not JSON")

    if len(body) > MAX_JSON_BYTES:
        raise Malformed(f"{what} is larger than {MAX_JSON_BYTES} bytes")
    try:
        data = json.loads(body.decode("utf-8"), object_pairs_hook=no_doubles, parse_constant=no_constant)
        json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate could be neither stored nor answered
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest({"base": [f"{what} must be a JSON object"]})
    return data


async def _read_form(request: Request, max_files: int, work: Path | None) -> dict[str, Any]:
    tail = b""
    plain_receive = request.receive

    async def receive() -> Any:
        nonlocal tail
        message = await plain_receive()
        tail = (tail + message.get("body", b""))[-256:]
        return message

    request = Request(request.scope, receive)
    items: list[tuple[str, str | Upload]] = []
    async with request.form(max_files=2 * max_files + 10, max_fields=MAX_FIELDS, max_part_size=2**20) as form:
        boundary = re.search(r'boundary="?([^";]+)', request.headers["content-type"])
        if boundary and b"--" + boundary[1].encode() + b"--" not in tail:  # Starlette takes a body that was cut off
            raise Malformed("the body ends before its closing boundary; it was cut off on the way")
        for number, (key, value) in enumerate(form.multi_items()):
            if not isinstance(value, UploadFile):
                items.append((key, value))
            elif work is None:
                items.append((key, Path(value.filename or "file").name))
            else:
                work.mkdir(parents=True, exist_ok=True)
                path = work / f"{number:04d}"
                with path.open("wb") as file:
                    while chunk := await value.read(2**20):
                        file.write(chunk)
                items.append((key, Upload(Path(value.filename or "file").name, path)))
    return nest(items)


def nest(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Rails' form names: `a[b]=1&a[c][]=2&a[d][][e]=3` -> {"a": {"b": "1", "c": ["2"], "d": [{"e": "3"}]}}.

    A list of objects goes on to its next object when a name comes again; `[0]`, `[1]` say it outright.
    Raises Malformed where a name is no such name, is given twice, or is two kinds of thing.
    """
    root: dict[str, Any] = {}
    for key, value in items:
        match = KEY.fullmatch(key)
        parts = [match[1], *re.findall(r"\[([\w-]*)\]", match[2])] if match else []
        if not match or len(parts) > 5:
            raise Malformed(f"{key[:100]!r} is not a name that this API has")
        place: Any = root
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            place = _step_into(place, part, following, key, value, parts)
    return root


def _step_into(place: Any, part: str, following: str | None, key: str, value: Any, parts: list[str]) -> Any:
    fresh: Any = value if following is None else [] if following == "" or NUMBER.fullmatch(following) else {}
    if isinstance(place, list):
        if NUMBER.fullmatch(part):
            if int(part) > len(place):
                raise Malformed(f"{key!r} leaves out a number before {part}")
            if int(part) == len(place):
                place.append(fresh)
            elif following is None:
                raise Malformed(f"{key!r} is given twice")
            return place[int(part)]
        if part:
            raise Malformed(f"{key!r} is used for two kinds of thing")
        last = place[-1] if place else None
        if following and isinstance(last, dict) and (following not in last or isinstance(last[following], list | dict)):
            return last
        place.append(fresh)
        return fresh
    if not isinstance(place, dict) or part == "":
        raise Malformed(f"{key!r} is used for two kinds of thing")
    if part in place:
        if following is None or type(place[part]) is not type(fresh):
            raise Malformed(f"{key!r} is given twice, or used for two kinds of thing")
        return place[part]
    place[part] = fresh
    return fresh


def _add_error_answers(app: FastAPI) -> None:
    def error(status: int) -> Any:
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
            return JSONResponse({"error": "there is nothing of that id"}, 404)
        return JSONResponse({str(entry["loc"][-1]): [entry["msg"]] for entry in problem.errors()}, 422)

    app.add_exception_handler(InvalidRequest, invalid)
    app.add_exception_handler(NotFound, error(404))
    app.add_exception_handler(Conflict, error(409))
    app.add_exception_handler(CannotLook, error(503))
    app.add_exception_handler(Malformed, error(400))
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, arguments)
    app.add_exception_handler(Exception, lambda _request, _problem: JSONResponse({"error": "internal error"}, 500))


def _body_schema(root: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    body = {"type": "object", "required": [root], "properties": {root: schema}, "additionalProperties": False}
    wrapped = json.loads(
        json.dumps(body).replace('"#/$defs/PromptRequest"', '"#/properties/tune/properties/prompts_attributes/items"')
    )
    if "PromptRequest" in definitions:
        wrapped["properties"][root]["properties"]["prompts_attributes"]["items"] = definitions["PromptRequest"]
    kinds: dict[str, Any] = {kind: {"schema": wrapped} for kind in ("application/json", "multipart/form-data")}
    kinds["application/json"]["example"] = {root: EXAMPLES[model]}
    return kinds
