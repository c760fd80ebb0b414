# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Measures the fused path on a CUDA device in one command of less than eight minutes.

    python benchmarks/ad_hoc/kernel_bench.py --out results

Parity tests first (nothing else is printed if one fails), then every path in the three scenarios,
memory, sweeps over candidates and nodes, noise drawn in the kernels, and the search for tiles,
until the budget is spent. The end is a table, the targets as PASS, FAIL or OPEN (not measured), and
the rows that belong into ``triton_kernels/_config.py``; the folder gets the same as text and all
rows as JSON. Needs torch, triton and pytest only. A failing variant is recorded with its error and
does not stop the rest. ``--dry-run`` walks through with tiny networks on a CPU, whose numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import kernel_report as report  # noqa: E402
import kernel_variants as variants  # noqa: E402
from kernel_measure import Machine, Table  # noqa: E402
from kernel_variants import SCENARIOS, Problem, _config, _launch  # noqa: E402

LAYERED = {
    "half": [
        (64, 32, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3),
        (128, 64, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3),
        (32, 64, 128, 4, 3), (16, 64, 128, 4, 3), (64, 64, 128, 4, 3), (64, 128, 128, 8, 3),
    ],
    "tf32": [
        (64, 32, 32, 4, 4), (64, 64, 32, 4, 4), (64, 128, 32, 4, 4), (128, 128, 32, 8, 3),
        (128, 256, 32, 8, 3), (128, 128, 64, 8, 3), (16, 64, 64, 4, 3),
    ],
    "tf32x3": [
        (64, 32, 32, 4, 4), (64, 64, 32, 4, 3), (64, 128, 32, 8, 3), (128, 64, 32, 8, 3),
        (16, 64, 64, 4, 3),
    ],
}  # fmt: skip
LOOP = {
    "half": [(16, 64, 8, 2), (16, 64, 8, 3), (16, 64, 4, 3), (32, 64, 8, 2), (32, 64, 8, 3),
             (64, 64, 8, 3), (64, 32, 8, 4)],
    "tf32": [(16, 32, 8, 2), (16, 32, 8, 3), (32, 32, 8, 2), (32, 32, 8, 3)],
    "tf32x3": [(16, 32, 8, 2), (16, 16, 8, 2)],
}  # fmt: skip
FAMILY = {"fp16": "half", "bf16": "half", "tf32": "tf32", "fp32": "tf32x3"}
NODES = [(1, 32, n) for n in (1, 4, 16, 256, 1024, 2048, 4096)]
CANDIDATES = [(1, n, 64) for n in (8, 128, 512, 2048)]
COMPILED_SWEEP = [(1, 32, 1), (1, 32, 16), (1, 128, 64), (1, 512, 64), (1, 2048, 64)]
MEMORY = [(1, 32, 64), (1, 32, 1024), (1, 32, 4096), (1, 32, 16384)]
TESTS_SECONDS, COMPILE_SECONDS = 200.0, 100.0
ALARM_SECONDS = 30.0  # after the budget, for what is being measured at that time


class OutOfTime(BaseException):
    """The alarm; no ``except Exception`` may swallow it."""


def label(config) -> str:
    if isinstance(config, _launch.LoopConfig):
        return f"loop {config.block_m}x{config.block_k} w{config.warps}s{config.stages}"
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"layered {tile} w{config.warps}s{config.stages}{' pdl' if config.pdl else ''}"


def shipped(problem: Problem, precision: str) -> dict:
    """The tiles that the tables choose for this many rows."""
    return _shipped(problem.rows, problem.width, precision)


def _shipped(rows: int, width: int, precision: str) -> dict:
    name = variants.KERNEL_PRECISION[precision]
    return {
        "layered": _config._layer_config(name, rows),
        "loop": _config._loop_config(name, rows, (width,)),
    }


def chosen(precision: str, rows: int) -> str:
    """The design that the tables choose."""
    name = variants.KERNEL_PRECISION[precision]
    return _path(_config.choose("triton", (Problem.width,), name, rows))


def tiles(precision: str) -> list:
    family = FAMILY[precision]
    layered = [_launch.LayerConfig(*numbers) for numbers in LAYERED[family]]
    return layered + [_launch.LoopConfig(*numbers) for numbers in LOOP[family]]


def warm(job) -> tuple[str, float, str]:
    """Compiles one variant in a process of its own, into the caches on disk.

    Returns what it is, the seconds of its first call while all cores compile, and its error.
    """
    precision, shape, config = job
    error, start = "", time.perf_counter()
    try:
        # All of it: after an error of the device, whatever this process does next fails too.
        machine = Machine(dry=False)
        problem = machine.problem(shape)
        torch.set_float32_matmul_precision(variants.MATMUL[precision])
        with torch.no_grad():
            if config is None:
                call = machine.compile(variants.folded(problem, precision, False))
                call = functools.partial(call, *problem.inputs())
            else:
                call = variants.kernel(problem, precision, config, False)
            machine.synchronise()
            start = time.perf_counter()
            call()
            machine.synchronise()
    except Exception as caught:  # noqa: BLE001
        shown = "compiled" if config is None else label(config)
        error = f"{precision} {shown}: {type(caught).__name__}: {str(caught)[:200]}"
    return "compiled" if config is None else "kernel", time.perf_counter() - start, error


