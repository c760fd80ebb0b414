# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Compiles what would be launched for sm_80 and sm_90, without a GPU, and sees that nothing spills.

The launches of a call on CPU tensors are recorded instead of run, so that the kernels are compiled
with the arguments and tiles that they are launched with.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess

import pytest
import torch
from _kernel_cases import Case
from torchrl_evor.triton_kernels._checks import PRECISIONS

_has_triton = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not _has_triton, reason="needs triton")

# Hidden widths, states and nodes of the calls that take every tile that `_config.py` chooses for
# these widths. Those of the layered design are the same for all widths, and once is enough.
LAYERED = [(512, (1, 4)), (512, (1, 64)), (512, (50, 64)), (1024, (50, 64))]
LOOP = [(256, (1, 64)), (256, (50, 64)), (512, (1, 64)), (512, (50, 64)), (1024, (1, 64))]
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


def _record(monkeypatch, call, on_launch) -> list:
    """Pairs of kernel and arguments of all launches of ``call``, once per specialisation."""
    from triton.runtime.jit import JITFunction

    launches = {}

    def run(kernel, *args, grid, warmup, **options):
        on_launch()
        constants = {name: options[name] for name in options if name in kernel.arg_names}
        key = (kernel.__name__, str(sorted(options.items())))
        launches.setdefault(key, (kernel, args, constants, options))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call()
    return list(launches.values())


def _specialise(value):
    """Type and attributes as Triton's launcher derives them; ``None`` for a constant."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype], [["tt.divisibility", 16]]
    if isinstance(value, float):
        return "fp32", []
    return ("i32", [["tt.divisibility", 16]] if value % 16 == 0 else []) if value != 1 else None


def _compile(launch, capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, constants, options = launch
    signature, attributes = {}, {}
    constants = dict(constants)
    for index, (name, value) in enumerate(zip(kernel.arg_names, args)):
        special = _specialise(value)
        if special is None:
            constants[name] = value
            continue
        signature[name] = special[0]
        if special[1]:
            attributes[index,] = special[1]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )
    kept = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    kept["enable_fp_fusion"] = True
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kept)


def _spilled_bytes(compiled, capability: int, folder) -> int:
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(capability)
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    arch = "sm_90a" if capability == 90 else f"sm_{capability}"
    command = [getattr(tool, "path", tool), "-v", f"--gpu-name={arch}", str(source)]
    done = subprocess.run([*command, "-o", str(folder / "o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return max(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))


def _tile(design: str, precision: str, width: int, rows: int):
    from torchrl_evor.triton_kernels import _config

    return _config.choose(f"triton_{design}", (width,) * 4, precision, rows)


def _launches(
    monkeypatch,
    design: str,
    precision: str,
    states: int,
    nodes: int,
    seeded=False,
    width=512,
    on_launch=lambda: None,
):
    """The launches of one call; enough rows are claimed to get the tile for that many."""
    from torchrl_evor.triton_kernels import _launch, _triton_weights

    case = Case(1, 2, 4, (width,) * 4)
    packed = case.packed
    steps = _launch.Steps(*((4, "midpoint") if seeded else (3, "euler")))
    config = _tile(design, precision, width, states * 32 * nodes)

    seed = torch.tensor([1, 2])
    noise, gumbel = (seed, seed) if seeded else (case.noise.view(-1), case.gumbel)

    @torch.no_grad()
    def call():
        reads = packed.tensors(), packed.layer_norm, precision, design == "loop"
        weights = _triton_weights.pack_weights(*reads)
        options = {"activation": packed.activation, "eps": packed.eps, "precision": precision}
        one = torch.ones(())
        reads = weights, case.observation, case.action, noise, 4, gumbel, None, one, one
        for tile in (config, config._replace(rows=4)):  # at once, and one candidate at a time
            _launch.evor_select(*reads, 1.0, 0.5, False, steps=steps, config=tile, **options)

    return _record(monkeypatch, call, on_launch)


def _check(
    monkeypatch, tmp_path, design, precision, shape, capability, only="", seeded=False, width=512
):
    found = _launches(monkeypatch, design, precision, *shape, seeded, width)
    assert {launch[0].__name__ for launch in found} >= {
        "_fold_kernel",
        "_average_kernel",
        "_select_kernel",
    }
    spills = {}
    for launch in found:
        if only in launch[0].__name__:
            compiled = _compile(launch, capability)
            name = f"{launch[0].__name__} {launch[2]}"
            spills[name] = _spilled_bytes(compiled, capability, tmp_path)
    assert not any(spills.values()), spills


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("design, precision", [("layered", "fp16"), ("loop", "fp16")])
def test_compiles_and_spills_nothing(monkeypatch, tmp_path, design, precision, capability):
    _check(monkeypatch, tmp_path, design, precision, (1, 64), capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("design, only", [("layered", "_first"), ("loop", "_loop")])
def test_noise_from_a_seed_spills_nothing(monkeypatch, tmp_path, design, only, capability):
    _check(monkeypatch, tmp_path, design, "fp16", (1, 64), capability, only, seeded=True)
    _check(monkeypatch, tmp_path, design, "fp16", (1, 64), capability, "_select", seeded=True)


@pytest.mark.parametrize("design", ["layered", "loop"])
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch, design):
    """What a machine of one GPU cannot show: launches happen inside the guard, and only there."""
    from torchrl_evor.triton_kernels import _launch, _launch_select, _triton_weights

    inside, launched = [], []

    @contextlib.contextmanager
    def guard(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    for module in (_launch, _launch_select, _triton_weights):
        monkeypatch.setattr(module, "device_guard", guard)
    _launches(monkeypatch, design, "fp16", 1, 64, on_launch=lambda: launched.append(len(inside)))
    assert len(launched) > 5 and set(launched) == {1}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("design", ["layered", "loop"])
def test_every_tile_has_a_case(design, precision):
    """Of all numbers of rows, those of ``test_all_chosen_tiles`` take all tiles."""
    taken = {}
    for width, (states, nodes) in LAYERED if design == "layered" else LOOP:
        taken.setdefault(width, set()).add(_tile(design, precision, width, states * 32 * nodes))
    for width, tiles in taken.items():
        chosen = {_tile(design, precision, width, 2**power + 1) for power in range(31)}
        assert chosen <= (set().union(*taken.values()) if design == "layered" else tiles)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "design, width, shape",
    [("layered", *case) for case in LAYERED]
    + [(design, *case) for design in ("loop", "loop-seed") for case in LOOP],
    ids=str,
)
def test_all_chosen_tiles(monkeypatch, tmp_path, design, width, shape, precision, capability):
    """The seed matters to the loop only: products of the layered design do not draw noise."""
    design, _, seeded = design.partition("-")
    only = "_hidden" if design == "layered" else "_loop"
    reads = design, precision, shape, capability, only
    _check(monkeypatch, tmp_path, *reads, seeded=bool(seeded), width=width)


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
