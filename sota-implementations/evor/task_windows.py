# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The n-step windows of several tasks over their common data, for programs.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_evor.data.datasets import gather_chunks, make_windows, sample_candidates


@dataclass(frozen=True)
class Setting:
    """What distinguishes one value network from its neighbours in the stack."""

    seed: int
    task: int
    n_step: int


class TaskWindows:
    """The n-step windows of several settings over one dataset, as tables on one device.

    Args:
        replays (dict of int to OGBenchExperienceReplay): the dataset labelled for each task.
        settings (list of Setting): ``M`` settings, grouped by seed.
        gamma (float): discount per step.
        device (torch.device): where tables lie and batches are made.
        chunk_size (int, optional): actions per decision. Defaults to 1.
    """

    def __init__(
        self, replays: dict, settings: list[Setting], gamma: float, device, chunk_size: int = 1
    ) -> None:
        data = next(iter(replays.values())).transitions
        self.num_seeds = len({setting.seed for setting in settings})
        # Behind the last transition there is a state whose action is known.
        keys = ("observation", "action", ("next", "observation"), ("next", "action"))
        # Plain tensors: memory-mapped ones are slow to index and cannot be compiled.
        columns = [data[key].as_subclass(Tensor).to(device) for key in keys]
        self.observation, self.action, self.next_observation, self.next_action = columns
        size, valid, tables = len(data), torch.ones(len(data), dtype=torch.bool), {}
        for task, n_step in {(s.task, s.n_step) for s in settings}:
            windows = make_windows(replays[task].transitions, n_step, chunk_size, gamma)
            valid &= torch.zeros(size, dtype=torch.bool).index_fill_(0, windows.start, True)
            tables[task, n_step] = self._scatter(windows, size)
        rows = [tables[s.task, s.n_step] for s in settings]
        self.end, self.reward, self.terminated = (
            torch.stack(column).to(device) for column in zip(*rows)
        )
        self.start = valid.nonzero().squeeze(-1).to(device)
        self.chunk_size = chunk_size
        self.candidates = None

    @staticmethod
    def _scatter(windows, size: int) -> tuple[Tensor, Tensor, Tensor]:
        columns = (windows.end.int(), windows.reward, windows.terminated)
        return tuple(c.new_zeros(size).index_copy_(0, windows.start, c) for c in columns)

    def rows(self, batch_size: int) -> Tensor:
        """Random transitions that start a window in every setting, ``[S, B]``."""
        shape = (self.num_seeds, batch_size)
        return self.start[torch.randint(len(self.start), shape, device=self.start.device)]

    def policy_batch(self, row: Tensor) -> TensorDict:
        """What the base policies imitate, ``[S, B]``."""
        action = gather_chunks(self.action, row, self.chunk_size)
        return TensorDict(observation=self.observation[row], action=action, batch_size=row.shape)

    def keep_candidates(self, policy, num_candidates: int) -> None:
        """Draws ``[S, N, P, act]`` candidates at every next state, for batches to hold.

        Args:
            policy (FlowMatchingModel): a stack of the base policies of all seeds.
            num_candidates (int): actions for each state.
        """
        self.candidates = sample_candidates(
            lambda states: policy(states.expand(self.num_seeds, *states.shape)),
            self.next_observation,
            num_candidates,
        )
        copies = len(self.end) // self.num_seeds
        seed = torch.arange(self.num_seeds, device=self.end.device)
        self.seed = seed.repeat_interleave(copies).unsqueeze(1)

    def value_batch(self, row: Tensor) -> TensorDict:
        """Windows of every setting at the rows of its seed, ``[M, B]``."""
        row = row.repeat_interleave(len(self.end) // self.num_seeds, 0)
        end = self.end.gather(1, row).long()
        terminated = self.terminated.gather(1, row).unsqueeze(-1)
        following = {
            "observation": self.next_observation[end],
            "action": gather_chunks(self.next_action, end, self.chunk_size),
            "reward": self.reward.gather(1, row).unsqueeze(-1),
            "terminated": terminated,
            "done": terminated,
        }
        if self.candidates is not None:
            following["candidates"] = self.candidates[self.seed, end]
        return TensorDict(
            observation=self.observation[row],
            action=gather_chunks(self.action, row, self.chunk_size),
            steps_to_next_obs=(end - row + 1).unsqueeze(-1),
            next=TensorDict(following, batch_size=row.shape),
            batch_size=row.shape,
        )
