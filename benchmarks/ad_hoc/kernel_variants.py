# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the benchmarks of the fused path measure: one problem, and the ways to compute it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from kernel_path import ROOT  # sorts before the kernels, which it finds
from torch import nn
from torchrl_evor.triton_kernels import (
    _config,
    _launch,
    evor_select,
    pack_velocity_mlp,
    philox_normal,
)
from torchrl_evor.triton_kernels._steps import Steps
from torchrl_evor.triton_kernels._torch_path import folded_sample
from torchrl_evor.triton_kernels.packing import fold
from torchrl_evor.triton_kernels.reference import (
    evor_select_reference,
    sample_returns_reference,
)

WIDTH, DEPTH, STEPS, OBS, ACT = 512, 4, 10, 28, 5
SCENARIOS = {"S1": (1, 32, 64), "S2": (256, 1, 1), "S3": (50, 32, 64)}
OPTIONS = {"tau_r": 1.0, "tau_q": 0.5, "num_steps": STEPS, "loc": 0.0, "scale": 1.0}
MATMUL = {"fp16": "high", "bf16": "high", "tf32": "high", "fp32": "highest"}
KERNEL_PRECISION = {"fp32": "tf32x3", "fp16": "fp16", "bf16": "bf16", "tf32": "tf32"}
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_network(layer_norm: bool, width: int = WIDTH) -> nn.Sequential:
    layers, inputs = [], OBS + ACT + 2
    for _ in range(DEPTH):
        layers += [nn.Linear(inputs, width), nn.GELU(approximate="tanh")]
        layers += [nn.LayerNorm(width, eps=1e-6)] if layer_norm else []
        inputs = width
    layers += [nn.Linear(width, 1)]
    for layer in layers:
        if isinstance(layer, nn.Linear):  # as in VelocityMLP
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).requires_grad_(False)


class Problem:
    """One scenario: network, fresh random inputs, the answer in float64."""

    width, steps = WIDTH, STEPS

    def __init__(self, shape, layer_norm=True, device="cuda", stratified=False):
        torch.manual_seed(0)
        self.shape = states, candidates, nodes = shape
        self.rows = states * candidates * nodes
        self.layer_norm = layer_norm
        self.network = make_network(layer_norm, self.width).to(device)
        self.options = OPTIONS | {"num_steps": self.steps}
        self.packed = pack_velocity_mlp(self.network, OBS, ACT)
        self.observation = torch.randn(states, OBS, device=device)
        self.action = torch.randn(states, candidates, ACT, device=device)
        quantiles = (torch.arange(nodes, device=device, dtype=torch.float64) + 0.5) / nodes
        nodes = torch.special.ndtri(quantiles).float()
        self.noise = nodes if stratified else torch.randn(shape, device=device)
        self.gumbel = -torch.empty(states, candidates, device=device).exponential_().log()
        self.seed = torch.tensor([0, 0], device=device)
        self.flops = 2 * self.rows * self.steps * (DEPTH - 1) * self.width**2

    def inputs(self):
        return self.observation, self.action, self.noise, self.gumbel

    def copy_of_network(self) -> nn.Sequential:
        network = make_network(self.layer_norm, self.width)
        network.load_state_dict(self.network.state_dict())
        return network.to(self.noise.device)

    def _answer(self, noise):
        inputs = (tensor.double() for tensor in (self.observation, self.action, noise))
        return sample_returns_reference(self.copy_of_network().double(), *inputs, self.steps)

    @functools.cached_property
    def want(self):
        return self._answer(self.noise)

    @functools.cached_property
    def want_of_seed(self):
        return self._answer(philox_normal(self.seed, self.shape))


def naive(problem: Problem, precision: str):
    """The module as it stands: concat and nn.Sequential, in half precision where asked for."""
    dtype = DTYPE.get(precision, torch.float32)
    network = problem.copy_of_network().to(dtype)

    def velocity(inputs):
        return network(inputs.to(dtype)).float()

    def call():
        return evor_select_reference(velocity, *problem.inputs(), **problem.options)

    return call


