# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe as a user runs it: small, but the whole way from collected data to pictures."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _recipe_cases import RECIPE, SMALL, TASK, check_evor, needs_extras, run
from tensordict import TensorDict

pytestmark = needs_extras


def component(checkpoint: Path, name: str):
    (folder,) = checkpoint.glob(f"components/*-{name}")
    return json.loads((folder / "value.json").read_text())


class TestRun:
    def test_leaves_what_a_person_looks_at(self, short_run):
        result, output = short_run
        for name in ("learning_curve.png", "reward_to_go.png", "base_policy.png", "maze.png"):
            assert (output / name).read_bytes().startswith(b"\x89PNG"), name
        assert "success" in result.stderr + result.stdout
        logged = {path.stem for path in (output / "logs").rglob("*.csv")}
        assert {"loss_actor", "loss_value", "success"} <= logged
        assert component(output / "checkpoint", "progress")["step"] == 4

    def test_resumed_run_is_the_uninterrupted_run(self, recipe_root, short_run):
        longer = [*SMALL, "optim.num_updates=8"]  # at a constant rate, which does not know it
        resumed = run(
            "evor.py",
            recipe_root,
            *longer,
            f"resume={short_run[1] / 'checkpoint'}",
            f"hydra.run.dir={recipe_root / 'resumed'}",
        )
        whole = run("evor.py", recipe_root, *longer, f"hydra.run.dir={recipe_root / 'whole'}")
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        assert whole.returncode == 0, whole.stderr[-2000:]
        histories = [
            component(recipe_root / name / "checkpoint", "progress")["history"]["train"]
            for name in ("resumed", "whole")
        ]
        assert [row["step"] for row in histories[0]] == [2, 4, 6, 8]
        assert histories[0] == histories[1]


def test_chunks_of_actions_and_an_ensemble(recipe_root):
    """The whole way in chunks of three actions by two flows, up to a study of the finished run."""
    import studies

    output = recipe_root / "chunks"
    result = run(
        "evor.py",
        recipe_root,
        *SMALL,
        "chunk_size=3",
        "value.num_flows=2",
        "loss.bound_returns=true",
        "data.n_step=2",
        "optim.num_updates=2",
        "results_dir=results",
        f"hydra.run.dir={output}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("reward_to_go.png", "base_policy.png", "maze.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    (path,) = (recipe_root / "results").rglob("*.csv")
    (row,) = studies.read(path)
    assert path.stem == row["method"] == "evor-3-x2"
    assert row["training"].startswith("data=local-seed0-4000 lr=0.0005 schedule=")
    assert row["training"].endswith(" bound_returns=True")
    trained = studies.load(output)
    assert (trained.method, trained.chunk_size) == ("evor-3-x2", 3)
    assert len(trained.returns.members) == 2
    actor = studies.make_actor(trained, {"num_candidates": 2, "num_samples": 2})
    columns = studies.evaluate(trained, actor, episodes=1, seed=0, num_envs=1)
    assert columns["length_mean"] == 1000 and columns["latency_seconds"] > 0


class TestBaseline:
    def test_leaves_a_row_and_a_checkpoint_that_studies_open(self, recipe_root):
        import studies

        output = recipe_root / "baseline"
        small = [*SMALL, "method=scalar", "chunk_size=2", "optim.num_updates=4"]
        places = [f"results_dir={recipe_root / 'baselines'}", f"hydra.run.dir={output}"]
        result = run("train_baseline.py", recipe_root, *small, *places)
        assert result.returncode == 0, result.stderr[-2000:]
        trained = studies.load(output)
        assert (trained.method, trained.chunk_size) == ("scalar-2", 2)
        assert trained.returns.loc < -1  # the data's, not those of a fresh network
        # A finished run is evaluated again, nothing trained.
        again = run(
            "train_baseline.py",
            recipe_root,
            *small,
            f"resume={output / 'checkpoint'}",
            "actor.tau_q=3.0",
            f"results_dir={recipe_root / 'again'}",
            f"hydra.run.dir={recipe_root / 'baseline_again'}",
        )
        assert again.returncode == 0, again.stderr[-2000:]
        paths = [recipe_root / name / TASK / "scalar-2.csv" for name in ("baselines", "again")]
        (first,), (second,) = (studies.read(path) for path in paths)
        assert (first["tau_q"], second["tau_q"]) == ("1.0", "3.0")
        for name in ("num_updates", "train_seconds", "parameters"):
            assert first[name] == second[name], name
        assert (first["num_updates"], first["n_step"]) == ("4", "20")

    def test_the_checkpoint_of_another_method_is_refused(self, recipe_root, short_run):
        """EVOR's own networks, but the baselines' names and options."""
        result = run(
            "train_baseline.py",
            recipe_root,
            *SMALL,
            "optim.num_updates=4",
            "method=evor",
            f"resume={short_run[1] / 'checkpoint'}",
            f"hydra.run.dir={recipe_root / 'refused'}",
        )
        assert result.returncode != 0
        assert "belongs to another configuration: method was None" in result.stderr

    @pytest.mark.parametrize("method", ["bc", "iql"])
    def test_without_a_choice_among_candidates_there_is_no_study(self, recipe_root, method):
        import studies

        output = recipe_root / method
        one = [*SMALL, f"method={method}", "optim.num_updates=2", f"hydra.run.dir={output}"]
        result = run("train_baseline.py", recipe_root, *one)
        assert result.returncode == 0, result.stderr[-2000:]
        assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match=f"is a '{method}' agent"):
            studies.load(output)


