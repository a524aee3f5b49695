# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "mujoco==3.3.0", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0", "metaworld==3.1.1",
# ]
# ///
"""Q-switch Mixture of Policies (QMP) on Soft Actor-Critic: tasks share behaviour, and nothing else.

Zhang, Jain, Hwang, Sun, Lim: "Efficient Multi-Task Reinforcement Learning via Selective Behavior Sharing", 2023,
arXiv:2302.00671. Every task has its own SAC learner. At each environment step of task i all policies propose an action
and the critic of task i picks the one that is executed: a task borrows another's behaviour where, by its own judgement,
that pays. Training is plain SAC on task i's own data, so a bad loan costs samples and biases nothing.

    Q-switch, behaviour policy (Sec. 4)      propose_actions, q_switch
    soft policy evaluation / improvement     soft_target, critic_loss, actor_loss, temperature_loss, update
    Divide-and-Conquer baseline              gaussian_kl, pairwise_kl, distill

Differences from the paper, each explained in docs/qmp_sac.md:
1. ReLU instead of tanh units, as in the authors' code (--activation tanh for the paper's table).
2. Exactly --train-every steps per task and round, all tasks in lock-step; the authors' sampler collects whole episodes
   and so favours low task indices once some tasks end early.
3. The Q-switch scores the sampled actions with min(Q1, Q2), as the paper's text has it; the authors' code scores mean
   actions with Q1 alone and executes a fresh sample (--switch-action mean --switch-q q1).
4. The shared baselines draw the same number of transitions of each task for a batch, and keep 1e6 of each.
5. 1M environment steps by default instead of 12M in the maze (--total-timesteps 12_000_000).
6. The reacher's shoulder motor is twice as strong, as the official one cannot hold the arm (--reacher-model official);
   success there means all three stages.

    python qmp_sac.py                                     # the ten-task maze, QMP
    python qmp_sac.py --method separated --seed 2         # ten independent learners
    python qmp_sac.py --env reacher --total-timesteps 500_000
    python qmp_sac.py --env metaworld --capture-video     # a door and a drawer on one table
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
import matplotlib
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
PRESETS = {  # the paper's Table 1 and appendix; a setting left at None takes its value from here
    "maze": dict(learning_starts=3_000, train_every=600, gradient_steps=100, batch_size=256, lr=3e-4, hidden_size=256,
                 kl_weight=0.0, mixture_warmup=0),
    "reacher": dict(learning_starts=10_000, train_every=200, gradient_steps=200, batch_size=32, lr=3e-4,
                    hidden_size=256, kl_weight=0.0, mixture_warmup=0),      # authors' code; see --reacher-preset
    "metaworld": dict(learning_starts=10_000, train_every=500, gradient_steps=50, batch_size=256, lr=1.5e-3,
                      hidden_size=256, kl_weight=0.0, mixture_warmup=0),
}
REACHER_PAPER = dict(train_every=1_000, gradient_steps=100)
METHOD_PRESETS = {  # width 834 gives shared networks about as many parameters as ten networks of width 256 have
    ("maze", "shared"): dict(hidden_size=834), ("maze", "shared-multihead"): dict(hidden_size=834),
    ("maze", "qmp-multihead"): dict(hidden_size=834, mixture_warmup=100),
    ("maze", "dnc"): dict(kl_weight=1e-3), ("maze", "dnc-reg"): dict(kl_weight=1e-4),
    ("reacher", "shared"): dict(hidden_size=600), ("reacher", "shared-multihead"): dict(hidden_size=512, lr=1e-3),
    ("reacher", "qmp-multihead"): dict(hidden_size=512, lr=1e-3),
    ("reacher", "dnc"): dict(kl_weight=1e-3), ("reacher", "dnc-reg"): dict(kl_weight=1e-3),
    ("metaworld", "shared"): dict(hidden_size=512, lr=1e-3),
    ("metaworld", "shared-multihead"): dict(hidden_size=512, lr=1e-3),          # the paper reports none: as `shared`
    ("metaworld", "qmp-multihead"): dict(hidden_size=512, lr=1e-3),
    ("metaworld", "dnc"): dict(kl_weight=1e-3), ("metaworld", "dnc-reg"): dict(kl_weight=1e-3),
}
TIED_LAYERS = {"shared": (0, 1, 2), "shared-multihead": (0, 1), "qmp-multihead": (0, 1)}    # other methods share none


@dataclass
class Args:
    env: Literal["maze", "reacher", "metaworld"] = "maze"
    """task family; each task of the family is one sub-environment"""
    method: Literal["qmp", "qmp-own", "separated", "shared", "qmp-uniform", "qmp-domain", "shared-multihead", "qmp-multihead",
                    "dnc", "dnc-reg"] = "qmp"
    """the paper's method, a baseline or an ablation (docs/qmp_sac.md says what each one is)"""
    tasks: tuple[int, ...] | None = None
    """indices of the tasks to train on, such as 0 4 8; None takes all of the family"""
    seed: int = 1
    """seeds every generator: networks, environments, replay, exploration"""
    total_timesteps: int = 1_000_000
    """environment steps, summed over tasks"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes cuda if present, else cpu"""
    eval_every: int = 60_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes per task and evaluation: deterministic policy, separate environments, own generators"""
    eval_mixture: bool = False
    """also evaluate the behaviour policy (columns mixture/...): what task i could do with the help of the others"""
    checkpoint_every: int = 120_000
    """environment steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM"""
    runs_dir: Path = Path("runs")
    """where run folders go"""
    resume: Path | None = None
    """run folder to go on from, to the same or a larger --total-timesteps"""
    evaluate: Path | None = None
    """run folder to load and evaluate; trains nothing and writes nothing but pictures asked for"""
    capture_video: bool = False
    """after training or with --evaluate: one animated picture of all tasks side by side"""

    reacher_model: Literal["strong", "official"] = "strong"
    """arm with a shoulder motor that can hold it (gear 20), or the authors' (gear 10), which cannot at some goals"""
    reacher_reward: Literal["code", "paper"] = "code"
    """reward of the authors' code, or the paper's description with a bonus of 1 per goal"""
    reacher_preset: Literal["code", "paper"] = "code"
    """rounds of 200 steps and 200 updates per task (authors' code), or of 1000 and 100 (the paper's table)"""

    switch_action: Literal["sample", "mean"] = "sample"
    """action that the Q-switch scores: each policy's sample, which is executed (paper), or its mean (authors' code)"""
    switch_q: Literal["min", "q1"] = "min"
    """critic that scores: the smaller of the twins, or the first alone (authors' code)"""
    switch_entropy: bool = False
    """add each policy's entropy to its score, as the later version of the paper does: Q_i(s, a_j) - alpha_i log pi_j"""
    mixture_warmup: int | None = None
    """rounds after the first fill with the own policy, before the mixture acts; None: 100 for qmp-multihead in the
    maze, else 0"""
    learning_starts: int | None = None
    """transitions per task, after which the first full round ends with updates; None: the preset of --env"""
    train_every: int | None = None
    """environment steps per task between two rounds of updates; None: the preset of --env"""
    gradient_steps: int | None = None
    """updates per task in a round; networks that T tasks share make T times as many; None: the preset of --env"""
    batch_size: int | None = None
    """transitions per task and update; of all tasks together where they share networks; None: the preset of --env"""
    buffer_size: int = 1_000_000
    """replay capacity per task, transitions"""
    hidden_size: int | None = None
    """width of the two hidden layers; None: 256, or more for networks that all tasks share (834 in the maze)"""
    activation: Literal["relu", "tanh"] = "relu"
    """hidden units: relu (authors' code) or tanh (paper)"""
    lr: float | None = None
    """Adam step size of policies, critics and temperatures; None: the preset of --env"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak coefficient: the share of the online critics that enters the targets at each update"""
    kl_weight: float | None = None
    """weight of the KL to every other task's policy, paper: beta; None: 1e-3, or 1e-4 for dnc-reg in the maze"""
    distill_every: int | None = None
    """environment steps between two distillations (dnc); None: a tenth of the run as it was started"""
    distill_steps: int = 500
    """minibatches per distillation"""
    distill_target: Literal["replay", "policy"] = "replay"
    """what the common policy imitates: replayed actions (authors' code), or each task's policy on its own states"""

    def __post_init__(self):
        preset = PRESETS[self.env] | METHOD_PRESETS.get((self.env, self.method), {})
        if self.env == "reacher" and self.reacher_preset == "paper":
            preset |= REACHER_PAPER
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.distill_every is None:
            self.distill_every = -(-self.total_timesteps // 10)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "train_every",
                     "gradient_steps", "batch_size", "buffer_size", "hidden_size", "distill_every", "distill_steps",
                     "learning_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("kl_weight", "mixture_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "gamma", "tau"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.method == "qmp-domain" and self.env != "reacher" and not (self.resume or self.evaluate):
            raise ValueError("--method qmp-domain knows how the reacher's tasks are related; use it with --env reacher")
        family = range(len(TASKS[self.env]))
        if self.tasks is not None and (not self.tasks or sorted(set(self.tasks) & set(family)) != sorted(self.tasks)):
            raise ValueError(f"--tasks takes different indices from 0 to {family[-1]} for --env {self.env}, "
                             f"got {' '.join(map(str, self.tasks)) or 'none'}")
        if self.method in TIED_LAYERS and self.batch_size < len(self.tasks or family):
            raise ValueError(f"--batch-size {self.batch_size} holds less than one transition per task; "
                             f"use at least {len(self.tasks or family)}")


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
MAZE = ("############", "#....#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#", "#..#.#.....#",
        "##.#.#.#.###", "#..#...#...#", "############")    # D4RL's large maze; row = x axis, column = y axis
MAZE_TASKS = [((1, 3), (5, 8)), ((1, 10), (2, 4)), ((4, 1), (1, 7)), ((7, 4), (4, 10)), ((1, 3), (7, 4)),
              ((1, 7), (7, 10)), ((5, 4), (7, 9)), ((7, 1), (2, 6)), ((1, 2), (3, 10)), ((7, 2), (6, 8))]  # start, goal
TASKS = {"maze": [f"task{i}" for i in range(10)], "reacher": [f"task{i}" for i in range(5)],
         "metaworld": ["door-open", "door-close", "drawer-open", "drawer-close"]}
HORIZON = {"maze": 600, "reacher": 200, "metaworld": 500}


@cache
def maze_model() -> mujoco.MjModel:
    """The point mass in D4RL's large maze. Cell (row, col) has its centre at world (row + 1, col + 1)."""
    walls = "".join(f'<geom type="box" pos="{row + 1} {col + 1} 0" size=".5 .5 .2"/>'
                    for row, line in enumerate(MAZE) for col, cell in enumerate(line) if cell == "#")
    return mujoco.MjModel.from_xml_string(f"""
    <mujoco>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default>
        <geom condim="1" margin=".002" friction=".5 .1 .1" contype="2" conaffinity="1" density="1000"/>
        <joint type="slide" damping="1" limited="false"/>
        <motor gear="100" ctrllimited="true" ctrlrange="-1 1"/>
      </default>
      <worldbody>
        <geom type="plane" pos="0 0 -.1" size="40 40 .25" contype="1" conaffinity="0"/>
        {walls}
        <body name="particle" pos="1.2 1.2 0">
          <geom type="sphere" size=".1" contype="1"/>
          <joint name="x" axis="1 0 0"/>
          <joint name="y" axis="0 1 0"/>
        </body>
      </worldbody>
      <actuator><motor joint="x"/><motor joint="y"/></actuator>
    </mujoco>""")


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


class MazeEnv(SavableEnv):
    """One task of the maze: push a point mass (4.19 kg) from `start` to within 0.5 m of `goal`.

    Observation (4,): position and velocity [m, m/s], without the goal. Action (2,): force / 100 N, clipped to +-1.
    Reward exp(-distance) - 1 is below 0 at every step, so reaching the goal, which ends the episode, is what pays.
    """
    max_speed = 5.0                                       # m/s along each axis, enforced before each simulation step

    def __init__(self, start: tuple[int, int], goal: tuple[int, int]):
        self.model, self.data = maze_model(), mujoco.MjData(maze_model())
        self.start, self.goal = np.array(start, float), np.array(goal, float)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.start + self.np_random.uniform(-0.1, 0.1, 2)
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        return self._obs(), {"success": False}

    def step(self, action):
        self.data.ctrl[:] = np.clip(action, -1.0, 1.0)
        self.data.qvel[:] = np.clip(self.data.qvel, -self.max_speed, self.max_speed)
        mujoco.mj_step(self.model, self.data)
        distance = float(np.linalg.norm(self.data.qpos - self.goal))
        success = distance <= 0.5
        return self._obs(), math.exp(-distance) - 1.0, success, False, {"success": success}

    def _obs(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel]).astype(np.float32)

    def render(self, scale: int = 16) -> np.ndarray:
        """Seen from above, rows downwards, uint8 RGB: walls, the goal's disc and the point mass."""
        image = np.where(np.array([list(line) for line in MAZE])[..., None] == "#", 70, 245).astype(np.uint8)
        image = image.repeat(scale, 0).repeat(scale, 1).repeat(3, 2)
        row, col = np.indices(image.shape[:2]) / scale - 0.5 - 0.2   # pixel -> qpos, whose origin is 0.2 off-centre
        for centre, radius, colour in ((self.goal, 0.5, (110, 190, 120)), (self.data.qpos, 0.2, (200, 50, 50))):
            image[(row - centre[0]) ** 2 + (col - centre[1]) ** 2 <= radius**2] = colour
        return image


