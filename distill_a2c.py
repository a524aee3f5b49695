# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.0", "tyro==1.0.17",
#                 "pydantic==2.14.4", "filelock==4.3.1", "imageio==2.38.1", "tensorboard==2.21.0", "tqdm==4.70.1",
#                 "matplotlib==3.11.2"]
# ///
"""Multi-task distillation: one student with a head per task learns what a teacher per task does.

Arora, Kumar, Krone, Li: "Multi-task Learning for Continuous Control", 2018, arXiv:1802.01034. Teachers are policies
that A2C has trained on one half-cheetah each. The student acts, in one task after the other, and each teacher says for
the states that it meets what it would have done: a distribution, towards which the student's head is pulled.

    KL(teacher || student), Eq. 4 (see 1 below)         distillation_loss
    shared trunk, heads                                 Policy
    states of student or teacher; one step of a head    visit_states, distill_update

Differences from the paper, each explained in docs/distill_a2c.md:
1. The printed Eq. 4 is KL(student || teacher) under the name of the other direction, which is what the code computes
   and our default; --loss kl_student_teacher has the printed one.
2. Teachers are frozen with their observation filters, which go on moving in the authors' code.
3. Each head has a filter of its own, which learns from the states that it is trained on; the authors' student has one
   for all heads, which learns from a test environment.
4. A rollout goes on where the last one ended. The authors' distil.py never carries the last observation over: the
   first action of every five is chosen for, and one in five of the states is, the very first reset state.

    python multitask_a2c.py --method scratch              # six teachers: 3M steps each
    python distill_a2c.py --teachers RUN_FOLDER           # the student: 1M steps per head
    python distill_a2c.py --method single --tasks SmallFoot --teachers RUN_FOLDER    # alone, on its teacher's rollouts
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
from torch.distributions import Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
PARTS = {"Torso": ["torso"], "Head": ["head"], "Thigh": ["bthigh", "fthigh"], "Leg": ["bshin", "fshin"],
         "Foot": ["bfoot", "ffoot"]}
VARIANTS = tuple(size + part for part in PARTS for size in ("Small", "Big"))
PAPER = ("SmallFoot", "BigFoot", "SmallLeg", "SmallThigh", "SmallTorso", "BigTorso")
HORIZON, GOOD_RETURN, LOG_EVERY = 1_000, 1_000, 20_000        # steps; a success; environment steps between writes
STEPS = "environment steps, summed over tasks"
FIXED = {"method", "tasks", "seed", "teachers", "loss", "num_envs", "hidden_size"}
PRESETS = {"distill": 1_000_000, "single": 5_000_000}         # steps per task
TABLE_2 = {"paper, distillation 1M": dict(zip(PAPER, (1348.30, -63.07, 1413.55, 838.35, 2116.94, 1323.61)))}
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass
class Args:
    method: Literal["distill", "single"] = "distill"  # one student with heads; one per task, with the authors' settings
    tasks: Annotated[tuple[Literal[VARIANTS], ...], Field(min_length=1)] = PAPER  # bodies of a half-cheetah
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive | None = None   # summed over tasks; None: 1M per task, as in Table 2, 5M with single
    device: str = "cpu"                       # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive = 300_000            # environment steps between evaluations
    eval_episodes: Positive = 20              # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive = 600_000      # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    teachers: tuple[Path, ...] = ()           # runs of multitask_a2c.py --method scratch with all tasks between them
    p_student: Annotated[float, Field(ge=0, le=1)] | None = None  # share of rollouts by the student, paper: p_s
    # KL(teacher || student), as in the authors' code; KL(student || teacher), the formula printed; squared differences
    loss: Literal["kl_teacher_student", "kl_student_teacher", "mse"] = "kl_teacher_student"
    num_envs: Positive = 16                   # copies of each task's environment, stepped in parallel
    num_steps: Positive = 5                   # steps of a rollout, paper: t_max; each ends with an update
    hidden_size: Positive = 64                # width of the two hidden layers
    lr: Share = 7e-4                          # RMSprop step size

    def __post_init__(self):
        self.tasks = tuple(dict.fromkeys(self.tasks))                  # each once
        self.total_timesteps = self.total_timesteps or PRESETS[self.method] * len(self.tasks)
        self.p_student = float(self.method == "distill") if self.p_student is None else self.p_student


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


class Policy(nn.Module):
    """Gaussian policy of one task over torques, which are not squashed, behind its observation filter.

    `trunk`: the policy of another task whose hidden layers are this one's, too.
    """

    def __init__(self, hidden: int, log_std: str, trunk: Policy | None = None):
        super().__init__()
        self.filter, free = ObservationFilter(), log_std == "parameter"
        self.pi1 = trunk.pi1 if trunk else linear(17, hidden)
        self.pi2 = trunk.pi2 if trunk else linear(hidden, hidden)
        self.pi3 = linear(hidden, 6 if free else 12, scale=0.01)
        self.log_std = nn.Parameter(torch.zeros(6)) if free else None

    def forward(self, obs: Tensor) -> Normal:
        """(B, 17) -> distribution of actions, (B, 6)."""
        mean = self.pi3(torch.tanh(self.pi2(torch.tanh(self.pi1(self.filter(obs))))))
        mean, log_std = mean.chunk(2, dim=-1) if self.log_std is None else (mean, self.log_std)
        return Normal(mean, log_std.exp(), validate_args=False)


# --- The method ------------------------------------------------------------------------------------------------------
def load_teachers(args: Args) -> dict[str, dict[str, Tensor]]:
    """The weights of each task's agent, out of the runs that --teachers names: the last that has the task."""
    if not args.teachers:
        sys.exit("--teachers RUN_FOLDER is missing; this trains them and prints the name of their folder:\n    python "
                 f"multitask_a2c.py --method scratch --tasks {' '.join(args.tasks)}")
    found = {}
    for folder in args.teachers:
        found |= load_checkpoint(folder).get("agents", {})
    if missing := [name for name in args.tasks if name not in found]:
        sys.exit(f"--teachers have no {', '.join(missing)}, but {', '.join(found) or 'no task of multitask_a2c.py'}")
    return found


