"""The Hugging Face face: importing it registers `gated_deltanet` with AutoConfig, AutoModel and AutoModelForCausalLM.

Holds no computation of its own; the modules are those of `gdn.model`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gdn.hf.cache import GatedDeltaNetCache
from gdn.hf.configuration import GatedDeltaNetConfig
from gdn.hf.export import export, write_card
from gdn.hf.modeling import GatedDeltaNetForCausalLM, GatedDeltaNetModel, GatedDeltaNetPreTrainedModel

# flash-linear-attention registers the same type, also with exist_ok; whichever is imported last serves AutoConfig.
AutoConfig.register(GatedDeltaNetConfig.model_type, GatedDeltaNetConfig, exist_ok=True)
AutoModel.register(GatedDeltaNetConfig, GatedDeltaNetModel, exist_ok=True)
AutoModelForCausalLM.register(GatedDeltaNetConfig, GatedDeltaNetForCausalLM, exist_ok=True)

__all__ = [
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "GatedDeltaNetPreTrainedModel",
    "export",
    "write_card",
]
