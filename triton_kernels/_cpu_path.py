# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The folded maths on a CPU: oneDNN products with fused activations, cache-sized chunks of rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._chebyshev import interpolated_flow
from ._steps import Steps
from ._torch_path import base_of
from .packing import FoldedVelocity, activate

__all__ = ["CPUWeights", "cpu_sample", "cpu_weights"]

# Activations of 512 rows of 512 in float32 take 1 MB: two of them and one weight stay in the cache.
_CHUNK_BYTES = 2**20
# Fewer rows of one state than this share a product with those of other states.
_STATE_ROWS = 64
# Units of each layer whose smoothness is looked at.
_PROBED_UNITS = 64
_GATE = 2 * math.sqrt(2 / math.pi)
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
    # The operator is TorchInductor's, not public: without it the plain products serve. They are
    # twice as slow on AMD processors with AVX-512, and faster by a half without AVX-512.
    return (
        "AVX512" in torch.backends.cpu.get_cpu_capability()
        and torch.backends.mkldnn.is_available()
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


def _layer(
    weights: CPUWeights, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = ""
) -> Tensor:
    """Activation of a linear map; ``None`` leaves it out."""
    name = weights.activation if activation == "" else activation
    if weights.onednn:
        options = ("none", [], "") if name is None else _ONEDNN_ACTIVATIONS[name]
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *options)
    x = F.linear(x, weight, bias)
    return x if name is None else _activate_(x, name)


def _activate_(x: Tensor, activation: str) -> Tensor:
    """Activation, in place where that is faster."""
    if activation != "gelu_tanh":
        return activate(x, activation)
    # x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): a sigmoid takes a quarter of a tanh's time.
    gate = (x * x).mul_(0.044715 * _GATE).add_(_GATE).mul_(x).sigmoid_()
    return x.mul_(gate)


def _normalized(weights: CPUWeights, g: Tensor) -> Tensor:
    """LayerNorm without scale and shift, which are in the next weight; overwrites ``g``."""
    if weights.eps < 0:
        return g
    # Half the time of F.layer_norm.
    g.sub_(g.mean(-1, keepdim=True))
    square = torch.linalg.vector_norm(g, dim=-1, keepdim=True).square_()
    return g.mul_(square.div_(g.shape[-1]).add_(weights.eps).rsqrt_())


def _between(weights: CPUWeights, x: Tensor, mapping: Tensor) -> Tensor:
    """Activations at other points ``[M' * P, H]`` from pre-activations ``[M * P, H]``."""
    points = x.view(mapping.shape[1], -1)
    return _layer(weights, mapping, points.t(), None).view(-1, x.shape[-1])


