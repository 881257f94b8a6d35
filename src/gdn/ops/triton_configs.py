"""One fixed configuration per kernel, architecture and size: no timing at run time, so that two runs and two ranks are the same."""

from typing import Any, NamedTuple

from torch import Tensor


class Config(NamedTuple):
    block: int  # rows or columns a program or loop step takes
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def configuration(kernel: str, x: Tensor, size: int) -> Config:
    if kernel == "intra":
        return Config(64, 4, 3)
    if kernel in ("states", "d_states"):
        return Config(32 if size % 64 else 64, 4, 1)
    if kernel == "gradients":
        return Config(32 if size % 64 else 64, 8, 1)
    raise KeyError(kernel)
