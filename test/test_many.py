# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Many runs in one program: what it trains is what each would train alone."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from _recipe_cases import RECIPE, TASK, needs_extras, run
from tensordict import TensorDict

pytestmark = needs_extras

SMALL_MANY = [
    "data.num_transitions=4000",
    "hidden_sizes=[16,16]",
    "actor.num_candidates=2",
    "actor.num_samples=2",
    "eval.episodes=1",
    "eval.processes=1",
    "device=cpu",
]


def make_program(*overrides):
    from hydra import compose, initialize_config_dir
    from programs import Program

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=list(overrides))
    return Program(cfg, TASK, 0.99, torch.device("cpu"))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_many_tasks_have_the_windows_of_each(recipe_root, short_run, chunk_size):
    """Tables of two tasks and two lengths hold what the replay buffer of each samples."""
    from task_windows import Setting, TaskWindows

    from torchrl_evor import OGBenchExperienceReplay

    def replay(task, n_step=1):
        return OGBenchExperienceReplay(
            f"{TASK}-singletask-task{task}-v0",
            root=recipe_root / "data",
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
def test_critics_of_many_act_as_they_were_trained(recipe_root, short_run, tmp_path, method):
    """Q* of each task's agent, read from its file, is that of its part of the stack."""
    import agents
    import programs
    from hydra import compose, initialize_config_dir

    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "tasks=[1,2]", "n_steps=[2]"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=[*options, f"methods=[{method}]", "num_atoms=7"])
    program = programs.Program(cfg, TASK, 0.9, torch.device("cpu"))
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


@pytest.mark.parametrize("n_step, fewer", [(1, True), (2, False)])
def test_many_methods_share_their_rows(recipe_root, short_run, monkeypatch, n_step, fewer):
    """A window of two chunks may start shortly before a terminal, where one of one cannot."""
    import programs
    from hydra import compose, initialize_config_dir

    load = programs.load_task

    def load_with_terminal(*args):
        replay = load(*args)
        data = replay.transitions.clone()
        episode = data["episode"].ravel()
        last = (episode == episode[0]).nonzero().max()
        data["next", "terminated"][last] = True
        monkeypatch.setattr(type(replay), "transitions", property(lambda self: data))
        return replay

    monkeypatch.setattr(programs, "load_task", load_with_terminal)
    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "tasks=[1]", "chunk_size=5"]
    options += ["n_steps=[4]", "methods=[evor,qc]", f"qc_n_step={n_step}"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=options)
    program = programs.Program(cfg, TASK, 0.9, torch.device("cpu"))
    windows = list(program.windows.values())
    assert torch.equal(windows[0].start, windows[1].start)
    for method, longest in (("evor", 20), ("qc", 5 * n_step)):
        batch = program.windows[method].value_batch(windows[0].start.unsqueeze(0))
        steps = batch["steps_to_next_obs"]
        assert steps.min() >= 1 and steps.max() == longest
    # Without Q-chunking there are more rows, where its windows leave something out.
    alone = programs.TaskWindows(program.replays, program.settings["evor"], 0.9, program.device, 5)
    assert (len(alone.start) > len(windows[0].start)) == fewer


@pytest.mark.parametrize("method", ["qc", "evor"])
def test_many_draws_candidates_where_no_task_has_ended(monkeypatch, method):
    """A task that ends within the chunk leaves the candidates to the state of the others."""
    from programs import StackedEVORLoss, StackedQCLoss

    from torchrl_evor import FlowMatchingPolicy, ReturnFlow, ScalarCritic, StackedVelocityMLP

    policy = FlowMatchingPolicy(StackedVelocityMLP(1, 1 + 2 + 1, 2, hidden_sizes=(4,)), 2)
    options = {"num_candidates": 3, "reduction": "none"}
    if method == "qc":
        critic = ScalarCritic(StackedVelocityMLP(4, 1 + 2, hidden_sizes=(4,)), num_critics=2)
        loss = StackedQCLoss(policy, critic, **options)
    else:
        flow = StackedVelocityMLP(2, 1 + 2 + 2, hidden_sizes=(4,))
        returns = ReturnFlow(flow, 2, loc=torch.tensor([0.0, 1.0]))
        loss = StackedEVORLoss(policy, returns, next_action="improved", **options)
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


