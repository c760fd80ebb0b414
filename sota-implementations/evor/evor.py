# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR on OGBench: from data to a trained policy, its curves and its pictures."""

from __future__ import annotations

import checks
import figures
import hydra
import result_rows
import runs
import torch
import utils
from omegaconf import DictConfig
from tqdm import tqdm


@hydra.main(config_path=".", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    utils.check_config(cfg)
    output = runs.new_output(cfg)
    device = utils.choose_device(cfg.device)
    torch.manual_seed(cfg.seed)
    utils.configure_torch(cfg)

    data = utils.make_data(cfg)
    policy, returns = utils.make_networks(cfg, data, device)
    loss, updater, optimizer = utils.make_loss(cfg, policy, returns, utils.return_bounds(cfg, data))
    actor = utils.make_actor(cfg, policy, returns)

    run = runs.train(cfg, output, data, loss, updater, optimizer, actor)
    episodes = utils.evaluate(cfg, actor, cfg.eval.final_episodes, progress=True)
    tqdm.write(run.log_episodes(episodes))
    result_rows.append_result(cfg, run, data, "evor", actor, episodes)
    figures.learning_curve(run.history, output / "learning_curve.png")
    path = output / "reward_to_go.png"
    figures.reward_to_go(data, actor, cfg.loss.gamma, path, chunk_size=cfg.chunk_size)
    figures.base_policy(data, policy, output / "base_policy.png", chunk_size=cfg.chunk_size)
    if "maze" in cfg.env.name:
        figures.maze(data, actor, episodes, utils.env_name(cfg), output / "maze.png")
    tqdm.write(f"Curves, pictures, logs and the checkpoint are in {output}")


if __name__ == "__main__":
    main()
