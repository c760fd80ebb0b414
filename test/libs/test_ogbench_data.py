# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OGBench data as replay buffers: rewards, samplers, cache, bad input."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from _ogbench_cases import FILE, TASK, arrays, maze_file, needs_ogbench
from tensordict import TensorDict
from torchrl.data import PrioritizedSampler, SamplerWithoutReplacement, SliceSampler
from torchrl.data.datasets import load_dataset
from torchrl.data.replay_buffers import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers.prioritized import SumSegmentTreeFp32
from torchrl.envs.transforms import RewardScaling

from torchrl_evor.data import (
    OGBenchExperienceReplay,
    WindowStorage,
    make_windows,
    ogbench_arrays_to_tensordict,
)
from torchrl_evor.data.datasets import (
    _ogbench_cache,
    ogbench,
)
from torchrl_evor.data.datasets._ogbench_arrays import label_rewards


@needs_ogbench
class TestReplay:
    def test_rewards_are_ogbenchs(self, make, folder):
        import ogbench

        path = str(folder / f"{FILE}.npz")
        env, theirs, val = ogbench.make_env_and_datasets(TASK, dataset_path=path)
        ours = make().transitions
        np.testing.assert_array_equal(ours["next", "reward"][:, 0], theirs["rewards"])
        np.testing.assert_array_equal(ours["next", "terminated"][:, 0], theirs["masks"] == 0)
        np.testing.assert_array_equal(ours["observation"], theirs["observations"])
        np.testing.assert_array_equal(ours["next", "observation"], theirs["next_observations"])
        assert 0 < ours["next", "terminated"].sum() < 50
        other = make(split="val").transitions
        np.testing.assert_array_equal(other["next", "reward"][:, 0], val["rewards"])
        # the state before the step decides
        near = (ours["observation"] - torch.as_tensor(env.unwrapped.cur_goal_xy)).norm(dim=-1)
        goal = near <= env.unwrapped._goal_tol
        assert torch.equal(ours["next", "terminated"][:, 0], goal)

    def test_sample(self, make):
        data = make(batch_size=32, n_step=5, gamma=0.9)
        sample = data.sample()
        assert sample.shape == (32,)
        assert data.sample(7).shape == (7,)
        windows = make_windows(data.transitions, 5, 1, 0.9)
        index = sample["index"]
        assert torch.equal(sample["next", "reward"][:, 0], windows.reward[index])
        end = windows.end[index]
        transitions = data.transitions[end]
        assert torch.equal(sample["next", "observation"], transitions["next", "observation"])
        assert torch.equal(sample["next", "action"], transitions["next", "action"])

    def test_tasks_share_their_transitions(self, make, monkeypatch):
        first = make()
        monkeypatch.setattr(ogbench, "write_transitions", None)
        second = make(dataset_id="pointmaze-medium-navigate-singletask-task2-v0")
        assert first.data_path != second.data_path
        assert (first.transitions["observation"] == second.transitions["observation"]).all()
        rewards = [data.transitions["next", "reward"] for data in (first, second)]
        assert not torch.equal(*rewards)

    def test_default_task_is_ogbenchs(self, make):
        default = make(dataset_id="pointmaze-medium-navigate-singletask-v0")
        assert (default.transitions == make().transitions).all()

    def test_cache_is_reused(self, make, monkeypatch):
        first = make().transitions
        monkeypatch.setattr(ogbench, "write_transitions", None)
        monkeypatch.setattr(ogbench, "write_outcomes", None)
        again = make(download=False)
        assert (again.transitions == first).all()
        assert again.transitions.is_memmap() or again.transitions["observation"].filename

    def test_a_changed_file_is_converted_again(self, make, folder):
        before = make().transitions["observation"].clone()
        maze_file(folder / f"{FILE}.npz", lengths=(31, 20), seed=5)
        after = make().transitions
        assert len(after) == 51
        assert not torch.equal(after["observation"][:50], before)

    def test_an_interrupted_conversion_leaves_nothing(self, make, monkeypatch):
        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(_ogbench_cache, "_check_free_space", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
        monkeypatch.undo()
        assert len(make()) == 50

    def test_a_full_disk(self, make, monkeypatch):
        usage = shutil.disk_usage("/")._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="cache needs .* more bytes, but only 10 are free"):
            make()

    def test_load_dataset(self, tmp_path, folder):
        data = load_dataset(
            f"ogbench:{TASK}", batch_size=4, directory=folder, root=tmp_path / "cache"
        )
        assert isinstance(data, OGBenchExperienceReplay)
        assert data.sample().shape == (4,)

    def test_the_file_is_replaced_later(self, tmp_path, folder):
        """What was read keeps its place; what is read then has another."""
        mine = tmp_path / "mine"
        shutil.copytree(folder, mine)
        make = functools.partial(
            OGBenchExperienceReplay, TASK, directory=mine, root=tmp_path / "cache"
        )
        data = make()
        path = data.data_path
        for file in mine.iterdir():
            os.utime(file, (0, 0))
        assert data.data_path == path and path.exists()
        assert make().data_path != path
        shutil.rmtree(mine)
        assert data.data_path == path

    def test_available_datasets(self):
        names = OGBenchExperienceReplay.available_datasets
        assert TASK in names and "puzzle-4x6-noisy-singletask-task5-v0" in names

    def test_return_statistics(self, make):
        data = make(gamma=0.9)
        loc, scale = data.return_statistics()
        returns = data.empirical_returns()
        assert loc == pytest.approx(returns.mean().item())
        assert scale == pytest.approx(returns.std(correction=0).item())
        assert -10 < loc < 0
        assert data.return_statistics(gamma=0.0)[0] == pytest.approx(
            data.transitions["next", "reward"].mean().item(), abs=1e-6
        )

    def test_return_bounds(self, make):
        """Rewards are -1, and 0 at the goal, where a return is over."""
        data = make(gamma=0.9)
        assert set(data.transitions["next", "reward"].unique().tolist()) == {-1.0, 0.0}
        assert data.return_bounds() == pytest.approx((-10.0, 0.0))
        assert data.return_bounds(gamma=0.0) == (-1.0, 0.0)
        assert data.return_bounds(slack=0.5) == pytest.approx((-15.0, 5.0))
        low, high = data.return_bounds()
        returns = data.empirical_returns()
        assert low <= returns.min() and returns.max() <= high
        with pytest.raises(ValueError, match="gamma must be at least 0 and below 1, got 1.0"):
            data.return_bounds(gamma=1.0)
        with pytest.raises(ValueError, match="slack must be at least 0, got -1"):
            data.return_bounds(slack=-1)

    @pytest.mark.parametrize(
        "change, error, message",
        [
            (lambda q: q[:-1], ValueError, "'qpos' must have as many rows"),
            (lambda q: q[:, 0], ValueError, r"'qpos' must have 2 dimension\(s\)"),
            (lambda q: q.astype(str), TypeError, "'qpos' must be floating point"),
            (lambda q: np.where(q == q[3], np.nan, q), ValueError, "'qpos' must be finite"),
            (lambda q: np.tile(q, 3), ValueError, "is the file of another environment"),
        ],
    )
    def test_bad_positions(self, make, folder, change, error, message):
        raw = dict(np.load(folder / f"{FILE}.npz"))
        raw["qpos"] = change(raw["qpos"])
        np.savez(folder / f"{FILE}.npz", **raw)
        with pytest.raises(error, match=message):
            make()

    def test_observation_statistics(self, make, folder):
        raw = dict(np.load(folder / f"{FILE}.npz"))
        raw["observations"][:, 1] = 7.0  # a constant is left in its units
        np.savez(folder / f"{FILE}.npz", **raw)
        data = make()
        mean, deviation = data.observation_statistics()
        observation = data.transitions["observation"]
        assert mean.tolist() == pytest.approx([observation[:, 0].mean().item(), 7.0])
        assert deviation[0].item() == pytest.approx(observation[:, 0].std(correction=0).item())
        assert deviation[1] == 1.0

    def test_equal_returns_have_scale_one(self, make, folder):
        raw = dict(np.load(folder / f"{FILE}.npz"))
        raw["qpos"] = np.zeros_like(raw["qpos"])  # far from the goal: every reward is -1
        np.savez(folder / f"{FILE}.npz", **raw)
        loc, scale = make(gamma=0.9).return_statistics()
        assert loc == pytest.approx(-10) and scale == 1.0

    def test_delete(self, make):
        data = make()
        data.delete()
        assert not data.data_path.exists()
        assert len(make()) == 50

    @pytest.mark.slow
    def test_preprocess(self, make, tmp_path):
        data = make(n_step=3)

        before = data.transitions["observation"].clone()

        def double(rows):
            rows["observation"] *= 2  # in place: TorchRL tries fn on the first row
            return rows

        new = data.preprocess(double, num_workers=1, dest=tmp_path / "new")
        assert len(new) == 50
        assert torch.equal(data.transitions["observation"], before)
        assert torch.equal(new[:]["observation"], before * 2)
        # single transitions, not windows
        assert torch.equal(new[:]["next", "reward"], data.transitions["next", "reward"])

    def test_the_global_generator_is_left_alone(self, make):
        np.random.seed(3)
        expected = np.random.rand()
        np.random.seed(3)
        make()
        assert np.random.rand() == expected

    def test_sparse_rewards(self, tmp_path):
        """Two cubes, one of them in its place for some rows: -1, not minus the number missing."""
        raw = arrays(lengths=(4,))
        del raw["rewards"], raw["masks"]
        qpos = np.zeros((5, 28), dtype=np.float32)
        task = "cube-double-play-singletask-task2-v0"
        goals = self.goals(task)
        qpos[1:, 14:17] = goals[0]
        qpos[2, 21:24] = goals[1]
        np.savez(tmp_path / "cube-double-play-v0.npz", **raw, qpos=qpos, qvel=qpos)
        make = functools.partial(
            OGBenchExperienceReplay, task, directory=tmp_path, root=tmp_path / "cache"
        )
        rewards = {
            kind: make(reward_type=kind).transitions["next", "reward"].squeeze(-1).tolist()
            for kind in ("default", "sparse")
        }
        assert rewards == {"default": [-2, -1, 0, -1], "sparse": [-1, -1, 0, -1]}

    @staticmethod
    def goals(task):
        import gymnasium
        import ogbench  # noqa: F401

        env = gymnasium.make(task.replace("-play", ""), disable_env_checker=True)
        env.reset(seed=0)
        return env.unwrapped._data.mocap_pos.copy()


