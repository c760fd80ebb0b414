# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A scalar flow from few evaluations of its velocity, with an estimate of the error.

For one state and action the velocity is a smooth function of two scalars, z and the flow time. It
is evaluated on a grid, Chebyshev points in z times a few of the Euler steps, and the Euler steps of
all nodes run on the interpolating polynomial. The cost does not depend on the number of nodes.
Candidates whose last coefficients do not fall below the tolerance are left to the caller.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["interpolated_flow"]

# Degrees in z and in time of the polynomials, in the order in which they are tried.
LEVELS = ((8, 3), (12, 4), (16, 5), (20, 5), (24, 6), (32, 7))
# A grid must cost less than this share of the evaluations at the nodes.
_MAX_SHARE = 0.6
# The grid spans the paths of the outermost nodes, found by large steps, and a little more.
_OUTER_STEPS = 3
_MARGIN = 1.12
# What the probed candidates may use of the tolerance, for others may be a little worse.
_PROBE_SHARE = 0.9
# Between total degree (1) and tensor products (inf): a third fewer points at equal error.
_SHAPE = 1.5


class _Grid(NamedTuple):
    degrees: tuple[int, int]  # numbers of polynomials in z and in time
    steps: tuple[int, ...]  # T of the K Euler steps
    points: tuple[Tensor, ...]  # Chebyshev points in [-1, 1], some at each of the T steps
    fit: Tensor  # [E, G], values on the grid to coefficients, least squares
    terms: tuple[tuple[int, int], ...]  # E pairs of degrees
    order: Tensor  # [E], place of each coefficient among all products of polynomials
    edges: tuple[Tensor, Tensor]  # [2, E] each, in z and time: the last coefficients, those before
    at_steps: Tensor  # [K, degrees[1]], polynomials in time at all Euler steps

    @property
    def size(self) -> int:
        return self.fit.shape[1]


def _spread_steps(num_times: int, place: Tensor) -> tuple[int, ...]:
    """Steps at which polynomials in time are well determined: largest product of distances."""
    num_steps = len(place)
    if num_times >= num_steps:
        return tuple(range(num_steps))
    if math.comb(num_steps, num_times) > 2000:
        lobatto = [math.cos(math.pi * i / (num_times - 1)) for i in range(num_times)]
        return tuple(round((num_steps - 1) / 2 * (1 - x)) for x in lobatto)

    def spread(steps):
        chosen = place[list(steps)]
        distances = (chosen[:, None] - chosen).abs() + torch.eye(num_times)
        return distances.log().sum().item()

    return max(itertools.combinations(range(num_steps), num_times), key=spread)


@functools.lru_cache(maxsize=64)
def _grid(degree_z: int, degree_time: int, num_steps: int, dtype: torch.dtype) -> _Grid:
    place = torch.linspace(-1, 1, num_steps, dtype=torch.float64)
    steps = _spread_steps(degree_time, place)

    def kept(i: int, j: int) -> bool:
        return j < degree_time and (i / degree_z) ** _SHAPE + (j / degree_time) ** _SHAPE < 1

    terms = [(i, j) for j in range(degree_time) for i in range(degree_z) if kept(i, j)]
    counts = [sum(kept(i, j) for i in range(degree_z)) for j in range(degree_time)]
    # Of a polynomial of low degree in time the outermost steps tell most.
    last = degree_time - 1
    rank = sorted(range(degree_time), key=lambda n: (0 < n < last, abs(2 * n - last)))
    points = [_chebyshev_points(counts[rank.index(n)]) for n in range(degree_time)]
    in_time = _polynomials(place, degree_time)
    rows = [
        (_polynomials(part, degree_z)[:, :, None] * in_time[step]).flatten(1)
        for part, step in zip(points, steps)
    ]
    # A polynomial through all the steps leaves nothing out in time.
    in_time_edges = _edges(terms, kept, (0, 1)) & (degree_time < num_steps)
    order = torch.tensor([i * degree_time + j for i, j in terms])
    return _Grid(
        (degree_z, degree_time),
        steps,
        tuple(part.to(dtype) for part in points),
        torch.linalg.pinv(torch.cat(rows)[:, order]).to(dtype),
        tuple(terms),
        order,
        (_edges(terms, kept, (2, 0)).to(dtype), in_time_edges.to(dtype)),
        in_time.to(dtype),
    )


def _edges(terms, kept, move: tuple[int, int]) -> Tensor:
    """Marks coefficients whose next one is left out, and those whose next but one is."""
    last = [not kept(i + move[0], j + move[1]) for i, j in terms]
    beyond = [not kept(i + 2 * move[0], j + 2 * move[1]) for i, j in terms]
    return torch.tensor([last, [b and not a for a, b in zip(last, beyond)]])


def _chebyshev_points(number: int) -> Tensor:
    return torch.cos((torch.arange(number, dtype=torch.float64) + 0.5) * math.pi / number)


def _polynomials(x: Tensor, number: int) -> Tensor:
    """The first Chebyshev polynomials at ``x`` ``[*B]``, clamped to [-1, 1]: ``[*B, number]``."""
    orders = torch.arange(number, dtype=x.dtype)
    return torch.cos(orders * torch.acos(x.clamp(-1, 1)).unsqueeze(-1))