def test_many_improves_each_task_by_its_own_law():
    """The next action of a stack's task is the best of its candidates by its flow alone."""
    from programs import StackedEVORLoss

    from torchrl_evor import FlowMatchingPolicy, ReturnFlow, StackedVelocityMLP

    policy = FlowMatchingPolicy(StackedVelocityMLP(1, 1 + 2 + 1, 2, hidden_sizes=(4,)), 2)
    flow = StackedVelocityMLP(2, 1 + 2 + 2, hidden_sizes=(8,))
    units = {"loc": torch.tensor([0.0, 5.0]), "scale": torch.tensor([1.0, 3.0])}
    options = {"num_candidates": 6, "num_samples": 3, "tau_r": 2.0, "tau_q": 0.0}
    loss = StackedEVORLoss(
        policy, ReturnFlow(flow, 2, **units), next_action="improved", reduction="none", **options
    )
    following = torch.randn(1, 5, 1).expand(2, 5, 1)
    batch = TensorDict(
        steps_to_next_obs=torch.ones(2, 5, 1, dtype=torch.long),
        next=TensorDict(observation=following),
    )
    torch.manual_seed(1)
    candidates = loss._next_candidates(batch)
    assert torch.equal(candidates[0], candidates[1])
    torch.manual_seed(1)
    chosen = loss._next_action(batch)
    for index, network in enumerate(flow.unstack()):
        alone = ReturnFlow(network, 2, **{name: value[index] for name, value in units.items()})
        choice = {"num_samples": 3, "tau_r": 2.0}
        action, *_ = alone.select(following[index], candidates[index], **choice)
        torch.testing.assert_close(chosen[index], action)
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize(
    "options, message",
    [
        (["next_action=policy"], "next_action must be one of .*, got 'policy'"),
        (["next_action=improved", "n_steps=[2,4]"], r"n_steps must be one .*, got \[2, 4\]"),
        (["policy_solver=heun"], "solver must be one of .*, got 'heun'"),
        (["value_solver=midpoint", "value_steps=3"], "num_steps must be even .*, got 3"),
        (["methods=[evor,bc]", "policies=x"], "must be without 'bc' where policies are kept"),
        (["keep_candidates=true"], r"keep_candidates must be false unless .* \(policies\)"),
        (["keep_candidates=true", "policies=x"], "keep_candidates must be false without qc or"),
        (["improved.num_steps=0"], "improved.num_steps must be an integer of at least 1, got 0"),
        (["actor.num_steps=0"], "num_steps must be an integer of at least 1, got 0"),
        *(
            ([f"{name}.num_steps=3", "value_solver=midpoint"], "num_steps must be even .*, got 3")
            for name in ("improved", "actor")
        ),
        (["methods=[evr]"], "methods must be one of .*, got 'evr'"),
        (["methods=[evor,evor]"], r"methods must hold .* none twice, got \['evor', 'evor'\]"),
        (["envs=[]"], "envs must hold at least one value"),
        (["envs=[{name:a}]"], "envs must each hold name and gamma, got {'name': 'a'}"),
        (["envs=[{name:a,gamma:0.9},{name:a,gamma:0.99}]"], "envs must hold .* none twice"),
        (["envs=[{name:a,gamma:0.9}]"], "name must be .*, got 'a-singletask-task1-v0'"),
        (["tasks=[1,1]"], "tasks must hold .* none twice"),
        (["tasks=[6]"], "got 'pointmaze-medium-navigate-singletask-task6-v0'"),
        (["seeds=[0,0]"], "seeds must hold .* none twice"),
        (["seeds=[-1]"], "seeds must be an integer of at least 0, got -1"),
        (["n_steps=[]"], "n_steps must hold at least one value"),
        (["n_steps=[0]"], "n_steps must be an integer of at least 1, got 0"),
        (["tau_rs=[3,3]"], "tau_rs must hold .* none twice"),
        (["tau_rs=[-1]"], "tau_r must be .*, got -1"),
        (["actor.nodes=some"], "nodes must be one of"),
        (["schedule=linear"], "schedule must be one of .*, got 'linear'"),
        (["value_spread=0"], "value_spread must be positive"),
        (["policy_noise=-0.1"], "policy_noise must be a deviation in"),
        (["num_critics.evor=0"], "num_critics.evor must be an integer of at least 1, got 0"),
        (["eval.episodes=-1"], "eval.episodes must be an integer of at least 0"),
        (["eval.processes=0"], "eval.processes must be an integer of at least 1"),
        (["eval.seed=-1"], "eval.seed must be an integer of at least 0"),
        (["protocol=''"], "protocol must be a text that is not empty"),
        (["matmul_precision=low"], "matmul_precision must be one of"),
        *(
            ([f"{name}=0"], f"{name} must be an integer of at least 1, got 0")
            for name in ("num_updates", "data.batch_size", "logger.interval", "chunk_size")
        ),
        (["qc_n_step=0"], "qc_n_step must be an integer of at least 1, got 0"),
    ],
)
def test_many_bad_input(options, message):
    """Named before any data are read."""
    import many
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=options)
    with pytest.raises(ValueError, match=message):
        many.check_config(cfg)


