# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.0", "metaworld==3.1.1", "tyro==1.0.17",
#   "pydantic==2.14.4", "filelock==4.3.1", "imageio==2.38.1", "tensorboard==2.21.0", "tqdm==4.70.1",
#   "matplotlib==3.11.2",
# ]
# ///
"""Policy correction (PiCor): improve one task, then correct the policy so that the others lose nothing.

Bai, Zhang, Tao, Wu, Wang, Xu: "PiCor: Multi-Task Deep Reinforcement Learning with Policy Correction", AAAI 2023. One
policy serves all tasks, which are trained one at a time, in blocks of K steps. An update is plain SAC on the active
task. Then the weighted advantage of the new policy over the old one is estimated on states of all tasks; where it is
negative, a few steps raise it, close to what SAC has just found. Tasks that are still unsettled weigh more.

    blocks of K steps                                    draw_schedule
    phase 1, SAC on the active task, Eq. 6 and 7         update
    w = softmax(alpha / tau), Eq. 9                      task_weights
    max(0, c (1 - gamma) - sum_z w_z A_z), Eq. 10        hinge
    phase 2, D_KL(pi || pi') + lambda / 2 hinge^2        correct
    the other rows of Table 1: G-Surgery                 descend_mean, project_conflicts
        Soft Modularization; KTM-DRL                     SoftModules; load_experts, imitate

Differences from the paper, each explained in docs/picor_sac.md:
1. What the paper leaves open is decided as follows: soft advantages on both sides with common random numbers, in units
   of the spread of Q; the KL before the tanh; an optimizer of its own and up to five steps for the correction.
2. The critic learns from all tasks at every update (--critic-batch active for the paper's text): with the active task
   alone it forgets the others, and the correction trusts it.
3. Meta-World v3 with reward v2; HalfCheetah-v5. All rows have one update per environment step; KTM is built on SAC.

    python picor_sac.py                                   # four goals for a point mass: minutes
    python picor_sac.py --no-correction                   # the same blocks without
    python picor_sac.py --env halfcheetah --method soft-modules
    python picor_sac.py --method independent              # teachers for: --method ktm --teachers runs/...
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
from collections import defaultdict
from dataclasses import replace
from datetime import datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import imageio.v2 as imageio
import metaworld
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
GOALS = {"north-east": (1.0, 1.0), "south-west": (-1.0, -1.0), "south-east": (1.0, -1.0), "north-west": (-1.0, 1.0)}
PARTS = {"Torso": ["torso"], "Head": ["head"], "Thigh": ["bthigh", "fthigh"], "Leg": ["bshin", "fshin"],
         "Foot": ["bfoot", "ffoot"]}
FAMILIES = {"goals": tuple(GOALS),
            "halfcheetah": ("SmallFoot", "BigFoot", "SmallLeg", "BigLeg", "SmallThigh", "BigThigh", "SmallTorso",
                            "BigTorso"),
            "mt4": ("reach", "drawer-close", "button-press-topdown", "window-close"),
            "mt10": tuple(name.removesuffix("-v3") for name in metaworld.env_dict.MT10_V3)}
ACTION_SIZES = {"goals": 2, "halfcheetah": 6, "mt4": 4, "mt10": 4}
PRESETS = {  # a setting left at None takes its value from here
    "goals": dict(horizon=50, block_steps=500, hidden_sizes=(64, 64), batch_size=64, learning_starts=500, lr=1e-3,
                  total_timesteps=12_000, eval_every=1_000, checkpoint_every=2_000, eval_episodes=10),
    "halfcheetah": dict(horizon=1_000, block_steps=1_000, hidden_sizes=(256, 256), batch_size=256, lr=3e-4,
                        learning_starts=2_000, total_timesteps=200_000, eval_every=20_000, checkpoint_every=20_000,
                        eval_episodes=5),
    "mt4": dict(horizon=200, block_steps=200, hidden_sizes=(256, 256), batch_size=256, learning_starts=1_000, lr=3e-4,
                total_timesteps=200_000, eval_every=20_000, checkpoint_every=20_000, eval_episodes=1, num_goals=1),
    "mt10": dict(horizon=500, block_steps=500, hidden_sizes=(512, 512), batch_size=256, learning_starts=5_000, lr=3e-4,
                 total_timesteps=5_000_000, eval_every=100_000, checkpoint_every=100_000, eval_episodes=1, num_goals=1)}
# Settings that have an effect in some runs only, and are refused in others
OF_PICOR = ("no_correction", "no_adaptive_weights", "critic_batch")
OF_CORRECTION = ("correction_steps", "correction_states", "recent", "c", "penalty", "hard_advantage")
OF_WEIGHTS, OF_KTM = ("weight_tau", "weight_warmup"), ("teachers", "offline_updates")
ONE_TASK = ("picor", "independent", "ktm")                    # methods whose policy learns from the active task only
STEPS = "environment steps, summed over tasks"
LOG_EVERY = 1_000                                             # environment steps between writes to TensorBoard
FIXED = {"env", "method", "tasks", "seed", "hidden_sizes", "num_goals", "block_steps", "task_order", "learning_starts",
         "offline_updates"}                                   # of a run that goes on

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]                 # --no-correction, without --no-no-correction


@dataclass
class Args:
    # four goals for a point mass; eight half-cheetahs with other body parts; four or ten tasks of Meta-World
    env: Literal["goals", "halfcheetah", "mt4", "mt10"] = "goals"
    # policy correction; SAC on batches of all tasks; the same with heads; a SAC per task; mtsac with gradient surgery;
    # with modules that a routing network mixes; with a teacher per task
    method: Literal["picor", "mtsac", "mtmhsac", "independent", "g-surgery", "soft-modules", "ktm"] = "picor"
    tasks: tuple[str, ...] = ()               # a subset of the family's tasks; none takes all of them
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive | None = None   # environment steps, summed over tasks
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive | None = None        # environment steps between evaluations
    eval_episodes: Positive | None = None     # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive | None = None  # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    no_correction: Switch = False             # picor without phase 2, the paper's "Cor": SAC in blocks of one task
    no_adaptive_weights: Switch = False       # weights 1 / N, without the paper's "Ada": from the temperatures
    critic_batch: Literal["all", "active"] = "all"  # tasks that picor's critic learns from
    correction_steps: Positive = 5            # most steps of a correction; it ends as soon as the hinge is 0
    correction_states: Positive = 32          # states per task on which advantages are estimated
    recent: Annotated[int, Field(ge=0)] = 0   # of the task's last so many transitions; 0: of all
    c: Annotated[float, Field(le=0)] = -0.1   # discounted return that an update may lose [spread of Q]
    penalty: Annotated[float, Field(ge=0)] = 10.0  # weight of half the squared hinge, paper: lambda
    hard_advantage: Switch = False            # advantage without entropy: the hinge then fights what SAC improved
    weight_tau: Share = 0.1                   # temperature of the weights' softmax [entropy temperatures], paper: tau
    weight_warmup: Annotated[int, Field(ge=0)] = 500  # updates of every task before weights leave 1 / N
    teachers: Path | None = None              # ktm: run folder of --method independent; its steps come on top
    offline_updates: Positive | None = None   # ktm: updates before the first step; as many as --total-timesteps
    block_steps: Positive | None = None       # environment steps of a task before the next one's turn, paper: K; ktm: 1
    task_order: Literal["random", "cycle"] | None = None  # how the task of a block is drawn: at random, for ktm in turn
    horizon: Positive | None = None           # steps after which an episode is cut off
    num_goals: Annotated[int, Field(ge=1, le=50)] | None = None  # Meta-World: goals per task, drawn by the seed; 1
    alpha_init: Share = 0.2                   # entropy temperature at the start [reward per nat]
    update_every: Positive = 1                # environment steps per update
    learning_starts: Positive | None = None   # random actions per task before the first update; of its policy for ktm
    batch_size: Positive | None = None        # transitions per update
    buffer_size: Positive = 1_000_000         # replay capacity per task, transitions; no more than the run can fill
    # widths of the hidden layers, of soft-modules' base
    hidden_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    lr: Share | None = None                   # Adam step size of all networks and temperatures
    gamma: Share = 0.99                       # discount factor
    tau: Share = 0.005                        # Polyak coefficient: share of the online critics in a step of targets

    def __post_init__(self):
        self.tasks = self.tasks or FAMILIES[self.env]
        picor, ktm = self.method == "picor", self.method == "ktm"
        presets = PRESETS[self.env] | {"task_order": "random"}
        if ktm:                                                        # a step of every task, an update for each
            presets |= {"task_order": "cycle", "block_steps": 1,
                        "offline_updates": self.total_timesteps or presets["total_timesteps"]}
        for name, value in presets.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for used, names in ((picor, OF_PICOR), (picor and not self.no_correction, OF_CORRECTION),
                            (picor and not self.no_adaptive_weights, OF_WEIGHTS), (ktm, OF_KTM),
                            ("num_goals" in presets, ("num_goals",))):
            for name in names:
                if not used and getattr(self, name) != getattr(Args, name):
                    raise ValueError(f"--{name.replace('_', '-')} has no effect here: --env {self.env}, --method "
                                     f"{self.method} and the switches given; leave it out")
        if not set(self.tasks) <= set(FAMILIES[self.env]) or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks {' '.join(self.tasks)}: different ones of {', '.join(FAMILIES[self.env])}")
        if self.batch_size < len(self.tasks) or self.env in ("mt4", "mt10") and self.horizon > 500:
            raise ValueError("--batch-size is at least one transition per task, --horizon in Meta-World at most 500")


# --- Environments ----------------------------------------------------------------------------------------------------
class GoalTask:
    """Push a point to a goal at a corner: what one task wants is wrong for the three others.

    Observation (2 + T,): position, and the task, one-hot. Action (2,): displacement / 0.1, clipped to +-1. Reward
    -distance, and 1 more within 0.15 of the goal, which is a success. Never terminates. `state`: the position.
    """

    def __init__(self, name: str, one_hot: np.ndarray):
        self.goal, self.one_hot = np.array(GOALS[name]), one_hot

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """First observation of an episode."""
        self.state = rng.uniform(-0.2, 0.2, 2)
        return np.concatenate([self.state, self.one_hot], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        """Observation, reward, termination, and whether this step succeeds."""
        self.state = self.state + 0.1 * np.clip(action, -1.0, 1.0)
        distance = float(np.linalg.norm(self.state - self.goal))
        obs = np.concatenate([self.state, self.one_hot], dtype=np.float32)
        return obs, -distance + (distance < 0.15), False, {"success": distance < 0.15}

    def render(self) -> np.ndarray:
        """The goal in green and the point in red, 3 m wide: (240, 240, 3) uint8."""
        y, x = np.mgrid[1.5:-1.5:240j, -1.5:1.5:240j]
        picture = np.full((240, 240, 3), 255, np.uint8)
        picture[np.hypot(x - self.goal[0], y - self.goal[1]) < 0.15] = (110, 190, 120)
        picture[np.hypot(x - self.state[0], y - self.state[1]) < 0.06] = (200, 50, 50)
        return picture


def cheetah_model(variant: str) -> mujoco.MjModel:
    """Gymnasium's half-cheetah with radius, and half-length where there is one, of one kind of body part scaled.

    Joints keep their places, and the compiler spreads 14 kg over new volumes: a smaller foot makes the rest heavier.
    """
    spec = mujoco.MjSpec.from_file(str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"))
    factor, part = (0.75, variant[5:]) if variant.startswith("Small") else (1.25, variant[3:])
    for geom in PARTS[part]:
        spec.geom(geom).size = spec.geom(geom).size * factor
    return spec.compile()


class CheetahTask(HalfCheetahEnv):
    """HalfCheetah-v5 with one kind of body part smaller or larger, which never terminates.

    Observation (17 + T,): joint positions without x, all velocities, and the task, one-hot. Action (6,): torques.
    Reward x speed - 0.1 |a|^2. Success: faster than 3 m/s.
    """

    def __init__(self, name: str, one_hot: np.ndarray):
        self.variant, self.one_hot = name, one_hot
        super().__init__(render_mode="rgb_array")

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """What Gymnasium's environment simulates."""
        model = cheetah_model(self.variant)
        return model, mujoco.MjData(model)

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """First observation of an episode."""
        self.np_random = rng
        return np.concatenate([super().reset()[0], self.one_hot], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        """Observation, reward, termination, and whether this step succeeds."""
        obs, reward, _, _, info = super().step(action)
        success = {"success": info["x_velocity"] > 3.0}
        return np.concatenate([obs, self.one_hot], dtype=np.float32), reward, False, success

    @property
    def state(self) -> np.ndarray:
        """All that the next step reads, the warm start of MuJoCo's solver included."""
        state = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return state

    @state.setter
    def state(self, state: np.ndarray) -> None:
        mujoco.mj_setState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)


