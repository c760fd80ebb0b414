# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Local collection: OGBench's file format, its rules of behaviour, seeds, restarts, failures."""

from __future__ import annotations

import errno
import importlib.util
import os
import pickle
import queue
import runpy
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchrl_evor.data import collect_ogbench
from torchrl_evor.data.datasets import _ogbench_episodes, ogbench_scripted
from torchrl_evor.data.datasets._ogbench_episodes import Behaviour, make_episode_source
from torchrl_evor.data.datasets._ogbench_names import FILES, SINGLE_TASKS, parse_file_name

_has_ogbench = importlib.util.find_spec("ogbench") is not None
needs_ogbench = pytest.mark.skipif(not _has_ogbench, reason="ogbench is not installed")
MAZE = "pointmaze-medium-navigate-v0"
COLLECT = Path(__file__).parents[2] / "sota-implementations" / "evor" / "collect.py"


def collect(path, name=MAZE, size=40, length=10, **kwargs):
    kwargs = {"num_workers": 1, "progress": False, **kwargs}
    return collect_ogbench(name, path, size, episode_length=length, **kwargs)


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def assert_equal_files(first, second):
    first, second = read(first), read(second)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.fixture
def small_shards(monkeypatch):
    """Two episodes of ten transitions in each part."""
    monkeypatch.setattr(ogbench_scripted, "_SHARD_TRANSITIONS", 20)


class TestNames:
    def test_official_sizes(self):
        sizes = {name: (f.num_episodes, f.episode_length) for name, f in FILES.items()}
        assert sizes["pointmaze-medium-navigate-v0"] == (1000, 1000)
        assert sizes["pointmaze-giant-navigate-v0"] == (500, 2000)
        assert sizes["antmaze-large-stitch-v0"] == (5000, 200)
        assert sizes["antmaze-medium-explore-v0"] == (10_000, 500)
        assert sizes["humanoidmaze-giant-navigate-v0"] == (1000, 4000)
        assert sizes["cube-quadruple-noisy-v0"] == (5000, 1000)
        assert "antmaze-giant-explore-v0" not in sizes
        assert len(SINGLE_TASKS) == 6 * len(FILES)

    @needs_ogbench
    def test_every_task_is_an_environment_of_ogbench(self):
        import gymnasium
        import ogbench  # noqa: F401

        from torchrl_evor.data.datasets._ogbench_names import parse_task_name

        unknown = {parse_task_name(name).env_id for name in SINGLE_TASKS} - set(gymnasium.registry)
        assert unknown == set()

    def test_unknown_name_suggests_the_nearest(self):
        with pytest.raises(
            ValueError, match="dataset_id='cube-sngle-play-v0'.*cube-single-play-v0"
        ):
            parse_file_name("cube-sngle-play-v0")


@needs_ogbench
class TestFormat:
    @pytest.mark.parametrize(
        "name, obs, qpos",
        [
            (MAZE, 2, 2),
            ("pointmaze-medium-stitch-v0", 2, 2),
            ("cube-single-play-v0", 28, 21),
            ("cube-double-noisy-v0", 37, 28),
            ("scene-play-v0", 40, 25),
            ("puzzle-3x3-noisy-v0", 55, 23),
        ],
    )
    def test_arrays(self, tmp_path, name, obs, qpos):
        data = read(collect(tmp_path / "x.npz", name, size=12, length=6))
        rows = 2 * (6 + 1)  # each trajectory's last state is a row too
        buttons = {"scene-play-v0": 2, "puzzle-3x3-noisy-v0": 9}.get(name)
        assert set(data) == {"observations", "actions", "terminals", "qpos", "qvel"} | (
            {"button_states"} if buttons else set()
        )
        assert data["observations"].shape == (rows, obs)
        assert data["qpos"].shape == (rows, qpos)
        assert data["observations"].dtype == data["actions"].dtype == np.float32
        assert data["terminals"].dtype == bool
        np.testing.assert_array_equal(np.flatnonzero(data["terminals"]), [6, 13])
        assert np.abs(data["actions"]).max() <= 1
        if buttons:
            assert data["button_states"].shape == (rows, buttons)
            assert data["button_states"].dtype == np.int64

    def test_a_row_holds_the_state_before_its_action(self, tmp_path):
        data = read(collect(tmp_path / "x.npz", size=30, length=30))
        # Away from walls a point moves by 0.2 * action, and a maze's state is its position.
        np.testing.assert_array_equal(data["observations"], data["qpos"])
        moved = data["observations"][1:] - data["observations"][:-1]
        free = np.isclose(moved, 0.2 * data["actions"][:-1], atol=1e-5).all(-1)
        assert free.mean() > 0.5

    def test_a_folder_gets_ogbench_names(self, tmp_path):
        assert collect(tmp_path, split="val") == tmp_path / f"{MAZE.removesuffix('-v0')}-v0-val.npz"
        assert collect(tmp_path, "pointmaze-medium-navigate-singletask-task3-v0").name == (
            f"{MAZE}.npz"
        )

    def test_whole_episodes(self, tmp_path):
        assert read(collect(tmp_path / "x.npz", size=11))["terminals"].sum() == 2


