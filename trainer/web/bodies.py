"""Request bodies: JSON, multipart and urlencoded forms with Rails-style nesting, and uploaded files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Never

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from trainer.contract.disk import as_problems, check_room
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Upload
from trainer.contract.prompts import PICTURES
from trainer.files import PARTIAL
from trainer.studio.idempotency import IdempotencyKey
from trainer.studio.rows import Services

MAX_FIELDS = 5000
MAX_JSON_BYTES = 2**20
KEY = re.compile(r"(\w+)((?:\[[\w-]{0,64}\])*)")
NUMBER = re.compile("[0-9]+")  # `isdigit` and `\d` match digits that `int` refuses


class Malformed(Exception):
    """A body that cannot be read. Answered with 400."""


@asynccontextmanager
async def sent(
    request: Request, services: Services, root: str | None, max_files: int
) -> AsyncIterator[dict[str, object]]:
    """The object under `root` of a request; its files are Uploads in it, and are deleted at the end.

    root None: the whole body. Raises DiskProblem where there is no room for them.
    """
    outputs, length = services.settings.outputs, request.headers.get("content-length", "0")
    if length.isdigit():  # the uploaded file, and the decoded photo
        check_room(outputs, 2 * int(length), "the files of this request")
    work = outputs / "incoming" / f"{PARTIAL}upload-{uuid.uuid4().hex[:12]}"
    try:
        with as_problems(outputs):
            data = await read_body(request, root, max_files, work)
        yield data
    finally:
        shutil.rmtree(work, ignore_errors=True)


@asynccontextmanager
async def sent_tune(request: Request, services: Services) -> AsyncIterator[tuple[dict[str, object], list[Upload]]]:
    """The object `tune` of a request without `images`, and the files of `images`."""
    max_files = services.settings.max_images + len(PICTURES) * services.settings.max_prompts
    async with sent(request, services, "tune", max_files) as data:
        uploads = data.pop("images", None) or []
        if not isinstance(uploads, list) or not all(isinstance(upload, Upload) for upload in uploads):
            message = "must be files in multipart/form-data; addresses go into image_urls"
            raise InvalidRequest({"images": [message]})
        yield data, uploads


def read_idempotency_key(request: Request, data: dict[str, object], uploads: list[Upload]) -> IdempotencyKey | None:
    """The header `Idempotency-Key` with a digest of the request. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        raise InvalidRequest({"Idempotency-Key": ["must be 1 to 255 visible ASCII characters, such as a UUID"]})
    asked = json.dumps(data, sort_keys=True, default=lambda upload: [upload.name, _sha256(upload.path).hex()])
    digest = hashlib.sha256(request.url.path.encode() + asked.encode())
    for upload in uploads:
        digest.update(upload.name.encode() + _sha256(upload.path))
    return IdempotencyKey(key, digest.hexdigest())


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


async def read_body(request: Request, root: str | None, max_files: int, work: Path | None) -> dict[str, object]:
    """The object under `root` in a JSON, multipart or urlencoded body; files are written into `work`. JSON may be the
    object itself, as Rails allows.

    root None: the whole body. work None: only the names of files are kept. Raises Malformed for an unreadable body,
    InvalidRequest if the object is missing.
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
    if root is None:
        return data
    if kind == "application/json" and data and root not in data:
        data = {root: data}
    unknown = [name for name in data if name != root]
    if unknown:
        raise InvalidRequest({name: [f"unknown parameter; everything goes under {root}"] for name in unknown})
    inner = data.get(root)
    if not isinstance(inner, dict):
        raise InvalidRequest({root: ["is required, and must be an object"]})
    if isinstance(inner.get("characteristics"), str) and inner["characteristics"].strip():
        inner["characteristics"] = parse_json(inner["characteristics"].encode(), "characteristics")
    return {name: value for name, value in inner.items() if not (name == "characteristics" and not value)}


def parse_json(body: bytes, what: str = "the body") -> dict[str, object]:
    """A JSON object; refuses duplicate names, and numbers that are not in JSON, such as NaN."""

    def no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise Malformed(f"{what} gives a name twice")
        return seen

    def no_constant(name: str) -> Never:
        raise Malformed(f"{what} has {name}, which is not JSON")

    if len(body) > MAX_JSON_BYTES:
        raise Malformed(f"{what} is larger than {MAX_JSON_BYTES} bytes")
    try:
        data = json.loads(body.decode("utf-8"), object_pairs_hook=no_doubles, parse_constant=no_constant)
        json.dumps(data, ensure_ascii=False).encode()  # fails for a lone surrogate, which could not be stored
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest({"base": [f"{what} must be a JSON object"]})
    return data


async def _read_form(request: Request, max_files: int, work: Path | None) -> dict[str, object]:
    tail = b""
    plain_receive = request.receive

    async def receive() -> Message:
        nonlocal tail
        message = await plain_receive()
        tail = (tail + message.get("body", b""))[-256:]
        return message

    request = Request(request.scope, receive)
    items: list[tuple[str, str | Upload]] = []
    async with request.form(max_files=2 * max_files + 10, max_fields=MAX_FIELDS, max_part_size=2**20) as form:
        boundary = re.search(r'boundary="?([^";]+)', request.headers["content-type"])
        if boundary and b"--" + boundary[1].encode() + b"--" not in tail:  # Starlette accepts a truncated body
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


def nest(items: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Parse the form names of Rails: `a[b]=1&a[c][]=2&a[d][][e]=3` -> {"a": {"b": "1", "c": ["2"], "d": [{"e": "3"}]}}.

    In a list of objects, a repeated name begins the next object; `[0]`, `[1]` number the objects. Raises Malformed if a
    name has another form, is given twice, or is used for two kinds of value.
    """
    root: dict[str, object] = {}
    for key, value in items:
        match = KEY.fullmatch(key)
        parts = [match[1], *re.findall(r"\[([\w-]*)\]", match[2])] if match else []
        if not match or len(parts) > 5:
            raise Malformed(f"{key[:100]!r} is not a name that this API has")
        place: object = root
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            place = _step_into(place, part, following, key, value, parts)
    return root


def _step_into(place: object, part: str, following: str | None, key: str, value: object, parts: list[str]) -> object:
    fresh: object = value if following is None else [] if following == "" or NUMBER.fullmatch(following) else {}
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
