# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The folded maths in PyTorch: any device, any floating dtype, traceable by ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._steps import Steps
from .packing import FoldedVelocity, activate

__all__ = ["folded_sample"]

# Activations in flight: large enough for the widest device, about four of them are alive.
_CHUNK_BYTES = 2**28


def base_of(folded: FoldedVelocity, observation: Tensor, action: Tensor) -> Tensor:
    """Share of observation and action in the first pre-activation, ``[S, P, H]``."""
    obs_dim = observation.shape[-1]
    shared = F.linear(observation, folded.first_weight[:, :obs_dim], folded.first_bias)
    return shared.unsqueeze(1) + F.linear(action, folded.first_weight[:, obs_dim:])


def _next_layer(g: Tensor, folded: FoldedVelocity, index: int, eps: float) -> Tensor:
    """Pre-activation of the layer after ``g``, in the dtype of the bias."""
    weight, bias = folded.weights[index], folded.biases[index]
    if eps >= 0:
        # Scale and shift of the LayerNorm are in the weight and the bias.
        g = F.layer_norm(g, g.shape[-1:], eps=eps)
    return F.linear(g.to(weight.dtype), weight, bias.to(weight.dtype)).to(bias.dtype)


def folded_sample(
    folded: FoldedVelocity,
    activation: str,
    eps: float,
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    steps: Steps,
) -> Tensor:
    """End points of the flow.

    Args:
        folded (FoldedVelocity): from :func:`fold`; the dtype of its ``weights`` is that of the
            operands.
        activation (str): name of the activation.
        eps (float): epsilon of the LayerNorms, negative where there are none.
        observation (Tensor): ``[S, obs]``.
        action (Tensor): ``[S, P, act]``.
        noise (Tensor): ``[N]`` or ``[S, P, N]``.
        steps (Steps): evaluations of the velocity.

    Returns:
        Tensor: ``[S, P, N]``.
    """
    num_nodes = noise.shape[-1]
    base = base_of(folded, observation, action).flatten(0, 1)
    # Half-precision networks are integrated in float32.
    wide = torch.promote_types(base.dtype, torch.float32)
    noise = noise.to(wide).expand(*action.shape[:2], num_nodes).flatten(0, 1)

    def ends(base: Tensor, start: Tensor) -> Tensor:
        z, base = start, base.unsqueeze(1)
        for k in range(steps.num):
            x = base + z.unsqueeze(-1) * folded.first_z + (k / steps.num) * folded.first_t
            for index in range(len(folded.weights)):
                x = _next_layer(activate(x, activation), folded, index, eps)
            start, z = steps.move(start, x.squeeze(-1), k)
        return z

    widest = max(bias.shape[0] for bias in (folded.first_bias, *folded.biases))
    size = max(1, _CHUNK_BYTES // (num_nodes * widest * base.element_size()))
    # Pairs of state and candidate in pieces, so that memory does not grow with their number.
    pieces = [ends(*pair) for pair in zip(base.split(size), noise.split(size))]
    return torch.cat(pieces).view(*action.shape[:2], num_nodes)
