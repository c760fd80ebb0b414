# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the scripts of the recipe refuse before any work is done."""

from __future__ import annotations

import importlib
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _recipe_cases import RECIPE, SMALL, check_evor, needs_extras, run

pytestmark = needs_extras

SCRIPTS = (
    *("evor", "train_baseline", "many", "costs"),
    *("value_study", "architecture_study", "inference_study", "noise_study", "stitch_study"),
)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs a script of the recipe in this process, as from a command line."""

    def call(script: str, *overrides: str) -> None:
        argv = [script, *overrides, "hydra/job_logging=none", f"hydra.run.dir={tmp_path / 'run'}"]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # its configuration lies beside it
        importlib.import_module(script).main()

    return call


class TestKinds:
    """Each option is of the kind of its default."""

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_unknown_options(self, main, script):
        with pytest.raises(ValueError, match="stepz is no option, there are .*num_threads"):
            main(script, "+stepz=1")

    @pytest.mark.parametrize(
        "script, override, message",
        [
            ("evor", "loss.bound_returns=no", "loss.bound_returns must be true or false, got 'no'"),
            ("evor", "value.layer_norm=off", "value.layer_norm must be true or false, got 'off'"),
            ("evor", "compile=maybe", "compile must be true or false, got 'maybe'"),
            ("evor", "compile=1", "compile must be true or false, got 1"),
            ("evor", "eval.seed=abc", "eval.seed must be an integer, got 'abc'"),
            ("evor", "seed=true", "seed must be an integer, got True"),
            ("evor", "optim.num_updates=2.5", "optim.num_updates must be an integer, got 2.5"),
            ("evor", "eval.interval=null", "eval.interval must be an integer, got None"),
            ("evor", "protocol=2", "protocol must be text, got 2"),
            ("evor", "actor.tau_r=null", "actor.tau_r must be a number .*, got None"),
            ("evor", "optim.lr=true", "optim.lr must be a number .*, got True"),
            ("evor", "actor.tau_r=.inf", "a number .on a command line inf, not .inf., got '.inf'"),
            ("evor", "optim=fast", "optim must be a mapping, got 'fast'"),
            ("evor", "value.hidden_sizes=64", "value.hidden_sizes must be a list, got 64"),
            ("evor", "value.hidden_sizes=[64,a]", r"hidden_sizes\[1\] must be an integer, got 'a'"),
            ("evor", "+optim.steps=3", "optim.steps is no option, there are num_updates, lr"),
            ("train_baseline", "method=3", "method must be text, got 3"),
            ("many", "layer_norm=no", "layer_norm must be true or false"),
            ("many", "envs=[{name:a,gama:0.9}]", r"envs\[0\].gama is no option"),
            (
                "many",
                "+settings=cube-single-play",
                "settings must be left to .*many.py .*'loss'",
            ),
            ("value_study", "num_updates=many", "num_updates must be an integer"),
            ("architecture_study", "base.layer_norm=no", "base.layer_norm must be true or false"),
            (
                "architecture_study",
                "+variants.base.layer_norm=no",
                "variants.base.layer_norm must be true or false",
            ),
            ("stitch_study", "+variants.qc-5.value.layer_norm=no", "layer_norm must be true or"),
            ("inference_study", "grids.tau_q=[a]", r"grids.tau_q\[0\] must be a number"),
        ],
    )
    def test_values(self, main, script, override, message):
        with pytest.raises(ValueError, match=message):
            main(script, override)

    def test_what_fits(self, main, monkeypatch):
        """Integers are numbers; what is null may be anything; settings come from elsewhere."""
        import utils

        class Reached(Exception):
            pass

        def stop(cfg):
            raise Reached

        monkeypatch.setattr(utils, "check_config", stop)
        fits = ["optim.lr=1", "actor.tau_r=inf", "value.observation_spread=3", "num_threads=2"]
        for script in ("evor", "train_baseline"):
            with pytest.raises(Reached):
                main(script, *fits, "results_dir=x", "data.n_step=7", "+settings=cube-single-play")


@pytest.mark.parametrize("script", ["evor.py", "train_baseline.py"])
def test_a_second_run_in_the_folder_of_the_first(recipe_root, short_run, script):
    """Its log would go on with the rows of the first."""
    _, folder = short_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.csv")}
    result = run(script, recipe_root, *SMALL, f"hydra.run.dir={folder}")
    assert result.returncode != 0
    assert "hydra.run.dir must be a folder without a checkpoint, got" in result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.csv")}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["method=qcc"], "method must be one of"),
        (["method=scalar", "loss.next_action=improved"], "next_action must be"),
        (["method=qc", "value.num_flows=2"], "value.num_flows=2 needs method=evor"),
        (["method=iql", "policy.observation_noise=0.1"], "policy.observation_noise must be 0"),
        (["policy.observation_noise=-1"], "observation_noise must be a deviation"),
        (["method=iql", "baseline.expectile=2.0"], "expectile must lie between 0 and 1"),
    ],
)
def test_methods_of_baselines(overrides, message):
    import train_baseline
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("baselines", overrides=[*SMALL, *overrides])
    with pytest.raises(ValueError, match=message):
        train_baseline.check_config(cfg)


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
            ("eval.episodes=0", "eval.episodes must be an integer of at least 1"),
            ("data.n_step=0", "data.n_step must be an integer of at least 1"),
            ("data.observation_spread=0", "observation_spread must be positive and finite, got 0"),
            ("data.observation_spread=.inf", "observation_spread must be positive and finite"),
            ("data.observation_spread=null", "observation_spread must be positive and finite"),
            ("value.observation_spread=-1", "value.observation_spread must be positive and finite"),
            ("loss.td_target=exact", "td_target must be one of"),
            ("loss.next_action=best", "next_action must be one of"),
            ("actor.nodes=even", "nodes must be one of"),
            ("actor.backend=jax", "backend must be one of"),
            ("actor.tau_q=-1", "tau_q"),
            ("actor.tau_r=.inf", r"tau_r must be a temperature in \[0, inf\], got '.inf'"),
            ("actor.num_candidates=0", "num_candidates"),
            ("value.num_steps=0", "num_steps"),
            ("value.hidden_sizes=[0]", "hidden_sizes"),
            ("optim.schedule=linear", "optim.schedule must be one of .'constant', 'cosine'."),
            ("seed=-1", "seed must be an integer of at least 0, got -1"),
            ("eval.seed=-1", "eval.seed must be an integer of at least 0, got -1"),
            ("eval.interval=-1", "eval.interval must be an integer of at least 0, got -1"),
            ("checkpoint.interval=-1", "checkpoint.interval must be an integer of at least 0"),
            ("matmul_precision=low", "matmul_precision must be one of .*, got 'low'"),
            ("protocol=' '", "protocol must be a text that is not empty, got ' '"),
            (f"results_dir={__file__}", "results_dir must be a folder, got .* is a file"),
            (f"results_dir={__file__}/rows", "results_dir must be a folder, got .* is a file"),
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

    @pytest.mark.parametrize("threads", [0, -1, 1.5, "all"])
    def test_num_threads(self, threads):
        import utils
        from omegaconf import OmegaConf

        cfg = OmegaConf.create({"num_threads": threads, "matmul_precision": "highest"})
        with pytest.raises(ValueError, match=f"num_threads must be null or .*got '?{threads}"):
            utils.configure_torch(cfg)

    @pytest.mark.parametrize(
        "override, group",
        [("loss.gamma=0.9", "loss"), ("optim.lr=1.0", "optim"), ("data.n_step=7", "data")],
    )
    def test_checkpoint_of_another_configuration(self, recipe_root, short_run, override, group):
        resume = f"resume={short_run[1] / 'checkpoint'}"
        with pytest.raises(ValueError, match=f"belongs to another configuration: {group} was"):
            check_evor(recipe_root, "optim.num_updates=8", override, resume)

    def test_another_end_of_a_cosine(self, recipe_root, short_run, monkeypatch):
        """At a constant rate a run may go on; under a schedule its end is part of it."""
        resume = f"resume={short_run[1] / 'checkpoint'}"
        check_evor(recipe_root, "optim.num_updates=8", resume)
        with pytest.raises(ValueError, match="optim was"):
            check_evor(recipe_root, "optim.num_updates=8", "optim.schedule=cosine", resume)

    def test_a_damaged_checkpoint(self, recipe_root, short_run, tmp_path):
        import studies

        checkpoint = Path(shutil.copytree(short_run[1] / "checkpoint", tmp_path / "checkpoint"))
        resume = f"resume={checkpoint}"
        check_evor(recipe_root, resume)
        largest = max(checkpoint.rglob("*.memmap"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:16])
        with pytest.raises(ValueError, match=rf"damaged: .*{largest.name} .* got 16\."):
            check_evor(recipe_root, resume)
        with pytest.raises(ValueError, match=rf"checkpoint=.* is damaged: .*{largest.name}"):
            studies.load(checkpoint)
        assert largest.stat().st_size == 16  # reading would have grown it
        largest.unlink()
        with pytest.raises(ValueError, match="got no file"):
            check_evor(recipe_root, resume)

    @pytest.mark.parametrize("content", ['{"a": 1', "[]"])
    def test_damaged_sizes(self, tmp_path, content):
        import checkpoint_io

        (tmp_path / checkpoint_io.SIZES).write_text(content)
        with pytest.raises(ValueError, match="is damaged: sizes.json must hold the sizes"):
            checkpoint_io.check_sizes(tmp_path)

    def test_a_checkpoint_of_something_else(self, recipe_root, tmp_path):
        from torchrl.checkpoint import Checkpoint

        folder = Checkpoint(progress={"step": 1}).save(tmp_path / "checkpoint")
        with pytest.raises(ValueError, match="resume=.*was not written by evor.py"):
            check_evor(recipe_root, f"resume={folder}")

    def test_no_room_for_a_checkpoint(self, tmp_path, monkeypatch):
        import checkpoint_io

        full = SimpleNamespace(free=10)
        monkeypatch.setattr(checkpoint_io.shutil, "disk_usage", lambda path: full)
        with pytest.raises(OSError, match="needs 1.0 MiB, 0.0 MiB are free"):
            checkpoint_io.check_room(tmp_path, torch.nn.Linear(2, 2))

    @pytest.fixture
    def interruptible(self):
        """A shell starts what runs in its background with interrupts ignored."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_an_interrupt_waits_for_the_checkpoint(self, interruptible):
        import checkpoint_io

        done = False
        with pytest.raises(KeyboardInterrupt):
            with checkpoint_io.uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done = True
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


if __name__ == "__main__":
    pytest.main([__file__, "-v"])