metaworld_benchmark = cache(metaworld.MT1)     # a task's class, and the fifty pairs of goal and start of a seed


class MetaWorldTask:
    """A task of Meta-World v3, reward v2 (0 to 10 a step), which never terminates; an episode has one of `num_goals`.

    Observation (39 + T,): hand, gripper and objects, the same one step earlier, the goal, and the task, one-hot of T.
    Action (4,): displacement of the hand / 1 cm, and the closing of the fingers.
    """

    def __init__(self, name: str, one_hot: np.ndarray, seed: int, num_goals: int):
        benchmark = metaworld_benchmark(f"{name}-v3", seed=seed)
        self.env, self.renderer = benchmark.train_classes[f"{name}-v3"](), None
        self.goals, self.queue, self.one_hot = benchmark.train_tasks[:num_goals], [], one_hot

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """First observation of an episode with the next goal; each comes once before one comes again."""
        self.queue = self.queue or rng.permutation(len(self.goals)).tolist()
        self.env.set_task(self.goals[self.queue.pop()])
        return np.concatenate([self.env.reset()[0], self.one_hot], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict]:
        """Observation, reward, termination, and whether this step succeeds."""
        obs, reward, _, _, info = self.env.step(np.clip(action, -1.0, 1.0))
        return np.concatenate([obs, self.one_hot], dtype=np.float32), reward, False, {"success": info["success"]}

    def render(self) -> np.ndarray:
        """What a camera sees, (480, 480, 3) uint8."""
        try:
            self.renderer = self.renderer or mujoco.Renderer(self.env.model, 480, 480)
        except Exception as error:                                     # each backend of OpenGL raises its own
            sys.exit(f"pictures need OpenGL ({error}); without a screen set MUJOCO_GL=egl or MUJOCO_GL=osmesa and "
                     "install it, or leave --capture-video out")
        self.renderer.update_scene(self.env.data, "corner2")
        return self.renderer.render()[::-1, ::-1]                      # Meta-World's camera hangs upside down


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


