# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The studies: what they refuse, what their rows hold, and each one small but the whole way."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _recipe_cases import HAS_EXTRAS, RECIPE, needs_extras, run_script

pytestmark = needs_extras

if HAS_EXTRAS:
    import agents
    import architecture_study
    import checks
    import costs
    import inference_study
    import noise_study
    import results_io
    import stitch_study
    import studies
    import task_windows
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from torchrl_evor import VelocityMLP
    from torchrl_evor.data.datasets import _ogbench_episodes
    from torchrl_evor.data.datasets._ogbench_names import parse_file_name

TASK = {"env": "pointmaze-medium-navigate", "task": 1, "seed": 0}


def config(name: str, *overrides: str):
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def agent_file(folder: Path, method: str = "evor", observation_dim: int = 2) -> Path:
    """A tiny agent as many.py writes it."""
    value_inputs = observation_dim + 2 + (2 if method == "evor" else 0)
    members = [
        VelocityMLP(value_inputs, hidden_sizes=(8,), layer_norm=True)
        for _ in range(1 if method == "evor" else 2)
    ]
    agent = agents.Agent(
        VelocityMLP(observation_dim + 2 + 1, 2, hidden_sizes=(8,)), members, -100.0, 10.0
    )
    setting = task_windows.Setting(seed=0, task=1, n_step=5)
    cfg = SimpleNamespace(
        chunk_size=1,
        hidden_sizes=[8],
        value_hidden_sizes=[8],
        activation="gelu_tanh",
        layer_norm=True,
        policy_steps=2,
        policy_solver="euler",
        value_steps=2,
        value_solver="euler",
        num_atoms=7,
        data=SimpleNamespace(batch_size=4),
    )
    windows = {method: SimpleNamespace(observation=torch.zeros(7, observation_dim))}
    program = SimpleNamespace(
        num_updates=3,
        windows=windows,
        cfg=cfg,
        training_text=lambda method: f"data=official method={method}",
        policy_updates=3,
        device=torch.device("cpu"),
    )
    return agents.save(folder, TASK["env"], method, setting, agent, program, train_seconds=60.0)


def row(value, success, episodes=10, seed=0, **other):
    return {
        "num_candidates": value,
        "env": TASK["env"],
        "task": 1,
        "method": "evor",
        "seed": seed,
        "checkpoint": "outputs/first",
        "episodes": episodes,
        "success": success,
        "length_mean": 100.0,
        "latency_seconds": 0.001,
        **other,
    }


def changed(path: Path, **entries) -> Path:
    """An agent file with other entries."""
    torch.save({**torch.load(path), **entries}, path)
    return path


def as_program(monkeypatch, *overrides: str):
    """Configuration of many.py as its command line gives it."""
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=list(overrides), return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    return cfg


