# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "numpy==2.4.6", "ale-py==0.12.1", "gymnasium==1.4.0", "tyro==1.0.17", "pydantic==2.14.4",
#   "filelock==4.3.1", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "imageio==2.38.1",
# ]
# ///
"""Task clustering by expectation-maximisation with implicit quantile networks: which Atari games share a policy?

Ackermann, Richter, Wattenhofer: "Unsupervised Task Clustering for Multi-Task Reinforcement Learning", ECML-PKDD 2021;
IQN: Dabney, Ostrovski, Silver, Munos: "Implicit Quantile Networks for Distributional Reinforcement Learning", 2018.
n policies share twelve games out among themselves: play every game with every policy and give it to the one that scores
best (E-step), then train each policy with IQN on its own games (M-step), and repeat. Each policy has a head per game,
and a replay per game; nothing is reset when a game moves.

    E-step: G[t, i], score of policy i in game t         play_games
    assignment: argmax_i G[t, i]; empty sets get all     train
    M-step: which of its games a policy plays next       GamePolicy.begin
    IQN: n-step target, quantile Huber loss              FrameReplay.sample, GamePolicy.update

Differences from the paper, each explained in docs/iqn_em_atari.md:
1. All policies train side by side, and the last episode of an M-step is cut short, at exactly --m-step-size steps.
2. The cap on an episode's length truncates: the target bootstraps there.
3. IQN's recommended settings by default (--preset code for those that the authors' program runs with).
4. mean_return is of the assigned policies, in fresh episodes; max_return is of the best policies in the last E-step,
   which the paper probably plots. Baselines have neither E-steps nor M-steps.

The paper's size needs a GPU, 100 GB of memory and days; the first command takes about 40 minutes on one core.

    python iqn_em_atari.py --preset laptop                # four games, two policies; --method multihead, ppt
    python iqn_em_atari.py                                # twelve games, four policies, 33 million steps
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
from collections import defaultdict
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Settings --------------------------------------------------------------------------------------------------------
STEPS = "environment steps, summed over policies"
FIXED = {"method", "preset", "games", "seed", "num_policies", "m_step_size", "width", "buffer_size"}
UPDATE_EVERY, EPSILON, EVAL_EPSILON = 4, 0.01, 0.001          # equal in the paper and the authors' program
LOG_EVERY = 5_000                                             # environment steps between writes to TensorBoard
SCORES = {  # of random play and of a human: the usual table of 57 Atari games
    "MsPacman": (307.3, 6951.6), "Alien": (227.8, 7127.7), "BankHeist": (14.2, 753.1), "WizardOfWor": (563.5, 4756.5),
    "SpaceInvaders": (148.0, 1668.7), "Assault": (222.4, 742.0), "DemonAttack": (152.1, 1971.0),
    "Phoenix": (761.4, 7242.6), "ChopperCommand": (811.0, 7387.8), "Jamesbond": (29.0, 302.8),
    "Zaxxon": (32.5, 9173.3), "Riverraid": (1338.5, 17118.0)}
PAPER = dict(  # in braces by method: where one is missing, the setting has no effect on it
    games=tuple(SCORES), total_timesteps=33_000_000, eval_every=1_000_000, checkpoint_every=1_000_000,
    num_policies={"em": 4}, m_step_size={"em": 250_000}, eval_steps={"em": 27_000}, horizon=27_000,
    learning_starts=20_000, target_period=8_000, buffer_size=300_000, save_replay=False,
    width={"em": 1.0, "multihead": 2.0, "ppt": 3**-0.5},      # about as many parameters in all, here and below
    epsilon_period={"em": 1_000_000, "multihead": 250_000, "ppt": 3_000_000})              # 250,000 of each policy
PRESETS = {
    "gin": PAPER | dict(num_quantiles=(64, 64, 32), n_step=3, lr=5e-5),
    "code": PAPER | dict(num_quantiles=(32, 32, 32), n_step=1, lr=2.5e-4),
    "laptop": dict(                                           # ours, chosen once for two cores and not tuned
        games=("MsPacman", "Alien", "Assault", "DemonAttack"), total_timesteps=300_000, eval_every=50_000,
        checkpoint_every=50_000, num_policies={"em": 2}, m_step_size={"em": 25_000}, eval_steps={"em": 2_000},
        horizon=4_500, learning_starts=2_000, target_period=1_000, buffer_size=100_000, save_replay=True, n_step=3,
        width={"em": 0.25, "multihead": 0.38, "ppt": 0.168}, epsilon_period=50_000, num_quantiles=(8, 8, 8), lr=2.5e-4)}
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass
class Args:
    # EM clustering; one wide network with a head per game; one narrow network per game
    method: Literal["em", "multihead", "ppt"] = "em"
    # decides what is None below: IQN's recommended settings, as in the paper; the authors' program's; small, short
    preset: Literal["gin", "code", "laptop"] = "gin"
    games: tuple[str, ...] | None = None      # any of ALE; beyond the paper's twelve they count as 0 when normalised
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1  # seeds every generator
    total_timesteps: Positive | None = None   # environment steps, summed over policies; 33 million, laptop 300,000
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the networks live
    threads: Positive = 1                     # of PyTorch on a CPU: networks this small gain little from more
    eval_every: Positive | None = None        # environment steps between evaluations
    eval_episodes: Positive = 5               # per task and evaluation, deterministic, in separate environments
    checkpoint_every: Positive | None = None  # environment steps between checkpoints; one more when the run ends
    runs_dir: Path = Path("runs")             # where run folders go
    resume: Path | None = None                # run folder to go on from, with its settings and flags given on top
    evaluate: Path | None = None              # run folder to load and evaluate; trains nothing
    capture_video: bool = False               # with --evaluate: an animated picture of each task

    num_policies: Positive | None = None      # paper: n; only em
    m_step_size: Positive | None = None       # training steps per policy and M-step, paper: T_M; only em
    eval_steps: Positive | None = None        # em: steps per policy and game in an E-step, and the rest of an episode
    horizon: Positive | None = None           # steps, of four frames each, after which an episode is cut
    # of all layers, in multiples of 32, 64, 64 filters and 512 units
    width: Annotated[float, Field(ge=1 / 32, le=8)] | None = None
    # fractions of a pass, of a target, to act with: N, N', K
    num_quantiles: tuple[Positive, Positive, Positive] | None = None
    n_step: Positive | None = None            # rewards in a target before it bootstraps
    lr: Share | None = None                   # Adam step size
    gamma: Share = 0.99                       # discount factor
    batch_size: Positive = 32                 # transitions per update, all of one game
    target_period: Positive | None = None     # training steps of a policy between copies to its target network
    learning_starts: Positive | None = None   # transitions in a replay before the policy learns from it
    epsilon_period: Positive | None = None    # environment steps, after 8 % of as many, in which epsilon falls to 1 %
    buffer_size: Annotated[int, Field(ge=100)] | None = None  # replay capacity per policy and game, frames
    save_replay: bool | None = None           # in checkpoints; without it a resumed run collects its data anew

    def __post_init__(self):
        for name, value in PRESETS[self.preset].items():
            value = value.get(self.method) if isinstance(value, dict) else value
            if value is None and getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --method {self.method}; leave it out")
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.games or sum(f"ALE/{game}-v5" in gym.registry for game in set(self.games)) < len(self.games):
            raise ValueError(f"--games {' '.join(self.games)}: give different ones, such as {' '.join(SCORES)}")


# --- Environments ----------------------------------------------------------------------------------------------------
def make_emulator(args: Args, game: int, **picture) -> AtariVectorEnv:
    """One copy of a game, in a thread of its own. Observation (1, 4, 84, 84) uint8: the last four grey pictures.

    Dopamine's protocol (Machado et al. 2018): an action, one of the game's own 3 to 18, is held for four frames, the
    last two are merged by their maximum, and in each frame the emulator sticks to the previous action with probability
    0.25; a lost life ends nothing. Every episode begins in the same state: a seed decides no more than the sticking.
    `reset(seed=...)` loads the game anew, in 0.15 s; `reset()` goes on with its random numbers, in 0.01 s.
    """
    return gym.make_vec(f"ALE/{args.games[game]}-v5", num_envs=1, repeat_action_probability=0.25, noop_max=0,
                        use_fire_reset=False, reward_clipping=False, max_num_frames_per_episode=4 * args.horizon,
                        **picture)


def human_normalised(games: tuple[str, ...], scores: np.ndarray) -> np.ndarray:
    """0 for the score of random play, 1 for a human's or a better one; 0 where SCORES lacks the game. (..., T)"""
    low, high = np.array([SCORES.get(game, (0, np.inf)) for game in games]).T
    return np.minimum((scores - low) / (high - low), 1)


