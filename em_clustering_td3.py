# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0",
#   "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0",
# ]
# ///
"""Task clustering by expectation-maximisation with TD3: tasks that disagree get different policies.

Ackermann, Richter, Wattenhofer: "Unsupervised Task Clustering for Multi-Task Reinforcement Learning", ECML-PKDD 2021.
No policy is told which task it is in. n policies share the tasks out among themselves: evaluate every policy on every
task and give each task to the policy that is best at it (E-step), then train each policy with TD3 on episodes of its
own tasks (M-step), and repeat. Nothing is reset when a task moves: a policy keeps its weights and all of its replay.

    E-step: G[t, i], return of policy i on task t        play
    assignment: argmax_i G[t, i]; empty sets get all     assign_tasks, clusters
    M-step: TD3 on tasks drawn from T_i                  train, td3_update
    gradient surgery (Yu et al. 2020), a baseline        conflict_weights, project_conflicts, gather_gradients

All policies train side by side: one stack of networks, one environment per policy, one update for all. tabular_em.py
is the same idea in tables and the place to start. Differences from the paper, each explained in
docs/em_clustering_td3.md:
1. An M-step has exactly --m-step-size steps per policy: the last episode is cut short, and updates are spread over the
   steps in place of a block after each episode.
2. Time limits bootstrap (--timeout-is-terminal for the authors' code); target noise is TD3's own.
3. The pendulum's policies use half of the torque, as in the authors' code (--action-scale 2 for the paper's text).
4. Reported are the assigned policy, afresh, and the maximum over policies, which the paper probably plots.
5. Walkers as in the authors' code where it differs from the text: low stumps, finish lines at 27, 44 and 89 metres.

    python em_clustering_td3.py                           # seven pendulums, four policies
    python em_clustering_td3.py --method sp --seed 2      # one policy for all
    python em_clustering_td3.py --env track --hidden-sizes 128 128
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.envs.box2d import bipedal_walker
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
WALKER = dict(hidden_sizes=(400, 300), lr=1e-3, batch_size=1_000, update_every=3, exploration_noise=0.1,
              smoothing_noise=0.2, m_step_size=200_000, learning_starts=10_000, buffer_size=5_000_000,
              total_timesteps=2_400_000)
PRESETS = {  # the paper's appendix; a setting left at None takes its value from here
    "pendulum": dict(hidden_sizes=(64, 64), lr=3e-3, batch_size=128, update_every=1, exploration_noise=0.05,
                     smoothing_noise=0.1, m_step_size=50_000, learning_starts=10_000, buffer_size=2_000_000,
                     total_timesteps=1_000_000),
    "track": WALKER, "legs": WALKER,
}
METHOD_PRESETS = {  # both start to learn after 100,000 steps of all tasks
    ("pendulum", "multihead"): dict(hidden_sizes=(96, 64), learning_starts=14_300),
    ("pendulum", "surgery"): dict(hidden_sizes=(128, 128), learning_starts=14_300),
    ("track", "multihead"): dict(hidden_sizes=(400, 400), update_every=5, learning_starts=16_700),
    ("track", "surgery"): dict(hidden_sizes=(800, 600), update_every=5, learning_starts=16_700),
    ("legs", "multihead"): dict(hidden_sizes=(400, 400), update_every=5, learning_starts=11_100),
    ("legs", "surgery"): dict(hidden_sizes=(800, 600), update_every=5, learning_starts=11_100),
}
TIED_LAYERS = {"multihead": (1,), "surgery": (0, 1)}          # of 3: these methods have one row of networks per task
CLUSTERED = ("em", "random-clusters")                         # these have n policies, and tasks that are assigned


@dataclass
class Args:
    env: Literal["pendulum", "track", "legs"] = "pendulum"
    """seven pendulum lengths; six track-and-field events of a walker; walkers of three leg lengths on three grounds"""
    method: Literal["em", "sp", "ppt", "multihead", "surgery", "random-clusters"] = "em"
    """EM clustering; one policy for all tasks; one per task; shared layer and heads; shared trunk with gradient
    surgery; clusters drawn once at random"""
    seed: int = 1
    """seeds every generator: networks, environments, replay, exploration, clusters"""
    total_timesteps: int | None = None
    """environment steps of training, summed over policies, rounded to whole M-steps; E-steps come on top; None: the
    preset of --env, 1_000_000 or for walkers 2_400_000"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes cuda if present, else cpu"""
    eval_every: int = 50_000
    """environment steps between rows of metrics.csv, which are written after E-steps only"""
    eval_episodes: int = 20
    """greedy episodes per policy and task in an E-step, paper: k; part of the method, not only of the report"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM"""
    runs_dir: Path = Path("runs")
    """where run folders go"""
    resume: Path | None = None
    """run folder to go on from, to the same or a larger --total-timesteps"""
    evaluate: Path | None = None
    """run folder to load and evaluate; trains nothing and writes nothing but pictures asked for"""
    capture_video: bool = False
    """after training or with --evaluate: one animated picture of all tasks side by side"""

    num_policies: int | None = None
    """paper: n; None: 4 for em and random-clusters, 1 for sp, one per task for the others"""
    m_step_size: int | None = None
    """training steps per policy and M-step, paper: T_M; None: the preset of --env for four policies, and as many steps
    in all for methods with another number"""
    evals_per_m_step: int = 1
    """E-steps per M-step, which they must divide; only the last one assigns tasks. The authors' code has 3"""
    action_scale: float = 1.0
    """largest mean action of a policy. On the pendulum, whose torque limit is 2, the paper's text says 2 and the
    authors' code has 1"""
    flat_ground: bool = False
    """legs: no bumps on flat ground, as in the paper's text; the authors' code has some, 2 to 12 cm high"""
    timeout_is_terminal: bool = False
    """no bootstrapping at time limits, as in the authors' code"""
    exploration_noise: float | None = None
    """standard deviation of the noise on training actions, clipped to +-0.5; None: the preset of --env"""
    smoothing_noise: float | None = None
    """standard deviation of the noise on target actions, clipped to +-0.5; None: the preset of --env"""
    learning_starts: int | None = None
    """training steps per policy before its first update; None: the preset of --env"""
    update_every: int | None = None
    """training steps per policy and update, paper: u; None: the preset of --env"""
    policy_delay: int = 3
    """updates of the critics per update of policies and targets"""
    batch_size: int | None = None
    """transitions per policy (or task, with heads) and update; None: the preset of --env"""
    buffer_size: int | None = None
    """replay capacity per policy (or task, with heads), transitions; None: the preset of --env"""
    hidden_sizes: tuple[int, int] | None = None
    """widths of the two hidden layers; None: the preset of --env"""
    lr: float | None = None
    """Adam step size of policies and critics; None: the preset of --env"""
    gamma: float = 0.99
    """discount factor of learning; reported returns are undiscounted"""
    tau: float = 0.005
    """Polyak coefficient: the share of the online networks that enters the targets"""
    action_penalty: float = 1e-3
    """weight of the mean squared action in the policies' loss"""
    max_grad_norm: float = 0.5
    """each parameter tensor's gradient is clipped to this L2 norm, for each policy by itself; 0 turns it off"""

    def __post_init__(self):
        num_tasks = len(TASKS[self.env])
        fixed = {"sp": 1, "em": None, "random-clusters": None}.get(self.method, num_tasks)
        if self.num_policies is None:
            self.num_policies = fixed or 4
        if fixed and self.num_policies != fixed:
            raise ValueError(f"--method {self.method} has {fixed} policies on --env {self.env}, got "
                             f"{self.num_policies}; leave --num-policies out, or resume with the run's own --method")
        if not 1 <= self.num_policies <= num_tasks:
            raise ValueError(f"--num-policies must be from 1 to {num_tasks}, the number of tasks of --env {self.env}, "
                             f"got {self.num_policies}")
        preset = PRESETS[self.env] | METHOD_PRESETS.get((self.env, self.method), {})
        if self.method not in CLUSTERED:
            preset["m_step_size"] = 4 * preset["m_step_size"] // self.num_policies
            preset["m_step_size"] -= preset["m_step_size"] % max(1, min(self.evals_per_m_step, preset["m_step_size"]))
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "m_step_size",
                     "evals_per_m_step", "learning_starts", "update_every", "policy_delay", "batch_size",
                     "buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        for name in ("exploration_noise", "smoothing_noise", "action_penalty", "max_grad_norm"):
            if not getattr(self, name) >= 0:                           # not a number neither
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        if min(self.hidden_sizes) < 1:
            raise ValueError(f"--hidden-sizes must be at least 1, got {self.hidden_sizes}")
        for name in ("lr", "gamma", "tau"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")
        limit = 2 if self.env == "pendulum" else 1
        if not 0 < self.action_scale <= limit:
            raise ValueError(f"--action-scale must be above 0 and at most {limit}, the limit of --env {self.env}, got "
                             f"{self.action_scale}")
        if self.m_step_size % self.evals_per_m_step:
            raise ValueError(f"--m-step-size {self.m_step_size} cannot be split into {self.evals_per_m_step} equal "
                             f"parts; let --evals-per-m-step divide it")
        round_of_all = self.num_policies * self.m_step_size
        self.total_timesteps = round_of_all * max(1, int(self.total_timesteps / round_of_all + 0.5))
        if self.flat_ground and self.env != "legs" and not (self.resume or self.evaluate):
            raise ValueError(f"--flat-ground is for the bumps of --env legs, got --env {self.env}; leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
LENGTHS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)                 # of the pendulums [m]


class Event(NamedTuple):
    """A task of the walker. Distances in Box2D's metres; the walker starts at x = 4.67."""

    name: str
    leg: int                                                  # length of upper and of lower leg [1/30 m]
    reward: str                                               # "speed", "height" or "length" of jumps, "progress"
    finish: float                                             # x that ends the episode
    energy: float = 0.028                                     # price of a motor's full effort for a step
    stumps: str = ""                                          # "hurdles", or the gap between low stumps [m]
    stump_height: float = 0.0                                 # its mean [terrain steps of 0.467 m]


EVENTS = {
    "track": [Event("jump-up", 45, "height", 88.667), Event("jump-long", 45, "length", 26.6),
              Event("sprint", 45, "speed", 26.6), Event("run", 45, "speed", 44.333),
              Event("marathon", 45, "speed", 88.667, 0.052), Event("hurdles", 45, "speed", 88.667, stumps="hurdles")],
    "legs": [Event(f"legs{leg}-{ground}", leg, "progress", 88.667, stumps=gap, stump_height=h) for leg in (25, 35, 45)
             for ground, gap, h in (("flat", "4", 0.0), ("gap2", "2", 0.5), ("gap4", "4", 0.5))],
}
TASKS = {"pendulum": [f"length{round(100 * length)}cm" for length in LENGTHS]} | {
    env: [event.name for event in events] for env, events in EVENTS.items()}
LOG_EVERY = 5_000                                             # environment steps between writes to TensorBoard
HORIZON = {"pendulum": 500, "track": 2_000, "legs": 2_000}    # steps of a training episode ...
EVAL_HORIZON = {"pendulum": 200, "track": 2_000, "legs": 2_000}          # ... and of one in an E-step


class PendulumEnv(gym.Env):
    """Swing a pendulum up, as Gymnasium's Pendulum, with a length that each episode draws from those of `allowed`.

    Observation (3,): cosine and sine of the angle from upright, angular velocity [rad/s]; not the length. Action (1,):
    torque [N m]. Reward -(angle^2 + 0.1 velocity^2 + 0.001 torque^2) before the step. Success: upright at the end.
    """
    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, allowed: list[int]):
        self.allowed, self.task, self.angle, self.velocity = allowed, allowed[0], 0.0, 0.0
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task = int(self.np_random.choice(self.allowed))
        self.angle, self.velocity = self.np_random.uniform(-math.pi, math.pi), self.np_random.uniform(-1, 1)
        return self._obs(), {"success": False, "task": self.task}

    def step(self, action):
        torque, length = float(np.clip(action[0], -2.0, 2.0)), LENGTHS[self.task]
        angle = (self.angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(angle**2 + 0.1 * self.velocity**2 + 0.001 * torque**2)
        self.velocity += 0.05 * (15 / length * math.sin(self.angle) + 3 * torque / length**2)     # 3 g / (2 l)
        self.angle += 0.05 * self.velocity
        self.velocity = min(max(self.velocity, -8.0), 8.0)            # after the angle has moved, as the first version
        return self._obs(), reward, False, False, {"success": math.cos(self.angle) > 0.95, "task": self.task}

    def _obs(self) -> np.ndarray:
        return np.array([math.cos(self.angle), math.sin(self.angle), self.velocity], np.float32)

    def get_state(self) -> list[float]:
        """All that the next step reads."""
        return [self.angle, self.velocity, float(self.task)]

    def set_state(self, state: list[float]) -> None:
        """Undo `get_state`."""
        self.angle, self.velocity, self.task = state[0], state[1], int(state[2])

    def render(self, size: int = 120) -> np.ndarray:
        """The rod, to scale: uint8 RGB."""
        picture, length = Image.new("RGB", (size, size), "white"), 0.36 * size * LENGTHS[self.task]
        tip = size / 2 - length * math.sin(self.angle), size / 2 - length * math.cos(self.angle)
        draw = ImageDraw.Draw(picture)
        draw.line([(size / 2, size / 2), tip], fill=(200, 50, 50), width=7)
        draw.ellipse([size / 2 - 4, size / 2 - 4, size / 2 + 4, size / 2 + 4], fill="black")
        return np.asarray(picture)


class WalkerEnv(bipedal_walker.BipedalWalker):
    """Gymnasium's two-legged walker, in the event that each episode draws from those of `allowed`.

    Observation (24,) and action (4,) as in BipedalWalker-v3; neither position nor event is observed. A fall replaces
    the reward of its step by -100. Success: over the finish line. The simulator's state cannot be saved.
    """

    def __init__(self, events: list[Event], allowed: list[int]):
        self.events, self.allowed, self.task = events, allowed, allowed[0]
        super().__init__(render_mode="rgb_array")

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.task = int(self.np_random.choice(self.allowed))
        height = self.events[self.task].leg / bipedal_walker.SCALE
        bipedal_walker.LEG_H = height                                 # only the stock reset reads these three
        bipedal_walker.LEG_FD.shape.SetAsBox(bipedal_walker.LEG_W / 2, height / 2)
        bipedal_walker.LOWER_FD.shape.SetAsBox(0.8 * bipedal_walker.LEG_W / 2, height / 2)
        self.world, self.terrain = bipedal_walker.Box2D.b2World(), []  # a used world would not repeat itself exactly
        self.airborne, self.last_contact_x = False, 0.0
        return super().reset()[0], {"success": False, "task": self.task}

    def step(self, action):
        event = self.events[self.task]
        obs, reward, _, _, _ = super().step(action)
        (x, y), fallen = self.hull.position, self.game_over or self.hull.position.x < 0
        contact = self.legs[1].ground_contact or self.legs[3].ground_contact
        if event.reward != "progress":                                # that is the stock reward
            landed = contact and self.airborne
            reward = {"speed": 0.1 * self.hull.linearVelocity.x, "height": landed * (y - self.last_contact_x),
                      "length": landed * (x - self.last_contact_x)}[event.reward]
            reward = -100.0 if fallen else reward - event.energy * float(np.abs(action).clip(0, 1).sum())
        self.airborne = not contact
        self.last_contact_x = x if contact else self.last_contact_x
        finished = x > event.finish
        return obs, float(reward), bool(fallen or finished), False, {"success": finished and not fallen,
                                                                      "task": self.task}

    def _generate_terrain(self, hardcore):
        """Level ground; stumps as wide as a terrain step from x = 9.33 on, which "flat" has too, 2 to 12 cm high."""
        step, ground, event = bipedal_walker.TERRAIN_STEP, bipedal_walker.TERRAIN_HEIGHT, self.events[self.task]
        self.terrain, self.terrain_poly = [], []
        self.terrain_x = [i * step for i in range(bipedal_walker.TERRAIN_LENGTH)]
        self.terrain_y = [ground] * len(self.terrain_x)
        left = bipedal_walker.TERRAIN_STARTPAD * step
        while event.stumps and left < bipedal_walker.TERRAIN_LENGTH * step:
            if event.stumps == "hurdles":
                height, pitch = 1.0, step * self.np_random.integers(5, 10, 2).sum()
            else:
                height = step * max(0.05, self.np_random.normal(event.stump_height, 0.1))
                pitch = float(event.stumps) + step
            self.fd_polygon.shape.vertices = [(left, ground), (left + step, ground), (left + step, ground + height),
                                              (left, ground + height)]
            self.terrain.append(self.world.CreateStaticBody(fixtures=self.fd_polygon))
            self.terrain[-1].color1, self.terrain[-1].color2 = (255, 255, 255), (153, 153, 153)
            left += pitch
        for i, (x, after) in enumerate(zip(self.terrain_x[:-1], self.terrain_x[1:])):
            self.fd_edge.shape.vertices = [(x, ground), (after, ground)]
            self.terrain.append(self.world.CreateStaticBody(fixtures=self.fd_edge))
            self.terrain[-1].color1 = self.terrain[-1].color2 = (76, 255 if i % 2 == 0 else 204, 76)
            self.terrain_poly.append(([(x, ground), (after, ground), (after, 0), (x, 0)], (102, 153, 76)))
        self.terrain.reverse()

    def render(self) -> np.ndarray:
        """Every third pixel of the stock picture."""
        return super().render()[::3, ::3]


def make_env(args: Args, allowed: list[int], horizon: int) -> gym.Env:
    """An environment that plays the tasks of `allowed`, with its time limit and with the statistics of its episodes."""
    if args.env == "pendulum":
        env = PendulumEnv(allowed)
    else:
        env = WalkerEnv([event._replace(stumps="") if args.flat_ground and event.stump_height == 0 else event
                         for event in EVENTS[args.env]], allowed)
    return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(env, horizon))


