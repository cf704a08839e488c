"""Downloads from the Hugging Face hub, after checks of disk and memory. No other module does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx2
import psutil
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.hf_api import RepoSibling
from pydantic import BaseModel, TypeAdapter

from trainer.contract.run_files import OBJECT
from trainer.files import Unreadable, read_json

ASK_SECONDS = 10.0  # time limit of each request about a repository; downloads have the library's own limits
DISK_MARGIN = 2**30  # bytes that stay free after a download
GB = 1e9  # bytes, the unit of disks and of the hub's pages
INDEX = "model_index.json"
UNUSED_PARTS = {"safety_checker", "feature_extractor"}
SMALL = (".json", ".txt", ".model")  # configurations and vocabularies
WEIGHTS = {"model", "diffusion_pytorch_model"}  # file names that transformers and diffusers load
# (names of all files, function that fetches one of them) -> names of the wanted files
Pick = Callable[[Collection[str], Callable[[str], Path]], list[str]]


WrongConfig = StrictDataclassError  # of transformers' configurations: a value of a wrong type


class _Shards(BaseModel):
    """An index of weights: the file of each tensor."""

    weight_map: dict[str, str]


SHARDS = TypeAdapter(_Shards)


class NotEnoughRoom(OSError):
    """The disk or the memory is too small for the download."""


class _Lacking(Exception):
    """A repository, or its copy in the cache, lacks files. The message continues after the repository's name."""


def fetch_pipeline(
    repository: str, revision: str | None = None, variant: str | None = None, *, ram_check: bool = True
) -> Path:
    """The folder of a diffusers pipeline: model_index.json and the parts it names, from the cache or else the hub.

    Of each part: its configuration, its vocabulary and one copy of its weights: that of the variant ("fp16"), or the
    plain one if the part has no such copy or `variant` is None. Never pickles, code, the safety checker or single
    files at the root. Otherwise as `fetch_files`. ram_check: before the download, check that the weights fit the free
    memory.
    """

    def pick(names: Collection[str], place: Callable[[str], Path]) -> list[str]:
        if INDEX not in names:
            raise _Lacking(f"has no {INDEX}, so it is no diffusers pipeline")
        patterns = [f"{part}/*" for part in _parts(place(INDEX))]
        return [INDEX, *_part_files(names, patterns, variant)]

    return _fetch(repository, revision, pick, ram_check=ram_check)


def fetch_parts(
    repository: str,
    patterns: Sequence[str],
    revision: str | None = None,
    variant: str | None = None,
    *,
    ram_check: bool = True,
) -> Path:
    """The snapshot folder with parts of a pipeline, such as ["vae/*", "tokenizer/*"]; otherwise as `fetch_pipeline`."""

    def pick(names: Collection[str], _place: Callable[[str], Path]) -> list[str]:
        return _part_files(names, patterns, variant)

    return _fetch(repository, revision, pick, ram_check=ram_check)


