"""One row of tokens through a model: prefill in chunks, then token by token, in memory that does not grow with the length."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator
from functools import cache

import torch
from torch import Tensor

from gdn.errors import ConfigError
from gdn.generation.cpu_decoder import CPUDecoder
from gdn.generation.cpu_products import has_fbgemm
from gdn.generation.cpu_token import CompiledToken
from gdn.generation.gpu_decoder import GPUDecoder, Stream
from gdn.generation.sampling import Sampling, sample
from gdn.generation.weights import join_projections
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops.cpu import cpu_has_bf16_dots, cpu_widens_bf16

log = logging.getLogger(__name__)

GRID = 64  # tokens; prefill is cut on multiples of it, where the rule's own chunks begin
PREFILL_CHUNK = 2048  # tokens of one prefill forward: large enough for matrix products, and memory stays flat


def generate(
    model: GatedDeltaNetLM,
    prompt_ids: Tensor | list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int] = (),
    state: DecodeState | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[int]:
    """Read the prompt, then yield up to max_new_tokens ids, each as soon as it is chosen; one of eos_ids ends it, yielded last.

    state: of one row, goes on from there and is updated in place: it holds the prompt and all yielded tokens but the last.
    To go on later as if never stopped, call again with that last token as the prompt: the draw at each position depends on
    the seed and the position alone. Arguments are checked at the call, the model runs when the iterator is advanced.
    Raises ConfigError for a bad argument, CheckpointError if the model's logits are nan.
    """
    ids = check_prompt(model, prompt_ids)
    check_length(max_new_tokens)
    check_eos(model, eos_ids)
    check_chunk(prefill_chunk)
    state = model.new_state(1) if state is None else state
    _check_state(model, state, 1)
    return _stream(model, ids, state, max_new_tokens, sampling, frozenset(eos_ids), prefill_chunk)


def prefill(
    model: GatedDeltaNetLM, prompt_ids: Tensor | list[int], state: DecodeState, *, prefill_chunk: int = PREFILL_CHUNK
) -> Tensor:
    """Read a prompt into the state of one row, updated in place; returns the logits after its last token, [1, vocab].

    Memory is that of prefill_chunk tokens (a multiple of 64), whatever the prompt's length. Errors as in `generate`.
    """
    ids = check_prompt(model, prompt_ids)
    check_chunk(prefill_chunk)
    _check_state(model, state, 1)
    on_gpu = GPUDecoder(model) if GPUDecoder.serves(model) else None
    return read_prompt(reader(model, on_gpu), ids, state, prefill_chunk)


def _stream(
    model: GatedDeltaNetLM,
    ids: Tensor,
    state: DecodeState,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: frozenset[int],
    prefill_chunk: int,
) -> Iterator[int]:
    on_gpu = GPUDecoder(model) if GPUDecoder.serves(model) else None
    read = reader(model, on_gpu)
    logits = read_prompt(read, ids, state, prefill_chunk)
    if on_gpu is not None:
        stream = Stream(on_gpu, state, sampling)
        for n in range(max_new_tokens):
            token = stream.next([0])[0] if n else stream.start(0, logits, sampling.seed)
            yield token
            if token in eos_ids:
                return
        return
    generator = torch.Generator(ids.device)
    position = int(state.position[0])
    for n in range(max_new_tokens):
        if n:
            logits = read(ids, state)
        generator.manual_seed(draw_seed(sampling.seed, position + n))
        chosen = sample(logits, sampling, generator)
        ids, token = chosen[None], int(chosen)
        yield token
        if token in eos_ids:
            return


def draw_seed(seed: int, position: int) -> int:
    """A seed for the draw at one position: hashed, because neighbouring seeds of one generator give related numbers."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # within the signed 64 bits that every generator takes


def read_prompt(read: "Reader", ids: Tensor, state: DecodeState, prefill_chunk: int) -> Tensor:
    logits, done = ids.new_empty(0), 0
    for size in pieces(int(state.position[0]), ids.shape[1], prefill_chunk, alone=ids.is_cuda):
        logits = read(ids[:, done : done + size], state)
        done += size
    return logits


def pieces(start: int, total: int, chunk: int, *, alone: bool) -> Iterator[int]:
    """Sizes of the pieces that `total` tokens are read in after `start` others.

    Cut at multiples of the chunk counted from the first token ever read: the same cuts however often one stopped. alone:
    what stands after the last multiple of GRID is a piece of its own, as it is where a reader stopped there before.
    """
    end = start + total
    while start < end:
        stop = min(end, start + chunk - start % chunk)
        if alone and stop == end and end - end % GRID > start:
            stop = end - end % GRID
        yield stop - start
        start = stop


Reader = Callable[[Tensor, DecodeState], Tensor]


def reader(model: GatedDeltaNetLM, on_gpu: GPUDecoder | None) -> Reader:
    """What reads ids [N, T] into a state of N rows and gives the last ones' logits [N, vocab]; on a GPU's step N is 1.

    One token of one row goes the same way wherever it comes from, prompt or text: so going on is never having stopped, to the
    bit.
    """
    steps, reads, decoder = CPUDecoder.serves(model), CPUDecoder.reads(model), cache(CPUDecoder)

    def read(ids: Tensor, state: DecodeState) -> Tensor:
        if on_gpu is not None and ids.numel() == 1:
            return on_gpu.step(ids[0], state)
        if steps and ids.numel() == 1:
            return decoder(model).step(int(ids), state)[None]
        if reads:
            return decoder(model).read(ids, state)
        with torch.no_grad():  # not inference_mode: the state must stay usable outside
            logits = model(ids, state=state, last_only=True).logits
        assert logits is not None
        return logits

    return read


