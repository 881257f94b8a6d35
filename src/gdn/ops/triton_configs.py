"""One table of tiles per kernel, kind of GPU and size: no timing at run time, so that two runs, and two ranks, are the same.

Hopper's own kernels (`triton_hopper_*`) have theirs in their code; these are the general ones.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

KIB = 1024


class Config(NamedTuple):
    block: int  # intra: keys a loop step; states, d_states, d_initial: values a program; gradients: values a loop step
    num_warps: int
    num_stages: int
    registers: int | None = None  # a thread at most

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# 16-bit input, by the least shared memory a block may have: 227 KB from compute capability 9.0 on (timed on an H200 at K = V =
# 256, B16 T2048 H4: 62, 211, 280 and 925 us), 163 KB at 8.0, 99 KB at 8.6 and 8.9 (both compiled ahead of time, not timed: what
# fits and spills least). Blocks are halved until they divide V.
_NARROW = {
    227: {
        "intra": Config(64, 4, 3, registers=128),
        "states": Config(128, 8, 2),
        "d_states": Config(128, 8, 2),
        "d_initial": Config(32, 4, 3),
        "gradients": Config(64, 8, 3),
    },
    163: {
        "intra": Config(64, 4, 3),
        "states": Config(64, 8, 2),
        "d_states": Config(64, 8, 2),
        "d_initial": Config(32, 4, 3),
        "gradients": Config(64, 8, 3),
    },
    99: {
        "intra": Config(64, 4, 2),
        "states": Config(64, 8, 1),
        "d_states": Config(64, 8, 1),
        "d_initial": Config(32, 4, 3),
        "gradients": Config(64, 8, 2),
    },
}
# Float32 is multiplied outside the tensor cores, from registers, and each product of a thread is an instruction to compile:
# small tiles, many threads. For checks and small models, not for speed.
_WIDE = {
    "intra": Config(32, 16, 1),
    "states": Config(16, 16, 1),
    "d_states": Config(16, 16, 1),
    "d_initial": Config(16, 16, 1),
    "gradients": Config(16, 16, 1),
}
WIDE_KIB = 152  # what float32 keys of 256 need


def choose(kernel: str, narrow: bool, size: int, shared_memory: int) -> Config:
    """Tiles of `kernel` for `size` keys (intra) or values, 16-bit or float32 input, bytes of shared memory a block may have."""
    if not narrow:
        return _WIDE[kernel]
    config = next(table for kib, table in _NARROW.items() if shared_memory >= kib * KIB)[kernel]
    block = config.block
    while size % block:
        block //= 2
    if "states" in kernel and block < config.block:
        return Config(block, 4, config.num_stages)  # half a tile is half the warps' work
    return config._replace(block=block)


def configuration(kernel: str, x: Tensor, size: int) -> Config:
    """`choose` for input x and the GPU it lies on; on a CPU, in the interpreter, any will do."""
    return choose(kernel, x.dtype != torch.float32, size, shared_memory(x.device))


def shared_memory(device: torch.device) -> int:
    """Bytes a block may have on this device."""
    if device.type != "cuda":
        return 227 * KIB
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks what follows
    found: int = properties.shared_memory_per_block_optin
    return found


@cache
def hopper(device: torch.device) -> bool:
    """Whether it is a GPU of Hopper or later: kernels may begin early, and an engine copies blocks of a matrix."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