# --- Networks --------------------------------------------------------------------------------------------------------
class IQN(nn.Module):
    """Quantiles of each action's return. With a head per game an update leaves Adam's memory of the others alone."""

    def __init__(self, num_actions: list[int], width: float):
        super().__init__()
        filters1, filters2, filters3, units = (int(width * size) for size in (32, 64, 64, 512))
        self.features = nn.Sequential(
            nn.Conv2d(4, filters1, 8, stride=4, padding=2), nn.ReLU(),                               # 84 -> 21
            nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(filters1, filters2, 4, stride=2), nn.ReLU(),       # 21 -> 11, as
            nn.Conv2d(filters2, filters3, 3, padding=1), nn.ReLU(), nn.Flatten())                    # TensorFlow pads
        self.embedding = nn.Linear(64, 121 * filters3)
        self.dense = nn.Linear(121 * filters3, units)
        self.heads = nn.ModuleList(nn.Linear(units, actions) for actions in num_actions)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                limit = (3**0.5 / layer.weight[0].numel()) ** 0.5      # Dopamine's: variance 3^-1/2 over inputs
                nn.init.uniform_(layer.weight, -limit, limit)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor, taus: Tensor) -> Tensor:
        """What the heads read, at the fractions `taus`: (B, 4, 84, 84) uint8, (B, N) -> (B, N, D)."""
        cosines = torch.cos(taus[..., None] * (torch.pi * torch.arange(1, 65, device=taus.device)))  # (B, N, 64)
        embedded = torch.relu(self.embedding(cosines))                                       # IQN, Eq. 4: (B, N, F)
        return torch.relu(self.dense(self.features(obs / 255)[:, None] * embedded))


