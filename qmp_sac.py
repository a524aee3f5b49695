# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "mujoco==3.3.0", "metaworld==3.1.1", "tyro==1.0.17", "pydantic==2.14.4",
#   "filelock==4.3.1", "imageio==2.38.1", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Q-switch Mixture of Policies (QMP) on Soft Actor-Critic: tasks share behaviour, and nothing else.

Zhang, Jain, Hwang, Sun, Lim: "Efficient Multi-Task Reinforcement Learning via Selective Behavior Sharing", 2023,
arXiv:2302.00671. Every task has its own SAC learner. At each step of task i all policies propose an action, and the
critic of task i picks the one that is executed: a task borrows another's behaviour where, by its own judgement, that
pays. Training is plain SAC on task i's own data, so a bad loan costs samples and biases nothing.

    behaviour policy, Q-switch (Sec. 4)                  behave
    soft policy evaluation and improvement               update
    Divide-and-Conquer baseline                          update, distill

Differences from the paper, each explained in docs/qmp_sac.md:
1. ReLU instead of tanh units, as in the authors' code; 1M steps by default instead of 12M in the maze.
2. Exactly --train-every steps per task and round, all tasks in lock-step. The authors' sampler collects whole episodes,
   tasks in turn, so that one that is not solved yet gets about twice the data and updates of a solved one.
3. The Q-switch scores the sampled actions by min(Q1, Q2), as the paper's text has it; the authors' code scores mean
   actions by Q1 and executes a fresh sample (--switch-action mean --switch-q q1).
4. Evaluated are each task's own policies; what the authors plot for QMP is the mixture (--eval-mixture).
5. The shared baselines draw the same number of transitions of each task for a batch, and keep 1e6 of each.
6. The reacher's shoulder motor is twice as strong, as the official one cannot hold the arm (--reacher-model official).
   Success there means all three stages; `touched`, one goal at any step, is what the authors' code calls success.
7. qmp-own is ours: the critic picks among samples of the own policy, to tell borrowing from picking.

    python qmp_sac.py                                     # the ten-task maze, QMP
    python qmp_sac.py --method separated --seed 2         # ten independent learners
    python qmp_sac.py --env reacher --total-timesteps 500_000
