# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What TD targets and critics learn of the return, against known laws or held-out returns.

Rows hold, for each seed and measurement, means over states and actions. Where
laws are known, by a formula or by simulation, in units of the spread of returns:
the Wasserstein-1 distance of the law, the error of its mean and the errors of Q*
at several temperatures. On data of OGBench: the continuous ranked probability
score against returns of held-out data, and how far their ranks are from uniform.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import baselines
import checks
import figures
import hydra
import numpy as np
import results_io
import torch
import utils
from hydra.core.hydra_config import HydraConfig
from matplotlib import pyplot as plt
from maze_walk import MazeWalk
from omegaconf import DictConfig
from report_tables import Estimator, table
from torch import Tensor
from torchrl.objectives import SoftUpdate
from tqdm import tqdm
from value_problems import NUM_QUANTILES, PROBLEMS, HeldOutReturns, KnownLaws

from torchrl_evor import (
    Critic,
    CriticLoss,
    EVORLoss,
    FlowMatchingPolicy,
    ReturnFlow,
    StackedVelocityMLP,
    VelocityMLP,
)
from torchrl_evor.envs import resolve_environment
from torchrl_evor.modules.functional import check_choice, check_positive
from torchrl_evor.objectives.td_targets import TD_TARGETS
from torchrl_evor.record import mean

LABELS = ("problem", "method", "updates", "seconds", "seed")
METHODS = (*TD_TARGETS, *baselines.CRITICS)
COUNTS = ("num_seeds", "num_updates", "interval", "batch_size", "num_steps", "num_atoms")
Truth = KnownLaws | HeldOutReturns


def check_config(cfg: DictConfig) -> None:
    """Fails before any work is done, where a value of the configuration cannot be."""
    for name in COUNTS:
        check_positive(name, cfg[name])
    if cfg.interval > cfg.num_updates:  # nothing would be measured
        raise ValueError(
            f"interval must be at most num_updates={cfg.num_updates}, got {cfg.interval}."
        )
    for method in checks.check_sweep("methods", cfg.methods):
        check_choice("methods", method, METHODS)
    for problem in checks.check_sweep("problems", cfg.problems):
        if problem not in (*PROBLEMS, "maze"):
            resolve_environment(problem)


def make_truth(cfg: DictConfig, name: str) -> Truth:
    """By name: ``"chain"``, ``"fork"``, ``"maze"``, or a single-task dataset of OGBench."""
    if name in PROBLEMS:
        return KnownLaws(PROBLEMS[name](), cfg.temperatures)
    if name == "maze":
        return KnownLaws(MazeWalk(**cfg.maze), cfg.temperatures)
    return HeldOutReturns(name, **cfg.ogbench)


def standardize(network: StackedVelocityMLP, cfg: DictConfig, truth: Truth) -> StackedVelocityMLP:
    """Lets a network see observations with the spread that is asked for."""
    if cfg.observation_spread is None:
        return network
    if truth.replay is None:
        raise ValueError(
            f"observation_spread={cfg.observation_spread} needs measured observations, got a "
            f"problem of numbered states."
        )
    return network.standardize_inputs_(*utils.input_units(cfg.observation_spread, truth.replay))


def make_model(cfg: DictConfig, truth: Truth, method: str):
    """The model of the return for all seeds, in normalised units."""
    units = {"loc": truth.loc, "scale": truth.scale}
    z = (truth.returns - truth.loc) / truth.scale
    atoms = {"support": utils.support(z), "num_atoms": cfg.num_atoms}
    inputs = truth.observation.shape[-1] + truth.action.shape[-1]

    def stack(in_features: int, out_features: int = 1) -> StackedVelocityMLP:
        network = StackedVelocityMLP(
            cfg.num_seeds,
            in_features,
            out_features,
            hidden_sizes=cfg.hidden_sizes,
            layer_norm=cfg.layer_norm,
        )
        return standardize(network, cfg, truth)

    if method in TD_TARGETS:
        return ReturnFlow(stack(inputs + 2), cfg.num_steps, **units)
    network = stack(inputs, 1 if method == "scalar" else cfg.num_atoms)
    return baselines.make_critic(method, network, **atoms, **units)


def make_loss(model, truth: Truth, method: str):
    """The loss and its value term; the policy is there for form's sake and is not trained."""
    policy = FlowMatchingPolicy(VelocityMLP(3, 1, hidden_sizes=(1,)), 1)
    if method in TD_TARGETS:
        loss = EVORLoss(policy, model, td_target=method, next_action="dataset")
        return loss.make_value_estimator(gamma=truth.gamma), loss.value_loss
    loss = CriticLoss(policy, model, next_action="dataset")
    return loss.make_value_estimator(gamma=truth.gamma), loss.qvalue_loss


