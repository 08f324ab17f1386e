"""LongGen's model: the training one on megatron-core, the exported one on transformers.

The exported files import each other relatively only, because an export folder is flat. Here the
kernels live in a package of their own: bound as siblings, they are the same module objects.
"""

import sys

from kernels import pattern, sparse_attention

sys.modules[f"{__name__}.pattern"] = pattern
sys.modules[f"{__name__}.sparse_attention"] = sparse_attention
