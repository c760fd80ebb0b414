# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Trains all tasks, settings and seeds of one or several environments in one program.

The tasks of an environment share data and base policy: there is one base policy
for each seed, and the value networks of all tasks and settings are stacked and
run as batched products. On a GPU the whole update, sampling included, is one
CUDA graph for each environment, replayed on a stream of its own from PyTorch 2.13 on.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import agents
import baselines
import checks
import hydra
import runs
import torch
import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from programs import Program
from tqdm import tqdm

from torchrl_evor.envs import resolve_environment
from torchrl_evor.modules.functional import (
    check_choice,
    check_deviation,
    check_positive,
    check_solver,
)

COUNTS = (
    *("num_updates", "chunk_size", "policy_steps", "value_steps", "num_atoms"),
    *("qc_n_step", "qc_candidates", "data.batch_size", "logger.interval", "eval.num_envs"),
)
TIMED = 100  # updates between looks at the clock, where max_seconds is given


def check_config(cfg: DictConfig) -> None:
    """Fails before any work is done, where a value of the configuration cannot be."""
    utils.check_program(cfg)
    for env in cfg.envs:
        if not {"name", "gamma"} <= env.keys():
            raise ValueError(f"envs must each hold name and gamma, got {env}.")
    checks.check_sweep("envs", [env.name for env in cfg.envs])
    for name in ("tasks", "seeds", "methods", "n_steps", "tau_rs"):
        checks.check_sweep(name, cfg[name])
    for name in COUNTS:
        check_positive(name, OmegaConf.select(cfg, name))
    for n_step in cfg.n_steps:
        check_positive("n_steps", n_step)
    for name, value in (*(("seeds", x) for x in cfg.seeds), ("eval.episodes", cfg.eval.episodes)):
        checks.check_not_negative(name, value)
    for tau in cfg.tau_rs:
        utils.check_actor({**cfg.actor, "tau_r": tau})
    if cfg.eval.episodes:  # which needs OGBench
        for env, task in itertools.product(cfg.envs, cfg.tasks):
            resolve_environment(f"{env.name}-singletask-task{task}-v0")
    if cfg.eval.processes is not None:
        check_positive("eval.processes", cfg.eval.processes)
    for method in cfg.methods:
        check_choice("methods", method, ("evor", *baselines.CRITICS, "qc", "bc"))
    if cfg.evaluate is None:
        _check_training(cfg)


def _check_training(cfg: DictConfig) -> None:
    check_choice("schedule", cfg.schedule, utils.SCHEDULES)
    check_choice("next_action", cfg.next_action, ("dataset", "improved"))
    for name in ("policy", "value"):
        check_solver(cfg[f"{name}_solver"], cfg[f"{name}_steps"])
    utils.check_spread("data.observation_spread", cfg.data.observation_spread)
    utils.check_spread("value_spread", cfg.value_spread)
    check_deviation("policy_noise", cfg.policy_noise)
    for method in (method for method in cfg.methods if method != "bc"):
        check_positive(f"num_critics.{method}", cfg.num_critics[method])
    if cfg.next_action == "improved" and len(cfg.n_steps) > 1:
        raise ValueError(f"n_steps must be one for next_action=improved, got {cfg.n_steps}.")
    for name in ("improved.num_steps", "actor.num_steps"):
        num_steps = OmegaConf.select(cfg, name)
        if num_steps is not None and check_positive(name, num_steps) > 1:
            check_solver(cfg.value_solver, num_steps)
    if cfg.keep_candidates:
        _check_kept_candidates(cfg)
    if cfg.policies is not None and "bc" in cfg.methods:
        # It would be counted as trained by the updates of this run.
        raise ValueError("methods must be without 'bc' where policies are kept, not trained.")


def _check_kept_candidates(cfg: DictConfig) -> None:
    if cfg.policies is None:
        raise ValueError("keep_candidates must be false unless base policies are kept (policies).")
    if "qc" not in cfg.methods and (cfg.next_action != "improved" or "evor" not in cfg.methods):
        raise ValueError(
            "keep_candidates must be false without qc or evor with next_action=improved, which "
            "alone choose among candidates at the next state."
        )


def train(cfg: DictConfig, programs: list[Program]) -> float:
    """Updates all programs in turn; returns the seconds that it took."""
    start = time.perf_counter()
    with tqdm(total=cfg.num_updates, unit="update") as bar:
        for step in range(1, cfg.num_updates + 1):
            for program in programs:
                program.update()
            shown = step % cfg.logger.interval == 0 or step == cfg.num_updates
            timed = cfg.max_seconds is not None and step % TIMED == 0
            if not (shown or timed):
                continue
            # Which keeps the queue of the device short, too.
            for program in programs:
                program.synchronize()
            losses = {p.name: [f"{x:.3g}" for x in p.metrics.tolist()] for p in programs}
            bar.update(step - bar.n)
            bar.set_postfix(losses)
            if cfg.max_seconds is not None and time.perf_counter() - start > cfg.max_seconds:
                break
    for program in programs:
        program.synchronize()
    return time.perf_counter() - start


@hydra.main(config_path=".", config_name="many", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    check_config(cfg)
    output = Path(HydraConfig.get().runtime.output_dir)
    device = utils.choose_device(cfg.device)
    torch.manual_seed(cfg.seeds[0])
    utils.configure_torch(cfg)
    files = agents.find(cfg) if cfg.evaluate is not None else train_all(cfg, output, device)
    if cfg.eval.episodes:
        agents.evaluate_all(cfg, files, device)


def train_all(cfg: DictConfig, output: Path, device: torch.device) -> dict[Path, str]:
    """Trains and writes all agents; returns their files with their methods."""
    runs.reset_peak_memory(device)
    programs = [Program(cfg, env.name, env.gamma, device) for env in cfg.envs]
    seconds = sum(program.candidate_seconds for program in programs) + train(cfg, programs)
    tqdm.write(f"{programs[0].num_updates} updates in {seconds:.0f} s")
    folder, files = Path(cfg.agents or output / "agents"), {}
    for program, method in itertools.product(programs, cfg.methods):
        for setting, agent in program.agents(method):
            path = agents.save(folder, program.name, method, setting, agent, program, seconds)
            files[path] = method
    return files


if __name__ == "__main__":
    main()
