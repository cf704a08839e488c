"""`python -m benchmarks.likeness`. The child that decodes photos imports the module that is run, except a __main__.py:
else torch would use the memory that its limit leaves for photos."""

from benchmarks.likeness import main

main()
