"""RMSNorm that megatron-core's local layer specs accept, also under sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension (arXiv 1910.07467, equation 4).

    The signature is the one that megatron-core's specs call. The weight carries the mark
    `sequence_parallel`: its gradient is then a partial sum over the tensor-parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
