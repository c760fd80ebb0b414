# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe where candidates are kept: first the policy, then the value, in one run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from _recipe_cases import RECIPE, SMALL, TASK, check_evor, needs_extras, run

pytestmark = needs_extras
KEPT = ["loss.next_action=improved", "loss.improved.num_candidates=3", "loss.keep_candidates=true"]
CHOICE = ["loss.improved.num_samples=1", "loss.improved.num_steps=1"]
UPDATES = 4  # of the policy, and as many of the value


class Stopped(Exception):
    """A run that ends before its time."""


class Agent:
    """What evor.py trains, in this process, with every batch that was sampled."""

    def __init__(self, root: Path, output: Path, *overrides: str) -> None:
        import utils
        from hydra import compose, initialize_config_dir

        options = [*SMALL, *KEPT, *CHOICE, f"optim.num_updates={UPDATES}", "logger.backend=none"]
        options += [f"data.root={root / 'data'}", "data.n_step=3", *overrides]
        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            self.cfg = compose("config", overrides=options)
        utils.check_config(self.cfg)
        torch.manual_seed(0)
        self.output = output
        output.mkdir(exist_ok=True)
        self.data = utils.make_data(self.cfg)
        policy, returns = utils.make_networks(self.cfg, self.data, torch.device("cpu"))
        self.loss, self.updater, self.optimizer = utils.make_loss(self.cfg, policy, returns)
        self.actor = utils.make_actor(self.cfg, policy, returns)
        self.batches, self.networks = [], []

    def parameters(self) -> dict[str, torch.Tensor]:
        modules = {"policy": self.actor.policy, "value": self.actor.returns}
        return {
            name: torch.cat([p.detach().flatten() for p in module.parameters()])
            for name, module in modules.items()
        }

    def train(self, monkeypatch, stop: int = 1000):
        """Trains; the sample after ``stop`` of them ends the run."""
        import runs

        sample = self.data.sample

        def record():
            if len(self.batches) == stop:
                raise Stopped
            self.batches.append(sample())
            self.networks.append(self.parameters())
            return self.batches[-1]

        monkeypatch.setattr(self.data, "sample", record)
        parts = (self.data, self.loss, self.updater, self.optimizer, self.actor)
        return runs.train(self.cfg, self.output, *parts)


def test_the_value_is_trained_over_candidates_of_the_finished_policy(
    recipe_root, tmp_path, monkeypatch
):
    evaluations = ["eval.interval=2", "eval.episodes=1", "eval.num_envs=1"]
    agent = Agent(recipe_root, tmp_path, "optim.schedule=cosine", *evaluations)
    trained = agent.train(monkeypatch)
    assert trained.step == 2 * UPDATES
    held = [("next", "candidates") in batch.keys(True) for batch in agent.batches]
    assert held == [False] * UPDATES + [True] * UPDATES
    assert agent.batches[-1]["next", "candidates"].shape == (16, 3, 2)
    changed = {
        name: [
            not torch.equal(a[name], b[name]) for a, b in zip(agent.networks, agent.networks[1:])
        ]
        for name in ("policy", "value")
    }
    # What an update changes is seen before the next one.
    assert changed["policy"] == [True] * UPDATES + [False] * (UPDATES - 1)
    assert changed["value"] == [False] * UPDATES + [True] * (UPDATES - 1)
    losses = [{n for n in row if n.startswith("loss")} for row in trained.history["train"]]
    assert losses == [{"loss_actor"}] * 2 + [{"loss_value"}] * 2
    # Not after 2 and 4 updates, when there was no value to choose by.
    assert [row["step"] for row in trained.history["eval"]] == [6]


@pytest.mark.parametrize("stop", [3, 6])  # in either phase
def test_a_continued_run_is_the_uninterrupted_run(recipe_root, tmp_path, monkeypatch, stop):
    options = ["checkpoint.interval=1", "optim.schedule=cosine"]
    whole = Agent(recipe_root, tmp_path / "whole", *options)
    expected = whole.train(monkeypatch).history["train"]
    stopped = Agent(recipe_root, tmp_path / "stopped", *options)
    with pytest.raises(Stopped):
        stopped.train(monkeypatch, stop)
    resume = f"resume={tmp_path / 'stopped' / 'checkpoint'}"
    rest = Agent(recipe_root, tmp_path / "rest", *options, resume)
    history = rest.train(monkeypatch).history["train"]
    assert len(rest.batches) == 2 * UPDATES - stop
    for batch, other in zip(rest.batches, whole.batches[stop:]):
        assert (batch == other).all()
    for name in ("policy", "value"):
        torch.testing.assert_close(rest.networks[-1][name], whole.networks[-1][name])
    assert history[-1] == expected[-1]


def test_losses_that_no_row_holds_yet_are_logged_before_the_value(
    recipe_root, tmp_path, monkeypatch
):
    agent = Agent(recipe_root, tmp_path, "logger.interval=3")
    history = agent.train(monkeypatch).history["train"]
    assert [(row["step"], "loss_actor" in row) for row in history] == [
        (3, True),
        (4, True),
        (6, False),
    ]


def test_each_phase_has_a_schedule_of_its_own():
    import utils

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = utils.make_scheduler(optimizer, "cosine", 2, 2)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0, 1.0, 2.0, 1.0, 0.0, 0.0], abs=1e-12)


def test_another_length_is_another_run(recipe_root, tmp_path, monkeypatch):
    """Though at a constant rate: the policy's updates end where the value's begin."""
    Agent(recipe_root, tmp_path).train(monkeypatch)
    options = [*KEPT, *CHOICE, "data.n_step=3", f"resume={tmp_path / 'checkpoint'}"]
    options += ["logger.backend=none", f"data.root={recipe_root / 'data'}"]
    with pytest.raises(ValueError, match="belongs to another configuration: optim was"):
        check_evor(recipe_root, *options, f"optim.num_updates={UPDATES + 1}")


@pytest.mark.parametrize(
    ("script", "method", "name", "options"),
    [
        ("evor.py", [], "evor-2", [*KEPT, *CHOICE]),
        ("train_baseline.py", ["method=qc"], "qc-2", ["loss.keep_candidates=true"]),
    ],
)
def test_scripts(recipe_root, tmp_path, script, method, name, options):
    """Rows say how many updates each network had, and that candidates were kept."""
    import studies

    result = run(
        script,
        recipe_root,
        *SMALL,
        *method,
        *options,
        "chunk_size=2",
        "data.n_step=2",
        "optim.num_updates=2",
        f"results_dir={tmp_path / 'results'}",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    (row,) = studies.read(tmp_path / "results" / TASK / f"{name}.csv")
    assert row["num_updates"] == "2" and math.isfinite(float(row["return_mean"]))
    assert "kept)" in row["training"]


@pytest.mark.parametrize("options", [[], ["loss.next_action=policy"]])
def test_nothing_is_kept_where_nothing_is_chosen(recipe_root, options):
    with pytest.raises(ValueError, match="loss.keep_candidates must be false without"):
        check_evor(recipe_root, "loss.keep_candidates=true", *options)
