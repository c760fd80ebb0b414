# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Plain PyTorch specification of reward-to-go sampling and soft selection.

Slow and obvious on purpose: the faster paths of this package are tested against this file. Every
function of the flow works in any floating dtype, on any device, and is differentiable. The noise of
a seed is here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_steps, check_temperatures

__all__ = [
    "choose_candidate",
    "evor_select_reference",
    "philox",
    "philox_gumbel",
    "philox_normal",
    "q_star",
    "sample_returns_reference",
]

_MASK = 0xFFFFFFFF


def sample_returns_reference(
    velocity: Callable[[Tensor], Tensor],
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    num_steps: int,
    solver: str = "euler",
) -> Tensor:
    """Integrates the reward-to-go flow from its noise.

    Euler steps on left end points ``k / num_steps``, or half as many steps of the midpoint rule.

    Args:
        velocity (callable): maps ``concat(observation, action, z, t)``, ``[..., obs + act + 2]``,
            to ``[..., 1]``: a network, or a packed or frozen view of one.
        observation (Tensor): ``[*B, obs]``.
        action (Tensor): candidates, ``[*B, P, act]``.
        noise (Tensor): start of the flow, broadcastable to ``[*B, P, N]``.
        num_steps (int): evaluations of the velocity.
        solver (str): ``"euler"``, or ``"midpoint"``, which wants an even ``num_steps``.

    Returns:
        Tensor: ``[*B, P, N]``, in units of ``z``.

    Raises:
        ValueError: if ``num_steps`` is below 1 or odd for ``"midpoint"``, or ``solver`` unknown.
    """
    check_steps(num_steps, solver)
    candidates = action.shape[:-1]
    num_nodes = noise.shape[-1]
    z = noise.expand(*candidates, num_nodes)
    x = observation[..., None, None, :].expand(*candidates, num_nodes, observation.shape[-1])
    a = action.unsqueeze(-2).expand(*candidates, num_nodes, action.shape[-1])

    def velocity_at(z: Tensor, k: int) -> Tensor:
        t = torch.full_like(z, k / num_steps)
        return velocity(torch.cat([x, a, z.unsqueeze(-1), t.unsqueeze(-1)], -1)).squeeze(-1)

    if solver == "euler":
        for k in range(num_steps):
            z = z + velocity_at(z, k) / num_steps
        return z
    for k in range(0, num_steps, 2):
        middle = z + velocity_at(z, k) / num_steps
        z = z + velocity_at(middle, k + 1) * 2 / num_steps
    return z


def q_star(returns: Tensor, tau_r: float, log_weights: Tensor | None = None) -> Tensor:
    r"""Optimal value :math:`\tau_R \log \sum_j w_j \exp(z_j / \tau_R)` of weighted nodes.

    The value of arXiv 2502.20548, Theorem 2.2, under deterministic transitions. ``tau_r = 0`` is
    the maximum over the nodes of positive weight, ``tau_r = inf`` the weighted sum (the mean).

    Args:
        returns (Tensor): ``[*B, N]``, in reward units.
        tau_r (float): temperature in reward units, in ``[0, inf]``.
        log_weights (Tensor, optional): ``[N]``, logarithms of weights that sum to one. Defaults to
            ``-log(N)``.

    Returns:
        Tensor: ``[*B]``.

    Examples:
        >>> import torch
        >>> q_star(torch.tensor([1.0, 3.0]), math.inf), q_star(torch.tensor([1.0, 3.0]), 0.0)
        (tensor(2.), tensor(3.))
    """
    if returns.dtype in (torch.float16, torch.bfloat16):  # too short for sums over many nodes
        return q_star(returns.float(), tau_r, log_weights).to(returns.dtype)
    if math.isinf(tau_r):
        return returns.mean(-1) if log_weights is None else (returns * log_weights.exp()).sum(-1)
    nodes = returns
    if log_weights is not None:
        nodes = returns.masked_fill(log_weights == -math.inf, -math.inf)
    top = nodes.amax(-1, keepdim=True)
    if tau_r == 0:
        return top.squeeze(-1)
    # expm1 and log1p keep the digits that cancel in a logsumexp when tau_r is large.
    depth = torch.expm1((nodes - top) / tau_r)
    excess = depth.mean(-1) if log_weights is None else (log_weights.exp() * depth).sum(-1)
    value = top.squeeze(-1) + tau_r * torch.log1p(excess)
    if log_weights is None:
        return value
    # Under a top node of hardly any weight it is the excess that cancels, to -1.
    soft = tau_r * torch.logsumexp(nodes / tau_r + log_weights, -1)
    return torch.where(excess < -0.5, soft, value)


def choose_candidate(q: Tensor, gumbel: Tensor | None, tau_q: float) -> Tensor:
    r"""Index of one candidate: the largest value, or a draw from the softmax of the values.

    The draw from :math:`\mathrm{softmax}(Q/\tau_Q)` is Gumbel-max: ``argmax(q / tau_q + gumbel)``.
    The lowest index wins a tie. A candidate whose value is NaN never wins against one that has a
    value.

    Args:
        q (Tensor): ``[*B, P]``.
        gumbel (Tensor, optional): standard Gumbel noise, ``[*B, P]``. Not read when ``tau_q`` is
            zero.
        tau_q (float): temperature in reward units, in ``[0, inf]``; ``inf`` draws evenly.

    Returns:
        Tensor: ``[*B]``, int64.

    Examples:
        >>> import torch
        >>> choose_candidate(torch.tensor([0.0, 2.0, 2.0]), None, 0.0)
        tensor(1)
    """
    score = q if tau_q == 0 else q / tau_q + gumbel
    return score.masked_fill(score.isnan(), -math.inf).argmax(-1)


