# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import difflib
import importlib.util
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data.tensor_specs import Binary, Bounded, Composite, Unbounded
from torchrl.envs.common import EnvBase

from torchrl_evor.envs.transforms.action_noise import GaussianActionNoise

_has_ogbench = importlib.util.find_spec("ogbench") is not None

RewardType = Literal["default", "sparse"]

# A dataset id carries the behaviour that collected it, an environment id does not.
_MAZE_DATASETS = ("navigate", "stitch", "explore")
_MANIPULATION_DATASETS = ("play", "noisy")
# Float32 policies that squash or clip may overshoot the bounds by rounding.
_ACTION_TOLERANCE = 1e-4
_MODEL_FILES = threading.Lock()


def available_environments() -> list[str]:
    """Environment ids of OGBench's state-based single-task environments.

    Examples:
        >>> from torchrl_evor.envs import available_environments
        >>> "cube-double-singletask-task2-v0" in available_environments()
        True
    """
    registry = _import_gymnasium().registry
    return [
        name
        for name, spec in registry.items()
        if "ogbench" in str(spec.entry_point)
        and "singletask" in name.split("-")
        and not name.startswith(("visual", "powderworld"))
    ]


def resolve_environment(name: str) -> str:
    """Environment id that a dataset id, or an environment id, stands for.

    Args:
        name (str): a dataset id such as ``"pointmaze-medium-navigate-singletask-task1-v0"``, or an
            environment id such as ``"pointmaze-medium-singletask-task1-v0"``.

    Returns:
        The id that ``gymnasium.make`` understands.

    Raises:
        ValueError: if there is no such environment; the nearest name is suggested.

    Examples:
        >>> from torchrl_evor.envs import resolve_environment
        >>> resolve_environment("cube-single-play-singletask-task1-v0")
        'cube-single-singletask-task1-v0'
    """
    environments = available_environments()
    known = {env_id: env_id for env_id in environments}
    known.update(
        (dataset_id, env_id) for env_id in environments for dataset_id in _dataset_ids(env_id)
    )
    if name in known:
        return known[name]
    # OGBench's goal-conditioned names lack the word, which would send the search astray.
    guess = name if "singletask" in name else name.removesuffix("-v0") + "-singletask-v0"
    near = difflib.get_close_matches(guess, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        "name must be a state-based single-task OGBench environment or dataset such as "
        f"'pointmaze-medium-navigate-singletask-task1-v0', got {name!r}. Did you mean {near!r}?"
    )


def _dataset_ids(env_id: str) -> list[str]:
    """Dataset ids of one environment: the behaviour goes right before ``singletask``."""
    head, tail = env_id.split("-singletask", 1)
    is_maze = "maze" in head or "soccer" in head
    kinds = _MAZE_DATASETS if is_maze else _MANIPULATION_DATASETS
    return [f"{head}-{kind}-singletask{tail}" for kind in kinds]


def _import_gymnasium():
    if not _has_ogbench:
        raise ImportError("OGBenchEnv needs ogbench: pip install 'torchrl_evor[ogbench]'.")
    with _quiet():
        import gymnasium
        import ogbench  # noqa: F401 - registers the environments

    return gymnasium


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides two remarks: glfw's on a missing display, gymnasium's on bounds stored as float32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*DISPLAY.*")
        warnings.filterwarnings("ignore", message=".*precision lowered.*")
        yield


@contextmanager
def _remove_model_files() -> Iterator[None]:
    """Closes and deletes the files that OGBench's mazes are loaded from and that they leave open.

    A maze writes its walls to a temporary file and keeps the descriptor; a process may have some
    1024 of them.
    """
    mkstemp, thread, files = tempfile.mkstemp, threading.get_ident(), []

    def record(suffix=None, *args, **kwargs):
        file = mkstemp(suffix, *args, **kwargs)
        if suffix == ".xml" and threading.get_ident() == thread:
            files.append(file)
        return file

    with _MODEL_FILES:  # or two threads would undo each other's
        tempfile.mkstemp = record
        try:
            yield
        finally:
            tempfile.mkstemp = mkstemp
            for descriptor, path in files:
                os.close(descriptor)
                os.unlink(path)