@pytest.mark.parametrize(
    "options", [["methods=[bc]", "evaluate=x"], ["methods=[bc]"], ["eval.episodes=0"]]
)
def test_many_good_input(options, monkeypatch):
    """Cloned policies may be alone; who does not evaluate needs no OGBench."""
    import many
    from hydra import compose, initialize_config_dir

    if "eval.episodes=0" in options:
        monkeypatch.setattr(many, "resolve_environment", None)
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        many.check_config(compose("many", overrides=options))


def test_many_keeps_the_base_policies_of_an_earlier_run(recipe_root, short_run, tmp_path):
    """``policies`` trains values alone, over networks that stay as they were saved."""
    import agents

    def program(*overrides):
        return make_program(*options, *overrides)

    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "seeds=[0,1]", "tasks=[1]"]
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
    with pytest.raises(ValueError, match="must hold an agent of .*, seed 7"):
        program(f"policies={tmp_path}", "seeds=[0,7]")
    with pytest.raises(ValueError, match=r"hidden_sizes=\[8\] must be that of the base policy"):
        program(f"policies={tmp_path}", "hidden_sizes=[8]")
    with pytest.raises(ValueError, match=r"lr=0.5 must be .* was trained with [0-9.]+\."):
        program(f"policies={tmp_path}", "lr=0.5")
    with pytest.raises(ValueError, match=r"policy_noise=0.1 must be .* was trained with 0\."):
        program(f"policies={tmp_path}", "policy_noise=0.1")
    flow = program(f"policies={tmp_path}", "policy_steps=4", "policy_solver=midpoint").policy.module
    assert (flow.num_steps, flow.solver) == (4, "midpoint")


def test_many_trains_base_policies_alone(recipe_root, short_run, tmp_path):
    """For values of later runs."""
    import agents

    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "seeds=[0,1]", "tasks=[1]"]
    first = make_program(*options, "methods=[bc]")
    before = [p.clone() for p in first.policy.parameters()]
    first.update()
    trained = list(first.policy.parameters())
    assert len(trained) == 6 and not any(map(torch.equal, before, trained))
    assert first.metrics.shape == (1,) and first.metrics > 0
    for setting, agent in first.agents("bc"):
        agents.save(tmp_path, TASK, "bc", setting, agent, first, 60.0)
    second = make_program(*options, "methods=[scalar]", f"policies={tmp_path}")
    for one, other in zip(trained, second.policy.parameters()):
        assert torch.equal(one, other)


def test_many_keeps_candidates(recipe_root, short_run, tmp_path, monkeypatch):
    """Those of each seed's own policy at the states that windows lead to, drawn once."""
    import agents

    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "seeds=[0,1]", "tasks=[1,2]"]
    options += ["n_steps=[5]", "methods=[evor,scalar,qc]", "qc_candidates=2", "chunk_size=2"]
    options += ["next_action=improved"]
    first = make_program(*options)
    for setting, agent in first.agents("evor"):
        agents.save(tmp_path, TASK, "evor", setting, agent, first, 60.0)
    kept = make_program(*options, f"policies={tmp_path}", "keep_candidates=true")
    row = kept.windows["evor"].rows(6)
    for method, count in (("evor", 4), ("qc", 2)):
        windows = kept.windows[method]
        following = windows.value_batch(row)["next"]
        assert following["candidates"].shape == (4, 6, count, 4)
        assert "candidates" not in kept.windows["scalar"].value_batch(row)["next"].keys()
        for index, setting in enumerate(kept.settings[method]):
            end = windows.end[index, row[setting.seed]].long()
            assert torch.equal(
                following["candidates"][index], windows.candidates[setting.seed, end]
            )
    # Actions that are their state, twice: candidates lie at the row of theirs.
    states = windows.next_observation
    module, asked = kept.policy.module, []
    monkeypatch.setattr(
        type(module), "forward", lambda self, x: asked.append(x) or x.repeat(1, 1, 1, 2)
    )
    windows.keep_candidates(module, 3)
    expected = states.view(1, -1, 1, 2).expand(2, -1, 3, -1).repeat(1, 1, 1, 2)
    assert torch.equal(windows.candidates, expected)
    windows.keep_candidates(module, 2)
    asked.clear()
    kept.update()
    assert not asked
    for method, text in (
        ("evor", "improved(num_candidates:4,num_samples:4,tau_r:inf,tau_q:1,kept)"),
        ("qc", "next_candidates=2(kept)"),
    ):
        assert text in kept.training_text(method)
        assert "kept" not in first.training_text(method)