@needs_ogbench
class TestSamplers:
    """A data set is a replay buffer like any other."""

    def test_slices(self, make):
        data = make(batch_size=32, n_step=4, sampler=SliceSampler(slice_len=8, cache_values=True))
        sample = data.sample().reshape(4, 8)
        assert (sample["episode"] == sample["episode"][:, :1]).all()
        assert (sample["index"].diff(dim=-1) == 1).all()

    def test_without_replacement(self, make):
        data = make(batch_size=10, sampler=SamplerWithoutReplacement())
        index = torch.cat([data.sample()["index"] for _ in range(5)])
        assert index.sort().values.tolist() == list(range(50))

    @pytest.mark.skipif(SumSegmentTreeFp32 is None, reason="torchrl's C++ extension is missing")
    def test_priorities(self, make):
        data = make(batch_size=64, sampler=PrioritizedSampler(50, alpha=1.0, beta=1.0))
        priority = torch.full((50,), 1e-9)
        priority[7] = 1.0
        data.update_priority(torch.arange(50), priority)
        assert (data.sample()["index"] == 7).float().mean() > 0.9

    def test_transform_and_prefetch(self, make):
        transform = RewardScaling(loc=5.0, scale=0.0, in_keys=[("next", "reward")])
        data = make(batch_size=16, prefetch=2, transform=transform)
        for _ in range(3):
            reward = data.sample()["next", "reward"]
            torch.testing.assert_close(reward, torch.full((16, 1), 5.0))

    def test_nothing_can_be_written(self, make):
        data = make()
        with pytest.raises(RuntimeError, match="doesn't allow writing"):
            data.add(data[0])

    def test_a_checkpoint_does_not_copy_the_data(self, make, tmp_path):
        data = make()
        state = data.state_dict()
        assert "observation" not in str(state)
        data.load_state_dict(state)
        data.dumps(tmp_path / "dump")
        assert sum(f.stat().st_size for f in (tmp_path / "dump").rglob("*")) < 10_000
        assert data.sample(3).shape == (3,)

    def test_the_seed_decides_the_sample(self, make):
        data = make()
        torch.manual_seed(1)
        first = data.sample()["index"]
        torch.manual_seed(1)
        assert torch.equal(data.sample()["index"], first)
        assert not torch.equal(data.sample()["index"], first)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_a_gpu(self, make):
        sample = make(device="cuda").sample()
        assert sample["observation"].device.type == "cuda"
        assert sample["next", "reward"].device.type == "cuda"


