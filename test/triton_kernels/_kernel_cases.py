# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Networks, inputs and the one table of tolerances of the kernel tests."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchrl_evor.triton_kernels import pack_velocity_mlp
from torchrl_evor.triton_kernels.reference import evor_select_reference

# Relative error ||z - z64|| / ||z64|| of the end points against float64, by operand precision.
# The interpreter computes tf32 and tf32x3 products in float32.
TOLERANCE = {
    "float64": 1e-12,
    "float32": 5e-6,
    "ieee": 5e-6,
    "tf32x3": 2e-5,
    "tf32": 4e-3,
    "fp16": 2e-3,
    "bf16": 2e-2,
}
ACTIVATIONS = {
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def make_mlp(in_features, widths, activation="gelu_tanh", layer_norm=False):
    layers = []
    for width in widths:
        layers += [nn.Linear(in_features, width), ACTIVATIONS[activation]()]
        if layer_norm:
            norm = nn.LayerNorm(width, eps=1e-6)
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
            layers.append(norm)
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, 1))


class Case:
    """A network with one set of inputs, and its answer in float64."""

    def __init__(
        self,
        states,
        candidates,
        nodes,
        widths,
        *,
        activation="gelu_tanh",
        layer_norm=True,
        shared=False,
        obs=5,
        act=3,
        num_steps=3,
        solver="euler",
        device="cpu",
        seed=0,
        weighted=False,
        **options,
    ):
        torch.manual_seed(seed)
        self.network = make_mlp(obs + act + 2, widths, activation, layer_norm).to(device)
        self.packed = pack_velocity_mlp(self.network, obs, act)
        self.observation = torch.randn(states, obs, device=device)
        self.action = torch.randn(states, candidates, act, device=device)
        shape = (nodes,) if shared else (states, candidates, nodes)
        self.noise = torch.randn(shape, device=device)
        uniform = torch.rand(states, candidates, device=device).clamp(1e-6, 1 - 1e-6)
        self.gumbel = -(-uniform.log()).log()
        self.options = {"tau_r": 0.7, "tau_q": 0.5, "loc": 2.0, "scale": 3.0} | options
        self.options |= {"num_steps": num_steps, "solver": solver}
        if weighted:
            self.options["log_weights"] = torch.randn(nodes, device=device).log_softmax(-1)

    def inputs(self):
        return self.observation, self.action, self.noise, self.gumbel

    @torch.no_grad()
    def want(self):
        """Action, value, values and returns of the reference in float64."""
        options = {k: v.double() if torch.is_tensor(v) else v for k, v in self.options.items()}
        inputs = [tensor.double() for tensor in self.inputs()]
        return evor_select_reference(copy.deepcopy(self.network).double(), *inputs, **options)


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def assert_matches(got, case, precision):
    """All outputs against float64: values within the table, the choice by its value."""
    chosen, value, q, returns = got
    _, _, want_q, want_returns = case.want()
    tolerance = TOLERANCE[precision]
    assert relative_error(returns, want_returns) <= tolerance
    assert relative_error(q, want_q) <= tolerance
    # A rounded score may swap near-ties, so the choice is checked on the scores as computed.
    tau_q = case.options["tau_q"]
    score = q / tau_q + case.gumbel if tau_q > 0 else q
    index = score.argmax(-1, keepdim=True)
    torch.testing.assert_close(value, q.gather(-1, index).squeeze(-1), rtol=0, atol=0)
    want_action = case.action.gather(
        -2, index[..., None].expand(*index.shape, case.action.shape[-1])
    )
    torch.testing.assert_close(chosen, want_action.squeeze(-2), rtol=0, atol=0)
