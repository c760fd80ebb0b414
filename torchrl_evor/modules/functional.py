# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The mathematics of EVOR as functions of tensors.

Flow time runs from 0 (noise) to 1 (data) and the path is linear,
``z_t = (1 - t) * noise + t * data``. Nothing here knows about modules,
configurations or TensorDicts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "gauss_hermite_normal",
    "integrate",
    "interpolate",
    "log_mean_exp",
    "soft_choice",
    "standard_gumbel",
    "stratified_normal",
]

Velocity = Callable[[Tensor, Tensor], Tensor]
SOLVERS = ("euler", "midpoint")
NODES = ("stratified", "gauss_hermite", "random")


def interpolate(noise: Tensor, data: Tensor, time: Tensor) -> Tensor:
    """Point at ``time`` on the straight path from ``noise`` to ``data``.

    Args:
        noise (Tensor): start of the path, ``[*B, D]``.
        data (Tensor): end of the path, ``[*B, D]``.
        time (Tensor): flow time in ``[0, 1]``, ``[*B, 1]``.

    Returns:
        Tensor: ``(1 - time) * noise + time * data``, ``[*B, D]``.

    Examples:
        >>> import torch
        >>> interpolate(torch.zeros(1), torch.full((1,), 4.0), torch.full((1,), 0.25))
        tensor([1.])
    """
    return (1 - time) * noise + time * data


def integrate(
    velocity: Velocity,
    noise: Tensor,
    num_steps: int,
    solver: Literal["euler", "midpoint"] = "euler",
) -> Tensor:
    """Carries ``noise`` along a velocity field from flow time 0 to 1.

    The field is evaluated at flow times ``k / num_steps``. Explicit Euler moves
    at each of them. The midpoint rule takes them in pairs: from the first it
    moves half a step, and with the velocity found there the whole step.

    Args:
        velocity (Callable): ``(z [*B, D], time [*B, 1]) -> dz/dt [*B, D]``.
        noise (Tensor): state at flow time 0, ``[*B, D]``.
        num_steps (int): evaluations of the field, at least 1; even for the
            midpoint rule.
        solver (str, optional): ``"euler"`` or ``"midpoint"``. Defaults to ``"euler"``.

    Returns:
        Tensor: state at flow time 1, ``[*B, D]``.

    Raises:
        ValueError: if ``solver`` is unknown, or ``num_steps`` odd for the midpoint rule.

    Examples:
        >>> import torch
        >>> integrate(lambda z, t: 2 * t, torch.zeros(1), 4)
        tensor([0.7500])
        >>> integrate(lambda z, t: 2 * t, torch.zeros(1), 4, "midpoint")
        tensor([1.])
    """
    check_solver(solver, num_steps)

    def change(z: Tensor, step: int) -> Tensor:
        return velocity(z, torch.full_like(z[..., :1], step / num_steps)) / num_steps

    z = noise
    if solver == "euler":
        for step in range(num_steps):
            z = z + change(z, step)
        return z
    for step in range(0, num_steps, 2):
        middle = z + change(z, step)
        z = z + 2 * change(middle, step + 1)
    return z


def check_solver(solver: str, num_steps: int) -> str:
    """Returns ``solver`` if it is known and can make ``num_steps`` evaluations.

    Raises:
        ValueError: otherwise.
    """
    check_choice("solver", solver, SOLVERS)
    if solver == "midpoint" and num_steps % 2:
        raise ValueError(
            f"num_steps must be even for solver='midpoint', two evaluations to a step, "
            f"got {num_steps}."
        )
    return solver


