"""Compiles the Gluon kernels for compute capability 9.0, without a GPU; prints what went well."""

from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_kernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.hopper_backward import hopper_bwd_window_kernel
from kernels.hopper_far_dkv import hopper_bwd_far_dkv_kernel
from kernels.hopper_far_dq import hopper_bwd_far_dq_kernel
from kernels.hopper_forward import hopper_fwd_kernel

STRIDED = (64, 192, 64, 4, True)
KERNELS = (
    (hopper_fwd_kernel, {"HEAD_DIM": 128, "PATTERN": STRIDED, "STAGES": 2}),
    (hopper_bwd_window_kernel, {"HEAD_DIM": 64, "WINDOW": 256, "STAGES": 2}),
    (hopper_bwd_far_dkv_kernel, {"HEAD_DIM": 64, "PATTERN": STRIDED, "STAGES": 2}),
    (hopper_bwd_far_dq_kernel, {"HEAD_DIM": 64, "PATTERN": STRIDED, "STAGES": 2}),
)


def ptx(kernel, constants) -> str:
    """The kernel's PTX, as for bfloat16 tensors."""

    def boxes(dtype):
        layout = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
        return f"tensordesc<{dtype}[64, 64],{layout!r}>"

    kinds = dict.fromkeys(("lse_ptr", "delta_ptr", "partial_ptr"), "*fp32")
    # The window's part of dQ, by the names of the kernels that write and read it.
    kinds["near_desc" if "near_desc" in kernel.arg_names else "dq_desc"] = boxes(gl.float32)
    kinds |= dict.fromkeys(
        ("cu_seqlens", "slot_tiles", "lowest_ptr", "turn_ptr", "ticket_ptr"), "*i32"
    )
    kinds |= dict.fromkeys(("dk_ptr", "dv_ptr"), "*bf16")
    kinds |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {
        name: kinds.get(name, boxes(gl.bfloat16) if name.endswith("_desc") else "i32")
        for name in kernel.arg_names
    }
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    return compile_kernel(source, target=target, options={"num_warps": 4}).asm["ptx"]


if __name__ == "__main__":
    for kernel, constants in KERNELS:
        text = ptx(kernel, constants)
        assert "wgmma.mma_async" in text and "cp.async.bulk.tensor" in text, kernel.__name__
        print(kernel.__name__)
