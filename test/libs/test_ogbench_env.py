# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import (
    Compose,
    FlattenAction,
    MultiAction,
    ParallelEnv,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from torchrl_evor import EVORActor, FlowMatchingPolicy, ReturnFlow, VelocityMLP
from torchrl_evor.envs import (
    GaussianActionNoise,
    OGBenchEnv,
    OGBenchSimulator,
    available_environments,
    resolve_environment,
    rollout_episodes,
)

_has_ogbench = importlib.util.find_spec("ogbench") is not None
needs_ogbench = pytest.mark.skipif(not _has_ogbench, reason="ogbench not installed")

MAZE = "pointmaze-medium-navigate-singletask-task1-v0"
CUBE = "cube-single-play-singletask-task1-v0"


def make_maze(max_episode_steps=20, **kwargs):
    return OGBenchEnv(MAZE, max_episode_steps=max_episode_steps, **kwargs)


def drive_to_goal(env):
    """A policy that follows the shortest path which OGBench computes for its own controllers."""
    maze = env.simulator.unwrapped

    def policy(td):
        rows = td["observation"].double().reshape(-1, 2).numpy()
        targets = [maze.get_oracle_subgoal(xy, maze.cur_goal_xy)[0] for xy in rows]
        step = (np.array(targets) - rows) / 0.2
        action = torch.from_numpy(step).float().clamp(-1, 1)
        return td.set("action", action.reshape(td["observation"].shape))

    return policy


@needs_ogbench
class TestNames:
    @pytest.mark.parametrize(
        "name, expected",
        [
            (MAZE, "pointmaze-medium-singletask-task1-v0"),
            ("pointmaze-large-stitch-singletask-v0", "pointmaze-large-singletask-v0"),
            ("scene-play-singletask-task5-v0", "scene-singletask-task5-v0"),
            ("antsoccer-arena-navigate-singletask-v0", "antsoccer-arena-singletask-v0"),
            ("cube-double-singletask-task2-v0", "cube-double-singletask-task2-v0"),
        ],
    )
    def test_resolve(self, name, expected):
        assert resolve_environment(name) == expected

    @pytest.mark.parametrize(
        "name, suggestion",
        [
            ("pointmaze-medum-navigate-singletask-task1-v0", MAZE),
            ("cube-single-pley-singletask-task1-v0", CUBE),
            ("cube-single-navigate-singletask-task1-v0", "cube-single"),  # mazes are navigated
            ("cube-single-v0", "cube-single-singletask-v0"),  # goal-conditioned
            ("visual-cube-single-play-singletask-v0", "cube-single-play-singletask-v0"),
            ("", "v0"),
        ],
    )
    def test_unknown_names_suggest_the_nearest(self, name, suggestion):
        with pytest.raises(ValueError, match=r"name must be .* Did you mean") as error:
            OGBenchEnv(name)
        assert suggestion in str(error.value).split("Did you mean")[1]

    def test_available(self):
        names = available_environments()
        # 28 state-based environments (12 mazes, 2 soccer, 5 cubes, scene, 4 puzzles), each with
        # five tasks and a default
        assert len(names) == 24 * 6
        assert not [name for name in names if "visual" in name]

    def test_bad_options(self):
        with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
            OGBenchEnv(MAZE, max_episode_steps=0)
        with pytest.raises(ValueError, match="reward_type must be 'default' or 'sparse'"):
            OGBenchEnv(MAZE, reward_type="dense")
        with pytest.raises(ValueError, match="std must be a finite number"):
            OGBenchEnv(MAZE, action_noise=-0.1)