REACHER_LINKS = (  # body, position, quaternion, mass, its centre and frame, inertia, joint axis, range, shape; radius
    ("link_1", "0 0 .1535", "0 0 1 0", .613151, "-1.14317e-6 .0102141 -.0637045", ".702792 .0778988 -.0778994 .702813",
     ".00149348 .00144012 .000401632", "0 0 -1", "-.8 .8", ""),
    ("link_2", "0 0 -.1185", "0 0 .707107 .707107", 1.85031, "0.206657 -1.55e-7 -.030675", "1 0 0 0",
     ".0402753 .0398125 .00121953", "0 0 1", "-1.5 .7", "0 0 0 .41 0 0;.04"),
    ("link_3", ".41 0 0", "0 .707107 .707107 0", .70372, ".0847979 -1.18e-7 -.020283",
     "2.338e-5 .694869 1.997e-5 .719136", ".00386732 .00373181 .000358773", "0 0 -1", "-.698132 .698132",
     "0 0 0 .207 0 -.011;.035"),
    ("link_4", ".207 0 -.01125", "0 .707107 0 -.707107", .227408, ".00914824 4.5e-8 -.0370941",
     ".971237 -1.93e-5 -.238115 3.24e-5", ".000176463 .00017225 .000108303", "0 0 -1", "-.698132 .698132",
     "0 0 0 .0343 0 -.0659;.03"),
    ("link_5", ".0343 0 -.06588", ".887011 0 -.461749 0", .227408, ".00914824 4.5e-8 -.0370941",
     ".971237 -1.93e-5 -.238115 3.24e-5", ".000176463 .00017225 .000108303", "0 0 -1", "-.698132 .698132",
     "0 0 0 .0343 0 -.0659;.03"),
    ("hand", ".0343 0 -.06588", ".627211 -.326506 -.326506 .627211", .58074, ".0036132 -6.22e-5 -.0583749",
     ".669114 -.237618 -.23799 .66271", ".000817146 .000671192 .000606807", "0 0 -1", "-.698132 .698132",
     "0 0 -.06;.05"))
