# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Noise in the dynamics, in data and at test, against the temperature of the reward-to-go.

Q* takes every good outcome for one that an action can bring about, which holds where transitions
are deterministic. Here the world adds Gaussian noise to each action; data hold the commanded one.
For each level: data are collected in that world, evor.py is trained on them, and the agent acts in
the same world at every tau_r. tau_r = inf is the mean, the right value under noise; small ones are
optimistic. An interrupted study goes on where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checks
import hydra
import studies
import utils
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from torchrl_evor.data import collect_ogbench
from torchrl_evor.envs import resolve_environment
from torchrl_evor.modules.functional import check_positive

LINES = ("method", "action_noise", "num_candidates", "num_samples", "tau_q", "nodes", "training")


def collect(cfg: DictConfig, noise: float) -> Path:
    """Folder with the data of a noisy world, collected on first use."""
    size = cfg.data.num_transitions
    folder = Path(cfg.work_dir) / f"{size}-seed{cfg.data.seed}" / f"noise{noise:g}"
    folder.mkdir(parents=True, exist_ok=True)
    collect_ogbench(
        utils.env_name(cfg),
        folder,
        size,
        seed=cfg.data.seed,
        num_workers=cfg.data.num_workers,
        action_noise=noise,
    )
    return folder


def train(cfg: DictConfig, folder: Path, seed: int) -> Path:
    """Folder of the evor.py run on some data; a finished or interrupted one is continued.

    Raises:
        RuntimeError: if the run fails, or was begun with other settings.
    """
    run = (folder / f"task{cfg.env.task}-seed{seed}").resolve()
    command = [
        sys.executable,
        str(Path(__file__).with_name("evor.py")),
        f"env.name={cfg.env.name}",
        f"env.task={cfg.env.task}",
        f"seed={seed}",
        "data.source=auto",
        f"data.directory={folder.resolve()}",
        f"data.root={folder.resolve() / 'cache'}",
        "eval.interval=0",
        "eval.final_episodes=1",
        f"hydra.run.dir={run}",
        *cfg.train,
    ]
    if cfg.device is not None:
        command.append(f"device={cfg.device}")
    if cfg.num_threads is not None:
        command.append(f"num_threads={cfg.num_threads}")
    if (run / "checkpoint").exists():
        command.append(f"resume={run / 'checkpoint'}")
    if subprocess.run(command).returncode:
        raise RuntimeError(f"training in {run} failed; its message is above.")
    return run


def check(cfg: DictConfig) -> tuple[list[float], list[float], list[int]]:
    """The sweeps, before any work is done."""
    resolve_environment(utils.env_name(cfg))
    for name in ("data.num_transitions", "eval.episodes", "eval.num_envs"):
        check_positive(name, OmegaConf.select(cfg, name))
    noises, tau_rs = (checks.check_sweep(x, cfg[x], numbers=True) for x in ("noises", "tau_rs"))
    if not all(0 <= noise < float("inf") for noise in noises):
        raise ValueError(f"noises must be finite and at least 0, got {noises}.")
    if not all(tau >= 0 for tau in tau_rs):
        raise ValueError(f"tau_rs must be at least 0, got {tau_rs}.")
    for tau in tau_rs:
        utils.check_actor({**cfg.actor, "tau_r": tau})
    seeds = checks.check_sweep("seeds", cfg.seeds)
    for name, seed in (*(("seeds", x) for x in seeds), ("data.seed", cfg.data.seed)):
        checks.check_not_negative(name, seed)
    checks.check_not_negative("eval.seed", cfg.eval.seed)
    return noises, tau_rs, seeds


def evaluate(cfg: DictConfig, run: Path, noise: float, tau_rs: list[float], path: Path) -> list:
    """Adds a row for every temperature; returns all rows of the file."""
    trained = studies.load(run, utils.choose_device(cfg.device))
    rows = []
    for tau in tau_rs:
        options = {**OmegaConf.to_container(cfg.actor), "tau_r": tau}
        actor = studies.make_actor(trained, options)
        columns = studies.evaluate(trained, actor, **cfg.eval, action_noise=noise)
        setting = {"action_noise": noise, "training": " ".join(cfg.train) or "config.yaml"}
        label = studies.labels(trained, run.relative_to(run.parents[2]), {**options, **setting})
        rows = studies.add_rows(path, [{"study": "noise", **label, **columns}])
        tqdm.write(f"noise={noise:g} tau_r={tau:g}: success {columns['success']:.2f}")
    return rows


@hydra.main(config_path=".", config_name="noise_study", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    noises, tau_rs, seeds = check(cfg)
    utils.configure_threads(cfg.num_threads)
    path = studies.csv_path(cfg.results_dir, "noise", cfg.env.name)
    rows = []
    with tqdm(total=len(noises) * len(seeds), unit="run") as bar:
        for noise in noises:
            folder = collect(cfg, noise)
            for seed in seeds:
                bar.set_description(f"noise {noise:g}, seed {seed}")
                rows = evaluate(cfg, train(cfg, folder, seed), noise, tau_rs, path)
                bar.update()
    studies.plot_success(rows, "tau_r", LINES, path.with_suffix(".png"))
    tqdm.write(f"Rows in {path}, picture in {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
