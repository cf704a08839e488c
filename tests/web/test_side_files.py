"""A file that is broken is reported where it belongs; everything else is answered as before."""

from __future__ import annotations

import logging
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from tests.helpers.analyzer import SharedAnalyzer
from tests.helpers.faults import CONTENTS, HUGE, INSTEAD, as_json, instead_of, remove, safetensors, spoiled
from tests.helpers.web import photo, upload
from trainer import files
from trainer.config import branch_file, looks, resolve
from trainer.contract.errors import Conflict, InvalidRequest
from trainer.contract.fields import parse_request
from trainer.contract.prompts import PromptRequest
from trainer.contract.tunes import CheckRequest
from trainer.files import Unreadable
from trainer.library import bases
from trainer.names import FORMATS
from trainer.photos.decoder import Decoder
from trainer.settings import read_settings
from trainer.studio import answers, models, pack_verbs, settle, tunes
from trainer.studio import prompts as prompt_verbs
from trainer.studio.prompt_rules import check_prompt
from trainer.studio.rows import Services
from trainer.studio.store import Store
from trainer.web import page
from trainer.web.form import Form
from trainer.web.guard import Guard
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

ROOT = Path(__file__).parents[2]
SEEN = [
    {
        "file": "000-64x64.jpg", "name": "rex.png", "kind": "photo", "caption": "A photo of ohwx dog", "width": 64,
        "height": 64, "mask": None,
    }
]  # fmt: skip
READING = {"step": 10, "loss": 0.5, "lr": 0.001, "peak_gib": 1.5, "seconds": 2.0}
LOG = [{"step": 0, "event": "started", "at": "2026-11-23T12:34:56.789Z"}, READING, READING | {"step": 20, "loss": 0.4}]
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
HEADER: dict[str, Any] = {
    "__metadata__": {"ss_sd_model_name": "Tunebooth fast"},
    KEY: {"dtype": "F32", "shape": [4, 768], "data_offsets": [0, 4 * 768 * 4]},
}
LORA = safetensors(HEADER, bytes(4 * 768 * 4))
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768}
HTTP = ("/health", "/", "/tunes", "/prompts", "/gallery/tunes", "/packs", "/presets")