REACHER_GOALS = np.array([(0.2, 0.3, 0.5), (0.3, 0.0, 0.3), (0.4, -0.3, 0.4), (0.4, 0.3, 0.2)])    # metres, world
REACHER_TASKS = ((0, 1, 2), (0, 1, 3), (1, 3, 2), (1, 2, 0), None)     # order of the goals; None: stay at the start
DOMAIN_WEIGHTS = torch.tensor([[3, 2, 0, 1, 0], [2, 3, 1, 0, 0], [0, 1, 3, 1, 0], [1, 0, 1, 3, 0], [0, 0, 0, 0, 1.0]])


@cache
def reacher_model(variant: str) -> mujoco.MjModel:
    """A Jaco arm of six joints without fingers: official masses, capsules instead of the official meshes.

    "official" has a shoulder motor (joint 2) too weak to hold the arm at some goals; "strong" doubles its gear to 20.
    """
    arm = ""
    for name, pos, quat, mass, com, com_quat, inertia, axis, limits, shape in reversed(REACHER_LINKS):
        place, _, size = shape.partition(";")
        kind = 'type="capsule" fromto' if place.count(" ") == 5 else 'type="sphere" pos'
        geom = f'<geom {kind}="{place}" size="{size}" mass="0"/>' if shape else ""
        start = ' ref="-2.8"' if name == "link_5" else ""             # outside its limits, as in the official model
        arm = f"""<body name="{name}" pos="{pos}" quat="{quat}">
          <inertial pos="{com}" quat="{com_quat}" mass="{mass}" diaginertia="{inertia}"/>
          <joint name="{name}" axis="{axis}" range="{limits}"{start}/>{geom}{arm}</body>"""
    gears = (5, 20 if variant == "strong" else 10, 10, 10, 10, 10)
    motors = "".join(f'<motor joint="{link[0]}" gear="{gear}"/>' for link, gear in zip(REACHER_LINKS, gears))
    return mujoco.MjModel.from_xml_string(f"""
    <mujoco>
      <compiler angle="radian"/>
      <option timestep="0.01" gravity="0 0 -9.8" iterations="10" integrator="Euler"/>
      <default>
        <joint type="hinge" limited="true" damping="0.5" armature="0.01"/>
        <geom margin="0.001" contype="1" conaffinity="0"/>
        <motor ctrllimited="true" ctrlrange="-1 1"/>
      </default>
      <worldbody>
        <geom type="plane" size="5 5 1" contype="1" conaffinity="1"/>
        <body name="base" pos="0 0 .25">{arm}</body>
      </worldbody>
      <actuator>{motors}</actuator>
    </mujoco>""")


