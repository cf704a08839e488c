"""The answers about packs: what clients of the hosted service read in a pack, then ours."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from trainer.clock import stamp
from trainer.config import branch_file
from trainer.library.bases import hashed_id
from trainer.studio import packs
from trainer.studio.pack_file import ANY, Pack
from trainer.studio.prompt_rules import API_NUM_IMAGES
from trainer.studio.rows import Services


def pack_id(slug: str) -> int:
    """The number of a pack, from its slug alone: no other pack gets it, also after this one is deleted."""
    return hashed_id(f"pack {slug}")


def own_folder(services: Services) -> Path:
    """The folder of the packs that users saved."""
    return services.settings.outputs / "packs"


def is_own(services: Services, slug: str) -> bool:
    """Whether a user saved this pack; else it comes with the program."""
    return (own_folder(services) / f"{slug}.toml").exists()


def pack_answer(services: Services, pack: Pack) -> dict[str, object]:
    """The answer of GET /p/SLUG.

    costs: 0 for each class, since nothing costs anything here. cover_url: null, since a pack has no pictures; for the
    same reason each prompt's images are empty. public_at: null for a pack that a user saved. created_at: when its file
    was written. main_class_name: its first class; null if it is for everything.
    """
    described = packs.describe(pack, branch_file.default_token(services.settings.presets, pack.branch))
    prompts = described["prompts"]
    assert isinstance(prompts, dict)
    own = is_own(services, pack.slug)
    folder = own_folder(services) if own else services.settings.presets / "packs"
    written = written_at(folder / f"{pack.slug}.toml")
    main = pack.classes[0]
    return {
        "id": pack_id(pack.slug),
        **described,
        "cover_url": None,
        "main_class_name": None if main == ANY else main,
        "costs": {
            name: {"cost": 0, "num_images": sum(int(one.get("num_images", API_NUM_IMAGES)) for one in listed)}
            for name, listed in prompts.items()
        },
        "prompts_per_class": {
            name: [{"id": one["id"], "images": []} for one in listed] for name, listed in prompts.items()
        },
        "created_at": written,
        "updated_at": written,
        "public_at": None if own else written,
        "unlisted_at": None,
    }


def written_at(file: Path) -> str:
    """When a file was written; now, if it has just been deleted."""
    try:
        return stamp(datetime.fromtimestamp(file.stat().st_mtime, UTC))
    except FileNotFoundError:
        return stamp(datetime.now(UTC))
