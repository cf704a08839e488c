"""Fetching from the hub, against a small one on loopback: what is asked for, what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from trainer.library import hub
from trainer.library.hub import NotEnoughRoom

REPO = "acme/painter"
TOKEN = "hf_veryveryverysecret"
ASSETS = {"tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "scheduler/scheduler_config.json"}
PLAIN = {
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
}
FP16 = {
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
}
UNWANTED = {
    "painter.safetensors", "README.md", "pipeline.py", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin.index.json", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/adapter.safetensors", "vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors",
    "safety_checker/config.json", "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json",
    "image_encoder/config.json", "unet/deep/model.safetensors",
}  # fmt: skip


def painter(version: str = "1") -> dict[str, bytes]:
    """The files of a pipeline, and all that such repositories hold besides."""
    files = {name: f"{name} {version}".encode() for name in ASSETS | PLAIN | FP16 | UNWANTED}
    weights = sorted(name.partition("/")[2] for name in PLAIN if "-of-" in name)
    index = {"weight_map": {f"layer {number}": name for number, name in enumerate(weights)}}
    files["unet/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index).encode()
    parts = {"unet": ["diffusers", "UNet"], "vae": ["diffusers", "VAE"], "tokenizer": ["transformers", "Tokenizer"]}
    rest = {"scheduler": ["diffusers", "S"], "safety_checker": ["x", "y"], "image_encoder": [None, None]}
    files["model_index.json"] = json.dumps({"_class_name": "P", "flag": True, **parts, **rest}).encode()
    return files


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class FakeHub:
    """Repositories as name -> revision -> files, and what was asked for."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    gated: bool = False
    failing: str = ""  # a file whose content is not available
    asked: list[str] = field(default_factory=list)  # "METHOD path"

    def weights_asked(self) -> list[str]:
        return [line for line in self.asked if line.endswith(".safetensors")]

    def got(self) -> set[str]:
        """The files that were downloaded."""
        return {line.split("/", 5)[5] for line in self.asked if line.startswith("GET /acme/")}

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name, *rest = ["/".join(words[2:4]), *words[4:]] if api else ["/".join(words[:2]), *words[2:]]
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revisions = self.repositories[name]
        wanted = rest[1] if len(rest) > 1 else "main"
        revision = next((key for key in revisions if unquote(wanted) in (key, commit_of(key))), None)
        if revision is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = revisions[revision]
        if api and rest[:1] == ["tree"]:
            return 200, {}, json.dumps([described(file, data, "path") for file, data in files.items()]).encode()
        if api:
            siblings = [described(file, data, "rfilename") for file, data in files.items()]
            info = {"id": name, "modelId": name, "sha": commit_of(revision), "siblings": siblings}
            return 200, {}, json.dumps(info | {"gated": "auto" if self.gated else False}).encode()
        file = unquote("/".join(rest[2:]))
        if self.gated and token != f"Bearer {TOKEN}":
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b""
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{etag(file, files[file])}"', "X-Repo-Commit": commit_of(revision)}, files[file]


def etag(name: str, data: bytes) -> str:
    return (hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1)(data).hexdigest()


