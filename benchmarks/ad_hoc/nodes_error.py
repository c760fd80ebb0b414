# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Error of Q* from few nodes and few steps, on known laws and on trained flows.

    python benchmarks/ad_hoc/nodes_error.py --out results
    python benchmarks/ad_hoc/nodes_error.py --out results --agents agent.pt  # of the recipe

Known laws are mixtures of Gaussians of unit deviation, with their exact velocity and the closed
form of Q*. Errors are in units of the deviation of the law, root mean square over laws or
candidates. Writes ``nodes_error.csv``; all of it runs in about a minute on one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from torchrl_evor import ReturnFlow, VelocityMLP
from torchrl_evor.modules.functional import gauss_hermite_normal, log_mean_exp, stratified_normal

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TAUS = (0.1, 0.3, 1.0, math.inf)  # in deviations of the law
MANY = 4096
# Weights, means and deviations before normalisation.
LAWS = {
    "gaussian": ([1.0], [0.0], [1.0]),
    "bimodal": ([0.6, 0.4], [-1.0, 1.0], [0.1, 0.1]),
    "skewed": ([0.1, 0.3, 0.6], [-3.0, -1.0, 0.3], [1.0, 0.5, 0.2]),
    "skewed up": ([0.1, 0.3, 0.6], [3.0, 1.0, -0.3], [1.0, 0.5, 0.2]),
}


class Mixtures:
    """Laws of ``P`` candidates: mixtures of ``C`` Gaussians, and the exact flow to them."""

    def __init__(self, weights, means, deviations):
        tensors = (torch.as_tensor(x, dtype=torch.float64) for x in (weights, means, deviations))
        self.weights, self.means, self.deviations = torch.broadcast_tensors(*tensors)

    @classmethod
    def unit(cls, weights, means, deviations) -> Mixtures:
        """One law of mean zero and deviation one."""
        w, m, s = (torch.tensor([x], dtype=torch.float64) for x in (weights, means, deviations))
        mean = (w * m).sum()
        scale = (w * (s**2 + (m - mean) ** 2)).sum().sqrt()
        return cls(w, (m - mean) / scale, s / scale)

    def velocity(self, z: Tensor, time: float) -> Tensor:
        """``E[data - noise | z_t = z]`` of the straight path, ``[P, N]``."""
        z = z.unsqueeze(-1)
        m, s = self.means.unsqueeze(-2), self.deviations.unsqueeze(-2)
        variance = (1 - time) ** 2 + (time * s) ** 2
        offset = z - time * m
        log_share = -0.5 * (offset**2 / variance + variance.log())
        share = (log_share + self.weights.log().unsqueeze(-2)).softmax(-1)
        speed = m + (time * s**2 - (1 - time)) / variance * offset
        return (share * speed).sum(-1)

    def q_star(self, tau: float) -> Tensor:
        """Closed form, ``[P]``."""
        if math.isinf(tau):
            return (self.weights * self.means).sum(-1)
        exponent = self.means / tau + 0.5 * (self.deviations / tau) ** 2
        return tau * torch.logsumexp(self.weights.log() + exponent, -1)

    def quantiles(self, noise: Tensor) -> Tensor:
        """Exact end points of ``noise`` ``[P, N]``, by bisection of the distribution function."""
        target = torch.special.ndtr(noise)
        low, high = torch.full_like(noise, -40.0), torch.full_like(noise, 40.0)
        for _ in range(70):
            middle = (low + high) / 2
            place = (middle.unsqueeze(-1) - self.means.unsqueeze(-2)) / self.deviations.unsqueeze(
                -2
            )
            below = (self.weights.unsqueeze(-2) * torch.special.ndtr(place)).sum(-1) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class Trained:
    """Candidates of one state under a trained return flow."""

    def __init__(self, returns: ReturnFlow, observation: Tensor, action: Tensor):
        self.returns, self.observation, self.action = returns.double(), observation, action

    @torch.no_grad()
    def velocity(self, z: Tensor, time: float) -> Tensor:
        shape = (*z.shape, -1)
        return self.returns.velocity(
            self.observation.expand(shape),
            self.action.unsqueeze(-2).expand(shape),
            z.unsqueeze(-1),
            torch.full_like(z, time).unsqueeze(-1),
        ).squeeze(-1)


def steps_of(name: str, number: int) -> list[float]:
    """Times 0 to 1 of ``number`` steps: even, or finer towards one end."""
    even = [k / number for k in range(number + 1)]
    if name.startswith("late"):
        return [1 - (1 - t) ** float(name[4:]) for t in even]
    return [t ** float(name[5:]) for t in even] if name.startswith("early") else even


def integrate(flow, noise: Tensor, times: list[float], method: str = "euler") -> Tensor:
    z = noise
    for t, after in zip(times[:-1], times[1:]):
        h = after - t
        middle = z if method == "euler" else z + 0.5 * h * flow.velocity(z, t)
        z = z + h * flow.velocity(middle, t if method == "euler" else t + 0.5 * h)
    return z


