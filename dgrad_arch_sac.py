# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "mujoco==3.3.0", "metaworld==3.1.1", "tyro==1.0.17", "pydantic==2.14.4",
#   "filelock==4.3.1", "imageio==2.38.1", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
# ]
# ///
"""Task-conditioned matrix layers ("D-Grad(A)") on multi-task SAC: an architecture in which tasks quarrel less.

Yu, Kumar, Gupta, Levine, Hausman, Finn: "Multi-Task Reinforcement Learning without Interference", 2019 (workshop). One
network serves all tasks, but after each hidden layer a matrix of the task's own turns the activations. Random matrices
make the activations of different tasks nearly orthogonal, and with them the gradients of the shared weights.

    y_l = M_l(z) relu(W_l y_(l-1) + b_l) + beta_l(z)     ModularMLP
    M and beta at the start                              initial_matrices
    gradient of each task, and how much they conflict    task_gradients, conflict_summary
    soft policy evaluation and improvement               update

Differences from the paper, each explained in docs/dgrad_arch_sac.md:
1. The task network is a table of matrices, one per task and layer, as the one-hot z makes a linear one; the paper
   states neither its depth nor its scale.
2. The matrices start orthogonal (--m-init): activations keep their length, which a default initialisation inflates.
3. Meta-World v3 with 50 goals per task, episodes of 200 or 500 steps, in place of the fixed goals of 2019.
4. Networks of today, 2 x 256 or 3 x 400; --hidden-sizes 160 160 160 for the paper's, and six of them for its baseline.

    python dgrad_arch_sac.py                                         # four tasks, matrix layers
    python dgrad_arch_sac.py --method sac                            # the same network without them
    python dgrad_arch_sac.py --method sac --hidden-sizes 752 752     # ... with as many parameters as dgrad-a
    python dgrad_arch_sac.py --m-init identity                       # as many, and at the start the plain network
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
from functools import cache
from importlib.metadata import distributions
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import imageio.v2 as imageio
import metaworld
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
MT10, MT50 = (tuple(name.removesuffix("-v3") for name in names) for names in
              (metaworld.env_dict.MT10_V3, metaworld.env_dict.MT50_V3))
LARGE = dict(horizon=500, hidden_sizes=(400, 400, 400), batch_size=128, critic_lr=3e-4, learning_starts=4_000)
PRESETS = {  # a setting left at None takes its value from here
    "mt4": dict(tasks=("reach", "drawer-close", "button-press-topdown", "window-close"), horizon=200,
                hidden_sizes=(256, 256), batch_size=64, critic_lr=1e-3, learning_starts=1_000,
                total_timesteps=200_000, eval_every=20_000, checkpoint_every=40_000),
    "mt10": LARGE | dict(tasks=MT10, total_timesteps=5_000_000, eval_every=200_000, checkpoint_every=200_000),
    "mt50": LARGE | dict(tasks=MT50, total_timesteps=20_000_000, eval_every=2_000_000, checkpoint_every=2_000_000)}
STEPS = "environment steps, summed over tasks"
LOG_EVERY = 2_000                                             # environment steps between writes to TensorBoard
FIXED = {"env", "method", "tasks", "seed", "m_init", "hidden_sizes", "buffer_size"}  # of a run that goes on

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass
class Args:
    env: Literal["mt4", "mt10", "mt50"] = "mt4"  # four quick tasks of Meta-World, or its 10 or 50; sets what is None
    method: Literal["dgrad-a", "sac"] = "dgrad-a"  # matrix layers; one network told the task by a one-hot
    tasks: tuple[Literal[MT50], ...] | None = None  # other tasks, such as drawer-open; None: those of --env
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive | None = None   # environment steps, summed over tasks; 200_000, mt10 5M, mt50 20M
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive | None = None        # environment steps between evaluations
    eval_episodes: Positive = 10              # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive | None = None  # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    horizon: Annotated[int, Field(ge=1, le=500)] | None = None  # steps after which an episode is cut off
    num_goals: Annotated[int, Field(ge=1, le=50)] = 50  # goals per task, drawn by the seed; episodes take them in turns
    # dgrad-a's matrices at the start: rotations (None), numbers of variance 1 / width, or the plain network
    m_init: Literal["orthogonal", "gaussian", "identity"] | None = None
    watch_every: Positive = 10                # updates between measurements of gradients, which change nothing
    update_every: Positive = 1                # steps of every environment per update
    learning_starts: Positive | None = None   # random actions per task before the first update
    batch_size: Positive | None = None        # transitions per task and update
    buffer_size: Positive = 100_000           # replay capacity per task, transitions
    hidden_sizes: tuple[Positive, ...] | None = None  # widths of the hidden layers
    lr: Share = 3e-4                          # Adam step size of the policy
    critic_lr: Share | None = None            # Adam step size of critics and temperatures
    gamma: Share = 0.99                       # discount factor
    tau: Share = 0.005                        # Polyak coefficient: share of the online critics in a step of targets
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0  # gradients are clipped to this L2 norm, actor and critics apart

    def __post_init__(self):
        for name, value in PRESETS[self.env].items():
            setattr(self, name, getattr(self, name) or value)
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks {' '.join(self.tasks)}: needs different tasks")
        if self.method == "sac" and self.m_init:
            raise ValueError("--m-init goes with --method dgrad-a")
        self.m_init = self.m_init or ("orthogonal" if self.method == "dgrad-a" else None)


# --- Environments ----------------------------------------------------------------------------------------------------
metaworld_benchmark = cache(metaworld.MT1)     # a task's class, and the fifty pairs of goal and start of a seed


class MetaWorldTasks:
    """An environment of Meta-World v3 per task, reward v2 (0 to 10 a step). `obs` is what to act on, (T, 39 + T).

    Observation of a task: hand, gripper and objects, the same one step earlier, the goal, and the task as a one-hot.
    Action (4,): displacement of the hand / 1 cm, and the closing of the fingers. No task ever terminates: all episodes
    are cut off together, after `horizon` steps, and the next ones begin.
    """

    def __init__(self, args: Args, rng: np.random.Generator):
        benchmarks = {f"{name}-v3": metaworld_benchmark(f"{name}-v3", seed=args.seed) for name in args.tasks}
        self.envs = [benchmark.train_classes[name]() for name, benchmark in benchmarks.items()]
        self.goals = [benchmark.train_tasks[:args.num_goals] for benchmark in benchmarks.values()]
        self.horizon, self.rng, self.queue, self.renderers = args.horizon, rng, [], []
        self.reset()

    def reset(self) -> None:
        """New episodes, in each task with its next goal; each goal comes once before one comes again."""
        self.queue = self.queue or list(zip(*(self.rng.permutation(len(goals)) for goals in self.goals)))
        for env, goals, index in zip(self.envs, self.goals, self.queue.pop()):
            env.set_task(goals[index])
        obs = [env.reset()[0] for env in self.envs]
        self.obs = np.hstack([obs, np.eye(len(obs))], dtype=np.float32)
        self.episodes = {key: np.zeros(len(obs)) for key in ("episodic_return", "episodic_length", "success")}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Actions (T, A) -> observations that they lead to (T, O), rewards (T,), and episodes that end here.

        The last is {} or their return, length, and whether any step was a success, (T,) each.
        """
        obs, rewards, _, _, infos = zip(*(env.step(a) for env, a in zip(self.envs, np.clip(actions, -1.0, 1.0))))
        next_obs = self.obs = np.hstack([obs, np.eye(len(obs))], dtype=np.float32)
        episodes = self.episodes
        episodes["episodic_return"] += rewards
        episodes["episodic_length"] += 1
        episodes["success"] = np.maximum(episodes["success"], [info["success"] for info in infos])
        if episodes["episodic_length"][0] < self.horizon:
            return next_obs, np.array(rewards), {}
        self.reset()
        return next_obs, np.array(rewards), episodes

    def render(self) -> np.ndarray:
        """What a camera sees of each task, side by side, (240, 240 T, 3) uint8."""
        try:
            self.renderers = self.renderers or [mujoco.Renderer(env.model, 240, 240) for env in self.envs]
        except Exception as error:                                     # each backend of OpenGL raises its own
            sys.exit(f"pictures need OpenGL ({error}); without a screen set MUJOCO_GL=egl or MUJOCO_GL=osmesa and "
                     "install it, or leave --capture-video out")
        for env, renderer in zip(self.envs, self.renderers):
            renderer.update_scene(env.data, "corner2")                 # hangs upside down
        return np.hstack([renderer.render()[::-1, ::-1] for renderer in self.renderers])