def log_mean_exp(
    values: Tensor, tau: float, dim: int = -1, log_weights: Tensor | None = None
) -> Tensor:
    r"""Soft maximum :math:`\tau \log \sum_j w_j \exp(v_j / \tau)` of weighted nodes.

    The optimal regularised value of `Q# <https://arxiv.org/abs/2502.20548>`_,
    Theorem 2.2, when ``values`` are samples of the reward-to-go. ``tau=0`` is
    the maximum over nodes of positive weight, ``tau=inf`` the (weighted) mean.

    Args:
        values (Tensor): nodes, for instance returns in reward units.
        tau (float): temperature in the units of ``values``, in ``[0, inf]``.
        dim (int, optional): dimension of the nodes. Defaults to ``-1``.
        log_weights (Tensor, optional): logarithms of node weights that sum to
            one, broadcastable to ``values``. Defaults to equal weights.

    Returns:
        Tensor: ``values`` without ``dim``.

    Raises:
        ValueError: if ``tau`` is negative or NaN.

    Examples:
        >>> import torch
        >>> values = torch.tensor([0.0, 2.0])
        >>> [log_mean_exp(values, tau).item() for tau in (0.0, float("inf"))]
        [2.0, 1.0]
    """
    check_temperature("tau", tau)
    if values.dtype in (torch.float16, torch.bfloat16):  # too short for sums over many nodes
        return log_mean_exp(values.float(), tau, dim, log_weights).to(values.dtype)
    if tau == 0 and log_weights is not None:
        values = values.masked_fill(log_weights == -math.inf, -math.inf)
    top = values.amax(dim, keepdim=True)
    if tau == 0:
        return top.squeeze(dim)
    weights = 1 / values.shape[dim] if log_weights is None else log_weights.exp()
    if math.isinf(tau):
        return (weights * values).sum(dim)
    if log_weights is None:
        log_weights = -math.log(values.shape[dim])
    # expm1 and log1p keep the digits that cancel when tau is large.
    depth = (values - top) / tau
    excess = (weights * torch.expm1(depth)).sum(dim)
    # Under a top node of hardly any weight the excess cancels to -1. Clamped, because a gradient
    # of the branch that is not taken would be NaN.
    soft = torch.log1p(excess.clamp_min(-0.5))
    soft = torch.where(excess < -0.5, torch.logsumexp(depth + log_weights, dim), soft)
    return top.squeeze(dim) + tau * soft


def soft_choice(values: Tensor, tau: float, gumbel: Tensor | None = None) -> Tensor:
    r"""Draws an index from :math:`\mathrm{softmax}(v / \tau)` by Gumbel-max.

    Args:
        values (Tensor): values of the candidates, ``[*B, P]``.
        tau (float): temperature in the units of ``values``; ``0`` takes the best.
        gumbel (Tensor, optional): standard Gumbel noise, ``[*B, P]``. Drawn by
            default, where ``tau`` is positive.

    Returns:
        Tensor: int64 index, ``[*B]``; the first of equals. A value that is NaN never
        wins against one that is not.

    Raises:
        ValueError: if ``tau`` is negative or NaN, or ``gumbel`` has another shape.

    Examples:
        >>> import torch
        >>> soft_choice(torch.tensor([0.0, 3.0, 1.0]), 0.0)
        tensor(1)
    """
    if check_temperature("tau", tau) > 0:
        if gumbel is None:
            gumbel = standard_gumbel(values)
        if gumbel.shape != values.shape:  # broadcast, the same draw would favour no candidate
            raise ValueError(
                f"gumbel must have the shape of the values, {tuple(values.shape)}, "
                f"got {tuple(gumbel.shape)}."
            )
        # In 16 bits, beside returns of hundreds, the noise would be rounded to ties, which the
        # first wins.
        values = values.to(torch.promote_types(values.dtype, torch.float32)) / tau + gumbel
    return values.masked_fill(values.isnan(), -math.inf).argmax(-1)


def standard_gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape, device and dtype of ``like``, in float32 at least."""
    # In one order of memory, so that a seed means the same numbers for views of any strides.
    dtype = torch.promote_types(like.dtype, torch.float32)
    empty = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return -empty.exponential_().log()


def check_temperature(name: str, value: float) -> float:
    """Returns ``value`` if it is a temperature (``0 <= value <= inf``).

    Raises:
        ValueError: naming ``name``, if ``value`` is negative, NaN, text or ``None``.
    """
    if value is None or isinstance(value, str) or not value >= 0:
        raise ValueError(f"{name} must be a temperature in [0, inf], got {value!r}.")
    return value


def check_deviation(name: str, value: float) -> float:
    """Returns ``value`` if it is a standard deviation (``0 <= value < inf``).

    Raises:
        ValueError: naming ``name``, if ``value`` is negative, infinite, NaN or no number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a deviation in [0, inf), got {value!r}.")
    return value


