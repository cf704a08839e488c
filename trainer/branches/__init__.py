"""The model families. A new one needs a file here, a TOML in `presets/` and its name in `names.py`. Imports torch."""
