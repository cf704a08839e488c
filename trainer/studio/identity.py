"""The identity of a faceid tune's person, or its mock on a placeholder branch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config import branch_file
from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.photos import Photo, ProgressCallback, no_progress
from trainer.library import weights
from trainer.library.weights import Unavailable
from trainer.names import FORMATS, ModelType
from trainer.studio.inspection import look_for_faces
from trainer.studio.rows import Services


def find_identity(
    services: Services,
    branch: str,
    name: str,
    work: Path,
    photos: Sequence[Photo],
    progress: ProgressCallback = no_progress,
) -> tuple[list[Photo], list[str]]:
    """Write the identity of the person in `work/images`; returns verdicts and warnings, as `PhotoAnalyzer.identify`.

    A placeholder branch writes none: it only looks for faces, and refuses no photo.
    """
    if branch_file.is_placeholder(services.settings.presets, branch):
        return find_mock_identity(services, branch, name, work / "images", photos, progress)
    return services.analyzer.identify(work, photos, name, progress)


def find_mock_identity(
    services: Services, branch: str, name: str, images: Path, photos: Sequence[Photo], progress: ProgressCallback
) -> tuple[list[Photo], list[str]]:
    """Look for faces with the detector that is here: nothing is downloaded for a mock."""
    photos = [photo.model_copy(deep=True) for photo in photos]
    warnings = [f"a faceid on branch {branch} is a mock: its prompts are drawn without the face"]
    try:
        if weights.find(services.settings, weights.DETECTOR) is None:
            return photos, [*warnings, "no face was looked for: the face detector is not here yet"]
        for number, photo in enumerate(photos):
            progress("faces are detected", number, len(photos))
            if not photo.dropped:
                look_for_faces(services.analyzer, images, photo, name)
    except (AnalysisUnavailable, Unavailable) as problem:
        return photos, [*warnings, f"no face was looked for: {problem}"]
    progress("faces are detected", len(photos), len(photos))
    if not any(photo.faces for photo in photos):
        warnings.append("no face was found in any photo: a branch that draws faces refuses this request")
    return photos, warnings


def made_files(work: Path, model_type: ModelType) -> list[str]:
    """The model files of a model type that are in `work/model`."""
    files = (FORMATS[name] for name in model_type.formats)
    return [file for file in files if (work / "model" / file).is_file()]
