# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A scalar flow from few evaluations of its velocity, with an estimate of the error.

For one state and action the velocity is a smooth function of two scalars, z and the flow time. It
is evaluated on a grid, Chebyshev points in z times a few of the Euler steps, and the Euler steps of
all nodes run on the interpolating polynomial. The cost does not depend on the number of nodes.

The layers of a network are interpolated one by one: what goes into an activation is smoother the
earlier the layer, so that its product runs on fewer points than the velocity needs.

Candidates whose last coefficients do not fall below the tolerance, or whose velocity is not met at
points that were evaluated besides, are left to the caller.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._steps import Steps

__all__ = ["interpolated_flow", "ScalarVelocity"]

# Degrees in z and in time of the polynomials, in the order in which they are tried.
LEVELS = (
    *((4, 2), (6, 3), (8, 3), (8, 4), (10, 4), (12, 4), (10, 5), (14, 4), (12, 5), (14, 5)),
    *((16, 5), (14, 6), (16, 6), (20, 5), (20, 6), (24, 6), (32, 7)),
)
# A grid must have less than this share of the points that the nodes visit.
_MAX_SHARE = 0.75
# The grid spans the paths of the outermost nodes, found by large steps, and a little more.
_OUTER_STEPS = 3
_MARGIN = 1.12
# What the probed candidates may use of the tolerance, for others may be a little worse: by the
# interpolation of the velocity, and by that of the layers.
_PROBE_SHARE = 0.25
_LAYER_SHARE = 0.35
_RATES = torch.logspace(0, 6, 61).view(-1, 1, 1)
# Between total degree (1) and tensor products (inf): a third fewer points at equal error.
_SHAPE = 1.5
# Errors estimated from missed velocities were down to 0.85 of the true ones.
_SAFETY = 1.5
_GOLDEN = (math.sqrt(5) - 1) / 2


