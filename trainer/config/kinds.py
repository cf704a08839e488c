"""What a class name is about: person, animal, style or object; and the caption that follows from it."""

from __future__ import annotations

# What a class name is about. The people are those of the hosted service (astria-docs, "face crop"), and their plurals.
KINDS = {
    "person": {
        "man", "woman", "boy", "girl", "child", "baby", "person", "couple", "men", "women", "boys", "girls",
        "children", "people",
    },
    "animal": {
        "cat", "dog", "puppy", "kitten", "bird", "horse", "rabbit", "hamster", "animal", "pet", "parrot", "cow", "pig",
        "sheep", "goat", "fox", "bear", "fish", "turtle", "lizard", "snake", "ferret", "mouse", "duck", "chicken",
        "cats", "dogs", "puppies", "kittens", "birds", "horses", "rabbits", "animals", "pets",
    },
}  # fmt: skip
STYLE_KIND, OTHER_KIND = "style", "object"


def kind_of(name: str) -> str:
    """What a class name is about: person, animal, style or object. `name` may have several words."""
    if "style" in name.lower():  # as `schema.default_caption` has it
        return STYLE_KIND
    words = set(name.lower().split())
    return next((kind for kind, known in KINDS.items() if words & known), OTHER_KIND)


def default_caption(token: str, class_name: str) -> str:
    """What a photo without a caption of its own is called; the hosted service's words."""
    subject = f"{token} {class_name}"
    return subject if "style" in class_name.lower() else f"A photo of {subject}"
