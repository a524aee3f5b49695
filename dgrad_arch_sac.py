# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "mujoco==3.3.0", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0", "metaworld==3.1.1",
# ]
# ///
"""Task-conditioned matrix layers ("D-Grad(A)") on multi-task SAC: an architecture in which tasks quarrel less.

Yu, Kumar, Gupta, Levine, Hausman, Finn: "Multi-Task Reinforcement Learning without Interference", 2019 (workshop). One
network serves all tasks, but after each hidden layer a matrix of the task's own turns the activations. Random matrices
make the activations of different tasks nearly orthogonal, and with them the gradients of the shared weights.

    y_l = M_l(z) relu(W_l y_(l-1) + b_l) + beta_l(z)     ModularMLP
    gradient of each task, and how much they conflict    per_task, gather_gradients, conflict_summary
    soft policy evaluation / improvement                 soft_target, critic_loss, actor_loss, joint_update

Differences from the paper, each explained in docs/dgrad_arch_sac.md:
1. The task network is a table of matrices, one per task and layer, as the one-hot z makes a linear one
   (--task-net-hidden for one with a hidden layer); the paper states neither its depth nor its scale.
2. The matrices start orthogonal (--m-init): activations keep their length, which a default initialisation inflates.
3. Meta-World v3 with 50 goals per task, episodes of 200 or 500 steps, in place of the fixed goals of 2019.
4. Widths of today, 2 x 256 or 3 x 400; --hidden-sizes 160 160 160 for the paper's, and six of them for its baseline.

    python dgrad_arch_sac.py                              # four tasks, matrix layers
    python dgrad_arch_sac.py --method sac --seed 2        # the same network without
    python dgrad_arch_sac.py --method sac --hidden-sizes 752 752     # ... with as many parameters as dgrad-a
    python dgrad_arch_sac.py --env mt10 --hidden-sizes 160 160 160 --total-timesteps 20_000_000
"""
from __future__ import annotations

import copy
import difflib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
MT10 = ("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
        "peg-insert-side", "window-open", "window-close")
MT50 = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press-topdown", "button-press-topdown-wall",
    "button-press", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble",
    "door-close", "door-lock", "door-open", "door-unlock", "hand-insert", "drawer-close", "drawer-open", "faucet-open",
    "faucet-close", "hammer", "handle-press-side", "handle-press", "handle-pull-side", "handle-pull", "lever-pull",
    "pick-place-wall", "pick-out-of-hole", "pick-place", "plate-slide", "plate-slide-side", "plate-slide-back",
    "plate-slide-back-side", "peg-insert-side", "peg-unplug-side", "soccer", "stick-push", "stick-pull", "push",
    "push-wall", "push-back", "reach", "reach-wall", "shelf-place", "sweep-into", "sweep", "window-open",
    "window-close")
FAMILIES = {"mt3": ("reach", "drawer-close", "window-close"), "mt10": MT10, "mt50": MT50,
            "mt4": ("reach", "drawer-close", "button-press-topdown", "window-close")}
SMALL = dict(horizon=200, hidden_sizes=(256, 256), batch_size=64, lr=3e-4, critic_lr=1e-3, learning_starts=1_000,
             total_timesteps=200_000, eval_every=20_000)
LARGE = dict(horizon=500, hidden_sizes=(400, 400, 400), batch_size=128, lr=3e-4, critic_lr=3e-4, learning_starts=4_000)
LOG_EVERY = 2_000                                             # environment steps between writes to TensorBoard
PRESETS = {  # a setting left at None takes its value from here
    "mt3": SMALL, "mt4": SMALL, "mt10": LARGE | dict(total_timesteps=5_000_000, eval_every=200_000),
    "mt50": LARGE | dict(total_timesteps=20_000_000, eval_every=2_000_000)}


@dataclass
class Args:
    env: Literal["mt3", "mt4", "mt10", "mt50"] = "mt4"
    """three or four quick tasks of Meta-World, or its standard ten or fifty"""
    method: Literal["dgrad-a", "sac", "film"] = "dgrad-a"
    """matrix layers; one network told the task by a one-hot; scales and shifts in place of matrices (FiLM)"""
    tasks: tuple[str, ...] | None = None
    """names of other Meta-World tasks, such as drawer-open window-close; None takes those of --env"""
    seed: int = 1
    """seeds every generator: networks, goals, replay, exploration"""
    total_timesteps: int | None = None
    """environment steps, summed over tasks; None: 200_000, mt10 5 and mt50 20 million"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes cuda if present, else cpu"""
    eval_every: int | None = None
    """environment steps between evaluations; None: 20_000, mt10 200_000, mt50 2 million"""
    eval_episodes: int = 10
    """episodes per task and evaluation: deterministic policy, separate environments, own generators"""
    checkpoint_every: int = 40_000
    """environment steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM"""
    runs_dir: Path = Path("runs")
    """where run folders go"""
    resume: Path | None = None
    """run folder to go on from, to the same or a larger --total-timesteps"""
    evaluate: Path | None = None
    """run folder to load and evaluate; trains nothing and writes nothing but pictures asked for"""
    capture_video: bool = False
    """after training or with --evaluate: one animated picture of all tasks side by side"""

    horizon: int | None = None
    """steps after which an episode is cut off, at most 500; None: the preset of --env"""
    num_goals: int = 50
    """goals (with start positions) per task, 1 to 50, drawn by the seed; each episode draws one of them"""
    reward_version: Literal["v2", "v1"] = "v2"
    """Meta-World's reward: v2 lies in 0 to 10 for every task, v1 has no common scale"""
    m_init: Literal["orthogonal", "gaussian", "identity"] | None = None
    """how matrices start: random rotations, entries of variance 1 / width, or the plain network; for film the diagonal
    kinds of these: random signs, N(0, 1), ones. None: orthogonal for dgrad-a, identity for film, gaussian with
    --task-net-hidden"""
    task_net_hidden: int = 0
    """hidden units of the network from the one-hot to matrices and shifts; 0 makes them a table"""
    watch_every: int = 10
    """updates between measurements of the tasks' gradients"""
    learning_starts: int | None = None
    """random actions per task before the first update; None: the preset of --env"""
    batch_size: int | None = None
    """transitions per task and update; None: the preset of --env"""
    buffer_size: int = 100_000
    """replay capacity per task, transitions"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers; None: the preset of --env"""
    lr: float | None = None
    """Adam step size of the policy; None: the preset of --env"""
    critic_lr: float | None = None
    """Adam step size of critics and temperatures; None: the preset of --env"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak coefficient: the share of the online critics that enters the targets at each update"""
    max_grad_norm: float = 1.0
    """L2 norm to which the gradient of the policy, and that of both critics, is clipped; 0 turns it off"""

    def __post_init__(self):
        for name, value in PRESETS[self.env].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.tasks is None:
            self.tasks = FAMILIES[self.env]
        for task in self.tasks:
            if task not in MT50:
                close = difflib.get_close_matches(task.removesuffix("-v3"), MT50, 4, 0.4)
                raise ValueError(f"--tasks {task}: no such task of Meta-World; close: {', '.join(close) or 'none'}. "
                                 f"All: {', '.join(sorted(MT50))}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks must be different from each other, got {' '.join(self.tasks)}")
        if not self.tasks:
            raise ValueError("--tasks needs at least one task")
        if self.task_net_hidden:
            if self.m_init not in (None, "gaussian"):
                raise ValueError(f"--m-init {self.m_init} needs a table; with --task-net-hidden M starts gaussian")
            self.m_init = "gaussian"
        if self.m_init is None:
            self.m_init = "identity" if self.method == "film" else "orthogonal"
        if not 1 <= self.horizon <= 500:
            raise ValueError(f"--horizon must be from 1 to 500, where Meta-World ends an episode, got {self.horizon}")
        if not 1 <= self.num_goals <= 50:
            raise ValueError(f"--num-goals must be from 1 to 50, got {self.num_goals}")
        for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "watch_every", "batch_size",
                     "buffer_size", "learning_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        for name in ("max_grad_norm", "task_net_hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "critic_lr", "gamma", "tau"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {getattr(self, name)}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes takes one or more widths of at least 1, got {self.hidden_sizes}")


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
@cache
def metaworld_benchmark(name: str, seed: int):
    """Meta-World's class for a task, and the fifty (goal, start) pairs that it draws for a seed."""
    import metaworld
    benchmark = metaworld.MT1(f"{name}-v3", seed=seed)
    return benchmark.train_classes[f"{name}-v3"], benchmark.train_tasks