# --- Networks --------------------------------------------------------------------------------------------------------
class ModularMLP(nn.Module):
    """An MLP that T tasks share, with a layer of the task's own after each hidden one: M(z) relu(W x + b) + beta(z).

    All tasks, and C copies of the network (1 for policies, 2 for twin critics), are evaluated at once. What tasks share
    has a first axis of C, what is a task's own one of C * T. With sac there is no such layer.
    """

    def __init__(self, args: Args, copies: int, n_in: int, n_out: int, init=nn.init.xavier_uniform_):
        super().__init__()
        self.stack, sizes, shared, own = (copies, len(args.tasks)), [n_in, *args.hidden_sizes, n_out], [], []
        for n_in, n_out in zip(sizes[:-1], sizes[1:]):                 # weight and bias of each layer in turn
            shared += [torch.empty(copies, n_in, n_out), torch.zeros(copies, 1, n_out)]
            for matrix in shared[-2]:
                init(matrix)
        for width in args.hidden_sizes if args.m_init else ():         # M and beta of each hidden layer in turn
            own += [initial_matrices(math.prod(self.stack), width, args.m_init),
                    torch.zeros(math.prod(self.stack), 1, width)]
        self.params, self.num_shared = nn.ParameterList(shared + own), len(shared)

    def forward(self, x: Tensor, params: list[Tensor] | None = None) -> Tensor:
        """(T, B, in) -> (C, T, B, out): row i through the network as task i has it, with other parameters if given."""
        params = list(self.params if params is None else params)
        shared, own = params[:self.num_shared], params[self.num_shared:]
        batch, x = x.shape[-2], x.expand(*self.stack, *x.shape[-2:])
        for weight, bias, matrix, beta in zip_longest(shared[::2], shared[1::2], own[::2], own[1::2]):
            x = torch.baddbmm(bias, x.reshape(len(weight), -1, x.shape[-1]), weight)
            if weight is not shared[-2]:
                x = torch.relu_(x)                                     # in place: large activations cost memory traffic
            if matrix is not None:
                x = torch.baddbmm(beta, x.view(len(beta), batch, -1), matrix)
        return x.view(*self.stack, batch, -1)


