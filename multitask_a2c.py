# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.0", "tyro==1.0.17",
#                 "pydantic==2.14.4", "filelock==4.3.1", "imageio==2.38.1", "tensorboard==2.21.0", "tqdm==4.70.1",
#                 "matplotlib==3.11.2"]
# ///
"""Multi-task A2C: one trunk, a head per task, and what fine-tuning forgets.

Arora, Kumar, Krone, Li: "Multi-task Learning for Continuous Control", 2018, arXiv:1802.01034. Six half-cheetahs with
smaller or larger body parts are tasks. Advantage actor-critic learns them one by one ("scratch"), all with one network
that shares its first layers ("vanilla"), or one after the other with most layers frozen ("finetune").

    R_t = r_t + gamma R_(t+1), bootstrapped             n_step_returns
    0.5 A^2 - A log pi(a|s) - 0.01 H(pi), Sec. 3        a2c_update
    shared trunk, heads                                 Agent

Differences from the paper, each explained in docs/multitask_a2c.md:
1. The entropy bonus is the entropy; the authors' code adds the log-likelihood instead, which does nothing on average.
2. Time limits bootstrap from the last observation; the authors' code takes them for ends.
3. The log standard deviation is a free parameter per task, as in the code; --log-std network for the paper's text.
4. Each task has an observation filter of its own.

    python multitask_a2c.py                               # six tasks, shared trunk: 1M steps per head
    python multitask_a2c.py --method scratch              # six networks: 3M steps each
    python multitask_a2c.py --method finetune --tasks SmallLeg --finetune-from RUN_FOLDER
"""
from __future__ import annotations

import csv
import json
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

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from mujoco.rollout import Rollout
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
PARTS = {"Torso": ["torso"], "Head": ["head"], "Thigh": ["bthigh", "fthigh"], "Leg": ["bshin", "fshin"],
         "Foot": ["bfoot", "ffoot"]}
VARIANTS = tuple(size + part for part in PARTS for size in ("Small", "Big"))
PAPER = ("SmallFoot", "BigFoot", "SmallLeg", "SmallThigh", "SmallTorso", "BigTorso")
HORIZON, GOOD_RETURN, LOG_EVERY = 1_000, 1_000, 20_000        # steps; a success; environment steps between writes
STEPS = "environment steps, summed over tasks"
FIXED = {"method", "tasks", "seed", "finetune_from", "source_task", "finetune_layers", "log_std", "num_envs",
         "hidden_size"}                                       # of a run that goes on
PRESETS = {"vanilla": 1_000_000, "scratch": 3_000_000, "finetune": 1_000_000}         # steps per task
TABLE_2 = {"paper, scratch 3M": dict(zip(PAPER, (1326.30, 37.80, 1420.77, 1444.21, 2116.10, 1312.50))),
           "paper, vanilla 1M": dict(zip(PAPER, (1480.89, 2188.11, 1525.09, 1874.04, 2276.11, 1428.97)))}
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


