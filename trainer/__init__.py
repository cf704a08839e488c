"""Tunebooth trains a personal model on photos, and renders prompts with it."""

from __future__ import annotations

__version__ = "0.1.0"
