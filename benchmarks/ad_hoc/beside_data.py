# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What base policies of a maze propose beside the data, at a place and around it.

    python benchmarks/ad_hoc/beside_data.py <run>/agents/<agent>.pt <run>/agents/<other>.pt \
        --at 10.7 14.8 --num-transitions 1000000 --picture outputs/beside_data.png

Prints how many of the data's states are near, and of each agent's base policy how fast its
proposals move to the nearest of them, as a share of full speed: mean, deviation and the share of
proposals that make at least a tenth. The picture holds mean proposals on a grid, the data in grey.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from torchrl_evor import FlowMatchingPolicy, OGBenchExperienceReplay

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sota-implementations" / "evor"))

import agents  # noqa: E402
import figures  # noqa: E402

NEAREST = 1000  # states whose middle is where the data are


@torch.no_grad()
def velocities(policy: FlowMatchingPolicy, position: Tensor, num_samples: int) -> Tensor:
    """Mean action ``[*B, N, 2]`` of each proposed chunk, in units of full speed."""
    states = position.unsqueeze(-2).expand(*position.shape[:-1], num_samples, 2)
    return policy.module(states).unflatten(-1, (-1, 2)).mean(-2)


def report(name: str, policy: FlowMatchingPolicy, place: Tensor, towards: Tensor) -> None:
    """Prints how fast proposals at ``place`` move along the unit vector ``towards``."""
    speed = velocities(policy, place, 2000) @ towards
    share = (speed >= 0.1).double().mean()
    print(f"{name}: speed to the data {speed.mean():.2f} +- {speed.std():.2f}, {share:.0%} >= 0.1")


def draw(policies: dict, place: Tensor, states: Tensor, env_name: str, path: Path) -> None:
    """Mean proposals around ``place`` for each policy, beside the data's states."""
    offset = torch.linspace(-3, 3, 13)
    grid = place + torch.cartesian_prod(offset, offset)
    figure, axes = plt.subplots(1, len(policies), figsize=(4 * len(policies), 4), squeeze=False)
    for axis, (name, policy) in zip(axes[0], policies.items()):
        mean = velocities(policy, grid, 256).mean(1)
        axis.scatter(*states.T, s=4, color="0.6", lw=0, zorder=1)
        axis.quiver(*grid.T, *mean.T, angles="xy", scale_units="xy", scale=0.5, zorder=3)
        axis.plot(*place, "x", color="tab:red", zorder=4)
        figures.draw_walls(axis, env_name)
        axis.set(aspect="equal", title=name)
        for limits, middle in ((axis.set_xlim, place[0]), (axis.set_ylim, place[1])):
            limits(middle.item() - 3.5, middle.item() + 3.5)
    figure.tight_layout()
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("agents", type=Path, nargs="+", help="agent files of many.py, one maze")
    parser.add_argument("--names", nargs="+", help="of the agents, their paths if left out")
    parser.add_argument("--at", type=float, nargs=2, required=True, help="position in the maze")
    parser.add_argument("--num-transitions", type=int, help="of the local collection")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    contents = [agents.read(path) for path in args.agents]
    envs = {content["env"] for content in contents}
    if len(envs) > 1 or not envs.pop().startswith("pointmaze"):
        parser.error("agents must be of one pointmaze.")
    names = args.names or [str(path) for path in args.agents]
    policies = {
        name: agents.build({**content, "method": "bc"})
        for name, content in zip(names, contents, strict=True)
    }
    env_name = f"{contents[0]['env']}-singletask-task{contents[0]['task']}-v0"
    data = OGBenchExperienceReplay(env_name, source="local", num_transitions=args.num_transitions)
    states, place = data.transitions["observation"][:], torch.tensor(args.at)
    distance = (states - place).norm(dim=-1)
    near = ", ".join(f"{int((distance < r).sum())} within {r}" for r in (0.5, 1, 1.5, 2))
    print(f"Of {len(states)} states: {near} of {args.at}")
    nearest = distance.topk(min(NEAREST, len(states)), largest=False).indices
    towards = states[nearest].mean(0) - place
    for name, policy in policies.items():
        report(name, policy, place, towards / towards.norm())
    if args.picture:
        draw(policies, place, states[torch.randperm(len(states))[:40_000]], env_name, args.picture)


if __name__ == "__main__":
    main()
