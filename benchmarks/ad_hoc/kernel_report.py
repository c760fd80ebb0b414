# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Table, verdicts and rows of ``_config.py`` from measured rows. Plain Python, no device."""

from __future__ import annotations

__all__ = ["Verdict", "best_tiles", "crossover", "fastest_rows", "table", "verdicts"]

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

KERNELS = ("layered", "loop")
EAGER_GAIN = 3.0  # times the module, in every scenario
SLACK = 1.02  # "no slower": medians within two percent
ROOF = 0.40  # of the matrix units' rate, in S3
SATURATED = 32768  # rows that fill a large device
LINEAR = 1.15  # most to least time per row beyond saturation
MARGIN = 1.05  # the kernel must be this much faster to be the default
WORK_SPACE_SLACK = 2**20


class Verdict(NamedTuple):
    """One target: ``passed`` is ``None`` where a row that it needs was not measured."""

    target: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "PASS", False: "FAIL", None: "OPEN"}[self.passed]
        return f"{word}  {self.target}: {self.detail}"


def _rows_count(row: dict) -> int:
    return math.prod(row["shape"])


def _find(rows, **wanted) -> dict | None:
    """The fastest measured row with these entries."""
    good = [
        row
        for row in rows
        if "ms" in row and all(row.get(key) == value for key, value in wanted.items())
    ]
    return min(good, key=lambda row: row["ms"], default=None)


def _kernel(rows, **wanted) -> dict | None:
    # Rows of the search are short, and the least of many is luck: its best are measured again.
    rows = [row for row in rows if not row.get("search")]
    found = [_find(rows, path=path, noise="given", **wanted) for path in KERNELS]
    return min((row for row in found if row), key=lambda row: row["ms"], default=None)


def _versus(target: str, kernel, baseline, least: float) -> Verdict:
    if kernel is None or baseline is None:
        missing = "kernel" if kernel is None else "baseline"
        return Verdict(target, None, f"the {missing} was not measured")
    gain = baseline["ms"] / kernel["ms"]
    detail = (
        f"{gain:.2f} times ({kernel['variant']} {kernel['ms']:.4f} ms, {baseline['variant']}"
        f" {baseline['ms']:.4f} ms), wanted {least:.2f}"
    )
    return Verdict(target, gain >= least, detail)


def _linear(rows, precision: str) -> Verdict:
    target = f"{precision} time linear in candidates times nodes"
    many = [
        row
        for row in rows
        if "ms" in row
        and row["precision"] == precision
        and row.get("sweep")
        and row["path"] == "layered"
        and row["graph"]
        and _rows_count(row) >= SATURATED
    ]
    if len({_rows_count(row) for row in many}) < 2:
        return Verdict(target, None, "fewer than two sizes beyond saturation were measured")
    cost = [1e6 * row["ms"] / _rows_count(row) for row in many]
    ratio = max(cost) / min(cost)
    detail = f"{min(cost):.1f} to {max(cost):.1f} ns per row, ratio {ratio:.2f} <= {LINEAR}"
    return Verdict(target, ratio <= LINEAR, f"{detail}, {len(many)} shapes")


def _memory(rows) -> Verdict:
    target = "memory independent of the nodes"
    found = {_rows_count(r): r["peak_bytes"] for r in rows if r.get("memory") and "peak_bytes" in r}
    many = sorted(count for count in found if count >= SATURATED)
    if len(many) < 2:
        return Verdict(target, None, "fewer than two sizes beyond saturation were measured")
    first, last = many[0], many[-1]
    growth = found[last] - found[first]
    detail = (
        f"{found[first] / 2**20:.1f} MiB at {first} rows, {found[last] / 2**20:.1f} MiB at {last}:"
        f" {growth / (last - first):.2f} bytes per further row"
    )
    return Verdict(target, growth <= WORK_SPACE_SLACK, detail)


def verdicts(rows: list[dict], precisions) -> list[Verdict]:
    """The targets of the fused path, one by one, at equal precision.

    Args:
        rows (list of dict): measured rows of one run.
        precisions (iterable of str): ``"fp16"``, ``"tf32"`` or ``"fp32"``.

    The module and the kernels compared with it read live weights; kernels compared with compiled
    PyTorch have their weights folded beforehand, as it has.
    """
    found = []
    for precision in precisions:
        for scenario in ("S1", "S2", "S3"):
            some = {"scenario": scenario, "precision": precision}
            name = f"{precision} {scenario}"
            module = _find(rows, path="module", graph=False, **some)
            kernel = _kernel(rows, weights="live", **some)
            found.append(_versus(f"{name} three times eager", kernel, module, EAGER_GAIN))
            compiled = _find(rows, path="compiled", graph=True, **some)
            kernel = _kernel(rows, weights="frozen", **some)
            one = scenario == "S1"
            target = f"{name} {'ahead of' if one else 'no slower than'} compiled with graphs"
            found.append(_versus(target, kernel, compiled, 1.0 if one else 1 / SLACK))
        kernel = _kernel(rows, weights="frozen", scenario="S3", precision=precision)
        target = f"{precision} S3 above 40 % of the roofline"
        if kernel is None or kernel.get("roof") is None:
            found.append(Verdict(target, None, "the kernel was not measured"))
        else:
            detail = f"{100 * kernel['roof']:.1f} % ({kernel['variant']})"
            found.append(Verdict(target, kernel["roof"] > ROOF, detail))
        found.append(_linear(rows, precision))
    return [*found, _memory(rows)]


