"""`cpu_token.c`, compiled once for this machine by its own C compiler: one more token of one row, by threads."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from gdn.ops.cpu import capabilities

log = logging.getLogger(__name__)

BLOCK = 32  # every width is a multiple of it
_SOURCE = Path(__file__).with_name("cpu_token.c")
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_FLAGS = "-std=gnu11 -O3 -fPIC -shared -fno-math-errno -ffp-contract=fast -Wno-psabi -fopenmp".split()
_SECONDS = 60  # for a compiler that takes one


class Layer(ctypes.Structure):
    """Addresses of one block's weights, as in `generation.weights.LayerWeights`; 0 for those that it has not."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in "mixer_norm conv conv_bias rate dt_bias o_norm ffn_norm projections out ffn down".split()
    ]


class Token(ctypes.Structure):
    """All that a token needs: sizes, switches (0 or 1), addresses.

    conv_size: 0 without a convolution. bf16, window_bf16: of the large weights and of `window`, which are float32 otherwise.
    recurrent [layers, value_heads, head_dim, head_v_dim] float32 and window [layers, conv_size - 1, D] are updated; their strides
    from layer to layer in elements and in bytes. room: `room_size` floats. logits [vocab] float32 are written.
    """

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "layers hidden heads value_heads head_dim head_v_dim ffn vocab conv_size "
                "bf16 window_bf16 gate negative token recurrent_stride window_stride"
            ).split()
        ),
        ("eps", ctypes.c_float),
        ("embeddings", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("layer", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in "recurrent room logits window".split()),
    ]

    def room_size(self, threads: int) -> int:
        """Floats that `threads` need: the vectors of a step, then two for each thread."""
        values, keys = self.value_heads * self.head_v_dim, self.heads * self.head_dim
        rows = 2 * keys + (3 if self.gate else 1) * values + 2 * self.value_heads + BLOCK
        return self.hidden + values + 2 * self.ffn + rows + threads * 2 * max(self.hidden, 2 * self.head_v_dim)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled file, with gdn_step(Token *, threads); None, and a line in the log, where it cannot be had.

    It is kept in the user's cache, under a name that tells source, compiler, flags and processor apart.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    native = _NATIVE.get(platform.machine())
    if compiler is None or native is None or os.name != "posix":
        log.info("decoding on this CPU by PyTorch's operators: no C compiler (or none that is known here)")
        return None
    command = [compiler, *_FLAGS, native]
    known = [_SOURCE.read_text(encoding="utf-8"), *command, platform.platform(), *sorted(capabilities())]
    name = f"cpu_token-{hashlib.sha256(chr(0).join(known).encode()).hexdigest()[:16]}.so"
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdn"
    try:
        path = cache_folder / name
        if not path.exists():
            cache_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_folder) as folder:  # two at once: each moves a whole file in
                made = Path(folder) / name
                subprocess.run([*command, str(_SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True, timeout=_SECONDS)
                made.replace(path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("decoding on this CPU by PyTorch's operators: %s", error)
        return None
    loaded.gdn_step.argtypes, loaded.gdn_step.restype = [ctypes.POINTER(Token), ctypes.c_int], None
    return loaded
