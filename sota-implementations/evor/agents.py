# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Trained agents as files of their own, and their evaluation in parallel processes."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import multiprocessing
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import baselines
import result_rows
import results_io
import runs
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torchrl.envs.utils import ExplorationType, set_exploration_type
from tqdm import tqdm

from torchrl_evor import (
    EVORActor,
    FlowMatchingPolicy,
    OGBenchEnv,
    ReturnFlow,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.envs import rollout_episodes

# Entries that are younger than the oldest agent files; None: such a file does not say.
YOUNGER = {
    "chunk_size": 1,
    "layer_norm": True,
    "policy_solver": "euler",
    **dict.fromkeys(("training", "policy_updates", "train_seconds", "peak_memory_mb")),
    **dict.fromkeys(("support", "num_atoms")),
}
# Entries of every agent file: which run it is, how its networks are built, and they.
REQUIRED = (
    *("env", "method", "seed", "task", "n_step", "num_updates", "num_transitions", "batch_size"),
    *("hidden_sizes", "activation", "policy_steps", "value_steps", "value_solver"),
    *("loc", "scale", "policy", "value"),
)
# Options of many.yaml that an agent file holds under the same name.
BUILT_WITH = (
    *("chunk_size", "hidden_sizes", "value_hidden_sizes", "activation", "layer_norm"),
    *("policy_steps", "policy_solver", "value_steps", "value_solver", "num_atoms"),
)


@dataclass
class Agent:
    """A trained agent: base policy, value network (an ensemble's members, none for "bc"), units,
    lowest and highest atom of a histogram.
    """

    policy: VelocityMLP
    value: list[VelocityMLP]
    loc: float
    scale: float
    support: tuple[float, float] | None = None


def save(
    folder: Path, env: str, method: str, setting, agent: Agent, program, train_seconds: float
) -> Path:
    """Writes one agent with what is needed to build it again; atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "env": env,
        "method": method,
        "chunk_size": program.cfg.chunk_size,
        **asdict(setting),
        "num_updates": program.num_updates,
        "num_transitions": len(program.windows[method].observation),
        "hidden_sizes": list(program.cfg.hidden_sizes),
        "value_hidden_sizes": list(program.cfg.value_hidden_sizes),
        "activation": program.cfg.activation,
        "layer_norm": program.cfg.layer_norm,
        "policy_steps": program.cfg.policy_steps,
        "policy_solver": program.cfg.policy_solver,
        "value_steps": program.cfg.value_steps,
        "value_solver": program.cfg.value_solver,
        "batch_size": program.cfg.data.batch_size,
        "training": program.training_text(method),
        "policy_updates": program.policy_updates,
        "train_seconds": train_seconds,
        "peak_memory_mb": runs.peak_memory_mb(program.device),
        "loc": agent.loc,
        "scale": agent.scale,
        "support": agent.support,
        "num_atoms": program.cfg.num_atoms,
        "policy": {key: value.cpu() for key, value in agent.policy.state_dict().items()},
        "value": [
            {key: value.cpu() for key, value in member.state_dict().items()}
            for member in agent.value
        ],
    }
    name = f"{env}_task{setting.task}_seed{setting.seed}_{label(content)}_n{setting.n_step}.pt"
    partial = folder / f".{name}.part"
    torch.save(content, partial)
    os.replace(partial, folder / name)
    return folder / name


def read(path: Path) -> dict:
    """Content of an agent file, with the defaults of what is younger than the file.

    Raises:
        ValueError: if the file is of another kind.
    """
    expected = f"{str(path)!r} must be an agent file of many.py"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # which names the path itself
        raise
    except Exception as error:  # a broken file may raise anything
        raise ValueError(f"{expected}, got one that PyTorch cannot read.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, a dict, got a {type(content).__name__}.")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise ValueError(f"{expected}, with entries {missing}, got none of them.")
    return {**YOUNGER, "value_hidden_sizes": content["hidden_sizes"], **content}


def find(cfg: DictConfig) -> dict[Path, str]:
    """Agent files in ``cfg.evaluate`` of the chosen runs, with their methods.

    Raises:
        ValueError: if a chosen run has none, the folder holds a file of another kind, or an agent
            was built with other values than the command line says.
    """
    names = [env.name for env in cfg.envs]
    chosen = list(itertools.product(names, cfg.tasks, cfg.seeds, cfg.methods))
    files, found, given = {}, set(), given_options()
    for path in sorted(Path(cfg.evaluate).glob("*.pt")):
        content = read(path)
        run = tuple(content[key] for key in ("env", "task", "seed", "method"))
        if run in chosen:
            _check_options(path, content, cfg, given)
            files[path] = content["method"]
            found.add(run)
    missing = ["{} task {} seed {} {}".format(*run) for run in chosen if run not in found]
    if missing:
        raise ValueError(
            f"evaluate={cfg.evaluate!r} must hold agents of all envs, tasks, seeds and methods, "
            f"got none of: {', '.join(missing)}."
        )
    return files


def given_options() -> set[str]:
    """Options that the command line sets; outside of a Hydra program there are none.

    Only these can contradict an agent file: those of its training need not be given again, and
    the others are defaults, which say nothing about it.
    """
    if not HydraConfig.initialized():
        return set()
    return {text.lstrip("+").split("=")[0] for text in HydraConfig.get().overrides.task}


def _check_options(path: Path, content: dict, cfg: DictConfig, given: set[str]) -> None:
    method = content["method"]
    theirs = {name: content[name] for name in BUILT_WITH if content[name] is not None}
    theirs[f"num_critics.{method}"] = len(content["value"])
    if method != "bc":  # which has no windows
        theirs["qc_n_step" if method == "qc" else "n_steps"] = content["n_step"]
    for name in (name for name in theirs if name in given):
        ours = OmegaConf.select(cfg, name)
        if theirs[name] not in (ours if name == "n_steps" else [ours]):
            raise ValueError(
                f"{name}={ours} must be that of the agents in evaluate: {path} was built with "
                f"{theirs[name]}."
            )


def label(content: dict) -> str:
    """Name of an agent file's method in tables."""
    return result_rows.method_name(content["method"], content["chunk_size"], len(content["value"]))


def build(content: dict, device: torch.device | str = "cpu", **actor_options):
    """Builds the actor of an agent file, for behaviour cloning the base policy.

    Args:
        content (dict): what :func:`read` returns.
        device (torch.device): where the networks go.
        **actor_options: options of :class:`EVORActor`.
    """
    policy = _policy_network(content)
    members = [
        _network(content, state, content["value_hidden_sizes"], content["layer_norm"])
        for state in content["value"]
    ]
    action_dim = policy.net[-1].out_features
    steps, solver = content["policy_steps"], content["policy_solver"]
    policy = FlowMatchingPolicy(policy, action_dim, steps, solver=solver)
    if content["method"] == "bc":
        return policy.to(device)
    units = {"loc": content["loc"], "scale": content["scale"]}
    if content["method"] == "evor":
        steps, solver = content["value_steps"], content["value_solver"]
        returns = ReturnFlow(members, steps, solver=solver, **units)
    else:
        network = members[0] if len(members) == 1 else StackedVelocityMLP.from_models(members)
        kind = "scalar" if content["method"] == "qc" else content["method"]
        atoms = {key: content[key] for key in ("support", "num_atoms")}
        returns = baselines.make_critic(kind, network, num_critics=len(members), **atoms, **units)
    return EVORActor(policy, returns, **actor_options).to(device)


def load_policy(
    folder: Path, env: str, seed: int, expected: dict, training: str
) -> tuple[VelocityMLP, int]:
    """Network of the base policy of a seed, which its agents share, and its updates.

    Args:
        folder (Path): where :func:`save` wrote agents.
        env (str): environment whose data it imitates.
        seed (int): seed of the agents.
        expected (dict): entries that the file must hold.
        training (str): what the training of the policy must have been, as far as the file says.

    Raises:
        ValueError: if there is none, or it has other settings.
    """
    paths = sorted(folder.glob(f"{env}_task*_seed{seed}_*.pt"))
    if not paths:
        raise ValueError(f"policies={str(folder)!r} must hold an agent of {env}, seed {seed}.")
    content = read(paths[0])
    for key, value in expected.items():
        if content[key] != value:
            raise ValueError(
                f"{key}={value} must be that of the base policy in policies: "
                f"{paths[0]} has {content[key]}."
            )
    theirs = results_io.YOUNGER | results_io.parse_training(content["training"])
    for key, value in (results_io.YOUNGER | results_io.parse_training(training)).items():
        # Flow matching takes no steps: any number may sample what it has learnt.
        if key != "policy_steps" and theirs.get(key, value) != value:
            raise ValueError(
                f"{key}={value} must be that of the base policy in policies: "
                f"{paths[0]} was trained with {theirs[key]}."
            )
    if "planned_updates" in theirs:
        # Its learning rate has not fallen: no base policy of so many updates.
        raise ValueError(
            f"policies={str(folder)!r} must hold base policies that were trained to the end: "
            f"{paths[0]} was stopped after {content['num_updates']} of "
            f"{theirs['planned_updates']} updates."
        )
    return _policy_network(content), content["policy_updates"] or content["num_updates"]


def sizes(state: dict) -> tuple[int, int]:
    """Inputs and outputs of the network with these weights."""
    weights = [value for value in state.values() if value.ndim == 2]
    return weights[0].shape[1], weights[-1].shape[0]


def _policy_network(content: dict) -> VelocityMLP:
    return _network(content, content["policy"], content["hidden_sizes"])


def _network(content: dict, state: dict, hidden_sizes, layer_norm: bool = False) -> VelocityMLP:
    network = VelocityMLP(
        *sizes(state),
        hidden_sizes=hidden_sizes,
        activation=content["activation"],
        layer_norm=layer_norm,
        device="meta",
    )
    network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return network


def evaluate_file(
    path: Path,
    device: str,
    episodes: int,
    num_envs: int,
    seed: int,
    options: dict,
    matmul_precision: str = "medium",
) -> dict:
    """Outcome of one agent file with some options of its actor; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(matmul_precision)
    content = read(path)
    actor = build(content, device, **options)
    torch.manual_seed(seed)
    name = f"{content['env']}-singletask-task{content['task']}-v0"
    with set_exploration_type(ExplorationType.RANDOM):
        outcome = rollout_episodes(
            lambda: OGBenchEnv(name),
            actor,
            episodes,
            seed=seed,
            num_envs=num_envs,
            chunk_size=content["chunk_size"],
            device=device,
        )
    hidden_sizes = content["value_hidden_sizes"]
    if content["method"] == "bc":
        # Nothing of values and of the choice plays a part.
        options, hidden_sizes = {}, content["hidden_sizes"]
    states = (content["policy"], *content["value"])
    parameters = sum(value.numel() for state in states for value in state.values())
    kept = (
        *("env", "task", "seed", "n_step", "num_updates", "num_transitions", "batch_size"),
        *("training", "train_seconds", "peak_memory_mb"),
    )
    return {
        **{key: content[key] for key in kept},
        "method": label(content),
        "hidden": "x".join(map(str, hidden_sizes)),
        # In what a row holds of a choice; the rest is of its device.
        **{name: options[name] for name in options if name in results_io.COLUMNS},
        **result_rows.episode_columns(outcome),
        "parameters": parameters,
    }


def evaluate_all(cfg: DictConfig, files: dict[Path, str], device) -> None:
    """Evaluates agents, by file their method, in parallel processes and records the rows."""
    # A temperature of the reward-to-go says something to laws only, steps to flows.
    jobs = [
        (path, {**cfg.actor, "tau_r": float(tau), "num_steps": steps})
        for path, method in files.items()
        for tau in (cfg.tau_rs if method in baselines.LAWS else [math.inf])
        for steps in [cfg.actor.num_steps if method == "evor" else None]
    ]
    processes = cfg.eval.processes or len(os.sched_getaffinity(0))
    evaluation = cfg.eval.episodes, cfg.eval.num_envs, cfg.eval.seed
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [
            pool.submit(
                evaluate_file, path, str(device), *evaluation, options, cfg.matmul_precision
            )
            for path, options in jobs
        ]
        finished = concurrent.futures.as_completed(futures)
        for future in tqdm(finished, total=len(futures), unit="agent"):
            outcome = future.result()
            tqdm.write(
                "{env} task {task} seed {seed} {method} n={n_step} tau_r={tau_r:g}: success "
                "{success:.2f}, return {return_mean:.1f}".format(**{"tau_r": math.nan, **outcome})
            )
            if cfg.results_dir is not None:
                path = Path(cfg.results_dir) / outcome["env"] / f"{outcome['method']}.csv"
                results_io.append_row(path, _row(cfg, outcome, device))


def _row(cfg: DictConfig, outcome: dict, device) -> dict:
    return {
        **outcome,
        "protocol": cfg.protocol,
        "device": result_rows.ran_on(device, cfg),
        "command": results_io.command(),
    }
