# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One decision on a CPU, every path in turn, so that a busy machine slows all of them alike.

    python benchmarks/ad_hoc/kernel_cpu.py --out results

32 candidates, 16 or 64 stratified nodes, ten Euler steps, 4x512, with one and with all threads.
Prints the best and the median time, how many times faster than the module, and the relative error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_variants import OPTIONS, Problem, evor_select, naive, public  # noqa: E402


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


def measure(problem: Problem, rounds: int) -> dict:
    calls = {name: make(problem) for name, make in PATHS.items()}
    seconds = {name: [] for name in calls}
    errors = {}
    for name, call in calls.items():
        errors[name] = ((call()[3].double() - problem.want).norm() / problem.want.norm()).item()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(found) for name, found in seconds.items()}
    median = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        name: {
            "best_ms": 1e3 * best[name],
            "median_ms": 1e3 * median[name],
            "speedup_best": best["module"] / best[name],
            "speedup_median": median["module"] / median[name],
            "error": errors[name],
        }
        for name in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for threads in dict.fromkeys(arguments.threads):
        torch.set_num_threads(threads)
        for nodes in (16, 64):
            for layer_norm in (True, False):
                problem = Problem((1, 32, nodes), layer_norm, "cpu", stratified=True)
                with torch.no_grad():
                    results = measure(problem, arguments.rounds if nodes == 16 else 5)
                for name, row in results.items():
                    setting = {"threads": threads, "nodes": nodes, "layer_norm": layer_norm}
                    kind = "LayerNorm" if layer_norm else "plain"
                    rows.append({**setting, "path": name, **row})
                    print(
                        f"threads {threads} nodes {nodes} {kind:9}"
                        f" {name:18} best {row['best_ms']:7.1f} ms {row['speedup_best']:5.2f}x"
                        f"  median {row['median_ms']:7.1f} ms {row['speedup_median']:5.2f}x"
                        f"  error {row['error']:.1e}",
                        flush=True,
                    )
    partial = arguments.out / ".kernel_cpu.json.part"
    partial.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    os.replace(partial, arguments.out / "kernel_cpu.json")


if __name__ == "__main__":
    main()
