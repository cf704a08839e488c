"""Which models there are, of which family, and where they come from. Never imports torch."""
