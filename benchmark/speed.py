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
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
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


def resident_bytes() -> int:
    """Memory of this process at the moment (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


# --- em_clustering_td3 -----------------------------------------------------------------------------------------------
def em_clustering_td3() -> None:
    import em_clustering_td3 as em
    for env, obs_size, action_size in (("pendulum", 3, 1), ("track", 24, 4)):
        updates, rng = {}, np.random.default_rng(0)
        for n in (1, 4):
            args = em.Args(env=env, num_policies=n, m_step_size=1_000)
            learners = em.TD3Learners(args, obs_size, action_size)
            buffer = em.ReplayBuffer(n, 5_000, obs_size, action_size, torch.device("cpu"))
            buffer.data.normal_()
            buffer.num_added = 5_000
            updates[f"n = {n}"] = _td3_updates(em, args, learners, learners.make_optimizers(args.lr), buffer, rng)
        times = milliseconds(updates, repetitions=7 if env == "track" else 25)
        line(f"{env}: three updates of one policy, batch {args.batch_size}", f"{times['n = 1']:.1f} ms")
        line("of four policies, stacked", f"{times['n = 4']:.1f} ms: {times['n = 4'] / times['n = 1']:.2f} x; "
             f"a loop over them would be 4 x")
    for batch in (100, 1_000):                                         # acting, stepping, storing and an update
        stack, *singles = (_walker_round(em, n, batch) for n in (4, 1, 1, 1, 1))
        times = milliseconds({"stack": stack, "loop": partial(_each, singles)}, repetitions=25)
        line(f"track, batch {batch}: four policies learning, stacked", f"{12e3 / times['stack']:,.0f} steps/s")
        line("as a loop over them", f"{12e3 / times['loop']:,.0f} steps/s: the stack is "
             f"{times['loop'] / times['stack']:.2f} times as fast")
    whole_run("em_clustering_td3", ["--total-timesteps", "40000", "--m-step-size", "10000", "--learning-starts", "500",
                                    "--eval-episodes", "5"], "pendulum, em, 40,000 steps, 5 episodes per E-step pair")


def _walker_round(em, n: int, batch: int):
    """Three steps of each of n policies in an environment of its own, and an update: 3 n steps."""
    args, rng = em.Args(env="track", num_policies=n, batch_size=batch), np.random.default_rng(0)
    envs, cpu = em.make_envs(args, list(range(6))), torch.device("cpu")
    learners, buffer = em.TD3Learners(args, 24, 4), em.ReplayBuffer(n, 5_000, 24, 4, cpu)
    optimizers, obs = learners.make_optimizers(args.lr), envs.reset(seed=0)[0]

    def one():
        nonlocal obs
        for _ in range(3):
            with torch.no_grad():
                actions = em.policy_actions(args, learners.actor, torch.from_numpy(obs)[:, None])[:, 0].numpy()
            next_obs, rewards, terminations, _, infos = envs.step(actions)
            buffer.add(obs, actions, rewards, em.true_next_obs(next_obs, infos), terminations)
            obs = next_obs
        em.td3_update(args, learners, optimizers, buffer.sample(rng, batch), 1.0, True, rng)
    return one


def _each(functions: list) -> None:
    for function in functions:
        function()


def _td3_updates(em, args, learners, optimizers, buffer, rng):
    def three():
        for i in range(3):                                             # one of them moves policies and targets
            em.td3_update(args, learners, optimizers, buffer.sample(rng, args.batch_size), 1.0, i == 2, rng)
    return three


# --- pcgrad_sac, dgrad_arch_sac --------------------------------------------------------------------------------------
def _joint_updates(module, args, learners, num_tasks, surgery, rng):
    optimizers = learners.make_optimizers(args.lr, args.critic_lr)
    buffer = module.ReplayBuffer(num_tasks, 2_000, 39 + num_tasks, 4, torch.device("cpu"))
    buffer.data.normal_()
    buffer.num_added = 2_000

    def one():
        orders = (lambda: module.draw_visit_order(num_tasks, rng)) if surgery else (lambda: None)
        batch = buffer.sample(rng, args.batch_size)
        module.joint_update(learners, optimizers, batch, 0.99, 0.005, 1.0, surgery, orders)
    return one


def pcgrad_sac() -> None:
    import pcgrad_sac as pc
    for env, num_tasks in (("mt4", 4), ("mt10", 10)):
        rng, args = np.random.default_rng(0), pc.Args(env=env)
        updates = {method: _joint_updates(pc, args, pc.make_learners(args, num_tasks, 39 + num_tasks, 4), num_tasks,
                                          method == "pcgrad", rng) for method in ("sac", "pcgrad")}
        times = milliseconds(updates, repetitions=9)
        line(f"{env}: update of sac, batch {num_tasks} x {args.batch_size}, {args.hidden_sizes}",
             f"{times['sac']:.1f} ms")
        line("with surgery", f"{times['pcgrad']:.1f} ms: {times['pcgrad'] / times['sac']:.2f} x")
    for env, num_tasks in (("mt10", 10), ("mt50", 50)):
        start, before = time.perf_counter(), resident_bytes()
        envs = pc.make_envs(pc.Args(env=env), list(range(num_tasks)))
        envs.reset(seed=0)
        seconds, grown = time.perf_counter() - start, (resident_bytes() - before) / 2**20
        actions = np.zeros((num_tasks, 4), np.float32)
        step = milliseconds({"step": partial(envs.step, actions)}, repetitions=60)["step"]
        line(f"construction of {env}; memory of its simulators", f"{seconds:.1f} s; {grown:,.0f} MB")
        line("stepping it, per lock-step", f"{step:.1f} ms: {num_tasks / step * 1e3:,.0f} steps/s")
    whole_run("pcgrad_sac", ["--total-timesteps", "12000", "--learning-starts", "500", "--eval-every", "12000",
                             "--eval-episodes", "1"], "mt4, pcgrad, 12,000 steps")


def dgrad_arch_sac() -> None:
    import dgrad_arch_sac as dg
    for env, num_tasks in (("mt4", 4), ("mt10", 10)):
        updates = {}
        for method in ("sac", "dgrad-a", "film"):
            args = dg.Args(env=env, method=method)
            learners = dg.make_modular_learners(args, num_tasks, 39 + num_tasks, 4)
            updates[method] = _joint_updates(dg, args, learners, num_tasks, False, np.random.default_rng(0))
        times = milliseconds(updates, repetitions=7)
        line(f"{env}: update of sac", f"{times['sac']:.1f} ms")
        for method in ("dgrad-a", "film"):
            line(f"of {method}", f"{times[method]:.1f} ms: {times[method] / times['sac']:.2f} x")
    whole_run("dgrad_arch_sac", ["--total-timesteps", "12000", "--learning-starts", "500", "--eval-every", "12000",
                                 "--eval-episodes", "1"], "mt4, dgrad-a, 12,000 steps")


# --- multitask_a2c, distill_a2c --------------------------------------------------------------------------------------
def multitask_a2c() -> None:
    import gymnasium as gym
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

    import distill_a2c
    import multitask_a2c as a2c
    args, cpu, tasks = a2c.Args(), torch.device("cpu"), list(range(6))
    pool, rng = a2c.CheetahPool(list(args.tasks), 16, 0), np.random.default_rng(0)
    stock = SyncVectorEnv([lambda: gym.make("HalfCheetah-v5") for _ in range(16)])
    stock.reset(seed=0)
    processes = AsyncVectorEnv([lambda: gym.make("HalfCheetah-v5") for _ in range(16)])
    processes.reset(seed=0)
    actions = rng.uniform(-1, 1, (6, 16, 6)).astype(np.float32)
    nets = a2c.ActorCritic(6, 64, "parameter", None)
    optimizer = torch.optim.RMSprop(nets.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)
    shared = a2c.ActorCritic(6, 64, "parameter", "paper")
    shared_optimizer = torch.optim.RMSprop(shared.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)

    student = distill_a2c.Student(6, 64)
    student_optimizer = torch.optim.RMSprop(student.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)
    one_by_one, simulating, step = [[task] for task in tasks], 0.0, pool.step

    def timed_step(*step_args):
        nonlocal simulating
        start = time.perf_counter()
        result = step(*step_args)
        simulating += time.perf_counter() - start
        return result

    def round_of(nets, optimizer, groups):
        for group in groups:
            rollout, _ = a2c.collect(pool, nets, group, 5, cpu)
            a2c.a2c_update(args, nets, optimizer, rollout, group)
            for task in group:
                pool.reset(task)                                       # or time limits would come up in between

    def round_of_distillation():
        for group in one_by_one:
            obs, _ = distill_a2c.visit_states(pool, student, group, 5, cpu)
            distill_a2c.distill_update(distill_a2c.Args(), student, nets, student_optimizer, obs, group)
            for task in group:
                pool.reset(task)
    rounds = {"scratch": lambda: round_of(nets, optimizer, [tasks]),
              "vanilla": lambda: round_of(shared, shared_optimizer, one_by_one), "distill": round_of_distillation}
    rollout, _ = a2c.collect(pool, nets, tasks, 5, cpu)
    times = milliseconds({
        "pool": lambda: pool.step(tasks, actions), "stock": lambda: stock.step(actions[0]),
        "processes": lambda: processes.step(actions[0]),
        "update": lambda: a2c.a2c_update(args, nets, optimizer, rollout, tasks), **rounds}, repetitions=25)
    line("stepping 6 x 16 cheetahs, MuJoCo's rollout", f"{96 / times['pool'] * 1e3:,.0f} steps/s")
    line("stepping 16 with Gymnasium's SyncVectorEnv", f"{16 / times['stock'] * 1e3:,.0f} steps/s")
    line("stepping 16 in processes of their own, AsyncVectorEnv", f"{16 / times['processes'] * 1e3:,.0f} steps/s")
    processes.close()
    pool.step = timed_step
    for name, one_round in rounds.items():
        simulating, start = 0.0, time.perf_counter()
        for _ in range(25):
            one_round()
        line(f"{name}, rollout and update", f"{480 / times[name] * 1e3:,.0f} steps/s; simulating takes "
             f"{simulating / (time.perf_counter() - start):.0%} of the time")


# --- picor_sac -------------------------------------------------------------------------------------------------------
def picor_sac() -> None:
    import picor_sac as pi
    real = pi.hinge
    for env, sizes, obs_size, action_size in (("halfcheetah", (256, 256), 25, 6), ("halfcheetah", (512, 512), 25, 6)):
        updates, weights = {}, torch.full((8,), 1 / 8)
        for name, settings in (("sac", dict(correction=False)), ("one", dict(correction_steps=1, c=0.0)),
                               ("five", dict(correction_steps=5, c=0.0))):
            args = pi.Args(env=env, hidden_sizes=sizes, **settings)
            learners, = pi.make_picor_learners(args, 8, obs_size, action_size)
            optimizers = pi.make_picor_optimizers(args, learners)
            buffer = pi.TaskReplay(8, 2_000, obs_size, action_size, torch.device("cpu"))
            buffer.data.normal_()
            buffer.num_added[:] = 2_000
            updates[name] = _picor_update(pi, args, learners, optimizers, buffer, weights)
        pi.hinge = lambda *a: real(*a) + 1e-3                          # always something to correct
        times = milliseconds(updates, repetitions=15)
        pi.hinge = real
        line(f"{env}, {sizes}, batch {args.batch_size}: update without correction", f"{times['sac']:.1f} ms")
        line("with one correction step", f"{times['one']:.1f} ms: {times['one'] / times['sac']:.2f} x")
        line("with five", f"{times['five']:.1f} ms: {times['five'] / times['sac']:.2f} x")
    whole_run("picor_sac", ["--total-timesteps", "4000", "--eval-every", "4000"], "goals, 4,000 steps")


def _picor_update(pi, args, learners, optimizers, buffer, weights):
    rng = np.random.default_rng(0)
    return lambda: pi.picor_update(args, learners, optimizers, buffer, 0, weights, rng)


# --- iqn_em_atari ----------------------------------------------------------------------------------------------------
class StackedIQN(nn.Module):
    """n of the script's networks, with one game, in one: grouped convolutions and stacked products."""

    def __init__(self, n: int, width: float):
        super().__init__()
        f1, f2, f3, units = (int(width * size) for size in (32, 64, 64, 512))
        self.n, self.conv1 = n, nn.Conv2d(4 * n, f1 * n, 8, 4, 2, groups=n)
        self.conv2, self.conv3 = nn.Conv2d(f1 * n, f2 * n, 4, 2, groups=n), nn.Conv2d(f2 * n, f3 * n, 3, 1, 1, groups=n)
        self.shapes = [(64, 121 * f3), (121 * f3, units), (units, 18)]
        self.weights = nn.ParameterList(0.01 * torch.randn(n, *shape) for shape in self.shapes)
        self.biases = nn.ParameterList(torch.zeros(n, 1, shape[1]) for shape in self.shapes)
        self.heads = [lambda hidden: torch.baddbmm(self.biases[2], hidden, self.weights[2])]

    def features(self, obs):
        """(B, n * 4, 84, 84) -> (n, B, F)."""
        x = torch.relu(self.conv2(nn.functional.pad(torch.relu(self.conv1(obs / 255)), (1, 2, 1, 2))))
        return torch.relu(self.conv3(x)).view(len(obs), self.n, -1).transpose(0, 1)

    def forward(self, features, taus):
        """(n, B, F), (n, B, N) -> (n, B, N, 18)."""
        cosines = torch.cos(torch.pi * torch.arange(1, 65) * taus[..., None]).flatten(1, 2)
        embedded = torch.relu(torch.baddbmm(self.biases[0], cosines, self.weights[0]))
        hidden = features[:, :, None] * embedded.view(*taus.shape, -1)
        hidden = torch.relu(torch.baddbmm(self.biases[1], hidden.flatten(1, 2), self.weights[1]))
        return torch.baddbmm(self.biases[2], hidden, self.weights[2]).view(*taus.shape, 18)

    def update(self, iqn, args, optimizer, batch):
        """The script's `iqn_update` for all of them."""
        obs, actions, returns, discounts, next_obs = batch
        n_online, n_target, n_acting = args.num_quantiles
        with torch.no_grad():
            z = self(self.features(next_obs), torch.rand(self.n, len(obs), n_acting + n_target))
            best = z[:, :, :n_acting].mean(2).argmax(2)[:, :, None, None].expand(-1, -1, n_target, 1)
            samples = returns[:, None] + discounts[:, None] * z[:, :, n_acting:].gather(3, best).squeeze(3)
        taus = torch.rand(self.n, len(obs), n_online)
        chosen = actions[None, :, None, None].expand(self.n, -1, n_online, 1)
        quantiles = self(self.features(obs), taus).gather(3, chosen).squeeze(3)
        loss = iqn.quantile_huber_loss(quantiles.flatten(0, 1), taus.flatten(0, 1), samples.flatten(0, 1))
        optimizer.zero_grad()
        (self.n * loss.mean()).backward()
        optimizer.step()