def _one_compile_thread() -> None:
    """Every worker would start a pool of its own; the key of the cache ignores this option."""
    from torch._inductor import config

    config.compile_threads = 1


def warm_all(table: Table, precisions) -> None:
    """All compilations at once, as far as they get in their time; nothing is measured meanwhile."""
    compiled = [(p, s, None) for p in precisions for s in SCENARIOS.values()]
    compiled += [(p, s, None) for p in precisions if p != "tf32" for s in COMPILED_SWEEP]
    jobs = compiled + [(p, SCENARIOS["S1"], config) for p in precisions for config in tiles(p)]
    # One node, and four, are specialisations of the loop kernel; and the tables may choose tiles
    # that the search does not try.
    sizes = [math.prod(shape) for shape in SCENARIOS.values()]
    for p in precisions:
        own = {c for n in sizes for c in _shipped(n, Problem.width, p).values()}
        loops = [c for c in {*tiles(p), *own} if _path(c) == "loop"]
        jobs += [(p, SCENARIOS["S2"], c) for c in loops]
        jobs += [(p, NODES[1], c) for c in loops if c in own]
        jobs += [(p, SCENARIOS["S1"], c) for c in own - set(tiles(p))]
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    took: dict[str, list[float]] = {"kernel": [], "compiled": []}
    failed = table.info["not_compiled"] = []
    stop = time.perf_counter() + COMPILE_SECONDS
    with multiprocessing.get_context("spawn").Pool(workers, _one_compile_thread) as pool:
        found = pool.imap_unordered(warm, jobs)
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in jobs:
                kind, seconds, error = found.next(timeout=max(0.1, stop - time.perf_counter()))
                took[kind].append(seconds)
                failed += [error] if error else []
        # Leaving the block ends the workers: what is not compiled yet is compiled when measured.
    table.info["cold_first_call_s"] = {
        kind: {"median": round(statistics.median(some), 1), "max": round(max(some), 1)}
        for kind, some in took.items()
        if some
    }


def scenarios(table: Table, problems, precisions) -> None:
    for precision in precisions:
        for name, problem in problems.items():
            measure = functools.partial(table.measure, problem, name, precision)
            for graph, end in ((False, ""), (True, " graph")):
                plain = functools.partial(
                    variants.folded(problem, precision, False), *problem.inputs()
                )
                module = functools.partial(variants.naive, problem, precision)
                measure(f"module{end}", module, path="module", graph=graph)
                measure(f"folded{end}", lambda c=plain: c, path="folded", graph=graph)
            kernels(table, problem, name, precision, (False, True), ("live", "frozen"))


def kernels(table: Table, problem, name, precision, graphs, weights, **facts) -> None:
    """Both designs with the tiles that the tables choose."""
    for path, config in shipped(problem, precision).items():
        for kind in weights:
            make = functools.partial(
                table.machine.kernel, problem, precision, config, kind == "frozen"
            )
            for graph in graphs:
                shown = f"{label(config)} {kind}{' graph' if graph else ''}"
                known = {"path": path, "weights": kind, "graph": graph, "shipped": True}
                table.measure(problem, name, precision, shown, make, **known, **facts)


def compiled(table: Table, problems, precisions) -> None:
    for precision in precisions:
        for name, problem in problems.items():
            torch._dynamo.reset()
            one = table.machine.compile(variants.folded(problem, precision, False))
            call = functools.partial(one, *problem.inputs())
            measure = functools.partial(table.measure, problem, name, precision)
            measure("compiled", lambda c=call: c, path="compiled")
            measure("compiled graph", lambda c=call: c, path="compiled", graph=True)


def sweeps(table: Table, precisions) -> None:
    """Time against candidates and nodes; compiled PyTorch at some sizes, to place thresholds."""
    for precision in [p for p in ("fp16", "fp32") if p in precisions]:
        for shape in NODES + CANDIDATES:
            problem, name = table.machine.problem(shape), "x".join(map(str, shape))
            weights = ("live", "frozen") if shape in COMPILED_SWEEP else ("frozen",)
            kernels(table, problem, name, precision, (True,), weights, sweep=True)
            if shape in COMPILED_SWEEP:
                compiled(table, {name: problem}, (precision,))


def memory(table: Table) -> None:
    for shape in MEMORY:
        problem, name = table.machine.problem(shape), "x".join(map(str, shape))
        config = shipped(problem, "fp16")["layered"]
        reads = problem, "fp16", config, True
        make = functools.partial(table.machine.kernel, *reads, return_samples=False)
        table.measure(problem, name, "fp16", "layered, no samples", make, 0.05, memory=True)


