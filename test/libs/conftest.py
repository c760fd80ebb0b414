# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Data sets over small files of the official format."""

from __future__ import annotations

import pytest
from _ogbench_cases import FILE, TASK, maze_file

from torchrl_evor.data import (
    OGBenchExperienceReplay,
)


@pytest.fixture
def folder(tmp_path):
    """A user's folder of official files."""
    path = tmp_path / "files"
    path.mkdir()
    maze_file(path / f"{FILE}.npz")
    maze_file(path / f"{FILE[:-3]}-v0-val.npz", lengths=(6,), seed=1)
    return path


@pytest.fixture
def make(tmp_path, folder):
    """Makes the data set from the folder, with a cache of this test's own."""

    def make(dataset_id=TASK, **kwargs):
        return OGBenchExperienceReplay(
            dataset_id, root=tmp_path / "cache", directory=folder, **kwargs
        )

    return make
