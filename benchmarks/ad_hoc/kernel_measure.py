# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How ``kernel_bench.py`` measures: the device or the dry run, and the table of rows."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import kernel_variants as variants
import torch
from kernel_variants import Problem, public


class Machine:
    """What differs between a CUDA device and the dry run on a CPU."""

    def __init__(self, dry: bool):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        if dry:
            Problem.width, Problem.steps = 16, 2

    def problem(self, shape) -> Problem:
        if self.dry:
            shape = tuple(min(size, 4) for size in shape)
        return Problem(shape, device=self.device)

    def synchronise(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def graphed(self, call):
        return call if self.dry else variants.graphed(call)

    def compile(self, call):
        return torch.compile(call, dynamic=False, backend="eager" if self.dry else "inductor")

    def kernel(self, problem, precision, config, frozen, **options):
        if self.dry:
            return public(problem, frozen, backend="torch", **options)
        return variants.kernel(problem, precision, config, frozen, **options)

    @contextlib.contextmanager
    def peak(self, row: dict):
        """Bytes beyond those held before, at their most."""
        if self.dry:
            yield row.setdefault("peak_bytes", 0)
            return
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        yield
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - held

    def versions(self) -> dict:
        name = platform.processor() if self.dry else torch.cuda.get_device_name()
        triton = __import__("triton").__version__
        versions = {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda}
        return {"device": name, "python": platform.python_version(), **versions}

    def timed(self, call, seconds: float = 0.25) -> dict:
        """Milliseconds per call, back to back, and of one call with a synchronisation."""

        def run(times: int) -> float:
            start = time.perf_counter()
            for _ in range(times):
                call()
            self.synchronise()
            return (time.perf_counter() - start) / times

        run(1)
        # The dry run shows that all works, not how fast.
        times = 1 if self.dry else max(1, int(0.01 / run(1)))
        seconds = 0.0 if self.dry else seconds
        runs, stop = [], time.perf_counter() + seconds
        while time.perf_counter() < stop or len(runs) < 5:
            runs.append(run(times) * 1e3)
        runs.sort()
        return {
            "ms": statistics.median(runs),
            "ms_p10": runs[len(runs) // 10],
            "ms_p90": runs[-1 - len(runs) // 10],
            "latency_ms": statistics.median(run(1) * 1e3 for _ in range(15)),
        }

    def roofline(self) -> dict:
        """TFLOP/s of large products on random data; tf32x3 does three tf32 products."""
        rates, side = {}, 64 if self.dry else 8192
        for name in ("fp16", "bf16", "tf32", "ffma"):
            torch.set_float32_matmul_precision("highest" if name == "ffma" else "high")
            size = side if name != "ffma" else side // 2
            dtype = variants.DTYPE.get(name, torch.float32)
            a = torch.randn(size, size, device=self.device, dtype=dtype)
            rates[name] = 2 * size**3 / self.timed(lambda a=a: a @ a, 0.2)["ms"] / 1e9
        rates["fp32"] = rates["tf32"] / 3
        x = torch.randn(2**12 if self.dry else 2**29, device=self.device)
        y = torch.empty_like(x)
        rates["copy_tb_s"] = 8 * x.numel() / self.timed(lambda: y.copy_(x), 0.2)["ms"] / 1e9
        return rates


class Table:
    """Rows of results, written after each one."""

    def __init__(self, out: Path, budget: float, machine: Machine):
        self.out, self.rows, self.machine = out, [], machine
        self.start, self.budget = time.perf_counter(), budget
        self.info: dict = {}

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def save(self) -> None:
        temporary = self.out / "kernel_bench.json.tmp"
        temporary.write_text(json.dumps({"info": self.info, "rows": self.rows}, indent=1))
        os.replace(temporary, self.out / "kernel_bench.json")

    def measure(self, problem, scenario, precision, variant, make, seconds=0.2, **facts):
        """Times what ``make`` returns; ``facts`` say what it is, for the verdicts."""
        if self.elapsed() > self.budget:
            return None
        row = {"scenario": scenario, "precision": precision, "variant": variant}
        row |= {"shape": problem.shape, "graph": False, "noise": "given"} | facts
        torch.set_float32_matmul_precision(variants.MATMUL[precision])
        try:
            with torch.no_grad(), self.machine.peak(row):
                self.machine.synchronise()
                start = time.perf_counter()
                call = make()
                if row["graph"]:
                    call = self.machine.graphed(call)
                out = call()
                self.machine.synchronise()
                # Compilation and capture are in here, as far as the caches on disk leave any.
                row["first_s"] = time.perf_counter() - start
                row |= self.machine.timed(call, seconds)
            self._rate(row, problem, out)
        except Exception as error:  # noqa: BLE001
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
            row.pop("ms", None)
        self.rows.append(row)
        self.save()
        return row

    def _rate(self, row: dict, problem: Problem, out) -> None:
        with torch.no_grad():
            if row["noise"] != "randn" and len(out) > 3:
                want = problem.want_of_seed if row["noise"] == "seed" else problem.want
                row["error"] = ((out[3].double() - want).norm() / want.norm()).item()
        row.setdefault("error", float("nan"))
        row["tflops"] = problem.flops / row["ms"] / 1e9
        roof = self.info.get("roof_tflops", {}).get(row["precision"])
        row["roof"] = row["tflops"] / roof if roof else None