def _interval(velocity, noise: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Centre and radius ``[P, 1]`` of the values of z on the paths of the outermost nodes.

    One interval for all times: in a moving frame the velocity would vary faster in time.
    """
    ends = [torch.stack(noise.aminmax(dim=-1), -1)]
    steps = [round(num_steps * i / _OUTER_STEPS) for i in range(_OUTER_STEPS + 1)]
    for step, following in zip(steps[:-1], steps[1:]):
        if following > step:
            move = velocity(ends[-1], step / num_steps) * ((following - step) / num_steps)
            ends.append(ends[-1] + move)
    lowest, highest = torch.cat(ends, 1).aminmax(dim=-1, keepdim=True)
    return (lowest + highest) / 2, _MARGIN / 2 * (highest - lowest)


def _run(velocity, noise: Tensor, num_steps: int, grid: _Grid):
    """End points ``[P, N]``, their estimated error ``[P]`` and the coefficients ``[P, E]``."""
    centre, radius = _interval(velocity, noise, num_steps)
    values = [
        velocity(centre + radius * points, step / num_steps)
        for points, step in zip(grid.points, grid.steps)
    ]
    terms = torch.cat(values, 1) @ grid.fit.t()
    dense = noise.new_zeros(len(noise), math.prod(grid.degrees))
    dense = dense.index_copy_(1, grid.order, terms).unflatten(1, grid.degrees)
    at_steps = dense @ grid.at_steps.t()
    z, reach = noise, torch.zeros_like(noise)
    for k in range(num_steps):
        place = (z - centre) / radius
        reach = torch.maximum(reach, place.abs())
        basis = _polynomials(place, grid.degrees[0])
        z = z + (basis @ at_steps[:, :, k, None]).squeeze(-1) / num_steps
    # A NaN counts as outside.
    return z, _error(terms, grid).masked_fill(~(reach.amax(-1) <= 1), math.inf), terms


def _error(terms: Tensor, grid: _Grid) -> Tensor:
    # Errors in time alternate in sign from step to step and cancel in part.
    return _tail(terms, grid.edges[0]) + 0.5 * _tail(terms, grid.edges[1])


def _tail(terms: Tensor, edges: Tensor) -> Tensor:
    """Size of the coefficients left out, from the last ones and their decay: ``[P]``."""
    last, before = (terms.unsqueeze(1) * edges).square().sum(-1).sqrt().unbind(-1)
    return last * (last / before).clamp(max=1).nan_to_num(0.0)


def _grids(num_nodes: int, num_steps: int, dtype: torch.dtype) -> list[_Grid]:
    most = _MAX_SHARE * num_nodes * num_steps - 2 * _OUTER_STEPS
    levels = dict.fromkeys((points, min(times, num_steps)) for points, times in LEVELS)
    grids = [_grid(*level, num_steps, dtype) for level in levels]
    return [grid for grid in grids if grid.size <= most]


def _size(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _relative(error: Tensor, z: Tensor) -> Tensor:
    """Errors ``[P]`` in units of the root mean square of the nodes; what is no number is inf."""
    return (error / z.square().mean(-1).sqrt()).nan_to_num(nan=math.inf)


def _choose_grid(velocity, noise: Tensor, num_steps: int, tolerance: float) -> _Grid | None:
    """The smallest grid that serves some candidates, or ``None`` if the largest does not."""
    grids = _grids(noise.shape[1], num_steps, noise.dtype)
    if not grids:
        return None
    z, error, terms = _run(velocity, noise, num_steps, grids[-1])
    if _size(_relative(error, z)) > tolerance:
        return None
    for grid in grids[:-1]:
        kept = torch.tensor([grids[-1].terms.index(term) for term in grid.terms])
        left_out = terms.index_fill(1, kept, 0.0).norm(dim=-1)
        error = torch.maximum(left_out, _error(terms[:, kept], grid))
        if _size(_relative(error, z)) <= _PROBE_SHARE * tolerance:
            return grid
    return grids[-1]


def interpolated_flow(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """End points of the flows of some candidates, where interpolation is accurate.

    Args:
        velocity (callable): ``(z [P, M], time) -> [P, M]``, with a method ``subset(index)`` that
            gives the velocity of some of the candidates.
        noise (Tensor): start of the flow, ``[P, N]`` with at least one candidate.
        num_steps (int): Euler steps.
        tolerance (float): root mean square, over the candidates that are kept, of their error
            relative to the size of their end points.

    Returns:
        tuple of Tensor: end points ``[P, N]``, and the indices of the candidates for which they
        are not accurate.
    """
    index = torch.arange(len(noise))
    probe = index[:: max(1, (len(noise) + 1) // 2)]
    grid = _choose_grid(velocity.subset(probe), noise[probe], num_steps, tolerance)
    if grid is None:
        return noise.clone(), index
    z, error, _ = _run(velocity, noise, num_steps, grid)
    smallest_first, order = _relative(error, z).sort()
    counts = torch.arange(1, len(z) + 1, device=z.device)
    good = (smallest_first.square().cumsum(0) / counts).sqrt() <= tolerance
    return z, order[~good].sort().values