def check_bounds(name: str, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """Returns ``bounds`` as a tuple if they are two numbers in increasing order, or ``None``.

    Raises:
        ValueError: naming ``name``, if they are not.
    """
    if bounds is None:
        return None
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise ValueError(f"{name} must be None or two increasing numbers, got {bounds!r}.")
    return low, high


def check_positive(name: str, value: int) -> int:
    """Returns ``value`` if it is an integer of at least 1.

    Raises:
        ValueError: naming ``name``, otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return value


def check_choice(name: str, value: str, choices) -> str:
    """Returns ``value`` if it is one of ``choices``.

    Raises:
        ValueError: naming ``name`` and the choices, otherwise.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices, key=str)}, got {value!r}.")
    return value


def stratified_normal(
    num_nodes: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Standard-normal quantiles :math:`\Phi^{-1}((j - 1/2) / N)`, in increasing order.

    A scalar flow is monotone in its noise, so integrating from these nodes
    gives the corresponding quantiles of the law that the flow carries.

    Args:
        num_nodes (int): number of nodes :math:`N`, at least 1.

    Keyword Args:
        device (torch.device, optional): device of the result.
        dtype (torch.dtype, optional): dtype of the result. Defaults to the
            default dtype.

    Returns:
        Tensor: ``[num_nodes]``.

    Examples:
        >>> stratified_normal(3)
        tensor([-0.9674,  0.0000,  0.9674])
    """
    # Probabilities in float64: ndtri loses the tails in float32.
    probability = (torch.arange(num_nodes, dtype=torch.float64, device=device) + 0.5) / num_nodes
    return torch.special.ndtri(probability).to(dtype or torch.get_default_dtype())


@torch.compiler.assume_constant_result
def gauss_hermite_normal(
    num_nodes: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    r"""Gauss-Hermite nodes and weights of a standard normal.

    :math:`\sum_j w_j f(x_j) = E f(\epsilon)` for polynomials of a degree below
    :math:`2 N`. The outermost nodes lie further out than those of
    :func:`stratified_normal` (8 nodes: 4.1 against 1.5) and weigh little, so that
    :func:`log_mean_exp` at a small temperature sees the upper tail.

    Args:
        num_nodes (int): number of nodes :math:`N`, at least 1, at most some 700.

    Keyword Args:
        device (torch.device, optional): device of the results.
        dtype (torch.dtype, optional): dtype of the results. Defaults to the
            default dtype.

    Returns:
        tuple of Tensor: nodes in increasing order and logarithms of their
        weights, ``[num_nodes]`` each. Kept for the next call: not to be written to.

    Raises:
        ValueError: if there are so many nodes that weights are too small for float64.

    Examples:
        >>> nodes, log_weights = gauss_hermite_normal(3)
        >>> nodes, log_weights.exp()
        (tensor([-1.7321,  0.0000,  1.7321]), tensor([0.1667, 0.6667, 0.1667]))
    """
    device = device or torch.get_default_device()
    return _gauss_hermite(num_nodes, device, dtype or torch.get_default_dtype())


@functools.lru_cache(maxsize=64)
def _gauss_hermite(num_nodes: int, device, dtype) -> tuple[Tensor, Tensor]:
    # Kept, so that none is copied to the device while a CUDA graph is captured.
    with torch.inference_mode(False), torch.no_grad():
        roots = torch.arange(1, num_nodes, dtype=torch.float64).sqrt()
        nodes = torch.linalg.eigvalsh(roots.diag(1) + roots.diag(-1))
        nodes = (nodes - nodes.flip(0)) / 2  # symmetric to the last digit
        # Normalised Hermite polynomials of degree N - 1, whose squares give the weights.
        before, polynomial = torch.zeros_like(nodes), torch.ones_like(nodes)
        for n in range(1, num_nodes):
            following = (nodes * polynomial - math.sqrt(n - 1) * before) / math.sqrt(n)
            before, polynomial = polynomial, following
        log_weights = -math.log(num_nodes) - 2 * polynomial.abs().log()
        if not log_weights.isfinite().all():
            raise ValueError(f"num_nodes must be at most some 700, got {num_nodes}.")
        return nodes.to(device, dtype), log_weights.to(device, dtype)
