"""How fast the scripts are, in CPU time of one thread: python benchmark/speed.py [--peers PYTHON] [--only NAME ...]

An SAC update of one network, and TD3 and A2C as whole programs, beside Stable-Baselines3 and SBX as the interpreter of
--peers has them, and beside a plain loop over modules; then each script: milliseconds per 1,000 steps of the whole
program, and per update. All, or rows that begin with --only, take --rounds turns in processes of their own, and the
best turn counts. On a machine with other work only ratios mean something: the last column has the first row as unit.
"""
from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBS, ACTIONS, BATCH = 4, 2, 256                                        # of the SAC update; its layers are 2 x 256


def cpu_ms(function, times: int = 1) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    for _ in range(times):
        function()
    return 1e3 * (time.process_time() - start) / times


def our_sac(num_tasks: int, stacked: bool) -> list[float]:
    """Our SAC update with its sampling, of networks that share nothing, stacked or plain modules; per network."""
    import numpy as np
    import torch
    from torch import nn

    import pcgrad_sac as sac

    class Plain(nn.Module):
        def __init__(self, copies: int, num_tasks: int, sizes: list[int]):
            super().__init__()
            a, b, c, d = sizes
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(),
                                                    nn.Linear(c, d)) for _ in range(copies))
            self.params, self.stack = list(self.parameters()), (copies, num_tasks)

        def forward(self, x, params=None):
            return torch.stack([net(x) for net in self.nets])
    if torch.cpu.get_capabilities().get("amx_bf16") is False:          # as the script does
        torch.set_float32_matmul_precision("medium")
    net, rng, args = sac.TaskMLP if stacked else Plain, np.random.default_rng(0), sac.Args(method="sac")
    agent = sac.SAC(net(1, num_tasks, [OBS, 256, 256, 2 * ACTIONS]), net(2, num_tasks, [OBS + ACTIONS, 256, 256, 1]),
                    num_tasks)
    parameters = {"actor": agent.actor.parameters(), "critic": agent.critic.parameters(), "alpha": [agent.log_alpha]}
    optimizers = {name: torch.optim.Adam(params, 3e-4, fused=True) for name, params in parameters.items()}
    buffer = sac.ReplayBuffer(num_tasks, 10_000, OBS, ACTIONS, "cpu")
    buffer.data.normal_()
    buffer.num_added = 10_000
    def update():
        sac.update(args, agent, optimizers, buffer.sample(rng, BATCH), rng)
    return [min(cpu_ms(update, 5) for _ in range(20)) / num_tasks]


def peer_sac(library: str) -> list[float]:
    """A peer's SAC update with its sampling."""
    import gymnasium as gym

    class Nothing(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (OBS,)), gym.spaces.Box(-1, 1, (ACTIONS,))

        def reset(self, **settings):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}
    model = importlib.import_module(library).SAC("MlpPolicy", Nothing(), policy_kwargs={"net_arch": [256, 256]})
    model.learn(300)
    return [min(cpu_ms(partial(model.train, gradient_steps=1, batch_size=BATCH), 5) for _ in range(20))]


def peer_program(library: str, algorithm: str, env: str, num_envs: int, steps: int, **settings) -> list[float]:
    """A peer's whole program, per 1,000 steps."""
    from stable_baselines3.common.env_util import make_vec_env
    model = getattr(importlib.import_module(library), algorithm)("MlpPolicy", make_vec_env(env, num_envs), **settings)
    model.learn(1_000)
    return [1e3 / steps * cpu_ms(partial(model.learn, steps, reset_num_timesteps=False))]


def our_program(script: str, flags: str, steps: int) -> list[float]:
    """A script's whole program, per 1,000 steps (what twice the steps cost beyond the steps), and its update."""
    module, spent = importlib.import_module(script), []

    def timed(function, *args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        spent.append(1e3 * (time.process_time() - start))
        return result
    for name in [name for name in vars(module) if name == "update" or name.endswith("_update")]:
        setattr(module, name, partial(timed, getattr(module, name)))
    with tempfile.TemporaryDirectory() as folder:
        flags += f" --runs-dir {folder} --eval-every 100000000 --eval-episodes 1 --total-timesteps"
        costs = [cpu_ms(partial(module.train, module.tyro.cli(module.Args, args=[*flags.split(), str(total)])))
                 for total in (steps, 2 * steps)]
    return [1e3 / steps * (costs[1] - costs[0]), *([sum(spent) / len(spent)] if spent else [])]


TD3 = dict(env="Pendulum-v1", num_envs=1, steps=4_000, batch_size=128, policy_kwargs={"net_arch": [64, 64]})
A2C = dict(env="HalfCheetah-v5", num_envs=16, steps=40_000, policy_kwargs={"net_arch": [64, 64]})
PEERS = {f"SAC update, {library}": partial(peer_sac, library) for library in ("stable_baselines3", "sbx")}
PEERS |= {f"TD3 on a pendulum, {library}": partial(peer_program, library, "TD3", **TD3)
          for library in ("stable_baselines3", "sbx")}
PEERS["A2C on a half-cheetah, stable_baselines3"] = partial(peer_program, "stable_baselines3", "A2C", **A2C)
MEASURED = {"SAC update, a loop over modules": partial(our_sac, 1, False),
            "SAC update, a stack of ten": partial(our_sac, 10, True), **PEERS}
MEASURED |= {f"{script} {flags}": partial(our_program, script, flags, steps) for script, flags, steps in (
    ("em_clustering_td3", "--env pendulum --method sp --learning-starts 500", 4_000),
    ("multitask_a2c", "--method scratch --tasks SmallFoot", 40_000), ("qmp_sac", "--env maze", 60_000),
    ("pcgrad_sac", "--env mt4", 8_000), ("dgrad_arch_sac", "--env mt4", 8_000), ("picor_sac", "--env goals", 4_000),
    ("iqn_em_atari", "--preset laptop --num-policies 1 --games MsPacman", 4_000))}


def main(peers: str = sys.executable, only: tuple[str, ...] = (), rounds: int = 3) -> None:
    """Print the table."""
    results = {name: [] for name in MEASURED if not only or name.startswith(tuple(only))}
    for name in list(results) * rounds:
        child = subprocess.run([peers if name in PEERS else sys.executable, __file__, "measure", name], text=True,
                               capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        if child.returncode == 0:
            results[name].append([float(word) for word in child.stdout.splitlines()[-1].split()])
    print("| measured, CPU time of one thread | ms | in units of the first row |\n|---|---|---|")
    unit = min((row[0] for row in next(iter(results.values()))), default=float("nan"))
    for name, rows in results.items():
        kinds = ("",) if "update" in name else (", 1,000 steps", ", an update")
        for kind, values in zip(kinds, zip(*rows)):
            print(f"| {name}{kind} | {min(values):.3g} | {min(values) / unit:.2f} |")
        if not rows:
            print(f"| {name} | not installed, or failed | |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        if hasattr(os, "sched_setaffinity"):                           # one core: JAX starts as many threads as it sees
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(*MEASURED[sys.argv[2]]())
    else:
        import tyro
        tyro.cli(main)
