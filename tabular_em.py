# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "pydantic==2.14.4", "filelock==4.3.1",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Task clustering by expectation-maximisation, in tables: tasks that disagree get different policies.

Ackermann, Richter, Wattenhofer: "Unsupervised Task Clustering for Multi-Task Reinforcement Learning", ECML-PKDD 2021.
No policy is told which task it is in, so tasks with conflicting rewards spoil each other's policy. Here n policies
share the tasks out among themselves: play every policy on every task and give each task to the policy that is best at
it (E-step), then train each policy on its own tasks only (M-step), and repeat. The policies are plain Q-tables.

    E-step: G[t][i], return of policy i on task t; task t goes to argmax_i G[t][i]     Trial.e_step
    T_i: the tasks of policy i, or all tasks if it has got none                        Trial.tasks_of
    M-step: Q-learning on episodes of tasks drawn from T_i                             Trial.m_step

Differences from the paper, explained in docs/tabular_em.md:
1. The chain pays -0.1 per step and negates rewards on the wrong half, as the authors' code does. With the reward as the
   paper prints it, nothing is learnt (--env chain-paper).
2. Q-learning bootstraps through terminal states, as the authors' code does (--mask-terminals for the textbook).
3. The paper probably plots the best of all policies on each task, max_return; mean_return is of the assigned policy.

    python tabular_em.py                                  # twelve goals in four corners, EM with four policies
    python tabular_em.py --env chain --method sp          # left and right goals, one policy for all
"""
import csv
import json
import math
import os
import random
import shlex
import signal
import sys
import threading
import time
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
STEPS = "environment steps, summed over policies"
FIXED = {"env", "method", "seed", "trials", "num_policies"}            # what a continued run cannot change


@dataclass
class Args:
    # twelve goals in a grid's corners; ten rewards on a chain, as the authors coded them, or as they printed them
    env: Literal["grid", "chain", "chain-paper"] = "grid"
    # EM clustering; one policy for all tasks; one policy per task; clusters drawn once at random
    method: Literal["em", "sp", "ppt", "random-clusters"] = "em"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    trials: Positive = 10                     # independent repetitions; trial k is the same, however many there are
    total_timesteps: Positive = 200_000       # environment steps of a trial, summed over policies; without evaluation
    eval_every: Positive = 2_000              # environment steps between evaluations
    eval_episodes: Positive = 3               # greedy, per policy and task in an E-step, per task in an evaluation
    checkpoint_every: Positive = 20_000       # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    num_policies: Positive | None = None      # paper: n; None: grid 4, chain 2, sp 1, ppt one per task
    m_step_size: Positive = 500               # paper: T_M, steps per policy and M-step; the last episode is finished
    mask_terminals: bool = False              # no bootstrapping from the goal (textbook)
    lr: Share = 0.2                           # step size of Q-learning
    gamma: Share = 0.9                        # discount factor of Q-learning; reported returns are undiscounted
    epsilon: Share = 0.2                      # share of random actions in training; decays by 1e-6 of itself a step

    def __post_init__(self):
        num_tasks, num_clusters = (12, 4) if self.env == "grid" else (10, 2)
        preset = {"sp": 1, "ppt": num_tasks}.get(self.method, num_clusters)
        self.num_policies = self.num_policies or preset
        if self.method in ("sp", "ppt") and self.num_policies != preset:
            raise ValueError(f"--num-policies: --method {self.method} has {preset}; leave the flag out")


# --- Environments ----------------------------------------------------------------------------------------------------
class Tasks(NamedTuple):
    """Tasks with the same states, actions and start, which differ in reward and goal."""

    names: list[str]
    moves: list[list[int]]                                             # [state][action]: the next state
    rewards: list[list[float]]                                         # [task][state]: of entering it
    goal: list[int]                                                    # [task]: the state that ends an episode
    start: int
    eval_cap: int                                                      # steps of an evaluation episode; 50 in training
    group: list[int]                                                   # [task]: corner or side, the clusters hoped for
    optimum: float                                                     # return of the shortest paths, mean over tasks
    width: int                                                         # states in a row of a picture


def grid_tasks() -> Tasks:
    """7 x 7 cells, start in the middle, actions +x, +y, -x, -y; three goals in each corner (paper, Sec. 5.1).

    Reward 1 / distance to the goal, 10 in the goal; a move off the grid stays in the cell and is paid again.
    """
    cells = [(state % 7, state // 7) for state in range(49)]
    moves = [[min(max(x + dx, 0), 6) + 7 * min(max(y + dy, 0), 6) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1))]
             for x, y in cells]
    goals = [(0, 0), (1, 0), (0, 1), (0, 6), (1, 6), (0, 5), (6, 6), (5, 6), (6, 5), (6, 0), (5, 0), (6, 1)]
    rewards = [[10.0 if cell == goal else 1 / math.dist(cell, goal) for cell in cells] for goal in goals]
    return Tasks([f"goal{x}{y}" for x, y in goals], moves, rewards, [x + 7 * y for x, y in goals], start=24, eval_cap=7,
                 group=[task // 3 for task in range(12)], optimum=12.600, width=7)


def chain_tasks(as_printed: bool = False) -> Tasks:
    """51 states in a row, start in the middle, actions left and right; goal at either end (paper, Sec. 5.1)."""
    def reward(goal: int, period: int | None, state: int) -> float:
        """20 in the goal, 1 / distance to it in every f-th state; in the authors' code, two rules more."""
        value = 20.0 if state == goal else 1 / abs(goal - state) if period and state % period == 0 else 0.0
        wrong_side = state < 25 if goal == 50 else state > 25
        return value if as_printed else (-value if wrong_side else value) - 0.1

    kinds = [(goal, period) for period in (16, None, 2, 4, 8) for goal in (50, 0)]
    names = [("right-" if goal else "left-") + (f"every{period}" if period else "goal") for goal, period in kinds]
    rewards = [[reward(*kind, state) for state in range(51)] for kind in kinds]
    moves = [[max(state - 1, 0), min(state + 1, 50)] for state in range(51)]
    return Tasks(names, moves, rewards, [50, 0] * 5, start=25, eval_cap=50, group=[50, 0] * 5,
                 optimum=20.616 if as_printed else 18.116, width=51)


