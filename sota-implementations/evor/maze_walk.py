# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A problem of policy evaluation in a real maze, whose laws are known by simulation."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm
from value_problems import Mixture, sample_windows

from torchrl_evor import OGBenchExperienceReplay
from torchrl_evor.envs import OGBenchSimulator
from torchrl_evor.modules.functional import check_positive

TASK = "pointmaze-teleport-navigate-singletask-task2-v0"
# The name by which OGBench's format knows data of this task.
DATA = "pointmaze-teleport-navigate-v0.npz"
# Of the data, for walks that no training sees.
OTHER_WALKS = 0.1
# A simulated return is cut off where what follows weighs less than this.
TAIL = 0.005


class Walker:
    """Walks by position alone through pointmaze-teleport, to the goal of task 2 or a teleporter.

    In each cell it heads for the nearest of them along the shortest path; its actions are unit
    vectors with Gaussian noise on them, clipped. A teleporter leads to one of three places, by
    chance: beside the goal, back to where the next one is near, or into a cell without a way out.
    So a return is that of one jump, of several, or of none that ever arrives.

    Args:
        noise (float): standard deviation of the noise of each action.
        seed (int): of all that is random.
    """

    def __init__(self, noise: float, seed: int) -> None:
        self.simulator = OGBenchSimulator(TASK)
        self.simulator.reset(seed)
        self.maze = self.simulator.unwrapped
        self.noise, self.generator = noise, np.random.default_rng(seed)
        self.cells = [tuple(cell) for cell in np.argwhere(self.maze.maze_map == 0)]
        self.subgoals = self._subgoals()

    def _subgoals(self) -> dict[tuple[int, int], np.ndarray]:
        """Centre of the cell to head for, from each cell with a way to one of them."""
        maze = self.maze
        ends = [maze.cur_goal_xy, *maze._teleport_info["teleport_in_xys"]]
        steps = [maze.get_oracle_subgoal(end, end)[1] for end in ends]
        subgoals = {}
        for cell in self.cells:
            ways = [(count[cell], end) for count, end in zip(steps, ends) if count[cell] >= 0]
            if ways:
                _, nearest = min(ways, key=lambda way: way[0])
                subgoals[cell], _ = maze.get_oracle_subgoal(maze.ij_to_xy(cell), nearest)
        return subgoals

    @property
    def _way(self) -> np.ndarray | None:
        """From here to the next cell's centre; None where no way leads out."""
        position = self.maze.get_xy()
        subgoal = self.subgoals.get(self.maze.xy_to_ij(position))
        return None if subgoal is None else subgoal - position

    def act(self) -> np.ndarray:
        """An action ``[2]`` at the present position."""
        action, way = self.generator.normal(0, self.noise, 2), self._way
        if way is not None:
            action += way / (np.linalg.norm(way) + 1e-6)
        return action.clip(-1, 1)

    def episode(self, length: int) -> dict[str, np.ndarray]:
        """At most ``length`` steps from a random place, as arrays of OGBench's format."""
        start = self.maze.ij_to_xy(self.cells[self.generator.integers(len(self.cells))])
        self.maze.set_xy(start + self.generator.uniform(-1, 1, 2))
        rows, terminated = [(self.maze.get_xy(), self.act())], False
        while len(rows) <= length and not terminated:
            _, _, terminated, *_ = self.simulator.step(rows[-1][1])
            rows.append((self.maze.get_xy(), self.act()))
        position, action = (np.array(column, dtype=np.float32) for column in zip(*rows))
        terminals = np.zeros(len(rows), dtype=bool)
        terminals[-1] = True
        return {
            "observations": position,
            "actions": action,
            "terminals": terminals,
            "qpos": position,
            "qvel": np.zeros_like(position),
        }

    def discounted_return(self, position: np.ndarray, action: np.ndarray, gamma: float) -> float:
        """Of one walk from ``position`` that begins with ``action``."""
        self.maze.set_xy(position)
        total, discount = 0.0, 1.0
        while discount > TAIL and self._way is not None:
            _, reward, terminated, *_ = self.simulator.step(action)
            total += discount * reward
            discount *= gamma
            if terminated:
                return total
            action = self.act()
        # Shut in, the walker never arrives; otherwise what follows weighs hardly anything.
        return total - discount / (1 - gamma)