class TestRows:
    def test_a_repeated_setting_replaces_its_row(self, tmp_path):
        path = tmp_path / "rows.csv"
        studies.add_rows(path, [row(1, 0.0), row(2, 0.5)])
        rows = studies.add_rows(path, [row(2, 0.9)])
        assert [(r["num_candidates"], r["success"]) for r in rows] == [("1", "0.0"), ("2", "0.9")]
        assert studies.read(path) == rows

    def test_other_columns_are_refused(self, tmp_path):
        path = tmp_path / "rows.csv"
        studies.add_rows(path, [row(1, 0.0)])
        with pytest.raises(ValueError, match="must have the columns"):
            studies.add_rows(path, [row(1, 0.0, extra=1)])
        assert len(studies.read(path)) == 1

    def test_pooling_counts_episodes(self):
        """10 of 10 and 0 of 40: 10 of 50, not the mean of the two shares."""
        rows = [{"success": "1.0", "episodes": "10"}, {"success": "0.0", "episodes": "40"}]
        mean, low, high = studies.pool(rows)
        assert mean == 0.2
        # Wilson: centre (k + z^2 / 2) / (n + z^2)
        z2 = 1.959964**2
        assert (low + high) / 2 == pytest.approx((10 + z2 / 2) / (50 + z2), abs=1e-6)

    def test_are_not_taken_for_results_of_training(self, tmp_path):
        path = studies.csv_path(tmp_path, "candidates", TASK["env"])
        studies.add_rows(path, [row(1, 0.0)])
        with pytest.raises(ValueError, match="must hold rows"):
            results_io.read_rows(tmp_path)

    def test_picture(self, tmp_path):
        rows = [
            {k: str(v) for k, v in row(value, 0.5, method=method).items()}
            for value in (0.0, 1.0, math.inf)
            for method in ("evor", "scalar")
        ]
        studies.plot_success(rows, "num_candidates", ("method",), tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    def test_tasks_and_seeds_are_one_line(self, tmp_path, monkeypatch):
        """Each of them is a run of its own, and so another checkpoint."""
        drawn = []
        monkeypatch.setattr(studies.figures, "save", lambda figure, path: drawn.append(figure))
        rows = [
            row(value, 0.5, task=task, seed=seed, checkpoint=f"outputs/task{task}/seed{seed}/date")
            for task in (1, 2)
            for seed in (0, 1)
            for value in (1, 2)
        ]
        studies.plot_success(rows, "num_candidates", ("method",), tmp_path / "picture.png")
        assert len(drawn[0].axes[0].containers) == 1

    def test_two_trainings_of_a_seed_are_no_point(self, tmp_path):
        rows = [row(1, 0.5), row(2, 0.5), row("2.0", 0.9, checkpoint="outputs/second")]
        path = tmp_path / "picture.png"
        with pytest.raises(
            ValueError, match="one training of .* task 1 seed 0 .*'outputs/first' and 'outputs/sec"
        ):
            studies.plot_success(rows, "num_candidates", ("method",), path)
        rows[2]["method"] = "scalar"
        studies.plot_success(rows, "num_candidates", ("method",), path)

    def test_rows_of_two_trainings_are_kept(self, tmp_path, monkeypatch):
        outcome = {
            "episodes": 2,
            "success": 0.5,
            "return_mean": -10.0,
            "length_mean": 10.0,
            "eval_seconds_per_decision": 0.1,
            "latency_seconds": 0.1,
        }
        monkeypatch.setattr(studies, "evaluate", lambda *args, **options: outcome)
        files = [str(agent_file(tmp_path / name)) for name in ("first", "second")]
        options = [f"results_dir={tmp_path}", "values=[1,2]", "device=cpu"]
        path = studies.csv_path(tmp_path, "candidates", TASK["env"])
        inference_study.run(config("inference_study", f"checkpoint={files[0]}", *options))
        with pytest.raises(ValueError, match="All rows are kept"):
            inference_study.run(config("inference_study", f"checkpoint={files[1]}", *options))
        assert [r["checkpoint"] for r in studies.read(path)] == [files[0]] * 2 + [files[1]] * 2


class TestAgentFiles:
    """Which of them ``many.py evaluate=`` takes, and what it refuses."""

    def find(self, monkeypatch, folder: Path, *overrides: str):
        chosen = [f"evaluate={folder}", "tasks=[1]", "methods=[evor]"]
        return agents.find(as_program(monkeypatch, *chosen, *overrides))

    @pytest.mark.parametrize(
        "override, message",
        [
            ("chunk_size=2", r"chunk_size=2 must be .* was built with 1\."),
            ("hidden_sizes=[16,16]", r"hidden_sizes=\[16, 16\] must be .* was built with \[8\]"),
            ("policy_steps=4", "policy_steps=4 must be .* was built with 2"),
            ("policy_solver=midpoint", "policy_solver=midpoint must be .* built with euler"),
            ("num_critics.evor=3", "num_critics.evor=3 must be .* was built with 1"),
            ("n_steps=[10]", r"n_steps=\[10\] must be .* was built with 5"),
            ("qc_n_step=1", "qc_n_step=1 must be .* was built with 5"),
        ],
    )
    def test_a_given_option_must_be_theirs(self, tmp_path, monkeypatch, override, message):
        method = "qc" if override.startswith("qc") else "evor"
        agent_file(tmp_path, method)
        with pytest.raises(ValueError, match=message):
            self.find(monkeypatch, tmp_path, override, f"methods=[{method}]")

    def test_windows_are_those_of_the_method(self, tmp_path, monkeypatch):
        path, given = agent_file(tmp_path, "qc"), ["n_steps=[10]", "qc_n_step=5", "methods=[qc]"]
        assert self.find(monkeypatch, tmp_path, *given) == {path: "qc"}

    def test_defaults_say_nothing_about_them(self, tmp_path, monkeypatch):
        path = changed(agent_file(tmp_path), chunk_size=5)
        given = ["n_steps=[5,10]", "chunk_size=5", "hidden_sizes=[8]", "num_critics.scalar=2"]
        assert self.find(monkeypatch, tmp_path) == {path: "evor"}
        assert self.find(monkeypatch, tmp_path, *given, "actor.tau_q=3.0") == {path: "evor"}

    def test_options_of_runs_that_are_not_chosen_are_left_alone(self, tmp_path, monkeypatch):
        changed(agent_file(tmp_path, method="scalar"), chunk_size=5)
        path = agent_file(tmp_path)
        assert self.find(monkeypatch, tmp_path, "chunk_size=1") == {path: "evor"}

    def test_every_run_that_was_asked_for_exists(self, tmp_path, monkeypatch):
        agent_file(tmp_path)
        with pytest.raises(ValueError, match="evaluate=.* must hold agents of all") as error:
            self.find(monkeypatch, tmp_path, "tasks=[1,2]", "seeds=[0,1]")
        (listed,) = re.findall("got none of: (.*)[.]", str(error.value))
        runs = ("task 1 seed 1", "task 2 seed 0", "task 2 seed 1")
        assert listed == ", ".join(f"{TASK['env']} {run} evor" for run in runs)

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"junk", "got one that PyTorch cannot read"),
            (b"", "got one that PyTorch cannot read"),
            ({"weights": torch.zeros(2)}, r"with entries \['env', 'method'"),
            (torch.zeros(2), "a dict, got a Tensor"),
        ],
    )
    def test_a_file_of_another_kind_is_named(self, tmp_path, monkeypatch, content, message):
        path = tmp_path / f"{TASK['env']}_task1_seed0_other.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        message = f"{path.name}' must be an agent file of many.py, {message}"
        with pytest.raises(ValueError, match=message):
            self.find(monkeypatch, tmp_path)
        with pytest.raises(ValueError, match=message):
            agents.load_policy(tmp_path, TASK["env"], 0, {}, "")

    def test_the_cause_is_chained(self, tmp_path):
        (tmp_path / "junk.pt").write_bytes(b"junk")
        with pytest.raises(ValueError) as error:
            agents.read(tmp_path / "junk.pt")
        assert error.value.__cause__ is not None
        with pytest.raises(FileNotFoundError):
            agents.read(tmp_path / "none.pt")

    @pytest.mark.parametrize("method", ["evor", "scalar"])
    def test_a_file_that_is_older_than_some_entries(self, tmp_path, monkeypatch, method):
        path = agent_file(tmp_path, method=method)
        content = {key: x for key, x in torch.load(path).items() if key not in agents.YOUNGER}
        torch.save(content, path)
        assert studies.load(path).chunk_size == 1
        given = [f"methods=[{method}]", "num_atoms=9"]
        assert self.find(monkeypatch, tmp_path, *given) == {path: method}

    @pytest.mark.parametrize("method", ["evor", "scalar"])
    @pytest.mark.parametrize(
        "entries",
        [{"chunk_size": 2}, {"env": "cube-single-play"}, {"env": "antmaze-medium-navigate"}],
    )
    def test_networks_must_fit_environment_and_chunks(self, tmp_path, method, entries):
        path = changed(agent_file(tmp_path, method=method), **entries)
        env = entries.get("env", TASK["env"])
        message = f"checkpoint=.*{path.name}' must fit env='{env}' and chunk_size=.* a policy of 5"
        with pytest.raises(ValueError, match=message):
            studies.load(path)

    def test_a_value_must_fit_as_well(self, tmp_path):
        other = torch.load(agent_file(tmp_path / "other", method="scalar"))["value"]
        path = changed(agent_file(tmp_path), value=other)
        with pytest.raises(ValueError, match="values of 6 inputs, got .*, values of 4"):
            studies.load(path)