@needs_ogbench
class TestOGBenchEnv:
    def test_specs(self):
        env = make_maze()
        check_env_specs(env)
        assert env.observation_spec["observation"].shape == (2,)
        assert env.observation_spec["observation"].dtype is torch.float32
        assert env.observation_spec["success"].dtype is torch.bool
        assert env.action_spec.space.low.tolist() == [-1, -1]
        assert env.action_spec.space.high.tolist() == [1, 1]
        assert env.reward_spec.shape == (1,)

    def test_manipulation_specs(self):
        env = OGBenchEnv(CUBE)
        check_env_specs(env)
        assert env.observation_spec["observation"].shape == (28,)
        assert env.action_spec.shape == (5,)

    def test_limit_of_ogbench(self):
        assert OGBenchEnv(MAZE).simulator.max_episode_steps == 1000

    def test_truncation(self):
        env = make_maze(max_episode_steps=4)
        rollout = env.rollout(10, auto_reset=True)
        assert rollout.shape == (4,)
        assert rollout["next", "truncated"].flatten().tolist() == [False, False, False, True]
        assert not rollout["next", "terminated"].any()
        assert (rollout["next", "reward"] == -1).all()

    def test_success_terminates(self):
        env = make_maze(max_episode_steps=None)
        env.set_seed(0)
        rollout = env.rollout(1000, drive_to_goal(env))
        success = rollout["next", "success"].flatten()
        assert rollout.shape[0] < 1000
        assert success[-1] and not success[:-1].any()
        assert rollout["next", "terminated"][-1] and not rollout["next", "truncated"][-1]
        # -1 for each step until the goal, 0 for the one that is judged to be there
        assert rollout["next", "reward"].flatten()[-1] == 0
        assert (rollout["next", "reward"].flatten()[:-1] == -1).all()

    def test_same_seed_same_episodes(self):
        def two_episodes(seed):
            env = make_maze()
            env.set_seed(seed)
            torch.manual_seed(0)
            return torch.cat([env.rollout(20), env.rollout(20)])

        first, second, other = two_episodes(3), two_episodes(3), two_episodes(4)
        assert (first["next", "observation"] == second["next", "observation"]).all()
        assert (first["observation"][0] != other["observation"][0]).any()
        assert (first["observation"][0] != first["observation"][20]).any()

    def test_global_numpy_state_is_neither_read_nor_written(self):
        env = make_maze()
        np.random.seed(0)
        before = np.random.get_state()[1].copy()
        start = env.reset(seed=7)["observation"]
        assert (np.random.get_state()[1] == before).all()
        np.random.seed(1)
        assert (env.reset(seed=7)["observation"] == start).all()

    def test_teleports_are_seeded(self):
        # The teleport's exit is drawn while stepping, from numpy's global generator.
        def trace(seed):
            simulator = OGBenchSimulator("pointmaze-teleport-singletask-task2-v0")
            simulator.reset(seed)
            maze = simulator.unwrapped
            maze.set_xy(np.array(maze._teleport_info["teleport_in_xys"][0]))
            simulator.step(np.zeros(2))
            return maze.get_xy()

        np.random.seed(0)
        ends = [trace(seed) for seed in range(6)]
        np.random.seed(1)
        assert all((trace(seed) == end).all() for seed, end in enumerate(ends))
        assert len({tuple(end.tolist()) for end in ends}) > 1

    def test_large_seed(self):
        env = make_maze()
        assert (
            env.reset(seed=2**40)["observation"] != env.reset(seed=2**40 + 1)["observation"]
        ).any()

    @pytest.mark.parametrize("action", [[float("nan"), 0], [0, 1.001], [float("-inf"), 0]])
    def test_bad_action(self, action):
        env = make_maze()
        td = env.reset()
        with pytest.raises(ValueError, match="action must be finite and lie between -1.0 and 1.0"):
            env.step(td.set("action", torch.tensor(action)))

    def test_bad_action_shape(self):
        with pytest.raises(ValueError, match=r"action must have the shape \(2,\), got \(3,\)"):
            make_maze().simulator.step(np.zeros(3))

    def test_rounding_is_tolerated(self):
        simulator = make_maze().simulator
        start = simulator.reset(seed=0)
        moved = simulator.step(np.array([1 + 5e-5, 0]))[0]
        simulator.reset(seed=0)
        assert (moved == simulator.step(np.array([1.0, 0]))[0]).all()
        assert moved[0] > start[0]

    @pytest.mark.parametrize(
        "batched",
        [SerialEnv, partial(ParallelEnv, mp_start_method="fork")],  # spawning imports torch anew
        ids=["SerialEnv", "ParallelEnv"],
    )
    def test_batched(self, batched):
        env = batched(2, make_maze)
        try:
            env.set_seed(0)
            rollout = env.rollout(45, break_when_any_done=False)
        finally:
            env.close()
        assert rollout.shape == (2, 45)
        ends = rollout["next", "done"].squeeze(-1).nonzero()
        assert ends.tolist() == [[0, 19], [0, 39], [1, 19], [1, 39]]
        assert (rollout["observation"][0, 0] != rollout["observation"][1, 0]).any()

    def test_collector(self):
        collector = Collector(make_maze, frames_per_batch=30, total_frames=60)
        try:
            batches = list(collector)
        finally:
            collector.shutdown()
        assert [batch.numel() for batch in batches] == [30, 30]
        assert batches[0]["next", "success"].dtype is torch.bool

    def test_chunks_of_actions_through_torchrls_transforms(self):
        chunks = Compose(MultiAction(), FlattenAction(action_shape=(3, 2)))
        env = TransformedEnv(make_maze(max_episode_steps=7), chunks)
        executed = []
        simulator = env.base_env.simulator
        step = simulator.step
        simulator.step = lambda action: executed.append(action.tolist()) or step(action)
        policy = FlowMatchingPolicy(VelocityMLP(2 + 6 + 1, 6, hidden_sizes=(8,)), action_dim=6)
        returns = ReturnFlow(VelocityMLP(2 + 6 + 2, hidden_sizes=(8,)))
        rollout = env.rollout(10, EVORActor(policy, returns, num_candidates=2, num_samples=2))
        assert rollout.shape == (3,)  # 3 + 3 + 1 steps
        assert rollout["next", "truncated"].flatten().tolist() == [False, False, True]
        actions = rollout["action"].unflatten(-1, (3, 2)).flatten(0, 1)[:7]
        np.testing.assert_allclose(executed, actions, rtol=1e-6)

    def test_sparse_reward(self):
        # Scene has five sub-goals; at the start of task 2 more than one of them is unmet.
        rewards = {}
        for reward_type in ("default", "sparse"):
            simulator = OGBenchSimulator("scene-singletask-task2-v0", reward_type=reward_type)
            simulator.reset(seed=0)
            rewards[reward_type] = simulator.step(np.zeros(5))[1]
        assert rewards["default"] < -1
        assert rewards["sparse"] == -1

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of descriptors")
    def test_nothing_is_left_open(self, tmp_path, monkeypatch):
        """OGBench's mazes leave an open file each, which a process has no thousand of."""
        make_maze()  # what is imported the first time stays
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        before = len(os.listdir("/proc/self/fd"))
        make_maze().rollout(3)
        assert len(os.listdir("/proc/self/fd")) == before
        assert not list(tmp_path.iterdir())
        os.close(tempfile.mkstemp(suffix=".xml")[0])  # those of others stay
        assert len(list(tmp_path.iterdir())) == 1

    def test_unknown_arguments_of_reset(self):
        with pytest.raises(TypeError, match="sed"):
            make_maze().reset(sed=3)

    def test_close(self):
        env = make_maze()
        env.close()
        assert env.is_closed