def make_envs(args: Args, rng: np.random.Generator, only: int | None = None) -> TaskEnvs:
    """The tasks of the run, or only one, with starts drawn from `rng`."""
    envs = []
    for i, (name, one_hot) in enumerate(zip(args.tasks, np.eye(len(args.tasks)))):
        if only in (None, i):
            envs.append(GoalTask(name, one_hot) if args.env == "goals" else
                        CheetahTask(name, one_hot) if args.env == "halfcheetah" else
                        MetaWorldTask(name, one_hot, args.seed, args.num_goals))
    return TaskEnvs(envs, args.horizon, rng)


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


class BoundedSAC(SAC):
    """SAC with log standard deviations in [-5, 2]: tinier ones would make the KL of the correction explode."""

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(T, B, O) -> mean and log standard deviation of each task's Gaussian before the tanh, (T, B, A) each."""
        mean, raw = self.actor(obs)[0].chunk(2, dim=-1)
        return mean, -5.0 + 3.5 * (torch.tanh(raw) + 1.0)


class SoftModules(nn.Module):
    """Soft Modularization (Yang et al. 2020, arXiv:2003.13661, the deep variant), C networks at once.

    Four layers of four modules each. A module's input is a mixture of the outputs of the layer before, and a routing
    network says from the observation and the task's one-hot how much of each. Widths of the gate and of the modules are
    256 and 128 where the base has 400, as the authors' code has it, and else in proportion.
    """

    def __init__(self, copies: int, num_tasks: int, task_at: int, sizes: list[int], depth: int = 4, modules: int = 4):
        """`sizes`: input, base layers, output; the one-hot begins at `task_at` of the input."""
        super().__init__()
        n_in, *base, n_out = sizes
        gate, width, self.num_modules = round(0.64 * base[-1]), round(0.32 * base[-1]), modules
        self.task = slice(task_at, task_at + num_tasks)

        def stack(count: int, *sizes: int, bound: float | None = None) -> TaskMLP:
            def init(matrix: Tensor) -> None:                          # hidden layers by their number of outputs
                limit = bound or matrix.shape[1] ** -0.5
                nn.init.uniform_(matrix, -limit, limit)
            net = TaskMLP(copies, count, list(sizes), init=init)
            for bias in list(net.params)[1::2]:
                nn.init.uniform_(bias, -bound, bound) if bound else nn.init.constant_(bias, 0.1)
            return net
        self.base, self.embed = stack(1, n_in - num_tasks, *base), stack(1, num_tasks, base[-1])
        self.gate = stack(1, base[-1], gate, gate)
        self.conditions = nn.ModuleList(stack(1, i * modules**2, gate) for i in range(1, depth))
        self.logits = nn.ModuleList(stack(1, gate, modules * (modules if i < depth - 1 else 1), bound=3e-3)
                                    for i in range(depth))
        self.layers = nn.ModuleList(stack(modules, base[-1] if i == 0 else width, width) for i in range(depth))
        self.output = stack(1, width, n_out, bound=3e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, in) -> (C, T, B, out); N = T B, M modules."""
        rows, x = x.shape[:-1], x.reshape(1, -1, x.shape[-1])                              # (1, N, in)
        features = torch.cat([x[..., :self.task.start], x[..., self.task.stop:]], dim=-1)
        base = self.base(features)                                                         # (C, 1, N, base)
        gate = self.gate(torch.relu(base * self.embed(x[..., self.task])))                 # (C, 1, N, gate)
        mixtures, known = [], []          # of a layer's outputs, for each module of the next
        for i, logits in enumerate(self.logits):
            route = gate * self.conditions[i - 1](torch.cat(known, dim=-1)) if i else gate
            mixtures.append(logits(torch.relu(route)).unflatten(-1, (-1, self.num_modules)).softmax(-1))
            known.append(mixtures[-1].flatten(-2))                     # (C, 1, N, M M), the last one (C, 1, N, M)
        out = self.layers[0](torch.relu(base).expand(-1, self.num_modules, -1, -1))        # (C, M, N, width)
        for mixture, layer in zip(mixtures, [*self.layers[1:], self.output]):
            out = layer(torch.relu(torch.einsum("cnij,cjnw->cinw", mixture.squeeze(1), out)))
        return out.view(len(out), *rows, -1)


def make_agent(args: Args, obs_size: int, action_size: int) -> BoundedSAC:
    """One network for all tasks, or with a head for each, or of modules."""
    num_tasks, layers = len(args.tasks), len(args.hidden_sizes) + 1

    def network(copies: int, n_in: int, n_out: int, init) -> nn.Module:
        sizes = [n_in, *args.hidden_sizes, n_out]
        if args.method == "soft-modules":
            return SoftModules(copies, num_tasks, obs_size - num_tasks, sizes)
        return TaskMLP(copies, num_tasks, sizes, layers - (args.method == "mtmhsac"), init)
    actor = network(1, obs_size, 2 * action_size, nn.init.xavier_uniform_)
    agent = BoundedSAC(actor, network(2, obs_size + action_size, 1, nn.init.xavier_normal_), num_tasks)
    agent.log_alpha.data.fill_(math.log(args.alpha_init))
    return agent.to(args.device)


# --- Replay buffer ---------------------------------------------------------------------------------------------------
class TaskReplay:
    """The last transitions of each task; a row is obs, action, reward, next_obs, termination."""

    def __init__(self, capacities: list[int], obs_size: int, action_size: int, device: str):
        self.widths, self.num_added = [obs_size, action_size, 1, obs_size, 1], [0] * len(capacities)
        check_memory(4 * sum(capacities) * sum(self.widths), max(capacities))
        self.data = [torch.zeros(max(1, capacity), sum(self.widths), device=device) for capacity in capacities]

    def add(self, task: int, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Append a transition of one task. Truncation is no termination."""
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.data[task][self.num_added[task] % len(self.data[task])] = torch.from_numpy(row).to(self.data[task].device)
        self.num_added[task] += 1

    def sample(self, rng: np.random.Generator, tasks: list[int], batch_size: int, recent: int = 0) -> list[Tensor]:
        """Draw for each of K tasks its own: obs (K, B, O), actions, rewards (K, B), next_obs, terminations.

        Args:
            recent: draw from the last so many transitions of each task; 0 draws from all.
        """
        rows = []
        for task in tasks:
            data, size = self.data[task], min(self.num_added[task], len(self.data[task]))
            ages = rng.integers(1, min(size, recent or size) + 1, batch_size)              # 1: the newest
            rows.append(data[torch.from_numpy((self.num_added[task] - ages) % len(data)).to(data.device)])
        obs, actions, rewards, next_obs, terminations = torch.stack(rows).split(self.widths, dim=-1)
        return [obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1)]

    def get_state(self) -> list[Tensor]:
        """The rows of each task, the oldest first, which is overwritten next once all places are taken."""
        return [data[:count].roll(-count, 0).cpu() for data, count in zip(self.data, self.num_added)]

    def restore(self, state: list[Tensor]) -> None:
        """Undo `get_state`; of more rows than fit, the newest stay."""
        for task, (data, rows) in enumerate(zip(self.data, state)):
            rows = rows[-len(data):]
            data[:len(rows)], self.num_added[task] = rows.to(data.device), len(rows)


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
def draw_schedule(args: Args) -> np.ndarray:
    """The active task of every environment step, by number: --learning-starts steps of each, then blocks of K steps.

    All methods have the same blocks, as their generator serves nothing else; a longer run begins with a shorter one's.
    """
    num_tasks, count = len(args.tasks), -(-args.total_timesteps // args.block_steps)
    order = np.arange(count) % num_tasks
    if args.task_order == "random":
        order = np.random.default_rng([args.seed, 2]).integers(num_tasks, size=count)
    filling = np.repeat(np.arange(num_tasks), args.learning_starts)
    return np.concatenate([filling, np.repeat(order, args.block_steps)])[:args.total_timesteps]


def task_weights(alpha: Tensor, tau: float) -> Tensor:
    """Eq. 9, softmax(alpha / tau) over tasks, (T,) -> (T,): a larger temperature is a less settled task."""
    return torch.softmax(alpha / tau, dim=0)


def current_weights(args: Args, log_alpha: Tensor, updates: list[int]) -> Tensor:
    """The tasks' weights, (T,), from their temperatures, where the method has any: then after a warm-up."""
    if args.method == "soft-modules":                                  # the nearly solved weigh more
        return torch.softmax(-log_alpha, dim=0)
    if args.method == "picor" and not args.no_adaptive_weights and min(updates) >= args.weight_warmup:
        return task_weights(log_alpha.exp(), args.weight_tau)
    return torch.full_like(log_alpha, 1 / len(log_alpha))


def hinge(advantages: Tensor, weights: Tensor, c: float, gamma: float) -> Tensor:
    """Eq. 10, by how much the weighted advantage, both (T,), falls short of c (1 - gamma) <= 0; at least 0."""
    return (c * (1 - gamma) - (weights * advantages).sum()).clamp(min=0.0)


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(u), u = mean + std * noise, with its log-probability [nats]: (..., A) -> (..., A), (...)."""
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))        # log(1 - tanh(u)^2), exact at any u
    return torch.tanh(u), (gaussian - log_derivative).sum(-1)


def draw_visit_order(num_tasks: int, rng: np.random.Generator | None) -> np.ndarray:
    """For each task the others, (T, T - 1), in a random order, or in that of the list without a generator."""
    others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
    return np.array([rng.permutation(row) if rng else row for row in others])


def project_conflicts(task_grads: Tensor, visit_order: np.ndarray) -> Tensor:
    """Remove from each task's gradient its components that oppose another task's (PCGrad, Algorithm 1).

    Args:
        task_grads: flattened gradients before surgery, (T, P).
        visit_order: row i lists the partners that task i meets, in order, (T, T - 1).
    Returns:
        Projected gradients, (T, P). The paper's update is their sum over tasks.
    """
    projected = task_grads.clone()
    for i, partners in enumerate(visit_order):
        for j in partners:
            # not `@`: in "medium" precision oneDNN takes several times as long for the product of two vectors
            dot = (projected[i] * task_grads[j]).sum()                 # projected so far, against the original j
            if dot < 0:
                projected[i] -= dot / (task_grads[j].square().sum() + 1e-12) * task_grads[j]
    return projected


def descend_mean(args: Args, optimizer: torch.optim.Optimizer, net: nn.Module, losses: Tensor,
                 rng: np.random.Generator) -> None:
    """Descend the mean of the tasks' losses, (K,), after what the method does to gradients."""
    params = list(net.parameters())
    optimizer.zero_grad()
    if args.method == "g-surgery":
        each = torch.eye(len(losses)).to(losses)                       # the loss of one task, and of no other
        by_task = torch.autograd.grad(losses, params, each, is_grads_batched=True)         # (T, C, in, out) each
        task_grads = torch.cat([grad.flatten(1) for grad in by_task], dim=1)               # (T, P)
        mean = project_conflicts(task_grads, draw_visit_order(len(losses), rng)).mean(0)
        for param, part in zip(params, mean.split([param.numel() for param in params])):
            param.grad = part.view_as(param)
    else:
        losses.mean().backward(inputs=params)
    if args.method == "soft-modules":                                  # the policy and each critic to a norm of 1
        grads = [param.grad.view(net.output.stack[0], -1) for param in params]             # (C, ...) each
        norms = torch.cat(grads, dim=1).norm(dim=1, keepdim=True)
        for grad in grads:
            grad /= norms.clamp(min=1.0)
    optimizer.step()


def update(args: Args, agent: SAC, optimizers: dict, buffer: TaskReplay, task: int, weights: Tensor,
           rng: np.random.Generator, teacher: SAC | None = None, offline: bool = False
           ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Phase 1, a SAC step on the active task or, in the baselines, on all; then phase 2, which corrects the policy.

    Args:
        task: the active one, by number.
        weights: of all tasks, (T,), with a sum of 1.
        teacher: of the active task (ktm), whose critics judge the policy, too; `offline` alone, and with its replay.
    Returns:
        Losses; what `correct` says.
    """
    everyone, correcting = list(range(len(args.tasks))), args.method == "picor" and not args.no_correction
    policy_tasks = [task] if args.method in ONE_TASK else everyone
    critic_tasks = everyone if args.method == "picor" and args.critic_batch == "all" else policy_tasks
    batch = buffer.sample(rng, critic_tasks, args.batch_size // len(critic_tasks))
    obs, actions, rewards, next_obs, terminations = batch              # (K, B, ...)
    alpha, scale = agent.log_alpha.detach().exp()[:, None], len(everyone) * weights        # (T, 1), and (T,) around 1

    # Critics, Eq. 6 ------------------------------------------------------------------------------------------
    with torch.no_grad():
        if offline:
            target = agent.q(teacher.critic, obs, actions)             # (2, K, B): each twin learns from its like
        else:
            next_actions, next_log_prob = squash(*agent.policy(next_obs), torch.randn(actions.shape).to(actions))
            next_value = agent.q(agent.target, next_obs, next_actions).amin(0) - alpha[critic_tasks] * next_log_prob
            target = rewards + args.gamma * (1 - terminations) * next_value                # (K, B)
    critic_loss = (agent.q(agent.critic, obs, actions) - target).square().mean(-1).sum(0)  # (K,)
    weighted = scale * critic_loss if args.method == "soft-modules" else critic_loss
    descend_mean(args, optimizers["critic"], agent.critic, weighted, rng)

    # Policy, Eq. 7 -------------------------------------------------------------------------------------------
    if correcting:
        states = buffer.sample(rng, everyone, args.correction_states, args.recent)[0]      # (T, n, O)
        with torch.no_grad():
            before = agent.policy(states)                              # pi_t
    if policy_tasks != critic_tasks:
        obs = buffer.sample(rng, policy_tasks, args.batch_size)[0]
    noise = torch.randn(*obs.shape[:-1], actions.shape[-1]).to(obs)    # of the CPU's generator, whatever the device
    pi, log_prob = squash(*agent.policy(obs), noise)                   # (K, B, A), (K, B)
    judges = ([] if offline else [agent.critic]) + ([teacher.critic] if teacher else [])
    q = sum(agent.q(critic, obs, pi).amin(0) for critic in judges)
    actor_loss = (alpha[policy_tasks] * log_prob - q).mean(-1)         # (K,)
    weighted = actor_loss if correcting else scale[policy_tasks] * actor_loss
    descend_mean(args, optimizers["actor"], agent.actor, weighted, rng)

    # Temperatures, each with an Adam of its own: what rests keeps its statistics --------------------------------
    for z, entropy in zip(policy_tasks, -log_prob.detach().mean(-1)):
        agent.log_alpha.grad = torch.zeros_like(weights)
        agent.log_alpha.grad[z] = entropy + actions.shape[-1]          # of log_alpha (entropy - target), target -A
        optimizers[f"alpha{z}"].step()

    found = correct(args, agent, optimizers["correction"], states, before, weights) if correcting else {}
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
    losses = {"critic": critic_loss.detach().mean().cpu(), "actor": actor_loss.detach().mean().cpu()}
    return losses, {name: value.cpu() for name, value in found.items()}


def correct(args: Args, agent: SAC, optimizer: torch.optim.Optimizer, states: Tensor, before: tuple[Tensor, Tensor],
            weights: Tensor) -> dict[str, Tensor]:
    """Phase 2, Eq. 10: move the policy until no more than c is lost, close to where phase 1 left it.

    Args:
        states: of all tasks, (T, n, O).
        before: mean and log standard deviation in them of pi_t, the policy before phase 1, (T, n, A) each.
        weights: (T,).
    Returns:
        advantage of each task, (T,), hinge, and whether it was corrected, at the start; steps, and KL from where phase
        1 left the policy, at the end.
    """
    alpha = 0.0 if args.hard_advantage else agent.log_alpha.detach().exp()[:, None]
    noise = torch.randn(before[0].shape).to(states)                    # the same for both policies

    def value(mean: Tensor, log_std: Tensor) -> Tensor:
        actions, log_prob = squash(mean, log_std, noise)
        return agent.q(agent.critic, states, actions).amin(0) - alpha * log_prob           # (T, n)
    with torch.no_grad():
        old_value = value(*before)
        actions = [squash(*before, torch.randn(noise.shape).to(noise))[0] for _ in range(4)]
        q = torch.stack([agent.q(agent.critic, states, action).amin(0) for action in actions])
        spread = q.std(0).mean(1).clamp(min=1e-6)                      # of Q over four actions, (T,)
        mean, log_std = agent.policy(states)
        anchor = Normal(mean, log_std.exp(), validate_args=False)      # pi', where phase 1 left the policy
    for steps in range(args.correction_steps + 1):
        mean, log_std = agent.policy(states)
        kl = kl_divergence(Normal(mean, log_std.exp(), validate_args=False), anchor).sum(-1).mean()    # at first 0
        advantages = (value(mean, log_std) - old_value).mean(1) / spread                   # (T,)
        shortfall = hinge(advantages, weights, args.c, args.gamma)
        if steps == 0:
            found = {"advantage": advantages.detach(), "hinge": shortfall.detach()}
            found["corrected"] = (shortfall > 0).float()
        if steps == args.correction_steps or not shortfall > 0:        # enough, or reached: not one step more
            break
        loss = kl + 0.5 * args.penalty * shortfall.square()
        optimizer.zero_grad()
        loss.backward(inputs=list(agent.actor.parameters()))
        optimizer.step()
    return found | {"kl": kl.detach(), "steps": torch.tensor(float(steps))}


# --- Training --------------------------------------------------------------------------------------------------------
def evaluate(args: Args, act, stopped=lambda: False) -> dict[str, np.ndarray] | None:
    """--eval-episodes episodes of every task, in environments with a generator of their own.

    Args:
        act: observations (T, O) -> actions (T, A).
    Returns:
        return and success, (T, episodes) each; None as soon as `stopped` says so.
    """
    envs, episodes, frames = make_envs(args, np.random.default_rng([args.seed, 1])), [[] for _ in args.tasks], []
    while min(map(len, episodes)) < args.eval_episodes:
        if stopped():
            return None
        if args.capture_video and not all(episodes) and envs.episodes[0]["episodic_length"] % 4 == 0:
            frames.append(np.hstack([env.render()[::2, ::2] for env in envs.envs]))
        for task, episode in envs.step(act(envs.obs))[-1].items():
            episodes[task].append(episode)
    if frames:
        imageio.mimsave(args.evaluate / "tasks.gif", frames, duration=60, loop=0)
    return {kind: np.array([[episode[key] for episode in row[:args.eval_episodes]] for row in episodes])
            for kind, key in (("return", "episodic_return"), ("success", "success"))}


def make_optimizers(args: Args, agent: SAC) -> dict[str, torch.optim.Optimizer]:
    """An Adam for the policy, for both critics, for the correction, and for each task's temperature."""
    params = {"actor": agent.actor.parameters(), "critic": agent.critic.parameters(),
              "correction": agent.actor.parameters()}
    params |= {f"alpha{z}": [agent.log_alpha] for z in range(len(args.tasks))}
    return {name: torch.optim.Adam(group, args.lr, fused=True) for name, group in params.items()}


def get_state(agents: nn.ModuleList, optimizers: list, buffer: TaskReplay, envs: list, rng) -> dict:
    """All that the next step reads, but for Meta-World's simulators, whose state cannot be saved."""
    worlds = [dict(obs=torch.from_numpy(each.obs), episodes=each.episodes, simulator=each.envs[0].state.tolist())
              for each in envs if hasattr(each.envs[0], "state")]
    return dict(agents=agents.state_dict(), buffer=buffer.get_state(), worlds=worlds,
                optimizers=[{name: opt.state_dict() for name, opt in each.items()} for each in optimizers],
                rng=json.dumps(rng.bit_generator.state), torch_rng=torch.get_rng_state())


def restore(state: dict, optimizers: list, buffer: TaskReplay, envs: list, rng) -> None:
    """Undo `get_state` for all but the agents; in Meta-World fresh episodes begin."""
    for each, saved in zip(optimizers, state["optimizers"]):
        for name, optimizer in each.items():                           # with --lr as it is now
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved[name]["state"]})
    buffer.restore(state["buffer"])
    rng.bit_generator.state = json.loads(state["rng"])
    torch.set_rng_state(state["torch_rng"])
    for each, world in zip(envs, state["worlds"]):
        each.obs, each.episodes = world["obs"].numpy(), world["episodes"]
        each.envs[0].state = np.array(world["simulator"])
    if not state["worlds"]:
        for each in envs:
            each.reset()
        tqdm.write("the simulators' states are not saved: the run goes on with fresh episodes, and a block anew")