# --- The method ------------------------------------------------------------------------------------------------------
def greedy(values: list[float], rng: random.Random) -> int:
    """The action of highest value; ties are broken at random."""
    best = max(values)
    if values.count(best) == 1:
        return values.index(best)
    return rng.choice([action for action, value in enumerate(values) if value == best])


class Trial:
    """One repetition: n policies, and which of them has which task."""

    def __init__(self, args: Args, tasks: Tasks, number: int):
        self.args, self.tasks, self.rng = args, tasks, random.Random(f"trial {number} of seed {args.seed}")
        n, num_tasks = args.num_policies, len(tasks.names)
        self.q = [[[0.0] * len(actions) for actions in tasks.moves] for _ in range(n)]     # [policy][state][action]
        self.steps = [0] * n                                           # [policy]: training steps so far
        self.assignment = [task % n for task in range(num_tasks)]      # [task]: its policy; sp and ppt keep it
        self.history = []                                              # of E-steps: (global_step, assignment, G)
        if args.method == "random-clusters":                           # n rows of equal size, some slots left empty
            row_size = math.ceil(num_tasks / n)
            self.assignment = [slot // row_size for slot in self.rng.sample(range(n * row_size), num_tasks)]
        self.e_step(global_step=0)                                     # the first assignment is of untrained policies

    def play(self, policy: int, task: int, rng: random.Random) -> tuple[float, float]:
        """Greedy episodes of a policy on a task: mean undiscounted return, and share that ended in the goal."""
        tasks, q, episodes = self.tasks, self.q[policy], self.args.eval_episodes
        total_return, successes = 0.0, 0
        for _ in range(episodes):
            state = tasks.start
            for _ in range(tasks.eval_cap):
                state = tasks.moves[state][greedy(q[state], rng)]
                total_return += tasks.rewards[task][state]
                if state == tasks.goal[task]:
                    successes += 1
                    break
        return total_return / episodes, successes / episodes

    def e_step(self, global_step: int) -> None:
        """Give each task to the policy that is best at it; ties to the lowest index."""
        returns = [[self.play(policy, task, self.rng)[0] for policy in range(len(self.q))]
                   for task in range(len(self.assignment))]            # G[t][i]
        if self.args.method == "em":
            self.assignment = [row.index(max(row)) for row in returns]
        self.history.append((global_step, self.assignment, returns))

    def tasks_of(self, policy: int) -> list[int]:
        """T_i, the tasks that the policy trains on: its own, or all if it has got none."""
        own = [task for task, assigned in enumerate(self.assignment) if assigned == policy]
        return own or list(range(len(self.assignment)))

    def m_step(self, policy: int) -> None:
        """Q-learning on the policy's tasks for T_M steps; the last episode is finished."""
        args, tasks, rng, q = self.args, self.tasks, self.rng, self.q[policy]
        own, step = self.tasks_of(policy), self.steps[policy]
        end = step + args.m_step_size
        while step < end:
            task, state = rng.choice(own), tasks.start
            goal, rewards = tasks.goal[task], tasks.rewards[task]
            for _ in range(50):
                explore = rng.random() < args.epsilon * (1 - 1e-6) ** step
                action = rng.randrange(len(q[state])) if explore else greedy(q[state], rng)
                next_state = tasks.moves[state][action]
                next_value = 0.0 if next_state == goal and args.mask_terminals else max(q[next_state])
                q[state][action] += args.lr * (rewards[next_state] + args.gamma * next_value - q[state][action])
                step, state = step + 1, next_state
                if state == goal:
                    break
        self.steps[policy] = step

    def separates(self) -> bool:
        """Whether tasks share a policy exactly where they share a corner or side."""
        pairs = set(zip(self.assignment, self.tasks.group))
        return len(pairs) == len(set(self.assignment)) == len(set(self.tasks.group))

    def state_dict(self) -> dict:
        """What the next step reads, for a checkpoint."""
        return {"q": torch.tensor(self.q, dtype=torch.float64), "steps": self.steps, "assignment": self.assignment,
                "history": self.history, "rng": self.rng.getstate()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        vars(self).update(state | {"q": state["q"].tolist(), "rng": self.rng})
        self.rng.setstate(state["rng"])


# --- Training --------------------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """E-step and M-step in turns, in every trial; returns the run folder."""
    tasks = grid_tasks() if args.env == "grid" else chain_tasks(as_printed=args.env == "chain-paper")
    trials = [Trial(args, tasks, number) for number in range(args.trials)]
    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    for trial, saved in zip(trials, state.get("trials", [])):
        trial.load_state_dict(saved)
    if args.evaluate:
        print_table(tasks.names, evaluate(args, trials))
        return args.evaluate
    run, global_step = Run(args, args.env, tasks.names, state), state.get("global_step", 0)

    def save() -> None:
        run.save(global_step, {"trials": [trial.state_dict() for trial in trials]})

    save()                                                             # so that a killed run can be resumed
    while True:
        if run.due(global_step):
            result = evaluate(args, trials)
            run.log_evaluation(global_step, result, compare(trials, result["return"].mean(0)))
        if global_step >= args.total_timesteps or run.stop.is_set():
            break
        previous_step, global_step = global_step, global_step + args.num_policies * args.m_step_size
        for trial in trials:
            for policy in range(args.num_policies):
                trial.m_step(policy)
            trial.e_step(global_step)
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()
    save()
    if not run.stop.is_set():
        plot_returns(run.rows, tasks.optimum, run.dir / "returns.png")
        plot_assignment(trials[0], run.dir / "assignment.png")
        plot_policies(trials[0], run.dir / "policies.png")
        print_table(tasks.names, result)
        print(f"corners or sides exactly separated in {run.rows[-1]['separated']:.0%} of the trials")
    run.close()
    return run.dir


def evaluate(args: Args, trials: list[Trial]) -> dict[str, np.ndarray]:
    """Return and success of each task's own policy, (T, trials) each; with the same random numbers at every call."""
    played = []
    for number, trial in enumerate(trials):
        rng = random.Random(f"evaluation of trial {number} of seed {args.seed}")
        played.append([trial.play(policy, task, rng) for task, policy in enumerate(trial.assignment)])
    return dict(zip(("return", "success"), np.array(played).T))        # from (trials, T, 2)


def compare(trials: list[Trial], own: np.ndarray) -> dict[str, float]:
    """Further columns of metrics.csv from each trial's return, (trials,); ci95: half of a 95 % confidence interval."""
    best = np.array([trial.history[-1][2] for trial in trials]).max(2).mean(1)       # (trials,): what the paper plots
    ci95, max_ci95 = (1.96 * values.std() / max(len(trials) - 1, 1) ** 0.5 for values in (own, best))
    empty = [len(trial.q) - len(set(trial.assignment)) for trial in trials]
    return {"ci95": ci95, "max_return": best.mean(), "max_ci95": max_ci95, "empty": np.mean(empty),
            "separated": np.mean([trial.separates() for trial in trials]),
            **{f"trial{number}/return": value for number, value in enumerate(own)}}


# --- Pictures of the method ------------------------------------------------------------------------------------------
def plot_returns(rows: list[dict], optimum: float, path: Path) -> None:
    """The paper's Fig. 2 and 3, left: return over training, mean over trials with its 95 % confidence band."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for mean, width, label in (("mean_return", "ci95", "assigned policy"), ("max_return", "max_ci95", "best policy")):
        steps, middle, half = np.array([(row["global_step"], row[mean], row[width]) for row in rows]).T
        axis.plot(steps, middle, label=label)
        axis.fill_between(steps, middle - half, middle + half, alpha=0.2)
    axis.axhline(optimum, color="black", linestyle="--", label="shortest paths")
    axis.set(xlabel=STEPS, ylabel="return, mean over tasks")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_assignment(trial: Trial, path: Path) -> None:
    """The paper's Fig. 2 and 3, right: a dot where a task is assigned to the panel's policy, its colour the return."""
    steps, assignment, returns = (np.array(column) for column in zip(*trial.history))
    figure = Figure(figsize=(9, 1 + 1.6 * len(trial.q)), layout="constrained")
    axes = figure.subplots(len(trial.q), 1, sharex=True, squeeze=False)[:, 0]
    for policy, axis in enumerate(axes):
        when, task = np.nonzero(assignment == policy)
        dots = axis.scatter(steps[when], task, 10, returns[when, task, policy], vmin=returns.min(), vmax=returns.max())
        axis.set_yticks(range(len(trial.tasks.names)), trial.tasks.names, fontsize=6)
        axis.set(ylabel=f"policy {policy}", ylim=(len(trial.tasks.names) - 0.5, -0.5))
    axes[-1].set_xlabel(STEPS)
    figure.colorbar(dots, ax=axes, label="return")
    figure.savefig(path, dpi=120)


def plot_policies(trial: Trial, path: Path) -> None:
    """Greedy moves of each policy where it has learnt something, and the goals of its tasks."""
    tasks, n = trial.tasks, len(trial.q)
    y, x = divmod(np.arange(len(tasks.moves)), tasks.width)            # of each state
    shape, size = ((1, n), (3 * n, 3)) if y.any() else ((n, 1), (11, n))
    figure = Figure(figsize=size, layout="constrained")
    for policy, axis in enumerate(figure.subplots(*shape, squeeze=False).flat):
        q, goals = np.array(trial.q[policy]), [tasks.goal[task] for task in trial.tasks_of(policy)]
        state, action = np.nonzero((q == q.max(1, keepdims=True)) & q.any(1, keepdims=True))
        after = np.array(tasks.moves)[state, action]
        axis.quiver(x[state], y[state], x[after] - x[state], y[after] - y[state], pivot="mid", angles="xy",
                    scale_units="xy", scale=2)
        axis.plot(x[goals], y[goals], "*", color="tab:green", markersize=12)
        axis.set(title=f"policy {policy}", aspect="equal", xlim=(-0.7, x.max() + 0.7), ylim=(y.max() + 0.7, -0.7))
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
