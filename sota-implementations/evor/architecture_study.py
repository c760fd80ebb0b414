# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What width, depth, LayerNorm and embeddings of the velocity field buy, against parameters.

Trains the reward-to-go flow of value_study.py in each variant and measures the learnt law.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import checks
import figures
import hydra
import utils
import value_study
from hydra.core.hydra_config import HydraConfig
from matplotlib import pyplot as plt
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from torchrl_evor import ReturnFlow, StackedVelocityMLP
from torchrl_evor.modules.models.embeddings import (
    EmbeddedVelocity,
    FourierEmbedding,
    GaussianBinEmbedding,
)
from torchrl_evor.objectives.td_targets import TD_TARGETS

SETTINGS = ("hidden_sizes", "layer_norm", "z", "time")
LABELS = (*value_study.LABELS, "variant", "parameters", *SETTINGS)


def make_embedding(cfg: DictConfig, name: str, kind: str):
    """Embedding of ``z`` or ``time``; ``None`` leaves it as it is."""
    if kind == "raw":
        return None
    if kind == "fourier":
        return FourierEmbedding(cfg.embeddings.frequencies)
    if kind == "bins":
        return GaussianBinEmbedding(cfg.embeddings.bins, width=cfg.embeddings.width)
    raise ValueError(f"{name} must be 'raw', 'fourier' or 'bins', got {kind!r}.")


def make_model(cfg: DictConfig, truth: value_study.Truth, method: str) -> ReturnFlow:
    """The reward-to-go flow of a variant, for all seeds; see :func:`value_study.make_model`."""
    embeddings = {name: make_embedding(cfg, name, cfg[name]) for name in ("z", "time")}
    inputs = truth.observation.shape[-1] + truth.action.shape[-1]
    network = StackedVelocityMLP(
        cfg.num_seeds,
        inputs + EmbeddedVelocity.num_extra(**embeddings),
        hidden_sizes=cfg.hidden_sizes,
        layer_norm=cfg.layer_norm,
    )
    network = value_study.standardize(network, cfg, truth)
    if any(module is not None for module in embeddings.values()):
        network = EmbeddedVelocity(network, **embeddings)
    return ReturnFlow(network, cfg.num_steps, loc=truth.loc, scale=truth.scale)


def make_variants(cfg: DictConfig) -> dict[str, DictConfig]:
    """Configuration of each variant, checked before any of them is trained.

    Raises:
        ValueError: if there are none, one names an unknown setting, or a method is no TD target.
    """
    if not cfg.variants or not cfg.problems or not cfg.methods:
        raise ValueError("variants, problems and methods must each hold at least one entry.")
    unknown = sorted(set(cfg.methods) - set(TD_TARGETS))
    if unknown:
        raise ValueError(f"methods must be TD targets of {tuple(TD_TARGETS)}, got {unknown}.")
    variants = {}
    for name, changes in cfg.variants.items():
        settings = OmegaConf.to_container(cfg, resolve=True)
        changes = OmegaConf.to_container(changes or OmegaConf.create())
        checks.compare(f"variants.{name}", changes, settings["base"])
        settings.update({**settings["base"], **changes})
        variants[name] = OmegaConf.create(settings)
        for key in ("z", "time"):
            make_embedding(variants[name], key, variants[name][key])
    return variants


def num_parameters(cfg: DictConfig, truth: value_study.Truth) -> int:
    """Parameters of one seed's velocity field."""
    model = make_model(cfg, truth, "bellman")
    return sum(parameter.numel() for parameter in model.parameters()) // cfg.num_seeds


def study(name: str, variants: dict[str, DictConfig], truth, method: str, bar: tqdm) -> list[dict]:
    """Rows of all variants on one problem."""
    rows = []
    for variant, cfg in variants.items():
        bar.set_description(f"{name}, {method}, {variant}")
        label = {key: cfg[key] for key in SETTINGS[1:]}
        label["hidden_sizes"] = "x".join(map(str, cfg.hidden_sizes))
        label.update(variant=variant, parameters=num_parameters(cfg, truth))
        measured = value_study.study(cfg, name, truth, method, bar, build=make_model)
        rows += [{**label, **row} for row in measured]
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Last errors of each variant against its parameters: mean over seeds, and their range."""
    last = max(row["updates"] for row in rows)
    panels, colors = {}, plt.get_cmap("tab20")
    for row in rows:
        columns = [key for key in row if key not in LABELS]
        panels.update({(row["problem"], row["method"], column): None for column in columns})
    width = min(5, len(panels))
    height = math.ceil(len(panels) / width)
    figure, axes = plt.subplots(height, width, figsize=(3.4 * width, 3 * height), squeeze=False)
    for axis, (problem, method, column) in zip(axes.flat, panels):
        for index, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            chosen = [
                row
                for row in rows
                if (row["problem"], row["method"], row["variant"]) == (problem, method, variant)
                and row["updates"] == last
            ]
            values = [row[column] for row in chosen]
            mean = statistics.fmean(values)
            reach = [[mean - min(values)], [max(values) - mean]]
            size = chosen[0]["parameters"]
            axis.errorbar(
                [size], [mean], yerr=reach, fmt="o", capsize=2, label=variant, color=colors(index)
            )
        axis.set_title(f"{problem.split('-singletask')[0]}, {method}: {column}", fontsize=8)
        axis.set(xlabel="parameters", xscale="log", yscale="log")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figures.legend_beside(figure, axes[0, 0])
    figures.save(figure, path, dpi=130, bbox_inches="tight")


@hydra.main(config_path=".", config_name="architecture_study", version_base="1.3")
def main(cfg: DictConfig) -> None:
    checks.check_options(cfg, free=["variants"])
    value_study.check_config(cfg)
    utils.configure_threads(cfg.num_threads)
    variants = make_variants(cfg)
    output = Path(cfg.output or HydraConfig.get().runtime.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    total = len(cfg.problems) * len(cfg.methods) * len(variants) * cfg.num_updates
    rows = []
    with tqdm(total=total, unit="update") as bar:
        for name in cfg.problems:
            truth = value_study.make_truth(cfg, name)
            for method in cfg.methods:
                rows += study(name, variants, truth, method, bar)
                value_study.write(rows, output / "architecture_study.csv")
    plot(rows, output / "architecture_study.png")
    tqdm.write(f"architecture_study.csv and architecture_study.png are in {output}")


if __name__ == "__main__":
    main()