class TestBadInput:
    @pytest.mark.parametrize("values", [[], None, [1, 2, 1]])
    def test_sweeps(self, values):
        with pytest.raises(ValueError, match="sizes must hold at least one value, and none twice"):
            checks.check_sweep("sizes", values)

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match="checkpoint must be the folder"):
            studies.load(None)
        with pytest.raises(FileNotFoundError, match="checkpoint must be the folder"):
            studies.load(tmp_path)

    def test_a_file_of_another_kind(self, tmp_path):
        torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="is no agent of many.py"):
            studies.load(tmp_path / "other.pt")

    @pytest.mark.parametrize(
        "overrides, message",
        [
            (["study=speed"], "study must be one of candidates, samples, tau_q, tau_r, steps"),
            (["values=[]"], "values must hold at least one value"),
            (["values=[0]"], "num_candidates"),
            (["study=tau_q", "values=[-1.0]"], "tau_q"),
            (["actor.nodes=some"], "nodes"),
            (["study=steps", "values=[0]"], "values must be an integer of at least 1, got 0"),
            (["study=steps", "values=[5]", "policy_solver=midpoint"], "num_steps must be even"),
            (["study=steps", "policy_solver=heun"], "solver must be one of .*, got 'heun'"),
        ],
    )
    def test_inference(self, tmp_path, overrides, message):
        trained = studies.load(agent_file(tmp_path))
        with pytest.raises(ValueError, match=message):
            inference_study.make_sweep(config("inference_study", *overrides), trained)

    @pytest.mark.parametrize("study", ["samples", "tau_r", "value_steps"])
    def test_a_scalar_critic_has_no_nodes(self, tmp_path, study):
        trained = studies.load(agent_file(tmp_path, method="scalar"))
        with pytest.raises(ValueError, match="needs the reward-to-go flow .* method 'scalar-x2'"):
            inference_study.make_sweep(config("inference_study", f"study={study}"), trained)

    @pytest.mark.parametrize(
        "override, message",
        [
            ("noises=[]", "noises must hold"),
            ("noises=[-0.5]", "noises must be finite and at least 0"),
            ("tau_rs=[.inf]", "on a command line inf, not .inf"),
            ("tau_rs=[-1.0]", "tau_rs must be at least 0"),
            ("env.task=9", "task"),
            ("actor.nodes=typo", "nodes must be one of"),
            ("actor.num_candidates=0", "num_candidates"),
            ("eval.episodes=0", "eval.episodes must be an integer of at least 1"),
            ("seeds=[-1]", "seeds must be an integer of at least 0, got -1"),
        ],
    )
    def test_noise(self, override, message):
        with pytest.raises(ValueError, match=message):
            noise_study.check(config("noise_study", override))

    @pytest.mark.parametrize(
        "override, message",
        [
            ("variants=null", "variants must hold"),
            ("eval.interval=7", "must be a multiple of eval.interval"),
            ("+variants.dataset.data.steps=3", "variants.dataset does not fit baselines.yaml"),
            ("variants.scalar.method=scala", "variants.scalar .* method must be one of"),
            ("variants.scalar.loss.next_action=improved", "variants.scalar .* next_action must"),
            ("+variants.qc-5.value.num_flows=2", "variants.qc-5 .* needs method=evor, got .*qc"),
            ("loss.improved.num_candidates=0", "loss.improved.num_candidates"),
            ("loss.improved.tau_r=-1", "loss.improved.tau_r"),
        ],
    )
    def test_stitch(self, override, message):
        with pytest.raises(ValueError, match=message):
            stitch_study.make_variants(config("stitch_study", override))

    @pytest.mark.parametrize(
        "override, message",
        [
            ("variants=null", "must each hold at least one entry"),
            ("methods=[scalar]", "methods must be TD targets"),
            (
                "+variants.base={widths: 3}",
                "variants.base.widths is no option, there are hidden_sizes",
            ),
            ("base.z=wavelets", "z must be 'raw', 'fourier' or 'bins', got 'wavelets'"),
        ],
    )
    def test_architecture(self, override, message):
        with pytest.raises(ValueError, match=message):
            architecture_study.make_variants(config("architecture_study", override))


