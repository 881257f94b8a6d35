"""The decode state of the whole model: all it remembers of any number of tokens, in constant size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.model.config import ModelConfig


@dataclass
class DecodeState:
    """One row for each sequence. The model updates the tensors in place; `fork` first to keep a moment.

    recurrent [L, N, HV, K, V] float32: the rule's state of each layer.
    conv [L, N, conv_size - 1, D]: the last inputs of the short convolutions, D = channels of q, k and v side by side.
    position [N] int64: tokens read so far.
    """

    recurrent: Tensor
    conv: Tensor
    position: Tensor

    @classmethod
    def empty(
        cls, config: ModelConfig, rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "DecodeState":
        """The state before the first token; `dtype` is the model's activation type and concerns the convolutions alone."""
        L, carried = config.num_hidden_layers, config.conv_size - 1 if config.use_short_conv else 0
        shape = (L, rows, config.value_heads, config.head_dim, config.head_v_dim)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            recurrent=torch.zeros(shape, dtype=wide, device=device),
            conv=torch.zeros(L, rows, carried, 2 * config.key_dim + config.value_dim, dtype=dtype, device=device),
            position=torch.zeros(rows, dtype=torch.int64, device=device),
        )

    @property
    def rows(self) -> int:
        return len(self.position)

    @property
    def nbytes(self) -> int:
        return self.recurrent.nbytes + self.conv.nbytes + self.position.nbytes

    def select(self, rows: Tensor) -> "DecodeState":
        """A new state made of these rows (int64 [M]), which may repeat."""
        return DecodeState(self.recurrent[:, rows], self.conv[:, rows], self.position[rows])

    def fork(self) -> "DecodeState":
        """An independent copy."""
        return DecodeState(self.recurrent.clone(), self.conv.clone(), self.position.clone())

    def reset(self) -> None:
        """Back to the state before the first token, in place."""
        for tensor in (self.recurrent, self.conv, self.position):
            tensor.zero_()