def fastest_rows(
    rows: list[dict], width: int, chosen: Callable[[str, int], str]
) -> dict[tuple[str, int], tuple[int, int]]:
    """Entries of ``_FASTEST``: the longest range of rows where the tables' own kernel is ahead.

    A size counts where the kernel, with the design and the tile that ``_config.py`` chooses, beats
    compiled PyTorch by the margin, both in CUDA graphs, with live weights, as it is called.

    Args:
        rows (list of dict): measured rows of one run.
        width (int): of the networks.
        chosen (callable): name of the design that ``_config.py`` takes for a precision and a
            number of rows.
    """
    wins: dict[str, dict[int, bool]] = {}
    known = {"noise": "given", "weights": "live", "graph": True, "shipped": True}
    for precision, count, some in _sizes(rows):
        compiled = _find(some, path="compiled", graph=True)
        ours = _find(some, path=chosen(precision, count), **known)
        if compiled and ours:
            won = compiled["ms"] >= MARGIN * ours["ms"]
            wins.setdefault(precision, {})[count] = won
    runs = {precision: _longest_run(won) for precision, won in wins.items()}
    names = {"fp32": "tf32x3"}
    return {(names.get(key, key), width): run for key, run in runs.items() if run}


def crossover(rows: list[dict]) -> list[str]:
    """Both designs by the tables' own tiles, size by size: where ``_LOOP_ROWS`` belongs."""
    lines = []
    known = {"noise": "given", "weights": "frozen", "graph": True, "shipped": True}
    for precision, count, some in _sizes(rows):
        layered, loop = (_find(some, path=path, **known) for path in KERNELS)
        if layered and loop:
            both = f"loop {loop['ms']:.4f} ms, layered {layered['ms']:.4f} ms"
            lines.append(f"{precision} {count} rows: {both}")
    return lines


def _sizes(rows: list[dict]) -> Iterator[tuple[str, int, list[dict]]]:
    """Rows of one precision and size at a time, with these, from few to many."""
    keys = {(row["precision"], _rows_count(row)) for row in rows}
    for key in sorted(keys):
        yield *key, [row for row in rows if (row["precision"], _rows_count(row)) == key]


def _longest_run(wins: dict[int, bool]) -> tuple[int, int] | None:
    best: list[int] = []
    run: list[int] = []
    for count, won in wins.items():
        run = [*run, count] if won else []
        best = max(best, run, key=len)
    return (best[0], best[-1]) if best else None


def best_tiles(rows: list[dict], precisions) -> list[str]:
    """The fastest measured tile of each design, where it is ahead of the one that is shipped."""
    lines = []
    for precision in precisions:
        for scenario in ("S1", "S2", "S3"):
            for path in KERNELS:
                some = {"scenario": scenario, "precision": precision, "path": path, "graph": True}
                best = _find(rows, noise="given", weights="frozen", **some)
                ours = _find(rows, noise="given", weights="frozen", shipped=True, **some)
                if best and ours and ours["ms"] > 1.03 * best["ms"]:
                    lines.append(
                        f"{precision} {scenario} {path}: {best['variant']} {best['ms']:.4f} ms,"
                        f" shipped {ours['variant']} {ours['ms']:.4f} ms"
                    )
    return lines


def table(rows: list[dict], tiles: int = 3) -> list[str]:
    """Lines of the table: all paths, and of the tiles that were tried the fastest few."""
    lines = [
        f"{'scenario':12} {'prec':5} {'variant':38} {'ms':>8} {'p10':>8} {'p90':>8} {'latency':>8}"
        f" {'first s':>7} {'MiB':>7} {'TF/s':>6} {'roof %':>6} error"
    ]
    keys = dict.fromkeys((row["scenario"], row["precision"]) for row in rows)
    for scenario, precision in keys:
        some = [r for r in rows if (r["scenario"], r["precision"]) == (scenario, precision)]
        good = [r for r in some if "ms" in r]
        tried = sorted((r for r in good if r.get("search")), key=lambda r: r["ms"])
        for row in [r for r in good if not r.get("search")] + tried[:tiles]:
            lines.append(_line(row))
    return lines


def _line(row: dict) -> str:
    roof = f"{100 * row['roof']:6.1f}" if row.get("roof") else "     -"
    return (
        f"{row['scenario']:12} {row['precision']:5} {row['variant']:38} {row['ms']:8.4f}"
        f" {row['ms_p10']:8.4f} {row['ms_p90']:8.4f} {row['latency_ms']:8.4f} {row['first_s']:7.2f}"
        f" {row['peak_bytes'] / 2**20:7.1f} {row['tflops']:6.1f} {roof} {row['error']:.1e}"
    )
