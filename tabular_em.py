# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2",
#   "pillow==13.0.0",
# ]
# ///
"""Task clustering by expectation-maximisation, in tables: tasks that disagree get different policies.

Ackermann, Richter, Wattenhofer: "Unsupervised Task Clustering for Multi-Task Reinforcement Learning", ECML-PKDD 2021.
No policy is told which task it is in, so tasks with conflicting rewards spoil each other's policy. Here n policies
share the tasks out among themselves: evaluate every policy on every task and give each task to the policy that is best
at it (E-step), then train each policy on its own tasks only (M-step), and repeat. The policies are plain Q-tables.

    E-step: G[t, i], return of policy i on task t        greedy_returns
    assignment: argmax_i G[t, i]; empty sets get all     assign_tasks, clusters
    M-step: Q-learning on tasks drawn from T_i           m_step, q_update

All trials run in one process, stepped together as arrays (trials, policies, ...); each has its own random numbers, so
trial k is the same however many run beside it. Differences from the paper, each explained in docs/tabular_em.md:
1. The chain pays -0.1 per step and negates rewards on the wrong half, as the authors' code does; with the reward as the
   paper states it, nothing is learnt (--chain-reward paper).
2. Q-learning bootstraps through terminal states, as the authors' code does (--mask-terminals for the textbook).
3. Reported are both the maximum over policies, which the paper probably plots, and the assigned policy afresh.

    python tabular_em.py                                  # twelve goals in four corners, EM with four policies
    python tabular_em.py --env chain --method sp          # left and right goals, one policy for all
"""
from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    env: Literal["grid", "chain"] = "grid"
    """task family: twelve goals in the corners of a 7 x 7 grid, or ten reward schemes on a chain of 51 states"""
    method: Literal["em", "sp", "ppt", "random-clusters"] = "em"
    """EM clustering; one policy for all tasks; one policy per task; clusters drawn once at random"""
    seed: int = 1
    """trial k draws from generators seeded with (seed, k)"""
    trials: int = 10
    """independent repetitions, stepped together"""
    total_timesteps: int = 200_000
    """environment steps of training per trial, summed over policies; whole M-steps, whose last episodes come on top"""
    device: Literal["auto", "cpu"] = "auto"
    """tables live on the CPU"""
    eval_every: int = 2_000
    """environment steps between rows of metrics.csv, which are written after E-steps only"""
    eval_episodes: int = 3
    """greedy episodes per policy and task in an E-step, paper: k; part of the method, not only of the report"""
    checkpoint_every: int = 20_000
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
    """paper: n; None: 4 for the grid, 2 for the chain, 1 for sp, one per task for ppt"""
    m_step_size: int = 500
    """training steps per policy and M-step, paper: T_M; episodes that have begun are finished"""
    evals_per_m_step: int = 1
    """evaluations per M-step, which they must divide; only the last one assigns tasks. The authors' code has 3"""
    mask_terminals: bool = False
    """no bootstrapping from the goal state (textbook); the authors' code bootstraps through it"""
    chain_reward: Literal["code", "paper"] = "code"
    """code: -0.1 per step, and rewards on the wrong half of the chain turn negative; the paper has neither"""
    lr: float = 0.2
    """Q-learning step size"""
    gamma: float = 0.9
    """discount factor of learning; reported returns are undiscounted"""
    epsilon: float = 0.2
    """probability of a random action in training, before its decay by 1e-6 of itself per step of the policy"""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        for name in ("trials", "total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "m_step_size",
                     "evals_per_m_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "gamma", "epsilon"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")
        num_tasks = {"grid": 12, "chain": 10}[self.env]
        fixed = {"sp": 1, "ppt": num_tasks}.get(self.method)
        if self.num_policies is None:
            self.num_policies = fixed or {"grid": 4, "chain": 2}[self.env]
        if fixed and self.num_policies != fixed:
            raise ValueError(f"--method {self.method} has {fixed} policies on --env {self.env}, got "
                             f"{self.num_policies}; leave --num-policies out, or resume with the run's own --method")
        if not 1 <= self.num_policies <= num_tasks:
            raise ValueError(f"--num-policies must be from 1 to {num_tasks}, the number of tasks of --env {self.env}, "
                             f"got {self.num_policies}")
        if self.m_step_size % self.evals_per_m_step:
            raise ValueError(f"--m-step-size {self.m_step_size} cannot be split into {self.evals_per_m_step} equal "
                             f"parts; let --evals-per-m-step divide it")
        round_of_all = self.num_policies * self.m_step_size
        self.total_timesteps = round_of_all * -(-self.total_timesteps // round_of_all)


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
class Tasks(NamedTuple):
    """A family of deterministic tasks with the same states, moves and start: S states, A actions, T tasks."""

    names: list[str]
    start: int
    next_state: np.ndarray                                # (S, A) int64
    reward: np.ndarray                                    # (T, S): reward of entering a state
    goal: np.ndarray                                      # (T,) int64: entering it ends the episode
    position: np.ndarray                                  # (S, 2): x and y, for pictures
    group: np.ndarray                                     # (T,): corner or side, the clusters that one hopes for
    train_cap: int                                        # steps after which an episode is cut off, in training ...
    eval_cap: int                                         # ... and in evaluation


def grid_tasks() -> Tasks:
    """7 x 7 cells, start in the middle, moves +x, +y, -x, -y; three goals in each corner (paper, Sec. 5.1).

    Reward 1 / distance to the goal in every cell, 10 in the goal. Moves off the grid stay put and are paid, too.
    """
    x, y = np.arange(49) % 7, np.arange(49) // 7
    moves = [np.clip(x + dx, 0, 6) + 7 * np.clip(y + dy, 0, 6) for dx, dy in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    goals = [(corner_x + dx * (1 - corner_x // 3), corner_y + dy * (1 - corner_y // 3))
             for corner_x, corner_y in ((0, 0), (0, 6), (6, 6), (6, 0)) for dx, dy in ((0, 0), (1, 0), (0, 1))]
    distance = np.array([np.hypot(x - goal_x, y - goal_y) for goal_x, goal_y in goals])
    reward = np.where(distance == 0, 10.0, 1 / np.maximum(distance, 1))
    return Tasks([f"goal{goal_x}{goal_y}" for goal_x, goal_y in goals], 3 + 7 * 3, np.stack(moves, 1), reward,
                 np.array([goal_x + 7 * goal_y for goal_x, goal_y in goals]), np.stack([x, y], 1), np.arange(12) // 3,
                 train_cap=50, eval_cap=7)


def chain_tasks(variant: str = "code") -> Tasks:
    """51 states in a row, start in the middle, moves left and right; goal at either end (paper, Sec. 5.1).

    Reward 20 in the goal and 1 / distance to it in every f-th state, f in {16, none, 2, 4, 8}; `variant` "code" adds
    -0.1 everywhere and turns the sign of the latter on the far side of the start.
    """
    state, names, goals, rewards = np.arange(51), [], [], []
    for period in (16, 0, 2, 4, 8):
        for side, goal in (("right", 50), ("left", 0)):
            bonus = np.where(state % period == 0, 1 / np.maximum(abs(goal - state), 1), 0.0) if period else np.zeros(51)
            far_side = state < 25 if goal == 50 else state > 25
            if variant == "code":
                bonus = np.where(far_side, -bonus, bonus)
            rewards.append(np.where(state == goal, 20.0, bonus) - 0.1 * (variant == "code"))
            names.append(f"{side}-every{period}" if period else f"{side}-goal")
            goals.append(goal)
    return Tasks(names, 25, np.stack([np.maximum(state - 1, 0), np.minimum(state + 1, 50)], 1), np.array(rewards),
                 np.array(goals), np.stack([state, 0 * state], 1), np.arange(10) % 2, train_cap=50, eval_cap=50)


def make_tasks(args: Args) -> Tasks:
    """The family that --env and --chain-reward name."""
    return grid_tasks() if args.env == "grid" else chain_tasks(args.chain_reward)


def optimal_returns(tasks: Tasks, shortest: bool = True) -> np.ndarray:
    """Best undiscounted return of each task from the start, (T,), by value iteration over the steps that are left.

    Args:
        shortest: among the shortest ways to the goal; otherwise among all behaviours within the evaluation's cap, which
            may dawdle where every step is paid.
    """
    best = np.empty(len(tasks.goal))
    for task, goal in enumerate(tasks.goal):
        is_goal = np.arange(len(tasks.next_state)) == goal
        values = np.where(is_goal, 0.0, -np.inf if shortest else 0.0)              # with no step left
        for _ in range(tasks.eval_cap):
            onwards = (tasks.reward[task] + values)[tasks.next_state].max(1)
            values = np.where(is_goal, -np.inf if shortest else 0.0, onwards)      # with one step more
            if shortest and np.isfinite(values[tasks.start]):
                break
        best[task] = values[tasks.start]
    return best


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


def separates(assignment: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Whether tasks share a policy exactly where they share a group: (..., T) and (T,) -> (...) bool."""
    together = assignment[..., :, None] == assignment[..., None, :]
    return (together == (group[:, None] == group)).all((-1, -2))


def random_clusters(num_tasks: int, num_policies: int, rng: np.random.Generator) -> np.ndarray:
    """Assignment for the ablation, (T,): tasks fall into n rows of ceil(T / n) slots each, one row per policy."""
    row_size = -(-num_tasks // num_policies)
    return rng.permutation(num_policies * row_size)[:num_tasks] // row_size


def pick(allowed: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One of the True entries of the last axis, drawn by a number in [0, 1): (..., K) bool, (...) -> index (...)."""
    rank = (uniform * allowed.sum(-1)).astype(np.int64)
    return (allowed.cumsum(-1) > rank[..., None]).argmax(-1)


def greedy_returns(q: np.ndarray, tasks: Tasks, task: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, ...]:
    """Play one episode per entry of `task` greedily, ties broken at random.

    Args:
        q: the Q-table that plays each episode, (..., S, A).
        task: its task, (...).
        uniform: numbers in [0, 1) that break ties, (eval_cap, ...).
    Returns:
        Undiscounted returns, successes and visited states; (...), (...), (eval_cap + 1, ...), -1 after the end.
    """
    state, index = np.full(task.shape, tasks.start), np.indices(task.shape, sparse=True)
    returns, success, states = np.zeros(task.shape), np.zeros(task.shape, bool), [state]
    for numbers in uniform:
        values = q[(*index, state)]                                    # (..., A)
        action = pick(values == values.max(-1, keepdims=True), numbers)
        state = tasks.next_state[state, action]
        returns += np.where(success, 0.0, tasks.reward[task, state])
        states.append(np.where(success, -1, state))
        success = success | (state == tasks.goal[task])
    return returns, success, np.stack(states)


def e_step(args: Args, tasks: Tasks, q: np.ndarray, rngs: list[np.random.Generator]) -> tuple[np.ndarray, int]:
    """Evaluate every policy on every task: G[t, i], (trials, T, n), means over episodes, and steps spent per trial."""
    (trials, num_policies, *table), num_tasks = q.shape, len(tasks.goal)
    shape = (num_tasks, num_policies, args.eval_episodes)
    uniform = np.stack([rng.random((tasks.eval_cap, *shape)) for rng in rngs], 1)
    players = np.broadcast_to(q[:, None, :, None], (trials, *shape, *table))
    task = np.broadcast_to(np.arange(num_tasks)[:, None, None], (trials, *shape))
    returns, _, states = greedy_returns(players, tasks, task, uniform)
    return returns.mean(-1), (states[1:] >= 0).sum() // trials


def evaluate_assigned(args: Args, tasks: Tasks, q: np.ndarray, assignment: np.ndarray,
                      rngs: list[np.random.Generator]) -> tuple[np.ndarray, ...]:
    """Fresh episodes of each task's own policy, free of the E-step's choice of a maximum: as `greedy_returns`.

    Args:
        assignment: (trials, T).
    Returns:
        Returns and successes, (trials, T, episodes); states, (eval_cap + 1, trials, T, episodes).
    """
    shape = (assignment.shape[1], args.eval_episodes)
    uniform = np.stack([rng.random((tasks.eval_cap, *shape)) for rng in rngs], 1)
    players = q[np.arange(len(q))[:, None], assignment][:, :, None]                # (trials, T, 1, S, A)
    players = np.broadcast_to(players, (len(q), *shape, *q.shape[2:]))
    task = np.broadcast_to(np.arange(shape[0])[:, None], (len(q), *shape))
    return greedy_returns(players, tasks, task, uniform)


def q_update(q: np.ndarray, reward: np.ndarray, next_values: np.ndarray, terminal: np.ndarray, lr: float, gamma: float,
             mask_terminals: bool) -> np.ndarray:
    """Q(s, a) moved towards r + gamma max_a' Q(s', a'): all of one shape, (...), `next_values` being the maximum."""
    bootstrap = next_values * ~terminal if mask_terminals else next_values
    return q + lr * (reward + gamma * bootstrap - q)


def m_step(args: Args, tasks: Tasks, q: np.ndarray, member: np.ndarray, steps: np.ndarray, size: int,
           rngs: list[np.random.Generator]) -> None:
    """Q-learning of every policy on its own tasks for at least `size` steps; episodes that have begun are finished.

    Args:
        q: tables, (trials, n, S, A), changed in place.
        member: which tasks a policy trains on, (trials, n, T) bool; each episode draws one of them uniformly.
        steps: training steps of each policy so far, (trials, n), changed in place.
        rngs: one generator per trial; all its numbers for the M-step are drawn at once.
    """
    trials, num_policies = steps.shape
    uniform = np.stack([rng.random((size + tasks.train_cap, 4, num_policies)) for rng in rngs], 2)
    trial, policy = np.indices((trials, num_policies), sparse=True)
    taken, length, state, task = np.zeros((4, trials, num_policies), int)         # steps in all, of the episode; ...
    for explore, random_action, tie, new_task in uniform:
        begins = length == 0
        task = np.where(begins, pick(member, new_task), task)
        state = np.where(begins, tasks.start, state)
        active = ~begins | (taken < size)
        if not active.any():
            break
        values = q[trial, policy, state]                               # (trials, n, A)
        greedy = pick(values == values.max(-1, keepdims=True), tie)
        epsilon = args.epsilon * (1 - 1e-6) ** (steps + taken)
        action = np.where(explore < epsilon, (random_action * values.shape[-1]).astype(int), greedy)
        after = tasks.next_state[state, action]
        terminal = after == tasks.goal[task]
        old = q[trial, policy, state, action]
        new = q_update(old, tasks.reward[task, after], q[trial, policy, after].max(-1), terminal, args.lr, args.gamma,
                       args.mask_terminals)
        q[trial, policy, state, action] = np.where(active, new, old)
        taken += active
        length = np.where(terminal | (length + 1 >= tasks.train_cap), 0, length + active)
        state = after
    steps += taken


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def train(args: Args) -> Path | None:
    """E-step and M-step in turns, for all trials at once; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    tasks, n = make_tasks(args), args.num_policies
    num_tasks, (num_states, num_actions) = len(tasks.goal), tasks.next_state.shape
    rngs, e_step_rngs, eval_rngs = ([np.random.default_rng((args.seed + offset, trial))
                                     for trial in range(args.trials)] for offset in (0, 5_000, 10_000))
    part = args.m_step_size // args.evals_per_m_step                   # steps per policy between two E-steps
    q = np.zeros((args.trials, n, num_states, num_actions))
    steps, eval_steps, global_step = np.zeros((args.trials, n), np.int64), 0, 0
    if args.method == "random-clusters":
        assignment = np.stack([random_clusters(num_tasks, n, rng) for rng in rngs])
    else:
        assignment = np.tile(np.arange(num_tasks) % n, (args.trials, 1))           # right for sp and ppt
    history = []                                                       # (step, assignment, returns) of each E-step

    state = {"seconds": 0.0}
    if args.resume or args.evaluate:
        state = load_checkpoint(args.resume or args.evaluate)
        q, steps, assignment = (state[name].numpy() for name in ("q", "steps", "assignment"))
        eval_steps, global_step = state["eval_steps"], state["global_step"]
        history = [(step, a.numpy(), r.numpy()) for step, a, r in state["history"]]
        for rng, saved in zip(rngs + e_step_rngs + eval_rngs, json.loads(state["generators"])):
            rng.bit_generator.state = saved
    if args.resume and global_step > args.total_timesteps:
        raise Failure(f"--resume {args.resume}: that run has {global_step:,} steps already; "
                      f"give a larger --total-timesteps than {args.total_timesteps:,}")

    if args.evaluate:
        finish(args, tasks, q, assignment, args.evaluate)
        return args.evaluate
    run = Run(args, tasks.names, global_step, state["seconds"])

    def evaluate_all_policies(assign: bool) -> np.ndarray:
        """E-step; keeps what the assignment picture needs."""
        nonlocal assignment, eval_steps
        returns, spent = e_step(args, tasks, q, e_step_rngs)
        eval_steps += int(spent)
        if args.method == "em" and assign:
            assignment = assign_tasks(returns)
        own = np.take_along_axis(returns, assignment[..., None], -1)[..., 0]       # (trials, T)
        history.append((global_step, assignment, own))
        return returns

    def save() -> None:
        """Everything that the next step reads."""
        run.save(dict(
            global_step=global_step, q=torch.from_numpy(q), steps=torch.from_numpy(steps), eval_steps=eval_steps,
            assignment=torch.from_numpy(assignment),
            history=[(step, torch.from_numpy(a), torch.from_numpy(r)) for step, a, r in history],
            generators=json.dumps([rng.bit_generator.state for rng in rngs + e_step_rngs + eval_rngs])))

    if not args.resume:
        evaluate_all_policies(assign=True)                             # the first assignment is of untrained policies
        save()

    while global_step < args.total_timesteps and not run.stop_signal:
        # M-step: every policy learns its own tasks -----------------------------------------------------------
        m_step(args, tasks, q, clusters(assignment, n), steps, part, rngs)
        previous_step, global_step = global_step, global_step + n * part

        # E-step: every policy is tried on every task, each task goes to the best -------------------------------
        returns = evaluate_all_policies(assign=global_step % (n * args.m_step_size) == 0)
        best = returns.max(-1)                                         # (trials, T): the paper's metric

        # Log, save ---------------------------------------------------------------------------------------------
        if crossed(previous_step, global_step, args.eval_every) or global_step >= args.total_timesteps:
            own, successes, _ = evaluate_assigned(args, tasks, q, assignment, eval_rngs)
            per_trial = own.mean((1, 2))                               # (trials,)
            columns = {"ci95": confidence(per_trial), "max_return": best.mean(), "max_ci95": confidence(best.mean(1)),
                       "separated": separates(assignment, tasks.group).mean(), "empty": np.mean(
                           [n - len(np.unique(row)) for row in assignment]),
                       "train_steps": round(steps.sum(1).mean()), "eval_steps": eval_steps}
            columns |= {f"trial{k}/return": value for k, value in enumerate(per_trial)}
            run.log_evaluation(global_step, {"returns": own.mean(2).T, "successes": successes.mean(2).T}, columns)
            run.write(global_step)
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        finish(args, tasks, q, assignment, run.dir)
        plot_returns(run.dir, tasks)
        plot_assignment(run.dir / "assignment.png", tasks.names, [(s, a[0], r[0]) for s, a, r in history], n)
        plot_policies(run.dir / "policies.png", tasks, q[0], assignment[0])
    run.close()
    return run.dir


def finish(args: Args, tasks: Tasks, q: np.ndarray, assignment: np.ndarray, folder: Path) -> None:
    """Print what the assigned policies reach and the clusters that were found; animate the first trial if asked to."""
    rngs = [np.random.default_rng((args.seed + 20_000, trial)) for trial in range(args.trials)]
    returns, successes, states = evaluate_assigned(args, tasks, q, assignment, rngs)
    returns, successes = (values.swapaxes(0, 1).reshape(len(tasks.names), -1) for values in (returns, successes))
    print_table(tasks.names, {"returns": returns, "successes": successes})
    print_clusters(tasks, assignment, args.num_policies)
    if args.capture_video:
        film = [[draw_state(tasks, task, state) for task, state in enumerate(states[0, 0, :, 0])]]
        for row in states[1:, 0, :, 0]:                                # a finished episode keeps its last picture
            film.append([draw_state(tasks, task, state) if state >= 0 else film[-1][task]
                         for task, state in enumerate(row)])
        save_animation(folder / "tasks.gif", tasks.names, film)


def print_clusters(tasks: Tasks, assignment: np.ndarray, num_policies: int) -> None:
    """The first trial's clusters, and in how many trials tasks share a policy exactly where they share a group."""
    print("\nclusters of trial 0")
    for policy in range(num_policies):
        names = [name for name, chosen in zip(tasks.names, assignment[0]) if chosen == policy]
        print(f"  policy {policy}: {', '.join(names) or 'none of its own (trains on all tasks)'}")
    count = separates(assignment, tasks.group).sum()
    print(f"corners or sides exactly separated in {count} of {len(assignment)} trials\n")


def confidence(values: np.ndarray) -> float:
    """Half width of the 95 % confidence interval of the mean over trials, (trials,), normal approximation."""
    return 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
def plot_returns(folder: Path, tasks: Tasks) -> None:
    """returns.png from metrics.csv: mean over trials with its 95 % confidence band, and the optimum, dashed."""
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, steps = figure.subplots(), table["global_step"]
    for mean, width, label in (("mean_return", "ci95", "assigned policy"),
                               ("max_return", "max_ci95", "maximum over policies")):
        axis.plot(steps, table[mean], label=label)
        axis.fill_between(steps, table[mean] - table[width], table[mean] + table[width], alpha=0.2)
    axis.axhline(optimal_returns(tasks).mean(), color="black", linestyle="--", label="optimal shortest paths")
    axis.axhline(optimal_returns(tasks, shortest=False).mean(), color="grey", linestyle=":",
                 label="optimal within the evaluation's cap")
    axis.set(xlabel="training steps, summed over policies", ylabel="return, mean over tasks")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.legend(frameon=False)
    figure.savefig(folder / "returns.png", dpi=120)


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


def plot_policies(path: Path, tasks: Tasks, q: np.ndarray, assignment: np.ndarray) -> None:
    """Greedy moves of each policy, (n, S, A), in its learnt states, with the goals of its tasks; square = start."""
    width, height = np.ptp(tasks.position, 0) + 1
    rows, columns = (-(-len(q) // 4), min(len(q), 4)) if height > 1 else (len(q), 1)
    figure = Figure(figsize=(3 * columns, 3 * rows) if height > 1 else (11, 1 + 0.7 * rows), layout="constrained")
    for policy, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.set_axis_off()
        if policy >= len(q):
            continue
        greedy = (q[policy] == q[policy].max(1, keepdims=True)) & np.any(q[policy] != 0, 1, keepdims=True)
        state, action = np.nonzero(greedy)
        move = tasks.position[tasks.next_state[state, action]] - tasks.position[state]
        axis.quiver(*tasks.position[state].T, *move.T, scale=2.2, scale_units="xy", units="xy", angles="xy", width=0.07,
                    pivot="mid")
        goals = tasks.position[tasks.goal[assignment == policy]]
        axis.plot(*goals.T, "*", color="tab:green", markersize=13, alpha=0.8)
        axis.plot(*tasks.position[tasks.start], "s", color="tab:red", markersize=9, alpha=0.5)
        axis.set(xlim=(-0.7, width - 0.3), ylim=(height - 0.3, -0.7), title=f"policy {policy}", aspect="equal")
    figure.savefig(path, dpi=120)


def draw_state(tasks: Tasks, task: int, state: int) -> np.ndarray:
    """One frame of an animation: all states in grey, the task's goal in green, the agent in red; (H, W, 3) uint8."""
    width, height = np.ptp(tasks.position, 0) + 1
    image = np.full((height, width, 3), 230, np.uint8)
    for place, colour in ((tasks.goal[task], (110, 190, 120)), (state, (200, 50, 50))):
        image[tasks.position[place, 1], tasks.position[place, 0]] = colour
    return image.repeat(12 if height > 1 else 4, 0).repeat(12 if height > 1 else 4, 1)


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
