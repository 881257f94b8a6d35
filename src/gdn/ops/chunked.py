"""The gated delta rule in chunkwise (WY) form in plain PyTorch: the fast path wherever there is no GPU kernel.

Within a chunk of C tokens the recurrence is a unit lower-triangular system, solved for all chunks at once; only the K x V state
is carried from chunk to chunk, three operations each. The backward is written out: it follows the adjoint of the recurrence,
not of the triangular inverse, which is shorter (no gradient of the inverse is ever formed).

Per chunk, with gc the running sum of g from the chunk's start, and S the state before the chunk:

    G_ij = exp(gc_i - gc_j) for i >= j             L = strictly lower part of G * (k k^T)
    A = (I + L diag(beta))^-1                      X = A (v - exp(gc) k S)         what each token writes, before beta
    o = scale exp(gc) q S + P (beta X),            P = scale G * (q k^T)
    S' = exp(gc_C) S + (exp(gc_C - gc) k)^T (beta X)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkLayout(NamedTuple):
    """How tokens lie in chunks: chunks are ordered by their rank within a sequence, sequences by falling number of chunks.

    So the sequences still running at rank r are the first `running[r]`, and one loop over ranks serves batches and packed
    documents alike. A chunk grid starts with each sequence: a packed document is computed exactly as it is alone.
    """

    chunk: int  # tokens a chunk
    running: tuple[int, ...]  # sequences with a chunk of rank r
    order: list[int] | None  # packed: sequence numbers by falling number of chunks; None: the batch as it is
    gather: Tensor | None  # packed: [chunks * C] token of each slot; the number of tokens = padding


def batch_layout(B: int, T: int, chunk: int) -> ChunkLayout:
    """Layout of B sequences of T tokens each."""
    return ChunkLayout(chunk, (B,) * -(-T // chunk), None, None)


def packed_layout(lengths: list[int], chunk: int, device: torch.device) -> ChunkLayout:
    """Layout of sequences that lie one behind another, lengths in tokens; zero lengths have no chunk."""
    counts = [-(-length // chunk) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda n: -counts[n])
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    total = starts[-1]
    running = tuple(sum(count > r for count in counts) for r in range(max(counts, default=0)))
    positions = torch.arange(chunk)
    slots = []
    for r, n_running in enumerate(running):
        for n in order[:n_running]:
            token = starts[n] + r * chunk + positions
            slots.append(torch.where(token < starts[n + 1], token, total))
    gather = torch.cat(slots) if slots else positions[:0]
    return ChunkLayout(chunk, running, order, gather.to(device))


def gated_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    lengths: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_rule_reference`, to rounding, in chunks; differentiable once.

    Computes in float32, or in float64 if v is float64; returns o and the final state in that dtype.
    """
    B, T, HV, V = v.shape
    K, dtype = q.shape[-1], torch.promote_types(v.dtype, torch.float32)
    N = B if lengths is None else len(lengths)
    chunk = _chunk_size(T if lengths is None else max(lengths, default=0), max(K, V))
    layout = batch_layout(B, T, chunk) if lengths is None else packed_layout(lengths, chunk, v.device)
    groups = HV // q.shape[2]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    state = v.new_zeros(N, HV, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if layout.order is not None:
        state = state[layout.order]
    if not any(layout.running):
        return v.to(dtype), initial_state.to(dtype).clone() if initial_state is not None else state
    padding = -T % chunk if layout.gather is None else 1
    inputs = [x.to(dtype) for x in (q, k, v, g.unsqueeze(-1), beta.unsqueeze(-1))]
    if padding:
        inputs = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in inputs]
    o, final = _ChunkRule.apply(*inputs, state.flatten(0, 1), scale, layout)
    final = final.view(N, HV, K, V)
    if layout.order is not None:
        final = final[torch.tensor(layout.order).argsort().to(final.device)]
    return o[:, :T], final


def _chunk_size(T: int, width: int) -> int:
    # Work within chunks grows with C, carrying the width x width state costs one pass a chunk. Measured: docs/log.md.
    return max(1, min(T, 64 if width >= 128 else 32))


