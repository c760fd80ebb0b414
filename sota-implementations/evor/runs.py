# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Training a configuration: its updates, and the state, logs and checkpoint of a run."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import time
from pathlib import Path

import checkpoint_io
import torch
import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl._utils import timeit
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from torchrl_evor import OGBenchExperienceReplay
from torchrl_evor.record import wilson_interval


def new_output(cfg: DictConfig) -> Path:
    """Folder of the running script, whose logs would go on with those of an earlier run.

    Raises:
        ValueError: if that left a checkpoint there which is not continued.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume is None and (output / "checkpoint").exists():
        raise ValueError(
            f"hydra.run.dir must be a folder without a checkpoint, got {str(output)!r}: continue "
            f"its run with resume={output / 'checkpoint'} or choose another folder."
        )
    return output


def train(
    cfg: DictConfig,
    output: Path,
    data: OGBenchExperienceReplay,
    loss: LossModule,
    updater: SoftUpdate | None,
    optimizer: torch.optim.Optimizer,
    actor: TensorDictModuleBase,
) -> Run:
    """All updates that are left, with logs, checkpoints and evaluations along the way."""
    phases, num_updates = utils.make_phases(cfg, loss), cfg.optim.num_updates
    schedule = (cfg.optim.schedule, num_updates, len(phases))
    scheduler = utils.make_scheduler(optimizer, *schedule)
    modules = {"loss": loss, "updater": updater, "optimizer": optimizer, "scheduler": scheduler}
    run = Run(cfg, output, **modules)
    run.resume()
    device = next(actor.parameters()).device
    reset_peak_memory(device)
    last = len(phases) * num_updates
    with tqdm(total=last, initial=run.step, unit="update") as bar:
        for phase, losses in enumerate(phases, 1):
            update = utils.make_update(cfg, losses, updater, optimizer, scheduler)
            end = phase * num_updates
            if phase == 2 and run.step < end:
                run.log_losses()
                bar.write(f"drawing candidates at each of {len(data.transitions)} states")
                utils.keep_candidates(cfg, data, actor.policy, loss.num_candidates)
            while run.step < end:
                with timeit("sample"):
                    batch = data.sample().to(device)
                with timeit("update"):
                    run.add(update(batch))
                bar.update()
                if run.due(cfg.logger.interval):
                    bar.set_postfix(run.log_losses())
                if run.due(cfg.checkpoint.interval):
                    run.save()
                # Before the last phase there is no value to choose by.
                if run.due(cfg.eval.interval) and last - num_updates < run.step < last:
                    episodes = utils.evaluate(cfg, actor, cfg.eval.episodes)
                    bar.write(run.log_episodes(episodes))
    run.save()
    return run


def summarize(episodes: TensorDictBase) -> dict[str, float]:
    """Mean success with its 95 % Wilson interval, mean return with its 95 % normal interval."""
    count, successes = len(episodes), int(episodes["success"].sum())
    interval = wilson_interval(successes, count)
    returns = episodes["return"].double()
    half = 1.96 * returns.std().item() / math.sqrt(count) if count > 1 else math.nan
    return {
        "success": successes / count,
        "success_low": interval.low,
        "success_high": interval.high,
        "return": returns.mean().item(),
        "return_low": returns.mean().item() - half,
        "return_high": returns.mean().item() + half,
        "length": episodes["length"].double().mean().item(),
    }


class Run:
    """Step, history, logger and checkpoint (of ``modules`` and random states) of a run.

    Modules that are ``None`` are left out.
    """

    def __init__(self, cfg: DictConfig, output: Path, **modules) -> None:
        self.cfg = cfg
        self.output = output
        self.step = 0
        self.peak_memory_mb = 0.0
        # Wall-clock time of training so far; None: resumed from a checkpoint without it.
        self.seconds: float | None = 0.0
        self.history: dict[str, list] = {"train": [], "eval": []}
        self._last: float | None = None
        self._sum, self._count = None, 0
        self._modules = {name: x for name, x in modules.items() if x is not None}
        kwargs = {"wandb_kwargs": {"project": cfg.logger.project, "mode": cfg.logger.mode}}
        backend = "" if cfg.logger.backend == "none" else cfg.logger.backend
        self.logger = get_logger(backend, str(output), "logs", **kwargs)

    def due(self, interval: int) -> bool:
        """Whether something done every ``interval`` updates is due now; 0 is never."""
        return interval > 0 and self.step % interval == 0

    def add(self, losses: TensorDictBase) -> None:
        """Counts one update; its losses stay on their device until they are logged."""
        now = time.perf_counter()
        if self._last is not None and self.seconds is not None:
            self.seconds += now - self._last
        self._last = now
        self.step += 1
        self._count += 1
        self._sum = losses if self._sum is None else self._sum + losses

    def log_losses(self) -> dict[str, float]:
        """Logs the mean losses of the updates since the last call, if there are any."""
        if self._sum is None:
            return {}
        row = {name: value.item() / self._count for name, value in self._sum.items()}
        self._sum, self._count = None, 0
        self._log("train", row)
        if self.logger is not None:
            for name, seconds in timeit.todict(prefix="seconds").items():
                self.logger.log_scalar(name, seconds, step=self.step)
        timeit.erase()
        return {name: f"{value:.3g}" for name, value in row.items()}

    def log_episodes(self, episodes: TensorDictBase) -> str:
        """Logs an evaluation and puts it in a sentence."""
        self._last = None  # the time of evaluations is not that of training
        row = summarize(episodes)
        self._log("eval", row)
        return (
            f"update {self.step}: success {row['success']:.2f} "
            f"[{row['success_low']:.2f}, {row['success_high']:.2f}], return {row['return']:.1f} "
            f"[{row['return_low']:.1f}, {row['return_high']:.1f}], length {row['length']:.0f} "
            f"over {len(episodes)} episodes"
        )

    def _log(self, group: str, row: dict[str, float]) -> None:
        self.history[group].append({"step": self.step, **row})
        if self.logger is not None:
            for name, value in row.items():
                self.logger.log_scalar(f"{group}/{name}", value, step=self.step)

    def save(self) -> Path:
        """Writes the checkpoint; what was there before stays whole until it is replaced."""
        checkpoint_io.check_room(self.output, self._modules["loss"])
        device = next(self._modules["loss"].parameters()).device
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb(device))
        names = ("step", "seconds", "peak_memory_mb", "history")
        progress = {name: getattr(self, name) for name in names}
        config = OmegaConf.to_container(self.cfg, resolve=True)
        checkpoint = self._checkpoint(rng=GlobalRNGState(), progress=progress, config=config)
        with checkpoint_io.uninterrupted():
            path = checkpoint.save(self.output / "checkpoint")
            checkpoint_io.write_sizes(Path(path))
        return path

    def resume(self) -> None:
        """Continues from ``cfg.resume``, if given; see :func:`checkpoint_io.load_progress`."""
        if self.cfg.resume is None:
            return
        progress = checkpoint_io.load_progress(self.cfg)
        checkpoint = self._checkpoint(rng=GlobalRNGState())
        checkpoint.load(self.cfg.resume, components=[*self._modules, "rng"])
        self.step, self.history = progress["step"], progress["history"]
        self.seconds = progress.get("seconds")
        self.peak_memory_mb = progress.get("peak_memory_mb", 0.0)

    def _checkpoint(self, **components) -> Checkpoint:
        return Checkpoint(**self._modules, **components)


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak of what this process did before, where the system lets it."""
    if device.type == "cuda":
        torch.cuda.init()  # which a device with an index does not see to
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Peak device memory on a GPU, else peak resident memory of the process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
