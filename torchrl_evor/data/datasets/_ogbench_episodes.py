# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One episode of OGBench's scripted behaviour, in the real environments.

The rules (who acts, which noise, when a goal is drawn again) follow the published description of
OGBench's data sets, *OGBench: Benchmarking Offline Goal-Conditioned RL* (arXiv 2410.20092), and
use the oracles that the ``ogbench`` package ships.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections import defaultdict, deque

import numpy as np

from torchrl_evor.data.datasets._ogbench_names import OGBenchFile

_has_ogbench = importlib.util.find_spec("ogbench") is not None

_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))
# Distance, in cells, between start and goal of a "stitch" trajectory.
_STITCH_CELLS = 4
# Range from which an episode draws the probability that a cube is put onto another one.
_STACKING = {
    "cube-single-v0": (0.0, 0.0),
    "cube-double-v0": (0.0, 0.25),
    "cube-triple-v0": (0.05, 0.35),
    "cube-quadruple-v0": (0.1, 0.5),
}
_OTHER_STACKING = (0.5, 0.5)
_MARKOV_NOISE_SHAPE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
_ARRAY_DTYPES = {"terminals": bool, "button_states": np.int64}


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What decides an episode, apart from its seed.

    Args:
        env_id (str): the goal-conditioned environment.
        kind (str): ``"navigate"``, ``"stitch"``, ``"play"`` or ``"noisy"``.
        episode_length (int): transitions per trajectory; one more row is recorded, the last
            state with the action that the controller would take there.
        noise (float): standard deviation of the action noise. Mazes: as it is. ``"play"``: scale of
            the smoothed noise on the plan. ``"noisy"``: upper end of the range that an episode
            draws its own level from.
        p_random_action (float): probability of a uniform action (manipulation only).
        action_noise (float): standard deviation of the noise that the world adds to each action.
            Files hold the commanded action, as after :class:`OGBenchEnv` with ``action_noise``.
    """

    env_id: str
    kind: str
    episode_length: int
    noise: float
    p_random_action: float
    action_noise: float = 0.0

    @classmethod
    def official(cls, file: OGBenchFile, **overrides) -> Behaviour:
        """The behaviour behind an official file; ``overrides`` that are None leave it."""
        noisy = {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}
        values = {
            "episode_length": file.episode_length,
            "noise": 0.5 if file.family == "pointmaze" else 0.1,
            "p_random_action": noisy.get(file.family, 0.0) if file.kind == "noisy" else 0.0,
        }
        values.update({k: v for k, v in overrides.items() if v is not None})
        return cls(env_id=file.env_id, kind=file.kind, **values)


@contextlib.contextmanager
def numpy_seed(seed: int):
    """Seeds numpy's global generator, which OGBench draws from, and puts it back."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def make_episode_source(behaviour: Behaviour) -> MazeEpisodes | ManipulationEpisodes:
    """The environment and controllers for ``behaviour``, ready to draw episodes by seed."""
    if not _has_ogbench:
        raise ImportError("Local collection needs the ogbench package: pip install ogbench==1.2.2")
    if behaviour.kind in ("navigate", "stitch"):
        return MazeEpisodes(behaviour)
    return ManipulationEpisodes(behaviour)