"""
from __future__ import annotations

import copy
import csv
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Literal

import imageio.v2 as imageio
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
TASKS = {"maze": tuple(f"task{i}" for i in range(10)), "reacher": tuple(f"task{i}" for i in range(5)),
         "metaworld": ("door-open", "door-close", "drawer-open", "drawer-close")}
SWITCH = dict(mixture_warmup=0.0, switch_action="sample", switch_q="min")
WIDE = dict(hidden_size=512, lr=1e-3)
PRESETS = {  # of an environment, a method, or both: the last that has a setting decides; what none has is refused
    "maze": dict(hidden_size=256, learning_starts=3_000, train_every=600, gradient_steps=100, batch_size=256, lr=3e-4),
    "reacher": dict(hidden_size=256, learning_starts=10_000, train_every=200, gradient_steps=200, batch_size=32,
                    lr=3e-4, reacher_model="strong"),
    "metaworld": dict(hidden_size=256, learning_starts=10_000, train_every=500, gradient_steps=50, batch_size=256,
                      lr=1.5e-3),
    "qmp": SWITCH, "qmp-multihead": SWITCH, "qmp-own": dict(mixture_warmup=0.0, switch_q="min"),
    "qmp-uniform": dict(mixture_warmup=0.0), "qmp-domain": dict(mixture_warmup=0.0),
    "dnc": dict(kl_weight=1e-3), "dnc-reg": dict(kl_weight=1e-3), "maze dnc-reg": dict(kl_weight=1e-4),
    # shared networks 834 wide have about as many parameters as ten networks of 256
    "maze shared": dict(hidden_size=834), "maze shared-multihead": dict(hidden_size=834),
    "maze qmp-multihead": dict(hidden_size=834, mixture_warmup=0.05),
    "reacher shared": dict(hidden_size=600), "reacher shared-multihead": WIDE, "reacher qmp-multihead": WIDE,
    "metaworld shared": WIDE, "metaworld shared-multihead": WIDE, "metaworld qmp-multihead": WIDE}
SHARED_LAYERS = {"shared": 3, "shared-multihead": 2, "qmp-multihead": 2}           # of three; other methods share none
MIXTURES = ("qmp", "qmp-multihead", "qmp-uniform", "qmp-domain")                   # where other tasks' policies act
STEPS = "environment steps, summed over tasks"
FIXED = {"env", "method", "tasks", "seed", "reacher_model", "hidden_size", "buffer_size"}       # of a run that goes on

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass
class Args:
    env: Literal["maze", "reacher", "metaworld"] = "maze"  # task family; decides, with the method, what is None below
    # the paper's method, a control, a baseline or an ablation: docs/qmp_sac.md says what each one is
    method: Literal["qmp", "qmp-own", "separated", "shared", "qmp-uniform", "qmp-domain", "shared-multihead",
                    "qmp-multihead", "dnc", "dnc-reg"] = "qmp"
    tasks: tuple[int, ...] = ()  # indices of the tasks to train on, such as 0 4 8; none takes all of the family
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive = 1_000_000     # environment steps, summed over tasks
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive = 60_000             # environment steps between evaluations
    eval_episodes: Positive = 10              # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive = 120_000      # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    eval_mixture: bool = False                # also evaluate the mixture, with mean actions: columns mixture/...
    reacher_model: Literal["strong", "official"] | None = None  # shoulder motor of gear 20, or the authors' 10
    switch_action: Literal["sample", "mean"] | None = None  # what the Q-switch scores; a sample is what is executed
    switch_q: Literal["min", "q1"] | None = None  # which critic: the smaller of the twins, or the first (code)
    mixture_warmup: Annotated[float, Field(ge=0, lt=1)] | None = None  # share of the run before the Q-switch acts
    learning_starts: Positive | None = None   # transitions per task before the first round of updates
    train_every: Positive | None = None       # environment steps per task between two rounds of updates
    gradient_steps: Positive | None = None    # updates per task and round, T times as many where networks are shared
    batch_size: Positive | None = None        # transitions per update, of a task, or of all where networks are shared
    buffer_size: Positive = 1_000_000         # replay capacity per task, transitions
    hidden_size: Positive | None = None       # width of the two hidden layers
    lr: Share | None = None                   # Adam step size of policies, critics and temperatures
    gamma: Share = 0.99                       # discount factor
    tau: Share = 0.005                        # Polyak coefficient: share of the online critics in a step of targets
    kl_weight: Annotated[float, Field(ge=0)] | None = None  # of the KL to every other task's policy, paper: beta

    def __post_init__(self):
        preset = PRESETS[self.env] | PRESETS.get(self.method, {}) | PRESETS.get(f"{self.env} {self.method}", {})
        for name in set().union(*PRESETS.values()):
            if getattr(self, name) is None:
                setattr(self, name, preset.get(name))
            elif name not in preset:
                raise ValueError(f"--{name.replace('_', '-')}: no effect with --env {self.env} --method {self.method}")
        family = range(len(TASKS[self.env]))
        self.tasks = self.tasks or tuple(family)
        if len(set(self.tasks) & set(family)) < len(self.tasks):
            raise ValueError(f"--tasks {' '.join(map(str, self.tasks))}: needs different indices, 0 to {family[-1]}")
        if self.eval_mixture and self.method not in MIXTURES:
            raise ValueError(f"--eval-mixture goes with {' or '.join(MIXTURES)}")
        if self.method == "qmp-domain" and self.env != "reacher":
            raise ValueError("--method qmp-domain knows how the reacher's tasks are related; use it with --env reacher")


# --- Environments ----------------------------------------------------------------------------------------------------
MAZE = ("############", "#....#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#", "#..#.#.....#",
        "##.#.#.#.###", "#..#...#...#", "############")    # D4RL's large maze; row = x axis, column = y axis
MAZE_TASKS = [((1, 3), (5, 8)), ((1, 10), (2, 4)), ((4, 1), (1, 7)), ((7, 4), (4, 10)), ((1, 3), (7, 4)),
              ((1, 7), (7, 10)), ((5, 4), (7, 9)), ((7, 1), (2, 6)), ((1, 2), (3, 10)), ((7, 2), (6, 8))]  # start, goal
REACHER_GOALS = np.array([(0.2, 0.3, 0.5), (0.3, 0.0, 0.3), (0.4, -0.3, 0.4), (0.4, 0.3, 0.2),     # metres, world
                          (0.410, 0.119, 0.239)])                      # where the hand is at the start
REACHER_TASKS = ((0, 1, 2), (0, 1, 3), (1, 3, 2), (1, 2, 0), (4, 4, 4))            # order of the goals
DOMAIN_WEIGHTS = torch.tensor([[3, 2, 0, 1, 0], [2, 3, 1, 0, 0], [0, 1, 3, 1, 0], [1, 0, 1, 3, 0], [0, 0, 0, 0, 1.0]])


class SimulatedTask:
    """A task in MuJoCo: `model`, `data`, and a picture of them."""
    camera, renderer = "view", None

    def __init__(self, xml: str):
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)

    def render(self) -> np.ndarray:
        """What the camera sees, (160, 160, 3) uint8."""
        try:
            self.renderer = self.renderer or mujoco.Renderer(self.model, 160, 160)
        except Exception as error:                                     # each platform raises its own
            sys.exit(f"pictures need OpenGL ({error}); without a screen set MUJOCO_GL=egl or MUJOCO_GL=osmesa, with "
                     "that library installed, or leave --capture-video out")
        mujoco.mj_fwdPosition(self.model, self.data)                   # a reset places neither bodies nor camera
        self.renderer.update_scene(self.data, self.camera)
        return self.renderer.render()


# The point mass in D4RL's large maze. Cell (row, col) has its centre at world (row + 1, col + 1), in metres
MAZE_XML = """
<mujoco>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <geom condim="1" margin=".002" friction=".5 .1 .1" contype="2" conaffinity="1" density="1000"/>
    <joint type="slide" damping="1" limited="false"/>
    <motor gear="100" ctrllimited="true" ctrlrange="-1 1"/>
  </default>
  <worldbody>
    <camera name="view" pos="5 6.5 14" xyaxes="0 1 0 -1 0 0"/>
    <site pos="{goal[0]} {goal[1]} 0" size=".3" rgba="0 .8 0 1"/>
    <geom type="plane" pos="0 0 -.1" size="40 40 .25" contype="1" conaffinity="0" rgba=".9 .9 .9 1"/>
    {walls}
    <body name="particle" pos="1.2 1.2 0">
      <geom type="sphere" size=".1" contype="1" rgba="1 0 0 1"/>
      <joint name="x" axis="1 0 0"/>
      <joint name="y" axis="0 1 0"/>
    </body>
  </worldbody>
  <actuator><motor joint="x"/><motor joint="y"/></actuator>
