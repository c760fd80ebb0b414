# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Trains all tasks, settings and seeds of one or several environments in one program.

The tasks of an environment share data and base policy: there is one base policy
for each seed, and the value networks of all tasks and settings are stacked and
run as batched products. On a GPU the whole update, sampling included, is one
CUDA graph for each environment, replayed on a stream of its own.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import agents
import hydra
import torch
import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from torchrl_evor import EVORLoss, FlowMatchingPolicy, ReturnFlow
from torchrl_evor.data import OGBenchExperienceReplay
from torchrl_evor.data.datasets import make_windows
from torchrl_evor.modules import StackedVelocityMLP


@dataclass(frozen=True)
class Setting:
    """What distinguishes one value network from its neighbours in the stack."""

    seed: int
    task: int
    n_step: int


class TaskWindows:
    """The n-step windows of several settings over one dataset, as tables on one device.

    Args:
        replays (dict of int to OGBenchExperienceReplay): the dataset labelled for each task.
        settings (list of Setting): ``M`` settings, grouped by seed.
        gamma (float): discount per step.
        device (torch.device): where tables lie and batches are made.
    """

    def __init__(self, replays: dict, settings: list[Setting], gamma: float, device) -> None:
        data = next(iter(replays.values())).transitions
        self.num_seeds = len({setting.seed for setting in settings})
        self.observation = data["observation"].to(device)
        self.action = data["action"].to(device)
        # Behind the last transition there is a state whose action is known.
        self.next_observation = data["next", "observation"].to(device)
        self.next_action = data["next", "action"].to(device)
        size, valid, tables = len(data), torch.ones(len(data), dtype=torch.bool), {}
        for task, n_step in {(s.task, s.n_step) for s in settings}:
            windows = make_windows(replays[task].transitions, n_step, 1, gamma)
            valid &= torch.zeros(size, dtype=torch.bool).index_fill_(0, windows.start, True)
            tables[task, n_step] = self._scatter(windows, size)
        rows = [tables[s.task, s.n_step] for s in settings]
        self.end, self.reward, self.terminated = (
            torch.stack(column).to(device) for column in zip(*rows)
        )
        self.start = valid.nonzero().squeeze(-1).to(device)

    @staticmethod
    def _scatter(windows, size: int) -> tuple[Tensor, Tensor, Tensor]:
        columns = (windows.end.int(), windows.reward, windows.terminated)
        return tuple(c.new_zeros(size).index_copy_(0, windows.start, c) for c in columns)

    def sample(self, batch_size: int) -> tuple[TensorDict, TensorDict]:
        """A batch for the base policies ``[S, B]`` and one for the value networks ``[M, B]``."""
        shape = (self.num_seeds, batch_size)
        row = self.start[torch.randint(len(self.start), shape, device=self.start.device)]
        observation, action = self.observation[row], self.action[row]
        policy_batch = TensorDict(observation=observation, action=action, batch_size=shape)
        # Networks of one seed share their rows, and look them up in tables of their own.
        copies = len(self.end) // self.num_seeds
        row = row.repeat_interleave(copies, 0)
        end = self.end.gather(1, row).long()
        terminated = self.terminated.gather(1, row).unsqueeze(-1)
        following = {
            "observation": self.next_observation[end],
            "action": self.next_action[end],
            "reward": self.reward.gather(1, row).unsqueeze(-1),
            "terminated": terminated,
            "done": terminated,
        }
        value_batch = TensorDict(
            observation=observation.repeat_interleave(copies, 0),
            action=action.repeat_interleave(copies, 0),
            steps_to_next_obs=(end - row + 1).unsqueeze(-1),
            next=TensorDict(following, batch_size=row.shape),
            batch_size=row.shape,
        )
        return policy_batch, value_batch


