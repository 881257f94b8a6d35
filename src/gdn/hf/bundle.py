"""The model as one file for folders that must serve without gdn: its definitions, cut out of this package's own sources.

Kept are the definitions that the Hugging Face classes reach, as they are written, with their comments; left out are the GPU
kernels' branches. Nothing is written twice: the file that `export` adds to a folder is made anew each time, and compared.
"""

import ast
import importlib.util
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

MODELING_FILE = "modeling_gated_deltanet.py"
_CLASSES = {
    "AutoConfig": "GatedDeltaNetConfig",
    "AutoModel": "GatedDeltaNetModel",
    "AutoModelForCausalLM": "GatedDeltaNetForCausalLM",
}
AUTO_MAP = {auto: f"{MODELING_FILE.removesuffix('.py')}.{name}" for auto, name in _CLASSES.items()}

_Import = tuple[str, str | None, str]  # module, name in it or None for the module itself, alias
_ROOTS = [("gdn.hf.configuration", "GatedDeltaNetConfig"), ("gdn.hf.modeling", "GatedDeltaNetModel")]
_ROOTS += [("gdn.hf.modeling", "GatedDeltaNetForCausalLM")]
_METHODS_LEFT_OUT = {
    "Block": {"_fused", "_fused_backend", "is_fused"},
    "DecodeState": {"expected", "save", "load"},
    "GatedDeltaNet": {"_fused_rule"},
    "GatedDeltaNetForCausalLM": {"_step_backend", "_single_token"},
    "GatedDeltaNetPreTrainedModel": {"save_pretrained"},
    "ModelConfig": {"num_parameters", "flops_per_token", "to_json"},
}
_SUBSTITUTES = {
    ("gdn.ops.backend", "choose_backend"): '''\
def choose_backend(backend: str, *_: Any) -> str:
    """Plain PyTorch, on any device, is all there is in this file."""
    return "torch" if backend == "auto" else backend
'''
}
_HEADER = '''\
"""Gated DeltaNet (arXiv:2412.06464) in plain PyTorch for transformers, in one file: AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True) loads it from here. Made by `gdn export` from the sources of the package gdn, which has the same model
with faster kernels: with `import gdn.hf` that package serves and this file is not read.

SPDX-License-Identifier: Apache-2.0
"""
'''


@cache
def bundle() -> str:
    """The source of MODELING_FILE. Raises ValueError if two modules define one name, which one file cannot hold."""
    wanted: dict[str, set[str]] = {}
    externals: set[_Import] = set()
    todo = list(_ROOTS)
    while todo:
        module, name = _definer(*todo.pop())
        if name in wanted.setdefault(module, set()):
            continue
        wanted[module].add(name)
        parts = _parts(module)
        for used in _names(parts.text(name)):
            if used in parts.definitions:
                todo.append((module, used))
            elif used in parts.imports:
                source, original = parts.imports[used]
                if source.startswith("gdn."):
                    todo.append((source, original or used))
                else:
                    externals.add((source, original, used))
    _refuse_collisions(wanted)
    order: list[str] = []
    for module in sorted(wanted):
        _visit(module, order)
    blocks = [
        _parts(module).text(name) for module in order for name in _parts(module).definitions if name in wanted.get(module, ())
    ]
    return "\n\n".join([_HEADER + "\n" + _import_lines(externals), *blocks])


def write_bundle(folder: Path) -> None:
    """Put MODELING_FILE into the existing `folder`."""
    (folder / MODELING_FILE).write_text(bundle(), encoding="utf-8")


def load_bundle(folder: Path) -> ModuleType:
    """The module in `folder`/MODELING_FILE, imported from there and from nowhere else."""
    name = "gdn_exported_modeling"
    spec = importlib.util.spec_from_file_location(name, folder / MODELING_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and transformers look their modules up there
    spec.loader.exec_module(module)
    return module


@dataclass
class _Parts:
    """One module's top-level definitions, by name in the order of the file, and imports: alias -> (module, name in it)."""

    module: str
    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def text(self, name: str) -> str:
        """The definition as it is written, with the comment above it, without what is left out."""
        if (self.module, name) in _SUBSTITUTES:
            return _SUBSTITUTES[self.module, name]
        node = self.definitions[name]
        removed: set[int] = set()
        for inner in ast.walk(node):
            if _is_kernel_branch(inner) or _is_method_left_out(node, inner):
                assert isinstance(inner, ast.stmt)
                removed |= set(self._span(inner))
        return "\n".join(self.lines[i] for i in self._span(node) if i not in removed).rstrip() + "\n"

    def _span(self, node: ast.stmt) -> range:
        """Line indices of a statement, its decorators and the comment directly above; of a method also the blank line above."""
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        assert node.end_lineno is not None
        while self.lines[start - 1].lstrip().startswith("#"):
            start -= 1
        if node.col_offset and isinstance(node, ast.FunctionDef) and not self.lines[start - 1].strip():
            start -= 1
        return range(start, node.end_lineno)


def _is_kernel_branch(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Constant) and n.value == "triton" for n in ast.walk(node.test))


def _is_method_left_out(owner: ast.stmt, node: ast.AST) -> bool:
    if not isinstance(owner, ast.ClassDef) or not isinstance(node, ast.FunctionDef):
        return False
    return node in owner.body and node.name in _METHODS_LEFT_OUT.get(owner.name, ())


@cache
def _parts(module: str) -> _Parts:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    parts = _Parts(module, source.splitlines())
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts.definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            parts.definitions[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parts.definitions[node.target.id] = node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                parts.imports[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts.imports[alias.asname or alias.name.split(".")[0]] = (alias.name, None)
    return parts


def _definer(module: str, name: str) -> tuple[str, str]:
    """Where `name` of `module` is defined, through re-exports."""
    while name not in _parts(module).definitions:
        source, original = _parts(module).imports[name]
        module, name = source, original or name
    return module, name


def _visit(module: str, order: list[str]) -> None:
    """Append `module` to `order` after all that it imports."""
    if module in order:
        return
    for source, _ in _parts(module).imports.values():
        if source.split(".")[0] == "gdn":
            _visit(source, order)
    order.append(module)


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def _refuse_collisions(wanted: dict[str, set[str]]) -> None:
    seen: dict[str, str] = {}
    for module, names in wanted.items():
        for name in names:
            if seen.setdefault(name, module) != module:
                raise ValueError(f"{name} is defined in {seen[name]} and in {module}: one file cannot hold both")


def _import_lines(externals: set[_Import]) -> str:
    """Import statements: the standard library's, then the others."""
    groups = []
    for standard in (True, False):
        chosen = sorted((e for e in externals if (e[0].split(".")[0] in sys.stdlib_module_names) == standard), key=str)
        whole = [
            source if source == alias else f"{source} as {alias}" for source, original, alias in chosen if original is None
        ]
        modules = sorted({source for source, original, _ in chosen if original is not None})
        parts = {m: ", ".join(original for source, original, _ in chosen if source == m and original) for m in modules}
        groups.append(
            [f"import {name}" for name in whole] + [f"from {module} import {names}" for module, names in parts.items()]
        )
    return "\n".join([*groups[0], "", *groups[1]]) + "\n"
