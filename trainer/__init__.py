"""Tunebooth: photos in, a personal model and rendered prompts out."""

__version__ = "0.1.0"