def make_nodes(kind: str, number: int, shape: tuple[int, ...], generator) -> tuple:
    """Noise ``[*shape, number]`` and log weights or ``None``."""
    if kind == "random":
        noise = torch.randn(*shape, number, dtype=torch.float64, generator=generator)
        return noise, None
    if kind == "stratified":
        return stratified_normal(number, dtype=torch.float64).expand(*shape, number), None
    if kind == "jittered":
        place = torch.arange(number) + torch.rand(*shape, number, generator=generator).double()
        return torch.special.ndtri((place / number).clamp(1e-12, 1 - 1e-12)), None
    noise, log_weights = gauss_hermite_normal(number, dtype=torch.float64)
    return noise.expand(*shape, number), log_weights


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def study_nodes(name: str, end_points, candidates: int, scale, rows: list, repeats: int = 64):
    """Error of Q* against 4,096 stratified nodes, for every kind and number of nodes."""
    generator = torch.Generator().manual_seed(0)
    many = end_points(make_nodes("stratified", MANY, (candidates,), generator)[0])
    for kind in ("random", "jittered", "stratified", "hermite"):
        for number in NODES:
            if kind == "hermite" and number > 128:
                continue
            times = repeats if kind in ("random", "jittered") else 1
            errors = {tau: [] for tau in TAUS}
            for _ in range(times):
                noise, log_weights = make_nodes(kind, number, (candidates,), generator)
                z = end_points(noise)
                for tau in TAUS:
                    value = _value(z, tau * scale, log_weights)
                    errors[tau].append((value - _value(many, tau * scale, None)) / scale)
            for tau in TAUS:
                error = rms(torch.stack(errors[tau]))
                rows.append(_row("nodes", name, kind, number, 0, tau, error))


def _value(z: Tensor, tau, log_weights) -> Tensor:
    return log_mean_exp(z, float(tau), log_weights=log_weights)


def _row(study, law, kind, nodes, evaluations, tau, error, agreement="") -> dict:
    return {
        "study": study,
        "law": law,
        "kind": kind,
        "nodes": nodes,
        "evaluations": evaluations,
        "tau": tau,
        "error": f"{error:.3e}",
        "agreement": agreement,
    }


def study_steps(name: str, flow, candidates: int, scale, want, rows: list) -> None:
    """Error of Q* of few steps, ``want(noise)`` being the end points of infinitely many."""
    noise = stratified_normal(256, dtype=torch.float64).expand(candidates, 256)
    exact = want(noise)
    for kind in ("euler", "euler late1.5", "euler late2", "euler early1.5", "midpoint"):
        method, _, spacing = kind.partition(" ")
        for evaluations in (2, 4, 6, 8, 10, 20):
            number = evaluations // (2 if method == "midpoint" else 1)
            z = integrate(flow, noise, steps_of(spacing, number), method)
            for tau in TAUS:
                error = (_value(z, tau * scale, None) - _value(exact, tau * scale, None)) / scale
                rows.append(_row("steps", name, kind, 256, evaluations, tau, rms(error)))


def study_rounds(name: str, flows: list, scale: float, rows: list, num_steps: int = 10) -> None:
    """Choice of the best of 32 candidates by few nodes for all and 64 for the best of them.

    ``error`` is the mean loss of value of the choice, against 256 nodes for all.
    """
    even = steps_of("", num_steps)
    for tau in TAUS:
        want, scores = [], {}
        for flow in flows:
            ends = {}
            for number in (1, 2, 4, 8, 16, 64, 256):
                noise = stratified_normal(number, dtype=torch.float64).expand(32, number)
                ends[number] = _value(integrate(flow, noise, even), tau * scale, None)
            want.append(ends[256])
            for number in (1, 2, 4, 8, 16, 64):
                scores.setdefault((number, 0), []).append(ends[number])
            for number, kept in ((1, 8), (2, 4), (2, 8), (4, 4), (4, 8), (8, 4)):
                score = torch.full_like(ends[64], -math.inf)
                best = ends[number].topk(kept).indices
                score[best] = ends[64][best]
                scores.setdefault((number, kept), []).append(score)
        want = torch.stack(want)
        for (number, kept), values in scores.items():
            chosen = torch.stack(values).argmax(-1, keepdim=True)
            loss = (want.amax(-1) - want.gather(-1, chosen).squeeze(-1)).mean().item() / scale
            agreement = (chosen.squeeze(-1) == want.argmax(-1)).double().mean().item()
            kind = f"{number} for all" + (f", 64 for {kept}" if kept else "")
            cost = 32 * number + 64 * kept
            row = _row("rounds", name, kind, cost, cost * num_steps, tau, loss, f"{agreement:.3f}")
            rows.append(row)


