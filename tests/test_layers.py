"""The package's import directions, fences and sizes, read from its source: nothing is imported to find out."""

import ast
from collections import Counter
from pathlib import Path

import gdn

SOURCE = Path(gdn.__file__).parent
LAYERS = (
    {"__init__", "errors", "config", "files"},
    {"ops"},
    {"model"},
    {"data", "distributed", "generation"},
    {"hf"},
    {"eval", "serve", "report"},
    {"train"},
    {
        "quickstart",
        "doctor",
        "doctor_kernels",
        "cli",
        "cli_eval",
        "cli_train",
        "info",
        "provenance",
        "evaluate",
        "reproduce",
        "lossband",
        "cli_reproduce",
        "runpage",
        "__main__",
    },
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FENCES = {  # package -> who may import it
    "triton": ("ops/triton_",),
    "transformers": ("hf/", "eval/harness.py", "data/tokenizer.py"),
    "lm_eval": ("eval/",),
    "datatrove": ("data/readers.py", "data/executors.py"),
    "tensorboard": ("train/metrics.py",),
    "torch.utils.tensorboard": ("train/metrics.py",),
    "wandb": ("train/metrics.py",),
}


def imported(source: str) -> list[str]:
    """Dotted names of all imports, inside functions too; `from a import b` is a and a.b. A relative import is none of ours."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [module] + [f"{module}.{alias.name}" for alias in node.names]
    return names


def violations(path: str, source: str) -> list[str]:
    """What the file at `path`, relative to the package, may not import."""
    unit = path.split("/")[0].removesuffix(".py")
    found = set()
    for name in imported(source):
        if name.startswith("."):
            found.add(f"{path}: relative import {name}")
        for package, allowed in FENCES.items():
            if (name == package or name.startswith(package + ".")) and not path.startswith(allowed):
                found.add(f"{path}: {package}")
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root != "gdn" or target not in LEVEL or target == unit:
            continue
        level = LEVEL[unit]
        beside = level in (0, 7) and LEVEL[target] == level  # single modules: errors serve config, info serves cli
        if LEVEL[target] >= level and not beside:
            found.add(f"{path}: gdn.{target}")
    return sorted(found)


def sources() -> dict[str, str]:
    return {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def test_imports_point_downwards_and_respect_the_fences() -> None:
    files = sources()
    assert len(files) > 30
    unknown = {path.split("/")[0].removesuffix(".py") for path in files} - LEVEL.keys()
    assert not unknown, f"give these a layer: {unknown}"
    assert [line for path, source in files.items() for line in violations(path, source)] == []


def test_a_violation_is_caught() -> None:
    for path, source, culprit in [
        ("ops/norm.py", "from gdn.model.lm import GatedDeltaNetLM", "gdn.model"),
        ("data/order.py", "def f():\n    import gdn.generation.engine", "gdn.generation"),
        ("eval/memory.py", "from gdn import report", "gdn.report"),
        ("eval/memory.py", "from gdn.train.loop import train", "gdn.train"),
        ("model/lm.py", "if True:\n    from triton.language import dot", "triton"),
        ("generation/engine.py", "import transformers.models as m", "transformers"),
        ("train/loop.py", "from torch.utils import tensorboard", "torch.utils.tensorboard"),
        ("config.py", "from gdn.ops import l2_norm", "gdn.ops"),
        ("ops/norm.py", "from . import gates", "relative import ."),
    ]:
        assert any(line.startswith(f"{path}: {culprit}") for line in violations(path, source)), (path, source)
    assert violations("hf/modeling.py", "import transformers\nimport gdn.model.lm\nfrom gdn.hf.cache import C") == []
    assert violations("eval/perplexity.py", "from gdn.data.loader import IGNORED") == []


def test_shape_of_the_package() -> None:
    files = sources()
    long = {path: source.count("\n") for path, source in files.items() if source.count("\n") >= 400}
    assert not long, "files of 400 lines and more"
    modules = Counter(path.split("/")[0] for path in files if "/" in path and not path.endswith("__init__.py"))
    assert modules and min(modules.values()) > 1, f"a package of one module is a module: {modules}"
    assert {path for path in files if path.count("/") > 1} == set(), "nested deeper than one"
    parts = {part.removesuffix(".py") for path in files for part in path.split("/")}
    assert not parts & {"utils", "util", "common", "helpers"}
