# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Windows over transitions: n-step returns, chunks, storage."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from _ogbench_cases import arrays

from torchrl_evor.data import (
    WindowStorage,
    make_windows,
    ogbench_arrays_to_tensordict,
)
from torchrl_evor.data.datasets import (
    _ogbench_windows,
)
from torchrl_evor.data.datasets._ogbench_windows import discounted_sums, empirical_returns


def slow_windows(data, n_step, chunk_size, gamma):
    """The definition, one transition at a time: start -> what the window holds."""
    episode, found = data["episode"].tolist(), {}
    reward = data["next", "reward"].double().flatten().tolist()
    terminal = data["next", "terminated"].flatten().tolist()
    for start in range(len(episode)):
        last = max(t for t in range(len(episode)) if episode[t] == episode[start])
        if start + chunk_size - 1 > last:
            continue  # its own chunk is incomplete
        total, end = 0.0, None
        for k in range(n_step * chunk_size):
            t = start + k
            if t > last:
                break
            total += gamma**k * reward[t]
            end = t
            # the window may stop here, if this is its last step or the next chunk's last chance
            if terminal[t] or t + chunk_size > last:
                break
        # going on to a terminal needs no next chunk
        later = [
            t for t in range(end, min(start + n_step * chunk_size - 1, last) + 1) if terminal[t]
        ]
        if later:
            end = later[0]
            total = sum(gamma ** (t - start) * reward[t] for t in range(start, end + 1))
        elif end < start + chunk_size - 1:
            continue  # no whole next chunk, and no terminal
        found[start] = (end, total, terminal[end], terminal[end] or end == last)
    return found


