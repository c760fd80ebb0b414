# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR in a loop of one's own, on any TorchRL replay buffer.

``python examples/hand_written_loop.py`` collects a small OGBench data set on
this machine, trains on it and acts. With the defaults this takes minutes;
``--updates 200 --num-transitions 5000`` shows the mechanics in seconds.
"""

from __future__ import annotations

import argparse

import torch
from torchrl._utils import logger as torchrl_logger
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from torchrl_evor import (
    EVORActor,
    EVORLoss,
    FlowMatchingPolicy,
    OGBenchEnv,
    OGBenchExperienceReplay,
    ReturnFlow,
    VelocityMLP,
)


def train(
    data: TensorDictReplayBuffer,
    updates: int,
    gamma: float,
    loc: float,
    scale: float,
    hidden_sizes: tuple[int, ...] = (256, 256, 256),
) -> EVORActor:
    """Trains on ``data`` and returns the actor."""
    batch = data.sample()
    obs, act = batch["observation"].shape[-1], batch["action"].shape[-1]
    hidden = {"hidden_sizes": hidden_sizes}
    policy = FlowMatchingPolicy(VelocityMLP(obs + act + 1, act, **hidden), act)
    network = VelocityMLP(obs + act + 2, 1, layer_norm=True, **hidden)
    returns = ReturnFlow(network, loc=loc, scale=scale)

    loss = EVORLoss(policy, returns, next_action="dataset").make_value_estimator(gamma=gamma)
    updater = SoftUpdate(loss, tau=0.02)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    progress = tqdm(range(updates))
    for update in progress:
        losses = loss(data.sample())
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        updater.step()
        if update % 100 == 0:
            progress.set_postfix({key: f"{value.item():.3f}" for key, value in losses.items()})
    return EVORActor(policy, returns, num_candidates=32, num_samples=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="pointmaze-medium-navigate-singletask-task1-v0")
    parser.add_argument("--num-transitions", type=int, default=300_000)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    gamma = 0.995
    data = OGBenchExperienceReplay(
        args.dataset,
        batch_size=256,
        n_step=300,
        gamma=gamma,
        source="local",
        num_transitions=args.num_transitions,
    )
    actor = train(data, args.updates, gamma, *data.return_statistics())
    env = OGBenchEnv(args.dataset)
    env.set_seed(args.seed)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        episode = env.rollout(env.simulator.max_episode_steps, actor)
    success = bool(episode["next", "success"].any())
    torchrl_logger.info("One episode: %d steps, success %s.", len(episode), success)


if __name__ == "__main__":
    main()