class _Episodes:
    """Runs seeded episodes and returns the columns of OGBench's file format."""

    def __init__(self, behaviour: Behaviour, **env_kwargs):
        import gymnasium
        import ogbench  # noqa: F401  (registers the environments)

        self.behaviour = behaviour
        self.env = gymnasium.make(
            behaviour.env_id,
            terminate_at_goal=False,
            # One row more than transitions: the last state of a trajectory is a row too.
            max_episode_steps=behaviour.episode_length + 1,
            disable_env_checker=True,
            **env_kwargs,
        )

    def __call__(self, seed: int) -> dict[str, np.ndarray]:
        """Plays one episode.

        Args:
            seed (int): decides the whole episode, whatever was played before.

        Returns:
            dict: ``observations``, ``actions``, ``terminals``, ``qpos``, ``qvel`` (and
            ``button_states``), each with ``episode_length + 1`` rows.
        """
        with numpy_seed(seed):
            # Resetting with a seed is what seeds the environment's own generator.
            self.env.reset(seed=seed)
            # Mazes settle their reset with a few random steps.
            self.env.action_space.seed(seed)
            rows = self._play()
        return {
            key: np.asarray(value, dtype=_ARRAY_DTYPES.get(key, np.float32))
            for key, value in rows.items()
        }

    def close(self):
        self.env.close()

    def _step(self, action):
        """Executes an action in a world that may disturb it; nothing is drawn without noise."""
        std = self.behaviour.action_noise
        if std > 0:
            action = np.clip(action + np.random.normal(0, std, np.shape(action)), -1, 1)
        return self.env.step(action)

    def _play(self) -> dict[str, list]:
        raise NotImplementedError

    @staticmethod
    def _record(rows, observation, action, done, info):
        rows["observations"].append(observation)
        rows["actions"].append(action)
        rows["terminals"].append(done)
        rows["qpos"].append(info["prev_qpos"])
        rows["qvel"].append(info["prev_qvel"])
        if "prev_button_states" in info:
            rows["button_states"].append(info["prev_button_states"])


class MazeEpisodes(_Episodes):
    """Pointmaze: walk along the shortest path to a goal cell, with Gaussian action noise.

    ``"navigate"`` draws a new goal whenever one is reached; ``"stitch"`` walks to a goal that is
    four cells away and stays there.
    """

    def __init__(self, behaviour: Behaviour):
        super().__init__(behaviour)
        self._free = self.env.unwrapped.maze_map == 0
        self._cells = [tuple(cell) for cell in np.argwhere(self._free)]
        self._goals = [cell for cell in self._cells if not self._is_corridor(cell)]
        self._subgoals: dict[tuple, np.ndarray] = {}

    def _is_corridor(self, cell) -> bool:
        """Whether the cell has exactly the two free neighbours of a straight passage."""
        up, left, down, right = (self._free[cell[0] + i, cell[1] + j] for i, j in _NEIGHBOURS)
        return (up and down and not left and not right) or (left and right and not up and not down)

    def _cells_at_distance(self, start, distance):
        """Cells whose shortest path from ``start`` has ``distance`` steps."""
        reached = {start: 0}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for i, j in _NEIGHBOURS:
                other = (cell[0] + i, cell[1] + j)
                # The border of the map is wall, so that no index leaves it.
                if self._free[other] and other not in reached:
                    reached[other] = reached[cell] + 1
                    queue.append(other)
        return [cell for cell, steps in reached.items() if steps == distance]

    @staticmethod
    def _pick(cells):
        return cells[np.random.randint(len(cells))]

    def _start_and_goal(self):
        start = self._pick(self._cells)
        if self.behaviour.kind == "navigate":
            return start, self._pick(self._goals)
        return start, self._pick(self._cells_at_distance(start, _STITCH_CELLS) or [start])

    def _subgoal(self, maze, position, goal):
        # The oracle searches the map anew in every step, but only the two cells matter.
        cells = (maze.xy_to_ij(position), maze.xy_to_ij(goal))
        if cells not in self._subgoals:
            self._subgoals[cells], _ = maze.get_oracle_subgoal(position, goal)
        return self._subgoals[cells]

    def _act(self, maze):
        position = maze.get_xy()
        direction = self._subgoal(maze, position, maze.cur_goal_xy) - position
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        action = direction + np.random.normal(0, self.behaviour.noise, direction.shape)
        return np.clip(action, -1, 1)

    def _play(self):
        maze, rows, done = self.env.unwrapped, defaultdict(list), False
        start, goal = self._start_and_goal()
        task = {"init_ij": start, "goal_ij": goal}
        observation, _ = self.env.reset(options={"task_info": task})
        while not done:
            action = self._act(maze)
            following, _, terminated, truncated, info = self._step(action)
            done = terminated or truncated
            if info["success"] and self.behaviour.kind == "navigate":
                maze.set_goal(self._pick(self._goals))
            self._record(rows, observation, action, done, info)
            observation = following
        return rows


