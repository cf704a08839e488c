"""The models folder as people have it: links, unfinished files, files of other programs, previews, leftovers."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path, PurePath

import pytest

from trainer.library import bases, models_folder, models_tree
from trainer.settings import Settings, read_settings

# Names and shapes of the original release of SD 1.5, at its widths
SD15 = {
    "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": [768],
    "first_stage_model.encoder.conv_in.weight": [128, 3, 3, 3],
}
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
LIES = [0, 0]  # offsets: numbers of a type that nobody knows the size of take no room


def checkpoint() -> bytes:
    """A header of a single file of SD 1.5, without numbers."""
    entries = {name: {"dtype": "F0", "shape": shape, "data_offsets": LIES} for name, shape in SD15.items()}
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def diffusers_folder(folder: Path) -> Path:
    put(folder / "model_index.json", json.dumps(INDEX).encode())
    put(folder / "unet" / "config.json", json.dumps({"cross_attention_dim": 768, "in_channels": 4}).encode())
    for part in ("unet/diffusion_pytorch_model.bin", "vae/model.safetensors", "text_encoder/pytorch_model.bin"):
        put(folder / part, b"x")
    return folder


def listed(settings: Settings) -> dict[str, str | None]:
    """Title -> why it cannot be used, of all that is in the models folder."""
    known = {base.title for base in bases.list_bases(settings.model_copy(update={"models": Path("/nowhere")}))}
    return {base.title: base.error for base in bases.list_bases(settings) if base.title not in known}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Another drive."""
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive"


# Links


def test_linked_files_and_folders_are_read(settings: Settings, elsewhere: Path) -> None:
    """shared/cases/08-models-links: the owner of the folder has made the links."""
    put(elsewhere / "many" / "sd" / "one.safetensors", checkpoint())
    diffusers_folder(elsewhere / "many" / "whole")
    diffusers_folder(elsewhere / "alone")
    put(elsewhere / "file.safetensors", checkpoint())
    (settings.models / "other-drive").symlink_to(elsewhere / "many")
    (settings.models / "alone").symlink_to(elsewhere / "alone")
    (settings.models / "linked.safetensors").symlink_to(elsewhere / "file.safetensors")
    expected = ("other-drive/sd/one.safetensors", "other-drive/whole", "alone", "linked.safetensors")
    assert listed(settings) == dict.fromkeys(expected)
    for title in expected:
        base = bases.resolve(settings, bases.hashed_id(title), None)
        assert (base.branch, base.path) == ("sd15", settings.models / title)


def test_what_has_no_link_keeps_its_id(settings: Settings) -> None:
    """A title is the path in the models folder, and the id is made of it: pinned, tunes are in databases with it."""
    put(settings.models / "a" / "b.safetensors", checkpoint())
    put(settings.models / ".c.safetensors", checkpoint())
    diffusers_folder(settings.models / "d")
    (settings.models / "again").symlink_to(settings.models / "a")
    (settings.models / "e.safetensors").symlink_to(settings.models / "a" / "b.safetensors")
    usable = {base.title: base.id for base in bases.list_bases(settings) if base.path and base.branch == "sd15"}
    assert usable == {
        "a/b.safetensors": 1_262_820_248, ".c.safetensors": 1_074_737_182, "d": 1_403_845_591,
        "e.safetensors": 1_634_416_955,
    }  # fmt: skip


def test_links_that_lead_back_end(settings: Settings, elsewhere: Path) -> None:
    put(settings.models / "a" / "one.safetensors", checkpoint())
    (settings.models / "a" / "up").symlink_to(settings.models)
    (elsewhere / "back").symlink_to(settings.models)
    (elsewhere / "self").symlink_to(elsewhere)
    (settings.models / "drive").symlink_to(elsewhere)
    (settings.models / "loop").symlink_to(settings.models / "loop")
    found = listed(settings)
    assert found.pop("a/one.safetensors") is None
    assert "symbolic links" in str(found.pop("loop"))
    assert found == dict.fromkeys(
        ("a/up", "drive/back", "drive/self"), "it is a link to a folder that is listed already, under its own name"
    )


def test_dangling_links_are_named(settings: Settings) -> None:
    for name in ("gone", "deep/gone.safetensors", "gone.ckpt", "README.md", "preview.png"):
        (settings.models / "deep").mkdir(exist_ok=True)
        (settings.models / name).symlink_to("/mnt/not-mounted/x")
    found = listed(settings)
    assert found.keys() == {"gone", "deep/gone.safetensors", "gone.ckpt"}
    assert set(found.values()) == {"it is a link to something that is not there; connect its drive, or remove the link"}


