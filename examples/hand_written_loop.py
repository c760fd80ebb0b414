# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR in a loop of one's own, on any TorchRL replay buffer.

``python examples/hand_written_loop.py`` collects an OGBench data set on this
machine, trains on it with the settings of the recipe and acts. With the
defaults this takes minutes; ``--updates 200 --num-transitions 5000`` shows the
mechanics in seconds.
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
    return_units: tuple[float, float],
    input_units: tuple[torch.Tensor, torch.Tensor],
    hidden_sizes: tuple[int, ...] = (256, 256, 256),
) -> EVORActor:
    """Trains on ``data`` and returns the actor.

    ``return_units`` and ``input_units`` are mean and deviation of the returns and, ``[obs]``, of
    the observations.
    """
    batch = data.sample()
    obs, act = batch["observation"].shape[-1], batch["action"].shape[-1]
    hidden = {"hidden_sizes": hidden_sizes, "activation": "gelu"}
    policy = FlowMatchingPolicy(VelocityMLP(obs + act + 1, act, **hidden), act)
    network = VelocityMLP(obs + act + 2, 1, layer_norm=True, **hidden)
    loc, scale = return_units
    returns = ReturnFlow(network, num_steps=4, solver="midpoint", loc=loc, scale=scale)
    mean, deviation = input_units
    for velocity in (policy.module.velocity_network, network):
        velocity.standardize_inputs_(mean, deviation / 2)  # more than standardised: sharper walls

    loss = EVORLoss(policy, returns, next_action="dataset").make_value_estimator(gamma=gamma)
    updater = SoftUpdate(loss, tau=0.02)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    progress = tqdm(range(updates))
    for update in progress:
        losses = loss(data.sample())
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        schedule.step()
        updater.step()
        if update % 100 == 0:
            progress.set_postfix({key: f"{value.item():.3f}" for key, value in losses.items()})
    return EVORActor(policy, returns, num_candidates=16, num_samples=16, tau_r=30.0, tau_q=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="pointmaze-medium-navigate-singletask-task1-v0")
    parser.add_argument("--num-transitions", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    gamma = 0.995
    data = OGBenchExperienceReplay(
        args.dataset,
        batch_size=256,
        n_step=50,
        gamma=gamma,
        source="local",
        num_transitions=args.num_transitions,
    )
    units = data.return_statistics(), data.observation_statistics()
    actor = train(data, args.updates, gamma, *units)
    env = OGBenchEnv(args.dataset)
    env.set_seed(args.seed)
    with set_exploration_type(ExplorationType.RANDOM):
        episode = env.rollout(env.simulator.max_episode_steps, actor)
    success = bool(episode["next", "success"].any())
    torchrl_logger.info("One episode: %d steps, success %s.", len(episode), success)


if __name__ == "__main__":
    main()
