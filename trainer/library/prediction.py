"""What the UNet of a single file predicts, and its noise schedule: marker tensors and metadata say so.

Rules of other programs: ComfyUI (`SDXL.model_type` in supported_models.py; its CheckpointSave writes the markers as
empty tensors, and `modelspec.predict_key`), kohya's sd-scripts (`modelspec.prediction_type`, `ss_v_parameterization`,
`ss_zero_terminal_snr`), A1111 (`parameterization` in NAME.yaml next to the file, which SD 1.5 models have in place of
markers). A marker comes before metadata, which mergers copy from one file to another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.library.header import Header, read_header

V_MARKER = "v_pred"
ZERO_SNR_MARKER = "ztsnr"
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
VELOCITY = {"v", "v_prediction", "v-prediction", "v_pred", "v-pred", "vpred", "velocity"}
# Words for what neither the training nor the samplers here can do.
UNSUPPORTED = {"sample", "x0", "x_start", "edm", "flow", "flow_prediction", "rectified_flow", "flow_matching"}
YAML_VELOCITY = re.compile(rb"""^\s*parameterization:\s*["']?v["']?\s*(#.*)?$""", re.MULTILINE)
MOST_YAML_BYTES = 2**20
# Markers of a noise schedule by continuous noise levels (Karras et al. 2022, arXiv 2206.00364) -> a model with it.
EDM_MARKERS = {"edm_mean": "Playground v2.5", "edm_std": "Playground v2.5", "edm_vpred.sigma_max": "CosXL"}


@dataclass(frozen=True)
class Prediction:
    """velocity: it predicts the velocity (Salimans & Ho 2022), else the noise. zero_snr: the last step of its noise
    schedule is pure noise (Lin et al. 2023, arXiv 2305.08891)."""

    velocity: bool = False
    zero_snr: bool = False


def read_prediction(file: Path) -> Prediction:
    """The prediction of a single file, also by the YAML next to it. Raises OSError, ValueError."""
    found = prediction_of(read_header(file))
    if not found.velocity and (beside := yaml_of(file)).is_file():
        with beside.open("rb") as stream:
            return Prediction(YAML_VELOCITY.search(stream.read(MOST_YAML_BYTES)) is not None)
    return found


def yaml_of(file: Path) -> Path:
    """The file next to a single file, with the same name, that has A1111's configuration."""
    return file.with_suffix(".yaml")


def prediction_of(header: Header) -> Prediction:
    """The prediction of a single file. Raises ValueError for one that is not supported."""
    if marker := next((name for name in EDM_MARKERS if name in header.shapes), None):
        raise ValueError(
            f"it has the noise levels of EDM (its tensor {marker} says so, as in {EDM_MARKERS[marker]}), which are not"
            " supported; use a model that predicts noise or velocity"
        )
    facts = header.metadata
    words = [facts[key].strip().lower() for key in PREDICTION_KEYS if key in facts]
    if V_MARKER not in header.shapes:
        if word := next((word for word in words if word in UNSUPPORTED), None):
            raise ValueError(
                f"its metadata says that it predicts {word!r}, which is not supported; use a model that predicts noise"
                " or velocity"
            )
        if not VELOCITY.intersection(words) and not _is_true(facts.get("ss_v_parameterization")):
            return Prediction()
    return Prediction(True, ZERO_SNR_MARKER in header.shapes or _is_true(facts.get("ss_zero_terminal_snr")))


def check_scheduler(config: Mapping[str, object]) -> None:
    """config: of a diffusers scheduler. Raises ValueError for a noise schedule or prediction that is not supported."""
    kind, predicted = str(config.get("_class_name")), str(config.get("prediction_type"))
    if kind.startswith("EDM"):
        raise ValueError(
            f"it has the noise levels of EDM ({kind}), which are not supported; use a model that predicts noise or"
            " velocity"
        )
    if "FlowMatch" in kind or config.get("use_flow_sigmas") or predicted in UNSUPPORTED:
        word = predicted if predicted in UNSUPPORTED else "a flow"
        raise ValueError(
            f"its scheduler says that it predicts {word!r}, which is not supported for this family; use a model that"
            " predicts noise or velocity"
        )


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() == "true"
