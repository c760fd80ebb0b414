# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Success of a trained agent against what it spends when acting, without retraining.

  inference_study.py checkpoint=<run> study=candidates    against N_pi (1 is behaviour cloning)
  inference_study.py checkpoint=<run> study=samples       against N, the reward-to-go nodes
  inference_study.py checkpoint=<run> study=tau_q         against the temperature of the choice
  inference_study.py checkpoint=<run> study=tau_r         against that of the reward-to-go
  inference_study.py checkpoint=<run> study=steps         against the base policy's evaluations

Rows of several checkpoints (tasks, seeds) of an environment come together in one file and picture.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import checks
import hydra
import studies
import utils
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from torchrl_evor import FlowMatchingPolicy
from torchrl_evor.modules.functional import check_positive, check_solver

SWEPT = {
    "candidates": "num_candidates",
    "samples": "num_samples",
    "tau_q": "tau_q",
    "tau_r": "tau_r",
    "steps": "policy_steps",
    "value_steps": "num_steps",
}


def make_sweep(cfg: DictConfig, trained: studies.Trained) -> list[tuple[dict, object]]:
    """Options and actor of every value; all are checked before the first one acts."""
    if cfg.study not in SWEPT:
        raise ValueError(f"study must be one of {', '.join(SWEPT)}, got {cfg.study!r}.")
    if cfg.study in ("samples", "tau_r", "value_steps"):
        studies.needs_flow(trained, cfg.study)
    values = cfg.grids[cfg.study] if cfg["values"] is None else cfg["values"]
    base = OmegaConf.to_container(cfg.actor)
    for name in ("tau_r", "tau_q"):
        base[name] = checks.check_number(f"actor.{name}", base[name])
    sweep = []
    for value in checks.check_sweep("values", values, numbers=cfg.study.startswith("tau")):
        options = {**base, SWEPT[cfg.study]: value}
        if cfg.study == "steps":
            options["policy_solver"] = cfg.policy_solver
            policy = _with_steps(trained.policy, value, cfg.policy_solver)
            actor = studies.make_actor(dataclasses.replace(trained, policy=policy), base)
        else:
            actor = studies.make_actor(trained, options)
        sweep.append((options, actor))
    return sweep


def _with_steps(policy: FlowMatchingPolicy, num_steps: int, solver: str) -> FlowMatchingPolicy:
    """A copy of a policy whose flow takes other steps."""
    policy = copy.deepcopy(policy)
    policy.module.num_steps = check_positive("values", num_steps)
    policy.module.solver = check_solver(solver, num_steps)
    return policy


def run(cfg: DictConfig) -> Path:
    """Evaluates every value, adds a row after each, and draws the picture."""
    trained = studies.load(cfg.checkpoint, utils.choose_device(cfg.device))
    sweep = make_sweep(cfg, trained)
    path = studies.csv_path(cfg.results_dir, cfg.study, trained.env)
    with tqdm(sweep, unit="value", desc=f"{trained.env_name}, {cfg.study}") as bar:
        for options, actor in bar:
            columns = studies.evaluate(trained, actor, **cfg.eval)
            noise = {"action_noise": float(cfg.eval.action_noise)}
            label = studies.labels(trained, cfg.checkpoint, {**options, **noise})
            rows = studies.add_rows(path, [{"study": cfg.study, **label, **columns}])
            swept = SWEPT[cfg.study]
            bar.write(
                f"{swept}={options[swept]}: success {columns['success']:.2f}, "
                f"{1e3 * columns['latency_seconds']:.1f} ms for a decision alone"
            )
    settings = ("num_candidates", "num_samples", "tau_r", "tau_q", "nodes", "action_noise")
    lines = ("method", *(name for name in settings if name != swept), "backend", "device")
    lines += ("policy_solver",) if cfg.study == "steps" else ()
    studies.plot_success(rows, swept, lines, path.with_suffix(".png"))
    return path


@hydra.main(config_path=".", config_name="inference_study", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    utils.configure_torch(cfg)
    path = run(cfg)
    tqdm.write(f"Rows in {path}, picture in {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
