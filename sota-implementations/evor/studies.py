# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the studies share: trained agents, their evaluation, raw rows and pictures of success.

A study writes ``<results_dir>/_studies/<study>/<env>.csv`` and a picture beside it. report.py
leaves folders alone whose name starts with an underscore. Aggregates are drawn and never stored.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import agents
import checkpoint_io
import figures
import result_rows
import results_io
import torch
import train_baseline
import utils
import value_study
from matplotlib import pyplot as plt
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_evor import EVORActor, FlowMatchingPolicy, OGBenchEnv, ReturnFlow
from torchrl_evor.envs import rollout_episodes
from torchrl_evor.modules import ReturnModel
from torchrl_evor.record import wilson_interval

# What was measured; all other columns say what was run.
MEASURED = (
    "success",
    "return_mean",
    "length_mean",
    "eval_seconds_per_decision",
    "latency_seconds",
    "train_seconds",
)


@dataclass
class Trained:
    """A trained agent and where it comes from."""

    policy: FlowMatchingPolicy
    returns: ReturnModel
    env: str
    task: int
    method: str
    seed: int
    chunk_size: int = 1

    @property
    def env_name(self) -> str:
        """OGBench's name of the single-task dataset."""
        return f"{self.env}-singletask-task{self.task}-v0"


def load(checkpoint: str | Path | None, device: torch.device | str = "cpu") -> Trained:
    """Opens a run of ``evor.py`` or ``train_baseline.py``, or an agent file of ``many.py``.

    Args:
        checkpoint (path-like): the run's folder, the checkpoint in it, or the file.
        device (torch.device or str, optional): where the networks go. Defaults to ``"cpu"``.

    Raises:
        FileNotFoundError: if there is no such run or file.
        ValueError: if its content is of another kind, or does not fit its own configuration.
    """
    expected = (
        "checkpoint must be the folder of a run of evor.py or train_baseline.py, or an "
        f"agents/*.pt file, got {None if checkpoint is None else str(checkpoint)!r}."
    )
    if checkpoint is None:
        raise ValueError(expected)
    path = Path(checkpoint)
    if path.is_file():
        return _load_agent(path, device)
    folder = path if Checkpoint.is_checkpoint(path) else path / "checkpoint"
    if not Checkpoint.is_checkpoint(folder):
        raise FileNotFoundError(expected)
    if (folder / checkpoint_io.SIZES).exists():  # which older checkpoints lack
        checkpoint_io.check_sizes(folder, "checkpoint")
    return _load_run(folder, device)


def _load_agent(path: Path, device) -> Trained:
    try:
        content = agents.read(path)
        actor = agents.build(content, device)
    except Exception as error:
        raise ValueError(f"checkpoint={str(path)!r} is no agent of many.py: {error!r}") from error
    if content["method"] == "bc":
        raise ValueError(f"checkpoint={str(path)!r} is a 'bc' agent, without a value to act by.")
    trained = Trained(
        actor.policy,
        actor.returns,
        **{name: content[name] for name in ("env", "task", "seed", "chunk_size")},
        method=agents.label(content),
    )
    _check_sizes(path, content, *_dimensions(trained.env_name, trained.chunk_size))
    return trained


def _check_sizes(path: Path, content: dict, observation_dim: int, action_dim: int) -> None:
    """Networks of another environment or length of chunks load as well: only sizes tell."""
    features = observation_dim + action_dim
    # Besides, a policy reads the flow time, and a reward-to-go flow z and the flow time.
    value_inputs = features + (2 if content["method"] == "evor" else 0)
    policy = agents.sizes(content["policy"])
    values = {agents.sizes(state)[0] for state in content["value"]}
    if policy != (features + 1, action_dim) or values != {value_inputs}:
        raise ValueError(
            f"checkpoint={str(path)!r} must fit env={content['env']!r} and "
            f"chunk_size={content['chunk_size']}: a policy of {features + 1} inputs and "
            f"{action_dim} outputs, values of {value_inputs} inputs, got a policy of {policy[0]} "
            f"and {policy[1]}, values of {', '.join(map(str, sorted(values)))}."
        )


