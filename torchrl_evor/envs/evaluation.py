# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.envs import EnvBase

_has_tqdm = importlib.util.find_spec("tqdm") is not None

Trace = Literal["observation", "action"]


class EpisodeSimulator(Protocol):
    """What :func:`rollout_episodes` asks of an environment (see ``OGBenchSimulator``)."""

    action_low: np.ndarray

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Starts the episode that ``seed`` determines and returns its first observation."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        """Returns observation, reward, terminated, truncated, success."""


def rollout_episodes(
    envs: Callable[[], EpisodeSimulator] | Sequence[EpisodeSimulator] | EnvBase,
    policy: Callable[[TensorDictBase], TensorDictBase],
    num_episodes: int,
    *,
    seed: int,
    num_envs: int = 16,
    chunk_size: int = 1,
    record: Sequence[Trace] = (),
    device: torch.device | str | None = None,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    progress: bool = False,
) -> TensorDict:
    """Runs whole episodes with one policy call per step for all that are running.

    The environments are stepped in this process by a bare loop; what costs time is the policy, and
    that is called once for the stacked observations of all running episodes. Episode ``i`` is reset
    with ``seed + i``, so what the environment draws does not depend on ``num_envs``. A policy
    that draws random numbers shares its generator among the episodes of a call: its runs are
    repeatable for a given ``num_envs`` only.

    Exploration mode and gradients of the policy call are the caller's: wrap the call in
    ``set_exploration_type`` to choose; gradients are off.

    Args:
        envs (callable, sequence or EnvBase): makes one environment, or is what is to be used. Each
            is an :class:`EpisodeSimulator` or has one as its ``simulator``, as
            :class:`~torchrl_evor.envs.OGBenchEnv` does. What a callable made is closed at the end.
        policy (callable): any TensorDict callable that reads ``observation_key``
            (``[n, observation]``) and writes ``action_key`` (``[n, chunk_size * action]``).
        num_episodes (int): number of episodes.
        seed (int): seed of the first episode; the following ones count up.
        num_envs (int, optional): how many run at once if ``envs`` is a callable.
            Defaults to ``16``.
        chunk_size (int, optional): actions in one decision, executed open loop until the chunk or
            the episode ends. Defaults to ``1``.
        record (sequence of str, optional): any of ``"observation"`` and ``"action"``, to be
            returned as traces. Defaults to none.
        device (torch.device or str, optional): where the policy wants its observations.
            Defaults to ``None``, the CPU.
        observation_key (NestedKey, optional): the policy's input. Defaults to ``"observation"``.
        action_key (NestedKey, optional): the policy's output. Defaults to ``"action"``.
        progress (bool, optional): shows a bar of finished episodes and decisions.
            Defaults to ``False``.

    Returns:
        A TensorDict of batch size ``[num_episodes]`` on the CPU, episode ``i`` at index ``i``:
        ``success`` (bool, in any step), ``return`` (undiscounted sum of rewards), ``length``
        (steps), ``seed``, ``decisions`` (policy calls that it took part in), ``policy_seconds``
        (its share of the time of those calls), and for each trace in ``record`` an entry
        ``("trace", name)`` of shape ``[num_episodes, longest, feature]``, padded with NaN
        (observations hold one more step than actions: the last one reached).

    Raises:
        ValueError: if a number is below 1, ``envs`` is empty, holds one twice or one without a
            simulator of its own (a ``TransformedEnv``, whose transforms would not be heeded), a
            trace is unknown, or the policy's action has the wrong shape.
        KeyError: if the policy does not write ``action_key``.

    Examples:
        >>> from torchrl_evor.envs import OGBenchEnv, rollout_episodes
        >>> def policy(td):
        ...     return td.set("action", td["observation"].new_ones(td.batch_size[0], 2))
        >>> name = "pointmaze-medium-navigate-singletask-task1-v0"
        >>> episodes = rollout_episodes(
        ...     lambda: OGBenchEnv(name, max_episode_steps=20), policy, num_episodes=3, seed=0
        ... )
        >>> episodes["length"].tolist(), episodes["return"].tolist()
        ([20, 20, 20], [-20.0, -20.0, -20.0])
    """
    _check_arguments(num_episodes, num_envs, chunk_size, record)
    bar = _progress_bar(num_episodes, progress)
    if isinstance(envs, EnvBase):  # which is callable, too
        envs = [envs]
    made = callable(envs)
    owned = [envs() for _ in range(min(num_envs, num_episodes))] if made else list(envs)
    if not owned:
        raise ValueError("envs must hold at least one environment, got an empty sequence.")
    decide = _Decider(policy, chunk_size, device, observation_key, action_key)
    try:
        simulators = [_simulator(env) for env in owned]
        if len(set(map(id, simulators))) < len(simulators):
            raise ValueError("envs must be different environments, got one more than once.")
        episodes = _run(simulators, decide, num_episodes, seed, bar)
    finally:
        bar.close()
        for env in owned if made else ():
            env.close()
    return _collate(episodes, record)


def _simulator(env):
    """What of an environment steps in numpy: its own simulator, or itself."""
    # Not by getattr, with which a TransformedEnv answers for the one below its transforms.
    if not isinstance(env, EnvBase) or inspect.getattr_static(env, "simulator", None) is not None:
        return getattr(env, "simulator", env)
    raise ValueError(
        f"envs must have a simulator of their own, as OGBenchEnv has, got {type(env).__name__}: "
        f"its transforms or its batch would not be heeded."
    )


class _Decider:
    """Stacks observations, asks the policy once, hands out chunks of actions."""

    def __init__(self, policy, chunk_size, device, observation_key, action_key) -> None:
        self.policy = policy
        self.chunk_size = chunk_size
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self.observation_key = observation_key
        self.action_key = action_key

    def __call__(self, observations: list[np.ndarray], action_dim: int) -> np.ndarray:
        """Maps n observations to actions ``[n, chunk_size, action_dim]``."""
        stacked = torch.from_numpy(np.stack(observations)).to(self.device)
        tensordict = TensorDict(batch_size=stacked.shape[:1], device=self.device)
        tensordict.set(self.observation_key, stacked)
        with torch.no_grad():
            tensordict = self.policy(tensordict)
        action = tensordict.get(self.action_key, None)
        if action is None:
            raise KeyError(f"policy did not write action_key={self.action_key!r}.")
        expected = (len(observations), self.chunk_size * action_dim)
        if tuple(action.shape) != expected:
            raise ValueError(
                f"policy must write {self.action_key!r} of shape [episodes, chunk_size * action] = "
                f"{list(expected)}, got {list(action.shape)}."
            )
        # The copy to the CPU waits for the device, so timing around this call is honest.
        return action.cpu().numpy().reshape(len(observations), self.chunk_size, action_dim)


class _Episode:
    """One running episode and what is counted along it."""

    def __init__(self, index: int, simulator: EpisodeSimulator, seed: int) -> None:
        self.index, self.simulator, self.seed = index, simulator, seed
        self.observations = [simulator.reset(seed)]
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.success = self.done = False
        self.decisions, self.policy_seconds = 0, 0.0

    def execute(self, chunk: np.ndarray) -> None:
        """Steps through a chunk ``[h, action]``, no further than the episode's end."""
        for action in chunk:
            observation, reward, terminated, truncated, success = self.simulator.step(action)
            self.observations.append(observation)
            self.actions.append(action)
            self.rewards.append(reward)
            self.success |= success
            self.done = terminated or truncated
            if self.done:
                return