def fetch_model(repository: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The snapshot folder of a repository that is one model: its configuration, its vocabulary if it has one, and one
    copy of its weights. Otherwise as `fetch_files`."""

    def pick(names: Collection[str], _place: Callable[[str], Path]) -> list[str]:
        inside = {f"./{name}": name for name in names if "/" not in name}
        return [inside[name] for name in _part_files(inside, ["./*"], variant)]

    return _fetch(repository, revision, pick, ram_check=False)


def fetch_files(repository: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The snapshot folder, in the hub's own cache, with all these files of a repository in it.

    A complete copy in the cache is used without a request to the hub, even if the branch has moved since. Complete
    means: every wanted file of the commit is there, by the list of the commit's files that huggingface_hub keeps in
    the cache. It adds a file only after its download has ended, so an interrupted download continues with the missing
    files. A cache without that list (of an older huggingface_hub) is completed from the hub; offline it counts as
    complete if it has the shards that the weight indexes name, and weights in every part that needs some.

    Raises OSError with a clear message before anything large is downloaded: offline and not in the cache, hub not
    reachable, no such repository, revision or file, no access; NotEnoughRoom if it does not fit.
    """

    def pick(known: Collection[str], _place: Callable[[str], Path]) -> list[str]:
        if absent := [name for name in names if name not in known]:
            raise _Lacking(f"has no {_shortened(absent)}")
        return list(names)

    return _fetch(repository, revision, pick, ram_check=False)


def _fetch(repository: str, revision: str | None, pick: Pick, *, ram_check: bool) -> Path:
    title = f"{repository} (revision {revision})" if revision else repository
    try:
        return _from_cache(repository, revision, pick)
    except _Lacking as lack:
        if constants.is_offline_mode():
            raise OSError(
                f"{title} {lack}. Looked for in {constants.HF_HUB_CACHE}, since HF_HUB_OFFLINE is set. Unset it, or run"
                f" `hf download {repository}` where there is a network, or put a folder into the models folder."
            ) from None
    with _clear_errors(repository, title):
        api = HfApi()
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=ASK_SECONDS)
        files = {file.rfilename: file for file in info.siblings or []}
        wanted = pick(files, lambda name: Path(hf_hub_download(repository, name, revision=info.sha)))
        if info.gated:  # the list is public, the files are not
            url = hf_hub_url(repository, wanted[0], revision=info.sha)
            api.get_hf_file_metadata(url=url, timeout=ASK_SECONDS)
        missing = [files[name] for name in wanted if not _is_here(repository, info.sha, files[name])]
        _check_disk(title, sum(file.size or 0 for file in missing))
        if ram_check:
            _check_ram(title, sum(files[name].size or 0 for name in wanted if name.endswith(".safetensors")))
        snapshot_download(repository, revision=revision, allow_patterns=wanted)
        return _from_cache(repository, revision, pick)  # files are missing if the hub became unreachable