def _load_run(folder: Path, device) -> Trained:
    saved = Checkpoint(config={}, progress={})
    try:
        saved.load(folder)
        cfg = checkpoint_io.with_defaults(saved.components["config"])
        method = cfg.get("method", "evor")
        dimensions = _dimensions(utils.env_name(cfg), cfg.chunk_size)
        # Units and weights come with the checkpoint.
        if "method" in cfg:
            sizes = train_baseline.plain_sizes(cfg, *dimensions)
            loss, actor, _, _ = train_baseline.make_agent(cfg, sizes, torch.device("cpu"))
        else:
            policy, returns = utils.build_networks(cfg, *dimensions)
            loss, _, _ = utils.make_loss(cfg, policy, returns)
            actor = utils.make_actor(cfg, policy, returns)
        Checkpoint(loss=loss).load(folder, components=["loss"])
    except Exception as error:
        raise ValueError(
            f"checkpoint={str(folder)!r} does not fit the networks of its configuration, or is "
            f"not of evor.py or train_baseline.py: {error!r}"
        ) from error
    if not isinstance(actor, EVORActor):
        raise ValueError(
            f"checkpoint={str(folder)!r} is a {method!r} agent, which does not choose among "
            "candidates by a value."
        )
    actor = actor.to(device)
    return Trained(
        actor.policy,
        actor.returns,
        env=cfg.env.name,
        task=cfg.env.task,
        method=result_rows.run_name(cfg, method),
        seed=cfg.seed,
        chunk_size=cfg.chunk_size,
    )


def _dimensions(env_name: str, chunk_size: int) -> tuple[int, int]:
    """Size of an observation and of a chunk of actions."""
    env = OGBenchEnv(env_name)
    sizes = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    env.close()
    return sizes[0], chunk_size * sizes[1]


def make_actor(trained: Trained, options: dict) -> EVORActor:
    """The actor of a trained agent with some options; the numbers are checked.

    Raises:
        ValueError: if an option is bad, or has no meaning for a scalar critic.
    """
    return EVORActor(trained.policy, trained.returns, **options)


def evaluate(
    trained: Trained, actor: EVORActor, *, episodes: int, seed: int, num_envs: int, action_noise=0.0
) -> dict:
    """Columns of the episodes; every call meets the same starts and the same noise.

    ``eval_seconds_per_decision`` is a share of calls for ``num_envs`` episodes at once,
    ``latency_seconds`` the median time of a decision for one state alone.
    """
    device = trained.returns.loc.device
    torch.manual_seed(seed)
    with set_exploration_type(ExplorationType.RANDOM):
        outcome = rollout_episodes(
            lambda: OGBenchEnv(trained.env_name, action_noise=action_noise),
            actor,
            episodes,
            seed=seed,
            num_envs=num_envs,
            chunk_size=trained.chunk_size,
            device=device,
            record=("observation",),
        )
        state = outcome["trace", "observation"][:1, 0].to(device)
        latency = decision_seconds(actor, state)
    return {**result_rows.episode_columns(outcome), "latency_seconds": latency}


@torch.no_grad()
def decision_seconds(actor: EVORActor, observation: torch.Tensor, repeats: int = 10) -> float:
    """Median seconds of one decision for ``observation`` ``[B, obs]``, after two to warm up."""

    def decide() -> None:
        states = TensorDict(observation=observation, batch_size=observation.shape[:1])
        # The copy to the CPU waits for the device.
        actor(states)["action"].cpu()

    return median_seconds(decide, repeats, warmup=2)


def median_seconds(call: Callable[[], object], repeats: int, warmup: int) -> float:
    """Median time of a call that waits for its device, after some to warm up."""
    seconds = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def labels(trained: Trained, checkpoint: str, options: dict) -> dict:
    """Columns that say what was run."""
    return {
        "env": trained.env,
        "task": trained.task,
        "method": trained.method,
        "seed": trained.seed,
        "checkpoint": str(checkpoint),
        **options,
        "device": result_rows.device_name(trained.returns.loc.device),
    }


def csv_path(results_dir: str, study: str, env: str) -> Path:
    """``<results_dir>/_studies/<study>/<env>.csv``; its folder is made."""
    path = Path(results_dir) / "_studies" / study / f"{env}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def add_rows(path: Path, rows: list[dict]) -> list[dict[str, str]]:
    """Adds raw rows to a file; what was run before in the same setting is replaced.

    Returns:
        All rows of the file, as text.

    Raises:
        ValueError: if the file has other columns.
    """
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    with results_io._lock(path.parent):
        old = read(path)
        if old and list(old[0]) != list(rows[0]):
            raise ValueError(f"{path} must have the columns {list(rows[0])}, got {list(old[0])}.")
        replaced = {_key(row) for row in rows}
        rows = [*(row for row in old if _key(row) not in replaced), *rows]
        value_study.write(rows, path)
    return rows


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key(row: dict[str, str]) -> tuple:
    return tuple(value for name, value in row.items() if name not in MEASURED)


