# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Collects OGBench data on this machine, with OGBench's own scripted controllers.

Writes <dataset>.npz and <dataset>-val.npz (a tenth of the size) in OGBench's own format into the
folder. Finished pieces are kept: after an interrupt, repeat the command and it goes on.
Use the files with OGBenchExperienceReplay(..., directory=<folder>).

  collect.py cube-single-play-v0 --folder data
  collect.py pointmaze-medium-navigate-v0 --folder data --num-transitions 300000 --seed 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torchrl_evor.data import collect_ogbench


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset",
        nargs="+",
        help="OGBench names: pointmaze-<size>-{navigate,stitch}-v0, "
        "{cube-*,scene,puzzle-*}-{play,noisy}-v0 (a -singletask name stands for its data set)",
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written")
    parser.add_argument(
        "--num-transitions", type=int, help="at least so many (default: as the official file)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole file (default: 0)")
    parser.add_argument("--num-workers", type=int, help="processes (default: one for each core)")
    parser.add_argument(
        "--noise", type=float, help="level of the controller's noise (default: official)"
    )
    parser.add_argument(
        "--action-noise",
        type=float,
        default=0.0,
        help="deviation of the noise that the world adds to actions (default: 0)",
    )
    parser.add_argument(
        "--p-random-action", type=float, help="share of uniform actions (default: official)"
    )
    parser.add_argument(
        "--episode-length", type=int, help="transitions per trajectory (default: official)"
    )
    parser.add_argument("--no-val", action="store_true", help="write the training file only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    splits = ("train",) if args.no_val else ("train", "val")
    for dataset in args.dataset:
        for split in splits:
            collect(args, dataset, split)
    return 0


def collect(args: argparse.Namespace, dataset: str, split: str) -> None:
    """Writes one file, named as OGBench names it."""
    size = args.num_transitions
    if size is not None and split == "val":
        size = max(1, size // 10)
    args.folder.mkdir(parents=True, exist_ok=True)
    path = collect_ogbench(
        dataset,
        args.folder,
        size,
        seed=args.seed,
        split=split,
        num_workers=args.num_workers,
        noise=args.noise,
        action_noise=args.action_noise,
        p_random_action=args.p_random_action,
        episode_length=args.episode_length,
    )
    print(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"collect.py: {error}")
    except KeyboardInterrupt:
        sys.exit("collect.py: interrupted; repeat the command to go on.")
