# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Baselines of the comparison, on the data, networks and evaluation of EVOR."""

from __future__ import annotations

import time
from pathlib import Path

import baselines
import hydra
import torch
import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from torchrl_evor import OGBenchExperienceReplay


def make_sizes(cfg: DictConfig, data: OGBenchExperienceReplay) -> baselines.Sizes:
    """Sizes and units, from a row of the data and its empirical returns."""
    row = data[:1]
    loc, scale = data.return_statistics(cfg.loss.gamma)
    z = (data.empirical_returns(cfg.loss.gamma) - loc) / scale
    return baselines.Sizes(
        row["observation"].shape[-1],
        row["action"].shape[-1],
        hidden_sizes=cfg.value.hidden_sizes,
        policy_activation=cfg.policy.activation,
        value_activation=cfg.value.activation,
        num_steps=cfg.policy.num_steps,
        value_steps=cfg.value.num_steps,
        value_solver=cfg.value.solver,
        observation_statistics=utils.input_units(cfg.data.observation_spread, data),
        layer_norm=cfg.value.layer_norm,
        loc=loc,
        scale=scale,
        # Room beyond the data, because bootstrapped targets overshoot on the way.
        support=(z.min().item() - 0.5, z.max().item() + 0.5),
        num_atoms=cfg.baseline.num_atoms,
    )


def make_agent(cfg: DictConfig, sizes: baselines.Sizes, device: torch.device):
    """Loss, actor, optimiser and the Polyak average of the target network, if there is one."""
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


def train(cfg: DictConfig, data, loss, optimizer, scheduler, updater, device) -> float:
    """All updates; returns the seconds that they took."""
    compute_loss = torch.compile(loss) if cfg.compile else loss
    start = time.perf_counter()
    with tqdm(total=cfg.optim.num_updates, unit="update") as bar:
        for step in range(1, cfg.optim.num_updates + 1):
            losses = compute_loss(data.sample().to(device))
            optimizer.zero_grad()
            sum(value for name, value in losses.items() if name.startswith("loss")).backward()
            optimizer.step()
            scheduler.step()
            if updater is not None:
                updater.step()
            bar.update()
            if step % cfg.logger.interval == 0:
                bar.set_postfix({name: f"{value.item():.3g}" for name, value in losses.items()})
    return time.perf_counter() - start


@hydra.main(config_path=".", config_name="baselines", version_base="1.3")
def main(cfg: DictConfig) -> None:
    utils.check_config(cfg)
    output = Path(HydraConfig.get().runtime.output_dir)
    device = utils.choose_device(cfg.device)
    torch.manual_seed(cfg.seed)
    utils.configure_torch(cfg)
    data = utils.make_data(cfg)
    loss, actor, optimizer, updater = make_agent(cfg, make_sizes(cfg, data), device)
    scheduler = utils.make_scheduler(optimizer, cfg.optim.schedule, cfg.optim.num_updates)
    seconds = train(cfg, data, loss, optimizer, scheduler, updater, device)
    partial = output / "loss.pt.part"
    torch.save(loss.state_dict(), partial)
    partial.replace(output / "loss.pt")
    episodes = utils.evaluate(cfg, actor, cfg.eval.final_episodes, progress=True)
    row = utils.append_result(cfg, cfg.method, actor, episodes, cfg.optim.num_updates, seconds)
    tqdm.write(
        f"{row['method']}: success {row['success']:.2f}, return {row['return_mean']:.1f} over "
        f"{row['episodes']} episodes; parameters of the loss in {output / 'loss.pt'}"
    )


if __name__ == "__main__":
    main()
