# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small files of the official format."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

_has_ogbench = importlib.util.find_spec("ogbench") is not None
needs_ogbench = pytest.mark.skipif(not _has_ogbench, reason="ogbench is not installed")
FILE = "pointmaze-medium-navigate-v0"
TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def arrays(lengths=(3, 2), terminals_at=(), seed=0, **replaced):
    """A file of trajectories with ``lengths`` transitions; some rows are terminals (mask 0)."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths) + len(lengths)
    ends = np.cumsum([length + 1 for length in lengths]) - 1
    data = {
        "observations": np.arange(rows, dtype=np.float32)[:, None] + [0.0, 0.5],
        "actions": rng.uniform(-1, 1, (rows, 3)),
        "terminals": np.isin(np.arange(rows), ends),
        "rewards": rng.normal(size=rows),
        "masks": 1.0 - np.isin(np.arange(rows), terminals_at),
    }
    data.update(replaced)
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in data.items()}


def maze_file(path, lengths=(30, 20), seed=0):
    """An official-format pointmaze file; some states are within task 1's goal."""
    raw = arrays(lengths, seed=seed)
    rows = len(raw["terminals"])
    raw["observations"] = np.random.default_rng(seed).uniform(18, 22, (rows, 2)).astype(np.float32)
    raw["qpos"] = raw["observations"]
    raw["qvel"] = np.zeros_like(raw["observations"])
    del raw["rewards"], raw["masks"]
    np.savez_compressed(path, **raw)
    return raw
