"""Seeds for each part of a run, derived from one seed."""

from __future__ import annotations

import hashlib


def derive(seed: int, step: int, purpose: str) -> int:
    """A separate seed for each purpose in each step, below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
