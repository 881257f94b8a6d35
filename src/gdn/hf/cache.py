"""transformers' Cache protocol over a DecodeState: constant size whatever the length, for a model without attention."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gdn.hf.configuration import GatedDeltaNetConfig
from gdn.model.config import ModelConfig
from gdn.model.state import DecodeState


def state_layout(config: ModelConfig) -> tuple[torch.Size, torch.Size]:
    """Shapes of a state of no rows: equal for models that can take up each other's states."""
    state = DecodeState.empty(config, 0, "meta")
    return state.recurrent.shape, state.conv.shape


class GatedDeltaNetCache(Cache):
    """All that the model remembers of the tokens read. It starts empty; the first forward pass allocates it.

    state: the decode state, None before the first token. seen_tokens: columns read so far, masked ones included, which is
    the length `generate` reckons with (`state.position` counts each row's own tokens). last_hidden [B, hidden]: of each row's
    last token that was not masked. steps: what the model keeps here to read single tokens with the kernels of a GPU.
    """

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(layers=[])
        self.model_config = config.to_model_config()
        self.layout = state_layout(self.model_config)
        self.state: DecodeState | None = None
        self.seen_tokens = 0
        self.last_hidden: Tensor | None = None
        self.steps: Any = None

    def state_for(self, x: Tensor) -> DecodeState:
        """The state for activations x [B, T, hidden], allocated where there is none of so many rows; the caller has seen to it
        that none with tokens is lost."""
        if self.state is None or self.state.rows != x.shape[0]:
            with torch.inference_mode(False):  # what is made within could not be updated without
                self.state = DecodeState.empty(self.model_config, x.shape[0], x.device, x.dtype)
        return self.state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # transformers' word for no limit

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen_tokens > 0

    def reset(self) -> None:
        self.seen_tokens, self.last_hidden = 0, None
        if self.state is not None:
            self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None and self.last_hidden is not None:
            rows = beam_idx.to(self.state.position.device)
            chosen, self.last_hidden = self.state.select(rows), self.last_hidden[rows]
            if chosen.rows == self.state.rows:  # in place: a captured step goes on with the same memory
                self.state.copy_(chosen)
            else:
                self.state = chosen

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.reorder_cache(torch.arange(self.state.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot forget its last tokens; keep a `copy.deepcopy` of the cache to return to."""
        raise ValueError("this cache cannot be cropped: a recurrent state keeps no earlier moments")

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.rows

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def __len__(self) -> int:
        return self.model_config.num_hidden_layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen_tokens={self.seen_tokens}, rows={self.batch_size})"
