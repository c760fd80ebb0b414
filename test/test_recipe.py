# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe as a user runs it: small, but the whole way from collected data to pictures."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
sys.path.insert(0, str(RECIPE))

_has_extras = all(
    importlib.util.find_spec(name) is not None
    for name in ("hydra", "ogbench", "matplotlib", "scipy", "tqdm")
)
pytestmark = pytest.mark.skipif(not _has_extras, reason="needs the extras [all]")

TASK = "pointmaze-medium-navigate"
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


SMALL_MANY = [
    "data.num_transitions=4000",
    "hidden_sizes=[16,16]",
    "actor.num_candidates=2",
    "actor.num_samples=2",
    "eval.episodes=1",
    "eval.processes=1",
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


def check(root: Path, *overrides: str) -> None:
    """What evor.py does before any work."""
    import utils
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("config", overrides=[*SMALL, f"data.root={root / 'data'}", *overrides])
    utils.check_config(cfg)


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
        for name in ("learning_curve.png", "reward_to_go.png", "base_policy.png", "maze.png"):
            assert (output / name).read_bytes().startswith(b"\x89PNG"), name
        assert "success" in result.stderr + result.stdout
        logged = {path.stem for path in (output / "logs").rglob("*.csv")}
        assert {"loss_actor", "loss_value", "success"} <= logged
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


def test_chunks_of_actions_and_an_ensemble(root):
    """The whole way in chunks of three actions by two flows, up to a study of the finished run."""
    import studies

    output = root / "chunks"
    result = run(
        "evor.py",
        root,
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
    (path,) = (root / "results").rglob("*.csv")
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
    def test_leaves_a_row_and_a_checkpoint_that_studies_open(self, root):
        import studies

        output = root / "baseline"
        small = [*SMALL, "method=scalar", "chunk_size=2", "optim.num_updates=4"]
        places = [f"results_dir={root / 'baselines'}", f"hydra.run.dir={output}"]
        result = run("train_baseline.py", root, *small, *places)
        assert result.returncode == 0, result.stderr[-2000:]
        trained = studies.load(output)
        assert (trained.method, trained.chunk_size) == ("scalar-2", 2)
        assert trained.returns.loc < -1  # the data's, not those of a fresh network
        # A finished run is evaluated again, nothing trained.
        again = run(
            "train_baseline.py",
            root,
            *small,
            f"resume={output / 'checkpoint'}",
            "actor.tau_q=3.0",
            f"results_dir={root / 'again'}",
            f"hydra.run.dir={root / 'baseline_again'}",
        )
        assert again.returncode == 0, again.stderr[-2000:]
        paths = [root / name / TASK / "scalar-2.csv" for name in ("baselines", "again")]
        (first,), (second,) = (studies.read(path) for path in paths)
        assert (first["tau_q"], second["tau_q"]) == ("1.0", "3.0")
        for name in ("num_updates", "train_seconds", "parameters"):
            assert first[name] == second[name], name
        assert (first["num_updates"], first["n_step"]) == ("4", "20")

    def test_the_checkpoint_of_another_method_is_refused(self, root, short_run):
        """EVOR's own networks, but the baselines' names and options."""
        result = run(
            "train_baseline.py",
            root,
            *SMALL,
            "optim.num_updates=4",
            "method=evor",
            f"resume={short_run[1] / 'checkpoint'}",
            f"hydra.run.dir={root / 'refused'}",
        )
        assert result.returncode != 0
        assert "belongs to another configuration: method was None" in result.stderr

    @pytest.mark.parametrize("method", ["bc", "iql"])
    def test_without_a_choice_among_candidates_there_is_no_study(self, root, method):
        import studies

        output = root / method
        one = [*SMALL, f"method={method}", "optim.num_updates=2", f"hydra.run.dir={output}"]
        result = run("train_baseline.py", root, *one)
        assert result.returncode == 0, result.stderr[-2000:]
        assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match=f"is a '{method}' agent"):
            studies.load(output)


def test_law_of_chunks_is_compared_at_the_right_actions(tmp_path):
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
    figures.reward_to_go(data, actor, 0.9, tmp_path / "law.png", chunk_size=chunk, num_neighbours=5)
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


def test_older_checkpoints_take_defaults(root, short_run, tmp_path):
    """Runs from before some options were there can be studied and continued."""
    import checkpoint_io
    import studies

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(short_run[1] / "checkpoint", checkpoint)
    (folder,) = checkpoint.glob("components/*-config")
    saved = json.loads((folder / "value.json").read_text())
    del saved["chunk_size"], saved["loss"]["improved"], saved["value"]["num_flows"]
    (folder / "value.json").write_text(json.dumps(saved))
    trained = studies.load(checkpoint)
    assert (trained.method, trained.chunk_size) == ("evor", 1)
    checkpoint_io.write_sizes(checkpoint)
    check(root, f"resume={checkpoint}")
    with pytest.raises(ValueError, match="belongs to another configuration: chunk_size was 1"):
        check(root, f"resume={checkpoint}", "chunk_size=2")


def test_improved_options_reach_every_loss():
    """Of the recipe and of the baselines."""
    import baselines
    import utils
    from hydra import compose, initialize_config_dir

    options = {"num_candidates": 3, "num_samples": 5, "tau_r": 7.0, "tau_q": 0.5}
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
    import many
    import results_io
    import utils
    from hydra import compose, initialize_config_dir

    together = ["hidden_sizes=[8,4]", "activation=silu", "lr=2e-3", "schedule=cosine", "tau=0.1"]
    together += ["value_steps=6", "value_solver=midpoint", "data.observation_spread=3"]
    together += ["value_spread=2"]
    alone = ["policy.hidden_sizes=[8,4]", "policy.activation=silu", "value.activation=silu"]
    alone += ["optim.lr=2e-3", "optim.schedule=cosine", "loss.tau=0.1", "value.num_steps=6"]
    alone += ["value.solver=midpoint", "data.observation_spread=3", "loss.gamma=0.9"]
    alone += ["value.observation_spread=2"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        first = many.training_settings(compose("many", overrides=together), 0.9, "official")
        second = utils.training_settings(compose("baselines", overrides=alone), "official")
        improved = compose("config", overrides=["loss.next_action=improved"])
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
    text = results_io.training_text("iql", second)
    assert text == f"{value} expectile=0.9 temperature=10"
    text = results_io.training_text("evor", utils.training_settings(improved, "official"))
    improved = "improved(num_candidates:4,num_samples:4,tau_r:inf,tau_q:1)"
    assert text.endswith(f" next_action={improved} bound_returns=False")


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
    def test_checkpoint_of_another_configuration(self, root, short_run, override, group):
        resume = f"resume={short_run[1] / 'checkpoint'}"
        with pytest.raises(ValueError, match=f"belongs to another configuration: {group} was"):
            check(root, "optim.num_updates=8", override, resume)

    def test_another_end_of_a_cosine(self, root, short_run, monkeypatch):
        """At a constant rate a run may go on; under a schedule its end is part of it."""
        resume = f"resume={short_run[1] / 'checkpoint'}"
        check(root, "optim.num_updates=8", resume)
        with pytest.raises(ValueError, match="optim was"):
            check(root, "optim.num_updates=8", "optim.schedule=cosine", resume)

    def test_a_damaged_checkpoint(self, root, short_run, tmp_path):
        checkpoint = Path(shutil.copytree(short_run[1] / "checkpoint", tmp_path / "checkpoint"))
        resume = f"resume={checkpoint}"
        check(root, resume)
        largest = max(checkpoint.rglob("*.memmap"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:16])
        with pytest.raises(ValueError, match=rf"damaged: .*{largest.name} .* got 16\."):
            check(root, resume)
        largest.unlink()
        with pytest.raises(ValueError, match="got no file"):
            check(root, resume)

    def test_a_checkpoint_of_something_else(self, root, tmp_path):
        from torchrl.checkpoint import Checkpoint

        folder = Checkpoint(progress={"step": 1}).save(tmp_path / "checkpoint")
        with pytest.raises(ValueError, match="resume=.*was not written by evor.py"):
            check(root, f"resume={folder}")

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
        import utils
        from hydra import compose, initialize_config_dir

        pytest.importorskip(backend)
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        overrides = [f"logger.backend={backend}", f"logger.mode={mode}"]
        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            cfg = compose("config", overrides=overrides)
        run = utils.Run(cfg, tmp_path, loss=torch.nn.Linear(1, 1))
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


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_many_tasks_have_the_windows_of_each(root, short_run, chunk_size):
    """Tables of two tasks and two lengths hold what the replay buffer of each samples."""
    from many import Setting, TaskWindows

    from torchrl_evor import OGBenchExperienceReplay

    def replay(task, n_step=1):
        return OGBenchExperienceReplay(
            f"{TASK}-singletask-task{task}-v0",
            root=root / "data",
            source="local",
            num_transitions=4000,
            gamma=0.9,
            n_step=n_step,
            chunk_size=chunk_size,
        )

    settings = [Setting(0, task, n_step) for task in (1, 2) for n_step in (1, 4)]
    tasks = {task: replay(task) for task in (1, 2)}
    windows = TaskWindows(tasks, settings, 0.9, torch.device("cpu"), chunk_size)
    # Windows of all settings start at the same rows here.
    alone = [replay(setting.task, setting.n_step) for setting in settings]
    assert all(len(data) == len(windows.start) for data in alone)
    together = windows.value_batch(windows.start.unsqueeze(0))
    imitated = windows.policy_batch(windows.start.unsqueeze(0))
    for index, data in enumerate(alone):
        batch = data[:]
        keys = ("observation", "action", "steps_to_next_obs")
        nested = ("observation", "action", "reward", "terminated")
        for key in (*keys, *(("next", name) for name in nested)):
            torch.testing.assert_close(together[index][key], batch[key], msg=str(key))
        assert torch.equal(imitated["action"][0], batch["action"])


@pytest.mark.parametrize("method", ["scalar", "hl_gauss", "categorical", "quantile"])
def test_critics_of_many_act_as_they_were_trained(root, short_run, tmp_path, method):
    """Q* of each task's agent, read from its file, is that of its part of the stack."""
    import agents
    import many
    from hydra import compose, initialize_config_dir

    options = [f"data.root={root / 'data'}", *SMALL_MANY, "tasks=[1,2]", "n_steps=[2]"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=[*options, f"methods=[{method}]", "num_atoms=7"])
    program = many.Program(cfg, TASK, 0.9, torch.device("cpu"))
    program.update()
    observation, candidates = torch.randn(2, 5, 2), torch.rand(2, 5, 3, 2)
    critic = program.losses[method].qvalue_network
    with torch.no_grad():
        want = critic.q_star(observation.unsqueeze(-2), candidates, tau=3.0)
        for index, (setting, agent) in enumerate(program.agents(method)):
            path = agents.save(tmp_path, TASK, method, setting, agent, program, 1.0)
            returns = agents.build(agents.read(path)).returns
            got = returns.q_star(observation[index].unsqueeze(-2), candidates[index], tau=3.0)
            torch.testing.assert_close(got, want[index], rtol=1e-5, atol=1e-4)
            assert type(returns) is type(critic)


def test_many_methods_share_their_rows(root, short_run, monkeypatch):
    """A long window may start shortly before a terminal, where a short one cannot."""
    import many
    from hydra import compose, initialize_config_dir

    load = many.load_task

    def load_with_terminal(*args):
        replay = load(*args)
        data = replay.transitions.clone()
        episode = data["episode"].ravel()
        last = (episode == episode[0]).nonzero().max()
        data["next", "terminated"][last] = True
        monkeypatch.setattr(type(replay), "transitions", property(lambda self: data))
        return replay

    monkeypatch.setattr(many, "load_task", load_with_terminal)
    options = [f"data.root={root / 'data'}", *SMALL_MANY, "tasks=[1]", "chunk_size=5"]
    options += ["n_steps=[4]", "methods=[evor,qc]"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=options)
    program = many.Program(cfg, TASK, 0.9, torch.device("cpu"))
    windows = list(program.windows.values())
    assert torch.equal(windows[0].start, windows[1].start)
    for method, longest in (("evor", 20), ("qc", 5)):
        batch = program.windows[method].value_batch(windows[0].start.unsqueeze(0))
        steps = batch["steps_to_next_obs"]
        assert steps.min() >= 1 and steps.max() == longest
    # Without the first method there are more rows, so that something was left out.
    alone = many.TaskWindows(program.replays, program.settings["evor"], 0.9, program.device, 5)
    assert len(alone.start) > len(windows[0].start)


def test_many_draws_candidates_where_no_task_has_ended(monkeypatch):
    """A task that ends within the chunk leaves the candidates to the state of the others."""
    from many import StackedQCLoss

    from torchrl_evor import FlowMatchingPolicy, ScalarCritic, StackedVelocityMLP

    policy = FlowMatchingPolicy(StackedVelocityMLP(1, 1 + 2 + 1, 2, hidden_sizes=(4,)), 2)
    critic = ScalarCritic(StackedVelocityMLP(4, 1 + 2, hidden_sizes=(4,)), num_critics=2)
    loss = StackedQCLoss(policy, critic, num_candidates=3, reduction="none")
    asked = []
    module = type(policy.module)
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda self, x: asked.append(x) or forward(self, x))
    # Two tasks, two rows; each task ends in another one.
    batch = TensorDict(
        steps_to_next_obs=torch.tensor([[[2], [5]], [[5], [1]]]),
        next=TensorDict(observation=torch.tensor([[[1.0], [7.0]], [[5.0], [2.0]]])),
    )
    assert loss._next_action(batch).shape == (2, 2, 2)
    expected = torch.tensor([[5.0], [7.0]]).expand(2, 3).unsqueeze(-1)
    torch.testing.assert_close(asked[0][0], expected)


def test_many_keeps_the_base_policies_of_an_earlier_run(root, short_run, tmp_path):
    """``policies`` trains values alone, over networks that stay as they were saved."""
    import agents
    from hydra import compose, initialize_config_dir
    from many import Program

    def program(*overrides):
        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            cfg = compose("many", overrides=[*options, *overrides])
        return Program(cfg, TASK, 0.99, torch.device("cpu"))

    options = [f"data.root={root / 'data'}", *SMALL_MANY, "seeds=[0,1]", "tasks=[1]"]
    options += ["n_steps=[5]", "methods=[evor,scalar,qc]", "qc_candidates=2", "layer_norm=false"]
    options += ["num_critics.evor=3"]
    torch.manual_seed(0)
    first = program()
    first.num_updates = 3
    for method in ("evor", "scalar"):
        for setting, agent in first.agents(method):
            agents.save(tmp_path, TASK, method, setting, agent, first, 60.0)
    torch.manual_seed(1)
    second = program(f"policies={tmp_path}")
    assert first.training_text("scalar").endswith("layer_norm=False next_action=dataset")
    assert second.training_text("scalar") == f"{first.training_text('scalar')} policy_updates=3"
    before = {key: value.clone() for key, value in second.losses["scalar"].state_dict().items()}
    second.update()
    trained = dict(second.policy.named_parameters())
    for key, value in first.policy.named_parameters():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=0)
    after = second.losses["scalar"].state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("qvalue" in key for key in changed) and not any("actor" in key for key in changed)
    assert second.metrics.shape == (3,)  # no loss of a policy among them
    observations = TensorDict(observation=torch.zeros(5, 2), batch_size=[5])
    for path in tmp_path.glob("*.pt"):
        actor = agents.build(agents.read(path), num_candidates=3, num_samples=2)
        assert actor(observations.clone())["action"].shape == (5, 2)
    for method, size in (("evor", 3), ("scalar", 1), ("qc", 2)):
        for _, agent in second.agents(method):
            assert len(agent.value) == size
    # Members, and settings, are networks of their own.
    members = [member.net[0].weight for _, agent in second.agents("evor") for member in agent.value]
    assert len({tuple(weight.flatten().tolist()) for weight in members}) == 2 * 3
    assert {path.stem.split("_")[-2] for path in tmp_path.glob("*.pt")} == {"evor-x3", "scalar"}
    cfg = program(f"evaluate={tmp_path}", "methods=[scalar]", "seeds=[1]").cfg
    assert [path.name for path in agents.find(cfg)] == [f"{TASK}_task1_seed1_scalar_n5.pt"]
    cfg.tasks = [2]
    with pytest.raises(ValueError, match="evaluate=.* got none of: .* task 2 seed 1 scalar"):
        agents.find(cfg)
    with pytest.raises(ValueError, match="must be without 'bc' where policies are kept"):
        program(f"policies={tmp_path}", "methods=[evor,bc]")
    with pytest.raises(ValueError, match="must hold an agent of .*, seed 7"):
        program(f"policies={tmp_path}", "seeds=[0,7]")
    with pytest.raises(ValueError, match=r"hidden_sizes=\[8\] must be that of the base policy"):
        program(f"policies={tmp_path}", "hidden_sizes=[8]")
    with pytest.raises(ValueError, match=r"lr=0.5 must be .* was trained with [0-9.]+\."):
        program(f"policies={tmp_path}", "lr=0.5")