@pytest.mark.parametrize("neighbours", [5, 300])  # of 80 transitions
def test_law_of_chunks_is_compared_at_the_right_actions(tmp_path, neighbours):
    """Each row of the picture holds the chunk that starts at its observation."""
    import figures

    from torchrl_evor.data.datasets import make_windows

    steps, chunk = 40, 3
    index = torch.arange(2 * steps)
    episode, time = index // steps, index % steps
    transitions = TensorDict(
        episode=episode,
        observation=index.unsqueeze(-1).float(),
        action=100 + index.unsqueeze(-1).float(),
        next=TensorDict(
            observation=index.unsqueeze(-1) + 1.0,
            action=101 + index.unsqueeze(-1).float(),
            reward=-torch.ones(2 * steps, 1),
            terminated=((time == steps - 1) & (episode == 1)).unsqueeze(-1),
            batch_size=[2 * steps],
        ),
        batch_size=[2 * steps],
    )
    seen = []

    class Returns:
        loc = torch.zeros(())

        def record(self, observation, action, num):
            behind_terminal = observation[:, 0] == 2 * steps  # nothing is bootstrapped there
            seen.append((action - observation)[~behind_terminal])
            return torch.randn(len(observation), num)

        sample = quantiles = record

    actor = SimpleNamespace(returns=Returns())
    data = SimpleNamespace(transitions=transitions)
    options = {"chunk_size": chunk, "num_neighbours": neighbours}
    figures.reward_to_go(data, actor, 0.9, tmp_path / "law.png", **options)
    ends = make_windows(transitions, 2 * steps, chunk, 0.9).end
    assert ends[0] == steps - chunk  # a whole next chunk follows
    assert len(seen) == 9  # all states once, then law and continuation of four states
    offset = torch.cat(seen)
    torch.testing.assert_close(offset, torch.tensor([100.0, 101.0, 102.0]).expand_as(offset))


