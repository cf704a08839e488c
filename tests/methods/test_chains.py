"""Tunes on earlier tunes, models in other formats, and faces in prompts: through the verbs and the worker."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from tests.helpers.fast import FAST_ID
from tests.helpers.methods import ROUNDING, SOME, distance, picture
from tests.helpers.shared import SHARED
from tests.helpers.studio import Studio
from tests.helpers.web import client_of
from trainer.branches.protocol import load_branch
from trainer.contract.errors import Conflict, InvalidRequest, NotFound
from trainer.contract.photos import Upload
from trainer.library import bases
from trainer.library.bases import Base
from trainer.methods import lora
from trainer.names import FORMATS
from trainer.photos.decoder import Decoder
from trainer.settings import read_settings
from trainer.studio import answers, models, prompts, rows, tunes
from trainer.studio.expiry import expire
from trainer.studio.rows import Services

FACES = SHARED / "data" / "faces"
PROMPT = {"text": "ohwx dog", "num_images": 1, "steps": 2, "w": 64, "h": 64}
ARGS = "resolution=64 lr=2e-2 warmup_steps=0 rank=2 alpha=2 save_dtype=float32"


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory, photos: list[Path], tiny_sd15: Path, tiny_sdxl1: Path, tiny_flux1: Path
) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("chains")
    for base in (tiny_sd15, tiny_sdxl1, tiny_flux1):
        shutil.copytree(base, folder / "models" / base.name)
    small = folder / "weights"
    small.mkdir()
    if SHARED.is_dir():
        for name in ("detection_mobilenet0.25_Final.pth", "mobilefacenet_112.onnx"):
            shutil.copy(SHARED / "weights" / name, small)
    decoder = Decoder(read_settings(outputs=folder / "decoder", models=folder / "models"))
    made = Studio(folder, decoder, photos, weights=small)
    made.worker.start()
    yield made
    made.close()
    decoder.close()


def base_id(studio: Studio, title: str) -> int:
    return next(int(base["id"]) for base in models.list_base_tunes(studio.services) if base["title"] == title)


def trained(studio: Studio, title: str, base: int, model_type: str = "lora", **more: Any) -> int:
    """A tune of three steps that is done, with its prompt."""
    asked = {"branch": None, "steps": 3, "args": ARGS, "prompts_attributes": [PROMPT], "token": "ohwx"}
    if model_type == "checkpoint":
        asked["args"] = "resolution=64 lr=1e-3 warmup_steps=0 prior_weight=0 save_dtype=float32"
    tune = studio.ended(studio.create(title, base_tune_id=base, model_type=model_type, **asked | more))
    assert (tune.status, tune.error) == ("trained", None)
    assert [(prompt.status, prompt.error) for prompt in tune.prompts] == [("rendered", None)] * len(tune.prompts)
    return tune.id


def model(studio: Studio, tune_id: int) -> Path:
    return rows.tune_folder(studio.services, tune_id) / "model"


# On an earlier tune


@pytest.mark.long
def test_tunes_stand_on_each_other_and_say_so(studio: Studio) -> None:
    root = base_id(studio, "sd15")
    first = trained(studio, "first", root, token="rexx")
    second = trained(studio, "second", first, token=None)  # a LoRA that goes on
    third = trained(studio, "third", second, "checkpoint")
    fourth = trained(studio, "fourth", third, "pti", args=f"{ARGS} token_lr=1e-2")
    assert tunes.get_tune(studio.services, second).token == "rexx"  # the earlier one's
    assert models.lineage(studio.services, fourth) == [
        f"third (tune {third}, checkpoint)", f"second (tune {second}, lora)", f"first (tune {first}, lora)",
    ]  # fmt: skip
    with safe_open(model(studio, fourth) / FORMATS["kohya"], "pt") as file:
        told = file.metadata()
    assert told["tunebooth.base"] == "third"
    assert json.loads(told["tunebooth.stands_on"]) == ["second", "first", "sd15"]
    for tune, others in ((first, [second]), (second, [third]), (third, [fourth])):
        with pytest.raises(Conflict, match=rf"is the base of tunes {others[0]} \("):
            tunes.delete_tune(studio.services, tune)
    answer = client_of(studio.services).delete(f"/tunes/{third}")
    assert answer.status_code == 409 and f"{fourth} (fourth)" in answer.json()["error"]
    tunes.delete_tune(studio.services, fourth)
    tunes.delete_tune(studio.services, third)
    assert not rows.tune_folder(studio.services, third).exists()


@pytest.mark.long
def test_a_lora_that_went_on_is_rendered_on_the_root_alone(studio: Studio) -> None:
    root = base_id(studio, "flux1")
    first = trained(studio, "root of two", root)
    second = trained(studio, "went on", first)
    ranks = {
        len(value) for key, value in load_file(model(studio, second) / lora.DIFFUSERS_FILE).items() if "lora_A" in key
    }
    assert ranks == {2}
    row = studio.store.get("tunes", second)
    assert row is not None
    base = bases.of_tune(studio.settings, row, lambda tune_id: studio.store.get("tunes", tune_id))
    assert (base.path, base.model) == (studio.settings.models / "flux1", model(studio, second))
    prompt = prompts.create_prompt(studio.services, root, {**PROMPT, "text": f"ohwx dog <lora:{second}:1>"})
    assert (prompt.tune_id, prompt.tunes) == (root, [second])


@pytest.mark.long
def test_a_flux1_checkpoint_has_its_other_parts_from_its_base(studio: Studio) -> None:
    args = "resolution=64 lr=2e-2 warmup_steps=0"
    first = trained(studio, "flux whole", base_id(studio, "flux1"), "checkpoint", args=args)
    trained(studio, "flux on whole", first)
    trained(studio, "flux whole on whole", first, "checkpoint", args=args)


@pytest.mark.long
def test_learned_tokens_are_no_base_for_a_checkpoint_and_snapshots_have_theirs(studio: Studio) -> None:
    words = trained(studio, "a word", FAST_ID, "pti", branch="fast", args="", prompts_attributes=[])
    with pytest.raises(InvalidRequest) as refused:
        studio.create("on a word", base_tune_id=words, branch=None, model_type="checkpoint")
    assert "a checkpoint cannot hold" in refused.value.problems["base_tune_id"][0]
    models = {str(moment["model"]).partition("?")[0] for moment in answers.saved_snapshots(studio.services, words)}
    assert {model.rpartition("/")[2] for model in models} == {FORMATS["bundled"], "None"}


@pytest.mark.parametrize("state", ["canceled", "faceid"])
def test_what_has_no_weights_is_no_base(studio: Studio, state: str) -> None:
    tune = trained(studio, f"no base: {state}", FAST_ID, branch="fast", prompts_attributes=[])
    studio.store.update("tunes", tune, **({"status": state} if state == "canceled" else {"method": state}))
    with pytest.raises(InvalidRequest) as refused:
        studio.create(f"on {state}", base_tune_id=tune, branch=None)
    expected = "it is canceled" if state == "canceled" else "holds a face"
    assert expected.removeprefix("it ") in refused.value.problems["base_tune_id"][0]


@pytest.mark.long
def test_fast_takes_an_earlier_fast_tune_as_base_and_nothing_else(studio: Studio) -> None:
    first = trained(studio, "quick", FAST_ID, branch="fast", args="", prompts_attributes=[])
    second = tunes.get_tune(
        studio.services, trained(studio, "quicker", first, branch="fast", args="", prompts_attributes=[])
    )
    assert not any("not used" in warning for warning in second.warnings)
    assert models.lineage(studio.services, second.id) == [f"quick (tune {first}, lora)"]
    other = studio.ended(studio.create("on its own", base_tune_id=690204, branch="fast", prompts_attributes=[]))
    assert any("base_tune_id 690204 is not used" in warning for warning in other.warnings)


@pytest.mark.long
def test_a_lora_file_in_the_models_folder_is_a_base(studio: Studio) -> None:
    first = trained(studio, "to be carried away", base_id(studio, "sd15"), "pti", args=f"{ARGS} token_lr=1e-2")
    for name, file in (
        ("theirs", FORMATS["kohya"]),
        ("theirs_emb", FORMATS["embeddings"]),
        ("bundle", FORMATS["bundled"]),
    ):
        shutil.copy(model(studio, first) / file, studio.settings.models / f"{name}.safetensors")
    listed = {base["title"]: base for base in models.list_base_tunes(studio.services)}
    assert "theirs_emb.safetensors" not in listed
    for name in ("theirs", "bundle"):
        base = listed[f"{name}.safetensors"]
        assert (base["branch"], base["error"], base["stands_on"]) == ("sd15", None, ["sd15"])
        tune = tunes.get_tune(studio.services, trained(studio, f"on {name}", base["id"]))
        assert (model(studio, tune.id) / FORMATS["embeddings"]).exists()  # brought along
        assert not any("missing" in warning for warning in tune.warnings)
    (studio.settings.models / "theirs_emb.safetensors").unlink()
    lonely = tunes.get_tune(studio.services, trained(studio, "on theirs alone", listed["theirs.safetensors"]["id"]))
    assert any("theirs_emb.safetensors is missing" in warning for warning in lonely.warnings)


@pytest.mark.parametrize(
    ("key", "shape", "branch"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", [4, 3072], "flux1"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", [4, 3072], "flux1"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", [4, 640], "sdxl1"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", [4, 1280], "sdxl1"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", [4, 320], "sd15"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", [4, 2048], "sdxl1"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", [4, 768], "sd15"),
    ],
)
def test_the_branch_of_a_lora_file_is_recognized_by_its_keys(
    tmp_path: Path, key: str, shape: list[int], branch: str
) -> None:
    settings = read_settings(outputs=tmp_path / "outputs", models=tmp_path / "models")
    save_file({key: torch.zeros(shape)}, settings.models / "theirs.safetensors")
    found = next(base for base in bases.list_bases(settings) if base.title == "theirs.safetensors")
    assert (found.branch, found.error) == (branch, None)
    under = bases.list_bases(settings)
    assert found.repository == next(base for base in under if base.branch == branch).repository  # the branch's default


@pytest.mark.parametrize(("root", "expected"), [("Realistic Vision 5.1", 690204), ("Tunebooth fast", FAST_ID)])
def test_a_lora_file_of_ours_has_the_base_that_it_names(tmp_path: Path, root: str, expected: int) -> None:
    settings = read_settings(outputs=tmp_path / "outputs", models=tmp_path / "models")
    file, key = settings.models / "ours.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    # Trained on an earlier tune, whose title is nobody's here.
    save_file({key: torch.zeros(4, 320)}, file, {"tunebooth.base": "an earlier tune", "tunebooth.root": root})
    known = bases.list_bases(settings)
    found = next(base for base in known if base.title == "ours.safetensors")
    under = next(base for base in known if base.id == expected)
    assert (found.weights, found.chain, found.error) == (under.weights, (root,), None)
    save_file({key: torch.zeros(4, 320)}, file, {"tunebooth.root": "my checkpoint"})
    lost = next(base for base in bases.list_bases(settings) if base.title == "ours.safetensors")
    assert lost.error == "it was trained on 'my checkpoint', which is not among the bases"
    with pytest.raises(InvalidRequest, match="my checkpoint"):
        bases.resolve(settings, lost.id, None)


def test_a_base_that_is_deleted_while_photos_come_refuses_the_tune(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = trained(studio, "soon gone", FAST_ID, branch="fast", args="", prompts_attributes=[])
    insert = tunes._insert

    def late(services: Services, *arguments: Any) -> Any:
        tunes.delete_tune(services, base)
        return insert(services, *arguments)

    monkeypatch.setattr(tunes, "_insert", late)
    before = len(studio.store.find("tunes"))
    with pytest.raises(InvalidRequest, match=f"{base} is no base any more"):
        studio.create("on nothing", base_tune_id=base, branch="fast")
    assert len(studio.store.find("tunes")) == before - 1


def test_what_is_in_use_does_not_expire_and_an_expired_child_does_not_count(studio: Studio) -> None:
    first = trained(studio, "parent", FAST_ID, branch="fast", args="", prompts_attributes=[])
    second = trained(studio, "child", first, branch="fast", args="", prompts_attributes=[])

    def expired(tune_id: int) -> bool:
        row = studio.store.get("tunes", tune_id)
        assert row is not None
        expire(studio.settings, studio.store, row)
        return tunes.get_tune(studio.services, tune_id).status == "expired"

    assert not expired(first)
    made = studio.store._insert("exports", {"tune_id": second, "format": "checkpoint"})  # no job: it is never made
    studio.store.update("exports", made, status="exporting")
    assert not expired(second)
    studio.store.delete("exports", made)
    assert expired(second) and expired(first)


# In another format


def asked(studio: Studio, tune_id: int, format_: str) -> str:
    """The link to a model in a format, once it is made."""
    client, deadline = client_of(studio.services), time.monotonic() + 120
    while time.monotonic() < deadline:
        answer = client.get(f"/tunes/{tune_id}/model", params={"format": format_}, follow_redirects=False)
        if answer.status_code == 307:
            return str(answer.headers["location"])
        assert answer.status_code == 202 and answer.headers["retry-after"] == "5", answer.text
        time.sleep(0.1)
    pytest.fail("it was not made")


def downloaded(studio: Studio, link: str) -> bytes:
    answer = client_of(studio.services).get(link.partition("://")[2].partition("/")[2] and "/" + link.split("/", 3)[3])
    assert answer.status_code == 200
    return answer.content


@pytest.mark.parametrize("family", SOME)
def test_a_lora_is_merged_into_a_whole_model_that_renders_alike(studio: Studio, family: str, tmp_path: Path) -> None:
    tune = trained(studio, f"merged {family}", base_id(studio, family), prompts_attributes=[])
    link = asked(studio, tune, "checkpoint")
    merged = rows.tune_folder(studio.services, tune) / "exports" / "checkpoint" / FORMATS["checkpoint"]
    assert downloaded(studio, link) == merged.read_bytes()
    root = Base(1, family, family, path=studio.settings.models / family)
    plain = load_branch(root, torch.device("cpu"), tmp_path)
    plain.pipeline.set_progress_bar_config(disable=True)
    bare = picture(plain.pipeline, "a dog")
    lora.apply(plain, model(studio, tune), 1.0)
    expected = picture(plain.pipeline, "a dog")
    rest = root if family == "flux1" else None
    whole = load_branch(Base(2, "m", family, path=merged, rest=rest), torch.device("cpu"), tmp_path)
    whole.pipeline.set_progress_bar_config(disable=True)
    if family == "sdxl1":  # pti: its words are no part of a whole model, and "a dog" has none of them
        assert (model(studio, tune) / FORMATS["embeddings"]).exists()
    assert distance(picture(whole.pipeline, "a dog"), expected) < 1e-3
    assert distance(expected, bare) > 5e-3
    with safe_open(merged, "pt") as file:
        assert not file.metadata()["modelspec.architecture"].endswith("/lora")


@pytest.mark.long
@pytest.mark.parametrize(("family", "dtype"), [("sd15", "float16"), ("flux1", "bfloat16")])
def test_a_merge_in_half_precision_is_the_picture_but_for_its_digits(
    studio: Studio, family: str, dtype: str, tmp_path: Path
) -> None:
    args = ARGS.replace("float32", dtype)
    tune = trained(studio, f"half {family}", base_id(studio, family), args=args, prompts_attributes=[])
    asked(studio, tune, "checkpoint")
    merged = rows.tune_folder(studio.services, tune) / "exports" / "checkpoint" / FORMATS["checkpoint"]
    assert {value.dtype for value in load_file(merged).values()} == {getattr(torch, dtype)}
    root = Base(1, family, family, path=studio.settings.models / family)
    plain = load_branch(root, torch.device("cpu"), tmp_path)
    rest = root if family == "flux1" else None
    whole = load_branch(Base(2, "m", family, path=merged, rest=rest), torch.device("cpu"), tmp_path)
    bare = picture(plain.pipeline, "a dog")
    lora.apply(plain, model(studio, tune), 1.0)
    expected = picture(plain.pipeline, "a dog")
    assert distance(picture(whole.pipeline, "a dog"), expected) < 0.25 * distance(expected, bare)


def test_a_checkpoint_comes_as_a_diffusers_folder_that_renders_alike(studio: Studio, tmp_path: Path) -> None:
    tune = trained(studio, "unpacked", base_id(studio, "sd15"), "checkpoint", prompts_attributes=[])
    (tmp_path / "d.zip").write_bytes(downloaded(studio, asked(studio, tune, "diffusers")))
    with zipfile.ZipFile(tmp_path / "d.zip") as packed:
        packed.extractall(tmp_path / "folder")
    folder = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True, safety_checker=None)
    file = model(studio, tune) / FORMATS["checkpoint"]
    single = StableDiffusionPipeline.from_single_file(
        str(file), config=str(file.with_suffix("")), local_files_only=True, safety_checker=None
    )
    for pipeline in (folder, single):
        pipeline.set_progress_bar_config(disable=True)
    assert distance(picture(folder), picture(single)) < ROUNDING


def test_formats_that_are_there_and_those_that_are_not(studio: Studio) -> None:
    tune = trained(studio, "in forms", FAST_ID, "pti", branch="fast", args="", prompts_attributes=[])
    client = client_of(studio.services)
    for format_ in ("kohya", "diffusers", "embeddings", "bundled"):
        answer = client.get(f"/tunes/{tune}/model", params={"format": format_}, follow_redirects=False)
        assert answer.status_code == 307 and FORMATS[format_] in answer.headers["location"]
    answer = client.get(f"/tunes/{tune}/model", follow_redirects=False)
    assert FORMATS["kohya"] in answer.headers["location"]
    answer = client.get(f"/tunes/{tune}/model", params={"format": "onnx"})
    assert (
        answer.status_code == 422 and "bundled, checkpoint, diffusers, embeddings, kohya" in answer.json()["format"][0]
    )
    with pytest.raises(NotFound):
        models.model_link(studio.services, 99999)


@pytest.mark.long
def test_an_export_that_fails_says_why_once_and_is_tried_again(studio: Studio) -> None:
    tune = trained(studio, "spoilt", base_id(studio, "sd15"), prompts_attributes=[])
    file = model(studio, tune) / lora.DIFFUSERS_FILE
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert models.model_link(studio.services, tune, "checkpoint") is None
    deadline = time.monotonic() + 60
    while models.model_formats(studio.services, tune)["checkpoint"][1] != "failed" and time.monotonic() < deadline:
        time.sleep(0.1)
    answer = client_of(studio.services).get(f"/tunes/{tune}/model", params={"format": "checkpoint"})
    assert answer.status_code == 409 and "could not be made into checkpoint" in answer.json()["error"]
    file.write_bytes(good)
    assert "exports/checkpoint" in asked(studio, tune, "checkpoint")
    assert tunes.get_tune(studio.services, tune).status == "trained"
    assert [p.name for p in (rows.tune_folder(studio.services, tune) / "exports").iterdir()] == ["checkpoint"]


# Faces


@pytest.fixture(scope="module")
def people(studio: Studio) -> dict[str, int]:
    """The faceid tunes of two people."""
    if not FACES.is_dir():
        pytest.skip("the photos in ../shared are not on this machine")
    unet = StableDiffusionPipeline.from_pretrained(
        studio.settings.models / "sd15", local_files_only=True, safety_checker=None
    ).unet
    tiny.make_tiny_faceid(studio.settings.weights / "ip-adapter-faceid_sd15.bin", unet)
    return {person: face_tune(studio, person) for person in ("person_a", "person_b")}


def face_tune(studio: Studio, person: str, *photos: Path, **more: Any) -> int:
    uploads = [Upload(path.name, path) for path in photos or sorted((FACES / person).glob("*.jpg"))]
    request = {
        "title": f"the face of {person}", "name": "person", "model_type": "faceid",
        "base_tune_id": base_id(studio, "sd15"), **more,
    }  # fmt: skip
    return tunes.create_tune(studio.services, request, uploads)[0].id


@pytest.fixture(autouse=True)
def any_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny adapter is not the published file."""
    from dataclasses import replace

    from trainer.library import weights

    published = weights.face_adapter
    monkeypatch.setattr(weights, "face_adapter", lambda *asked: replace(published(*asked), sha256=None))