class House:
    """The web side over a store without a worker: a good tune, and one whose files are spoiled."""

    def __init__(self, folder: Path, decoder: Decoder) -> None:
        shutil.copytree(ROOT / "presets", folder / "presets")
        self.settings = read_settings(
            outputs=folder / "outputs", models=folder / "models", presets=folder / "presets", weights=folder / "weights"
        )
        self.outputs, self.presets, self.models = self.settings.outputs, self.settings.presets, self.settings.models
        self.store = Store(self.outputs)
        self.analyzer = SharedAnalyzer(self.settings)
        self.services = Services(self.settings, self.store, decoder, self.analyzer)
        self.form: Any = object.__new__(Form)  # its choices, without the page around it
        self.form._services = self.services
        write(self.presets / "mine.toml", b"[lora]\nrank = 6\n[lora.person]\nflip = true\n")
        write(self.outputs / "packs/own.toml", (ROOT / "presets/packs/headshots.toml").read_bytes())
        write(self.models / "lora.safetensors", LORA)
        write(self.models / "whole/model_index.json", as_json(INDEX))
        write(self.models / "whole/unet/config.json", as_json(UNET))
        self.good, self.bad = (self.tune(folder, title) for title in ("good", "bad"))
        guard = Guard(
            self.settings,
            load=lambda: page.mount(create_app(self.services), self.services),
            begin=lambda: None,
            unload=lambda: None,
        )
        self.client = TestClient(guard, base_url=self.settings.base_url, raise_server_exceptions=False)

    def folder(self, tune_id: int) -> Path:
        return self.outputs / "tunes" / str(tune_id)

    def tune(self, folder: Path, title: str) -> int:
        """A trained tune with everything that is read of one."""
        request = {"title": title, "name": "dog", "branch": "fast", "prompts_attributes": [{"text": "ohwx dog"}]}
        tune, _ = tunes.create_tune(self.services, request, [upload(folder / "photos", "rex.png", photo())])
        prompt = tune.prompts[0].id
        self.store.update("tunes", tune.id, status="trained", files=[FORMATS["kohya"]])
        self.store.update("prompts", prompt, status="rendered", files=["0.png"])
        for file, content in {
            "dataset/seen/seen.json": as_json(SEEN),
            "log.jsonl": b"".join(as_json(line) + b"\n" for line in LOG),
            "samples/step-000010.png": photo(),
            f"checkpoints/step-000010/{FORMATS['kohya']}": LORA,
            f"model/{FORMATS['kohya']}": LORA,
            f"prompts/{prompt}/0.png": photo(),
        }.items():
            write(self.folder(tune.id) / file, content)
        return tune.id

    def reads(self, *names: str) -> list[str]:
        """The read paths of these names that fail, in the functions behind the routes and behind the page."""
        found = []
        for name in names:
            try:
                JSONResponse(jsonable_encoder(READS[name](self)))
            except Exception as problem:  # noqa: BLE001  # whatever a broken file makes of it
                found.append(f"{name}: {type(problem).__name__} {problem!s:.80}")
        return found

    def requests(self) -> list[str]:
        """The addresses that do not answer 200."""
        paths = (*HTTP, f"/tunes/{self.good}", f"/tunes/{self.bad}")
        return [path for path in paths if self.client.get(path).status_code != 200]

    def seen(self) -> list[dict[str, Any]]:
        return answers.trained_pictures(self.services, self.bad)

    def readings(self) -> list[dict[str, Any]]:
        return answers.readings(self.services, self.bad)

    def base(self, title: str) -> Any:
        return next(base for base in bases.list_bases(self.settings) if base.title == title)

    def pack(self, slug: str) -> Any:
        return next(pack for pack in pack_verbs.list_packs(self.services) if pack["slug"] == slug)

    def train_on(self, branch: str, **given: object) -> str:
        """What settling a request says; nothing where it goes through."""
        request = parse_request(CheckRequest, {"branch": branch, "name": "man", **given}).as_tune()
        try:
            settle.settle(self.services, request, 4, bases.listed_once(self.settings))
        except InvalidRequest as invalid:
            return str(invalid)
        return ""

    def prompt(self, **given: object) -> str:
        try:
            check_prompt(self.services, parse_request(PromptRequest, {"text": "a", **given}))
        except InvalidRequest as invalid:
            return str(invalid)
        return ""


READS: dict[str, Callable[[House], object]] = {
    "tunes": lambda house: tunes.list_tunes(house.services),
    "prompts": lambda house: prompt_verbs.list_prompts(house.services),
    "live": lambda house: page.live_parts(house.services, ("", "", ""))[3],
    "gallery": lambda house: models.list_base_tunes(house.services),
    "choices": lambda house: house.form.choices(),
    "packs": lambda house: pack_verbs.list_packs(house.services),
    "shelf": lambda house: page.pack_shelf(house.services),
    "presets": lambda house: settle.list_presets(house.services),
}


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, decoder: Decoder) -> Iterator[House]:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request costs more than the request
    house = House(tmp_path_factory.mktemp("house"), decoder)
    with house.client:
        house.client.get("/tunes")  # waits for the page
        assert house.requests() == house.reads(*READS) == []
        yield house
    house.analyzer.close()
    house.store.close()


@pytest.fixture
def broken(house: House) -> Iterator[Callable[[str], Path]]:
    """broken(kind): the file of a kind, which is whole again after the test."""
    kept: dict[Path, bytes] = {}

    def of_kind(kind: str) -> Path:
        file = FILES[kind](house)
        kept[file] = file.read_bytes()
        return file

    yield of_kind
    for file, content in kept.items():
        remove(file)
        file.write_bytes(content)
    assert house.reads(*READS) == []


