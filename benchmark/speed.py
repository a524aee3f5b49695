"""How fast the scripts are, as ratios within one process: python benchmark/speed.py [SCRIPT ...]

For each script, at its paper's hyperparameters: milliseconds per update and its share of the machine's measured
matrix-product peak; the same update as a plain loop over per-task modules, which is what one would write first; where
the time of a training round goes; environment steps per second over a whole (short) run; peak memory with a full replay
buffer. Absolute times vary with the machine and its load; the ratios are what counts, each the median of repetitions
that alternate between the two sides.
"""
from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))


def milliseconds(functions: dict, repetitions: int = 15) -> dict[str, float]:
    """Median time of each function, called in turns after a warm-up, so that a busy machine slows all alike."""
    times = {name: [] for name in functions}
    for repetition in range(repetitions + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_products(num_tasks: int, batch: int, width: int) -> dict:
    """Large products, square and in the update's own shape; the fastest one is the peak."""
    square, stack = torch.randn(1024, 1024), torch.randn(num_tasks, width, width)
    x, stack_out = torch.randn(num_tasks, batch, width), torch.empty(num_tasks, batch, width)
    out = torch.empty(1024, 1024)
    return {"square": (lambda: torch.mm(square, square, out=out), 2 * 1024**3),
            "stack": (lambda: torch.bmm(x, stack, out=stack_out), 2 * num_tasks * batch * width**2)}


def line(label: str, value: str) -> None:
    print(f"| {label} | {value} |", flush=True)


# --- qmp_sac ---------------------------------------------------------------------------------------------------------
class SingleSAC:
    """One task's SAC in ordinary modules and optimizers, as a single-task script has it."""

    def __init__(self, obs_size: int, action_size: int, hidden: int, lr: float):
        def mlp(n_in, n_out):
            return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, n_out))
        self.actor = mlp(obs_size, 2 * action_size)
        self.qf1, self.qf2, self.qf1_target, self.qf2_target = (mlp(obs_size + action_size, 1) for _ in range(4))
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=lr)
        self.q_optimizer = torch.optim.Adam([*self.qf1.parameters(), *self.qf2.parameters()], lr=lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=lr)

    def act(self, obs):
        mean, log_std = self.actor(obs).chunk(2, -1)
        noise, log_std = torch.randn_like(mean), log_std.clamp(-20, 2)
        action = torch.tanh(mean + log_std.exp() * noise)
        return action, (-0.5 * noise**2 - log_std - 0.919 - torch.log(1 - action**2 + 1e-6)).sum(-1)

    def update(self, obs, actions, rewards, next_obs, terminations):
        alpha = self.log_alpha.exp().item()
        with torch.no_grad():
            next_actions, next_log_prob = self.act(next_obs)
            x = torch.cat([next_obs, next_actions], -1)
            next_q = torch.min(self.qf1_target(x), self.qf2_target(x)).squeeze(-1)
            target = rewards + 0.99 * (1 - terminations) * (next_q - alpha * next_log_prob)
        x = torch.cat([obs, actions], -1)
        q_loss = sum(nn.functional.mse_loss(q(x).squeeze(-1), target) for q in (self.qf1, self.qf2))
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        pi, log_prob = self.act(obs)
        x = torch.cat([obs, pi], -1)
        actor_loss = (alpha * log_prob - torch.min(self.qf1(x), self.qf2(x)).squeeze(-1)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        alpha_loss = -(self.log_alpha * (log_prob.detach() - pi.shape[1]).mean()).sum()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for net, target_net in ((self.qf1, self.qf1_target), (self.qf2, self.qf2_target)):
                for p, t in zip(net.parameters(), target_net.parameters()):
                    t.mul_(0.995).add_(p, alpha=0.005)


def qmp_sac() -> None:
    for env, steps in (("maze", 90_000), ("reacher", 20_000), ("metaworld", 40_000)):
        qmp_sac_on(env, steps)
    whole_run("qmp_sac", ["--total-timesteps", "1000000", "--learning-starts", "100000", "--eval-every", "1000000",
                          "--eval-episodes", "1", "--method", "separated"],
              "maze, replay of 1M steps filled, no updates")


def qmp_sac_on(env: str, steps: int) -> None:
    """One task family: the update against a loop, the parts of a lock-step, whole runs of `steps` steps."""
    import qmp_sac as qmp
    args, rng = qmp.Args(env=env), np.random.default_rng(0)
    envs = qmp.make_envs(args, list(range(len(qmp.TASKS[env]))))
    obs, _ = envs.reset(seed=0)
    (num_tasks, obs_size), action_size = obs.shape, envs.single_action_space.shape[0]
    learners = qmp.Learners(args, num_tasks, obs_size, action_size)
    optimizers = learners.make_optimizers(args.lr)
    buffer = qmp.ReplayBuffer(num_tasks, 100_000, obs_size, action_size, torch.device("cpu"))
    buffer.data.normal_()
    buffer.num_added = 100_000
    singles = [SingleSAC(obs_size, action_size, args.hidden_size, args.lr) for _ in range(num_tasks)]

    def ensemble():
        qmp.update(args, learners, optimizers, buffer.sample(rng, args.batch_size))

    def loop():
        for task, single in enumerate(singles):
            index = torch.from_numpy(rng.integers(100_000, size=args.batch_size))
            fields = buffer.data[task, index].split(buffer.widths, -1)
            single.update(*fields[:2], fields[2][:, 0], fields[3], fields[4][:, 0])

    with FlopCounterMode(display=False) as counter:
        ensemble()
    products = matrix_products(num_tasks, args.batch_size, args.hidden_size)
    times = milliseconds({"ensemble": ensemble, "loop": loop} | {name: f for name, (f, _) in products.items()})
    peak = max(flop / times[name] / 1e6 for name, (_, flop) in products.items())
    reached = counter.get_total_flops() / times["ensemble"] / 1e6
    line(f"{env}: update of {num_tasks} learners, batch {args.batch_size}",
         f"{times['ensemble']:.1f} ms, {counter.get_total_flops() / 1e9:.2f} GFLOP")
    line("its share of the matrix-product peak", f"{reached:.0f} of {peak:.0f} GFLOP/s = {reached / peak:.0%}")
    line("the same as a loop over the learners", f"{times['loop']:.1f} ms: {times['loop'] / times['ensemble']:.2f} x")

    actions, zeros, one_obs = np.zeros((num_tasks, action_size), np.float32), np.zeros(num_tasks), torch.from_numpy(obs)
    step_times = milliseconds({
        "act, Q-switch": lambda: qmp.behave(args, learners, one_obs, False)[0].numpy(),
        "act, own policy": lambda: qmp.behave(args, learners, one_obs, True)[0].numpy(),
        "step the environments": lambda: envs.step(actions),
        "store": lambda: buffer.add(obs, actions, zeros, obs, zeros)}, repetitions=300)
    for name, value in step_times.items():
        line(f"{name}, per lock-step of {num_tasks}", f"{value:.2f} ms")
    fill = 2 * args.train_every                                        # updates begin with the third round
    updates = (steps // (num_tasks * args.train_every) - 2) * args.gradient_steps
    for method in ("qmp", "separated"):
        whole_run("qmp_sac", ["--env", env, "--method", method, "--total-timesteps", str(steps), "--eval-every",
                              str(steps), "--eval-episodes", "1", "--learning-starts", str(fill)],
                  f"--env {env} --method {method}, {steps:,} steps", update=times["ensemble"] / 1e3 * updates)


def whole_run(script: str, arguments: list[str], label: str, update: float | None = None) -> None:
    """Run a script as a user does; report steps per second between start-up and end, and the peak of its memory.

    `update`: seconds that its updates alone should take; the rest is acting, stepping, evaluation and logging.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, f"{script}.py", *arguments, "--runs-dir", folder]
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.DEVNULL)
        total = time.perf_counter() - start
        row = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()[-1].split(",")
    rate, seconds = int(row[0]) / float(row[1]), float(row[1])
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    rest = "" if update is None else f"; not updates: {1 - update / seconds:.0%}"
    line(label, f"{rate:,.0f} steps/s, {total:.0f} s in all, up to {memory:,.0f} MB{rest}")


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}\n")
    print("| measured | value |\n|---|---|")
    for name in sys.argv[1:] or ["qmp_sac"]:
        line(f"**{name}.py**", "")
        globals()[name]()
