"""The subject of the photos: main faces, one person or several, and which photos are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from trainer.config.kinds import kind_of
from trainer.config.train_config import TrainConfig
from trainer.contract.photos import Photo
from trainer.library import weights
from trainer.photos.found import Found

SAME = {  # least cosine of two identities of one person
    "face_recognition_sface_2021dec.onnx": 0.363,  # OpenCV's own figure
    "mobilefacenet_112.onnx": 0.4,  # same person 0.53 and more, others 0.25 and less, on the tests' data
    weights.ARCFACE.name: 0.28,  # threshold of insightface's own example (web-demos/src_recognition)
}
CANDIDATE = 0.25  # of the area of the photo's largest face: a smaller face is in the background
STRANGER = "not the person of the other photos"
PAIRS = {"couple"}  # class names of two people: two faces of a photo are the subject
CROWDS = {"men", "women", "boys", "girls", "children", "people"}  # of more people: all faces are


def not_people(parameter: str, name: str) -> str:
    return f"{parameter} is for photos of people, and {name} is not: no faces are detected"


def drop_faceless(photos: list[Photo], config: TrainConfig) -> list[str]:
    """Drop or keep photos of people without a face, as `faceless` says; returns warnings for all photos."""
    faceless = [photo for photo in photos if photo.faces == []]
    if config.faceless == "drop" and len(faceless) == len(photos):
        return ["no face was found in any photo: all are kept"]
    for photo in faceless:
        if config.faceless == "drop":
            photo.dropped = "no face was found (faceless=drop)"
        else:
            photo.notes.append("no face was found: kept as it is (faceless=keep)")
    return []


def of_one_person(name: str) -> bool:
    """Whether a class name means one person, as a faceid needs."""
    return kind_of(name) == "person" and not set(name.lower().split()) & (PAIRS | CROWDS)


def drop_unusable(photos: list[Photo], subjects: dict[str, list[Found]]) -> list[str]:
    """Drop the photos that do not show the person of a faceid; returns a warning for each."""
    warnings = []
    for photo in photos:
        if not photo.faces:
            photo.dropped = "no face was found"
        elif photo.same_person is False:
            photo.dropped = STRANGER
        elif not subjects[photo.file][0].identity:  # only the IDENTIFIED largest faces have one
            photo.dropped = f"{len(photo.faces)} faces were found, and none is prominent"
        else:
            continue
        warnings.append(f"{photo.name} is left out: {photo.dropped}")
    return warnings


def doubts(photos: list[Photo], faces: dict[str, Found], same: float) -> list[str]:
    """Warnings for a faceid whose person is not clear. faces: file of the photo -> main face."""
    warnings = []
    if any(photo.same_person is None for photo in photos):  # no majority, so it is not known
        alike = [likeness(one, other) for one, other in combinations(faces.values(), 2)]
        if alike and min(alike) < same:
            names = ", ".join(photo.name for photo in photos)
            warnings.append(
                f"{names} seem to show different people (likeness {min(alike):.2f}; one person has {same:g} and"
                " more). Their faces are mixed in training: leave out the photos of other people"
            )
    return warnings + [
        f"{photo.name} shows {len(photo.faces)} faces: the most prominent one is taken"
        for photo in photos
        if photo.same_person is None and photo.faces and len(photo.faces) > 1
    ]


def mean(vectors: Sequence[Sequence[float]]) -> list[float]:
    """The mean of vectors of length 1."""
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]


def choose(
    photos: Sequence[Photo], found: Sequence[list[Found]], name: str, same: float | None
) -> tuple[list[list[Found]], list[bool | None]]:
    """For each photo: the faces of the subject, and whether they show the person of the other photos (None: not known).

    The subject is the most prominent face; with identities and three photos or more, the person who is in most of them.
    For a couple it is two faces, for several people all.
    """
    words = set(name.lower().split())
    ranked = [
        sorted(faces, key=lambda face: -prominence(face, photo)) for photo, faces in zip(photos, found, strict=True)
    ]
    if words & CROWDS:
        return ranked, [None] * len(ranked)
    if words & PAIRS:
        return [faces[:2] for faces in ranked], [None] * len(ranked)
    main = [faces[:1] for faces in ranked]
    person = recurring(ranked, same) if same else None
    if person is None or same is None:
        return main, [None] * len(ranked)
    known: list[bool | None] = []
    for place, faces in enumerate(ranked):
        alike = [face for face in candidates(faces) if likeness(face, person) >= same]
        if alike:
            main[place] = [max(alike, key=lambda face: likeness(face, person))]
        known.append(bool(alike) if faces else None)
    return main, known


def prominence(face: Found, photo: Photo) -> float:
    """How large, central and sharp a face is: the root of its share of the photo, up to halved by each other factor."""
    left, top, right, bottom = face.box
    away = max(abs((left + right) / photo.width - 1), abs((top + bottom) / photo.height - 1))  # 0 at the centre
    sharp = min(1.0, face.sharpness / 100)
    return float((face.area / (photo.width * photo.height)) ** 0.5 * (1 - away / 2) * (0.5 + sharp / 2))


def candidates(faces: list[Found]) -> list[Found]:
    """The faces that may be the subject, without people in the background."""
    largest = max((face.area for face in faces), default=0.0)
    return [face for face in faces if face.identity and face.area >= CANDIDATE * largest]


def likeness(one: Found, other: Found) -> float:
    """Cosine of two identities."""
    return sum(a * b for a, b in zip(one.identity or (), other.identity or (), strict=False))


def recurring(ranked: Sequence[list[Found]], same: float) -> Found | None:
    """The face that is in most photos; None unless it is in more than half, of three photos or more."""
    asked = [candidates(faces) for faces in ranked if faces]
    if len(asked) < 3:
        return None

    def seen_in(face: Found) -> tuple[int, float]:
        best = [max((likeness(face, other) for other in others), default=-1.0) for others in asked]
        return sum(value >= same for value in best), sum(best)

    everybody = [face for faces in asked for face in faces]
    person = max(everybody, key=seen_in, default=None)
    return person if person and 2 * seen_in(person)[0] > len(asked) else None
