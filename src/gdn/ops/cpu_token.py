"""`cpu_token.c` and `cpu_draw.c`, compiled once for this machine by its own C compiler: a token of one row, and its draw."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from gdn.ops.cpu import cpuinfo

BLOCK = 32  # every width is a multiple of it
_SOURCES = [Path(__file__).with_name(name) for name in ("cpu_token.c", "cpu_draw.c", "cpu_vectors.h")]
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi")
_SECONDS = 30  # for a compiler that takes one or two

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
    """With gdn_step(Token *, threads) and gdn_draw; or None where it cannot be had (`build` says why)."""
    return build()[0]


@cache
def build(instructions: str | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library and what compiled it; or None and the reason. instructions: the compiler's option, this processor's if None.

    It is kept in the user's cache, under a name that tells sources, options, processor, C library and compiler apart (of a
    command of several words the first program).
    """
    if os.name != "posix" or platform.machine() not in _NATIVE:
        return None, f"not compiled for {platform.system()} on {platform.machine()}"
    compiler = [os.environ.get("CC", "")]
    try:
        found = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
        compiler = shlex.split(compiler[0]) or found[:1]
        if not compiler:
            return None, "no C compiler was found: cc, gcc, clang, or what CC names"
        command = [*compiler, *_OPTIONS, instructions or _NATIVE[platform.machine()]]
        path = _folder() / f"cpu_token-{_name(command)}.so"
        if not path.exists():
            _compile(command, path)
        try:
            loaded = _loaded(path)
        except OSError:  # damaged, or made where another C library is
            _compile(command, path)
            loaded = _loaded(path)
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)  # bytes after a timeout
        lines = [*(said.strip() if isinstance(said, str) else "").splitlines(), str(error) or repr(error)]
        return None, f"{compiler[0]}: {next((line for line in lines if 'error' in line), lines[0])}"
    return loaded, f"by {compiler[0]}"


def _folder() -> Path:
    """The user's own: what lies there is run."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (named if named.is_absolute() else Path.home() / ".cache") / "gdn"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise OSError(f"{folder} belongs to another user, or others may write to it")
    return folder


def _name(command: list[str]) -> str:
    compiler = Path(shutil.which(command[0]) or command[0]).stat()
    told = [cpuinfo(name) for name in ("model name", "CPU part", "flags", "Features")]
    parts = [
        *(source.read_text(encoding="utf-8") for source in _SOURCES),
        *command,
        str(compiler.st_size),
        str(compiler.st_mtime_ns),
    ]
    return hashlib.sha256("\0".join([*parts, *told, *platform.libc_ver()]).encode()).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as own:  # of several processes each moves a whole file in
        made = Path(own) / path.name
        whole = [*command, *map(str, _SOURCES[:2]), "-o", str(made), "-lm"]
        subprocess.run(whole, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        made.replace(path)


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.gdn_step.argtypes, loaded.gdn_step.restype = [ctypes.POINTER(Token), ctypes.c_int], None
    pointers, size, number = [ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_float
    loaded.gdn_draw.argtypes, loaded.gdn_draw.restype = [*pointers, size, number, size, number], size
    return loaded