FILES: dict[str, Callable[[House], Path]] = {
    "seen.json": lambda house: house.folder(house.bad) / "dataset/seen/seen.json",
    "log.jsonl": lambda house: house.folder(house.bad) / "log.jsonl",
    "a LoRA": lambda house: house.models / "lora.safetensors",
    "model_index.json": lambda house: house.models / "whole/model_index.json",
    "config.json": lambda house: house.models / "whole/unet/config.json",
    "a branch": lambda house: house.presets / "sd15.toml",
    "the default branch": lambda house: house.presets / "flux1.toml",
    "branch fast": lambda house: house.presets / "fast.toml",
    "a preset": lambda house: house.presets / "mine.toml",
    "styles": lambda house: house.presets / "looks/styles.toml",
    "film": lambda house: house.presets / "looks/film.toml",
    "annotators": lambda house: house.presets / "looks/annotators.toml",
    "a pack": lambda house: house.presets / "packs/headshots.toml",
    "a pack of one's own": lambda house: house.outputs / "packs/own.toml",
}
OF_A_TUNE = ("tunes", "live")
OF_MODELS = ("gallery", "choices")
READERS: dict[str, tuple[str, ...]] = {  # what reads a kind; all readers are tried with all kinds broken at once, below
    "seen.json": OF_A_TUNE,
    "log.jsonl": OF_A_TUNE,
    "a LoRA": OF_MODELS,
    "model_index.json": OF_MODELS,
    "config.json": OF_MODELS,
    **dict.fromkeys(("a branch", "the default branch", "branch fast"), (*OF_MODELS, "packs", "tunes")),
    "a preset": ("presets", "choices"),
    **dict.fromkeys(("styles", "film", "annotators"), ("prompts", "tunes")),
    **dict.fromkeys(("a pack", "a pack of one's own"), ("packs", "shelf")),
}


def annotator(house: House) -> str:
    try:
        looks.annotator_row(house.presets, "depth")
    except ValueError as problem:
        return str(problem)
    return ""


REPORTS: dict[str, Callable[[House], object]] = {  # where a broken one is told of; nothing where it is whole
    "seen.json": lambda house: not house.seen(),
    "log.jsonl": lambda house: not house.readings(),
    "a LoRA": lambda house: house.base("lora.safetensors").error,
    "model_index.json": lambda house: house.base("whole").error,
    "config.json": lambda house: house.base("whole").error,
    "a branch": lambda house: house.train_on("sd15") and house.base("sd15").error,
    "the default branch": lambda house: house.train_on("flux1") and house.base("flux1").error,
    "branch fast": lambda house: house.train_on("fast") and house.base("fast").error,
    "a preset": lambda house: house.train_on("sd15", preset="mine"),
    "styles": lambda house: house.prompt(style="Cinematic"),
    "film": lambda house: house.prompt(color_grading="Film Portra"),
    "annotators": annotator,
    "a pack": lambda house: house.pack("headshots").get("error"),
    "a pack of one's own": lambda house: house.pack("own").get("error"),
}
# What no file can hold and be whole; of the rest, some is a TOML or a list like any other.
NEVER_WHOLE = ("not UTF-8", "zeros", "brackets that open", "a folder", "a link to itself")


def spoil(file: Path, fault: str) -> None:
    if fault in CONTENTS:
        file.write_bytes(CONTENTS[fault](file.read_bytes()))
    else:
        instead_of(file, fault)


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_reported_where_it_belongs_and_leaves_the_rest_as_it_is(
    house: House, broken: Callable[[str], Path], kind: str
) -> None:
    neighbour = tunes.get_tune(house.services, house.good)
    file = broken(kind)
    good, problems = file.read_bytes(), []
    for fault in (*CONTENTS, *INSTEAD):
        remove(file)
        file.write_bytes(good)
        spoil(file, fault)
        problems += [f"{fault}: {problem}" for problem in house.reads(*READERS[kind])]
        try:
            told = REPORTS[kind](house)
        except StopIteration:  # a link to itself is no pack and no index
            told = fault == "a link to itself"
        if fault in NEVER_WHOLE and not told:
            problems.append(f"{fault}: nobody is told")
    assert problems == []
    assert tunes.get_tune(house.services, house.good) == neighbour


