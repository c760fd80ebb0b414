# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The command that measures the kernels: its verdicts on made-up timings, its gate, a dry run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_report as report  # conftest.py puts its folder on the path
import pytest

ROOT = Path(__file__).resolve().parents[2]

_has_triton = importlib.util.find_spec("triton") is not None
SHAPES = {"S1": (1, 32, 64), "S2": (256, 1, 1), "S3": (50, 32, 64)}


def _row(ms, path, scenario="S1", shape=None, **facts):
    row = {"scenario": scenario, "precision": "fp16", "variant": f"{path} made up", "path": path}
    row |= {"shape": shape or SHAPES[scenario], "graph": False, "noise": "given", "ms": ms}
    row |= {"ms_p10": ms, "ms_p90": ms, "latency_ms": ms, "first_s": 1.0, "peak_bytes": 0}
    return row | {"tflops": 1.0, "roof": 0.5, "error": 1e-4} | facts


def layered(precision, rows):
    return "layered"


def _verdicts(*rows) -> dict[str, bool | None]:
    return {verdict.target: verdict.passed for verdict in report.verdicts(list(rows), ["fp16"])}


class TestVerdicts:
    @pytest.mark.parametrize("ms, passed", [(0.99, True), (1.01, False)])
    def test_three_times_eager(self, ms, passed):
        """Live weights count; frozen ones, another precision or other noise do not."""
        rows = [_row(3.0, "module"), _row(ms, "loop", weights="live")]
        rows += [_row(0.1, "loop", weights="frozen")]
        rows += [_row(0.1, "loop", weights="live", precision="tf32")]
        rows += [_row(0.1, "loop", weights="live", noise="seed")]
        assert _verdicts(*rows)["fp16 S1 three times eager"] is passed

    @pytest.mark.parametrize(
        "scenario, ms, passed",
        [("S1", 0.99, True), ("S1", 1.01, False), ("S2", 1.01, True), ("S2", 1.03, False)],
    )
    def test_against_compiled_with_graphs(self, scenario, ms, passed):
        """Without graphs, compiled PyTorch is not the one to beat."""
        rows = [_row(1.0, "compiled", scenario, graph=True), _row(9.0, "compiled", scenario)]
        rows += [_row(ms, "layered", scenario, weights="frozen", graph=True)]
        found = _verdicts(*rows)
        kind = "ahead of" if scenario == "S1" else "no slower than"
        assert found[f"fp16 {scenario} {kind} compiled with graphs"] is passed

    def test_a_lucky_short_run_does_not_count(self):
        rows = [_row(1.0, "compiled", graph=True), _row(1.5, "loop", weights="frozen")]
        rows += [_row(0.5, "loop", weights="frozen", search=True)]
        assert _verdicts(*rows)["fp16 S1 ahead of compiled with graphs"] is False

    @pytest.mark.parametrize("roof, passed", [(0.41, True), (0.39, False)])
    def test_roofline(self, roof, passed):
        rows = [_row(1.0, "layered", "S3", weights="frozen", roof=roof)]
        assert _verdicts(*rows)["fp16 S3 above 40 % of the roofline"] is passed

    @pytest.mark.parametrize("ms, passed", [(2.2, True), (2.4, False)])
    def test_linear_beyond_saturation(self, ms, passed):
        """The small shape, which costs ten times as much per row, does not count."""
        known = {"sweep": True, "graph": True, "weights": "frozen"}
        rows = [
            _row(0.1, "layered", shape=(1, 32, 10), **known),
            _row(1.0, "layered", shape=(1, 512, 64), **known),
            _row(ms, "layered", shape=(1, 1024, 64), **known),
        ]
        assert _verdicts(*rows)["fp16 time linear in candidates times nodes"] is passed

    @pytest.mark.parametrize("extra, passed", [(2**19, True), (2**21, False)])
    def test_memory(self, extra, passed):
        """A little slack for the allocator, and not four bytes for each further end point."""
        few, many = (1, 32, 1024), (1, 32, 16384)
        rows = [
            _row(1.0, "layered", shape=few, memory=True, peak_bytes=10**8),
            _row(9.0, "layered", shape=many, memory=True, peak_bytes=10**8 + extra),
        ]
        assert _verdicts(*rows)["memory independent of the nodes"] is passed

    def test_what_was_not_measured_is_open(self):
        found = _verdicts(_row(1.0, "module"), {"scenario": "S1", "failed": "no", "shape": (1,)})
        assert set(found.values()) == {None}
        assert str(report.Verdict("a", None, "b")) == "OPEN  a: b"