@pytest.mark.parametrize("method", ["evor", "qc", "iql", "bc"])
def test_costs_of_a_method(method):
    sizes = ["policy.hidden_sizes=[8]", "value.hidden_sizes=[8]", "value.layer_norm=false"]
    small = ["updates=2", "decisions=2", "states=3", "chunk_size=2", "data.batch_size=4"]
    cfg = config("costs", *sizes, *small, "baseline.num_candidates=2")
    row = costs.measure(OmegaConf.to_container(cfg, resolve=True), method)
    policy = (2 + 4 + 1) * 8 + 8 + 8 * 4 + 4
    value = {
        "evor": (2 + 4 + 2 + 1) * 8 + 8 + 1,
        "qc": 2 * ((2 + 4 + 1) * 8 + 8 + 1),
        # One of states, and two of states and actions; its policy reads states alone.
        "iql": (2 + 1) * 8 + 8 + 1 + 2 * ((2 + 4 + 1) * 8 + 8 + 1) - (4 + 1) * 8,
        "bc": 0,
    }
    assert row["parameters"] == policy + value[method]
    assert tuple(row) == tuple(costs.COLUMNS)
    assert min(row[name] for name in ("update_ms", "decision_ms", "decisions_ms")) > 0
    assert min(row["train_mb"], row["act_mb"]) >= 0
    shown = costs.show([row], 3).splitlines()
    assert "Decision, 3 states, ms" in shown[0] and len(shown) == 3