class _Velocity:
    """What velocities of one and of several states share: all but the first layer."""

    def __init__(self, weights: CPUWeights):
        self.weights = weights
        self.num_products = len(weights.hidden)

    def _head(self, g: Tensor) -> Tensor:
        head, bias = self.weights.folded.weights[-1], self.weights.folded.biases[-1]
        return F.linear(_normalized(self.weights, g), head, bias)

    def __call__(
        self, z: Tensor, time: Tensor | float, maps: tuple[Tensor | None, ...] = ()
    ) -> Tensor:
        """Velocity at ``z`` ``[M, P]``, as in :class:`~._chebyshev.ScalarVelocity`."""
        points = max([len(z), *(len(mapping) for mapping in maps if mapping is not None)])
        size = max(1, _chunk_rows(self.weights.folded) // points)
        if not maps or z.shape[1] <= size:
            return self._through(z, time, maps)
        # Larger results would come from fresh pages each time: a tenth of a decision.
        size = math.ceil(z.shape[1] / math.ceil(z.shape[1] / size))
        chunks = [slice(start, start + size) for start in range(0, z.shape[1], size)]
        return torch.cat([self.subset(c)._through(z[:, c], time, maps) for c in chunks], 1)

    def _through(self, z: Tensor, time: Tensor | float, maps: tuple[Tensor | None, ...]) -> Tensor:
        weights, g = self.weights, self.first(z, time)
        for index, (weight, bias) in enumerate(zip(weights.hidden, weights.folded.biases)):
            mapping = maps[index] if maps else None
            activation = "" if mapping is None else None
            g = _layer(weights, _normalized(weights, g), weight, bias, activation)
            if mapping is not None:
                g = _between(weights, g, mapping)
        return self._head(g).view(-1, z.shape[1])

    def layers(self, z: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Velocity ``[M, P]`` and some pre-activations of each product, ``[M, P, U]``."""
        weights, g, found = self.weights, self.first(z, time), []
        for weight, bias in zip(weights.hidden, weights.folded.biases):
            x = _layer(weights, _normalized(weights, g), weight, bias, None)
            found.append(x[:, :: max(1, x.shape[-1] // _PROBED_UNITS)].unflatten(0, z.shape))
            g = activate(x, weights.activation)
        return self._head(g).view_as(z), found


class _OneState(_Velocity):
    """Velocity at some candidates of one state: the state is in the bias of the first layer."""

    def __init__(self, weights: CPUWeights, bias: Tensor, action: Tensor):
        super().__init__(weights)
        self.bias, self.action = bias, action
        self.inputs = action.new_empty(0, 0, action.shape[-1] + 2)

    def first(self, z: Tensor, time: Tensor | float) -> Tensor:
        if self.inputs.shape[:2] != z.shape:
            self.inputs = z.new_empty(*z.shape, self.action.shape[-1] + 2)
            self.inputs[..., :-2] = self.action
        self.inputs[..., -2] = z
        self.inputs[..., -1] = time
        return _layer(self.weights, self.inputs.flatten(0, 1), self.weights.first, self.bias)

    def subset(self, index: Tensor | slice) -> _OneState:
        return _OneState(self.weights, self.bias, self.action[index])


class _ManyStates(_Velocity):
    """Velocity at candidates of several states, whose shares in the first layer are given."""

    def __init__(self, weights: CPUWeights, base: Tensor):
        super().__init__(weights)
        self.base = base  # [P, H]

    def first(self, z: Tensor, time: Tensor | float) -> Tensor:
        folded = self.weights.folded
        x = torch.addcmul(self.base, z.unsqueeze(-1), folded.first_z)
        time = torch.as_tensor(time, dtype=z.dtype).unsqueeze(-1)
        x = torch.addcmul(x, time, folded.first_t).flatten(0, 1)
        return _activate_(x, self.weights.activation)

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


def _integrate(velocity, noise: Tensor, steps: Steps, size: int) -> Tensor:
    """End points from ``noise`` ``[N, P]``, for ``size`` candidates at a time."""
    parts = []
    for first in range(0, noise.shape[1], size):
        chunk = slice(first, first + size)
        whole = size >= noise.shape[1]
        some = velocity if whole else velocity.subset(chunk)
        start = z = noise[:, chunk]
        for k in range(steps.num):
            start, z = steps.move(start, some(z, k / steps.num), k)
        parts.append(z)
    return torch.cat(parts, 1)


def cpu_sample(
    weights: CPUWeights,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    steps: Steps,
    tolerance: float = 0.0,
) -> Tensor:
    """End points of the flow.

    Args:
        weights (CPUWeights): from :func:`cpu_weights`.
        observation (Tensor): ``[S, obs]``.
        action (Tensor): ``[S, P, act]``.
        noise (Tensor): ``[N]`` or ``[S, P, N]``.
        steps (Steps): evaluations of the velocity.
        tolerance (float): relative error up to which the velocity may be interpolated; 0 evaluates
            it at every node and step.

    Returns:
        Tensor: ``[S, P, N]``.
    """
    shape = (*action.shape[:2], noise.shape[-1])
    noise = noise.to(action.dtype).expand(shape).flatten(0, 1).t()
    z = torch.empty(noise.shape[::-1], dtype=noise.dtype)
    size = max(1, _chunk_rows(weights.folded) // shape[-1])
    for chunk, velocity in _velocities(weights, observation, action, shape[-1]):
        start = noise[:, chunk].contiguous()
        if tolerance == 0:
            z[chunk] = _integrate(velocity, start, steps, size).t()
            continue
        ends, left = interpolated_flow(velocity, start, steps, tolerance)
        if len(left):
            some = velocity if len(left) == len(z[chunk]) else velocity.subset(left)
            ends[:, left] = _integrate(some, start[:, left], steps, size)
        z[chunk] = ends.t()
    return z.view(shape)
