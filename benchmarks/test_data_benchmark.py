# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A million transitions of cube-single's size: conversion, laying windows, sampling.

    pytest benchmarks/test_data_benchmark.py -o addopts=

TorchRL's own buffer over single transitions of the same data is measured beside ours.
"""

from __future__ import annotations

import numpy as np
import pytest
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_evor.data import WindowStorage, ogbench_arrays_to_tensordict

OBS, ACT, EPISODES, LENGTH, ROWS = 28, 5, 1000, 1001, 256


def make_arrays():
    rng, rows = np.random.default_rng(0), EPISODES * LENGTH
    return {
        "observations": rng.normal(size=(rows, OBS)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, ACT)).astype(np.float32),
        "terminals": (np.arange(rows) % LENGTH == LENGTH - 1).astype(np.float32),
        "rewards": -np.ones(rows, np.float32),
        "masks": np.ones(rows, np.float32),
    }


@pytest.fixture(scope="module")
def data():
    return ogbench_arrays_to_tensordict(make_arrays())


def test_conversion(benchmark):
    """Arrays of a file to transitions."""
    arrays = make_arrays()
    benchmark.pedantic(lambda: ogbench_arrays_to_tensordict(arrays), rounds=3)


@pytest.mark.parametrize("n_step", [1, 100, 1000])
def test_windows(benchmark, data, n_step):
    """Windows over all transitions, which is what another ``n_step`` costs."""
    benchmark.pedantic(lambda: WindowStorage(data, n_step=n_step), rounds=3)


@pytest.mark.parametrize("storage", ["windows", "torchrl"])
def test_sample(benchmark, data, storage):
    """A batch of 256, of 100-step windows or of TorchRL's single transitions."""
    if storage == "windows":
        storage = WindowStorage(data, n_step=100)
        buffer = TensorDictReplayBuffer(storage=storage, batch_size=ROWS)
    else:
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=ROWS)
        buffer.extend(data)
    buffer.sample()
    benchmark(buffer.sample)
