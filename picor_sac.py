# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "mujoco==3.3.0", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0", "metaworld==3.1.1",
# ]
# ///
"""Policy correction (PiCor): improve one task, then correct the policy so that the others lose nothing.

Bai, Zhang, Tao, Wu, Wang, Xu: "PiCor: Multi-Task Deep Reinforcement Learning with Policy Correction", AAAI 2023. One
policy serves all tasks, which are trained one at a time, in blocks of K steps. An update is plain SAC on the active
task. Then the weighted advantage of the new policy over the old one is estimated on states of all tasks; where it is
negative, a few steps raise it, close to what SAC has just found. Tasks that are still unsettled weigh more.

    w = softmax(alpha / tau), Eq. 9                      task_weights
    A(s, pi) of the new policy over the old              soft_advantage
    max(0, c (1 - gamma) - sum_z w_z A_z), Eq. 10        hinge
    D_KL(pi || pi') + lambda / 2 hinge^2, Eq. 10         correction_loss, correct
    phase 1, SAC on the active task, Eq. 6 and 7         critic_phase, policy_phase, temperature_phase

Differences from the paper, each explained in docs/picor_sac.md:
1. What the paper leaves open is decided as follows: soft advantages on both sides with common random numbers, in units
   of the spread of Q; the KL before the tanh; an optimizer of its own and up to five steps for the correction.
2. The critic learns from all tasks at every update (--critic-batch active for the paper's text): with the active task
   alone it forgets the others, and the correction trusts it.
3. Meta-World v3 with reward v2; HalfCheetah-v5.

    python picor_sac.py                                   # four goals for a point mass: minutes
    python picor_sac.py --no-correction                   # the same blocks without
    python picor_sac.py --env halfcheetah --total-timesteps 200_000
    python picor_sac.py --env mt10 --total-timesteps 5_000_000
"""
from __future__ import annotations

import copy
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
GOALS = {"north-east": (1.0, 1.0), "south-west": (-1.0, -1.0), "south-east": (1.0, -1.0), "north-west": (-1.0, 1.0)}
PARTS = {"Torso": ("torso",), "Head": ("head",), "Thigh": ("bthigh", "fthigh"), "Leg": ("bshin", "fshin"),
         "Foot": ("bfoot", "ffoot")}
FACTORS = {"Small": 0.75, "Big": 1.25}
FAMILIES = {
    "goals": tuple(GOALS),
    "halfcheetah": tuple(size + part for part in ("Foot", "Leg", "Thigh", "Torso") for size in FACTORS),
    "mt4": ("reach", "drawer-close", "button-press-topdown", "window-close"),
    "mt10": ("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
             "peg-insert-side", "window-open", "window-close"),
}
PRESETS = {  # a setting left at None takes its value from here
    "goals": dict(horizon=50, block_steps=500, hidden_sizes=(64, 64), batch_size=64, learning_starts=500, lr=1e-3,
                  total_timesteps=12_000, eval_every=1_000, checkpoint_every=2_000, eval_episodes=10),
    "halfcheetah": dict(horizon=1_000, block_steps=1_000, hidden_sizes=(256, 256), batch_size=256, lr=3e-4,
                        learning_starts=2_000, total_timesteps=200_000, eval_every=20_000, checkpoint_every=20_000,
                        eval_episodes=5),
    "mt4": dict(horizon=200, block_steps=200, hidden_sizes=(256, 256), batch_size=256, learning_starts=1_000, lr=3e-4,
                total_timesteps=200_000, eval_every=20_000, checkpoint_every=20_000, eval_episodes=1),
    "mt10": dict(horizon=500, block_steps=500, hidden_sizes=(512, 512), batch_size=256, learning_starts=5_000, lr=3e-4,
                 total_timesteps=5_000_000, eval_every=100_000, checkpoint_every=100_000, eval_episodes=1),
}
LOG_EVERY = 1_000                                             # environment steps between writes to TensorBoard