@dataclass
class Args:
    # shared trunk with a head per task; a network per task; the last layers of a trained network, on another task
    method: Literal["vanilla", "scratch", "finetune"] = "vanilla"
    tasks: Annotated[tuple[Literal[VARIANTS], ...], Field(min_length=1)] = PAPER  # bodies; one for finetune
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive | None = None   # summed over tasks; None: 1M per task, 3M with scratch, as in Table 2
    device: str = "cpu"                       # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive = 600_000            # environment steps between evaluations
    eval_episodes: Positive = 20              # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive = 600_000      # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    finetune_from: Path | None = None         # run that finetune starts from, of the same --log-std and --hidden-size
    source_task: Literal[VARIANTS] | None = None  # the task of that run whose network finetune takes; None: its first
    finetune_layers: Literal["code", "paper"] | None = None  # outputs and log-std; None, code: the policy's pi2, too
    log_std: Literal["parameter", "network"] = "parameter"  # free numbers per task (code), or an output (paper)
    num_envs: Positive = 16                   # copies of each task's environment, stepped in parallel
    num_steps: Positive = 5                   # steps of a rollout, paper: t_max; each ends with an update
    hidden_size: Positive = 64                # width of the two hidden layers
    lr: Share = 7e-4                          # RMSprop step size
    gamma: Share = 0.99                       # discount factor
    timeout_is_terminal: bool = False         # no bootstrapping at time limits, as in the authors' code
    entropy_coef: NonNegative = 0.01          # weight of the entropy bonus [reward per nat]

    def __post_init__(self):
        self.tasks = tuple(dict.fromkeys(self.tasks))                  # each once
        finetune = self.finetune_from is not None and len(self.tasks) == 1
        if finetune != (self.method == "finetune") or not finetune and (self.source_task or self.finetune_layers):
            raise ValueError("--method finetune needs one task and a run, --tasks SmallLeg --finetune-from RUN; "
                             "--source-task and --finetune-layers go with it")
        self.total_timesteps = self.total_timesteps or PRESETS[self.method] * len(self.tasks)


