# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "mujoco==3.3.0", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0",
# ]
# ///
"""Multi-task A2C: one trunk, a head per task, and what fine-tuning forgets.

Arora, Kumar, Krone, Li: "Multi-task Learning for Continuous Control", 2017, arXiv:1802.01034. Six half-cheetahs with
smaller or larger body parts are tasks. Advantage actor-critic learns them one by one ("scratch"), all with one network
that shares its first layers ("vanilla"), or one after the other with most layers frozen ("finetune").

    R_t = r_t + gamma R_(t+1), bootstrapped             n_step_returns
    0.5 A^2 - A log pi(a|s) - 0.01 H(pi), Sec. 3        gaussian_log_prob, gaussian_entropy, a2c_losses
    shared trunk, heads                                 HeadMLP

Differences from the paper, each explained in docs/multitask_a2c.md:
1. The entropy bonus is the entropy; the authors' code adds the log-likelihood instead, which does nothing on average.
2. Time limits bootstrap from the last observation; the authors' code takes them for ends.
3. The log standard deviation is a free parameter per task, as in the code; --log-std network for the paper's text.
4. Each task has an observation filter of its own.
5. Cheetahs of Gymnasium's HalfCheetah-v5, stepped in batches by MuJoCo's own rollout.

    python multitask_a2c.py                               # six tasks, shared trunk: 1M steps per head
    python multitask_a2c.py --method scratch              # six networks: 3M steps each
    python multitask_a2c.py --method finetune --tasks SmallLeg --finetune-from RUN_FOLDER
"""
from __future__ import annotations

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
from dataclasses import asdict, dataclass
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
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from mujoco.rollout import Rollout
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
PARTS = {"Torso": ("torso",), "Head": ("head",), "Thigh": ("bthigh", "fthigh"), "Leg": ("bshin", "fshin"),
         "Foot": ("bfoot", "ffoot")}
FACTORS = {"Small": 0.75, "Big": 1.25}
VARIANTS = tuple(size + part for part in PARTS for size in FACTORS)
PAPER = ("SmallFoot", "BigFoot", "SmallLeg", "SmallThigh", "SmallTorso", "BigTorso")
STEPS_PER_TASK = {"vanilla": 1_000_000, "scratch": 3_000_000, "finetune": 1_000_000}
HORIZON, GOOD_RETURN, LOG_EVERY = 1_000, 1_000, 20_000        # steps; a success; environment steps between writes


