# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Parts of the recipe: data, networks, loss, evaluation and the state of a run."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import time
from pathlib import Path

import checkpoint_io
import results_io
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchrl._utils import timeit
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule
from torchrl.record.loggers import get_logger
from tqdm import tqdm

from torchrl_evor import (
    EVORActor,
    EVORLoss,
    FlowMatchingPolicy,
    OGBenchEnv,
    OGBenchExperienceReplay,
    ReturnFlow,
    VelocityMLP,
)
from torchrl_evor.envs import resolve_environment, rollout_episodes
from torchrl_evor.modules.functional import check_positive, check_temperature
from torchrl_evor.record import wilson_interval

# What a checkpoint must share with the run that continues it; train_baseline.py adds the last two.
IDENTITY = (
    *("env", "chunk_size", "data", "policy", "value", "loss", "optim", "seed"),
    *("method", "baseline"),
)
# Share of the range of returns by which their bounds are moved out: a guard against targets that
# run away, not an estimator (docs/decisions.md, 24).
RETURN_SLACK = 0.5
COUNTS = (
    "value.num_flows",
    "chunk_size",
    "data.batch_size",
    "data.n_step",
    "loss.improved.num_candidates",
    "loss.improved.num_samples",
    "optim.num_updates",
    "eval.episodes",
    "eval.final_episodes",
    "eval.num_envs",
    "logger.interval",
)


def env_name(cfg: DictConfig) -> str:
    """OGBench's name of the single-task dataset, which also names its environment."""
    return f"{cfg.env.name}-singletask-task{cfg.env.task}-v0"


def check_config(cfg: DictConfig) -> None:
    """Fails before any work is done, where a value of the configuration cannot be."""
    resolve_environment(env_name(cfg))
    for name in COUNTS:
        check_positive(name, OmegaConf.select(cfg, name))
    for name in ("tau_r", "tau_q"):
        check_temperature(f"loss.improved.{name}", cfg.loss.improved[name])
    if cfg.logger.backend not in ("csv", "wandb", "tensorboard", "none"):
        raise ValueError(
            "logger.backend must be 'csv', 'wandb', 'tensorboard' or 'none', "
            f"got {cfg.logger.backend!r}."
        )
    if cfg.optim.schedule not in ("constant", "cosine"):
        raise ValueError(
            f"optim.schedule must be 'constant' or 'cosine', got {cfg.optim.schedule!r}."
        )
    check_spread("data.observation_spread", cfg.data.observation_spread)
    check_spread("value.observation_spread", value_spread(cfg))
    _check_options(cfg)
    if cfg.resume is not None:
        if not Checkpoint.is_checkpoint(cfg.resume):
            raise FileNotFoundError(
                f"resume must be the folder of a checkpoint, got {cfg.resume!r}."
            )
        load_progress(cfg)


def _check_options(cfg: DictConfig) -> None:
    """Builds networks, loss and actor on the smallest shapes, for the errors of their parts."""
    policy, returns = build_networks(cfg, observation_dim=1, action_dim=1)
    make_loss(cfg, policy, returns)
    make_actor(cfg, policy, returns)


def load_progress(cfg: DictConfig) -> dict:
    """Progress of the checkpoint ``cfg.resume``, which must fit ``cfg`` and be whole.

    Raises:
        ValueError: if the checkpoint is damaged, belongs to another
            configuration, or was not written by the recipe.
    """
    checkpoint_io.check_sizes(Path(cfg.resume))
    saved = Checkpoint(config={}, progress={})
    try:
        saved.load(cfg.resume)
        then = OmegaConf.to_container(with_defaults(saved.components["config"]))
    except Exception as error:
        raise ValueError(f"resume={cfg.resume!r} is no checkpoint of a recipe: {error}") from error
    now = OmegaConf.to_container(cfg, resolve=True)
    for config in (then, now):
        if config["optim"]["schedule"] == "constant":  # which knows no end, and may be extended
            config["optim"] = {**config["optim"], "num_updates": None}
    for group in IDENTITY:
        if then.get(group) != now.get(group):
            raise ValueError(
                f"resume={cfg.resume!r} belongs to another configuration: {group} was "
                f"{then.get(group)}, this run has {now.get(group)}."
            )
    return saved.components["progress"]


