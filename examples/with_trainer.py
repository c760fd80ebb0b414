# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR inside TorchRL's own ``Trainer``, with its hooks and a logger.

The trainer of torchrl 0.14.1 asks for a collector; ``OfflineSource`` stands
there and makes every count of frames a count of gradient updates.
:class:`~torchrl_evor.EVORTrainer` is the same with evaluation, checkpoints and
resumption, for those who need no hooks of their own.

``python examples/with_trainer.py`` collects an OGBench data set on this
machine, trains on it and runs ten episodes; curves go to ``--log-dir`` as csv files.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torchrl._utils import logger as torchrl_logger
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from torchrl.record.loggers import Logger
from torchrl.trainers import LRSchedulerHook, TargetNetUpdaterHook, Trainer

from torchrl_evor import (
    EVORActor,
    EVORLoss,
    FlowMatchingPolicy,
    OGBenchEnv,
    OGBenchExperienceReplay,
    ReturnFlow,
    VelocityMLP,
)
from torchrl_evor.envs import rollout_episodes
from torchrl_evor.trainers import LossSumStepper, OfflineSource

UPDATES_PER_TURN = 10  # of the trainer's outer loop, where it logs


def make_loss(
    data: TensorDictReplayBuffer,
    gamma: float,
    return_units: tuple[float, float],
    input_units: tuple[torch.Tensor, torch.Tensor],
    hidden_sizes: tuple[int, ...] = (256, 256, 256),
) -> EVORLoss:
    """Networks and loss for the shapes of ``data``.

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
    return EVORLoss(policy, returns, next_action="dataset").make_value_estimator(gamma=gamma)


def make_trainer(
    loss: EVORLoss,
    data: TensorDictReplayBuffer,
    updates: int,
    logger: Logger | None = None,
    log_interval: int = 1000,
    progress_bar: bool = True,
) -> Trainer:
    """TorchRL's trainer over a fixed data set."""
    source = OfflineSource(data, UPDATES_PER_TURN)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    trainer = Trainer(
        collector=source,
        total_frames=updates,
        frame_skip=1,
        optim_steps_per_batch=UPDATES_PER_TURN,
        loss_module=loss,
        optimizer=optimizer,
        optimization_stepper=LossSumStepper(),
        logger=logger,
        log_interval=log_interval,
        progress_bar=progress_bar,
    )
    source.register(trainer)  # the data
    trainer.register_op("post_optim", TargetNetUpdaterHook(SoftUpdate(loss, tau=0.02)))
    LRSchedulerHook(schedule, interval="optim").register(trainer)
    trainer.register_op("post_optim_complete_log", progress)
    return trainer


def progress(updates: int, losses) -> dict:
    """Shows the losses in the progress bar."""
    return {"log_pbar": True, "flow_loss": losses["loss_value"].item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="pointmaze-medium-navigate-singletask-task1-v0")
    parser.add_argument("--num-transitions", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=12_000)
    parser.add_argument("--log-dir", default="outputs")
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
    loss = make_loss(data, gamma, data.return_statistics(), data.observation_statistics())
    logger = CSVLogger(exp_name="with_trainer", log_dir=args.log_dir)
    make_trainer(loss, data, args.updates, logger).train()
    choice = {"num_candidates": 16, "num_samples": 16, "tau_r": 30.0, "tau_q": 1.0}
    actor = EVORActor(loss.actor_network, loss.value_network, **choice)
    with set_exploration_type(ExplorationType.RANDOM):
        episodes = rollout_episodes(partial(OGBenchEnv, args.dataset), actor, 10, seed=args.seed)
    torchrl_logger.info("Success in %d of 10 episodes.", episodes["success"].sum())


if __name__ == "__main__":
    main()