class MazeWalk:
    """The evaluation of :class:`Walker`, by data of its walks, in the physics of OGBench.

    Args:
        folder (path-like): where walks and simulated returns are kept; made by the first call.
        gamma (float): discount per step.
        n_step (int): steps of data rewards in a target.
        noise (float): standard deviation of the noise of each action.
        num_transitions (int): of the data, at least.
        episode_length (int): longest walk in the data.
        num_pairs (int): states and actions of other walks whose laws are simulated.
        num_rollouts (int): walks from each of them.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        gamma: float,
        n_step: int,
        noise: float,
        num_transitions: int,
        episode_length: int,
        num_pairs: int,
        num_rollouts: int,
    ) -> None:
        self.gamma = gamma
        sizes = {
            "num_transitions": num_transitions,
            "episode_length": episode_length,
            "num_pairs": num_pairs,
            "num_rollouts": num_rollouts,
        }
        if not 0 < gamma < 1:
            raise ValueError(f"maze.gamma must lie between 0 and 1, got {gamma!r}.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"maze.noise must be finite and at least 0, got {noise!r}.")
        for option, size in sizes.items():
            check_positive(f"maze.{option}", size)
        name = "-".join(map(str, ("walk", f"noise{noise:g}", f"gamma{gamma:g}", *sizes.values())))
        folder = Path(folder) / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole; nothing is left of what was interrupted.
            kept = {"dir": folder.parent, "prefix": ".walk", "ignore_cleanup_errors": True}
            with tempfile.TemporaryDirectory(**kept) as partial:
                _make(Path(partial), noise, gamma, **sizes)
                os.replace(partial, folder)
        data = {"directory": folder, "root": folder}
        self.replay = OGBenchExperienceReplay(TASK, gamma=gamma, n_step=n_step, **data)
        with np.load(folder / "returns.npz") as simulated:
            arrays = {key: torch.from_numpy(simulated[key]) for key in simulated.files}
        self._pairs = arrays["observation"], arrays["action"]
        self._returns = arrays["returns"]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """States and actions whose laws are known."""
        return self._pairs

    def law(self) -> Mixture:
        """As many atoms as walks were simulated."""
        weights = torch.full_like(self._returns, 1 / self._returns.shape[-1])
        return Mixture(self._returns, torch.zeros_like(weights), weights)

    def sample(self, *batch: int) -> TensorDict:
        """Windows of the data."""
        return sample_windows(self.replay, *batch)


def _make(folder: Path, noise, gamma, num_transitions, episode_length, num_pairs, num_rollouts):
    """Walks to learn from, and returns from some places of others."""
    np.savez(folder / DATA, **_collect(Walker(noise, 0), num_transitions, episode_length))
    others = Walker(noise, 1)
    num_others = max(num_pairs, round(OTHER_WALKS * num_transitions))
    walks = _collect(others, num_others, episode_length)
    np.savez(folder / "returns.npz", **_simulate(others, walks, gamma, num_pairs, num_rollouts))


def _collect(walker: Walker, num_transitions: int, episode_length: int) -> dict[str, np.ndarray]:
    episodes, count = [], 0
    with tqdm(total=num_transitions, desc="walks", unit="step") as bar:
        while count < num_transitions:
            episodes.append(walker.episode(episode_length))
            steps = len(episodes[-1]["terminals"]) - 1
            count += steps
            bar.update(steps)
    return {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}


def _simulate(walker: Walker, walks, gamma, num_pairs, num_rollouts) -> dict[str, np.ndarray]:
    rows = np.flatnonzero(~walks["terminals"])
    rows = rows[np.linspace(0, len(rows) - 1, num_pairs).astype(int)]
    observation, action = walks["observations"][rows], walks["actions"][rows]
    returns = np.empty((num_pairs, num_rollouts))
    with tqdm(total=returns.size, desc="simulated returns", unit="walk") as bar:
        for pair in range(num_pairs):
            for rollout in range(num_rollouts):
                start = observation[pair], action[pair]
                returns[pair, rollout] = walker.discounted_return(*start, gamma)
                bar.update()
    return {"observation": observation, "action": action, "returns": returns}
