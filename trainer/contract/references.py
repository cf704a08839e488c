"""`<lora:NAME:WEIGHT>` and `<faceid:NAME:WEIGHT>` in a prompt's text."""

from __future__ import annotations

import re

from trainer.contract.errors import InvalidRequest

REFERENCE = re.compile(r"<(lora|faceid):([^:<>]+)(?::([^:<>]*))?>")
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
MOST_WEIGHT = 10.0  # a model at ten times its strength draws noise


def references(text: str) -> tuple[str, list[tuple[str, str, float]]]:
    """A prompt's text without `<lora:NAME:WEIGHT>` and `<faceid:NAME:WEIGHT>`, and these as (lora, name, weight).

    The default weight is 1. Raises InvalidRequest if a weight is not a number or is out of range.
    """
    found, problems = [], []
    for kind, name, weight in REFERENCE.findall(text):
        if weight and not NUMBER.fullmatch(weight.strip()):
            problems.append(f"<{kind}:{name}:{weight}>: the weight must be a number, as 1, 0.7 or -0.5")
        elif weight and abs(float(weight)) > MOST_WEIGHT:
            problems.append(f"<{kind}:{name}:{weight}>: the weight must be from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}")
        else:
            found.append((kind, name.strip(), float(weight or 1)))
    if problems:
        raise InvalidRequest({"text": problems})
    return re.sub(r" {2,}", " ", REFERENCE.sub("", text)).strip() if found else text, found
