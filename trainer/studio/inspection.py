"""The inspection of one photo, before it is sent with a tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.config.kinds import kind_of
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest
from trainer.contract.fields import parse_request
from trainer.contract.inspection import Inspection, InspectRequest
from trainer.contract.photos import Photo, Upload
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.intake import intake
from trainer.photos.subject import CANDIDATE, choose
from trainer.studio.rows import Services

# Of the long side. A tune asks for 512 px of the short side, but the hosted service's sample reduces each photo to a
# long side of 512 px before it sends it here.
LOW_RESOLUTION_PX = 512


def inspect_image(services: Services, data: Mapping[str, object]) -> Inspection:
    """What is seen in one photo; nothing is kept. Raises InvalidRequest, DiskProblem."""
    request, field = _parse(data)
    uploads = [request.file] if isinstance(request.file, Upload) else []
    urls = [request.file_url] if request.file_url else []
    try:
        with intake(services.settings, services.decoder, uploads, urls) as taken:
            if len(taken.photos) != 1:
                raise InvalidRequest({field: [f"must be one photo, got {len(taken.photos)}"]})
            (photo,), warnings = taken.photos, [f"{name} is accepted and has no effect" for name in request.ignored]
            warnings += taken.warnings
            if kind_of(request.name) == "person":
                try:
                    look_for_faces(services.analyzer, taken.folder / "images", photo, request.name)
                except AnalysisUnavailable as problem:
                    warnings.append(str(problem))
            else:
                warnings.append(f"only faces of people are looked for: whether this is a {request.name} is not known")
    except InvalidRequest as invalid:
        raise InvalidRequest({field: [line for lines in invalid.problems.values() for line in lines]}) from None
    return Inspection(
        name="" if photo.faces == [] else request.name,
        blurry=photo.blurred,
        low_resolution=max(photo.width, photo.height) < LOW_RESOLUTION_PX,
        includes_multiple_people=None if photo.faces is None else several(photo),
        width=photo.width,
        height=photo.height,
        faces=photo.faces,
        warnings=[*photo.notes, *warnings],
    )


def _parse(data: Mapping[str, object]) -> tuple[InspectRequest, str]:
    """The request, and the field that has its photo. Raises InvalidRequest with all errors."""
    problems: dict[str, list[str]] = {}
    if not isinstance(data.get("file"), Upload | None):
        problems["file"] = ["must be a file in multipart/form-data; an address goes into file_url"]
    elif not data.get("file") and not data.get("file_url"):
        problems["file"] = ["is required, or file_url"]
    elif data.get("file") and data.get("file_url"):
        problems["file"] = ["file and file_url are two photos; leave one of them out"]
    try:
        request = parse_request(InspectRequest, data)
    except InvalidRequest as invalid:
        raise InvalidRequest(problems | invalid.problems) from None
    if problems:
        raise InvalidRequest(problems)
    return request, "file" if request.file else "file_url"


def look_for_faces(analyzer: PhotoAnalyzer, images: Path, photo: Photo, name: str) -> None:
    """Put the faces of a photo in the folder `images` into its verdict. Raises AnalysisUnavailable."""
    found = analyzer.faces(images / photo.file)
    (subject,), _ = choose([photo], [found], name, None)
    photo.faces = [face.in_verdict(main=face in subject) for face in found]


def several(photo: Photo) -> bool:
    """Whether a photo has more than one person who is not far in the background."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (face.box for face in photo.faces or [])]
    return sum(area >= CANDIDATE * max(areas) for area in areas) > 1