def test_parameters_by_hand():
    """Chain: 10 states, 1 action, z and time; bins add 32 inputs, Fourier times 8."""
    truth = architecture_study.value_study.make_truth(config("architecture_study"), "chain")
    variants = architecture_study.make_variants(config("architecture_study"))
    sizes = {k: architecture_study.num_parameters(v, truth) for k, v in variants.items()}
    assert sizes["depth 1"] == 13 * 64 + 64 + 64 + 1
    assert sizes["base"] == sizes["depth 1"] + 64 * 64 + 64
    assert sizes["layer norm"] == sizes["base"] + 2 * 2 * 64
    assert sizes["both"] == sizes["base"] + (32 + 8) * 64


def test_sweep_changes_one_option_only(tmp_path):
    trained = studies.load(agent_file(tmp_path))
    assert (trained.env, trained.task, trained.method) == (TASK["env"], 1, "evor")
    cfg = config("inference_study", "study=tau_r")
    sweep = inference_study.make_sweep(cfg, trained)
    assert [actor.tau_r for _, actor in sweep] == list(cfg.grids.tau_r)
    assert {actor.num_candidates for _, actor in sweep} == {32}
    assert all(actor.returns is trained.returns for _, actor in sweep)


def test_sweep_of_the_values_steps(tmp_path):
    trained = studies.load(agent_file(tmp_path))
    sweep = inference_study.make_sweep(config("inference_study", "study=value_steps"), trained)
    assert [(options["num_steps"], actor.num_steps) for options, actor in sweep] == [
        *((n, n) for n in (1, 2, 4, 8, 16))
    ]


