# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Baselines of the comparison, on the data, networks and evaluation of EVOR."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import baselines
import checks
import figures
import hydra
import result_rows
import runs
import torch
import utils
from omegaconf import DictConfig, OmegaConf
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from torchrl_evor import OGBenchExperienceReplay


def resolve_n_step(cfg: DictConfig) -> None:
    """Fills in the windows of a method that are not given."""
    if cfg.data.n_step is None:
        defaults = OmegaConf.load(Path(__file__).with_name("config.yaml"))
        cfg.data.n_step = 1 if cfg.method in ("qc", "iql") else defaults.data.n_step


def plain_sizes(cfg: DictConfig, observation_dim: int, action_dim: int) -> baselines.Sizes:
    """Sizes of the configuration, without units; ``action_dim`` is that of a chunk."""
    return baselines.Sizes(
        observation_dim,
        action_dim,
        policy_hidden_sizes=cfg.policy.hidden_sizes,
        value_hidden_sizes=cfg.value.hidden_sizes,
        policy_activation=cfg.policy.activation,
        value_activation=cfg.value.activation,
        num_steps=cfg.policy.num_steps,
        solver=cfg.policy.solver,
        observation_noise=cfg.policy.observation_noise,
        value_steps=cfg.value.num_steps,
        value_solver=cfg.value.solver,
        layer_norm=cfg.value.layer_norm,
        num_flows=cfg.value.num_flows,
        num_atoms=cfg.baseline.num_atoms,
    )


def make_sizes(cfg: DictConfig, data: OGBenchExperienceReplay) -> baselines.Sizes:
    """Sizes and units, from a row of the data and its empirical returns."""
    row = data[:1]
    loc, scale = data.return_statistics(cfg.loss.gamma)
    z = (data.empirical_returns(cfg.loss.gamma) - loc) / scale
    return dataclasses.replace(
        plain_sizes(cfg, row["observation"].shape[-1], row["action"].shape[-1]),
        policy_statistics=utils.input_units(cfg.data.observation_spread, data),
        value_statistics=utils.input_units(utils.value_spread(cfg), data),
        loc=loc,
        scale=scale,
        return_bounds=utils.return_bounds(cfg, data),
        support=utils.support(z),
    )


def make_agent(cfg: DictConfig, sizes: baselines.Sizes, device: torch.device):
    """Loss, actor, optimiser and the Polyak average of the target network, if there is one."""
    flow_options = {"value.num_flows": 1, "loss.bound_returns": False}
    for name, default in flow_options.items():
        value = OmegaConf.select(cfg, name)
        if cfg.method != "evor" and value != default:
            raise ValueError(f"{name}={value} needs method=evor, got method={cfg.method}.")
    if cfg.method == "iql" and cfg.policy.observation_noise:
        raise ValueError(
            "policy.observation_noise must be 0 for method=iql, whose policy imitates no data, "
            f"got {cfg.policy.observation_noise}."
        )
    options = {name: cfg.baseline[name] for name in cfg.baseline if name != "num_atoms"}
    loss, actor = baselines.make_baseline(
        cfg.method,
        sizes,
        td_target=cfg.loss.td_target,
        next_action=cfg.loss.next_action,
        improved=cfg.loss.improved,
        actor=cfg.actor,
        **options,
    )
    loss.make_value_estimator(gamma=cfg.loss.gamma)
    loss, actor = loss.to(device), actor.to(device)
    optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.optim.lr, fused=True)
    updater = None if cfg.method == "bc" else SoftUpdate(loss, tau=cfg.loss.tau)
    return loss, actor, optimizer, updater


def check_config(cfg: DictConfig) -> None:
    """Fails before any work is done, as in :func:`utils.check_config`, for the method as well."""
    utils.check_config(cfg)
    make_agent(cfg, plain_sizes(cfg, 1, cfg.chunk_size), torch.device("cpu"))


@hydra.main(config_path=".", config_name="baselines", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    resolve_n_step(cfg)
    check_config(cfg)
    output = runs.new_output(cfg)
    device = utils.choose_device(cfg.device)
    torch.manual_seed(cfg.seed)
    utils.configure_torch(cfg)
    data = utils.make_data(cfg)
    loss, actor, optimizer, updater = make_agent(cfg, make_sizes(cfg, data), device)

    run = runs.train(cfg, output, data, loss, updater, optimizer, actor)
    episodes = utils.evaluate(cfg, actor, cfg.eval.final_episodes, progress=True)
    tqdm.write(f"{cfg.method}, {run.log_episodes(episodes)}")
    result_rows.append_result(cfg, run, data, cfg.method, actor, episodes)
    figures.learning_curve(run.history, output / "learning_curve.png")
    tqdm.write(f"Curves, logs and the checkpoint are in {output}")


if __name__ == "__main__":
    main()