</mujoco>"""


class MazeTask(SimulatedTask):
    """One task of the maze: push a point mass (4.19 kg) from `start` to within 0.5 m of `goal`.

    Observation (4,): position and velocity [m, m/s], without the goal. Action (2,): force / 100 N, clipped to +-1.
    Reward exp(-distance) - 1 is below 0 at every step, so reaching the goal, which ends the episode, is what pays.
    """
    horizon, action_size, max_speed = 600, 2, 5.0         # m/s along each axis, enforced before each simulation step

    def __init__(self, start: tuple[int, int], goal: tuple[int, int]):
        self.start, self.goal = np.array(start, float), np.array(goal, float)
        walls = "".join(f'<geom type="box" pos="{row + 1} {col + 1} 0" size=".5 .5 .2"/>'
                        for row, line in enumerate(MAZE) for col, cell in enumerate(line) if cell == "#")
        super().__init__(MAZE_XML.format(walls=walls, goal=self.goal + 1.2))

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """First observation of an episode: within 10 cm of the start, almost at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.start + rng.uniform(-0.1, 0.1, 2)
        self.data.qvel[:] = 0.1 * rng.standard_normal(2)
        return np.concatenate([self.data.qpos, self.data.qvel], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        """Observation, reward, termination, and whether this step succeeds."""
        self.data.ctrl[:] = np.clip(action, -1.0, 1.0)
        self.data.qvel[:] = np.clip(self.data.qvel, -self.max_speed, self.max_speed)
        mujoco.mj_step(self.model, self.data)
        distance, obs = np.linalg.norm(self.data.qpos - self.goal), np.concatenate([self.data.qpos, self.data.qvel])
        return obs.astype(np.float32), math.exp(-distance) - 1.0, distance <= 0.5, {"success": distance <= 0.5}


# A Jaco arm of six joints without fingers: official masses, capsules instead of the official meshes. Joint 5 starts
# (ref) outside its limits, as in the official model
REACHER_XML = """
<mujoco>
  <compiler angle="radian"/>
  <option timestep="0.01" gravity="0 0 -9.8" iterations="10" integrator="Euler"/>
  <default>
    <joint type="hinge" axis="0 0 -1" range="-.698132 .698132" limited="true" damping="0.5" armature="0.01"/>
    <geom type="capsule" mass="0" margin="0.001" contype="1" conaffinity="0"/>
    <motor gear="10" ctrllimited="true" ctrlrange="-1 1"/>
  </default>
  <worldbody>
    <camera name="view" pos="1.8 0 .9" xyaxes="0 1 0 -.35 0 1"/>{goals}
    <geom type="plane" size="5 5 1" contype="1" conaffinity="1" rgba=".9 .9 .9 1"/>
    <body name="base" pos="0 0 .25">
    <body name="link_1" pos="0 0 .1535" quat="0 0 1 0"><joint name="1" range="-.8 .8"/>
      <inertial pos="-1.14317e-6 .0102141 -.0637045" quat=".702792 .0778988 -.0778994 .702813"
                mass=".613151" diaginertia=".00149348 .00144012 .000401632"/>
    <body name="link_2" pos="0 0 -.1185" quat="0 0 .707107 .707107"><joint name="2" axis="0 0 1" range="-1.5 .7"/>
      <inertial pos="0.206657 -1.55e-7 -.030675" mass="1.85031" diaginertia=".0402753 .0398125 .00121953"/>
      <geom fromto="0 0 0 .41 0 0" size=".04"/>
    <body name="link_3" pos=".41 0 0" quat="0 .707107 .707107 0"><joint name="3"/>
      <inertial pos=".0847979 -1.18e-7 -.020283" quat="2.338e-5 .694869 1.997e-5 .719136"
                mass=".70372" diaginertia=".00386732 .00373181 .000358773"/>
      <geom fromto="0 0 0 .207 0 -.011" size=".035"/>
    <body name="link_4" pos=".207 0 -.01125" quat="0 .707107 0 -.707107"><joint name="4"/>{wrist}
    <body name="link_5" pos=".0343 0 -.06588" quat=".887011 0 -.461749 0"><joint name="5" ref="-2.8"/>{wrist}
    <body name="hand" pos=".0343 0 -.06588" quat=".627211 -.326506 -.326506 .627211"><joint name="6"/>
      <inertial pos=".0036132 -6.22e-5 -.0583749" quat=".669114 -.237618 -.23799 .66271"
                mass=".58074" diaginertia=".000817146 .000671192 .000606807"/>
      <geom type="sphere" pos="0 0 -.06" size=".05" rgba="1 0 0 1"/>
    </body></body></body></body></body></body></body>
  </worldbody>
  <actuator>
    <motor joint="1" gear="5"/><motor joint="2" gear="{gear}"/>
    <motor joint="3"/><motor joint="4"/><motor joint="5"/><motor joint="6"/>
  </actuator>
</mujoco>"""
WRIST = """
      <inertial pos=".00914824 4.5e-8 -.0370941" quat=".971237 -1.93e-5 -.238115 3.24e-5"
                mass=".227408" diaginertia=".000176463 .00017225 .000108303"/>
      <geom fromto="0 0 0 .0343 0 -.0659" size=".03"/>"""


class ReacherTask(SimulatedTask):
    """One task of the multistage reacher: touch three goals in order (tasks 0 to 3) or hold the hand still (task 4).

    Observation (15,): joint angles and velocities [rad, rad/s], and which goal is next, one-hot; where the goals are is
    not observed. Action (6,): joint torques as a share of the motors' limits. A goal is touched within 5 cm.
    The "official" shoulder motor (joint 2) is too weak to hold the arm at some goals; "strong" doubles its gear to 20.
    """
    horizon, action_size = 200, 6

    def __init__(self, task: int, variant: str):
        self.task, self.goals = task, REACHER_GOALS[list(REACHER_TASKS[task])]
        goals = "".join(f'<site pos="{x} {y} {z}" size=".05" rgba="0 .8 0 1"/>' for x, y, z in self.goals)
        super().__init__(REACHER_XML.format(wrist=WRIST, goals=goals, gear=20 if variant == "strong" else 10))
        self.steps_per_stage = 30 if task == 4 else 1                  # holding still: any 30, not 30 in a row

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """First observation of an episode: the same pose +-0.01 rad, almost at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += rng.uniform(-0.01, 0.01, 6)
        self.data.qvel[:] = rng.uniform(-0.001, 0.001, 6)
        mujoco.mj_forward(self.model, self.data)
        self.stage = self.touches = 0
        return self.observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        """Observation, reward as in the authors' code, termination, and what is reached."""
        action = np.clip(action, -1.0, 1.0)
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, nstep=4)
        distance = np.linalg.norm(self.data.body("hand").xpos - self.goals[self.stage])
        touched = distance < 0.05
        self.touches += int(touched)
        self.stage = self.touches // self.steps_per_stage
        effort = (0.01 * float(np.square(action).sum()) + 0.001 * np.abs(self.data.qvel).mean()
                  + 1e-5 * np.abs(self.data.qacc).mean())
        delay = 0.4 * (3 - self.stage)                                 # paid at every step until the last goal
        reward = (-distance - delay, -distance + 200 * touched - 2, -distance - delay, -delay, -distance)[self.task]
        info = {"success": self.stage == 3, "touched": touched, "stages": self.stage}
        return self.observe(), reward - effort, self.stage == 3, info

    def observe(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel, np.arange(3) == self.stage], dtype=np.float32)