class ReacherEnv(SavableEnv):
    """One task of the multistage reacher: touch three goals in order (tasks 0 to 3) or hold the hand still (task 4).

    Observation (15,): joint angles and velocities [rad, rad/s], and which goal is next, one-hot; where the goals are is
    not observed. Action (6,): joint torques as a share of the motors' limits. A goal is touched within 5 cm.
    """
    progress = ("stage", "held", "any_touch")
    hold_still = np.array([0.410, 0.119, 0.239])                      # the hand at the start [m]

    def __init__(self, task: int, variant: str, reward: str):
        self.model, self.data = reacher_model(variant), mujoco.MjData(reacher_model(variant))
        self.task, self.order, self.reward_kind, self.stage, self.held = task, REACHER_TASKS[task], reward, 0, 0
        self.any_touch = 0
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (15,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += self.np_random.uniform(-0.01, 0.01, 6)
        self.data.qvel[:] = self.np_random.uniform(-0.001, 0.001, 6)
        mujoco.mj_forward(self.model, self.data)
        self.stage = self.held = self.any_touch = 0
        return self._obs(), {"success": False, "stages": 0, "touched": 0}

    def step(self, action):
        action = np.clip(action, -1.0, 1.0)
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, nstep=4)
        goal = self.hold_still if self.order is None else REACHER_GOALS[self.order[self.stage]]
        distance = float(np.linalg.norm(self.data.body("hand").xpos - goal))
        touched = distance < 0.05
        if self.order is None:
            self.held += touched
            self.stage = self.held // 30                   # 90 steps near the start, not necessarily in a row
        else:
            self.stage += touched
        self.any_touch = int(self.any_touch or touched)                # what the authors' code counts as success
        done = self.stage == 3
        reward = self._reward(action, distance, touched)
        return self._obs(), reward, done, False, {"success": done, "stages": self.stage, "touched": self.any_touch}

    def _reward(self, action: np.ndarray, distance: float, touched: bool) -> float:
        """The authors' code ("code"), or what the paper says in words ("paper")."""
        effort = 0.01 * float(np.square(action).sum())
        if self.reward_kind == "paper":
            return touched * (self.order is not None) - effort * (self.task < 3) - distance * (self.task != 3)
        effort += 0.001 * float(np.abs(self.data.qvel).mean()) + 1e-5 * float(np.abs(self.data.qacc).mean())
        time = 0.4 * (3 - self.stage)                                 # paid at every step until the last goal
        return (-distance - time, -distance + 200 * touched - 2, -distance - time, -time, -distance)[self.task] - effort

    def _obs(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel, np.arange(3) == self.stage]).astype(np.float32)

    def render(self, size: int = 160) -> np.ndarray:
        """The arm seen from the front and above, 1.3 m wide: next goal in green, hand in red."""
        def pixel(point):
            x, y, z = np.asarray(point) * size / 1.3
            return size / 2 - y + 0.4 * x, 0.75 * size - z + 0.4 * x
        picture = Image.new("RGB", (size, size), "white")
        draw, goal = ImageDraw.Draw(picture), self.hold_still
        if self.order is not None:
            goal = REACHER_GOALS[self.order[min(self.stage, 2)]]
        draw.line([pixel(point) for point in self.data.xpos[1:]], fill="black", width=4)
        for point, radius, colour in ((goal, 0.05, (110, 190, 120)), (self.data.xpos[-1], 0.03, (200, 50, 50))):
            (x, y), r = pixel(point), radius * size / 1.3
            draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
        return np.asarray(picture)


@cache
def door_drawer_model() -> mujoco.MjModel:
    """Meta-World's Sawyer arm at a table with its drawer and its door; the drawer comes first, as its tasks ask."""
    from metaworld.asset_path_utils import full_V3_path_for
    assets = Path(full_V3_path_for("sawyer_xyz/sawyer_drawer.xml")).parent.parent
    part = f'<include file="{assets}/objects/assets/'
    fingers = "".join(f'<position joint="{joint}" kp="400" ctrllimited="true" ctrlrange="-1 1" user="1"/>'
                      for joint in ("r_close", "l_close"))
    return mujoco.MjModel.from_xml_string(f"""
    <mujoco>
      <compiler meshdir="{assets}/sawyer_xyz" texturedir="{assets}/sawyer_xyz"/>
      <include file="{assets}/scene/basic_scene.xml"/>
      {part}drawer_dependencies.xml"/>{part}doorlock_dependencies.xml"/>{part}xyz_base_dependencies.xml"/>
      <worldbody>
        {part}xyz_base.xml"/>
        <body name="drawer" pos=".4 .9 0">{part}drawer.xml"/></body>
        <body name="door" pos="-.1 .9 .15">{part}doorlockB.xml"/></body>
        <site name="goal" size=".02" rgba="0 .8 0 1"/>
      </worldbody>
      <actuator>{fingers}</actuator>
      <equality><weld body1="mocap" body2="hand" solref=".02 1"/></equality>
    </mujoco>""")


