"""FaceID: who is on photos, and how rendering puts them in beside whatever else is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import tiny
from tests.helpers.analyzer import SharedAnalyzer
from tests.helpers.fast import fast_base
from tests.helpers.marks import long_but
from tests.helpers.shared import SHARED
from trainer.branches.protocol import load_branch
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest
from trainer.contract.photos import Photo
from trainer.library import weights
from trainer.library.weights import Unavailable
from trainer.methods import faceid
from trainer.photos import faces
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.subject import SAME
from trainer.settings import Settings, read_settings

FACES = SHARED / "data" / "faces"
needs_shared = pytest.mark.skipif(
    not (FACES.is_dir() and (SHARED / "weights").is_dir()), reason="the photos in ../shared are not on this machine"
)
RECOGNIZER = "mobilefacenet_112.onnx"
PERSON_A = [f"person_a/0{number}.jpg" for number in (1, 2, 3)]
PERSON_B = [f"person_b/0{number}.jpg" for number in (1, 2, 3)]


# Who is on the photos


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhotoAnalyzer]:
    """A child with the weights of ../shared, which lives through all tests here."""
    folder = tmp_path_factory.mktemp("looker")
    made = SharedAnalyzer(read_settings(outputs=folder / "o", models=folder / "m", weights=SHARED / "weights"))
    yield made
    made.close()


def fetch_inputs(folder: Path, *names: str) -> list[Photo]:
    """Pictures of ../shared as the intake leaves them in `folder/images`."""
    (folder / "images").mkdir()
    photos = []
    for number, name in enumerate(names):
        file = f"{number:03}{Path(name).suffix}"
        shutil.copy(FACES / name, folder / "images" / file)
        with Image.open(FACES / name) as image:
            width, height = image.size
        photos.append(Photo(name=name, file=file, width=width, height=height, format="JPEG"))
    return photos


def found(name: str, recognizer: str = RECOGNIZER) -> Tensor:
    """The identity (D,) of the largest face of a picture of ../shared."""
    detector = SHARED / "weights" / weights.DETECTOR.name
    face = faces.find(FACES / name, detector, SHARED / "weights" / recognizer)[0]
    return torch.tensor(face.identity)


@needs_shared
def test_one_person_has_one_identity_and_two_have_two() -> None:
    ours, theirs = (torch.stack([found(name) for name in names]) for names in (PERSON_A, PERSON_B))
    for person in (ours, theirs):
        assert (person @ person.T).min() > SAME[RECOGNIZER]
    assert (ours @ theirs.T).max() < SAME[RECOGNIZER]


@needs_shared
def test_the_identity_of_a_tune_is_the_mean_of_its_photos(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    photos, warnings = analyzer.identify(
        tmp_path, fetch_inputs(tmp_path, *PERSON_A), "man", lambda *words: told.append(words)
    )
    identity, facts = faceid.read_identity(tmp_path / "model" / "faceid.safetensors")
    assert identity.shape == (128,) and identity.dtype == torch.float32
    expected = torch.stack([found(name) for name in PERSON_A]).mean(0)
    assert torch.allclose(identity, expected / expected.norm(), atol=1e-5)
    assert facts == {"recognizer": RECOGNIZER, "photos": "3"}
    assert [photo.same_person for photo in photos] == [True] * 3 and not any(photo.dropped for photo in photos)
    assert warnings == [f"w600k_r50.onnx is not available here, so {RECOGNIZER} was used: the published adapters do"
                        " not know its identities"]  # fmt: skip
    assert told[-1] == ("faces are detected", 3, 3)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["faceid.safetensors"]


@needs_shared
def test_another_person_is_left_out_by_name(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    photos, warnings = analyzer.identify(tmp_path, fetch_inputs(tmp_path, *PERSON_A, PERSON_B[0]), "man")
    assert [photo.dropped for photo in photos] == [None] * 3 + ["not the person of the other photos"]
    assert "person_b/01.jpg is left out: not the person of the other photos" in warnings
    assert not photos[3].notes  # nothing of closeups, which a faceid has none of
    identity, facts = faceid.read_identity(tmp_path / "model" / "faceid.safetensors")
    expected = torch.stack([found(name) for name in PERSON_A]).mean(0)
    assert torch.allclose(identity, expected / expected.norm(), atol=1e-5) and facts["photos"] == "3"


@needs_shared
def test_the_person_of_the_other_photos_is_found_in_a_group(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    """One photo has two people side by side, of whom the one that is not meant is the larger."""
    photos = fetch_inputs(tmp_path, PERSON_A[1], PERSON_A[2], PERSON_A[0])
    both = Image.new("RGB", (1524, 768))
    for name, width, place in ((PERSON_B[0], 500, 0), (PERSON_A[0], 1024, 500)):
        with Image.open(FACES / name) as image:
            both.paste(image.resize((width, round(width * image.height / image.width))), (place, 0))
    both.save(tmp_path / "images" / photos[2].file)
    photos[2].width, photos[2].height = both.size
    photos, warnings = analyzer.identify(tmp_path, photos, "man")
    assert [photo.same_person for photo in photos] == [True] * 3 and len(photos[2].faces or []) == 2
    identity, _ = faceid.read_identity(tmp_path / "model" / "faceid.safetensors")
    assert identity @ found(PERSON_A[0]) > SAME[RECOGNIZER] > identity @ found(PERSON_B[0])
    assert len(warnings) == 1  # of the recognizer


@needs_shared
def test_two_photos_that_disagree_both_stay_with_a_warning(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    photos, warnings = analyzer.identify(tmp_path, fetch_inputs(tmp_path, PERSON_A[0], PERSON_B[0]), "person")
    assert [photo.dropped for photo in photos] == [None, None]
    assert warnings[0].startswith("person_a/01.jpg, person_b/01.jpg seem to show different people (likeness ")
    assert "Their faces are mixed in training" in warnings[0]
    assert faceid.read_identity(tmp_path / "model" / "faceid.safetensors")[1]["photos"] == "2"


@needs_shared
def test_one_photo_is_enough_and_of_several_faces_the_most_prominent_one_is_taken(
    analyzer: PhotoAnalyzer, tmp_path: Path
) -> None:
    photos, warnings = analyzer.identify(tmp_path, fetch_inputs(tmp_path, "group/market_two.jpg"), "woman")
    assert sum(face.main for face in photos[0].faces or []) == 1
    assert warnings[0] == "group/market_two.jpg shows 2 faces: the most prominent one is taken"


@needs_shared
def test_photos_without_a_face_are_left_out_by_name(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    photos, warnings = analyzer.identify(tmp_path, fetch_inputs(tmp_path, "noface/coffee.jpg", PERSON_A[0]), "man")
    assert [photo.dropped for photo in photos] == ["no face was found", None]
    assert warnings[0] == "noface/coffee.jpg is left out: no face was found"
    assert faceid.read_identity(tmp_path / "model" / "faceid.safetensors")[1]["photos"] == "1"


@needs_shared
def test_without_any_face_there_is_no_tune_and_each_photo_says_why(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    photos = fetch_inputs(tmp_path, "noface/coffee.jpg", "noface/rocket.jpg", "single/astronaut.png")
    photos[2].dropped = "the same picture as another"
    with pytest.raises(InvalidRequest) as refusal:
        analyzer.identify(tmp_path, photos, "woman")
    assert refusal.value.problems == {
        "images": [
            "noface/coffee.jpg: no face was found",
            "noface/rocket.jpg: no face was found",
            "single/astronaut.png: the same picture as another",
        ]
    }
    assert photos[0].dropped is None and not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["couple", "young women", "dog", "oil painting style"])
def test_a_faceid_is_of_one_person(settings: Settings, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"a faceid is of one person .* and {name} is not"):
        PhotoAnalyzer(settings).identify(tmp_path, [], name)


def test_without_weights_photos_cannot_be_analyzed(settings: Settings, tmp_path: Path) -> None:
    mine = settings.model_copy(update={"weights": tmp_path / "weights"})
    with pytest.raises(
        AnalysisUnavailable, match="face detection is not available: the face detector is not here and HF_HUB_OFFLINE"
    ):
        PhotoAnalyzer(mine).identify(tmp_path, [], "man")


@needs_shared
def test_a_folder_that_cannot_be_written_is_reported(analyzer: PhotoAnalyzer, tmp_path: Path) -> None:
    photos = fetch_inputs(tmp_path, PERSON_A[0])
    (tmp_path / "model").write_text("a file in the way")
    with pytest.raises(AnalysisUnavailable, match="the identity could not be written: "):
        analyzer.identify(tmp_path, photos, "man")


def test_an_identity_is_kept_whole_and_of_length_1(tmp_path: Path) -> None:
    file = tmp_path / "model" / "faceid.safetensors"
    for nothing in ([0.0] * 4, [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="not a vector of finite numbers with a direction"):
            faces.save_identity(nothing, file, {})
    assert not file.exists()
    faces.save_identity([3.0, 4.0], file, {"photos": "1"})
    identity, facts = faceid.read_identity(file)
    assert identity.tolist() == pytest.approx([0.6, 0.8]) and facts == {"photos": "1"}


@needs_shared
def test_the_mirrored_face_counts_but_for_arcface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its identities are those that the adapters were trained on; tried with the weights that are here."""
    image, _ = faces.read_small(FACES / PERSON_A[0])
    rows = faces.detect(image, faces.load_detector(SHARED / "weights" / weights.DETECTOR.name))
    face = faces.align(image, rows[0, 5:].reshape(5, 2))

    def apart() -> float:
        one, other = (torch.tensor(faces.identify(side, SHARED / "weights" / RECOGNIZER))
                      for side in (face, face[:, ::-1]))  # fmt: skip
        return float((one - other).norm())

    assert apart() < 1e-5
    assert {weights.ARCFACE.name} == faces.PLAIN and faces.RECOGNIZERS.keys() == SAME.keys()
    monkeypatch.setattr(faces, "PLAIN", {RECOGNIZER})
    assert apart() > 0.01