def test_many_stops_in_time(root, short_run, tmp_path):
    """The clock is read between rows of the log, and a schedule that was cut off says so."""
    import agents
    import many
    from hydra import compose, initialize_config_dir

    options = [f"data.root={root / 'data'}", *SMALL_MANY, "tasks=[1]", "n_steps=[5]"]
    options += ["methods=[evor]", "num_updates=1000", "logger.interval=500", "max_seconds=0"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=options)
    for schedule, text in (("constant", ""), ("cosine", " planned_updates=1000")):
        cfg.schedule = schedule
        program = many.Program(cfg, TASK, 0.99, torch.device("cpu"))
        many.train(cfg, [program])
        assert program.num_updates == many.TIMED
        assert program.training_text("evor").endswith(f"bound_returns=False{text}")
    ((setting, agent),) = program.agents("evor")
    agents.save(tmp_path, TASK, "evor", setting, agent, program, 1.0)
    cfg.policies = str(tmp_path)
    with pytest.raises(ValueError, match="stopped after 100 of 1000 updates"):
        many.Program(cfg, TASK, 0.99, torch.device("cpu"))


def test_rows_say_how_numbers_came_about():
    """Runs that differ in the arithmetic are rows of their own."""
    import utils
    from hydra import compose, initialize_config_dir

    device = torch.device("cpu")
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        for name in ("config", "baselines", "many"):
            assert utils.ran_on(device, compose(name)) == utils.device_name(device)
            options = ["actor.backend=torch", "actor.precision=bf16", "matmul_precision=highest"]
            assert utils.ran_on(device, compose(name, overrides=options)).endswith(
                " actor.backend=torch actor.precision=bf16 matmul_precision=highest"
            )


