# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Makes what begins with ``_`` importable from every test folder, and seeds every test."""

from __future__ import annotations

import pytest
import torch
from _recipe_cases import SMALL, run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def recipe_root(tmp_path_factory):
    """One folder, and so one collection of data, for all runs of the recipe."""
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="session")
def short_run(recipe_root):
    """Four updates of the smallest agent."""
    folder = recipe_root / "short"
    result = run("evor.py", recipe_root, *SMALL, "optim.num_updates=4", f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr[-2000:]
    return result, folder
