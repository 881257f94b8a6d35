import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_testing import SMALL, config_json, plain, relative, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gdn.errors import ConfigError
from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GatedDeltaNetModel
from gdn.model.config import ModelConfig
from gdn.model.load import load_model, save_model

Make = Callable[..., GatedDeltaNetForCausalLM]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_the_auto_classes_know_the_model() -> None:
    config = AutoConfig.for_model("gated_deltanet", **SMALL)
    assert type(config) is GatedDeltaNetConfig
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is GatedDeltaNetModel
        assert type(AutoModelForCausalLM.from_config(config)) is GatedDeltaNetForCausalLM


@pytest.mark.parametrize("gdn_first", [True, False])
def test_registration_beside_flash_linear_attention(gdn_first: bool) -> None:
    """Another package registers the same type, as flash-linear-attention does; the last import serves, nothing raises."""
    other = textwrap.dedent("""
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
        class OtherConfig(PreTrainedConfig):
            model_type = "gated_deltanet"
        class Other(PreTrainedModel):
            config_class = OtherConfig
        AutoConfig.register("gated_deltanet", OtherConfig, exist_ok=True)
        AutoModelForCausalLM.register(OtherConfig, Other, exist_ok=True)
    """)
    ours = "import gdn.hf\n"
    check = textwrap.dedent(f"""
        import torch
        served = type(AutoConfig.for_model("gated_deltanet")).__name__
        assert served == "{"OtherConfig" if gdn_first else "GatedDeltaNetConfig"}", served
        with torch.device("meta"):
            small = gdn.hf.GatedDeltaNetConfig(**{SMALL})
            assert type(AutoModelForCausalLM.from_config(small)) is gdn.hf.GatedDeltaNetForCausalLM
            assert type(AutoModelForCausalLM.from_config(OtherConfig())) is Other
    """)
    script = (ours + other if gdn_first else other + ours) + check
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_defaults_are_flash_linear_attentions() -> None:
    config = GatedDeltaNetConfig()
    assert config.to_model_config() == ModelConfig(bos_token_id=1, eos_token_id=2)
    assert (config.attn_mode, config.hidden_act, config.output_gate_activation) == ("chunk", "swish", "swish")
    assert (config.attn, config.attnres_block_size, config.use_l2warp) == (None, None, False)
    assert (config.fuse_norm, config.fuse_swiglu, config.fuse_cross_entropy) == (True, True, True)


def test_config_round_trips(tmp_path: Path) -> None:
    own = ModelConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=3, num_heads=2, num_v_heads=4, head_dim=8, expand_v=0.5, use_gate=False,
        use_short_conv=False, conv_size=3, conv_bias=True, allow_neg_eigval=True, hidden_ratio=3, intermediate_size=24,
        norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=77, eos_token_id=5,
    )  # fmt: skip
    config = GatedDeltaNetConfig.from_model_config(own)
    assert config.to_model_config() == own
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_model_config() == own
    assert ModelConfig.from_json(config_json(tmp_path), "saved") == own
    (tmp_path / "config.json").write_text(json.dumps(own.to_json()))
    assert AutoConfig.from_pretrained(tmp_path).to_model_config() == own
    assert GatedDeltaNetConfig(eos_token_id=[2, 3]).to_model_config().eos_token_id is None


def test_a_recorded_config_loads_with_every_key(recorded_folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(recorded_folder)
    config.save_pretrained(tmp_path)
    before, after = config_json(recorded_folder), config_json(tmp_path)
    for key in before.keys() - {"transformers_version", "_name_or_path", "dtype", "architectures"}:
        if key in after:
            assert after[key] == before[key], key
        else:  # transformers leaves out what equals its own defaults
            assert getattr(config, key) == getattr(GatedDeltaNetConfig(), key) or key in ("id2label", "label2id"), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn": {"layers": [0], "num_heads": 2}}, "attn = .* is not built here"),
        ({"attnres_block_size": 2}, "attnres_block_size = 2 is not built here"),
        ({"use_l2warp": True}, "use_l2warp = True is not built here"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not built here"),
        ({"num_v_heads": 3}, "num_v_heads = 3; expected a multiple of num_heads = 2"),
        ({"head_dim": "8"}, "head_dim = '8'"),
    ],
    ids=str,
)
def test_switches_that_are_not_built_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_config(GatedDeltaNetConfig(**SMALL | change))


