# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""EVOR beside the official JAX agents FQL and QC: updates per second, in one run, in turns.

    python benchmarks/jax_comparison/compare.py --jax-python PYTHON --fql FQL --qc QC

Each method has a process of its own, so that PyTorch and JAX need not share an environment.
Blocks alternate (A B C A B C ...), all others wait meanwhile, and ratios are taken within a
round. See the README beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASES = ("JAX FQL", "JAX QC")


@dataclass
class Method:
    """A row of the table: how its worker is started, and what it measured."""

    name: str
    python: str
    script: str
    options: dict

    def start(self, environment: dict) -> None:
        """Starts the worker and waits until it is warm."""
        print(f"{self.name}: first calls ...", flush=True)
        self.rates = []
        self.process = subprocess.Popen(
            [self.python, str(HERE / self.script), json.dumps(self.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.info = self._answer()

    def block(self, seconds: float) -> None:
        """Times about ``seconds`` of updates, at least three."""
        count = max(3, math.ceil(seconds / self.info["seconds_per_update"]))
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        self.rates.append(count / self._answer())

    def stop(self) -> None:
        """Ends the worker, by force if it is busy."""
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"The worker of {self.name!r} ended with code {code}; see above.")
        return json.loads(line)


def make_methods(args: argparse.Namespace) -> list[Method]:
    """Rows of the table, in the order of their turns."""
    common = {
        "threads": args.threads,
        "shapes": {
            "observation": args.observation,
            "action": args.action,
            "batch": args.batch,
            "hidden": args.hidden,
            "num_steps": args.num_steps,
            "transitions": args.transitions,
        },
    }
    modes = {"eager": [False], "compiled": [True], "both": [False, True]}[args.mode]
    methods = []
    for next_action, precision, compile in itertools.product(
        args.next_action, args.torch_matmul_precision, modes
    ):
        options = {
            **common,
            "device": args.device,
            "next_action": next_action,
            "compile": args.compile_mode if compile and args.compile_mode else compile,
            "torch_matmul_precision": precision,
        }
        name = f"EVOR {'compiled' if compile else 'eager'}, {next_action}, {precision}"
        methods.append(Method(name, sys.executable, "torch_worker.py", options))
    jax = {**common, "num_candidates": args.num_candidates, "horizon": args.qc_horizon}
    for name, agent, checkout in (("JAX FQL", "fql", args.fql), ("JAX QC", "qc", args.qc)):
        options = {**jax, "agent": agent, "checkout": str(checkout)}
        if checkout is not None:
            methods.append(Method(name, args.jax_python, "jax_worker.py", options))
    return methods


def make_environment(args: argparse.Namespace) -> dict:
    """The same processors and thread pools for both frameworks."""
    if hasattr(os, "sched_setaffinity"):
        # Workers inherit it, and XLA sizes its thread pool by it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment |= {"NPROC": threads, "JAX_PLATFORMS": args.device}
    # First calls are reported: no compiled code of an earlier run.
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    if args.jax_matmul_precision:
        environment["JAX_DEFAULT_MATMUL_PRECISION"] = args.jax_matmul_precision
    return environment


def measure(methods: list[Method], args: argparse.Namespace) -> list[float]:
    """Alternates blocks; returns the load of the machine before each round."""
    environment = make_environment(args)
    started, loads = [], []
    try:
        for method in methods:
            started.append(method)
            method.start(environment)
        for index in range(args.rounds):
            loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan)
            for method in methods:
                method.block(args.seconds)
                # Thread pools of the last worker spin for some milliseconds.
                time.sleep(0.1)
            rates = ", ".join(f"{m.name} {m.rates[-1]:.2f}/s" for m in methods)
            print(f"round {index + 1} of {args.rounds}: {rates}", flush=True)
    finally:
        for method in started:
            if hasattr(method, "process"):
                method.stop()
    return loads


def spread(values: list[float]) -> dict:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(methods: list[Method], args: argparse.Namespace, loads: list[float]) -> dict:
    """Everything that was measured, and what it depends on."""
    rates = {method.name: method.rates for method in methods}
    rows = []
    for method in methods:
        ratios = {
            base: spread([ours / theirs for ours, theirs in zip(method.rates, rates[base])])
            for base in BASES
            if base in rates
        }
        rows.append(
            {
                "name": method.name,
                "updates_per_second": spread(method.rates),
                "ratio": ratios,
                "rates": method.rates,
                **method.info,
            }
        )
    return {
        "cpu": processor(),
        "platform": platform.platform(),
        "threads": args.threads,
        "load_before_rounds": loads,
        "revisions": {"FQL": revision(args.fql), "QC": revision(args.qc)},
        "arguments": {key: _plain(value) for key, value in vars(args).items()},
        "methods": rows,
    }


def table(report: dict) -> str:
    """The report in Markdown."""
    options = report["arguments"]
    bases = [base for base in BASES if base in report["methods"][0]["ratio"]]
    head = ["method", "updates/s (median, range)", *(f"times {base}" for base in bases)]
    head += ["first call [s]", "product error"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in report["methods"]:
        cells = [row["name"], _range(row["updates_per_second"])]
        cells += [_range(row["ratio"][base]) for base in bases]
        cells += [f"{row['first_call_seconds']:.1f}", f"{row['matmul_error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    versions = {}
    for row in report["methods"]:
        versions |= row["versions"]
    context = [
        f"{report['cpu']}, {report['threads']} threads, device {options['device']}; "
        f"load before rounds at most {max(report['load_before_rounds']):.1f}.",
        f"Networks {options['hidden']}, batch {options['batch']}, observation "
        f"{options['observation']}, action {options['action']}, {options['num_steps']} Euler "
        f"steps; QC best of {options['num_candidates']}, horizon {options['qc_horizon']}.",
        f"{options['rounds']} rounds of {options['seconds']} s a method. EVOR rows: program, next "
        "action, torch matmul precision; JAX matmul precision "
        f"{options['jax_matmul_precision'] or 'default'}.",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + "; "
        + ", ".join(f"{name} at {commit}" for name, commit in report["revisions"].items())
        + ".",
    ]
    return "\n".join([*lines, "", *context, ""])


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def _range(values: dict) -> str:
    return f"{values['median']:.2f} [{values['min']:.2f}, {values['max']:.2f}]"


def processor() -> str:
    """Name of the CPU, the bare architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def revision(checkout: Path | None) -> str:
    """Commit of a checkout, ``"unknown"`` where it is not one."""
    if checkout is None or not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def write_text(path: Path, text: str) -> None:
    """Writes a file that is never read half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def checkout(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not (path / "agents").is_dir():
        raise argparse.ArgumentTypeError(f"must be a checkout with a folder agents, got {text}")
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--fql", type=checkout, help="checkout of github.com/seohongpark/fql")
    add("--qc", type=checkout, help="checkout of github.com/ColinQiyangLi/qc")
    add("--jax-python", default=sys.executable, help="Python with the requirements of both")
    add("--threads", type=positive, default=len(_processors()), help="threads of each method")
    add("--rounds", type=positive, default=10, help="blocks of each method")
    add("--seconds", type=float, default=5.0, help="length of a block")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--mode", choices=["eager", "compiled", "both"], default="both")
    add("--compile-mode", choices=["reduce-overhead"], help="CUDA graphs")
    add("--next-action", nargs="+", choices=["policy", "dataset"], default=["policy", "dataset"])
    add(
        "--torch-matmul-precision",
        nargs="+",
        choices=["highest", "high", "medium"],
        default=["highest"],
        help="a row for each; see the README beside this file",
    )
    add("--jax-matmul-precision", help="for JAX_DEFAULT_MATMUL_PRECISION, default: JAX's own")
    add("--num-candidates", type=positive, default=32, help="N of QC's best of N")
    add("--qc-horizon", type=positive, default=1, help="chunk of QC; 1 is its cheapest")
    add("--observation", type=positive, default=28)
    add("--action", type=positive, default=5)
    add("--batch", type=positive, default=256)
    add("--hidden", type=positive, nargs="+", default=[512, 512, 512, 512])
    add("--num-steps", type=positive, default=10, help="Euler steps")
    add("--transitions", type=positive, default=100_000, help="size of the random data")
    add("--output", type=Path, default=Path("jax_comparison"), help="prefix of .json and .md")
    return parser.parse_args()


def _processors():
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count())


def main() -> None:
    args = parse_args()
    methods = make_methods(args)
    report = summarise(methods, args, measure(methods, args))
    write_text(args.output.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    write_text(args.output.with_suffix(".md"), table(report))
    print(f"\n{table(report)}\nWritten to {args.output.with_suffix('.json')} and .md")


if __name__ == "__main__":
    main()
