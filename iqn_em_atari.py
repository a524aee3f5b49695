# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "gymnasium[box2d,mujoco]==1.4.0", "ale-py==0.12.1", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0",
# ]
# ///
"""Task clustering by expectation-maximisation with implicit quantile networks: which Atari games share a policy?

Ackermann, Richter, Wattenhofer: "Unsupervised Task Clustering for Multi-Task Reinforcement Learning", ECML-PKDD 2021;
IQN: Dabney, Ostrovski, Silver, Munos: "Implicit Quantile Networks for Distributional Reinforcement Learning", 2018.
n policies share twelve games out among themselves: play every game with every policy and give it to the one that scores
best (E-step), then train each policy with IQN on its own games (M-step), and repeat. Each policy has a head per game,
and a replay per game; nothing is reset when a game moves.

    E-step: G[t, i], score of policy i in game t         play_games
    assignment: argmax_i G[t, i]; empty sets get all     assign_tasks, clusters
    M-step: which of its games a policy plays next       next_game
    quantile Huber loss, n-step target                   quantile_huber_loss, iqn_update, FrameReplay.sample

em_clustering_td3.py is the same idea on pendulums and walkers. Differences from the paper, each explained in
docs/iqn_em_atari.md:
1. All policies train side by side, and the last episode of an M-step is cut short, at exactly --m-step-size steps.
2. The cap on an episode's length truncates: the target bootstraps there.
3. IQN's recommended settings by default (--preset code for those that the authors' program runs with).
4. Reported are the assigned policy, in fresh episodes, and the maximum over policies, which the paper probably plots.

The paper's size needs a GPU, 100 GB of memory and days. The first command took 40 minutes on one core.

    python iqn_em_atari.py --preset laptop --games MsPacman Alien Assault DemonAttack --num-policies 2
    python iqn_em_atari.py --preset laptop --games MsPacman Alien Assault DemonAttack --method multihead
    python iqn_em_atari.py                                # twelve games, four policies, 33 million steps
"""
from __future__ import annotations

import copy
import difflib
import json
import math
import os
import random
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
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.roms import get_all_rom_ids
from ale_py.vector_env import AtariVectorEnv
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
PAPER = dict(total_timesteps=33_000_000, checkpoint_every=1_000_000, m_step_size=250_000, eval_steps=27_000,
             horizon=27_000, learning_starts=20_000, epsilon_period=250_000, target_period=8_000, buffer_size=300_000)
PRESETS = {  # a setting left at None takes its value from here
    "gin": PAPER | dict(num_quantiles=(64, 64, 32), n_step=3, lr=5e-5, scale=1.0),
    "code": PAPER | dict(num_quantiles=(32, 32, 32), n_step=1, lr=2.5e-4, scale=1.0),
    "laptop": dict(  # ours, chosen once for two cores and not tuned
                   total_timesteps=300_000, checkpoint_every=50_000, m_step_size=25_000, eval_steps=2_000,
                   horizon=4_500, learning_starts=2_000, epsilon_period=25_000, target_period=1_000,
                   buffer_size=100_000, num_quantiles=(8, 8, 8), n_step=3, lr=2.5e-4, scale=0.25),
}
WIDTH = {"em": 1.0, "multihead": 2.0, "ppt": 3 ** -0.5}      # about as many parameters in all, with twelve games
SCORES = {  # of random play and of a human: the usual table of 57 Atari games
    "MsPacman": (307.3, 6951.6), "Alien": (227.8, 7127.7), "BankHeist": (14.2, 753.1), "WizardOfWor": (563.5, 4756.5),
    "SpaceInvaders": (148.0, 1668.7), "Assault": (222.4, 742.0), "DemonAttack": (152.1, 1971.0),
    "Phoenix": (761.4, 7242.6), "ChopperCommand": (811.0, 7387.8), "Jamesbond": (29.0, 302.8),
    "Zaxxon": (32.5, 9173.3), "Riverraid": (1338.5, 17118.0),
}


