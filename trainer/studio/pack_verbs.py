"""The operations on packs: list, get, create a tune, save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.config import branch_file, looks
from trainer.contract.errors import Conflict, InvalidRequest, NotFound, nearest, words
from trainer.contract.fields import parse_request
from trainer.contract.photos import ProgressCallback, Upload, no_progress
from trainer.contract.prompts import PromptRequest, prompt_of
from trainer.contract.run_files import ASKED
from trainer.contract.tunes import Tune
from trainer.files import Unreadable, read_json, write_whole
from trainer.library import bases
from trainer.studio import pack_file, packs
from trainer.studio.idempotency import IdempotencyKey
from trainer.studio.pack_answers import own_folder, pack_answer, pack_id
from trainer.studio.pack_file import Pack
from trainer.studio.prompt_rules import check_prompt
from trainer.studio.prompts import create_prompt, delete_prompt
from trainer.studio.references import resolve
from trainer.studio.rows import Services, row_of, tune_folder, tunes_by_id
from trainer.studio.settle import token_for
from trainer.studio.tunes import create_tune, get_tune


def list_packs(services: Services) -> list[dict[str, object]]:
    """All packs, with their prompts for each class; `error` for an unreadable one."""
    described = []
    for slug, table in all_pack_tables(services).items():
        try:
            pack = read_pack(slug, table)
            described.append(pack_answer(services, pack))
        except (Conflict, InvalidRequest) as problem:  # of its branch, the second
            described.append({"id": pack_id(slug), "slug": slug, "error": str(problem)})
    return described


def list_gallery_packs(
    services: Services, limit: int | None = None, offset: int = 0, before_id: int | None = None
) -> list[dict[str, object]]:
    """The packs that come with the program, the largest number first. before_id: only those with smaller numbers."""
    public = [pack for pack in list_packs(services) if pack.get("public_at")]
    public.sort(key=_number, reverse=True)
    found = [pack for pack in public if before_id is None or _number(pack) < before_id]
    return found[offset:][:limit]


def _number(pack: Mapping[str, object]) -> int:
    return pack_id(str(pack["slug"]))


def get_pack(services: Services, slug: str) -> dict[str, object]:
    """slug: of the pack, or its number. Raises NotFound, Conflict."""
    return pack_answer(services, pack_of(services, slug))


def create_pack_tune(
    services: Services,
    slug: str,
    data: Mapping[str, object],
    uploads: Sequence[Upload],
    progress: ProgressCallback = no_progress,
    key: IdempotencyKey | None = None,
) -> tuple[Tune, bool]:
    """Queue a tune with the settings and prompts of a pack; with `tune_ids`, queue its prompts on an existing tune.

    data: the tune parameters, which override the pack's, and `prompt_attributes`, `prompt_ids`, `tune_ids`. Raises
    NotFound, Conflict, InvalidRequest.
    """
    pack, listed = pack_of(services, slug), bases.listed_once(services.settings)
    if tune_id := packs.asked_tune(data):
        if uploads:
            raise InvalidRequest({"images": ["has no effect with tune_ids, since nothing is trained; leave it out"]})
        tune = row_of(services, "tunes", tune_id)
        requests = packs.prompt_requests(pack, data, tune["name"], tune["token"])
        for request in (parse_request(PromptRequest, one) for one in requests):  # check all before creating one
            check_prompt(services, request)
            resolve(services.store, listed, request.parsed, tune["branch"], tune)
        made: list[int] = []
        try:
            for number, one in enumerate(requests):
                of_prompt = key and IdempotencyKey(f"{key.key} {number}", key.digest)
                made.append(create_prompt(services, tune_id, one, progress, of_prompt, listed).id)
        except (InvalidRequest, NotFound):  # all of them or none; a client that died sends the same key again
            for prompt_id in made:
                delete_prompt(services, prompt_id)
            raise
        return get_tune(services, tune_id), True
    base_tune_id, branch = packs.asked_base(pack, data)
    base = bases.resolve(services.settings, base_tune_id, branch, tunes_by_id(services), listed)
    return create_tune(
        services,
        packs.tune_request(pack, data, base.branch, token_for(services, base)),
        uploads,
        progress,
        key,
        listed,
    )


def save_pack(services: Services, tune_id: int, title: str | None = None) -> dict[str, object]:
    """Make a pack of a tune's settings and prompts. Raises NotFound, InvalidRequest."""
    tune = row_of(services, "tunes", tune_id)
    prompts = [prompt_of(row) for row in services.store.find("prompts", tune_id=tune_id, oldest_first=True)]
    request = tune_folder(services, tune_id) / "request.json"
    try:
        asked = read_json(request, ASKED).args
    except FileNotFoundError:  # of an older version
        asked = None
    except Unreadable as problem:
        raise Conflict(f"tune {tune_id} cannot be made into a pack: {problem}") from None
    title = title or tune["title"]
    requests = [prompt.model_dump(exclude_none=True) for prompt in prompts]
    placeholder = branch_file.is_placeholder(services.settings.presets, tune["branch"])
    toml = pack_file.to_toml(title, tune, requests, asked, placeholder=placeholder)
    folder = own_folder(services)
    if folder.exists() and not folder.is_dir():
        raise Conflict("packs in the outputs folder is a file, where the folder of the packs should be; move it away")
    folder.mkdir(exist_ok=True)
    with services.store.transaction():  # so that no other request takes the name
        slug = pack_file.free_slug(title, list(all_pack_tables(services)))
        write_whole(folder / f"{slug}.toml", toml)
    return get_pack(services, slug)


def all_pack_tables(services: Services) -> dict[str, dict[str, object] | str]:
    """The program's packs, and the packs that users saved."""
    return looks.pack_tables(services.settings.presets / "packs", own_folder(services))


def pack_of(services: Services, slug: str) -> Pack:
    """The pack of a slug or number. Raises NotFound, Conflict."""
    tables = all_pack_tables(services)
    if slug not in tables and slug.isdecimal():
        numbered = [one for one in tables if str(pack_id(one)) == slug]
        if len(numbered) > 1:  # one chance in a thousand million
            raise Conflict(f"the packs {words(numbered)} have the number {slug}; write the name of one")
        slug = next(iter(numbered), slug)
    if slug not in tables:
        raise NotFound(f"there is no pack {slug!r}{nearest(slug, tables)}; known: {words(tables)}")
    return read_pack(slug, tables[slug])


def read_pack(slug: str, table: dict[str, object] | str) -> Pack:
    if isinstance(table, str):
        raise Conflict(table)
    try:
        return pack_file.load(table, slug)
    except ValueError as problem:
        raise Conflict(f"{slug}.toml: {problem}") from None
