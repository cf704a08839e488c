"""Flags in the text of a prompt, as users of the hosted service write them: `a dog --mask_prompt face --mask_blur 4`.

This module only parses. Flags without an effect are removed from the text, with a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Flags:
    """The flags that have an effect; None (or False) if they are not in the text.

    mask_prompt, mask_negative: what the mask covers, and what it does not, as text. mask_dilate: `12` px or `5%`,
    negative to shrink. mask_blur: px. Numbers are within the bounds of NUMBERS.
    """

    mask_prompt: str | None = None
    mask_negative: str | None = None
    mask_invert: bool = False
    mask_dilate: str | None = None
    mask_blur: float | None = None
    hires_denoising_strength: float | None = None
    hires_cfg_scale: float | None = None
    face_inpaint_denoising: float | None = None
    upscale_factor: float | None = None
    only_upscale: bool = False
    control_guidance_start: float | None = None
    control_guidance_end: float | None = None


OURS = [field.name for field in fields(Flags)]
WORDS = ("mask_prompt", "mask_negative")
SWITCHES = ("mask_invert", "only_upscale")
NUMBERS: dict[str, tuple[float, float]] = {
    "mask_blur": (0, 1000),
    "hires_denoising_strength": (0.1, 1),
    "hires_cfg_scale": (0, 15),
    "face_inpaint_denoising": (0, 1),
    "upscale_factor": (1, 4),
    "control_guidance_start": (0, 1),
    "control_guidance_end": (0, 1),
}
CLAMPED = ("hires_denoising_strength",)  # set to the nearest allowed number, as at the hosted service
# The other flags of the hosted service: how many words of the text belong to each.
NONE, ONE, SOME_NUMBERS, ALL = "none", "one", "some numbers", "all to the next flag"
ELSEWHERE = {
    "outpaint": ONE, "outpaint_width": ONE, "outpaint_height": ONE, "outpaint_prompt": ALL, "tiled_upscale": NONE,
    "tiled_upscale_v2": NONE, "resemblance": ONE, "upscale_v4": NONE, "improve_similarity": ONE,
    "remove_background": NONE, "fix_bindi": NONE, "faceid_portrait": NONE, "input_faceid": NONE, "controlnets": ALL,
    "controlnet_weights": SOME_NUMBERS, "fill": NONE, "multi": NONE,
}  # fmt: skip
FLAG = re.compile(r"(?<!\S)--([a-z0-9_]+)(?=[\s=,]|$)[=,]?")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
DILATE = re.compile(rf"({NUMBER.pattern})(%|px|)")
MOST_DILATE = {"%": 100, "px": 1000}  # also the negative limit
ATTRIBUTE = re.compile(r"([a-z][a-z0-9_]*)=(.*)")  # a line of a prompt that was copied from the hosted service's page
SHOWN = 60  # characters of a value in a warning


def split(text: str) -> tuple[str, Flags, list[str]]:
    """The text without its flags, the flags that have an effect, and warnings. Never raises.

    A flag is `--name` at the beginning or after white space. Its value is the words up to the next flag; for numbers
    only the next word; for switches nothing, `true` or `false`. Lines `name=value` below the text are removed as well:
    prompts copied from the hosted service's page have them, and here they are attributes of the prompt.
    """
    text, warnings = without_attributes(text.strip())
    found = list(FLAG.finditer(text))
    if not found:
        return text, Flags(), warnings
    kept = text[: found[0].start()].rstrip()
    values: dict[str, Any] = {}
    ends = [flag.start() for flag in found[1:]] + [len(text)]
    for flag, end in zip(found, ends, strict=True):
        name, after = flag[1], text[flag.end() : end]
        taken, rest = cut(after, words_of(name, after, kept))
        kept = joined(kept, rest)
        if name not in OURS:
            what = "has no effect here" if name in ELSEWHERE else "is not known here"
            warnings.append(f"{shown(f'--{name} {taken}')} {what} and was left out of the prompt")
            continue
        value, message = read(name, taken)
        warnings += [message] if message else []
        if value is not None:
            warnings += [f"--{name} is given twice; the last one counts"] if name in values else []
            values[name] = value
    flags = Flags(**values)
    start = 0 if flags.control_guidance_start is None else flags.control_guidance_start
    stop = 1 if flags.control_guidance_end is None else flags.control_guidance_end
    if start >= stop:
        flags = replace(flags, control_guidance_start=None, control_guidance_end=None)
        message = "--control_guidance_start (0 if not given) must be below --control_guidance_end (1 if not given)"
        warnings.append(f"{message}, got {start:g} and {stop:g}; they were left out")
    return kept, flags, warnings


def without_attributes(text: str) -> tuple[str, list[str]]:
    """The text without lines `name=value` at its end, and a warning for each; the first line is always text."""
    lines, warnings = text.split("\n"), list[str]()
    while len(lines) > 1 and (not lines[-1].strip() or ATTRIBUTE.fullmatch(lines[-1].strip())):
        if match := ATTRIBUTE.fullmatch(lines.pop().strip()):
            message = f"send it as the prompt's attribute {match[1]}"
            warnings.append(f"{shown(match[0])} below the text was left out: {message}")
    return "\n".join(lines).rstrip(), warnings[::-1]


def words_of(name: str, after: str, before: str) -> int:
    """The number of words after a flag that are its value. before: the text so far."""
    words = after.split()
    takes = ELSEWHERE.get(name)
    if name in WORDS or takes == ALL:
        return len(words)
    if name in SWITCHES or takes == NONE:
        return int(words[:1] != [] and words[0].lower().rstrip(",;") in ("true", "false"))
    if name in OURS or takes == ONE:
        return 1
    if takes == SOME_NUMBERS:
        return next((i for i, word in enumerate(words) if not NUMBER.fullmatch(word.rstrip(",;"))), len(words))
    # An unknown flag. After the text, all words up to the next flag are its value. Before the text, only a number is:
    # the flag must not remove the whole prompt.
    return len(words) if before else int(any(character.isdigit() for character in "".join(words[:1])))


def cut(text: str, count: int) -> tuple[str, str]:
    """The first `count` words with single spaces between them, and the rest of the text."""
    parts = text.split(maxsplit=count)
    return " ".join(parts[:count]), "".join(parts[count:])


def joined(left: str, right: str) -> str:
    """The text before a flag and the text after it, as one text."""
    right = right.strip()
    return left + (" " if left and right and right[0] not in ",.;" else "") + right


def read(name: str, value: str) -> tuple[str | float | None, str | None]:
    """A flag's value for Flags, None if it is invalid; and a warning."""
    if name in WORDS:
        return (value, None) if value else (None, f"--{name} needs words after it; it was left out")
    bare = value.rstrip(",;")
    if name in SWITCHES:
        return bare.lower() != "false", None
    got = f"got {shown(bare)}" if bare else "got nothing"
    if name == "mask_dilate":
        match = DILATE.fullmatch(bare)
        if match and abs(float(match[1])) <= MOST_DILATE[match[2] or "px"]:
            return f"{round(float(match[1]), 2):g}{match[2].removesuffix('px')}", None
        allowed = " or ".join(f"-{most}{unit} to {most}{unit}" for unit, most in MOST_DILATE.items())
        return None, f"--mask_dilate must be from {allowed}, {got}; it was left out"
    low, high = NUMBERS[name]
    if NUMBER.fullmatch(bare) and low <= float(bare) <= high:
        return float(bare), None
    allowed = f"--{name} must be a number from {low:g} to {high:g}, {got}"
    if name in CLAMPED and NUMBER.fullmatch(bare):
        nearest = min(max(float(bare), low), high)
        return nearest, f"{allowed}; {nearest:g} was taken"
    return None, f"{allowed}; it was left out"


def shown(value: str) -> str:
    """A value for a warning: one line, shortened."""
    line = " ".join(value.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