def load_experts(args: Args, obs_size: int, action_size: int) -> tuple[nn.ModuleList, TaskReplay]:
    """KTM-DRL's experts, one per task, from a run of --method independent, with its replay."""
    path = (args.teachers or Path()) / "args.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["args"] if path.exists() else {}
    wanted = {"method": "independent", "env": args.env, "tasks": list(args.tasks), "seed": args.seed,
              "num_goals": args.num_goals}
    if wanted != {key: stored.get(key) for key in wanted}:
        sys.exit("--method ktm needs --teachers RUN, the run folder of --method independent with the same --env, "
                 "--tasks, --seed and --num-goals")
    like_them, state = replace(args, hidden_sizes=stored["hidden_sizes"]), load_checkpoint(args.teachers)
    teachers = nn.ModuleList(make_agent(like_them, obs_size, action_size) for _ in args.tasks)
    teachers.load_state_dict(state["agents"])
    replay = TaskReplay([len(rows) for rows in state["buffer"]], obs_size, action_size, args.device)
    replay.restore(state["buffer"])
    tqdm.write(f"first {args.offline_updates:,} updates on the data of the teachers, whose {state['global_step']:,} "
               "environment steps come on top")
    return teachers, replay


def imitate(args: Args, agent: SAC, optimizers: dict, teachers: nn.ModuleList, replay: TaskReplay, count: int,
            rng: np.random.Generator) -> dict[str, Tensor]:
    """Update number `count` of KTM-DRL's first phase, on the teachers' replay and by their critics; its losses."""
    task, weights = (count - 1) % len(teachers), current_weights(args, agent.log_alpha.detach(), [])
    losses, _ = update(args, agent, optimizers, replay, task, weights, rng, teachers[task], offline=True)
    if count == args.offline_updates:                                  # the second phase begins with these
        agent.target.load_state_dict(agent.critic.state_dict())
        for optimizer in optimizers.values():
            optimizer.state.clear()
    return losses


