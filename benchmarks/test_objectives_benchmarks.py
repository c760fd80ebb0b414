# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Speed of full updates, eager and compiled: ``python -m pytest benchmarks -o addopts=``.

Networks of 4x512, batch 256, observation 28, action 5, ten Euler steps. The environment
variable ``EVOR_BENCHMARK_MATMUL_PRECISION`` (``highest``, ``high`` or ``medium``) goes to
``torch.set_float32_matmul_precision``; the error of a product is recorded beside the time.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import tensordict
import torch
import torchrl

sys.path.insert(0, str(Path(__file__).parent))

import _updates  # noqa: E402
from _updates import Shapes  # noqa: E402

CUDA = torch.cuda.is_available()
SHAPES = Shapes()
COMPILE = [
    False,
    True,
    pytest.param(
        "reduce-overhead", marks=pytest.mark.skipif(not CUDA, reason="CUDA graphs need CUDA")
    ),
]


def processor() -> str:
    """Name of the CPU, the bare architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@pytest.fixture(autouse=True)
def matmul_precision():
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(os.environ.get("EVOR_BENCHMARK_MATMUL_PRECISION", previous))
    yield
    torch.set_float32_matmul_precision(previous)


def measure(benchmark, loss, compile, *, shapes: Shapes = SHAPES, rounds: int = 30) -> None:
    """Times the update and records all that the number depends on."""
    device = torch.device("cuda" if CUDA else "cpu")
    torch.compiler.reset()
    torch.manual_seed(0)
    step = _updates.make_update(loss, shapes, device, compile=compile)

    def update() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    start = time.perf_counter()
    update()
    benchmark.extra_info.update(
        first_call_seconds=time.perf_counter() - start,
        device=torch.cuda.get_device_name() if CUDA else "cpu",
        cpu=processor(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        torchrl=torchrl.__version__,
        tensordict=tensordict.__version__,
        python=platform.python_version(),
        shapes=asdict(shapes),
        matmul_precision=torch.get_float32_matmul_precision(),
        matmul_error_cpu=_updates.matmul_error(),
    )
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(update, rounds=rounds, warmup_rounds=5, iterations=1)
    if CUDA:
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("compile", COMPILE)
@pytest.mark.parametrize("td_target", ["bellman"])
@pytest.mark.parametrize("next_action", ["policy", "dataset"])
def test_evor_speed(benchmark, next_action, td_target, compile):
    loss = _updates.make_evor_loss(SHAPES, next_action=next_action, td_target=td_target)
    measure(benchmark, loss, compile)


@pytest.mark.parametrize("compile", COMPILE)
def test_critic_speed(benchmark, compile):
    measure(benchmark, _updates.make_quantile_loss(SHAPES), compile)


@pytest.mark.parametrize("compile", COMPILE)
def test_qc_speed(benchmark, compile):
    # 8192 rows for each of ten steps: few rounds are enough, and all that a CPU has time for.
    measure(benchmark, _updates.make_qc_loss(SHAPES), compile, rounds=30 if CUDA else 5)


if __name__ == "__main__":
    pytest.main([__file__, "-o", "addopts=", *sys.argv[1:]])
