"""What Triton 3.6 and 3.9 call differently in Gluon, under one name each."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

store_wait = tma.store_wait

if hasattr(tma, "async_atomic_add"):
    async_load = tma.async_load
    async_store = tma.async_store
    async_add = tma.async_atomic_add
    async_load_elements = async_copy.async_load
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global
    async_load_elements = async_copy.async_copy_global_to_shared

    @builtin
    def async_add(tensor_desc, coord, src, _semantic=None):
        """Adds a tile of shared memory to global memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """The same shared memory as of another type, shape and layout."""
    change = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return change(dtype, shape, layout, _semantic=_semantic)
