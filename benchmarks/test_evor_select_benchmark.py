# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Speed of sampling returns and choosing a candidate, by every path there is.

    python -m pytest benchmarks/test_evor_select_benchmark.py -o addopts= -m "not gpu"  # or -m gpu

On a GPU ``ad_hoc/kernel_bench.py`` measures the same and more, with a verdict on each target.

The parity tests of the device run first; if one fails nothing is measured. Networks are 4x512 with
ten Euler steps; random weights. Each row records achieved TFLOP/s of the matrix products that the
straightforward module needs, the error against float64, peak memory and the time of the first call.
Two threads are asked for with ``OMP_NUM_THREADS=2``.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "ad_hoc"))

import kernel_variants as variants  # noqa: E402
from kernel_measure import Machine  # noqa: E402
from kernel_variants import Problem  # noqa: E402

_has_triton = importlib.util.find_spec("triton") is not None
DECISION = (1, 32, 16)
CPU_SWEEP = [(1, 32, 1), (1, 32, 64), (1, 32, 256), (1, 8, 16), (1, 128, 16), (256, 1, 1)]
CUDA_SWEEP = [(1, 32, 4), (1, 32, 256), (1, 32, 1024), (1, 8, 64), (1, 512, 64)]
SECONDS = 0.4  # of timed rounds per row
gpu = pytest.mark.gpu


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request):
    if request.param == "cuda" and not (torch.cuda.is_available() and _has_triton):
        pytest.skip("needs CUDA and triton")
    if not variants.parity_tests(request.param):
        pytest.exit("The parity tests fail: nothing is measured.", returncode=1)
    return request.param


@pytest.fixture(autouse=True)
def no_grad():
    before = torch.get_float32_matmul_precision()
    with torch.no_grad():
        yield
    torch.set_float32_matmul_precision(before)
    torch.compiler.reset()


@functools.lru_cache
def roofline() -> dict:
    return Machine(dry=False).roofline()


def measure(benchmark, problem: Problem, precision: str, make, seeded: bool = False) -> None:
    """Times ``make()``'s call back to back and records all that the number depends on."""
    on_gpu = problem.noise.is_cuda
    if on_gpu:
        roof = roofline()[precision]
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    torch.set_float32_matmul_precision(variants.MATMUL[precision])
    call = make()

    def synchronised():
        out = call()
        if on_gpu:
            torch.cuda.synchronize()
        return out

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        out = synchronised()
        seconds.append(time.perf_counter() - start)
    # Before the reference in float64, which takes more.
    peak = torch.cuda.max_memory_allocated() - held if on_gpu else None
    want = problem.want_of_seed if seeded else problem.want
    error = ((out[3].double() - want).norm() / want.norm()).item()
    benchmark.pedantic(synchronised, rounds=max(5, min(200, int(SECONDS / seconds[-1]))))
    rate = problem.flops / benchmark.stats["median"] / 1e12
    benchmark.extra_info.update(
        shape=problem.shape,
        precision=precision,
        tflops=rate,
        error=error,
        first_call_seconds=seconds[0],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        device=torch.cuda.get_device_name() if on_gpu else platform.processor(),
    )
    if on_gpu:
        triton = __import__("triton").__version__
        benchmark.extra_info.update(roofline=rate / roof, peak_bytes=peak, triton=triton)


CPU_PATHS = {
    "module": lambda p: variants.naive(p, "fp32"),
    "folded": lambda p: functools.partial(variants.folded(p, "fp32", True), *p.inputs()),
    "fused": variants.public,
    "fused seed": functools.partial(variants.public, noise="seed"),
    "fused 1e-5": lambda p: variants.public(p, tolerance=1e-5),
    "fused 1e-3": lambda p: variants.public(p, tolerance=1e-3),
}


@pytest.mark.benchmark(group="one decision, CPU")
@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("layer_norm", [True, False], ids=["layernorm", "plain"])
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_decision_on_a_cpu(benchmark, device, layer_norm, path):
    problem = Problem(DECISION, layer_norm, device, stratified=True)
    measure(benchmark, problem, "fp32", lambda: CPU_PATHS[path](problem), path.endswith(" seed"))


@pytest.mark.benchmark(group="candidates and nodes, CPU")
@pytest.mark.parametrize("path", ["module", "fused", "fused 1e-3"])
@pytest.mark.parametrize("shape", CPU_SWEEP, ids=str)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_sweep_on_a_cpu(benchmark, device, shape, path):
    problem = Problem(shape, True, device, stratified=True)
    measure(benchmark, problem, "fp32", lambda: CPU_PATHS[path](problem))


def _cuda_path(problem: Problem, precision: str, path: str):
    """One path on a GPU: "graph" replays a CUDA graph, "seed" draws the noise in the kernel."""
    name, *words = path.split()
    graph = "graph" in words
    inputs = problem.inputs()
    if name == "module":
        call = variants.naive(problem, precision)
    elif name in ("folded", "compiled"):
        function = variants.folded(problem, precision, False)
        if name == "compiled":
            function = torch.compile(function, dynamic=False)
        call = functools.partial(function, *inputs)
    else:
        backend = {"layered": "triton_layered", "loop": "triton_loop"}.get(name, name)
        kernel_precision = variants.KERNEL_PRECISION[precision]
        noise = "seed" if "seed" in words else "given"
        call = variants.public(problem, backend=backend, precision=kernel_precision, noise=noise)
    return variants.graphed(call) if graph else call


KERNELS = ["layered", "layered graph", "layered seed graph", "loop", "loop graph", "loop seed"]
CUDA_PATHS = ["module", "module graph", "folded", "folded graph", "compiled", "compiled graph"]


@gpu
@pytest.mark.parametrize("path", [*CUDA_PATHS, *KERNELS, "auto"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("scenario", variants.SCENARIOS)
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_scenarios(benchmark, device, scenario, precision, path):
    benchmark.group = f"{scenario} {precision}"
    problem = Problem(variants.SCENARIOS[scenario], device=device)
    make = functools.partial(_cuda_path, problem, precision, path)
    measure(benchmark, problem, precision, make, "seed" in path)


@gpu
@pytest.mark.benchmark(group="candidates and nodes, GPU")
@pytest.mark.parametrize("path", ["folded graph", "layered graph", "loop graph"])
@pytest.mark.parametrize("shape", CUDA_SWEEP, ids=str)
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_sweep(benchmark, device, shape, path):
    problem = Problem(shape, device=device)
    measure(benchmark, problem, "fp16", lambda: _cuda_path(problem, "fp16", path))


if __name__ == "__main__":
    pytest.main([__file__, "-o", "addopts=", *sys.argv[1:]])
