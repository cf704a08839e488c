"""The settings: folders, address, key and limits. Only this module reads the environment and the command line."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

log = logging.getLogger("tunebooth.settings")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SIGNS_LINKS = r"[!-~]{22,}"  # of 6 bits each: 128 and more
LEAST_SECRET_BYTES = 24  # Standard Webhooks


class NoOutputs(Exception):
    """The outputs folder is not there and cannot be made."""


class Settings(BaseSettings):
    """Every setting is an option (`--public-url`) and an environment variable (`TUNEBOOTH_PUBLIC_URL`).

    `app.py rescue` takes tunes and prompts in again whose files are in `outputs` and which the database does not know.
    """

    model_config = SettingsConfigDict(
        env_prefix="TUNEBOOTH_",
        frozen=True,
        cli_prog_name="app.py",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs a key.")
    port: int = Field(7860, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    outputs: Path = Field(Path("outputs"), description="Folder of the database and of everything a tune makes.")
    models: Path = Field(Path("models"), description="Folder of base models: diffusers folders or .safetensors files.")
    presets: Path = Field(
        Path(__file__).parent.parent / "presets", description="Folder of the presets, a user's own among them."
    )
    weights: Path = Field(Path("weights"), description="Folder of the small models that analyze photos.")
    lifetime_days: int | None = Field(None, ge=1, description="Days until a trained tune expires. None: it never does.")
    face_crop: bool = Field(False, description="Whether face crops are added where neither request nor preset says.")
    demo: bool = Field(False, description="Queue a tune of the bundled sample photos at the start.")
    open: bool = Field(False, description="Open the page in the browser once it is up.")
    key: SecretStr | None = Field(None, description="API key. Made at first start where one is needed.")
    public_url: str | None = Field(None, description="Address that links in answers begin with; it may have a path.")
    idempotency: Literal["off", "tunes", "all"] = Field(
        "tunes", description="Which repeated requests (title included) answer with what the first one created."
    )
    webhook_secret: SecretStr | None = Field(
        None, description="Signs callbacks (Standard Webhooks): base64, with or without whsec_ before it."
    )
    private_urls: Literal["refuse", "allow"] = Field(
        "refuse", description="Whether image_urls and callbacks may point at private addresses."
    )
    device: str = Field("auto", description="Where to train: auto, cuda, cuda:1, mps, cpu.")
    picture_format: Literal["png", "jpeg"] = Field("png", description="File format of rendered pictures.")
    tensorboard: bool = Field(False, description="Write TensorBoard files of each tune into its folder.")
    max_images: int = Field(100, ge=1, description="Most photos of one tune.")
    max_prompts: int = Field(100, ge=0, description="Most prompts sent with one tune.")
    max_image_mb: int = Field(40, ge=1, description="Largest photo file, in megabytes.")
    max_body_mb: int = Field(1024, ge=1, description="Largest request, in megabytes.")
    max_megapixels: int = Field(100, ge=1, description="Largest photo, in millions of pixels.")
    decode_seconds: float = Field(20.0, gt=0, description="Time limit for decoding one photo.")

    @field_validator("idempotency", mode="before")
    @classmethod
    def _was_a_switch(cls, value: object) -> object:
        """Accept true and false, the values until version 0.1."""
        return {"true": "tunes", "1": "tunes", "false": "off", "0": "off"}.get(str(value).lower(), value)

    @field_validator("webhook_secret")
    @classmethod
    def _is_base64(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret:
            webhook_key(secret)
        return secret

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK

    @cached_property
    def base_url(self) -> str:
        """The address of this app for its users, without a slash at the end."""
        if self.public_url:
            return self.public_url.rstrip("/")
        if space := os.environ.get("SPACE_HOST"):
            return f"https://{space}"
        return self.local_url

    @cached_property
    def local_url(self) -> str:
        """The address of the port itself, for programs on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @cached_property
    def prefix(self) -> str:
        """The path of `base_url`, as in `/tb`; empty if there is none."""
        return urlsplit(self.base_url).path

    @cached_property
    def link_secret(self) -> bytes:
        """The secret that signs links. It is kept in a file, so that links survive a restart."""
        path = self.outputs / ".link-secret"
        kept = _kept_secret(path)
        if not re.fullmatch(SIGNS_LINKS, kept):  # a power cut leaves an empty file, or zeros: anyone could sign links
            if kept:
                log.warning(".link-secret is broken; a new one is made, and links that were given out end")
            kept = secrets.token_urlsafe(24)
            _write_secret(path, kept)
        return kept.encode()

    def required_key(self) -> tuple[bytes | None, str | None]:
        """(sha256 of the API key, the key itself if it is new: it is not stored); (None, None): no key is needed."""
        if self.key:
            return digest_of(self.key.get_secret_value()), None
        if self.on_loopback:
            return None, None
        path = self.outputs / ".key"
        kept = _kept_secret(path)
        if re.fullmatch("[0-9a-f]{64}", kept):
            return bytes.fromhex(kept), None
        if kept:
            log.warning(".key is broken; a new key is made, and the earlier one is not valid any more")
        key = secrets.token_urlsafe(24)
        _write_secret(path, digest_of(key).hex())
        return digest_of(key), key

    def models_problem(self) -> str | None:
        """Why the models folder cannot be read; None: it can."""
        if not self.models.is_dir():
            why = why_no_folder("models", self.models)
        elif not os.access(self.models, os.R_OK | os.X_OK):
            why = f"the models folder {self.models} cannot be read; change its permissions"
        else:
            return None
        return f"{why}. Until then, only the bases of the presets can be used"

    def check_secrets(self) -> None:
        """Raises RuntimeError if the file of a secret exists and cannot be read."""
        for name in (".key", ".link-secret"):
            _kept_secret(self.outputs / name)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _kept_secret(path: Path) -> str:
    """The content of a secret's file; empty if there is no file. Raises RuntimeError if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as problem:
        why = f"{path.name} in the outputs folder cannot be read ({problem.strerror})"
        raise RuntimeError(f"{why}; remove it, and a new one is made") from None


def _write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def webhook_key(secret: SecretStr) -> bytes:
    """The bytes of a secret of Standard Webhooks. Raises ValueError."""
    try:
        key = base64.b64decode(secret.get_secret_value().removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if len(key) < LEAST_SECRET_BYTES:
        raise ValueError(
            f"must be base64 of at least {LEAST_SECRET_BYTES} bytes, as `openssl rand -base64 32` makes it"
        )
    return key


def read_settings(arguments: Sequence[str] | None = None, **overrides: object) -> Settings:
    """The command line overrides the environment; a Hugging Face Space listens on all addresses, port 7860.

    arguments: the command line; None: none (tests, scripts). overrides: fields that override everything else.
    """
    if os.environ.get("SPACE_ID"):
        overrides = {"host": "0.0.0.0", "port": 7860, **overrides}  # noqa: S104
    cli: object = None
    if arguments is not None:  # the option was a switch until version 0.1
        cli = ["--idempotency=off" if argument == "--no-idempotency" else argument for argument in arguments]
    settings = Settings(_cli_parse_args=cli, **overrides)  # type: ignore[call-arg,arg-type]
    try:
        settings.outputs.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise NoOutputs(f"{why_no_folder('outputs', settings.outputs, problem)}, or name another --outputs") from None
    try:
        settings.models.mkdir(parents=True, exist_ok=True)
    except OSError as problem:  # without it, the bases of the presets can be used
        log.warning("%s", why_no_folder("models", settings.models, problem))
    return settings


def why_no_folder(name: str, folder: Path, problem: OSError | None = None) -> str:
    """Why a folder of the settings is not there, and what to do. problem: why it could not be made."""
    if folder.is_symlink():
        return f"the {name} folder {folder} is a link to a folder that is not there; connect its drive"
    if folder.exists():
        return f"the {name} folder {folder} is a file; move it away"
    if problem is None:
        return f"the {name} folder {folder} is not there; connect its drive, or make the folder"
    return f"the {name} folder {folder} cannot be made ({problem.strerror}); make it"


def command_line() -> tuple[bool, Settings]:
    """Whether the command is `rescue`, and the settings of this process. Ends it if there is no outputs folder."""
    rescues = sys.argv[1:2] == ["rescue"]
    try:
        return rescues, read_settings(sys.argv[2:] if rescues else sys.argv[1:])
    except NoOutputs as problem:
        sys.exit(f"Tunebooth: {problem}.")
