"""Tunebooth: photos in, a personal model and rendered prompts out."""

from __future__ import annotations

__version__ = "0.1.0"
