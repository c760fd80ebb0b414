# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data.replay_buffers import TensorDictReplayBuffer

from torchrl_evor.modules.functional import check_positive

__all__ = ["OfflineSource"]


class OfflineSource:
    """Stands where a TorchRL ``Trainer`` asks for a collector, over a fixed data set.

    It collects nothing: each turn of the trainer's outer loop receives an
    empty batch that counts ``updates_per_batch`` frames. With as many
    ``optim_steps_per_batch`` and ``frame_skip=1``, every count of frames in the
    trainer (its length, the intervals of its logs and checkpoints) is a count
    of gradient updates. The data come from the replay buffer through
    :meth:`register`, which also writes back priorities.

    Args:
        replay_buffer (TensorDictReplayBuffer): the data.
        updates_per_batch (int, optional): gradient updates between two turns
            of the outer loop. Defaults to ``1``.

    Keyword Args:
        batch_size (int, optional): transitions per update. Defaults to the
            batch size of ``replay_buffer``.
        device (torch.device, optional): where the batches go. Defaults to
            where the buffer leaves them.

    Raises:
        ValueError: if a count is below 1, or neither ``batch_size`` nor the
            buffer says how many transitions to sample.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=4)
        >>> _ = buffer.extend(TensorDict(observation=torch.zeros(10, 3), batch_size=[10]))
        >>> source = OfflineSource(buffer, updates_per_batch=5)
        >>> next(iter(source)).numel()
        5
        >>> source.sample()["observation"].shape
        torch.Size([4, 3])
    """

    # What the trainer reads of a collector.
    init_random_frames = 0
    requested_frames_per_batch = 0

    def __init__(
        self,
        replay_buffer: TensorDictReplayBuffer,
        updates_per_batch: int = 1,
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size is None and replay_buffer.batch_size is None:
            raise ValueError("batch_size must be given, as replay_buffer has none of its own.")
        if batch_size is not None:
            check_positive("batch_size", batch_size)
        self.replay_buffer = replay_buffer
        self.updates_per_batch = check_positive("updates_per_batch", updates_per_batch)
        self.batch_size = batch_size
        self.device = device

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Empty batches without end; the trainer counts and stops."""
        while True:
            yield TensorDict(batch_size=[self.updates_per_batch])

    def sample(self, batch: TensorDictBase | None = None) -> TensorDictBase:
        """Transitions for one update (hook ``"process_optim_batch"``)."""
        sample = self.replay_buffer.sample(self.batch_size)
        return sample if self.device is None else sample.to(self.device)

    def update_priority(self, batch: TensorDictBase) -> None:
        """Writes the errors of a batch to its priorities (hook ``"post_optim_log"``)."""
        self.replay_buffer.update_tensordict_priority(batch)

    def register(self, trainer: Any) -> None:
        """Registers the hooks that feed ``trainer`` from the replay buffer."""
        trainer.register_op("process_optim_batch", self.sample)
        trainer.register_op("post_optim_log", self.update_priority)

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """There is no environment to seed; the trainer seeds the generators itself."""
        return seed

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """There is no copy of the policy to update."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data are not part of a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to restore."""

    def shutdown(self) -> None:
        """There are no workers to stop."""