def test_recorded_weights_load_and_give_the_recorded_outputs(recorded_folder: Path, recorded: dict[str, Tensor]) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(recorded_folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = recorded["model_io.input_ids"]
    with torch.no_grad():
        out = loaded(ids, labels=ids)
        base = AutoModel.from_pretrained(recorded_folder)(ids).last_hidden_state
    assert relative(out.logits[:, :48], recorded["model_io.logits_fp32_first48"]) < 1e-4
    assert float(out.loss) == pytest.approx(float(recorded["model_io.loss"]), abs=1e-3)
    assert torch.equal(loaded.lm_head(base), out.logits)


def test_the_published_snippets_dtype(recorded_folder: Path, recorded: dict[str, Tensor]) -> None:
    for argument in ("torch_dtype", "dtype"):
        loaded = AutoModelForCausalLM.from_pretrained(recorded_folder, trust_remote_code=True, **{argument: torch.bfloat16})
        assert loaded.dtype == torch.bfloat16
        for name, parameter in loaded.named_parameters():
            gate = name.endswith(("A_log", "dt_bias"))
            assert parameter.dtype == (torch.float32 if gate else torch.bfloat16), name
            assert torch.equal(parameter, recorded[f"model.{name}"].to(parameter.dtype)), name
    ids = recorded["model_io.input_ids"]
    with torch.no_grad():
        assert relative(loaded(ids).logits, recorded["model_io.logits_bf16"]) < 3e-2


def test_the_keys_are_those_of_the_plain_model(make: Make) -> None:
    for config in ({}, {"tie_word_embeddings": True, "conv_bias": True, "use_gate": False}):
        model = make(**config)
        own = plain(model)
        assert model.state_dict().keys() == own.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(model(tokens(2, 70)).logits, own(tokens(2, 70)).logits)


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True, "conv_bias": True}], ids=["plain", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load_bitwise(make: Make, tmp_path: Path, config: dict[str, Any], sharded: bool, dtype: torch.dtype) -> None:
    make(**config).save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype)
    model.save_pretrained(tmp_path / "second", max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "second" / "model.safetensors.index.json").exists() == sharded
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype="auto", **options)
        assert same_weights(model, again)
        assert model.model.layers[0].attn.A_log.dtype == torch.float32
        assert (again.lm_head.weight is again.model.embeddings.weight) == config.get("tie_word_embeddings", False)
    own = load_model(tmp_path / "second")
    assert same_weights(model, own)


def test_gdn_checkpoints_load(make: Make, tmp_path: Path) -> None:
    own = plain(make(tie_word_embeddings=True))
    save_model(own, tmp_path, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16 and same_weights(loaded, load_model(tmp_path))


def test_gate_parameters_stored_in_bfloat16_are_widened(make: Make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("auto", torch.bfloat16, torch.float16):
        attn = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).model.layers[0].attn
        assert attn.A_log.dtype == attn.dt_bias.dtype == torch.float32
        assert torch.equal(attn.A_log, tensors["model.layers.0.attn.A_log"].float())


def test_weights_missing_from_a_file_are_drawn_and_the_others_kept(make: Make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = ["model.layers.1.attn.A_log", "model.layers.0.attn.q_proj.weight", "model.layers.1.attn_norm.weight"]
    lost += ["model.layers.0.attn.dt_bias"]  # its neighbour A_log is there, and the other way round in layer 1
    save_file({k: v for k, v in tensors.items() if k not in lost}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name in tensors.keys() - set(lost):
        assert torch.equal(loaded[name], tensors[name]), name
    A = loaded[lost[0]].exp()
    assert (A > 0).all() and (A <= 16).all() and A.std() > 0
    assert float(loaded[lost[1]].std()) == pytest.approx(0.02, rel=0.2)
    assert (loaded[lost[2]] == 1).all()


def test_a_new_model_is_initialised() -> None:
    torch.manual_seed(0)
    sizes = SMALL | {"num_heads": 64, "head_dim": 2, "initializer_range": 0.05, "conv_bias": True}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(GatedDeltaNetConfig(**sizes), dtype=dtype)
        attn = model.model.layers[0].attn
        assert attn.A_log.dtype == attn.dt_bias.dtype == torch.float32 and model.dtype == dtype
        assert 10 < attn.A_log.exp().max() <= 16 and attn.A_log.exp().min() < 3
        dt = torch.nn.functional.softplus(attn.dt_bias.detach())
        assert 0.0009 < dt.min() < 0.005 < 0.03 < dt.max() < 0.11
        for weight in (model.lm_head.weight, attn.q_conv1d.weight, model.model.embeddings.weight):
            assert float(weight.detach().float().std()) == pytest.approx(0.05, rel=0.2)
        assert not attn.q_conv1d.bias.any() and (attn.o_norm.weight == 1).all()


def test_resizing_the_vocabulary_keeps_the_rest(make: Make) -> None:
    for tied in (False, True):
        model = make(tie_word_embeddings=tied)
        before = model(tokens(1, 20)).logits
        model.resize_token_embeddings(80)
        after = model(tokens(1, 20)).logits
        assert after.shape[-1] == 80 and relative(after[..., : before.shape[-1]], before) < 1e-5