def make_envs(args: Args, task_ids: list[int]) -> SyncVectorEnv:
    """A training environment per policy; a finished one restarts in the same step, its last observation in `infos`."""
    return SyncVectorEnv([partial(make_env, args, task_ids, HORIZON[args.env]) for _ in range(args.num_policies)],
                         autoreset_mode=AutoresetMode.SAME_STEP)


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


class TD3Learners(nn.Module):
    """All that TD3 trains, in stacks of R: policies and twin critics, with their targets.

    R is the number of policies, independent of each other; for the two baselines with heads it is the number of tasks,
    and the networks share the layers of TIED_LAYERS. What other classes here call a task, T, is such a row.
    """

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        tied = TIED_LAYERS.get(args.method, ())
        self.actor = TaskMLP(args.num_policies, [obs_size, *args.hidden_sizes, action_size], tied)
        self.qf1, self.qf2 = (TaskMLP(args.num_policies, [obs_size + action_size, *args.hidden_sizes, 1], tied)
                              for _ in range(2))
        self.actor_target, self.qf1_target, self.qf2_target = map(copy.deepcopy, (self.actor, self.qf1, self.qf2))

    def make_optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """One Adam for policies and one for critics, which act on each number by itself: independent rows stay so."""
        params = {"actor": self.actor.parameters(), "critic": [*self.qf1.parameters(), *self.qf2.parameters()]}
        return {name: torch.optim.Adam(p, lr=lr, eps=1e-7, fused=True) for name, p in params.items()}


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
def assign_tasks(returns: np.ndarray) -> np.ndarray:
    """E-step: the policy that is best at each task; ties go to the lowest index.

    Args:
        returns: G[t, i], mean return of policy i on task t, (..., T, n).
    Returns:
        Policy of each task, (..., T) int64.
    """
    return returns.argmax(-1)