class MetaWorldEnv(gym.Env):
    """A task of Meta-World v3: every episode draws one of its goals; success is kept for the rest of the episode.

    Observation (39 + T,): hand, gripper and objects, the same one step earlier, the goal, and the task, one-hot of T.
    Action (4,): displacement of the hand / 1 cm, and the closing of the fingers. The simulator's state cannot be saved.
    """
    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, name: str, one_hot: np.ndarray, seed: int, num_goals: int, reward_version: str):
        stock, goals = metaworld_benchmark(name, seed)
        self.stock, self.goals, self.one_hot = stock(reward_function_version=reward_version), goals[:num_goals], one_hot
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39 + len(one_hot),), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stock.set_task(self.goals[self.np_random.integers(len(self.goals))])
        self.success = False
        return self._obs(self.stock.reset()[0]), {"success": False}

    def step(self, action):
        obs, reward, _, _, info = self.stock.step(np.clip(action, -1.0, 1.0))
        self.success |= bool(info["success"])
        return self._obs(obs), float(reward), False, False, {"success": self.success}

    def _obs(self, obs: np.ndarray) -> np.ndarray:
        return np.concatenate([obs, self.one_hot]).astype(np.float32)

    def render(self) -> np.ndarray:
        return ray_cast(self.stock.model, self.stock.data, (0.0, 0.7, 0.15), 1.4, 105, -38)


def make_env(args: Args, task: int) -> gym.Env:
    """Task `task` of the list, with its time limit as truncation and with the statistics of its episodes."""
    env = MetaWorldEnv(args.tasks[task], np.eye(len(args.tasks))[task], args.seed, args.num_goals, args.reward_version)
    return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(env, args.horizon))


def make_envs(args: Args, task_ids: list[int]) -> SyncVectorEnv:
    """One sub-environment per task; a finished one restarts in the same step, its last observation in `infos`."""
    return SyncVectorEnv([partial(make_env, args, task) for task in task_ids], autoreset_mode=AutoresetMode.SAME_STEP)


def true_next_obs(next_obs: np.ndarray, infos: dict) -> np.ndarray:
    """Undo SAME_STEP autoreset: the observation each action led to, (T, O)."""
    true_obs = next_obs.copy()
    for i in np.flatnonzero(infos.get("_final_obs", ())):
        true_obs[i] = infos["final_obs"][i]               # the other entries of final_obs are None
    return true_obs


def finished_episodes(infos: dict):
    """Yield (task, {undiscounted return, length, what the task reports}) of each episode that ended on this step."""
    final = infos.get("final_info", {})                   # a dict of arrays
    for i in np.flatnonzero(final.get("_episode", ())):
        reported = {key: float(values[i]) for key, values in final.items() if key[0] != "_" and key != "episode"}
        yield int(i), {"episodic_return": float(final["episode"]["r"][i]),
                       "episodic_length": int(final["episode"]["l"][i]), **reported}


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
class TaskMLP(nn.Module):
    """One MLP per task, all of them evaluated at once.

    A layer is a stack of matrices, (T, in, out), one per task, or a single one, (1, in, out), for the layers in `tied`,
    which all tasks share: no tied layer gives independent networks, all of them one network for all tasks, all but the
    last a shared trunk with a head per task.
    """

    def __init__(self, num_tasks: int, sizes: list[int], tied: tuple[int, ...] = (), activation: str = "relu",
                 init=nn.init.xavier_uniform_):
        super().__init__()
        self.activation = getattr(torch, activation + "_")             # in place: large activations cost memory traffic
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            weight = torch.empty(1 if layer in tied else num_tasks, n_in, n_out)
            for matrix in weight:
                init(matrix)
            self.weights.append(weight)
            self.biases.append(torch.zeros(len(weight), 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, in) -> (T, B, out): row i of the first axis goes through network i."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = x @ weight[0] + bias[0] if len(weight) == 1 else torch.baddbmm(bias, x, weight)
            if layer < len(self.weights) - 1:
                x = self.activation(x)
        return x


class ModularMLP(nn.Module):
    """A network that all tasks share, with a layer of the task's own after each hidden activation.

    The task's layer is y = M x + beta with a matrix M, or with a diagonal one, gamma * x + beta (`diagonal`). What is
    shared has a first axis of 1, as in TaskMLP, what is a task's own one of T.
    """

    def __init__(self, num_tasks: int, sizes: list[int], m_init: str, diagonal: bool, task_net_hidden: int = 0,
                 init=nn.init.xavier_uniform_):
        super().__init__()
        self.trunk, self.diagonal = TaskMLP(num_tasks, sizes, tuple(range(len(sizes))), init=init), diagonal
        tables = [torch.cat([initial_matrices(num_tasks, width, m_init, diagonal), torch.zeros(num_tasks, 1, width)], 1)
                  for width in sizes[1:-1]]                            # (T, n + 1, n): the last row is beta
        self.embedding = None
        if task_net_hidden:                                            # z -> hidden -> (M, beta), of the same scale
            self.embedding = nn.Parameter(torch.randn(num_tasks, 1, task_net_hidden))
            scales = [torch.ones_like(table[:1]) / math.sqrt(1 if diagonal else table.shape[2]) for table in tables]
            for scale in scales:
                scale[:, -1] = 0                                       # beta starts at 0
            tables = [torch.randn(1, task_net_hidden, scale.numel()) * scale.flatten() / math.sqrt(task_net_hidden / 2)
                      for scale in scales]                             # 1 / 2: mean square of the hidden units
        self.tables = nn.ParameterList(tables)

    def task_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Each hidden layer's matrices, (T, n, n), or scales, (T, 1, n) if diagonal, and shifts, (T, 1, n)."""
        tables = list(self.tables)
        if self.embedding is not None:                                 # (T, 1, H) @ (1, H, .) -> (T, n + 1, n)
            widths = [weight.shape[-1] for weight in self.trunk.weights]
            tables = [(self.embedding.relu() @ head).view(len(self.embedding), -1, width)
                      for head, width in zip(tables, widths)]
        return [(table[:, :-1], table[:, -1:]) for table in tables]

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, in) -> (T, B, out): row i of the first axis is task i's."""
        *hidden, last = zip(self.trunk.weights, self.trunk.biases)
        for (weight, bias), (matrix, beta) in zip(hidden, self.task_layers()):
            x = torch.relu(x @ weight + bias)
            x = matrix * x + beta if self.diagonal else torch.baddbmm(beta, x, matrix)
        return x @ last[0] + last[1]


