"""What the forward of a sharded bf16 model is given, in one process of a group: `gates_seen.py cast|keep`.

Prints {parameter name: dtype} at rest, as the mixer sees them in the forward, and of the gradients.
"""

import json
import os
import sys

import torch
from fleet import free_port
from torch import nn

from gdn.distributed.mesh import join, make_workers
from gdn.distributed.parallelize import parallelize
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights


def main(cast_gates: bool) -> dict[str, dict[str, str]]:
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=2, head_dim=16, intermediate_size=48)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    with join(torch.device("cpu")) as device:
        model = GatedDeltaNetLM(config, torch.bfloat16)
        init_weights(model, "mamba", 0)
        parallelize(model, make_workers(device, 1), cast_gates)
        resting = {name: str(p.dtype) for name, p in model.named_parameters()}
        seen: dict[str, str] = {}

        def look(module: nn.Module, inputs: object) -> None:
            seen.update({name: str(p.dtype) for name, p in model.named_parameters()})

        model.model.layers[0].attn.register_forward_pre_hook(look)
        ids = torch.arange(16).view(2, 8)
        loss = model(ids, ids).loss_sum
        assert loss is not None
        loss.backward()
        gradients = {name: str(p.grad.dtype) for name, p in model.named_parameters() if p.grad is not None}
    return {"resting": resting, "seen": seen, "gradients": gradients}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1] == "cast")))