@pytest.mark.parametrize("chunk", [1, 3])
def test_proposals_are_compared_with_what_the_data_did(tmp_path, chunk):
    """Half of the actions are 1, on the left as on the right, where fewer states are."""
    import figures

    generator = torch.Generator().manual_seed(0)
    count, length = 6000, 20
    index = torch.arange(count)
    episode = index // length
    side = episode % 10 == 0  # every tenth trajectory lies on the right
    action = (episode + episode // 10) % 2  # so that these alternate as well
    transitions = TensorDict(
        episode=episode,
        observation=10.0 * side.unsqueeze(-1) + torch.rand(count, 1, generator=generator),
        action=action.unsqueeze(-1).float(),
        next=TensorDict(
            reward=torch.zeros(count, 1),
            terminated=torch.zeros(count, 1, dtype=torch.bool),
            batch_size=[count],
        ),
        batch_size=[count],
    )

    class Policy(torch.nn.Module):
        """Right on the left; on the right one of four times 0."""

        def __init__(self):
            super().__init__()
            self.device = torch.nn.Parameter(torch.zeros(()))

        def forward(self, batch):
            right = batch["observation"] > 5
            coin = torch.arange(len(right)).unsqueeze(-1) % 4
            batch["action"] = torch.where(right, coin > 0, coin > 1).float().expand(-1, chunk)
            return batch

    torch.manual_seed(0)
    data = SimpleNamespace(transitions=transitions)
    distances = figures.base_policy(data, Policy(), tmp_path / "policy.png", chunk_size=chunk)
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")
    assert len(distances) == 4
    # 0 and a quarter; the share of 1 among 300 neighbours has a deviation of 0.03.
    assert max(distances[:2]) < 0.12
    assert 0.13 < distances[-1] < 0.37


@pytest.mark.parametrize("lacking", ["improved", "improved.num_steps"])
def test_older_checkpoints_take_defaults(recipe_root, short_run, tmp_path, lacking):
    """Runs from before some options were there can be studied and continued."""
    import checkpoint_io
    import studies

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(short_run[1] / "checkpoint", checkpoint)
    (folder,) = checkpoint.glob("components/*-config")
    saved = json.loads((folder / "value.json").read_text())
    *above, last = lacking.split(".")
    section = saved["loss"]
    for name in above:
        section = section[name]
    del saved["chunk_size"], section[last], saved["value"]["num_flows"]
    (folder / "value.json").write_text(json.dumps(saved))
    (checkpoint / checkpoint_io.SIZES).unlink()  # which the oldest do not have
    trained = studies.load(checkpoint)
    assert (trained.method, trained.chunk_size) == ("evor", 1)
    checkpoint_io.write_sizes(checkpoint)
    check_evor(recipe_root, f"resume={checkpoint}")
    with pytest.raises(ValueError, match="belongs to another configuration: chunk_size was 1"):
        check_evor(recipe_root, f"resume={checkpoint}", "chunk_size=2")


def test_improved_options_reach_every_loss():
    """Of the recipe and of the baselines."""
    import baselines
    import utils
    from hydra import compose, initialize_config_dir

    options = {"num_candidates": 3, "num_samples": 5, "tau_r": 7.0, "tau_q": 0.5, "num_steps": 2}
    overrides = [f"loss.improved.{name}={value}" for name, value in options.items()]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("config", overrides=[*SMALL, "loss.next_action=improved", *overrides])
    loss, _, _ = utils.make_loss(cfg, *utils.build_networks(cfg, 2, 2))
    sizes = baselines.Sizes(2, 2, policy_hidden_sizes=(8,), value_hidden_sizes=(8,))
    other, _ = baselines.make_baseline(
        "evor", sizes, next_action="improved", improved=cfg.loss.improved
    )
    for made in (loss, other):
        assert made.next_action == "improved"
        assert {name: getattr(made, name) for name in options} == options


@pytest.mark.parametrize(
    "overrides, n_step",
    [
        (["method=scalar"], 50),
        (["method=evor"], 50),
        (["method=qc"], 1),
        (["method=iql"], 1),
        (["method=iql", "data.n_step=7"], 7),
    ],
)
def test_windows_of_a_method(overrides, n_step):
    """Critics of the same problem read the same windows unless told otherwise."""
    import train_baseline
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("baselines", overrides=overrides)
    train_baseline.resolve_n_step(cfg)
    assert cfg.data.n_step == n_step


@pytest.mark.parametrize("option", ["value.num_flows=3", "loss.bound_returns=true"])
def test_options_of_the_flow_alone(option):
    """No other method has them, so none takes them in silence."""
    import train_baseline
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("baselines", overrides=["method=scalar", option])
    with pytest.raises(ValueError, match=f"{option.split('=')[0]}=.* needs method=evor"):
        train_baseline.make_agent(cfg, sizes=None, device=None)


def test_command_of_a_row(monkeypatch):
    """A shell would take braces apart, and an option with them, in silence."""
    import results_io

    monkeypatch.setattr(sys, "argv", ["many.py", "envs=[{name:a,gamma:0.9}]", "lr=1e-3"])
    command = results_io.command()
    assert command == "python many.py 'envs=[{name:a,gamma:0.9}]' lr=1e-3"
    echo = subprocess.run(
        ["bash", "-c", f"printf '%s\n' {command}"], capture_output=True, text=True
    )
    assert echo.stdout.split() == ["python", *sys.argv]


def test_text_of_a_training():
    """One text for one training, whichever program ran it; only what concerns the method."""
    import programs
    import result_rows
    import results_io
    from hydra import compose, initialize_config_dir

    together = ["hidden_sizes=[8,4]", "activation=silu", "lr=2e-3", "schedule=cosine", "tau=0.1"]
    together += ["value_steps=6", "value_solver=midpoint", "data.observation_spread=3"]
    together += ["value_spread=2"]
    alone = ["policy.hidden_sizes=[8,4]", "policy.activation=silu", "value.activation=silu"]
    alone += ["optim.lr=2e-3", "optim.schedule=cosine", "loss.tau=0.1", "value.num_steps=6"]
    alone += ["value.solver=midpoint", "data.observation_spread=3", "loss.gamma=0.9"]
    alone += ["value.observation_spread=2"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        first = programs.training_settings(compose("many", overrides=together), 0.9, "official")
        second = result_rows.training_settings(compose("baselines", overrides=alone), "official")
        improved = compose("config", overrides=["loss.next_action=improved"])
        together = ["policy_steps=4", "policy_solver=midpoint"]
        alone = ["policy.num_steps=4", "policy.solver=midpoint"]
        midpoint = [
            programs.training_settings(compose("many", overrides=together), 0.9, "official"),
            result_rows.training_settings(compose("config", overrides=alone), "official"),
        ]
    policy = "data=official lr=0.002 schedule=cosine observation_spread=3 policy_hidden=8x4 "
    policy += "policy_activation=silu policy_steps=10"
    value = f"{policy} gamma=0.9 tau=0.1 value_spread=2 value_activation=silu layer_norm=True"
    flow = "value_steps=6 value_solver=midpoint td_target=bellman"
    expected = {
        "bc": policy,
        "scalar": f"{value} next_action=dataset",
        "qc": f"{value} num_critics=2 next_candidates=32",
        "evor": f"{value} {flow} next_action=dataset bound_returns=False",
    }
    for settings in (first, second):
        made = {method: results_io.training_text(method, settings) for method in expected}
        assert made == expected
    for settings in midpoint:
        text = results_io.training_text("bc", settings)
        assert text.endswith(" policy_steps=4(midpoint)")
    for settings in (first, second):
        text = results_io.training_text("qc", {**settings, "policy_noise": 0.1})
        assert text == expected["qc"].replace("steps=10", "steps=10 policy_noise=0.1")
    text = results_io.training_text("iql", second)
    assert text == f"{value} expectile=0.9 temperature=10"
    text = results_io.training_text("evor", result_rows.training_settings(improved, "official"))
    improved = "improved(num_candidates:4,num_samples:4,tau_r:inf,tau_q:1)"
    assert text.endswith(f" next_action={improved} bound_returns=False")
    text = results_io.next_action_text("improved", {"num_steps": 2, "tau_q": None}, kept=True)
    assert text == "improved(num_steps:2,kept)"
    assert results_io.next_action_text("dataset", {"num_steps": 2}, kept=True) == "dataset"


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPE / "settings").iterdir()))
def test_settings_of_a_dataset(name):
    """One word sets what suits it; the command line has the last one, whatever the order."""
    import utils
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        plain = compose("config")
        cfg = compose("config", overrides=[f"+settings={name}"])
        changed = compose("config", overrides=["chunk_size=3", f"+settings={name}"])
    utils.check_config(cfg)
    assert name.startswith(cfg.env.name) and cfg.keys() == plain.keys()
    groups = [key for key in plain if OmegaConf.is_dict(plain[key])]
    assert all(cfg[key].keys() == plain[key].keys() for key in groups)
    assert (plain.chunk_size, cfg.chunk_size, changed.chunk_size) == (1, 5, 3)


