# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
sys.path.insert(0, str(RECIPE))

import value_problems  # noqa: E402

_has_hydra = importlib.util.find_spec("hydra") is not None
_has_ogbench = importlib.util.find_spec("ogbench") is not None


def simulate(problem, state, right, size):
    """Returns of rollouts from one pair, by the problem's own transitions."""
    returns, discount = torch.zeros(size), torch.ones(size)
    observation, action = value_problems.encode(
        torch.full((size,), state), torch.full((size,), right), problem.num_states
    )
    pool = problem.sample(60000)
    key = 2 * pool["observation"].argmax(-1) + (pool["action"].squeeze(-1) > 0)
    rows = {k: (key == k).nonzero().squeeze(-1) for k in range(2 * problem.num_states)}
    while discount.any():
        index = 2 * observation.argmax(-1) + (action.squeeze(-1) > 0)
        chosen = torch.empty(size, dtype=torch.long)
        for k, candidates in rows.items():
            mask = index == k
            chosen[mask] = candidates[torch.randint(len(candidates), (int(mask.sum()),))]
        step = pool[chosen]
        returns += discount * step["next", "reward"].squeeze(-1)
        discount = problem.gamma * discount * ~step["next", "terminated"].squeeze(-1)
        observation, action = step["next", "observation"], step["next", "action"]
    return returns