@dataclass
class Args:
    env: Literal["goals", "halfcheetah", "mt4", "mt10"] = "goals"
    """four goals for a point mass; eight half-cheetahs with other body parts; four or ten tasks of Meta-World"""
    method: Literal["picor", "mtsac", "mtmhsac", "independent"] = "picor"
    """policy correction; SAC on all tasks, told the task by a one-hot; the same with a head per task; a SAC per task"""
    tasks: tuple[str, ...] | None = None
    """a subset of the family's tasks; None takes all of them"""
    seed: int = 1
    """seeds every generator: networks, environments, replay, exploration, blocks"""
    total_timesteps: int | None = None
    """environment steps, summed over tasks; None: the preset of --env"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes cuda if present, else cpu"""
    eval_every: int | None = None
    """environment steps between evaluations; None: the preset of --env"""
    eval_episodes: int | None = None
    """episodes per task and evaluation: deterministic policy, separate environments, own generators"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM"""
    runs_dir: Path = Path("runs")
    """where run folders go"""
    resume: Path | None = None
    """run folder to go on from, to the same or a larger --total-timesteps"""
    evaluate: Path | None = None
    """run folder to load and evaluate; trains nothing and writes nothing but pictures asked for"""
    capture_video: bool = False
    """after training or with --evaluate: one animated picture of all tasks side by side"""

    correction: bool = True
    """phase 2 of picor, the paper's "Cor"; --no-correction leaves SAC in blocks of one task"""
    adaptive_weights: bool = True
    """weights from the temperatures, the paper's "Ada"; --no-adaptive-weights makes them 1 / N. Without correction they
    scale the loss of the active task's policy"""
    block_steps: int | None = None
    """environment steps of a task before the next one's turn, paper: K; None: the preset of --env"""
    task_order: Literal["random", "cycle"] = "random"
    """how the task of a block is drawn"""
    critic_batch: Literal["all", "active"] = "all"
    """tasks that picor's critic learns from at each update"""
    critic_heads: bool = False
    """an output of the critics per task; with --critic-batch all"""
    mtsac_batch: Literal["mixed", "active"] = "mixed"
    """mtsac: batches of all tasks, or of the active one, which the paper's ablation means"""
    correction_steps: int = 5
    """most steps of a correction; it ends as soon as the hinge is 0"""
    correction_states: int = 32
    """states per task on which advantages are estimated"""
    recent: int = 0
    """draw these states from the task's last so many transitions; 0 draws from all"""
    c: float = -0.1
    """how much discounted return may be lost per update [spread of Q, or reward with --no-adv-norm], paper: c < 0"""
    penalty: float = 10.0
    """weight of half the squared hinge, paper: lambda"""
    weight_tau: float = 0.1
    """temperature of the weights' softmax [entropy temperatures], paper: tau"""
    weight_warmup: int = 500
    """updates that every task must have had before the weights leave 1 / N"""
    adv_norm: bool = True
    """measure each task's advantage in standard deviations of Q over actions, so that c suits all tasks"""
    hard_advantage: bool = False
    """leave the entropy out of the advantage; the hinge then fights what SAC has just improved"""
    alpha_init: float = 0.2
    """entropy temperature at the start [reward per nat]"""
    alpha_all: bool = False
    """move the temperatures of all tasks at each update, on the states of phase 2, not only the active task's"""
    horizon: int | None = None
    """steps after which an episode is cut off; None: the preset of --env"""
    num_goals: int = 1
    """Meta-World: goals per task, 1 to 50; the paper has one, drawn by the seed; with more, raise --eval-episodes"""
    learning_starts: int | None = None
    """random actions per task before the first update; None: the preset of --env"""
    batch_size: int | None = None
    """transitions per update; None: the preset of --env"""
    buffer_size: int = 1_000_000
    """replay capacity per task, transitions"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers; None: the preset of --env"""
    lr: float | None = None
    """Adam step size of all networks and temperatures; None: the preset of --env"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak coefficient: the share of the online critics that enters the targets at each update"""

    def __post_init__(self):
        for name, preset in PRESETS[self.env].items():
            if getattr(self, name) is None:
                setattr(self, name, preset)
        family = FAMILIES[self.env]
        if self.tasks is None:
            self.tasks = family
        for task in self.tasks:
            if task not in family:
                raise ValueError(f"--tasks {task}: --env {self.env} has {', '.join(family)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks takes one or more different tasks, got {' '.join(self.tasks) or 'none'}")
        for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "block_steps", "horizon",
                     "learning_starts", "batch_size", "correction_steps", "correction_states", "buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        for name in ("recent", "penalty", "weight_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "gamma", "tau", "weight_tau", "alpha_init"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {getattr(self, name)}")
        if not self.c <= 0:
            raise ValueError(f"--c must be at most 0, as it says how much may be lost, got {self.c}")
        batches = {"picor": self.critic_batch, "mtsac": self.mtsac_batch, "independent": "active"}.get(self.method)
        if self.alpha_all and not (self.method == "picor" and self.correction):
            raise ValueError("--alpha-all moves temperatures on the states of phase 2, which only --method picor has, "
                             "and not with --no-correction; leave it out")
        if self.critic_heads and batches == "active":
            raise ValueError(f"--critic-heads needs batches of all tasks, or heads would move while it is not their "
                             f"turn, and --method {self.method} has batches of one here; use --method picor with "
                             "--critic-batch all, or mtsac with --mtsac-batch mixed")
        if self.env.startswith("mt") and self.horizon > 500:
            raise ValueError(f"--horizon must be from 1 to 500, where Meta-World ends an episode, got {self.horizon}")
        if not 1 <= self.num_goals <= 50:
            raise ValueError(f"--num-goals must be from 1 to 50, got {self.num_goals}")
        if self.batch_size < len(self.tasks):
            raise ValueError(f"--batch-size {self.batch_size} holds less than one transition per task; "
                             f"use at least {len(self.tasks)}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes takes one or more widths of at least 1, got {self.hidden_sizes}")


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


