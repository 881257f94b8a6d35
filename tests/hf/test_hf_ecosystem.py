"""What users bring to the model: Trainer, LoRA, device maps, compilation. A few steps each, results compared, not only run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_testing import relative, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gdn.hf import GatedDeltaNetForCausalLM

Model = GatedDeltaNetForCausalLM
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as files, in shards."""
    path = tmp_path_factory.mktemp("ecosystem") / "model"
    model.save_pretrained(path, max_shard_size="20KB")
    return path


def text(model: Any, **options: Any) -> torch.Tensor:
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    out: torch.Tensor = model.generate(input_ids=ids, **settings | options)
    return out


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer_takes_the_steps_of_a_plain_loop(folder: Path, tmp_path: Path, checkpointing: bool) -> None:
    """Two micro-batches a step, padded unequally: the loss is over all targets of the step, as one batch would have it."""
    rows = [tokens(1, 12 + n, seed=n)[0] for n in range(8)]

    def batch(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e["input_ids"])) for e in examples], batch_first=True).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.01,
        lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", report_to=[], use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=checkpointing, save_steps=4, save_total_limit=1, logging_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trained = AutoModelForCausalLM.from_pretrained(folder)
    trainer = Trainer(trained, arguments, train_dataset=[{"input_ids": row} for row in rows], data_collator=batch)
    trainer.train()

    wanted = AutoModelForCausalLM.from_pretrained(folder).train()
    losses, whole = [], batch([{"input_ids": row} for row in rows])
    for _ in range(4):
        loss = wanted(**whole).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in wanted.parameters():
                parameter -= 0.01 * parameter.grad
        wanted.zero_grad()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.05
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, parameter in wanted.state_dict().items():
        assert torch.equal(saved[name], trained.state_dict()[name]), name
        step = parameter - start[name]
        assert float((saved[name] - parameter).norm()) < 1e-3 * float(step.norm()), name


def test_lora_learns_saves_loads_and_merges(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = tokens(4, 20), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    moved = {name.split(".")[-4] for name, p in model.named_parameters() if "lora_B" in name and p.detach().any()}
    assert moved == set(PROJECTIONS)  # every adapter took part in the result
    for name, tensor in model.state_dict().items():
        if "lora" not in name:
            assert torch.equal(tensor, frozen[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert relative(logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits) > 0.1
        assert torch.equal(again(input_ids=ids).logits, logits)
        written = text(again)
        merged = model.merge_and_unload()
        assert relative(merged(ids).logits, logits) < 1e-5 and torch.equal(text(merged), written)


@pytest.mark.parametrize("target", ["lm_head", "embeddings", "tokens"])
def test_adapters_of_head_and_embeddings_learn(folder: Path, target: str) -> None:
    """The loss is that of the logits that the model returns."""
    from peft import LoraConfig, get_peft_model

    options = {"trainable_token_indices": [1, 2, 3]} if target == "tokens" else {}
    modules = ["q_proj"] if target == "tokens" else [target]
    base, ids = AutoModelForCausalLM.from_pretrained(folder), tokens(4, 20)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, **options)).train()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(6):
        out = model(input_ids=ids, labels=ids)
        wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert float(out.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_a_hook_on_the_head_is_in_the_loss(folder: Path) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), tokens(2, 20)
    plain = float(model(ids, labels=ids).loss.detach())
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    out = model(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(out.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5) and abs(float(wanted) - plain) > 0.1


ON_DISK = {"model.embeddings": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "disk"}


@pytest.mark.parametrize("device_map", ["auto", ON_DISK], ids=["auto", "disk"])
def test_device_maps(folder: Path, model: Model, tmp_path: Path, device_map: Any) -> None:
    placed = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    away = {name for name, parameter in placed.named_parameters() if parameter.is_meta}
    assert ("lm_head.weight" in away and "model.layers.1.attn.A_log" in away) == (device_map != "auto")
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)
        assert float(placed(ids, labels=ids).loss) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
        assert torch.equal(text(placed), text(model))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_the_compiled_model_is_the_model(make: Callable[..., Model], backend: str) -> None:
    """Inference is one graph; training goes through the backward that is written out."""
    model, ids = make(num_hidden_layers=1), tokens(2, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-5
    model.train()(ids, labels=ids).loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend=backend)(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, wanted[name]) < 1e-4, name
    torch._dynamo.reset()
