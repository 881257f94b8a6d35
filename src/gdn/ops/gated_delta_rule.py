"""The public gated delta rule: validation and defaults. The computation is in `reference`, `chunked` and `triton_rule`.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t

Source: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks" (arXiv:2412.06464), section 3.
"""

import torch
from torch import Tensor

from gdn.ops.backend import Backend, choose_backend
from gdn.ops.chunked import gated_delta_rule_chunked
from gdn.ops.reference import gated_delta_rule_reference


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Outputs of the gated delta rule over whole sequences; differentiable (once) in every tensor.

    q, k [B, T, H, K], L2-normalised by the caller; v [B, T, HV, V] with HV a multiple of H; g [B, T, HV] log decay <= 0;
    beta [B, T, HV] write strength in [0, 2); scale defaults to K ** -0.5; initial_state [N, HV, K, V], zeros if None.
    cu_seqlens: int32 [N + 1], then B == 1 and the state is reset at each of these boundaries; sequences may be empty. The GPU
    kernels read it on the device and never wait for it: that it runs from 0 to T without falling is there the caller's word.
    Returns o [B, T, HV, V] in v's dtype. Sums and states are float32 (float64 for float64 input).
    Raises ValueError for shapes that do not fit, BackendError for a backend that does not exist or cannot serve.
    """
    o, _ = _rule(q, k, v, g, beta, scale, initial_state, cu_seqlens, backend, with_final_state=False)
    return o


def gated_delta_rule_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_rule`, and the final state [N, HV, K, V] of each sequence (float32, float64 for float64 input)."""
    return _rule(q, k, v, g, beta, scale, initial_state, cu_seqlens, backend, with_final_state=True)


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """One token for each row: updates `state` [B, HV, K, V] in place and returns o [B, HV, V] in v's dtype. No gradients.

    q, k [B, H, K]; v [B, HV, V]; g, beta [B, HV]. The GPU kernel takes a float32 state whose [K, V] matrices are contiguous.
    """
    dtype = state.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # A state in float64 is for checks; the kernel keeps float32.
    if choose_backend(backend, state.device, v.dtype if dtype == torch.float32 else dtype, *state.shape[-2:]) == "triton":
        from gdn.ops.triton_step import step

        return step(q, k, v, g, beta, state, scale)
    groups = v.shape[1] // q.shape[1]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, dim=1) for x in (q, k))
    with torch.no_grad():
        q, k = (x.to(dtype).unsqueeze(-2) for x in (q, k))
        state.mul_(g.to(dtype).exp()[..., None, None])
        write = (v.to(dtype).unsqueeze(-2) - k @ state).mul_(beta.to(dtype)[..., None, None])
        state.addcmul_(k.mT, write)
        return (q @ state).squeeze(-2).mul_(scale).to(v.dtype)


def sequence_lengths(cu_seqlens: Tensor, T: int) -> list[int]:
    """Tokens of each packed sequence; ValueError unless cu_seqlens is int32, starts at 0, never falls and ends at T."""
    check_boundaries(cu_seqlens)
    bounds = cu_seqlens.tolist()
    lengths = [after - before for before, after in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != T or min(lengths) < 0:
        raise ValueError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; expected 0 to T = {T} without falling")
    return lengths


def check_boundaries(cu_seqlens: Tensor) -> None:
    """ValueError unless cu_seqlens has the dtype and shape of boundaries; its values are not looked at."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; expected int32 [N + 1] with N >= 1")


def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: Backend,
    *,
    with_final_state: bool,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_backend(backend, v.device, v.dtype, q.shape[-1], v.shape[-1])
    if chosen == "triton" and v.numel():
        from gdn.ops.triton_rule import rule

        return rule(q, k, v, g, beta, scale, initial_state, cu_seqlens, with_final_state=with_final_state)
    lengths = None if cu_seqlens is None else sequence_lengths(cu_seqlens, q.shape[1])
    compute = gated_delta_rule_reference if chosen == "reference" else gated_delta_rule_chunked
    o, final_state = compute(q, k, v, g, beta, scale, initial_state, lengths)
    return o.to(v.dtype), final_state


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q {tuple(q.shape)}, v {tuple(v.shape)}: expected [B, T, H, K] and [B, T, HV, V]")
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    wanted = {"k": (k, (B, T, H, K)), "v": (v, (B, T, HV, V)), "g": (g, (B, T, HV)), "beta": (beta, (B, T, HV))}
    N = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens with a batch of {B}: packed sequences lie in one row (B == 1)")
        check_boundaries(cu_seqlens)
        N = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        wanted["initial_state"] = (initial_state, (N, HV, K, V))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {shape} beside q {tuple(q.shape)}")
    if HV % H:
        raise ValueError(f"v has {HV} heads; expected a multiple of the {H} heads of q and k")