def test_with_everything_broken_at_once_all_is_answered(house: House, broken: Callable[[str], Path]) -> None:
    for fault in ("cut", "not UTF-8", "a folder"):
        for kind in FILES:
            file = FILES[kind](house) if fault != "cut" else broken(kind)
            remove(file)
            file.write_bytes(b"[a]\nb = {")
            spoil(file, fault)
        assert house.requests() == house.reads(*READS) == []
        assert page.build(house.services)
        assert all(house.base(branch).error for branch in ("sd15", "flux1", "fast"))
        assert [base.id for base in bases.list_bases(house.settings) if base.branch == "sdxl1" and not base.error]
        assert house.train_on("sd15").startswith("branch: sd15 cannot be used: sd15.toml cannot be read")


@pytest.mark.parametrize("kind", ["seen.json", "log.jsonl"])
def test_what_is_only_shown_is_left_out_with_one_warning(
    house: House, broken: Callable[[str], Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken(kind).write_bytes(b"\xff")
    files._logged.clear()
    for _ in range(3):
        assert house.reads(*OF_A_TUNE) == []
    said = [record.message for record in caplog.records if record.name == "tunebooth.files"]
    assert len(said) == 1 and said[0].startswith(f"{kind} cannot be read: ")


def test_values_of_wrong_types_are_not_shown(house: House, broken: Callable[[str], Path]) -> None:
    seen, log, problems = broken("seen.json"), broken("log.jsonl"), []
    for name, value in spoiled(SEEN):
        seen.write_bytes(as_json(value))
        problems += [f"{name}: {problem}" for problem in house.reads(*OF_A_TUNE)]
    for name, value in spoiled(READING):
        log.write_bytes(as_json(READING) + b"\n" + as_json(value) + b"\n")
        problems += [f"{name}: {problem}" for problem in house.reads("live")]
    assert problems == []
    log.write_bytes(as_json(READING) + b"\n" + as_json(READING)[:20])
    assert house.readings() == [READING]  # a line that a crash cut off is left out alone
    for file in ("../../../2/images/000.png", "/etc/passwd", "..", ""):
        seen.write_bytes(as_json([SEEN[0] | {"file": file}]))
        assert house.seen() == []  # no link to another tune's file is signed


HEADERS: dict[str, Any] = {
    "a length beyond the end": b"\xff\xff\xff\xff\x00\x00\x00\x00{}",
    "the largest length": b"\xff" * 8 + b"{}",
    "no length": b"\x02\x00",
    "a list": safetensors([]),
    "a number": safetensors(7),
    "null": safetensors(None),
    "a tensor that is null": safetensors({KEY: None}),
    "a tensor that is a list": safetensors({KEY: [1]}),
    "not UTF-8": safetensors(b'{"\xff": {}}'),
    "deep": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a lone surrogate": safetensors(rb'{"__metadata__": {"tunebooth.root": "\ud800"}}'),
    **{
        f"metadata is {metadata!r:.20}": safetensors(HEADER | {"__metadata__": metadata}, bytes(4 * 768 * 4))
        for metadata in ([], 7, "x", {"a": 1}, {"a": {}}, {"tunebooth.root": ["x"]}, {"ss_sd_model_name": None})
    },
    **{
        f"shape is {shape!r:.20}": safetensors({KEY: HEADER[KEY] | {"shape": shape}}, bytes(4 * 768 * 4))
        for shape in (None, 5, "x", {}, [-4, 768], [2**62, 2**62], [HUGE], [4.5, 768], [[4], 768], [4, 767], ["4", 768])
    },
    **{
        f"offsets are {offsets!r:.20}": safetensors({KEY: HEADER[KEY] | {"data_offsets": offsets}}, bytes(4 * 768 * 4))
        for offsets in (
            None, [], [0], [0, 12288, 1], [0, "12288"], [-1, 12287], [12288, 0], [0, 1e999], [0, HUGE], [0, 12289]
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_a_model_with_an_absurd_header_is_listed_with_the_reason(
    house: House, broken: Callable[[str], Path], fault: str
) -> None:
    broken("a LoRA").write_bytes(HEADERS[fault])
    assert house.reads(*OF_MODELS) == []
    assert str(house.base("lora.safetensors").error).startswith("it is")


def test_metadata_that_is_null_is_none(house: House, broken: Callable[[str], Path]) -> None:
    broken("a LoRA").write_bytes(safetensors(HEADER | {"__metadata__": None}, bytes(4 * 768 * 4)))
    assert house.base("lora.safetensors").error is None


@pytest.mark.parametrize(("kind", "good"), [("model_index.json", INDEX), ("config.json", UNET)])
def test_wrong_values_in_a_diffusers_folder_do_not_hide_the_other_bases(
    house: House, broken: Callable[[str], Path], kind: str, good: dict[str, Any]
) -> None:
    file, problems = broken(kind), []
    for name, value in spoiled(good):
        file.write_bytes(as_json(value))
        problems += [f"{name}: {problem}" for problem in house.reads("gallery")]
    assert problems == []


OF_TOML = ("x", HUGE, float("inf"), ["x"], {"a": {"b": 1}})


def tomls(good: dict[str, Any], *sections: str) -> Iterator[tuple[str, bytes]]:
    """A TOML with one value in these sections (all of them where none is named) taken out, or of another type."""
    for name, value in spoiled(good, OF_TOML):
        if not sections or name.partition("=")[0].removeprefix("no ").split(".")[0] in sections:
            yield name, tomlkit.dumps(value).encode()


def use(house: House, branch: str) -> None:
    """Everything that is read of a branch's TOML. Raises what nobody expects of a broken one."""
    house.train_on(branch)
    house.train_on(branch, preset="mine")
    for read in (
        lambda: branch_file.render_config(house.presets, branch),
        lambda: branch_file.control_row(house.presets, branch, "canny"),
        lambda: branch_file.least_gib(house.presets, branch, "lora"),
        lambda: fitted(house, branch),
    ):
        try:
            read()
        except (InvalidRequest, Unreadable):
            continue


def fitted(house: House, branch: str) -> object:
    config = resolve.resolve(
        house.presets, branch=branch, model_type="lora", preset=None, name="man", photos=4, steps=None, args=None
    )
    return resolve.fit(house.presets, config, branch=branch, model_type="lora", asked=None, free_gib=1.0)


def test_wrong_values_in_the_toml_of_a_branch_are_that_branch_s_error(
    house: House, broken: Callable[[str], Path]
) -> None:
    file, problems = broken("a branch"), []
    good = tomllib.loads(file.read_text())
    words = ("steps_per_photo", "rank", "resolution", "person", "memory", "least_gib")  # the others are like `rank`
    good["lora"] = {key: value for key, value in good["lora"].items() if key in words}
    sections = ("token", "model_type", "warnings", "why_not", "instead", "without", "render", "base", "detect", "lora")
    for name, content in tomls(good, *sections):
        file.write_bytes(content)
        try:
            use(house, "sd15")
        except Exception as problem:  # noqa: BLE001  # whatever a broken file makes of it
            problems.append(f"{name}: {type(problem).__name__} {problem!s:.80}")
        problems += [f"{name}: {problem}" for problem in house.reads("gallery")]
    assert problems == []


@pytest.mark.parametrize("kind", ["a preset", "a pack", "styles", "film", "annotators"])
def test_wrong_values_in_a_toml_are_refused_where_it_is_named(
    house: House, broken: Callable[[str], Path], kind: str
) -> None:
    file, problems = broken(kind), []
    good = tomllib.loads(file.read_text())
    for key in list(good)[1:] if kind in ("styles", "film") else ():  # one is as good as ten
        del good[key]
    for name, content in tomls(good):
        file.write_bytes(content)
        try:
            REPORTS[kind](house)
        except Exception as problem:  # noqa: BLE001  # whatever a broken file makes of it
            problems.append(f"{name}: {type(problem).__name__} {problem!s:.80}")
        problems += [f"{name}: {problem}" for problem in house.reads(READERS[kind][0])]
    assert problems == []


def test_a_name_that_is_not_utf8_is_reported_and_hides_nothing(house: House) -> None:
    odd = os.fsdecode(b"\xff")
    tune = house.folder(house.bad)
    odd_files = {
        house.models / f"{odd}.safetensors": LORA,
        house.models / os.fsdecode(b"a\xfe") / "model_index.json": as_json(INDEX),
        house.presets / f"{odd}.toml": b"[lora]\n",
        house.presets / "packs" / f"{odd}.toml": (ROOT / "presets/packs/headshots.toml").read_bytes(),
        tune / "samples" / f"step-{odd}.png": photo(),
        tune / "samples" / f"step-00000{odd}.png": photo(),
        tune / "samples" / "step-last.png": photo(),
        tune / "checkpoints" / f"step-00000{odd}" / FORMATS["kohya"]: LORA,
        tune / "images" / f"{odd}.png": photo(),
    }
    try:
        for file, content in odd_files.items():
            write(file, content)
        assert house.requests() == house.reads(*READS) == []
        for title in ("\ufffd.safetensors", "a\ufffd"):
            assert "its name is not UTF-8" in house.base(title).error
        assert "\ufffd" not in "".join(settle.list_presets(house.services))
        assert "a pack's name must be" in house.pack("\ufffd")["error"]
        assert [one["step"] for one in answers.saved_snapshots(house.services, house.bad)] == [10]
    finally:
        for file in odd_files:
            remove(file)


COLUMNS = {
    "tunes": ("characteristics", "photos", "files", "progress", "warnings"),
    "prompts": ("files", "progress", "warnings", "kept", "attributes", "named", "parsed"),
}
TEXTS = [
    "", "{", "null", "7", '"x"', "[]", "{}", "[null]", "[1]", '[{"a": 1}]', '{"a": 1}', '{"a": null}', "[NaN]", "1e999",
    '{"loss": 1e999}', '{"step": "x"}', r'["\ud800"]', r'{"\ud800": "\ud800"}', "[" * 100_000, "9" * 5000,
    '{"super_resolution": []}', '{"ar": {}}', '{"text": 1, "models": 2, "flags": 3}',
]  # fmt: skip


@pytest.mark.parametrize(("table", "column"), [(table, column) for table, all_ in COLUMNS.items() for column in all_])
def test_a_broken_column_is_a_warning_of_its_own_row(house: House, table: str, column: str) -> None:
    row_id = house.bad if table == "tunes" else tunes.get_tune(house.services, house.bad).prompts[0].id
    neighbour, problems = tunes.get_tune(house.services, house.good), []

    def put(text: str) -> None:
        with house.store.transaction() as db:
            db.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (text, row_id))

    with house.store.transaction() as db:
        good = db.execute(f"SELECT {column} FROM {table} WHERE id = ?", (row_id,)).fetchone()[0]
    try:
        for text in TEXTS:
            put(text)
            problems += [f"{text:.20}: {problem}" for problem in house.reads("tunes", "prompts")]
        assert problems == []
        put("{")
        tune = tunes.get_tune(house.services, house.bad)
        told = tune.warnings if table == "tunes" else tune.prompts[0].warnings
        only_shown = column in ("progress", "warnings", "kept")
        message = f"{column} cannot be read: the database is damaged there"
        assert (message in told) is not only_shown
        assert tunes.get_tune(house.services, house.good) == neighbour
    finally:
        put(good)


def test_a_request_that_cannot_be_read_makes_no_pack(house: House) -> None:
    file = house.folder(house.bad) / "request.json"
    good, packs = file.read_bytes(), sorted((house.outputs / "packs").iterdir())
    try:
        for content in (b"", b"{", b"[]", b"{}", b'{"args": 7}', b"\xff"):
            file.write_bytes(content)
            with pytest.raises(Conflict, match=r"cannot be made into a pack: request\.json cannot be read"):
                pack_verbs.save_pack(house.services, house.bad)
    finally:
        file.write_bytes(good)
    assert sorted((house.outputs / "packs").iterdir()) == packs


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_permission_is_reported(house: House, broken: Callable[[str], Path], kind: str) -> None:
    file = broken(kind)
    file.chmod(0)
    try:
        assert house.reads(*READS) == []
        assert REPORTS[kind](house)
    finally:
        file.chmod(0o644)


def test_a_toml_that_is_mended_is_read_again(house: House, broken: Callable[[str], Path]) -> None:
    file = broken("a branch")
    good = file.read_bytes()
    file.write_bytes(good[:200])
    assert house.train_on("sd15")
    file.write_bytes(good)
    assert house.train_on("sd15") == ""
