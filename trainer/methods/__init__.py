"""The model types: what is trained, what is saved, and how it is applied when rendering. Imports torch."""
