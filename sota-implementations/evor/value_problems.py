# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Problems of policy evaluation, and what is known of their returns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from torchrl_evor import OGBenchExperienceReplay

NUM_QUANTILES = 200


@dataclass
class Mixture:
    """Mixtures of Gaussians, ``[Q, C]`` each; a deviation of zero is an atom."""

    means: Tensor
    deviations: Tensor
    weights: Tensor

    def quantiles(self, num_quantiles: int) -> Tensor:
        """Quantiles ``(j - 1/2) / num_quantiles``, ``[Q, num_quantiles]``, by bisection."""
        probability = (torch.arange(num_quantiles, dtype=torch.float64) + 0.5) / num_quantiles
        reach = 6 * self.deviations + 1e-6
        low = (self.means - reach).amin(-1, keepdim=True).expand(-1, num_quantiles)
        high = (self.means + reach).amax(-1, keepdim=True).expand(-1, num_quantiles)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def cdf(self, values: Tensor) -> Tensor:
        """Probability of at most ``values`` ``[Q, N]``, of the same shape."""
        distance = values.unsqueeze(-1) - self.means.unsqueeze(-2)
        smooth = torch.special.ndtr(distance / self.deviations.clamp_min(1e-300).unsqueeze(-2))
        step = (distance >= 0).double()
        below = torch.where(self.deviations.unsqueeze(-2) > 0, smooth, step)
        return (self.weights.unsqueeze(-2) * below).sum(-1)

    def q_star(self, tau: float) -> Tensor:
        """``tau * log E exp(Z / tau)`` in closed form, ``[Q]``; the mean for ``tau=inf``."""
        if math.isinf(tau):
            return (self.weights * self.means).sum(-1)
        exponents = self.means / tau + (self.deviations / tau).square() / 2
        return tau * torch.logsumexp(exponents + self.weights.log(), -1)

    def deviation(self) -> Tensor:
        """Standard deviation of each mixture, ``[Q]``."""
        second = self.means.square() + self.deviations.square()
        variance = (self.weights * second).sum(-1) - self.q_star(math.inf).square()
        return variance.clamp_min(0).sqrt()


class Problem(Protocol):
    """A data-collecting policy to be evaluated, whose laws of the return are known."""

    gamma: float

    def pairs(self) -> tuple[Tensor, Tensor]:
        """States ``[Q, obs]`` and actions ``[Q, act]``."""

    def law(self) -> Mixture:
        """Laws of the return of these pairs."""

    def sample(self, *batch: int) -> TensorDict:
        """Transitions, or windows, with the data's own next action."""


def encode(state: Tensor, right: Tensor, num_states: int) -> tuple[Tensor, Tensor]:
    """One-hot observation ``[*B, num_states]`` and action -1 or 1, ``[*B, 1]``."""
    observation = nn.functional.one_hot(state, num_states).float()
    return observation, 2 * right.unsqueeze(-1).float() - 1


def all_pairs(num_states: int) -> tuple[Tensor, Tensor]:
    """Observations and actions of all pairs, state by state, action -1 before 1."""
    state = torch.arange(num_states).repeat_interleave(2)
    return encode(state, torch.arange(2).repeat(num_states), num_states)


def _transitions(num_states, state, right, following, next_right, reward, terminated):
    observation, action = encode(state, right, num_states)
    next_observation, next_action = encode(following, next_right, num_states)
    terminated = terminated.unsqueeze(-1)
    return TensorDict(
        observation=observation,
        action=action,
        next=TensorDict(
            observation=next_observation,
            action=next_action,
            reward=reward.unsqueeze(-1),
            done=terminated,
            terminated=terminated,
            batch_size=state.shape,
        ),
        batch_size=state.shape,
    )