class SavableEnv(gym.Env):
    """A MuJoCo simulator that can say all that its next step reads."""
    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    progress = ()                                         # names of own counters that change during an episode

    def get_state(self) -> list[float]:
        """Simulator, warm start of its solver included, followed by the counters."""
        state = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return [*state.tolist(), *(float(getattr(self, name)) for name in self.progress)]

    def set_state(self, state: list[float]) -> None:
        """Undo `get_state`."""
        simulator = np.array(state[:len(state) - len(self.progress)])
        mujoco.mj_setState(self.model, self.data, simulator, mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, value in zip(self.progress, state[len(simulator):]):
            setattr(self, name, int(value))


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


class GoalEnv(gym.Env):
    """Push a point to a goal at a corner: what one task wants is wrong for the three others.

    Observation (2 + T,): position, and the task, one-hot. Action (2,): displacement / 0.1, clipped to +-1. Reward
    -distance, and 1 more within 0.15 of the goal, which is a success once it lasts to the end of the episode.
    """
    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, goal: tuple[float, float], one_hot: np.ndarray):
        self.goal, self.one_hot, self.position = np.array(goal), one_hot, np.zeros(2)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2 + len(one_hot),), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.2, 0.2, 2)
        return self._obs(), {"success": False}

    def step(self, action):
        self.position = self.position + 0.1 * np.clip(action, -1.0, 1.0)
        distance = float(np.linalg.norm(self.position - self.goal))
        return self._obs(), -distance + (distance < 0.15), False, False, {"success": distance < 0.15}

    def _obs(self) -> np.ndarray:
        return np.concatenate([self.position, self.one_hot]).astype(np.float32)

    def get_state(self) -> list[float]:
        """All that the next step reads."""
        return self.position.tolist()

    def set_state(self, state: list[float]) -> None:
        """Undo `get_state`."""
        self.position = np.array(state)

    def render(self, size: int = 120) -> np.ndarray:
        """The goal in green and the point in red, 3 m wide: uint8 RGB."""
        picture = Image.new("RGB", (size, size), "white")
        for (x, y), radius, colour in ((self.goal, 0.15, (110, 190, 120)), (self.position, 0.06, (200, 50, 50))):
            centre, r = (size / 2 + size / 3 * x, size / 2 - size / 3 * y), size / 3 * radius
            ImageDraw.Draw(picture).ellipse([centre[0] - r, centre[1] - r, centre[0] + r, centre[1] + r], fill=colour)
        return np.asarray(picture)


class CheetahEnv(SavableEnv):
    """HalfCheetah-v5 with one kind of body part smaller or larger.

    Observation (17 + T,): joint positions without x, all velocities, and the task, one-hot. Action (6,): torques.
    Reward x speed - 0.1 |a|^2; never terminates. Success: faster than 3 m/s on that step.
    """

    def __init__(self, variant: str, one_hot: np.ndarray):
        self.model, self.one_hot = cheetah_model(variant), one_hot
        self.data = mujoco.MjData(self.model)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (17 + len(one_hot),), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] += self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(self.model.nv)
        mujoco.mj_forward(self.model, self.data)
        return self._obs(), {"success": False}

    def step(self, action):
        before, self.data.ctrl[:] = self.data.qpos[0], action
        mujoco.mj_step(self.model, self.data, nstep=5)
        speed = (self.data.qpos[0] - before) / 0.05
        reward = float(speed - 0.1 * np.square(action).sum())
        return self._obs(), reward, False, False, {"success": bool(speed > 3)}

    def _obs(self) -> np.ndarray:
        return np.concatenate([self.data.qpos[1:], self.data.qvel, self.one_hot]).astype(np.float32)

    def render(self) -> np.ndarray:
        return ray_cast(self.model, self.data, (self.data.qpos[0], 0.0, 0.6), 3.0, 90, -10)