class TestRowsOfTheTable:
    def _rows(self, gains):
        rows = []
        for count, gain in gains.items():
            shape = (1, 1, count)
            rows += [_row(gain, "compiled", shape=shape, graph=True)]
            rows += [_row(1.0, "layered", shape=shape, graph=True, shipped=True, weights="live")]
        return rows

    def test_longest_range_that_wins(self):
        rows = self._rows({32: 1.5, 512: 1.02, 2048: 1.1, 8192: 2.0, 32768: 1.06, 100000: 0.9})
        assert report.fastest_rows(rows, 512, layered) == {("fp16", 512): (2048, 32768)}

    def test_none_that_wins(self):
        assert report.fastest_rows(self._rows({32: 1.0, 512: 1.04}), 512, layered) == {}

    def test_only_shipped_tiles_count(self):
        rows = self._rows({512: 1.0})
        rows += [_row(0.1, "layered", shape=(1, 1, 512), graph=True, search=True)]
        assert report.fastest_rows(rows, 512, layered) == {}

    def test_the_design_that_would_run_counts(self):
        """The loop kernel where it is chosen, however fast the other one is."""
        kernel_bench = pytest.importorskip("kernel_bench")
        rows = self._rows({512: 2.0, 8192: 2.0})
        for count in (512, 8192):
            shape = (1, 1, count)
            rows += [_row(3.0, "loop", shape=shape, graph=True, shipped=True, weights="live")]
        found = report.fastest_rows(rows, 512, kernel_bench.chosen)
        assert found == {("fp16", 512): (8192, 8192)}
        assert "fp16 512 rows: loop 3.0000 ms, layered 1.0000 ms" in report.crossover(
            [row | {"weights": "frozen"} for row in rows]
        )

    def test_live_weights_count(self):
        """Which is what acting and training call with."""
        rows = self._rows({512: 1.0})
        rows += [rows[-1] | {"weights": "frozen", "ms": 0.1}]
        assert report.fastest_rows(rows, 512, layered) == {}

    def test_full_precision_is_named_as_the_kernels_name_it(self):
        rows = [row | {"precision": "fp32"} for row in self._rows({512: 2.0})]
        assert report.fastest_rows(rows, 256, layered) == {("tf32x3", 256): (512, 512)}

    def test_better_tiles(self):
        known = {"weights": "frozen", "graph": True}
        rows = [_row(1.0, "loop", shipped=True, **known), _row(0.9, "loop", search=True, **known)]
        assert "0.9000 ms, shipped" in report.best_tiles(rows, ["fp16"])[0]
        assert report.best_tiles(rows[:1], ["fp16"]) == []

    def test_table_shows_the_best_of_the_search_only(self):
        rows = [_row(float(n), "loop", search=True) for n in range(1, 6)] + [_row(9.0, "module")]
        lines = report.table(rows, tiles=2)
        assert len(lines) == 1 + 1 + 2 and "module" in lines[1] and " 2.0000" in lines[3]


@pytest.mark.skipif(not _has_triton, reason="needs triton")
class TestCommand:
    def test_nothing_is_printed_or_measured_when_a_test_fails(self, monkeypatch, capsys, tmp_path):
        import kernel_bench

        monkeypatch.setattr(kernel_bench.variants, "parity_tests", lambda *_: False)
        monkeypatch.setattr(kernel_bench, "measure_all", lambda *_: pytest.fail("measured"))
        monkeypatch.setattr(kernel_bench, "Machine", lambda dry: kernel_bench.argparse.Namespace(
            dry=dry, device="cpu"))  # fmt: skip
        out = tmp_path / "results"
        monkeypatch.setattr(sys, "argv", ["kernel_bench.py", "--dry-run", "--out", str(out)])
        with pytest.raises(SystemExit, match="nothing is measured"):
            kernel_bench.main()
        assert capsys.readouterr().out == "" and not out.exists()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "body, passes, shown",
        [
            ("def test_a(): pass\ndef test_b(): pass\n", True, ""),
            ("def test_a(): pass\ndef test_b(): assert 1 == 2\n", False, "assert 1 == 2"),
            ("import time\ndef test_a(): time.sleep(60)\n", False, "did not end in time"),
            ("import pytest\n@pytest.mark.skip\ndef test_a(): pass\n", False, "No parity test ran"),
            ("syntax error\n", False, "SyntaxError"),
        ],
        ids=["pass", "fail", "late", "skipped", "broken"],
    )
    def test_gate(self, tmp_path, capsys, body, passes, shown):
        import kernel_variants

        file = tmp_path / "test_parity.py"
        file.write_text(body)
        seconds = 3.0 if "sleep" in body else 300.0
        assert kernel_variants.passes(str(file), processes=2, seconds=seconds) is passes
        printed = capsys.readouterr().out
        assert shown in printed and bool(printed) is bool(shown)

    @pytest.mark.slow
    def test_dry_run(self, tmp_path):
        command = [sys.executable, str(ROOT / "benchmarks/ad_hoc/kernel_bench.py"), "--dry-run"]
        sections = ["scenarios", "compiled", "memory", "sweeps", "noise", "search"]
        command += ["--out", str(tmp_path), "--precisions", "fp16", "--sections", *sections]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        written = json.loads((tmp_path / "kernel_bench.json").read_text())
        rows = written["rows"]
        assert rows and not [row for row in rows if "failed" in row]
        assert {row["path"] for row in rows if "path" in row} == {
            "module", "folded", "compiled", "layered", "loop"
        }  # fmt: skip
        # Noise of a seed has its own answer; the CPU computes every path in float32 or fp16.
        errors = {row["variant"]: row["error"] for row in rows if row["noise"] == "seed"}
        assert errors and all(error < 1e-5 for error in errors.values())
        assert "Targets:" in done.stdout and "_FASTEST: dict" in done.stdout
        assert (tmp_path / "kernel_bench.txt").read_text() == done.stdout


if __name__ == "__main__":
    pytest.main([__file__, "-q"])
