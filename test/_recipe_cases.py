# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small runs of the recipe's scripts, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
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


def run(script: str, root: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPE / script), f"data.root={root / 'data'}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