class DoorDrawerTask(SimulatedTask):
    """One of four tasks at a table with a door and a drawer: open or close one of them, whatever the other is doing.

    A Meta-World v3 task, with its control and reward, in the drawer's scene with the door in it. The one that is to be
    moved starts anywhere in a range of 10 cm, the other in its place, closed. Nothing terminates.
    Observation (21,): hand [m], finger gap [0, 1], position and rotation of the drawer's and the door's handle, goal.
    Action (4,): displacement of the hand / 1 cm, and the closing of the fingers.
    """
    horizon, action_size, camera = 500, 4, "corner3"

    def __init__(self, task: int):
        import metaworld
        assets = Path(metaworld.__file__).parent / "assets"
        super().__init__(f"""
        <mujoco>
          <compiler assetdir="{assets}/sawyer_xyz"/>
          <include file="{assets}/sawyer_xyz/sawyer_drawer.xml"/>
          <include file="{assets}/objects/assets/doorlock_dependencies.xml"/>
          <worldbody>
            <body name="door" pos="-.1 .9 .15"><include file="{assets}/objects/assets/doorlockB.xml"/></body>
          </worldbody>
        </mujoco>""")
        self.model.body("drawer").pos = (0.4, 0.9, 0.0)
        stock = metaworld.ALL_V3_ENVIRONMENTS[TASKS["metaworld"][task] + "-v3"]
        scene = {"_initialize_simulation": lambda stock: (self.model, self.data)}
        self.stock, self.is_door = type("InOurScene", (stock,), scene)(), task < 2
        self.starts = [(-0.1, 0.85, 0.15), (0.0, 0.95, 0.15)] if self.is_door else [(0.3, 0.9, 0.0), (0.4, 0.9, 0.0)]
        self.stock.hand_init_pos = np.array([-0.6 if task == 1 else 0.0, 0.6, 0.2])
        self.stock._set_task_called = True

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """First observation of an episode."""
        self.stock._last_rand_vec = rng.uniform(*self.starts)          # where the stock task puts its object
        mujoco.mj_resetData(self.model, self.data)                     # closes both
        self.stock.reset_model()
        mujoco.mj_forward(self.model, self.data)                       # or the drawer is seen where it was before
        return self.observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        """Observation, reward, termination, and whether this step succeeds."""
        action = np.clip(action, -1.0, 1.0)
        self.stock.set_xyz_action(action[:3])
        self.stock.do_simulation([action[3], -action[3]], self.stock.frame_skip)
        mujoco.mj_forward(self.model, self.data)
        obs = self.observe()
        seen = obs.astype(np.float64)
        if self.is_door:                                               # where the stock reward looks for its object
            seen[4:11] = seen[11:18]
        reward, info = self.stock.evaluate_state(seen, action)
        return obs, reward, False, {"success": info["success"]}

    def observe(self) -> np.ndarray:
        body, handle, door_quat = self.data.body, self.data.geom("handle"), np.empty(4)
        gap = np.linalg.norm(body("rightclaw").xpos - body("leftclaw").xpos) / 0.1
        mujoco.mju_mat2Quat(door_quat, handle.xmat)
        return np.concatenate([body("hand").xpos, [min(gap, 1.0)], body("drawer_link").xpos + (0.0, -0.16, 0.0),
                               body("drawer_link").xquat, handle.xpos, np.roll(door_quat, -1), self.stock._target_pos],
                              dtype=np.float32)


class TaskEnvs:
    """One environment per task, stepped in turn; what is over begins anew. `obs` is what to act on, (T, O)."""

    def __init__(self, envs: list, horizon: int, rng: np.random.Generator):
        self.envs, self.horizon, self.rng = envs, horizon, rng
        self.reset()

    def reset(self) -> None:
        """New episodes in all tasks."""
        self.obs = np.stack([env.reset(self.rng) for env in self.envs])
        self.episodes = [{"episodic_return": 0.0, "episodic_length": 0} for _ in self.envs]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, dict]]:
        """Actions (T, A) -> observations that they lead to (T, O), rewards, terminations (T,), and episodes that end.

        The last is {task: return, length, and what else the environment reports, its largest value of the episode}.
        """
        next_obs, rewards, terminations, infos = zip(*(env.step(a) for env, a in zip(self.envs, actions)))
        self.obs, ended = np.stack(next_obs), {}
        for i, (episode, info) in enumerate(zip(self.episodes, infos)):
            episode["episodic_return"] += float(rewards[i])
            episode["episodic_length"] += 1
            episode |= {key: max(episode.get(key, 0.0), float(value)) for key, value in info.items()}
            if terminations[i] or episode["episodic_length"] == self.horizon:
                ended[i], self.episodes[i] = episode, {"episodic_return": 0.0, "episodic_length": 0}
                self.obs[i] = self.envs[i].reset(self.rng)
        return np.stack(next_obs), np.array(rewards), np.array(terminations), ended


def make_envs(args: Args, rng: np.random.Generator) -> TaskEnvs:
    """The tasks of the run, with starts drawn from `rng`."""
    make = {"maze": lambda task: MazeTask(*MAZE_TASKS[task]), "metaworld": DoorDrawerTask,
            "reacher": lambda task: ReacherTask(task, args.reacher_model)}[args.env]
    envs = [make(task) for task in args.tasks]
    return TaskEnvs(envs, envs[0].horizon, rng)


# --- Networks --------------------------------------------------------------------------------------------------------
class TaskMLP(nn.Module):
    """An MLP for each of T tasks, C times over (1 for policies, 2 for twin critics), all evaluated at once.

    A layer is a stack of matrices: (C * T, in, out) where each task has its own, (C, in, out) in the first
    `shared_layers`, which all tasks share. None shared are independent networks, all but the last a trunk with heads.
    """

    def __init__(self, copies: int, num_tasks: int, sizes: list[int], shared_layers: int = 0,
                 init=nn.init.xavier_uniform_):
        super().__init__()
        self.stack, self.params = (copies, num_tasks), nn.ParameterList()      # weight and bias of each layer in turn
        for layer, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            weight = torch.empty(copies * (1 if layer < shared_layers else num_tasks), n_in, n_out)
            for matrix in weight:
                init(matrix)
            self.params.extend([weight, torch.zeros(len(weight), 1, n_out)])

    def forward(self, x: Tensor, params: list[Tensor] | None = None) -> Tensor:
        """(T, B, in) -> (C, T, B, out): row i through the networks of task i, with other parameters if given.

        Where all layers are shared, the rows may be of any tasks, and more or fewer than T.
        """
        params, rows = list(self.params if params is None else params), x.shape[-3:-1]
        x = x.expand(self.stack[0], *x.shape[-3:])
        for weight, bias in zip(params[::2], params[1::2]):
            x = torch.baddbmm(bias, x.reshape(len(weight), -1, x.shape[-1]), weight)
            if weight is not params[-2]:
                x = torch.relu_(x)                                     # in place: large activations cost memory traffic
        return x.view(self.stack[0], *rows, -1)


class SAC(nn.Module):
    """What SAC trains for T tasks: policies, twin critics with their targets, temperatures."""

    def __init__(self, actor: nn.Module, critic: nn.Module, num_tasks: int):
        super().__init__()
        self.actor, self.critic, self.target = actor, critic, copy.deepcopy(critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(num_tasks))

    def policy(self, obs: Tensor, *params) -> tuple[Tensor, Tensor]:
        """(T, B, O) -> mean and log standard deviation of each task's Gaussian before the tanh, (T, B, A) each."""
        mean, log_std = self.actor(obs, *params)[0].chunk(2, dim=-1)
        return mean, log_std.clamp(-20.0, 2.0)

    def q(self, critic: nn.Module, obs: Tensor, actions: Tensor, *params) -> Tensor:
        """Both soft Q-functions of `critic`, online or target: (T, B, O) and (T, B, A) -> (2, T, B)."""
        return critic(torch.cat([obs, actions], dim=-1), *params).squeeze(-1)


