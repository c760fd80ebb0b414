# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[1] / "sota-implementations" / "evor"
sys.path.insert(0, str(RECIPE))

import report  # noqa: E402
import report_methods  # noqa: E402
import results_io  # noqa: E402

_has_matplotlib = importlib.util.find_spec("matplotlib") is not None

ENV = "cube-double-play"
FULL = {
    "env": ENV,
    "task": 1,
    "method": "evor",
    "seed": 0,
    "num_updates": 1000,
    "hidden": "8x8",
    "batch_size": 4,
    "device": "cpu",
    "episodes": 10,
    "success": 0.5,
    "return_mean": -12.5,
    "protocol": "small",
    "num_transitions": 99,
    "tau_r": float("inf"),
    "tau_q": 0.0,
    "training": "lr=0.001 gamma=0.99",
    "train_seconds": 10.0,
    "eval_seconds_per_decision": 0.002,
    "parameters": 1234,
    "command": "python evor.py seed=0",
}


def row(**changes):
    return {**FULL, **changes}


def add(root, **changes):
    values = row(**changes)
    results_io.append_row(root / values["env"] / f"{values['method']}.csv", values)


def add_all(root, method, table, **changes):
    """``table[seed][task]`` of successes."""
    for seed, successes in enumerate(table):
        for task, success in enumerate(successes, start=1):
            add(root, method=method, seed=seed, task=task, success=success, **changes)


def run(root, *arguments):
    """The report's text, without plots unless asked for."""
    plots = [] if "--plots" in arguments else ["--no-plots"]
    rest = [argument for argument in arguments if argument != "--plots"]
    output = root.parent / "report"
    report.main(["--results", str(root), "--output", str(output), *plots, *rest])
    return (output / "report.md").read_text()


