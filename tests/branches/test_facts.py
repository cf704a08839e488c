"""What a family's TOML and its file say alike."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.branches.flux1 import CONFIG as FLUX1_CONFIG
from trainer.branches.flux1 import Flux1
from trainer.branches.sd15 import CONFIG as SD15_CONFIG
from trainer.branches.sd15 import SD15
from trainer.branches.sdxl1 import CONFIG as SDXL1_CONFIG
from trainer.branches.sdxl1 import SDXL1
from trainer.config.branch_file import control_row, detection_of, detections
from trainer.contract.prompts import CONTROLS
from trainer.names import BRANCHES
from trainer.settings import Settings

FAMILIES = {"sd15": (SD15, SD15_CONFIG), "sdxl1": (SDXL1, SDXL1_CONFIG), "flux1": (Flux1, FLUX1_CONFIG)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_toml_and_file_agree(settings: Settings, name: str) -> None:
    family, config = FAMILIES[name]
    found = detection_of(settings.presets, name)
    assert found is not None
    assert (found.denoiser, found.whole_file) == (family.denoiser_name, family.whole_file)
    assert found.pipeline == config["model_index.json"]["_class_name"]
    modes = {kind for net in family.control_nets for kind in net.modes}
    assert all(control_row(settings.presets, name, kind) for kind in modes)
    assert all(set(net.pipelines) == {"text", "image", "inpaint"} for net in family.control_nets)


def test_only_the_placeholder_has_no_files_of_its_own(settings: Settings) -> None:
    assert {*BRANCHES} - detections(settings.presets).keys() == {"fast"}
    assert list(detections(settings.presets)) == ["flux1", "sdxl1", "sd15"]  # the newest is asked first


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_configuration_names_every_part_of_the_pipeline(name: str) -> None:
    config: dict[str, Any] = FAMILIES[name][1]
    parts = {part for part, value in config["model_index.json"].items() if isinstance(value, list)}
    with_config = {file.partition("/")[0] for file in config if "/" in file}
    assert with_config == {part for part in parts if not part.startswith("tokenizer")}


def test_kinds_of_control_are_those_of_the_api() -> None:
    assert {kind for family, _ in FAMILIES.values() for net in family.control_nets for kind in net.modes} <= {*CONTROLS}