@needs_ogbench
class TestBehaviour:
    """The rules by which OGBench's data were made."""

    @staticmethod
    def source(name, **overrides):
        return make_episode_source(Behaviour.official(FILES[name], **overrides))

    def test_official_numbers(self):
        def noise(name):
            behaviour = Behaviour.official(FILES[name])
            return behaviour.noise, behaviour.p_random_action

        assert noise("pointmaze-large-stitch-v0") == (0.5, 0.0)
        assert noise("cube-double-play-v0") == (0.1, 0.0)
        assert noise("cube-double-noisy-v0") == (0.1, 0.1)
        assert noise("puzzle-4x4-noisy-v0") == (0.1, 0.2)

    def test_navigate_without_noise_visits_several_goals(self):
        source = self.source(MAZE, noise=0.0, episode_length=400)
        maze = source.env.unwrapped
        goals = []
        original = maze.set_goal
        maze.set_goal = lambda *args, **kwargs: (goals.append(args), original(*args, **kwargs))
        episode = source(3)
        renewed = [args[0] for args in goals if args]
        assert len(renewed) >= 3
        assert set(renewed) <= set(source._goals)
        # unit directions: every step is as long as the controller asks for
        np.testing.assert_allclose(np.linalg.norm(episode["actions"], axis=-1), 1, atol=1e-3)

    def test_goals_are_not_in_corridors(self):
        source = self.source(MAZE)
        free = source._free
        for i, j in source._cells:
            up, down, left, right = free[i - 1, j], free[i + 1, j], free[i, j - 1], free[i, j + 1]
            corridor = (up, down, left, right) in ((1, 1, 0, 0), (0, 0, 1, 1))
            assert ((i, j) in source._goals) != corridor

    def test_stitch_goes_four_cells_and_stays(self):
        source = self.source("pointmaze-medium-stitch-v0", noise=0.0)
        maze = source.env.unwrapped
        for seed in range(4):
            path = source(seed)["observations"]
            start, end = maze.xy_to_ij(path[0]), maze.xy_to_ij(path[-1])
            assert self.distance(source._free, start, end) == 4
            assert np.linalg.norm(path[-1] - path[-20:], axis=-1).max() < 1.0

    @staticmethod
    def distance(free, start, end):
        reached, queue = {tuple(start): 0}, deque([tuple(start)])
        while queue:
            i, j = queue.popleft()
            for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if free[cell] and cell not in reached:
                    reached[cell] = reached[i, j] + 1
                    queue.append(cell)
        return reached[tuple(end)]

    def test_remembered_subgoals_are_the_oracles(self):
        source = self.source(MAZE, episode_length=200)
        source(0)
        maze = source.env.unwrapped
        assert len(source._subgoals) > 10
        for (start, goal), subgoal in source._subgoals.items():
            fresh, _ = maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(goal))
            np.testing.assert_array_equal(subgoal, fresh)

    def test_play_moves_the_cube(self):
        cube = self.source("cube-single-play-v0", episode_length=250)(0)["qpos"][:, 14:17]
        lifted = cube[:, 2].max() - cube[0, 2]
        moved = np.linalg.norm(cube[-1, :2] - cube[0, :2])
        assert lifted > 0.05
        assert moved > 0.05

    def test_a_random_action_is_uniform(self):
        source = self.source("cube-single-noisy-v0", p_random_action=1.0, episode_length=60)
        actions = source(0)["actions"]
        assert abs(actions.mean()) < 0.15
        assert abs(actions.std() - 3**-0.5) < 0.1

    def test_scene_health(self):
        qpos = np.zeros((3, 25))
        qpos[:, 14:17] = [0.4, 0.0, 0.02]
        assert _ogbench_episodes._cube_is_visible(qpos)
        for y, z, visible in ((0.29, 0.02, False), (-0.3, 0.02, False), (-0.3, 0.07, True)):
            qpos[1, 15:17] = y, z
            assert _ogbench_episodes._cube_is_visible(qpos) is visible