def test_arcface_is_preferred_and_the_recognizer_of_other_tunes_a_way_out(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = settings.model_copy(update={"weights": tmp_path / "weights"})
    mine.weights.mkdir()
    assert weights.find_identifier(mine) is None
    with pytest.raises(Unavailable, match=r"face recognizer of faceid tunes is not here .* put w600k_r50.onnx into"):
        weights.obtain_identifier(mine)
    other, arcface = (replace(one, sha256=None) for one in (weights.RECOGNIZERS[1], weights.ARCFACE))
    monkeypatch.setattr(weights, "RECOGNIZERS", (other,))
    (mine.weights / other.name).touch()
    assert weights.find_identifier(mine) == weights.obtain_identifier(mine) == mine.weights / other.name
    (mine.weights / arcface.name).write_bytes(b"not it")
    with pytest.raises(
        Unavailable, match=r"w600k_r50\.onnx in the weights folder is not the face recognizer of faceid"
    ):
        weights.obtain_identifier(mine)  # and not another one without a word
    monkeypatch.setattr(weights, "ARCFACE", arcface)
    assert weights.find_identifier(mine) == weights.obtain_identifier(mine) == mine.weights / arcface.name


# Rendering


PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl1": StableDiffusionXLPipeline}
ROUNDING = 1e-4  # of latents, which lie between -6 and 6 here


def test_another_projection_of_the_text_is_left_alone() -> None:
    branch = load_branch(fast_base(), torch.device("cpu"), Path("unused"))  # its UNet has one of its own
    assert branch.pipeline.unet.encoder_hid_proj is not None
    faceid.remove(branch.pipeline)
    assert branch.pipeline.unet.encoder_hid_proj is not None


@pytest.fixture(params=["sd15", pytest.param("sdxl1", marks=pytest.mark.long)])
def branch(request: pytest.FixtureRequest) -> Any:
    """What `faceid` asks of a branch, around a tiny base in diffusers' own pipeline."""
    options = {"safety_checker": None} if request.param == "sd15" else {}
    folder = request.getfixturevalue(f"tiny_{request.param}")
    pipeline = PIPELINES[request.param].from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return SimpleNamespace(pipeline=pipeline, device=torch.device("cpu"), denoiser_name="unet")


@pytest.fixture
def adapter(branch: Any, tmp_path: Path) -> Path:
    return tiny.make_tiny_faceid(tmp_path / "adapter.bin", branch.pipeline.unet)


@pytest.fixture
def people(tmp_path: Path) -> list[Path]:
    """The folders of two people of whom nobody has seen a photo."""
    generator = torch.Generator().manual_seed(0)
    for name in ("ada", "bob"):
        identity = torch.randn(128, generator=generator).tolist()
        faces.save_identity(identity, tmp_path / name / "faceid.safetensors", {"recognizer": RECOGNIZER})
    return [tmp_path / "ada", tmp_path / "bob"]


def picture(branch: Any, folder: Path | None = None, cfg_scale: float = 5.0, count: int = 1) -> Tensor:
    """The latents (count, 4, h, w) of a prompt; folder: whose identity is put in."""
    latents: Tensor = branch.pipeline(
        "a portrait",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=cfg_scale,
        num_images_per_prompt=count,
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
        output_type="latent",
        **(faceid.inputs(branch, folder, cfg_scale) if folder else {}),
    ).images
    return latents


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_a_face_is_put_in_at_its_scale_and_taken_off_again(branch: Any, adapter: Path, people: list[Path]) -> None:
    base, (ada, bob), keys = picture(branch), people, branch.pipeline.unet.state_dict().keys()
    faceid.apply(branch, ada, 1.0, adapter)
    of_ada = picture(branch, ada)
    assert distance(of_ada, base) > 0.1 and distance(picture(branch, bob), of_ada) > 0.1
    faceid.apply(branch, ada, 0.0, adapter)
    assert distance(picture(branch, ada), base) < ROUNDING
    faceid.apply(branch, ada, 0.5, adapter)
    assert distance(picture(branch, ada), base) > 0.01 and distance(picture(branch, ada), of_ada) > 0.01
    faceid.apply(branch, ada, 1.0, adapter)
    assert distance(picture(branch, ada), of_ada) < ROUNDING  # nothing of the ones before is left
    for _ in range(2):
        faceid.remove(branch.pipeline)
        assert distance(picture(branch), base) < ROUNDING
    assert branch.pipeline.unet.state_dict().keys() == keys


def test_the_adapters_own_lora_is_at_work(branch: Any, adapter: Path, people: list[Path], tmp_path: Path) -> None:
    state = torch.load(adapter, weights_only=True)
    state["ip_adapter"] = {key: value for key, value in state["ip_adapter"].items() if "_ip." in key}
    torch.save(state, tmp_path / "bare.bin")
    pictures = []
    for file in (adapter, tmp_path / "bare.bin"):
        faceid.apply(branch, people[0], 1.0, file)
        pictures.append(picture(branch, people[0]))
    assert distance(*pictures) > 0.1


def test_several_pictures_and_pictures_without_guidance(branch: Any, adapter: Path, people: list[Path]) -> None:
    faceid.apply(branch, people[0], 1.0, adapter)
    (guided,), (alone,) = (faceid.inputs(branch, people[0], cfg)["ip_adapter_image_embeds"] for cfg in (5.0, 1.0))
    assert guided.shape == (2, 1, 1, 128) and alone.shape == (1, 1, 1, 128)
    assert not guided[0].any() and torch.equal(guided[1:], alone)
    both = picture(branch, people[0], count=2)
    assert distance(both[:1], picture(branch, people[0])) < ROUNDING and distance(both[0], both[1]) > 0.1
    assert distance(picture(branch, people[0], cfg_scale=1.0), picture(branch, people[1], cfg_scale=1.0)) > 0.01


@pytest.mark.parametrize("scale", long_but([0.5], [1.0, 0.5]))
def test_another_lora_stays_as_it_is(branch: Any, adapter: Path, people: list[Path], scale: float) -> None:
    """A tune's LoRA in the denoiser and the text encoder, at a scale of its own."""
    base, pipeline = picture(branch), branch.pipeline
    faceid.apply(branch, people[0], 1.0, adapter)
    alone = picture(branch, people[0])
    faceid.remove(pipeline)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module, targets in ((pipeline.unet, ["to_k", "ff.net.2"]), (pipeline.text_encoder, ["q_proj"])):
            module.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="tune")
    pipeline.set_adapters("tune", scale)
    tuned = picture(branch)
    assert distance(tuned, base) > 0.1
    faceid.apply(branch, people[0], 0.0, adapter)
    assert distance(picture(branch, people[0]), tuned) < ROUNDING
    for _ in range(2):
        faceid.apply(branch, people[0], 1.0, adapter)
        assert distance(picture(branch, people[0]), tuned) > 0.1 and distance(picture(branch, people[0]), alone) > 0.01
    faceid.remove(pipeline)
    assert distance(picture(branch), tuned) < ROUNDING
    assert list(pipeline.unet.peft_config) == list(pipeline.text_encoder.peft_config) == ["tune"]
    pipeline.unload_lora_weights()
    assert distance(picture(branch), base) < ROUNDING


