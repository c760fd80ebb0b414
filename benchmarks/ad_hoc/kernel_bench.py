# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the fused path on a CUDA device: parity tests, then every variant, a short table last.

    python benchmarks/ad_hoc/kernel_bench.py --out results

Needs torch, triton and pytest only. One failing variant is recorded with its error and does not
stop the rest.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_variants import (  # noqa: E402
    DTYPE,
    MATMUL,
    SCENARIOS,
    WIDTH,
    Problem,
    _config,
    _launch,
    folded,
    graphed,
    kernel,
    naive,
    parity_tests,
)

LAYERED = {
    "half": [
        (64, 32, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3),
        (64, 256, 64, 4, 3), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (32, 64, 128, 4, 3), (16, 64, 128, 4, 3),
        (64, 64, 128, 4, 3), (64, 128, 128, 8, 3),
    ],
    "tf32": [
        (64, 32, 32, 4, 4), (64, 64, 32, 4, 4), (64, 128, 32, 4, 4), (128, 128, 32, 8, 3),
        (128, 256, 32, 8, 3), (64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (16, 64, 64, 4, 3),
    ],
    "tf32x3": [
        (64, 32, 32, 4, 4), (64, 64, 32, 4, 3), (64, 128, 32, 4, 3), (128, 128, 32, 8, 3),
        (128, 64, 32, 4, 3), (16, 64, 64, 4, 3),
    ],
}  # fmt: skip
LOOP = {
    "half": [(16, 64, 8, 2), (16, 64, 8, 3), (16, 64, 4, 3), (32, 64, 8, 2), (32, 64, 8, 3),
             (64, 64, 8, 3), (64, 32, 8, 4)],
    "tf32": [(16, 32, 8, 2), (16, 32, 8, 3), (32, 32, 8, 2), (32, 32, 8, 3)],
    "tf32x3": [(16, 32, 8, 2), (16, 16, 8, 2)],
}  # fmt: skip
FAMILY = {"fp16": "half", "bf16": "half", "tf32": "tf32", "fp32": "tf32x3"}


def timed(call, seconds: float = 0.25) -> dict:
    """Milliseconds per call, back to back, and the latency of one call with a synchronisation."""
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    inner = max(1, int(0.01 / (time.perf_counter() - start)))
    runs, latencies, stop = [], [], time.perf_counter() + seconds
    while time.perf_counter() < stop or len(runs) < 5:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - start) / inner * 1e3)
    for _ in range(15):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        latencies.append((time.perf_counter() - start) * 1e3)
    runs.sort()
    return {
        "ms": statistics.median(runs),
        "ms_p10": runs[len(runs) // 10],
        "ms_p90": runs[-1 - len(runs) // 10],
        "latency_ms": statistics.median(latencies),
        "first_s": first,
    }


class Table:
    """Rows of results, written after each one."""

    def __init__(self, out: Path, budget: float):
        self.out, self.rows, self.start, self.budget = out, [], time.perf_counter(), budget
        self.info: dict = {}

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def save(self) -> None:
        temporary = self.out / "kernel_bench.json.tmp"
        temporary.write_text(json.dumps({"info": self.info, "rows": self.rows}, indent=1))
        os.replace(temporary, self.out / "kernel_bench.json")

    def measure(self, problem, scenario, precision, variant, make, must=False, seconds=0.25):
        if self.elapsed() > self.budget and not must:
            return None
        row = {"scenario": scenario, "precision": precision, "variant": variant}
        row["shape"] = problem.shape
        torch.set_float32_matmul_precision(MATMUL[precision])
        try:
            with torch.no_grad():
                call = make()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                row |= timed(call, seconds)
                out = call()
                row["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
                error = (out[3].double() - problem.want).norm() / problem.want.norm()
                row["error"] = error.item()
                row["tflops"] = problem.flops / row["ms"] / 1e9
                roof = self.info.get("roof_tflops", {}).get(precision)
                row["roof"] = row["tflops"] / roof if roof else None
        except Exception as error:  # noqa: BLE001
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        self.rows.append(row)
        self.save()
        shown = row.get("failed") or f"{row['ms']:.4f} ms  err {row['error']:.1e}"
        print(f"[{self.elapsed():5.0f}s] {scenario} {precision} {variant}: {shown}", flush=True)
        return row


def roofline() -> dict:
    """Rates of large products in TFLOP/s on random data; tf32x3 does three tf32 products."""
    rates = {}
    for name, size in (("fp16", 8192), ("bf16", 8192), ("tf32", 8192), ("ffma", 4096)):
        torch.set_float32_matmul_precision("highest" if name == "ffma" else "high")
        a = torch.randn(size, size, device="cuda", dtype=DTYPE.get(name, torch.float32))
        best = timed(lambda a=a: a @ a, 0.2)["ms"]
        rates[name] = 2 * size**3 / best / 1e9
    rates["fp32"] = rates["tf32"] / 3
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    rates["copy_tb_s"] = 2 * x.numel() * 4 / timed(lambda: y.copy_(x), 0.2)["ms"] / 1e9
    return rates


def configs(precision: str, pdl: bool = True):
    family = FAMILY[precision]
    layered = [_launch.LayerConfig(*c) for c in LAYERED[family]]
    if pdl:
        layered += [config._replace(pdl=True) for config in layered]
    return layered, [_launch.LoopConfig(*c) for c in LOOP[family]]


def warm(job) -> str:
    """Compiles one configuration in a process of its own, into the cache on disk."""
    precision, config = job
    try:
        with torch.no_grad():
            for name in ("S1", "S2") if isinstance(config, _launch.LayerConfig) else ("S1",):
                kernel(Problem(SCENARIOS[name]), precision, config, False)()
            torch.cuda.synchronize()
        return ""
    except Exception as error:  # noqa: BLE001
        return f"{precision} {config}: {type(error).__name__}: {str(error)[:200]}"


def warm_all(precisions, workers: int = 14) -> None:
    jobs = [(p, c) for p in precisions for family in configs(p) for c in family]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for message in pool.map(warm, jobs):
            if message:
                print("warm:", message, flush=True)


def label(config) -> str:
    name = "loop" if isinstance(config, _launch.LoopConfig) else "layer"
    tile = "x".join(str(v) for v in config[:-4] if not isinstance(v, bool))
    if name == "layer":
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        return f"layer {tile} w{config.warps}s{config.stages}{' pdl' if config.pdl else ''}"
    return f"loop {config.block_m}x{config.block_k} w{config.warps}s{config.stages}"


def baselines(table: Table, problems, precisions) -> None:
    for name, problem in problems.items():
        for precision in precisions:
            if precision == "bf16":
                continue
            measure = functools.partial(table.measure, problem, name, precision)
            inputs = problem.inputs()
            one = functools.partial(folded, problem, precision)
            measure("eager", lambda p=problem, d=precision: naive(p, d))
            measure("eager graph", lambda p=problem, d=precision: graphed(naive(p, d)))
            measure("folded", lambda f=one, i=inputs: functools.partial(f(False), *i))
            measure(
                "folded graph", lambda f=one, i=inputs: graphed(functools.partial(f(False), *i))
            )


def compiled(table: Table, problems, precisions) -> None:
    for precision in precisions:
        for name, problem in problems.items():
            if precision == "bf16":
                continue
            torch._dynamo.reset()
            inputs = problem.inputs()
            call = functools.partial(
                torch.compile(folded(problem, precision, False), dynamic=False), *inputs
            )
            table.measure(problem, name, precision, "compiled", lambda c=call: c)
            table.measure(problem, name, precision, "compiled graph", lambda c=call: graphed(c))


def kernels(table: Table, problems, precisions) -> None:
    for precision in precisions:
        for name, problem in problems.items():
            layered, loops = configs(precision)
            found = []
            for config in layered + loops:
                row = table.measure(
                    problem,
                    name,
                    precision,
                    f"{label(config)} graph",
                    lambda p=problem, d=precision, c=config: graphed(kernel(p, d, c, True)),
                    seconds=0.06,
                )
                if row and "ms" in row:
                    found.append((row["ms"], config))
            for kind in (_launch.LayerConfig, _launch.LoopConfig):
                best = min((f for f in found if isinstance(f[1], kind)), default=None)
                if best is None:
                    continue
                config, design = best[1], "layer" if kind is _launch.LayerConfig else "loop"
                make = functools.partial(kernel, problem, precision, config)
                for mode, frozen in (("frozen", True), ("live", False)):
                    table.measure(
                        problem,
                        name,
                        precision,
                        f"best {design} {mode}",
                        functools.partial(make, frozen),
                    )
                table.measure(
                    problem,
                    name,
                    precision,
                    f"best {design} live graph",
                    lambda m=make: graphed(m(False)),
                )
                if design == "layer" and name == "S3":
                    for rows in (8448, 16896, 33792, 50688, 102400):
                        part = config._replace(rows=rows)
                        table.measure(
                            problem,
                            name,
                            precision,
                            f"{label(part)} rows<={rows} graph",
                            lambda m=make, c=part: graphed(kernel(*m.args[:2], c, True)),
                            seconds=0.1,
                        )


def sweeps(table: Table) -> None:
    """Time against candidates and nodes, with the tile that the tables choose."""
    for shape in ((1, 32, 1), (1, 32, 4), (1, 32, 16), (1, 32, 256), (1, 32, 1024), (1, 8, 64),
                  (1, 128, 64), (1, 512, 64)):  # fmt: skip
        problem = Problem(shape)
        name = "x".join(map(str, shape))
        layer = _config._layer_config("fp16", problem.rows)
        loop = _config._loop_config("fp16", problem.rows, (WIDTH,))
        for config in (layer, loop):
            table.measure(
                problem,
                name,
                "fp16",
                f"{label(config)} graph",
                lambda p=problem, c=config: graphed(kernel(p, "fp16", c, True)),
                seconds=0.06,
            )


def summary(table: Table) -> None:
    print("\n" + json.dumps(table.info))
    print(
        "scenario prec  variant                          ms    p10    p90  lat   TF/s roof  error"
    )
    groups: dict = {}
    for row in table.rows:
        groups.setdefault((row["scenario"], row["precision"]), []).append(row)
    for (name, precision), rows in groups.items():
        good = [row for row in rows if "ms" in row]
        named = [
            r for r in good if r["variant"].split()[0] in ("eager", "folded", "compiled", "best")
        ]
        for design in ("layer", "loop"):
            kind = [r for r in good if r["variant"].startswith(design + " ")]
            named += sorted(kind, key=lambda r: r["ms"])[:4]
        for r in named:
            roof = f"{100 * r['roof']:4.1f}" if r.get("roof") else "   -"
            print(
                f"{name:8} {precision:5} {r['variant']:32} {r['ms']:7.4f} {r['ms_p10']:6.3f}"
                f" {r['ms_p90']:6.3f} {r['latency_ms']:6.3f} {r['tflops']:5.0f} {roof}"
                f" {r['error']:.1e}"
            )
    failed = [row for row in table.rows if "failed" in row]
    print(f"{len(failed)} failed; {table.elapsed():.0f} s")
    for row in failed[:12]:
        print(row["scenario"], row["precision"], row["variant"], row["failed"][:160])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--budget", type=float, default=330.0, help="seconds")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp32", "tf32"])
    parser.add_argument(
        "--sections", nargs="+", default=["tests", "baselines", "kernels", "compiled", "sweeps"]
    )
    parser.add_argument("--force", action="store_true", help="measure even if a test fails")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = Table(arguments.out, arguments.budget)
    sections, precisions = arguments.sections, arguments.precisions
    if "tests" in sections and not parity_tests("cuda") and not arguments.force:
        raise SystemExit("The parity tests fail: nothing is measured.")
    print(f"[{table.elapsed():.0f}s] tests done", flush=True)
    triton = __import__("triton")
    table.info = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "roof_tflops": {k: round(v, 1) for k, v in roofline().items()},
    }
    try:
        if "kernels" in sections:
            warm_all(precisions)
            print(f"[{table.elapsed():.0f}s] kernels compiled", flush=True)
        problems = {name: Problem(shape) for name, shape in SCENARIOS.items()}
        if "baselines" in sections:
            baselines(table, problems, precisions)
        if "kernels" in sections:
            kernels(table, problems, precisions)
        if "compiled" in sections:
            compiled(table, problems, precisions)
        if "sweeps" in sections:
            sweeps(table)
    finally:
        summary(table)


if __name__ == "__main__":
    main()
