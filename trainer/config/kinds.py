"""The kind of a class name (person, animal, style or object), and the default caption."""

from __future__ import annotations

# Kind -> class names. The people are those of the hosted service (astria-docs, "face crop"), and their plurals.
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
    """The kind of a class name: person, animal, style or object. `name` may have several words."""
    if "style" in name.lower():  # as in `default_caption`
        return STYLE_KIND
    words = set(name.lower().split())
    return next((kind for kind, known in KINDS.items() if words & known), OTHER_KIND)


def default_caption(token: str, class_name: str) -> str:
    """The caption of a photo that has none of its own; the text is the hosted service's."""
    subject = f"{token} {class_name}"
    return subject if "style" in class_name.lower() else f"A photo of {subject}"