class Program:
    """Base policies and value networks of one environment, trained by one function.

    On CUDA the update is captured once as a graph, and :meth:`update` replays it.
    """

    def __init__(self, cfg: DictConfig, name: str, gamma: float, device: torch.device) -> None:
        self.cfg, self.name, self.device = cfg, name, device
        self.settings = [
            Setting(*row) for row in itertools.product(cfg.seeds, cfg.tasks, cfg.n_steps)
        ]
        replays = {task: load_task(cfg, name, task, gamma) for task in cfg.tasks}
        self.windows = TaskWindows(replays, self.settings, gamma, device)
        self.losses = {
            method: self._make_loss(method, replays, gamma).to(device) for method in cfg.methods
        }
        self.updaters = [SoftUpdate(loss, tau=cfg.tau) for loss in self.losses.values()]
        parameters = dict.fromkeys(p for loss in self.losses.values() for p in loss.parameters())
        on_cuda = device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            list(parameters), lr=cfg.lr, fused=True, capturable=on_cuda
        )
        self.metrics = torch.zeros(1 + len(self.losses), device=device)
        self.stream = torch.cuda.Stream(device) if on_cuda else None
        self.graph = None
        self.num_updates = 0

    def _make_loss(self, method: str, replays: dict, gamma: float) -> torch.nn.Module:
        """The loss of a method; all methods share the base policies."""
        if not hasattr(self, "policy"):
            self.policy = self._make_policy()
        statistics = [replays[s.task].return_statistics(gamma) for s in self.settings]
        loc, scale = (torch.tensor(column) for column in zip(*statistics))
        features = self.windows.observation.shape[-1] + self.windows.action.shape[-1]
        stack = {"hidden_sizes": self.cfg.hidden_sizes, "layer_norm": True}
        if method == "evor":
            network = StackedVelocityMLP(len(self.settings), features + 2, **stack)
            returns = ReturnFlow(network, self.cfg.num_steps, loc=loc, scale=scale)
            loss = EVORLoss(
                self.policy,
                returns,
                td_target=self.cfg.td_target,
                next_action="dataset",
                reduction="none",
            )
        else:
            raise ValueError(f"methods must be 'evor' or 'scalar', got {method!r}.")
        return loss.make_value_estimator(gamma=gamma)

    def _make_policy(self) -> FlowMatchingPolicy:
        observation_dim = self.windows.observation.shape[-1]
        action_dim = self.windows.action.shape[-1]
        network = StackedVelocityMLP(
            self.windows.num_seeds,
            observation_dim + action_dim + 1,
            action_dim,
            hidden_sizes=self.cfg.hidden_sizes,
        )
        return FlowMatchingPolicy(network, action_dim, self.cfg.num_steps)

    def _update(self) -> None:
        policy_batch, value_batch = self.windows.sample(self.cfg.data.batch_size)
        first = next(iter(self.losses.values()))
        # Means over the batch and sums over models give each model the gradient it has alone.
        terms = [first.actor_loss(policy_batch)[0].mean(-1).sum()]
        terms += [loss.value_loss(value_batch)[0].mean(-1).sum() for loss in self.losses.values()]
        self.optimizer.zero_grad()
        sum(terms).backward()
        self.optimizer.step()
        for updater in self.updaters:
            updater.step()
        self.metrics.copy_(torch.stack(terms).detach())

    def update(self) -> None:
        """One gradient step of every network; asynchronous on CUDA."""
        self.num_updates += 1
        if self.stream is None:
            return self._update()
        with torch.cuda.stream(self.stream):
            if self.graph is not None:
                return self.graph.replay()
            self._update()
        if self.num_updates == 10:
            self._capture()

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._update()
        self.graph = graph

    def agents(self, method: str):
        """Trained agents, one for each setting, as ``(setting, agent)``."""
        policies = self.policy.module.velocity_network.unstack()
        returns = self.losses[method].value_network
        networks = returns.velocity_network.unstack()
        seeds = list(dict.fromkeys(setting.seed for setting in self.settings))
        for index, setting in enumerate(self.settings):
            policy = policies[seeds.index(setting.seed)]
            loc, scale = returns.loc.flatten()[index], returns.scale.flatten()[index]
            yield setting, agents.Agent(policy, networks[index], loc.item(), scale.item())


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


def train(cfg: DictConfig, programs: list[Program]) -> float:
    """Updates all programs in turn; returns the seconds that it took."""
    start = time.perf_counter()
    with tqdm(total=cfg.num_updates, unit="update") as bar:
        for step in range(1, cfg.num_updates + 1):
            for program in programs:
                program.update()
            if step % cfg.logger.interval and step < cfg.num_updates:
                continue
            # Reading the losses waits for the device, which keeps its queue short.
            losses = {p.name: [f"{x:.3g}" for x in p.metrics.tolist()] for p in programs}
            bar.update(step - bar.n)
            bar.set_postfix(losses)
            if cfg.max_seconds is not None and time.perf_counter() - start > cfg.max_seconds:
                break
    return time.perf_counter() - start


@hydra.main(config_path=".", config_name="many", version_base="1.3")
def main(cfg: DictConfig) -> None:
    output = Path(HydraConfig.get().runtime.output_dir)
    device = utils.choose_device(cfg.device)
    torch.manual_seed(cfg.seeds[0])
    torch.set_float32_matmul_precision("high")
    programs = [Program(cfg, env.name, env.gamma, device) for env in cfg.envs]
    seconds = train(cfg, programs)
    tqdm.write(f"{programs[0].num_updates} updates in {seconds:.0f} s")
    folder = Path(cfg.agents or output / "agents")
    files = []
    for program, method in itertools.product(programs, cfg.methods):
        for setting, agent in program.agents(method):
            files.append(agents.save(folder, program.name, method, setting, agent, program))
    agents.evaluate_all(cfg, files, device, seconds)


if __name__ == "__main__":
    main()
