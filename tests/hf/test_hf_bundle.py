"""The one file that an exported folder carries: the same logits, text and training in a process that has no gdn."""

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_testing import config_json, plain, tokens
from transformers import AutoModelForCausalLM

from gdn.errors import CheckpointError
from gdn.hf import GatedDeltaNetForCausalLM, bundle, export

Make = Callable[..., GatedDeltaNetForCausalLM]

# Plain transformers, in a process where gdn cannot be imported: logits, a padded batch, text, a loss's gradients.
ALONE = textwrap.dedent("""
    import sys
    class NoGdn:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "gdn":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, NoGdn())
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.set_num_threads(1)
    folder, ids, mask = sys.argv[1], *torch.load(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    assert "transformers_modules" in type(model).__module__ and "gdn" not in sys.modules
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "GatedDeltaNetConfig"
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=mask)
    found = {"text": model.generate(ids, **options), "beams": model.generate(ids, num_beams=3, **options)}
    with torch.no_grad():
        found["logits"] = model(ids, attention_mask=mask).logits
    model.train()(ids, labels=ids).loss.backward()
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(found, sys.argv[3])
""")


def without_gdn(folder: Path, tmp_path: Path, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.save((ids, mask), tmp_path / "in.pt")
    command = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({}, torch.float32), ({"conv_bias": True, "num_v_heads": 4, "tie_word_embeddings": True}, torch.bfloat16)],
    ids=["float32", "bfloat16-switches"],
)
def test_plain_transformers_computes_the_same(make: Make, tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    export(plain(make(**config)), tmp_path / "out", dtype=dtype)
    ids, mask = tokens(2, 75), torch.ones(2, 75, dtype=torch.long)
    mask[1, :6] = 0
    found = without_gdn(tmp_path / "out", tmp_path, ids, mask)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", trust_remote_code=True)
    assert type(here) is GatedDeltaNetForCausalLM  # where gdn is, it serves
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for name, beams in (("text", 1), ("beams", 3)):
        assert torch.equal(found[name], here.generate(ids, attention_mask=mask, num_beams=beams, **options))
    with torch.no_grad():
        assert torch.equal(found["logits"], here(ids, attention_mask=mask).logits)
    here.train()(ids, labels=ids).loss.backward()
    for name, parameter in here.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


def test_what_save_pretrained_writes_serves_alone_too(make: Make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    ids, mask = tokens(1, 9), torch.ones(1, 9, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(without_gdn(tmp_path / "out", tmp_path, ids, mask)["logits"], model(ids).logits)


def test_the_file_stands_alone(tmp_path: Path) -> None:
    source = bundle.bundle()
    imported = {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside == {"torch", "transformers"}
    assert "triton" not in {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    (tmp_path / "modeling.py").write_text(source)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(tmp_path / "modeling.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # undefined or unused names
    assert result.returncode == 0, result.stdout


def test_a_file_that_computes_something_else_is_not_published(make: Make, tmp_path: Path) -> None:
    """Taken from the sources, it cannot drift by itself; altered on the way, or out of date, it is found out."""

    def alter(folder: Path) -> None:
        path = folder / bundle.MODELING_FILE
        text = path.read_text()
        assert text.count("F.softplus(") == 1
        path.write_text(text.replace("F.softplus(", "1.001 * F.softplus("))

    with pytest.raises(CheckpointError, match=r"not published: .* differ .* through modeling_gated_deltanet.py"):
        export(plain(make()), tmp_path / "out", tokenizer_files=alter)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out_exists_in_the_sources_and_not_in_the_file() -> None:
    tree = ast.parse(bundle.bundle())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    import gdn.hf.modeling as modeling
    from gdn.model.config import ModelConfig
    from gdn.model.lm import Block
    from gdn.model.state import DecodeState

    owners = {
        "Block": Block,
        "DecodeState": DecodeState,
        "GatedDeltaNet": modeling.GatedDeltaNet,
        "GatedDeltaNetForCausalLM": modeling.GatedDeltaNetForCausalLM,
        "GatedDeltaNetPreTrainedModel": modeling.GatedDeltaNetPreTrainedModel,
        "ModelConfig": ModelConfig,
    }
    assert owners.keys() == bundle._METHODS_LEFT_OUT.keys()
    for name, methods in bundle._METHODS_LEFT_OUT.items():
        kept = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef)}
        assert not methods & kept and all(method in vars(owners[name]) for method in methods), name


def test_two_definitions_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"_check is defined in gdn.a and in gdn.b"):
        bundle._refuse_collisions({"gdn.a": {"_check", "x"}, "gdn.b": {"_check"}})


def test_config_json_names_the_file(make: Make, tmp_path: Path) -> None:
    export(plain(make()), tmp_path / "out")
    make().save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "out", tmp_path / "saved"):
        auto_map = config_json(folder)["auto_map"]
        assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        module = bundle.load_bundle(folder)
        for reference in auto_map.values():
            file, name = reference.split(".")
            assert (folder / f"{file}.py").exists() and hasattr(module, name)