class DoorDrawerEnv(gym.Env):
    """One of four tasks at a table with a door and a drawer: open or close one of them, whatever the other is doing.

    A Meta-World v3 task, with its control and reward, put into the scene with both objects. The one that is to be
    moved starts anywhere in a range of 10 cm, the other in its place, closed. Success is kept for the episode.
    Observation (21,): hand [m], finger gap [0, 1], position and rotation of the drawer's and the door's handle, goal.
    Action (4,): displacement of the hand / 1 cm, and the closing of the fingers. The simulator's state cannot be saved.
    """
    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, task: int):
        from metaworld import envs
        stock = (envs.SawyerDoorEnvV3, envs.SawyerDoorCloseEnvV3, envs.SawyerDrawerOpenEnvV3,
                 envs.SawyerDrawerCloseEnvV3)[task]

        class InOurScene(stock):
            """The stock task with the model of the table in place of its own."""

            def _initialize_simulation(self):
                model = copy.copy(door_drawer_model())                # a copy, as each episode moves an object in it
                return model, mujoco.MjData(model)

        self.stock, self.is_door = InOurScene(), task < 2
        low, high = ((-0.1, 0.85, 0.15), (0.0, 0.95, 0.15)) if self.is_door else ((0.3, 0.9, 0.0), (0.4, 0.9, 0.0))
        self.stock._random_reset_space = gym.spaces.Box(np.array(low), np.array(high), dtype=np.float64)
        self.stock._freeze_rand_vec, self.stock.seeded_rand_vec, self.stock._set_task_called = False, True, True
        self.stock.hand_init_pos = np.array([-0.6 if task == 1 else 0.0, 0.6, 0.2])
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (21,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.stock.np_random, self.success = self.np_random, False    # Meta-World's own reset ignores the seed
        mujoco.mj_resetData(self.stock.model, self.stock.data)        # closes both
        self.stock.reset_model()
        mujoco.mj_forward(self.stock.model, self.stock.data)          # or the drawer is seen where it was before
        return self._obs(), {"success": False}

    def step(self, action):
        action = np.clip(action, -1.0, 1.0)
        self.stock.set_xyz_action(action[:3])
        self.stock.do_simulation([action[3], -action[3]], self.stock.frame_skip)
        mujoco.mj_forward(self.stock.model, self.stock.data)
        obs = self._obs()
        seen = obs.astype(np.float64)
        if self.is_door:                                              # where the stock reward looks for its object
            seen[4:11] = seen[11:18]
        reward, info = self.stock.evaluate_state(seen, action)
        self.success |= bool(info["success"])
        return obs, float(reward), False, False, {"success": self.success}

    def _obs(self) -> np.ndarray:
        data, door_quat = self.stock.data, np.empty(4)
        gap = np.linalg.norm(data.body("rightclaw").xpos - data.body("leftclaw").xpos) / 0.1
        drawer, handle = data.body("drawer_link"), data.geom("handle")
        mujoco.mju_mat2Quat(door_quat, handle.xmat)
        return np.concatenate([data.body("hand").xpos, [min(gap, 1.0)], drawer.xpos + (0.0, -0.16, 0.0), drawer.xquat,
                               handle.xpos, np.roll(door_quat, -1), self.stock._target_pos]).astype(np.float32)

    def render(self) -> np.ndarray:
        return ray_cast(self.stock.model, self.stock.data, (0.1, 0.75, 0.12), 1.4, 105, -38)


def make_env(args: Args, task: int) -> gym.Env:
    """Task `task` of the family, with its time limit as truncation and with the statistics of its episodes."""
    if args.env == "maze":
        env = MazeEnv(*MAZE_TASKS[task])
    elif args.env == "reacher":
        env = ReacherEnv(task, args.reacher_model, args.reacher_reward)
    else:
        env = DoorDrawerEnv(task)
    env = gym.wrappers.TimeLimit(env, HORIZON[args.env])
    return gym.wrappers.RecordEpisodeStatistics(env)


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


class Learners(nn.Module):
    """All that SAC trains for T tasks: policies, twin critics with their targets, temperatures.

    Independent learners are stacked: one Adam over (T, ...) tensors is T independent Adams, since Adam acts on each
    number by itself, and the sum of per-task losses gives each task its own gradient.
    """

    def __init__(self, args: Args, num_tasks: int, obs_size: int, action_size: int):
        super().__init__()
        tied = TIED_LAYERS.get(args.method, ())
        sizes = (num_tasks, obs_size, action_size, (args.hidden_size,) * 2, tied, args.activation)
        self.actor, self.qf1, self.qf2 = Actor(*sizes), Critic(*sizes), Critic(*sizes)
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.log_alpha = nn.Parameter(torch.zeros(1 if len(tied) == 3 else num_tasks))
        self.target_entropy = -float(action_size)
        if args.method == "dnc":                                       # the common policy that is distilled into
            self.centroid = copy.deepcopy(self.actor)
            for param in self.centroid.parameters():
                param.data = param.data[:1].clone()                    # starts as the first policy

    def make_optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """One Adam each for policies, critics and temperatures, and for the common policy of dnc."""
        params = {"actor": self.actor.parameters(), "alpha": [self.log_alpha],
                  "critic": [*self.qf1.parameters(), *self.qf2.parameters()]}
        if hasattr(self, "centroid"):
            params["centroid"] = self.centroid.parameters()
        return {name: torch.optim.Adam(p, lr=lr, fused=True) for name, p in params.items()}


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


def propose_actions(actor: Actor, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every policy's sample and mean action in every task's state, (T states, T policies, A) each.

    The third output is the samples' log-probability under their own policy, (T states, T policies).

    Args:
        obs: one observation per task, (T, O).
    """
    mean, log_std = actor(obs.expand(len(obs), *obs.shape))            # (T policies, T states, A)
    actions, log_prob = squash(mean, log_std, torch.randn_like(mean))
    return actions.transpose(0, 1), mean.tanh().transpose(0, 1), log_prob.transpose(0, 1)


def q_switch(obs: Tensor, proposals: Tensor, qf1: Critic, qf2: Critic | None, bonus: Tensor | float = 0.0) -> Tensor:
    """Index of the proposal that each task's own critic likes best (Sec. 4, Q-switch); ties go to the lowest index.

    Args:
        obs: one observation per task, (T, O).
        proposals: candidate actions, row i for task i, (T, J, A).
        qf2: twin whose smaller value counts; None scores with `qf1` alone.
        bonus: what is added to the scores, (T, J).
    Returns:
        (T,) int64 in [0, J).
    """
    obs = obs[:, None].expand(-1, proposals.shape[1], -1)              # (T, J, O)
    scores = qf1(obs, proposals)                                       # (T, J): Q_i(s_i, a_j)
    if qf2 is not None:
        scores = torch.min(scores, qf2(obs, proposals))
    return (scores + bonus).argmax(dim=1)


@torch.no_grad()
def behave(args: Args, learners: Learners, obs: Tensor, own_policy: bool) -> tuple[Tensor, Tensor]:
    """Actions to execute, (T, A), and the policy each one came from, (T,): the only thing that QMP changes in SAC."""
    tasks = torch.arange(len(obs), device=obs.device)
    if own_policy or not args.method.startswith("qmp"):
        mean, log_std = learners.actor(obs[:, None])                   # (T, 1, A)
        return squash(mean, log_std, torch.randn_like(mean))[0].squeeze(1), tasks
    samples, means, log_prob = propose_actions(learners.actor, obs)
    if args.method == "qmp-own":                                       # the control: T samples of the task's own policy
        mean, log_std = learners.actor(obs[:, None].expand(-1, len(obs), -1))              # (T, T samples, A)
        samples = squash(mean, log_std, torch.randn_like(mean))[0]
        return samples[tasks, q_switch(obs, samples, learners.qf1, learners.qf2)], tasks
    if args.method == "qmp-uniform":
        chosen = torch.randint(len(obs), (len(obs),), device=obs.device)
    elif args.method == "qmp-domain":                                  # by hand: how many stretches two tasks share
        rows = DOMAIN_WEIGHTS if args.tasks is None else DOMAIN_WEIGHTS[list(args.tasks)][:, list(args.tasks)]
        chosen = torch.multinomial(rows.to(obs.device), 1).squeeze(1)
    else:
        scored = samples if args.switch_action == "sample" else means
        entropy = -learners.log_alpha.exp()[:, None] * log_prob if args.switch_entropy else 0.0
        chosen = q_switch(obs, scored, learners.qf1, learners.qf2 if args.switch_q == "min" else None, entropy)
    return samples[tasks, chosen], chosen


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


def gaussian_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians, by dimension [nats]; squashing both by the same tanh would not change it."""
    log_ratio = 2 * (log_std_p - log_std_q)
    return 0.5 * (log_ratio.exp() + ((mean_p - mean_q) / log_std_q.exp()).square() - 1 - log_ratio)


def pairwise_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(pi_j || pi_i), averaged over states and action dimensions (regulariser of Divide-and-Conquer).

    Args:
        mean, log_std: all policies in the same states, (T, S, A).
    Returns:
        (T, T), entry (i, j). Gradients reach policy i only: policy j is a constant in i's loss.
    """
    return gaussian_kl(mean.detach()[None], log_std.detach()[None], mean[:, None], log_std[:, None]).mean((2, 3))


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


def update(args: Args, learners: Learners, optimizers: dict, batch: list[Tensor]) -> dict[str, Tensor]:
    """One SAC step for every task: critics, policies, temperatures, targets. Returns the losses, (T,) each.

    Losses are summed over tasks: independent learners get their own gradients, shared layers the sum.
    """
    obs, actions, rewards, next_obs, terminations = batch
    alpha = learners.log_alpha.detach().exp()[:, None]                 # (T, 1), or (1, 1) if all layers are shared

    with torch.no_grad():
        mean, log_std = learners.actor(next_obs)
        next_actions, next_log_prob = squash(mean, log_std, torch.randn_like(mean))
        next_q = torch.min(learners.qf1_target(next_obs, next_actions), learners.qf2_target(next_obs, next_actions))
        target = soft_target(rewards, terminations, next_q, next_log_prob, alpha, args.gamma)
    q_loss = critic_loss(learners.qf1(obs, actions), learners.qf2(obs, actions), target)
    step(optimizers["critic"], q_loss)

    mean, log_std = learners.actor(obs)
    pi, log_prob = squash(mean, log_std, torch.randn_like(mean))
    with frozen(learners.qf1, learners.qf2):
        pi_loss = actor_loss(torch.min(learners.qf1(obs, pi), learners.qf2(obs, pi)), log_prob, alpha)
    losses = {"critic": q_loss, "actor": pi_loss}
    if args.method in ("dnc", "dnc-reg"):
        states = obs[:, :max(1, obs.shape[1] // len(obs))].flatten(0, 1)       # every task's, (S, O)
        losses["kl"] = pairwise_kl(*learners.actor(states.expand(len(obs), *states.shape))).sum(1)
        pi_loss = pi_loss + args.kl_weight * losses["kl"]
    step(optimizers["actor"], pi_loss)

    step(optimizers["alpha"], temperature_loss(learners.log_alpha, log_prob.detach(), learners.target_entropy))

    with torch.no_grad():
        for online, targets in ((learners.qf1, learners.qf1_target), (learners.qf2, learners.qf2_target)):
            for param, target_param in zip(online.parameters(), targets.parameters()):
                target_param.lerp_(param, args.tau)                            # keeps 1 - tau of the old target
    return {name: loss.detach() for name, loss in losses.items()}


def step(optimizer: torch.optim.Optimizer, losses: Tensor) -> None:
    """Descend the sum of the tasks' losses, (T,)."""
    optimizer.zero_grad()
    losses.sum().backward()
    optimizer.step()


def distill(args: Args, learners: Learners, optimizer: torch.optim.Optimizer, buffer: ReplayBuffer,
            rng: np.random.Generator) -> None:
    """Fit one policy to all tasks' behaviour and restart every policy from it (Divide-and-Conquer).

    The common policy and its `optimizer` live as long as the run. Nothing else of the learners changes.
    """
    num_tasks = len(buffer.data)
    for _ in range(args.distill_steps):
        obs, actions, *_ = buffer.sample(rng, max(1, args.batch_size // num_tasks))
        mean, log_std = learners.centroid(obs.flatten(0, 1)[None])              # (1, T * B, A)
        if args.distill_target == "replay":                            # maximum likelihood of the replayed actions
            raw = torch.atanh(actions.flatten(0, 1)[None].clamp(-1 + 1e-6, 1 - 1e-6))
            noise = (raw - mean) / log_std.exp()                      # with which `squash` draws just this action
            loss = -squash(mean, log_std, noise)[1].mean(1)
        else:                                                          # KL(pi_i || centroid) on task i's states
            with torch.no_grad():
                teacher_mean, teacher_log_std = (x.flatten(0, 1)[None] for x in learners.actor(obs))
            loss = gaussian_kl(teacher_mean, teacher_log_std, mean, log_std).mean((1, 2))
        step(optimizer, loss)
    with torch.no_grad():
        for param, common in zip(learners.actor.parameters(), learners.centroid.parameters()):
            param.copy_(common.expand_as(param))


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


def train(args: Args) -> Path | None:
    """Collect with the behaviour policy, update every learner, evaluate; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    device = pick_device(args.device)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)                             # replay indices
    task_ids = list(args.tasks or range(len(TASKS[args.env])))
    num_tasks, names = len(task_ids), [TASKS[args.env][task] for task in task_ids]
    envs = make_envs(args, task_ids)
    obs, _ = envs.reset(seed=args.seed)                                # (T, O); sub-environment i gets seed + i
    obs_size, action_size = obs.shape[1], envs.single_action_space.shape[0]

    learners = Learners(args, num_tasks, obs_size, action_size).to(device)
    optimizers = learners.make_optimizers(args.lr)

    def greedy(obs: np.ndarray) -> np.ndarray:
        """Each task's own policy without noise: nothing of another task is consulted."""
        with torch.no_grad():
            return learners.actor(torch.as_tensor(obs, device=device)[:, None])[0].tanh().squeeze(1).cpu().numpy()

    def mixture(obs: np.ndarray) -> np.ndarray:
        return behave(args, learners, torch.as_tensor(obs, device=device), own_policy=False)[0].cpu().numpy()

    if args.evaluate:
        learners.load_state_dict(load_checkpoint(args.evaluate)["learners"])
        evaluation = evaluate(args, task_ids, greedy, frames=args.capture_video)
        print_table(names, evaluation)
        if args.eval_mixture:
            print("behaviour policies:")
            print_table(names, evaluate(args, task_ids, mixture))
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
    recent = torch.zeros(num_tasks, num_tasks, dtype=torch.int64)      # steps of task i that policy j took ...
    counts = torch.zeros_like(recent)                                  # ... since the last evaluation, and before it
    if args.resume:
        learners.load_state_dict(state["learners"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        buffer.num_added = state["num_added"]
        buffer.data[:, :len(buffer)] = state["buffer"].to(device)
        counts, recent = state["counts"], state["recent"]
        obs = set_world(state["world"], envs, rng)
    run = Run(args, names, global_step, state["seconds"])
    losses = defaultdict(list)
    round_size, updates, batch_size = num_tasks * args.train_every, args.gradient_steps, args.batch_size
    if args.method in TIED_LAYERS:                                     # a batch of all tasks, and T times as many
        updates, batch_size = updates * num_tasks, batch_size // num_tasks
    warmup_end = num_tasks * args.learning_starts + args.mixture_warmup * round_size if args.mixture_warmup else 0
    first_update = (num_tasks * args.learning_starts // round_size + 1) * round_size
    if args.total_timesteps < first_update:
        print(f"--total-timesteps {args.total_timesteps:,} only fills the buffers: the first updates come at step "
              f"{first_update:,} (--learning-starts {args.learning_starts:,} for each task, and a full round)")

    def save() -> None:
        """Everything that the next step reads."""
        run.save(dict(
            global_step=global_step, learners=learners.state_dict(), counts=counts, recent=recent,
            optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            world=get_world(envs, obs, rng), num_added=buffer.num_added,
            buffer=buffer.data[:, :len(buffer)].clone().cpu()))       # a clone, or torch.save writes the empty part too

    if not args.resume:
        save()                                                         # from here on a killed run can be resumed

    while global_step < args.total_timesteps and not run.stop_signal:
        # Divide-and-Conquer: all policies restart from their common one -------------------------------------
        if args.method == "dnc" and global_step and crossed(global_step - num_tasks, global_step, args.distill_every):
            distill(args, learners, optimizers["centroid"], buffer, rng)

        # Act: in every task the policy that its own critic prefers ------------------------------------------
        actions, chosen = behave(args, learners, torch.as_tensor(obs, device=device), global_step < warmup_end)
        actions = actions.cpu().numpy()
        recent[range(num_tasks), chosen.cpu()] += 1

        # Step every task once, log what ended, store --------------------------------------------------------
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        previous_step, global_step = global_step, global_step + num_tasks
        for task, episode in finished_episodes(infos):
            run.add(f"tasks/{names[task]}", episode)
        buffer.add(obs, actions, rewards, true_next_obs(next_obs, infos), terminations)
        obs = next_obs

        # Update: plain SAC on every task's own data ---------------------------------------------------------
        new_round = crossed(previous_step, global_step, round_size)
        if new_round and global_step > num_tasks * args.learning_starts:
            for _ in range(updates):
                for name, loss in update(args, learners, optimizers, buffer.sample(rng, batch_size)).items():
                    losses[name].append(loss)
            means = {name: torch.stack(values).mean(0).cpu() for name, values in losses.items()}
            losses.clear()
            check_finite(global_step, means | dict(learners.named_parameters()))
            means["alpha"] = learners.log_alpha.detach().exp().cpu().expand(num_tasks)
            for name, per_task in means.items():
                run.add("losses", {name: per_task.mean().item()})
                run.add("losses", {f"{task}/{name}": value.item() for task, value in zip(names, per_task)})

        # Evaluate, log, save --------------------------------------------------------------------------------
        evaluate_now = crossed(previous_step, global_step, args.eval_every) or global_step >= args.total_timesteps
        if evaluate_now:
            evaluation = evaluate(args, task_ids, greedy)
            own = recent.diagonal() / recent.sum(1)
            columns = {f"{name}/own_share": share.item() for name, share in zip(names, own)}
            if "stages" in evaluation:
                columns |= {f"{name}/stages": stages.mean() for name, stages in zip(names, evaluation["stages"])}
                columns |= {f"{name}/touched": hits.mean() for name, hits in zip(names, evaluation["touched"])}
            if args.eval_mixture:
                helped = evaluate(args, task_ids, mixture)
                columns |= {"mixture/return": helped["returns"].mean(), "mixture/success": helped["successes"].mean()}
            run.add("method", {"own_share": own.mean().item()})
            run.log_evaluation(global_step, evaluation, columns)
            counts += recent
            recent.zero_()
        if new_round or evaluate_now:
            run.write(global_step)
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        evaluation = evaluate(args, task_ids, greedy, frames=args.capture_video)
        plot_mixture(run.dir / "mixture.png", counts, names)
        np.savetxt(run.dir / "mixture.csv", counts.numpy() / counts.sum(1, keepdim=True).numpy(), "%.6f", ",",
                   header=",".join(names))
        if args.env == "maze":
            plot_paths(run.dir / "paths.png", task_ids, names, evaluation["paths"])
        elif args.env == "reacher":
            plot_stages(run.dir, names)
        if args.capture_video:
            save_animation(run.dir / "tasks.gif", names, evaluation["frames"])
        print_table(names, evaluation)
    run.close()
    return run.dir


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
def plot_mixture(path: Path, counts: Tensor, names: list[str]) -> None:
    """Who borrows from whom: row i, column j is the share of task i's steps that policy j took (the paper's Fig. 5).

    Args:
        counts: steps of task i taken by policy j, (T, T). The diagonal, which would hide the rest, has its own panel.
    """
    share = (counts / counts.sum(1, keepdim=True)).numpy()
    own, lent = share.diagonal()[:, None], np.where(np.eye(len(names)), np.nan, share)
    figure = Figure(figsize=(2.5 + 0.75 * len(names), 1.2 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[len(names), 1])
    for axis, values, title in ((left, lent, "share of steps, against 1/T (white)"), (right, own, "own policy")):
        axis.imshow(values, vmin=0, vmax=2 / len(names), cmap="RdBu_r", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if axis is right or row != column:
                axis.text(column, row, f"{100 * value:.0f}%", ha="center", va="center", fontsize=8,
                          color="white" if abs(value * len(names) - 1) > 0.6 else "black")
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[])
    left.set_xticks(range(len(names)), names, rotation=45)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="policy that acted", ylabel="task that was acted in")
    figure.savefig(path, dpi=120)


def plot_stages(folder: Path, names: list[str]) -> None:
    """stages.png from metrics.csv: how many of the three stages of each task its evaluated policy completes."""
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    figure = Figure(figsize=(2.6 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        axis.fill_between(table["global_step"], table[f"{name}/stages"], alpha=0.4)
        axis.plot(table["global_step"], table[f"{name}/stages"])
        axis.set(title=name, xlabel="environment steps", ylim=(0, 3.05))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supylabel("stages completed")
    figure.savefig(folder / "stages.png", dpi=120)


def plot_paths(path: Path, task_ids: list[int], names: list[str], paths: list[np.ndarray]) -> None:
    """The first evaluation episode of each task, drawn into the maze: dot = start, star = goal."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    axis.imshow([[cell == "#" for cell in line] for line in MAZE], cmap="Greys", vmax=1.6)
    for i, (task, points) in enumerate(zip(task_ids, paths)):
        colour, goal = matplotlib.colormaps["tab10"](task), np.array(MAZE_TASKS[task][1]) + 0.2
        row, column = points[:, :2].T + 0.2                            # qpos is 0.2 off the cells' centres
        reached = math.dist((row[-1], column[-1]), goal) <= 0.5
        axis.plot(column, row, color=colour, linewidth=1.6, label=names[i] + ("" if reached else " (not reached)"))
        axis.plot(column[0], row[0], "o", color=colour)
        axis.plot(goal[1], goal[0], "*", color=colour, markersize=14, markeredgecolor="black", markeredgewidth=0.5)
    figure.legend(loc="outside right center", frameon=False)
    axis.set(xlabel="column", ylabel="row", title="paths of the evaluated policies: dot = start, star = goal")
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