def make_agent(args: Args, obs_size: int, action_size: int) -> SAC:
    """A learner for each task, with networks of its own or layers that all tasks share."""
    num_tasks, hidden, shared = len(args.tasks), [args.hidden_size] * 2, SHARED_LAYERS.get(args.method, 0)
    actor = TaskMLP(1, num_tasks, [obs_size, *hidden, 2 * action_size], shared)
    critic = TaskMLP(2, num_tasks, [obs_size + action_size, *hidden, 1], shared, nn.init.xavier_normal_)
    agent = SAC(actor, critic, 1 if args.method == "shared" else num_tasks)
    if args.method == "dnc":                                           # the common policy, which starts as the first
        agent.centroid = nn.ParameterList(param.detach()[:1].clone() for param in actor.params)
    return agent.to(args.device)


# --- Replay buffer ---------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The last `capacity` transitions of each task; a row is obs, action, reward, next_obs, termination."""

    def __init__(self, num_tasks: int, capacity: int, obs_size: int, action_size: int, device: str):
        self.widths, self.num_added = [obs_size, action_size, 1, obs_size, 1], 0     # per task: all add at once
        check_memory(4 * num_tasks * capacity * sum(self.widths), capacity)
        self.data = torch.zeros(num_tasks, capacity, sum(self.widths), device=device)
        self.tasks = torch.arange(num_tasks, device=device)[:, None]

    def __len__(self) -> int:
        return min(self.num_added, self.data.shape[1])

    def add(self, obs, actions, rewards, next_obs, terminations) -> None:
        """Append one transition per task: (T, O), (T, A), (T,), (T, O), (T,). Truncation is no termination."""
        row = np.concatenate([obs, actions, rewards[:, None], next_obs, terminations[:, None]], 1, dtype=np.float32)
        self.data[:, self.num_added % self.data.shape[1]] = torch.from_numpy(row).to(self.data.device)
        self.num_added += 1

    def sample(self, rng: np.random.Generator, batch_size: int) -> list[Tensor]:
        """Draw uniformly, for each task its own: obs (T, B, O), actions, rewards (T, B), next_obs, terminations."""
        index = torch.from_numpy(rng.integers(len(self), size=(len(self.data), batch_size))).to(self.data.device)
        obs, actions, rewards, next_obs, terminations = self.data[self.tasks, index].split(self.widths, dim=-1)
        return [obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1)]


def check_memory(num_bytes: int, capacity: int) -> None:
    """End with one sentence where a replay is larger than the memory of this machine, or of the container it is."""
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf    # Windows
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        have = min(have, int(limit.read_text()))
    if num_bytes > 0.9 * have:
        sys.exit(f"the replay would grow to {num_bytes / 1e9:.0f} GB, and there are {have / 1e9:.0f} GB of memory "
                 f"here; --buffer-size {int(0.8 * have / num_bytes * capacity)} would fit")


# --- The method ------------------------------------------------------------------------------------------------------
def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(u), u = mean + std * noise, with its log-probability [nats]: (..., A) -> (..., A), (...)."""
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))        # log(1 - tanh(u)^2), exact at any u
    return torch.tanh(u), (gaussian - log_derivative).sum(-1)


@torch.no_grad()
def behave(args: Args, agent: SAC, obs: np.ndarray, method: str, explore: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Act in every task by the rule of `method`: the only thing that QMP changes in SAC (Sec. 4).

    Args:
        obs: one observation per task, (T, O).
        method: that of the run, or "separated" where the own policies act: in the warm-up and in evaluation.
        explore: False takes the mean action of each policy in place of a sample.
    Returns:
        Actions to execute, (T, A), and the policy that each one comes from, (T,).
    """
    states, tasks = torch.from_numpy(obs).to(args.device), torch.arange(len(obs))
    repeated = states[:, None].expand(-1, len(obs), -1)                # (T, T, O): row i is T times the state of task i
    inputs = repeated if method == "qmp-own" else states[:, None]      # T proposals of the own policy, or one
    if method in MIXTURES:
        inputs = repeated.transpose(0, 1)                              # (T, T, O): row j, for policy j, has all states
    mean, log_std = agent.policy(inputs)
    noise = torch.randn(mean.shape).to(mean) if explore else torch.zeros_like(mean)
    samples = torch.tanh(mean + log_std.exp() * noise)
    if method in MIXTURES:
        mean, samples = mean.transpose(0, 1), samples.transpose(0, 1)  # (T, T, A): row i is what is proposed to task i

    if method == "qmp-uniform":
        chosen = torch.randint(len(obs), (len(obs),))
    elif method == "qmp-domain":                                       # by hand: how many stretches two tasks share
        chosen = torch.multinomial(DOMAIN_WEIGHTS[list(args.tasks)][:, list(args.tasks)], 1).squeeze(1)
    elif method in ("qmp", "qmp-multihead", "qmp-own"):                # the Q-switch
        scored = mean.tanh() if args.switch_action == "mean" else samples
        scores = agent.q(agent.critic, repeated, scored)               # (2, T, T): Q_i(s_i, a_j) of both twins
        chosen = (scores.amin(0) if args.switch_q == "min" else scores[0]).argmax(1)       # ties: the lowest index
    else:
        chosen = torch.zeros_like(tasks)                               # there is one proposal
    return samples[tasks, chosen].cpu().numpy(), (chosen if method in MIXTURES else tasks).cpu().numpy()


