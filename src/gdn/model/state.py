"""The decode state of the whole model: all it remembers of any number of tokens, in constant size; and as a file."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.files import publish_file
from gdn.model.config import ModelConfig
from gdn.ops.pending import SLOTS, settle, slot_size, slots_for

if TYPE_CHECKING:
    from gdn.model.lm import GatedDeltaNetLM

LAYOUT = "2"  # of a file's tensors, their names, axes and meaning; raised with any change to them
_EARLIER_LAYOUT = "1"  # as this one, without what is pending
_TENSORS = ("recurrent", "conv", "pending", "position")


@dataclass
class DecodeState:
    """One row for each sequence. The model updates the tensors in place; `fork` first to keep a moment.

    recurrent [L, N, HV, K, V] float32: the rule's state of each layer.
    conv [L, N, conv_size - 1, D]: the last inputs of the short convolutions, D = channels of q, k and v side by side.
    pending [L, N, HV, slots, K + V + 4], typed like `recurrent`: tokens that it has not taken up; `settle` brings them in.
    position [N] int64: tokens read so far.
    """

    recurrent: Tensor
    conv: Tensor
    pending: Tensor
    position: Tensor

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        rows: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        slots: int | None = None,
    ) -> "DecodeState":
        """The state before the first token; `dtype` is the model's activation type and concerns the convolutions alone.

        slots: for pending tokens; None: as many as decoding on that device takes (`slots_for`).
        """
        if slots is None:
            slots = slots_for(torch.device(device), dtype, config.head_dim, config.head_v_dim)
        L, carried = config.num_hidden_layers, config.conv_size - 1 if config.use_short_conv else 0
        shape = (L, rows, config.value_heads, config.head_dim, config.head_v_dim)
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            recurrent=torch.zeros(shape, dtype=wide, device=device),
            conv=torch.zeros(L, rows, carried, 2 * config.key_dim + config.value_dim, dtype=dtype, device=device),
            pending=torch.zeros(*shape[:3], slots, slot_size(*shape[3:]), dtype=wide, device=device),
            position=torch.zeros(rows, dtype=torch.int64, device=device),
        )

    @classmethod
    def expected(cls, model: "GatedDeltaNetLM", rows: int) -> "DecodeState":
        """As `model` makes it where it lies, on meta: shapes and dtypes."""
        config, weight = model.config, model.model.embeddings.weight
        dtype = model.compute_dtype or weight.dtype
        slots = slots_for(weight.device, dtype, config.head_dim, config.head_v_dim)
        return cls.empty(config, rows, "meta", dtype, slots)

    @property
    def rows(self) -> int:
        return len(self.position)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All there is, by name; rows are the second axis, of `position` the first."""
        return {name: getattr(self, name) for name in _TENSORS}

    def view(self, start: int, end: int) -> "DecodeState":
        """The rows from `start` up to `end`, in the same memory."""
        return self._with(lambda tensor: tensor[:, start:end], self.position[start:end])

    def select(self, rows: Tensor) -> "DecodeState":
        """A new state made of these rows (int64 [M]), which may repeat."""
        return self._with(lambda tensor: tensor[:, rows], self.position[rows])

    def fork(self) -> "DecodeState":
        """An independent copy."""
        return self._with(torch.clone, self.position.clone())

    def _with(self, change: Callable[[Tensor], Tensor], position: Tensor) -> "DecodeState":
        return DecodeState(change(self.recurrent), change(self.conv), change(self.pending), position)

    def copy_(self, other: "DecodeState") -> None:
        """Take over the rows of `other`, of as many, in place."""
        for mine, its in zip(self.tensors().values(), other.tensors().values()):
            mine.copy_(its)

    def reset(self) -> None:
        """Back to the state before the first token, in place."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def settle(self) -> None:
        """Bring what is pending into `recurrent`, in place, as whole passes of the model do before they read it."""
        settle(self.recurrent, self.pending, self.position)

    def save(self, path: Path, model: "GatedDeltaNetLM") -> None:
        """Write all rows, which `model` made, to a safetensors file: complete or absent, in an existing folder.

        The file tells its layout, the configuration's hash and that of the gate parameters. The state may be used on.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        with publish_file(path) as partial:
            partial.write_bytes(save(tensors, metadata={"layout": LAYOUT, **identity(model)}))

    @classmethod
    def load(cls, path: Path, model: "GatedDeltaNetLM") -> "DecodeState":
        """The state saved at `path`, on the device of `model`: the same bits, if its activations have the dtype they had.

        Raises CheckpointError for a missing or damaged file, another layout, and a state of another model.
        """
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; expected a saved decode state") from None
        except (SafetensorError, OSError) as error:  # OSError of a folder, by its system's words
            raise CheckpointError(f"{path}: damaged or no safetensors file: {error}") from None
        if metadata.get("layout") not in (LAYOUT, _EARLIER_LAYOUT):
            raise CheckpointError(f"{path}: layout = {metadata.get('layout')!r}; expected a decode state of layout {LAYOUT!r}")
        for key, wanted in identity(model).items():
            got = metadata.get(key)
            if got != wanted:
                raise CheckpointError(f"{path}: a state of another model: its {key} is {got}; this model's is {wanted}")
        recurrent = tensors.get("recurrent")
        if metadata["layout"] == _EARLIER_LAYOUT and recurrent is not None and recurrent.ndim == 5:
            none = recurrent.new_zeros(*recurrent.shape[:3], 0, slot_size(*recurrent.shape[3:]))
            tensors.setdefault("pending", none)
        state = cls(**_fit(tensors, path, model))
        own = cls.expected(model, state.rows).pending
        if state.pending.shape != own.shape:  # saved on another kind of device
            state.settle()
            state.pending = torch.zeros_like(own, device=state.recurrent.device)
        return state


def identity(model: "GatedDeltaNetLM") -> dict[str, str]:
    """What tells models apart: SHA-256 of the contents of config.json, and of the gate parameters.

    Those are float32 in every copy of a model, whatever the dtype of the rest, and move with every step of training: so a
    state is not taken up by another checkpoint of the same run. Weights that differ elsewhere alone are not told apart.
    """
    config = json.dumps(model.config.to_json(), sort_keys=True).encode()
    gates = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.endswith(("A_log", "dt_bias")):
            gates.update(tensor.detach().float().cpu().numpy().tobytes())
    return {"config_sha256": hashlib.sha256(config).hexdigest(), "gates_sha256": gates.hexdigest()}


def _fit(tensors: dict[str, Tensor], path: Path, model: "GatedDeltaNetLM") -> dict[str, Tensor]:
    """The tensors with this model's device and dtypes; CheckpointError for names, shapes and kinds that are not its own."""
    if tensors.keys() != set(_TENSORS):
        raise CheckpointError(f"{path}: holds {sorted(tensors)}; expected {sorted(_TENSORS)}")
    weight, rows, pending = model.model.embeddings.weight, tensors["position"].numel(), tensors["pending"]
    slots = 0 if pending.ndim == 5 and not pending.shape[3] else SLOTS
    expected = DecodeState.empty(model.config, rows, "meta", model.compute_dtype or weight.dtype, slots)
    for name, wanted in expected.tensors().items():
        if tensors[name].shape != wanted.shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensors[name].shape)}; expected {tuple(wanted.shape)}")
        if tensors[name].dtype.is_floating_point != (wanted.dtype != torch.int64):
            raise CheckpointError(f"{path}: {name} is {tensors[name].dtype}; expected {wanted.dtype}")
        tensors[name] = tensors[name].to(weight.device, wanted.dtype)
    return tensors