class OGBenchSimulator:
    """One OGBench environment in plain numpy: the ground of :class:`OGBenchEnv` and of evaluation.

    It adds to the gymnasium environment what a reproducible evaluation needs: float32
    observations, actions that are checked, success in the return value, and randomness of its own.
    OGBench's mazes draw start positions and teleports from numpy's *global* generator; here that
    state is private to each simulator, so that neither other simulators nor other users of
    ``numpy.random`` change an episode, and no episode changes them.

    Args:
        name (str): environment or dataset id, see :func:`resolve_environment`.
        max_episode_steps (int, optional): steps after which an episode is truncated. Defaults to
            ``None``, OGBench's own limit.
        action_noise (float, optional): standard deviation of the Gaussian noise that the world
            adds to each action, see :class:`~torchrl_evor.envs.GaussianActionNoise`.
            Defaults to ``0.0``.
        reward_type (str, optional): ``"default"`` is OGBench's reward (the number of unmet goals,
            negated); ``"sparse"`` is ``-1`` until all goals are met, then ``0``. They coincide
            where the task has one goal. Defaults to ``"default"``.

    Examples:
        >>> import numpy as np
        >>> from torchrl_evor.envs import OGBenchSimulator
        >>> simulator = OGBenchSimulator("pointmaze-medium-singletask-task1-v0")
        >>> observation = simulator.reset(seed=0)
        >>> observation.shape, observation.dtype
        ((2,), dtype('float32'))
        >>> observation, reward, terminated, truncated, success = simulator.step(np.zeros(2))
        >>> reward, terminated, truncated, success
        (-1.0, False, False, False)
    """

    def __init__(
        self,
        name: str,
        *,
        max_episode_steps: int | None = None,
        action_noise: float = 0.0,
        reward_type: RewardType = "default",
    ) -> None:
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}.")
        if reward_type not in ("default", "sparse"):
            raise ValueError(f"reward_type must be 'default' or 'sparse', got {reward_type!r}.")
        self.name = resolve_environment(name)
        self._sparse = reward_type == "sparse"
        gymnasium = _import_gymnasium()
        with _quiet(), _remove_model_files():
            self._env = gymnasium.make(
                self.name, max_episode_steps=max_episode_steps, disable_env_checker=True
            )
            self._action_space = self._env.unwrapped.action_space
            self.observation_shape: tuple[int, ...] = self._env.observation_space.shape
        self.max_episode_steps: int = self._env.spec.max_episode_steps
        self.action_low: np.ndarray = self._action_space.low.astype(np.float32)
        self.action_high: np.ndarray = self._action_space.high.astype(np.float32)
        self.noise = GaussianActionNoise(action_noise, self.action_low, self.action_high)
        self._random_state = np.random.RandomState().get_state()
        # Only teleporting mazes draw from the global generator while stepping.
        self._steps_are_random = getattr(self._env.unwrapped, "_teleport_info", None) is not None

    @property
    def unwrapped(self):
        """The OGBench environment itself, for example to read a maze's map."""
        return self._env.unwrapped

    @contextmanager
    def _private_randomness(self) -> Iterator[None]:
        outer = np.random.get_state()
        np.random.set_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = np.random.get_state()
            np.random.set_state(outer)

    def _seed(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}.")
        # The legacy generator takes 32 bits; a SeedSequence folds any larger seed into them.
        folded, noise_seed = np.random.SeedSequence(seed).generate_state(2)
        self._random_state = np.random.RandomState(folded).get_state()
        self._action_space.seed(int(folded))  # mazes settle by random actions
        self.noise.seed(int(noise_seed))

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Starts an episode.

        Args:
            seed (int, optional): makes this episode, and all that follow without a seed,
                a function of the seed and of the actions. Defaults to ``None``, which continues.

        Returns:
            The first observation, float32.
        """
        if seed is not None:
            self._seed(seed)
        with self._private_randomness(), _quiet():
            observation, _ = self._env.reset(seed=seed)
        return np.asarray(observation, dtype=np.float32)

    def _check_action(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, dtype=np.float32)
        if action.shape != self.action_low.shape:
            raise ValueError(
                f"action must have the shape {self.action_low.shape}, got {action.shape}."
            )
        inside = (action >= self.action_low - _ACTION_TOLERANCE) & (
            action <= self.action_high + _ACTION_TOLERANCE
        )
        if not inside.all():  # NaN compares as outside
            raise ValueError(
                "action must be finite and lie between "
                f"{self.action_low.min()} and {self.action_high.max()}, got {action}."
            )
        return np.minimum(np.maximum(action, self.action_low), self.action_high)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        """Executes one action.

        Args:
            action (np.ndarray): of the shape of ``action_low``, within the bounds.

        Returns:
            Observation (float32), reward, terminated, truncated, success.

        Raises:
            ValueError: if ``action`` has another shape, holds NaN or leaves the bounds by more
                than ``1e-4``.
        """
        action = self.noise(self._check_action(action))
        if self._steps_are_random:
            with self._private_randomness():
                observation, reward, terminated, truncated, info = self._env.step(action)
        else:
            observation, reward, terminated, truncated, info = self._env.step(action)
        if self._sparse:
            reward = 0.0 if reward == 0 else -1.0
        return (
            np.asarray(observation, dtype=np.float32),
            float(reward),
            bool(terminated),
            bool(truncated),
            bool(info["success"]),
        )

    def close(self) -> None:
        """Frees the simulation."""
        self._env.close()


class OGBenchEnv(EnvBase):
    """An OGBench single-task environment as a TorchRL environment.

    OGBench, ``arXiv:2410.20092``. Observations are the simulator's state as float32, actions are
    bounded, and ``("next", "success")`` tells whether the task's goal is met. As in OGBench,
    success ends an episode (``terminated``) and is judged on the state *before* the step; the step
    limit ends it with ``truncated``.

    Args:
        name (str): dataset id such as ``"cube-single-play-singletask-task1-v0"``, or environment id
            (the same without the behaviour, here ``play``).
        max_episode_steps (int, optional): steps after which an episode is truncated. Defaults to
            ``None``, OGBench's own limit.
        action_noise (float, optional): standard deviation of the Gaussian noise that the world
            adds to each action. Defaults to ``0.0``.
        reward_type (str, optional): ``"default"`` or ``"sparse"``, see :class:`OGBenchSimulator`.
            Defaults to ``"default"``.
        device (torch.device or str, optional): device of the tensors; the physics run on the CPU.
            Defaults to ``None``.

    Raises:
        ValueError: if there is no environment called ``name``; the nearest name is suggested.

    Examples:
        >>> from torchrl_evor.envs import OGBenchEnv
        >>> env = OGBenchEnv("pointmaze-medium-navigate-singletask-task1-v0")
        >>> seed = env.set_seed(0)
        >>> rollout = env.rollout(3)
        >>> rollout["observation"].shape, rollout["next", "success"].shape
        (torch.Size([3, 2]), torch.Size([3, 1]))
    """

    def __init__(
        self,
        name: str,
        *,
        max_episode_steps: int | None = None,
        action_noise: float = 0.0,
        reward_type: RewardType = "default",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(device=device, batch_size=torch.Size([]))
        self.simulator = OGBenchSimulator(
            name,
            max_episode_steps=max_episode_steps,
            action_noise=action_noise,
            reward_type=reward_type,
        )
        self._pending_seed: int | None = None
        self._make_specs()

    @property
    def name(self) -> str:
        """The environment id, without the behaviour of a dataset id."""
        return self.simulator.name

    def _make_specs(self) -> None:
        device = self.device
        shape = self.simulator.observation_shape
        self.observation_spec = Composite(
            observation=Unbounded(shape, dtype=torch.float32, device=device),
            success=Binary(shape=(1,), dtype=torch.bool, device=device),
            device=device,
        )
        self.action_spec = Bounded(
            torch.from_numpy(self.simulator.action_low),
            torch.from_numpy(self.simulator.action_high),
            dtype=torch.float32,
            device=device,
        )
        self.reward_spec = Unbounded((1,), dtype=torch.float32, device=device)
        flag = Binary(shape=(1,), dtype=torch.bool, device=device)
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), device=device
        )

    def _pack(self, observation, terminated, truncated, success, **entries) -> TensorDict:
        return TensorDict(
            {
                "observation": torch.from_numpy(observation.copy()),
                "success": torch.tensor([success]),
                "done": torch.tensor([terminated or truncated]),
                "terminated": torch.tensor([terminated]),
                "truncated": torch.tensor([truncated]),
                **entries,
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _reset(
        self, tensordict: TensorDictBase | None = None, *, seed: int | None = None
    ) -> TensorDict:
        seed, self._pending_seed = self._pending_seed if seed is None else seed, None
        return self._pack(self.simulator.reset(seed), False, False, False)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict.get(self.action_key).detach().cpu().numpy()
        observation, reward, terminated, truncated, success = self.simulator.step(action)
        return self._pack(
            observation, terminated, truncated, success, reward=torch.tensor([reward])
        )

    def _set_seed(self, seed: int | None) -> None:
        # Applied by the next reset, which is where OGBench draws its randomness.
        self._pending_seed = seed

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Frees the simulation."""
        if not self.is_closed:
            self.simulator.close()
        super().close(raise_if_closed=raise_if_closed)
