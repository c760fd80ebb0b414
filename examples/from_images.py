# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR from images: encoders before the base policy and before the reward-to-go.

Each encoder runs once for an image, however many candidates, samples and steps
of a flow come after it, and learns from the loss of what it feeds alone.

``python examples/from_images.py`` collects an OGBench maze on this machine,
draws its point from above, trains and acts on the pictures alone.
``--updates 50 --num-transitions 5000`` shows the mechanics in seconds. For
images of your own give :func:`train` a buffer that holds ``"pixels"``, uint8
``[C, H, W]``, in place of ``"observation"``, there and under ``"next"``.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl._utils import logger as torchrl_logger
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ConvNet
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
from torchrl_evor.envs import rollout_episodes

FEATURES = 64


class Camera(nn.Module):
    """A picture from above, ``[*B, 1, size, size]``, with a bright spot where the point is.

    ``loc`` and ``scale`` are mean and deviation of positions, ``[2]``; 2.5 deviations either way
    are in the picture.
    """

    def __init__(self, loc: Tensor, scale: Tensor, size: int = 32) -> None:
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.register_buffer("axis", torch.linspace(-2.5, 2.5, size))

    def forward(self, position: Tensor) -> Tensor:
        place = ((position - self.loc) / self.scale).unsqueeze(-1)
        pixel = self.axis[1] - self.axis[0]
        column, row = torch.exp(-((self.axis - place) / pixel).square() / 2).unbind(-2)
        spot = row.unsqueeze(-1) * column.unsqueeze(-2)
        return (255 * spot).to(torch.uint8).unsqueeze(-3)


class Encoder(nn.Sequential):
    """Features ``[*B, FEATURES]`` of images ``[*B, C, H, W]`` like ``pixels``."""

    def __init__(self, pixels: Tensor) -> None:
        channels = pixels.shape[-3]
        super().__init__(
            ConvNet(channels, num_cells=[16, 32], strides=2, activation_class=nn.GELU),
            nn.LazyLinear(FEATURES),
            nn.LayerNorm(FEATURES),
        )
        self(pixels)  # makes the lazy layer

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.float() / 255)


def encode(encoder: TensorDictSequential, batch: TensorDictBase) -> TensorDictBase:
    """Writes the features of an image and of the next one, which no gradient reaches."""
    encoder(batch)
    with torch.no_grad():  # by the same encoder, as in DrQ-v2: what comes after it has targets
        encoder(batch["next"])
    return batch


def make(
    batch: TensorDictBase,
    return_units: tuple[float, float],
    hidden_sizes: tuple[int, ...] = (256, 256, 256),
) -> tuple[TensorDictSequential, EVORLoss]:
    """Encoders and loss for the shapes of ``batch``.

    ``return_units`` are mean and deviation of the returns.
    """
    encoder = TensorDictSequential(
        TensorDictModule(Encoder(batch["pixels"]), ["pixels"], ["policy_features"]),
        TensorDictModule(Encoder(batch["pixels"]), ["pixels"], ["value_features"]),
    )
    act = batch["action"].shape[-1]
    hidden = {"hidden_sizes": hidden_sizes, "activation": "gelu"}
    network = VelocityMLP(FEATURES + act + 1, act, **hidden)
    policy = FlowMatchingPolicy(network, act, in_keys="policy_features")
    network = VelocityMLP(FEATURES + act + 2, 1, layer_norm=True, **hidden)
    units = dict(zip(("loc", "scale"), return_units))
    flow = {"num_steps": 4, "solver": "midpoint", "in_keys": ["value_features", "action"]}
    return encoder, EVORLoss(policy, ReturnFlow(network, **flow, **units), next_action="dataset")


def train(
    data: TensorDictReplayBuffer,
    updates: int,
    gamma: float,
    return_units: tuple[float, float],
    hidden_sizes: tuple[int, ...] = (256, 256, 256),
) -> TensorDictSequential:
    """Trains on ``data`` and returns an actor that reads ``"pixels"``."""
    encoder, loss = make(data.sample(), return_units, hidden_sizes)
    loss.make_value_estimator(gamma=gamma)
    updater = SoftUpdate(loss, tau=0.02)
    optimizer = torch.optim.Adam([*encoder.parameters(), *loss.parameters()], lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    progress = tqdm(range(updates))
    for update in progress:
        losses = loss(encode(encoder, data.sample()))
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        schedule.step()
        updater.step()
        if update % 100 == 0:
            progress.set_postfix({key: f"{value.item():.3f}" for key, value in losses.items()})
    choice = {"num_candidates": 16, "num_samples": 16, "tau_r": 30.0, "tau_q": 1.0}
    actor = EVORActor(loss.actor_network, loss.value_network, **choice)
    return TensorDictSequential(encoder, actor)


def photograph(camera: TensorDictModule, batch: TensorDictBase) -> TensorDictBase:
    """Pictures in place of positions."""
    for step in (batch, batch["next"]):
        camera(step)
        del step["observation"]
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="pointmaze-medium-navigate-singletask-task1-v0")
    parser.add_argument("--num-transitions", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=12_000)
    parser.add_argument("--episodes", type=int, default=10)
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
    camera = TensorDictModule(Camera(*data.observation_statistics()), ["observation"], ["pixels"])
    data.append_transform(partial(photograph, camera))
    actor = TensorDictSequential(camera, train(data, args.updates, gamma, data.return_statistics()))
    with set_exploration_type(ExplorationType.RANDOM):
        episodes = rollout_episodes(
            partial(OGBenchEnv, args.dataset), actor, args.episodes, seed=args.seed
        )
    torchrl_logger.info("Success in %d of %d episodes.", episodes["success"].sum(), args.episodes)


if __name__ == "__main__":
    main()