class Chain:
    """A walk on a line that costs 1 per step, until it leaves at the right end.

    The policy steps right with probability ``right``; at the left end a step
    to the left stays. Returns have one-sided tails and a single mode.
    """

    def __init__(self, num_states: int = 10, gamma: float = 0.95, right: float = 0.6) -> None:
        self.num_states, self.gamma, self.right = num_states, gamma, right

    def pairs(self) -> tuple[Tensor, Tensor]:
        return all_pairs(self.num_states)

    def law(self, horizon: int = 400) -> Mixture:
        """A walk of T steps returns ``-(1 - gamma^T) / (1 - gamma)``."""
        policy = torch.tensor([1 - self.right, self.right], dtype=torch.float64)
        duration = torch.zeros(self.num_states, 2, horizon, dtype=torch.float64)
        duration[-1, 1, 0] = 1.0
        for step in range(1, horizon):
            # Probability that the walk from each state takes `step` steps.
            state = (duration[:, :, step - 1] * policy).sum(-1)
            duration[:, 0, step] = torch.cat([state[:1], state[:-1]])
            duration[:-1, 1, step] = state[1:]
        steps = torch.arange(1, horizon + 1, dtype=torch.float64)
        means = -(1 - self.gamma**steps) / (1 - self.gamma)
        weights = duration.flatten(0, 1)
        return Mixture(means.expand_as(weights), torch.zeros_like(weights), weights)

    def sample(self, *batch: int) -> TensorDict:
        state = torch.randint(self.num_states, batch)
        right = (torch.rand(batch) < self.right).long()
        next_right = (torch.rand(batch) < self.right).long()
        following = state + 2 * right - 1
        terminated = following == self.num_states
        following = following.clamp(0, self.num_states - 1)
        reward = -torch.ones(batch)
        return _transitions(
            self.num_states, state, right, following, next_right, reward, terminated
        )


class Fork:
    """Stages in a row; behind the last, an outcome of plus or minus ``prize``.

    Every stage pays 0.5 times the action with noise. The last action moves
    the odds of the prize from 0.2 to 0.8. Returns have two far modes.
    """

    def __init__(self, num_states: int = 4, gamma: float = 0.9, prize: float = 5.0) -> None:
        self.num_states, self.gamma, self.prize = num_states, gamma, prize
        self.noise = 0.3
        self.odds = torch.tensor([0.2, 0.8])

    def pairs(self) -> tuple[Tensor, Tensor]:
        return all_pairs(self.num_states)

    def law(self) -> Mixture:
        """One component for each sequence of later actions and each outcome."""
        rows = [
            self._components(stage, right) for stage in range(self.num_states) for right in (0, 1)
        ]
        width = max(len(row) for row in rows)
        # Rows of later stages are filled with components of no weight.
        padded = [row + [(0.0, 1.0, 0.0)] * (width - len(row)) for row in rows]
        return Mixture(*torch.tensor(padded, dtype=torch.float64).unbind(-1))

    def _components(self, stage: int, right: int) -> list[tuple[float, float, float]]:
        later = self.num_states - stage - 1
        discounts = [self.gamma**step for step in range(later + 1)]
        deviation = self.noise * math.sqrt(sum(discount**2 for discount in discounts))
        components = []
        for actions in itertools.product((0, 1), repeat=later):
            actions = (right, *actions)
            pay = sum(d * 0.5 * (2 * action - 1) for d, action in zip(discounts, actions))
            odds = self.odds[actions[-1]].item()
            for sign, probability in ((1, odds), (-1, 1 - odds)):
                mean = pay + sign * discounts[-1] * self.prize
                components.append((mean, deviation, probability / 2**later))
        return components

    def sample(self, *batch: int) -> TensorDict:
        state = torch.randint(self.num_states, batch)
        right, next_right = torch.randint(2, batch), torch.randint(2, batch)
        terminated = state == self.num_states - 1
        prize = torch.where(torch.rand(batch) < self.odds[right], self.prize, -self.prize)
        reward = right.float() - 0.5 + self.noise * torch.randn(batch) + prize * terminated
        following = (state + 1).clamp_max(self.num_states - 1)
        return _transitions(
            self.num_states, state, right, following, next_right, reward, terminated
        )


PROBLEMS = {"chain": Chain, "fork": Fork}