def test_what_is_no_file_is_named_and_not_opened(settings: Settings) -> None:
    os.mkfifo(settings.models / "pipe.safetensors")
    assert listed(settings) == {"pipe.safetensors": "it is neither a file nor a folder"}


def test_a_folder_in_the_place_of_a_file_is_named(settings: Settings) -> None:
    (settings.models / "one.safetensors").mkdir()
    put(settings.models / "two.safetensors" / "two.safetensors", checkpoint())
    (settings.models / "three" / "model_index.json").mkdir(parents=True)
    assert listed(settings) == {
        "one.safetensors": "it is a folder, where a file should be",
        "two.safetensors/two.safetensors": None,
        "three": "its model_index.json is not a JSON object: model_index.json cannot be read: Is a directory",
    }


# Files that are not read

PICKLE, UNFINISHED, ARCHIVE = (
    "it is a pickle, which can run code",
    "it is not finished: it is still",
    "it is an archive",
)
RENAMED, UNKNOWN = "it is a safetensors file under another name", "it is of no kind that is read here"
UNREAD: dict[str, tuple[Callable[[], bytes], str]] = {
    **{f"old{suffix}": (lambda: b"PK\3\4", PICKLE) for suffix in (".ckpt", ".pt", ".pth", ".bin", ".CKPT")},
    **{f"new.safetensors{end}": (lambda: b"", UNFINISHED) for end in (".part", ".crdownload", ".incomplete", ".tmp")},
    "new.safetensors.aria2": (lambda: b"", UNFINISHED),
    "flux.gguf": (lambda: b"GGUF", "it is a GGUF file"),
    **{f"all{suffix}": (lambda: b"x", ARCHIVE) for suffix in (".zip", ".7z", ".rar", ".tar")},
    "unet.onnx": (lambda: b"x", UNKNOWN),
    "ae.sft": (lambda: checkpoint() + bytes(2**20), RENAMED),
    "UPPER.SAFETENSORS": (lambda: checkpoint() + bytes(2**20), RENAMED),
    "renamed.ckpt": (checkpoint, RENAMED),
    "large": (lambda: bytes(2**20), UNKNOWN),
    ".new.safetensors.Xy12Ab": (lambda: b"", "it is hidden: its name begins with a dot"),  # as rsync copies
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_listed_with_the_reason(settings: Settings, name: str) -> None:
    make, why = UNREAD[name]
    put(settings.models / "mine" / name, make())
    (error,) = listed(settings).values()
    assert error and error.startswith(why)
    assert listed(settings).keys() == {f"mine/{name}"}


def test_what_lies_beside_models_is_not_listed(settings: Settings) -> None:
    put(settings.models / "one.safetensors", checkpoint())
    for name in (
        "README", "README.md", "one.txt", "one.json", "one.png", "one.preview.png", "one.civitai.info", "one.webp",
        "one.yaml", "LICENSE", ".DS_Store", "._one.safetensors", "Thumbs.db", "desktop.ini", ".gitattributes",
        ".cache/huggingface/download/one.safetensors", ".git/lfs/one.safetensors", ".Trash-1000/files/old.safetensors",
        ".Trash-1000/files/old.ckpt", "put models here",
    ):  # fmt: skip
        put(settings.models / name, b"\0\5\x16\7" if name.startswith("._") else checkpoint()[:100])
    assert listed(settings) == {"one.safetensors": None}


def test_the_parts_of_a_model_are_not_listed_singly(settings: Settings) -> None:
    diffusers_folder(settings.models / "whole")
    put(settings.models / "one.safetensors", checkpoint())
    put(settings.models / "one" / "tokenizer" / "vocab.json", b"{}")
    put(settings.models / "one" / "text_encoder" / "config.json", b"{}")
    put(settings.models / "one" / "text_encoder" / "model.safetensors", b"x")
    put(settings.models / "one" / "text_encoder" / "pytorch_model.bin", b"x")
    assert listed(settings) == {"one.safetensors": None, "whole": None}


def test_a_folder_of_other_models_may_have_the_name_of_a_file(settings: Settings) -> None:
    put(settings.models / "one.safetensors", checkpoint())
    put(settings.models / "one" / "two.safetensors", checkpoint())
    put(settings.models / "one" / "two.json", b"{}")
    put(settings.models / "one" / "three.ckpt", b"x")
    found = listed(settings)
    assert str(found.pop("one/three.ckpt")).startswith(PICKLE)
    assert found == {"one.safetensors": None, "one/two.safetensors": None}


def test_a_cache_of_the_hub_is_read_by_its_snapshots(settings: Settings) -> None:
    """models--NAME/{blobs,refs,snapshots}: the files of a snapshot are links to blobs."""
    cache = settings.models / "models--me--mine"
    whole = diffusers_folder(cache / "snapshots" / "0123abcd")
    blob = put(cache / "blobs" / "9f8e", (whole / "model_index.json").read_bytes())
    put(cache / "blobs" / "large.incomplete", bytes(2**20))
    put(cache / "refs" / "main", b"0123abcd")
    (whole / "model_index.json").unlink()
    (whole / "model_index.json").symlink_to(os.path.relpath(blob, whole))
    assert listed(settings) == {"models--me--mine/snapshots/0123abcd": None}


# Files that only seem to be models


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is still being copied, or the copy has broken off"),
        (checkpoint()[:50], "it is still being copied, or the copy has broken off"),
        (struct.pack("<Q", 90) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(90) + bytes(9),
         "its header speaks of 134 bytes, it has 107: it is still being copied, or the copy has broken off"),
        (bytes(100), "it begins with zeros, as a file does whose download is not finished"),
        (b"PK\3\4" + bytes(100), "it is a pickle"),
        (b"\x80\2}q\0" + bytes(100), "it is a pickle"),
        (b"GGUF" + bytes(100), "it is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Log in</html>", "it is a web page"),
        (b'{"error":"Unauthorized","message":"log in"}', "it is a JSON text"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_model_is_named_by_what_it_is(settings: Settings, content: bytes, why: str) -> None:
    put(settings.models / "base.safetensors", content)
    (error,) = listed(settings).values()
    assert (error and why in error and "safetensors" in error) or "it is broken" in str(error)


def test_a_file_is_read_again_once_its_copy_has_ended(settings: Settings) -> None:
    put(settings.models / "base.safetensors", checkpoint()[:50])
    assert "still being copied" in str(listed(settings)["base.safetensors"])
    put(settings.models / "base.safetensors", checkpoint())
    assert listed(settings) == {"base.safetensors": None}


# The models folder itself


@pytest.mark.parametrize("kind", ["dangling link", "file", "removed"])
def test_without_a_models_folder_the_bases_of_the_presets_are_left(tmp_path: Path, kind: str) -> None:
    models = tmp_path / "models"
    if kind == "dangling link":
        models.symlink_to("/mnt/not-mounted")
    elif kind == "file":
        models.touch()
    settings = read_settings(outputs=tmp_path / "outputs", models=models)
    if kind == "removed":
        models.rmdir()
    why = {
        "dangling link": "is a link to a folder that is not there; connect its drive",
        "file": "is a file; move it away",
    }
    assert why.get(kind, "is not there; connect its drive, or make the folder") in str(settings.models_problem())
    assert listed(settings) == {}
    assert bases.resolve(settings, None, "fast").error is None
    if kind == "dangling link":  # the drive is connected
        models.unlink()
        models.mkdir()
        assert settings.models_problem() is None


def test_a_linked_models_folder_is_read(tmp_path: Path, elsewhere: Path) -> None:
    put(elsewhere / "one.safetensors", checkpoint())
    (tmp_path / "models").symlink_to(elsewhere)
    settings = read_settings(outputs=tmp_path / "outputs", models=tmp_path / "models")
    assert settings.models_problem() is None
    assert listed(settings) == {"one.safetensors": None}


def test_a_folder_that_cannot_be_read_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    put(settings.models / "secret" / "one.safetensors", checkpoint())
    put(settings.models / "two.safetensors", checkpoint())
    scan = os.scandir

    def scan_others(folder: Path) -> object:
        if folder.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(models_tree.os, "scandir", scan_others)
    assert listed(settings) == {"secret": "it cannot be read: Permission denied", "two.safetensors": None}


def test_the_work_of_a_scan_grows_with_the_files_and_not_with_their_square(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        put(settings.models / f"{number}.safetensors", checkpoint())
        put(settings.models / f"{number}.png")
        (settings.models / f"folder {number}").mkdir()
    compared, equal = [0], PurePath.__eq__

    def counted(one: PurePath, other: object) -> bool:
        compared[0] += 1
        return equal(one, other)

    models_folder.scan(settings)
    monkeypatch.setattr(PurePath, "__eq__", counted)
    assert len(models_folder.scan(settings)) == 60
    assert compared[0] < 60 * 60
