# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One decision on a CPU, every path in turn, so that a busy machine slows all of them alike.

    python benchmarks/ad_hoc/kernel_cpu.py --out results

32 candidates, 16 or 64 stratified nodes, ten Euler steps, 4x512, with one and with all threads.
Prints the best and the median time, how many times faster than the module, and the relative error.
With one thread the time is that of the processor, so that other processes do not count.
``--seeds 12`` does the same for other weights and inputs, at 16 nodes with LayerNorm only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_variants import (  # noqa: E402
    OPTIONS,
    Problem,
    evor_select,
    make_network,
    naive,
    public,
)


def frozen(problem: Problem, **options):
    packed = problem.packed.freeze()

    def call():
        return evor_select(packed, *problem.inputs(), **OPTIONS, return_samples=True, **options)

    return call


PATHS = {
    "module": lambda p: naive(p, "fp32"),
    "fused": public,
    "fused 1e-5": lambda p: public(p, tolerance=1e-5),
    "fused 1e-5 frozen": lambda p: frozen(p, tolerance=1e-5),
    "fused 1e-3": lambda p: public(p, tolerance=1e-3),
}


def problem_of(nodes: int, layer_norm: bool, seed: int) -> Problem:
    problem = Problem((1, 32, nodes), layer_norm, "cpu", stratified=True)
    if seed:
        torch.manual_seed(seed)
        problem.network.load_state_dict(make_network(layer_norm).state_dict())
        problem.observation = torch.randn_like(problem.observation)
        problem.action = torch.randn_like(problem.action)
    return problem


def errors_of(call, problem: Problem) -> dict:
    """Relative to float64: of all end points, of those of the worst candidate, of all Q*."""
    _, _, q, z = call()
    missed, want = z.double() - problem.want, problem.want
    want_q = torch.logsumexp(want, -1) - math.log(want.shape[-1])
    return {
        "error": (missed.norm() / want.norm()).item(),
        "worst": (missed.norm(dim=-1) / want.norm(dim=-1)).max().item(),
        "error_q": ((q.double() - want_q).norm() / want_q.norm()).item(),
    }


def measure(problem: Problem, rounds: int) -> dict:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = {name: make(problem) for name, make in PATHS.items()}
    seconds = {name: [] for name in calls}
    errors = {name: errors_of(call, problem) for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    best = {name: min(found) for name, found in seconds.items()}
    median = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        name: {
            "best_ms": 1e3 * best[name],
            "median_ms": 1e3 * median[name],
            "speedup_best": best["module"] / best[name],
            "speedup_median": median["module"] / median[name],
            **errors[name],
        }
        for name in calls
    }


def show(row: dict) -> None:
    kind = "LayerNorm" if row["layer_norm"] else "plain"
    print(
        f"threads {row['threads']} nodes {row['nodes']} seed {row['seed']} {kind:9}"
        f" {row['path']:18} best {row['best_ms']:7.1f} ms {row['speedup_best']:5.2f}x"
        f"  median {row['median_ms']:7.1f} ms {row['speedup_median']:5.2f}x"
        f"  error {row['error']:.1e} worst {row['worst']:.1e} Q* {row['error_q']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = [(nodes, kind, 0) for nodes in (16, 64) for kind in (True, False)]
    if arguments.seeds > 1:
        settings = [(16, True, seed) for seed in range(arguments.seeds)]
    rows = []
    for threads in dict.fromkeys(arguments.threads):
        torch.set_num_threads(threads)
        for nodes, layer_norm, seed in settings:
            with torch.no_grad():
                rounds = arguments.rounds if nodes == 16 else 5
                results = measure(problem_of(nodes, layer_norm, seed), rounds)
            for name, row in results.items():
                setting = {"threads": threads, "nodes": nodes, "layer_norm": layer_norm}
                rows.append({**setting, "seed": seed, "path": name, **row})
                show(rows[-1])
    partial = arguments.out / ".kernel_cpu.json.part"
    partial.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    os.replace(partial, arguments.out / "kernel_cpu.json")


if __name__ == "__main__":
    main()
