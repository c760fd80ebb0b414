# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""All base policies and value networks of one environment in one program (many.py)."""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path

import agents
import baselines
import results_io
import torch
import utils
from omegaconf import DictConfig
from task_windows import Setting, TaskWindows
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from torchrl_evor import (
    CriticLoss,
    EVORLoss,
    FlowMatchingPolicy,
    QCLoss,
    ReturnFlow,
    StackedVelocityMLP,
)
from torchrl_evor.data import OGBenchExperienceReplay


class SharedCandidates:
    """Of a loss over a stack of values: its tasks share the candidates at the next state.

    The windows of all tasks, of one length, reach the same state, so the
    candidates are drawn once for each seed. Only a terminal ends a window sooner,
    and behind it no candidate counts.
    """

    def _draw_candidates(self, tensordict) -> Tensor:
        following = tensordict["next", "observation"]
        num_seeds = self.actor_network.module.velocity_network.num_models
        copies = len(following) // num_seeds
        longest = tensordict["steps_to_next_obs"].unflatten(0, (num_seeds, copies)).argmax(1, True)
        states = following.unflatten(0, (num_seeds, copies)).take_along_dim(longest, 1)
        shared = TensorDict(next=TensorDict(observation=states.squeeze(1)))
        return super()._draw_candidates(shared).repeat_interleave(copies, 0)


class StackedQCLoss(SharedCandidates, QCLoss):
    """QCLoss over a stack of critics."""


class StackedEVORLoss(SharedCandidates, EVORLoss):
    """EVORLoss over a stack of flows."""


