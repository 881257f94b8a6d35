"""A trained model to a Hugging Face folder that is proven to load to the same model before anyone can see it; its model card.

Knows no recipe and no data format: what the card tells arrives as plain dicts, the tokenizer as a function that writes files.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from gdn.errors import CheckpointError
from gdn.files import publish_folder
from gdn.hf.bundle import AUTO_MAP, MODELING_FILE, load_bundle, write_bundle
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import CONFIG, read_json, save_model, stored_dtype

_TOLERANCE = 1e-6  # relative 2-norm; both sides run the same modules, so that more than this means other weights
_CHECK_SHAPE = (2, 80)  # more than one chunk of the rule

_USAGE = """\
```python
import gdn.hf  # without gdn: leave this line out and pass trust_remote_code=True to both calls
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=False)[0]))
```"""


def export(
    model: GatedDeltaNetLM,
    out: Path,
    *,
    tokenizer_files: Callable[[Path], None] | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Publish `model` as the new folder `out`: weights, config.json, generation_config.json, tokenizer and README.md, and the
    model's code in one file, for transformers with trust_remote_code and without gdn.

    tokenizer_files writes the tokenizer into the folder it is given; card is the text of README.md (see `write_card`);
    dtype is that of the stored weights, None: as they are (gate parameters stay float32). BOS and EOS are the model
    configuration's. The folder is complete or absent: before it appears it is loaded through AutoModelForCausalLM and through
    the file it carries, and a difference of either's logits on a fixed batch from the model's own (cast alike) is a
    CheckpointError.
    Raises FileExistsError if `out` exists.
    """
    with publish_folder(out) as folder:
        save_model(model, folder, dtype=dtype)
        text = json.dumps(read_json(folder / CONFIG) | {"auto_map": AUTO_MAP}, indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_bundle(folder)
        config = model.config
        GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id).save_pretrained(folder)
        if tokenizer_files is not None:
            tokenizer_files(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        for way, difference in _differences(model, folder, dtype).items():
            if not difference <= _TOLERANCE:
                raise CheckpointError(
                    f"{out}: not published: the exported weights' logits differ from the model's by {difference:.1e} {way} "
                    f"(relative 2-norm); expected at most {_TOLERANCE:.0e}"
                )


def greedy_text(folder: Path, prompt: str, bos_id: int, max_new_tokens: int) -> str:
    """What plain transformers code writes after `prompt` with the model and tokenizer in `folder`, greedily, without a stop."""
    model = _load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[bos_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _load(folder: Path, dtype: torch.dtype | str = "auto", loader: Any = AutoModelForCausalLM) -> Any:
    """The folder's model through `loader`, without transformers' progress bars: these are fractions of a second."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return loader.from_pretrained(folder, dtype=dtype).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def write_card(recipe: Mapping[str, Any], data: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The model card: front matter, usage, and one table for each dict; nested dicts become dotted names.

    recipe: the resolved recipe. data: the summary of the data's manifest. results: what was measured, name to value; an
    empty dict is said to be empty rather than left out.
    """
    front = "library_name: transformers\npipeline_tag: text-generation\ntags:\n- gated_deltanet\n- linear-attention"
    name = str(recipe.get("name", "Gated DeltaNet language model"))
    sections = [("Measured results", results), ("Recipe", recipe), ("Data", data)]
    parts = [f"---\n{front}\n---", f"# {name}", "A Gated DeltaNet language model (arXiv:2412.06464).", "## Usage", _USAGE]
    for title, values in sections:
        rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in _flatten(values)]
        parts += [f"## {title}", "\n".join(["| name | value |", "|---|---|", *rows]) if rows else "None recorded."]
    return "\n\n".join(parts) + "\n"


def _differences(model: GatedDeltaNetLM, folder: Path, dtype: torch.dtype | None) -> dict[str, float]:
    """Relative 2-norm between the logits of `model`, its weights cast to `dtype`, and those of what lies in `folder`, by way
    of loading it."""
    wanted = _cast(model, dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, _CHECK_SHAPE, generator=generator)
    ways = {"through the Auto classes": AutoModelForCausalLM}
    ways[f"through {MODELING_FILE}"] = load_bundle(folder).GatedDeltaNetForCausalLM
    with torch.no_grad():
        expected: Tensor = wanted(ids).logits.double()
        found = {way: _load(folder, wanted.model.embeddings.weight.dtype, loader)(ids) for way, loader in ways.items()}
    return {way: float((out.logits.double() - expected).norm() / expected.norm()) for way, out in found.items()}


def _cast(model: GatedDeltaNetLM, dtype: torch.dtype | None) -> GatedDeltaNetLM:
    """A copy of `model` on the CPU in the dtype it is stored in, computing in that dtype; shares what need not be cast."""
    with torch.device("meta"):
        copy = GatedDeltaNetLM(model.config)
    tensors = {name: t.detach().to(device="cpu", dtype=stored_dtype(name, dtype)) for name, t in model.state_dict().items()}
    copy.load_state_dict(tensors, assign=True)
    return copy.eval()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
