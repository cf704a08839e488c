"""`python -m benchmarks.likeness`. The child that decodes photos imports whatever module is run, but not a __main__.py:
torch would take the memory that its limit leaves for photos."""

from benchmarks.likeness import main

main()