def distillation_loss(teacher: Normal, student: Normal, loss: str) -> Tensor:
    """How far the student's distributions of actions, (N, A), are from the teacher's: Eq. 4, mean over states, [nats].

    The teacher's are constants. "mse" is the mean squared difference of means and of deviations.
    """
    if loss == "mse":
        return (student.mean - teacher.mean).square().mean() + (student.stddev - teacher.stddev).square().mean()
    pair = (teacher, student) if loss == "kl_teacher_student" else (student, teacher)
    return kl_divergence(*pair).sum(-1).mean()


@torch.no_grad()
def visit_states(args: Args, env: Cheetahs, policy: Policy) -> tuple[Tensor, np.ndarray | None]:
    """Let a policy act for S = t_max steps: the observations, (S * P, 17), and what the episodes that ended earned."""
    seen, earned = [], None
    for _ in range(args.num_steps):
        seen.append(env.observe().to(args.device))
        chosen = policy(seen[-1])
        env.step(chosen.mean + chosen.stddev * torch.randn(chosen.mean.shape).to(args.device))       # CPU's generator
        if env.steps == HORIZON:
            earned = env.returns
            env.reset()
    return torch.cat(seen), earned


def distill_update(args: Args, student: Policy, teacher: Policy, optimizer: torch.optim.Optimizer,
                   obs: Tensor) -> dict[str, float]:
    """One step of the student's head for a task, and of its trunk, towards the teacher, on states (N, 17)."""
    with torch.no_grad():
        target = teacher(obs)                                          # its filter does not move
    student.filter.update(obs)                                         # once per update, before the loss
    actions = student(obs)
    loss = distillation_loss(target, actions, args.loss)
    optimizer.zero_grad()                                              # to None: RMSprop skips what a task does not use
    loss.backward()                                                    # no clipping, as in the authors' code
    optimizer.step()
    return {args.loss: loss.item(), "sigma": actions.stddev.mean().item()}


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
    """Visit states, move a head towards its teacher, task by task; returns the run folder."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, students, teachers = np.random.default_rng(args.seed), nn.ModuleDict(), nn.ModuleDict()
    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    learnt = state["teachers"] if state else load_teachers(args)
    for name in args.tasks:
        trunk = students[args.tasks[0]] if students and args.method == "distill" else None
        students[name] = Policy(args.hidden_size, "parameter", trunk)
        if state:
            students[name].load_state_dict(state["students"][name])
        log_std = "parameter" if "log_std" in learnt[name] else "network"
        teachers[name] = Policy(len(learnt[name]["pi1.bias"]), log_std)
        teachers[name].load_state_dict({key: learnt[name][key] for key in teachers[name].state_dict()})     # no critic
    students.to(args.device), teachers.to(args.device)
    if args.evaluate:
        print_table(args.tasks, evaluate(args, students))
        if args.capture_video:
            film(args, students, args.evaluate)
        return args.evaluate
    optimizer = torch.optim.RMSprop(students.parameters(), args.lr, alpha=0.99, eps=1e-5)
    envs = {name: Cheetahs(name, args.num_envs, rng) for name in args.tasks}
    if args.resume:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})  # --lr as it is now
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        for env, (steps, *arrays) in zip(envs.values(), state["envs"]):
            env.steps, env.state, env.returns = steps, *(array.numpy() for array in arrays)
    run, global_step = Run(args, "halfcheetah", args.tasks, state), state.get("global_step", 0)
    losses = state.get("losses", [])

    def save() -> None:
        run.save(global_step, dict(
            students={name: student.state_dict() for name, student in students.items()}, losses=losses,
            teachers={name: teacher.state_dict() for name, teacher in teachers.items()},
            optimizer=optimizer.state_dict(), rng=json.dumps(rng.bit_generator.state), torch_rng=torch.get_rng_state(),
            envs=[(env.steps, torch.from_numpy(env.state), torch.from_numpy(env.returns)) for env in envs.values()]))

    save()                                                             # from here on a killed run can be resumed
    while True:
        if run.due(global_step):
            result = evaluate(args, students, run.stop.is_set)
            if result is not None:
                columns = {f"{name}/{args.loss}": terms[args.loss] for name, terms in zip(args.tasks, losses)}
                for name, returns in zip(args.tasks, result["return"]):
                    columns |= {f"{name}/median": np.median(returns), f"{name}/std": returns.std()}
                run.log_evaluation(global_step, result, columns)
        if global_step >= args.total_timesteps or run.stop.is_set():
            break
        round_start, losses = global_step, []
        for name in args.tasks:                                        # the tasks take turns
            student, teacher = students[name], teachers[name]
            obs, earned = visit_states(args, envs[name], student if rng.random() < args.p_student else teacher)
            global_step += len(obs)
            losses.append(distill_update(args, student, teacher, optimizer, obs))
            if earned is not None:
                run.log(f"tasks/{name}", {"episodic_return": earned.mean(), "episodic_length": HORIZON,
                                          "success": (earned >= GOOD_RETURN).mean()})
        run.log("losses", {key: [terms[key] for terms in losses] for key in losses[0]})
        if crossed(round_start, global_step, LOG_EVERY):
            run.write(global_step)
        if crossed(round_start, global_step, args.checkpoint_every):
            save()
    save()
    taught = None if run.stop.is_set() else evaluate(args, teachers, run.stop.is_set)
    if taught is not None:
        medians = dict(zip(args.tasks, np.median(taught["return"], axis=1)))
        plot_tasks(run.dir / "tasks.png", args.tasks, result["return"], {"teacher, median": medians} | TABLE_2)
        plot_divergence(run.dir / "divergence.png", args.tasks, args.loss, run.rows)
        for who, outcome in (("teachers", taught), ("student", result)):
            print(f"{who}:")
            print_table(args.tasks, outcome)
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


def plot_divergence(path: Path, names: list[str], loss: str, rows: list[dict]) -> None:
    """Each head's distance from its teacher over training."""
    axis = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name in names:
        axis.plot([row["global_step"] for row in rows], [row[f"{name}/{loss}"] for row in rows], ".-", label=name)
    axis.set(xlabel=STEPS, yscale="log", ylabel=f"{loss} [nats]" if loss != "mse" else loss)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.legend(frameon=False)
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
