"""Output layer and cross entropy in one, chunked and vocabulary-parallel: no [tokens, vocab]."""

from __future__ import annotations

import torch
from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)

# The label of a position that has no next token to predict.
IGNORED = -100


class LossOutputLayer(ColumnParallelLinear):
    """An output layer that, given labels, returns each token's loss instead of logits.

    Loss and projection are one forward, so that a sharded weight is whole while both need it.
    `valid_vocab` is the model's vocabulary: rows beyond it only pad it to a multiple of the
    tensor-parallel size, and get no probability.
    """

    valid_vocab: int

    def _padding_bias(self, weight: torch.Tensor) -> torch.Tensor | None:
        """-inf for this rank's padding rows, float32; None where there are none."""
        rows = weight.shape[0]
        first = rows * self.tp_group.rank()
        if rows * self.tp_group.size() == self.valid_vocab:
            return None
        index = torch.arange(first, first + rows, device=weight.device)
        bias = torch.zeros(rows, device=weight.device)
        return bias.masked_fill_(index >= self.valid_vocab, float("-inf"))

    def forward(self, input_, weight=None, runtime_gather_output=None, labels=None):
        """hidden [S, B, hidden], labels [B, S] -> losses [B, S] in nats, 0 where IGNORED."""
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            # The loss sums the hidden states' gradient over the group itself.
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        losses_SB = vocab_parallel_linear_cross_entropy(
            input_,
            weight,
            labels.t().contiguous(),
            bias=self._padding_bias(weight),
            tp_group=self.tp_group,
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses_SB.t()