def described(name: str, data: bytes, key: str) -> dict[str, object]:
    """A file in the hub's lists. `oid` is what the tree says, `blobId` and `sha256` what the model's page says."""
    digest = etag(name, data)
    facts: dict[str, object] = {key: name, "type": "file", "size": len(data), "oid": digest, "blobId": digest}
    if name.endswith(".safetensors"):
        facts["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 100}
    return facts


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """away(URL): the library uses that hub, an empty cache and no token of this machine. Nobody answers until then."""

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()  # it has read the proxies of the environment
    yield use
    huggingface_hub.close_session()


@pytest.fixture
def fake(away: Callable[[str], None]) -> Iterator[FakeHub]:
    """A hub with one pipeline, which the library uses."""
    state = FakeHub({REPO: {"main": painter()}})

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = urlsplit(self.path).path
            state.asked.append(f"{self.command} {path}")
            status, headers, body = state.answer(path, self.headers.get("Authorization"))
            if state.failing and path.endswith(state.failing) and self.command == "GET":
                status, body = 500, b""
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # the usual 5 are fewer than the library's threads: the others wait a second

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        away(f"http://127.0.0.1:{server.server_address[1]}")
        yield state
        server.shutdown()
        thread.join()


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(OSError) as refused:
        call()
    # With a traceback it would be in the log, along with whatever it was raised from.
    assert TOKEN not in "".join(traceback.format_exception(refused.value))
    return str(refused.value)


def test_a_pipeline_is_fetched_with_only_the_wanted_files(fake: FakeHub) -> None:
    folder = hub.fetch_pipeline(REPO)
    assert files_in(folder) == {"model_index.json"} | ASSETS | PLAIN
    assert (folder / "unet" / "config.json").read_text() == "unet/config.json 1"
    assert folder.is_relative_to(constants.HF_HUB_CACHE)


def test_of_a_variant_only_its_weights_are_fetched_and_plain_ones_where_a_part_has_no_others(fake: FakeHub) -> None:
    assert files_in(hub.fetch_pipeline(REPO, variant="fp16")) == {
        "model_index.json", *ASSETS, *FP16, "vae/diffusion_pytorch_model.safetensors"
    }  # fmt: skip


def test_a_variant_that_no_part_has_is_refused(fake: FakeHub) -> None:
    assert "no weights of the variant bf16" in refusal(lambda: hub.fetch_pipeline(REPO, variant="bf16"))


@pytest.mark.parametrize(
    ("file", "copy"),
    [
        ("unet/diffusion_pytorch_model.safetensors", ""),
        ("text_encoder/model.safetensors", ""),
        ("text_encoder/model-00001-of-00003.safetensors", ""),
        ("text_encoder/model.safetensors.index.json", ""),
        ("text_encoder/model.fp16.safetensors", "fp16"),
        ("text_encoder/model.fp16-00001-of-00002.safetensors", "fp16"),
        ("unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
        ("text_encoder/model.safetensors.index.fp16.json", "fp16"),
        ("unet/diffusion_pytorch_model.fp16.safetensors.index.json", "fp16"),
        ("unet/diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("unet/lora.safetensors", None),
        ("unet/config.json", None),
        ("unet/diffusion_pytorch_model.bin", None),
        ("unet/diffusion_pytorch_model.bin.index.json", None),
        ("text_encoder/flax_model.msgpack", None),
    ],
)
def test_the_name_of_a_weight_file_says_which_copy_it_belongs_to(file: str, copy: str | None) -> None:
    assert hub._copy_of(file) == copy


def test_single_files_and_single_parts_are_fetched(fake: FakeHub) -> None:
    folder = hub.fetch_files(REPO, ["tokenizer/vocab.json"])
    assert files_in(folder) == {"tokenizer/vocab.json"}
    assert hub.fetch_parts(REPO, ["vae/*", "tokenizer/*"]) == folder
    names = {"tokenizer/vocab.json", "tokenizer/merges.txt", "vae/diffusion_pytorch_model.safetensors"}
    assert files_in(folder) == names
    assert "has no tokenizer/nothing.txt" in refusal(lambda: hub.fetch_files(REPO, ["tokenizer/nothing.txt"]))
    assert "has no text_encoder/*" in refusal(lambda: hub.fetch_parts(REPO, ["text_encoder/*"]))


def test_a_second_call_asks_nothing(fake: FakeHub) -> None:
    folder = hub.fetch_pipeline(REPO)
    fake.asked.clear()
    assert hub.fetch_pipeline(REPO) == folder
    assert hub.fetch_parts(REPO, ["unet/*"]) == hub.fetch_files(REPO, ["tokenizer/merges.txt"]) == folder
    assert fake.asked == []


def test_the_hub_is_asked_once_for_the_sizes_and_before_any_weight(fake: FakeHub) -> None:
    hub.fetch_pipeline(REPO)
    assert fake.asked[0] == f"GET /api/models/{REPO}"
    assert len(fake.weights_asked()) == 2 * sum(name.endswith(".safetensors") for name in PLAIN)  # HEAD and GET


def test_an_interrupted_download_resumes(fake: FakeHub) -> None:
    fake.failing = "unet/diffusion_pytorch_model-00002-of-00002.safetensors"
    assert "answers 500" in refusal(lambda: hub.fetch_pipeline(REPO))
    here = files_in(next(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")))
    assert here and fake.failing not in here
    fake.asked.clear()
    rest, fake.failing = fake.failing, ""
    assert files_in(hub.fetch_pipeline(REPO)) == {"model_index.json"} | ASSETS | PLAIN
    assert rest in fake.got() and not fake.got() & here


def test_an_interrupted_download_is_not_taken_for_whole_offline(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.failing = "tokenizer/merges.txt"
    refusal(lambda: hub.fetch_pipeline(REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "lacks tokenizer/merges.txt" in refusal(lambda: hub.fetch_parts(REPO, ["tokenizer/*"]))


def test_a_revision_is_respected(fake: FakeHub) -> None:
    fake.repositories[REPO]["pr/1"] = painter("2")
    for revision in ("pr/1", commit_of("pr/1")):
        folder = hub.fetch_pipeline(REPO, revision)
        assert (folder.name, (folder / "unet" / "config.json").read_text()) == (commit_of("pr/1"), "unet/config.json 2")
    assert hub.fetch_pipeline(REPO).name == commit_of("main")


def test_an_unknown_revision_is_named(fake: FakeHub) -> None:
    assert f"no such revision: {REPO} (revision v9)" in refusal(lambda: hub.fetch_pipeline(REPO, "v9"))


def test_an_unknown_repository_is_named(fake: FakeHub) -> None:
    text = refusal(lambda: hub.fetch_pipeline("acme/nothing"))
    assert "has no acme/nothing" in text and "HF_TOKEN" in text


def test_a_repository_without_matching_files_is_refused(fake: FakeHub) -> None:
    files = fake.repositories[REPO]["main"]
    del files["vae/diffusion_pytorch_model.safetensors"]
    files |= {"vae/diffusion_pytorch_model.bin": b"", "vae/config.json": b"{}"}
    assert "no weights in vae/* that are safetensors" in refusal(lambda: hub.fetch_pipeline(REPO))
    files["model_index.json"] = b"["
    fake.repositories[REPO] = {"main": {}, "broken": files}
    assert "has no model_index.json" in refusal(lambda: hub.fetch_pipeline(REPO))
    assert "broken model_index.json" in refusal(lambda: hub.fetch_pipeline(REPO, "broken"))
    assert fake.weights_asked() == []


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
@pytest.mark.parametrize("fetch", [hub.fetch_pipeline, lambda name: hub.fetch_parts(name, ["unet/*"])])
def test_a_gated_repository_is_refused_before_any_weight_is_asked_for(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str | None, fetch: Callable[[str], Path]
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    fake.gated = True
    text = refusal(lambda: fetch(REPO))
    assert f"https://huggingface.co/{REPO}" in text and "HF_TOKEN" in text and "hf auth login" in text
    assert ("the token in use has no access" if token else "no token is set") in text
    assert token is None or token not in text
    assert fake.got() == set() and fake.weights_asked() == []


def test_a_gated_repository_is_fetched_with_a_token_that_has_access(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.gated = True
    assert files_in(hub.fetch_pipeline(REPO)) == {"model_index.json"} | ASSETS | PLAIN


def test_the_token_is_in_no_error(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refusal(lambda: hub.fetch_pipeline("acme/nothing"))
    refusal(lambda: hub.fetch_pipeline(REPO, "v9"))
    fake.failing = "merges.txt"
    refusal(lambda: hub.fetch_pipeline(REPO))
    for spoiled in (f"{TOKEN}\x01", f"{TOKEN}…", f"{TOKEN}\nx"):  # the HTTP client quotes a header that it cannot send
        monkeypatch.setenv("HF_TOKEN", spoiled)
        assert "HF_TOKEN" in refusal(lambda: hub.fetch_pipeline("acme/nothing"))


def free_disk(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


def test_too_little_disk_is_refused_before_the_first_weight(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(fake.repositories[REPO]["main"][name]) for name in ASSETS | PLAIN)
    free_disk(monkeypatch, hub.DISK_MARGIN + size - 1)
    with pytest.raises(NotEnoughRoom, match=r"needs 1\.1 GB of disk.*has 1\.1 GB.*HF_HOME"):
        hub.fetch_pipeline(REPO)
    assert fake.weights_asked() == []
    free_disk(monkeypatch, hub.DISK_MARGIN + size)
    hub.fetch_pipeline(REPO)


def test_files_in_the_cache_need_no_disk(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fetch_pipeline(REPO)
    fake.repositories[REPO]["next"] = painter()  # another commit with the same content
    free_disk(monkeypatch, 0)
    assert files_in(hub.fetch_pipeline(REPO, "next")) == {"model_index.json"} | ASSETS | PLAIN
    fake.repositories[REPO]["last"] = painter("2")
    refusal(lambda: hub.fetch_pipeline(REPO, "last"))


def test_on_a_disk_without_links_too_only_the_missing_files_count(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    missing = hub.fetch_pipeline(REPO) / "tokenizer" / "merges.txt"
    assert not missing.is_symlink()
    free_disk(monkeypatch, hub.DISK_MARGIN + missing.stat().st_size)
    missing.unlink()
    hub.fetch_pipeline(REPO)
    assert missing.exists()


def test_too_little_memory_is_refused_before_the_first_weight(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(NotEnoughRoom, match=r"needs 0\.0 GB of memory.*smaller base"):
        hub.fetch_pipeline(REPO)
    assert fake.weights_asked() == []
    hub.fetch_files(REPO, ["tokenizer/vocab.json"])
    hub.fetch_pipeline(REPO, ram_check=False)


def test_offline_the_cache_is_used_and_missing_files_are_named(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refusal(lambda: hub.fetch_pipeline(REPO))
    assert f"{REPO} is not in the cache" in text and constants.HF_HUB_CACHE in text
    assert f"hf download {REPO}" in text and "HF_HUB_OFFLINE" in text and "models folder" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = hub.fetch_pipeline(REPO)
    fake.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch_pipeline(REPO) == folder
    assert fake.asked == []


def forget_the_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the list of the commit's files out of the cache, as if an older library had filled it."""
    shutil.rmtree(folder.parent.parent / "trees")
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})


def test_a_cache_of_an_older_library_is_used_offline_if_its_weights_are_there(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.fetch_pipeline(REPO)
    forget_the_list(folder, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch_pipeline(REPO) == folder
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "lacks unet/diffusion_pytorch_model-00002" in refusal(lambda: hub.fetch_pipeline(REPO))


def test_a_cache_of_an_older_library_is_completed_by_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetch_pipeline(REPO)
    forget_the_list(folder, monkeypatch)
    (folder / "tokenizer" / "merges.txt").unlink()
    assert files_in(hub.fetch_pipeline(REPO)) == {"model_index.json"} | ASSETS | PLAIN


def test_a_hub_that_does_not_answer_is_reported_as_unreachable(away: Callable[[str], None]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    away(f"http://somebody:password@127.0.0.1:{port}")
    start = time.monotonic()
    text = refusal(lambda: hub.fetch_pipeline(REPO))
    assert "127.0.0.1 cannot be reached" in text and "password" not in text and "HF_HUB_OFFLINE" in text
    assert time.monotonic() - start < 20


def test_a_hub_that_says_nothing_is_not_waited_for(
    away: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ASK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        away(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert "cannot be reached" in refusal(lambda: hub.fetch_pipeline(REPO))
        assert time.monotonic() - start < 10


def test_a_web_page_in_place_of_the_hub_is_recognised(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "answer", lambda *_: (200, {}, b"<html>Please log in</html>"))
    assert "login page" in refusal(lambda: hub.fetch_pipeline(REPO))