def learnt_quantiles(model, observation: Tensor, action: Tensor) -> Tensor:
    """Quantiles of the learnt laws, ``[S, Q, NUM_QUANTILES]``."""
    if not isinstance(model, Critic):
        return model.quantiles(observation, action, NUM_QUANTILES)
    values, log_weights = model.law(model.outputs(observation, action))
    weights = torch.full_like(values, 1 / values.shape[-1])
    if log_weights is not None:
        weights = log_weights.exp()
    values, order = values.sort(-1)
    cumulative = weights.gather(-1, order).cumsum(-1)
    probability = (torch.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    probability = probability.expand(*cumulative.shape[:-1], -1).contiguous()
    index = torch.searchsorted(cumulative, probability).clamp_max(values.shape[-1] - 1)
    return values.gather(-1, index)


@torch.no_grad()
def measure(cfg: DictConfig, model, truth: Truth) -> dict[str, Tensor]:
    """Errors of each seed, ``[S]``."""
    observation = truth.observation.expand(cfg.num_seeds, -1, -1)
    action = truth.action.expand(cfg.num_seeds, -1, -1)
    quantiles = learnt_quantiles(model, observation, action)
    return truth.errors(quantiles, lambda tau: model.q_star(observation, action, tau, 64))


def study(
    cfg: DictConfig, name: str, truth: Truth, method: str, bar: tqdm, build=make_model
) -> list[dict]:
    """Trains all seeds of a method on a problem; one row for each measurement and seed."""
    torch.manual_seed(0)
    model = build(cfg, truth, method)
    loss, value_loss = make_loss(model, truth, method)
    updater = SoftUpdate(loss, tau=cfg.tau)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, cfg.num_updates)
    rows, seconds = [], 0.0
    for update in range(1, cfg.num_updates + 1):
        batch = truth.sample(cfg.num_seeds, cfg.batch_size)
        start = time.perf_counter()
        value, _ = value_loss(batch)
        optimizer.zero_grad()
        # The sum over seeds of their means: each seed trains as if it were alone.
        (cfg.num_seeds * value).backward()
        optimizer.step()
        updater.step()
        schedule.step()
        seconds += time.perf_counter() - start
        bar.update()
        if update % cfg.interval == 0:
            errors = measure(cfg, model, truth)
            label = {"problem": name, "method": method, "updates": update, "seconds": seconds}
            for seed in range(cfg.num_seeds):
                values = {key: error[seed].item() for key, error in errors.items()}
                rows.append({**label, "seed": seed, **values})
    return rows


def write(rows: list[dict], path: Path) -> None:
    """All rows so far; what was there before stays whole until it is replaced."""
    results_io.write_csv(path, list(dict.fromkeys(key for row in rows for key in row)), rows)


def measures(rows: list[dict]) -> list[str]:
    """Names of the errors that rows hold."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in LABELS))


def summary(rows: list[dict]) -> str:
    """Markdown tables of the last measurements: means over seeds with bootstrap intervals.

    Args:
        rows (list of dict): rows of :func:`study`.

    Returns:
        One table for each problem, its methods in the order of the rows.
    """
    estimator = Estimator(num_resamples=2000, confidence=0.95, seed=0, single=True)
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        chosen = [row for row in rows if row["problem"] == problem]
        last = max(row["updates"] for row in chosen)
        chosen = [row for row in chosen if row["updates"] == last]
        columns = measures(chosen)
        lines = []
        for method in dict.fromkeys(row["method"] for row in chosen):
            seeds = [row for row in chosen if row["method"] == method]
            errors = np.array([[row[column] for column in columns] for row in seeds])
            cells = [estimator.text(mean, e[:, None], scale=1, form=".3f") for e in errors.T]
            lines.append([method, *cells, f"{seeds[0]['seconds']:.0f}"])
        parts += [f"{problem}, {last:,} updates:", table(["method", *columns, "seconds"], lines)]
    return "\n\n".join(parts) + "\n"


def plot(rows: list[dict], path: Path, against: str = "updates") -> None:
    """Curves of each method against updates or seconds: mean over seeds, and their range."""
    panels = dict.fromkeys((row["problem"], key) for row in rows for key in measures([row]))
    columns = min(5, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (3.2 * columns, 2.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis, (problem, column) in zip(axes.flat, panels):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [r for r in rows if r["problem"] == problem and r["method"] == method]
            # All seeds are measured at the same updates and seconds.
            points = sorted({row[against] for row in chosen})
            values = [[r[column] for r in chosen if r[against] == p] for p in points]
            (curve,) = axis.plot(points, [sum(v) / len(v) for v in values], label=method)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(points, low, high, color=curve.get_color(), alpha=0.15)
        axis.set_title(f"{problem.split('-singletask')[0]}: {column}", fontsize=8)
        axis.set(xlabel=against, yscale="log")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figures.legend_beside(figure, axes[0, 0])
    figures.save(figure, path, dpi=130, bbox_inches="tight")


@hydra.main(config_path=".", config_name="value_study", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    check_config(cfg)
    utils.configure_threads(cfg.num_threads)
    output = Path(cfg.output or HydraConfig.get().runtime.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    num_runs = len(cfg.problems) * len(cfg.methods)
    rows = []
    with tqdm(total=num_runs * cfg.num_updates, unit="update") as bar:
        for name in cfg.problems:
            truth = make_truth(cfg, name)
            for method in cfg.methods:
                bar.set_description(f"{name}, {method}")
                rows += study(cfg, name, truth, method, bar)
                write(rows, output / "value_study.csv")
    plot(rows, output / "value_study.png")
    plot(rows, output / "value_study_seconds.png", against="seconds")
    tqdm.write(summary(rows))
    tqdm.write(f"Rows (value_study.csv) and curves (value_study*.png) are in {output}")


if __name__ == "__main__":
    main()
