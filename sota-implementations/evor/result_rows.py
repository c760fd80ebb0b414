# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a run says of itself in a row of results (results_io.py)."""

from __future__ import annotations

from pathlib import Path

import results_io
import torch
import utils
from omegaconf import DictConfig, OmegaConf
from runs import Run
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from torchrl_evor import OGBenchExperienceReplay


def append_result(
    cfg: DictConfig,
    run: Run,
    data: OGBenchExperienceReplay,
    method: str,
    actor: TensorDictModuleBase,
    episodes: TensorDictBase,
) -> None:
    """Adds the row of a finished run to the folder ``cfg.results_dir``, if there is one."""
    if cfg.results_dir is None:
        return
    row = {
        "env": cfg.env.name,
        "task": cfg.env.task,
        "method": run_name(cfg, method),
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "num_updates": run.step // (1 + cfg.loss.keep_candidates),  # of each network
        "num_transitions": len(data.transitions),
        "n_step": cfg.data.n_step,
        "hidden": "x".join(map(str, cfg.value.hidden_sizes)),
        "batch_size": cfg.data.batch_size,
        "device": ran_on(next(actor.parameters()).device, cfg),
        "train_seconds": run.seconds,
        "peak_memory_mb": run.peak_memory_mb,
        "parameters": sum(parameter.numel() for parameter in actor.parameters()),
        "training": results_io.training_text(method, training_settings(cfg, data.origin)),
        "command": results_io.command(),
        **episode_columns(episodes),
    }
    if method == "bc":  # as many.py says it: nothing of values plays a part
        row |= {"hidden": "x".join(map(str, cfg.policy.hidden_sizes)), "n_step": 1}
    if hasattr(actor, "num_candidates"):
        settings = ("num_candidates", "num_samples", "nodes", "num_steps", "tau_r", "tau_q")
        row.update({name: cfg.actor[name] for name in settings})
    results_io.append_row(Path(cfg.results_dir) / cfg.env.name / f"{row['method']}.csv", row)


def training_settings(cfg: DictConfig, origin: str) -> dict[str, object]:
    """Values for :func:`results_io.training_text` from a configuration of a single run."""
    settings = {
        "data": origin,
        "lr": cfg.optim.lr,
        "schedule": cfg.optim.schedule,
        "observation_spread": cfg.data.observation_spread,
        "policy_hidden": "x".join(map(str, cfg.policy.hidden_sizes)),
        "policy_activation": cfg.policy.activation,
        "policy_steps": results_io.steps_text(cfg.policy.num_steps, cfg.policy.solver),
        "policy_noise": cfg.policy.observation_noise,
        "gamma": cfg.loss.gamma,
        "tau": cfg.loss.tau,
        "value_spread": utils.value_spread(cfg),
        "value_activation": cfg.value.activation,
        "layer_norm": cfg.value.layer_norm,
        "value_steps": cfg.value.num_steps,
        "value_solver": cfg.value.solver,
        "td_target": cfg.loss.td_target,
        "next_action": results_io.next_action_text(
            cfg.loss.next_action, cfg.loss.improved, cfg.loss.keep_candidates
        ),
        "bound_returns": cfg.loss.bound_returns,
    }
    baseline = dict(cfg.get("baseline", {}))
    kept = "(kept)" * cfg.loss.keep_candidates
    baseline["next_candidates"] = f"{baseline.pop('num_candidates', None)}{kept}"
    return {**settings, **baseline}


def method_name(method: str, chunk_size: int, num_critics: int = 1) -> str:
    """Name in tables, with the length of chunks and the size of an ensemble.

    Q-chunking always carries its length and, as it always is an ensemble, never its size.
    """
    chunks = f"-{chunk_size}" if method == "qc" or chunk_size > 1 else ""
    return method + chunks + (f"-x{num_critics}" if num_critics > 1 and method != "qc" else "")


def run_name(cfg: DictConfig, method: str) -> str:
    """Name in tables of a run of ``evor.py`` or ``train_baseline.py``."""
    return method_name(method, cfg.chunk_size, cfg.value.num_flows if method == "evor" else 1)


def episode_columns(episodes: TensorDictBase) -> dict[str, float]:
    """What a row of results says of its episodes."""
    return {
        "episodes": len(episodes),
        "success": episodes["success"].double().mean().item(),
        "return_mean": episodes["return"].double().mean().item(),
        "length_mean": episodes["length"].double().mean().item(),
        "eval_seconds_per_decision": (
            episodes["policy_seconds"].sum() / episodes["decisions"].sum()
        ).item(),
    }


def ran_on(device: torch.device, cfg: DictConfig) -> str:
    """The device, and what else decides how numbers come about there, where it is no default."""
    defaults = {"actor.backend": "auto", "actor.precision": None, "matmul_precision": "medium"}
    chosen = {key: OmegaConf.select(cfg, key, default=value) for key, value in defaults.items()}
    others = [f"{key}={chosen[key]}" for key in defaults if chosen[key] != defaults[key]]
    return " ".join([device_name(device), *others])


def device_name(device: torch.device) -> str:
    """``cpu x <threads>`` or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu x {torch.get_num_threads()}"