def test_sweep_of_steps_leaves_the_trained_policy_alone(tmp_path):
    trained = studies.load(agent_file(tmp_path))
    cfg = config("inference_study", "study=steps", "values=[4,6]", "policy_solver=midpoint")
    sweep = inference_study.make_sweep(cfg, trained)
    flows = [actor.policy.module for _, actor in sweep]
    assert [(flow.num_steps, flow.solver) for flow in flows] == [(4, "midpoint"), (6, "midpoint")]
    assert [(options["policy_steps"], options["policy_solver"]) for options, _ in sweep] == [
        (4, "midpoint"),
        (6, "midpoint"),
    ]
    assert (trained.policy.module.num_steps, trained.policy.module.solver) == (2, "euler")
    noise = torch.randn(5, 2)
    actions = [flow(torch.zeros(5, 2), noise) for flow in (*flows, trained.policy.module)]
    assert not actions[0].equal(actions[2])


def episode(action_noise: float):
    file = parse_file_name("pointmaze-medium-navigate-v0")
    behaviour = _ogbench_episodes.Behaviour.official(
        file, noise=0.0, episode_length=60, action_noise=action_noise
    )
    source = _ogbench_episodes.make_episode_source(behaviour)
    try:
        return source(3)
    finally:
        source.close()


def test_data_of_a_noisy_world_hold_the_commanded_action():
    """Commands of a noiseless controller have length 1 or less; the world scatters their effect."""
    calm, noisy = episode(0.0), episode(0.5)
    for data in (calm, noisy):
        assert np.linalg.norm(data["actions"], axis=-1).max() <= 1 + 1e-5

    def residual(data):
        # A free step moves the point by 0.2 times what is executed; walls stop some.
        moved = np.diff(data["observations"], axis=0) / 0.2
        return np.median(np.abs(moved - data["actions"][:-1]))

    assert residual(calm) < 1e-3
    assert 0.1 < residual(noisy) < 0.7


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


def run(script: str, root: Path, *overrides: str) -> None:
    result = run_script(script, root, *overrides)
    assert result.returncode == 0, result.stderr[-2000:]


def check_outputs(root: Path, study: str, env: str, count: int) -> list[dict]:
    path = root / "results" / "_studies" / study / f"{env}.csv"
    rows = studies.read(path)
    assert len(rows) == count
    assert all(0 <= float(r["success"]) <= 1 for r in rows)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return rows


@pytest.mark.slow
def test_inference_study(root):
    overrides = [f"checkpoint={agent_file(root)}", "eval.episodes=1", "device=cpu"]
    run("inference_study.py", root, *overrides, "values=[1,2]", "actor.num_samples=2")
    rows = check_outputs(root, "candidates", TASK["env"], 2)
    assert [r["num_candidates"] for r in rows] == ["1", "2"]
    assert all(float(r["latency_seconds"]) > 0 for r in rows)
    run("inference_study.py", root, *overrides, "study=steps", "values=[1,2]")
    rows = check_outputs(root, "steps", TASK["env"], 2)
    assert [(r["policy_steps"], r["policy_solver"]) for r in rows] == [
        ("1", "euler"),
        ("2", "euler"),
    ]


@pytest.mark.slow
def test_noise_study_trains_and_goes_on(root):
    train = ["data.n_step=20", "data.batch_size=8", "optim.num_updates=2", "value.hidden_sizes=[8]"]
    overrides = [
        "noises=[0.5]",
        "data.num_transitions=2000",
        "data.num_workers=1",
        "train=[" + ",".join(f'"{x}"' for x in train) + "]",
        "actor.num_candidates=2",
        "actor.num_samples=2",
        "eval.episodes=1",
        "device=cpu",
    ]
    run("noise_study.py", root, *overrides, "tau_rs=[0]")
    run("noise_study.py", root, *overrides, "tau_rs=[inf]")
    rows = check_outputs(root, "noise", TASK["env"], 2)
    assert [(r["action_noise"], r["tau_r"]) for r in rows] == [("0.5", "0.0"), ("0.5", "inf")]
    (run_folder,) = (root / "outputs" / "noise_study").glob("*/noise0.5/task1-seed0")
    first, second = studies.load(run_folder), studies.load(run_folder / "checkpoint")
    # Units and weights are the checkpoint's, not those of a fresh network.
    assert first.returns.loc == second.returns.loc < -1
    for a, b in zip(first.policy.parameters(), second.policy.parameters()):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_stitch_study(root):
    run(
        "stitch_study.py",
        root,
        f"data.root={root / 'data'}",
        "data.num_transitions=2000",
        "data.batch_size=8",
        "optim.num_updates=2",
        "eval.interval=1",
        "eval.final_episodes=1",
        "value.hidden_sizes=[8]",
        "policy.hidden_sizes=[8]",
        "actor.num_candidates=1",
        "actor.num_samples=1",
        "baseline.num_candidates=2",
        "loss.improved.num_candidates=2",
        "+variants.kept={method:evor,loss:{next_action:improved,keep_candidates:true}}",
        "device=cpu",
    )
    rows = check_outputs(root, "stitch", "pointmaze-medium-stitch", 14)
    assert ["keep_candidates=True" in r["settings"] for r in rows] == [False] * 12 + [True] * 2
    seconds = [float(r["train_seconds"]) for r in rows if r["method"] == "improved"]
    assert len(seconds) == 2 and 0 < seconds[0] < seconds[1]