@needs_ogbench
class TestSeeds:
    @pytest.mark.parametrize("name", [MAZE, "cube-single-noisy-v0", "puzzle-3x3-play-v0"])
    def test_an_episode_depends_on_its_seed_only(self, name):
        behaviour = Behaviour.official(FILES[name], episode_length=12)
        used, fresh = make_episode_source(behaviour), make_episode_source(behaviour)
        used(1)
        first, second, other = used(7), fresh(7), fresh(8)
        for key in first:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)
        assert not np.array_equal(first["actions"], other["actions"])

    def test_the_callers_generator_is_left_alone(self, tmp_path):
        np.random.seed(5)
        expected = np.random.rand(3)
        np.random.seed(5)
        collect(tmp_path / "x.npz")
        np.testing.assert_array_equal(np.random.rand(3), expected)

    def test_same_seed_whatever_the_parts(self, tmp_path, monkeypatch):
        one = collect(tmp_path / "one.npz", size=50)
        monkeypatch.setattr(ogbench_scripted, "_SHARD_TRANSITIONS", 20)
        assert_equal_files(one, collect(tmp_path / "three.npz", size=50))

    def test_seed_and_split_make_different_files(self, tmp_path):
        files = [
            collect(tmp_path / "a.npz"),
            collect(tmp_path / "b.npz", seed=1),
            collect(tmp_path / "c.npz", split="val"),
        ]
        starts = {read(file)["observations"][0].tobytes() for file in files}
        assert len(starts) == 3

    def test_a_longer_file_begins_like_a_shorter_one(self, tmp_path):
        short = read(collect(tmp_path / "a.npz", size=20))
        long = read(collect(tmp_path / "b.npz", size=40))
        np.testing.assert_array_equal(long["actions"][:22], short["actions"])

    @pytest.mark.slow
    def test_same_seed_whatever_the_number_of_workers(self, tmp_path, small_shards):
        one = collect(tmp_path / "one.npz", size=80)
        assert_equal_files(one, collect(tmp_path / "two.npz", size=80, num_workers=2))

    @pytest.mark.parametrize("piped", [False, True])
    def test_a_program_without_a_main_guard(self, tmp_path, piped):
        """The processes do not run it again: a script would be locked out, a pipe not be found."""
        script = tmp_path / "script.py"
        script.write_text(
            "from torchrl_evor.data import collect_ogbench\n"
            f"collect_ogbench({MAZE!r}, {str(tmp_path / 'x.npz')!r}, 20_000, num_workers=2)\n"
            "import __main__; print(__main__.collect_ogbench.__name__)\n"
        )
        with open(script) as source:
            command = [sys.executable, *([] if piped else [str(script)])]
            done = subprocess.run(
                command, stdin=source, capture_output=True, text=True, timeout=120, cwd=tmp_path
            )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "collect_ogbench\n"
        assert len(read(tmp_path / "x.npz")["observations"]) >= 20_000

    @pytest.mark.slow
    def test_a_killed_worker_is_noticed(self, tmp_path, small_shards, monkeypatch):
        path = tmp_path / "x.npz"
        with monkeypatch.context() as patched:
            patched.setattr(ogbench_scripted, "_work", _die)
            with pytest.raises(RuntimeError, match="ended with exit code 3.*repeat the call"):
                collect(path, num_workers=2)
        assert collect(path).exists()

    @pytest.mark.slow
    def test_an_error_in_a_worker_is_raised(self, tmp_path, small_shards, monkeypatch):
        monkeypatch.setattr(ogbench_scripted, "_work", _fail)
        with pytest.raises(OSError, match="could not be written"):
            collect(tmp_path / "x.npz", num_workers=2)

    @pytest.mark.slow
    def test_interrupting_the_command(self, tmp_path):
        """The processes end, and the command goes on when it is repeated."""
        args = (MAZE, "--folder", str(tmp_path), "--no-val", "--num-transitions", "200000")
        command = [sys.executable, str(COLLECT), *args, "--num-workers", "2"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
            parts = tmp_path / f"{MAZE}.npz.parts"
            while len(list(parts.glob("0*.npz"))) < 2:
                time.sleep(0.1)
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert b"interrupted; repeat the command to go on" in stderr
        assert len(list(parts.glob("0*.npz"))) >= 2
        assert not list(tmp_path.glob("*.npz"))


def _die(*args):
    os._exit(3)


def _fail(plan, shards, results):
    results.put(OSError(errno.ENOSPC, "x could not be written (No space left on device)"))


@needs_ogbench
class TestRestart:
    def test_an_interrupt_keeps_what_is_finished(self, tmp_path, monkeypatch, small_shards):
        path, played = tmp_path / "x.npz", []
        source = make_episode_source(Behaviour.official(FILES[MAZE], episode_length=10))

        def interrupted_after(count):
            def play(seed):
                if len(played) == count:
                    raise KeyboardInterrupt
                played.append(seed)
                return source(seed)

            return lambda behaviour: play

        monkeypatch.setattr(ogbench_scripted, "_episode_source", interrupted_after(5))
        with pytest.raises(KeyboardInterrupt):
            collect(path, size=80)
        assert not path.exists()
        parts = path.with_name("x.npz.parts")
        assert sorted(p.name for p in parts.glob("*.npz")) == ["000000.npz", "000001.npz"]

        monkeypatch.setattr(ogbench_scripted, "_episode_source", interrupted_after(-1))
        collect(path, size=80)
        # the fifth episode's part was unfinished: it is played again, the first four are not
        assert len(played) == 5 + 4
        assert not parts.exists()
        assert_equal_files(path, collect(tmp_path / "whole.npz", size=80))

    def test_other_arguments_do_not_go_on(self, tmp_path, monkeypatch):
        path = tmp_path / "x.npz"
        monkeypatch.setattr(ogbench_scripted._Plan, "merge_parts", lambda self: None)
        collect(path)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="other arguments.*'seed': 0.*'seed': 1"):
            collect(path, seed=1)
        assert collect(path).exists()

    def test_a_finished_file_of_other_arguments(self, tmp_path):
        path = collect(tmp_path / "x.npz")
        before = path.read_bytes()
        with pytest.raises(RuntimeError, match=r"other arguments.*'seed': \(0, 1\)"):
            collect(path, seed=1)
        with pytest.raises(RuntimeError, match="other arguments.*action_noise"):
            collect(path, action_noise=0.5)
        assert collect(path) == path and path.read_bytes() == before

    def test_an_error_that_cannot_be_sent(self):
        """It comes as text; a queue would drop it, and the parent would wait for ever."""

        class Stubborn(Exception):
            def __reduce__(self):
                raise TypeError("not to be pickled")

        class Plan:
            def episodes(self, shard):
                raise Stubborn("here")

            behaviour = None

        results = queue.Queue()
        ogbench_scripted._work(Plan(), [0], results)
        error = results.get_nowait()
        assert type(error) is RuntimeError
        pickle.dumps(error)

    def test_workers_that_end_without_a_result(self):
        with pytest.raises(RuntimeError, match="ended with exit code 0"):
            ogbench_scripted._next_result(queue.Queue(), [SimpleNamespace(exitcode=0)])

    def test_an_existing_file_is_left_alone(self, tmp_path):
        path = tmp_path / "x.npz"
        path.write_bytes(b"mine")
        assert collect(path) == path
        assert path.read_bytes() == b"mine"

    @pytest.mark.parametrize("what", ["savez", "savez_compressed"])
    def test_a_full_disk(self, tmp_path, monkeypatch, what):
        path = tmp_path / "x.npz"

        def full(file, **arrays):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, what, full)
        with pytest.raises(OSError, match="could not be written.*No space left") as caught:
            collect(path)
        assert caught.value.errno == errno.ENOSPC
        assert not path.exists()
        left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
        merging = {"000000.npz", "x.npz.json"} if what == "savez_compressed" else set()
        assert left == {"plan.json", "x.npz.lock"} | merging
        monkeypatch.undo()
        assert len(read(collect(path))["terminals"]) == 44

    @pytest.mark.parametrize("last", ["x.npz", "x.npz.json"])
    def test_interrupted_at_the_end(self, tmp_path, monkeypatch, last):
        path, write = tmp_path / "x.npz", ogbench_scripted.write_atomically

        def interrupted(target, content):
            if target.name == last:
                raise KeyboardInterrupt
            write(target, content)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ogbench_scripted, "write_atomically", interrupted)
            collect(path)
        # Whatever came last, it is not taken for a collection with other arguments.
        with pytest.raises(RuntimeError, match="with other arguments"):
            collect(path, seed=5)
        assert len(read(collect(path))["terminals"]) == 44

    def test_two_at_once(self, tmp_path):
        path = tmp_path / "x.npz"
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(collect, [path] * 3))
        assert found == [path] * 3
        assert {p.name for p in tmp_path.iterdir()} == {"x.npz", "x.npz.json"}

    @pytest.mark.parametrize(
        "name, error, message",
        [
            ("x.npz.parts/plan.json", RuntimeError, "plan.json is damaged .* delete it"),
            ("x.npz.parts/000000.npz", ValueError, "000000.npz .* is not a complete npz archive"),
        ],
    )
    def test_damaged_pieces(self, tmp_path, monkeypatch, name, error, message):
        with monkeypatch.context() as patch, pytest.raises(AttributeError):
            patch.delattr(ogbench_scripted._Plan, "merge_parts")
            collect(tmp_path / "x.npz")
        (tmp_path / name).write_text("{")
        with pytest.raises(error, match=message):
            collect(tmp_path / "x.npz")


