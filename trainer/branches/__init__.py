"""The model families. A new one is a file here, a TOML in `presets/` and a word in `names.py`. Imports torch."""