def initial_matrices(number: int, width: int, m_init: str) -> Tensor:
    """Matrices that keep the length of what they turn, (number, width, width)."""
    drawn = torch.randn(number, width, width)
    if m_init == "identity":
        return torch.eye(width).repeat(number, 1, 1)
    if m_init == "orthogonal":
        return torch.stack([nn.init.orthogonal_(matrix) for matrix in drawn])
    return drawn / math.sqrt(width)


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
    """One network for all tasks, with layers of their own in between unless the method is sac."""
    actor = ModularMLP(args, 1, obs_size, 2 * action_size)
    critic = ModularMLP(args, 2, obs_size + action_size, 1, nn.init.xavier_normal_)
    return SAC(actor, critic, len(args.tasks)).to(args.device)


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


def task_gradients(net: nn.Module, loss_of) -> tuple[list[Tensor], Tensor]:
    """Each task's gradient by itself, as if every task had a network of its own.

    Args:
        loss_of: the network's parameters -> losses of the tasks, (T,).
    Returns:
        For each parameter, (C * T, in, out); and, of what the tasks share, one vector per task, (T, P).
    """
    copies, num_tasks = net.stack
    own = [param.detach().repeat_interleave(copies * num_tasks // len(param), dim=0).requires_grad_()
           for param in net.params]
    grads = torch.autograd.grad(loss_of(own).sum(), own)
    shared = [grad for grad, param in zip(grads, net.params) if len(param) == copies]
    return grads, torch.cat([grad.unflatten(0, net.stack).transpose(0, 1).flatten(1) for grad in shared], dim=1)


def conflict_summary(network: str, task_grads: Tensor) -> dict[str, Tensor]:
    """Cosines between the tasks' gradients, (T, P): of all pairs, (T, T), and over pairs of two tasks their mean, the
    mean of their absolute values, and the share of conflicts, those below 0.
    """
    unit = nn.functional.normalize(task_grads, dim=1)
    cosines = (unit @ unit.T).cpu()
    pairs = cosines[~torch.eye(len(cosines), dtype=bool)]
    return {f"{network}_cosines": cosines, f"{network}_cosine": pairs.mean(),
            f"{network}_abs_cosine": pairs.abs().mean(), f"{network}_conflicts": (pairs < 0).float().mean()}


def update(args: Args, agent: SAC, optimizers: dict, batch: list[Tensor], watch: bool = False
           ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One SAC step on the mean of the tasks' losses: critics, policy, temperatures, targets.

    Returns:
        Losses and temperatures, (T,) each; if `watch`, what `conflict_summary` says of both networks.
    """
    obs, actions, rewards, next_obs, terminations = batch              # (T, B, ...)
    alpha, losses, conflicts = agent.log_alpha.detach().exp()[:, None], {}, {}
    with torch.no_grad():
        next_actions, next_log_prob = squash(*agent.policy(next_obs), torch.randn(actions.shape).to(actions))
        next_value = agent.q(agent.target, next_obs, next_actions).amin(0) - alpha * next_log_prob              # (T, B)
        target = rewards + args.gamma * (1 - terminations) * next_value

    def critic_loss(params) -> Tensor:
        losses["critic"] = (agent.q(agent.critic, obs, actions, params) - target).square().mean(-1).sum(0)      # (T,)
        return losses["critic"]

    noise = torch.randn(actions.shape).to(actions)                     # of the CPU's generator, whatever the device

    def actor_loss(params) -> Tensor:
        pi, losses["log_prob"] = squash(*agent.policy(obs, params), noise)
        losses["actor"] = (alpha * losses["log_prob"] - agent.q(agent.critic, obs, pi).amin(0)).mean(-1)        # (T,)
        return losses["actor"]

    for network, loss_of in (("critic", critic_loss), ("actor", actor_loss)):          # the policy with moved critics
        net, params = getattr(agent, network), list(getattr(agent, network).params)
        if watch:
            conflicts |= conflict_summary(network, task_gradients(net, loss_of)[1])
        for param, grad in zip(params, torch.autograd.grad(loss_of(params).mean(), params)):
            param.grad = grad
        nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        optimizers[network].step()

    entropy = -losses.pop("log_prob").detach().mean(-1)                # of the policy before its step
    agent.log_alpha.grad = entropy + actions.shape[-1]                 # of log_alpha (entropy - target), target -A
    optimizers["alpha"].step()
    losses["alpha"] = agent.log_alpha.exp()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), args.tau)
    return {name: loss.detach().cpu() for name, loss in losses.items()}, conflicts


# --- Training --------------------------------------------------------------------------------------------------------
def evaluate(args: Args, act, stopped=lambda: False) -> dict[str, np.ndarray] | None:
    """Return and success of --eval-episodes episodes per task, (T, episodes) each; None as soon as `stopped` says so.

    `act` turns observations, (T, O), into actions, (T, A). The environments have a generator of their own.
    """
    envs, episodes, frames = MetaWorldTasks(args, np.random.default_rng([args.seed, 1])), [], []
    while len(episodes) < args.eval_episodes:
        if stopped():
            return None
        if args.capture_video and not episodes and envs.episodes["episodic_length"][0] % 4 == 0:
            frames.append(envs.render())
        if ended := envs.step(act(envs.obs))[-1]:
            episodes.append(ended)
    if frames:
        imageio.mimsave(args.evaluate / "tasks.gif", frames, duration=60, loop=0)
    return {key.removeprefix("episodic_"): np.stack([episode[key] for episode in episodes], axis=1)
            for key in ("episodic_return", "success")}


def train(args: Args) -> Path:
    """Act in every task, then one update of the shared networks; returns the run folder."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") is False:         # x86 without AMX:
        torch.set_float32_matmul_precision("medium")   # oneDNN's products, often faster; others would round to bfloat16
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)                             # starts, replay indices, random actions
    num_tasks, obs_size, action_size = len(args.tasks), 39 + len(args.tasks), 4
    agent = make_agent(args, obs_size, action_size)
    optimizers = {"actor": torch.optim.Adam(agent.actor.parameters(), args.lr, fused=True),
                  "critic": torch.optim.Adam(agent.critic.parameters(), args.critic_lr, fused=True),
                  "alpha": torch.optim.Adam([agent.log_alpha], args.critic_lr, fused=True)}

    @torch.no_grad()
    def act(obs: np.ndarray, explore: bool = False) -> np.ndarray:
        mean, log_std = agent.policy(torch.from_numpy(obs).to(args.device)[:, None])        # (T, 1, A)
        noise = torch.randn(mean.shape).to(mean) if explore else torch.zeros_like(mean)
        return squash(mean, log_std, noise)[0].squeeze(1).cpu().numpy()

    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    if state:
        agent.load_state_dict(state["agent"])
    if args.evaluate:
        print_table(args.tasks, evaluate(args, act))
        return args.evaluate
    buffer = ReplayBuffer(num_tasks, min(args.buffer_size, -(-args.total_timesteps // num_tasks)), obs_size,
                          action_size, args.device)
    run, global_step, history, watched = Run(args, args.env, args.tasks, state), 0, [], {}
    counts = [sum(param.numel() for param in net.parameters()) for net in (agent.actor, agent.critic)]
    tqdm.write(f"parameters of {args.method}: policy {counts[0]:,}, each critic {counts[1] // 2:,}")
    if args.resume:
        for name, optimizer in optimizers.items():                     # with --lr as it is now
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizers"][name]["state"]})
        global_step, history, watched = state["global_step"], state["history"], state["watched"]
        buffer.num_added = state["num_added"]
        buffer.data[:, :len(buffer)] = state["buffer"].to(args.device)
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        tqdm.write("the simulators' states are not saved: the run goes on with fresh episodes")
    envs = MetaWorldTasks(args, rng)

    def save() -> None:
        run.save(global_step, dict(
            agent=agent.state_dict(), optimizers={name: opt.state_dict() for name, opt in optimizers.items()},
            history=history, watched=watched, num_added=buffer.num_added, buffer=buffer.data[:, :len(buffer)].clone(),
            rng=json.dumps(rng.bit_generator.state), torch_rng=torch.get_rng_state()))

    save()                                                             # from here on a killed run can be resumed
    while True:
        # Evaluate: first, so that a run that was stopped during an evaluation makes it up ---------------------
        if run.due(global_step) and (result := evaluate(args, act, run.stop.is_set)):
            count = watched.pop("count", 1)
            means, watched = {key: total / count for key, total in watched.items()}, {}
            run.log_evaluation(global_step, result, {key: mean for key, mean in means.items() if mean.ndim == 0})
            history += [(global_step, means)] if means else []         # one task has none
        if global_step >= args.total_timesteps or run.stop.is_set():
            break

        # Act, step every task once, store ---------------------------------------------------------------------
        filling = global_step < num_tasks * args.learning_starts
        obs = envs.obs
        actions = rng.uniform(-1, 1, (num_tasks, action_size)) if filling else act(obs, explore=True)
        next_obs, rewards, ended = envs.step(actions)
        global_step += num_tasks
        buffer.add(obs, actions, rewards, next_obs, np.zeros(num_tasks))                    # nothing terminates
        run.log("tasks", ended)

        # Update: plain SAC on the mean of the tasks' losses ---------------------------------------------------
        if not filling and buffer.num_added % args.update_every == 0:
            watch = num_tasks > 1 and buffer.num_added // args.update_every % args.watch_every == 0
            losses, conflicts = update(args, agent, optimizers, buffer.sample(rng, args.batch_size), watch)
            run.log("losses", losses)
            if watch:                                                  # sums since the last evaluation
                watched = {key: watched.get(key, 0) + value for key, value in (conflicts | {"count": 1}).items()}

        if crossed(global_step - num_tasks, global_step, LOG_EVERY):
            run.write(global_step)
        if crossed(global_step - num_tasks, global_step, args.checkpoint_every):
            save()
    save()
    if history:
        plot_conflicts(run.dir, args.tasks, history)
    if not run.stop.is_set():
        print_table(args.tasks, result)
    run.close()
    return run.dir


# --- Picture of the method -------------------------------------------------------------------------------------------
def plot_conflicts(folder: Path, names: list[str], history: list) -> None:
    """conflicts.png: cosines between the tasks' gradients, four times over training."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, 4)
    for row, network in zip(axes, ("critic", "actor")):
        for axis, (step, means) in zip(row, [history[round(i * (len(history) - 1) / 3)] for i in range(4)]):
            image = axis.imshow(means[f"{network}_cosines"].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set(xticks=[], title=f"{network}, {step:,} steps")
            axis.set_yticks(range(len(names)), names if axis is row[0] else [""] * len(names), fontsize=7)
            for (i, j), value in np.ndenumerate(means[f"{network}_cosines"]) if len(names) <= 10 else ():
                axis.text(j, i, f"{value:.2f}" if i != j else "", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axes, label="cosine between gradients of two tasks")
    figure.savefig(folder / "conflicts.png", dpi=120)


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