class TestBadInput:
    @pytest.mark.parametrize("name", ["antmaze-large-navigate-v0", "humanoidmaze-medium-stitch-v0"])
    def test_no_script_walks(self, tmp_path, name):
        with pytest.raises(ValueError, match="cannot be collected locally.*reinforcement learning"):
            collect(tmp_path / "x.npz", name)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"size": 0}, "num_transitions must be an integer >= 1, got 0"),
            ({"length": 0}, "episode_length must be"),
            ({"seed": -1}, "seed must be"),
            ({"split": "test"}, "split must be 'train' or 'val', got 'test'"),
            ({"num_workers": 0}, "num_workers must be"),
            ({"noise": -0.1}, "noise must be"),
            ({"noise": float("nan")}, "noise must be"),
            ({"p_random_action": 1.5}, "p_random_action must lie in"),
            ({"p_random_action": 0.5}, "p_random_action must be None for mazes, got 0.5"),
        ],
    )
    def test_numbers(self, tmp_path, kwargs, message):
        with pytest.raises(ValueError, match=message):
            collect(tmp_path / "x.npz", **kwargs)
        assert list(tmp_path.iterdir()) == []

    def test_path(self, tmp_path):
        with pytest.raises(ValueError, match="path must end in '.npz'"):
            collect(tmp_path / "x.hdf5")


