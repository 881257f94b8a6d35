"""`cpu_token.c`, compiled once for this machine by its own C compiler: one more token of one row, by threads."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from gdn.ops.cpu import cpuinfo

BLOCK = 32  # every width is a multiple of it
_SOURCE = Path(__file__).with_name("cpu_token.c")
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi")
_SECONDS = 60  # for a compiler that takes one

# The fields as the C file declares them.
VECTORS = ("mixer_norm", "conv", "conv_bias", "rate", "dt_bias", "o_norm", "ffn_norm")
MATRICES = ("projections", "out", "ffn", "down")
_SIZES = ("layers", "hidden", "heads", "value_heads", "head_dim", "head_v_dim", "ffn", "vocab", "conv_size")
_SWITCHES = ("bf16", "window_bf16", "gate", "negative")
_TENSORS = ("embeddings", "head", "norm", "recurrent", "window", "room", "logits")


class Layer(ctypes.Structure):
    """Addresses of one block's weights, as in `generation.weights.LayerWeights`; None for those that it has not."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*VECTORS, *MATRICES)]


class Token(ctypes.Structure):
    """All that a token needs: sizes, switches (0 or 1), the id, strides, and addresses.

    conv_size: 0 without a convolution. bf16, window_bf16: of the large weights and of `window`, which are float32 otherwise.
    recurrent [layers, value_heads, head_dim, head_v_dim] float32 and window [layers, conv_size - 1, D] are updated; from layer
    to layer they go by strides, in elements and in bytes. room: `room_size` floats. logits [vocab] float32 are written.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_SWITCHES, "token", "recurrent_stride", "window_stride")),
        *((name, ctypes.c_void_p) for name in _TENSORS),
        ("layer", ctypes.POINTER(Layer)),
        ("eps", ctypes.c_float),
    ]

    def room_size(self, threads: int) -> int:
        """Floats that `threads` need: the vectors of a step, then two for each thread."""
        values, keys = self.value_heads * self.head_v_dim, self.heads * self.head_dim
        rows = 2 * keys + (3 if self.gate else 1) * values + 2 * self.value_heads + BLOCK
        return self.hidden + values + 2 * self.ffn + rows + threads * 2 * max(self.hidden, 2 * self.head_v_dim)


def library() -> ctypes.CDLL | None:
    """The compiled file, with gdn_step(Token *, threads), or None where it cannot be had (`build` says why)."""
    return build()[0]


@cache
def build(instructions: str | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library and what compiled it; or None and the reason. instructions: the compiler's option, this processor's if None.

    It is kept in the user's cache, under a name that tells source, compiler, options and processor apart.
    """
    if os.name != "posix" or platform.machine() not in _NATIVE:
        return None, f"not compiled for {platform.system()} on {platform.machine()}"
    compiler = shutil.which(os.environ.get("CC", "")) or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler was found (cc, gcc, clang, or the one that CC names)"
    command = [compiler, *_OPTIONS, instructions or _NATIVE[platform.machine()]]
    processor = [cpuinfo(name) for name in ("model name", "CPU part", "flags", "Features")]
    known = "\0".join([_SOURCE.read_text(encoding="utf-8"), *command, *processor])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdn"
    path = folder / f"cpu_token-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:  # of several processes each moves a whole file in
                made = Path(own) / path.name
                compile_it = [*command, str(_SOURCE), "-o", str(made), "-lm"]
                subprocess.run(compile_it, check=True, capture_output=True, text=True, timeout=_SECONDS)
                made.replace(path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler}: {said.strip().splitlines()[0]}"
    loaded.gdn_step.argtypes, loaded.gdn_step.restype = [ctypes.POINTER(Token), ctypes.c_int], None
    return loaded, f"by {compiler}"
