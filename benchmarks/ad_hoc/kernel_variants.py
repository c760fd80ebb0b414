# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the benchmarks of the fused path measure: one problem, and the ways to compute it."""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("torchrl") is None:
    # A machine without TorchRL: the kernels need torch and triton only.
    package = types.ModuleType("torchrl_evor")
    package.__path__ = [str(ROOT / "torchrl_evor"), str(ROOT)]
    sys.modules["torchrl_evor"] = package

from torchrl_evor.triton_kernels import (  # noqa: E402
    _config,
    _launch,
    evor_select,
    pack_velocity_mlp,
)
from torchrl_evor.triton_kernels._torch_path import folded_sample  # noqa: E402
from torchrl_evor.triton_kernels.packing import fold  # noqa: E402
from torchrl_evor.triton_kernels.reference import (  # noqa: E402
    evor_select_reference,
    sample_returns_reference,
)

WIDTH, DEPTH, STEPS, OBS, ACT = 512, 4, 10, 28, 5
SCENARIOS = {"S1": (1, 32, 64), "S2": (256, 1, 1), "S3": (50, 32, 64)}
OPTIONS = {"tau_r": 1.0, "tau_q": 0.5, "num_steps": STEPS, "loc": 0.0, "scale": 1.0}
MATMUL = {"fp16": "high", "bf16": "high", "tf32": "high", "fp32": "highest"}
KERNEL_PRECISION = {"fp32": "tf32x3", "fp16": "fp16", "bf16": "bf16", "tf32": "tf32"}
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_network(layer_norm: bool) -> nn.Sequential:
    layers, width = [], OBS + ACT + 2
    for _ in range(DEPTH):
        layers += [nn.Linear(width, WIDTH), nn.GELU(approximate="tanh")]
        layers += [nn.LayerNorm(WIDTH, eps=1e-6)] if layer_norm else []
        width = WIDTH
    layers += [nn.Linear(WIDTH, 1)]
    for layer in layers:
        if isinstance(layer, nn.Linear):  # as in VelocityMLP
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).requires_grad_(False)


class Problem:
    """One scenario: network, fresh random inputs, the answer in float64."""

    def __init__(self, shape, layer_norm=True, device="cuda", stratified=False):
        torch.manual_seed(0)
        self.shape = states, candidates, nodes = shape
        self.rows = states * candidates * nodes
        self.network = make_network(layer_norm).to(device)
        self.packed = pack_velocity_mlp(self.network, OBS, ACT)
        self.observation = torch.randn(states, OBS, device=device)
        self.action = torch.randn(states, candidates, ACT, device=device)
        quantiles = (torch.arange(nodes, device=device, dtype=torch.float64) + 0.5) / nodes
        nodes = torch.special.ndtri(quantiles).float()
        self.noise = nodes if stratified else torch.randn(shape, device=device)
        self.gumbel = -torch.empty(states, candidates, device=device).exponential_().log()
        self.flops = 2 * self.rows * STEPS * (DEPTH - 1) * WIDTH**2

    def inputs(self):
        return self.observation, self.action, self.noise, self.gumbel

    @functools.cached_property
    def want(self):
        network = make_network(any(isinstance(m, nn.LayerNorm) for m in self.network))
        network.load_state_dict(self.network.state_dict())
        inputs = (t.double() for t in (self.observation, self.action, self.noise))
        return sample_returns_reference(network.double().to(self.noise.device), *inputs, STEPS)


def naive(problem: Problem, precision: str):
    """The module as it stands: concat and nn.Sequential, in half precision where asked for."""
    dtype = DTYPE.get(precision, torch.float32)
    network = make_network(any(isinstance(m, nn.LayerNorm) for m in problem.network))
    network.load_state_dict(problem.network.state_dict())
    network = network.to(problem.noise.device, dtype)

    def velocity(inputs):
        return network(inputs.to(dtype)).float()

    def call():
        return evor_select_reference(velocity, *problem.inputs(), **OPTIONS)

    return call


def folded(problem: Problem, precision: str, fresh: bool):
    """The folded maths of the torch path; ``fresh`` folds the weights at every call."""
    dtype = DTYPE.get(precision)
    packed = problem.packed
    kept = fold(packed.tensors(), packed.layer_norm, dtype)

    def call(observation, action, noise, gumbel):
        weights = fold(packed.tensors(), packed.layer_norm, dtype) if fresh else kept
        z = folded_sample(weights, "gelu_tanh", packed.eps, observation, action, noise, STEPS)
        q = torch.logsumexp(z, -1) - math.log(z.shape[-1])
        index = (q / 0.5 + gumbel).argmax(-1, keepdim=True)
        chosen = action.gather(1, index.unsqueeze(-1).expand(-1, -1, ACT)).squeeze(1)
        return chosen, q.gather(1, index), q, z

    return call


def kernel(problem: Problem, precision: str, config, frozen: bool):
    """One configuration of a kernel through the public function."""
    packed = problem.packed.freeze() if frozen else problem.packed
    backend = "triton_layered" if isinstance(config, _launch.LayerConfig) else "triton_loop"

    def call():
        original = _config.choose
        _config.choose = lambda *_: config
        try:
            return evor_select(
                packed,
                *problem.inputs(),
                **OPTIONS,
                backend=backend,
                precision=KERNEL_PRECISION[precision],
                return_samples=True,
            )
        finally:
            _config.choose = original

    return call


def public(problem: Problem, **options):
    """The public function, with live weights and all returns."""

    def call():
        reads = problem.packed, *problem.inputs()
        return evor_select(*reads, **OPTIONS, return_samples=True, **options)

    return call


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


def passes(*arguments: str) -> bool:
    """Whether the parity tests pass; their output is shown if they do not."""
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider"]
    command += ["--confcutdir=test/triton_kernels", "--no-header", "--tb=short", "-rf"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print((done.stdout + done.stderr)[-5000:], flush=True)
    return done.returncode == 0


def parity_tests(device: str) -> bool:
    """Runs the parity tests of one device."""
    folder = "test/triton_kernels"
    if device == "cuda":
        return passes(f"{folder}/test_evor_select_gpu.py", "-m", "gpu")
    return passes(f"{folder}/test_ops.py", f"{folder}/test_cpu_path.py")
