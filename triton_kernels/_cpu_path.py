# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The folded maths on a CPU: oneDNN products with fused activations, cache-sized chunks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._chebyshev import interpolated_flow
from ._torch_path import activate, base_of
from .packing import FoldedVelocity

__all__ = ["CPUWeights", "cpu_sample", "cpu_weights"]

# Activations of 512 rows of 512 in float32 take 1 MB: two of them and one weight stay in the cache.
_CHUNK_BYTES = 2**20
# Fewer rows of one state than this share a product with those of other states.
_STATE_ROWS = 64
_ONEDNN_ACTIVATIONS = {
    "gelu_tanh": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
}


class CPUWeights(NamedTuple):
    """Folded weights; ``hidden`` and ``first`` in oneDNN's layout where ``onednn``."""

    folded: FoldedVelocity
    first: Tensor  # [H, act + 2]: the columns of action, z and t
    hidden: tuple[Tensor, ...]
    activation: str
    eps: float
    onednn: bool


def _has_onednn() -> bool:
    # The operator is TorchInductor's, not public: without it the plain products serve.
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def cpu_weights(folded: FoldedVelocity, action_dim: int, activation: str, eps: float) -> CPUWeights:
    """Puts folded weights on the CPU into the layout of their products.

    Args:
        folded (FoldedVelocity): from :func:`fold`, float32 or float64.
        action_dim (int): size of one candidate.
        activation (str): name of the activation.
        eps (float): epsilon of the LayerNorms, negative where there are none.
    """
    actions = folded.first_weight[:, folded.first_weight.shape[1] - action_dim :]
    first = torch.cat([actions, folded.first_z[:, None], folded.first_t[:, None]], 1)
    hidden = folded.weights[:-1]
    onednn = first.dtype == torch.float32 and _has_onednn()
    if onednn:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        rows = _chunk_rows(folded)
        first = reorder(first, rows)
        hidden = tuple(reorder(weight.contiguous(), rows) for weight in hidden)
    return CPUWeights(folded, first, hidden, activation, eps, onednn)


def _chunk_rows(folded: FoldedVelocity) -> int:
    widest = max(bias.shape[0] for bias in (folded.first_bias, *folded.biases))
    # All threads work on one chunk, and each has a cache.
    share = _CHUNK_BYTES // (widest * folded.first_bias.element_size())
    return max(64, share) * torch.get_num_threads()