@dataclass
class Args:
    env: Literal["cheetah"] = "cheetah"
    """half-cheetahs whose body parts are smaller or larger"""
    method: Literal["vanilla", "scratch", "finetune"] = "vanilla"
    """shared trunk with a head per task; a network per task; the last layers of a trained network, on another task"""
    tasks: tuple[str, ...] = PAPER
    """body-part variants, such as SmallFoot BigHead; one, for finetune"""
    seed: int = 1
    """seeds every generator: networks, environments, actions"""
    total_timesteps: int | None = None
    """environment steps, summed over tasks; None: 1M per task, or 3M with scratch, as in the paper's Table 2"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes cuda if present, else cpu"""
    eval_every: int = 600_000
    """environment steps between evaluations"""
    eval_episodes: int = 20
    """episodes per task and evaluation: mean action, filter frozen, separate environments, own generators"""
    checkpoint_every: int = 600_000
    """environment steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM"""
    runs_dir: Path = Path("runs")
    """where run folders go"""
    resume: Path | None = None
    """run folder to go on from, to the same or a larger --total-timesteps"""
    evaluate: Path | None = None
    """run folder to load and evaluate; trains nothing and writes nothing but pictures asked for"""
    capture_video: bool = False
    """after training or with --evaluate: one animated picture of all tasks side by side"""

    finetune_from: Path | None = None
    """run folder of --method scratch or vanilla that finetune starts from"""
    source_task: str | None = None
    """the task of that run whose network is taken; None: its first"""
    finetune_layers: Literal["code", "paper"] = "code"
    """what finetune trains: last hidden layer, means and log-std of the policy and the critic's output (authors' code),
    or the output layers alone (paper)"""
    share: Literal["paper", "first-layer"] = "paper"
    """what vanilla shares: both hidden layers of the policy and the critic's first, or the first of each (the code)"""
    log_std: Literal["parameter", "network"] = "parameter"
    """log standard deviation of actions: free numbers per task (authors' code), or an output of the policy (paper);
    finetune has that of its source"""
    norm_reward: bool = False
    """divide each task's rewards by the running deviation of its discounted return, clipped to +-10"""
    num_envs: int = 16
    """copies of each task's environment, stepped in parallel"""
    num_steps: int = 5
    """steps of a rollout, paper: t_max; each ends with an update"""
    hidden_size: int = 64
    """width of the two hidden layers of policy and critic; finetune has that of its source"""
    lr: float = 7e-4
    """RMSprop step size"""
    gamma: float = 0.99
    """discount factor"""
    timeout_is_terminal: bool = False
    """no bootstrapping at time limits, as in the authors' code"""
    value_coef: float = 0.5
    """weight of the squared advantage in the loss"""
    entropy_coef: float = 0.01
    """weight of the entropy bonus [reward per nat]"""
    max_grad_norm: float = 0.5
    """L2 norm to which the gradient of policy and critic together is clipped, for each update; 0 turns it off"""

    def __post_init__(self):
        for task in self.tasks:
            if task not in VARIANTS:
                raise ValueError(f"--tasks {task}: no such variant; there are {', '.join(VARIANTS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks takes one or more different variants, got {' '.join(self.tasks) or 'none'}")
        if self.method == "finetune" and (len(self.tasks) != 1 or self.finetune_from is None):
            raise ValueError("--method finetune needs one task to learn and a run to start from: "
                             "--tasks SmallLeg --finetune-from RUN_FOLDER")
        if self.method != "finetune" and (self.finetune_from or self.source_task):
            raise ValueError("--finetune-from and --source-task go with --method finetune")
        if self.finetune_from is not None:
            self.finetune_from = Path(self.finetune_from)              # args.json holds text
        if self.total_timesteps is None:
            self.total_timesteps = STEPS_PER_TASK[self.method] * len(self.tasks)
        for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "num_envs", "num_steps",
                     "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if HORIZON % self.num_steps:
            raise ValueError(f"--num-steps must divide the {HORIZON} steps of an episode, got {self.num_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        for name in ("value_coef", "entropy_coef", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:                # not a number neither
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("lr", "gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
@cache
def cheetah_model(variant: str) -> mujoco.MjModel:
    """Gymnasium's half-cheetah with every size of one kind of body part scaled; the total mass stays 14 kg.

    The numbers of a geom's `size` are scaled (radius, and half-length where it has one), nothing else: joints keep
    their places, and the compiler spreads 14 kg over the new volumes: a smaller foot makes all other parts heavier.
    """
    spec = mujoco.MjSpec.from_file(str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"))
    factor = next(factor for name, factor in FACTORS.items() if variant.startswith(name))
    for geom in PARTS[variant.removeprefix("Small").removeprefix("Big")]:
        spec.geom(geom).size = spec.geom(geom).size * factor
    return spec.compile()


class CheetahPool:
    """P copies of each of T cheetahs, stepped in batches: HalfCheetah-v5 but for the speed.

    Observation (17,): joint positions without x, and all velocities. Action (6,): torques, not clipped in the reward
    x speed - 0.1 |a|^2. Episodes have HORIZON steps and never terminate; all copies of a task are reset together.
    """

    def __init__(self, tasks: list[str], copies: int, seed: int):
        self.models, self.copies = [cheetah_model(task) for task in tasks], copies
        self.rollout, self.scratch = Rollout(nthread=0), [mujoco.MjData(self.models[0])]
        self.rng, self.nq = np.random.default_rng(seed), self.models[0].nq
        size = mujoco.mj_stateSize(self.models[0], mujoco.mjtState.mjSTATE_FULLPHYSICS)   # time, qpos, qvel
        self.state, self.steps = np.zeros((len(tasks), copies, size)), np.zeros(len(tasks), np.int64)
        self.returns = np.zeros((len(tasks), copies))         # undiscounted, of the episodes that are running
        for task in range(len(tasks)):
            self.reset(task)

    def reset(self, task: int) -> None:
        """New episodes for all copies of a task."""
        shape = self.copies, self.nq
        self.state[task, :, 0] = 0
        self.state[task, :, 1:1 + self.nq] = self.models[task].qpos0 + self.rng.uniform(-0.1, 0.1, shape)
        self.state[task, :, 1 + self.nq:] = 0.1 * self.rng.standard_normal(shape)
        self.steps[task], self.returns[task] = 0, 0

    def observe(self, tasks: list[int]) -> np.ndarray:
        """(K, P, 17) float32."""
        return self.state[tasks][..., 2:].astype(np.float32)

    def step(self, tasks: list[int], actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step all copies of K tasks; actions (K, P, 6).

        Returns:
            The observations that the actions led to, (K, P, 17), rewards, (K, P), and whether the episodes end there,
            (K,): `returns` holds what they earned, until `reset`.
        """
        before, batch = self.state[tasks], len(tasks) * self.copies
        control = np.repeat(actions.reshape(batch, 1, 6).astype(np.float64), 5, axis=1)          # frame skip 5
        models = [self.models[task] for task in tasks for _ in range(self.copies)]
        states, _ = self.rollout.rollout(models, self.scratch, before.reshape(batch, -1), control)
        after = states[:, -1].reshape(before.shape)
        rewards = (after[..., 1] - before[..., 1]) / 0.05 - 0.1 * np.square(actions).sum(-1)
        self.state[tasks] = after
        self.steps[tasks] += 1
        self.returns[tasks] += rewards
        obs, ended = self.observe(tasks), self.steps[tasks] >= HORIZON
        return obs, rewards.astype(np.float32), ended

    def get_state(self) -> dict:
        """All that the next step reads."""
        return dict(state=torch.from_numpy(self.state.copy()), steps=torch.from_numpy(self.steps.copy()),
                    returns=torch.from_numpy(self.returns.copy()), rng=json.dumps(self.rng.bit_generator.state))

    def set_state(self, saved: dict) -> None:
        """Undo `get_state`."""
        self.state, self.steps, self.returns = (saved[key].numpy().copy() for key in ("state", "steps", "returns"))
        self.rng.bit_generator.state = json.loads(saved["rng"])

    def render(self, task: int, copy: int = 0) -> np.ndarray:
        """The cheetah from the side, uint8 RGB."""
        model, data = self.models[task], self.scratch[0]
        mujoco.mj_setState(model, data, self.state[task, copy], mujoco.mjtState.mjSTATE_FULLPHYSICS)
        mujoco.mj_forward(model, data)
        return ray_cast(model, data, (data.qpos[0], 0.0, 0.6), 3.0, 90, -10)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
def unit_columns(matrix: Tensor) -> None:
    """Fill a matrix (in, out) with normal numbers, the weights of each output unit scaled to length 1."""
    with torch.no_grad():
        matrix.normal_()
        matrix /= matrix.norm(dim=0)


class HeadMLP(nn.Module):
    """tanh networks of T tasks; the layers in `shared` are one for all tasks, the others each task's own.

    A task's own layers are parameters by themselves, unlike a stack, so that an update of one task leaves the
    optimizer's memory of the others alone.
    """

    def __init__(self, num_tasks: int, sizes: list[int], shared: tuple[int, ...] = ()):
        super().__init__()
        self.layers = nn.ModuleList()
        for layer, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            copies = range(1 if layer in shared else num_tasks)
            weights = nn.ParameterList(torch.empty(n_in, n_out) for _ in copies)
            biases = nn.ParameterList(torch.zeros(n_out) for _ in copies)
            for weight in weights:
                unit_columns(weight)
            self.layers.append(nn.ModuleDict({"weights": weights, "biases": biases}))

    def own(self, layer: int, task: int) -> list[nn.Parameter]:
        """Weight and bias that a task uses in a layer, shared or not."""
        return [params[task if len(params) > 1 else 0] for params in self.layers[layer].values()]

    def forward(self, x: Tensor, tasks: list[int]) -> Tensor:
        """(K, B, in) -> (K, B, out): row k goes through the network of tasks[k]."""
        for layer in range(len(self.layers)):
            weight, bias = (torch.stack(params) for params in zip(*(self.own(layer, task) for task in tasks)))
            x = torch.baddbmm(bias[:, None], x, weight)
            if layer < len(self.layers) - 1:
                x = torch.tanh(x)
        return x


class Policy(nn.Module):
    """Gaussian policies over torques, which are not squashed."""

    def __init__(self, num_tasks: int, hidden: int, shared: tuple[int, ...], log_std: str):
        super().__init__()
        self.net = HeadMLP(num_tasks, [17, hidden, hidden, 6 if log_std == "parameter" else 12], shared)
        for weight in self.net.layers[-1]["weights"]:
            weight.data *= 0.01
        self.log_std = None
        if log_std == "parameter":
            self.log_std = nn.ParameterList(torch.zeros(6) for _ in range(num_tasks))

    def forward(self, obs: Tensor, tasks: list[int]) -> tuple[Tensor, Tensor]:
        """(K, B, 17) -> mean and log standard deviation, (K, B, 6) each."""
        if self.log_std is None:
            return self.net(obs, tasks).chunk(2, dim=-1)
        mean = self.net(obs, tasks)
        return mean, torch.stack([self.log_std[task] for task in tasks])[:, None].expand_as(mean)


class ObservationFilter(nn.Module):
    """Each task's observations relative to their running mean and deviation, clipped to +-5."""

    def __init__(self, num_tasks: int, size: int = 17):
        super().__init__()
        self.register_buffer("count", torch.full((num_tasks, 1), 1e-2, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(num_tasks, size, dtype=torch.float64))
        self.register_buffer("squares", torch.full((num_tasks, size), 1e-2, dtype=torch.float64))

    def _apply(self, fn, recurse=True):
        return self                                                    # statistics stay on the CPU: MPS has no float64

    def update(self, obs: Tensor, tasks: list[int]) -> None:
        """Count (K, N, 17) observations."""
        obs = obs.cpu().double()
        self.count[tasks] += obs.shape[1]
        self.total[tasks] += obs.sum(1)
        self.squares[tasks] += obs.square().sum(1)

    def forward(self, obs: Tensor, tasks: list[int]) -> Tensor:
        """(K, B, 17) -> the same, standardised."""
        mean = self.total[tasks] / self.count[tasks]
        variance = (self.squares[tasks] / self.count[tasks] - mean.square()).clamp(min=1e-2)
        mean, deviation = (x[:, None].float().to(obs.device) for x in (mean, variance.sqrt()))
        return ((obs - mean) / deviation).clamp(-5.0, 5.0)


class ActorCritic(nn.Module):
    """Policies and values of T tasks, behind their observation filters."""

    def __init__(self, num_tasks: int, hidden: int, log_std: str, shared: str | None):
        super().__init__()
        policy_shared, value_shared = {None: ((), ()), "paper": ((0, 1), (0,)), "first-layer": ((0,), (0,))}[shared]
        self.filter = ObservationFilter(num_tasks)
        self.policy = Policy(num_tasks, hidden, policy_shared, log_std)
        self.value = HeadMLP(num_tasks, [17, hidden, hidden, 1], value_shared)

    def parameters_of(self, task: int) -> list[nn.Parameter]:
        """All that a task uses, shared or not."""
        free = [] if self.policy.log_std is None else [self.policy.log_std[task]]
        return free + [param for net in (self.policy.net, self.value) for layer in range(len(net.layers))
                       for param in net.own(layer, task)]

    def forward(self, obs: Tensor, tasks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(K, B, 17) -> mean and log standard deviation, (K, B, 6), and value, (K, B)."""
        obs = self.filter(obs, tasks)
        return *self.policy(obs, tasks), self.value(obs, tasks).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of actions [nats], summed over their dimensions: (..., A) -> (...)."""
    noise = (actions - mean) / log_std.exp()
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy of diagonal Gaussians [nats]: (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def n_step_returns(rewards: Tensor, terminations: Tensor, truncations: Tensor, final_values: Tensor, last_value: Tensor,
                   gamma: float) -> Tensor:
    """Discounted returns of a rollout of S steps, bootstrapped where it or an episode is cut off.

    Args:
        rewards, terminations, truncations: of each step, (S, ...); the flags as numbers.
        final_values: value of the last observation of an episode that was truncated on that step, (S, ...).
        last_value: value of the observation after the rollout, (...).
    Returns:
        R_t = r_t + gamma R_(t+1), which becomes r_t + gamma V(last observation) at a truncation, r_t at a termination.
    """
    returns, following = torch.empty_like(rewards), last_value
    for t in reversed(range(len(rewards))):
        following = torch.where(truncations[t] > 0, final_values[t], following) * (1 - terminations[t])
        following = returns[t] = rewards[t] + gamma * following
    return returns


def a2c_losses(returns: Tensor, values: Tensor, log_prob: Tensor, entropy: Tensor, value_coef: float,
               entropy_coef: float) -> dict[str, Tensor]:
    """Terms of the loss for each task; all inputs (K, N), outputs (K,).

    The advantage is a constant for the policy: its gradient reaches the value through the value's own term only.
    """
    advantages = returns - values
    return {"value": value_coef * advantages.square().mean(1), "policy": -(advantages.detach() * log_prob).mean(1),
            "entropy": -entropy_coef * entropy.mean(1)}


class RewardScale:
    """Rewards of each task divided by the running deviation of its discounted return, clipped to +-10."""

    def __init__(self, num_tasks: int, copies: int, gamma: float):
        self.gamma, self.running = gamma, torch.zeros(num_tasks, copies, dtype=torch.float64)
        self.moments = torch.tensor([[1e-4, 0.0, 1e-4]], dtype=torch.float64).repeat(num_tasks, 1)

    def __call__(self, rewards: Tensor, truncations: Tensor, tasks: list[int]) -> Tensor:
        """(S, K, P) -> the same, scaled; the discounted returns start anew with each episode."""
        scaled = torch.empty_like(rewards)
        for t, (reward, ended) in enumerate(zip(rewards, truncations)):
            self.running[tasks] = self.running[tasks] * self.gamma + reward.cpu()
            values = self.running[tasks]                               # (K, P)
            self.moments[tasks] += torch.stack([torch.ones_like(values), values, values.square()]).sum(2).T
            count, total, squares = self.moments[tasks].T
            deviation = (squares / count - (total / count).square()).clamp(min=1e-8).sqrt()
            scaled[t] = (reward / deviation[:, None].to(reward)).clamp(-10.0, 10.0)
            self.running[tasks] *= 1 - ended.cpu()
        return scaled


def collect(pool: CheetahPool, nets: ActorCritic, tasks: list[int], num_steps: int, device: torch.device) -> tuple:
    """Act for `num_steps` steps in all copies of K tasks.

    Returns:
        obs (S, K, P, 17), actions (S, K, P, 6), rewards, truncations, final_values (S, K, P) and last_value (K, P), as
        `n_step_returns` takes them; and (task, returns of its copies) of the episodes that ended.
    """
    columns, finished = [], []
    for _ in range(num_steps):
        obs = torch.from_numpy(pool.observe(tasks)).to(device)         # (K, P, 17)
        with torch.no_grad():
            mean, log_std = nets.policy(nets.filter(obs, tasks), tasks)
            noise = torch.randn(mean.shape).to(device)                 # of the CPU's generator, whatever the device
            actions = mean + log_std.exp() * noise                     # neither squashed nor clipped
        led_to, rewards, ended = pool.step(tasks, actions.cpu().numpy())
        rewards = torch.from_numpy(rewards).to(device)
        truncations, final_values = torch.zeros_like(rewards), torch.zeros_like(rewards)
        if ended.any():
            with torch.no_grad():
                final_values = nets(torch.from_numpy(led_to).to(device), tasks)[2]
            for row in np.flatnonzero(ended):
                truncations[row] = 1
                finished.append((tasks[row], pool.returns[tasks[row]].copy()))
                pool.reset(tasks[row])
        columns.append((obs, actions, rewards, truncations, final_values))
    with torch.no_grad():
        last_value = nets(torch.from_numpy(pool.observe(tasks)).to(device), tasks)[2]
    return (*map(torch.stack, zip(*columns)), last_value), finished


def a2c_update(args: Args, nets: ActorCritic, optimizer: torch.optim.Optimizer, rollout: tuple, tasks: list[int],
               scale=None) -> dict[str, Tensor]:
    """One A2C step for K tasks on their rollouts, their rewards changed by `scale` if there is one.

    Returns:
        Terms of the loss and the mean deviation of actions, (K,) each.
    """
    obs, actions, rewards, truncations, final_values, last_value = rollout
    if scale is not None:
        rewards = scale(rewards, truncations, tasks)
    ends = truncations if args.timeout_is_terminal else torch.zeros_like(rewards)
    returns = n_step_returns(rewards, ends, truncations, final_values, last_value, args.gamma)
    obs, actions = (x.transpose(0, 1).flatten(1, 2) for x in (obs, actions))       # (K, S * P, ...)
    returns = returns.transpose(0, 1).flatten(1)                                   # (K, S * P)
    nets.filter.update(obs, tasks)                                     # once per update, before the loss
    mean, log_std, values = nets(obs, tasks)
    losses = a2c_losses(returns, values, gaussian_log_prob(actions, mean, log_std), gaussian_entropy(log_std),
                        args.value_coef, args.entropy_coef)
    optimizer.zero_grad()                                              # to None: RMSprop skips what a task does not use
    sum(losses.values()).sum().backward()
    if args.max_grad_norm:
        for task in tasks:
            nn.utils.clip_grad_norm_(nets.parameters_of(task), args.max_grad_norm)
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()} | {"sigma": log_std.detach().exp().mean((1, 2))}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def evaluate_cheetahs(policy, names: list[str], episodes: int, seed: int, frames: bool = False) -> dict:
    """Episodes with the mean action, all side by side, in environments of their own.

    Args:
        policy: observations (T, episodes, 17) -> actions (T, episodes, 6).
        frames: also render each task's first episode, every tenth step of the first 600.
    Returns:
        returns, successes and the share of steps spent on the back, (T, episodes) each; frames.
    """
    pool, film, tasks = CheetahPool(names, episodes, seed + 10_000), [], list(range(len(names)))
    upside_down = np.zeros((len(names), episodes))
    for t in range(HORIZON):
        if frames and t % 10 == 0 and t < 600:
            film.append([pool.render(task) for task in tasks])
        with torch.no_grad():
            actions = policy(torch.from_numpy(pool.observe(tasks))).cpu().numpy()
        pool.step(tasks, actions)
        upside_down += (np.cos(pool.state[..., 3]) < 0) / HORIZON      # time, x, height, pitch
    return {"returns": pool.returns, "successes": pool.returns >= GOOD_RETURN, "upside_down": upside_down,
            "frames": film}


def over_episodes(names: list[str], evaluation: dict) -> dict[str, float]:
    """Each task's median and standard deviation over the episodes of an evaluation, and its time upside down."""
    columns = {}
    for name, returns, upside_down in zip(names, evaluation["returns"], evaluation["upside_down"]):
        columns |= {f"{name}/median": float(np.median(returns)), f"{name}/std": float(returns.std()),
                    f"{name}/upside_down": float(upside_down.mean())}
    return columns


def print_gaits(names: list[str], evaluation: dict) -> None:
    """One line: which cheetahs run, and which slide on their backs."""
    shares = zip(names, evaluation["upside_down"].mean(1))
    print("share of steps upside down: " + "  ".join(f"{name} {share:.2f}" for name, share in shares))


TABLE_2 = {"paper, scratch 3M": dict(zip(PAPER, (1326.30, 37.80, 1420.77, 1444.21, 2116.10, 1312.50))),
           "paper, distillation 1M": dict(zip(PAPER, (1348.30, -63.07, 1413.55, 838.35, 2116.94, 1323.61))),
           "paper, vanilla 1M": dict(zip(PAPER, (1480.89, 2188.11, 1525.09, 1874.04, 2276.11, 1428.97)))}
TABLE_1 = {  # by source and target of fine-tuning
    ("SmallFoot", "SmallLeg"): {"paper, fine-tuned 1M": {"SmallFoot": 1530.26, "SmallLeg": 1532.70},
                                "paper, fine-tuned 5M": {"SmallFoot": 1500.76, "SmallLeg": 1568.66}},
    ("SmallLeg", "SmallFoot"): {"paper, fine-tuned 1M": {"SmallFoot": 1600.31, "SmallLeg": 1498.45},
                                "paper, fine-tuned 5M": {"SmallFoot": 1493.02, "SmallLeg": 1425.64}}}


def load_actor_critic(folder: Path) -> tuple[ActorCritic, list[str]]:
    """The networks of a run of multitask_a2c.py, with the names of their tasks."""
    try:
        about = json.loads((folder / "args.json").read_text())
        settings = about["args"]
        if about["script"] != "multitask_a2c":
            raise Failure(f"{folder} was made by {about['script']}.py; give a run folder of multitask_a2c.py, or the "
                          "folder teachers/ in one of distill_a2c.py")
    except (OSError, ValueError, KeyError) as error:
        raise Failure(f"{folder}: no args.json of multitask_a2c.py there ({error}); give its run folder") from error
    nets = ActorCritic(len(settings["tasks"]), settings["hidden_size"], settings["log_std"],
                       settings["share"] if settings["method"] == "vanilla" else None)
    nets.load_state_dict(load_checkpoint(folder)["learners"])
    return nets, settings["tasks"]


def take_task(args: Args) -> tuple[ActorCritic, str]:
    """A network of one task, cut out of the run that --finetune-from names, whose sizes `args` takes; and that task."""
    source, tasks = load_actor_critic(args.finetune_from)
    name = args.source_task or tasks[0]
    if name not in tasks:
        raise Failure(f"--source-task {name}: {args.finetune_from} has {', '.join(tasks)}")
    args.source_task = name
    task, args.hidden_size = tasks.index(name), source.value.own(0, 0)[0].shape[1]
    args.log_std = "network" if source.policy.log_std is None else "parameter"
    nets = ActorCritic(1, args.hidden_size, args.log_std, None)
    with torch.no_grad():
        for ours, theirs in zip(nets.parameters_of(0), source.parameters_of(task)):
            ours.copy_(theirs)
        for key in ("count", "total", "squares"):
            getattr(nets.filter, key)[0] = getattr(source.filter, key)[task]
    return nets, name


def freeze(nets: ActorCritic, layers: str) -> None:
    """Leave trainable what fine-tuning trains: the output layers, and with "code" the policy's second hidden layer."""
    nets.requires_grad_(False)
    trained = [nets.policy.net.layers[-1], nets.value.layers[-1]]
    trained += [nets.policy.net.layers[1]] * (layers == "code")
    trained += [nets.policy.log_std] * (nets.policy.log_std is not None)
    for module in trained:
        module.requires_grad_(True)


def train(args: Args) -> Path | None:
    """Roll out, update, task by task; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    device = pick_device(args.device)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    names, num_tasks = list(args.tasks), len(args.tasks)
    saved = args.resume or args.evaluate
    if args.method == "finetune":                                      # a run that goes on does not need its source
        nets, source = ((ActorCritic(1, args.hidden_size, args.log_std, None), load_checkpoint(saved)["source"])
                        if saved else take_task(args))
        freeze(nets, args.finetune_layers)
        names += [source] * (source not in names)                      # evaluated too: what is forgotten of it
    else:
        nets = ActorCritic(num_tasks, args.hidden_size, args.log_std, args.share if args.method == "vanilla" else None)
    nets.to(device)
    trained = [param for param in nets.parameters() if param.requires_grad]
    optimizer = torch.optim.RMSprop(trained, lr=args.lr, alpha=0.99, eps=1e-5)
    heads = [min(task, num_tasks - 1) for task in range(len(names))]   # the source task is played by the one head, too

    def policy(obs: Tensor) -> Tensor:
        return nets(obs.to(device), heads)[0]

    if args.evaluate:
        nets.load_state_dict(load_checkpoint(args.evaluate)["learners"])
        evaluation = evaluate_cheetahs(policy, names, args.eval_episodes, args.seed, frames=args.capture_video)
        print_table(names, evaluation)
        print_gaits(names, evaluation)
        if args.capture_video:
            save_animation(args.evaluate / "tasks.gif", names, evaluation["frames"])
        return args.evaluate

    state = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "seconds": 0.0}
    global_step = state["global_step"]
    per_update = args.num_envs * args.num_steps                        # environment steps of a task
    if global_step - num_tasks * per_update >= args.total_timesteps:   # the last round may overshoot
        raise Failure(f"--resume {args.resume}: that run has {global_step:,} steps already; "
                      f"give a larger --total-timesteps than {args.total_timesteps:,}")
    pool = CheetahPool(names[:num_tasks], args.num_envs, args.seed)
    scale = RewardScale(num_tasks, args.num_envs, args.gamma) if args.norm_reward else None
    if args.resume:
        nets.load_state_dict(state["learners"])
        optimizer.load_state_dict(state["optimizer"])
        pool.set_state(state["pool"])
        torch.set_rng_state(state["torch"])
        if scale is not None:
            scale.running, scale.moments = state["scale"]
    run = Run(args, names, global_step, state["seconds"])
    before = state.get("before", {})                                   # returns at the start of fine-tuning
    if args.method == "finetune" and not args.resume:
        evaluation = evaluate_cheetahs(policy, names, args.eval_episodes, args.seed)
        before = {f"{name}/before": float(returns.mean()) for name, returns in zip(names, evaluation["returns"])}
        print(f"before fine-tuning, trained on {source}:")
        print_table(names, evaluation)
    losses = {task: defaultdict(list) for task in range(num_tasks)}

    def save() -> None:
        """Everything that the next step reads."""
        check_finite(global_step, dict(nets.named_parameters()))       # keeps the last good one
        run.save(dict(global_step=global_step, learners=nets.state_dict(), optimizer=optimizer.state_dict(),
                      pool=pool.get_state(), torch=torch.get_rng_state(), source=names[-1], before=before,
                      scale=None if scale is None else (scale.running.clone(), scale.moments.clone())))

    if not args.resume:
        save()                                                         # from here on a killed run can be resumed

    # A shared trunk is updated by one task after the other; networks that share nothing learn side by side
    groups = [[task] for task in range(num_tasks)] if args.method == "vanilla" else [list(range(num_tasks))]
    while global_step < args.total_timesteps and not run.stop_signal:
        previous_step = global_step
        for tasks in groups:
            # Roll out, log what ended -----------------------------------------------------------------------
            rollout, finished = collect(pool, nets, tasks, args.num_steps, device)
            global_step += len(tasks) * per_update
            for task, returns in finished:
                run.add(f"tasks/{names[task]}", {"episodic_return": returns.mean(), "episodic_length": HORIZON,
                                                 "success": (returns >= GOOD_RETURN).mean()})

            # Update: the heads of these tasks, and what they share --------------------------------------------
            for name, loss in a2c_update(args, nets, optimizer, rollout, tasks, scale).items():
                for task, value in zip(tasks, loss):
                    losses[task][name].append(value)

        # Log, evaluate, save --------------------------------------------------------------------------------
        evaluate_now = crossed(previous_step, global_step, args.eval_every) or global_step >= args.total_timesteps
        if crossed(previous_step, global_step, LOG_EVERY) or evaluate_now:
            log_terms(run, names, losses, nets, global_step)
        if evaluate_now:
            evaluation = evaluate_cheetahs(policy, names, args.eval_episodes, args.seed)
            run.log_evaluation(global_step, evaluation, over_episodes(names, evaluation) | before)
        if crossed(previous_step, global_step, LOG_EVERY) or evaluate_now:
            run.write(global_step)
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        evaluation = evaluate_cheetahs(policy, names, args.eval_episodes, args.seed, frames=args.capture_video)
        beside = TABLE_2
        if args.method == "finetune":
            beside = TABLE_1.get((names[-1], names[0]), {}) | {
                "before fine-tuning": {key.removesuffix("/before"): value for key, value in before.items()}}
        plot_tasks(run.dir / "tasks.png", names, evaluation["returns"], beside)
        if args.capture_video:
            save_animation(run.dir / "tasks.gif", names, evaluation["frames"])
        print_table(names, evaluation)
        print_gaits(names, evaluation)
    run.close()
    return run.dir


def log_terms(run: Run, names: list[str], losses: dict, nets: nn.Module, global_step: int) -> None:
    """Means since the last call to TensorBoard; stop if one of them, or a parameter, is not finite."""
    means = {f"{names[task]}/{name}": torch.stack(values).mean().cpu() for task, terms in losses.items()
             for name, values in terms.items()}
    for terms in losses.values():
        terms.clear()
    check_finite(global_step, means | dict(nets.named_parameters()))
    run.add("losses", {key: value.item() for key, value in means.items()})
    for name in {key.split("/")[1] for key in means}:
        run.add("losses", {name: np.mean([value.item() for key, value in means.items() if key.endswith("/" + name)])})


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
def plot_tasks(path: Path, names: list[str], returns: np.ndarray, published: dict[str, dict[str, float]]) -> None:
    """Each evaluation episode as a dot, (T, episodes), beside the paper's means over 20 episodes."""
    figure = Figure(figsize=(2 + 1.2 * len(names), 4), layout="constrained")
    axis = figure.subplots()
    for i, values in enumerate(returns):
        axis.plot(np.full(len(values), i), values, ".", color="black", alpha=0.4, label="episodes" if i == 0 else None)
        axis.plot([i - 0.2, i + 0.2], [np.median(values)] * 2, color="black", label="median" if i == 0 else None)
    for colour, (label, values) in enumerate(published.items()):
        known = [i for i, name in enumerate(names) if name in values]
        axis.plot([i + 0.15 for i in known], [values[names[i]] for i in known], "D", color=f"C{colour}",
                  label=label)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="return", xlim=(-0.5, len(names) - 0.5))
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


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