class TestActionNoise:
    def test_law(self):
        noise = GaussianActionNoise(0.2, seed=0)
        samples = np.stack([noise(np.zeros(4, dtype=np.float32)) for _ in range(5000)])
        # 20,000 draws: the standard error of the std is 0.2 / sqrt(40,000) = 0.001
        assert samples.std() == pytest.approx(0.2, abs=0.005)
        assert samples.mean() == pytest.approx(0.0, abs=0.007)

    def test_clipped_after_the_noise(self):
        noise = GaussianActionNoise(10.0, low=-0.5, high=0.25, seed=0)
        samples = np.stack([noise(np.zeros(3)) for _ in range(100)])
        assert samples.min() == -0.5 and samples.max() == 0.25

    def test_zero_changes_nothing(self):
        action = np.array([0.3, -2.0])
        assert GaussianActionNoise(0.0)(action) is action

    @pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
    def test_bad_std(self, std):
        with pytest.raises(ValueError, match="std must be a finite number of at least 0"):
            GaussianActionNoise(std)

    def test_bad_bounds(self):
        with pytest.raises(ValueError, match="low must be below high"):
            GaussianActionNoise(0.1, low=1.0, high=1.0)

    @needs_ogbench
    def test_in_the_environment(self):
        def positions(std, seed):
            simulator = OGBenchSimulator(MAZE, action_noise=std)
            simulator.reset(seed)
            return np.stack([simulator.step(np.zeros(2))[0] for _ in range(5)])

        assert (positions(0.3, 0) == positions(0.3, 0)).all()
        assert (positions(0.3, 0) != positions(0.3, 1)).any()
        assert (np.diff(positions(0.0, 0), axis=0) == 0).all()
        assert (np.diff(positions(0.3, 0), axis=0) != 0).any()

    @needs_ogbench
    @pytest.mark.slow
    def test_in_parallel_env(self):
        env = ParallelEnv(2, partial(make_maze, action_noise=0.3))
        try:
            env.set_seed(0)
            rollout = env.rollout(3, lambda td: td.set("action", torch.zeros(2, 2)))
        finally:
            env.close()
        assert (rollout["next", "observation"][:, 1:] != rollout["observation"][:, 1:]).any()
        assert (rollout["action"] == 0).all()  # the commanded action is what is stored