def _load(x: Tensor, layout: ChunkLayout, chunks: slice) -> Tensor:
    """[B, T', HV, D] -> these chunks, [chunks * HV, C, D]; padding is zero: it neither reads, writes nor decays."""
    C, (HV, D) = layout.chunk, x.shape[2:]
    if layout.gather is None:
        return _grid(x, C, chunks).reshape(-1, C, D)
    tokens = layout.gather[chunks.start * C : chunks.stop * C]
    return x[0].index_select(0, tokens).view(-1, C, HV, D).transpose(1, 2).reshape(-1, C, D)


def _store(out: Tensor, x: Tensor, layout: ChunkLayout, chunks: slice) -> None:
    """The reverse: write these chunks to their places in `out`."""
    C, (HV, D) = layout.chunk, out.shape[2:]
    if layout.gather is None:
        place = _grid(out, C, chunks)
        place.copy_(x.view(place.shape))
    else:
        tokens = layout.gather[chunks.start * C : chunks.stop * C]
        out[0].index_copy_(0, tokens, x.view(-1, HV, C, D).transpose(1, 2).reshape(-1, HV, D))


def _grid(x: Tensor, C: int, chunks: slice) -> Tensor:
    """A batch's chunks as a view [ranks, B, HV, C, D]."""
    B = x.shape[0]
    return x.unflatten(1, (-1, C))[:, chunks.start // B : chunks.stop // B].permute(1, 0, 3, 2, 4)


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower-triangular [M, C, C]; by substitution, which repeated keys do not upset.

    And one step of refinement: the error of substitution differs between processors' libraries by ten.
    """
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
    residual = torch.baddbmm(identity - inverse, lower, inverse, alpha=-1)
    return torch.baddbmm(inverse, inverse, residual)


def _decay(g: Tensor) -> Tensor:
    """G [M, C, C]: exp of the sum of g over (j, i] at and below the diagonal, zero above."""
    M, C = g.shape
    # Sums over each interval itself, not differences of running sums: those lose digits after strong decay, and -inf is nan.
    steps = g.unsqueeze(-1).expand(M, C, C).tril(-1)
    return steps.cumsum(dim=1).exp().tril()


def _intra(k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """G and L of each chunk [M, C, C]."""
    decay = _decay(g)
    return decay, (k @ k.mT).mul_(decay).tril_(-1)


def _edges(g: Tensor, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(gc) [M, C, 1], exp(gc_C - gc) [M, C, 1] and exp(gc_C) [M, 1, 1]: decay from, to and over the ends of the chunk."""
    from_start = g.cumsum(-1).exp().unsqueeze(-1)
    return from_start, decay[:, -1].unsqueeze(-1), from_start[:, -1:]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y over the last axis; a matrix product, because x * y would allocate a third array of their size."""
    return torch.bmm(x.reshape(-1, 1, x.shape[-1]), y.reshape(-1, y.shape[-1], 1)).view(x.shape[:-1])


# Floats of one [rows, C, K] array that a block of chunks may take: the dozen arrays of a block then stay in a core's cache.
_BLOCK_FLOATS = 1 << 19


def _blocks(running: tuple[int, ...], floats: int) -> list[tuple[slice, tuple[int, ...]]]:
    """Cut the ranks into blocks of at least one: their chunks and counts; `floats` a chunk of one [HV, C, K] array."""
    limit = _BLOCK_FLOATS // floats
    blocks: list[tuple[slice, tuple[int, ...]]] = []
    members: list[int] = []
    first = 0
    for n in running:
        if members and sum(members) + n > limit:
            blocks.append((slice(first, first + sum(members)), tuple(members)))
            first, members = first + sum(members), []
        members.append(n)
    return [*blocks, (slice(first, first + sum(members)), tuple(members))]


class _ChunkRule(torch.autograd.Function):
    """q, k [B, T', HV, K], v [B, T', HV, V], g, beta [B, T', HV, 1], padded for the layout; state [N * HV, K, V], its order.

    Both directions walk over blocks of a few ranks: what is independent of the state is computed for a block at once, then the
    state is carried through it. Temporary arrays are those of one block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        scale: float,
        layout: ChunkLayout,
    ) -> tuple[Tensor, Tensor]:
        o, final, HV = v.new_empty(v.shape), state.clone(), v.shape[2]
        saved: list[Tensor] = []
        for chunks, running in _blocks(layout.running, layout.chunk * HV * max(q.shape[-1], v.shape[-1])):
            q_, k_, v_, g_, beta_row = (_load(x, layout, chunks) for x in (q, k, v, g, beta))
            beta_column = beta_row.mT
            decay, lower = _intra(k_, g_.squeeze(-1))
            from_start, to_end, whole = _edges(g_.squeeze(-1), decay)
            inverse = _unit_lower_inverse(lower * beta_column)
            w = (inverse * from_start.mT) @ k_
            x = inverse @ v_
            k_out = k_ * (to_end * beta_row)
            states = v.new_empty(len(x), *state.shape[1:])
            start = 0
            for n in running:
                part, now = slice(start, start + n * HV), final[: n * HV]
                states[part] = now
                x[part].baddbmm_(w[part], now, alpha=-1)
                now.mul_(whole[part]).baddbmm_(k_out[part].mT, x[part])
                start += n * HV
            scores = (q_ @ k_.mT).mul_(decay).mul_(beta_column * scale)
            _store(o, (q_ @ states).mul_(from_start * scale).baddbmm_(scores, x), layout, chunks)
            if any(ctx.needs_input_grad):
                saved += [decay, lower, inverse, x, states]
        ctx.save_for_backward(q, k, v, g, beta, *saved)
        ctx.scale, ctx.layout = scale, layout
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *saved = ctx.saved_tensors
        scale, layout, HV = ctx.scale, ctx.layout, v.shape[2]
        dq, dk, dv, dg, d_beta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
        d_state = d_final.clone()
        blocks = _blocks(layout.running, layout.chunk * HV * max(q.shape[-1], v.shape[-1]))
        for i, (chunks, running) in reversed(list(enumerate(blocks))):
            q_, k_, g_, beta_row, do_ = (_load(x, layout, chunks) for x in (q, k, g, beta, do))
            decay, lower, inverse, x, states = saved[5 * i : 5 * i + 5]
            beta_column = beta_row.mT
            from_start, to_end, whole = _edges(g_.squeeze(-1), decay)

            # d: the gradient of beta X, from its own chunk's outputs and from the state after it, by the reverse recurrence.
            score_decay = decay * scale
            scores = (q_ @ k_.mT).mul_(score_decay)
            d = scores.mT @ do_
            do_start, k_end = do_ * (from_start * scale), k_ * to_end
            w = (inverse * from_start.mT * beta_row) @ k_
            d_states = torch.empty_like(states)
            start = len(x)
            for n in reversed(running):
                part, now = slice(start - n * HV, start), d_state[: n * HV]
                d_states[part] = now
                d[part].baddbmm_(k_end[part], now)
                now.mul_(whole[part]).baddbmm_(w[part].mT, d[part], alpha=-1).baddbmm_(q_[part].mT, do_start[part])
                start -= n * HV

            dv_ = (inverse * beta_row).mT @ d
            cross = dv_ @ x.mT
            written = lower * cross
            d_beta_ = _dot(x, d) - written.sum(-2)
            d_scores = (do_ @ x.mT).mul_(beta_column)
            pairs = scores.mul_(d_scores).sub_(written.mul_(beta_column))
            d_scores.mul_(score_decay)
            cross.mul_(decay).mul_(beta_column).tril_(-1)

            dq_ = do_start @ states.mT
            dk_ = (dv_ @ states.mT).mul_(-from_start)
            reads = _dot(q_, dq_) + _dot(k_, dk_)
            dk_after = (x @ d_states.mT).mul_(to_end * beta_row)
            writes = _dot(k_, dk_after)
            dq_.baddbmm_(d_scores, k_)
            dk_.add_(dk_after).baddbmm_(d_scores.mT, q_).baddbmm_(cross + cross.mT, k_, alpha=-1)

            # g_t decays what goes from tokens j < t to i >= t, from the state before to i >= t, from j < t to the state after,
            # and from state to state. Summing just these, not differences of larger sums, keeps the digits under strong decay.
            carried = whole.flatten(1) * _dot(states, d_states).sum(-1, keepdim=True)
            upper = torch.ones_like(decay[0]).triu()
            dg_ = (upper @ pairs).tril_(-1).sum(-1) + reads @ upper.mT + writes @ upper.triu(1) + carried
            in_chunks = (dq_, dk_, dv_, dg_.unsqueeze(-1), d_beta_.unsqueeze(-1))
            for out, gradient in zip((dq, dk, dv, dg, d_beta), in_chunks):
                _store(out, gradient, layout, chunks)
        return dq, dk, dv, dg, d_beta, d_state, None, None