def clusters(assignment: np.ndarray, num_policies: int) -> np.ndarray:
    """Which tasks each policy trains on: (..., T) -> (..., n, T) bool. One without tasks trains on all of them."""
    member = assignment[..., None, :] == np.arange(num_policies)[:, None]
    return member | ~member.any(-1, keepdims=True)


def random_clusters(num_tasks: int, num_policies: int, rng: np.random.Generator) -> np.ndarray:
    """Assignment for the ablation, (T,): tasks fall into n rows of ceil(T / n) slots each, one row per policy."""
    row_size = -(-num_tasks // num_policies)
    return rng.permutation(num_policies * row_size)[:num_tasks] // row_size


def policy_actions(args: Args, actor: TaskMLP, obs: Tensor) -> Tensor:
    """Deterministic actions of every row's policy, (R, B, O) -> (R, B, A)."""
    return args.action_scale * torch.tanh(actor(obs))


def value(critic: TaskMLP, obs: Tensor, actions: Tensor) -> Tensor:
    """Q-values of every row's critic, (R, B, O) and (R, B, A) -> (R, B)."""
    return critic(torch.cat([obs, actions], dim=-1)).squeeze(-1)


def clipped_noise(like: Tensor, std: float) -> Tensor:
    """Gaussian noise within +-0.5, of the shape of `like`."""
    return (std * torch.randn_like(like)).clamp(-0.5, 0.5)


def td_target(rewards: Tensor, terminations: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """Regression target of the critics, r + gamma (1 - termination) Q'; all (R, B)."""
    return rewards + gamma * (1 - terminations) * next_q


def critic_loss(q1: Tensor, q2: Tensor, target: Tensor) -> Tensor:
    """Mean squared errors of both twins, summed: (T, B) -> (T,)."""
    return ((q1 - target).square() + (q2 - target).square()).mean(1)


def policy_loss(q: Tensor, actions: Tensor, penalty: float) -> Tensor:
    """What TD3's policies minimise, -Q plus a small price of large actions: (R, B), (R, B, A) -> (R,)."""
    return -q.mean(1) + penalty * actions.square().mean((1, 2))


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


def td3_update(args: Args, learners: TD3Learners, optimizers: dict, batch: list[Tensor], limit: float,
               update_policies: bool, rng: np.random.Generator) -> dict[str, Tensor]:
    """One TD3 step of every row: critics, and with `update_policies` policies and all targets. Losses, (R,) each.

    Args:
        limit: largest action that the environment knows.
        rng: draws the order in which gradient surgery visits the tasks.
    """
    obs, actions, rewards, next_obs, terminations = batch
    with torch.no_grad():
        next_actions = policy_actions(args, learners.actor_target, next_obs)
        next_actions = (next_actions + clipped_noise(next_actions, args.smoothing_noise)).clamp(-limit, limit)
        next_q = torch.min(value(learners.qf1_target, next_obs, next_actions),
                           value(learners.qf2_target, next_obs, next_actions))
        target = td_target(rewards, terminations, next_q, args.gamma)
    (qf1, copies1), (qf2, copies2) = per_task(learners.qf1, len(obs)), per_task(learners.qf2, len(obs))
    q_loss = critic_loss(value(qf1, obs, actions), value(qf2, obs, actions), target)
    descend(args, optimizers["critic"], q_loss, [(learners.qf1, copies1), (learners.qf2, copies2)], rng)
    losses = {"critic": q_loss}

    if update_policies:
        actor, copies = per_task(learners.actor, len(obs))
        pi = policy_actions(args, actor, obs)
        with frozen(learners.qf1):
            pi_loss = policy_loss(value(learners.qf1, obs, pi), pi, args.action_penalty)
        descend(args, optimizers["actor"], pi_loss, [(learners.actor, copies)], rng)
        losses["actor"] = pi_loss
        with torch.no_grad():
            for name in ("actor", "qf1", "qf2"):
                online, targets = getattr(learners, name), getattr(learners, name + "_target")
                for param, target_param in zip(online.parameters(), targets.parameters()):
                    target_param.lerp_(param, args.tau)                        # keeps 1 - tau of the old target
    return {name: loss.detach() for name, loss in losses.items()}


def descend(args: Args, optimizer: torch.optim.Optimizer, losses: Tensor, nets: list, rng: np.random.Generator) -> None:
    """Descend the sum of the rows' losses, (R,), after surgery where the method has it and clipping.

    Args:
        nets: each network with the copies that `per_task` made for its forward pass.
    """
    optimizer.zero_grad()
    losses.sum().backward()
    for net, copies in nets:
        if copies:
            gather_gradients([(net, copies)], draw_visit_order(len(losses), rng) if args.method == "surgery" else None)
        for param in net.parameters():
            if args.max_grad_norm and param.grad is not None:          # of each row by itself
                norm = param.grad.flatten(1).norm(dim=1)
                param.grad *= (args.max_grad_norm / norm.clamp(min=1e-12)).clamp(max=1.0)[:, None, None]
    optimizer.step()


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


def draw_visit_order(num_tasks: int, rng: np.random.Generator) -> np.ndarray:
    """For each task the others in a random order, (T, T - 1)."""
    return np.array([rng.permutation([j for j in range(num_tasks) if j != i]) for i in range(num_tasks)])


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


def project_conflicts(task_grads: Tensor, visit_order: np.ndarray) -> Tensor:
    """Remove from each task's gradient its components that oppose another task's (PCGrad, Algorithm 1).

    Args:
        task_grads: flattened gradients before surgery, (T, P).
        visit_order: row i lists the partners that task i meets, in order, (T, T - 1).
    Returns:
        Projected gradients, (T, P). The paper's update is their sum over tasks.
    Raises:
        ValueError: if `visit_order` does not have one row per task.
    """
    if len(visit_order) != len(task_grads):
        raise ValueError(f"visit_order has {len(visit_order)} rows for {len(task_grads)} tasks; give one row per task")
    weights = conflict_weights((task_grads @ task_grads.T).cpu().double().numpy(), visit_order)
    return torch.from_numpy(weights).to(task_grads) @ task_grads


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def play(args: Args, learners: TD3Learners, policies: np.ndarray, tasks: np.ndarray, rng: np.random.Generator,
         frames: bool = False) -> dict:
    """Greedy episodes of each pair of a policy and a task, all pairs side by side, in fresh environments.

    Args:
        policies, tasks: the pairs, (P,) each.
        rng: draws the environments' seeds.
        frames: also render each pair's first episode, every fourth step.
    Returns:
        returns and successes, (P, --eval-episodes) each; steps, how many were taken; frames.
    """
    envs = [make_env(args, [int(task)], EVAL_HORIZON[args.env]) for task in tasks]
    obs = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in envs])
    device, everyone = learners.actor.weights[0].device, (args.num_policies, *obs.shape)
    episodes, steps, tick, film = [[] for _ in envs], 0, 0, []
    while playing := [pair for pair, done in enumerate(episodes) if len(done) < args.eval_episodes]:
        if frames and not all(episodes) and tick % 4 == 0:
            film.append([film[-1][k] if episodes[k] else env.render() for k, env in enumerate(envs)])
        tick += 1
        with torch.no_grad():                                          # every policy in every pair's state
            actions = policy_actions(args, learners.actor, torch.as_tensor(obs, device=device).expand(everyone))
        actions = actions.cpu().numpy()[policies, range(len(envs))]    # (P, A): the one that is asked for
        for pair in playing:
            obs[pair], _, terminated, truncated, info = envs[pair].step(actions[pair])
            steps += 1
            if terminated or truncated:
                episodes[pair].append((info["episode"]["r"], info["success"]))
                obs[pair], _ = envs[pair].reset()
    table = np.array(episodes, dtype=np.float64)                       # (P, episodes, 2)
    return {"returns": table[..., 0], "successes": table[..., 1], "steps": steps, "frames": film}


