"""Finds models, recognizes their family, and downloads them. Never imports torch."""