def test_a_face_is_ready_at_once(studio: Studio, people: dict[str, int]) -> None:
    tune = tunes.get_tune(studio.services, people["person_a"])
    assert (tune.status, tune.token, tune.args, tune.model_type) == ("trained", None, None, "faceid")
    assert tune.trained_at == tune.started_training_at and tune.ckpt_url and "faceid.safetensors" in tune.ckpt_url
    assert all(photo.faces for photo in tune.photos)
    assert models.model_link(studio.services, tune.id, "faceid")


def test_photos_without_a_face_are_refused_with_what_was_seen(studio: Studio, people: dict[str, int]) -> None:
    before = [tune.id for tune in tunes.list_tunes(studio.services)]
    with pytest.raises(InvalidRequest) as refused:
        face_tune(studio, "nobody", FACES / "noface" / "coffee.jpg")
    assert "no face" in str(refused.value.problems["images"])
    assert [tune.id for tune in tunes.list_tunes(studio.services)] == before


def rendered(studio: Studio, tune_id: int, text: str) -> Image.Image:
    prompt = prompts.create_prompt(studio.services, tune_id, {**PROMPT, "text": text, "seed": 3})
    deadline = time.monotonic() + 120
    while (now := prompts.get_prompt(studio.services, prompt.id)).status not in (
        "rendered",
        "failed",
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (now.status, now.error) == ("rendered", None)
    home = studio.settings.outputs / rows.prompt_home(rows.row_of(studio.services, "prompts", now.id))
    return Image.open(home / "prompts" / str(now.id) / "0.png").convert("RGB")


def unlike(one: Image.Image, other: Image.Image) -> bool:
    """By more than the one level that rounding may change: models are loaded again in between."""
    return max(most for _, most in ImageChops.difference(one, other).getextrema()) > 1


@pytest.mark.long
def test_faces_are_put_into_prompts_by_their_number(studio: Studio, people: dict[str, int]) -> None:
    root, (ann, bob) = base_id(studio, "sd15"), people.values()
    tune = trained(studio, "a style to be worn", root, prompts_attributes=[])
    plain = rendered(studio, tune, "a person")
    with_ann, with_bob = (rendered(studio, tune, f"a person <faceid:{one}:1>") for one in (ann, bob))
    assert unlike(plain, with_ann) and unlike(plain, with_bob) and unlike(with_ann, with_bob)
    assert not unlike(rendered(studio, tune, "a person"), plain)  # and nothing of them stays
    assert not unlike(rendered(studio, tune, f"a person <faceid:{ann}:0>"), plain)
    alone = rendered(studio, ann, "a person")
    assert unlike(alone, with_ann)  # without the tune
    assert not unlike(rendered(studio, root, f"a person <faceid:{ann}:1>"), alone)  # on the base, by its number
    assert not unlike(rendered(studio, tune, f"<lora:{tune}:0> a person <faceid:{ann}:1>"), alone)
    on_base = prompts.create_prompt(studio.services, root, {**PROMPT, "text": f"a person <faceid:{ann}:1>"})
    again = studio.store.get("prompts", prompts.duplicate_prompt(studio.services, on_base.id, {"seed": 4}).id)
    assert again is not None and (again["base_id"], again["seed"], again["lora_id"]) == (root, 4, ann)


BAD_NAMES = {
    "nobody": ("a person <faceid:99999:1>", "there is no faceid tune 99999"),
    "two": ("<faceid:{ann}:1> and <faceid:{bob}:1>", "names 2 faces; one is possible"),
    "a name": ("<faceid:ann:1>", "there is no faceid tune ann"),
    "a lora": ("<faceid:{tune}:1>", "there is no faceid tune"),
}


@pytest.mark.parametrize("kind", BAD_NAMES)
def test_a_face_that_cannot_be_put_in_is_refused(studio: Studio, people: dict[str, int], kind: str) -> None:
    tune = next(row["id"] for row in studio.store.find("tunes", method="lora", branch="sd15"))
    text, told = BAD_NAMES[kind]
    text = text.format(ann=people["person_a"], bob=people["person_b"], tune=tune)
    with pytest.raises(InvalidRequest) as refused:
        prompts.create_prompt(studio.services, tune, {"text": text})
    assert told in " ".join(refused.value.problems["text"])


@pytest.mark.long
def test_a_face_of_another_branch_is_refused(studio: Studio, people: dict[str, int]) -> None:
    quick = trained(studio, "quick for faces", FAST_ID, branch="fast", args="", prompts_attributes=[])
    with pytest.raises(InvalidRequest) as refused:
        prompts.create_prompt(studio.services, quick, {"text": f"a person <faceid:{people['person_a']}:1>"})
    assert "is of branch sd15, not fast" in refused.value.problems["text"][0]


@pytest.mark.long
def test_a_face_that_was_deleted_fails_the_prompt_in_words(
    studio: Studio, people: dict[str, int], monkeypatch: pytest.MonkeyPatch, dog_photos: Callable[[int], list[Path]]
) -> None:
    tune = trained(studio, "left behind", base_id(studio, "sd15"), prompts_attributes=[])
    gone = face_tune(studio, "person_a", title="to be deleted")
    blocker = studio.create("keeps the worker busy", branch="fast", steps=30)
    prompt = prompts.create_prompt(studio.services, tune, {**PROMPT, "text": f"a person <faceid:{gone}:1>"})
    tunes.delete_tune(studio.services, gone)
    studio.ended(blocker)
    deadline = time.monotonic() + 60
    while (now := prompts.get_prompt(studio.services, prompt.id)).status not in (
        "rendered",
        "failed",
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now.status == "failed" and f"<faceid:{gone}>: that tune was deleted" in str(now.error)
