# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key
from torch import nn, optim
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data.replay_buffers import TensorDictReplayBuffer
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from torchrl.trainers.trainers import OptimizationStepper, TargetNetUpdaterHook, Trainer

from torchrl_evor.data._memmap import check_memmap
from torchrl_evor.modules.functional import check_positive
from torchrl_evor.trainers.offline_source import OfflineSource

__all__ = ["EVORTrainer", "LossSumStepper"]


class LossSumStepper(OptimizationStepper):
    """One optimiser step on the sum of the losses.

    Unlike ``DefaultOptimizationStepper`` it does not wait for the device, as
    it reads no norm of the gradient, and what it returns to be logged, and is
    kept by the trainer, is detached. ``clip_norm`` of the trainer is honoured.
    """

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Losses of one batch, after the step that they have caused."""
        losses = trainer.compute_loss(sub_batch)
        trainer.optimizer.zero_grad()
        sum(value for key, value in losses.items() if key.startswith("loss")).backward()
        if trainer.clip_norm is not None:
            nn.utils.clip_grad_norm_(trainer.loss_module.parameters(), trainer.clip_norm)
        trainer.optimizer.step()
        return losses.detach()


class EVORTrainer(Trainer):
    """Offline training of any loss module on a fixed data set.

    A TorchRL ``Trainer`` whose frames are gradient updates (see
    :class:`~torchrl_evor.trainers.OfflineSource`): sample, loss, backward,
    optimiser, target networks, and then logs, evaluation and checkpoints. All
    hooks of ``Trainer.register_op`` are available.

    Keyword Args:
        loss_module (LossModule): for instance :class:`~torchrl_evor.EVORLoss`;
            the outputs whose names start with ``"loss"`` are summed.
        optimizer (Optimizer): optimiser of the loss's parameters.
        replay_buffer (TensorDictReplayBuffer): the data.
        total_updates (int): gradient updates, a multiple of
            ``optim_steps_per_batch``.
        target_net_updater (TargetNetUpdater, optional): stepped after each
            update. Defaults to ``None``.
        batch_size (int, optional): transitions per update. Defaults to the
            batch size of ``replay_buffer``.
        optim_steps_per_batch (int, optional): updates between two turns of the
            outer loop, where logs, evaluation and checkpoints happen. Defaults
            to ``1``.
        optimization_stepper (OptimizationStepper, optional): another way to
            make one update. Defaults to ``None``, :class:`LossSumStepper`.
        device (torch.device, optional): where the batches go. Defaults to
            where the buffer leaves them.
        clip_norm (float, optional): largest norm of the gradient. Defaults to
            ``None``, no limit.
        logger (Logger, optional): where scalars go, at the number of updates.
        log_interval (int, optional): updates between log rows. Defaults to ``1000``.
        evaluate (Callable, optional): called without arguments every
            ``eval_interval`` updates; returns scalars to be logged.
        eval_interval (int, optional): updates between evaluations. Defaults to
            ``10000``.
        checkpoint_path (str or Path, optional): folder of the checkpoint,
            replaced as a whole each time and written once more at the end: new, empty
            or the folder of an earlier one. It holds the loss, the optimiser, the counts,
            the random state and that of the sampler, but not the data. Defaults to
            ``None``, no checkpoint.
        checkpoint_interval (int, optional): updates between checkpoints.
            Defaults to ``10000``.
        progress_bar (bool, optional): Defaults to ``True``.
        seed (int, optional): seeds torch and numpy. Defaults to ``None``. A buffer that
            prefetches draws in threads of its own, which no seed repeats.

    Raises:
        ValueError: if a count is below 1, ``total_updates`` is not a multiple
            of ``optim_steps_per_batch``, ``clip_norm`` not positive, ``checkpoint_path`` holds
            something else, or the data's windows of several steps have another discount than
            the loss; in :meth:`resume`, if the checkpoint is damaged, has another discount or
            leaves a rest that is no such multiple.
        FileNotFoundError: from :meth:`resume`, if there is no checkpoint.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_evor import (
        ...     EVORLoss, EVORTrainer, FlowMatchingPolicy, ReturnFlow, VelocityMLP
        ... )
        >>> policy = FlowMatchingPolicy(VelocityMLP(3 + 2 + 1, 2, hidden_sizes=(32,)), 2)
        >>> returns = ReturnFlow(VelocityMLP(3 + 2 + 2, 1, hidden_sizes=(32,)))
        >>> loss = EVORLoss(policy, returns)
        >>> end = torch.zeros(100, 1, dtype=torch.bool)
        >>> following = TensorDict(
        ...     observation=torch.randn(100, 3), reward=torch.randn(100, 1), done=end,
        ...     terminated=end, batch_size=[100],
        ... )
        >>> data = TensorDict(
        ...     observation=torch.randn(100, 3), action=torch.rand(100, 2), next=following,
        ...     batch_size=[100],
        ... )
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=16)
        >>> _ = buffer.extend(data)
        >>> trainer = EVORTrainer(
        ...     loss_module=loss,
        ...     optimizer=torch.optim.Adam(loss.parameters(), 3e-4),
        ...     replay_buffer=buffer,
        ...     total_updates=4,
        ...     target_net_updater=SoftUpdate(loss, tau=0.005),
        ...     progress_bar=False,
        ... )
        >>> trainer.train()
        >>> trainer.updates
        4
    """

    def __init__(
        self,
        *,
        loss_module: LossModule,
        optimizer: optim.Optimizer,
        replay_buffer: TensorDictReplayBuffer,
        total_updates: int,
        target_net_updater: TargetNetUpdater | None = None,
        batch_size: int | None = None,
        optim_steps_per_batch: int = 1,
        optimization_stepper: OptimizationStepper | None = None,
        device: torch.device | str | None = None,
        clip_norm: float | None = None,
        logger: Logger | None = None,
        log_interval: int = 1000,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        eval_interval: int = 10_000,
        checkpoint_path: str | Path | None = None,
        checkpoint_interval: int = 10_000,
        progress_bar: bool = True,
        seed: int | None = None,
    ) -> None:
        counts = {
            "total_updates": total_updates,
            "optim_steps_per_batch": optim_steps_per_batch,
            "log_interval": log_interval,
            "eval_interval": eval_interval,
            "checkpoint_interval": checkpoint_interval,
        }
        for name, value in counts.items():
            check_positive(name, value)
        if total_updates % optim_steps_per_batch:
            raise ValueError(
                f"total_updates must be a multiple of optim_steps_per_batch, "
                f"got {total_updates} and {optim_steps_per_batch}."
            )
        # At or below 0 it would train nothing, or uphill.
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {clip_norm!r}.")
        _check_free(checkpoint_path)
        _check_discounts(loss_module, replay_buffer)
        source = OfflineSource(
            replay_buffer, optim_steps_per_batch, batch_size=batch_size, device=device
        )
        super().__init__(
            collector=source,
            total_frames=total_updates,
            frame_skip=1,
            optim_steps_per_batch=optim_steps_per_batch,
            loss_module=loss_module,
            optimizer=optimizer,
            optimization_stepper=optimization_stepper or LossSumStepper(),
            target_net_updater=target_net_updater,
            batch_size=batch_size,
            logger=logger,
            clip_norm=clip_norm,
            progress_bar=progress_bar,
            seed=seed,
            # The trainer acts when more than an interval has passed.
            log_interval=log_interval - 1,
            save_trainer_interval=checkpoint_interval - 1,
            save_trainer_file=checkpoint_path,
            # Also without a path: a resumed run takes its random state from there.
            checkpoint=Checkpoint(rng=GlobalRNGState(), sampler=replay_buffer.sampler),
        )
        # TorchRL's would hold a tensor for every update; what reads it wants the last.
        self._log_dict = defaultdict(lambda: deque(maxlen=1))
        source.register(self)
        if target_net_updater is not None:
            # Not TargetNetUpdaterHook.register, which steps once per turn of the outer loop.
            self.register_op("post_optim", TargetNetUpdaterHook(target_net_updater))
        if evaluate is not None:
            self.evaluate, self.eval_interval = evaluate, eval_interval
            self.register_op("post_steps_log", self._evaluate)

    @property
    def updates(self) -> int:
        """Gradient updates so far."""
        return self.collected_frames

    def resume(self, path: str | Path) -> EVORTrainer:
        """Restores the state of a checkpoint; :meth:`train` then goes on from there."""
        if not Checkpoint.is_checkpoint(path):
            raise FileNotFoundError(f"path must be the folder of a checkpoint, got {str(path)!r}.")
        check_memmap(Path(path))
        self.load_from_file(path)
        rest = self.total_frames - self.updates
        if rest > 0 and rest % self.optim_steps_per_batch:
            raise ValueError(
                f"total_updates beyond those of the checkpoint must be a multiple of "
                f"optim_steps_per_batch, got {rest} and {self.optim_steps_per_batch}."
            )
        # The checkpoint's discount is now the loss's.
        _check_discounts(self.loss_module, self.collector.replay_buffer)
        return self

    def train(self) -> None:
        """Trains up to ``total_updates``; does nothing once they are done."""
        if self.updates < self.total_frames:
            super().train()

    def _evaluate(self, batch: TensorDictBase) -> None:
        last = self.updates - self.optim_steps_per_batch
        if self.updates // self.eval_interval == last // self.eval_interval:
            return
        for name, value in self.evaluate().items():
            self._log_dict[name].append(value)
            if self.logger is not None:
                self.logger.log_scalar(name, value, step=self.updates)


def _check_free(checkpoint_path: str | Path | None) -> None:
    """A checkpoint replaces what is there, which must be one, too."""
    if checkpoint_path is None or Checkpoint.is_checkpoint(checkpoint_path):
        return
    path = Path(checkpoint_path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(
            f"checkpoint_path must be a new or empty folder, or one that holds a checkpoint, "
            f"got {str(path)!r}."
        )


def _check_discounts(loss_module: LossModule, replay_buffer: TensorDictReplayBuffer) -> None:
    """Rewards within a window and the value behind it make no return if discounted differently."""
    windows = replay_buffer.storage
    reads = {unravel_key(key) for key in getattr(loss_module, "in_keys", ())}
    reward = getattr(loss_module.tensor_keys, "reward", None)
    if (
        reward is None
        or unravel_key(("next", reward)) not in reads
        or getattr(windows, "n_step", 1) * getattr(windows, "chunk_size", 1) == 1
    ):
        return
    gamma = float(loss_module.value_estimator.gamma)
    if abs(windows.gamma - gamma) > 1e-6:
        raise ValueError(
            f"gamma of replay_buffer must be that of loss_module, {gamma:g} "
            f"(make_value_estimator), got {windows.gamma:g}."
        )