def train(args: Args) -> Path:
    """Blocks of one task: act, phase 1, phase 2; returns the run folder."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") is False:         # x86 without AMX:
        torch.set_float32_matmul_precision("medium")   # oneDNN's products, often faster; others would round to bfloat16
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)                             # starts, replay indices, random actions, orders
    num_tasks, schedule = len(args.tasks), draw_schedule(args)
    envs = [make_envs(args, rng, task) for task in range(num_tasks)]   # one is stepped at a time
    obs_size, action_size = envs[0].obs.shape[1], ACTION_SIZES[args.env]
    agents = nn.ModuleList(make_agent(args, obs_size, action_size)     # one for all tasks, or one for each, of which
                           for _ in range(num_tasks if args.method == "independent" else 1))     # only its task's turn
    optimizers = [make_optimizers(args, agent) for agent in agents]

    @torch.no_grad()
    def act(obs: np.ndarray, explore: bool = False) -> np.ndarray:
        rows = torch.from_numpy(obs).to(args.device)[:, None].chunk(len(agents))           # (T, 1, O), or T of 1
        mean, log_std = map(torch.cat, zip(*(agent.policy(row) for agent, row in zip(agents, rows))))
        noise = torch.randn(mean.shape).to(mean) if explore else torch.zeros_like(mean)
        return squash(mean, log_std, noise)[0].squeeze(1).cpu().numpy()

    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    if state:
        agents.load_state_dict(state["agents"])
    if args.evaluate:
        print_table(args.tasks, evaluate(args, act))
        return args.evaluate
    teachers = [None] * num_tasks
    if args.method == "ktm":
        teachers, teachers_replay = load_experts(args, obs_size, action_size)
    buffer = TaskReplay([min(args.buffer_size, int(count)) for count in np.bincount(schedule, minlength=num_tasks)],
                        obs_size, action_size, args.device)
    run, global_step, at, offline = Run(args, args.env, args.tasks, state), 0, 0, 0        # at: place in the schedule
    updates, watched = [0] * num_tasks, defaultdict(list)              # of each task; since the last evaluation
    fill = num_tasks * args.learning_starts
    if args.resume:
        restore(state, optimizers, buffer, envs, rng)
        global_step, at, offline, updates = (state[key] for key in ("global_step", "at", "offline", "updates"))
        watched |= state["watched"]
        if not state["worlds"]:                                        # a block with one episode cut short begins anew
            at -= at % args.learning_starts if at < fill else (at - fill) % args.block_steps

    def save() -> None:
        counts = dict(at=at, offline=offline, updates=updates, watched=dict(watched))
        run.save(global_step, counts | get_state(agents, optimizers, buffer, envs, rng))

    save()                                                             # from here on a killed run can be resumed
    while True:
        # Evaluate: first, so that a run that was stopped during an evaluation makes it up ---------------------
        if run.due(global_step) and (result := evaluate(args, act, run.stop.is_set)):
            extra = {key: float(np.mean(values)) for key, values in watched.items()}
            extra |= {f"{name}/updates": count for name, count in zip(args.tasks, updates)}
            watched.clear()
            run.log_evaluation(global_step, result, extra)
        if global_step >= args.total_timesteps or run.stop.is_set():
            break

        # KTM-DRL's first phase, on the teachers' replay -------------------------------------------------------
        if offline < (args.offline_updates or 0):
            offline += 1
            run.log("offline", imitate(args, agents[0], optimizers[0], teachers, teachers_replay, offline, rng))
            if offline % args.checkpoint_every == 0:
                save()
                tqdm.write(f"offline update {offline:,}/{args.offline_updates:,}")
            continue

        # Act in the active task, store ------------------------------------------------------------------------
        task, filling = int(schedule[at]), at < fill
        obs = np.concatenate([each.obs for each in envs])              # (T, O)
        if filling and args.method != "ktm":
            action = rng.uniform(-1, 1, action_size)
        else:
            action = act(obs, explore=True)[task]
        next_obs, rewards, terminations, ended = envs[task].step(action[None])             # of one task
        global_step, at = global_step + 1, at + 1
        buffer.add(task, obs[task], action, rewards[0], next_obs[0], terminations[0])
        for episode in ended.values():
            run.log(f"tasks/{args.tasks[task]}", episode)

        # Update: phase 1 on this task, phase 2 on all ---------------------------------------------------------
        if not filling and global_step % args.update_every == 0:
            which = task % len(agents)                                 # the one agent, or the task's own
            log_alpha = torch.stack([agents[z % len(agents)].log_alpha[z].detach() for z in range(num_tasks)])
            weights = current_weights(args, log_alpha, updates)
            losses, found = update(args, agents[which], optimizers[which], buffer, task, weights, rng, teachers[task])
            updates[task] += 1
            run.log("losses", losses | {"alpha": log_alpha.exp().cpu()})
            run.log("method", found | {"weight": weights.cpu()})
            columns = {name: value.item() for name, value in found.items() if value.ndim == 0}
            columns |= {f"{name}/weight": weight for name, weight in zip(args.tasks, weights.tolist())}
            for name, value in columns.items():
                watched[name].append(value)

        if crossed(global_step - 1, global_step, LOG_EVERY):
            run.write(global_step)
        if crossed(global_step - 1, global_step, args.checkpoint_every):
            save()
    save()
    if not run.stop.is_set():
        plot_weights(run.dir, args.tasks, run.rows)
        print_table(args.tasks, result)
    run.close()
    return run.dir


# --- Pictures of the method ------------------------------------------------------------------------------------------
def plot_weights(folder: Path, names: list[str], rows: list[dict]) -> None:
    """weights.png: the tasks' weights over training (Figure 4), and how much is corrected."""
    rows = [row for row in rows if "corrected" in row]                 # those after the first update
    if not rows:
        return
    steps = [row["global_step"] for row in rows]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [[row[f"{name}/weight"] for name in names] for row in rows], label=names)
    left.set(xlabel=STEPS, ylabel="weight of the task", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    right.plot(steps, [row["corrected"] for row in rows])
    right.set(xlabel=STEPS, ylabel="share of updates with a correction", ylim=(0, 1))
    kl = right.twinx()
    kl.plot(steps, [row["kl"] for row in rows], color="C1", linestyle="--")
    kl.set_ylabel("KL from phase 1's policy [nats], dashed")
    for axis in (left, right):
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(folder / "weights.png", dpi=120)


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