# --- Replay buffer ---------------------------------------------------------------------------------------------------
class FrameReplay:
    """The last `capacity` frames of one policy in one game; stacks and n-step returns are put together when sampled.

    The k-th frame ever added lies in row k % capacity. Here frame 10, the first of an episode, is the newest, and the
    next one takes the place of frame 3. Memory that no frame was written to is not taken.

        row        0    1    2    3    4    5    6    7
        frame      8    9   10    3    4    5    6    7
        action     4   -1   -1    0    5    1   -1    3     taken on seeing it; -1: none, its episode ended or is here
        age        1    2    0    2    3    4    5    0     steps since its episode's first: stacks go no further back
    """

    def __init__(self, capacity: int):
        self.rows = np.zeros(capacity, [("frame", np.uint8, (84, 84)), ("action", np.int64), ("age", np.int64),
                                        ("reward", np.float32), ("terminated", bool)])
        self.num_added, self.num_steps = 0, 0                 # frames and transitions so far

    def begin(self, frame: np.ndarray, age: int = 0) -> None:
        """Append a frame, (84, 84), `age` steps after its episode's first."""
        self.rows[self.num_added % len(self.rows)] = (frame, -1, age, 0.0, False)
        self.num_added += 1

    def add(self, action: int, reward: float, terminated: bool, next_frame: np.ndarray) -> None:
        """What was done at the newest frame, and the frame that this led to. Truncation is no termination."""
        newest = self.rows[(self.num_added - 1) % len(self.rows)]
        newest["action"], newest["reward"], newest["terminated"] = action, reward, terminated
        self.num_steps += 1
        self.begin(next_frame, newest["age"] + 1)

    def stacks(self, index: np.ndarray) -> Tensor:
        """Observations whose newest frames are the `index`-th ever added, (B, 4, 84, 84) uint8."""
        back = np.arange(3, -1, -1)
        rows = self.rows[(index[:, None] - back) % len(self.rows)]                           # (B, 4)
        of_episode = back <= rows["age"][:, -1:]
        return torch.from_numpy(rows["frame"] * of_episode[..., None, None])

    def sample(self, rng: np.random.Generator, batch_size: int, n_step: int, gamma: float) -> list[Tensor]:
        """Draw transitions: obs (B, 4, 84, 84), actions, returns and discounts (B,) each, and obs n steps later.

        A return has n rewards, or those up to its episode's end; a discount is gamma to their number, 0 if terminal.
        """
        oldest, index = max(0, self.num_added - len(self.rows)), np.zeros(0, np.int64)
        while len(index) < batch_size:
            drawn = rng.integers(oldest, self.num_added, size=batch_size - len(index))
            rows = self.rows[drawn % len(self.rows)]
            whole = np.minimum(rows["age"], 3) <= drawn - oldest                             # no frame of it is gone
            index = np.concatenate([index, drawn[whole & (rows["action"] >= 0)]])
        returns, discounts, after = np.zeros(batch_size, np.float32), np.ones(batch_size, np.float32), index.copy()
        for _ in range(n_step):
            rows = self.rows[after % len(self.rows)]
            running = rows["action"] >= 0                              # the frame is not the last of its episode
            returns += discounts * running * rows["reward"]
            discounts *= np.where(running, gamma * ~rows["terminated"], 1.0)
            after += running
        actions = self.rows["action"][index % len(self.rows)]
        return [self.stacks(index), *map(torch.from_numpy, (actions, returns, discounts)), self.stacks(after)]


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
class GamePolicy:
    """A policy: its networks and their optimizer, a replay and an emulator per game, and the episode it is playing."""

    def __init__(self, args: Args, num_actions: list[int]):
        self.args, self.online = args, IQN(num_actions, args.width).to(args.device)
        self.target = copy.deepcopy(self.online)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=args.lr, eps=3.125e-4, fused=True)
        self.replays, self.emulators = defaultdict(lambda: FrameReplay(args.buffer_size)), {}
        self.steps, self.game = np.zeros(len(num_actions), int), None            # in this M-step, by game; that played

    def begin(self, games: np.ndarray, rng: np.random.Generator) -> None:
        """An episode of one of the games: any at first, then the one with the fewest steps in this M-step."""
        self.game = int(games[self.steps[games].argmin()] if self.steps.any() else rng.choice(games))
        self.score, self.length, seed = 0.0, 0, None
        if self.game not in self.emulators:
            self.emulators[self.game], seed = make_emulator(self.args, self.game), int(rng.integers(2**31))
        self.obs = self.emulators[self.game].reset(seed=seed)[0]
        self.replays[self.game].begin(self.obs[0, -1])

    @torch.no_grad()
    def act(self, obs: np.ndarray, games: list[int], epsilon: float, rng: np.random.Generator) -> list[int]:
        """In B games, (B, 4, 84, 84), the actions with the largest mean of K quantiles or, with epsilon, any action."""
        taus = torch.from_numpy(rng.random((len(obs), self.args.num_quantiles[2]), np.float32)).to(self.args.device)
        hidden = self.online(torch.from_numpy(obs).to(self.args.device), taus).mean(1)       # (B, D): heads are linear
        greedy = [self.online.heads[game](row).argmax().item() for game, row in zip(games, hidden)]
        return [int(rng.integers(self.online.heads[game].out_features)) if rng.random() < epsilon else action
                for game, action in zip(games, greedy)]

    def step(self, action: int) -> dict | None:
        """Act in the game and store what came of it; what there is to say about an episode that is over."""
        self.obs, (reward,), (terminated,), (truncated,), _ = self.emulators[self.game].step(np.array([action]))
        self.replays[self.game].add(action, np.clip(reward, -1, 1), terminated, self.obs[0, -1])
        self.steps[self.game] += 1
        self.score, self.length = self.score + reward, self.length + 1
        if terminated or truncated:
            return {"episodic_return": self.score, "episodic_length": self.length}

    def update(self, batch: list[Tensor], game: int) -> float:
        """One step of IQN on transitions of a game; the quantile Huber loss (IQN, Eq. 3; kappa = 1) before it."""
        obs, actions, returns, discounts, next_obs = (column.to(self.args.device) for column in batch)
        num_online, num_target, num_acting = self.args.num_quantiles
        rows = torch.arange(len(obs), device=obs.device)
        with torch.no_grad():                                          # the target network chooses and judges
            taus = torch.rand(len(obs), num_acting + num_target).to(obs.device)
            next_quantiles = self.target.heads[game](self.target(next_obs, taus))            # (B, K + N', A)
            best = next_quantiles[:, :num_acting].mean(1).argmax(1)
            target = returns[:, None] + discounts[:, None] * next_quantiles[rows, num_acting:, best]         # (B, N')
        taus = torch.rand(len(obs), num_online).to(obs.device)
        quantiles = self.online.heads[game](self.online(obs, taus))[rows, :, actions]        # (B, N)
        error = target[:, None] - quantiles[..., None]                                       # (B, N, N')
        huber = torch.where(error.abs() <= 1, 0.5 * error.square(), error.abs() - 0.5)
        loss = ((taus[..., None] - (error.detach() < 0).float()).abs() * huber).mean(2).sum(1).mean()
        self.optimizer.zero_grad()                                     # to None: Adam passes over the other heads
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def state_dict(self) -> dict:
        """All but the running episode, as tensors and numbers."""
        state = {name: getattr(self, name).state_dict() for name in ("online", "target", "optimizer")}
        replays = {game: vars(replay) | {"rows": torch.from_numpy(replay.rows[:replay.num_added].view(np.uint8))}
                   for game, replay in self.replays.items() if self.args.save_replay}
        return state | {"steps": self.steps.tolist(), "replays": replays}

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`; the episode that was running has ended."""
        for name in ("online", "target", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.optimizer.param_groups[0]["lr"] = self.args.lr            # as it is now
        self.steps[:] = state["steps"]
        for game, saved in state["replays"].items():
            replay, rows = self.replays[game], saved.pop("rows").numpy()
            replay.rows[:saved["num_added"]] = rows.view(replay.rows.dtype)
            vars(replay).update(saved)


def play_games(emulators: list[AtariVectorEnv], policies: list[GamePolicy], pairs: list[tuple], seed: list[int],
               stopped, min_steps: int = 0, min_episodes: int = 1) -> list[tuple[list[float], int]] | None:
    """Whole episodes of each pair of a policy and a game until there are enough, a policy's games side by side.

    Of each pair: undiscounted scores, a list, and the number of steps; None if `stopped()`. Policies share the `seed`.
    """
    scores, steps = {pair: [0.0] for pair in pairs}, dict.fromkeys(pairs, 0)
    for i, policy in enumerate(policies):
        rng, playing = np.random.default_rng(seed), [pair for pair in pairs if pair[0] == i]
        obs = {pair: emulators[pair[1]].reset(seed=int(rng.integers(2**31)))[0] for pair in playing}
        while playing:
            if stopped():
                return None
            games, seen = [game for _, game in playing], np.concatenate([obs[pair] for pair in playing])
            for game, action in zip(games, policy.act(seen, games, EVAL_EPSILON, rng)):
                emulators[game].send(np.array([action]))               # all of them run at the same time
            for pair in playing.copy():
                obs[pair], (reward,), (terminated,), (truncated,), _ = emulators[pair[1]].recv()
                scores[pair][-1] += float(reward)
                steps[pair] += 1
                if (terminated or truncated) and steps[pair] >= min_steps and len(scores[pair]) >= min_episodes:
                    playing.remove(pair)
                elif terminated or truncated:
                    scores[pair].append(0.0)
                    obs[pair] = emulators[pair[1]].reset()[0]
    return [(scores[pair], steps[pair]) for pair in pairs]


def evaluate(args: Args, emulators: list[AtariVectorEnv], policies: list[GamePolicy], assignment: list[int],
             stopped=lambda: False) -> dict[str, np.ndarray] | None:
    """Scores of the assigned policies in fresh episodes, (T, episodes), the same ones at every call."""
    pairs = [(i, game) for game, i in enumerate(assignment)]
    played = play_games(emulators, policies, pairs, [args.seed, 1], stopped, min_episodes=args.eval_episodes)
    return played and {"return": np.array([scores for scores, _ in played])}


# --- Training --------------------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """E-steps and M-steps in turns; returns the run folder."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") is False:         # x86 without AMX:
        torch.set_float32_matmul_precision("medium")   # oneDNN's products, often faster; others would round to bfloat16
    torch.manual_seed(args.seed)
    rng, num_games = np.random.default_rng(args.seed), len(args.games)
    n = {"em": args.num_policies, "multihead": 1, "ppt": num_games}[args.method]
    stage = [make_emulator(args, game) for game in range(num_games)]             # of E-steps and evaluations
    policies = [GamePolicy(args, [int(emulator.single_action_space.n) for emulator in stage]) for _ in range(n)]
    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else {}
    for policy, saved in zip(policies, state.get("policies", [])):
        policy.load_state_dict(saved)
    assignment = state.get("assignment", [game % n for game in range(num_games)])          # that of the baselines
    if args.evaluate:
        report_games(args, policies, assignment, evaluate(args, stage, policies, assignment), args.evaluate)
        return args.evaluate
    num_replays = num_games * (n if args.method == "em" else 1)
    capacity = min(args.buffer_size, args.total_timesteps // num_replays)        # as far as it is used, on average
    check_memory(84 * 84 * num_replays * capacity, capacity)
    run, global_step, history, eval_steps = Run(args, "atari", list(args.games), state), 0, [], 0
    if args.resume:
        global_step, history, eval_steps = state["global_step"], state["history"], state["eval_steps"]
        rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"])

    def save() -> None:
        run.save(global_step, dict(
            policies=[policy.state_dict() for policy in policies], assignment=assignment, history=history,
            eval_steps=eval_steps, rng=json.dumps(rng.bit_generator.state), torch_rng=torch.get_rng_state()))

    tqdm.write(f"{n} policies, {sum(p.numel() for p in policies[0].online.parameters()):,} parameters each; a resumed "
               "run begins with fresh episodes" + " and an empty replay" * (not args.save_replay))
    if not args.resume:
        save()                                                         # from here on a killed run can be resumed
    while True:
        # E-step: every policy plays every game, each game goes to the best ------------------------------------
        if args.method == "em" and global_step == len(history) * n * args.m_step_size:
            pairs = [(i, game) for game in range(num_games) for i in range(n)]
            played = play_games(stage, policies, pairs, [args.seed, 2, global_step], run.stop.is_set, args.eval_steps)
            if played:                                                 # else a resumed run makes it up
                returns = np.array([np.mean(scores) for scores, _ in played]).reshape(num_games, n)         # G
                assignment = returns.argmax(1).tolist()                # ties: the lowest index
                history.append((global_step, assignment, returns.max(1).tolist()))
                eval_steps += sum(steps for _, steps in played)
                for policy in policies:                                # running episodes are cut
                    policy.steps[:], policy.game = 0, None

        # Evaluate: before the end, so that a run that was stopped during an evaluation makes it up ------------
        if run.due(global_step) and (result := evaluate(args, stage, policies, assignment, run.stop.is_set)):
            mean = result["return"].mean(1)
            best = np.array(history[-1][2]) if history else mean
            run.log_evaluation(global_step, result, {
                "max_return": best.mean(), "mean_normalised": human_normalised(args.games, mean).mean(),
                "max_normalised": human_normalised(args.games, best).mean(), "eval_steps": eval_steps,
                **{f"{name}/policy": i for name, i in zip(args.games, assignment)}})
        if global_step >= args.total_timesteps or run.stop.is_set():
            break

        # M-step: every policy acts in one of its games and learns from one; without games of its own, from all --
        epsilon = EPSILON + (1 - EPSILON) * np.clip(1.08 - global_step / args.epsilon_period, 0, 1)
        steps = global_step // n + 1                                   # of each policy
        for i, policy in enumerate(policies):
            games = np.array([game for game in range(num_games) if assignment[game] == i] or range(num_games))
            if policy.game is None:
                policy.begin(games, rng)
            episode = policy.step(policy.act(policy.obs, [policy.game], epsilon, rng)[0])
            if episode:
                run.log(f"tasks/{args.games[policy.game]}", episode)
                policy.game = None
            game = int(rng.choice(games))
            if steps % UPDATE_EVERY == 0 and policy.replays[game].num_steps > args.learning_starts:
                batch = policy.replays[game].sample(rng, args.batch_size, args.n_step, args.gamma)
                loss = policy.update(batch, game)
                run.log("losses", {"quantile": loss, f"policy{i}/quantile": loss})
                if crossed(steps - UPDATE_EVERY, steps, args.target_period):
                    policy.target.load_state_dict(policy.online.state_dict())
        global_step += n
        if crossed(global_step - n, global_step, LOG_EVERY):
            run.log("method", {"epsilon": epsilon})
            run.write(global_step)
        if crossed(global_step - n, global_step, args.checkpoint_every):
            save()
    save()
    if not run.stop.is_set():
        report_games(args, policies, assignment, result, run.dir)
        plot_games(run.dir, args.games)
        if history:
            plot_clusters(run.dir / "assignment.png", args.games, history, n)
    run.close()
    return run.dir


# --- Pictures of the method ------------------------------------------------------------------------------------------
def report_games(args: Args, policies: list[GamePolicy], assignment: list[int], result: dict, folder: Path) -> None:
    """Print what the assigned policies score; film 400 steps of each game if asked to."""
    print_table([f"{name} by policy {i}" for name, i in zip(args.games, assignment)], result)
    for game, name in enumerate(args.games) if args.capture_video else ():
        rng, frames = np.random.default_rng([args.seed, 3]), []
        pair = (make_emulator(args, game),                             # one for the policy, one that shows it in colour
                make_emulator(args, game, stack_num=1, grayscale=False, img_height=210, img_width=160))
        seed = int(rng.integers(2**31))
        obs, picture = (emulator.reset(seed=seed)[0] for emulator in pair)
        for _ in range(400):
            action = np.array(policies[assignment[game]].act(obs, [game], EVAL_EPSILON, rng))
            obs, picture = (emulator.step(action)[0] for emulator in pair)
            frames.append(picture[0, 0])
        imageio.mimsave(folder / f"{name}.gif", frames, duration=60, loop=0)


def plot_games(folder: Path, names: tuple[str, ...]) -> None:
    """games.png from metrics.csv: each game's score, beside random play (dotted) and a human (dashed)."""
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)
    rows, columns = math.ceil(len(names) / 6), min(len(names), 6)
    figure = Figure(figsize=(3 * columns, 2.8 * rows), layout="constrained")
    for axis, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names):
        axis.plot(table["global_step"], table[f"{name}/return"])
        for score, style in zip(SCORES.get(name, ()), (":", "--")):
            axis.axhline(score, color="black", linestyle=style)
        axis.set(title=name)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(folder / "games.png", dpi=120)


def plot_clusters(path: Path, names: tuple[str, ...], history: list, num_policies: int) -> None:
    """The E-steps (the paper's Fig. 11): a dot where a game is assigned to the panel's policy, its colour the score."""
    steps, assignment, scores = (np.array(column) for column in zip(*history))
    scores = human_normalised(names, scores)
    figure = Figure(figsize=(9, 1 + 1.6 * num_policies), layout="constrained")
    axes = figure.subplots(num_policies, 1, sharex=True, squeeze=False)[:, 0]
    for policy, axis in enumerate(axes):
        when, game = np.nonzero(assignment == policy)
        dots = axis.scatter(steps[when], game, 40, scores[when, game], vmin=scores.min(), vmax=scores.max())
        axis.set_yticks(range(len(names)), names, fontsize=6)
        axis.set(ylabel=f"policy {policy}", ylim=(len(names) - 0.5, -0.5))
    axes[-1].set_xlabel(STEPS)
    figure.colorbar(dots, ax=axes, label="human-normalised score")
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
