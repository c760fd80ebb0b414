# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Turns raw result rows into tables with intervals, and plots.

The rows of this repository, each method at its best:

    python report.py --split lr --best value_spread --best tau_r --best tau_q --mix num_updates \\
        --reference evor-5 --allow-single-seed        writes report/report.md and plots

Rows of one setting (--results <folder>):

    python report.py                                  all of them
    python report.py --readme ../../docs/results.md   also renews the tables of a page
    python report.py --where evor:tau_r=inf           picks one of several settings
    python report.py --split tau_r                    shows each of them as a method of its own
    python report.py --same EVOR=evor,evor-5          one method in the table of all environments
    python report.py --mix num_updates                methods of different budgets in one table
    python report.py --split tau_q --curve tau_q      draws each method along its temperatures
    python report.py --best tau_r --best tau_q        each method as it returns most, by environment

Reads results/<env>/<method>.csv (see results_io.py), one row per trained seed and task. Per
environment: mean and interquartile mean (IQM) of success with intervals by stratified bootstrap
over seeds, cost, comparisons with one method, and published numbers (published.csv) in a column
of their own. Rows of different settings or protocols are never averaged: that is an error.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import sys
from pathlib import Path

from report_methods import (
    SHARED,
    Method,
    best,
    check_known,
    group,
    known_settings,
    parse_same,
    select,
    split,
)
from report_tables import Estimator, environment_section, overall_section
from results_io import open_csv, read_rows, write_text

_has_matplotlib = importlib.util.find_spec("matplotlib") is not None

HERE = Path(__file__).resolve().parent
PLOTS = "@plots@"  # stands for the plots' folder as seen from the file that is written
START, END = "<!-- results:start -->", "<!-- results:end -->"
CITED = ("method", "success_percent", "source")
# Along what a curve can be drawn: the numbers that are chosen when acting.
CURVES = ("num_candidates", "num_samples", "tau_r", "tau_q")


def read_published(path: Path) -> dict[str, list[dict[str, str]]]:
    """Environment -> published rows, with the columns ``CITED``."""
    published: dict[str, list[dict[str, str]]] = {}
    with open_csv(path) as file:
        reader = csv.DictReader(file)
        if missing := {"env", *CITED} - set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns {sorted(missing)}, got none of them.")
        for row in reader:
            published.setdefault(row["env"], []).append(row)
    return published


def renew(readme: Path, text: str) -> None:
    """Replaces what stands between the two markers."""
    content = readme.read_text(encoding="utf-8")
    if content.count(START) != 1 or content.count(END) != 1:
        raise ValueError(f"{readme} must hold the lines {START} and {END} once each.")
    before, rest = content.split(START)
    if END not in rest:
        raise ValueError(f"{readme} must hold {START} before {END}.")
    write_text(readme, f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


def build(args: argparse.Namespace) -> str:
    """The report's text; writes the plots on the way."""
    check_known("--mix", args.mix, SHARED)
    if args.curve not in (None, *CURVES):
        raise ValueError(f"--curve must be one of {', '.join(CURVES)}, got {args.curve!r}.")
    if args.plots and not _has_matplotlib:
        raise ImportError("plots need matplotlib: pip install matplotlib, or pass --no-plots.")
    rows = select(read_rows(args.results), args.where)
    settings = known_settings(rows)
    check_known("--split", args.split, settings)
    check_known("--best", args.best, settings)
    environments = group(best(split(rows, args.split), args.best), args.mix)
    names = {method.name for methods in environments.values() for method in methods}
    same = parse_same(args.same, names)
    names |= set(same.values())
    check_known("--reference", args.reference or (), sorted(names))
    references = ["evor"] if args.reference is None else args.reference
    published = read_published(args.published)
    estimator = Estimator(args.num_resamples, args.confidence, args.seed, args.allow_single_seed)
    sections = [
        environment_section(env, methods, published.get(env, []), references, estimator)
        for env, methods in environments.items()
    ]
    if len(environments) > 1:
        sections.insert(0, overall_section(environments, references, estimator, same, args.best))
    if args.plots:
        sections += draw(args, environments, estimator)
    note = (
        "Success in percent, returns in reward units. Intervals: stratified bootstrap over the "
        "seeds of each task, too narrow where seeds are few, and where what the tasks of a seed "
        "have in common, such as a base policy, weighs much. Published numbers come from 1M "
        "official transitions and 1M updates with other code and hardware, some by way of "
        "secondary notes; they are not comparable with smaller runs. Seconds of training and "
        "memory are those of the program that trained a method, with others where it did."
    )
    return "\n\n".join([note, *sections])


def draw(
    args: argparse.Namespace, environments: dict[str, list[Method]], estimator: Estimator
) -> list[str]:
    """Draws all plots; the lines that show them."""
    import report_plots

    lines = []
    if args.curve is not None:
        report_plots.plot_curves(environments, args.curve, args.output / f"{args.curve}.png")
        lines.append(f"![Success against return along {args.curve}]({PLOTS}/{args.curve}.png)")
    for env, methods in environments.items():
        report_plots.plot_environment(env, methods, estimator, args.output / f"{env}.png")
        lines.append(f"![Success on {env}]({PLOTS}/{env}.png)")
    return lines


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, default=HERE / "results", help="folder of <env>/<method>.csv")
    add("--output", type=Path, default=HERE / "report", help="folder for report.md and plots")
    add("--readme", type=Path, help=f"file whose text between {START} and {END} is replaced")
    add("--published", type=Path, default=HERE / "published.csv", help="cited numbers")
    add("--where", action="append", default=[], metavar="[METHOD:]COLUMN=VALUE", help="row filter")
    add(
        "--split",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a method for each value; a setting of the training will do",
    )
    text = "keeps the values of the best mean return, for each method and environment"
    add("--best", action="append", default=[], metavar="COLUMN", help=text)
    text = "what may differ between the methods of a table nevertheless, one for each use"
    add("--mix", action="append", default=[], metavar="COLUMN", help=text)
    text = "method that the others are compared with, one for each use; evor by default"
    add("--reference", action="append", metavar="METHOD", help=text)
    add("--curve", metavar="COLUMN", help="draws success against return along its values")
    text = "what is one method in the table of all environments, under whatever name in each"
    add("--same", action="append", default=[], metavar="NAME=METHOD,METHOD", help=text)
    add("--num-resamples", type=int, default=2000, help="bootstrap resamples")
    add("--confidence", type=float, default=0.95, help="mass of the intervals")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    add("--allow-single-seed", action="store_true", help="single seeds, without intervals")
    add("--no-plots", dest="plots", action="store_false", help="tables only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    text = build(args)
    write_text(args.output / "report.md", text.replace(PLOTS, ".") + "\n")
    if args.readme is not None:
        plots = Path(os.path.relpath(args.output.resolve(), args.readme.resolve().parent))
        renew(args.readme, text.replace(PLOTS, plots.as_posix()))
    print(f"wrote {args.output / 'report.md'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