def _layer(weights: CPUWeights, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Activation of a linear map."""
    if weights.onednn:
        options = _ONEDNN_ACTIVATIONS[weights.activation]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *options)
    return activate(F.linear(x, weight, bias), weights.activation)


def _normalized(weights: CPUWeights, g: Tensor) -> Tensor:
    # Scale and shift of the LayerNorm are in the next weight.
    return g if weights.eps < 0 else F.layer_norm(g, g.shape[-1:], eps=weights.eps)


def _after_first(weights: CPUWeights, g: Tensor) -> Tensor:
    """Velocities ``[R]`` from the activations ``[R, H]`` of the first layer."""
    for weight, bias in zip(weights.hidden, weights.folded.biases):
        g = _layer(weights, _normalized(weights, g), weight, bias)
    head, bias = weights.folded.weights[-1], weights.folded.biases[-1]
    return F.linear(_normalized(weights, g), head, bias).squeeze(-1)


class _OneState:
    """Velocity at some candidates of one state: the state is in the bias of the first layer."""

    def __init__(self, weights: CPUWeights, bias: Tensor, action: Tensor):
        self.weights, self.bias, self.action = weights, bias, action
        self.inputs = action.new_empty(0, 0, action.shape[-1] + 2)

    def __call__(self, z: Tensor, time: Tensor | float) -> Tensor:
        """Velocity at ``z`` ``[P, M]``; ``time`` broadcasts against it."""
        if self.inputs.shape[:2] != z.shape:
            self.inputs = z.new_empty(*z.shape, self.action.shape[-1] + 2)
            self.inputs[..., :-2] = self.action.unsqueeze(1)
        self.inputs[..., -2] = z
        self.inputs[..., -1] = time
        rows = self.inputs.flatten(0, 1)
        first = _layer(self.weights, rows, self.weights.first, self.bias)
        return _after_first(self.weights, first).view_as(z)

    def subset(self, index: Tensor | slice) -> _OneState:
        return _OneState(self.weights, self.bias, self.action[index])


class _ManyStates:
    """Velocity at candidates of several states, whose shares in the first layer are given."""

    def __init__(self, weights: CPUWeights, base: Tensor):
        self.weights, self.base = weights, base  # [P, H]

    def __call__(self, z: Tensor, time: Tensor | float) -> Tensor:
        """Velocity at ``z`` ``[P, M]``; ``time`` broadcasts against it."""
        folded = self.weights.folded
        x = torch.addcmul(self.base.unsqueeze(1), z.unsqueeze(-1), folded.first_z)
        time = torch.as_tensor(time, dtype=z.dtype).unsqueeze(-1)
        x = torch.addcmul(x, time, folded.first_t).flatten(0, 1)
        return _after_first(self.weights, activate(x, self.weights.activation)).view_as(z)

    def subset(self, index: Tensor | slice) -> _ManyStates:
        return _ManyStates(self.weights, self.base[index])


def _velocities(weights: CPUWeights, observation: Tensor, action: Tensor, num_nodes: int):
    """Groups of candidates, each with its velocity: ``(state-major slice, velocity)``."""
    states, candidates = action.shape[:2]
    folded, obs_dim = weights.folded, observation.shape[-1]
    # Of many nodes, grids for interpolation take about as many rows per candidate as 16.
    size = max(1, _chunk_rows(folded) // min(num_nodes, 16))
    if states > 1 and candidates * num_nodes < _STATE_ROWS:
        base = base_of(folded, observation, action).flatten(0, 1)
        for start in range(0, states * candidates, size):
            chunk = slice(start, min(start + size, states * candidates))
            yield chunk, _ManyStates(weights, base[chunk])
        return
    biases = F.linear(observation, folded.first_weight[:, :obs_dim], folded.first_bias)
    for state in range(states):
        for start in range(0, candidates, size):
            stop = min(start + size, candidates)
            chunk = slice(state * candidates + start, state * candidates + stop)
            yield chunk, _OneState(weights, biases[state], action[state, start:stop])


def _euler(velocity, noise: Tensor, num_steps: int, size: int) -> Tensor:
    """End points from ``noise`` ``[P, N]``, for ``size`` candidates at a time."""
    parts = []
    for start in range(0, len(noise), size):
        chunk = slice(start, start + size)
        some, z = velocity if size >= len(noise) else velocity.subset(chunk), noise[chunk]
        for k in range(num_steps):
            z = z + some(z, k / num_steps) / num_steps
        parts.append(z)
    return torch.cat(parts)


def cpu_sample(
    weights: CPUWeights,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    num_steps: int,
    tolerance: float = 0.0,
) -> Tensor:
    """End points of the flow.

    Args:
        weights (CPUWeights): from :func:`cpu_weights`.
        observation (Tensor): ``[S, obs]``.
        action (Tensor): ``[S, P, act]``.
        noise (Tensor): ``[N]`` or ``[S, P, N]``.
        num_steps (int): Euler steps.
        tolerance (float): relative error up to which the velocity may be interpolated; 0 evaluates
            it at every node and step.

    Returns:
        Tensor: ``[S, P, N]``.
    """
    shape = (*action.shape[:2], noise.shape[-1])
    noise = noise.to(action.dtype).expand(shape).flatten(0, 1)
    z = torch.empty(noise.shape, dtype=noise.dtype)
    size = max(1, _chunk_rows(weights.folded) // shape[-1])
    for chunk, velocity in _velocities(weights, observation, action, shape[-1]):
        if tolerance == 0:
            z[chunk] = _euler(velocity, noise[chunk], num_steps, size)
            continue
        z[chunk], left = interpolated_flow(velocity, noise[chunk], num_steps, tolerance)
        if len(left):
            some = velocity if len(left) == len(z[chunk]) else velocity.subset(left)
            z[chunk][left] = _euler(some, noise[chunk][left], num_steps, size)
    return z.view(shape)