class TestCommand:
    @staticmethod
    def run(monkeypatch, *args):
        monkeypatch.setattr(sys, "argv", [str(COLLECT), *args])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(COLLECT), run_name="__main__")
        return caught.value.code

    @needs_ogbench
    def test_writes_both_splits(self, tmp_path, monkeypatch, capsys):
        args = (MAZE, "--folder", str(tmp_path), "--num-transitions", "20")
        assert self.run(monkeypatch, *args, "--episode-length", "10", "--num-workers", "1") == 0
        assert len(read(tmp_path / f"{MAZE}.npz")["terminals"]) == 22
        assert len(read(tmp_path / f"{MAZE[:-3]}-v0-val.npz")["terminals"]) == 11
        assert f"{MAZE}.npz" in capsys.readouterr().out

    def test_help(self, monkeypatch, capsys):
        assert self.run(monkeypatch, "--help") == 0
        assert "--num-transitions" in capsys.readouterr().out

    def test_errors_are_one_line(self, tmp_path, monkeypatch):
        code = self.run(monkeypatch, "antmaze-large-navigate-v0", "--folder", str(tmp_path))
        assert code.startswith("collect.py: dataset_id='antmaze-large-navigate-v0' cannot")


if __name__ == "__main__":
    pytest.main([__file__, *sys.argv[1:]])
