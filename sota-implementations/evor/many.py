# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Trains all tasks, settings and seeds of one or several environments in one program.

The tasks of an environment share data and base policy: there is one base policy
for each seed, and the value networks of all tasks and settings are stacked and
run as batched products. On a GPU the whole update, sampling included, is one
CUDA graph for each environment, replayed on a stream of its own from PyTorch 2.13 on.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import agents
import hydra
import runs
import torch
import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from programs import Program
from tqdm import tqdm

TIMED = 100  # updates between looks at the clock, where max_seconds is given


def train(cfg: DictConfig, programs: list[Program]) -> float:
    """Updates all programs in turn; returns the seconds that it took."""
    start = time.perf_counter()
    with tqdm(total=cfg.num_updates, unit="update") as bar:
        for step in range(1, cfg.num_updates + 1):
            for program in programs:
                program.update()
            shown = step % cfg.logger.interval == 0 or step == cfg.num_updates
            timed = cfg.max_seconds is not None and step % TIMED == 0
            if not (shown or timed):
                continue
            # Which keeps the queue of the device short, too.
            for program in programs:
                program.synchronize()
            losses = {p.name: [f"{x:.3g}" for x in p.metrics.tolist()] for p in programs}
            bar.update(step - bar.n)
            bar.set_postfix(losses)
            if cfg.max_seconds is not None and time.perf_counter() - start > cfg.max_seconds:
                break
    for program in programs:
        program.synchronize()
    return time.perf_counter() - start


@hydra.main(config_path=".", config_name="many", version_base="1.3")
def main(cfg: DictConfig) -> None:
    output = Path(HydraConfig.get().runtime.output_dir)
    device = utils.choose_device(cfg.device)
    torch.manual_seed(cfg.seeds[0])
    utils.configure_torch(cfg)
    files = agents.find(cfg) if cfg.evaluate is not None else train_all(cfg, output, device)
    if cfg.eval.episodes:
        agents.evaluate_all(cfg, files, device)


def train_all(cfg: DictConfig, output: Path, device: torch.device) -> dict[Path, str]:
    """Trains and writes all agents; returns their files with their methods."""
    utils.check_spread("data.observation_spread", cfg.data.observation_spread)
    utils.check_spread("value_spread", cfg.value_spread)
    runs.reset_peak_memory(device)
    programs = [Program(cfg, env.name, env.gamma, device) for env in cfg.envs]
    seconds = train(cfg, programs)
    tqdm.write(f"{programs[0].num_updates} updates in {seconds:.0f} s")
    folder, files = Path(cfg.agents or output / "agents"), {}
    for program, method in itertools.product(programs, cfg.methods):
        for setting, agent in program.agents(method):
            path = agents.save(folder, program.name, method, setting, agent, program, seconds)
            files[path] = method
    return files


if __name__ == "__main__":
    main()
