"""The branch that needs no GPU and no download: a small trained base in the package, through the very code of sd15.

benchmarks/fast_base made it; fast_base/README.md beside this file says what it can and cannot do.
"""

from trainer.branches.sd15 import load as load