@needs_ogbench
class TestLocal:
    def test_collects_once(self, tmp_path, monkeypatch):
        collected = []

        def collect(name, path, size, **kwargs):
            collected.append((name, size, kwargs["split"], kwargs["seed"]))
            maze_file(path)

        monkeypatch.setattr(ogbench, "collect_ogbench", collect)
        make = functools.partial(
            OGBenchExperienceReplay, TASK, source="local", num_transitions=50, root=tmp_path
        )
        assert len(make(seed=3)) == len(make(seed=3)) == 50
        assert collected == [(FILE, 50, "train", 3)]
        make(seed=4, split="val")
        assert collected[1:] == [(FILE, 5, "val", 4)]
        make(seed=3, download="force")
        assert len(collected) == 3

    def test_force_keeps_what_it_cannot_replace(self, tmp_path, monkeypatch):
        def collect(name, path, size, **kwargs):
            maze_file(path, seed=len(calls))
            calls.append(path)

        def fail(*args, **kwargs):
            raise ConnectionError

        calls = []
        make = functools.partial(
            OGBenchExperienceReplay, TASK, source="local", num_transitions=50, root=tmp_path
        )
        monkeypatch.setattr(ogbench, "collect_ogbench", collect)
        before = make().transitions["observation"].clone()
        monkeypatch.setattr(ogbench, "collect_ogbench", fail)
        with pytest.raises(ConnectionError):
            make(download="force")
        assert torch.equal(make(download=False).transitions["observation"], before)
        monkeypatch.setattr(ogbench, "collect_ogbench", collect)
        renewed = make(download="force")
        assert not torch.equal(renewed.transitions["observation"], before)
        assert {p.name for p in renewed.data_path_root.iterdir()} == {f"{FILE}.npz", "train"}

    def test_end_to_end(self, tmp_path):
        data = OGBenchExperienceReplay(
            "pointmaze-medium-stitch-singletask-task1-v0",
            batch_size=8,
            n_step=1000,
            source="local",
            num_transitions=600,
            num_workers=1,
            root=tmp_path,
        )
        assert len(data) == 600
        assert data.transitions["episode"].unique(return_counts=True)[1].tolist() == [200] * 3
        assert data.sample()["steps_to_next_obs"].max() <= 200

    def test_antmaze_says_why(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be collected locally"):
            OGBenchExperienceReplay(
                "antmaze-large-navigate-singletask-v0", source="local", root=tmp_path
            )


class TestBadInput:
    @pytest.mark.parametrize(
        "name, nearest",
        [
            ("pointmaze-medium-navigate-singletask-task7-v0", TASK[:-4]),
            ("pointmaze-medium-navigate-v0", "pointmaze-medium-navigate-singletask"),
            ("cube-duble-play-singletask-v0", "cube-double-play-singletask-v0"),
            ("visual-scene-play-singletask-v0", "scene-play-singletask-v0"),
        ],
    )
    def test_unknown_name(self, name, nearest):
        with pytest.raises(ValueError, match=f"dataset_id='{name}'.*Did you mean.*{nearest}"):
            OGBenchExperienceReplay(name)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"n_step": 0}, "n_step must be an integer >= 1, got 0"),
            ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
            ({"n_step": 2.0}, "n_step must be"),
            ({"chunk_size": -1}, "chunk_size must be"),
            ({"gamma": 1.5}, "gamma must lie in"),
            ({"source": "remote"}, "source must be one of"),
            ({"split": "test"}, "split must be one of"),
            ({"reward_type": "dense"}, "reward_type must be one of"),
            ({"download": "yes"}, "download must be one of"),
            ({"num_transitions": 5}, "num_transitions=5 .* needs source='local', got"),
            (
                {"source": "local", "num_transitions": 0},
                "num_transitions must be an integer >= 1, got 0",
            ),
            ({"seed": 3}, "seed=3 belongs to a local collection: .* got source='auto'"),
            ({"num_workers": 1}, "num_workers=1 belongs to a local collection"),
            ({"source": "local", "directory": "x"}, "directory must not be given"),
        ],
    )
    def test_arguments(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            OGBenchExperienceReplay(TASK, root=tmp_path, **kwargs)
        assert list(tmp_path.iterdir()) == []

    def test_directory_without_the_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"has no file '{FILE}.npz'"):
            OGBenchExperienceReplay(TASK, root=tmp_path, directory=tmp_path)

    def test_nothing_cached(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="download=False forbids"):
            OGBenchExperienceReplay(TASK, root=tmp_path, download=False)

    @pytest.mark.parametrize(
        "damage, error, message",
        [
            (lambda b: b[: len(b) // 2], ValueError, "not a complete npz archive"),
            (lambda b: b"not a zip", ValueError, "not a complete npz archive"),
            (lambda b: b"", ValueError, r"\(0 bytes\)"),
        ],
    )
    def test_damaged_files(self, make, folder, damage, error, message):
        path = folder / f"{FILE}.npz"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize(
        "name", ["transitions/observation.memmap", "*/next/reward.memmap", "*/next/meta.json"]
    )
    def test_damaged_cache(self, make, name):
        root = make().data_path_root
        path = next((root / "train").glob(name))
        content = path.read_bytes()
        path.write_bytes(content[:10])
        with pytest.raises(ValueError, match=f"cache is damaged .*{path.name}.* Delete {root}"):
            make()
        assert path.read_bytes() == content[:10]  # and not grown with zeros
        shutil.rmtree(root / "train")
        make()
        assert path.read_bytes() == content

    def test_a_flipped_byte(self, make, folder):
        path = folder / f"{FILE}.npz"
        content = bytearray(path.read_bytes())
        content[200] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ValueError, match="'observations' of the npz file is damaged"):
            make()

    @pytest.mark.parametrize("key", ["observations", "terminals", "qpos"])
    def test_missing_array(self, make, folder, key):
        raw = dict(np.load(folder / f"{FILE}.npz"))
        del raw[key]
        np.savez(folder / f"{FILE}.npz", **raw)
        with pytest.raises(KeyError, match=f"lacks the arrays.*{key}"):
            make()

    def test_pickled_code_is_not_executed(self, make, folder):
        raw = dict(np.load(folder / f"{FILE}.npz"))
        raw["observations"] = np.array([Bomb()] * len(raw["terminals"]), dtype=object)
        np.savez(folder / f"{FILE}.npz", **raw)
        with pytest.raises(TypeError, match="no plain numeric array"):
            make()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was executed",))


MEMORY = """
import sys
import gymnasium, ogbench
from torchrl_evor.data import OGBenchExperienceReplay

def resident():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))

# The environment, which labels the rewards, has memory of its own.
env = gymnasium.make("pointmaze-medium-singletask-task1-v0", disable_env_checker=True)
env.reset(), env.close()
before = resident()
task, folder = sys.argv[1:]
data = OGBenchExperienceReplay(task, batch_size=256, n_step=100, directory=folder, root=folder)
for _ in range(1000):
    data.sample()
storage = data._storage
read = [*storage._columns.values(), *vars(storage._windows).values()]
print(len(data), resident() - before, sum(x.nbytes for x in read if x is not None))
"""


@needs_ogbench
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_million_transitions(tmp_path):
    """The process grows by the arrays that sampling reads and little more, converting or not."""
    rows = 1001 * 1000
    observations = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    raw = {
        "observations": observations,
        "actions": observations.clip(-1, 1),
        "terminals": (np.arange(rows) % 1001 == 1000).astype(np.float32),
        "qpos": observations,
        "qvel": observations,
    }
    np.savez(tmp_path / f"{FILE}.npz", **raw)
    # The first process converts the file, the second finds the result. Of what was freed glibc
    # keeps up to 50 MB at its own discretion, unless its threshold is fixed.
    for threshold, limit in (({"MALLOC_MMAP_THRESHOLD_": str(2**20)}, 1.5), ({}, 2)):
        command = [sys.executable, "-c", MEMORY, TASK, str(tmp_path)]
        done = subprocess.run(
            command, env={**os.environ, **threshold}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        length, growth, read = map(int, done.stdout.split()[-3:])
        assert length == 1_000_000 and read > 60e6
        assert growth <= limit * read  # measured: 1.17 to 1.20, the second at times more


@needs_ogbench
@pytest.mark.parametrize(
    "states, message",
    [
        (np.zeros((5, 1)), r"shape \(5, 2\), got shape \(5, 1\)"),
        (np.zeros((4, 2)), "'button_states' must have 5 rows, got 4"),
        (np.full((5, 2), np.nan), "must be finite"),
        (None, "lacks the array 'button_states'"),
    ],
)
def test_states_of_buttons(states, message):
    """Of another shape they would broadcast to rewards of nothing."""
    task = "scene-singletask-task1-v0"
    raw = {"qpos": np.zeros((5, 25), dtype=np.float32)}
    raw.update({} if states is None else {"button_states": states})
    with pytest.raises((ValueError, KeyError), match=message):
        label_rewards(raw, task)


def test_a_buffer_of_ones_own():
    """The storage alone, over any TED data."""
    data = ogbench_arrays_to_tensordict(arrays(lengths=(40,)))
    buffer = TensorDictReplayBuffer(storage=WindowStorage(data, n_step=2), batch_size=16)
    sample = buffer.sample()
    assert isinstance(sample, TensorDict)
    assert sample["next", "reward"].shape == (16, 1)


if __name__ == "__main__":
    pytest.main([__file__, *sys.argv[1:]])