def test_many_sizes_of_values(root, short_run, tmp_path):
    """Value networks of their own size, over kept base policies too; rows and files say so."""
    import agents
    from hydra import compose, initialize_config_dir
    from many import Program

    options = [f"data.root={root / 'data'}", *SMALL_MANY, "tasks=[1]", "n_steps=[5]"]
    options += ["methods=[evor,scalar,bc]", "value_hidden_sizes=[8,4,2]"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=options)
        plain = compose("many", overrides=options[:-1])
    assert plain.value_hidden_sizes == plain.hidden_sizes == [16, 16]
    program = Program(cfg, TASK, 0.99, torch.device("cpu"))
    program.update()
    hidden = {"evor": "8x4x2", "scalar": "8x4x2", "bc": "16x16"}
    columns = {"num_candidates", "num_samples"}  # options of the actor that rows have
    for method in cfg.methods:
        ((setting, agent),) = program.agents(method)
        for member in agent.value:
            layers = [layer for layer in member.net if isinstance(layer, torch.nn.Linear)]
            assert [layer.out_features for layer in layers] == [8, 4, 2, 1]
        path = agents.save(tmp_path, TASK, method, setting, agent, program, 60.0)
        choice = {"num_candidates": 2, "num_samples": 2, "backend": "torch", "precision": None}
        outcome = agents.evaluate_file(path, "cpu", 1, 1, 0, choice)
        assert outcome["hidden"] == hidden[method]
        assert outcome.keys() & choice.keys() == (set() if method == "bc" else columns)
    # Files of before the option: one size for both.
    content = torch.load(path)
    del content["value_hidden_sizes"]
    torch.save(content, path)
    assert agents.read(path)["value_hidden_sizes"] == [16, 16]