def test_bounds_of_returns():
    """Half the range of what is possible further out on either side, if they are asked for."""
    import utils
    from hydra import compose, initialize_config_dir

    data = SimpleNamespace(return_bounds=lambda gamma, slack: (gamma, slack))
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        free, bound = (
            compose("config", overrides=["loss.gamma=0.9", *overrides])
            for overrides in ([], ["loss.bound_returns=true"])
        )
    assert utils.return_bounds(free, data) is None
    assert utils.return_bounds(bound, data) == (0.9, 0.5)
    loss, _, _ = utils.make_loss(bound, *utils.build_networks(bound, 2, 2), (-15.0, 5.0))
    assert loss.return_bounds == (-15.0, 5.0)


def test_spread_of_the_observations():
    """Networks see ``spread * (x - mean) / deviation``."""
    import utils

    statistics = torch.tensor([10.0, -2.0]), torch.tensor([2.0, 8.0])
    data = SimpleNamespace(observation_statistics=lambda: statistics)
    mean, unit = utils.input_units(4.0, data)
    assert mean.tolist() == [10.0, -2.0]
    assert unit.tolist() == [0.5, 2.0]
    torch.testing.assert_close(utils.input_units(1, data), statistics)


def test_spread_of_the_value_alone():
    """From the same draws, its first layer weighs observations four times as much at 8 as at 2."""
    import baselines
    import train_baseline
    import utils
    from hydra import compose, initialize_config_dir

    class Data:
        def __getitem__(self, index):
            return {"observation": torch.zeros(1, 2), "action": torch.zeros(1, 2)}

        def observation_statistics(self):
            return torch.zeros(2), torch.ones(2)

        def return_statistics(self, gamma):
            return 0.0, 1.0

        def empirical_returns(self, gamma):
            return torch.zeros(3)

    def weights(*overrides):
        overrides = ["data.observation_spread=2", "value.num_flows=2", *overrides]
        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            cfg = compose("baselines", overrides=overrides)
        torch.manual_seed(0)
        policy, returns = utils.make_networks(cfg, Data(), torch.device("cpu"))
        sizes = train_baseline.make_sizes(cfg, Data())
        actors = [baselines.make_baseline(method, sizes)[1] for method in ("evor", "scalar", "qc")]
        policies = [policy, *(actor.policy for actor in actors)]
        values = [returns, *(actor.returns for actor in actors)]
        return [torch.nn.ModuleList(models).state_dict() for models in (policies, values)]

    (policy, value), (same, other) = weights(), weights("value.observation_spread=8")
    assert all(torch.equal(policy[name], same[name]) for name in policy)
    changed = {name for name in value if not torch.equal(value[name], other[name])}
    assert len(changed) == 6  # two flows twice, a critic, a stack of critics
    for name in changed:
        ratio = other[name] / value[name]
        axis = 1 if ratio.shape[-1] == 256 else ratio.ndim - 1  # a stack multiplies from the right
        seen, rest = ratio.split([2, ratio.shape[axis] - 2], axis)
        assert (seen == 4).all() and (rest == 1).all()


