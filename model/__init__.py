"""LongGen's model: the training one on megatron-core, the exported one on transformers.

The exported files import each other relatively only, because an export folder is flat. Here the
kernels live in a package of their own: bound as siblings, they are the same module objects.
"""

import sys

from kernels import cached_attention, pattern, slots, sparse_attention

for _module in (cached_attention, pattern, slots, sparse_attention):
    sys.modules[f"{__name__}.{_module.__name__.partition('.')[2]}"] = _module
