# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe's scripts: importable, and small runs of them in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
sys.path.insert(0, str(RECIPE))
HAS_EXTRAS = all(
    importlib.util.find_spec(name) is not None
    for name in ("hydra", "ogbench", "matplotlib", "scipy", "tqdm")
)
needs_extras = pytest.mark.skipif(not HAS_EXTRAS, reason="needs the extras [all]")
TASK = "pointmaze-medium-navigate"
SMALL = [
    "data.num_transitions=4000",
    "data.n_step=20",
    "data.batch_size=16",
    "policy.hidden_sizes=[16,16]",
    "value.hidden_sizes=[16,16]",
    "actor.num_candidates=2",
    "actor.num_samples=2",
    "eval.interval=0",
    "eval.final_episodes=1",
    "logger.interval=2",
    "optim.schedule=constant",
    "device=cpu",
]


def run_script(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A script of the recipe in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, str(RECIPE / script), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def check_evor(root: Path, *overrides: str) -> None:
    """What evor.py does with its configuration before any work."""
    import utils
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("config", overrides=[*SMALL, f"data.root={root / 'data'}", *overrides])
    utils.check_config(cfg)


def run(script: str, root: Path, *overrides: str) -> subprocess.CompletedProcess:
    """One over the data of all tests, which lie in ``root``."""
    return run_script(script, root, f"data.root={root / 'data'}", *overrides)
