"""Settings: options, environment variables, and the secrets that are made once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.helpers.app import ROOT
from tests.helpers.faults import CONTENTS, INSTEAD, instead_of
from trainer.settings import Settings, command_line, digest_of, read_settings

KEY = "sd_123"
SAID: dict[str, str] = {  # every setting, with a value that is not its default
    "host": "0.0.0.0", "port": "8000", "outputs": "my outputs", "models": "my models", "presets": "my presets",
    "weights": "my weights", "face_crop": "true", "lifetime_days": "30",
    "demo": "true", "open": "true", "key": KEY, "public_url": "https://tunes.example", "idempotency": "false",
    "webhook_secret": "whsec_" + "aGVsbG8g" * 5, "private_urls": "allow", "device": "cuda:1", "max_images": "7",
    "max_prompts": "8", "max_image_mb": "9",
    "max_body_mb": "10", "max_megapixels": "11", "decode_seconds": "1.5",
    "tensorboard": "true", "picture_format": "jpeg",
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, and nothing said in the environment."""
    for name in list(os.environ):
        if name.startswith(("TUNEBOOTH_", "SPACE_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def options(said: dict[str, str]) -> list[str]:
    """As they are typed: `--max-images 7`, `--demo`, `--no-idempotency`."""
    words = []
    for name, value in said.items():
        flag = name.replace("_", "-")
        words += {"true": [f"--{flag}"], "false": [f"--no-{flag}"]}.get(value, [f"--{flag}", value])
    return words


def test_options_and_environment_variables_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SAID.keys() == Settings.model_fields.keys()
    default = read_settings([])
    by_option = read_settings(options(SAID))
    for name, value in SAID.items():
        monkeypatch.setenv(f"TUNEBOOTH_{name.upper()}", value)
    by_environment = read_settings([])
    assert by_option == by_environment
    assert all(getattr(by_option, name) != getattr(default, name) for name in SAID)
    assert (by_option.port, by_option.idempotency, by_option.decode_seconds) == (8000, "off", 1.5)


def test_an_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOTH_PORT", "8000")
    monkeypatch.setenv("TUNEBOOTH_DEVICE", "cpu")
    settings = read_settings(["--port", "9000"])
    assert (settings.port, settings.device) == (9000, "cpu")


def test_without_any_word_the_app_is_for_this_machine_alone() -> None:
    settings = read_settings([])
    assert (settings.host, settings.port, settings.on_loopback) == ("127.0.0.1", 7860, True)
    assert settings.private_urls == "refuse" and settings.idempotency == "tunes"
    assert settings.required_key() == (None, None)
    assert Path("outputs").is_dir() and Path("models").is_dir()  # made where they are missing
    assert (settings.presets / "fast.toml").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "70000"],
        ["--port", "many"],
        ["--private-urls", "maybe"],
        ["--max-images", "0"],
        ["--decode-seconds", "0"],
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(words: list[str]) -> None:
    with pytest.raises(ValidationError, match=words[0].strip("-").replace("-", "_")):
        read_settings(words)


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--prot", "8000"])
    assert "--prot" in capsys.readouterr().err


def test_a_key_is_not_shown_by_accident() -> None:
    settings = read_settings(["--key", KEY])
    assert KEY not in f"{settings} {settings!r} {settings.model_dump_json()}"
    assert settings.required_key() == (digest_of(KEY), None)


# Bound elsewhere


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    settings = read_settings(["--host", host])
    assert settings.on_loopback and settings.required_key() == (None, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "studio.lan"])
def test_every_other_address_needs_one(host: str) -> None:
    settings = read_settings(["--host", host])
    digest, key = settings.required_key()
    assert not settings.on_loopback and digest and key and len(key) >= 32


def test_a_space_is_bound_to_all_addresses_and_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "me/tunes")
    monkeypatch.setenv("SPACE_HOST", "me-tunes.hf.space")
    settings = read_settings([])
    assert (settings.host, settings.port) == ("0.0.0.0", 7860)
    assert settings.base_url == "https://me-tunes.hf.space"
    assert settings.required_key()[0]
    monkeypatch.setenv("TUNEBOOTH_KEY", KEY)  # a secret of the Space
    assert read_settings([]).required_key() == (digest_of(KEY), None)