class ScalarVelocity(Protocol):
    """Velocities of ``P`` candidates, as :func:`interpolated_flow` evaluates them."""

    num_products: int  # layers whose pre-activations can be interpolated

    def __call__(
        self, z: Tensor, time: Tensor | float, maps: tuple[Tensor | None, ...] = ()
    ) -> Tensor:
        """Velocity at ``z`` ``[M, P]`` and ``time``, ``[M, 1]`` or a number.

        ``maps`` has one ``[M', M]`` per product, which takes its results from the points of that
        product to those of the next one, or ``None`` where they are the same: ``[M', P]``.
        """

    def layers(self, z: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Velocity ``[M, P]``, and what some units of each product get: ``[M, P, U]`` each."""

    def subset(self, index: Tensor) -> ScalarVelocity:
        """The velocity of some of the candidates."""


class _Grid(NamedTuple):
    degrees: tuple[int, int]  # numbers of polynomials in z and in time
    place: Tensor  # [G], Chebyshev points in [-1, 1], some at each of a few Euler steps
    steps: Tensor  # [G], the Euler steps
    fit: Tensor  # [E, G], values on the grid to coefficients; E = G
    terms: tuple[tuple[int, int], ...]  # E pairs of degrees
    order: Tensor  # [E], place of each coefficient among all products of polynomials
    edges: Tensor  # [4, E], marks the last terms in z and those before, the same in time
    at_steps: Tensor  # [K, degrees[1]], polynomials in time at all Euler steps

    @property
    def size(self) -> int:
        return len(self.place)

    def basis(self, place: Tensor, steps: Tensor) -> Tensor:
        """The ``E`` products of polynomials at places ``[M]`` and steps ``[M]``: ``[M, E]``."""
        in_z = _polynomials(place.double(), self.degrees[0]).t()
        products = in_z.unsqueeze(2) * self.at_steps[steps].unsqueeze(1)
        return products.flatten(1)[:, self.order]


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


@functools.lru_cache(maxsize=256)
def _grid(level: tuple[int, int], num_steps: int, dtype: torch.dtype) -> _Grid:
    degree_z, degree_time = level
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
    # A polynomial through all the steps leaves nothing out in time.
    in_time_edges = _edges(terms, kept, (0, 1)) & (degree_time < num_steps)
    grid = _Grid(
        level,
        torch.cat(points),
        torch.tensor(steps).repeat_interleave(torch.tensor([len(part) for part in points])),
        torch.empty(0),
        tuple(terms),
        torch.tensor([i * degree_time + j for i, j in terms]),
        torch.cat([_edges(terms, kept, (2, 0)), in_time_edges]).to(dtype),
        _polynomials(place, degree_time).t(),
    )
    fit = torch.linalg.pinv(grid.basis(grid.place, grid.steps))
    return grid._replace(
        place=grid.place.to(dtype), fit=fit.to(dtype), at_steps=grid.at_steps.to(dtype)
    )


def _edges(terms, kept, move: tuple[int, int]) -> Tensor:
    """Marks coefficients whose next one is left out, and those whose next but one is."""
    last = [not kept(i + move[0], j + move[1]) for i, j in terms]
    beyond = [not kept(i + 2 * move[0], j + 2 * move[1]) for i, j in terms]
    return torch.tensor([last, [b and not a for a, b in zip(last, beyond)]])


def _chebyshev_points(number: int) -> Tensor:
    return torch.cos((torch.arange(number, dtype=torch.float64) + 0.5) * math.pi / number)


def _polynomials(x: Tensor, number: int) -> Tensor:
    """The first Chebyshev polynomials at ``x`` ``[*B]``, clamped to [-1, 1]: ``[number, *B]``."""
    orders = torch.arange(number, dtype=x.dtype).view(-1, *[1] * x.ndim)
    return torch.cos(orders * torch.acos(x.clamp(-1, 1)))


@functools.lru_cache(maxsize=1024)
def _map(
    level: tuple[int, int], target: tuple[int, int], num_steps: int, dtype: torch.dtype
) -> Tensor | None:
    """From values on one grid to values on another, ``[G', G]``; ``None`` between equal grids."""
    if level == target:
        return None
    grids = [_grid(x, num_steps, torch.float64) for x in (level, target)]
    return (grids[0].basis(grids[1].place, grids[1].steps) @ grids[0].fit).to(dtype)


class _Ladder(NamedTuple):
    """Grids, the smallest first, and what they make of the ``E`` terms of the largest."""

    grids: tuple[_Grid, ...]
    left_out: Tensor  # [grids, E], 1 for the terms that a grid does not have
    edges: Tensor  # [4, grids, E], the edges of each grid in z, then in time


@functools.lru_cache(maxsize=64)
def _ladder(num_nodes: int, num_steps: int, dtype: torch.dtype) -> _Ladder | None:
    """Grids that pay for so many nodes, if there are any."""
    most = _MAX_SHARE * num_nodes * num_steps - 2 * _OUTER_STEPS
    levels = dict.fromkeys((points, min(times, num_steps)) for points, times in LEVELS)
    grids = [_grid(level, num_steps, dtype) for level in levels]
    grids = [grid for grid in grids if grid.size <= most]
    grids = tuple(grid for grid in grids if set(grid.terms) <= set(grids[-1].terms))
    if not grids:
        return None
    place = {term: index for index, term in enumerate(grids[-1].terms)}
    left_out = torch.ones(len(grids), grids[-1].size, dtype=dtype)
    edges = torch.zeros(4, *left_out.shape, dtype=dtype)
    for row, grid in enumerate(grids):
        kept = torch.tensor([place[term] for term in grid.terms])
        left_out[row, kept] = 0
        edges[:, row, kept] = grid.edges
    return _Ladder(grids, left_out, edges)


class _Box(NamedTuple):
    """What is known of the candidates before any grid is laid."""

    centre: Tensor  # [P]
    radius: Tensor  # [P]
    z: Tensor  # [C, P], points at which the velocity was evaluated
    steps: Tensor  # [C]
    values: Tensor  # [C, P]

    def subset(self, index: Tensor) -> _Box:
        centre, radius, z, steps, values = self
        return _Box(centre[index], radius[index], z[:, index], steps, values[:, index])


def _box(velocity: ScalarVelocity, noise: Tensor, num_steps: int) -> _Box:
    """The values of z on the paths of the outermost nodes.

    One interval for all times: in a moving frame the velocity would vary faster in time.
    """
    ends, values, used = [torch.stack(noise.aminmax(dim=0))], [], []
    steps = [round(num_steps * i / _OUTER_STEPS) for i in range(_OUTER_STEPS + 1)]
    for step, following in zip(steps[:-1], steps[1:]):
        if following > step:
            values.append(velocity(ends[-1], step / num_steps))
            used += [step, step]
            ends.append(ends[-1] + values[-1] * ((following - step) / num_steps))
    lowest, highest = torch.cat(ends).aminmax(dim=0)
    return _Box(
        (lowest + highest) / 2,
        _MARGIN / 2 * (highest - lowest),
        torch.cat(ends[:-1]),
        torch.tensor(used),
        torch.cat(values),
    )


class _Polynomial:
    """Velocities of candidates as polynomials on a grid."""

    def __init__(self, grid: _Grid, box: _Box, values: Tensor):
        self.grid, self.box = grid, box
        self.terms = grid.fit @ values  # [E, P]
        dense = values.new_zeros(math.prod(grid.degrees), values.shape[1])
        dense = dense.index_copy_(0, grid.order, self.terms).unflatten(0, grid.degrees)
        self.at_steps = grid.at_steps @ dense  # [degrees[0], K, P]

    def at(self, z: Tensor, steps: int | Tensor) -> Tensor:
        """Velocity at ``z`` ``[M, P]`` and one step, or one step per entry of ``z``."""
        basis = _polynomials((z - self.box.centre) / self.box.radius, self.grid.degrees[0])
        if isinstance(steps, int):
            return (basis * self.at_steps[:, steps, None]).sum(0)
        return (basis * self.at_steps.gather(1, steps.expand(basis.shape))).sum(0)

    def path(self, noise: Tensor, steps: Steps) -> Tensor:
        """Points of nodes ``[N, P]``, the start and the end included: ``[K + 1, N, P]``."""
        path = noise.new_empty(steps.num + 1, *noise.shape)
        path[0] = start = noise
        for k in range(steps.num):
            start, path[k + 1] = steps.move(start, self.at(path[k], k), k)
        return path

    def error(self, path: Tensor, velocity: ScalarVelocity | None) -> Tensor:
        """Estimated error of the end points of ``path``, ``[P]``."""
        missed = (self.at(self.box.z, self.box.steps.unsqueeze(1)) - self.box.values).square()
        if velocity is not None:
            missed = torch.cat([missed, self._missed_inside(path, velocity)])
        # What is missed at some step grows with the distances of the nodes.
        growth = (path[-1].std(0) / path[0].std(0)).clamp(min=1)
        missed = _SAFETY * growth * missed.mean(0).sqrt()
        error = torch.maximum(_last_terms(self.terms.square(), self.grid.edges), missed)
        reach = ((path[:-1] - self.box.centre) / self.box.radius).abs().amax((0, 1))
        # A NaN counts as outside.
        return error.masked_fill(~(reach <= 1), math.inf)

    def _missed_inside(self, path: Tensor, velocity: ScalarVelocity) -> Tensor:
        """Squared difference from the velocity at a point of each path, spread over all."""
        num_steps, num_nodes, candidates = path[:-1].shape
        spread = (torch.arange(candidates, dtype=torch.float64) * _GOLDEN + 0.5).frac()
        place = (spread * num_steps * num_nodes).long().unsqueeze(0)  # [1, P]
        z, steps = path[:-1].flatten(0, 1).gather(0, place), place // num_nodes
        return (self.at(z, steps) - velocity(z, steps.to(z.dtype) / num_steps)).square()


def _last_terms(power: Tensor, edges: Tensor) -> Tensor:
    """Size of the terms left out, from the last ones and their decay; ``power`` is ``[E, P]``."""
    z, before_z, time, before_time = (edges @ power).sqrt()
    z = z * (z / before_z).clamp(max=1).nan_to_num(0.0)
    # Errors in time alternate in sign from step to step and cancel in part.
    return z + 0.5 * time * (time / before_time).clamp(max=1).nan_to_num(0.0)


def _relative(error: Tensor, z: Tensor) -> Tensor:
    """Errors ``[P]`` in units of the root mean square of the nodes; what is no number is inf."""
    return (error / z.square().mean(0).sqrt()).nan_to_num(nan=math.inf)


def _points(box: _Box, grid: _Grid, num_steps: int) -> tuple[Tensor, Tensor]:
    """Values of z ``[G, P]`` and times ``[G, 1]``."""
    time = (grid.steps.to(box.centre.dtype) / num_steps).unsqueeze(1)
    return torch.addcmul(box.centre, box.radius, grid.place.unsqueeze(1)), time


def _run(velocity, noise: Tensor, box: _Box, steps: Steps, grids: list[_Grid]):
    """End points ``[N, P]`` and their relative errors ``[P]``, from a grid for each layer."""
    maps = tuple(
        _map(grid.degrees, following.degrees, steps.num, box.centre.dtype)
        for grid, following in zip(grids[:-1], grids[1:])
    )
    values = velocity(*_points(box, grids[0], steps.num), maps)
    polynomial = _Polynomial(grids[-1], box, values)
    path = polynomial.path(noise, steps)
    return path[-1], _relative(polynomial.error(path, velocity), path[-1])


def _smallest(ladder: _Ladder, terms: Tensor, z: Tensor, most: float) -> int:
    """Place of the smallest grid that represents a velocity well enough."""
    power = terms.square()
    error = torch.maximum((ladder.left_out @ power).sqrt(), _last_terms(power, ladder.edges))
    enough = _relative(error, z).square().mean(-1).sqrt() <= most
    enough[-1] = True
    return int(enough.nonzero()[0])


def _cheapest(ladder: _Ladder, layers: list[Tensor], most: float) -> list[int]:
    """Places of the grids of pre-activations ``[G, P, U]``, whose errors together are allowed."""
    errors = []
    for layer in layers:
        terms = (ladder.grids[-1].fit @ layer.flatten(1)).view_as(layer)
        left_out = ladder.left_out @ terms.square().mean(-1)  # [grids, P]
        errors.append((left_out / layer.square().mean((0, 2))).mean(1) / most**2)
    errors = torch.stack(errors).nan_to_num(nan=math.inf)
    sizes = torch.tensor([grid.size for grid in ladder.grids])
    # The rate at which accuracy is bought rises until there is enough of it.
    places = (sizes + _RATES * errors).argmin(-1)  # [rates, layers]
    total = errors.expand(len(places), -1, -1).gather(-1, places.unsqueeze(-1)).sum((1, 2))
    enough = (total <= 1).nonzero()
    return places[enough[0, 0] if len(enough) else -1].tolist()


def _probe(
    velocity, noise: Tensor, box: _Box, steps: Steps, tolerance: float, ladder: _Ladder
) -> tuple[Tensor, Tensor, list[_Grid]]:
    """End points of some candidates, their relative errors, and a grid for each layer.

    There are no grids if the largest one does not serve.
    """
    largest = ladder.grids[-1]
    values, layers = velocity.layers(*_points(box, largest, steps.num))
    polynomial = _Polynomial(largest, box, values)
    path = polynomial.path(noise, steps)
    error = _relative(polynomial.error(path, None), path[-1])
    if not error.square().mean().sqrt() <= tolerance:
        return path[-1], error, []
    final = _smallest(ladder, polynomial.terms, path[-1], _PROBE_SHARE * tolerance)
    places = _cheapest(ladder, layers, _LAYER_SHARE * tolerance) if layers else []
    return path[-1], error, [ladder.grids[min(place, final)] for place in (*places, final)]


def _not_served(error: Tensor, tolerance: float) -> Tensor:
    """Indices ``[P]`` that are not to be kept, for the root mean square of the others to be."""
    smallest_first, order = error.sort()
    mean = smallest_first.square().cumsum(0) / torch.arange(1, len(error) + 1)
    good = mean.sqrt() <= tolerance
    return order[~good].sort().values


def interpolated_flow(
    velocity: ScalarVelocity, noise: Tensor, steps: Steps, tolerance: float
) -> tuple[Tensor, Tensor]:
    """End points of the flows of some candidates, where interpolation is accurate.

    Args:
        velocity (ScalarVelocity): velocities of ``P`` candidates.
        noise (Tensor): start of the flow, ``[N, P]`` with at least one candidate.
        steps (Steps): evaluations of the velocity.
        tolerance (float): root mean square, over the candidates that are kept, of their error
            relative to the size of their end points.

    Returns:
        tuple of Tensor: end points ``[N, P]``, and the indices of the candidates for which they
        are not accurate.
    """
    candidates = noise.shape[1]
    index = torch.arange(candidates)
    ladder = _ladder(len(noise), steps.num, noise.dtype)
    if ladder is None:
        return noise.clone(), index
    is_probe = index % max(1, (candidates + 1) // 2) == 0
    probe, rest = index[is_probe], index[~is_probe]
    z, error = noise.clone(), noise.new_full((candidates,), math.inf)
    box = _box(velocity, noise, steps.num)

    def some(index):
        return velocity.subset(index), noise[:, index], box.subset(index), steps

    z[:, probe], error[probe], grids = _probe(*some(probe), tolerance, ladder)
    if grids and len(rest):
        z[:, rest], error[rest] = _run(*some(rest), grids)
    return z, _not_served(error, tolerance)