def make_env(args: Args, task: int) -> gym.Env:
    """Task `task` of the list, with its time limit as truncation and with the statistics of its episodes."""
    name, one_hot = args.tasks[task], np.eye(len(args.tasks))[task]
    if args.env == "goals":
        env = GoalEnv(GOALS[name], one_hot)
    elif args.env == "halfcheetah":
        env = CheetahEnv(name, one_hot)
    else:
        env = MetaWorldEnv(name, one_hot, args.seed, args.num_goals, "v2")
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


class BoundedActor(Actor):
    """The policy with log standard deviations in [-5, 2]: tinier ones would make the KL of the correction explode."""

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(T, B, O) -> mean and log standard deviation, (T, B, A) each."""
        mean, raw = self.net(obs).chunk(2, dim=-1)
        return mean, -5.0 + 3.5 * (torch.tanh(raw) + 1.0)


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
class TaskReplay:
    """All transitions of each task, as many as it has had; a row is obs, action, reward, next_obs, termination."""

    def __init__(self, num_tasks: int, capacity: int, obs_size: int, action_size: int, device: torch.device):
        self.widths = [obs_size, action_size, 1, obs_size, 1]
        self.data = torch.zeros(num_tasks, capacity, sum(self.widths), device=device)
        self.num_added = np.zeros(num_tasks, np.int64)

    def add(self, task: int, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Append a transition of one task. Truncation is no termination."""
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.data[task, self.num_added[task] % self.data.shape[1]] = torch.from_numpy(row).to(self.data.device)
        self.num_added[task] += 1

    def sample(self, rng: np.random.Generator, tasks: list[int], batch_size: int, recent: int = 0) -> list[Tensor]:
        """Draw for each of K tasks its own: obs (K, B, O), actions, rewards (K, B), next_obs, terminations.

        Args:
            recent: draw from the last so many transitions of each task; 0 draws from all.
        """
        size = np.minimum(self.num_added[tasks], self.data.shape[1])
        window = np.minimum(size, recent) if recent else size
        ages = np.stack([rng.integers(1, w + 1, batch_size) for w in window])          # 1: the newest
        index = torch.from_numpy((self.num_added[tasks][:, None] - ages) % self.data.shape[1]).to(self.data.device)
        rows = self.data[torch.tensor(tasks, device=self.data.device)[:, None], index]
        obs, actions, rewards, next_obs, terminations = rows.split(self.widths, dim=-1)
        return [obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
def task_weights(alpha: Tensor, tau: float) -> Tensor:
    """Eq. 9, softmax(alpha / tau) over tasks, (T,) -> (T,): a larger temperature is a less settled task."""
    return torch.softmax(alpha / tau, dim=0)


def hinge(advantages: Tensor, weights: Tensor, c: float, gamma: float) -> Tensor:
    """Eq. 10, by how much the weighted advantage, both (T,), falls short of c (1 - gamma) <= 0; at least 0."""
    return (c * (1 - gamma) - (weights * advantages).sum()).clamp(min=0.0)


def correction_loss(kl: Tensor, shortfall: Tensor, penalty: float) -> Tensor:
    """Eq. 10, D_KL(pi || pi') + lambda / 2 hinge^2."""
    return kl + 0.5 * penalty * shortfall.square()


def gaussian_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians, by dimension [nats]; squashing both by the same tanh would not change it."""
    log_ratio = 2 * (log_std_p - log_std_q)
    return 0.5 * (log_ratio.exp() + ((mean_p - mean_q) / log_std_q.exp()).square() - 1 - log_ratio)


def soft_value(qf1, qf2, obs: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """min Q - alpha log pi of the actions that a policy takes with given noise; alpha (T, 1), result (T, n)."""
    actions, log_prob = squash(mean, log_std, noise)
    return torch.min(qf1(obs, actions), qf2(obs, actions)) - alpha * log_prob


def soft_advantage(new_value: Tensor, old_value: Tensor, spread: Tensor) -> Tensor:
    """A of the new policy over the old, mean over states, in units of `spread`: (T, n), (T, n), (T,) -> (T,).

    Both values are `soft_value` with the same noise, so that equal policies have an advantage of exactly 0.
    """
    return (new_value - old_value).mean(1) / spread


def q_spread(qf1, qf2, obs: Tensor, mean: Tensor, log_std: Tensor, draws: int = 4) -> Tensor:
    """Standard deviation of min Q over actions of the policy, mean over states: (T, n, O) -> (T,)."""
    values = []
    for _ in range(draws):
        actions, _ = squash(mean, log_std, torch.randn_like(mean))
        values.append(torch.min(qf1(obs, actions), qf2(obs, actions)))
    return torch.stack(values).std(0).mean(1).clamp(min=1e-6)


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


def call_with(net: nn.Module, params: dict[str, Tensor], *inputs: Tensor):
    """The network's output with other parameters than its own."""
    return torch.func.functional_call(net, params, inputs)


def of_tasks(net: nn.Module, tasks: list[int]):
    """The network as K of its tasks use it, to be called with a first axis of K."""
    return partial(call_with, net, {name: param if len(param) == 1 else param[tasks]
                                    for name, param in net.named_parameters()})


def critic_phase(learners: MultiTaskSAC, optimizer: torch.optim.Optimizer, batch: list[Tensor], alpha: Tensor,
                 gamma: float) -> Tensor:
    """Eq. 6, a step of both critics on batches of K tasks with temperatures (K, 1); the loss, (K,)."""
    obs, actions, rewards, next_obs, terminations = batch
    with torch.no_grad():
        mean, log_std = learners.actor(next_obs)
        next_actions, next_log_prob = squash(mean, log_std, torch.randn_like(mean))
        next_q = torch.min(learners.qf1_target(next_obs, next_actions), learners.qf2_target(next_obs, next_actions))
        target = soft_target(rewards, terminations, next_q, next_log_prob, alpha, gamma)
    loss = critic_loss(learners.qf1(obs, actions), learners.qf2(obs, actions), target)
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
    return loss.detach()


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


def policy_phase(learners: MultiTaskSAC, optimizer: torch.optim.Optimizer, obs: Tensor, tasks: list[int],
                 scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Eq. 7, a step of the policy on states of K tasks, (K, B, O).

    Args:
        scale: multiplies the loss.
    Returns:
        The loss, (K,), and the log-probabilities of the actions it was taken with, (K, B).
    """
    mean, log_std = learners.actor(obs)
    actions, log_prob = squash(mean, log_std, torch.randn_like(mean))
    with frozen(learners.qf1, learners.qf2):
        q = torch.min(of_tasks(learners.qf1, tasks)(obs, actions), of_tasks(learners.qf2, tasks)(obs, actions))
    loss = actor_loss(q, log_prob, learners.log_alpha.detach().exp()[tasks][:, None])
    optimizer.zero_grad()
    (scale * loss).mean().backward()
    optimizer.step()
    return loss.detach(), log_prob.detach()


def temperature_phase(learners: MultiTaskSAC, optimizers: dict, log_prob: Tensor, tasks: list[int]) -> None:
    """A step of the temperatures of K tasks towards the target entropy; log_prob (K, B), without a gradient."""
    optimizer = optimizers["alpha" if len(tasks) > 1 else f"alpha{tasks[0]}"]
    optimizer.zero_grad()
    temperature_loss(learners.log_alpha[tasks], log_prob, learners.target_entropy).sum().backward()
    optimizer.step()


def correct(args: Args, learners: MultiTaskSAC, optimizer: torch.optim.Optimizer, obs: Tensor,
            old: tuple[Tensor, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Phase 2: move the policy until no more than c is lost, close to where phase 1 left it.

    Args:
        obs: states of all tasks, (T, n, O).
        old: mean and log standard deviation in them of the policy before phase 1, (T, n, A) each.
        weights: (T,).
    Returns:
        advantage of each task and hinge at the start; steps, and KL from where phase 1 left the policy, at the end.
        Gradients reach the policy only.
    """
    alpha = torch.zeros_like(learners.log_alpha) if args.hard_advantage else learners.log_alpha.detach().exp()
    alpha, noise = alpha[:, None], torch.randn_like(old[0])            # common random numbers
    critics = learners.qf1, learners.qf2
    with torch.no_grad():
        old_value = soft_value(*critics, obs, *old, noise, alpha)
        spread = q_spread(*critics, obs, *old) if args.adv_norm else torch.ones(len(obs), device=obs.device)
        anchor = learners.actor(obs)                                   # pi', where phase 1 left the policy
        advantages = soft_advantage(soft_value(*critics, obs, *anchor, noise, alpha), old_value, spread)
        first = hinge(advantages, weights, args.c, args.gamma)
    steps, shortfall = 0, first
    while shortfall > 0 and steps < args.correction_steps:             # at pi' itself the KL and its gradient are 0
        mean, log_std = learners.actor(obs)
        kl = gaussian_kl(mean, log_std, *anchor).sum(-1).mean()
        with frozen(*critics):
            value = soft_value(*critics, obs, mean, log_std, noise, alpha)
        shortfall = hinge(soft_advantage(value, old_value, spread), weights, args.c, args.gamma)
        if not shortfall > 0:                                          # reached: not one step more
            break
        optimizer.zero_grad()
        correction_loss(kl, shortfall, args.penalty).backward()
        optimizer.step()
        steps += 1
    with torch.no_grad():
        kl = gaussian_kl(*learners.actor(obs), *anchor).sum(-1).mean() if steps else torch.zeros(())
    return {"advantage": advantages, "hinge": first, "kl": kl, "steps": torch.tensor(float(steps))}


def move_targets(learners: MultiTaskSAC, tau: float) -> None:
    """Polyak averaging of both critics."""
    with torch.no_grad():
        for online, targets in ((learners.qf1, learners.qf1_target), (learners.qf2, learners.qf2_target)):
            for param, target_param in zip(online.parameters(), targets.parameters()):
                target_param.lerp_(param, tau)                                 # keeps 1 - tau of the old target


def picor_update(args: Args, learners: MultiTaskSAC, optimizers: dict, buffer: TaskReplay, task: int, weights: Tensor,
                 rng: np.random.Generator) -> dict[str, Tensor]:
    """Phase 1 on the active task and, unless it is switched off, phase 2 on all of them; what is logged.

    The baselines are phase 1 as well: on batches of all tasks (mixed), or of one with networks of its own.
    """
    every, correcting = list(range(len(buffer.data))), args.method == "picor" and args.correction
    mixed = args.method == "mtmhsac" or (args.method == "mtsac" and args.mtsac_batch == "mixed")
    policy_tasks = every if mixed else [task]
    critic_tasks = every if mixed or (args.method == "picor" and args.critic_batch == "all") else [task]
    critic_rows, policy_rows = ([0] if args.method == "independent" else tasks
                                for tasks in (critic_tasks, policy_tasks))

    batch = buffer.sample(rng, critic_tasks, args.batch_size // len(critic_tasks))
    alpha = learners.log_alpha.detach().exp()[critic_rows][:, None]
    found = {"critic": critic_phase(learners, optimizers["critic"], batch, alpha, args.gamma)}
    if correcting:                                                     # before phase 1 changes the policy
        states = buffer.sample(rng, every, args.correction_states, args.recent)[0]
        with torch.no_grad():
            old = learners.actor(states)
    obs = batch[0] if policy_tasks == critic_tasks else buffer.sample(rng, policy_tasks, args.batch_size)[0]
    scale = len(every) * weights[task].item() if args.method == "picor" and not correcting else 1.0
    found["actor"], log_prob = policy_phase(learners, optimizers["actor"], obs, policy_rows, scale)
    if args.alpha_all:                                                 # also of the tasks whose turn it is not
        policy_rows, log_prob = every, squash(*old, torch.randn_like(old[0]))[1]
    temperature_phase(learners, optimizers, log_prob, policy_rows)
    if correcting:
        found |= correct(args, learners, optimizers["correction"], states, old, weights)
    move_targets(learners, args.tau)
    return found


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


def make_picor_learners(args: Args, num_tasks: int, obs_size: int, action_size: int) -> nn.ModuleList:
    """One set of networks for all tasks, or one for each if they are independent."""
    layers = len(args.hidden_sizes) + 1

    def make(tasks: int) -> MultiTaskSAC:
        policy, critic = (tuple(range(layers - heads)) for heads in (
            args.method == "mtmhsac", args.method == "mtmhsac" or args.critic_heads))
        sizes = (tasks, obs_size, action_size, args.hidden_sizes)
        learners = MultiTaskSAC(BoundedActor(*sizes, policy, "relu"), Critic(*sizes, critic, "relu"),
                                Critic(*sizes, critic, "relu"), tasks, action_size)
        learners.log_alpha.data.fill_(math.log(args.alpha_init))
        return learners
    return nn.ModuleList([make(1) for _ in range(num_tasks)] if args.method == "independent" else [make(num_tasks)])


def make_picor_optimizers(args: Args, learners: MultiTaskSAC) -> dict[str, torch.optim.Optimizer]:
    """Adams of SAC, one of its own for the correction, and one for each task's temperature.

    The last ones exist because a shared Adam would forget a temperature's statistics while it is not its task's turn.
    """
    adam = partial(torch.optim.Adam, lr=args.lr, fused=True)
    return learners.make_optimizers(args.lr, args.lr) | {"correction": adam(learners.actor.parameters())} | {
        f"alpha{task}": adam([learners.log_alpha]) for task in range(len(learners.log_alpha))}


def remember(collected: dict[str, list], names: list[str], found: dict[str, Tensor], weights: Tensor,
             alpha: Tensor) -> None:
    """Put what an update found beside what earlier ones did, by the keys of the log."""
    per_task = {"method/{}/weight": weights, "losses/{}/alpha": alpha}
    if "hinge" in found:                                               # the method has a correction
        per_task["method/{}/advantage"] = found.pop("advantage")
        collected["method/corrected"].append(float(found["hinge"] > 0))
    for key, values in per_task.items():
        for name, value in zip(names, values.tolist()):
            collected[key.format(name)].append(value)
    for key, value in found.items():
        collected[f"{'losses' if key in ('critic', 'actor') else 'method'}/{key}"].append(value.mean().item())


def train(args: Args) -> Path | None:
    """Blocks of one task: act, phase 1, phase 2; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    device = pick_device(args.device)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    rng, task_rng = (np.random.default_rng(args.seed + offset) for offset in (0, 5_000))   # the same blocks in all arms
    names, num_tasks = list(args.tasks), len(args.tasks)
    task_ids, alone = list(range(num_tasks)), args.method == "independent"
    envs = make_envs(args, task_ids)                                   # a sub-environment per task, stepped one by one
    obs, _ = envs.reset(seed=args.seed)                                # (T, O); sub-environment i gets seed + i
    obs_size, action_size = obs.shape[1], envs.single_action_space.shape[0]
    learners = make_picor_learners(args, num_tasks, obs_size, action_size).to(device)
    optimizers = [make_picor_optimizers(args, each) for each in learners]

    @torch.no_grad()
    def greedy(obs: np.ndarray) -> np.ndarray:
        inputs = torch.as_tensor(obs, device=device)[:, None]          # (T, 1, O)
        groups = zip(learners, inputs.split(1)) if alone else [(learners[0], inputs)]
        return torch.cat([each.actor(x)[0] for each, x in groups]).tanh().squeeze(1).cpu().numpy()

    if args.evaluate:
        learners.load_state_dict(load_checkpoint(args.evaluate)["learners"])
        evaluation = evaluate(args, task_ids, greedy, frames=args.capture_video)
        print_table(names, evaluation)
        if args.capture_video:
            save_animation(args.evaluate / "tasks.gif", names, evaluation["frames"])
        return args.evaluate

    state = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "seconds": 0.0}
    global_step = state["global_step"]
    if global_step > args.total_timesteps:
        raise Failure(f"--resume {args.resume}: that run has {global_step:,} steps already; "
                      f"give a larger --total-timesteps than {args.total_timesteps:,}")
    capacity = min(args.buffer_size, args.total_timesteps)
    buffer = TaskReplay(num_tasks, capacity, obs_size, action_size, device)
    updates, task, block_left = np.zeros(num_tasks, np.int64), 0, 0
    collected = defaultdict(list)
    if args.resume:
        learners.load_state_dict(state["learners"])
        for each, saved in zip(optimizers, state["optimizers"]):
            for name, optimizer in each.items():
                optimizer.load_state_dict(saved[name])
        buffer.num_added = state["num_added"].numpy().copy()
        for i, rows in enumerate(state["buffer"]):
            buffer.data[i, :len(rows)] = rows.to(device)
        updates, task, block_left = state["updates"].numpy().copy(), state["task"], state["block_left"]
        task_rng.bit_generator.state = json.loads(state["task_rng"])
        collected |= {key: list(values) for key, values in state["collected"].items()}
        obs = set_world(state["world"], envs, rng)
    run = Run(args, names, global_step, state["seconds"])

    def save() -> None:
        """Everything that the next step reads."""
        check_finite(global_step, dict(learners.named_parameters()))   # keeps the last good one
        run.save(dict(
            global_step=global_step, learners=learners.state_dict(), updates=torch.from_numpy(updates.copy()),
            optimizers=[{name: optimizer.state_dict() for name, optimizer in each.items()} for each in optimizers],
            world=get_world(envs, obs, rng), task_rng=json.dumps(task_rng.bit_generator.state), task=task,
            num_added=torch.from_numpy(buffer.num_added.copy()), collected=dict(collected), block_left=block_left,
            buffer=[rows[:count].clone().cpu() for rows, count in zip(buffer.data, buffer.num_added)]))

    if not args.resume:
        save()                                                         # from here on a killed run can be resumed

    fill = num_tasks * args.learning_starts
    while global_step < args.total_timesteps and not run.stop_signal:
        # The task of this block ----------------------------------------------------------------------------
        if block_left == 0:
            if global_step < fill:                                     # all tasks in turn, so that none is unknown
                task, block_left = global_step // args.learning_starts, args.learning_starts
            else:
                in_turn = (task + 1) % num_tasks
                task = in_turn if args.task_order == "cycle" else int(task_rng.integers(num_tasks))
                block_left = args.block_steps
        learner, row = (learners[task], 0) if alone else (learners[0], task)

        # Act in it, log what ended, store --------------------------------------------------------------------
        if global_step < fill:
            action = rng.uniform(-1, 1, action_size).astype(np.float32)
        else:
            with torch.no_grad():
                mean, log_std = of_tasks(learner.actor, [row])(torch.as_tensor(obs[task], device=device)[None, None])
                action = squash(mean, log_std, torch.randn_like(mean))[0].flatten().cpu().numpy()
        env = envs.envs[task]
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(task, obs[task], action, reward, next_obs, terminated)
        obs[task] = next_obs
        previous_step, global_step, block_left = global_step, global_step + 1, block_left - 1
        if terminated or truncated:
            run.add(f"tasks/{names[task]}", {"episodic_return": float(info["episode"]["r"]),
                                             "episodic_length": int(info["episode"]["l"]),
                                             "success": float(info["success"])})
            obs[task], _ = env.reset()

        # Update: phase 1 on this task, phase 2 on all -------------------------------------------------------
        if global_step > fill:
            alpha = torch.cat([each.log_alpha.detach().exp() for each in learners])
            weights = torch.full_like(alpha, 1 / num_tasks)
            if args.method == "picor" and args.adaptive_weights and updates.min() >= args.weight_warmup:
                weights = task_weights(alpha, args.weight_tau)
            found = picor_update(args, learner, optimizers[task if alone else 0], buffer, task, weights, rng)
            updates[task] += 1
            remember(collected, names, found, weights, alpha)

        # Log, evaluate, save --------------------------------------------------------------------------------
        evaluate_now = crossed(previous_step, global_step, args.eval_every) or global_step >= args.total_timesteps
        if crossed(previous_step, global_step, LOG_EVERY) or evaluate_now:
            means = {key: float(np.mean(values)) for key, values in collected.items()}
            check_finite(global_step, {key: torch.tensor(value) for key, value in means.items()}
                         | dict(learners.named_parameters()))
            for key, value in means.items():
                group, name = key.split("/", 1)
                run.add(group, {name: value})
            collected.clear()
            latest = means
        if evaluate_now:
            columns = {f"{name}/weight": latest.get(f"method/{name}/weight", 1 / num_tasks) for name in names}
            columns |= {f"{name}/updates": int(count) for name, count in zip(names, updates)}
            columns |= {key: latest.get(f"method/{key}", math.nan) for key in ("hinge", "kl", "corrected", "steps")}
            run.log_evaluation(global_step, evaluate(args, task_ids, greedy), columns)
        if crossed(previous_step, global_step, LOG_EVERY) or evaluate_now:
            run.write(global_step)
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        evaluation = evaluate(args, task_ids, greedy, frames=args.capture_video)
        plot_weights(run.dir, names)
        if args.capture_video:
            save_animation(run.dir / "tasks.gif", names, evaluation["frames"])
        print_table(names, evaluation)
    run.close()
    return run.dir


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
def plot_weights(folder: Path, names: list[str]) -> None:
    """weights.png from metrics.csv: task weights over training (the paper's Figure 4), and how much is corrected."""
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        left.plot(table["global_step"], table[f"{name}/weight"], label=name)
    left.set(xlabel="environment steps, summed over tasks", ylabel="weight of the task", ylim=(0, 1))
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.legend(frameon=False, fontsize=8)
    right.plot(table["global_step"], table["corrected"])
    right.set(xlabel="environment steps, summed over tasks", ylabel="share of updates with a correction", ylim=(0, 1))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    if np.nanmax(table["kl"], initial=0) > 0:
        kl = right.twinx()
        kl.semilogy(table["global_step"], table["kl"], color="C1", linestyle="--")
        kl.set_ylabel("KL from phase 1's policy [nats], dashed")
    figure.savefig(folder / "weights.png", dpi=120)


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
