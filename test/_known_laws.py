# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Toy problems with exact answers, for the tests."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


def gaussian_velocity(z: Tensor, time: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Field of the linear path from N(0, 1) to N(mean, std^2) at flow time ``time``.

    From ``E[Z - noise | z]`` of the joint Gaussian of ``Z`` and ``z``.
    """
    variance = (time * std).square() + (1 - time).square()
    slope = (time * std.square() - (1 - time)) / variance
    return mean + slope * (z - time * mean)


def euler_gaussian_std(std: float, num_steps: int) -> float:
    """Spread that ``num_steps`` Euler steps of :func:`gaussian_velocity` give, exactly.

    The field is affine in ``z - time * mean``, so each step multiplies that
    distance by ``1 + slope / num_steps`` and leaves the mean exact.
    """
    spread = 1.0
    for step in range(num_steps):
        time = step / num_steps
        variance = (time * std) ** 2 + (1 - time) ** 2
        spread *= 1 + (time * std**2 - (1 - time)) / variance / num_steps
    return spread


class GaussianReturns(nn.Module):
    """Velocity network whose law is read from the observation: ``(mean, std)``, reward units.

    Its input is concat(observation [2], action, z, time). The parameter is an
    offset of the velocity, zero at first, to have something to train.
    """

    def __init__(self, loc: float = 0.0, scale: float = 1.0, dtype=None) -> None:
        super().__init__()
        self.loc, self.scale = loc, scale
        self.offset = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        mean, std = (inputs[..., :1] - self.loc) / self.scale, inputs[..., 1:2] / self.scale
        z, time = inputs[..., -2:-1], inputs[..., -1:]
        return gaussian_velocity(z, time, mean, std) + self.offset


class Chain:
    """Random walk on a line, one step at a time, until it leaves at the right end.

    Every step costs 1. The data's policy goes right with probability
    ``right``, and left (or stays at the left end) otherwise.
    """

    def __init__(self, length: int = 4, gamma: float = 0.8, right: float = 0.7) -> None:
        self.length, self.gamma, self.right = length, gamma, right

    def returns(self, horizon: int = 400) -> tuple[Tensor, Tensor]:
        """Possible returns ``[horizon]`` and their probabilities ``[length, 2, horizon]``.

        The return of a walk of T steps is ``-(1 - gamma^T) / (1 - gamma)``; the
        law of T follows by conditioning on the first step.
        """
        move = torch.tensor([1 - self.right, self.right], dtype=torch.float64)
        law = torch.zeros(self.length, 2, horizon, dtype=torch.float64)
        law[-1, 1, 0] = 1.0  # stepping right from the last state ends the walk in one step
        for duration in range(1, horizon):
            state = (law[:, :, duration - 1] * move).sum(-1)
            law[:, 0, duration] = torch.cat([state[:1], state[:-1]])
            law[:-1, 1, duration] = state[1:]
        steps = torch.arange(1, horizon + 1, dtype=torch.float64)
        return -(1 - self.gamma**steps) / (1 - self.gamma), law

    def quantiles(self, state: int, action: int, probabilities: Tensor) -> Tensor:
        """Quantiles of the exact return of a state and an action."""
        values, law = self.returns()
        # The best return comes first, so that the law is read backwards.
        cumulative = law[state, action].flip(0).cumsum(0)
        index = torch.searchsorted(cumulative, probabilities.to(torch.float64))
        return values.flip(0)[index.clamp_max(len(values) - 1)]

    def encode(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot observation ``[*B, length]`` and action -1 or 1, ``[*B, 1]``."""
        observation = nn.functional.one_hot(state, self.length).to(torch.get_default_dtype())
        return observation, (2 * action - 1).unsqueeze(-1).to(observation.dtype)

    def sample(self, size: int) -> TensorDict:
        """Transitions from uniform states, both actions taken by the data's policy."""
        state = torch.randint(self.length, (size,))
        action = (torch.rand(size) < self.right).long()
        following = state + 2 * action - 1
        terminated = (following == self.length).unsqueeze(-1)
        following = following.clamp(0, self.length - 1)
        next_action = (torch.rand(size) < self.right).long()
        reward = -torch.ones(size, 1)
        now, later = self.encode(state, action), self.encode(following, next_action)
        return transitions(now, later, reward, terminated)


def transitions(now, later, reward: Tensor, terminated: Tensor) -> TensorDict:
    """Transitions from pairs of observation and action, rewards and ends ``[size, 1]``."""
    size = len(reward)
    following = {"observation": later[0], "action": later[1], "reward": reward}
    following.update(done=terminated, terminated=terminated)
    return TensorDict(
        observation=now[0],
        action=now[1],
        next=TensorDict(following, batch_size=[size]),
        batch_size=[size],
    )


class SkillOrLuck:
    """Two ways to a prize that half of the returns hold: one by an action, one by chance.

    From state 0 the action 1 leads to state 1, where action 1 wins ``prize`` and -1 nothing; the
    action -1 leads to state 2, where either action wins it every second time. The data's policy
    takes both actions equally often, so both ways have the same law of returns under it.
    """

    length, gamma, prize = 3, 0.9, 5.0

    encode = Chain.encode

    def sample(self, size: int) -> TensorDict:
        """Transitions from uniform states; ended episodes go on to state 0, which no one reads."""
        action, chance, next_action = torch.randint(2, (3, size))
        state = torch.randint(self.length, (size,))
        terminated = state > 0
        won = torch.where(state == 1, action, chance).bool() & terminated
        following = torch.where(terminated, 0, 2 - action)
        now, later = self.encode(state, action), self.encode(following, next_action)
        reward = self.prize * won.unsqueeze(-1)
        return transitions(now, later, reward, terminated.unsqueeze(-1))


class CoinVelocity(nn.Module):
    """Field that carries N(0, 1) to the actions -1 and 1, equally often, whatever is observed.

    From ``(E[a | a_t] - a_t) / (1 - t)`` with the posterior mean ``tanh(t a_t / (1 - t)^2)``. The
    parameter is an offset of the velocity, zero at first, to have something to train.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        action, time = inputs[..., -2:-1], inputs[..., -1:]
        mean = torch.tanh(time * action / (1 - time).square())
        return (mean - action) / (1 - time) + self.offset


class PointEnv(EnvBase):
    """A point in the plane that moves by its action; the reward is the first coordinate."""

    def __init__(self, batch_size: tuple[int, ...] = ()) -> None:
        super().__init__(batch_size=torch.Size(batch_size))
        shape = (*batch_size, 2)
        self.observation_spec = Composite(observation=Unbounded(shape), shape=batch_size)
        self.action_spec = Bounded(-1.0, 1.0, shape)
        self.reward_spec = Unbounded((*batch_size, 1))

    def _reset(self, tensordict=None):
        observation = torch.zeros(*self.batch_size, 2)
        return TensorDict(observation=observation, batch_size=self.batch_size)

    def _step(self, tensordict):
        observation = tensordict["observation"] + tensordict["action"]
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict(
            observation=observation,
            reward=observation[..., :1],
            done=done,
            terminated=done.clone(),
            batch_size=self.batch_size,
        )

    def _set_seed(self, seed):
        return seed
