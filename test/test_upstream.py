# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The package as a part of TorchRL: its files in a copy of the installed TorchRL, each at its path.

Where TorchRL has a file of that name, ours goes to its end. Nothing but the package's name changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchrl

ROOT = Path(__file__).parents[1]
FUTURE = "from __future__ import annotations\n"
EXPORTS = ROOT / "torchrl_evor" / "__init__.py"


def _renamed(path: Path) -> str:
    # Tests take names from the top of the package, which TorchRL has in its parts.
    text = re.sub(r"from torchrl_evor import", "from exported import", path.read_text())
    return text.replace("torchrl_evor", "torchrl")


def _place(path: Path, target: Path) -> None:
    text = _renamed(path)
    if target.exists():
        before = target.read_text()
        if "__all__" in before:
            text = text.replace("__all__ = [", "__all__ += [")
        text = before + "\n\n" + text.replace(FUTURE, "")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A folder with TorchRL, this package within it, and the tests."""
    folder = tmp_path_factory.mktemp("upstream")
    unread = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(torchrl.__file__).parent, folder / "torchrl", ignore=unread)
    for path in sorted((ROOT / "torchrl_evor").rglob("*.py")):
        if path != EXPORTS:
            _place(path, folder / "torchrl" / path.relative_to(ROOT / "torchrl_evor"))
    for path in sorted((ROOT / "triton_kernels").glob("*.py")):
        _place(path, folder / "torchrl" / "triton_kernels" / path.name)
    for path in sorted((ROOT / "test").rglob("*.py")):
        _place(path, folder / "test" / path.relative_to(ROOT / "test"))
    _place(EXPORTS, folder / "exported.py")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def _run(merged: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(merged)}
    done = subprocess.run(
        [sys.executable, *command], cwd=merged, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


def test_files_shared_with_torchrl():
    """Files of our name in TorchRL, which a reviewer will see changed rather than added."""
    host = Path(torchrl.__file__).parent
    ours = (path.relative_to(EXPORTS.parent) for path in EXPORTS.parent.rglob("*.py"))
    shared = {str(p) for p in ours if p.name != "__init__.py" and (host / p).exists()}
    configs = {"common.py", "data.py", "modules.py", "objectives.py", "trainers.py"}
    assert shared == {
        "modules/functional.py",
        "modules/tensordict_module/actors.py",
        *(f"trainers/algorithms/configs/{name}" for name in configs),
    }


def test_imports(merged):
    """No circle of imports: ours name the modules where TorchRL defines things."""
    lines = "import exported, torchrl, torchrl.trainers.algorithms.configs, torchrl.triton_kernels"
    print_names = f"{lines}; print(torchrl.__file__, exported.EVORLoss.__module__)"
    found, module = _run(merged, "-c", print_names).split()
    assert Path(found) == merged / "torchrl" / "__init__.py"
    assert module == "torchrl.objectives.evor"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["modules", "objectives", "trainers", "record", "libs"])
def test_tests_pass(merged, folder):
    # Left out: what runs the scripts of this repository, and names at the top of the package.
    chosen = "not TestCommand and not fields_are_public"
    out = _run(merged, "-m", "pytest", "-q", "-x", "-W", "ignore", f"test/{folder}", "-k", chosen)
    assert " passed" in out


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
