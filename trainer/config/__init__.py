"""From the TOMLs in `presets/` to frozen objects. Never imports torch."""