def evor_select_reference(
    velocity: Callable[[Tensor], Tensor],
    observation: Tensor,
    action: Tensor,
    noise: Tensor,
    gumbel: Tensor | None,
    *,
    tau_r: float,
    tau_q: float,
    num_steps: int,
    solver: str = "euler",
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores every candidate by its sampled reward-to-go and chooses one of them.

    Args:
        velocity (callable): as in :func:`sample_returns_reference`.
        observation (Tensor): ``[*B, obs]``.
        action (Tensor): candidates, ``[*B, P, act]``.
        noise (Tensor): broadcastable to ``[*B, P, N]``.
        gumbel (Tensor, optional): ``[*B, P]``, read when ``tau_q > 0``.

    Keyword Args:
        tau_r (float): temperature of the reward-to-go average, reward units.
        tau_q (float): temperature of the choice, reward units.
        num_steps (int): as in :func:`sample_returns_reference`.
        solver (str): as in :func:`sample_returns_reference`.
        loc (float or Tensor): ``return = loc + scale * z``.
        scale (float or Tensor): see ``loc``.
        log_weights (Tensor, optional): ``[N]``.

    Returns:
        tuple of Tensor: the chosen action ``[*B, act]``, its value ``[*B]``, all values ``[*B, P]``
        and all returns ``[*B, P, N]``, the last three in reward units.

    Raises:
        ValueError: if a temperature is not in ``[0, inf]``, or a choice is to be drawn without
            Gumbel noise.
    """
    check_temperatures(tau_r, tau_q, gumbel)
    z = sample_returns_reference(velocity, observation, action, noise, num_steps, solver)
    returns = loc + scale * z
    q = q_star(returns, tau_r, log_weights)
    index = choose_candidate(q, gumbel, tau_q).unsqueeze(-1)
    chosen = action.gather(-2, index.unsqueeze(-1).expand(*index.shape, action.shape[-1]))
    return chosen.squeeze(-2), q.gather(-1, index).squeeze(-1), q, returns


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011), the generator of CUDA's and Triton's libraries.

    Args:
        counter (Tensor): ``[..., 4]`` int64, four words in ``[0, 2**32)``.
        key (Tensor): ``[..., 2]`` int64, two words in ``[0, 2**32)``.

    Returns:
        Tensor: ``[..., 4]`` int64, four words in ``[0, 2**32)``.

    Examples:
        >>> import torch
        >>> [hex(n) for n in philox(torch.zeros(4, dtype=int), torch.zeros(2, dtype=int)).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # Products wrap around in 64 bits, whose upper half the mask reads as unsigned.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (second >> 32 & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = (first >> 32 & _MASK) ^ c3 ^ k1, first & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def _philox_uniform(seed: Tensor, shape: tuple[int, ...], stream: int) -> tuple[Tensor, Tensor]:
    """Two float64 uniforms per entry: multiples of 2**-23 plus 2**-24, so never 0 or 1."""
    count = math.prod(shape)
    if count > 2**32:
        raise ValueError(f"shape {tuple(shape)} has {count} entries, a seed serves up to 2**32.")
    index = torch.arange(count, device=seed.device)
    key, call = seed.unbind(0)
    words = [index, torch.full_like(index, stream), call & _MASK, call >> 32 & _MASK]
    counter = torch.stack([word.expand(count) for word in words], -1)
    drawn = philox(counter, torch.stack([key & _MASK, key >> 32 & _MASK]))
    uniform = ((drawn[:, :2] >> 9).double() + 0.5) * 2.0**-23
    return uniform[:, 0].view(shape), uniform[:, 1].view(shape)


def philox_normal(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, which the kernels draw themselves when they are given a seed.

    Entry ``i`` of the flattened result is Box-Muller on the first two words of Philox with the key
    ``seed[0]`` and the counter ``(i, 0, low and high half of seed[1])``, so that it depends on
    neither the shape nor the device. The magnitude is at most 5.77.

    Args:
        seed (Tensor): ``[2]`` int64: a seed, and the number of the call made with it.
        shape (tuple of int): shape of the result, up to ``2**32`` entries.

    Returns:
        Tensor: float32, on the device of ``seed``. The kernels' noise agrees up to ``2e-6``.

    Examples:
        >>> import torch
        >>> philox_normal(torch.tensor([7, 0]), (2, 3)).shape
        torch.Size([2, 3])
    """
    radius, angle = _philox_uniform(seed, shape, stream=0)
    return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).float()


def philox_gumbel(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel noise, independent of :func:`philox_normal` of the same seed.

    Entry ``i`` is ``-log(-log(u))`` with ``u`` from the first word at the counter ``(i, 1, ...)``.

    Args:
        seed (Tensor): as in :func:`philox_normal`.
        shape (tuple of int): shape of the result, up to ``2**32`` entries.

    Returns:
        Tensor: float32, on the device of ``seed``.

    Examples:
        >>> import torch
        >>> philox_gumbel(torch.tensor([7, 0]), (5,)).isfinite().all()
        tensor(True)
    """
    uniform, _ = _philox_uniform(seed, shape, stream=1)
    return (-(-uniform.log()).log()).float()
