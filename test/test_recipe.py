# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe as a user runs it: small, but the whole way from collected data to pictures."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
sys.path.insert(0, str(RECIPE))

_has_extras = all(
    importlib.util.find_spec(name) is not None
    for name in ("hydra", "ogbench", "matplotlib", "scipy", "tqdm")
)
pytestmark = pytest.mark.skipif(not _has_extras, reason="needs the extras [all]")

SMALL = [
    "data.num_transitions=4000",
    "data.n_step=20",
    "data.batch_size=16",
    "policy.hidden_sizes=[16,16]",
    "value.hidden_sizes=[16,16]",
    "actor.num_candidates=2",
    "actor.num_samples=2",
    "eval.interval=0",
    "eval.final_episodes=1",
    "logger.interval=2",
    "optim.schedule=constant",
    "device=cpu",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One folder, and so one collection of data, for all runs."""
    return tmp_path_factory.mktemp("recipe")


def run(script: str, root: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPE / script), f"data.root={root / 'data'}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def short_run(root):
    """Four updates of the smallest agent."""
    result = run("evor.py", root, *SMALL, "optim.num_updates=4", f"hydra.run.dir={root / 'short'}")
    assert result.returncode == 0, result.stderr[-2000:]
    return result, root / "short"


def component(checkpoint: Path, name: str):
    (folder,) = checkpoint.glob(f"components/*-{name}")
    return json.loads((folder / "value.json").read_text())


class TestRun:
    def test_leaves_what_a_person_looks_at(self, short_run):
        result, output = short_run
        for name in ("learning_curve.png", "maze.png"):
            assert (output / name).read_bytes().startswith(b"\x89PNG"), name
        assert "success" in result.stderr + result.stdout
        scalars = {path.stem for path in (output / "logs" / "scalars").iterdir()}
        assert {"train_loss_actor", "train_loss_value", "eval_success"} <= {
            name.replace("/", "_") for name in scalars
        } or any((output / "logs").rglob("*loss_value*"))
        assert component(output / "checkpoint", "progress")["step"] == 4

    def test_resumed_run_is_the_uninterrupted_run(self, root, short_run):
        longer = [*SMALL, "optim.num_updates=8"]  # at a constant rate, which does not know it
        resumed = run(
            "evor.py",
            root,
            *longer,
            f"resume={short_run[1] / 'checkpoint'}",
            f"hydra.run.dir={root / 'resumed'}",
        )
        whole = run("evor.py", root, *longer, f"hydra.run.dir={root / 'whole'}")
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        assert whole.returncode == 0, whole.stderr[-2000:]
        histories = [
            component(root / name / "checkpoint", "progress")["history"]["train"]
            for name in ("resumed", "whole")
        ]
        assert [row["step"] for row in histories[0]] == [2, 4, 6, 8]
        assert histories[0] == histories[1]


class TestBadInput:
    """Every mistake is named before any work is done."""

    @pytest.mark.parametrize(
        "override, message",
        [
            ("resume=nowhere", "resume must be the folder of a checkpoint, got 'nowhere'"),
            ("env.name=pointmaze-medum-navigate", "pointmaze-medium-navigate"),
            ("env.task=7", "task"),
            ("optim.num_updates=0", "optim.num_updates must be an integer of at least 1, got 0"),
            ("eval.final_episodes=0", "eval.final_episodes must be an integer of at least 1"),
            ("optim.schedule=linear", "optim.schedule must be 'constant' or 'cosine'"),
            ("logger.backend=excel", "logger.backend must be"),
        ],
    )
    def test_configuration(self, override, message):
        import utils
        from hydra import compose, initialize_config_dir

        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            cfg = compose("config", overrides=[override])
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            utils.check_config(cfg)

    def test_checkpoint_of_another_configuration(self, root, short_run):
        result = run(
            "evor.py",
            root,
            *SMALL,
            "optim.num_updates=8",
            "loss.gamma=0.9",
            f"resume={short_run[1] / 'checkpoint'}",
            f"hydra.run.dir={root / 'other'}",
        )
        assert result.returncode != 0
        assert "belongs to another configuration: loss was" in result.stderr


class TestScheduler:
    def test_cosine_goes_from_all_to_nothing_and_on_after_a_restart(self):
        import utils

        def make(lr):
            return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)

        optimizer = make(2.0)
        scheduler = utils.make_scheduler(optimizer, "cosine", 4)
        rates = []
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        half = math.sqrt(0.5)  # 1 + cos(pi k / 4) for k = 0, ..., 4
        assert rates == pytest.approx([2.0, 1 + half, 1.0, 1 - half, 0.0], abs=1e-12)
        assert optimizer.param_groups[0]["lr"] == 0.0  # and stays there

        first = utils.make_scheduler(make(2.0), "cosine", 4)
        first.optimizer.step()
        first.step()
        second = utils.make_scheduler(make(2.0), "cosine", 4)
        second.load_state_dict(first.state_dict())
        second.optimizer.step()
        second.step()
        assert second.get_last_lr() == pytest.approx([1.0])


class TestSummary:
    def test_wilson_interval_of_all_successes(self):
        import utils
        from tensordict import TensorDict

        episodes = TensorDict(
            {
                "success": torch.ones(50, dtype=torch.bool),
                "return": torch.full((50,), -100.0),
                "length": torch.full((50,), 100),
            },
            batch_size=[50],
        )
        summary = utils.summarize(episodes)
        assert summary["success"] == 1.0
        # Wilson: n / (n + z^2) with z = 1.96.
        assert summary["success_low"] == pytest.approx(50 / (50 + 1.959964**2), abs=1e-6)
        assert summary["success_high"] == 1.0
        assert summary["return_low"] == summary["return_high"] == -100.0


@pytest.mark.slow
def test_many_runs_leave_a_row_for_each(root):
    result = run(
        "many.py",
        root,
        "data.num_transitions=4000",
        "hidden_sizes=[16,16]",
        "num_updates=4",
        "logger.interval=2",
        "tasks=[1,2]",
        "n_steps=[5]",
        "methods=[evor,scalar,qc-1,bc]",
        "actor.num_candidates=2",
        "actor.num_samples=2",
        "eval.episodes=1",
        "eval.processes=1",
        "device=cpu",
        f"results_dir={root / 'results'}",
        f"hydra.run.dir={root / 'many'}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    import results_io

    rows = results_io.read_rows(root / "results")
    assert {(row.method, row.task) for row in rows} == {
        (method, task) for method in ("evor", "scalar", "qc-1", "bc") for task in (1, 2)
    }


if __name__ == "__main__":
    pytest.main([__file__, "-v"])
