# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Who may import whom, read from the sources, and what an import may ask to be installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The folder triton_kernels is imported as torchrl_evor.triton_kernels (setup.py maps it).
FOLDERS = {
    "torchrl_evor": ROOT / "torchrl_evor",
    "torchrl_evor.triton_kernels": ROOT / "triton_kernels",
}
EXTRAS = {
    "gymnasium",
    "hydra",
    "matplotlib",
    "mujoco",
    "ogbench",
    "omegaconf",
    "scipy",
    "tensorboard",
    "tqdm",
    "triton",
    "wandb",
}

P = "torchrl_evor"
CONFIGS = f"{P}.trainers.algorithms.configs"
# Part of the project -> the parts that it may import besides itself. The longest name decides.
MAY_IMPORT = {
    f"{P}.modules.functional": [],
    f"{P}.modules.models": [f"{P}.modules.functional"],
    f"{P}.modules.models.return_flow": [
        f"{P}.modules.functional",
        f"{P}.modules.models",
        f"{P}.triton_kernels",
    ],
    f"{P}.modules.tensordict_module": [f"{P}.modules.functional", f"{P}.modules.models"],
    f"{P}.modules": [],
    f"{P}.objectives": [f"{P}.modules"],
    f"{P}.data": [],
    f"{P}.envs": [],
    f"{P}.record": [],
    f"{P}.triton_kernels": [],
    f"{P}.trainers": [f"{P}.objectives", f"{P}.modules", f"{P}.data", f"{P}.envs", f"{P}.record"],
    CONFIGS: [f"{P}.trainers", f"{P}.objectives", f"{P}.modules", f"{P}.data", f"{P}.envs"],
    P: [f"{P}"],
}
# Parts that keep to few libraries, whatever the environment has installed.
ONLY_LIBRARIES = {
    f"{P}.modules.functional": {"torch"},
    f"{P}.record": {"numpy"},
    f"{P}.triton_kernels": {"torch", "triton"},
}


class Import(NamedTuple):
    source: str  # dotted name of the importing module
    target: str  # dotted name of what is imported
    lazy: bool  # inside a function
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_names() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


def read_imports(name: str, path: Path, text: str | None = None) -> list[Import]:
    """All imports of a file, type checking included; relative ones made absolute."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base]).rstrip(".")
            # "from package import module" names a module, if there is one of that name
            targets = [
                f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names
            ]
        found.extend(Import(name, target, lazy, node.lineno) for target in targets)
        inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(text if text is not None else path.read_text()), lazy=False)
    return found


MODULES = {name for name, _ in module_names()}
IMPORTS = [entry for name, path in module_names() for entry in read_imports(name, path)]


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def part_of(name: str) -> str:
    return max((part for part in MAY_IMPORT if inside(name, part)), key=len)


def breaks_the_picture(entry: Import) -> bool:
    if not inside(entry.target, P):
        return False
    part = part_of(entry.source)
    is_init = entry.source == part and part != f"{P}.modules.models.return_flow"
    # A package's __init__ gathers the names of what lies below it.
    if inside(entry.target, part) and (part != P or is_init):
        return False
    return not any(inside(entry.target, allowed) for allowed in MAY_IMPORT[part])


def test_the_sources_are_found():
    assert f"{P}.objectives.evor" in MODULES and f"{P}.triton_kernels" in MODULES
    assert len(IMPORTS) > 50


def test_imports_run_one_way():
    assert [str(entry) for entry in IMPORTS if breaks_the_picture(entry)] == []


def test_parts_that_keep_to_few_libraries():
    wrong = []
    for entry in IMPORTS:
        library = entry.target.split(".")[0]
        if library == P or library in sys.stdlib_module_names:
            continue
        for part, libraries in ONLY_LIBRARIES.items():
            if inside(entry.source, part) and library not in libraries:
                wrong.append(str(entry))
    assert wrong == []


def test_the_kernels_are_imported_lazily():
    seam = [e for e in IMPORTS if inside(e.target, f"{P}.triton_kernels")]
    outside = [e for e in seam if not inside(e.source, f"{P}.triton_kernels")]
    assert [str(e) for e in outside if not e.lazy] == []


def test_nothing_imports_tests_recipes_or_benchmarks():
    forbidden = {"test", "tests", "conftest", "benchmarks", "_known_laws", "utils"}
    assert [str(e) for e in IMPORTS if e.target.split(".")[0] in forbidden] == []


@pytest.mark.parametrize(
    "source, statement, wrong",
    [
        (f"{P}.modules.models.flow", "from torchrl_evor.objectives import EVORLoss", True),
        (f"{P}.modules.models.flow", "from .return_flow import ReturnFlow", False),
        (f"{P}.modules.models.flow", "from ... import objectives", True),
        (f"{P}.modules.functional", "from torchrl_evor.modules.models import flow", True),
        (f"{P}.modules.tensordict_module.actors", "import torchrl_evor.triton_kernels", True),
        (f"{P}.modules.models.return_flow", "import torchrl_evor.triton_kernels", False),
        (f"{P}.envs.libs.ogbench", "import torchrl_evor.modules", True),
        (f"{P}.data.datasets.ogbench", "def f():\n  from torchrl_evor import envs", True),
        (f"{P}.objectives.evor", "from torchrl_evor.modules import ReturnFlow", False),
        (f"{P}.objectives.evor", "from torchrl_evor import ReturnFlow", True),
        (f"{P}.objectives.evor", "import torchrl_evor.trainers", True),
        (f"{P}.trainers.algorithms.evor", "import torchrl_evor.trainers.algorithms.configs", False),
    ],
)
def test_the_reader_itself(source, statement, wrong):
    """The checks above can fail: each rule, shown on an import that breaks or keeps it."""
    entries = read_imports(source, Path("module.py"), statement)
    assert len(entries) == 1
    assert breaks_the_picture(entries[0]) is wrong


def test_import_without_extras():
    """torch, tensordict and torchrl are enough: every extra is made to look uninstalled."""
    packages = [*FOLDERS, f"{P}.envs", f"{P}.data", f"{P}.record"]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({sorted(EXTRAS)}))  # None: import fails, find_spec finds nothing
for package in {packages}:
    importlib.import_module(package)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    pytest.main([__file__])
