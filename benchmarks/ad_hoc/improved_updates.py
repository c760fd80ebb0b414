# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the best of four candidates in the target costs an update, and what makes it cheaper.

    python benchmarks/ad_hoc/improved_updates.py

Candidates that are drawn once and kept with the data, fewer nodes of each, fewer evaluations of the
flow for each node. Updates are timed in turn, on one thread, with the networks of the mazes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _updates  # noqa: E402

KEPT = replace(_updates.MAZE, candidates=4)


def evor(shapes: _updates.Shapes, **options) -> _updates.Update:
    loss = _updates.make_evor_loss(shapes, **options)
    loss.value_network.num_steps, loss.value_network.solver = 4, "midpoint"
    return _updates.make_update(loss, shapes, torch.device("cpu"))


def qc(shapes: _updates.Shapes) -> _updates.Update:
    loss = _updates.make_qc_loss(shapes, num_candidates=4)
    return _updates.make_update(loss, shapes, torch.device("cpu"))


def make_updates() -> dict[str, _updates.Update]:
    improved = {"next_action": "improved", "num_candidates": 4}
    updates = {"the data's next action": evor(_updates.MAZE, next_action="dataset")}
    for name, shapes in (("drawn", _updates.MAZE), ("kept", KEPT)):
        for nodes, steps in ((2, 4), (1, 4), (1, 2), (1, 1)):
            choice = {"num_samples": nodes, "num_steps": steps}
            updates[f"best of 4 {name}, {nodes} nodes, {steps} evaluations"] = evor(
                shapes, **improved, **choice
            )
        updates[f"Q-chunking, best of 4 {name}"] = qc(shapes)
    return updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="after two that are not counted")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    updates = make_updates()
    medians = _updates.time_in_turn(list(updates.values()), args.repeats)
    print("ms an update, and how many times that of the data's next action")
    for name, median in zip(updates, medians):
        print(f"  {name:46} {median:6.1f}  {median / medians[0]:.2f}")


if __name__ == "__main__":
    main()