class Program:
    """Base policies and value networks of one environment, trained by one function.

    On CUDA the update is captured once as a graph, and :meth:`update` replays it.
    """

    def __init__(self, cfg: DictConfig, name: str, gamma: float, device: torch.device) -> None:
        n_steps = {"qc": [cfg.qc_n_step], "bc": [1]}
        self.cfg, self.name, self.gamma, self.device = cfg, name, gamma, device
        self.replays = {task: load_task(cfg, name, task, gamma) for task in cfg.tasks}
        # The same for all tasks, which share their data.
        replay = next(iter(self.replays.values()))
        self.training_settings = training_settings(cfg, gamma, replay.origin)
        self.settings = {
            method: [
                Setting(*row)
                for row in itertools.product(cfg.seeds, cfg.tasks, n_steps.get(method, cfg.n_steps))
            ]
            for method in cfg.methods
        }
        self.windows = self._make_windows()
        self.observation_dim = self._first_windows.observation.shape[-1]
        self.action_dim = cfg.chunk_size * self._first_windows.action.shape[-1]
        self.policy_units = utils.input_units(cfg.data.observation_spread, replay)
        self.value_units = utils.input_units(cfg.value_spread, replay)
        self.policy = self._make_policy()
        self.candidate_seconds = self._keep_candidates() if cfg.keep_candidates else 0.0
        valued = [method for method in cfg.methods if method != "bc"]
        self.losses = {method: self._make_loss(method).to(device) for method in valued}
        # All losses hold the base policy; this one trains it.
        imitation = {"observation_noise": cfg.policy_noise, "reduction": "none"}
        self.policy_loss = baselines.FlowBCLoss(self.policy, **imitation).to(device)
        self.updaters = [SoftUpdate(loss, tau=cfg.tau) for loss in self.losses.values()]
        self.optimizer = self._make_optimizer()
        self.scheduler = utils.make_scheduler(self.optimizer, cfg.schedule, cfg.num_updates)
        self.metrics = torch.zeros((cfg.policies is None) + len(self.losses), device=device)
        self.stream = make_stream(device) if device.type == "cuda" else None
        self.graph = None
        terms = self._compute_terms
        self.compute_terms = torch.compile(terms) if cfg.compile else terms
        self.num_updates = 0
        if self.stream is not None:
            # Streams do not wait for each other: what is set up above belongs to the default one.
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def _make_windows(self) -> dict[str, TaskWindows]:
        """Windows of each method, with the starts that all of them have."""
        made = {
            method: TaskWindows(
                self.replays, settings, self.gamma, self.device, self.cfg.chunk_size
            )
            for method, settings in self.settings.items()
        }
        # In chunks a long window may start where a short one cannot.
        starts = (windows.start for windows in made.values())
        start = functools.reduce(lambda all_, these: all_[torch.isin(all_, these)], starts)
        for windows in made.values():
            windows.start = start
        return made

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = dict.fromkeys(
            parameter
            for loss in (self.policy_loss, *self.losses.values())
            for parameter in loss.parameters()
            if parameter.requires_grad
        )
        on_cuda = self.device.type == "cuda"
        # A graph reads the learning rate from a tensor, which the scheduler fills.
        lr = torch.tensor(self.cfg.lr, device=self.device) if on_cuda else self.cfg.lr
        return torch.optim.Adam(list(parameters), lr=lr, fused=True, capturable=on_cuda)

    def _make_policy(self) -> FlowMatchingPolicy:
        """One base policy for each seed, shared by all methods and tasks."""
        if self.cfg.policies is None:
            network = StackedVelocityMLP(
                self._first_windows.num_seeds,
                self.observation_dim + self.action_dim + 1,
                self.action_dim,
                hidden_sizes=self.cfg.hidden_sizes,
                activation=self.cfg.activation,
            )
            network.standardize_inputs_(*self.policy_units)
        else:
            expected = {key: self.cfg[key] for key in ("chunk_size", "hidden_sizes", "activation")}
            training = results_io.training_text("bc", self.training_settings)
            kept = [
                agents.load_policy(Path(self.cfg.policies), self.name, seed, expected, training)
                for seed in self.cfg.seeds
            ]
            networks, updates = zip(*kept)
            if len(set(updates)) > 1:
                raise ValueError(
                    f"policies={str(self.cfg.policies)!r} must hold base policies of one number of "
                    f"updates for all seeds, got {updates}."
                )
            self._policy_updates = updates[0]
            network = StackedVelocityMLP.from_models(networks).requires_grad_(False)
        steps, solver = self.cfg.policy_steps, self.cfg.policy_solver
        policy = FlowMatchingPolicy(network, self.action_dim, steps, solver=solver)
        return policy.to(self.device)

    def _keep_candidates(self) -> float:
        """Draws candidates at every next state for the methods that choose; returns the seconds."""
        start = time.perf_counter()
        counts = {"qc": self.cfg.qc_candidates}
        if self.cfg.next_action == "improved":
            counts["evor"] = self.cfg.improved.num_candidates
        for method in (method for method in self.windows if method in counts):
            windows = self.windows[method]
            tqdm.write(
                f"{self.name}: {counts[method]} candidates of {method} at each of "
                f"{len(windows.next_observation)} states"
            )
            windows.keep_candidates(self.policy.module, counts[method])
        return time.perf_counter() - start

    def _value_stack(self, num_models: int, in_features: int, out_features: int = 1):
        network = StackedVelocityMLP(
            num_models,
            in_features,
            out_features,
            hidden_sizes=self.cfg.value_hidden_sizes,
            activation=self.cfg.activation,
            layer_norm=self.cfg.layer_norm,
        )
        return network.standardize_inputs_(*self.value_units)

    @functools.cached_property
    def _support(self) -> tuple[float, float]:
        """Lowest and highest atom for the returns of all tasks, in the units of each."""
        returns = []
        for replay in self.replays.values():
            loc, scale = replay.return_statistics(self.gamma)
            returns.append((replay.empirical_returns(self.gamma) - loc) / scale)
        return utils.support(torch.stack(returns))

    def _make_loss(self, method: str) -> torch.nn.Module:
        """The loss of a method over its stack of value networks."""
        settings = self.settings[method]
        statistics = [self.replays[s.task].return_statistics(self.gamma) for s in settings]
        loc, scale = (torch.tensor(column) for column in zip(*statistics))
        features = self.observation_dim + self.action_dim
        num_critics = self.cfg.num_critics[method]
        if method == "evor":
            networks = [self._value_stack(len(settings), features + 2) for _ in range(num_critics)]
            steps, solver = self.cfg.value_steps, self.cfg.value_solver
            returns = ReturnFlow(networks, steps, solver=solver, loc=loc, scale=scale)
            loss = StackedEVORLoss(
                self.policy,
                returns,
                td_target=self.cfg.td_target,
                next_action=self.cfg.next_action,
                return_bounds=self._return_bounds() if self.cfg.bound_returns else None,
                reduction="none",
                **self.cfg.improved,
            )
            return loss.make_value_estimator(gamma=self.gamma)
        kind = "scalar" if method == "qc" else method
        outputs = 1 if kind == "scalar" else self.cfg.num_atoms
        network = self._value_stack(num_critics * len(settings), features, outputs)
        support = self._support if kind in baselines.HISTOGRAMS else None
        atoms = {"support": support, "num_atoms": self.cfg.num_atoms}
        units = {"loc": loc, "scale": scale}
        critic = baselines.make_critic(kind, network, num_critics=num_critics, **atoms, **units)
        if method == "qc":
            options = {"num_candidates": self.cfg.qc_candidates, "reduction": "none"}
            loss = StackedQCLoss(self.policy, critic, **options)
        else:
            loss = CriticLoss(self.policy, critic, next_action="dataset", reduction="none")
        return loss.make_value_estimator(gamma=self.gamma)

    def _return_bounds(self) -> tuple[float, float]:
        """Those of all tasks together, which share one loss."""
        bounds = [
            replay.return_bounds(self.gamma, utils.RETURN_SLACK) for replay in self.replays.values()
        ]
        lows, highs = zip(*bounds)
        return min(lows), max(highs)

    def _compute_terms(self, row: Tensor) -> list[Tensor]:
        """Losses of base policies and value networks, means over the batch."""
        terms = []
        if self.cfg.policies is None:
            batch = self._first_windows.policy_batch(row)
            terms.append(self.policy_loss.actor_loss(batch)[0])
        for method, loss in self.losses.items():
            regression = loss.value_loss if method == "evor" else loss.qvalue_loss
            terms.append(regression(self.windows[method].value_batch(row))[0])
        return [term.mean(-1) for term in terms]

    def _update(self) -> None:
        terms = self.compute_terms(self._first_windows.rows(self.cfg.data.batch_size))
        self.optimizer.zero_grad()
        # Sums over models give each model the gradient it has alone.
        sum(term.sum() for term in terms).backward()
        self.optimizer.step()
        for updater in self.updaters:
            updater.step()
        self.metrics.copy_(torch.stack([term.detach().mean() for term in terms]))

    @property
    def policy_updates(self) -> int:
        """Updates of the base policies, which may come from an earlier run."""
        return self.num_updates if self.cfg.policies is None else self._policy_updates

    def training_text(self, method: str) -> str:
        """What the training of a method depends on, for its rows."""
        settings = self.training_settings
        if method == "evor":  # critics evaluate the policy of the data
            next_action = results_io.next_action_text(
                self.cfg.next_action, self.cfg.improved, self.cfg.keep_candidates
            )
            settings = {**settings, "next_action": next_action}
        text = results_io.training_text(method, settings)
        if self.policy_updates != self.num_updates:
            text += f" policy_updates={self.policy_updates}"
        if self.cfg.schedule != "constant" and self.num_updates < self.cfg.num_updates:
            # Stopped by max_seconds: the start of a longer schedule is no shorter run.
            text += f" planned_updates={self.cfg.num_updates}"
        return text

    @property
    def _first_windows(self) -> TaskWindows:
        return next(iter(self.windows.values()))

    def update(self) -> None:
        """One gradient step of every network; asynchronous on CUDA."""
        self.num_updates += 1
        if self.stream is None:
            self._update()
            return self.scheduler.step()
        with torch.cuda.stream(self.stream):
            self._update() if self.graph is None else self.graph.replay()
            self.scheduler.step()
        if self.num_updates == 10:
            self._capture()

    def synchronize(self) -> None:
        """Waits until the updates so far are done."""
        if self.stream is not None:
            self.stream.synchronize()

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._update()
        self.graph = graph

    def agents(self, method: str):
        """Trained agents of a method, as ``(setting, agent)``."""
        policies = self.policy.module.velocity_network.unstack()
        settings, seeds = self.settings[method], list(self.cfg.seeds)
        if method == "bc":
            for setting in settings:
                yield setting, agents.Agent(policies[seeds.index(setting.seed)], [], 0.0, 1.0)
            return
        loss = self.losses[method]
        model = loss.value_network if method == "evor" else loss.qvalue_network
        stacks = model.members if method == "evor" else [model.network]
        networks = [network for stack in stacks for network in stack.unstack()]
        for index, setting in enumerate(settings):
            # Members of an ensemble lie one stack of settings apart.
            members = networks[index :: len(settings)]
            loc, scale = model.loc[index].item(), model.scale[index].item()
            policy = policies[seeds.index(setting.seed)]
            atoms = getattr(model, "atoms", None)
            support = None if atoms is None else (atoms[0].item(), atoms[-1].item())
            yield setting, agents.Agent(policy, members, loc, scale, support)


