"""The decode state of the whole model: all it remembers of any number of tokens, in constant size; and as a file."""

import hashlib
import json
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

if TYPE_CHECKING:
    from gdn.model.lm import GatedDeltaNetLM

LAYOUT = "1"  # of a file's tensors, their names, axes and meaning; raised with any change to them
_TENSORS = ("recurrent", "conv", "position")


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

    def copy_(self, other: "DecodeState") -> None:
        """Take over the rows of `other`, of as many, in place."""
        self.recurrent.copy_(other.recurrent)
        self.conv.copy_(other.conv)
        self.position.copy_(other.position)

    def reset(self) -> None:
        """Back to the state before the first token, in place."""
        for tensor in (self.recurrent, self.conv, self.position):
            tensor.zero_()

    def save(self, path: Path, model: "GatedDeltaNetLM") -> None:
        """Write all rows, which `model` made, to a safetensors file: complete or absent, in an existing folder.

        The file tells its layout, the configuration's hash and that of the gate parameters. The state may be used on.
        """
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
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
        if metadata.get("layout") != LAYOUT:
            raise CheckpointError(f"{path}: layout = {metadata.get('layout')!r}; expected a decode state of layout {LAYOUT!r}")
        for key, wanted in identity(model).items():
            got = metadata.get(key)
            if got != wanted:
                raise CheckpointError(f"{path}: a state of another model: its {key} is {got}; this model's is {wanted}")
        return cls(**_fit(tensors, path, model))


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
    weight = model.model.embeddings.weight
    rows = tensors["position"].numel()
    expected = DecodeState.empty(model.config, rows, "meta", model.compute_dtype or weight.dtype)
    for name in _TENSORS:
        wanted: Tensor = getattr(expected, name)
        if tensors[name].shape != wanted.shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensors[name].shape)}; expected {tuple(wanted.shape)}")
        if tensors[name].dtype.is_floating_point != (wanted.dtype != torch.int64):
            raise CheckpointError(f"{path}: {name} is {tensors[name].dtype}; expected {wanted.dtype}")
        tensors[name] = tensors[name].to(weight.device, wanted.dtype)
    return tensors
