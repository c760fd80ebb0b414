# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OGBench's arrays as transitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from _ogbench_cases import arrays, needs_ogbench

from torchrl_evor.data import (
    ogbench_arrays_to_tensordict,
)


class TestConverter:
    """Two trajectories, s0..s3 and s4..s6: rows 3 and 6 are last states, not transitions."""

    def test_rows(self):
        raw = arrays(rewards=np.arange(7.0), masks=np.array([1.0, 0, 1, 0, 1, 1, 0]))
        data = ogbench_arrays_to_tensordict(raw)
        assert data.shape == (5,)

        def column(*key):
            return data[key][..., 0].tolist()

        assert column("observation") == [0, 1, 2, 4, 5]
        assert column("next", "observation") == [1, 2, 3, 5, 6]
        assert data["episode"].tolist() == [0, 0, 0, 1, 1]
        assert column("next", "reward") == [0, 1, 2, 4, 5]
        # masks end an episode inside its trajectory; those of rows 3 and 6 belong to no transition
        assert column("next", "terminated") == [False, True, False, False, False]
        assert column("next", "truncated") == [False, False, True, False, True]
        assert column("next", "done") == [False, True, True, False, True]
        np.testing.assert_array_equal(data["action"], raw["actions"][[0, 1, 2, 4, 5]])
        # also the last state of a trajectory has an action of the data
        np.testing.assert_array_equal(data["next", "action"], raw["actions"][[1, 2, 3, 5, 6]])

    def test_a_terminal_on_the_last_transition_is_no_truncation(self):
        data = ogbench_arrays_to_tensordict(arrays(lengths=(2,), terminals_at=(1,)))
        assert data["next", "terminated"].squeeze(-1).tolist() == [False, True]
        assert not data["next", "truncated"].any()

    def test_layout(self):
        data = ogbench_arrays_to_tensordict(arrays())
        for key in ("reward", "done", "terminated", "truncated"):
            assert data["next", key].shape == (5, 1)
        for key in ("done", "terminated", "truncated"):
            assert data[key].shape == (5, 1) and data[key].dtype == torch.bool
            assert not data[key].any()
        floats = ("observation", "action", ("next", "observation"), ("next", "reward"))
        assert all(data[key].dtype == torch.float32 for key in floats)
        assert data["episode"].dtype == torch.int64

    def test_actions_stay_inside_the_bounds(self):
        edge = np.full((7, 3), -1.0005, dtype=np.float32)
        edge[0] = 1.0
        action = ogbench_arrays_to_tensordict(arrays(actions=edge))["action"]
        assert action.abs().max() < 1
        torch.testing.assert_close(action[0], torch.full((3,), 1 - 1e-5), rtol=0, atol=1e-7)

    def test_numeric_terminals_and_wider_floats(self):
        wide = arrays()
        wide = {k: v.astype(np.float64) for k, v in wide.items()}
        expected = ogbench_arrays_to_tensordict(arrays())
        assert (ogbench_arrays_to_tensordict(wide) == expected).all()

    @needs_ogbench
    def test_agrees_with_ogbench(self, tmp_path):
        from ogbench import load_dataset as ogbench_load

        raw = arrays(lengths=(4, 1, 3))
        np.savez(tmp_path / "x.npz", **raw)
        theirs = ogbench_load(tmp_path / "x.npz")
        ours = ogbench_arrays_to_tensordict(raw)
        np.testing.assert_array_equal(ours["observation"], theirs["observations"])
        np.testing.assert_array_equal(ours["next", "observation"], theirs["next_observations"])
        np.testing.assert_allclose(ours["action"], theirs["actions"], atol=1e-5)
        np.testing.assert_array_equal(ours["next", "truncated"][:, 0], theirs["terminals"] == 1)


class TestConverterBadInput:
    @pytest.mark.parametrize("key", ["observations", "actions", "terminals", "rewards", "masks"])
    def test_missing(self, key):
        raw = arrays()
        del raw[key]
        with pytest.raises(KeyError, match=f"lacks the array '{key}'"):
            ogbench_arrays_to_tensordict(raw)

    @pytest.mark.parametrize("key", ["observations", "actions", "rewards", "masks"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_finite(self, key, bad):
        raw = arrays()
        raw[key][4] = bad
        with pytest.raises(ValueError, match=f"'{key}' must be finite, got .* in row 4"):
            ogbench_arrays_to_tensordict(raw)

    @pytest.mark.parametrize("key", ["observations", "actions", "rewards", "masks"])
    def test_unequal_lengths(self, key):
        raw = arrays()
        raw[key] = raw[key][:-1]
        with pytest.raises(ValueError, match=rf"'{key}' must have as many rows .*\(7\), got 6"):
            ogbench_arrays_to_tensordict(raw)

    @pytest.mark.parametrize(
        "key, value, error, message",
        [
            ("observations", np.zeros((7, 2), np.uint8), TypeError, "floating point, got.*uint8"),
            ("actions", np.zeros((7, 3), np.int64), TypeError, "'actions' must be floating"),
            ("actions", np.zeros((7, 0), np.float32), ValueError, r"one column, got.*\(7, 0\)"),
            ("observations", np.zeros(7, np.float32), ValueError, r"2 dimension.*shape \(7,\)"),
            ("terminals", np.full(7, 2), TypeError, "only 0 and 1"),
            ("terminals", np.array(["no"] * 7), TypeError, "'terminals' must be boolean"),
            ("terminals", np.zeros(7, bool), ValueError, "must end with a terminal"),
            ("terminals", np.ones(7, bool), ValueError, "empty: every row"),
            ("terminals", np.zeros(0, bool), ValueError, "dataset is empty"),
            ("masks", np.full(7, 0.5, np.float32), TypeError, "'masks' must be boolean"),
            ("actions", np.full((7, 3), 1.01, np.float32), ValueError, r"\[-1, 1\].*1.0"),
            ("next_observations", np.zeros((7, 2)), ValueError, "form that ogbench.load_dataset"),
        ],
    )
    def test_wrong(self, key, value, error, message):
        raw = arrays()
        raw[key] = value
        with pytest.raises(error, match=message):
            ogbench_arrays_to_tensordict(raw)


if __name__ == "__main__":
    pytest.main([__file__, *sys.argv[1:]])