def folded(problem: Problem, precision: str, fresh: bool):
    """The folded maths of the torch path; ``fresh`` folds the weights at every call."""
    dtype = DTYPE.get(precision)
    packed = problem.packed
    kept = fold(packed.tensors(), packed.layer_norm, dtype)

    def call(observation, action, noise, gumbel):
        weights = fold(packed.tensors(), packed.layer_norm, dtype) if fresh else kept
        reads = observation, action, noise, Steps(problem.steps, "euler")
        z = folded_sample(weights, "gelu_tanh", packed.eps, *reads)
        q = torch.logsumexp(z, -1) - math.log(z.shape[-1])
        index = (q / 0.5 + gumbel).argmax(-1, keepdim=True)
        chosen = action.gather(1, index.unsqueeze(-1).expand(-1, -1, ACT)).squeeze(1)
        return chosen, q.gather(1, index), q, z

    return call


@contextlib.contextmanager
def tile(config):
    """Takes one configuration of a kernel; ``None`` leaves the choice to the tables."""
    original = _config.choose
    if config is not None:
        _config.choose = lambda *_: config
    try:
        yield
    finally:
        _config.choose = original


def _fresh(problem: Problem):
    gumbel = -torch.empty_like(problem.gumbel).exponential_().log()
    return problem.observation, problem.action, torch.randn_like(problem.noise), gumbel


def public(problem: Problem, frozen=False, noise="given", config=None, **options):
    """The public function, by default with live weights and all returns.

    ``noise`` is ``"given"``, drawn from a ``"seed"`` in the kernels, or drawn by torch in the call
    (``"randn"``).
    """
    packed = problem.packed.freeze() if frozen else problem.packed
    options = {"return_samples": True} | problem.options | options
    if noise == "seed":
        options |= {"seed": problem.seed, "num_samples": problem.shape[-1]}

    def call():
        reads = _fresh(problem) if noise == "randn" else problem.inputs()
        with tile(config):
            return evor_select(packed, *reads[: 2 if noise == "seed" else 4], **options)

    return call


def kernel(problem: Problem, precision: str, config, frozen: bool, **options):
    """One configuration of a kernel through the public function."""
    design = "triton_layered" if isinstance(config, _launch.LayerConfig) else "triton_loop"
    options = {"backend": design, "precision": KERNEL_PRECISION[precision]} | options
    return public(problem, frozen, config=config, **options)


def graphed(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def _pytest(*arguments: str) -> list[str]:
    # Options of the project name plug-ins that a bare machine does not have.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    return [*command, "--confcutdir=test/triton_kernels", "--no-header", "--tb=short", *arguments]


def passes(*arguments: str, processes: int = 1, seconds: float = 600.0) -> bool:
    """Whether the parity tests pass, dealt out to processes; output is shown if they do not."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    listed = subprocess.run(_pytest("--collect-only", *arguments), **options)
    # Names are relative to pytest's root, which need not be the folder that it runs in.
    files = {Path(name).name: name for name in arguments if name.endswith(".py")}
    found = (line.partition("::") for line in listed.stdout.splitlines() if "::" in line)
    names = [f"{files[Path(file).name]}::{test}" for file, _, test in found]
    if listed.returncode != 0 or not names:
        print(listed.stdout[-5000:], flush=True)
        return False
    shards = [names[start::processes] for start in range(min(processes, len(names)))]
    running = [subprocess.Popen(_pytest("-rf", *shard), **options) for shard in shards]
    deadline = time.monotonic() + seconds
    # All are waited for before the verdict: none may run on while something is measured.
    outcomes = [_outcome(process, deadline) for process in running]
    failed = [shown for code, shown in outcomes if code != 0]
    if failed or not any(" passed" in shown for _, shown in outcomes):
        print((failed or ["No parity test ran."])[0][-5000:], flush=True)
        return False
    return True


def _outcome(process: subprocess.Popen, deadline: float) -> tuple[int, str]:
    try:
        shown, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return 1, process.communicate()[0] + "\nThe parity tests did not end in time."
    return process.returncode, shown


def parity_tests(device: str, seconds: float = 600.0) -> bool:
    """Runs the parity tests of one device."""
    folder = "test/triton_kernels"
    if device == "cuda":
        processes = max(1, min(10, (os.cpu_count() or 2) - 2))
        arguments = f"{folder}/test_evor_select_gpu.py", "-m", "gpu"
        return passes(*arguments, processes=processes, seconds=seconds)
    names = "test_ops.py", "test_cpu_path.py", "test_seeded_noise.py"
    return passes(*(f"{folder}/{name}" for name in names), "-m", "not slow", seconds=seconds)
