"""The two gates of the rule: how much of the state is kept, and how strongly a token is written. Computed in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decay_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay g = -exp(A_log) * softplus(a + dt_bias) <= 0, in float32 (float64 for float64 gates).

    a [..., HV]; A_log, dt_bias [HV]. Source: Mamba-2's gate (arXiv:2405.21060), used by arXiv:2412.06464.
    """
    dtype = torch.promote_types(A_log.dtype, torch.float32)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))


def beta_gate(b: Tensor, allow_neg_eigval: bool) -> Tensor:
    """Write strength sigmoid(b) in float32, doubled if the state's transition may have negative eigenvalues.

    Source: Grazzi et al. 2024 (arXiv:2411.12537) for the doubling.
    """
    beta = b.to(torch.promote_types(b.dtype, torch.float32)).sigmoid()
    return 2 * beta if allow_neg_eigval else beta