def train(args: Args) -> Path | None:
    """E-step and M-step in turns; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    device = pick_device(args.device)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    rng, e_step_rng = (np.random.default_rng(args.seed + offset) for offset in (0, 5_000))
    n, names = args.num_policies, TASKS[args.env]
    num_tasks, part = len(names), args.m_step_size // args.evals_per_m_step        # steps per policy between E-steps
    envs = make_envs(args, list(range(num_tasks)))
    obs, _ = envs.reset(seed=args.seed)                                # (n, O); policy i's environment gets seed + i
    obs_size, action_size = obs.shape[1], envs.single_action_space.shape[0]
    limit = float(envs.single_action_space.high[0])
    learners = TD3Learners(args, obs_size, action_size).to(device)
    optimizers = learners.make_optimizers(args.lr)
    assignment = np.arange(num_tasks) % n                              # right for all methods that have no clusters
    if args.method == "random-clusters":
        assignment = random_clusters(num_tasks, n, rng)

    if args.evaluate:
        state = load_checkpoint(args.evaluate)
        learners.load_state_dict(state["learners"])
        report(args, learners, state["assignment"].numpy(), args.evaluate)
        return args.evaluate

    state = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "seconds": 0.0}
    global_step = state["global_step"]
    if global_step > args.total_timesteps:
        raise Failure(f"--resume {args.resume}: that run has {global_step:,} steps already; "
                      f"give a larger --total-timesteps than {args.total_timesteps:,}")
    capacity = min(args.buffer_size, args.total_timesteps // n)
    buffer = ReplayBuffer(n, capacity, obs_size, action_size, device)
    num_updates, eval_steps, history = 0, 0, []                        # history: (step, assignment, returns) by E-step
    if args.resume and global_step == args.total_timesteps:
        print(f"nothing to train: {global_step:,} steps are done, and --total-timesteps is rounded to whole M-steps of "
              f"{n * args.m_step_size:,}")
    if args.resume:
        learners.load_state_dict(state["learners"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        buffer.num_added = state["num_added"]
        buffer.data[:, :len(buffer)] = state["buffer"].to(device)
        num_updates, eval_steps, assignment = state["num_updates"], state["eval_steps"], state["assignment"].numpy()
        history = [(step, a.numpy(), r.numpy()) for step, a, r in state["history"]]
        e_step_rng.bit_generator.state = json.loads(state["e_step_rng"])
        allow(envs, clusters(assignment, n))
        obs = set_world(state["world"], envs, rng)
    run = Run(args, names, global_step, state["seconds"])
    losses = defaultdict(list)

    def e_step(assign: bool) -> np.ndarray:
        """Try the policies on the tasks and assign them; G[t, i], -inf for pairs that the method never asks for."""
        nonlocal assignment, eval_steps
        check_finite(global_step, dict(learners.named_parameters()))
        returns = np.full((num_tasks, n), -np.inf)
        pairs = (np.arange(num_tasks), assignment)                     # (tasks, policies)
        if args.method in CLUSTERED:
            pairs = np.nonzero(np.ones_like(returns))                  # all of them
        result = play(args, learners, pairs[1], pairs[0], e_step_rng)
        returns[pairs] = result["returns"].mean(1)
        eval_steps += result["steps"]
        if args.method == "em" and assign:
            assignment = assign_tasks(returns)
        history.append((global_step, assignment, returns[range(num_tasks), assignment]))
        return returns

    def save() -> None:
        """Everything that the next step reads."""
        check_finite(global_step, dict(learners.named_parameters()))   # keeps the last good one
        run.save(dict(
            global_step=global_step, learners=learners.state_dict(), num_updates=num_updates, eval_steps=eval_steps,
            optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            assignment=torch.from_numpy(assignment), world=get_world(envs, obs, rng), num_added=buffer.num_added,
            history=[(step, torch.from_numpy(a), torch.from_numpy(r)) for step, a, r in history],
            e_step_rng=json.dumps(e_step_rng.bit_generator.state),
            buffer=buffer.data[:, :len(buffer)].clone().cpu()))       # a clone, or torch.save writes the empty part too

    if not args.resume:
        e_step(assign=True)                                            # the first assignment is of untrained policies
        allow(envs, clusters(assignment, n))
        obs, _ = envs.reset()
        save()                                                         # from here on a killed run can be resumed

    while global_step < args.total_timesteps and not run.stop_signal:
        # M-step: every policy acts in a task of its own ------------------------------------------------------
        with torch.no_grad():
            actions = policy_actions(args, learners.actor, torch.as_tensor(obs, device=device)[:, None]).squeeze(1)
            actions = (actions + clipped_noise(actions, args.exploration_noise)).clamp(-limit, limit).cpu()
        check_finite(global_step, {"action": actions})                 # a walker's simulator would not survive it
        actions = actions.numpy()

        # Step every environment once, log what ended, store --------------------------------------------------
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        previous_step, global_step = global_step, global_step + n
        for _, episode in finished_episodes(infos):                    # of policy _, in the task that it names
            run.add(f"tasks/{names[int(episode.pop('task'))]}", episode)
        ends = terminations | truncations if args.timeout_is_terminal else terminations
        buffer.add(obs, actions, rewards, true_next_obs(next_obs, infos), ends)
        obs = next_obs

        # Update: TD3 on every policy's own data --------------------------------------------------------------
        steps = global_step // n                                       # of each policy
        if steps > args.learning_starts and steps % args.update_every == 0:
            num_updates += 1
            now = num_updates % args.policy_delay == 0
            batch = buffer.sample(rng, args.batch_size)
            for name, loss in td3_update(args, learners, optimizers, batch, limit, now, rng).items():
                losses[name].append(loss)

        # Log -------------------------------------------------------------------------------------------------
        if crossed(previous_step, global_step, LOG_EVERY):
            means = {name: torch.stack(values).mean(0).cpu() for name, values in losses.items()}
            losses.clear()
            check_finite(global_step, means)
            for name, per_policy in means.items():
                run.add("losses", {name: per_policy.mean().item()})
                run.add("losses", {f"policy{i}/{name}": loss.item() for i, loss in enumerate(per_policy)})
            run.write(global_step)

        # E-step: every policy is tried on every task, each task goes to the best -----------------------------
        if steps % part == 0:
            returns = e_step(assign=steps % args.m_step_size == 0)
            sizes = np.bincount(assignment, minlength=n)
            columns = {"empty": int((sizes == 0).sum()), "largest_cluster": int(sizes.max()), "eval_steps": eval_steps}
            run.add("method", columns)
            if crossed(global_step - n * part, global_step, args.eval_every) or global_step >= args.total_timesteps:
                eval_rng = np.random.default_rng((args.seed + 10_000, global_step))
                evaluation = play(args, learners, assignment, np.arange(num_tasks), eval_rng)
                columns |= {"max_return": returns.max(1).mean()}
                columns |= {f"{name}/policy": int(policy) for name, policy in zip(names, assignment)}
                run.log_evaluation(global_step, evaluation, columns)
            run.write(global_step)
            allow(envs, clusters(assignment, n))
            obs, _ = envs.reset()                                      # episodes of the old assignment are cut short
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        report(args, learners, assignment, run.dir)
        plot_assignment(run.dir / "assignment.png", names, history, n)
    run.close()
    return run.dir


def allow(envs: SyncVectorEnv, member: np.ndarray) -> None:
    """Let each policy's environment draw from the policy's tasks from its next episode on; member: (n, T) bool."""
    for env, mine in zip(envs.envs, member):
        env.unwrapped.allowed = np.flatnonzero(mine).tolist()


def report(args: Args, learners: TD3Learners, assignment: np.ndarray, folder: Path) -> None:
    """Print what the assigned policies reach, and the clusters; animate them if asked to."""
    names, generator = TASKS[args.env], np.random.default_rng(args.seed + 20_000)
    result = play(args, learners, assignment, np.arange(len(names)), generator, frames=args.capture_video)
    print_table(names, result)
    for policy in range(args.num_policies):
        mine = [name for name, chosen in zip(names, assignment) if chosen == policy]
        print(f"  policy {policy}: {', '.join(mine) or 'none of its own (trains on all tasks)'}")
    if args.capture_video:
        save_animation(folder / "tasks.gif", [f"{name}: {policy}" for name, policy in zip(names, assignment)],
                       result["frames"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
def plot_assignment(path: Path, names: list[str], history: list, num_policies: int, label: str = "return") -> None:
    """The E-steps (the paper's Fig. 2, 3, 9, 10): a dot where a task is assigned to the panel's policy.

    Args:
        history: training steps, assignment (T,) and return by the assigned policy (T,) of each E-step.
    """
    steps, assignment, returns = (np.array(column) for column in zip(*history))
    figure = Figure(figsize=(9, 1 + 1.6 * num_policies), layout="constrained")
    axes = figure.subplots(num_policies, 1, sharex=True, squeeze=False)[:, 0]
    for policy, axis in enumerate(axes):
        when, task = np.nonzero(assignment == policy)
        dots = axis.scatter(steps[when], task, c=returns[when, task], s=np.clip(1500 / len(steps), 6, 60),
                            vmin=returns.min(), vmax=returns.max())
        axis.grid(axis="y", linewidth=0.3)
        axis.set_axisbelow(True)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set(ylabel=f"policy {policy}", ylim=(len(names) - 0.5, -0.5))
    axes[-1].set_xlabel("training steps, summed over policies")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.colorbar(dots, ax=axes, label=label)
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


MAY_CHANGE = {"total_timesteps", "device", "eval_every", "checkpoint_every", "capture_video", "runs_dir", "resume",
              "evaluate"}                                              # between a run and its continuation


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