@pytest.mark.slow
def test_many_in_chunks(root):
    """The whole way to a row and to an agent that studies open."""
    import results_io
    import studies

    output = root / "many_chunks"
    result = run(
        "many.py",
        root,
        *SMALL_MANY,
        "chunk_size=3",
        "num_updates=2",
        "tasks=[1]",
        "n_steps=[2]",
        "methods=[evor,scalar,categorical,qc,bc]",
        "num_atoms=7",
        "tau_rs=[inf,3.0]",
        "bound_returns=true",
        "qc_candidates=2",
        f"results_dir={output / 'results'}",
        f"hydra.run.dir={output}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = results_io.read_rows(output / "results")
    readings = {
        method: sorted(row.tau_r for row in rows if row.method == f"{method}-3")
        for method in ("evor", "scalar", "categorical", "qc", "bc")
    }
    several, mean = [3.0, math.inf], [math.inf]
    assert readings == {
        **dict.fromkeys(("evor", "categorical"), several),
        **dict.fromkeys(("scalar", "qc"), mean),
        "bc": [None],
    }
    assert all("observation_spread=1 " in row.training for row in rows)
    trained = studies.load(output / "agents" / f"{TASK}_task1_seed0_evor-3_n2.pt")
    assert (trained.method, trained.chunk_size) == ("evor-3", 3)
    assert trained.policy.module.action_dim == 6
    # The same agent again by other nodes, nothing trained.
    small = [*SMALL_MANY, "tasks=[1]", "methods=[evor]", "actor.nodes=gauss_hermite"]
    places = [f"evaluate={output / 'agents'}", f"results_dir={output / 'results'}"]
    result = run("many.py", root, *small, *places, f"hydra.run.dir={output / 'again'}")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = results_io.read_file(output / "results" / TASK / "evor-3.csv")
    first, second = (row for row in rows if row.tau_r == math.inf)
    assert (first.nodes, second.nodes) == ("stratified", "gauss_hermite")
    assert first.train_seconds == second.train_seconds > 0


@pytest.mark.slow
def test_many_runs_leave_a_row_for_each(root):
    result = run(
        "many.py",
        root,
        *SMALL_MANY,
        "num_updates=4",
        "logger.interval=2",
        "tasks=[1,2]",
        "n_steps=[5]",
        "methods=[evor,scalar,qc,bc]",
        "qc_candidates=2",
        f"results_dir={root / 'results'}",
        f"hydra.run.dir={root / 'many'}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    import results_io

    rows = results_io.read_rows(root / "results")
    assert {(row.method, row.task) for row in rows} == {
        (method, task) for method in ("evor", "scalar", "qc-1", "bc") for task in (1, 2)
    }


@pytest.mark.slow
def test_many_compiled_equals_eager(root, monkeypatch):
    """``compile=true`` gives the same gradients; noise is fixed, since compilers reorder draws."""
    from hydra import compose, initialize_config_dir
    from many import Program

    monkeypatch.setattr(torch, "randn_like", lambda x: torch.linspace(-2, 2, x.numel()).view_as(x))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.linspace(0, 1, x.numel()).view_as(x))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    overrides = [
        f"data.root={root / 'data'}",
        "data.num_transitions=4000",
        "hidden_sizes=[16,16]",
        "seeds=[0,1]",
        "tasks=[1,2]",
        "n_steps=[5]",
        "policy_steps=2",
        "value_steps=2",
    ]
    gradients = []
    for mode in ("false", "true"):
        with initialize_config_dir(str(RECIPE), version_base="1.3"):
            cfg = compose("many", overrides=[*overrides, f"compile={mode}"])
        torch.manual_seed(0)
        program = Program(cfg, "pointmaze-medium-navigate", 0.99, torch.device("cpu"))
        row = torch.arange(2 * 64).view(2, 64)
        sum(term.sum() for term in program.compute_terms(row)).backward()
        gradients.append({k: p.grad for k, p in program.losses["evor"].named_parameters()})
    for key, eager in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], eager, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    pytest.main([__file__, "-v"])
