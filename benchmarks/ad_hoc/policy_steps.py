# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What evaluations of a base policy's flow buy and cost, by solver.

    python benchmarks/ad_hoc/policy_steps.py --updates 10
    python benchmarks/ad_hoc/policy_steps.py --agents <run>/agents/*.pt --num-transitions 1000000

Gaussian policies have a closed form: a flow of few steps scales the noise by less than their
deviation. Policies of ``many.py`` are compared, at states of their data, with 100 midpoint steps:
the deviation that is kept, the error from the same noise, and the energy distance of the two laws
(Szekely and Rizzo, 2013), for which two samples of the 100 steps are a zero. Updates of the losses
that sample the policy are timed in turn, on one thread, with the networks of the mazes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from nodes_error import Mixtures
from torch import Tensor

from torchrl_evor import FlowMatchingPolicy, OGBenchExperienceReplay
from torchrl_evor.modules.functional import integrate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _updates  # noqa: E402

SETTINGS = [
    *(("euler", steps) for steps in (4, 6, 10, 20, 40)),
    *(("midpoint", steps) for steps in (2, 4, 6, 10)),
]


def gaussian_deviation(deviation: float, solver: str, num_steps: int) -> float:
    """Deviation that the flow of a Gaussian policy gives, as a share of the policy's own."""
    policy = Mixtures([[1.0]], [[0.0]], [[deviation]])
    one = torch.ones(1, 1, dtype=torch.float64)
    return (integrate(policy.velocity, one, num_steps, solver) / deviation).item()


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Between samples ``[S, N, act]`` of two laws of each state, without bias, mean over states."""

    def between(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y).mean()

    unbiased = first.shape[1] / (first.shape[1] - 1)  # a sample is no distance from itself
    within = (between(first, first) + between(second, second)) * unbiased
    return (2 * between(first, second) - within).item()


@torch.no_grad()
def compare(policy: FlowMatchingPolicy, observation: Tensor, num_samples: int) -> list[tuple]:
    """Deviation kept, error and energy distance of each of ``SETTINGS``."""
    model = policy.module
    states = observation.unsqueeze(1).expand(-1, num_samples, -1)
    noises = torch.randn(2, *states.shape[:-1], model.action_dim)
    model.num_steps, model.solver = 200, "midpoint"
    exact, other = (model(states, noise) for noise in noises)
    deviation = exact.std(1).mean()
    rows = []
    for model.solver, model.num_steps in SETTINGS:
        action = model(states, noises[0])
        error = (action - exact).square().mean().sqrt() / deviation
        kept = action.std(1).mean() / deviation
        rows.append((kept.item(), error.item(), energy_distance(action, other)))
    return rows


def time_updates(repeats: int) -> None:
    """Prints median milliseconds of an update, and how many times those of ten Euler steps."""
    shapes = _updates.MAZE
    losses = {
        "EVOR, next action of the policy": lambda: _updates.make_evor_loss(shapes),
        "EVOR, best of 4": lambda: _updates.make_evor_loss(shapes, next_action="improved"),
        "Q-chunking, best of 4": lambda: _updates.make_qc_loss(shapes, num_candidates=4),
        "Q-chunking, best of 32": lambda: _updates.make_qc_loss(shapes),
    }
    settings = [("euler", 10), ("midpoint", 10), ("midpoint", 6), ("midpoint", 4)]
    for name, make in losses.items():
        updates = []
        for solver, steps in settings:
            loss = make()
            if name.startswith("EVOR"):
                loss.value_network.num_steps, loss.value_network.solver = 4, "midpoint"
            flow = loss.actor_network.module
            flow.num_steps, flow.solver = steps, solver
            updates.append(_updates.make_update(loss, shapes, torch.device("cpu")))
        medians = _updates.time_in_turn(updates, repeats)
        print(f"{name}: ms an update")
        for (solver, steps), median in zip(settings, medians):
            print(f"  {solver:8} {steps:3}  {median:6.1f}  {medians[0] / median:.2f}")


def study_agent(path: Path, num_transitions: int, num_states: int, num_samples: int) -> None:
    """Prints what :func:`compare` says of the base policy in an agent file."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sota-implementations" / "evor"))
    import agents

    content = agents.read(path)
    data = OGBenchExperienceReplay(
        f"{content['env']}-singletask-task{content['task']}-v0",
        source="local",
        num_transitions=num_transitions,
        batch_size=num_states,
    )
    policy = agents.build({**content, "method": "bc"})
    rows = compare(policy, data.sample()["observation"], num_samples)
    print(f"{path}: deviation kept, error in deviations, energy distance")
    for (solver, steps), row in zip(SETTINGS, rows):
        print(f"  {solver:8} {steps:3}  " + "  ".join(f"{value:.4f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=Path, nargs="*", default=[], help="agent files of many.py")
    parser.add_argument("--num-transitions", type=int, help="of the local collection")
    parser.add_argument("--states", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--updates", type=int, default=0, help="timed, after two more; 0: none")
    args = parser.parse_args()
    torch.manual_seed(0)
    print("Deviation that is kept, of Gaussian policies of deviation 0.1, 0.3 and 0.6")
    for solver, steps in SETTINGS:
        kept = [gaussian_deviation(deviation, solver, steps) for deviation in (0.1, 0.3, 0.6)]
        print(f"  {solver:8} {steps:3}  " + "  ".join(f"{share:.3f}" for share in kept))
    if args.updates:
        torch.set_num_threads(1)
        time_updates(args.updates)
    for path in args.agents:
        study_agent(path, args.num_transitions, args.states, args.samples)


if __name__ == "__main__":
    main()