@pytest.mark.parametrize("name", value_problems.PROBLEMS)
def test_laws_agree_with_simulation(name):
    problem = value_problems.PROBLEMS[name](num_states=3)
    law = problem.law()
    torch.testing.assert_close(law.weights.sum(-1), torch.ones(6, dtype=torch.float64))
    exact = law.quantiles(100)
    for pair in range(6):
        returns = simulate(problem, pair // 2, pair % 2, 4000).sort().values
        simulated = returns.reshape(100, 40).mean(-1).double()
        _, scale = exact[pair].mean(), law.deviation()[pair]
        distance = (simulated - exact[pair]).abs().mean()
        assert distance < 0.1 * scale + 1e-5, (pair, distance)
        for tau in (1.0, math.inf):
            value = law.q_star(tau)[pair].item()
            if math.isinf(tau):
                estimate = returns.mean()
            else:
                estimate = tau * ((returns / tau).logsumexp(0) - math.log(len(returns)))
            assert value == pytest.approx(estimate.item(), abs=0.12 * scale.item() + 1e-4)


def test_mixture_by_hand():
    law = value_problems.Mixture(
        *(
            torch.tensor([row], dtype=torch.float64)
            for row in ([0.0, 4.0], [0.0, 0.0], [0.75, 0.25])
        )
    )
    torch.testing.assert_close(
        law.quantiles(4), torch.tensor([[0.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    )
    assert law.q_star(math.inf).item() == 1.0
    assert law.q_star(2.0).item() == pytest.approx(2 * math.log(0.75 + 0.25 * math.exp(2)))
    assert law.deviation().item() == pytest.approx(math.sqrt(3))
    gaussian = value_problems.Mixture(*(torch.full((1, 1), x).double() for x in (1.0, 2.0, 1.0)))
    assert gaussian.q_star(4.0).item() == pytest.approx(1 + 4 / (2 * 4))
    # Quantiles 1/4 and 3/4 of a Gaussian lie 0.6745 deviations from its mean.
    assert gaussian.quantiles(2).tolist()[0] == pytest.approx([1 - 1.349, 1 + 1.349], abs=1e-3)


def test_errors_by_hand():
    truth = object.__new__(value_problems.KnownLaws)
    truth.scale, truth.returns = 2.0, torch.tensor([[0.0, 4.0]])
    truth.q_star = {math.inf: torch.tensor([2.0]), 0.5: torch.tensor([3.0])}
    quantiles = torch.tensor([[[1.0, 3.0]], [[0.0, 4.0]]])
    errors = truth.errors(quantiles, lambda tau: torch.full((2, 1), tau))
    # Distances 1 and 1 of the first seed, none of the second; learnt Q* is tau itself.
    assert errors["w1"].tolist() == [0.5, 0.0]
    assert errors["q_error_0.5"].tolist() == [1.0, 1.0]  # |0.5 * 2 - 3| / 2
    assert errors["mean_error"].isinf().all()


def test_returns_that_the_data_know():
    """Of five steps and of three at 0.5 a step: what follows weighs 1/32, 1/16, 1/8 and more."""
    episode = torch.tensor([7, 7, 7, 7, 7, 9, 9, 9])
    assert value_problems.rows_of_known_return(episode, 0.5).tolist() == [0, 1]
    with pytest.raises(ValueError, match="gamma=0.99 looks further than trajectories of 5 steps"):
        value_problems.rows_of_known_return(episode, 0.99)


def test_score_and_ranks_by_hand():
    truth = object.__new__(value_problems.HeldOutReturns)
    truth.scale, truth.returns = 2.0, torch.tensor([[1.0], [3.0]])
    # A point mass at 1 and a law of two points 0 and 4 for both returns.
    quantiles = torch.tensor([[[1.0, 1.0]] * 2, [[0.0, 4.0]] * 2])
    errors = truth.errors(quantiles, None)
    # |1 - 1|, |3 - 1|; and (1 + 3) / 2 - E|X - X'| / 2 = 2 - 1 for both.
    assert errors["crps"].tolist() == [0.5, 0.5]
    # Ranks 0 and 1, and twice 0.5, against 0.25 and 0.75.
    assert errors["rank_distance"].tolist() == [0.25, 0.25]


@pytest.mark.skipif(not _has_ogbench, reason="needs ogbench")
class TestMazeWalk:
    SIZES = {"num_transitions": 300, "episode_length": 40, "num_pairs": 5, "num_rollouts": 3}

    @staticmethod
    def walker(noise=0.5, seed=0):
        import maze_walk

        return maze_walk.Walker(noise, seed)

    def test_ways_by_hand(self):
        """Entrances are the cells (4, 6) and (5, 1), the goal is (7, 10), and (1, 7) is shut in."""
        walker = self.walker()
        centre = {cell: list(walker.maze.ij_to_xy(cell)) for cell in walker.cells}
        ways = {(6, 10): (7, 10), (4, 10): (5, 10), (6, 1): (5, 1), (3, 7): (3, 6), (3, 6): (4, 6)}
        for cell, subgoal in ways.items():
            assert walker.subgoals[cell].tolist() == centre[subgoal], cell
        assert set(centre) - set(walker.subgoals) == {(1, 7)}

    def test_returns_by_hand(self):
        walker = self.walker(noise=0.0)
        goal = np.array(walker.maze.cur_goal_xy)
        gamma = 0.9
        # OGBench judges the state before a step: at the goal nothing is paid, and it is over.
        assert walker.discounted_return(goal, np.zeros(2), gamma) == 0.0
        # From 4.1 below it 0.2 each time, to within a distance of 1: 16 steps that cost 1.
        below = goal - np.array([0.0, 4.1])
        expected = -(1 - gamma**16) / (1 - gamma)
        found = walker.discounted_return(below, np.array([0.0, 1.0]), gamma)
        assert found == pytest.approx(expected, rel=1e-6)
        # Shut in for ever.
        cell = walker.maze.ij_to_xy((1, 7))
        assert walker.discounted_return(cell, np.zeros(2), gamma) == pytest.approx(-10.0)

    def test_a_jump_decides(self):
        """At an entrance: never there, or as many steps as from the exit beside the goal."""
        walker, gamma = self.walker(noise=0.0, seed=2), 0.98
        entrance = np.array(walker.maze.ij_to_xy((5, 1)))
        exits = {
            cell: walker.discounted_return(np.array(walker.maze.ij_to_xy(cell)), np.zeros(2), gamma)
            for cell in ((6, 10), (1, 7))
        }
        found = [walker.discounted_return(entrance, np.zeros(2), gamma) for _ in range(40)]
        # The step into the exit costs 1, a step of no action at the exit as much.
        once = sum(abs(x - exits[6, 10]) < 0.02 * 50 for x in found)
        never = sum(abs(x + 50.0) < 0.3 for x in found)
        # A third each, and what comes back jumps again.
        assert 5 < once < 30 and 5 < never < 33

    def test_walks_have_ogbenchs_format_and_repeat(self):
        first, again = self.walker(seed=3), self.walker(seed=3)
        for _ in range(3):
            episode = first.episode(30)
            assert episode["terminals"].sum() == episode["terminals"][-1] == 1
            assert len(episode["terminals"]) <= 31
            for key, column in again.episode(30).items():
                assert np.array_equal(column, episode[key]), key

    def test_problem(self, tmp_path):
        import maze_walk

        options = {"gamma": 0.9, "n_step": 4, "noise": 1.0, **self.SIZES}
        problem = maze_walk.MazeWalk(tmp_path, **options)
        (folder,) = tmp_path.iterdir()
        observation, action = problem.pairs()
        assert observation.shape == action.shape == (5, 2)
        law = problem.law()
        assert law.means.shape == (5, 3)
        torch.testing.assert_close(law.q_star(math.inf), law.means.mean(-1))
        torch.testing.assert_close(law.quantiles(3), law.means.sort(-1).values)
        batch = problem.sample(2, 6)
        assert batch["next", "reward"].shape == (2, 6, 1)
        assert batch["steps_to_next_obs"].max() == 4
        # What was simulated is kept, and belongs to its settings.
        changed = (folder / "returns.npz").stat().st_mtime_ns
        again = maze_walk.MazeWalk(tmp_path, **options)
        assert torch.equal(again.law().means, law.means)
        assert (folder / "returns.npz").stat().st_mtime_ns == changed
        truth = value_problems.KnownLaws(problem, [1.0])
        assert truth.observation is observation and truth.replay is problem.replay
        maze_walk.MazeWalk(tmp_path, **{**options, "noise": 0.5})
        assert len(list(tmp_path.iterdir())) == 2

    def test_what_was_interrupted_is_made_again(self, tmp_path, monkeypatch):
        import maze_walk

        options = {"gamma": 0.9, "n_step": 4, "noise": 1.0, **self.SIZES}
        with monkeypatch.context() as patch:
            patch.setattr(maze_walk, "_simulate", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                maze_walk.MazeWalk(tmp_path, **options)
        assert not list(tmp_path.iterdir())
        maze_walk.MazeWalk(tmp_path, **options)
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("name, value", [("gamma", 1.0), ("noise", -1.0), ("num_pairs", 0)])
    def test_bad_numbers(self, tmp_path, name, value):
        import maze_walk

        options = {"gamma": 0.9, "n_step": 4, "noise": 1.0, **self.SIZES, name: value}
        with pytest.raises(ValueError, match=f"{name}.* must .*got .*{value}"):
            maze_walk.MazeWalk(tmp_path, **options)

    def test_simulated_returns_are_those_of_the_data(self):
        """A walk's own return, from its first step, is one more draw of the simulated law."""
        walker, gamma, scores = self.walker(noise=1.0, seed=1), 0.98, []
        while len(scores) < 16:
            episode = walker.episode(300)
            # From the side of the goal, where all arrive; chosen by their start alone.
            if episode["observations"][0][0] < 35 or episode["observations"][0][1] < 4:
                continue
            steps = len(episode["terminals"]) - 2
            start = episode["observations"][0], episode["actions"][0]
            # Minus 1 for each step before the one that leaves the goal.
            own = -(1 - gamma**steps) / (1 - gamma)
            drawn = [walker.discounted_return(*start, gamma) for _ in range(9)]
            scores.append(sum(x < own for x in drawn) + sum(x == own for x in drawn) / 2)
        # Ranks among nine draws are uniform from 0 to 9: mean 4.5, that of 16 within 0.72.
        assert abs(sum(scores) / len(scores) - 4.5) < 3 * 0.72


@pytest.mark.skipif(not _has_hydra, reason="needs hydra")
def test_summary_by_hand():
    import value_study

    def row(problem, method, updates, seed, **errors):
        label = {"problem": problem, "method": method, "updates": updates, "seed": seed}
        return {**label, "seconds": 2.4, **errors}

    rows = [
        row("chain", "bellman", 10, 0, w1=9.0),  # not the last measurement
        row("chain", "bellman", 20, 0, w1=0.25),
        row("chain", "bellman", 20, 1, w1=0.25),
        row("chain", "scalar", 20, 0, w1=1.0),
        row("maze", "bellman", 20, 0, crps=0.5),
    ]
    assert value_study.measures(rows) == ["w1", "crps"]
    assert value_study.summary(rows).split("\n") == [
        "chain, 20 updates:",
        "",
        "| method | w1 | seconds |",
        "| --- | --- | --- |",
        "| bellman | 0.250 [0.250, 0.250] | 2 |",
        "| scalar | 1.000 (1 seed) | 2 |",
        "",
        "maze, 20 updates:",
        "",
        "| method | crps | seconds |",
        "| --- | --- | --- |",
        "| bellman | 0.500 (1 seed) | 2 |",
        "",
    ]


@pytest.mark.skipif(not _has_hydra, reason="needs hydra")
def test_rows_are_written_in_lines(tmp_path):
    """One line for each, ended as everywhere else in the repository; later columns stay empty."""
    import value_study

    value_study.write([{"a": 1, "b": "x, y"}, {"a": 2, "c": 0.5}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == b'a,b,c\n1,"x, y",\n2,,0.5\n'
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.skipif(not _has_hydra, reason="needs hydra")
def test_spread_of_observations():
    """A network whose inputs are 4 and 6 on average, with deviations 1 and 2, at spread 2."""
    import value_study
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    network = value_study.StackedVelocityMLP(1, 3, hidden_sizes=(4,))
    inputs = torch.tensor([[[1.0, -2.0, 0.5]]])
    before = network(inputs)
    units = SimpleNamespace(
        observation_statistics=lambda: (torch.tensor([4.0, 6.0]), torch.tensor([1.0, 2.0]))
    )
    cfg = OmegaConf.create({"observation_spread": 2.0})
    truth = SimpleNamespace(replay=units)
    assert value_study.standardize(network, cfg, truth) is network
    moved = torch.tensor([[[4.0 + 0.5, 6.0 - 2.0, 0.5]]])
    torch.testing.assert_close(network(moved), before)
    with pytest.raises(ValueError, match="observation_spread=2.0 needs measured observations"):
        value_study.standardize(network, cfg, SimpleNamespace(replay=None))


@pytest.mark.skipif(not (_has_hydra and _has_ogbench), reason="needs hydra and ogbench")
@pytest.mark.parametrize(
    "override, message",
    [
        ("num_updates=0", "num_updates must be an integer of at least 1, got 0"),
        ("interval=0", "interval must be an integer of at least 1, got 0"),
        ("interval=20000", "interval must be at most num_updates=10000, got 20000"),
        ("batch_size=-1", "batch_size must be an integer of at least 1"),
        ("num_seeds=0", "num_seeds must be an integer of at least 1"),
        ("methods=[]", "methods must hold at least one value"),
        ("methods=[bellman,belman]", "methods must be one of .*, got 'belman'"),
        ("problems=[]", "problems must hold at least one value"),
        ("problems=[chain,forks]", "got 'forks'"),
    ],
)
def test_bad_input(override, message):
    """Named before any work is done, and so before results of an earlier run are replaced."""
    import value_study
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("value_study", overrides=[override])
        value_study.check_config(compose("value_study", overrides=["problems=[maze,fork]"]))
    with pytest.raises(ValueError, match=message):
        value_study.check_config(cfg)


@pytest.mark.slow
@pytest.mark.skipif(not _has_hydra, reason="needs hydra")
def test_command(tmp_path):
    options = ["num_updates=4", "interval=2", "num_seeds=2", f"output={tmp_path}"]
    command = [sys.executable, str(RECIPE / "value_study.py"), *options]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    header, *rows = (tmp_path / "value_study.csv").read_text().splitlines()
    assert header.startswith("problem,method,updates,seconds,seed,w1,mean_error,q_error_0.25")
    # 2 problems, 8 methods, 2 measurements, 2 seeds
    assert len(rows) == 2 * 8 * 2 * 2
    assert all(float(value) >= 0 for row in rows for value in row.split(",")[2:])
    for name in ("value_study.png", "value_study_seconds.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert (tmp_path / "value_study.png").stat().st_size > 0


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