class Counter:
    """A simulator with known results: episode ``seed`` lasts ``2 + seed % 4`` steps.

    The observation is ``[seed, step]``, the reward the first action; odd seeds succeed.
    """

    action_low = np.full(1, -1.0, dtype=np.float32)

    def reset(self, seed=None):
        self.seed, self.count = seed, 0
        return np.array([seed, 0], dtype=np.float32)

    def step(self, action):
        self.count += 1
        over = self.count == 2 + self.seed % 4
        success = over and self.seed % 2 == 1
        observation = np.array([self.seed, self.count], dtype=np.float32)
        return observation, float(action[0]), success, over and not success, success

    def close(self):
        self.closed = True


class TestRolloutEpisodes:
    @staticmethod
    def policy(td):
        return td.set("action", td["observation"][:, 1:] / 10)

    @needs_ogbench
    def test_one_environment(self):
        env = make_maze(max_episode_steps=5)
        result = rollout_episodes(env, lambda td: td.set("action", torch.zeros(1, 2)), 2, seed=3)
        assert result["length"].tolist() == [5, 5]
        assert len(env.rollout(2)) == 2  # the caller's, and not closed
        env.close()

    @pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 20])
    def test_known_episodes(self, num_envs):
        result = rollout_episodes(Counter, self.policy, 7, seed=10, num_envs=num_envs)
        assert result.batch_size == (7,)
        assert result["seed"].tolist() == [10, 11, 12, 13, 14, 15, 16]
        assert result["length"].tolist() == [4, 5, 2, 3, 4, 5, 2]
        assert result["success"].tolist() == [False, True, False, True, False, True, False]
        # 0 + 0.1 + ... + (length - 1) / 10
        torch.testing.assert_close(
            result["return"], torch.tensor([0.6, 1.0, 0.1, 0.3, 0.6, 1.0, 0.1])
        )
        assert (result["decisions"] == result["length"]).all()
        assert (result["policy_seconds"] > 0).all()

    def test_one_call_for_all_running(self):
        sizes = []

        def policy(td):
            sizes.append(td.batch_size[0])
            return self.policy(td)

        rollout_episodes(Counter, policy, 4, seed=0, num_envs=4)
        # lengths 2, 3, 4, 5
        assert sizes == [4, 4, 3, 2, 1]

    def test_time_of_a_call_is_shared(self, monkeypatch):
        """Each call takes a second, of those that run: four, four, three, two and one."""
        clock = SimpleNamespace(perf_counter=count().__next__)
        monkeypatch.setattr(sys.modules[rollout_episodes.__module__], "time", clock)
        result = rollout_episodes(Counter, self.policy, 4, seed=0, num_envs=4)
        seconds = torch.tensor([1 / 4, 1 / 4, 1 / 3, 1 / 2, 1], dtype=torch.float64).cumsum(0)
        torch.testing.assert_close(result["policy_seconds"], seconds[1:])

    def test_progress(self, capsys):
        """Before an episode ends decisions are counted, with no guess of the time left."""
        pytest.importorskip("tqdm")

        def policy(td):
            time.sleep(0.6)  # longer than the bar rests between two lines
            return self.policy(td)

        rollout_episodes(Counter, policy, 3, seed=0, num_envs=3, progress=True)
        lines = capsys.readouterr().err.split("\r")
        assert any("| 0/3 [00:00, decisions=1]" in line for line in lines)
        assert any("| 1/3 [00:01, decisions=2]" in line for line in lines)

    def test_traces(self):
        result = rollout_episodes(Counter, self.policy, 2, seed=2, record=("observation", "action"))
        observation, action = result["trace", "observation"], result["trace", "action"]
        assert observation.shape == (2, 6, 2)  # episodes of 4 and 5 steps
        assert action.shape == (2, 5, 1)
        assert observation[0, :5, 1].tolist() == [0, 1, 2, 3, 4]
        assert observation[0, 5].isnan().all() and not observation[1].isnan().any()
        torch.testing.assert_close(action[1, :, 0], torch.arange(5) / 10)

    def test_chunks_are_open_loop(self):
        def policy(td):
            # [n, 3 * 1]: the step at which it was decided, plus 0, 1, 2 hundredths
            return td.set("action", td["observation"][:, 1:] / 10 + torch.tensor([0, 0.01, 0.02]))

        result = rollout_episodes(
            Counter, policy, 2, seed=2, chunk_size=3, record=("action",), num_envs=2
        )
        assert result["length"].tolist() == [4, 5]  # a chunk is cut where the episode ends
        assert result["decisions"].tolist() == [2, 2]
        torch.testing.assert_close(
            result["trace", "action"][1, :, 0], torch.tensor([0, 0.01, 0.02, 0.3, 0.31])
        )

    def test_given_environments_stay_open(self):
        envs = [Counter(), Counter()]
        rollout_episodes(envs, self.policy, 3, seed=0)
        assert not any(hasattr(env, "closed") for env in envs)
        made = []
        rollout_episodes(lambda: made.append(Counter()) or made[-1], self.policy, 3, seed=0)
        assert len(made) == 3 and all(env.closed for env in made)

    def test_nested_keys(self):
        result = rollout_episodes(
            [Counter()],
            lambda td: td.set(("agent", "command"), td["agent", "state"][:, 1:] / 10),
            1,
            seed=0,
            observation_key=("agent", "state"),
            action_key=("agent", "command"),
        )
        assert result["return"].item() == pytest.approx(0.1)

    def test_no_gradients(self):
        weight = torch.zeros(1, requires_grad=True)

        def policy(td):
            action = td["observation"][:, 1:] * weight
            assert not action.requires_grad
            return td.set("action", action)

        rollout_episodes(Counter, policy, 1, seed=0)

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
            ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
            ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
            ({"record": ("reward",)}, "record must be a sequence"),
            ({"record": "action"}, "record must be a sequence"),
            ({"envs": []}, "envs must hold at least one"),
            ({"envs": [Counter()] * 2}, "envs must be different environments"),
            ({"chunk_size": 2}, r"chunk_size \* action\] = \[1, 2\], got \[1, 1\]"),
        ],
    )
    def test_bad_arguments(self, kwargs, match):
        arguments = {"envs": Counter, "policy": self.policy, "num_episodes": 1, "seed": 0}
        with pytest.raises(ValueError, match=match):
            rollout_episodes(**{**arguments, **kwargs})

    @needs_ogbench
    @pytest.mark.parametrize(
        "wrap",
        [lambda env: TransformedEnv(env, StepCounter(5)), lambda env: SerialEnv(1, make_maze)],
    )
    def test_transforms_and_batches_are_not_passed_over(self, wrap):
        closed = []
        env = wrap(make_maze())
        with pytest.raises(ValueError, match="envs must have a simulator.*" + type(env).__name__):
            rollout_episodes(env, self.policy, 1, seed=0)
        env.close = lambda: closed.append(True)
        with pytest.raises(ValueError, match="envs must have a simulator"):
            rollout_episodes(lambda: env, self.policy, 1, seed=0)
        assert closed

    def test_policy_without_action(self):
        with pytest.raises(KeyError, match="did not write action_key='action'"):
            rollout_episodes(Counter, lambda td: td, 1, seed=0)

    @needs_ogbench
    def test_ogbench_episodes_do_not_depend_on_the_number_of_environments(self):
        def policy(td):
            return td.set("action", torch.sin(7 * td["observation"]))

        results = [
            rollout_episodes(
                lambda: make_maze(action_noise=0.1),
                policy,
                5,
                seed=3,
                num_envs=num_envs,
                record=("observation",),
            )
            for num_envs in (1, 2, 5)
        ]
        traces = [result["trace", "observation"] for result in results]
        assert (traces[0] == traces[1]).all() and (traces[0] == traces[2]).all()
        assert len(traces[0][:, 0, 0].unique()) == 5

    @needs_ogbench
    def test_solves_the_maze_with_ogbench_own_directions(self):
        env = OGBenchEnv(MAZE)
        result = rollout_episodes([env], drive_to_goal(env), 2, seed=0)
        assert result["success"].all()
        assert (result["return"] == -(result["length"] - 1).float()).all()


if __name__ == "__main__":
    pytest.main([__file__])