def _iqn_loop(iqn, args, nets, optimizers, batch):
    for net, optimizer in zip(nets, optimizers):
        iqn.iqn_update(args, net, net, optimizer, batch, 0)


def iqn_em_atari() -> None:
    import iqn_em_atari as iqn
    rng, games = np.random.default_rng(0), ("MsPacman", "Alien", "Assault", "DemonAttack")
    for preset in ("laptop", "gin"):
        args = iqn.Args(preset=preset, games=games)
        replay = iqn.FrameReplay(4_000)
        frame = rng.integers(256, size=(4, 84, 84), dtype=np.uint8)
        replay.begin(frame)
        for k in range(3_500):
            replay.add(k % 6, 1.0, k % 500 == 499, frame)
        nets = [iqn.IQN([18], args.width) for _ in range(4)]
        optimizers = [torch.optim.Adam(net.parameters(), lr=args.lr, fused=True) for net in nets]
        stack = StackedIQN(4, args.width)
        stack_optimizer = torch.optim.Adam(stack.parameters(), lr=args.lr, fused=True)
        batch = replay.sample(rng, args.batch_size, args.n_step, args.gamma)
        wide = [x.repeat(1, 4, 1, 1) if x.dim() == 4 else x for x in batch]

        functions = {"one": partial(iqn.iqn_update, args, nets[0], nets[0], optimizers[0], batch, 0),
                     "loop": partial(_iqn_loop, iqn, args, nets, optimizers, batch),
                     "side by side": partial(stack.update, iqn, args, stack_optimizer, wide),
                     "sample": partial(replay.sample, rng, args.batch_size, args.n_step, args.gamma),
                     "act": partial(iqn.greedy_actions, nets[0], torch.from_numpy(frame[None]), [0],
                                    args.num_quantiles[2])}
        with FlopCounterMode(display=False) as counter:
            functions["one"]()
        products = matrix_products(1, args.batch_size * args.num_quantiles[0], int(512 * args.width))
        times = milliseconds(functions | {name: f for name, (f, _) in products.items()},
                             repetitions=9 if preset == "laptop" else 3)
        peak = max(flop / times[name] / 1e6 for name, (_, flop) in products.items())
        reached = counter.get_total_flops() / times["one"] / 1e6
        line(f"{preset}: update of one policy, N, N', K = {args.num_quantiles}, width {args.width}",
             f"{times['one']:.0f} ms, {counter.get_total_flops() / 1e9:.2f} GFLOP")
        line("its share of the matrix-product peak", f"{reached:.0f} of {peak:.0f} GFLOP/s = {reached / peak:.0%}")
        line("four policies, one after the other", f"{times['loop']:.0f} ms")
        line("the same as a stack", f"{times['side by side']:.0f} ms: {times['side by side'] / times['loop']:.2f} x")
        line("draw a batch; act in one state", f"{times['sample']:.1f} ms; {times['act']:.1f} ms")
    arcade = iqn.Arcade(args)
    for pairs in ([(0, game)] for game in range(4)):
        arcade.reset(pairs[0], 0)
    pairs = [(0, game) for game in range(4)]
    steps = milliseconds({"alone": lambda: arcade.step(pairs[:1], [0]), "four": lambda: arcade.step(pairs, [0] * 4)},
                         repetitions=200)
    line("stepping MsPacman alone; four games at a time", f"{4e3 / steps['alone']:,.0f} frames/s; "
         f"{16e3 / steps['four']:,.0f} frames/s")
    replay, before = iqn.FrameReplay(100_000), resident_bytes()
    replay.begin(frame)
    for k in range(99_999):
        replay.add(k % 6, 1.0, k % 500 == 499, frame)
    line("replay of 100,000 frames", f"{(resident_bytes() - before) / 1e9:.3f} GB; 7,056 bytes each are 0.706 GB")
    whole_run("iqn_em_atari", ["--preset", "laptop", "--games", *games, "--num-policies", "2", "--total-timesteps",
                               "20000", "--m-step-size", "10000", "--eval-episodes", "1"],
              "laptop, em, two policies, four games, 20,000 steps")


def whole_run(script: str, arguments: list[str], label: str, update: float | None = None) -> None:
    """Run a script as a user does; report steps per second between start-up and end, and the peak of its memory.

    `update`: seconds that its updates alone should take; the rest is acting, stepping, evaluation and logging.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, f"{script}.py", *arguments, "--runs-dir", folder]
        process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)                    # getrusage would tell the most of all children
        if status:
            raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
        total = time.perf_counter() - start
        row = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()[-1].split(",")
    rate, seconds = int(row[0]) / float(row[1]), float(row[1])
    rest = "" if update is None else f"; not updates: {1 - update / seconds:.0%}"
    line(label, f"{rate:,.0f} steps/s, {total:.0f} s in all, up to {usage.ru_maxrss / 1024:,.0f} MB{rest}")


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}\n")
    print("| measured | value |\n|---|---|")
    for name in sys.argv[1:] or ["qmp_sac", "em_clustering_td3", "pcgrad_sac", "dgrad_arch_sac", "multitask_a2c",
                                 "picor_sac", "iqn_em_atari"]:
        line(f"**{name}.py**", "")
        globals()[name]()
