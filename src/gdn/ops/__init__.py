"""The gated delta rule and the layer's other pieces as pure functions on tensors; no modules, no state of their own."""

from gdn.ops.conv_rule import conv_gated_delta_rule, conv_gated_delta_rule_step, conv_gated_delta_rule_with_state
from gdn.ops.cross_entropy import linear_cross_entropy, row_scores
from gdn.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, gated_delta_rule_with_state
from gdn.ops.gates import beta_gate, decay_gate
from gdn.ops.norm import gated_rms_norm, l2_norm, rms_norm
from gdn.ops.short_conv import short_conv, short_conv_step, short_conv_with_state

__all__ = [
    "beta_gate",
    "conv_gated_delta_rule",
    "conv_gated_delta_rule_step",
    "conv_gated_delta_rule_with_state",
    "decay_gate",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_delta_rule_with_state",
    "gated_rms_norm",
    "l2_norm",
    "linear_cross_entropy",
    "rms_norm",
    "row_scores",
    "short_conv",
    "short_conv_step",
    "short_conv_with_state",
]
