"""Files in the models folder that are not read, with the reason; and files that are no models, which are not listed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from trainer.library.header import MAX_HEADER_BYTES

MODEL_SUFFIX = ".safetensors"
APPLE_DOUBLE = (b"\0\x05\x16\x07", b"\0\x05\x16\0")
UNKNOWN_BYTES = 2**20  # smaller files of unknown kinds are no models
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
UNFINISHED = (
    ".part", ".partial", ".crdownload", ".download", ".opdownload", ".filepart", ".incomplete", ".aria2", ".!qb", ".tmp"
)  # fmt: skip
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst")
OTHER_FORMATS = (
    ".onnx", ".engine", ".plan", ".trt", ".mlmodel", ".h5", ".keras", ".tflite", ".npz", ".msgpack", ".pb", ".ot",
    ".ggml", ".llamafile",
)  # fmt: skip
# What lies next to models: texts, settings, previews, notes of download programs, leftovers of file managers.
BESIDE = (
    ".txt", ".md", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xml", ".html", ".htm", ".csv", ".tsv",
    ".pdf", ".rtf", ".doc", ".docx", ".info", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".svg", ".mp4",
    ".webm", ".mov", ".py", ".ipynb", ".sh", ".bat", ".log", ".lock", ".metadata", ".etag", ".sha256", ".md5", ".sig",
    ".torrent", ".url", ".lnk", ".webloc", ".desktop", ".db", ".model", ".spm", ".tmpl", ".jinja",
)  # fmt: skip

DANGLING = "it is a link to something that is not there; connect its drive, or remove the link"
LISTED_ALREADY = "it is a link to a folder that is listed already, under its own name"
FOLDER = "it is a folder, where a file should be"
NO_FILE = "it is neither a file nor a folder"
PICKLE = (
    "it is a pickle, which can run code when it is loaded; convert it to safetensors, for example with ComfyUI's node"
    " Save Checkpoint, or in Python with torch.load(..., weights_only=True) and safetensors.torch.save_file"
)
UNFINISHED_FILE = "it is not finished: it is still being downloaded or copied, or that has broken off"
ARCHIVE = "it is an archive; unpack it here"
GGUF = "it is a GGUF file, with quantized weights for other programs; take the model's .safetensors file"
RENAMED = f"it is a safetensors file under another name; rename it so that it ends with {MODEL_SUFFIX}"
HIDDEN = "it is hidden: its name begins with a dot, as programs name a file that they still copy"
UNKNOWN = f"it is of no kind that is read here; models are {MODEL_SUFFIX} files and diffusers folders"
# The first bytes of files that are often found under the name of a model.
HEADS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the model; run git lfs pull"),
    (b"GGUF", GGUF),
    (b"PK\x03\x04", f"in fact {PICKLE}"),
    (b"\x80\x02", f"in fact {PICKLE}"),
    (bytes(32), "it begins with zeros, as a file does whose download is not finished"),
)
TEXTS = {
    b"<": "it is a web page, perhaps one that asks to log in; download the model again",
    b"{": "it is a JSON text, perhaps the answer of a download site; download the model again",
}


def is_beside(path: Path) -> bool:
    """Whether the name of a file is that of what lies next to models: a text, a setting, a preview."""
    return path.suffix.lower() in BESIDE or path.name.startswith("._")


def is_apple_double(path: Path) -> bool:
    """Whether a file has what macOS writes next to a file on a foreign disk (RFC 1740)."""
    if not path.name.startswith("._"):
        return False
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) in APPLE_DOUBLE
    return False


def why_unread(path: Path) -> str | None:
    """Why a file that is not a .safetensors file is not read; None: it is not a model. Raises OSError."""
    suffix, size = path.suffix.lower(), path.stat().st_size
    if is_beside(path):
        return None
    by_name = next((why for suffixes, why in BY_SUFFIX if suffix in suffixes), None)
    copied = path.name.startswith(".") and MODEL_SUFFIX in path.name  # rsync adds six characters at the end
    if by_name is None and not copied and size < UNKNOWN_BYTES:
        return None
    if _has_safetensors_header(path, size) and by_name is not UNFINISHED_FILE and not copied:
        return RENAMED
    if by_name is None and path.name.startswith("."):
        return HIDDEN
    return by_name or UNKNOWN


BY_SUFFIX = (
    (PICKLES, PICKLE),
    (UNFINISHED, UNFINISHED_FILE),
    (ARCHIVES, ARCHIVE),
    ((".gguf",), GGUF),
    (OTHER_FORMATS, UNKNOWN),
)


def what_it_is(path: Path) -> str:
    """What a file is that is named as a .safetensors file, and is none; "": not known. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(32)
    if b"\0" not in head[:8] and head[:1] in TEXTS:  # the first 8 bytes of a safetensors file are a small number
        return TEXTS[head[:1]]
    return next((what for start, what in HEADS if head.startswith(start)), "")


def _has_safetensors_header(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= min(size - 8, MAX_HEADER_BYTES)