def noises(table: Table, problems) -> None:
    """Noise drawn in the kernels against noise drawn by torch inside the same graph."""
    for name, problem in problems.items():
        for path, config in shipped(problem, "fp16").items():
            for noise in ("seed", "randn"):
                reads = problem, "fp16", config, True
                make = functools.partial(table.machine.kernel, *reads, noise=noise)
                shown = f"{label(config)} {noise} graph"
                known = {"path": path, "noise": noise, "weights": "frozen", "graph": True}
                table.measure(problem, name, "fp16", shown, make, **known)


def search(table: Table, problems, precisions) -> None:
    """Every tile; the best of each design again, longer; then options of the best layered one."""

    def one(problem, name, precision, config, shown="", seconds=0.06, search=True) -> float:
        facts = {"path": _path(config), "weights": "frozen", "graph": True, "search": search}
        make = functools.partial(table.machine.kernel, problem, precision, config, True)
        text = f"{label(config)}{shown} graph"
        row = table.measure(problem, name, precision, text, make, seconds, **facts)
        return row["ms"] if row and "ms" in row else float("inf")

    best = {}
    for precision in precisions:
        for name, problem in problems.items():
            reads = problem, name, precision
            found = [(one(*reads, config), config) for config in tiles(precision)]
            for path in report.KERNELS:
                ms, config = min((f for f in found if _path(f[1]) == path), key=lambda f: f[0])
                if ms < float("inf"):
                    best[precision, name, path] = config
                    one(*reads, config, " best", 0.2, search=False)
    for (precision, name, path), config in best.items():
        if path == "layered":
            reads = problems[name], name, precision
            one(*reads, config._replace(pdl=True))
            for rows in (16896, 50688, 102400) if name == "S3" else ():
                one(*reads, config._replace(rows=rows), f" rows<={rows}")


def _path(config) -> str:
    return "loop" if isinstance(config, _launch.LoopConfig) else "layered"


def summary(table: Table, precisions) -> str:
    failed = [row for row in table.rows if "failed" in row]
    lines = [json.dumps(table.info), "", *report.table(table.rows), ""]
    lines += [f"{len(table.rows)} rows, {len(failed)} failed, {table.elapsed():.0f} s"]
    lines += [
        f"{row['scenario']} {row['precision']} {row['variant']}: {row['failed'][:160]}"
        for row in failed[:12]
    ]
    lines += ["", "Targets:", *map(str, report.verdicts(table.rows, precisions))]
    better = report.best_tiles(table.rows, precisions)
    lines += ["", "Tiles ahead of those in _config.py:", *(better or ["none"])]
    lines += ["", "The designs side by side:", *report.crossover(table.rows)]
    entries = report.fastest_rows(table.rows, Problem.width, chosen)
    lines += ["", "Paste into triton_kernels/_config.py:"]
    return "\n".join([*lines, f"_FASTEST: dict[tuple[str, int], tuple[int, int]] = {entries}"])


def _alarm(*_) -> None:
    raise OutOfTime


def measure_all(table: Table, arguments) -> None:
    machine, precisions = table.machine, arguments.precisions
    table.info |= machine.versions()
    table.info["roof_tflops"] = {k: round(v, 2) for k, v in machine.roofline().items()}
    if not machine.dry:
        warm_all(table, precisions)
    table.info["measuring_from_s"] = round(table.elapsed())
    problems = {name: machine.problem(shape) for name, shape in SCENARIOS.items()}
    sections = {
        "scenarios": lambda: scenarios(table, problems, precisions),
        "compiled": lambda: compiled(table, problems, precisions),
        "memory": lambda: memory(table),
        "sweeps": lambda: sweeps(table, precisions),
        "noise": lambda: noises(table, problems),
        "search": lambda: search(table, problems, precisions),
    }
    for name, section in sections.items():
        if name in arguments.sections:
            section()


def main() -> None:
    sections = ["tests", "scenarios", "compiled", "memory", "sweeps", "noise", "search"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--budget", type=float, default=420.0, help="seconds, all included")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp32", "tf32"])
    parser.add_argument("--sections", nargs="+", default=sections, choices=sections)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    machine = Machine(arguments.dry_run)
    if not machine.dry and not torch.cuda.is_available():
        raise SystemExit("A CUDA device is needed; --dry-run walks through on a CPU.")
    table = Table(arguments.out, arguments.budget, machine)
    if "tests" in arguments.sections and not variants.parity_tests(machine.device, TESTS_SECONDS):
        raise SystemExit("The parity tests fail: nothing is measured.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # What a single measurement may overrun is bounded too: a table late is a table lost.
    signal.signal(signal.SIGALRM, _alarm)
    left = max(1.0, arguments.budget + ALARM_SECONDS - table.elapsed())
    signal.setitimer(signal.ITIMER_REAL, left, 5.0)
    try:
        measure_all(table, arguments)
    except OutOfTime:
        print("Stopped by the alarm.")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shown = summary(table, arguments.precisions)
        (arguments.out / "kernel_bench.txt").write_text(shown + "\n")
        print(shown, flush=True)


if __name__ == "__main__":
    main()
