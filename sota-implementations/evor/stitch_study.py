# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Beyond one step of improvement: success against wall-clock where trajectories must be stitched.

Trains EVOR with next_action="improved" and "dataset", Q-chunking and the scalar critic on the same
data, networks and evaluation (train_baseline.py's), and evaluates each along the way.
"""

from __future__ import annotations

import time
from pathlib import Path

import checks
import figures
import hydra
import result_rows
import results_io
import studies
import torch
import train_baseline
import utils
from matplotlib import pyplot as plt
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm, trange


def make_variants(cfg: DictConfig) -> dict[str, DictConfig]:
    """Configuration of each variant, checked before any of them is trained.

    Raises:
        ValueError: if there are none, or one cannot be trained.
    """
    if not cfg.variants:
        raise ValueError("variants must hold at least one entry, got none.")
    if cfg.eval.interval < 1 or cfg.optim.num_updates % cfg.eval.interval:
        raise ValueError(
            "optim.num_updates must be a multiple of eval.interval, got "
            f"{cfg.optim.num_updates} and {cfg.eval.interval}."
        )
    variants = {}
    for name, changes in cfg.variants.items():
        try:
            variants[name] = OmegaConf.merge(cfg, changes)
            train_baseline.check_config(variants[name])
        except Exception as error:
            raise ValueError(f"variants.{name} does not fit baselines.yaml: {error}") from error
    return variants


def run(name: str, cfg: DictConfig, path: Path, device: torch.device) -> None:
    """Trains a variant in pieces and adds a row of raw numbers after each."""
    torch.manual_seed(cfg.seed)
    data = utils.make_data(cfg)
    sizes = train_baseline.make_sizes(cfg, data)
    loss, actor, optimizer, updater = train_baseline.make_agent(cfg, sizes, device)
    phases, num_updates = utils.make_phases(cfg, loss), cfg.optim.num_updates
    scheduler = utils.make_scheduler(optimizer, cfg.optim.schedule, num_updates, len(phases))
    *before, last = (
        utils.make_update(cfg, losses, updater, optimizer, scheduler) for losses in phases
    )
    start = time.perf_counter()
    for update in before:
        for _ in trange(num_updates, unit="update", desc=f"{name}, policy"):
            update(data.sample().to(device))
        utils.keep_candidates(cfg, data, actor.policy, loss.num_candidates)
    seconds = time.perf_counter() - start
    for end in range(cfg.eval.interval, num_updates + 1, cfg.eval.interval):
        start = time.perf_counter()
        for _ in trange(cfg.eval.interval, unit="update", desc=name):
            losses = last(data.sample().to(device))
        next(iter(losses.values())).item()  # waits for the device
        seconds += time.perf_counter() - start
        episodes = utils.evaluate(cfg, actor, cfg.eval.final_episodes, progress=True)
        label = {
            "study": "stitch",
            "env": cfg.env.name,
            "task": cfg.env.task,
            "method": name,
            "seed": cfg.seed,
            "update": end,
            "n_step": cfg.data.n_step,
            "num_transitions": len(data.transitions),
            "hidden": "x".join(map(str, cfg.value.hidden_sizes)),
            "settings": settings(cfg),
            "device": result_rows.device_name(device),
        }
        columns = result_rows.episode_columns(episodes)
        studies.add_rows(path, [{**label, **columns, "train_seconds": seconds}])
        tqdm.write(f"{name}, update {end}: success {columns['success']:.2f}, {seconds:.0f} s")


def settings(cfg: DictConfig) -> str:
    """What else distinguishes two runs of a variant, in one cell."""
    parts = {
        "chunk_size": cfg.chunk_size,
        **{name: value for name, value in cfg.actor.items() if value is not None},
        "gamma": cfg.loss.gamma,
        "tau": cfg.loss.tau,
        "lr": cfg.optim.lr,
        "batch_size": cfg.data.batch_size,
        "spread": cfg.data.observation_spread,
        "policy_steps": results_io.steps_text(cfg.policy.num_steps, cfg.policy.solver),
        "value_steps": cfg.value.num_steps,
        "value_spread": utils.value_spread(cfg),
        "layer_norm": cfg.value.layer_norm,
        "num_flows": cfg.value.num_flows,
        "bound_returns": cfg.loss.bound_returns,
        "next_candidates": cfg.baseline.num_candidates,
        "schedule": cfg.optim.schedule,
        # Where a schedule ends, a row in the middle of a longer one is another training.
        "num_updates": cfg.optim.num_updates,
    }
    if cfg.loss.next_action == "improved":
        improved = cfg.loss.improved.items()
        parts.update({f"improved.{name}": value for name, value in improved if value is not None})
    if cfg.loss.keep_candidates:
        parts["keep_candidates"] = True
    return " ".join(f"{name}={value}" for name, value in parts.items())


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Success with its Wilson interval against seconds of training, one curve per setting."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    same = ("method", "n_step", "num_transitions", "hidden", "settings", "device")
    for line in dict.fromkeys(tuple(row[name] for name in same) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in same) == line]
        updates = sorted({int(row["update"]) for row in chosen})
        groups = [[row for row in chosen if int(row["update"]) == u] for u in updates]
        seconds = [sum(float(r["train_seconds"]) for r in g) / len(g) for g in groups]
        mean, low, high = zip(*(studies.pool(group) for group in groups))
        (curve,) = axis.plot(seconds, mean, marker="o", label=f"{line[0]}, n={line[1]}")
        axis.fill_between(seconds, low, high, color=curve.get_color(), alpha=0.15)
    axis.set(xlabel="seconds of training", ylabel="success (95 % Wilson)", ylim=(-0.03, 1.03))
    axis.set_title(path.stem, fontsize=9)
    axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figures.save(figure, path)


@hydra.main(config_path=".", config_name="stitch_study", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg, free=["variants"])
    variants = make_variants(cfg)
    for variant in variants.values():
        checks.check_options(variant, free=["variants"])
    utils.configure_torch(cfg)
    device = utils.choose_device(cfg.device)
    path = studies.csv_path(cfg.results_dir, "stitch", cfg.env.name)
    for name, variant in variants.items():
        run(name, variant, path, device)
    plot(studies.read(path), path.with_suffix(".png"))
    tqdm.write(f"Rows in {path}, picture in {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