def cells(text, start):
    """The cells of the first table line that starts with a given cell."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "results"


class TestRows:
    def test_round_trip(self, root):
        add(root, seed=0)
        add(root, seed=1, command='python evor.py "a, b" = 1', return_mean=1 / 3)
        rows = results_io.read_rows(root)
        assert rows[0] == results_io.ResultRow(**FULL)
        assert rows[1].command == 'python evor.py "a, b" = 1'
        assert rows[1].return_mean == 1 / 3
        assert rows[0].peak_memory_mb is None and rows[0].tau_r == float("inf")

    def test_the_same_run_is_replaced(self, root):
        add(root, success=0.1)
        add(root, success=0.9)
        add(root, success=0.4, tau_r=10.0)  # another setting is another row
        assert [r.success for r in results_io.read_rows(root)] == [0.9, 0.4]

    @pytest.mark.parametrize(
        "changes, match",
        [
            ({"success": 1.5}, "success must lie between 0 and 1, got 1.5"),
            ({"success": float("nan")}, "success must be finite, got nan"),
            ({"return_mean": float("-inf")}, "return_mean must be finite"),
            ({"tau_r": float("nan")}, "tau_r must be finite"),
            ({"tau_q": float("nan")}, "tau_q must be finite"),
            ({"episodes": 0}, "episodes must be at least 1"),
            ({"task": 0}, "task must be at least 1"),
            ({"seed": 0.5}, "seed must be of type int, got 0.5"),
            ({"seed": None}, "seed must be of type int, got None"),
            ({"num_updates": -1}, "num_updates must be at least 0, got -1"),
            ({"method": ""}, "method must be a text that is not empty"),
            ({"sucess": 1.0}, r"unknown \['sucess'\], missing \[\]"),
        ],
    )
    def test_bad_values(self, root, changes, match):
        with pytest.raises(ValueError, match=match):
            results_io.append_row(root / "a.csv", row(**changes))
        assert not root.exists()

    def test_missing_columns(self, root):
        with pytest.raises(ValueError, match=r"unknown \[\], missing \['env', 'success'\]"):
            values = {k: v for k, v in FULL.items() if k not in ("env", "success")}
            results_io.append_row(root / "a.csv", values)

    def test_an_interrupted_write_leaves_the_old_file(self, root, monkeypatch):
        add(root, seed=0)

        def fail(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            add(root, seed=1)
        monkeypatch.undo()
        assert [r.seed for r in results_io.read_rows(root)] == [0]
        assert os.listdir(root / ENV) == ["evor.csv"]

    @pytest.mark.skipif(sys.platform == "win32", reason="forks")
    def test_writers_at_the_same_time_lose_nothing(self, root):
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=lambda s=s: [add(root, seed=10 * s + i) for i in range(10)])
            for s in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(r.seed for r in results_io.read_rows(root)) == list(range(40))


class TestReading:
    def test_empty_or_missing_folder(self, root):
        with pytest.raises(FileNotFoundError, match="results must be a folder"):
            results_io.read_rows(root)
        root.mkdir()
        with pytest.raises(ValueError, match="results must hold rows in <env>/<method>.csv"):
            results_io.read_rows(root)

    def test_foreign_columns(self, root):
        add(root)
        (root / ENV / "study.csv").write_text("step,loss\n1,2\n")
        with pytest.raises(ValueError, match=r"study.csv must have the columns env,task,.*step"):
            results_io.read_rows(root)
        (root / ENV / "study.csv").rename(root / ENV / "_study.csv")  # left alone
        assert len(results_io.read_rows(root)) == 1

    def test_files_from_before_a_column(self, root):
        """Are read, and written with it when a row is added."""
        add(root, seed=0)
        path = root / ENV / "evor.csv"
        lines = [line.split(",") for line in path.read_text().splitlines()]
        place = lines[0].index("num_steps")
        older = [",".join(line[:place] + line[place + 1 :]) for line in lines]
        path.write_text("\n".join(older) + "\n")
        assert results_io.read_rows(root)[0].num_steps is None
        add(root, seed=0, num_steps=1)  # another setting
        add(root, seed=0, num_steps=1)
        assert [row.num_steps for row in results_io.read_rows(root)] == [None, 1]
        path.write_text("\n".join([older[0], older[1] + ",1"]))
        with pytest.raises(ValueError, match="line 2: expected 26 values"):
            results_io.read_rows(root)

    def test_rows_of_another_method(self, root):
        add(root, method="bc")
        (root / ENV / "bc.csv").rename(root / ENV / "iql.csv")
        with pytest.raises(ValueError, match="method='iql' only, got .* 'bc'"):
            results_io.read_rows(root)

    @pytest.mark.parametrize("place", ["evor.csv", f"{ENV}/seed0/evor.csv"])
    def test_files_in_other_places(self, root, place):
        add(root)
        path = root / place
        path.parent.mkdir(exist_ok=True)
        path.write_text((root / ENV / "evor.csv").read_text())
        with pytest.raises(ValueError, match=rf"hold <env>/<method>.csv alone, got .*{place}"):
            results_io.read_rows(root)

    def test_files_without_rows(self, root):
        add(root)
        (root / ENV / "bc.csv").write_text((root / ENV / "evor.csv").read_text().splitlines()[0])
        with pytest.raises(ValueError, match="bc.csv must hold rows, got none"):
            results_io.read_rows(root)

    def test_files_that_are_no_text(self, root):
        add(root)
        (root / ENV / "bc.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="bc.csv must be a csv file in UTF-8"):
            results_io.read_rows(root)

    def test_bad_cell_names_the_line(self, root):
        add(root, seed=0)
        add(root, seed=1)
        path = root / ENV / "evor.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], lines[2].replace(",0.5,", ",half,")]))
        with pytest.raises(ValueError, match=r"evor.csv, line 3: .*half"):
            results_io.read_rows(root)
        path.write_text("\n".join([*lines[:2], "a,b"]))
        with pytest.raises(ValueError, match="line 3: expected 27 values"):
            results_io.read_rows(root)

    def test_duplicates(self, root):
        add(root)
        path = root / ENV / "evor.csv"
        path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
        with pytest.raises(ValueError, match="holds a run twice"):
            results_io.read_rows(root)


class TestReport:
    def test_numbers(self, root):
        add_all(root, "evor", [[0.2, 1.0], [0.4, 1.0], [0.6, 1.0]])
        changes = {"train_seconds": 20.0, "parameters": None, "return_mean": -40.0}
        changes["training"] = "lr=0.1"
        add_all(root, "bc", [[0.1, 0.0]] * 3, **changes)
        text = run(root)
        line = cells(text, "evor")
        assert line[1] == "3 × 2"
        assert line[2].startswith("70.0 [") and line[2].endswith("]")
        # sorted .2 .4 .6 1 1 1, one dropped at either end: 3.0 / 4
        assert line[3].startswith("75.0 [")
        assert line[4:] == ["-12.5 [-12.5, -12.5]", "1,000", "1,234", "10", "-", "2.00", "-"]
        # no spread among the seeds of a task: an interval of width zero
        assert cells(text, "bc")[2:4] == ["5.0 [5.0, 5.0]", "5.0 [5.0, 5.0]"]
        assert cells(text, "bc")[4:8] == ["-40.0 [-40.0, -40.0]", "1,000", "-", "20"]
        tasks = text[text.index("| Method | Task 1 | Task 2 |") :]
        assert cells(tasks, "evor")[1:] == ["40.0", "100.0"]
        comparison = text[text.index("| evor against |") :]
        assert cells(comparison, "bc")[1].startswith("65.0 [")
        assert cells(comparison, "bc")[2:4] == ["100.0 [100.0, 100.0]", "27.5 [27.5, 27.5]"]
        assert cells(comparison, "bc")[4] == "0, 1, 2: 55.0, 65.0, 75.0; 27.5, 27.5, 27.5"
        shared = "protocol small, num_updates 1000, num_transitions 99, hidden 8x8, batch_size 4"
        assert f"- All: {shared}, device cpu, episodes 10, tau_r inf, tau_q 0.0\n" in text
        command = "first of 6 runs: `python evor.py seed=0`"
        assert f"- bc: lr 0.1; {command}\n- evor: lr 0.001, gamma 0.99; {command}" in text

    def test_differences_of_each_seed(self, root):
        """They are paired by the number of the seed, over seeds that both have, or not at all."""
        for seed, value in ((0, 10.0), (5, 20.0)):
            for task in (1, 2):
                add(root, method="evor", task=task, seed=seed, return_mean=value + task)
                add(root, method="bc", task=task, seed=seed, return_mean=1.0)
                add(root, method="iql", task=task, seed=seed + 1, return_mean=1.0)
                add(root, method="qc", task=task, seed=seed, return_mean=1.0)
        for task in (1, 2):  # one seed more, which evor has not
            add(root, method="qc", task=task, seed=3, return_mean=-1000.0, success=0.0)
        text = run(root)
        assert cells(text, "qc")[4].startswith("-332.7 [")
        comparison = text[text.index("| evor against |") :]
        assert cells(comparison, "bc")[4] == "0, 5: 0.0, 0.0; 10.5, 20.5"
        assert cells(comparison, "qc")[1:] == cells(comparison, "bc")[1:]
        assert cells(comparison, "qc")[3].startswith("15.5 [")
        assert cells(comparison, "iql")[4] == "-"

    def test_published_numbers_stand_apart(self, root):
        add_all(root, "qc-5", [[0.5], [0.5]])
        text = run(root)
        header = cells(text, "Method")
        assert header[-1] == "**Published, not our runs** (%)"
        assert cells(text, "qc-5")[-1] == "66 [63, 70] (arXiv 2507.07969)"
        # Methods that were not run have nothing but their citation.
        assert cells(text, "*Value Flows*")[1:] == ["-"] * 9 + ["69 ± 4 (arXiv 2510.07650)"]

    def test_several_environments(self, root):
        for env, success in ((ENV, 0.0), ("scene-play", 1.0)):
            add_all(root, "evor", [[success], [success]], env=env)
        add_all(root, "bc", [[0.5], [0.5]], env="scene-play")
        text = run(root)
        assert text.index("All 2 environments") < text.index(f"### {ENV}")
        assert cells(text, "evor")[1:3] == ["2 × 2", "50.0 [50.0, 50.0]"]
        assert "Left out, because not run on all of them: bc." in text

    def test_names_of_one_method_in_several_environments(self, root):
        """Single actions here, chunks there: 0 and 1 for EVOR, 0.5 twice for the other."""
        for env, chunk, success in ((ENV, "", 0.0), ("scene-play", "-5", 1.0)):
            add_all(root, f"evor{chunk}", [[success], [success]], env=env)
            add_all(root, f"scalar{chunk}", [[0.25], [0.25]], env=env)
        options = ["--same", "EVOR=evor,evor-5", "--same", "scalar critic=scalar,scalar-5"]
        text = run(root, *options, "--reference", "EVOR").split(f"### {ENV}")[0]
        assert cells(text, "EVOR")[1:3] == ["2 × 2", "50.0 [50.0, 50.0]"]
        comparison = text[text.index("EVOR against") :]
        assert cells(comparison, "scalar critic")[1] == "25.0 [25.0, 25.0]"

    def test_two_methods_of_an_environment_are_not_the_same(self, root):
        for method in ("evor", "scalar"):
            add_all(root, method, [[1.0], [1.0]])
        add_all(root, "evor", [[1.0], [1.0]], env="scene-play")
        with pytest.raises(ValueError, match="--same both must name one method for each"):
            run(root, "--same", "both=evor,scalar")
        with pytest.raises(ValueError, match="--same must be NAME=METHOD,METHOD"):
            run(root, "--same", "both=evor,qc")

    def test_unequal_seeds_across_environments_are_not_pooled(self, root):
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "evor", [[1.0], [1.0], [1.0]], env="scene-play")
        assert "evor is left out: [2, 3] seeds" in run(root)

    def test_mixed_data_are_an_error(self, root):
        for method, data in (("evor", "official"), ("bc", "local-seed0-1000000")):
            add_all(root, method, [[1.0], [1.0]], training=f"data={data} lr=0.1")
        add_all(root, "iql", [[1.0], [1.0]], training="lr=0.1")  # an older row
        with pytest.raises(
            ValueError, match="methods of different data would share a table: .*'off"
        ):
            run(root)

    @pytest.mark.parametrize(
        "column, value",
        [("protocol", "large"), ("num_transitions", 5), ("episodes", 50), ("num_updates", 7)],
    )
    def test_mixed_protocols_are_an_error(self, root, column, value):
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "bc", [[1.0], [1.0]], **{column: value})
        with pytest.raises(ValueError, match=f"methods of different {column} would share a table"):
            run(root)
        text = run(root, "--where", f"{column}={FULL[column]}")
        assert "| bc |" not in text

    def test_budgets_are_mixed_on_request(self, root):
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "bc", [[1.0], [1.0]], num_updates=7)
        text = run(root, "--mix", "num_updates")
        assert [cells(text, name)[5] for name in ("evor", "bc")] == ["1,000", "7"]
        with pytest.raises(ValueError, match=r"--mix must be one of protocol, .*, got \['seed'\]"):
            run(root, "--mix", "seed")

    @pytest.mark.parametrize(
        "changes, key",
        [
            ({"protocol": "large"}, "protocol"),
            ({"num_updates": 7}, "num_updates"),
            ({"training": "lr=0.5 gamma=0.99"}, "lr"),
        ],
    )
    def test_environments_of_different_protocols_are_not_averaged(self, root, changes, key):
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "evor", [[0.0], [0.0]], env="scene-play", **changes)
        with pytest.raises(ValueError, match=f"evor: different {key} would be averaged: .*scene"):
            run(root)

    def test_environments_may_have_discounts_of_their_own(self, root):
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "evor", [[0.0], [0.0]], env="scene-play", training="lr=0.001 gamma=0.9")
        assert "| evor | 2 × 2 | 50.0 [50.0, 50.0] |" in run(root)

    @pytest.mark.parametrize(
        "column, value",
        [("protocol", "b"), ("tau_r", 1.0), ("device", "x"), ("training", "lr=0.01 gamma=0.99")],
    )
    def test_mixed_settings_are_an_error(self, root, column, value):
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "evor", [[0.0], [0.0]], **{column: value})
        add_all(root, "bc", [[0.5], [0.5]], tau_r=None)
        with pytest.raises(ValueError, match=f"evor: rows of different {column} would be averaged"):
            run(root)
        text = run(root, "--where", f"evor:{column}={FULL[column]}")
        assert cells(text, "evor")[2] == "100.0 [100.0, 100.0]"
        assert cells(text, "bc")[2] == "50.0 [50.0, 50.0]"

    def test_split(self, root):
        """Two readings of one agent stand side by side; one setting keeps its name."""
        add_all(root, "evor", [[1.0], [0.5]])
        add_all(root, "evor", [[0.0], [0.5]], tau_r=30.0)
        add_all(root, "bc", [[0.0], [0.0]], tau_r=None)
        text = run(root, "--split", "tau_r", "--reference", "evor tau_r=30.0")
        assert cells(text, "evor tau_r=inf")[2].startswith("75.0 [")
        assert cells(text, "evor tau_r=30.0")[2].startswith("25.0 [")
        assert cells(text, "bc")[2] == "0.0 [0.0, 0.0]"
        assert "| evor tau_r=30.0 against |" in text and "| evor |" not in text
        for seed, spread in ((0, 4), (1, 4), (0, 8), (1, 8)):
            training = f"data=official value_spread={spread}"
            add(root, method="scalar", seed=seed, tau_r=30.0, training=training)
        text = run(root, "--split", "tau_r", "--split", "value_spread", "--reference", "bc")
        assert cells(text, "scalar value_spread=4") and cells(text, "scalar value_spread=8")
        with pytest.raises(ValueError, match=r"--split must be one of .*got \['seed'\]"):
            run(root, "--split", "seed")

    def test_references(self, root):
        """Each environment is compared with those of the references that it has."""
        add_all(root, "evor", [[1.0], [1.0]])
        add_all(root, "bc", [[0.0], [0.0]])
        add_all(root, "bc", [[0.0], [0.0]], env="scene-play")
        add_all(root, "evor-5", [[0.5], [0.5]], env="scene-play")
        medium, large = run(root, "--reference", "evor", "--reference", "evor-5").split(
            "### scene-play"
        )
        assert "| evor against |" in medium and "| evor-5 against |" not in medium
        assert "| evor-5 against |" in large and "| evor against |" not in large
        with pytest.raises(ValueError, match=r"--reference must be one of .*got \['qc-7'\]"):
            run(root, "--reference", "qc-7")

    def test_missing_seeds_are_an_error(self, root):
        add_all(root, "evor", [[1.0, 1.0], [1.0]])
        with pytest.raises(
            ValueError, match=r"as many seeds for each task needed, got {1: 2, 2: 1}"
        ):
            run(root)

    def test_different_tasks_are_an_error(self, root):
        add_all(root, "evor", [[1.0, 1.0], [1.0, 1.0]])
        add_all(root, "bc", [[1.0], [1.0]])
        with pytest.raises(ValueError, match="all methods must have the same tasks"):
            run(root)

    def test_single_seed(self, root):
        add_all(root, "evor", [[0.5, 1.0]])
        with pytest.raises(ValueError, match="at least 2 seeds per task, got 1; pass --allow"):
            run(root)
        assert cells(run(root, "--allow-single-seed"), "evor")[2] == "75.0 (1 seed)"

    @pytest.mark.parametrize(
        "condition, match",
        [
            ("colour=red", "--where must be .*got 'colour=red'"),
            ("protocol", "--where must be"),
            ("seed=many", "--where seed=many must hold a value of seed: invalid literal"),
            ("tau_q=abc", "--where tau_q=abc must hold a value of tau_q: could not convert"),
            ("evro:tau_r=100", r"--where METHOD must be one of bc, evor, got \['evro'\]"),
            ("evor:tau_q=3.1", "--where evor:tau_q=3.1 leaves no rows of evor"),
            ("protocol=none", "--where protocol=none leaves no rows"),
        ],
    )
    def test_bad_conditions(self, root, condition, match):
        for method in ("evor", "bc"):
            add_all(root, method, [[1.0], [1.0]])
        with pytest.raises(ValueError, match=match):
            run(root, "--where", condition)

    @pytest.mark.parametrize(
        "content, match",
        [
            (b"a,b\n1,2\n", r"published.csv must have the columns \['env', 'method', 'source', "),
            (b"env,method,success_percent\n", r"must have the columns \['source'\]"),
            (b"\xff\xfe\x00", "published.csv must be a csv file in UTF-8: 'utf-8' codec can't"),
        ],
    )
    def test_bad_published_numbers(self, root, tmp_path, content, match):
        add_all(root, "evor", [[1.0], [1.0]])
        (tmp_path / "published.csv").write_bytes(content)
        with pytest.raises(ValueError, match=match):
            run(root, "--published", str(tmp_path / "published.csv"))

    def test_repeatable(self, root):
        add_all(root, "evor", [[0.2, 1.0], [0.4, 0.3], [0.6, 1.0]])
        assert run(root) == run(root)
        assert run(root) != run(root, "--seed", "1", "--num-resamples", "10")

    @pytest.mark.skipif(not _has_matplotlib, reason="matplotlib not installed")
    def test_plot(self, root):
        add_all(root, "evor", [[0.2, 1.0], [0.4, 1.0]])
        text = run(root, "--plots")
        assert f"(./{ENV}.png)" in text
        path = root.parent / "report" / f"{ENV}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert sorted(os.listdir(path.parent)) == [f"{ENV}.png", "report.md"]

    def test_curves(self, root):
        for tau_q, success, value in ((10.0, 0.5, -30.0), (1.0, 0.25, -10.0)):
            for tau_r in (30.0, 100.0):
                add(root, tau_q=tau_q, tau_r=tau_r, success=success, return_mean=value - tau_r)
        add(root, method="bc", tau_q=None, tau_r=None)  # one draw: no temperature
        add(root, method="qc", tau_q=1.0)  # one value: no curve
        rows = report_methods.split(results_io.read_rows(root), ["tau_r", "tau_q"])
        ((env, methods),) = report_methods.group(rows).items()
        assert env == ENV
        assert report_methods.curves(methods, "tau_q") == {
            "evor tau_r=30.0": [(1.0, -40.0, 25.0), (10.0, -60.0, 50.0)],
            "evor tau_r=100.0": [(1.0, -110.0, 25.0), (10.0, -130.0, 50.0)],
        }

    def test_best(self, root):
        for env, returns in ((ENV, (-10.0, -30.0)), ("scene-play", (-30.0, -20.0))):
            for tau_q, value in zip((1.0, 3.0), returns):
                for seed in range(2):
                    options = {"env": env, "seed": seed, "return_mean": value + seed}
                    add(root, tau_q=tau_q, success=tau_q / 10, **options)
            add(root, env=env, method="bc", success=0.0, tau_q=None)
        text = run(root, "--best", "tau_q", "--allow-single-seed", "--where", "evor:seed=0")
        assert cells(text, "evor")[2] == "20.0 (1 seed)"  # 10 and 30 percent, at 1 and at 3
        rows = report_methods.best(results_io.read_rows(root), ["tau_q"])
        chosen = {(row.env, row.method): row.tau_q for row in rows}
        assert chosen == {
            (ENV, "evor"): 1.0,
            (ENV, "bc"): None,
            ("scene-play", "evor"): 3.0,
            ("scene-play", "bc"): None,
        }
        with pytest.raises(ValueError, match=r"--best must be one of .*, got \['success'\]"):
            run(root, "--best", "success")
        add(root, tau_q=1.0, seed=2)
        with pytest.raises(ValueError, match="evor: --best needs the same tasks and seeds"):
            run(root, "--best", "tau_q")

    def test_best_of_a_setting_of_the_training(self, root):
        """Chosen for each environment, so that the table of all of them holds both."""
        for env, better in ((ENV, 8), ("scene-play", 4)):
            for spread in (4, 8):
                success = 0.75 if spread == better else 0.25
                for seed in range(2):
                    training = f"lr=0.001 value_spread={spread}"
                    options = {"seed": seed, "training": training, "success": success}
                    add(root, env=env, return_mean=100 * success, **options)
        text = run(root, "--best", "value_spread")
        assert text.count("\n| evor | 2 × 1 | 75.0 [75.0, 75.0] |") == 2
        assert text.count("\n| evor | 2 × 2 | 75.0 [75.0, 75.0] |") == 1

    @pytest.mark.skipif(not _has_matplotlib, reason="matplotlib not installed")
    def test_plot_of_curves(self, root):
        for env, method in ((ENV, "evor"), (ENV, "qc"), ("scene-play", "evor")):
            for tau_q in (1.0, 3.0):
                add(root, env=env, method=method, tau_q=tau_q)
        options = ("--split", "tau_q", "--curve", "tau_q", "--allow-single-seed")
        text = run(root, "--plots", *options, "--reference", "evor tau_q=1.0")
        assert "(./tau_q.png)" in text
        path = root.parent / "report" / "tau_q.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="--curve must be one of .*tau_q, got 'nodes'"):
            run(root, "--plots", *options[:2], "--curve", "nodes", "--allow-single-seed")


class TestReadme:
    @pytest.fixture
    def results(self, root):
        add_all(root, "evor", [[0.5], [0.5]])
        return root

    def test_only_what_stands_between_the_markers_is_replaced(self, results, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(f"# Top\n\n{report.START}\nold\n{report.END}\nbottom\n")
        for _ in range(2):  # renewing twice changes nothing
            text = run(results, "--readme", str(readme))
            content = readme.read_text()
            assert content == f"# Top\n\n{report.START}\n{text.strip()}\n{report.END}\nbottom\n"

    @pytest.mark.parametrize(
        "content", ["no markers", f"{report.START} only", f"{report.END}{report.START}"]
    )
    def test_missing_markers(self, results, tmp_path, content):
        readme = tmp_path / "README.md"
        readme.write_text(content)
        with pytest.raises(ValueError, match="README.md must hold"):
            run(results, "--readme", str(readme))
        assert readme.read_text() == content

    def test_errors_are_one_line_for_the_user(self, tmp_path):
        command = [sys.executable, str(RECIPE / "report.py"), "--output", str(tmp_path)]
        result = subprocess.run(
            [*command, "--results", str(tmp_path / "none")], capture_output=True, text=True
        )
        assert result.returncode == 1
        assert result.stderr.startswith("error: results must be a folder")
        assert "Traceback" not in result.stderr

    def test_a_folder_in_place_of_a_file(self, results, tmp_path):
        (results / ENV / "bc.csv").mkdir()
        command = [sys.executable, str(RECIPE / "report.py"), "--results", str(results)]
        command += ["--output", str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ") and "bc.csv" in result.stderr
        assert "Traceback" not in result.stderr


if __name__ == "__main__":
    pytest.main([__file__])
