# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a finished run shows: its learning curve, the learnt law, the maze."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from tensordict import TensorDict
from torch import Tensor

from torchrl_evor import EVORActor, FlowMatchingPolicy, OGBenchEnv, OGBenchExperienceReplay
from torchrl_evor.data.datasets import gather_chunks, make_windows

matplotlib.use("Agg")
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
LABELS = {"loss_actor": "policy", "loss_value": "value"}
LEARNT, EMPIRICAL, PATH = "#c1440e", "#2b5c8a", "#c1440e"


def legend_beside(figure, axis) -> None:
    """The legend of one panel to the right of all, where it hides no curve."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def save(figure, path: Path, **options) -> None:
    """Writes a PNG whole or not at all, and closes the figure."""
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", **{"dpi": 150, **options})
    partial.replace(path)
    plt.close(figure)


def learning_curve(history: dict[str, list[dict]], path: Path) -> None:
    """Losses and success against updates."""
    figure, (losses, success) = plt.subplots(1, 2, figsize=(9, 3.2))
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in history["train"]:
        for name in row:
            if name.startswith("loss"):
                curves.setdefault(name, []).append((row["step"], row[name]))
    for name, curve in curves.items():
        losses.plot(*zip(*curve), label=LABELS.get(name, name))
    positive = all(value > 0 for curve in curves.values() for _, value in curve)
    losses.set(xlabel="updates", ylabel="loss", yscale="log" if positive else "linear")
    if curves:  # a run shorter than the log interval has none
        losses.legend(frameon=False)
    rows = history["eval"]
    steps, means = [row["step"] for row in rows], [row["success"] for row in rows]
    below = [row["success"] - row["success_low"] for row in rows]
    above = [row["success_high"] - row["success"] for row in rows]
    success.errorbar(steps, means, yerr=[below, above], marker="o", capsize=3, color=LEARNT)
    success.set(xlabel="updates", ylabel="success (95 % interval)", ylim=(-0.03, 1.03))
    success.set_xlim(left=0)
    save(figure, path, bbox_inches="tight")


@torch.no_grad()
def reward_to_go(
    data: OGBenchExperienceReplay,
    actor: EVORActor,
    gamma: float,
    path: Path,
    chunk_size: int = 1,
    num_states: int = 4,
    num_neighbours: int = 300,
) -> None:
    """The learnt law beside the data's own returns, at states from worst to best.

    Around each state, the returns that the data earn from its nearest
    neighbours are compared with the law learnt for the same neighbours.
    Behind the end of a trajectory the data's return goes on with a draw from
    the law learnt for its last state, so only the half of the transitions
    that have the most of their trajectory before them are shown.
    """
    transitions = data.transitions
    windows = make_windows(transitions, len(transitions), chunk_size, gamma)
    # By position alone: to keep whatever has terminated would favour good returns.
    remaining = windows.last - windows.start
    kept = remaining >= remaining.median()
    rows, end = windows.start[kept], windows.end[kept]
    observation = transitions["observation"][rows]
    device = actor.returns.loc.device

    def data_returns(index: Tensor) -> Tensor:
        following = transitions["next", "observation"][end[index]].to(device)
        action = gather_chunks(transitions["next", "action"], end[index], chunk_size)
        rest = actor.returns.sample(following, action.to(device), 1)
        weight = gamma ** (end[index] - rows[index] + 1) * ~windows.terminated[kept][index]
        return windows.reward[kept][index] + weight * rest.squeeze(-1).cpu()

    def law(index: Tensor, num_quantiles: int) -> Tensor:
        action = gather_chunks(transitions["action"], rows[index], chunk_size).to(device)
        return actor.returns.quantiles(observation[index].to(device), action, num_quantiles).cpu()

    subset = torch.randperm(len(rows))[:5000]
    means = law(subset, 8).mean(-1)
    # Evenly by value: most states of a sparse reward look like the worst.
    levels = torch.linspace(*means.quantile(torch.tensor([0.02, 0.998])), num_states)
    centres = subset[(means - levels.unsqueeze(-1)).abs().argmin(-1)]
    spread = observation.std(0).clamp_min(1e-6)
    figure, axes = plt.subplots(
        1, num_states, figsize=(2.9 * num_states, 2.6), sharex=True, sharey=True
    )
    for axis, centre in zip(axes, centres):
        distance = ((observation - observation[centre]) / spread).square().sum(-1)
        index = distance.topk(min(num_neighbours, len(rows)), largest=False).indices
        learnt, empirical = law(index, 32).flatten(), data_returns(index)
        # Steps, because laws of sparse rewards have atoms, which no bin width shows.
        axis.ecdf(empirical, color=EMPIRICAL, lw=4, alpha=0.45, label="data")
        axis.ecdf(learnt, color=LEARNT, lw=1.6, label="learnt")
        axis.set(xlabel="discounted return", ylim=(0, 1.02))
        axis.set_title(f"mean {learnt.mean():.0f} (data {empirical.mean():.0f})", fontsize=10)
    axes[0].set_ylabel("share of returns below")
    axes[0].legend(frameon=False)
    figure.suptitle("Law of the reward-to-go at four states, from worst to best", y=1.04)
    save(figure, path, bbox_inches="tight")


@torch.no_grad()
def base_policy(
    data: OGBenchExperienceReplay,
    policy: FlowMatchingPolicy,
    path: Path,
    chunk_size: int = 1,
    num_states: int = 4,
    num_neighbours: int = 300,
) -> list[float]:
    """What the base policy proposes beside what the data did, from common states to rare ones.

    The best candidate is no better than what is proposed, and a critic knows nothing of actions
    that the data do not hold. Around each state, actions of its nearest neighbours are compared
    with proposals for the same neighbours, along the direction in which the data's differ most.

    Returns:
        list of float: for each state the largest difference between the two distribution
        functions; two samples of 300 of the same law differ by 0.11 once in twenty.
    """
    transitions = data.transitions
    rows = make_windows(transitions, 1, chunk_size, gamma=1.0).start
    observation = transitions["observation"][rows]
    spread = observation.std(0).clamp_min(1e-6)
    # Crowded or lonely: how far some neighbours are among a part of the states.
    part = observation[torch.randperm(len(rows))[:5000]] / spread
    # Exact, because the product form of the distance loses small ones.
    exact = "donot_use_mm_for_euclid_dist"
    near = torch.cdist(part[:1000], part, compute_mode=exact)
    near = near.kthvalue(min(6, len(part)), dim=-1).values
    common = near.argsort()[torch.linspace(0, len(near) - 1, num_states).long()]
    figure, axes = plt.subplots(1, num_states, figsize=(2.9 * num_states, 2.6))
    distances = []
    for axis, centre in zip(axes, part[common]):
        distance = (observation / spread - centre).square().sum(-1)
        index = distance.topk(min(num_neighbours, len(rows)), largest=False).indices
        did = gather_chunks(transitions["action"], rows[index], chunk_size)
        batch = TensorDict(observation=observation[index], batch_size=[len(index)])
        proposed = policy(batch.to(next(policy.parameters()).device))["action"].cpu()
        direction = torch.linalg.svd(did - did.mean(0), full_matrices=False).Vh[0]
        did, proposed = did @ direction, proposed @ direction
        grid = torch.cat([did, proposed])
        below = [(sample <= grid.unsqueeze(-1)).double().mean(-1) for sample in (did, proposed)]
        distances.append((below[0] - below[1]).abs().max().item())
        bins = torch.linspace(grid.min(), grid.max(), 26).tolist()
        axis.hist(did, bins, density=True, color=EMPIRICAL, alpha=0.45, label="data")
        axis.hist(proposed, bins, density=True, color=LEARNT, histtype="step", label="proposed")
        axis.set(xlabel="action, main direction", yticks=[])
        axis.set_title(f"differ by {distances[-1]:.2f}", fontsize=10)
    axes[0].set_ylabel("density")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Actions at four states, from the most common to the rarest", y=1.04)
    save(figure, path, bbox_inches="tight")
    return distances


@torch.no_grad()
def maze(
    data: OGBenchExperienceReplay,
    actor: EVORActor,
    episodes,
    env_name: str,
    path: Path,
    num_states: int = 4000,
    num_paths: int = 10,
) -> None:
    """Map of Q* over the data's states, walls, executed paths and the goal."""
    transitions = data.transitions
    index = torch.randperm(len(transitions))[:num_states]
    observation = transitions["observation"][index]
    chooser = EVORActor(
        actor.policy, actor.returns, num_candidates=8, num_samples=4, tau_r=actor.tau_r
    )
    device = actor.returns.loc.device
    values = chooser(observation=observation.to(device))[1].squeeze(-1).cpu()
    figure, axis = plt.subplots(figsize=(6, 5.2))
    # Returns saturate far from the goal; the map spreads what differs there.
    norm = PowerNorm(0.4, values.min().item(), values.max().item())
    dots = axis.scatter(*observation[:, :2].T, c=values, s=9, cmap="viridis", norm=norm, lw=0)
    figure.colorbar(dots, label="Q* of the chosen action (discounted return)")
    draw_walls(axis, env_name)
    for trace in episodes["trace", "observation"][:num_paths]:
        axis.plot(*trace[:, :2].T, color=PATH, lw=1, alpha=0.8)
    rate = episodes["success"].double().mean().item()
    axis.set(aspect="equal")
    axis.axis("off")
    axis.set_title(f"{env_name}\nsuccess {rate:.2f} over {len(episodes)} episodes", fontsize=10)
    save(figure, path, bbox_inches="tight")


def draw_walls(axis, env_name: str) -> None:
    """Walls and goal of a maze, in the units of its positions."""
    env = OGBenchEnv(env_name)
    env.reset()
    world = env.simulator.unwrapped
    unit = world._maze_unit
    for i, row in enumerate(world.maze_map):
        for j, wall in enumerate(row):
            if wall:
                x, y = world.ij_to_xy((i, j))
                corner = (x - unit / 2, y - unit / 2)
                axis.add_patch(Rectangle(corner, unit, unit, color="0.85", lw=0))
    axis.plot(*world.cur_goal_xy, marker="*", color="gold", mec="black", ms=16, zorder=5)
    env.close()