def update(args: Args, agent: SAC, optimizers: dict, batch: list[Tensor]) -> dict[str, Tensor]:
    """One SAC step for every task: critics, policies, temperatures, targets. Returns losses and alpha, (T,) each.

    Losses are summed over tasks: each task's own layers get their own gradient, and one Adam over all is as good as T,
    since it acts on each number by itself; shared layers get the sum.
    """
    obs, actions, rewards, next_obs, terminations = batch              # (T, B, ...)
    alpha = agent.log_alpha.detach().exp()[:, None]                    # (T, 1), or (1, 1) if all layers are shared
    with torch.no_grad():
        next_actions, next_log_prob = squash(*agent.policy(next_obs), torch.randn(actions.shape).to(actions))
        next_value = agent.q(agent.target, next_obs, next_actions).amin(0) - alpha * next_log_prob         # (T, B)
        target = rewards + args.gamma * (1 - terminations) * next_value
    losses = {"critic": (agent.q(agent.critic, obs, actions) - target).square().mean(-1).sum(0)}           # (T,)
    descend_sum(optimizers["critic"], losses["critic"])

    pi, log_prob = squash(*agent.policy(obs), torch.randn(actions.shape).to(actions))
    losses["actor"] = (alpha * log_prob - agent.q(agent.critic, obs, pi).amin(0)).mean(-1)
    actor_loss = losses["actor"]
    if args.kl_weight is not None:                                     # Divide-and-Conquer: stay near the others
        states = obs[:, :max(1, obs.shape[1] // len(obs))].flatten(0, 1)                   # some of every task, (S, O)
        mean, log_std = agent.policy(states.expand(len(obs), -1, -1))                      # (T, S, A)
        pi_i = Normal(mean[:, None], log_std.exp()[:, None], validate_args=False)          # before the tanh, which
        pi_j = Normal(mean.detach(), log_std.detach().exp(), validate_args=False)          # would not change the KL
        losses["kl"] = kl_divergence(pi_j, pi_i).mean((2, 3)).sum(1)                       # only pi_i is moved
        actor_loss = actor_loss + args.kl_weight * losses["kl"]
    descend_sum(optimizers["actor"], actor_loss)

    entropy = -log_prob.detach().mean(-1)                              # of the policies before their step
    agent.log_alpha.grad = (entropy + actions.shape[-1]).sum_to_size(len(alpha))       # of log_alpha (entropy + A)
    optimizers["alpha"].step()
    losses["alpha"] = agent.log_alpha.exp().expand(len(obs))
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
    return {name: loss.detach().cpu() for name, loss in losses.items()}


def descend_sum(optimizer: torch.optim.Optimizer, losses: Tensor) -> None:
    """Move the parameters of one optimizer, and no others, against the gradient of the summed losses, (T,)."""
    params = optimizer.param_groups[0]["params"]
    for param, grad in zip(params, torch.autograd.grad(losses.sum(), params)):
        param.grad = grad
    optimizer.step()


def distill(args: Args, agent: SAC, optimizer: torch.optim.Optimizer, buffer: ReplayBuffer, rng: np.random.Generator,
            minibatches: int = 500) -> None:
    """Fit one policy to all tasks' replayed actions and restart every policy from it (Divide-and-Conquer).

    The common policy and its `optimizer` live as long as the run. Nothing else of the learners changes.
    """
    for _ in range(minibatches):
        obs, actions, *_ = buffer.sample(rng, max(1, args.batch_size // len(args.tasks)))
        mean, log_std = agent.policy(obs, list(agent.centroid))        # (T, B, A)
        before_tanh = torch.atanh(actions.clamp(-1 + 1e-6, 1 - 1e-6))
        log_prob = Normal(mean, log_std.exp(), validate_args=False).log_prob(before_tanh).sum(-1)
        descend_sum(optimizer, -log_prob.mean())                       # what the tanh adds is a constant here
    with torch.no_grad():
        for param, common in zip(agent.actor.parameters(), agent.centroid):
            param.copy_(common.expand_as(param))


# --- Training --------------------------------------------------------------------------------------------------------
@torch.random.fork_rng(devices=[])                                     # what a mixture draws is not training's
def evaluate(args: Args, agent: SAC, method: str, stopped=lambda: False) -> dict[str, np.ndarray] | None:
    """--eval-episodes episodes of every task with mean actions, in environments with a generator of their own.

    Args:
        method: whose rule is followed; "separated" for each task's own policy.
    Returns:
        return, success and what else the tasks report, (T, episodes) each; None as soon as `stopped` says so.
    """
    torch.manual_seed(args.seed)
    envs, episodes, frames = make_envs(args, np.random.default_rng([args.seed, 1])), [[] for _ in args.tasks], []
    while min(map(len, episodes)) < args.eval_episodes:
        if stopped():
            return None
        if args.capture_video and not all(episodes) and envs.episodes[0]["episodic_length"] % 4 == 0:
            frames.append(np.hstack([env.render() for env in envs.envs]))
        actions, _ = behave(args, agent, envs.obs, method, explore=False)
        for task, episode in envs.step(actions)[-1].items():
            episodes[task].append(episode)
    if frames:
        name = "tasks" if method == "separated" else "mixture"
        imageio.mimsave(args.evaluate / f"{name}.gif", frames, duration=60, loop=0)
    return {key.removeprefix("episodic_"): np.array([[episode[key] for episode in row[:args.eval_episodes]]
                                                     for row in episodes])
            for key in episodes[0][0] if key != "episodic_length"}


def train(args: Args) -> Path:
    """Collect with the behaviour policy, update every learner on its own data; returns the run folder."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") is False:         # x86 without AMX:
        torch.set_float32_matmul_precision("medium")   # oneDNN's products, often faster; others would round to bfloat16
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)                             # starts, replay indices
    names, envs = [TASKS[args.env][task] for task in args.tasks], make_envs(args, rng)
    (num_tasks, obs_size), action_size = envs.obs.shape, envs.envs[0].action_size
    agent = make_agent(args, obs_size, action_size)
    optimizers = {name: torch.optim.Adam(net.parameters(), args.lr, fused=True)
                  for name, net in agent.named_children() if name != "target"}         # with dnc, of "centroid", too
    optimizers["alpha"] = torch.optim.Adam([agent.log_alpha], args.lr, fused=True)

    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    if state:
        agent.load_state_dict(state["agent"])
    if args.evaluate:
        print_table(names, evaluate(args, agent, "separated"))
        if args.eval_mixture:
            print("the mixture:")
            print_table(names, evaluate(args, agent, args.method))
        return args.evaluate

    buffer = ReplayBuffer(num_tasks, min(args.buffer_size, -(-args.total_timesteps // num_tasks)), obs_size,
                          action_size, args.device)
    run, global_step = Run(args, args.env, names, state), 0
    recent = torch.zeros(num_tasks, num_tasks, dtype=torch.int64)      # steps of task i that policy j took ...
    counts = torch.zeros_like(recent)                                  # ... since the last evaluation, and before it
    if args.resume:
        for name, optimizer in optimizers.items():                     # with --lr as it is now
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizers"][name]["state"]})
        global_step, buffer.num_added = state["global_step"], state["num_added"]
        counts, recent = state["counts"], state["recent"]
        buffer.data[:, :len(buffer)] = state["buffer"].to(args.device)
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        envs.reset()
        tqdm.write("the simulators' states are not saved: the run goes on with fresh episodes")
    updates, batch_size = args.gradient_steps, args.batch_size
    if args.method in SHARED_LAYERS:                                   # a batch of all tasks, and T times as many
        updates, batch_size = updates * num_tasks, max(1, batch_size // num_tasks)
    warmup_end = (args.mixture_warmup or 0) * args.total_timesteps
    if args.total_timesteps <= num_tasks * args.learning_starts:
        tqdm.write(f"this run only fills the buffers: updates begin after --learning-starts {args.learning_starts:,} "
                   "steps of each task")

    def save() -> None:
        run.save(global_step, dict(
            agent=agent.state_dict(), optimizers={name: opt.state_dict() for name, opt in optimizers.items()},
            counts=counts, recent=recent, num_added=buffer.num_added, buffer=buffer.data[:, :len(buffer)].clone(),
            rng=json.dumps(rng.bit_generator.state), torch_rng=torch.get_rng_state()))

    save()                                                             # from here on a killed run can be resumed
    while True:
        # Evaluate: first, so that a run that was stopped during an evaluation makes it up ---------------------
        if run.due(global_step):
            result = evaluate(args, agent, "separated", run.stop.is_set)
            mixed = evaluate(args, agent, args.method, run.stop.is_set) if args.eval_mixture else {}
            if result is not None and mixed is not None:
                own_share = (recent.diagonal() / recent.sum(1)).numpy()
                run.log("method", {"own_share": own_share})
                run.log_evaluation(global_step, result, {f"{name}/own_share": x for name, x in zip(names, own_share)}
                                   | {f"mixture/{kind}": values.mean() for kind, values in mixed.items()})
                counts += recent
                recent.zero_()
        if global_step >= args.total_timesteps or run.stop.is_set():
            break

        # Divide-and-Conquer: all policies restart from their common one ---------------------------------------
        if (args.method == "dnc" and optimizers["actor"].state         # after the first update: Adam remembers it
                and crossed(global_step - num_tasks, global_step, -(-args.total_timesteps // 10))):
            distill(args, agent, optimizers["centroid"], buffer, rng)

        # Act: in every task the policy that its own critic prefers; step every task once, store ---------------
        obs = envs.obs
        actions, chosen = behave(args, agent, obs, "separated" if global_step < warmup_end else args.method)
        recent[range(num_tasks), chosen] += 1
        next_obs, rewards, terminations, ended = envs.step(actions)
        global_step += num_tasks
        buffer.add(obs, actions, rewards, next_obs, terminations)
        for task, episode in ended.items():
            run.log(f"tasks/{names[task]}", episode)

        # Update: plain SAC on every task's own data -----------------------------------------------------------
        if buffer.num_added % args.train_every == 0:
            for _ in range(updates if buffer.num_added > args.learning_starts else 0):
                if run.stop.is_set():                                  # the rest of this round is not made up
                    break
                run.log("losses", update(args, agent, optimizers, buffer.sample(rng, batch_size)))
            run.write(global_step)
        if crossed(global_step - num_tasks, global_step, args.checkpoint_every):
            save()
    save()
    if not run.stop.is_set():
        plot_mixture(run.dir, counts.numpy(), names)
        print_table(names, result)
    run.close()
    return run.dir


# --- Picture of the method -------------------------------------------------------------------------------------------
def plot_mixture(folder: Path, counts: np.ndarray, names: list[str]) -> None:
    """Who borrows from whom: mixture.csv has the share of task i's steps that policy j took in row i, column j.

    mixture.png draws it as the paper's Fig. 5, left; red is more than 1/T, blue is less.
    """
    share = counts / counts.sum(1, keepdims=True)
    np.savetxt(folder / "mixture.csv", share, "%.6f", ",", header=",".join(names))
    figure = Figure(figsize=(2 + 0.75 * len(names), 1.5 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, vmin=0, vmax=2 / len(names), cmap="RdBu_r", aspect="auto", alpha=0.6)
    for (row, column), value in np.ndenumerate(share):
        axis.text(column, row, f"{100 * value:.0f}%", ha="center", va="center", fontsize=8)
    axis.set(title="share of steps, against 1/T (white)", xlabel="policy that acted", ylabel="task that was acted in")
    axis.set_xticks(range(len(names)), names, rotation=45)
    axis.set_yticks(range(len(names)), names)
    figure.savefig(folder / "mixture.png", dpi=120)


# --- Run folder: the same text in every script -----------------------------------------------------------------------
def crossed(before: int, after: int, period: int) -> bool:
    """Whether a multiple of `period` lies in (before, after]: the step counter grows by more than one."""
    return after // period > before // period


class Run:
    """A run's folder and voice: args.json, metrics.csv, TensorBoard, checkpoint.pt, progress bar, stop signals."""

    def __init__(self, args: Args, family: str, names: list[str], state: dict):
        """`family` begins the folder's name; `names` are the tasks'; `state` is the checkpoint to go on from, or {}."""
        if getattr(args, "capture_video", False):
            sys.exit("--capture-video goes with --evaluate RUN")
        self.args, self.names, self.pending, self.rows = args, names, {}, state.get("rows", [])
        self.started, first_step = time.time() - state.get("seconds", 0.0), state.get("global_step", 0)
        if self.rows and self.rows[-1]["global_step"] >= args.total_timesteps:         # evaluated at its end, too
            sys.exit(f"{args.resume} has {first_step:,} steps already; give a larger --total-timesteps")
        stem = f"{family}__{Path(__file__).stem}__{args.method}__s{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = args.resume or args.runs_dir / stem
        self.dir.mkdir(parents=True, exist_ok=args.resume is not None)
        self.lock = FileLock(self.dir / "lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            sys.exit(f"another process still writes to {self.dir}; stop it first")
        self.commands = [*state.get("commands", []), shlex.join(["python", *sys.argv])]
        about = {"script": Path(__file__).stem, "commands": self.commands, "args": vars(args),
                 "versions": {package.name: package.version for package in distributions()}}
        (self.dir / "args.json").write_text(json.dumps(about, indent=2, default=str), encoding="utf-8")
        self.writer = SummaryWriter(self.dir, purge_step=first_step + 1)
        self.bar = tqdm(total=args.total_timesteps, initial=first_step, unit="step", unit_scale=True, disable=None)
        self.stop, self.handlers = threading.Event(), {}
        for number in (signal.SIGINT, signal.SIGTERM):                 # not those that nohup and the like ignore
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.on_signal)
        tqdm.write(f"writing to {self.dir}")

    def on_signal(self, number, frame) -> None:
        """First Ctrl-C or SIGTERM: finish this step or leave this evaluation, save, end. Second: end at once."""
        os.write(2, b"\nstopping after a checkpoint; a second signal stops at once\n")       # print may be half-way
        self.stop.set()
        signal.signal(number, self.handlers[number])

    def log(self, group: str, values: dict) -> None:
        """Collect numbers, or one per task, (T,): `write` sends means to group/key and group/<task>/key."""
        for key, value in values.items():
            self.pending.setdefault((group, key), []).append(np.asarray(value))

    def write(self, global_step: int) -> None:
        """What has come since the last call, to TensorBoard; the end of the run where it is not finite."""
        self.log("charts", {"SPS": global_step / (time.time() - self.started)})
        for (group, key), values in self.pending.items():
            mean = np.mean(values, axis=0)                             # () or (T,)
            if not np.isfinite(mean).all():
                self.close()
                sys.exit(f"{group}/{key} is not finite at step {global_step:,}; resume {self.dir} with a smaller --lr")
            self.writer.add_scalar(f"{group}/{key}", mean.mean(), global_step)
            for name, value in zip(self.names, mean) if mean.ndim else ():
                self.writer.add_scalar(f"{group}/{name}/{key}", value, global_step)
        self.pending.clear()
        self.bar.update(global_step - self.bar.n)

    def due(self, global_step: int) -> bool:
        """Whether an evaluation is due: a multiple of --eval-every after the last row of metrics.csv, or the end."""
        last, total = self.rows[-1]["global_step"] if self.rows else 0, self.args.total_timesteps
        return crossed(last, global_step, self.args.eval_every) or last < total <= global_step

    def log_evaluation(self, global_step: int, result: dict[str, np.ndarray], extra: dict[str, float]) -> None:
        """A row of metrics.csv, for TensorBoard and the reader, too; `result` has "return" and more, (T, episodes)."""
        row = {f"mean_{kind}": values.mean() for kind, values in result.items()}
        row |= {f"{name}/{kind}": row.mean() for kind, rows in result.items() for name, row in zip(self.names, rows)}
        row = {key: float(f"{value:.6g}") for key, value in (row | extra).items()}
        self.rows.append({"global_step": global_step, "seconds": round(time.time() - self.started, 1)} | row)
        columns = dict.fromkeys(key for each in self.rows for key in each)
        with open(self.dir / "metrics.csv", "w", newline="", encoding="utf-8") as file:    # whole, so no row is torn
            csv.writer(file).writerows([columns, *([each.get(key) for key in columns] for each in self.rows)])
        self.log("eval", row)
        self.write(global_step)
        means = "  ".join(f"{kind} {values.mean():.2f}" for kind, values in result.items())
        tqdm.write(f"step {global_step:,}/{self.args.total_timesteps:,}  {means}  {self.rows[-1]['seconds']:,.0f} s")

    def save(self, global_step: int, state: dict) -> None:
        """Write the checkpoint beside, then rename: a killed run leaves the previous one or this one, never half."""
        self.write(global_step)                                        # ends the run where something is not finite
        state |= {"global_step": global_step, "rows": self.rows, "commands": self.commands,
                  "seconds": time.time() - self.started}
        torch.save(state, self.dir / "checkpoint.tmp")
        os.replace(self.dir / "checkpoint.tmp", self.dir / "checkpoint.pt")

    def close(self) -> None:
        """Draw the curves and let go of the folder, the screen and the signals; after a signal, say how to go on."""
        self.bar.close(), self.writer.close(), self.lock.release()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.rows:
            plot_curves(self.dir, self.names, self.rows)
        if self.stop.is_set():
            sys.exit(f"stopped; go on with: {shlex.join(['python', sys.argv[0], '--resume', str(self.dir)])}")


def plot_curves(folder: Path, names: list[str], rows: list[dict]) -> None:
    """curves.png: success and return over steps, the mean thick, each task thin."""
    steps = [row["global_step"] for row in rows]
    kinds = [kind for kind in ("success", "return") if f"mean_{kind}" in rows[0]]
    figure = Figure(figsize=(2 + 4.5 * len(kinds), 4), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        axis.plot(steps, [[row[f"{name}/{kind}"] for name in names] for row in rows], lw=0.8, label=names)
        axis.plot(steps, [row[f"mean_{kind}"] for row in rows], "k", lw=2.5, label="mean")
        axis.set(xlabel=STEPS, ylabel=f"evaluated {kind}")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(folder / "curves.png", dpi=120)


def print_table(names: list[str], result: dict[str, np.ndarray]) -> None:
    """One row per task and one for all: means over episodes, and the standard deviation of the return."""
    print(f"{'task':<24}" + "".join(f"{kind:>12}" for kind in result) + f"{'return +-':>12}")
    for i, name in enumerate([*names, "all"]):
        row = {kind: values[i] if i < len(names) else values for kind, values in result.items()}
        print(f"{name:<24}" + "".join(f"{x.mean():>12.2f}" for x in row.values()) + f"{row['return'].std():>12.2f}")


def load_checkpoint(folder: Path) -> dict:
    """The checkpoint of a run folder, on the CPU."""
    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:                                         # missing, or whatever a damaged file raises
        sys.exit(f"{folder} has no checkpoint.pt that can be read ({type(error).__name__}); give the folder of a run")


def read_args(argv: list[str] | None = None) -> Args:
    """Settings from the command line; with --resume or --evaluate those of that run, with the command line on top."""
    args = tyro.cli(Args, args=argv)
    if (folder := args.resume or args.evaluate) is None:
        return args
    try:
        about = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if about["script"] != Path(__file__).stem:
            sys.exit(f"{folder} was made by {about['script']}.py; use that script")
        stored = Args(**about["args"] | {"resume": None, "evaluate": None, "capture_video": False})
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{folder} has no args.json that this version can read ({error}); give the folder of a run")
    args = tyro.cli(Args, args=argv, default=stored)
    for name in FIXED - ({"seed"} if args.evaluate else set()):
        if getattr(args, name) != getattr(stored, name):
            sys.exit(f"{folder} was made with --{name.replace('_', '-')} {getattr(stored, name)}; leave the flag out")
    return args


if __name__ == "__main__":
    print(f"run folder: {train(read_args())}")
