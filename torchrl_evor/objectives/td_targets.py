# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Temporal-difference targets of the law of the reward-to-go, as functions of tensors.

Each takes what one transition and the next law give and returns a point on the
path of the return with the velocity to be fitted there. Flow time runs from 0
(noise) to 1 (data).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_evor.modules.functional import Velocity, interpolate

__all__ = [
    "TD_TARGETS",
    "bellman_target",
    "confine_velocity",
    "coupled_target",
    "sample_target",
    "velocity_target",
]


def sample_target(
    noise: Tensor,
    time: Tensor,
    reward: Tensor,
    discount: Tensor,
    next_return: Tensor,
    next_velocity: Velocity,
) -> tuple[Tensor, Tensor]:
    r"""Flow matching on the bootstrapped sample :math:`r + \gamma_e z'`.

    Unbiased, of high variance. Arguments and result as in :func:`bellman_target`.
    """
    backup = reward + discount * next_return
    return interpolate(noise, backup, time), backup - noise


def velocity_target(
    noise: Tensor,
    time: Tensor,
    reward: Tensor,
    discount: Tensor,
    next_return: Tensor,
    next_velocity: Velocity,
) -> tuple[Tensor, Tensor]:
    r"""Bellman backup of the next velocity at the same point, as publicly summarised.

    Without a term in the noise each sample keeps its own: the mean of the law
    is right and the law itself is not. Kept for comparison. Arguments and
    result as in :func:`bellman_target`.
    """
    point = interpolate(noise, reward + discount * next_return, time)
    return point, reward + discount * next_velocity(point, time)


def coupled_target(
    noise: Tensor,
    time: Tensor,
    reward: Tensor,
    discount: Tensor,
    next_return: Tensor,
    next_velocity: Velocity,
) -> tuple[Tensor, Tensor]:
    r"""Path-coupled form: both paths start from the same noise.

    Compare PCBF, `arXiv:2605.08253 <https://arxiv.org/abs/2605.08253>`_. Its
    bias is of order :math:`1 - \gamma_e`. Arguments and result as in
    :func:`bellman_target`.
    """
    point = interpolate(noise, reward + discount * next_return, time)
    next_point = interpolate(noise, next_return, time)
    target = reward + discount * next_velocity(next_point, time) - (1 - discount) * noise
    return point, target


def bellman_target(
    noise: Tensor,
    time: Tensor,
    reward: Tensor,
    discount: Tensor,
    next_return: Tensor,
    next_velocity: Velocity,
) -> tuple[Tensor, Tensor]:
    r"""Bellman equation of the velocity field itself.

    With :math:`Z = r + \gamma_e Z'` and one noise for both paths,
    :math:`Z_t = t r + c Z'_{t'}` where :math:`c = 1 - t + \gamma_e t` and
    :math:`t' = \gamma_e t / c`. Given :math:`(r, x', a')` this is a bijection
    between the two paths, so that the posterior means obey
    :math:`E[Z|Z_t] = r + \gamma_e E[Z'|Z'_{t'}]`, and in velocities

    .. math:: s(Z_t, t) = r - (1 - \gamma_e) Z'_{t'} + (\gamma_e / c)\, s'(Z'_{t'}, t').

    It is the conditional expectation of :func:`sample_target`: the same fixed
    point with less variance. Exact for laws: with the closed-form field of
    :math:`Z'` it returns the closed-form field of :math:`Z`.

    Args:
        noise (Tensor): standard-normal noise of the path, ``[*B, 1]``.
        time (Tensor): flow time in ``[0, 1]``, ``[*B, 1]``.
        reward (Tensor): reward (n-step: discounted sum), ``[*B, 1]``.
        discount (Tensor): effective discount, 0 at terminals, ``[*B, 1]``.
        next_return (Tensor): sample of the next law, ``[*B, 1]``.
        next_velocity (Callable): velocity field of the next law,
            ``(z [*B, 1], time [*B, 1]) -> [*B, 1]``.

    Returns:
        tuple of Tensor: the point at which the field is fitted and its target
        velocity there, each ``[*B, 1]``.

    Examples:
        >>> import torch
        >>> ones = torch.ones(1)
        >>> point, target = bellman_target(
        ...     0 * ones, 0.5 * ones, 2 * ones, 0 * ones, 7 * ones, lambda z, t: z
        ... )
        >>> point, target  # a terminal: half-way to the reward, at full speed
        (tensor([1.]), tensor([2.]))
    """
    contraction = 1 - time + discount * time
    # Zero only at a terminal at time 1, where next_time is 0 for any divisor.
    divisor = contraction.clamp_min(torch.finfo(time.dtype).tiny)
    next_time = discount * time / divisor
    next_point = interpolate(noise, next_return, next_time)
    target = (
        reward
        - (1 - discount) * next_point
        + discount / divisor * next_velocity(next_point, next_time)
    )
    return time * reward + contraction * next_point, target


def confine_velocity(
    velocity: Tensor, point: Tensor, time: Tensor, low: float | Tensor, high: float | Tensor
) -> Tensor:
    r"""The nearest velocity that leads to an end between two bounds.

    A straight path from :math:`z_t` with velocity :math:`v` ends at
    :math:`z_t + (1 - t) v`, which for the exact field is the posterior mean
    :math:`E[Z|Z_t]`. It lies within any bounds of :math:`Z`, so that the exact
    field is left as it is; what a network extrapolates beyond them is cut off.

    Args:
        velocity (Tensor): ``[*B, 1]``.
        point (Tensor): point on the path, ``[*B, 1]``.
        time (Tensor): flow time in ``[0, 1]``, ``[*B, 1]``.
        low (float or Tensor): least end, ``-inf`` for none; broadcasts.
        high (float or Tensor): greatest end, ``inf`` for none; broadcasts.

    Returns:
        Tensor: ``[*B, 1]``.

    Examples:
        >>> import torch
        >>> half, velocity = torch.full((1,), 0.5), torch.full((1,), 9.0)
        >>> confine_velocity(velocity, half, half, -1.0, 1.0)  # ends at 1 instead of 5
        tensor([1.])
    """
    # At time 1 a path is at its end, and any velocity will do that is no NaN.
    left = (1 - time).clamp_min(torch.finfo(time.dtype).tiny)
    return torch.minimum(torch.maximum(velocity, (low - point) / left), (high - point) / left)


TD_TARGETS = {
    "bellman": bellman_target,
    "sample": sample_target,
    "coupled": coupled_target,
    "velocity": velocity_target,
}
