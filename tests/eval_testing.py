"""A tiny model, tokenizers with and without a BOS of their own, and a folder of a few made-up documents for every task."""

import json
from pathlib import Path
from typing import Any

import torch

from gdn.data.tokenizer import train_bpe
from gdn.eval.local import INDEX, SOURCES
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

TEXT = "the river carries old boats past nine quiet towns and a bridge that nobody has crossed since winter"
WORDS = TEXT.split()


def sentence(n: int, words: int = 9) -> str:
    return " ".join(WORDS[(n * 7 + i * (n + 3)) % len(WORDS)] for i in range(words)).capitalize() + "."


def make_documents() -> dict[str, list[dict[str, Any]]]:
    """Per file some rows in the columns of the real one."""
    arc = [
        {
            "question": sentence(n),
            "choices": {"text": [sentence(n + i, 2 + i) for i in range(3 + n % 2)], "label": list("ABCD")[: 3 + n % 2]},
            "answerKey": "AB"[n % 2],
        }
        for n in range(4)
    ]
    page = " = River = \n \n" + " \n".join(f" {sentence(n, 30)} it 's @-@ {n} @,@ 000 ( miles ) . " for n in range(12))
    rows: dict[str, list[dict[str, Any]]] = {
        "hellaswag": [
            {
                "ctx_a": sentence(n),
                "ctx_b": "the boats",
                "activity_label": "Rowing [title]",
                "endings": [sentence(n + i, 3 + 4 * i) for i in range(4)],
                "label": str(n % 4),
            }
            for n in range(6)
        ],
        "piqa": [{"goal": sentence(n), "sol1": sentence(n + 1), "sol2": sentence(n + 2, 4), "label": n % 2} for n in range(4)],
        "arc_easy": arc,
        "arc_challenge": arc,
        "winogrande": [
            {"sentence": f"{sentence(n)} Then _ went home.", "option1": "Ann", "option2": "Bo", "answer": "12"[n % 2]}
            for n in range(4)
        ],
        "lambada_openai": [{"text": f"{sentence(n, 40)} and so to the {WORDS[n]}"} for n in range(4)],
        "boolq": [{"passage": sentence(n, 60), "question": sentence(n, 5), "answer": n % 2 == 0} for n in range(4)],
        "copa": [
            {
                "premise": sentence(n),
                "choice1": sentence(n + 1),
                "choice2": sentence(n + 2),
                "question": ["cause", "effect"][n % 2],
                "label": n % 2,
            }
            for n in range(4)
        ],
        "sciq": [
            {
                "question": sentence(n),
                "support": sentence(n, 30),
                "correct_answer": WORDS[n],
                **{f"distractor{i}": WORDS[n + i] if n else None for i in (1, 2, 3)},
            }
            for n in range(4)
        ],
        "wikitext": [{"page": page}, {"page": page[:300]}],
    }
    return rows


def write_data(folder: Path) -> Path:
    """The folder in the layout of --data, `eval` alone."""
    place = folder / "eval"
    place.mkdir(parents=True)
    made = make_documents()
    for task, source in SOURCES.items():
        text = "".join(json.dumps(row) + "\n" for row in made[task])
        (place / source.file).write_text(text, encoding="utf-8")
    (place / INDEX).write_text(json.dumps({source.file: len(made[task]) for task, source in SOURCES.items()}))
    return folder


def write_tokenizer(folder: Path, *, adds_bos: bool) -> Path:
    """A byte-level BPE; adds_bos: with a BOS in front of every text, as the published model's tokenizer puts it."""
    train_bpe([sentence(n, 20) for n in range(30)], 400).save(folder)
    if adds_bos:
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        bos = "<|endoftext|>"
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
        }
        path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def make_model(vocab_size: int = 400, max_length: int = 96) -> GatedDeltaNetLM:
    """Weights away from their neutral values, so that scores differ and greedy texts vary."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        head_dim=8,
        expand_v=1.0,
        max_position_embeddings=max_length,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GatedDeltaNetLM(config)
    init_weights(model, "mamba", 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