def check_prompt(model: GatedDeltaNetLM, prompt_ids: Tensor | list[int], name: str = "prompt_ids") -> Tensor:
    """The prompt as [1, T] int64 where the model lies."""
    try:
        ids = torch.as_tensor(prompt_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} is no row of integers: {str(error).splitlines()[0]}") from None
    vocab = model.config.vocab_size
    if ids.numel() == 0:
        raise ConfigError(f"{name} is empty; expected at least one token, such as the tokenizer's BOS")
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{name} is {ids.dtype} {tuple(ids.shape)}; expected one row of integers, [T]")
    ids = ids.long()
    outside = ((ids < 0) | (ids >= vocab)).nonzero().flatten()
    if len(outside):
        where = int(outside[0])
        raise ConfigError(f"{name}[{where}] = {int(ids[where])}; expected an id in [0, {vocab}), the model's vocabulary")
    return ids[None].to(model.model.embeddings.weight.device)


def check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}; expected at least 0")


def check_eos(model: GatedDeltaNetLM, eos_ids: Collection[int]) -> None:
    vocab = model.config.vocab_size
    for eos in eos_ids:
        if not 0 <= eos < vocab:
            raise ConfigError(f"eos_ids: {eos}; expected ids in [0, {vocab}), the model's vocabulary")


def check_chunk(prefill_chunk: int) -> None:
    if prefill_chunk < GRID or prefill_chunk % GRID:
        raise ConfigError(f"prefill_chunk = {prefill_chunk}; expected a multiple of {GRID} tokens")


def _check_state(model: GatedDeltaNetLM, state: DecodeState, rows: int) -> None:
    device, state_tensors = model.model.embeddings.weight.device, state.tensors()
    for name, want in DecodeState.expected(model, rows).tensors().items():
        got = state_tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype or got.device != device:
            raise ConfigError(
                f"state.{name} is {got.dtype} {tuple(got.shape)} on {got.device}; "
                f"expected {want.dtype} {tuple(want.shape)} on {device}, as this model makes it"
            )


def decode_dtype(device: torch.device | str, stored: torch.dtype, *, compiled: bool) -> tuple[torch.dtype, str]:
    """The dtype to load weights stored as `stored` in for decoding on `device`, and why; logged once for each answer.
    compiled: whether a CPU's single tokens are (`CompiledToken.serves`).

    A fixed rule by capability, never by timing, so that the same machine always gives the same text. One row on CPUs is bound
    by reading the weights, and bf16 has half the bytes: it is kept where it is read as fast as float32, by a compiled token, or
    by PyTorch with bf16 dot products or AVX2 alone (docs/log.md). Products of many rows are computed in float32 where there are
    no bf16 dots.
    """
    dtype, reason = _choose_dtype(torch.device(device).type, stored, compiled)
    _log_choice(torch.device(device).type, str(stored), str(dtype), reason)
    return dtype, reason


def for_decoding(model: GatedDeltaNetLM, device: torch.device | str) -> GatedDeltaNetLM:
    """The model, moved to `device` in place in its `decode_dtype`, in evaluation mode, without gradients.

    The weights that read one input are laid side by side, for fewer and longer products a token.
    """
    stored = model.model.embeddings.weight.dtype
    on_cpu = torch.device(device).type == "cpu"
    dtype, _ = decode_dtype(device, stored, compiled=on_cpu and CompiledToken.serves(model))
    if dtype != stored:  # only ever to float32, which the gate parameters have already
        model.to(dtype)
    model.to(device).eval().requires_grad_(False)
    join_projections(model)
    if on_cpu and dtype == torch.bfloat16 and not cpu_has_bf16_dots():
        model.compute_dtype = torch.float32  # of whole prompts: weights are widened one by one, and nothing else is rounded
    return model


def _choose_dtype(device: str, stored: torch.dtype, compiled: bool) -> tuple[torch.dtype, str]:
    if device != "cpu" or stored in (torch.float32, torch.float64):
        return stored, "as stored"
    if stored == torch.bfloat16 and cpu_has_bf16_dots():
        return stored, "as stored: this CPU has bf16 dot products"
    # Batches and prompts of a compiled token's model are FBGEMM's, where there are no bf16 dots.
    if stored == torch.bfloat16 and (cpu_widens_bf16() or (compiled and has_fbgemm())):
        return stored, "as stored: half the bytes, and they are read as fast here"
    if stored == torch.bfloat16:
        return torch.float32, "neither bf16 dot products nor a compiled token, without which bf16 may be many times slower"
    return torch.float32, f"{str(stored).removeprefix('torch.')} is not decoded on CPUs"


@cache
def _log_choice(device: str, stored: str, dtype: str, reason: str) -> None:
    log.info("decoding on %s in %s (weights stored in %s): %s", device, dtype, stored, reason)