def random_laws(number: int) -> list[Mixtures]:
    """Candidates of ``number`` states, whose laws differ a little in place, weights and width."""
    generator = torch.Generator().manual_seed(1)
    flows = []
    for _ in range(number):
        shift = 0.3 * torch.randn(32, 1, generator=generator).double()
        share = torch.sigmoid(0.7 * torch.randn(32, 1, generator=generator).double())
        width = 0.2 + 0.3 * torch.rand(32, 2, generator=generator).double()
        means = torch.tensor([-0.8, 0.8], dtype=torch.float64) + shift
        flows.append(Mixtures(torch.cat([share, 1 - share], 1), means, width))
    return flows


def train(steps: int) -> ReturnFlow:
    """A return flow fitted to laws of two modes whose weights depend on the action."""
    torch.manual_seed(0)
    returns = ReturnFlow(VelocityMLP(4 + 2 + 2, hidden_sizes=(128,) * 3, layer_norm=True))
    optimizer = torch.optim.Adam(returns.parameters(), lr=1e-3)
    for _ in range(steps):
        x, a = torch.randn(256, 4), 2 * torch.rand(256, 2) - 1
        upper = torch.rand(256, 1) < torch.sigmoid(2 * a[:, :1])
        data = torch.where(upper, 1.0, -1.0) + 0.3 * a[:, 1:] + 0.2 * torch.randn(256, 1)
        noise, time = torch.randn(256, 1), torch.rand(256, 1)
        point = (1 - time) * noise + time * data
        loss = (returns.velocity(x, a, point, time) - (data - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return returns


def trained_states(returns: ReturnFlow, number: int) -> list[Trained]:
    generator = torch.Generator().manual_seed(2)
    return [
        Trained(
            returns,
            torch.randn(4, generator=generator).double(),
            2 * torch.rand(32, 2, generator=generator).double() - 1,
        )
        for _ in range(number)
    ]


def agent_states(path: Path, number: int) -> list[Trained]:
    """First states of episodes, with candidates of the agent's own base policy."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "sota-implementations" / "evor"))
    import agents

    from torchrl_evor import OGBenchEnv

    content = agents.read(path)
    actor = agents.build(content, num_candidates=32)
    env = OGBenchEnv(f"{content['env']}-singletask-task{content['task']}-v0")
    states = [env.reset() for _ in range(number)]
    with torch.no_grad():
        pairs = [(state["observation"], actor.candidates(state)) for state in states]
    return [Trained(actor.returns, x.double(), a.double()) for x, a in pairs]


def study_trained(name: str, flows: list[Trained], rows: list) -> None:
    """All three studies on a network; its own ten Euler steps are what nodes are measured by."""
    even, fine = steps_of("", 10), steps_of("", 100)
    flow = flows[0]
    noise = stratified_normal(64, dtype=torch.float64).expand(len(flow.action), 64)
    scale = integrate(flow, noise, even).std(-1).mean().item()

    def ends(noise):
        return integrate(flow, noise, even)

    study_nodes(name, ends, len(flow.action), scale, rows, repeats=8)
    study_steps(
        name, flow, len(flow.action), scale, lambda n: integrate(flow, n, fine, "midpoint"), rows
    )
    study_rounds(name, flows, scale, rows)


def show(rows: list) -> None:
    """The table of each study, law by law."""
    for study in ("nodes", "steps", "rounds"):
        column = "evaluations" if study == "steps" else "nodes"
        print(f"\n{study}: error in deviations of the law, by tau and {column}")
        for law in dict.fromkeys(row["law"] for row in rows):
            some = [row for row in rows if row["study"] == study and row["law"] == law]
            for tau in TAUS if some else ():
                for kind in dict.fromkeys(row["kind"] for row in some):
                    found = [row for row in some if row["kind"] == kind and row["tau"] == tau]
                    cells = [
                        f"{row[column]}: {float(row['error']):.0e} {row['agreement']}".strip()
                        for row in found
                    ]
                    print(f"{law:9} tau {tau:<4} {kind:20}", "  ".join(cells))


def save(rows: list, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".nodes_error.csv.part"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, out / "nodes_error.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--agents", type=Path, nargs="*", default=[])
    parser.add_argument("--train-steps", type=int, default=1500)
    parser.add_argument("--states", type=int, default=32, help="choices per study of rounds")
    arguments = parser.parse_args()
    rows: list = []
    for name, parameters in LAWS.items():
        law = Mixtures.unit(*parameters)
        study_nodes(name, law.quantiles, 1, 1.0, rows)
        study_steps(name, law, 1, 1.0, law.quantiles, rows)
    study_rounds("mixtures", random_laws(4 * arguments.states), 1.0, rows)
    if arguments.train_steps:
        flows = trained_states(train(arguments.train_steps), arguments.states)
        study_trained("trained", flows, rows)
    for path in arguments.agents:
        study_trained(path.stem, agent_states(path, arguments.states), rows)
    save(rows, arguments.out)
    show(rows)


if __name__ == "__main__":
    main()