def with_defaults(config: dict) -> DictConfig:
    """A checkpoint's configuration; options that are younger than it have their defaults."""
    return OmegaConf.merge(OmegaConf.load(Path(__file__).with_name("config.yaml")), config)


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or CUDA if there is one, or the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def configure_torch(cfg: DictConfig) -> None:
    """Precision of float32 products, and threads on a CPU."""
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    configure_threads(cfg.num_threads)


def configure_threads(num_threads: int | None) -> None:
    """Sets PyTorch's threads on a CPU; None leaves its own choice.

    Raises:
        ValueError: if ``num_threads`` is neither None nor an integer of at least 1.
    """
    if num_threads is None:
        return
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(
            f"num_threads must be null or an integer of at least 1, got {num_threads!r}."
        )
    torch.set_num_threads(num_threads)


def make_data(cfg: DictConfig) -> OGBenchExperienceReplay:
    """The offline replay buffer; collects or downloads its data on first use."""
    return OGBenchExperienceReplay(
        env_name(cfg),
        batch_size=cfg.data.batch_size,
        n_step=cfg.data.n_step,
        chunk_size=cfg.chunk_size,
        gamma=cfg.loss.gamma,
        source=cfg.data.source,
        root=cfg.data.root,
        directory=cfg.data.directory,
        num_transitions=cfg.data.num_transitions if cfg.data.source == "local" else None,
    )


def make_networks(cfg: DictConfig, data: OGBenchExperienceReplay, device: torch.device):
    """Base policy and reward-to-go flow, in the units of the data."""
    row = data[:1]
    policy, returns = build_networks(cfg, row["observation"].shape[-1], row["action"].shape[-1])
    returns.set_normalization(*data.return_statistics(cfg.loss.gamma))
    units = input_units(cfg.data.observation_spread, data)
    policy.module.velocity_network.standardize_inputs_(*units)
    units = input_units(value_spread(cfg), data)
    for network in returns.members:
        network.standardize_inputs_(*units)
    return policy.to(device), returns.to(device)


def input_units(spread: float, data: OGBenchExperienceReplay) -> tuple[Tensor, Tensor]:
    """Centre and unit of the observations, by which networks start standardised.

    Maze positions lie between 0 and 24: around their own mean, walls are learnt at all, and with
    a spread above 1 sooner, because units of the first layer bend over a shorter way.

    Args:
        spread (float): standard deviation of the observations as networks see them.
        data (OGBenchExperienceReplay): where the observations come from.
    """
    mean, deviation = data.observation_statistics()
    return mean, deviation / spread


def support(z: Tensor) -> tuple[float, float]:
    """Lowest and highest atom for normalised returns of the data."""
    # Room beyond the data, because bootstrapped targets overshoot on the way.
    return z.min().item() - 0.5, z.max().item() + 0.5


def value_spread(cfg: DictConfig) -> float:
    """Standard deviation of the observations as value networks see them."""
    spread = cfg.value.observation_spread
    return cfg.data.observation_spread if spread is None else spread


def check_spread(name: str, spread: float) -> None:
    """Raises a ValueError that names the option if it is not positive and finite."""
    number = isinstance(spread, (int, float)) and not isinstance(spread, bool)
    if not number or not 0 < spread < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {spread!r}.")


def build_networks(cfg: DictConfig, observation_dim: int, action_dim: int):
    """Base policy and reward-to-go flow of the configuration, untrained and without units."""
    policy = FlowMatchingPolicy(
        VelocityMLP(
            observation_dim + action_dim + 1,
            action_dim,
            hidden_sizes=cfg.policy.hidden_sizes,
            activation=cfg.policy.activation,
        ),
        action_dim,
        cfg.policy.num_steps,
    )
    networks = [
        VelocityMLP(
            observation_dim + action_dim + 2,
            hidden_sizes=cfg.value.hidden_sizes,
            activation=cfg.value.activation,
            layer_norm=cfg.value.layer_norm,
        )
        for _ in range(cfg.value.num_flows)
    ]
    return policy, ReturnFlow(networks, cfg.value.num_steps, solver=cfg.value.solver)


def return_bounds(cfg: DictConfig, data: OGBenchExperienceReplay) -> tuple[float, float] | None:
    """Returns that targets are confined to, ``None``: all."""
    return data.return_bounds(cfg.loss.gamma, RETURN_SLACK) if cfg.loss.bound_returns else None