def _from_cache(repository: str, revision: str | None, pick: Pick) -> Path:
    """The snapshot folder, if all wanted files are there. Raises _Lacking otherwise."""
    try:  # without a pattern: the path of the snapshot, complete or not
        found = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        raise _Lacking("is not in the cache") from None
    folder = Path(found)
    names: Collection[str]
    try:
        names = [file.path for file in get_cached_repo_tree(repository, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        if not constants.is_offline_mode():
            raise _Lacking("is in the cache, but what belongs to it is not known") from None
        names = _names_in(folder)
    try:
        wanted = pick(names, folder.joinpath)
    except FileNotFoundError:
        wanted = [INDEX]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise _Lacking(f"is not whole in the cache: it lacks {_shortened(missing)}")
    return folder


def _names_in(folder: Path) -> set[str]:
    """The files of a snapshot folder, and the shards that its weight indexes name."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for index in folder.glob("*/*.safetensors.index*.json"):
        try:
            shards = set(read_json(index, SHARDS).weight_map.values())
        except (OSError, Unreadable):
            raise _Lacking(f"has a broken {index.name}") from None
        names |= {f"{index.parent.name}/{shard}" for shard in shards}
    return names


def _shortened(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _parts(index: Path) -> list[str]:
    """The folders that a model_index.json names, without those that are never used."""
    try:
        entries = read_json(index, OBJECT)
    except Unreadable:
        raise _Lacking(f"has a broken {INDEX}") from None
    # An entry is [library, class]; [null, null] means that this pipeline does not have the part.
    named = (name for name, entry in entries.items() if isinstance(entry, list) and entry and entry[0])
    return [name for name in named if name not in UNUSED_PARTS]


def _part_files(names: Iterable[str], patterns: Iterable[str], variant: str | None) -> list[str]:
    """The files that the parts are loaded from. Raises _Lacking if there are none, or only pickles."""
    wanted: list[str] = []
    found_variants = set()
    for pattern in patterns:
        inside = [name for name in names if name.count("/") == 1 and fnmatchcase(name, pattern)]
        copies = {name: copy for name in inside if (copy := _copy_of(name)) is not None}
        chosen = variant if variant in copies.values() else ""
        weights = [name for name, copy in copies.items() if copy == chosen]
        small = [name for name in inside if name.endswith(SMALL) and ".index." not in name]
        kinds = {PurePosixPath(name).name for name in small}
        if "config.json" in kinds and "tokenizer_config.json" not in kinds and not weights:
            raise _Lacking(f"has no weights in {pattern} that are safetensors, and nothing else is loaded")
        if not small and not weights:
            raise _Lacking(f"has no {pattern}")
        wanted += small + weights
        found_variants |= set(copies.values())
    if variant and found_variants and variant not in found_variants:
        raise _Lacking(f"has no weights of the variant {variant}")
    return wanted


def _copy_of(name: str) -> str | None:
    """The copy of a part's weights that a file or index belongs to: "" or a variant. None: it is not weights.

    model-00001-of-00002.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json, ...
    """
    file = PurePosixPath(name).name
    if not re.search(r"\.safetensors$|\.safetensors\.(.+\.)?json$", file):
        return None
    words = re.sub(r"-\d+-of-\d+", "", file).split(".")
    rest = [word for word in words[1:] if word not in ("safetensors", "index", "json")]
    return ".".join(rest) if words[0] in WEIGHTS else None


def _is_here(repository: str, commit: str | None, file: RepoSibling) -> bool:
    """Whether the cache has a file, of this commit or (if the file system has links) of one with the same content."""
    place = try_to_load_from_cache(repository, file.rfilename, revision=commit)
    blobs = Path(constants.HF_HUB_CACHE, "models--" + repository.replace("/", "--"), "blobs")
    content = file.lfs.sha256 if file.lfs else file.blob_id
    return isinstance(place, str) or (content is not None and (blobs / content).exists())


def _check_disk(title: str, size: int) -> None:
    """Raises NotEnoughRoom if `size` bytes do not fit on the disk of the cache."""
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if size and size + DISK_MARGIN > free:
        raise NotEnoughRoom(
            f"{title} needs {(size + DISK_MARGIN) / GB:.1f} GB of disk (1 GiB of it stays free), and {cache} has"
            f" {free / GB:.1f} GB. Free some space, or set HF_HOME to a folder on a larger disk."
        )


def _check_ram(title: str, size: int) -> None:
    """Raises NotEnoughRoom if `size` bytes of weights do not fit into the free memory."""
    free = psutil.virtual_memory().available
    if size > free:
        raise NotEnoughRoom(
            f"{title} needs {size / GB:.1f} GB of memory for its weights, and {free / GB:.1f} GB are free."
            " Close other programs, or take a smaller base."
        )


@contextmanager
def _clear_errors(repository: str, title: str) -> Iterator[None]:
    """Turn errors of the hub into OSError with a remedy in its message. No message can contain the token."""
    host = urlsplit(constants.ENDPOINT).hostname or "the hub"  # an endpoint may contain a password, a host does not
    token = get_token()
    if token and not (token.isascii() and token.isprintable()):  # the client's error would quote it
        raise OSError("the hub's token (HF_TOKEN, or `hf auth login`) holds characters that no token has")
    access = "the token in use has no access" if token else "no token is set"
    give = "give a token that has access in the environment variable HF_TOKEN, or with `hf auth login`"
    try:
        yield
    except _Lacking as lack:
        raise OSError(f"{title} {lack}") from None
    except GatedRepoError as error:
        raise OSError(
            f"{repository} is given only to those who accept its licence, and {access}: open"
            f" https://huggingface.co/{repository}, log in and accept it, then {give}."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(f"{host} has no {repository}, or it is private and {access}; if so, {give}.") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{host} has {repository}, but no such revision: {title}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = f" The token may have expired, or lack the right to read it: {give}." if status in (401, 403) else ""
        raise OSError(f"{host} answers {status} for {repository}.{hint}") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError):  # the second: the connection broke
        raise OSError(
            f"{host} cannot be reached for {repository}. Check the network; HF_HUB_OFFLINE=1"
            " uses only what is in the cache."
        ) from None
    except json.JSONDecodeError:
        raise OSError(f"{host} does not answer like the hub (a login page of this network?)") from None
    except RuntimeError as error:  # of hf_xet, the library's download of large files
        raise OSError(f"the download of {title} broke: {error}. Complete files are kept; try again.") from error
