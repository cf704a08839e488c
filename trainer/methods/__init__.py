"""The model types: what is trained and saved, and how it is applied in rendering. Imports torch."""