def test_a_key_is_made_once_and_kept_for_its_owner_alone() -> None:
    settings = read_settings(["--host", "0.0.0.0"])
    digest, key = settings.required_key()
    assert key and digest == digest_of(key)  # it is shown now, and only its digest is kept
    assert read_settings(["--host", "0.0.0.0"]).required_key() == (digest, None)
    assert key not in (settings.outputs / ".key").read_text()
    assert stat.S_IMODE((settings.outputs / ".key").stat().st_mode) == 0o600
    other = read_settings(["--host", "0.0.0.0", "--outputs", "elsewhere"])
    assert other.required_key()[0] != digest


@pytest.mark.parametrize("fault", ["empty", "cut", "not UTF-8", "zeros", "null", "a text", "a number", "brackets"])
def test_a_broken_secret_is_made_anew_and_the_log_says_so(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = read_settings(["--host", "0.0.0.0"])
    (digest, _), secret = settings.required_key(), settings.link_secret
    for name in (".key", ".link-secret"):
        file = settings.outputs / name
        file.write_bytes(CONTENTS[fault](file.read_bytes()[:24]))
    if fault == "brackets":
        (settings.outputs / ".link-secret").write_bytes(b"[" * 5)
    again = read_settings(["--host", "0.0.0.0"])
    made, key = again.required_key()
    assert key and made == digest_of(key) != digest
    assert len(again.link_secret) >= 32 and again.link_secret != secret
    assert len(caplog.records) == (0 if fault == "empty" else 2)  # nobody has had a key of an empty file
    assert read_settings(["--host", "0.0.0.0"]).required_key() == (made, None)


@pytest.mark.parametrize("name", [".key", ".link-secret"])
@pytest.mark.parametrize("fault", INSTEAD)
def test_the_app_does_not_start_where_a_secret_cannot_be_read(name: str, fault: str, tmp_path: Path) -> None:
    instead_of(tmp_path / name, fault)
    command = [sys.executable, "app.py", "--port", "0", "--outputs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Tunebooth: {name} in the outputs folder cannot be read (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "why"),
    [("link", "is a link to a folder that is not there; connect its drive"), ("file", "is a file; move it away")],
)
def test_the_app_ends_in_words_where_there_can_be_no_outputs_folder(
    kind: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "outputs"
    outputs.symlink_to("/mnt/not-mounted") if kind == "link" else outputs.touch()
    monkeypatch.setattr(sys, "argv", ["app.py", "--outputs", str(outputs), "--models", str(tmp_path / "models")])
    with pytest.raises(SystemExit) as ended:
        command_line()
    assert ended.value.code == f"Tunebooth: the outputs folder {outputs} {why}, or name another --outputs."


def test_links_are_signed_with_a_secret_that_is_kept() -> None:
    settings = read_settings([])
    assert settings.link_secret == read_settings([]).link_secret != read_settings(["--outputs", "else"]).link_secret
    assert len(settings.link_secret) >= 32
    assert stat.S_IMODE((settings.outputs / ".link-secret").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "secret"),
    [(".key", lambda settings: settings.required_key()[0]), (".link-secret", lambda settings: settings.link_secret)],
)
def test_an_empty_secret_is_made_again(name: str, secret: Callable[[Settings], str | bytes]) -> None:
    settings = read_settings(["--host", "0.0.0.0"])
    (settings.outputs / name).touch()  # what a power cut in the middle of writing leaves
    assert len(secret(settings)) >= 32
    assert secret(read_settings(["--host", "0.0.0.0"])) == secret(settings)


# Addresses


@pytest.mark.parametrize(
    ("words", "url"),
    [
        ([], "http://127.0.0.1:7860"),
        (["--port", "8000"], "http://127.0.0.1:8000"),
        (["--host", "0.0.0.0"], "http://127.0.0.1:7860"),
        (["--host", "::"], "http://127.0.0.1:7860"),
        (["--host", "::1"], "http://[::1]:7860"),
        (["--host", "studio.lan"], "http://studio.lan:7860"),
        (["--host", "0.0.0.0", "--public-url", "https://tunes.example/"], "https://tunes.example"),
        (["--public-url", "https://example.org/tunes"], "https://example.org/tunes"),
    ],
)
def test_links_begin_with_the_address_that_the_app_is_reached_by(words: list[str], url: str) -> None:
    assert read_settings(words).base_url == url
