"""Reads the TOMLs in `presets/` into frozen objects. Never imports torch."""