@dataclass
class Args:
    env: Literal["atari"] = "atari"
    """Atari 2600 games of the Arcade Learning Environment, which come with ale-py"""
    method: Literal["em", "multihead", "ppt"] = "em"
    """EM clustering; one wide network with a head per game; one narrow network per game"""
    games: tuple[str, ...] = tuple(SCORES)
    """the tasks, by their names in the Arcade Learning Environment; the paper's twelve by default. Others have no
    human score here: they count in returns only, and their success is 0"""
    preset: Literal["gin", "code", "laptop"] = "gin"
    """IQN's recommended settings, as in the paper; those of the authors' program; small networks and short M-steps"""
    seed: int = 1
    """seeds every generator: networks, emulators, replay, exploration, quantile fractions"""
    total_timesteps: int | None = None
    """environment steps of training, four frames each, summed over policies, rounded to whole M-steps; E-steps come on
    top; None: 33,000,000, laptop 300,000"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes cuda if present, else cpu"""
    eval_every: int = 50_000
    """environment steps between rows of metrics.csv, which are written after E-steps only"""
    eval_episodes: int = 5
    """episodes per game for a row of metrics.csv, by the policy that the game is assigned to"""
    checkpoint_every: int | None = None
    """environment steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM; None:
    1,000,000, laptop 50,000"""
    runs_dir: Path = Path("runs")
    """where run folders go"""
    resume: Path | None = None
    """run folder to go on from, to the same or a larger --total-timesteps"""
    evaluate: Path | None = None
    """run folder to load and evaluate; trains nothing and writes nothing but pictures asked for"""
    capture_video: bool = False
    """after training or with --evaluate: one animated picture of all tasks side by side"""

    num_policies: int | None = None
    """paper: n; None: 4 for em (or as many as there are games), 1 for multihead, one per game for ppt"""
    m_step_size: int | None = None
    """training steps per policy and M-step, paper: T_M; None: 250,000, laptop 25,000"""
    eval_steps: int | None = None
    """steps per policy and game in an E-step, at least: the last episode is played to its end; None: 27,000, laptop
    2,000"""
    horizon: int | None = None
    """steps after which an episode is cut, of four frames each; None: 27,000 (half an hour of play), laptop 4,500"""
    width: float | None = None
    """width of all layers, as a multiple of 32, 64 and 64 filters and 512 units; None: 1 for em, 2 for multihead,
    0.577 for ppt, laptop a quarter of that"""
    num_quantiles: tuple[int, int, int] | None = None
    """quantile fractions of an online pass, of a target, and to act with, papers: N, N', K; None: 64 64 32, code 32 32
    32, laptop 8 8 8"""
    n_step: int | None = None
    """rewards in a target before it bootstraps; None: 3, code 1"""
    lr: float | None = None
    """Adam step size; None: 5e-5, code and laptop 2.5e-4"""
    gamma: float = 0.99
    """discount factor of learning; reported scores are undiscounted"""
    batch_size: int = 32
    """transitions per update, all of them of one game"""
    update_every: int = 4
    """training steps per policy and update"""
    target_period: int | None = None
    """training steps of a policy between copies of it to its target network, each made with the update of that step, if
    there is one; None: 8,000, laptop 1,000"""
    learning_starts: int | None = None
    """transitions in the replay of a policy and a game before the policy learns from it; None: 20,000, laptop 2,000"""
    epsilon: float = 0.01
    """share of random actions in training, after a linear decline from 1"""
    epsilon_period: int | None = None
    """training steps of a policy over which random actions decline, after --learning-starts; None: 250,000, laptop
    25,000"""
    eval_epsilon: float = 0.001
    """share of random actions in E-steps and evaluations"""
    buffer_size: int | None = None
    """replay capacity per policy and game, frames of 7,056 bytes; None: 300,000, laptop 100,000"""
    save_replay: bool = True
    """let checkpoints hold the replay; without it they are small, and a resumed run collects its data anew. A run keeps
    the setting that it began with"""

    def __post_init__(self):
        preset = dict(PRESETS[self.preset])
        preset["width"] = preset.pop("scale") * WIDTH[self.method]
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        known = [rom_name(rom) for rom in get_all_rom_ids()]
        for game in self.games:
            if rom_of(game) is None:
                close = difflib.get_close_matches(game, known, 4, 0.4)
                raise ValueError(f"--games {game}: no such game in ale-py; close: {', '.join(close) or 'none'}. The "
                                 f"paper's: {', '.join(SCORES)}")
        if not self.games or len({rom_of(game) for game in self.games}) < len(self.games):
            raise ValueError(f"--games must be one or more, different from each other, got {' '.join(self.games)}")
        self.games = tuple(rom_name(rom_of(game)) for game in self.games)      # one spelling
        fixed = {"multihead": 1, "ppt": len(self.games)}.get(self.method)
        if self.num_policies is None:
            self.num_policies = fixed or min(4, len(self.games))
        if fixed and self.num_policies != fixed:
            raise ValueError(f"--method {self.method} has {fixed} policies for {len(self.games)} games, got "
                             f"{self.num_policies}; leave --num-policies out")
        if not 1 <= self.num_policies <= len(self.games):
            raise ValueError(f"--num-policies must be from 1 to {len(self.games)}, the number of games, got "
                             f"{self.num_policies}")
        for name in ("total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "m_step_size", "eval_steps",
                     "horizon", "n_step", "batch_size", "update_every", "target_period", "learning_starts",
                     "epsilon_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if min(self.num_quantiles) < 1:
            raise ValueError(f"--num-quantiles must be at least 1 each, got {self.num_quantiles}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {self.seed}")
        if not 1 / 32 <= self.width <= 8:
            raise ValueError(f"--width must be from 1/32 (one filter) to 8, got {self.width}")
        if self.buffer_size <= self.n_step + STACK:
            raise ValueError(f"--buffer-size must be above {self.n_step + STACK} (--n-step and the {STACK} frames of "
                             f"an observation), got {self.buffer_size}")
        for name in ("lr", "gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("epsilon", "eval_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be from 0 to 1, got {getattr(self, name)}")
        round_of_all = self.num_policies * self.m_step_size
        self.total_timesteps = round_of_all * max(1, round(self.total_timesteps / round_of_all))


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------
STACK = 4                                                     # frames in an observation
LOG_EVERY = 5_000                                             # environment steps between writes to TensorBoard
FILM = 250                                                    # pictures in an animation, at most


def rom_name(rom: str) -> str:
    """ms_pacman -> MsPacman, the spelling of the Arcade Learning Environment's own list."""
    return "".join(word.capitalize() for word in rom.split("_"))


def rom_of(game: str) -> str | None:
    """The file that a game is in: MsPacman, ms_pacman and ALE/MsPacman-v5 are all ms_pacman. None: there is none."""
    wanted = re.sub(r"^ALE/|-v\d$|_", "", game).lower()
    return next((rom for rom in get_all_rom_ids() if rom.replace("_", "") == wanted), None)


def human_normalised(game: str, score) -> float:
    """0 for the score of random play, 1 for that of a human; not a number where SCORES lacks the game."""
    low, high = SCORES.get(game, (math.nan, math.nan))
    return (score - low) / (high - low)


class Arcade:
    """Games side by side, an emulator for each pair of a policy and a game, made when it is first asked for.

    Observation (4, 84, 84) uint8: the last four grey pictures, the newest last, black before an episode's first.
    Actions: the game's own, 3 to 18. The protocol is Dopamine's (Machado et al. 2018): an action is held for four
    frames, of which the last two are merged by their maximum, and in each frame the emulator sticks to the previous
    action with probability 0.25; a lost life ends nothing; no random start. The emulator's state cannot be saved.
    """

    def __init__(self, args: Args):
        self.args, self.emulators = args, {}

    def emulator(self, pair: tuple[int, int]) -> AtariVectorEnv:
        """That of (policy, game). It has one copy of the game, and a thread of its own that runs it."""
        if pair not in self.emulators:
            self.emulators[pair] = AtariVectorEnv(
                rom_of(self.args.games[pair[1]]), num_envs=1, stack_num=STACK, repeat_action_probability=0.25,
                noop_max=0, use_fire_reset=False, reward_clipping=False,
                max_num_frames_per_episode=4 * self.args.horizon)
        return self.emulators[pair]

    def num_actions(self) -> list[int]:
        """Of each game."""
        return [int(self.emulator((0, game)).single_action_space.n) for game in range(len(self.args.games))]

    def reset(self, pair: tuple[int, int], seed: int | None = None) -> np.ndarray:
        """Begin an episode; its first observation, (4, 84, 84).

        A seed decides all that follows, whatever was played before. It costs 0.15 s, the game is loaded anew; without
        one, which takes a twentieth of that, the emulator goes on with its random numbers.
        """
        return self.emulator(pair).reset(seed=seed)[0][0]

    def step(self, pairs: list[tuple[int, int]], actions: list[int]) -> tuple[np.ndarray, ...]:
        """Step some of the games, all at the same time: obs (P, 4, 84, 84), scores, terminations, truncations (P,).

        An episode that ends must be followed by `reset`.
        """
        for pair, action in zip(pairs, actions):
            self.emulator(pair).send(np.array([action]))
        steps = [self.emulator(pair).recv() for pair in pairs]
        return tuple(np.concatenate([step[k] for step in steps]) for k in range(4))


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
class IQN(nn.Module):
    """A policy: quantiles of the return of each action, at fractions that the caller chooses, with a head per game.

    A head is a parameter by itself, not a row of a stack: an update in one game leaves Adam's memory of the others
    alone.
    """

    def __init__(self, num_actions: list[int], width: float):
        super().__init__()
        filters1, filters2, filters3, units = (int(width * size) for size in (32, 64, 64, 512))
        self.conv1 = nn.Conv2d(STACK, filters1, 8, stride=4, padding=2)          # 84 -> 21
        self.conv2 = nn.Conv2d(filters1, filters2, 4, stride=2)                  # 21, padded to 24 -> 11
        self.conv3 = nn.Conv2d(filters2, filters3, 3, padding=1)                 # 11 -> 11
        self.embedding = nn.Linear(64, 121 * filters3)
        self.dense = nn.Linear(121 * filters3, units)
        self.heads = nn.ModuleList(nn.Linear(units, actions) for actions in num_actions)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                limit = (3**0.5 / layer.weight[0].numel()) ** 0.5      # Dopamine's: variance 3^-1/2 over inputs
                nn.init.uniform_(layer.weight, -limit, limit)
                nn.init.zeros_(layer.bias)
        self.register_buffer("frequencies", math.pi * torch.arange(1, 65), persistent=False)

    def features(self, obs: Tensor) -> Tensor:
        """What a picture shows: (B, 4, 84, 84) uint8 -> (B, F)."""
        x = F.relu(self.conv1(obs / 255))
        x = F.relu(self.conv2(F.pad(x, (1, 2, 1, 2))))                 # TensorFlow's "same": one left, two right
        return F.relu(self.conv3(x)).flatten(1)

    def forward(self, features: Tensor, taus: Tensor) -> Tensor:
        """What the heads read, at the fractions `taus`: (B, F), (B, N) -> (B, N, D)."""
        embedded = F.relu(self.embedding(torch.cos(taus[..., None] * self.frequencies)))     # IQN, Eq. 4: (B, N, F)
        return F.relu(self.dense(features[:, None] * embedded))


def greedy_actions(net: IQN, obs: Tensor, games: list[int], num_quantiles: int,
                   generator: torch.Generator | None = None) -> list[int]:
    """In each of B games, the action with the largest mean over K random quantiles.

    Args:
        obs: (B, 4, 84, 84); row b is from game games[b].
        generator: draws the fractions; None: the one that training draws from.
    """
    with torch.no_grad():
        taus = torch.rand(len(obs), num_quantiles, device=obs.device, generator=generator)
        hidden = net(net.features(obs), taus).mean(1)                  # (B, D): heads are linear
        return [net.heads[game](row).argmax().item() for game, row in zip(games, hidden)]


# ---------------------------------------------------------------------------------------------------------------------
# Replay buffer
# ---------------------------------------------------------------------------------------------------------------------
class FrameReplay:
    """The last `capacity` frames of one policy in one game; stacks and n-step returns are put together when sampled.

    A row is a frame, with the action that was taken on seeing it (-1: none, the episode ended or goes on from here),
    what came of it, and the frame's place in its episode. Memory that no frame was written to is not taken.
    """

    def __init__(self, capacity: int):
        self.frames = np.zeros((capacity, 84, 84), np.uint8)
        self.actions, self.ages = np.full(capacity, -1, np.int64), np.zeros(capacity, np.int64)
        self.rewards, self.terminations = np.zeros(capacity, np.float32), np.zeros(capacity, bool)
        self.num_added, self.num_steps = 0, 0                 # frames and transitions so far

    def begin(self, obs: np.ndarray, age: int = 0) -> None:
        """Append the newest frame of an observation, (4, 84, 84), `age` steps after its episode's first."""
        row = self.num_added % len(self.frames)
        self.frames[row], self.actions[row], self.ages[row] = obs[-1], -1, age
        self.num_added += 1

    def add(self, action: int, reward: float, terminated: bool, next_obs: np.ndarray) -> None:
        """What was done at the newest frame, and the frame that this led to. Truncation is no termination."""
        row = (self.num_added - 1) % len(self.frames)
        self.actions[row], self.rewards[row], self.terminations[row] = action, reward, terminated
        self.num_steps += 1
        self.begin(next_obs, self.ages[row] + 1)

    def stacks(self, index: np.ndarray) -> Tensor:
        """Observations whose newest frames are the `index`-th ever added, (B, 4, 84, 84) uint8."""
        back = np.arange(STACK - 1, -1, -1)
        frames = self.frames[(index[:, None] - back) % len(self.frames)]
        within = back <= self.ages[index % len(self.frames)][:, None]                  # (B, 4): of the same episode
        return torch.from_numpy(frames * within[..., None, None])

    def sample(self, rng: np.random.Generator, batch_size: int, n_step: int, gamma: float) -> list[Tensor]:
        """Draw transitions uniformly.

        Returns:
            obs (B, 4, 84, 84); actions (B,); returns, the discounted sum of up to n rewards of the same episode, (B,);
            discounts, (B,): gamma to the number of those rewards, 0 after a termination; the observation then.
        """
        size = len(self.frames)
        oldest = max(0, self.num_added - size)
        index = np.zeros(0, np.int64)
        while len(index) < batch_size:
            drawn = rng.integers(oldest, self.num_added, size=batch_size - len(index))
            whole = np.minimum(self.ages[drawn % size], STACK - 1) <= drawn - oldest         # no frame is gone
            index = np.concatenate([index, drawn[whole & (self.actions[drawn % size] >= 0)]])
        returns, discounts = np.zeros(batch_size, np.float32), np.ones(batch_size, np.float32)
        after = index.copy()
        for _ in range(n_step):
            row = after % size
            on = self.actions[row] >= 0                                # the frame is not the last of its episode
            returns += discounts * on * self.rewards[row]
            discounts *= np.where(on, gamma * ~self.terminations[row], 1.0)
            after += on
        numbers = map(torch.from_numpy, (self.actions[index % size], returns, discounts))
        return [self.stacks(index), *numbers, self.stacks(after)]

    def get_state(self) -> dict:
        """All of it, as tensors."""
        used = min(self.num_added, len(self.frames))
        arrays = (self.frames, self.actions, self.ages, self.rewards, self.terminations)
        return dict(arrays=[torch.from_numpy(array[:used]) for array in arrays], num_added=self.num_added,
                    num_steps=self.num_steps)

    def set_state(self, state: dict) -> None:
        """Undo `get_state`; the episode that was running has ended."""
        self.num_added, self.num_steps = state["num_added"], state["num_steps"]
        for array, saved in zip((self.frames, self.actions, self.ages, self.rewards, self.terminations),
                                state["arrays"]):
            array[:len(saved)] = saved.numpy()


def trained_pairs(args: Args) -> int:
    """How many pairs of a policy and a game can come to be trained, each with a replay of its own."""
    return len(args.games) * (args.num_policies if args.method == "em" else 1)


def replay_frames(args: Args) -> int:
    """How many frames the replays of a whole run come to hold, but for the last ones of episodes."""
    return min(trained_pairs(args) * args.buffer_size, args.total_timesteps)


def memory_bytes() -> int:
    """Memory of this machine, or of the container that the program runs in."""
    limit, physical = Path("/sys/fs/cgroup/memory.max"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def plan_memory(args: Args) -> str:
    """What the replay can grow to, in words; a `Failure` if that is more than there is."""
    need, have = replay_frames(args) * 84 * 84, memory_bytes()
    if need > 0.9 * have:
        fits = int(0.8 * have / (84 * 84 * trained_pairs(args)))
        or_laptop = ", and so would --preset laptop, which is for machines without a GPU" * (args.preset != "laptop")
        raise Failure(f"--buffer-size {args.buffer_size}: the replay would grow to {need / 1e9:.0f} GB, and there are "
                      f"{have / 1e9:.0f} GB of memory here; --buffer-size {fits} would fit{or_laptop}")
    return f"the replay grows to {need / 1e9:.2f} GB, of {have / 1e9:.0f} GB of memory here"


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


def next_game(mine: np.ndarray, steps: np.ndarray, rng: np.random.Generator) -> int:
    """The game of a policy's next episode: at random at first, then the one with the fewest steps (ties: the first).

    Args:
        mine: the games that are assigned to the policy.
        steps: of the policy in this M-step, in each game, (T,).
    """
    return int(mine[steps[mine].argmin()] if steps.any() else rng.choice(mine))


def exploration(step: int, args: Args) -> float:
    """Share of random actions after `step` training steps of a policy: 1, then a line down to --epsilon."""
    left = 1 - (step - args.learning_starts) / args.epsilon_period
    return args.epsilon + (1 - args.epsilon) * min(1.0, max(0.0, left))


def quantile_huber_loss(quantiles: Tensor, taus: Tensor, target: Tensor) -> Tensor:
    """IQN's loss (its Eq. 3) with kappa = 1, summed over fractions, averaged over targets: (B,).

    Args:
        quantiles: of the return, at the fractions taus; (B, N) each.
        target: samples of what they should be quantiles of, (B, N').
    """
    error = target[:, None] - quantiles[..., None]                     # (B, N, N')
    huber = torch.where(error.abs() <= 1, 0.5 * error.square(), error.abs() - 0.5)
    return ((taus[..., None] - (error.detach() < 0).float()).abs() * huber).mean(2).sum(1)


def iqn_update(args: Args, online: IQN, target: IQN, optimizer: torch.optim.Optimizer, batch: list[Tensor],
               game: int) -> Tensor:
    """One step of a policy on transitions of one game; the loss before it."""
    obs, actions, returns, discounts, next_obs = batch
    num_online, num_target, num_acting = args.num_quantiles
    rows = torch.arange(len(obs), device=obs.device)
    with torch.no_grad():                                              # the target network chooses and judges
        taus = torch.rand(len(obs), num_acting + num_target, device=obs.device)
        next_quantiles = target.heads[game](target(target.features(next_obs), taus))         # (B, K + N', A)
        best = next_quantiles[:, :num_acting].mean(1).argmax(1)
        next_quantiles = next_quantiles[rows, num_acting:, best]                             # (B, N')
        samples = returns[:, None] + discounts[:, None] * next_quantiles
    taus = torch.rand(len(obs), num_online, device=obs.device)
    quantiles = online.heads[game](online(online.features(obs), taus))[rows, :, actions]     # (B, N)
    loss = quantile_huber_loss(quantiles, taus, samples).mean()
    optimizer.zero_grad()                                              # to None: Adam passes over the other heads
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def play_games(args: Args, arcade: Arcade, nets: nn.ModuleList, pairs: list[tuple[int, int]], rng: np.random.Generator,
               min_steps: int = 0, min_episodes: int = 1, frames: bool = False) -> dict:
    """Whole episodes of each pair of a policy and a game, all pairs side by side, until each pair has enough.

    Args:
        rng: draws seeds and random actions, and seeds the generator of the quantile fractions: all chance is in it.
        frames: also keep every fourth picture of each pair's first episode.
    Returns:
        returns: the undiscounted scores of each pair's episodes, a list of arrays; steps, how many were taken; frames.
    """
    device = nets[0].dense.weight.device
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
    obs = np.stack([arcade.reset(pair, int(rng.integers(2**31))) for pair in pairs])
    scores, steps = np.zeros(len(pairs)), np.zeros(len(pairs), int)
    episodes, film, tick, playing = [[] for _ in pairs], [], 0, list(range(len(pairs)))
    while playing:
        if frames and tick % 4 == 0 and len(film) < FILM and not all(episodes):
            film.append([film[-1][k] if episodes[k] else picture(obs[k]) for k in range(len(pairs))])
        tick += 1
        actions = {}
        for policy in sorted({pairs[k][0] for k in playing}):          # a pass for all games of a policy
            mine = [k for k in playing if pairs[k][0] == policy]
            games = [pairs[k][1] for k in mine]
            greedy = greedy_actions(nets[policy], torch.from_numpy(obs[mine]).to(device), games,
                                    args.num_quantiles[2], generator)
            for k, game, action in zip(mine, games, greedy):
                explore = rng.random() < args.eval_epsilon
                actions[k] = int(rng.integers(nets[policy].heads[game].out_features)) if explore else action
        obs[playing], rewards, terminations, truncations = arcade.step([pairs[k] for k in playing],
                                                                       [actions[k] for k in playing])
        scores[playing] += rewards
        steps[playing] += 1
        ended = [k for k, end in zip(playing, terminations | truncations) if end]
        for k in ended:
            episodes[k].append(scores[k])
            if steps[k] >= min_steps and len(episodes[k]) >= min_episodes:
                playing.remove(k)
            else:
                scores[k], obs[k] = 0, arcade.reset(pairs[k])
    return {"returns": [np.array(values) for values in episodes], "steps": int(steps.sum()), "frames": film}


def picture(obs: np.ndarray) -> np.ndarray:
    """The newest frame of an observation, twice as large, (168, 168, 3)."""
    return np.repeat(np.repeat(obs[-1], 2, 0), 2, 1)[..., None].repeat(3, -1)


def evaluate_games(args: Args, arcade: Arcade, nets: nn.ModuleList, assignment: np.ndarray, rng: np.random.Generator,
                   frames: bool = False) -> dict:
    """Fresh episodes of each game by the policy it is assigned to: returns and successes (T, episodes), frames."""
    pairs = [(int(policy), game) for game, policy in enumerate(assignment)]
    result = play_games(args, arcade, nets, pairs, rng, min_episodes=args.eval_episodes, frames=frames)
    returns = np.stack([values[:args.eval_episodes] for values in result["returns"]])
    human = np.stack([human_normalised(game, values) for game, values in zip(args.games, returns)])
    return {"returns": returns, "successes": (human >= 1).astype(float), "frames": result["frames"]}


def train(args: Args) -> Path | None:
    """E-step and M-step in turns; returns the run folder."""
    # Set-up ------------------------------------------------------------------------------------------------
    device = pick_device(args.device)
    memory = "" if args.evaluate else plan_memory(args)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    rng, e_step_rng = (np.random.default_rng(args.seed + offset) for offset in (0, 5_000))
    n, names, num_games = args.num_policies, list(args.games), len(args.games)
    arcade, stage = Arcade(args), Arcade(args)                         # to train in, and for E-steps and evaluations
    nets = nn.ModuleList(IQN(stage.num_actions(), args.width) for _ in range(n)).to(device)
    assignment = np.arange(num_games) % n                              # right for all methods that have no clusters

    if args.evaluate:
        state = load_checkpoint(args.evaluate)
        nets.load_state_dict(state["learners"])
        report_games(args, stage, nets, state["assignment"].numpy(), args.evaluate)
        return args.evaluate

    state = load_checkpoint(args.resume) if args.resume else {"global_step": 0, "seconds": 0.0}
    global_step = state["global_step"]
    if global_step > args.total_timesteps:
        raise Failure(f"--resume {args.resume}: that run has {global_step:,} steps already; "
                      f"give a larger --total-timesteps than {args.total_timesteps:,}")
    if args.resume and global_step == args.total_timesteps:
        print(f"nothing to train: {global_step:,} steps are done, and --total-timesteps is rounded to whole M-steps of "
              f"{n * args.m_step_size:,}")
    target_nets = copy.deepcopy(nets)
    optimizers = [torch.optim.Adam(net.parameters(), lr=args.lr, eps=3.125e-4, fused=True) for net in nets]
    replay = defaultdict(lambda: FrameReplay(args.buffer_size))        # by (policy, game)
    steps_in = np.zeros((n, num_games), int)                           # this M-step's steps of each policy, by game
    eval_steps, history = 0, []                                        # history: (step, assignment, scores) by E-step
    if args.resume:
        nets.load_state_dict(state["learners"])
        target_nets.load_state_dict(state["targets"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for pair in list(state["replay"]):
            replay[pair].set_state(state["replay"].pop(pair))          # not to hold it twice
        steps_in, eval_steps, assignment = state["steps_in"].numpy(), state["eval_steps"], state["assignment"].numpy()
        history = [(step, a.numpy(), r.numpy()) for step, a, r in state["history"]]
        for generator, saved in zip((rng, e_step_rng), json.loads(state["numpy"])):
            generator.bit_generator.state = saved
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"][:torch.cuda.device_count()])
        print("the emulator's state cannot be saved: the run goes on with fresh episodes"
              + ", and with an empty replay" * (not args.save_replay))
    run = Run(args, names, global_step, state["seconds"])
    print(f"{n} policies of {sum(p.numel() for p in nets[0].parameters()):,} parameters; {memory}", flush=True)
    losses = [[] for _ in range(n)]

    def e_step() -> np.ndarray:
        """Try the policies in the games and assign them; G[t, i], -inf for pairs that the method never asks for."""
        nonlocal assignment, eval_steps
        check_finite(global_step, dict(nets.named_parameters()))
        scores = np.full((num_games, n), -np.inf)
        tried = (np.arange(num_games), assignment)                     # (games, policies)
        if args.method == "em":
            tried = np.nonzero(np.ones_like(scores))                   # all of them
        pairs = [(int(policy), int(game)) for game, policy in zip(*tried)]
        result = play_games(args, stage, nets, pairs, e_step_rng, min_steps=args.eval_steps)
        scores[tried] = [values.mean() for values in result["returns"]]
        eval_steps += result["steps"]
        if args.method == "em":
            assignment = assign_tasks(scores)
        history.append((global_step, assignment, scores[range(num_games), assignment]))
        return scores

    def save() -> None:
        """Everything that the next step reads, but for the emulators."""
        check_finite(global_step, dict(nets.named_parameters()))       # keeps the last good one
        run.save(dict(
            global_step=global_step, learners=nets.state_dict(), targets=target_nets.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers], eval_steps=eval_steps,
            replay={pair: buffer.get_state() for pair, buffer in replay.items() if args.save_replay},
            steps_in=torch.from_numpy(steps_in), assignment=torch.from_numpy(assignment), torch=torch.get_rng_state(),
            history=[(step, torch.from_numpy(a), torch.from_numpy(r)) for step, a, r in history],
            numpy=json.dumps([generator.bit_generator.state for generator in (rng, e_step_rng)]),
            cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []))

    if not args.resume:
        e_step()                                                       # the first assignment is of untrained policies
        save()                                                         # from here on a killed run can be resumed
    pairs, obs = [(policy, 0) for policy in range(n)], np.zeros((n, STACK, 84, 84), np.uint8)
    scores, lengths = np.zeros(n), np.zeros(n, int)                    # of the running episodes

    def begin(policy: int) -> None:
        """An episode of the policy, in the game of its own that it has played least in this M-step."""
        game = next_game(np.flatnonzero(clusters(assignment, n)[policy]), steps_in[policy], rng)
        pairs[policy], scores[policy], lengths[policy] = (policy, game), 0, 0
        new = pairs[policy] not in arcade.emulators
        obs[policy] = arcade.reset(pairs[policy], int(rng.integers(2**31)) if new else None)
        replay[pairs[policy]].begin(obs[policy])

    for policy in range(n):
        begin(policy)
    while global_step < args.total_timesteps and not run.stop_signal:
        # M-step: every policy acts in a game of its own ------------------------------------------------------
        steps, actions = global_step // n, []                          # of each policy so far
        for policy, game in pairs:
            if rng.random() < exploration(steps, args):
                actions.append(int(rng.integers(nets[policy].heads[game].out_features)))
            else:
                seen = torch.from_numpy(obs[policy:policy + 1]).to(device)
                actions += greedy_actions(nets[policy], seen, [game], args.num_quantiles[2])

        # Step every game once, store, log what ended ----------------------------------------------------------
        obs, rewards, terminations, truncations = arcade.step(pairs, actions)
        previous_step, global_step, steps = global_step, global_step + n, steps + 1
        scores += rewards
        lengths += 1
        for policy, (_, game) in enumerate(pairs):
            replay[policy, game].add(actions[policy], np.clip(rewards[policy], -1, 1), terminations[policy],
                                     obs[policy])
            steps_in[policy, game] += 1
            if terminations[policy] or truncations[policy]:            # also just before an E-step, which begins anew
                human = human_normalised(names[game], scores[policy])
                run.add(f"tasks/{names[game]}", {"episodic_return": scores[policy], "success": float(human >= 1),
                                                 "episodic_length": lengths[policy]})
                begin(policy)

        # Update: each policy on one of its games, if it has played that enough --------------------------------
        if steps % args.update_every == 0:
            for policy, mine in enumerate(clusters(assignment, n)):
                game = int(rng.choice(np.flatnonzero(mine)))
                if replay[policy, game].num_steps <= args.learning_starts:
                    continue
                batch = replay[policy, game].sample(rng, args.batch_size, args.n_step, args.gamma)
                batch = [column.to(device) for column in batch]
                losses[policy].append(iqn_update(args, nets[policy], target_nets[policy], optimizers[policy], batch,
                                                 game))
                if crossed(steps - args.update_every, steps, args.target_period):
                    target_nets[policy].load_state_dict(nets[policy].state_dict())

        # Log -------------------------------------------------------------------------------------------------
        if crossed(previous_step, global_step, LOG_EVERY):
            means = {f"policy{i}/quantile": torch.stack(v).mean().cpu() for i, v in enumerate(losses) if v}
            losses = [[] for _ in range(n)]
            check_finite(global_step, means)
            run.add("losses", {name: loss.item() for name, loss in means.items()})
            run.add("losses", {"quantile": np.mean([loss.item() for loss in means.values()])} if means else {})
            run.add("method", {"epsilon": exploration(steps, args), "replay_gigabytes": 84 * 84e-9 * sum(
                min(buffer.num_added, args.buffer_size) for buffer in replay.values())})
            run.write(global_step)

        # E-step: every policy is tried in every game, each game goes to the best ------------------------------
        if steps % args.m_step_size == 0:
            tried = e_step()
            sizes = np.bincount(assignment, minlength=n)
            columns = {"empty": int((sizes == 0).sum()), "largest_cluster": int(sizes.max()), "eval_steps": eval_steps}
            run.add("method", columns)
            last = global_step >= args.total_timesteps
            if crossed(global_step - n * args.m_step_size, global_step, args.eval_every) or last:
                eval_rng = np.random.default_rng((args.seed + 10_000, global_step))
                evaluation = evaluate_games(args, stage, nets, assignment, eval_rng)
                run.log_evaluation(global_step, evaluation, columns | normalised(names, evaluation["returns"], tried)
                                   | {f"{name}/policy": int(policy) for name, policy in zip(names, assignment)})
            run.write(global_step)
            steps_in[:] = 0
            for policy in range(n):
                begin(policy)                                          # episodes of the old assignment are cut short
        if crossed(previous_step, global_step, args.checkpoint_every):
            save()

    # Finish --------------------------------------------------------------------------------------------------
    if run.saved_at != global_step:
        save()
    if not run.stop_signal:
        report_games(args, stage, nets, assignment, run.dir)
        label = "human-normalised score" if set(names) <= set(SCORES) else "score"
        if label != "score":
            history = [(s, a, np.array([human_normalised(*pair) for pair in zip(names, r)])) for s, a, r in history]
        plot_assignment(run.dir / "assignment.png", names, history, n, label)
        plot_games(run.dir, names)
    run.close()
    return run.dir


def normalised(names: list[str], returns: np.ndarray, tried: np.ndarray) -> dict[str, float]:
    """Means over the games whose human score is known, each game's own mean clipped at 1, as probably in Figure 6.

    Args:
        returns: scores of fresh episodes by the assigned policies, (T, episodes).
        tried: the E-step's means, (T, n); their maximum over policies is biased upwards.
    """
    rows = {"mean_normalised": returns.mean(1), "max_normalised": tried.max(1)}
    human = {key: [human_normalised(*pair) for pair in zip(names, scores)] for key, scores in rows.items()}
    return {key: float(np.nanmean(np.minimum(values, 1))) if np.isfinite(values).any() else math.nan
            for key, values in human.items()}


def report_games(args: Args, arcade: Arcade, nets: nn.ModuleList, assignment: np.ndarray, folder: Path) -> None:
    """Print what the assigned policies score, and the clusters; animate them if asked to."""
    generator = np.random.default_rng(args.seed + 20_000)
    result = evaluate_games(args, arcade, nets, assignment, generator, frames=args.capture_video)
    print_table(list(args.games), result)
    for policy in range(args.num_policies):
        mine = [name for name, chosen in zip(args.games, assignment) if chosen == policy]
        print(f"  policy {policy}: {', '.join(mine) or 'none of its own (trains on all games)'}")
    if args.capture_video:
        save_animation(folder / "tasks.gif", [f"{name}: {i}" for name, i in zip(args.games, assignment)],
                       result["frames"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the method
# ---------------------------------------------------------------------------------------------------------------------
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


def plot_games(folder: Path, names: list[str]) -> None:
    """games.png from metrics.csv: each game's score, beside those of random play and, where it fits, of a human."""
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, names):
        axis.plot(table["global_step"], table[f"{name}/return"], "k.-", label="evaluated")
        top = axis.get_ylim()[1]
        for label, score, colour in zip(("random", "human"), SCORES.get(name, ()), ("C3", "C2")):
            if label == "random" or score < 2 * top:
                axis.axhline(score, color=colour, linestyle="--", linewidth=1, label=label)
        axis.set(title=name, xlabel="training steps" if name in names[-columns:] else None)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend(frameon=False, fontsize=7)
    for axis in axes[len(names):]:
        axis.remove()
    figure.savefig(folder / "games.png", dpi=120)


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


def pick_device(name: str) -> torch.device:
    """auto takes cuda if present, else cpu."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise Failure(f"--device {name}: PyTorch {torch.__version__} finds none here; use --device auto") from error
    return device


def check_finite(global_step: int, tensors: dict[str, Tensor]) -> None:
    """Stop on a loss or a parameter that is not finite; the last checkpoint is older and good."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise Failure(f"{name} is not finite at step {global_step:,}; the last checkpoint is from before that. "
                          "A smaller --lr is the usual remedy", status=1)


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
