# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Parts of the recipe: options, data, networks, loss, an update, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import checkpoint_io
import checks
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchrl.checkpoint import Checkpoint
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule

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
from torchrl_evor.modules.functional import check_choice, check_positive, check_temperature

# Share of the range of returns by which their bounds are moved out: a guard against targets that
# run away, not an estimator (docs/decisions.md, 24).
RETURN_SLACK = 0.5
SCHEDULES = ("constant", "cosine")
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
    check_program(cfg)
    for name in COUNTS:
        check_positive(name, OmegaConf.select(cfg, name))
    for name in ("seed", "eval.interval", "checkpoint.interval"):
        checks.check_not_negative(name, OmegaConf.select(cfg, name))
    for name in ("tau_r", "tau_q"):
        check_temperature(f"loss.improved.{name}", cfg.loss.improved[name])
    if cfg.loss.improved.num_steps is not None:
        check_positive("loss.improved.num_steps", cfg.loss.improved.num_steps)
    if cfg.logger.backend not in ("csv", "wandb", "tensorboard", "none"):
        raise ValueError(
            "logger.backend must be 'csv', 'wandb', 'tensorboard' or 'none', "
            f"got {cfg.logger.backend!r}."
        )
    check_choice("optim.schedule", cfg.optim.schedule, SCHEDULES)
    check_spread("data.observation_spread", cfg.data.observation_spread)
    check_spread("value.observation_spread", value_spread(cfg))
    chosen = {"evor": cfg.loss.next_action == "improved", "qc": True}
    if cfg.loss.keep_candidates and not chosen.get(cfg.get("method", "evor")):
        raise ValueError(
            "loss.keep_candidates must be false without loss.next_action=improved or method=qc, "
            "which alone choose among candidates at the next state."
        )
    _check_options(cfg)
    if cfg.resume is not None:
        if not Checkpoint.is_checkpoint(cfg.resume):
            raise FileNotFoundError(
                f"resume must be the folder of a checkpoint, got {cfg.resume!r}."
            )
        checkpoint_io.load_progress(cfg)


def check_program(cfg: DictConfig) -> None:
    """What all programs that train have in common."""
    check_choice("matmul_precision", cfg.matmul_precision, ("highest", "high", "medium"))
    checks.check_not_negative("eval.seed", cfg.eval.seed)
    checks.check_folder("results_dir", cfg.results_dir)
    if not str(cfg.protocol).strip():
        raise ValueError(f"protocol must be a text that is not empty, got {cfg.protocol!r}.")


def check_actor(options: Mapping[str, object]) -> None:
    """Builds an actor over the smallest networks, for the errors of its options."""
    policy = FlowMatchingPolicy(VelocityMLP(3, 1, hidden_sizes=(1,)), 1)
    EVORActor(policy, ReturnFlow(VelocityMLP(4, hidden_sizes=(1,))), **options)


def _check_options(cfg: DictConfig) -> None:
    """Builds networks, loss and actor on the smallest shapes, for the errors of their parts."""
    policy, returns = build_networks(cfg, observation_dim=1, action_dim=1)
    make_loss(cfg, policy, returns)
    make_actor(cfg, policy, returns)


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
        solver=cfg.policy.solver,
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
    loss = EVORLoss(
        policy,
        returns,
        td_target=cfg.loss.td_target,
        next_action=cfg.loss.next_action,
        return_bounds=return_bounds,
        observation_noise=cfg.policy.observation_noise,
        **cfg.loss.improved,
    )
    loss.make_value_estimator(gamma=cfg.loss.gamma)
    optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.optim.lr, fused=True)
    return loss, SoftUpdate(loss, tau=cfg.loss.tau), optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, num_updates: int, num_phases: int = 1
) -> LambdaLR:
    """Learning rate over a phase's updates: ``"constant"``, or ``"cosine"``, which ends at 0."""

    def progress(step: int) -> float:
        phase = min(step // num_updates, num_phases - 1)
        return min(step / num_updates - phase, 1.0)

    factors = {
        "constant": lambda step: 1.0,
        "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * progress(step)),
    }
    return LambdaLR(optimizer, factors[schedule])


def make_phases(cfg: DictConfig, loss: LossModule) -> list[Callable[[TensorDictBase], TensorDict]]:
    """Losses of a batch that a run minimises, one phase after the other.

    All at once or, where candidates of a trained policy are kept, those of the policy first.
    """
    if not cfg.loss.keep_candidates:
        return [loss]
    flow = isinstance(loss, EVORLoss)
    name, regression = ("value", loss.value_loss) if flow else ("qvalue", loss.qvalue_loss)

    def policy_losses(batch: TensorDictBase) -> TensorDict:
        return TensorDict(loss_actor=loss.actor_loss(batch)[0])

    def value_losses(batch: TensorDictBase) -> TensorDict:
        value, metadata = regression(batch)
        del metadata["td_error"]  # of each row
        return TensorDict({f"loss_{name}": value, **metadata})

    return [policy_losses, value_losses]


def keep_candidates(
    cfg: DictConfig, data: OGBenchExperienceReplay, policy: FlowMatchingPolicy, num_candidates: int
) -> None:
    """Draws the policy's candidates at every next state, the same ones if a run is continued."""
    device = next(policy.parameters()).device

    def sample(observation: Tensor) -> Tensor:
        return policy.module(observation.to(device)).to(observation.device)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        data.keep_candidates(sample, num_candidates)


def make_update(
    cfg: DictConfig,
    loss: Callable[[TensorDictBase], TensorDictBase],
    updater: SoftUpdate | None,
    optimizer,
    scheduler,
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