class ManipulationEpisodes(_Episodes):
    """Cube, scene and puzzle: one task after another, each given to its own oracle.

    ``"play"`` follows plans with smoothed noise on them; ``"noisy"`` reacts to the state, with
    Gaussian noise whose level is drawn for each episode, and some uniform actions.
    """

    def __init__(self, behaviour: Behaviour):
        super().__init__(behaviour, mode="data_collection")
        self._oracles = _make_oracles(self.env, behaviour)
        self._low, self._high = _STACKING.get(behaviour.env_id, _OTHER_STACKING)

    def _oracle(self, observation, info):
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        return oracle

    def _act(self, oracle, observation, info, noise):
        if np.random.rand() < self.behaviour.p_random_action:
            # The environment makes a new, unseeded action space whenever it is asked for one.
            return np.random.uniform(-1, 1, size=_MARKOV_NOISE_SHAPE.shape)
        action = np.array(oracle.select_action(observation, info))
        if self.behaviour.kind == "noisy":
            action = action + np.random.normal(0, noise * _MARKOV_NOISE_SHAPE)
        return np.clip(action, -1, 1)

    def _play(self):
        while True:
            rows = self._play_once()
            # A scene whose cube left the table shows ambiguous goals: drawn again.
            if self.behaviour.env_id != "scene-v0" or _cube_is_visible(np.asarray(rows["qpos"])):
                return rows

    def _play_once(self):
        rows, done = defaultdict(list), False
        observation, info = self.env.reset()
        p_stack = np.random.uniform(self._low, self._high)
        noise = np.random.uniform(0, self.behaviour.noise)
        oracle = self._oracle(observation, info)
        while not done:
            action = self._act(oracle, observation, info, noise)
            following, _, terminated, truncated, info = self._step(action)
            done = terminated or truncated
            self._record(rows, observation, action, done, info)
            if oracle.done:
                # The oracle starts from the new target; `info` of the next step carries it too.
                oracle = self._oracle(*self.env.unwrapped.set_new_target(p_stack=p_stack))
            observation = following
        return rows


def _make_oracles(env, behaviour: Behaviour) -> dict:
    """One oracle for each kind of object, keyed as OGBench names its target tasks."""
    from ogbench.manipspace.oracles.markov import (
        button_markov,
        cube_markov,
        drawer_markov,
        window_markov,
    )
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    family = behaviour.env_id.split("-")[0]
    closed = {"gripper_always_closed": True} if family == "puzzle" else {}
    if behaviour.kind == "play":
        shared = {"env": env, "noise": behaviour.noise, "noise_smoothing": 0.5}
        made = {
            "cube": lambda: cube_plan.CubePlanOracle(**shared),
            "button": lambda: button_plan.ButtonPlanOracle(**shared, **closed),
            "drawer": lambda: drawer_plan.DrawerPlanOracle(**shared),
            "window": lambda: window_plan.WindowPlanOracle(**shared),
        }
    else:
        shared = {"env": env, "min_norm": 0.4}
        patience = {"max_step": 100} if family == "scene" else {}
        made = {
            "cube": lambda: cube_markov.CubeMarkovOracle(**shared, **patience),
            "button": lambda: button_markov.ButtonMarkovOracle(**shared, **closed),
            "drawer": lambda: drawer_markov.DrawerMarkovOracle(**shared),
            "window": lambda: window_markov.WindowMarkovOracle(**shared),
        }
    needed = {"cube": ("cube",), "puzzle": ("button",)}.get(family, tuple(made))
    return {name: made[name]() for name in needed}


def _cube_is_visible(qpos: np.ndarray) -> bool:
    """Whether the scene's cube stayed on the table or in the drawer during a whole episode."""
    _, y, z = qpos[:, 14:17].T  # the cube's position follows the arm's 14 joints
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return not ((y >= 0.29).any() or ((y <= -0.3) & ~in_drawer).any())