def test_many_stops_in_time(recipe_root, short_run, tmp_path):
    """The clock is read between rows of the log, and a schedule that was cut off says so."""
    import agents
    import many
    import programs
    from hydra import compose, initialize_config_dir

    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "tasks=[1]", "n_steps=[5]"]
    options += ["methods=[evor]", "num_updates=1000", "logger.interval=500", "max_seconds=0"]
    with initialize_config_dir(str(RECIPE), version_base="1.3"):
        cfg = compose("many", overrides=options)
    for schedule, text in (("constant", ""), ("cosine", " planned_updates=1000")):
        cfg.schedule = schedule
        program = programs.Program(cfg, TASK, 0.99, torch.device("cpu"))
        many.train(cfg, [program])
        assert program.num_updates == many.TIMED
        assert program.training_text("evor").endswith(f"bound_returns=False{text}")
    ((setting, agent),) = program.agents("evor")
    agents.save(tmp_path, TASK, "evor", setting, agent, program, 1.0)
    cfg.policies = str(tmp_path)
    with pytest.raises(ValueError, match="stopped after 100 of 1000 updates"):
        programs.Program(cfg, TASK, 0.99, torch.device("cpu"))


def test_many_sizes_of_values(recipe_root, short_run, tmp_path):
    """Value networks of their own size, over kept base policies too; rows and files say so."""
    import agents
    from hydra import compose, initialize_config_dir
    from programs import Program

    options = [f"data.root={recipe_root / 'data'}", *SMALL_MANY, "tasks=[1]", "n_steps=[5]"]
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
def test_many_in_chunks(recipe_root):
    """The whole way to a row and to an agent that studies open."""
    import results_io
    import studies

    output = recipe_root / "many_chunks"
    result = run(
        "many.py",
        recipe_root,
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
    result = run("many.py", recipe_root, *small, *places, f"hydra.run.dir={output / 'again'}")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = results_io.read_file(output / "results" / TASK / "evor-3.csv")
    first, second = (row for row in rows if row.tau_r == math.inf)
    assert (first.nodes, second.nodes) == ("stratified", "gauss_hermite")
    assert first.train_seconds == second.train_seconds > 0


@pytest.mark.slow
def test_many_runs_leave_a_row_for_each(recipe_root):
    result = run(
        "many.py",
        recipe_root,
        *SMALL_MANY,
        "num_updates=4",
        "logger.interval=2",
        "tasks=[1,2]",
        "n_steps=[5]",
        "methods=[evor,scalar,qc,bc]",
        "qc_candidates=2",
        f"results_dir={recipe_root / 'results'}",
        f"hydra.run.dir={recipe_root / 'many'}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    import results_io

    rows = results_io.read_rows(recipe_root / "results")
    assert {(row.method, row.task) for row in rows} == {
        (method, task) for method in ("evor", "scalar", "qc-1", "bc") for task in (1, 2)
    }


@pytest.mark.slow
def test_many_compiled_equals_eager(recipe_root, monkeypatch):
    """``compile=true`` gives the same gradients; noise is fixed, since compilers reorder draws."""
    from hydra import compose, initialize_config_dir
    from programs import Program

    monkeypatch.setattr(torch, "randn_like", lambda x: torch.linspace(-2, 2, x.numel()).view_as(x))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.linspace(0, 1, x.numel()).view_as(x))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    overrides = [
        f"data.root={recipe_root / 'data'}",
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
