"""Log-likelihoods of continuations and greedy continuations, many at a time: ids in, numbers and ids out; no text, no harness.

What is read twice is computed once: requests with the same context share one prefill, from whose state each of them goes on.
Work is packed by tokens, sequences end to end, so that a score does not depend on what else is asked for.
"""

import gc
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from gdn.errors import CheckpointError, ConfigError
from gdn.eval.requests import Likelihood, Piece, Request, Results, Wanted, by_context, rest_of, split, tensor_of, whole
from gdn.generation.gpu_decoder import GPUDecoder, Stream
from gdn.generation.sampling import Sampling
from gdn.generation.weights import join_projections
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops import row_scores

TOKEN_BUDGET = {"cuda": 32768, "cpu": 2048}  # tokens of one forward pass; on CPUs what stays in the caches (docs/log.md)
# Of decode states held at a time; 22 MB a row at the published size, 24 on a GPU.
STATE_BYTES = {"cuda": 16 << 30, "cpu": 1 << 30}
_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 25}  # elements of one block of logits: 512 MB on CUDA in bfloat16, 128 in float32
_STREAM_ROWS = 256  # texts that a GPU's captured steps write beside each other, as many as their bits are promised for
_GRID = 64  # where a long sequence may be split without a change in the GPU kernels' bits (docs/numerics.md)


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's collector of cycles does not run: while many small objects are made it takes as long as making them.

    For what makes few cycles, none with a tensor in it: what is not in a cycle is freed as ever.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Scorer:
    """Runs one model, where it lies, in its compute dtype, logits too; their log-softmax is float32's.

    tokens_computed counts what went through the model, tokens_asked what it would have been with every request read whole.
    """

    def __init__(self, model: GatedDeltaNetLM, *, token_budget: int | None = None, state_bytes: int | None = None) -> None:
        """token_budget: of one forward pass; state_bytes: of decode states held at a time; None: by device."""
        self.device = model.model.embeddings.weight.device
        if token_budget is None:
            token_budget = TOKEN_BUDGET.get(self.device.type, 2048)
        if token_budget < _GRID or token_budget % _GRID:
            raise ConfigError(f"token_budget = {token_budget}; expected a multiple of {_GRID}")
        self.model = model  # in whatever mode: nothing in it is random
        self.config = model.config
        self.token_budget = token_budget
        held = STATE_BYTES.get(self.device.type, 1 << 30) if state_bytes is None else state_bytes
        self.max_rows = max(1, held // DecodeState.expected(model, 1).nbytes)
        dtype = model.compute_dtype or model.model.embeddings.weight.dtype
        self.fused = all(block.is_fused(self.device, dtype) for block in model.model.layers)  # type: ignore[operator]
        # A pass reads a multiple of so many tokens, the rest being one more sequence that nobody asked for. On a GPU libraries
        # choose how to multiply, and so how to round, by the shape: every pass has the same. Where blocks are one operator,
        # whose rows have the same bits in any, it need only be whole pieces of the grid: kernels are compiled for those alone.
        self.unit = 1 if self.device.type != "cuda" else _GRID if self.fused else token_budget
        self.tokens_computed = 0
        self.tokens_asked = 0

    @torch.no_grad()
    @without_collector()
    def likelihoods(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Likelihood]:
        """One Likelihood for each request, in their order; progress is told how many requests are done.

        Raises ConfigError for an empty part or an id outside the vocabulary, CheckpointError if logits are nan.
        """
        self._check([ids for request in requests for ids in request])
        self.tokens_asked += sum(len(context) + len(continuation) - 1 for context, continuation in requests)
        results = Results(len(requests))
        alone: list[Piece] = []
        shared: list[Piece] = []
        for context, members in by_context(requests).items():
            # A context of one token costs less than keeping its state; without choices there is nothing to share.
            if len(members) == 1 or len(context) == 1:
                alone += [whole(requests[i], i) for i in members]
            else:
                first = Piece(context, None, [Wanted(len(context) - 1, requests[i].continuation[:1], i) for i in members])
                # Where all choices are of one token, one prediction answers them all, and no state is kept.
                (shared if any(len(requests[i].continuation) > 1 for i in members) else alone).append(first)
        done = 0
        for batch in self._batches(alone, len(requests)):
            self._score(batch, None, results)
            done += len({wanted.request for sequence in batch for wanted in sequence.wanted})
            if progress is not None:
                progress(done)
        shared.sort(key=lambda sequence: -len(sequence.ids))
        for start in range(0, len(shared), self.max_rows):
            group = shared[start : start + self.max_rows]
            state, row = self.model.new_state(len(group) + 1), 0
            for batch in self._batches(group, len(group)):
                part = state.view(row, row + len(batch) + 1)  # the next one's row is the spare one: it is emptied behind
                self._score(batch, part, results)
                row += len(batch)
                state.view(row, row + 1).reset()
            rests = [rest_of(requests[i], i, row) for row, sequence in enumerate(group) for _, _, i in sequence.wanted]
            # They only read the states, each as often as it is named: by the kernels in place, elsewhere from a layer's copy.
            for batch in self._batches(rests, len(rests) if self.fused else self.max_rows):
                self._score(batch, state, results)
            done += len(rests)
            if progress is not None:
                progress(done)
        return results.collect()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: Collection[int],
        stop: Callable[[list[int]], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The likeliest ids one after another behind each prompt, until max_new_tokens, one of eos_ids, or stop(ids so far).

        The id that ends a text is its last. Errors as in `likelihoods`.
        """
        self._check(prompts)
        texts: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        decoder = self._decoder()
        rows = self.max_rows if decoder is None else min(self.max_rows, _STREAM_ROWS)
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            before = self.tokens_computed
            mine, ended = [texts[i] for i in batch], partial(_ended, eos_ids=frozenset(eos_ids), stop=stop)
            state = self.model.new_state(len(batch) + 1)
            last = torch.cat(list(self._prefill([prompts[i] for i in batch], state)))
            state = state.view(0, len(batch))
            if decoder is None:
                self._decode(last, state, mine, max_new_tokens, ended)
            else:
                self._decode_captured(Stream(decoder, state, Sampling(temperature=0.0)), last, mine, max_new_tokens, ended)
            self.tokens_asked += self.tokens_computed - before
            if progress is not None:
                progress(start + len(batch))
        return texts

    def warm_up(self, texts: bool) -> None:
        """On a GPU: have the kernels compiled for contexts and their choices, and for texts. Nothing of it is counted."""
        if self.device.type == "cuda":
            counted = self.tokens_computed, self.tokens_asked
            self.likelihoods([Request([0, 0], [0, 0])] * 2 + [Request([0], [0])])
            if texts:
                self.generate([[0]] * _STREAM_ROWS, 2, ())
            self.tokens_computed, self.tokens_asked = counted

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        vocab = self.config.vocab_size
        for ids in sequences:
            if not ids:
                raise ConfigError("a context or continuation of no tokens; expected at least one, such as the BOS")
            if max(ids) >= vocab or min(ids) < 0:
                raise ConfigError(f"token id {max(ids)}; the model's vocabulary is {vocab}: this tokenizer is not the model's")

    def _batches(self, sequences: Sequence[Piece], rows: int) -> Iterator[list[Piece]]:
        """Sequences by falling length, as many at a time as the budget of tokens (one at least) and so many rows allow."""
        batch: list[Piece] = []
        tokens = 0
        for sequence in sorted((s for s in sequences if s.ids), key=lambda s: -len(s.ids)):
            if batch and (tokens + len(sequence.ids) > self.token_budget or len(batch) == rows):
                yield batch
                batch, tokens = [], 0
            batch.append(sequence)
            tokens += len(sequence.ids)
        if batch:
            yield batch

    def _score(self, batch: list[Piece], state: DecodeState | None, results: Results) -> None:
        """Read a batch and note what its requests want.

        state: what sequences with a row begin from, which is only read; for others a row for each and a spare one, updated.
        """
        rows = [sequence.row for sequence in batch if sequence.row is not None]
        if len(batch) == 1 and len(batch[0].ids) > self.token_budget:
            if state is None:
                state = self.model.new_state(2)
            elif rows:
                state = state.select(torch.tensor([*rows, 0], device=self.device))
            for piece in split(batch[0]._replace(row=None), self.token_budget):
                self._score([piece], state, results)
            return
        hidden = self._read([sequence.ids for sequence in batch], state, rows)
        start = 0
        places, tokens = array("q"), array("q")
        for sequence in batch:
            for first, wanted, request in sequence.wanted:
                places.extend(range(start + first, start + first + len(wanted)))
                tokens.extend(wanted)
                results.owners.extend([request] * len(wanted))
            start += len(sequence.ids)
        if not places:  # the first pieces of a long context
            return
        # The choices of one context want different tokens of one row of logits: each row is computed once.
        unique, which = tensor_of(places).unique(return_inverse=True)
        token_ids, unique, which = (tensor.to(self.device) for tensor in (tensor_of(tokens), unique, which))
        size = max(1, _LOGITS.get(self.device.type, _LOGITS["cpu"]) // self.config.vocab_size)
        order = which.argsort(stable=True)
        logs = torch.empty(len(tokens), device=self.device)
        greedy = torch.empty_like(logs, dtype=torch.bool)
        bounds = torch.searchsorted(which[order], torch.arange(0, len(unique) + size, size, device=self.device)).tolist()
        for first, start, end in zip(range(0, len(unique), size), bounds, bounds[1:]):
            logits = self.model.logits(hidden[unique[first : first + size]])
            totals, best = row_scores(logits)
            mine = order[start:end]
            rows_here, ids = which[mine] - first, token_ids[mine]
            logs[mine] = logits[rows_here, ids].float() - totals[rows_here]
            greedy[mine] = best[rows_here] == ids
        results.logs.append(_finite(logs))
        results.greedy.append(greedy.cpu())

    def _read(self, sequences: Sequence[Sequence[int]], state: DecodeState | None, rows: Sequence[int] = ()) -> Tensor:
        """Hidden states [tokens, hidden] of the sequences end to end.

        rows: which of the state's each begins from, and it is only read; without, it has one for each and a spare one behind.
        """
        lengths = [len(ids) for ids in sequences]
        flat = array("q")
        for ids in sequences:
            flat.extend(ids)
        self.tokens_computed += len(flat)
        if rest := -len(flat) % self.unit:
            lengths.append(rest)
            flat.extend(bytes(rest))
        begin = torch.tensor([*rows, 0][: len(lengths)], device=self.device) if rows else None
        if state is not None and begin is None:
            state = state.view(0, len(lengths))
        tokens, dtype = tensor_of(flat).to(self.device), self.model.compute_dtype
        if len(set(lengths)) == 1 and self.unit == 1:  # a batch: the same numbers to rounding, and no gathering
            hidden = self.model.model(tokens.view(len(lengths), -1), state, None, dtype, begin).flatten(0, 1)
        else:
            ends = torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
            hidden = self.model.model(tokens[None], state, ends, dtype, begin)[0]
        if state is not None and begin is None:
            state.position += torch.tensor(lengths, device=self.device)
        return torch.as_tensor(hidden)

    def _best(self, hidden: Tensor) -> Tensor:
        totals, best = row_scores(self.model.logits(hidden))
        _finite(totals)
        return best

    def _decoder(self) -> GPUDecoder | None:
        """What reads single tokens with few kernels, where the model lies on a GPU and is not being trained."""
        if self.device.type != "cuda" or any(parameter.requires_grad for parameter in self.model.parameters()):
            return None
        join_projections(self.model)
        return GPUDecoder(self.model) if GPUDecoder.serves(self.model) else None

    def _decode(
        self,
        last: Tensor,
        state: DecodeState,
        texts: list[list[int]],
        max_new_tokens: int,
        ended: Callable[[list[int]], bool],
    ) -> None:
        """Append to each text what follows its prompt, whose last hidden state [n, hidden] and state these are."""
        running = list(range(len(texts)))  # text of each row; None of them is finished but since the last select
        for _ in range(max_new_tokens):
            chosen = self._best(last)
            for text, token in zip(running, chosen.tolist()):
                if not ended(texts[text]):
                    texts[text].append(token)
            live = [row for row, text in enumerate(running) if not ended(texts[text])]
            if not live or len(texts[running[live[0]]]) == max_new_tokens:
                return
            if len(live) < len(running):
                keep = torch.tensor(live, device=self.device)
                state, chosen = state.select(keep), chosen[keep]
                running = [running[row] for row in live]
            self.tokens_computed += len(running)
            last = self.model.model(chosen[:, None], state, None, self.model.compute_dtype)[:, -1]
            state.position += 1

    def _decode_captured(
        self, stream: Stream, last: Tensor, texts: list[list[int]], max_new_tokens: int, ended: Callable[[list[int]], bool]
    ) -> None:
        """The same by a stream over that state, whose rows all go on until the last text has ended."""
        live = list(range(len(texts)))
        logits = self.model.logits(last)
        tokens = [stream.start(row, logits[row : row + 1], seed=0) for row in live]
        for n in range(max_new_tokens):
            for row, token in zip(live, tokens):
                texts[row].append(token)
            live = [row for row in live if not ended(texts[row])]
            if not live or n + 1 == max_new_tokens:
                return
            self.tokens_computed += len(texts)
            tokens = stream.next(live)

    def _prefill(self, prompts: list[Sequence[int]], state: DecodeState) -> Iterator[Tensor]:
        """Read prompts of falling length into the state's rows; yields the hidden states [n, hidden] of their last tokens."""
        row = 0
        while row < len(prompts):
            end, tokens = row + 1, len(prompts[row])
            while end < len(prompts) and tokens + len(prompts[end]) <= self.token_budget:
                tokens += len(prompts[end])
                end += 1
            part = state.view(row, end + 1)  # the next one's row is the spare one: it is emptied behind
            if tokens > self.token_budget:
                ids = prompts[row]
                for start in range(0, tokens, self.token_budget):
                    piece = ids[start : start + self.token_budget]
                    hidden = self._read([piece], part)[: len(piece)]
                yield hidden[-1:]
            else:
                hidden = self._read(prompts[row:end], part)
                ends = torch.tensor([len(ids) for ids in prompts[row:end]], device=self.device).cumsum(0)
                yield hidden[ends - 1]
            state.view(end, end + 1).reset()
            row = end


def _finite(logs: Tensor) -> Tensor:
    """On the host. Raises CheckpointError for a nan or an infinity."""
    logs = logs.cpu()
    if not logs.isfinite().all():
        raise CheckpointError("the model's logits are nan or infinite: so are its weights, or what it computes from them")
    return logs


def _ended(text: list[int], *, eos_ids: frozenset[int], stop: Callable[[list[int]], bool] | None) -> bool:
    return bool(text) and (text[-1] in eos_ids or (stop is not None and stop(text)))
