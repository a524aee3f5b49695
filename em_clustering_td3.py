# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "tyro==1.0.17", "pydantic==2.14.4",
#   "filelock==4.3.1", "imageio==2.38.1", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Task clustering by expectation-maximisation with TD3: tasks that disagree get different policies.

Ackermann, Richter, Wattenhofer: "Unsupervised Task Clustering for Multi-Task Reinforcement Learning", ECML-PKDD 2021.
No policy is told which task it is in. Play every policy on every task and give each task to the policy that is best at
it (E-step), then train each policy with TD3 on episodes of its own tasks (M-step), and repeat. Nothing is reset when a
task moves: a policy keeps its weights and all of its replay. tabular_em.py is the same in tables, the place to start.

    E-step: G[t, i], return of policy i on task t        play_pairs
    assignment: argmax_i G[t, i]                         train
    M-step: TD3 on tasks drawn from T_i, or from all     begin in train, td3_update
    gradient surgery (Yu et al. 2020), a baseline        project_conflicts, apply_gradients

Differences from the paper, each explained in docs/em_clustering_td3.md:
1. All policies train side by side, with updates between steps in place of a block after each episode. An M-step has
   exactly --m-step-size steps per policy: episodes in progress are cut short, as is the last M-step by the total.
2. Updates begin after 40,000 steps, summed over policies, in every method: the paper's 10,000 of each of four policies.
3. In an E-step all policies meet the same start states (--no-common-starts: each its own, as in the paper).
4. Time limits bootstrap (--timeout-is-terminal for the authors' code); target noise is TD3's own.
5. The pendulum's policies use half of the torque, as in the authors' code (--action-scale 2 for the paper's text).
6. Reported are the assigned policy and the maximum over policies, which the paper probably plots.
7. Walkers as in the authors' code where it differs from the text: low stumps, finish lines at 27, 44 and 89 metres.

    python em_clustering_td3.py                           # seven pendulums, four policies
    python em_clustering_td3.py --method sp --seed 2      # one policy for all
    python em_clustering_td3.py --env track --tasks sprint run marathon --hidden-sizes 128 128
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
from typing import Annotated, Literal, NamedTuple

import imageio
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from gymnasium.envs.box2d import bipedal_walker
from gymnasium.envs.classic_control import pendulum
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
PENDULUM = dict(  # {method: value} where it depends on the method; without "else" other methods have no such setting
    hidden_sizes={"multihead": (96, 64), "surgery": (128, 128), "else": (64, 64)}, lr=3e-3, batch_size=128,
    update_every=1, exploration_noise=0.05, smoothing_noise=0.1, buffer_size=2_000_000, total_timesteps=1_000_000,
    eval_every=50_000, eval_episodes=20, num_policies={"em": 4, "random-clusters": 4}, m_step_size={"em": 50_000},
    e_step_episodes={"em": 20})
WALKER = PENDULUM | dict(
    hidden_sizes={"multihead": (400, 400), "surgery": (800, 600), "else": (400, 300)}, lr=1e-3, batch_size=1_000,
    update_every={"multihead": 5, "surgery": 5, "else": 3}, exploration_noise=0.1, smoothing_noise=0.2,
    buffer_size=5_000_000, total_timesteps=2_400_000, eval_every=200_000, eval_episodes=5, m_step_size={"em": 200_000})
PRESETS = {"pendulum": PENDULUM, "track": WALKER, "legs": WALKER}      # what a setting left at None becomes
OWN_TASK = {  # methods with a policy, or a head, for each task: which of the three layers all tasks have in common
    "ppt": (False, False, False), "multihead": (False, True, False), "surgery": (True, True, False)}
STEPS = "environment steps, summed over policies"
LOG_EVERY = 5_000                                             # environment steps between writes to TensorBoard
FIXED = {"env", "method", "tasks", "seed", "num_policies", "hidden_sizes", "buffer_size", "action_scale", "flat_ground",
         "timeout_is_terminal"}                               # of a run that goes on

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


@dataclass
class Args:
    # seven pendulum lengths; six track-and-field events of a walker; three leg lengths on three grounds
    env: Literal["pendulum", "track", "legs"] = "pendulum"
    # EM; one policy; one per task; a shared layer and heads; a shared trunk with surgery; clusters drawn once
    method: Literal["em", "sp", "ppt", "multihead", "surgery", "random-clusters"] = "em"
    tasks: tuple[str, ...] = ()               # some of the tasks of --env, such as sprint run marathon; none: all
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive | None = None   # environment steps, summed over policies; evaluation not counted
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive | None = None        # environment steps between evaluations
    eval_episodes: Positive | None = None     # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive = 100_000      # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    num_policies: Positive | None = None      # of em and random-clusters, paper: n
    m_step_size: Positive | None = None       # training steps per policy and M-step, paper: T_M
    e_step_episodes: Positive | None = None   # deterministic episodes per policy and task in an E-step, paper: k
    common_starts: bool = True                # in an E-step all policies meet the same start states of a task
    action_scale: Annotated[float, Field(gt=0, le=2)] = 1.0  # largest mean action; paper's text: 2, pendulum's limit
    flat_ground: bool = False                 # legs: no bumps of 2 to 12 cm on flat ground, as in the paper's text
    timeout_is_terminal: bool = False         # no bootstrapping at time limits, as in the authors' code
    exploration_noise: NonNegative | None = None  # standard deviation of noise on training actions, clipped to +-0.5
    smoothing_noise: NonNegative | None = None  # standard deviation of noise on target actions, clipped to +-0.5
    learning_starts: Positive = 40_000        # environment steps, summed over policies, before the first update
    update_every: Positive | None = None      # training steps per policy and update, paper: u
    policy_delay: Positive = 3                # updates of the critics per update of policies and targets
    batch_size: Positive | None = None        # transitions per policy, or task with heads, and update
    buffer_size: Positive | None = None       # replay capacity per policy, or task with heads, transitions
    hidden_sizes: tuple[Positive, Positive] | None = None  # widths of the two hidden layers
    lr: Share | None = None                   # Adam step size of policies and critics
    gamma: Share = 0.99                       # discount factor
    tau: Share = 0.005                        # Polyak coefficient: share of the online networks in a step of targets
    action_penalty: NonNegative = 1e-3        # of the mean squared action, in the policies' loss
    preactivation_penalty: NonNegative = 0.0  # of the mean squared output before the tanh, likewise; not in the paper
    max_grad_norm: NonNegative = 0.5          # L2 norm to which gradients are clipped, tensor by tensor; 0: not at all

    def __post_init__(self):
        self.tasks = self.tasks or tuple(TASKS[self.env])
        if set(self.tasks) - set(TASKS[self.env]) or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks {' '.join(self.tasks)}: give different ones of {' '.join(TASKS[self.env])}")
        for name, value in PRESETS[self.env].items():
            value = value.get(self.method, value.get("else")) if isinstance(value, dict) else value
            if getattr(self, name) is None:
                setattr(self, name, value)
            elif value is None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --method {self.method}; leave it out")
        if not self.common_starts and self.method != "em" or self.flat_ground and self.env != "legs":
            raise ValueError("--no-common-starts goes with --method em, --flat-ground with --env legs; leave it out")


# --- Environments ----------------------------------------------------------------------------------------------------
class Event(NamedTuple):
    """A task of the walker. Distances in Box2D's metres; the walker starts at x = 4.67."""

    leg: int                                                  # length of upper and of lower leg [1/30 m]
    reward: str                                               # "speed", "height" or "length" of jumps, "progress"
    finish: float                                             # x that ends the episode
    energy: float = 0.028                                     # price of a motor's full effort for a step
    stumps: str = ""                                          # "hurdles", or the gap between low stumps [m]
    stump_height: float = 0.0                                 # its mean [terrain steps of 0.467 m]


TASKS = {
    "pendulum": {f"length{round(100 * length)}cm": length for length in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)},    # [m]
    "track": {"jump-up": Event(45, "height", 88.667), "jump-long": Event(45, "length", 26.6),
              "sprint": Event(45, "speed", 26.6), "run": Event(45, "speed", 44.333),
              "marathon": Event(45, "speed", 88.667, 0.052), "hurdles": Event(45, "speed", 88.667, stumps="hurdles")},
    "legs": {f"legs{leg}-{ground}": Event(leg, "progress", 88.667, stumps=gap, stump_height=height)
             for leg in (25, 35, 45)
             for ground, gap, height in (("flat", "4", 0.0), ("gap2", "2", 0.5), ("gap4", "4", 0.5))},
}
HORIZON = {"pendulum": 500, "track": 2_000, "legs": 2_000}    # steps of a training episode ...
EVAL_HORIZON = HORIZON | {"pendulum": 200}                    # ... and of one that is played without learning


class PendulumEnv(pendulum.PendulumEnv):
    """Gymnasium's pendulum with a length of its own, which is not observed. Success: upright at the end."""

    def __init__(self, length: float):
        super().__init__(render_mode="rgb_array")
        self.l = length

    def step(self, action):
        (angle, velocity), torque = map(float, self.state), min(max(float(action[0]), -2.0), 2.0)
        reward = -(pendulum.angle_normalize(angle)**2 + 0.1 * velocity**2 + 0.001 * torque**2)
        velocity += 0.05 * (15 / self.l * math.sin(angle) + 3 * torque / self.l**2)            # 3 g / (2 l)
        angle += 0.05 * velocity
        self.state = angle, min(max(velocity, -8.0), 8.0)     # after the angle has moved, as in Gym's first version
        return self._get_obs(), reward, False, False, {"success": math.cos(angle) > 0.95}


class WalkerEnv(bipedal_walker.BipedalWalker):
    """Gymnasium's two-legged walker in an event, which is not observed. Success: over the finish line."""

    def __init__(self, event: Event):
        super().__init__(render_mode="rgb_array")
        self.event = event

    def reset(self, *, seed=None, options=None):
        height = self.event.leg / bipedal_walker.SCALE
        bipedal_walker.LEG_H = height                         # only the stock reset reads these three
        bipedal_walker.LEG_FD.shape.SetAsBox(bipedal_walker.LEG_W / 2, height / 2)
        bipedal_walker.LOWER_FD.shape.SetAsBox(0.8 * bipedal_walker.LEG_W / 2, height / 2)
        self.world, self.terrain = bipedal_walker.Box2D.b2World(), []  # a used world would not repeat itself exactly
        self.airborne, self.last_contact_x = False, 0.0
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, _, _, _ = super().step(action)
        event, (x, y) = self.event, self.hull.position
        fallen, finished = self.game_over or x < 0, x > event.finish
        contact = self.legs[1].ground_contact or self.legs[3].ground_contact
        landed = contact and self.airborne
        if event.reward != "progress":                        # that is the stock reward
            reward = {"speed": 0.1 * self.hull.linearVelocity.x, "height": landed * (y - self.last_contact_x),
                      "length": landed * (x - self.last_contact_x)}[event.reward]
            reward = -100.0 if fallen else reward - event.energy * float(np.abs(action).clip(0, 1).sum())
        self.airborne, self.last_contact_x = not contact, x if contact else self.last_contact_x
        return obs, float(reward), bool(fallen or finished), False, {"success": finished and not fallen}

    def _generate_terrain(self, hardcore):
        """Level ground; stumps as wide as a terrain step from x = 9.33 on, which "flat" has too, 2 to 12 cm high."""
        step, ground, length = bipedal_walker.TERRAIN_STEP, bipedal_walker.TERRAIN_HEIGHT, bipedal_walker.TERRAIN_LENGTH
        left, bodies = bipedal_walker.TERRAIN_STARTPAD * step, []
        while self.event.stumps and left < length * step:
            hurdle = self.event.stumps == "hurdles"           # 1 m high
            top = ground + (1.0 if hurdle else step * max(0.05, self.np_random.normal(self.event.stump_height, 0.1)))
            bodies.append((self.fd_polygon, [(left, ground), (left + step, ground), (left + step, top), (left, top)]))
            left += step * self.np_random.integers(5, 10, 2).sum() if hurdle else float(self.event.stumps) + step
        bodies += [(self.fd_edge, [(i * step, ground), ((i + 1) * step, ground)]) for i in range(length - 1)]
        for fixture, corners in bodies:
            fixture.shape.vertices = corners
            body = self.world.CreateStaticBody(fixtures=fixture)
            body.color1 = body.color2 = (153, 153, 153)
            self.terrain.append(body)
        self.terrain_poly = [([(0, ground), (length * step, ground), (length * step, 0), (0, 0)], (102, 153, 76))]


def make_env(args: Args, name: str) -> PendulumEnv | WalkerEnv:
    """A task's environment."""
    task = TASKS[args.env][name]
    if args.env == "pendulum":
        return PendulumEnv(task)
    return WalkerEnv(task._replace(stumps="") if args.flat_ground and task.stump_height == 0 else task)


class Episode:
    """An episode in progress, in an environment of its own: last observation, return and length so far."""

    def __init__(self, args: Args, task: int, seed: int, horizon: int):
        self.args, self.task, self.horizon, self.env = args, task, horizon, make_env(args, args.tasks[task])
        self.obs, self.total, self.length, self.over = self.env.reset(seed=int(seed))[0], 0.0, 0, False

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Reward and termination, of which the time limit is none unless asked for."""
        self.obs, reward, terminated, _, info = self.env.step(action)
        self.total, self.length, self.success = self.total + reward, self.length + 1, info["success"]
        self.over = terminated or self.length == self.horizon
        return reward, self.over if self.args.timeout_is_terminal else terminated


# --- Networks --------------------------------------------------------------------------------------------------------
class PolicyMLP(nn.Module):
    """An MLP for each of R policies, C times over (1 for policies, 2 for twin critics), all evaluated at once.

    A layer is a stack of matrices: (C * R, in, out), one for each policy, or (C, in, out) where all share it.
    """

    def __init__(self, copies: int, num_policies: int, sizes: list[int], shared: tuple[bool, bool, bool]):
        super().__init__()
        self.stack, self.params = (copies, num_policies), nn.ParameterList()   # weight and bias of each layer in turn
        for n_in, n_out, one_for_all in zip(sizes[:-1], sizes[1:], shared):
            weight = torch.empty(copies * (1 if one_for_all else num_policies), n_in, n_out)
            for matrix in weight:
                nn.init.xavier_uniform_(matrix)
            self.params.extend([weight, torch.zeros(len(weight), 1, n_out)])

    def unshared(self) -> list[Tensor]:
        """Copies of its parameters, shared ones once for each policy: gradients then arrive policy by policy."""
        return [param.detach().repeat_interleave(math.prod(self.stack) // len(param), dim=0).requires_grad_()
                for param in self.params]

    def forward(self, x: Tensor, params: list[Tensor] | None = None) -> Tensor:
        """(R, B, in) -> (C, R, B, out): row i through the networks of policy i, with other parameters if given."""
        params = list(self.params if params is None else params)
        x = x.expand(len(params[-1]) // self.stack[1], *x.shape)       # those of the first twin alone are half as many
        shape = x.shape[:-1]
        for layer in range(0, len(params), 2):
            weight, bias = params[layer:layer + 2]
            x = torch.baddbmm(bias, x.reshape(len(weight), -1, x.shape[-1]), weight)
            if layer < len(params) - 2:
                x = torch.relu_(x)                                     # in place: large activations cost memory traffic
        return x.view(*shape, -1)


class TD3(nn.Module):
    """What TD3 trains for R policies: actors and twin critics, with their targets."""

    def __init__(self, args: Args, num_policies: int, env: PendulumEnv | WalkerEnv):
        super().__init__()
        self.scale, self.limit = args.action_scale, float(env.action_space.high[0])
        self.sizes = obs_size, action_size = *env.observation_space.shape, *env.action_space.shape
        shared = OWN_TASK.get(args.method, (False, False, False))
        self.actor = PolicyMLP(1, num_policies, [obs_size, *args.hidden_sizes, action_size], shared)
        self.critic = PolicyMLP(2, num_policies, [obs_size + action_size, *args.hidden_sizes, 1], shared)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)

    def q(self, critic: PolicyMLP, obs: Tensor, actions: Tensor, *params) -> Tensor:
        """Twin Q-functions of `critic`, online or target: (R, B, O) and (R, B, A) -> (2, R, B)."""
        return critic(torch.cat([obs, actions], dim=-1), *params).squeeze(-1)

    def noisy(self, actions: Tensor, std: float) -> Tensor:
        """Actions with Gaussian noise, itself within +-0.5, inside the environment's limits."""
        noise = std * torch.randn(actions.shape).to(actions)           # of the CPU's generator, whatever the device
        return (actions + noise.clamp(-0.5, 0.5)).clamp(-self.limit, self.limit)

    @torch.no_grad()
    def act(self, obs: np.ndarray, std: float = 0.0) -> np.ndarray:
        """Actions of each policy in its own row of observations, (R, B, O) -> (R, B, A)."""
        actions = self.scale * torch.tanh(self.actor(torch.from_numpy(obs).to(self.actor.params[0].device))[0])
        return (self.noisy(actions, std) if std else actions).cpu().numpy()


# --- Replay buffer ---------------------------------------------------------------------------------------------------
class PolicyReplay:
    """The last `capacity` transitions of each policy; a row is obs, action, reward, next_obs, termination."""

    def __init__(self, num_policies: int, capacity: int, obs_size: int, action_size: int, device: str):
        self.widths, self.num_added = [obs_size, action_size, 1, obs_size, 1], 0         # per policy: all add at once
        check_memory(4 * num_policies * capacity * sum(self.widths), capacity)
        self.data = torch.zeros(num_policies, capacity, sum(self.widths), device=device)
        self.policies = torch.arange(num_policies, device=device)[:, None]

    def __len__(self) -> int:
        return min(self.num_added, self.data.shape[1])

    def add(self, obs, actions, rewards, next_obs, terminations) -> None:
        """Append one transition per policy: (R, O), (R, A), (R,), (R, O), (R,)."""
        row = np.concatenate([obs, actions, rewards[:, None], next_obs, terminations[:, None]], 1, dtype=np.float32)
        self.data[:, self.num_added % self.data.shape[1]] = torch.from_numpy(row).to(self.data.device)
        self.num_added += 1

    def sample(self, rng: np.random.Generator, batch_size: int) -> list[Tensor]:
        """Draw uniformly, for each policy its own: obs (R, B, O), actions, rewards (R, B), next_obs, terminations."""
        index = torch.from_numpy(rng.integers(len(self), size=(len(self.data), batch_size))).to(self.data.device)
        obs, actions, rewards, next_obs, terminations = self.data[self.policies, index].split(self.widths, dim=-1)
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
def random_clusters(num_tasks: int, num_policies: int, rng: np.random.Generator) -> np.ndarray:
    """Assignment for the ablation, (T,): tasks fall into n rows of ceil(T / n) slots each, one row per policy."""
    row_size = -(-num_tasks // num_policies)
    return rng.permutation(num_policies * row_size)[:num_tasks] // row_size


def td3_update(args: Args, agent: TD3, optimizers: dict, batch: list[Tensor], update_policies: bool,
               rng: np.random.Generator) -> dict[str, Tensor]:
    """One TD3 step of every policy: critics, and with `update_policies` actors and all targets. Losses, (R,) each."""
    obs, actions, rewards, next_obs, terminations = batch              # (R, B, O), (R, B, A), (R, B), ...
    with torch.no_grad():
        next_actions = agent.noisy(agent.scale * torch.tanh(agent.actor_target(next_obs)[0]), args.smoothing_noise)
        next_q = agent.q(agent.critic_target, next_obs, next_actions).amin(0)                          # (R, B)
        target = rewards + args.gamma * (1 - terminations) * next_q
    params = agent.critic.unshared()
    losses = {"critic": (agent.q(agent.critic, obs, actions, params) - target).square().mean(-1).sum(0)}
    apply_gradients(args, optimizers["critic"], agent.critic, losses["critic"], params, rng)

    if update_policies:
        params, first_twin = agent.actor.unshared(), [param[:len(param) // 2] for param in agent.critic.params]
        before_tanh = agent.actor(obs, params)[0]                                                      # (R, B, A)
        pi = agent.scale * torch.tanh(before_tanh)
        losses["actor"] = (-agent.q(agent.critic, obs, pi, first_twin)[0].mean(1)
                           + args.action_penalty * pi.square().mean((1, 2))
                           + args.preactivation_penalty * before_tanh.square().mean((1, 2)))
        apply_gradients(args, optimizers["actor"], agent.actor, losses["actor"], params, rng)
        with torch.no_grad():
            for target, online in ((agent.actor_target, agent.actor), (agent.critic_target, agent.critic)):
                torch._foreach_lerp_(list(target.params), list(online.params), args.tau)
    return {name: loss.detach() for name, loss in losses.items()}


def apply_gradients(args: Args, optimizer: torch.optim.Optimizer, net: PolicyMLP, losses: Tensor, params: list[Tensor],
                    rng: np.random.Generator) -> None:
    """One step of Adam on each policy's loss, (R,), which depends on `params`, what `net.unshared` gave.

    Where tasks share a layer, it gets the mean of their gradients: in surgery after projection, of each twin by itself,
    partners in an order that `rng` draws. Then gradients are clipped, tensor by tensor.
    """
    grads = torch.autograd.grad(losses.sum(), params)                                  # (C * R, in, out) each
    shared = [grad.unflatten(0, net.stack) for grad, param in zip(grads, net.params) if len(grad) > len(param)]
    for c in range(net.stack[0]) if args.method == "surgery" and shared else ():
        by_task = torch.cat([grad[c].flatten(1) for grad in shared], dim=1)            # (T, P)
        projected = project_conflicts(by_task, draw_visit_order(len(by_task), rng))
        for grad, part in zip(shared, projected.split([grad[c, 0].numel() for grad in shared], dim=1)):
            grad[c] = part.view_as(grad[c])                                            # of `grads`, too
    for param, grad in zip(net.params, grads):
        param.grad = grad if len(grad) == len(param) else grad.unflatten(0, net.stack).mean(1)
        if args.max_grad_norm:
            norm = torch.linalg.vector_norm(param.grad, dim=(1, 2), keepdim=True)
            param.grad *= (args.max_grad_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
    optimizer.step()


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


# --- Training --------------------------------------------------------------------------------------------------------
def play_pairs(args: Args, agent: TD3, episodes: int, rng: np.random.Generator, common_starts: bool,
               stopped) -> dict | None:
    """Deterministic episodes of every policy in every task that it could have, all of these pairs side by side.

    Args:
        rng: draws starts and grounds of a task's episodes, the same for all policies or each its own.
        stopped: asked at every step; where it says so, there is no result.
    Returns:
        return and success, (n, T, episodes) each, nan for pairs that do not play; steps, how many were taken.
    """
    n, num_tasks, steps = agent.actor.stack[1], len(args.tasks), 0
    results = np.full((2, n, num_tasks, episodes), np.nan)
    seeds = rng.integers(2**31, size=(1 if common_starts else n, num_tasks, episodes))       # of all, or of each
    pairs = np.argwhere(np.eye(n) if args.method in OWN_TASK else np.ones((n, num_tasks)))
    for k in range(episodes):
        running = [(i, t, Episode(args, t, seeds[i % len(seeds), t, k], EVAL_HORIZON[args.env])) for i, t in pairs]
        obs = np.zeros((n, num_tasks, agent.sizes[0]), np.float32)
        while running:
            if stopped():
                return None
            for i, t, episode in running:
                obs[i, t] = episode.obs
            actions = agent.act(obs)                                   # (n, T, A)
            for i, t, episode in running:
                episode.step(actions[i, t])
                results[:, i, t, k] = episode.total, episode.success   # stays after the last step
            steps += len(running)
            running = [pair for pair in running if not pair[-1].over]
    return {"return": results[0], "success": results[1], "steps": steps}


def evaluate(args: Args, agent: TD3, assignment: np.ndarray, stopped=lambda: False) -> tuple[dict, dict] | None:
    """Play with the same starts at every evaluation; nothing comes back where `stopped` says so.

    Returns:
        return and success of each task's policy, (T, episodes) each; the other columns of metrics.csv.
    """
    played = play_pairs(args, agent, args.eval_episodes, np.random.default_rng([args.seed, 1]), True, stopped)
    if played is None:
        return None
    columns = {"max_return": np.nanmax(played["return"].mean(-1), axis=0).mean(), "eval_steps": played["steps"]}
    columns |= {f"{name}/policy": policy for name, policy in zip(args.tasks, assignment)}
    return {kind: played[kind][assignment, range(len(assignment))] for kind in ("return", "success")}, columns


def report(args: Args, agent: TD3, assignment: np.ndarray, result: dict[str, np.ndarray], folder: Path) -> None:
    """Print what the assigned policies reach, and the clusters; animate an episode of each task if asked to."""
    print_table(args.tasks, result)
    for policy in range(args.num_policies or 0):
        mine = [args.tasks[task] for task in np.flatnonzero(assignment == policy)]
        print(f"  policy {policy}: {', '.join(mine) or 'none of its own (trains on all tasks)'}")
    for task, policy in enumerate(assignment) if args.capture_video else ():
        episode, frames = Episode(args, task, args.seed, EVAL_HORIZON[args.env]), []
        while not episode.over:
            if episode.length % 4 == 0:
                frames.append(episode.env.render()[::3, ::3])
            episode.step(agent.act(np.tile(episode.obs, (agent.actor.stack[1], 1, 1)))[policy, 0])
        imageio.mimsave(folder / f"{args.tasks[task]}.gif", frames, duration=60, loop=0)


def train(args: Args) -> Path:
    """E-step and M-step in turns; returns the run folder."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") is False:         # x86 without AMX:
        torch.set_float32_matmul_precision("medium")   # oneDNN's products, often faster; others would round to bfloat16
    torch.manual_seed(args.seed)
    rng, num_tasks = np.random.default_rng(args.seed), len(args.tasks)
    n = args.num_policies or (num_tasks if args.method in OWN_TASK else 1)
    assignment = random_clusters(num_tasks, n, rng) if args.method == "random-clusters" else np.arange(num_tasks) % n
    agent = TD3(args, n, make_env(args, args.tasks[0])).to(args.device)
    optimizers = {name: torch.optim.Adam(net.parameters(), args.lr, eps=1e-7, fused=True)
                  for name, net in (("actor", agent.actor), ("critic", agent.critic))}
    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    if state:
        agent.load_state_dict(state["agent"])
        assignment = np.array(state["assignment"])
    if args.evaluate:
        report(args, agent, assignment, evaluate(args, agent, assignment)[0], args.evaluate)
        return args.evaluate
    buffer = PolicyReplay(n, min(args.buffer_size, -(-args.total_timesteps // n)), *agent.sizes, args.device)
    run, global_step, episodes = Run(args, args.env, args.tasks, state), state.get("global_step", 0), []
    e_steps = state.get("e_steps", {})                                 # at global_step: assignment, its returns, steps
    if args.resume:
        for name, optimizer in optimizers.items():                     # with --lr as it is now
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizers"][name]})
        buffer.num_added = state["num_added"]
        buffer.data[:, :len(buffer)] = state["buffer"].to(args.device)
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        tqdm.write("the simulators' states are not saved: the run goes on with fresh episodes")

    def save() -> None:
        run.save(global_step, dict(
            agent=agent.state_dict(), optimizers={name: opt.state_dict()["state"] for name, opt in optimizers.items()},
            assignment=assignment.tolist(), e_steps=e_steps, num_added=buffer.num_added,
            buffer=buffer.data[:, :len(buffer)].clone(), rng=json.dumps(rng.bit_generator.state),
            torch_rng=torch.get_rng_state()))

    def begin(policy: int) -> Episode:
        """A training episode, in a task drawn from T_i, the policy's own, or from all if it has got none."""
        own = np.flatnonzero(assignment == policy)
        task = int(rng.choice(own if len(own) else num_tasks))
        return Episode(args, task, rng.integers(2**31), HORIZON[args.env])

    save()                                                             # from here on a killed run can be resumed
    while True:
        # E-step: every policy is tried on every task, each task goes to the best -----------------------------
        if args.method == "em" and global_step // n % args.m_step_size == 0 and global_step not in e_steps:
            e_step_rng = np.random.default_rng([args.seed, 2, global_step])
            if played := play_pairs(args, agent, args.e_step_episodes, e_step_rng, args.common_starts, run.stop.is_set):
                returns = played["return"].mean(-1).T                  # G, (T, n)
                assignment, episodes = returns.argmax(1), []           # ties: the lowest index; what is running is cut
                e_steps[global_step] = assignment.tolist(), returns.max(1).tolist(), played["steps"]

        # Evaluate --------------------------------------------------------------------------------------------
        if run.due(global_step) and (evaluated := evaluate(args, agent, assignment, run.stop.is_set)):
            result, columns = evaluated
            columns["e_step_steps"] = sum(steps for _, _, steps in e_steps.values())
            run.log_evaluation(global_step, result, columns)
        if global_step >= args.total_timesteps or run.stop.is_set():
            break

        # M-step: every policy acts in a task of its own ------------------------------------------------------
        episodes = episodes or [begin(policy) for policy in range(n)]
        obs = np.stack([episode.obs for episode in episodes])          # (n, O)
        actions = agent.act(obs[:, None], args.exploration_noise)[:, 0]
        if not np.isfinite(actions).all():                             # a walker's simulator would not survive it
            run.close()
            sys.exit(f"actions are not finite at step {global_step:,}; resume {run.dir} with a smaller --lr")
        rewards, terminations = np.array([episode.step(action) for episode, action in zip(episodes, actions)]).T
        buffer.add(obs, actions, rewards, np.stack([episode.obs for episode in episodes]), terminations)
        global_step += n
        for policy, episode in enumerate(episodes):
            if episode.over:
                run.log(f"tasks/{args.tasks[episode.task]}", {
                    "episodic_return": episode.total, "episodic_length": episode.length, "success": episode.success})
                episodes[policy] = begin(policy)

        # ... and learns from its own data --------------------------------------------------------------------
        turn, rest = divmod(global_step // n, args.update_every)
        if global_step > args.learning_starts and rest == 0:
            batch, update_policies = buffer.sample(rng, args.batch_size), turn % args.policy_delay == 0
            for name, loss in td3_update(args, agent, optimizers, batch, update_policies, rng).items():
                losses = loss.cpu().numpy()                            # (n,)
                run.log("losses", {name: losses.mean()} | {f"policy{i}/{name}": x for i, x in enumerate(losses)})
        if crossed(global_step - n, global_step, LOG_EVERY):
            run.write(global_step)
        if crossed(global_step - n, global_step, args.checkpoint_every):
            save()

    save()
    if not run.stop.is_set():
        report(args, agent, assignment, result, run.dir)
        print(f"environment steps: {global_step:,} of training, {columns['e_step_steps']:,} of E-steps, "
              f"{sum(row['eval_steps'] for row in run.rows):,.0f} of evaluations")
        if e_steps:
            plot_e_steps(run.dir / "assignment.png", args.tasks, e_steps, n)
    run.close()
    return run.dir


# --- Picture of the method -------------------------------------------------------------------------------------------
def plot_e_steps(path: Path, names: tuple[str, ...], e_steps: dict, num_policies: int) -> None:
    """The paper's Fig. 9 and 10: a dot where an E-step gives a task to the panel's policy, its colour the return."""
    steps = np.array(list(e_steps))
    assignment, returns, _ = (np.array(column) for column in zip(*e_steps.values()))
    figure = Figure(figsize=(9, 1 + 1.6 * num_policies), layout="constrained")
    axes = figure.subplots(num_policies, 1, sharex=True, squeeze=False)[:, 0]
    for policy, axis in enumerate(axes):
        when, task = np.nonzero(assignment == policy)
        dots = axis.scatter(steps[when], task, s=np.clip(1500 / len(steps), 6, 60), c=returns[when, task],
                            vmin=returns.min(), vmax=returns.max())
        axis.grid(axis="y", lw=0.3)
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set(ylabel=f"policy {policy}", ylim=(len(names) - 0.5, -0.5))
    axes[-1].set_xlabel(STEPS)
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.colorbar(dots, ax=axes, label="return")
    figure.savefig(path, dpi=120)


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