class KnownLaws:
    """Errors of learnt laws of a problem whose laws are known.

    Args:
        problem (Problem): what is evaluated.
        temperatures (list of float): of Q*, times the spread of returns.
    """

    def __init__(self, problem: Problem, temperatures: list[float]) -> None:
        law = problem.law()
        means = law.q_star(math.inf)
        variance = law.deviation().square().mean() + means.var(correction=0)
        self.gamma, self.sample = problem.gamma, problem.sample
        self.replay = getattr(problem, "replay", None)
        self.loc, self.scale = means.mean().item(), variance.sqrt().item()
        self.observation, self.action = problem.pairs()
        self.returns = law.quantiles(NUM_QUANTILES)
        self.q_star = {t: law.q_star(t * self.scale) for t in (math.inf, *temperatures)}

    def errors(self, quantiles: Tensor, q_star: Callable[[float], Tensor]) -> dict[str, Tensor]:
        """Mean errors over all pairs, ``[S]`` each, in spreads of returns.

        Args:
            quantiles (Tensor): of the learnt laws, ``[S, Q, NUM_QUANTILES]``.
            q_star (Callable): learnt Q* ``[S, Q]`` at a temperature in reward units.
        """
        errors = {"w1": (quantiles - self.returns).abs().mean((-2, -1)) / self.scale}
        for temperature, exact in self.q_star.items():
            name = "mean_error" if math.isinf(temperature) else f"q_error_{temperature:g}"
            error = (q_star(temperature * self.scale) - exact).abs().mean(-1)
            errors[name] = error / self.scale
        return errors


def sample_windows(replay: OGBenchExperienceReplay, *batch: int) -> TensorDict:
    """Windows of a data set, of any batch shape."""
    return replay[torch.randint(len(replay), (math.prod(batch),))].reshape(batch)


def rows_of_known_return(episode: Tensor, gamma: float, weight: float = 0.1) -> Tensor:
    """Transitions behind which the end of the trajectory lies far enough to be forgotten.

    What comes after it is unknown; a return says something of the data where that weighs less
    than ``weight``. By position alone: to choose by outcomes would change their law.

    Raises:
        ValueError: if trajectories are too short.
    """
    _, counts = torch.unique_consecutive(episode, return_counts=True)
    end = counts.cumsum(0).repeat_interleave(counts)
    rows = (gamma ** (end - torch.arange(len(end))) < weight).nonzero().squeeze(-1)
    if not len(rows):
        raise ValueError(
            f"gamma={gamma} looks further than trajectories of {int(counts.max())} steps go."
        )
    return rows


class HeldOutReturns:
    """An OGBench task: one return of the data for each of many held-out pairs.

    The law behind them is not known. The continuous ranked probability score
    is lowest, in expectation, for the true law; how far the returns' ranks in
    the learnt laws are from uniform tells whether these are too narrow, too
    wide or out of place.

    Args:
        name (str): single-task dataset of OGBench.
        gamma (float): discount per step.
        n_step (int): steps of data rewards in a target.
        num_rows (int, optional): held-out pairs. Defaults to ``1000``.
        **data: options of :class:`OGBenchExperienceReplay`.
    """

    def __init__(self, name: str, gamma: float, n_step: int, num_rows: int = 1000, **data) -> None:
        self.gamma = gamma
        self.replay = OGBenchExperienceReplay(name, gamma=gamma, n_step=n_step, **data)
        self.loc, self.scale = self.replay.return_statistics()
        held_out = OGBenchExperienceReplay(name, gamma=gamma, split="val", **data)
        known = rows_of_known_return(held_out.transitions["episode"], gamma)
        rows = known[torch.linspace(0, len(known) - 1, num_rows).long()]
        self.observation = held_out.transitions["observation"][rows]
        self.action = held_out.transitions["action"][rows]
        self.returns = held_out.empirical_returns()[rows].unsqueeze(-1)

    def sample(self, *batch: int) -> TensorDict:
        """Windows of the training data."""
        return sample_windows(self.replay, *batch)

    def errors(self, quantiles: Tensor, q_star: Callable[[float], Tensor]) -> dict[str, Tensor]:
        """Score (in spreads of returns) and distance of ranks from uniform, ``[S]`` each."""
        count = quantiles.shape[-1]
        # Mean distance of two draws, from sorted quantiles.
        order = (2 * torch.arange(count) + 1 - count) / count**2
        score = (quantiles - self.returns).abs().mean(-1) - (order * quantiles).sum(-1)
        rank = (quantiles < self.returns).double().mean(-1).sort(-1).values
        uniform = (torch.arange(rank.shape[-1]) + 0.5) / rank.shape[-1]
        return {
            "crps": score.mean(-1) / self.scale,
            "rank_distance": (rank - uniform).abs().mean(-1),
        }
