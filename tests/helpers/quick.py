"""The samples of the product document, made quick."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.helpers.app import ROOT


def fewer_steps(folder: Path) -> Path:
    """The presets with a twentieth of the steps of branch fast."""
    presets = folder / "presets"
    shutil.copytree(ROOT / "presets", presets)
    toml = (presets / "fast.toml").read_text()
    for rule in ("steps_per_photo", "min_steps", "max_steps"):
        toml = re.sub(rf"^{rule} = \d+", f"{rule} = 8", toml, flags=re.MULTILINE)
    (presets / "fast.toml").write_text(toml)
    return presets