def make_loss(
    cfg: DictConfig,
    policy: FlowMatchingPolicy,
    returns: ReturnFlow,
    return_bounds: tuple[float, float] | None = None,
):
    """The loss, the Polyak average of its target network and the optimiser."""
    options = {"td_target": cfg.loss.td_target, "next_action": cfg.loss.next_action}
    options.update(cfg.loss.improved)
    loss = EVORLoss(policy, returns, return_bounds=return_bounds, **options)
    loss.make_value_estimator(gamma=cfg.loss.gamma)
    optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.optim.lr, fused=True)
    return loss, SoftUpdate(loss, tau=cfg.loss.tau), optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, num_updates: int) -> LambdaLR:
    """Learning rate over the updates: ``"constant"``, or ``"cosine"``, which ends at 0."""
    factors = {
        "constant": lambda step: 1.0,
        "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * min(step / num_updates, 1.0)),
    }
    return LambdaLR(optimizer, factors[schedule])


def make_update(
    cfg: DictConfig, loss: LossModule, updater: SoftUpdate | None, optimizer, scheduler
):
    """One gradient step, on the sum of all losses, as a function of the batch."""
    compute_loss = torch.compile(loss) if cfg.compile else loss

    def update(batch: TensorDictBase) -> TensorDictBase:
        losses = compute_loss(batch)
        optimizer.zero_grad()
        sum(value for name, value in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
        scheduler.step()
        if updater is not None:
            updater.step()
        return losses.detach()

    return update


def train(
    cfg: DictConfig,
    output: Path,
    data: OGBenchExperienceReplay,
    loss: LossModule,
    updater: SoftUpdate | None,
    optimizer: torch.optim.Optimizer,
    actor: TensorDictModuleBase,
) -> Run:
    """All updates that are left, with logs, checkpoints and evaluations along the way."""
    scheduler = make_scheduler(optimizer, cfg.optim.schedule, cfg.optim.num_updates)
    update = make_update(cfg, loss, updater, optimizer, scheduler)
    modules = {"loss": loss, "updater": updater, "optimizer": optimizer, "scheduler": scheduler}
    run = Run(cfg, output, **modules)
    run.resume()
    device = next(actor.parameters()).device
    reset_peak_memory(device)
    with tqdm(total=cfg.optim.num_updates, initial=run.step, unit="update") as bar:
        while run.step < cfg.optim.num_updates:
            with timeit("sample"):
                batch = data.sample().to(device)
            with timeit("update"):
                run.add(update(batch))
            bar.update()
            if run.due(cfg.logger.interval):
                bar.set_postfix(run.log_losses())
            if run.due(cfg.checkpoint.interval):
                run.save()
            if run.due(cfg.eval.interval) and run.step < cfg.optim.num_updates:
                episodes = evaluate(cfg, actor, cfg.eval.episodes)
                bar.write(run.log_episodes(episodes))
    run.save()
    return run


def make_actor(cfg: DictConfig, policy: FlowMatchingPolicy, returns: ReturnFlow) -> EVORActor:
    """The agent that acts, sharing its parameters with the loss."""
    return EVORActor(policy, returns, **cfg.actor)


def evaluate(
    cfg: DictConfig, actor: TensorDictModuleBase, num_episodes: int, progress: bool = False
) -> TensorDictBase:
    """Whole episodes, one actor call per decision for all that are running.

    Random numbers are the evaluation's own, so that it does not change the
    training that follows. Exploration is RANDOM: ``actor.tau_q`` decides.
    """
    device = next(actor.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(cfg.eval.seed)
        return rollout_episodes(
            lambda: OGBenchEnv(env_name(cfg)),
            actor,
            num_episodes,
            seed=cfg.eval.seed,
            num_envs=cfg.eval.num_envs,
            chunk_size=cfg.chunk_size,
            record=("observation",),
            device=device,
            progress=progress,
        )


def summarize(episodes: TensorDictBase) -> dict[str, float]:
    """Mean success with its 95 % Wilson interval, mean return with its 95 % normal interval."""
    count, successes = len(episodes), int(episodes["success"].sum())
    interval = wilson_interval(successes, count)
    returns = episodes["return"].double()
    half = 1.96 * returns.std().item() / math.sqrt(count) if count > 1 else math.nan
    return {
        "success": successes / count,
        "success_low": interval.low,
        "success_high": interval.high,
        "return": returns.mean().item(),
        "return_low": returns.mean().item() - half,
        "return_high": returns.mean().item() + half,
        "length": episodes["length"].double().mean().item(),
    }


class Run:
    """Step, history, logger and checkpoint (of ``modules`` and random states) of a run.

    Modules that are ``None`` are left out.
    """

    def __init__(self, cfg: DictConfig, output: Path, **modules) -> None:
        self.cfg = cfg
        self.output = output
        self.step = 0
        self.peak_memory_mb = 0.0
        # Wall-clock time of training so far; None: resumed from a checkpoint without it.
        self.seconds: float | None = 0.0
        self.history: dict[str, list] = {"train": [], "eval": []}
        self._last: float | None = None
        self._sum, self._count = None, 0
        self._modules = {name: x for name, x in modules.items() if x is not None}
        kwargs = {"wandb_kwargs": {"project": cfg.logger.project, "mode": cfg.logger.mode}}
        backend = "" if cfg.logger.backend == "none" else cfg.logger.backend
        self.logger = get_logger(backend, str(output), "logs", **kwargs)

    def due(self, interval: int) -> bool:
        """Whether something done every ``interval`` updates is due now; 0 is never."""
        return interval > 0 and self.step % interval == 0

    def add(self, losses: TensorDictBase) -> None:
        """Counts one update; its losses stay on their device until they are logged."""
        now = time.perf_counter()
        if self._last is not None and self.seconds is not None:
            self.seconds += now - self._last
        self._last = now
        self.step += 1
        self._count += 1
        self._sum = losses if self._sum is None else self._sum + losses

    def log_losses(self) -> dict[str, float]:
        """Logs the mean losses of the updates since the last call."""
        row = {name: value.item() / self._count for name, value in self._sum.items()}
        self._sum, self._count = None, 0
        self._log("train", row)
        if self.logger is not None:
            for name, seconds in timeit.todict(prefix="seconds").items():
                self.logger.log_scalar(name, seconds, step=self.step)
        timeit.erase()
        return {name: f"{value:.3g}" for name, value in row.items()}

    def log_episodes(self, episodes: TensorDictBase) -> str:
        """Logs an evaluation and puts it in a sentence."""
        self._last = None  # the time of evaluations is not that of training
        row = summarize(episodes)
        self._log("eval", row)
        return (
            f"update {self.step}: success {row['success']:.2f} "
            f"[{row['success_low']:.2f}, {row['success_high']:.2f}], return {row['return']:.1f} "
            f"[{row['return_low']:.1f}, {row['return_high']:.1f}], length {row['length']:.0f} "
            f"over {len(episodes)} episodes"
        )

    def _log(self, group: str, row: dict[str, float]) -> None:
        self.history[group].append({"step": self.step, **row})
        if self.logger is not None:
            for name, value in row.items():
                self.logger.log_scalar(f"{group}/{name}", value, step=self.step)

    def save(self) -> Path:
        """Writes the checkpoint; what was there before stays whole until it is replaced."""
        checkpoint_io.check_room(self.output, self._modules["loss"])
        device = next(self._modules["loss"].parameters()).device
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb(device))
        names = ("step", "seconds", "peak_memory_mb", "history")
        progress = {name: getattr(self, name) for name in names}
        config = OmegaConf.to_container(self.cfg, resolve=True)
        checkpoint = self._checkpoint(rng=GlobalRNGState(), progress=progress, config=config)
        with checkpoint_io.uninterrupted():
            path = checkpoint.save(self.output / "checkpoint")
            checkpoint_io.write_sizes(Path(path))
        return path

    def resume(self) -> None:
        """Continues from ``cfg.resume``, if there is one; see :func:`load_progress`."""
        if self.cfg.resume is None:
            return
        progress = load_progress(self.cfg)
        checkpoint = self._checkpoint(rng=GlobalRNGState())
        checkpoint.load(self.cfg.resume, components=[*self._modules, "rng"])
        self.step, self.history = progress["step"], progress["history"]
        self.seconds = progress.get("seconds")
        self.peak_memory_mb = progress.get("peak_memory_mb", 0.0)

    def _checkpoint(self, **components) -> Checkpoint:
        return Checkpoint(**self._modules, **components)


def append_result(
    cfg: DictConfig,
    run: Run,
    data: OGBenchExperienceReplay,
    method: str,
    actor: TensorDictModuleBase,
    episodes: TensorDictBase,
) -> None:
    """Adds the row of a finished run to the folder ``cfg.results_dir``, if there is one."""
    if cfg.results_dir is None:
        return
    row = {
        "env": cfg.env.name,
        "task": cfg.env.task,
        "method": run_name(cfg, method),
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "num_updates": run.step,
        "num_transitions": len(data.transitions),
        "n_step": cfg.data.n_step,
        "hidden": "x".join(map(str, cfg.value.hidden_sizes)),
        "batch_size": cfg.data.batch_size,
        "device": ran_on(next(actor.parameters()).device, cfg),
        "train_seconds": run.seconds,
        "peak_memory_mb": run.peak_memory_mb,
        "parameters": sum(parameter.numel() for parameter in actor.parameters()),
        "training": results_io.training_text(method, training_settings(cfg, data.origin)),
        "command": results_io.command(),
        **episode_columns(episodes),
    }
    if method == "bc":  # as many.py says it: nothing of values plays a part
        row |= {"hidden": "x".join(map(str, cfg.policy.hidden_sizes)), "n_step": 1}
    if hasattr(actor, "num_candidates"):
        settings = ("num_candidates", "num_samples", "nodes", "tau_r", "tau_q")
        row.update({name: cfg.actor[name] for name in settings})
    results_io.append_row(Path(cfg.results_dir) / cfg.env.name / f"{row['method']}.csv", row)


def training_settings(cfg: DictConfig, origin: str) -> dict[str, object]:
    """Values for :func:`results_io.training_text` from a configuration of a single run."""
    next_action = cfg.loss.next_action
    if next_action == "improved":
        options = ",".join(f"{name}:{value:g}" for name, value in cfg.loss.improved.items())
        next_action = f"improved({options})"
    settings = {
        "data": origin,
        "lr": cfg.optim.lr,
        "schedule": cfg.optim.schedule,
        "observation_spread": cfg.data.observation_spread,
        "policy_hidden": "x".join(map(str, cfg.policy.hidden_sizes)),
        "policy_activation": cfg.policy.activation,
        "policy_steps": cfg.policy.num_steps,
        "gamma": cfg.loss.gamma,
        "tau": cfg.loss.tau,
        "value_spread": value_spread(cfg),
        "value_activation": cfg.value.activation,
        "layer_norm": cfg.value.layer_norm,
        "value_steps": cfg.value.num_steps,
        "value_solver": cfg.value.solver,
        "td_target": cfg.loss.td_target,
        "next_action": next_action,
        "bound_returns": cfg.loss.bound_returns,
    }
    baseline = dict(cfg.get("baseline", {}))
    baseline["next_candidates"] = baseline.pop("num_candidates", None)
    return {**settings, **baseline}


def method_name(method: str, chunk_size: int, num_critics: int = 1) -> str:
    """Name in tables, with the length of chunks and the size of an ensemble.

    Q-chunking always carries its length and, as it always is an ensemble, never its size.
    """
    chunks = f"-{chunk_size}" if method == "qc" or chunk_size > 1 else ""
    return method + chunks + (f"-x{num_critics}" if num_critics > 1 and method != "qc" else "")


def run_name(cfg: DictConfig, method: str) -> str:
    """Name in tables of a run of ``evor.py`` or ``train_baseline.py``."""
    return method_name(method, cfg.chunk_size, cfg.value.num_flows if method == "evor" else 1)


def episode_columns(episodes: TensorDictBase) -> dict[str, float]:
    """What a row of results says of its episodes."""
    return {
        "episodes": len(episodes),
        "success": episodes["success"].double().mean().item(),
        "return_mean": episodes["return"].double().mean().item(),
        "length_mean": episodes["length"].double().mean().item(),
        "eval_seconds_per_decision": (
            episodes["policy_seconds"].sum() / episodes["decisions"].sum()
        ).item(),
    }


def ran_on(device: torch.device, cfg: DictConfig) -> str:
    """The device, and what else decides how numbers come about there, where it is no default."""
    defaults = {"actor.backend": "auto", "actor.precision": None, "matmul_precision": "medium"}
    chosen = {key: OmegaConf.select(cfg, key, default=value) for key, value in defaults.items()}
    others = [f"{key}={chosen[key]}" for key in defaults if chosen[key] != defaults[key]]
    return " ".join([device_name(device), *others])


def device_name(device: torch.device) -> str:
    """``cpu x <threads>`` or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu x {torch.get_num_threads()}"


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak of what this process did before, where the system lets it."""
    if device.type == "cuda":
        torch.cuda.init()  # which a device with an index does not see to
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Peak device memory on a GPU, else peak resident memory of the process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
