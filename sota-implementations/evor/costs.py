# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What training and acting cost, method by method, each alone in a process of its own.

Random data of the shapes of a task: costs do not depend on what is learnt. Times are medians.
Memory is what a phase adds at its peak to the process (on a GPU, to the device).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import checks
import hydra
import result_rows
import runs
import studies
import torch
import train_baseline
import utils
import value_study
from omegaconf import DictConfig, OmegaConf
from report_tables import number, table
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from tqdm import tqdm

from torchrl_evor.modules.functional import check_positive

COLUMNS = {
    "method": "Method",
    "parameters": "Parameters",
    "update_ms": "Update, ms",
    "train_mb": "Training, MB",
    "decision_ms": "Decision, one state, ms",
    "decisions_ms": "Decision, {states} states, ms",
    "act_mb": "Acting, MB",
    "device": "Device",
}


def make_batch(cfg: DictConfig, action_dim: int, device: torch.device) -> TensorDict:
    """Random transitions of one decision each."""
    size = check_positive("data.batch_size", cfg.data.batch_size)

    def step() -> dict:
        return {
            "observation": torch.randn(size, cfg.observation_dim),
            "action": torch.rand(size, action_dim) * 2 - 1,
        }

    done = torch.zeros(size, 1, dtype=torch.bool)
    following = {**step(), "reward": -torch.rand(size, 1), "done": done, "terminated": done}
    steps = torch.full((size, 1), cfg.chunk_size)
    batch = TensorDict({**step(), "steps_to_next_obs": steps, "next": following}, [size])
    return batch.to(device)


def added_memory(device: torch.device, phase: Callable[[], object]) -> tuple[object, float]:
    """Result of a phase and the memory in MiB that it adds at its peak."""
    runs.reset_peak_memory(device)
    before = runs.peak_memory_mb(device)
    return phase(), runs.peak_memory_mb(device) - before


def measure(config: dict, method: str) -> dict:
    """Costs of one method."""
    cfg = OmegaConf.create({**config, "method": method})
    utils.configure_torch(cfg)
    device = utils.choose_device(cfg.device)
    action_dim = cfg.chunk_size * cfg.action_dim
    batch = make_batch(cfg, action_dim, device)

    def train():
        sizes = train_baseline.plain_sizes(cfg, cfg.observation_dim, action_dim)
        loss, actor, optimizer, updater = train_baseline.make_agent(cfg, sizes, device)
        scheduler = utils.make_scheduler(optimizer, "constant", 1)
        update = utils.make_update(cfg, loss, updater, optimizer, scheduler)
        # Losses write the errors of rows to their batch, a copy, and go to the CPU, which waits
        # for the device.
        seconds = studies.median_seconds(lambda: update(batch.copy()).cpu(), cfg.updates, warmup=20)
        return actor, sum(p.numel() for p in loss.parameters()), seconds

    def act():
        observation = torch.randn(cfg.states, cfg.observation_dim, device=device)
        with set_exploration_type(ExplorationType.RANDOM):
            return [
                studies.decision_seconds(actor, states, cfg.decisions)
                for states in (observation[:1], observation)
            ]

    (actor, parameters, update_seconds), train_mb = added_memory(device, train)
    (decision, decisions), act_mb = added_memory(device, act)
    return {
        "method": result_rows.method_name(method, cfg.chunk_size),
        "parameters": parameters,
        "update_ms": 1e3 * update_seconds,
        "train_mb": train_mb,
        "decision_ms": 1e3 * decision,
        "decisions_ms": 1e3 * decisions,
        "act_mb": act_mb,
        "device": result_rows.device_name(device),
    }


def show(rows: list[dict], states: int) -> str:
    """A markdown table."""
    forms = {"parameters": ",.0f", "train_mb": ".0f", "act_mb": ".0f"}
    cells = [
        [
            value if isinstance(value, str) else number(value, forms.get(column, ".2f"))
            for column, value in row.items()
        ]
        for row in rows
    ]
    return table([name.format(states=states) for name in COLUMNS.values()], cells)


@hydra.main(config_path=".", config_name="costs", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg)
    for name in ("observation_dim", "action_dim", "updates", "decisions", "states"):
        check_positive(name, cfg[name])
    if cfg.loss.keep_candidates:
        raise ValueError("loss.keep_candidates must be false: random batches hold no candidates.")
    config, rows = OmegaConf.to_container(cfg, resolve=True), []
    for method in tqdm(cfg.methods, unit="method"):
        # A process for each, or one would begin with the memory of the last.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(measure, config, method).result())
    tqdm.write(show(rows, cfg.states))
    if cfg.output is not None:
        path = Path(cfg.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        value_study.write(rows, path)
        tqdm.write(f"Rows in {path}")


if __name__ == "__main__":
    main()