# --- Environments ----------------------------------------------------------------------------------------------------
def cheetah_model(variant: str) -> mujoco.MjModel:
    """Gymnasium's half-cheetah with radius, and half-length where there is one, of one kind of body part scaled.

    Joints keep their places, and the compiler spreads 14 kg over new volumes: a smaller foot makes the rest heavier.
    """
    spec = mujoco.MjSpec.from_file(str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"))
    factor, part = (0.75, variant[5:]) if variant.startswith("Small") else (1.25, variant[3:])
    for geom in PARTS[part]:
        spec.geom(geom).size = spec.geom(geom).size * factor
    return spec.compile()


class Cheetahs:
    """P copies of one cheetah, stepped in one call: Gymnasium's HalfCheetah-v5, but faster.

    Observation (17,): joint positions without x, and all velocities. Action (6,): torques, not clipped in the reward
    x speed - 0.1 |a|^2. Episodes have HORIZON steps and never terminate; all copies are reset together.
    """

    def __init__(self, variant: str, copies: int, rng: np.random.Generator):
        self.model, self.copies, self.rng = cheetah_model(variant), copies, rng
        self.rollout, self.data = Rollout(nthread=0), mujoco.MjData(self.model)
        self.reset()

    def reset(self) -> None:
        """New episodes for all copies."""
        qpos = self.model.qpos0 + self.rng.uniform(-0.1, 0.1, (self.copies, 9))
        qvel = 0.1 * self.rng.standard_normal((self.copies, 9))
        self.state = np.concatenate([np.zeros((self.copies, 1)), qpos, qvel], axis=1)          # time, qpos, qvel
        self.steps, self.returns = 0, np.zeros(self.copies)            # of the episodes so far, undiscounted

    def observe(self) -> Tensor:
        """(P, 17)."""
        return torch.from_numpy(self.state[:, 2:].astype(np.float32))

    def step(self, actions: Tensor) -> Tensor:
        """Actions (P, 6) -> rewards (P,)."""
        torques = actions.cpu().numpy().astype(np.float64)
        after = self.rollout.rollout(self.model, self.data, self.state, torques[:, None], nstep=5)[0][:, -1]
        rewards = (after[:, 1] - self.state[:, 1]) / 0.05 - 0.1 * np.square(torques).sum(1)
        self.state, self.steps, self.returns = after, self.steps + 1, self.returns + rewards
        return torch.from_numpy(rewards.astype(np.float32))


# --- Networks --------------------------------------------------------------------------------------------------------
def linear(n_in: int, n_out: int, scale: float = 1.0) -> nn.Linear:
    """A layer whose units have normal weights of length `scale` and no bias."""
    layer = nn.Linear(n_in, n_out)
    layer.weight.data = scale * nn.functional.normalize(torch.randn(n_out, n_in), dim=1)
    nn.init.zeros_(layer.bias)
    return layer


class ObservationFilter(nn.Module):
    """Observations relative to their running mean and deviation, clipped to +-5."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.tensor([[1e-2], [0.0], [1e-2]], dtype=torch.float64).repeat(1, 17))
        self.register_buffer("mean", torch.zeros(17))
        self.register_buffer("deviation", torch.ones(17))

    def update(self, obs: Tensor) -> None:
        """Count (N, 17) observations."""
        obs = obs.double()
        self.sums += torch.stack([torch.ones_like(obs), obs, obs.square()]).sum(1)
        mean, square = self.sums[1:] / self.sums[0]
        self.mean.copy_(mean)
        self.deviation.copy_((square - mean.square()).clamp(min=1e-2).sqrt())

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / self.deviation).clamp(-5.0, 5.0)


class Agent(nn.Module):
    """Gaussian policy over torques, which are not squashed, and value of one task, behind its observation filter.

    `trunk`: an agent whose hidden layers of the policy and first layer of the critic are this one's, too.
    """

    def __init__(self, hidden: int, log_std: str, trunk: Agent | None = None):
        super().__init__()
        self.filter, free = ObservationFilter(), log_std == "parameter"
        self.pi1 = trunk.pi1 if trunk else linear(17, hidden)
        self.pi2 = trunk.pi2 if trunk else linear(hidden, hidden)
        self.pi3 = linear(hidden, 6 if free else 12, scale=0.01)
        self.log_std = nn.Parameter(torch.zeros(6)) if free else None
        self.v1 = trunk.v1 if trunk else linear(17, hidden)
        self.v2, self.v3 = linear(hidden, hidden), linear(hidden, 1)

    def policy(self, obs: Tensor) -> Normal:
        """(B, 17) -> distribution of actions, (B, 6)."""
        mean = self.pi3(torch.tanh(self.pi2(torch.tanh(self.pi1(self.filter(obs))))))
        mean, log_std = mean.chunk(2, dim=-1) if self.log_std is None else (mean, self.log_std)
        return Normal(mean, log_std.exp(), validate_args=False)

    def value(self, obs: Tensor) -> Tensor:
        """(B, 17) -> (B,)."""
        return self.v3(torch.tanh(self.v2(torch.tanh(self.v1(self.filter(obs)))))).squeeze(-1)


# --- The method ------------------------------------------------------------------------------------------------------
def n_step_returns(rewards: Tensor, final_values: list[Tensor | None], last_value: Tensor, gamma: float) -> Tensor:
    """Discounted returns of a rollout of S steps, (S, P): R_t = r_t + gamma R_(t+1), bootstrapped where it is cut off.

    Values are (P,): `final_values` of what was seen last, where a step ended the episodes (None elsewhere), and
    `last_value` of what is seen after the rollout.
    """
    returns, following = torch.empty_like(rewards), last_value
    for t in reversed(range(len(rewards))):
        following = following if final_values[t] is None else final_values[t]
        following = returns[t] = rewards[t] + gamma * following
    return returns


@torch.no_grad()
def collect(args: Args, env: Cheetahs, agent: Agent) -> tuple[Tensor, Tensor, Tensor, np.ndarray | None]:
    """Act for S = t_max steps: observations and actions (S * P, ...), returns (S * P,), what ended episodes earned."""
    steps, final_values, earned = [], [None] * args.num_steps, None
    for t in range(args.num_steps):
        obs = env.observe().to(args.device)
        policy = agent.policy(obs)
        actions = policy.mean + policy.stddev * torch.randn(policy.mean.shape).to(obs)       # of the CPU's generator
        steps.append((obs, actions, env.step(actions).to(obs)))
        if env.steps == HORIZON:
            final_values[t] = agent.value(env.observe().to(obs)) * (not args.timeout_is_terminal)
            earned = env.returns
            env.reset()
    obs, actions, rewards = map(torch.stack, zip(*steps))
    returns = n_step_returns(rewards, final_values, agent.value(env.observe().to(obs)), args.gamma)
    return obs.flatten(0, 1), actions.flatten(0, 1), returns.flatten(), earned


def a2c_update(args: Args, agent: Agent, optimizer: torch.optim.Optimizer, obs: Tensor, actions: Tensor,
               returns: Tensor) -> dict[str, float]:
    """One A2C step of one agent; terms of the loss and the mean deviation of actions."""
    agent.filter.update(obs)                                           # once per update, before the loss
    policy, advantages = agent.policy(obs), returns - agent.value(obs)
    losses = {"value": 0.5 * advantages.square().mean(),               # weight and norm of the authors' code, both 0.5
              "policy": -(advantages.detach() * policy.log_prob(actions).sum(-1)).mean(),
              "entropy": -args.entropy_coef * policy.entropy().sum(-1).mean()}
    optimizer.zero_grad()                                              # to None: RMSprop skips what a task does not use
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 0.5)                  # of policy and critic together, L2
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()} | {"sigma": policy.stddev.mean().item()}


def load_source(args: Args) -> dict[str, Tensor]:
    """The weights that fine-tuning starts from; `args` takes the name of their task."""
    agents = load_checkpoint(args.finetune_from).get("agents", {})
    args.source_task = args.source_task or next(iter(agents), None)
    if args.source_task not in agents:
        sys.exit(f"{args.finetune_from} has no --source-task {args.source_task}, but {', '.join(agents) or 'none'}")
    return agents[args.source_task]


# --- Training --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(args: Args, policies: dict, stopped=lambda: False) -> dict[str, np.ndarray] | None:
    """Episodes by the mean action of each task's policy (observations -> Normal), with the same starts every time.

    Returns (T, episodes) of each; upside_down is the share of steps on the back. None once `stopped`.
    """
    rng, played = np.random.default_rng([args.seed, 1]), []
    for name, policy in policies.items():
        env, on_back = Cheetahs(name, args.eval_episodes, rng), 0
        while env.steps < HORIZON:
            if stopped():
                return None
            env.step(policy(env.observe().to(args.device)).mean)
            on_back += (np.cos(env.state[:, 3]) < 0) / HORIZON         # of time, x, height, pitch
        played.append((env.returns, on_back))
    returns, upside_down = np.swapaxes(played, 0, 1)
    return {"return": returns, "success": returns >= GOOD_RETURN, "upside_down": upside_down}


def train(args: Args) -> Path:
    """Roll out, update, task by task; returns the run folder."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, agents = np.random.default_rng(args.seed), nn.ModuleDict()
    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    for name in args.tasks:
        trunk = agents[args.tasks[0]] if agents and args.method == "vanilla" else None
        agents[name] = Agent(args.hidden_size, args.log_std, trunk)
        if state or args.method == "finetune":
            agents[name].load_state_dict(state["agents"][name] if state else load_source(args))
    agents.to(args.device)
    policies = {name: agent.policy for name, agent in agents.items()}
    if args.method == "finetune":
        frozen = ("pi1", "pi2", "v1", "v2") if args.finetune_layers == "paper" else ("pi1", "v1", "v2")
        for name, param in agents.named_parameters():
            param.requires_grad_(name.split(".")[1] not in frozen)
        policies.setdefault(args.source_task, agents[args.tasks[0]].policy)        # evaluated too: what is forgotten
    if args.evaluate:
        print_table(list(policies), evaluate(args, policies))
        if args.capture_video:
            film(args, policies, args.evaluate)
        return args.evaluate
    optimizer = torch.optim.RMSprop([p for p in agents.parameters() if p.requires_grad], args.lr, alpha=0.99, eps=1e-5)
    envs = {name: Cheetahs(name, args.num_envs, rng) for name in args.tasks}
    if args.resume:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})  # --lr as it is now
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        for env, (steps, *arrays) in zip(envs.values(), state["envs"]):
            env.steps, env.state, env.returns = steps, *(array.numpy() for array in arrays)
    run, global_step = Run(args, "halfcheetah", list(policies), state), state.get("global_step", 0)

    def save() -> None:
        run.save(global_step, dict(
            agents={name: agent.state_dict() for name, agent in agents.items()}, optimizer=optimizer.state_dict(),
            rng=json.dumps(rng.bit_generator.state), torch_rng=torch.get_rng_state(),
            envs=[(env.steps, torch.from_numpy(env.state), torch.from_numpy(env.returns)) for env in envs.values()]))

    save()                                                             # from here on a killed run can be resumed
    while True:
        if run.due(global_step) or args.method == "finetune" and not run.rows:           # what there was before it, too
            result = evaluate(args, policies, run.stop.is_set)
            if result is not None:
                columns = {}
                for name, returns in zip(run.names, result["return"]):
                    columns |= {f"{name}/median": np.median(returns), f"{name}/std": returns.std()}
                run.log_evaluation(global_step, result, columns)
        if global_step >= args.total_timesteps or run.stop.is_set():
            break
        round_start, losses = global_step, []
        for name, agent in agents.items():                             # the tasks take turns
            obs, actions, returns, earned = collect(args, envs[name], agent)
            global_step += len(obs)
            losses.append(a2c_update(args, agent, optimizer, obs, actions, returns))
            if earned is not None:
                run.log(f"tasks/{name}", {"episodic_return": earned.mean(), "episodic_length": HORIZON,
                                          "success": (earned >= GOOD_RETURN).mean()})
        run.log("losses", {key: [terms[key] for terms in losses] for key in losses[0]})
        if crossed(round_start, global_step, LOG_EVERY):
            run.write(global_step)
        if crossed(round_start, global_step, args.checkpoint_every):
            save()
    save()
    if not run.stop.is_set():
        before = {"before fine-tuning": {name: run.rows[0][f"{name}/return"] for name in policies}}
        others = before if args.method == "finetune" else TABLE_2
        plot_tasks(run.dir / "tasks.png", run.names, result["return"], others)
        print_table(run.names, result)
    run.close()
    return run.dir