def initial_matrices(num_tasks: int, width: int, m_init: str, diagonal: bool) -> Tensor:
    """Matrices of the tasks' layers that keep the length of what they turn, (T, n, n), or diagonals, (T, 1, n)."""
    if m_init == "identity":
        return torch.ones(num_tasks, 1, width) if diagonal else torch.eye(width).repeat(num_tasks, 1, 1)
    if diagonal:
        drawn = torch.randn(num_tasks, 1, width)
        return drawn.sign() if m_init == "orthogonal" else drawn
    drawn = torch.randn(num_tasks, width, width) / math.sqrt(width)
    return torch.stack([nn.init.orthogonal_(matrix) for matrix in drawn]) if m_init == "orthogonal" else drawn


class Actor(nn.Module):
    """Gaussian policies before the tanh, one per task."""

    def __init__(self, num_tasks: int, obs_size: int, action_size: int, hidden: tuple, tied: tuple, activation: str):
        super().__init__()
        self.net = TaskMLP(num_tasks, [obs_size, *hidden, 2 * action_size], tied, activation)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(T, B, O) -> mean and log standard deviation, (T, B, A) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Soft Q-functions, one per task."""

    def __init__(self, num_tasks: int, obs_size: int, action_size: int, hidden: tuple, tied: tuple, activation: str):
        super().__init__()
        self.net = TaskMLP(num_tasks, [obs_size + action_size, *hidden, 1], tied, activation, nn.init.xavier_normal_)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """(T, B, O) and (T, B, A) -> (T, B)."""
        return self.net(torch.cat([obs, actions], dim=-1)).squeeze(-1)


class MultiTaskSAC(nn.Module):
    """What SAC trains where tasks share networks: policy, twin critics with their targets, a temperature per task."""

    def __init__(self, actor: nn.Module, qf1: nn.Module, qf2: nn.Module, num_tasks: int, action_size: int):
        super().__init__()
        self.actor, self.qf1, self.qf2 = actor, qf1, qf2
        self.qf1_target, self.qf2_target = copy.deepcopy(qf1), copy.deepcopy(qf2)
        self.log_alpha = nn.Parameter(torch.zeros(num_tasks))
        self.target_entropy = -float(action_size)

    def make_optimizers(self, lr: float, critic_lr: float) -> dict[str, torch.optim.Optimizer]:
        """One Adam each for the policy, for both critics and for the temperatures."""
        params = {"actor": (self.actor.parameters(), lr), "alpha": ([self.log_alpha], critic_lr),
                  "critic": ([*self.qf1.parameters(), *self.qf2.parameters()], critic_lr)}
        return {name: torch.optim.Adam(p, lr=rate, fused=True) for name, (p, rate) in params.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Replay buffer
# ---------------------------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The last `capacity` transitions of each learner; a row is obs, action, reward, next_obs, termination."""

    def __init__(self, num_learners: int, capacity: int, obs_size: int, action_size: int, device: torch.device):
        self.widths = [obs_size, action_size, 1, obs_size, 1]
        self.data = torch.zeros(num_learners, capacity, sum(self.widths), device=device)
        self.learners = torch.arange(num_learners, device=device)[:, None]
        self.num_added = 0                                # per learner: all add at the same time

    def __len__(self) -> int:
        return min(self.num_added, self.data.shape[1])

    def add(self, obs, actions, rewards, next_obs, terminations) -> None:
        """Append one transition per learner: (T, O), (T, A), (T,), (T, O), (T,). Truncation is no termination."""
        row = np.concatenate([obs, actions, rewards[:, None], next_obs, terminations[:, None]], 1, dtype=np.float32)
        self.data[:, self.num_added % self.data.shape[1]] = torch.from_numpy(row).to(self.data.device)
        self.num_added += 1

    def sample(self, rng: np.random.Generator, batch_size: int) -> list[Tensor]:
        """Draw uniformly, for each learner its own: obs (T, B, O), actions, rewards (T, B), next_obs, terminations."""
        index = torch.from_numpy(rng.integers(len(self), size=(len(self.data), batch_size))).to(self.data.device)
        obs, actions, rewards, next_obs, terminations = self.data[self.learners, index].split(self.widths, dim=-1)
        return [obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(mean + std * noise) with its log-probability [nats]: (..., A) -> (..., A), (...)."""
    actions = torch.tanh(mean + log_std.exp() * noise)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return actions, (gaussian - torch.log(1 - actions.square() + 1e-6)).sum(-1)


def soft_target(rewards: Tensor, terminations: Tensor, next_q: Tensor, next_log_prob: Tensor, alpha: Tensor,
                gamma: float) -> Tensor:
    """Regression target of the critics, r + gamma (1 - termination) (Q' - alpha log pi'): (T, B), alpha (T, 1)."""
    return rewards + gamma * (1 - terminations) * (next_q - alpha * next_log_prob)


def critic_loss(q1: Tensor, q2: Tensor, target: Tensor) -> Tensor:
    """Mean squared errors of both twins, summed: (T, B) -> (T,)."""
    return ((q1 - target).square() + (q2 - target).square()).mean(1)


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """What the policy minimises, alpha log pi - Q: (T, B) -> (T,)."""
    return (alpha * log_prob - q).mean(1)


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """Its gradient raises alpha while the entropy is below the target: (T, B) -> (T,)."""
    return -log_alpha * (log_prob + target_entropy).mean(1)


def per_task(net: nn.Module, num_tasks: int) -> tuple:
    """The network with a copy of its tied layers for each task, so that each task's gradient arrives by itself.

    Returns:
        What to call in place of `net`, and the copies by parameter name: none if no layer is tied.
    """
    copies = {name: param.detach().expand(num_tasks, -1, -1).requires_grad_()
              for name, param in net.named_parameters() if len(param) == 1 < num_tasks and param.requires_grad}
    return (partial(call_with, net, copies) if copies else net), copies


def call_with(net: nn.Module, params: dict[str, Tensor], *inputs: Tensor):
    """The network's output with other parameters than its own."""
    return torch.func.functional_call(net, params, inputs)


def conflict_weights(gram: np.ndarray, visit_order: np.ndarray) -> np.ndarray:
    """How much of each task's gradient every projected gradient consists of (PCGrad, Algorithm 1, in coefficients).

    Projecting only ever subtracts multiples of the original gradients, so that their inner products are enough.

    Args:
        gram: inner products of the tasks' gradients before surgery, (T, T) float64.
        visit_order: row i lists the partners that task i meets, in order, (T, T - 1).
    Returns:
        Row i holds the coefficients of task i's projected gradient, (T, T).
    """
    weights = np.eye(len(gram))
    for i, partners in enumerate(visit_order):
        for j in partners:
            dot = weights[i] @ gram[:, j]                              # projected so far, against the original j
            if dot < 0:
                weights[i, j] -= dot / (gram[j, j] + 1e-12)
    return weights


def gather_gradients(nets: list[tuple[nn.Module, dict]], visit_order: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Give tied layers the mean of the tasks' gradients, as they are or after gradient surgery.

    Args:
        nets: networks with the copies that `per_task` made, whose gradients are there; one vector of all together.
        visit_order: as for `project_conflicts`; None for no surgery.
    Returns:
        Inner products of the tasks' gradients before surgery, and the coefficients of `conflict_weights`; (T, T) each.
    """
    tied = [(net.get_parameter(name), copies_) for net, copies in nets for name, copies_ in copies.items()]
    task_grads = torch.cat([copies.grad.flatten(1) for _, copies in tied], dim=1)             # (T, P)
    gram = (task_grads @ task_grads.T).cpu().double().numpy()
    weights = np.eye(len(gram)) if visit_order is None else conflict_weights(gram, visit_order)
    mean = torch.from_numpy(weights.mean(0)).to(task_grads) @ task_grads
    for (param, _), gradient in zip(tied, mean.split([param.numel() for param, _ in tied])):
        param.grad = gradient.view_as(param)
    return gram, weights


def descend_mean(optimizer: torch.optim.Optimizer, losses: Tensor, nets: list, max_grad_norm: float,
                 orders: np.ndarray | None, combine: str = "mean") -> tuple | None:
    """Descend the mean of the tasks' losses, (T,), after surgery if there are `orders`, and after clipping.

    Args:
        nets: each network with the copies that `per_task` made for its forward pass, empty if it was called itself.
        combine: "sum" multiplies all gradients by T.
    Returns:
        Inner products of the tasks' gradients and their weights, as `gather_gradients`; None without copies.
    """
    optimizer.zero_grad()
    split = any(copies for _, copies in nets)
    (losses.sum() if split else losses.mean()).backward()
    statistics = gather_gradients(nets, orders) if split else None
    params = [(name in copies, param) for net, copies in nets for name, param in net.named_parameters()]
    for tied, param in params:
        if param.grad is None:                                         # frozen by the reader
            continue
        if split and not tied:                                         # heads: the mean has 1 / T of their gradient
            param.grad /= len(losses)
        if combine == "sum":
            param.grad *= len(losses)
    if max_grad_norm:
        nn.utils.clip_grad_norm_([param for _, param in params], max_grad_norm)
    optimizer.step()
    return statistics


@contextmanager
def frozen(*nets: nn.Module):
    """The networks let gradients through and get none themselves; what a reader has frozen for good stays so."""
    params = [param for net in nets for param in net.parameters() if param.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


def joint_update(learners: MultiTaskSAC, optimizers: dict, batch: list[Tensor], gamma: float, tau: float,
                 max_grad_norm: float, split: bool, draw_orders=lambda: None, combine: str = "mean"
                 ) -> tuple[dict[str, Tensor], dict]:
    """One SAC step on the mean of the tasks' losses: critics, policy, temperatures, targets.

    Args:
        split: take each task's gradient by itself, which surgery needs, and which costs a little.
        draw_orders: gives the order of projections for each surgery; None means no surgery.
    Returns:
        Losses, (T,) each; inner products and weights of the tasks' gradients for "critic" and "actor", if split.
    """
    obs, actions, rewards, next_obs, terminations = batch
    num_tasks, alpha = len(obs), learners.log_alpha.detach().exp()[:, None]        # (T, 1)
    with torch.no_grad():
        mean, log_std = learners.actor(next_obs)
        next_actions, next_log_prob = squash(mean, log_std, torch.randn_like(mean))
        next_q = torch.min(learners.qf1_target(next_obs, next_actions), learners.qf2_target(next_obs, next_actions))
        target = soft_target(rewards, terminations, next_q, next_log_prob, alpha, gamma)
    twins = [(net, *(per_task(net, num_tasks) if split else (net, {}))) for net in (learners.qf1, learners.qf2)]
    q1, q2 = (call(obs, actions) for _, call, _ in twins)
    losses, statistics = {"critic": critic_loss(q1, q2, target)}, {}
    statistics["critic"] = descend_mean(optimizers["critic"], losses["critic"],
                                        [(net, copies) for net, _, copies in twins], max_grad_norm, draw_orders(),
                                        combine)

    call, copies = per_task(learners.actor, num_tasks) if split else (learners.actor, {})
    mean, log_std = call(obs)
    pi, log_prob = squash(mean, log_std, torch.randn_like(mean))
    with frozen(learners.qf1, learners.qf2):
        losses["actor"] = actor_loss(torch.min(learners.qf1(obs, pi), learners.qf2(obs, pi)), log_prob, alpha)
    statistics["actor"] = descend_mean(optimizers["actor"], losses["actor"], [(learners.actor, copies)], max_grad_norm,
                                       draw_orders(), combine)

    optimizers["alpha"].zero_grad()                                    # tasks cannot quarrel about temperatures
    temperature_loss(learners.log_alpha, log_prob.detach(), learners.target_entropy).sum().backward()
    optimizers["alpha"].step()

    with torch.no_grad():
        for online, targets in ((learners.qf1, learners.qf1_target), (learners.qf2, learners.qf2_target)):
            for param, target_param in zip(online.parameters(), targets.parameters()):
                target_param.lerp_(param, tau)                                 # keeps 1 - tau of the old target
    return ({name: loss.detach() for name, loss in losses.items()},
            {name: found for name, found in statistics.items() if found is not None})


def conflict_summary(gram: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What inner products of the tasks' gradients, (T, T), and surgery's weights, (T, T), say about conflict.

    Returns:
        cosine: of each pair, (T, T); abs_cosine: mean of its absolute value over pairs; conflicts: share of pairs below
        0; norm_ratio: length of the update relative to that without surgery; weights: as given; weight: mean over tasks
        of the factor that a task's gradient has in the update, 1 without surgery.
    """
    norms, pairs = np.sqrt(np.diag(gram)).clip(min=1e-12), ~np.eye(len(gram), dtype=bool)
    total, plain = weights.sum(0), np.ones(len(gram))
    cosine = gram / norms / norms[:, None]
    return {"cosine": cosine, "abs_cosine": np.abs(cosine[pairs]).mean(), "conflicts": (cosine[pairs] < 0).mean(),
            "weights": weights, "weight": total.mean(),
            "norm_ratio": math.sqrt(max(total @ gram @ total, 0.0) / max(plain @ gram @ plain, 1e-24))}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def evaluate(args: Args, task_ids: list[int], act, frames: bool = False) -> dict:
    """The first --eval-episodes episodes of every task in fresh environments, with generators of their own.

    Args:
        act: observations (T, O) -> actions (T, A).
        frames: also render each task's first episode, every fourth step.
    Returns:
        returns, successes and what else the tasks report, (T, episodes) each; paths, the observations of each task's
        first episode; frames.
    """
    envs = make_envs(args, task_ids)
    obs, _ = envs.reset(seed=args.seed + 10_000)
    episodes, paths, film = [[] for _ in task_ids], [[first] for first in obs], []
    with torch.random.fork_rng():                                      # the mixture draws noise: not from training's
        torch.manual_seed(args.seed + 10_000)
        while min(map(len, episodes)) < args.eval_episodes:
            playing = [i for i in range(len(task_ids)) if not episodes[i]]     # still in their first episode
            if frames and playing and len(paths[playing[0]]) % 4 == 1:
                film.append([env.render() if i in playing else film[-1][i] for i, env in enumerate(envs.envs)])
            obs, _, _, _, infos = envs.step(act(obs))
            for i in playing:
                paths[i].append(true_next_obs(obs, infos)[i])
            for i, episode in finished_episodes(infos):
                episodes[i].append(episode)
    envs.close()
    table = {key: np.array([[episode[key] for episode in row[:args.eval_episodes]] for row in episodes])
             for key in episodes[0][0]}                                # (T, episodes) each
    return table | {"returns": table["episodic_return"], "successes": table["success"],
                    "paths": [np.array(path) for path in paths], "frames": film}


def make_modular_learners(args: Args, num_tasks: int, obs_size: int, action_size: int) -> MultiTaskSAC:
    """One network for all tasks, with their own layers in between unless the method is sac."""
    sizes = (num_tasks, obs_size, action_size, args.hidden_sizes, tuple(range(len(args.hidden_sizes) + 1)), "relu")
    nets = [Actor(*sizes), Critic(*sizes), Critic(*sizes)]
    if args.method != "sac":
        ends = (obs_size, 2 * action_size), (obs_size + action_size, 1), (obs_size + action_size, 1)
        inits = nn.init.xavier_uniform_, nn.init.xavier_normal_, nn.init.xavier_normal_       # those of the plain nets
        for net, (n_in, n_out), init in zip(nets, ends, inits):
            net.net = ModularMLP(num_tasks, [n_in, *args.hidden_sizes, n_out], args.m_init, args.method == "film",
                                 args.task_net_hidden, init)
    return MultiTaskSAC(*nets, num_tasks, action_size)


def train(args: Args) -> Path | None:
    """Act in every task, then one update of the shared networks; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    device = pick_device(args.device)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)                             # replay indices, random actions
    names, num_tasks = list(args.tasks), len(args.tasks)
    task_ids = list(range(num_tasks))
    envs = make_envs(args, task_ids)
    obs, _ = envs.reset(seed=args.seed)                                # (T, O); sub-environment i gets seed + i
    obs_size, action_size = obs.shape[1], envs.single_action_space.shape[0]
    learners = make_modular_learners(args, num_tasks, obs_size, action_size).to(device)
    optimizers = learners.make_optimizers(args.lr, args.critic_lr)

    @torch.no_grad()
    def act(obs: np.ndarray, greedy: bool) -> np.ndarray:
        mean, log_std = learners.actor(torch.as_tensor(obs, device=device)[:, None])                 # (T, 1, A)
        noise = torch.zeros_like(mean) if greedy else torch.randn_like(mean)
        return squash(mean, log_std, noise)[0].squeeze(1).cpu().numpy()

    if args.evaluate:
        learners.load_state_dict(load_checkpoint(args.evaluate)["learners"])
        evaluation = evaluate(args, task_ids, partial(act, greedy=True), frames=args.capture_video)
        print_table(names, evaluation)
        if args.capture_video:
            save_animation(args.evaluate / "tasks.gif", names, evaluation["frames"])
        return args.evaluate

    state = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "seconds": 0.0}
    global_step = state["global_step"]
    if global_step - num_tasks >= args.total_timesteps:                # the last lock-step may overshoot
        raise Failure(f"--resume {args.resume}: that run has {global_step:,} steps already; "
                      f"give a larger --total-timesteps than {args.total_timesteps:,}")
    capacity = min(args.buffer_size, -(-args.total_timesteps // num_tasks))
    buffer = ReplayBuffer(num_tasks, capacity, obs_size, action_size, device)
    num_updates, history = 0, []                                       # history: (step, {what: mean matrix (T, T)})
    losses, conflicts = defaultdict(list), {"critic": {}, "actor": {}}         # sums of statistics, and of how many
    if args.resume:
        learners.load_state_dict(state["learners"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        buffer.num_added = state["num_added"]
        buffer.data[:, :len(buffer)] = state["buffer"].to(device)
        num_updates, history = state["num_updates"], state["history"]
        conflicts = {network: {key: (total.numpy(), count) for key, (total, count) in sums.items()}
                     for network, sums in state["conflicts"].items()}
        obs = set_world(state["world"], envs, rng)
    run = Run(args, names, global_step, state["seconds"])
    if not args.resume:
        for method in dict.fromkeys((args.method, "sac")):             # a comparison needs to know this
            with torch.device("meta"):                                 # sizes only
                other = make_modular_learners(replace(args, method=method), num_tasks, obs_size, action_size)
            sizes = [sum(p.numel() for p in net.parameters()) for net in (other.actor, other.qf1)]
            print(f"parameters of {method}: policy {sizes[0]:,}, each critic {sizes[1]:,}")

    def save() -> None:
        """Everything that the next step reads."""
        check_finite(global_step, dict(learners.named_parameters()))   # keeps the last good one
        run.save(dict(
            global_step=global_step, learners=learners.state_dict(), num_updates=num_updates, history=history,
            conflicts={network: {key: (torch.as_tensor(total), count) for key, (total, count) in sums.items()}
                       for network, sums in conflicts.items()},
            optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            world=get_world(envs, obs, rng), num_added=buffer.num_added,
            buffer=buffer.data[:, :len(buffer)].clone().cpu()))       # a clone, or torch.save writes the empty part too

    if args.total_timesteps <= num_tasks * args.learning_starts:
        print(f"--total-timesteps {args.total_timesteps:,} only fills the buffers: updates begin after "
              f"{num_tasks * args.learning_starts:,} steps (--learning-starts {args.learning_starts:,} for each task)")
    if not args.resume:
        save()                                                         # from here on a killed run can be resumed

    while global_step < args.total_timesteps and not run.stop_signal:
        # Act ----------------------------------------------------------------------------------------------
        filling = global_step < num_tasks * args.learning_starts
        actions = rng.uniform(-1, 1, (num_tasks, action_size)).astype(np.float32) if filling else act(obs, greedy=False)

        # Step every task once, log what ended, store --------------------------------------------------------
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        previous_step, global_step = global_step, global_step + num_tasks
        for task, episode in finished_episodes(infos):
            run.add(f"tasks/{names[task]}", episode)
        buffer.add(obs, actions, rewards, true_next_obs(next_obs, infos), terminations)
        obs = next_obs

        # Update: plain SAC on the mean of the tasks' losses ---------------------------------------------------
        if not filling:
            num_updates += 1
            found, statistics = joint_update(learners, optimizers, buffer.sample(rng, args.batch_size), args.gamma,
                                             args.tau, args.max_grad_norm, num_updates % args.watch_every == 0)
            for name, loss in found.items():
                losses[name].append(loss)
            for network, (gram, weights) in statistics.items():
                for key, value in conflict_summary(gram, weights).items():
                    total, count = conflicts[network].get(key, (0.0, 0))
                    conflicts[network][key] = total + value, count + 1

        # Log, evaluate, save --------------------------------------------------------------------------------
        evaluate_now = crossed(previous_step, global_step, args.eval_every) or global_step >= args.total_timesteps
        if crossed(previous_step, global_step, LOG_EVERY) or evaluate_now:
            log_losses(run, names, learners, losses, global_step)
        if evaluate_now:
            columns = log_conflicts(run, names, conflicts, history, global_step)
            run.log_evaluation(global_step, evaluate(args, task_ids, partial(act, greedy=True)), columns)
        if crossed(previous_step, global_step, LOG_EVERY) or evaluate_now:
            run.write(global_step)
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        evaluation = evaluate(args, task_ids, partial(act, greedy=True), frames=args.capture_video)
        plot_conflicts(run.dir, names, history)
        if args.capture_video:
            save_animation(run.dir / "tasks.gif", names, evaluation["frames"])
        print_table(names, evaluation)
    run.close()
    return run.dir


def log_losses(run: Run, names: list[str], learners: MultiTaskSAC, losses: dict, global_step: int) -> None:
    """Means since the last call to TensorBoard; stop if one of them, or a parameter, is not finite."""
    means = {name: torch.stack(values).mean(0).cpu() for name, values in losses.items()}             # (T,) each
    losses.clear()
    check_finite(global_step, means | dict(learners.named_parameters()))
    means["alpha"] = learners.log_alpha.detach().exp().cpu()
    for name, per_task_loss in means.items():
        run.add("losses", {name: per_task_loss.mean().item()})
        run.add("losses", {f"{task}/{name}": loss.item() for task, loss in zip(names, per_task_loss)})


def log_conflicts(run: Run, names: list[str], conflicts: dict, history: list, global_step: int) -> dict[str, float]:
    """Means of the gradients' statistics since the last call, to TensorBoard, to `history` and as columns."""
    columns, matrices = {}, {}
    for network, collected in conflicts.items():
        means = {key: total / count for key, (total, count) in collected.items()}
        collected.clear()
        unknown = np.full((len(names),) * 2, np.nan)                   # as long as there have been no updates
        cosine = matrices[network] = means.get("cosine", unknown)
        weights = matrices[f"{network}_weights"] = means.get("weights", unknown)
        per_task_cosine = (cosine.sum(1) - 1) / max(len(names) - 1, 1)
        run.add("grads", {f"{name}/{network}_cosine": value for name, value in zip(names, per_task_cosine)})
        run.add("grads", {f"{name}/{network}_weight": value for name, value in zip(names, weights.sum(0))})
        columns |= {f"{network}_cosine": per_task_cosine.mean()}
        columns |= {f"{network}_{key}": means.get(key, math.nan)
                    for key in ("abs_cosine", "conflicts", "norm_ratio", "weight")}
    run.add("grads", columns)
    history.append((global_step, {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}))
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
def plot_conflicts(folder: Path, names: list[str], history: list) -> None:
    """conflicts.png: cosines between the tasks' gradients, four times over training, and the share below 0."""
    known = [(step, matrices) for step, matrices in history if torch.isfinite(matrices["critic"]).all()]
    if not known:
        return
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    shown = [known[round(i * (len(known) - 1) / 3)] for i in range(4)]
    figure = Figure(figsize=(16, 6), layout="constrained")
    axes = figure.subplots(2, 5)
    for row, network in zip(axes, ("critic", "actor")):
        for axis, (step, matrices) in zip(row, shown):
            image = axis.imshow(matrices[network].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            if len(names) <= 10:
                for (i, j), value in np.ndenumerate(matrices[network].numpy()):
                    axis.text(j, i, f"{value:.2f}" if i != j else "", ha="center", va="center", fontsize=7)
                axis.set_yticks(range(len(names)), names if axis is row[0] else [""] * len(names), fontsize=7)
            axis.set(xticks=[], title=f"{network}, {step:,} steps")
        row[4].plot(table["global_step"], table[f"{network}_conflicts"], label="share of pairs below 0")
        row[4].plot(table["global_step"], table[f"{network}_cosine"], label="mean cosine")
        row[4].axhline(0, color="black", linewidth=0.5)
        row[4].set(xlabel="environment steps", title=network)
        row[4].xaxis.set_major_formatter(EngFormatter(sep=""))
        row[4].legend(frameon=False, fontsize=8)
    figure.colorbar(image, ax=axes[:, :4], label="cosine between gradients of two tasks")
    figure.savefig(folder / "conflicts.png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Shared blocks: the same text in every script
# ---------------------------------------------------------------------------------------------------------------------
class Failure(Exception):
    """What the user can mend: shown as one message without a traceback; the program ends with `status`."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def crossed(before: int, after: int, period: int) -> bool:
    """Whether a multiple of `period` lies in (before, after]: the step counter grows by more than one."""
    return after // period > before // period


def pick_device(name: str) -> torch.device:
    """auto takes cuda if present, else cpu."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise Failure(f"--device {name}: PyTorch {torch.__version__} finds none here; use --device auto") from error
    return device


def check_finite(global_step: int, tensors: dict[str, Tensor]) -> None:
    """Stop on a loss or a parameter that is not finite; the last checkpoint is older and good."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise Failure(f"{name} is not finite at step {global_step:,}; the last checkpoint is from before that. "
                          "A smaller --lr is the usual remedy", status=1)


COUNTERS = ("_elapsed_steps", "episode_returns", "episode_lengths")    # of TimeLimit and RecordEpisodeStatistics


def get_world(envs: SyncVectorEnv, obs: np.ndarray, rng: np.random.Generator) -> dict:
    """What a resumed run needs beside its networks and data: generators, observations, simulators if they can tell."""
    simulators = [dict(state=env.unwrapped.get_state(), rng=json.dumps(env.unwrapped.np_random.bit_generator.state),
                       counters=[float(env.get_wrapper_attr(name)) for name in COUNTERS])
                  for env in envs.envs if hasattr(env.unwrapped, "get_state")]
    return {"numpy": json.dumps(rng.bit_generator.state), "torch": torch.get_rng_state(), "simulators": simulators,
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [], "obs": torch.from_numpy(obs)}


def set_world(world: dict, envs: SyncVectorEnv, rng: np.random.Generator) -> np.ndarray:
    """Undo `get_world`; returns the observations to act on, which are of fresh episodes if no simulator could tell."""
    rng.bit_generator.state = json.loads(world["numpy"])
    torch.set_rng_state(world["torch"])
    if world["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(world["cuda"][:torch.cuda.device_count()])
    for env, simulator in zip(envs.envs, world["simulators"]):
        env.unwrapped.set_state(simulator["state"])
        env.unwrapped.np_random.bit_generator.state = json.loads(simulator["rng"])
        for name, value in zip(COUNTERS, simulator["counters"]):
            env.set_wrapper_attr(name, value)
    if world["simulators"]:
        return world["obs"].numpy()
    print("the simulator's state cannot be saved: the run goes on with fresh episodes")
    return envs.reset(seed=int(rng.integers(2**31)))[0]                # not those that the run began with


def write_whole(path: Path, write) -> None:
    """Call `write(temporary path)`, then rename: a killed run leaves the previous file or the new one, never half."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:                           # torch.save makes a full disk a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        tmp.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}, with {free:.1f} MB free there ({error}). What was saved before is intact: "
                      f"free some space, then --resume {path.parent}", status=1) from error


def load_checkpoint(folder: Path) -> dict:
    """The checkpoint of a run folder, on the CPU."""
    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Failure(f"{folder} has no checkpoint.pt: the run ended before its first one; start it again") from None
    except Exception as error:                                         # whatever a damaged file raises
        raise Failure(f"{folder / 'checkpoint.pt'} is damaged ({type(error).__name__}); bring back a copy of it, or "
                      "start the run again") from error


def print_table(names: list[str], evaluation: dict) -> None:
    """One row per task and one for all: mean return with its standard deviation over episodes, and success."""
    returns, successes = evaluation["returns"], evaluation["successes"]
    print(f"{'task':<24}{'return':>10}{'+-':>9}{'success':>9}   ({returns.shape[1]} episodes each)")
    for name, episodic_returns, success in zip([*names, "all"], [*returns, returns], [*successes, successes]):
        print(f"{name:<24}{episodic_returns.mean():>10.1f}{episodic_returns.std():>9.1f}{success.mean():>9.2f}")


def save_animation(path: Path, names: list[str], frames: list[list[np.ndarray]]) -> None:
    """All tasks side by side as an animated GIF, which any browser shows: one list of (H, W, 3) images per frame."""
    columns, (height, width, _) = math.ceil(math.sqrt(len(names))), frames[0][0].shape
    film = []
    for images in frames:
        film.append(Image.new("RGB", (columns * (width + 4), -(-len(names) // columns) * (height + 16)), "white"))
        for i, (name, image) in enumerate(zip(names, images)):
            x, y = i % columns * (width + 4), i // columns * (height + 16)
            ImageDraw.Draw(film[-1]).text((x + 2, y + 2), name, fill="black")
            film[-1].paste(Image.fromarray(image), (x, y + 14))
    write_whole(path, lambda tmp: film[0].save(tmp, "GIF", save_all=True, append_images=film[1:], duration=60, loop=0))
    print(f"wrote {path}")


def ray_cast(model: mujoco.MjModel, data: mujoco.MjData, target: tuple, distance: float, azimuth: float,
             elevation: float, size: int = 160) -> np.ndarray:
    """Picture (size, size, 3) of a MuJoCo scene by casting one ray per pixel: slow, but needs no screen and no OpenGL.

    Args:
        target: point in the middle of the picture [m]; the camera is `distance` away, at two angles [degrees].
    """
    a, e = math.radians(azimuth), math.radians(elevation)
    forward = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([math.sin(a), -math.cos(a), 0.0])
    span = 0.4 * np.linspace(-1, 1, size)                              # a field of view of 44 degrees
    rays = forward + span[None, :, None] * right - span[:, None, None] * np.cross(right, forward)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    eye, geom, depth = np.array(target) - distance * forward, np.empty(size**2, np.int32), np.empty(size**2)
    visible = np.array([1, 1, 1, 0, 0, 0], np.uint8)                   # groups of geoms, as MuJoCo's viewer has them
    mujoco.mj_multiRay(model, data, eye, rays.ravel(), visible, 1, -1, geom, depth, size**2, mujoco.mjMAXVAL)
    geom, points = geom.reshape(size, size), eye + rays * depth.reshape(size, size, 1)
    normal = np.cross(np.gradient(points, axis=1), np.gradient(points, axis=0))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-12
    light = 0.4 + 0.6 * np.abs(normal @ (0.3, -0.5, 0.8))[..., None]
    material = model.geom_matid[:, None]
    colour = np.where(material >= 0, model.mat_rgba[material[:, 0]] if model.nmat else 0.0, model.geom_rgba)[:, :3]
    return (255 * np.where(geom[..., None] >= 0, colour[geom] * light, 1.0).clip(0, 1)).astype(np.uint8)


def plot_curves(folder: Path, names: list[str]) -> None:
    """curves.png from metrics.csv: success and return over environment steps, the mean thick, each task thin."""
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, kind in zip(axes, ("success", "return")):
        for i, name in enumerate(names):
            axis.plot(table["global_step"], table[f"{name}/{kind}"], ("-", "--", ":")[i // 10 % 3], linewidth=0.8,
                      label=name)
        axis.plot(table["global_step"], table[f"mean_{kind}"], "k", linewidth=2.5, label="mean")
        axis.set(xlabel="environment steps, summed over tasks", ylabel=f"evaluated {kind}")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(folder / "curves.png", dpi=120)


class Run:
    """A run's folder and voice: args.json, metrics.csv, TensorBoard, checkpoint.pt, progress line, stop signals."""

    def __init__(self, args: Args, names: list[str], global_step: int = 0, seconds: float = 0.0):
        self.args, self.names, self.pending, self.stop_signal, self.saved_at = args, names, defaultdict(list), 0, None
        self.start_step, self.earlier_seconds, self.started = global_step, seconds, time.perf_counter()
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        script, about = Path(__file__), {"commands": []}
        if args.resume:
            self.dir, about = args.resume, json.loads((args.resume / "args.json").read_text())
        else:
            stem = f"{args.env}__{script.stem}__{args.method}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
            self.dir, number = args.runs_dir / stem, 1
            while self.dir.exists():                                   # by another run that began in the same second
                number += 1
                self.dir = args.runs_dir / f"{stem}-{number}"
            try:
                self.dir.mkdir(parents=True)
            except OSError as error:
                raise Failure(f"--runs-dir {args.runs_dir}: cannot make {self.dir} ({error.strerror})") from error
        self.metrics = self.dir / "metrics.csv"
        if args.resume:
            text = self.metrics.read_text() if self.metrics.exists() else ""
            rows = [row for row in text.splitlines(keepends=True) if row[-1] == "\n"]           # no torn last row
            keep = rows[:1] + [row for row in rows[1:] if int(row.split(",")[0]) <= global_step]
            write_whole(self.metrics, lambda tmp: tmp.write_text("".join(keep)))   # the rest is about to be repeated
        pinned = re.findall(r'"([\w-]+)[^"]*==', script.read_text().split("# ///")[1])
        self.settings = json.loads(json.dumps(asdict(args), default=str))              # paths become text
        about |= {"script": script.stem, "args": self.settings, "versions": {name: version(name) for name in pinned}}
        about["commands"].append(" ".join(sys.argv))
        write_whole(self.dir / "args.json", lambda tmp: tmp.write_text(json.dumps(about, indent=2) + "\n"))
        print(f"writing to {self.dir}", flush=True)
        self.writer = SummaryWriter(self.dir, purge_step=global_step + 1)
        self.bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True,
                        disable=not sys.stderr.isatty())

    def on_signal(self, number, frame) -> None:
        """First Ctrl-C or SIGTERM: finish this step, save, end. Second: end at once."""
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)

    def add(self, group: str, values: dict[str, float]) -> None:
        """Collect scalars for TensorBoard under group/key; `write` logs the mean of each."""
        for key, value in values.items():
            self.pending[f"{group}/{key}"].append(value)

    def write(self, global_step: int) -> None:
        """Send to TensorBoard what has come since the last call; move the progress line."""
        returns = [np.mean(self.pending[key]) for key in self.pending if key.endswith("/episodic_return")]
        self.add("charts", {"episodic_return": np.mean(returns)} if returns else {})
        self.add("charts", {"SPS": self.speed(global_step)})
        for key, values in self.pending.items():
            self.writer.add_scalar(key, np.mean(values), global_step)
        self.pending.clear()
        self.bar.update(global_step - self.bar.n)

    def speed(self, global_step: int) -> float:
        """Environment steps per second of this process."""
        return (global_step - self.start_step) / (time.perf_counter() - self.started)

    def seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def log_evaluation(self, global_step: int, evaluation: dict, extra: dict[str, float]) -> None:
        """A row of metrics.csv, the same to TensorBoard under eval/, and a line for the reader."""
        means = {"return": evaluation["returns"].mean(1), "success": evaluation["successes"].mean(1)}   # (T,) each
        row = {f"mean_{kind}": values.mean() for kind, values in means.items()}
        row |= {f"{name}/{kind}": values[i] for i, name in enumerate(self.names) for kind, values in means.items()}
        row |= extra
        with open(self.metrics, "a") as file:
            if file.tell() == 0:
                file.write(",".join(["global_step", "seconds", *row]) + "\n")
            values = ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values())
            file.write(f"{global_step},{self.seconds():.1f},{values}\n")
        self.add("eval", row)
        summary = f"return {row['mean_return']:.1f}  success {row['mean_success']:.2f}"
        self.bar.set_postfix_str(summary)
        if self.bar.disable:                                           # not a terminal
            total, speed = self.args.total_timesteps, self.speed(global_step)
            print(f"step {global_step:,}/{total:,}  {summary}  {speed:,.0f} steps/s  "
                  f"{(total - global_step) / speed / 60:.1f} min left", flush=True)

    def save(self, state: dict) -> None:
        """Write the checkpoint: whatever happens, `--resume` finds the previous one or this one."""
        state |= {"args": self.settings, "seconds": self.seconds()}
        write_whole(self.dir / "checkpoint.pt", partial(torch.save, state))
        self.saved_at = state["global_step"]

    def close(self) -> None:
        """Draw the curves, say where everything is; after a signal, end with the exit status that it stands for."""
        self.bar.close()
        self.writer.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.metrics.exists() and self.metrics.stat().st_size:
            plot_curves(self.dir, self.names)
        if self.stop_signal:
            print(f"stopped at step {self.saved_at:,}; go on with: python {sys.argv[0]} --resume {self.dir}")
            sys.exit(128 + self.stop_signal)
        print(f"run folder: {self.dir}")


MAY_CHANGE = {"total_timesteps", "device", "eval_every", "eval_episodes", "checkpoint_every", "capture_video",
              "runs_dir", "resume", "evaluate"}                        # between a run and its continuation


def read_args(settings: type, argv: list[str] | None = None):
    """Settings from the command line; with --resume or --evaluate those of that run, with the command line on top."""
    args = tyro.cli(settings, args=argv)
    folder, flag = args.resume or args.evaluate, "--resume" if args.resume else "--evaluate"
    if folder is None:
        return args
    if args.resume and args.evaluate:
        raise Failure("--resume goes on training and --evaluate does not: give one of them")
    try:
        about = json.loads((folder / "args.json").read_text())
        if about["script"] != Path(__file__).stem:
            raise Failure(f"{flag} {folder}: that run was made by {about['script']}.py; use that script")
        stored = {key: tuple(v) if isinstance(v, list) else v for key, v in about["args"].items()}     # JSON has lists
        if args.evaluate:
            stored["capture_video"] = False                            # a picture is drawn when it is asked for
        stored = settings(**stored | {"runs_dir": Path(stored["runs_dir"]), "resume": None, "evaluate": None})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"{flag} {folder}: no args.json there that this version can read ({error}); "
                      f"give a run folder, such as those below {args.runs_dir}/") from error
    args = tyro.cli(settings, args=argv, default=stored)
    for name, value in asdict(args).items():
        may_change = name in MAY_CHANGE or (args.evaluate and name.startswith("eval"))
        if not may_change and value != getattr(stored, name):
            raise Failure(f"{flag} {folder}: that run was made with --{name.replace('_', '-')} "
                          f"{getattr(stored, name)}, not {value}; leave the flag out, or start a new run")
    return args


def run_script(settings: type, main) -> None:
    """Read the settings, call `main`, and turn what the user can mend into one message."""
    try:
        main(read_args(settings))
    except Failure as failure:
        print(f"{Path(sys.argv[0]).name}: {failure}", file=sys.stderr)
        sys.exit(failure.status)
    except ModuleNotFoundError as error:                               # one that is imported where it is used
        print(f"{Path(sys.argv[0]).name}: these settings need the package {error.name}, which is not installed; the "
              "first lines of this file list all of them, and uv run installs them", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{Path(sys.argv[0]).name}: {error}; the last checkpoint is intact. Free some space, or make the run "
              "folder writable, then --resume it", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(Args, train)
