# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Candidates of a kept policy, drawn once for a whole data set."""

from __future__ import annotations

import sys

import pytest
import torch
from _ogbench_cases import needs_ogbench
from torch import nn
from torchrl.envs import ObservationNorm
from torchrl.envs.utils import exploration_type

from torchrl_evor import EVORLoss, FlowMatchingPolicy, QCLoss, ReturnFlow, ScalarCritic
from torchrl_evor.data import sample_candidates


def numbered(observation):
    """Actions that name their state and their place among the candidates."""
    place = torch.arange(observation.shape[-2], dtype=observation.dtype).unsqueeze(-1)
    return torch.cat([observation, place.expand(*observation.shape[:-1], 1)], -1)


@pytest.mark.parametrize("max_rows", [1, 5, 12, 4096])
def test_pieces_give_every_state_its_own(max_rows):
    observation = torch.randn(7, 3)
    candidates = sample_candidates(numbered, observation, 4, max_rows=max_rows)
    assert candidates.shape == (7, 4, 4)
    for place in range(4):
        assert torch.equal(candidates[:, place, :3], observation)
        assert candidates[:, place, 3].eq(place).all()


def test_leading_axes_of_a_stack_are_kept():
    def stack(observation):
        return torch.stack([observation, -observation])

    observation = torch.randn(7, 3)
    candidates = sample_candidates(stack, observation, 2, max_rows=4)
    assert candidates.shape == (2, 7, 2, 3)
    assert torch.equal(candidates[1, :, 0], -observation)


def test_of_a_flow():
    """Apart from each other, and without a graph of every sample."""
    policy = FlowMatchingPolicy(nn.Linear(3 + 2 + 1, 2), action_dim=2)
    candidates = sample_candidates(policy, torch.zeros(5, 3), 4)
    assert not candidates.requires_grad
    assert len(candidates.flatten(0, 1).unique(dim=0)) == 5 * 4
    assert sample_candidates(policy, torch.zeros(0, 3), 4).shape == (0, 4, 2)


def test_a_policy_of_several_outputs():
    with pytest.raises(TypeError, match="policy must return one tensor.*got tuple"):
        sample_candidates(lambda x: (x, x), torch.zeros(5, 3), 2)


def test_a_policy_is_asked_for_random_actions():
    modes = []
    sample_candidates(lambda x: modes.append(exploration_type()) or x, torch.zeros(1, 3), 2)
    assert [mode.name for mode in modes] == ["RANDOM"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_candidates": 0}, "num_candidates must be an integer >= 1, got 0"),
        ({"max_rows": 0}, "max_rows must be an integer >= 1, got 0"),
        (
            {"policy": lambda x: x[:, :1]},
            r"actions of the shape \(7, 4, 'act'\) for observations \(7, 4, 3\), got \(7, 1, 3\)",
        ),
        ({"policy": lambda x: x.flatten()}, r"got \(84,\)"),
    ],
)
def test_bad_input(options, message):
    options = {"policy": numbered, "num_candidates": 4, **options}
    with pytest.raises(ValueError, match=message):
        sample_candidates(observation=torch.zeros(7, 3), **options)


@needs_ogbench
class TestReplay:
    @pytest.mark.parametrize("chunk_size, n_step", [(1, 1), (1, 3), (2, 2)])
    def test_samples_hold_those_of_their_next_state(self, make, chunk_size, n_step):
        data = make(batch_size=16, n_step=n_step, chunk_size=chunk_size)
        assert "candidates" not in data.sample()["next"].keys()

        def policy(observation):  # of three numbers for each step of a chunk
            return numbered(observation).repeat_interleave(chunk_size, -1)

        data.keep_candidates(policy, 4)
        sample = data.sample()
        candidates = sample["next", "candidates"]
        assert candidates.shape == (16, 4, chunk_size * 3)
        assert torch.equal(candidates, sample_candidates(policy, sample["next", "observation"], 4))
        data.keep_candidates(policy, 2)
        assert data[0]["next", "candidates"].shape == (2, chunk_size * 3)

    def test_actions_of_another_size(self, make):
        data = make(chunk_size=2)
        with pytest.raises(
            ValueError, match=r"chunks of 2 actions, \(50, 4, 6\), got \(50, 4, 3\)"
        ):
            data.keep_candidates(numbered, 4)
        assert "candidates" not in data.sample()["next"].keys()

    def test_transforms(self, make):
        """They may change observations: candidates are drawn before there are any."""
        data = make(batch_size=16)
        data.keep_candidates(numbered, 2)
        data.append_transform(ObservationNorm(0.0, 0.01, in_keys=["observation"]))
        assert data.sample()["next", "candidates"].shape == (16, 2, 3)
        with pytest.raises(RuntimeError, match="before transforms are appended, got .* with 1"):
            data.keep_candidates(numbered, 2)

    @pytest.mark.parametrize("kind", ["evor", "qc"])
    def test_losses_take_them(self, make, monkeypatch, kind):
        """Nothing is sampled from the policy then."""
        policy = FlowMatchingPolicy(nn.Linear(2 + 3 + 1, 3), action_dim=3)
        if kind == "evor":
            returns = ReturnFlow(nn.Linear(2 + 3 + 2, 1))
            loss = EVORLoss(policy, returns, next_action="improved", num_candidates=4)
        else:
            loss = QCLoss(policy, ScalarCritic(nn.Linear(2 + 3, 1)), num_candidates=4)
        data = make(batch_size=16)
        data.keep_candidates(policy, 4)
        monkeypatch.setattr(type(policy.module), "forward", None)
        losses = loss(data.sample())
        assert all(value.isfinite().all() for value in losses.values())


if __name__ == "__main__":
    pytest.main([__file__, *sys.argv[1:]])