# --- Pictures of the method ------------------------------------------------------------------------------------------
def plot_tasks(path: Path, names: list[str], returns: np.ndarray, others: dict[str, dict[str, float]]) -> None:
    """Each evaluation episode as a dot, (T, episodes), and its task's median, beside the numbers of others."""
    axis = Figure(figsize=(2 + 1.2 * len(names), 4), layout="constrained").subplots()
    axis.plot(names, returns, ".", color="black", alpha=0.4)
    axis.plot(names, np.median(returns, axis=1), "k_", markersize=18, label="median of our episodes, the dots")
    for label, values in others.items():
        known = [name for name in names if name in values]
        axis.plot(known, [values[name] for name in known], "D", label=label)
    axis.set_ylabel("return")
    axis.legend(frameon=False, fontsize=8)
    axis.figure.savefig(path, dpi=120)


@torch.no_grad()
def film(args: Args, policies: dict, folder: Path) -> None:
    """<task>.gif: an episode with the mean action, every tenth step of the first 600."""
    for name, policy in policies.items():
        env, frames = Cheetahs(name, 1, np.random.default_rng([args.seed, 1])), []
        try:
            renderer = mujoco.Renderer(env.model, 200, 300)
        except Exception as error:                                     # whatever the OpenGL at hand raises
            sys.exit(f"--capture-video needs OpenGL ({error}): set MUJOCO_GL=egl, or MUJOCO_GL=osmesa without a GPU")
        while env.steps < 600:
            if env.steps % 10 == 0:
                mujoco.mj_setState(env.model, env.data, env.state[0], mujoco.mjtState.mjSTATE_FULLPHYSICS)
                mujoco.mj_forward(env.model, env.data)
                renderer.update_scene(env.data, camera="track")
                frames.append(renderer.render())
            env.step(policy(env.observe().to(args.device)).mean)
        imageio.mimsave(folder / f"{name}.gif", frames, duration=60, loop=0)


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
