"""The samples of the product document, made quick."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.helpers.app import ROOT


def cheap_previews(folder: Path) -> Path:
    """The presets without guidance, which halves the work of a preview: most of a short run of branch fast."""
    presets = folder / "presets"
    shutil.copytree(ROOT / "presets", presets)
    toml = (presets / "fast.toml").read_text()
    (presets / "fast.toml").write_text(re.sub(r"^cfg_scale = .+$", "cfg_scale = 1.0", toml, flags=re.MULTILINE))
    return presets


def fewer_steps(folder: Path) -> Path:
    """The presets with a twentieth of the steps of branch fast."""
    presets = folder / "presets"
    shutil.copytree(ROOT / "presets", presets)
    toml = (presets / "fast.toml").read_text()
    for rule in ("steps_per_photo", "min_steps", "max_steps"):
        toml = re.sub(rf"^{rule} = \d+", f"{rule} = 8", toml, flags=re.MULTILINE)
    (presets / "fast.toml").write_text(toml)
    return presets