def test_an_adapter_in_safetensors_is_the_same(branch: Any, adapter: Path, people: list[Path], tmp_path: Path) -> None:
    state = torch.load(adapter, weights_only=True)
    flat = {f"{part}.{key}": value for part, tensors in state.items() for key, value in tensors.items()}
    save_file(flat, tmp_path / "adapter.safetensors")
    pictures = []
    for file in (adapter, tmp_path / "adapter.safetensors"):
        faceid.apply(branch, people[0], 1.0, file)
        pictures.append(picture(branch, people[0]))
    assert distance(*pictures) < ROUNDING


def test_what_does_not_fit_is_refused_before_anything_changes(
    branch: Any, adapter: Path, people: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    faceid.apply(branch, people[0], 1.0, adapter)
    before, unet = picture(branch, people[0]), branch.pipeline.unet
    long = tiny.make_tiny_faceid(tmp_path / "long.bin", unet, vector=512)
    told = r"long\.bin takes identities of 512 numbers, and this one has 128: it was made with mobilefacenet_112\.onnx"
    with pytest.raises(ValueError, match=told):
        faceid.apply(branch, people[0], 1.0, long)
    state = torch.load(adapter, weights_only=True)
    state["image_proj"]["norm.weight"] = torch.ones(7)
    torch.save(state, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"other\.bin is for another family of models"):
        faceid.apply(branch, people[0], 1.0, tmp_path / "other.bin")
    for number, wrong in enumerate([{"weight": torch.ones(1)}, state | {"ip_adapter": {}}, {"image_proj": {}}]):
        torch.save(wrong, tmp_path / f"{number}.bin")
        with pytest.raises(ValueError, match=f"{number}.bin is not an IP-Adapter FaceID"):
            faceid.apply(branch, people[0], 1.0, tmp_path / f"{number}.bin")
    assert distance(picture(branch, people[0]), before) < ROUNDING