class TestLogger:
    @pytest.mark.parametrize(
        "backend, mode",
        [
            ("tensorboard", "online"),
            pytest.param("wandb", "disabled", marks=pytest.mark.slow),
            pytest.param("wandb", "offline", marks=pytest.mark.slow),
        ],
    )
    def test_without_an_account(self, tmp_path, monkeypatch, backend, mode):
        import runs
        from hydra import compose, initialize_config_dir

        pytest.importorskip(backend)
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        overrides = [f"logger.backend={backend}", f"logger.mode={mode}"]
        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            cfg = compose("config", overrides=overrides)
        run = runs.Run(cfg, tmp_path, loss=torch.nn.Linear(1, 1))
        run.add(TensorDict(loss_value=torch.tensor(2.0)))
        assert run.log_losses() == {"loss_value": "2"}
        if mode != "disabled":
            assert any(path.is_file() for path in tmp_path.rglob("*"))


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
        import runs
        from tensordict import TensorDict

        episodes = TensorDict(
            {
                "success": torch.ones(50, dtype=torch.bool),
                "return": torch.full((50,), -100.0),
                "length": torch.full((50,), 100),
            },
            batch_size=[50],
        )
        summary = runs.summarize(episodes)
        assert summary["success"] == 1.0
        # Wilson: n / (n + z^2) with z = 1.96.
        assert summary["success_low"] == pytest.approx(50 / (50 + 1.959964**2), abs=1e-6)
        assert summary["success_high"] == 1.0
        assert summary["return_low"] == summary["return_high"] == -100.0


def test_rows_say_how_numbers_came_about():
    """Runs that differ in the arithmetic are rows of their own."""
    import result_rows
    from hydra import compose, initialize_config_dir

    device = torch.device("cpu")
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        for name in ("config", "baselines", "many"):
            assert result_rows.ran_on(device, compose(name)) == result_rows.device_name(device)
            options = ["actor.backend=torch", "actor.precision=bf16", "matmul_precision=highest"]
            assert result_rows.ran_on(device, compose(name, overrides=options)).endswith(
                " actor.backend=torch actor.precision=bf16 matmul_precision=highest"
            )


if __name__ == "__main__":
    pytest.main([__file__, "-v"])