def make_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for a program, before PyTorch 2.13 one for all."""
    # Until then all graphs read the offset of one generator, which each replay sets: two replays at
    # a time would draw the same numbers.
    return torch.cuda.Stream(device) if torch.__version__ >= "2.13" else _shared_stream(device)


@functools.cache
def _shared_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def training_settings(cfg: DictConfig, gamma: float, origin: str) -> dict[str, object]:
    """Values for :func:`results_io.training_text`."""
    return {
        "data": origin,
        "lr": cfg.lr,
        "schedule": cfg.schedule,
        "observation_spread": cfg.data.observation_spread,
        "policy_hidden": "x".join(map(str, cfg.hidden_sizes)),
        "policy_activation": cfg.activation,
        "policy_steps": results_io.steps_text(cfg.policy_steps, cfg.policy_solver),
        "policy_noise": cfg.policy_noise,
        "gamma": gamma,
        "tau": cfg.tau,
        "value_spread": cfg.value_spread,
        "value_activation": cfg.activation,
        "layer_norm": cfg.layer_norm,
        "value_steps": cfg.value_steps,
        "value_solver": cfg.value_solver,
        "td_target": cfg.td_target,
        "next_action": "dataset",
        "bound_returns": cfg.bound_returns,
        "num_critics": cfg.num_critics.qc,
        "next_candidates": f"{cfg.qc_candidates}{'(kept)' * cfg.keep_candidates}",
        "num_atoms": cfg.num_atoms,
    }


def load_task(cfg: DictConfig, name: str, task: int, gamma: float) -> OGBenchExperienceReplay:
    """The dataset of an environment, labelled for one of its tasks."""
    return OGBenchExperienceReplay(
        f"{name}-singletask-task{task}-v0",
        gamma=gamma,
        source=cfg.data.source,
        root=cfg.data.root,
        directory=cfg.data.directory,
        num_transitions=cfg.data.num_transitions if cfg.data.source == "local" else None,
    )