def _run(simulators, decide, num_episodes, seed, bar) -> list[_Episode]:
    """Keeps every simulator busy until all episodes are done; results ordered by index."""
    waiting = iter(range(num_episodes))
    running = [_Episode(i, s, seed + i) for s, i in zip(simulators, waiting)]
    finished: list[_Episode] = []
    decisions = 0
    while running:
        _advance(running, decide)
        decisions += 1
        still_running = []
        for episode in running:
            if not episode.done:
                still_running.append(episode)
                continue
            finished.append(episode)
            index = next(waiting, None)
            if index is not None:
                still_running.append(_Episode(index, episode.simulator, seed + index))
        running = still_running
        bar.set_postfix(decisions=decisions, refresh=False)
        bar.update(len(finished) - bar.n)
    return sorted(finished, key=lambda episode: episode.index)


def _advance(running: list[_Episode], decide: _Decider) -> None:
    """One decision for every running episode."""
    action_dim = running[0].simulator.action_low.shape[-1]
    start = time.perf_counter()
    chunks = decide([episode.observations[-1] for episode in running], action_dim)
    share = (time.perf_counter() - start) / len(running)
    for episode, chunk in zip(running, chunks):
        episode.decisions += 1
        episode.policy_seconds += share
        episode.execute(chunk)


def _collate(episodes: list[_Episode], record: Sequence[Trace]) -> TensorDict:
    columns = {
        "success": torch.tensor([e.success for e in episodes]),
        "return": torch.tensor([sum(e.rewards) for e in episodes]),
        "length": torch.tensor([len(e.rewards) for e in episodes]),
        "seed": torch.tensor([e.seed for e in episodes]),
        "decisions": torch.tensor([e.decisions for e in episodes]),
        "policy_seconds": torch.tensor([e.policy_seconds for e in episodes], dtype=torch.float64),
    }
    traces = {name: _pad([getattr(e, f"{name}s") for e in episodes]) for name in record}
    if traces:
        columns["trace"] = TensorDict(traces, batch_size=[len(episodes)])
    return TensorDict(columns, batch_size=[len(episodes)])


def _pad(traces: list[list[np.ndarray]]) -> torch.Tensor:
    rows = [torch.from_numpy(np.stack(trace)).float() for trace in traces]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def _check_arguments(num_episodes, num_envs, chunk_size, record) -> None:
    counts = {"num_episodes": num_episodes, "num_envs": num_envs, "chunk_size": chunk_size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    unknown = set(record) - {"observation", "action"}
    if isinstance(record, str) or unknown:
        raise ValueError(
            f"record must be a sequence of 'observation' and 'action', got {record!r}."
        )


class _NoBar:
    n = 0

    def set_postfix(self, **values) -> None:
        pass

    def update(self, n: int) -> None:
        pass

    def close(self) -> None:
        pass


def _progress_bar(total: int, progress: bool):
    if not progress:
        return _NoBar()
    if not _has_tqdm:
        raise ImportError("progress=True needs tqdm: pip install tqdm.")
    from tqdm import tqdm

    # Episodes end all at once after many decisions: the count of these shows that it runs, and
    # an estimate of the time left would mislead.
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    options = {"unit": "episode", "leave": False, "miniters": 0, "mininterval": 0.5}
    return tqdm(total=total, desc="evaluation", bar_format=form, **options)