@pytest.mark.slow
def test_architecture_study(root):
    run(
        "architecture_study.py",
        root,
        "problems=[chain]",
        "num_updates=2",
        "interval=2",
        "num_seeds=2",
        "batch_size=4",
        f"output={root / 'architecture'}",
    )
    rows = studies.read(root / "architecture" / "architecture_study.csv")
    assert len(rows) == 2 * len(config("architecture_study").variants)
    assert all(math.isfinite(float(r["w1"])) for r in rows)
    assert (root / "architecture" / "architecture_study.png").stat().st_size > 0


if __name__ == "__main__":
    pytest.main([__file__, "-v"])


class TestBesideData:
    """``benchmarks/ad_hoc/beside_data.py``: data at (1, 0) from the place, constant policies."""

    def run(self, monkeypatch, *arguments):
        folder = Path(__file__).resolve().parents[1] / "benchmarks" / "ad_hoc"
        monkeypatch.syspath_prepend(str(folder))
        beside_data = importlib.import_module("beside_data")
        states = torch.tensor([[9.0, 8.0], [9.0, 8.0], [9.0, 8.0]])
        data = SimpleNamespace(transitions={"observation": states})
        monkeypatch.setattr(beside_data, "OGBenchExperienceReplay", lambda *args, **kwargs: data)
        monkeypatch.setattr(sys, "argv", ["beside_data.py", *map(str, arguments)])
        beside_data.main()

    def constant_policy(self, folder: Path, velocity: tuple[float, float]) -> Path:
        """An agent whose base policy flows by ``velocity`` from wherever the noise stands."""
        path = agent_file(folder)
        policy = torch.load(path)["policy"]
        last_weight, last_bias = list(policy)[-2:]
        policy[last_weight].zero_()
        policy[last_bias].copy_(torch.tensor(velocity))
        return changed(path, policy=policy)

    def test_speed_to_the_data(self, tmp_path, monkeypatch, capsys):
        """Noise plus 9 is clamped to full speed: 1 towards the data, -1 away from them."""
        there = self.constant_policy(tmp_path / "there", (9.0, 0.0))
        away = self.constant_policy(tmp_path / "away", (-9.0, 0.0))
        picture = tmp_path / "beside.png"
        names = ["--names", "there", "away", "--at", 8, 8, "--picture", picture]
        self.run(monkeypatch, there, away, *names)
        printed = capsys.readouterr().out
        assert "Of 3 states: 0 within 0.5, 0 within 1, 3 within 1.5, 3 within 2" in printed
        assert "there: speed to the data 1.00 +- 0.00, 100% >= 0.1" in printed
        assert "away: speed to the data -1.00 +- 0.00, 0% >= 0.1" in printed
        assert picture.stat().st_size > 0

    def test_other_environments_are_refused(self, tmp_path, monkeypatch, capsys):
        path = changed(agent_file(tmp_path), env="cube-single-play")
        with pytest.raises(SystemExit):
            self.run(monkeypatch, path, "--at", 8, 8)
        assert "agents must be of one pointmaze" in capsys.readouterr().err