def pool(rows: list[dict[str, str]]) -> tuple[float, float, float]:
    """Success over all episodes of some rows, and its 95 % Wilson interval."""
    episodes = sum(int(row["episodes"]) for row in rows)
    successes = sum(round(float(row["success"]) * int(row["episodes"])) for row in rows)
    interval = wilson_interval(successes, episodes)
    return successes / episodes, interval.low, interval.high


def plot_success(
    rows: list[dict[str, str]],
    x: str,
    lines: tuple[str, ...],
    path: Path,
    beside: str = "latency_seconds",
) -> None:
    """Success with its interval, steps and a time beside it, against column ``x``.

    Rows of several trainings of one task and seed are refused, because they would be one point.

    Args:
        rows (list of dict): raw rows. Episodes of all tasks and seeds that share ``x`` and
            ``lines`` are pooled; rows that differ in them never are.
        x (str): column of the horizontal axis, placed evenly because it may hold 0 and inf.
        lines (tuple of str): columns that tell curves apart; only those that vary are named.
        path (Path): the picture.
        beside (str, optional): column of the right panel, in seconds.

    Raises:
        ValueError: if rows of one point come from several trainings of a task and seed.
    """
    _check_trainings(rows, x, lines)
    ticks = sorted({float(row[x]) for row in rows})
    varying = [name for name in lines if len({row[name] for row in rows}) > 1]
    figure, (success, steps, seconds) = plt.subplots(1, 3, figsize=(13, 3.4))
    for line in dict.fromkeys(tuple(row[name] for name in lines) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in lines) == line]
        named = dict(zip(lines, line))
        label = ", ".join(f"{name}={named[name]}" for name in varying) or named[lines[0]]
        groups = {float(row[x]): [] for row in chosen}
        for row in chosen:
            groups[float(row[x])].append(row)
        values = sorted(groups)
        position = [ticks.index(value) for value in values]
        mean, low, high = zip(*(pool(groups[value]) for value in values))
        below, above = ([abs(m - e) for m, e in zip(mean, edge)] for edge in (low, high))
        success.errorbar(position, mean, yerr=[below, above], marker="o", capsize=3, label=label)
        lengths = [statistics.fmean(float(row["length_mean"]) for row in groups[v]) for v in values]
        steps.plot(position, lengths, marker="o")
        times = [statistics.median(float(row[beside]) for row in groups[v]) for v in values]
        seconds.plot(position, times, marker="o")
    for axis in (success, steps, seconds):
        axis.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        axis.set_xlabel(x)
    success.set(ylabel="success (95 % Wilson interval)", ylim=(-0.03, 1.03))
    success.legend(frameon=False, fontsize=7)
    steps.set(ylabel="mean steps of an episode", ylim=(0, None))
    seconds.set(ylabel=beside.replace("_", " "), yscale="log")
    figure.suptitle(path.stem, fontsize=9)
    figure.tight_layout()
    figures.save(figure, path)


def _check_trainings(rows: list[dict[str, str]], x: str, lines: tuple[str, ...]) -> None:
    """Tasks and seeds are pooled; a seed that was trained twice is two settings, not two seeds."""
    trainings = {}
    for row in rows:
        run = tuple(row[name] for name in ("env", "task", "seed", *lines))
        first = trainings.setdefault((run, float(row[x])), row["checkpoint"])
        if row["checkpoint"] != first:
            raise ValueError(
                f"results_dir must hold one training of {row['env']} task {row['task']} seed "
                f"{row['seed']} for a picture, got checkpoint={first!r} and "
                f"{row['checkpoint']!r} with equal {', '.join(lines)}. All rows are kept; give "
                "each training a results_dir of its own."
            )


def needs_flow(trained: Trained, study: str) -> None:
    """Raises a ValueError where a study sweeps what only a reward-to-go flow has."""
    if not isinstance(trained.returns, ReturnFlow):
        raise ValueError(
            f"study={study!r} needs the reward-to-go flow of an 'evor' agent, "
            f"got method {trained.method!r}."
        )