class TestWindows:
    def test_discounted_sums_do_not_cancel(self):
        """The last step's reward survives beside an early one that is 1e9 times as large."""
        reward = np.full(1000, 1e-3)
        reward[0] = 1e6
        steps = np.append(1000, 999 - np.arange(999))
        sums = discounted_sums(reward, steps, 1.0)
        np.testing.assert_allclose(sums[1:], 1e-3 * steps[1:], rtol=1e-12)
        np.testing.assert_allclose(sums[0], 1e6 + 0.999, rtol=1e-12)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
    @pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
    def test_discounted_sums(self, gamma, size):
        rng = np.random.default_rng(size)
        reward = rng.normal(size=size)
        steps = rng.integers(0, size - np.arange(size) + 1)
        slow = [sum(gamma**k * reward[t + k] for k in range(m)) for t, m in enumerate(steps)]
        np.testing.assert_allclose(discounted_sums(reward, steps, gamma), slow, atol=1e-12)

    def test_three_steps_by_hand(self):
        """Rewards 1, 2, 4, 8, 16 in one trajectory, gamma = 1/2, n = 3."""
        raw = arrays(lengths=(5,), rewards=2.0 ** np.arange(6))
        windows = make_windows(ogbench_arrays_to_tensordict(raw), 3, 1, 0.5)
        assert windows.start.tolist() == [0, 1, 2, 3, 4]
        assert windows.end.tolist() == [2, 3, 4, 4, 4]
        # the last two are cut by the end: 8 + 16/2 and 16
        assert windows.reward.tolist() == [3, 6, 12, 16, 16]
        assert windows.done.tolist() == [False, False, True, True, True]
        assert not windows.terminated.any()

    def test_a_terminal_stops_windows_by_hand(self):
        """As before, but transition 2 is terminal: the trajectory goes on behind it."""
        raw = arrays(lengths=(5,), terminals_at=(2,), rewards=2.0 ** np.arange(6))
        windows = make_windows(ogbench_arrays_to_tensordict(raw), 3, 1, 0.5)
        assert windows.end.tolist() == [2, 2, 2, 4, 4]
        assert windows.reward.tolist() == [3, 4, 4, 16, 16]
        assert windows.terminated.tolist() == [True, True, True, False, False]

    def test_chunks_by_hand(self):
        """Eight transitions a0..a7 (and a8 of the last state), chunks of three."""
        raw = arrays(lengths=(8,), rewards=np.ones(9))
        raw["actions"] = np.repeat(np.arange(9, dtype=np.float32)[:, None] / 10, 2, axis=1)
        data = ogbench_arrays_to_tensordict(raw)
        storage = WindowStorage(data, n_step=1, chunk_size=3, gamma=0.5)
        # transition 3 acts a3..a5, and a6..a8 follow; 4 has no whole next chunk
        assert len(storage) == 4
        sample = storage[torch.tensor([0, 3])]
        expected = torch.tensor([[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]) / 10
        torch.testing.assert_close(sample["action"], expected)
        torch.testing.assert_close(sample["next", "action"], expected + 0.3)
        assert sample["next", "reward"].tolist() == [[1.75], [1.75]]
        assert sample["steps_to_next_obs"].tolist() == [[3], [3]]
        assert sample["next", "observation"][:, 0].tolist() == [3, 6]

    @pytest.mark.parametrize("n_step", [1, 2, 3, 7, 1000])
    @pytest.mark.parametrize("chunk_size", [1, 2, 5])
    @pytest.mark.parametrize("terminals_at", [(), (4, 13, 14, 30)])
    def test_against_the_definition(self, n_step, chunk_size, terminals_at):
        raw = arrays(lengths=(6, 1, 12, 3, 9), terminals_at=terminals_at)
        data = ogbench_arrays_to_tensordict(raw)
        slow = slow_windows(data, n_step, chunk_size, 0.9)
        assert slow
        sample = WindowStorage(data, n_step=n_step, chunk_size=chunk_size, gamma=0.9)[:]
        start = torch.tensor(list(slow))
        end, reward, terminated, done = (torch.tensor(column) for column in zip(*slow.values()))
        torch.testing.assert_close(sample["observation"], data["observation"][start])
        torch.testing.assert_close(sample["next", "observation"], data["next", "observation"][end])
        assert sample["steps_to_next_obs"].squeeze(-1).tolist() == (end - start + 1).tolist()
        torch.testing.assert_close(sample["next", "reward"].squeeze(-1), reward.float())
        assert torch.equal(sample["next", "terminated"].squeeze(-1), terminated)
        assert torch.equal(sample["next", "done"].squeeze(-1), done)
        assert torch.equal(sample["next", "truncated"].squeeze(-1), done & ~terminated)
        for row, (first, last) in enumerate(zip(start.tolist(), end.tolist())):
            chunk = data["action"][first : first + chunk_size].flatten()
            assert torch.equal(sample["action"][row], chunk)
            if not terminated[row]:  # the next chunk is whole and of the same trajectory
                following = data["next", "action"][last : last + chunk_size].flatten()
                assert torch.equal(sample["next", "action"][row], following)
                assert data["episode"][last + chunk_size - 1] == data["episode"][first]

    def test_any_length_beyond_the_trajectory_is_its_rest(self):
        data = ogbench_arrays_to_tensordict(arrays(lengths=(6, 12)))
        for n_step in (12, 10**9):
            windows = make_windows(data, n_step, 1, 0.9)
            assert windows.end.tolist() == [5] * 6 + [17] * 12
            assert windows.done.all()

    def test_returns_without_terminals_go_on_with_the_mean_reward(self):
        raw = arrays(lengths=(4,), rewards=-np.ones(5))
        returns = empirical_returns(ogbench_arrays_to_tensordict(raw), 0.9)
        torch.testing.assert_close(returns, torch.full((4,), -10.0, dtype=torch.float64))

    def test_returns_end_at_terminals(self):
        raw = arrays(lengths=(4,), terminals_at=(2,), rewards=-np.ones(5))
        returns = empirical_returns(ogbench_arrays_to_tensordict(raw), 1.0)
        assert returns.tolist() == [-3, -2, -1, -1]

    def test_no_window(self):
        data = ogbench_arrays_to_tensordict(arrays(lengths=(4, 4)))
        with pytest.raises(ValueError, match="chunk_size=3 leaves no window.*5 transitions"):
            WindowStorage(data, chunk_size=3)

    @pytest.mark.parametrize("index", [2, [0, 2], slice(1, 3), np.array([1, 0]), torch.tensor([2])])
    def test_every_kind_of_index(self, index):
        data = ogbench_arrays_to_tensordict(arrays())
        storage = WindowStorage(data, n_step=2)
        rows = torch.arange(5)[torch.as_tensor(index) if not isinstance(index, slice) else index]
        torch.testing.assert_close(storage[index]["observation"], data["observation"][rows])
        assert storage[index].shape == rows.shape

    @pytest.mark.parametrize("index", [[], slice(2, 2)])
    def test_empty_index(self, index):
        storage = WindowStorage(ogbench_arrays_to_tensordict(arrays()), n_step=2, chunk_size=2)
        assert storage[index]["next", "action"].shape[0] == 0

    def test_read_only(self):
        data = ogbench_arrays_to_tensordict(arrays())
        storage = WindowStorage(data)
        with pytest.raises(RuntimeError, match="cannot be written"):
            storage[0] = data[0]


@pytest.mark.parametrize("n_step, chunk_size", [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("piece", [1, 7, 20])
def test_pieces_of_the_data_give_the_windows_of_the_whole(monkeypatch, piece, n_step, chunk_size):
    raw = arrays(lengths=(5, 12, 3, 1, 6, 9), terminals_at=(7, 30))
    data = ogbench_arrays_to_tensordict(raw)
    whole = make_windows(data, n_step, chunk_size, 0.9), empirical_returns(data, 0.9)
    monkeypatch.setattr(_ogbench_windows, "_PIECE", piece)
    pieces = make_windows(data, n_step, chunk_size, 0.9), empirical_returns(data, 0.9)
    for key, want in vars(whole[0]).items():
        assert torch.equal(getattr(pieces[0], key), want)
    assert torch.equal(pieces[1], whole[1])


class TestWindowStorage:
    data = ogbench_arrays_to_tensordict(arrays(lengths=(40, 10)))

    @pytest.mark.parametrize("index", [3, -1, slice(None), slice(2, 9, 3), torch.tensor(3), [1, 2]])
    def test_items_are_copies(self, index):
        storage = WindowStorage(self.data.clone(), n_step=2)
        before, rows = storage[:], torch.arange(len(storage))
        expected = before[rows[index]]
        item = storage[index]
        assert (item == expected).all() and item.shape == rows[index].shape
        item.apply_(lambda tensor: tensor.zero_())
        assert (storage[:] == before).all()

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"n_step": 0}, "n_step must be an integer >= 1, got 0"),
            ({"n_step": 2.5}, "n_step must be an integer >= 1, got 2.5"),
            ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
            ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
            ({"gamma": math.nan}, r"gamma must lie in \[0, 1\], got nan"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            WindowStorage(self.data, **options)

    @pytest.mark.parametrize("gamma", [0, 1])
    def test_the_ends_of_gamma(self, gamma):
        """A window of two earns its first reward alone, or both."""
        sample = WindowStorage(self.data, n_step=2, gamma=gamma)[0]
        reward = self.data["next", "reward"]
        assert sample["steps_to_next_obs"] == 2
        assert sample["next", "reward"] == reward[0] + gamma * reward[1]

    @pytest.mark.parametrize("key", ["episode", ("next", "action"), ("next", "reward")])
    def test_missing_entry(self, key):
        with pytest.raises(KeyError) as caught:
            WindowStorage(self.data.exclude(key))
        assert f"data must have the entry {key!r}, got [" in caught.value.args[0]

    @pytest.mark.parametrize("name", ["reward", "terminated"])
    def test_several_numbers_of_a_transition(self, name):
        data = self.data.clone()
        data["next", name] = data["next", name].expand(-1, 2)
        with pytest.raises(ValueError, match=f"'{name}'.* must have one number .* 2\\)"):
            WindowStorage(data)

    def test_trajectories_in_pieces(self):
        data = self.data.clone()
        data["episode"] = torch.arange(len(data)) % 2
        with pytest.raises(ValueError, match="episode must number whole trajectories, got 2 num"):
            WindowStorage(data)


if __name__ == "__main__":
    pytest.main([__file__, *sys.argv[1:]])
