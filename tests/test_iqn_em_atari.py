"""EM with quantile networks: an update in float64, the replay by frames, the emulator, who plays and learns what."""
import math
from functools import partial
from types import SimpleNamespace

import ale_py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ale_py.roms import get_rom_path

import iqn_em_atari as iqn

SMALL = dict(preset="laptop", games=("DemonAttack", "Assault"), total_timesteps=480, horizon=30, eval_episodes=1,
             learning_starts=20, batch_size=4, width=1 / 16, num_quantiles=(3, 4, 5), buffer_size=400)


# --- the games -------------------------------------------------------------------------------------------------------
def area_weights(size):
    """Which share of each of `size` pixels lies in each of 84 equal parts, over a part's length: (84, size)."""
    edges = np.arange(85) * size / 84
    overlap = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(edges[:-1, None], np.arange(size))
    return overlap.clip(0) * 84 / size


def test_pictures_are_the_emulators_own_merged_shrunk_and_stacked():
    emulator, ale = iqn.make_emulator(iqn.Args(**SMALL | {"horizon": 61}), 1), ale_py.ALEInterface()
    ale.setInt("random_seed", 3)
    ale.setFloat("repeat_action_probability", 0.25)
    ale.loadROM(get_rom_path("assault"))
    ale.reset_game()
    obs, pictures, total, expected = emulator.reset(seed=3)[0], [], 0, 0
    assert obs.shape == (1, 4, 84, 84) and obs.dtype == np.uint8 and not obs[0, :3].any() and obs[0, 3].any()
    for _ in range(60):
        screens = []
        for _ in range(4):
            expected += ale.act(ale.getMinimalActionSet()[2])          # up, which shoots in this game
            screens.append(ale.getScreenGrayscale())
        pictures.append(area_weights(210) @ np.maximum(*screens[2:]) @ area_weights(160).T)
        obs, rewards, terminations, truncations, _ = emulator.step(np.array([2]))
        total += rewards[0]
    assert total == expected > 1 and not terminations[0] and not truncations[0]            # scores, not their signs
    assert np.abs(obs[0] - np.stack(pictures[-4:])).max() < 0.51       # but for rounding
    assert emulator.step(np.array([2]))[3][0]                          # truncated after --horizon steps


def test_human_normalised_scores_by_hand():
    scores = iqn.human_normalised(("BankHeist", "Assault", "Pong", "Assault"), np.array([383.65, 2000.0, 3.0, 222.4]))
    assert scores.tolist() == pytest.approx([0.5, 1.0, 0.0, 0.0]) and len(iqn.SCORES) == 12


# --- networks --------------------------------------------------------------------------------------------------------
def test_sizes_and_exploration_are_the_papers_and_equal_between_methods_on_a_laptop():
    net = iqn.IQN([18, 6], 1.0)
    assert sum(p.numel() for p in net.parameters()) == 4_546_784 + 513 * 24
    for layer in (net.features[0], net.features[3], net.features[5], net.embedding, net.dense, net.heads[0]):
        limit = math.sqrt(math.sqrt(3) / layer.weight[0].numel())
        assert 0.97 * limit < layer.weight.abs().max() <= limit and not layer.bias.any()
    for preset, actions, within in (("laptop", [9, 18, 7, 6], 1.03),
                                    ("gin", [9, 18, 18, 10, 6, 7, 6, 8, 18, 18, 18, 18], 1.14)):
        settings = [iqn.Args(preset=preset, method=method) for method in ("em", "multihead", "ppt")]
        numbers = [settings[0].num_policies, 1, len(actions)]
        totals = [number * sum(p.numel() for p in iqn.IQN(actions, args.width).parameters())
                  for number, args in zip(numbers, settings)]
        assert max(totals) < within * min(totals)
        assert len({args.epsilon_period / (preset == "laptop" or n) for args, n in zip(settings, numbers)}) == 1


def same_padding(x, kernel, stride):
    """TensorFlow's rule: as many outputs as inputs over stride, the odd pixel goes to the right and below."""
    total = max(0, (-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1])
    return F.pad(x, (total // 2, total - total // 2) * 2)


def quantiles64(params, obs, taus, head):
    """The network once more, in float64 and from its parameters by name."""
    x = obs.double() / 255
    for name, kernel, stride in (("features.0", 8, 4), ("features.3", 4, 2), ("features.5", 3, 1)):
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        x = torch.relu(F.conv2d(same_padding(x, kernel, stride), weight, bias, stride))
    cosines = torch.stack([torch.cos(math.pi * i * taus) for i in range(1, 65)], dim=-1)
    embedded = torch.relu(cosines @ params["embedding.weight"].T + params["embedding.bias"])
    hidden = torch.relu((x.flatten(1)[:, None] * embedded) @ params["dense.weight"].T + params["dense.bias"])
    return hidden @ params[f"heads.{head}.weight"].T + params[f"heads.{head}.bias"]


def test_an_update_equals_one_in_float64_and_leaves_other_heads_alone():
    torch.manual_seed(0)
    policy = iqn.GamePolicy(iqn.Args(**SMALL | {"lr": 1e-3, "width": 1 / 8}), [6, 7])
    for p in policy.target.parameters():
        p.data *= 1.2                                                  # else the networks are the same
    obs, next_obs = torch.randint(256, (2, 8, 4, 84, 84), dtype=torch.uint8)
    actions, returns, discounts = torch.randint(7, (8,)), torch.randn(8) * 2, torch.tensor([0.9, 0.0] * 4)
    params = {name: p.detach().double().requires_grad_() for name, p in policy.online.named_parameters()}
    fixed = {name: p.detach().double() for name, p in policy.target.named_parameters()}
    torch.manual_seed(9)
    loss = policy.update([obs, actions, returns, discounts, next_obs], game=1)

    torch.manual_seed(9)
    taus_next, taus = torch.rand(8, 9).double(), torch.rand(8, 3).double()       # N = 3, N' = 4, K = 5
    following, now, total = quantiles64(fixed, next_obs, taus_next, 1), quantiles64(params, obs, taus, 1), 0.0
    for b in range(8):
        best = following[b, :5].mean(0).argmax()
        for i in range(3):
            for j in range(4):
                error = returns[b].double() + discounts[b].double() * following[b, 5 + j, best] - now[b, i, actions[b]]
                huber = error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5
                total = total + (1 - taus[b, i] if error < 0 else taus[b, i]) * huber / (4 * 8)
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-4)
    for name, param in policy.online.named_parameters():
        if name.startswith("heads.0"):
            assert torch.equal(param.double(), params[name])
        else:
            grad = params[name].grad                                   # Adam's first step, by its definition
            expected = params[name].detach() - 1e-3 * grad / (grad.abs() + 3.125e-4)
            assert torch.allclose(param.double(), expected, atol=3e-6) and not torch.equal(param.double(), params[name])
    before = policy.online.heads[1].weight.clone()
    policy.update([obs, actions % 6, returns, discounts, next_obs], game=0)
    assert torch.equal(policy.online.heads[1].weight, before)          # no momentum of the other game's step


def test_actions_are_the_best_of_each_rows_own_head_or_random():
    policy, rng = iqn.GamePolicy(iqn.Args(**SMALL), [3, 5]), np.random.default_rng(0)
    with torch.no_grad():
        policy.online.heads[0].bias[2], policy.online.heads[1].bias[4] = 1e3, 1e3
    obs, state = np.zeros((3, 4, 84, 84), np.uint8), torch.get_rng_state()
    assert policy.act(obs, [0, 1, 0], 0.0, rng) == [2, 4, 2]
    drawn = np.array([policy.act(obs, [0, 1, 0], 0.5, rng) for _ in range(200)])
    assert 0.6 < (drawn == [2, 4, 2]).mean() < 0.7 and set(drawn[:, 1]) == set(range(5))   # 1 - 0.5 (1 - 1 / A)
    assert torch.equal(torch.get_rng_state(), state)                   # evaluation takes no number from training


# --- replay ----------------------------------------------------------------------------------------------------------
def fill(replay, lengths):
    """Episodes of frames 1, 2, 3, ...; action k, reward k / 10 at frame k. `lengths`: steps, whether it terminated."""
    first, ends = 1, {}
    for steps, terminated in lengths:
        last = first + steps
        replay.begin(np.full((84, 84), first, np.uint8))
        for k in range(first, last):
            replay.add(k, k / 10, terminated and k == last - 1, np.full((84, 84), k + 1, np.uint8))
        ends |= {k: (first, last, terminated) for k in range(first, last + 1)}
        first = last + 1
    return ends


@pytest.mark.parametrize("capacity, n_step", [(1_000, 1), (1_000, 3), (37, 3)])
def test_the_replay_returns_what_was_put_in_also_from_a_checkpoint(capacity, n_step):
    policy = iqn.GamePolicy(iqn.Args(**SMALL), [3])
    policy.args.buffer_size = capacity                                 # below what a user may ask for
    ends = fill(policy.replays[0], [(1, True), (2, False), (9, True), (5, False), (30, True), (12, True), (6, False)])
    restored = iqn.GamePolicy(policy.args, [3])
    restored.load_state_dict(policy.state_dict())
    policy.args.save_replay = False
    assert policy.state_dict()["replays"] == {}
    replay, newest = restored.replays[0], max(ends)
    assert replay.num_steps == 65 and replay.num_added == newest
    batch = replay.sample(np.random.default_rng(0), 3_000, n_step, 0.9)
    obs, actions, returns, discounts, next_obs = (column.numpy() for column in batch)
    assert obs.dtype == np.uint8 and obs.shape == next_obs.shape == (3_000, 4, 84, 84) and actions.dtype == np.int64
    oldest = max(1, newest - capacity + 1)
    for b in range(len(obs)):
        k, (first, last, terminated) = int(actions[b]), ends[int(actions[b])]
        m = min(n_step, last - k)
        assert oldest <= k < last                                      # no action was taken at the last frame
        assert returns[b] == pytest.approx(sum(0.9**i * (k + i) / 10 for i in range(m)), rel=1e-5)
        assert discounts[b] == pytest.approx(0.0 if terminated and k + m == last else 0.9**m)
        for stack, top in ((obs[b], k), (next_obs[b], k + m)):
            assert stack[:, 0, 0].tolist() == [j if j >= first else 0 for j in range(top - 3, top + 1)]
    possible = {k for k, (first, last, _) in ends.items() if k < last and max(first, k - 3) >= oldest}
    counts = np.bincount(actions)[sorted(possible)]
    assert set(actions) == possible and counts.min() > 0.5 * counts.mean() and counts.max() < 1.7 * counts.mean()


# --- the schedule ----------------------------------------------------------------------------------------------------
class Clock:
    """A game of `length` steps that pays 3 for each."""

    def __init__(self, length):
        self.length, self.single_action_space = length, SimpleNamespace(n=3)

    def reset(self, seed=None):
        self.time = 0
        return np.zeros((1, 4, 84, 84), np.uint8), {}

    def send(self, actions):
        self.time += 1

    def recv(self):
        over = np.array([self.time == self.length])
        return np.zeros((1, 4, 84, 84), np.uint8), np.array([3]), over, np.array([False]), {}

    def step(self, actions):
        self.send(actions)
        return self.recv()


def test_whole_episodes_are_played_until_there_are_enough():
    policies = [iqn.GamePolicy(iqn.Args(**SMALL), [3] * 3) for _ in range(2)]
    emulators = [Clock(10), Clock(20), Clock(40)]
    play = partial(iqn.play_games, emulators, policies, [(0, 0), (1, 0), (1, 2), (0, 1)], [1])
    scores = [[30.0] * 3, [30.0] * 3, [120.0], [60.0] * 2]
    assert play(lambda: False, min_steps=25) == list(zip(scores, [30, 30, 40, 40]))
    assert [len(scores) for scores, _ in play(lambda: False, 0, 2)] == [2] * 4 and play(lambda: True) is None


def test_games_go_to_the_best_policy_who_learns_what_and_evaluations_come_when_they_are_due(monkeypatch, tmp_path):
    """Games of 25 steps that pay 3 each; E-steps find 3 around the numbers of a table, G[t, i]."""
    tables, played, learnt, calls, ids = iter([[[1, 2], [5, 3]], [[4, 2], [7, 1]], [[2, 2], [1, 3]]]), [], [], [], {}
    play, step, update, act, rates = iqn.play_games, iqn.GamePolicy.step, iqn.GamePolicy.update, iqn.GamePolicy.act, []

    def watch_play(emulators, policies, pairs, seed, stopped, min_steps=0, min_episodes=1):
        calls.append(min_steps)
        if min_steps != 11:
            return play(emulators, policies, pairs, seed, stopped, min_steps, min_episodes)
        table = next(tables)
        return [([table[game][i] - 3.0, table[game][i] + 3.0], 7) for i, game in pairs]

    def watch_step(policy, action):
        played.append((ids.setdefault(id(policy), len(ids)), policy.game))
        return step(policy, action)

    def watch_update(policy, batch, game):
        learnt.append((len(played), (ids[id(policy)], game)))
        assert 1 <= batch[2].min() and batch[2].max() < 2.98           # three rewards, each clipped to 1
        return update(policy, batch, game)
    monkeypatch.setattr(iqn.GamePolicy, "step", watch_step), monkeypatch.setattr(iqn.GamePolicy, "update", watch_update)
    monkeypatch.setattr(iqn.GamePolicy, "act", lambda policy, *given: (rates.append(given[2]), act(policy, *given))[1])
    monkeypatch.setattr(iqn, "play_games", watch_play)
    monkeypatch.setattr(iqn, "make_emulator", lambda args, game: Clock(25))
    folder = iqn.train(iqn.Args(**SMALL | dict(num_policies=2, m_step_size=80, eval_steps=11, total_timesteps=400,
                                               n_step=3, eval_every=100, learning_starts=5, epsilon_period=170, runs_dir=tmp_path)))
    assert len(played) == 400 and len(calls) == 3 + 4                  # the last M-step is cut short
    falling = 0.01 + 0.99 * np.clip(1.08 - np.arange(0, 400, 2) / 170, 0, 1)
    assert set(falling.round(9)) <= set(np.round(rates, 9))
    crossed, all_to_first, tie = {(0, 1), (1, 0)}, {(0, 0), (0, 1), (1, 0), (1, 1)}, {(0, 0), (1, 1)}
    for k, pairs in enumerate((crossed, all_to_first, tie)):           # a policy that got none plays both
        assert set(played[160 * k:160 * (k + 1)]) == pairs
        assert {pair for when, pair in learnt if 160 * k < when <= 160 * (k + 1)} == pairs
    columns = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="")
    expected = {"max_return": [3.5, 5.5, 5.5, 2.5], "eval_steps": [28, 56, 56, 84], "mean_return": [75] * 4,
                "DemonAttack/policy": [1, 0, 0, 0], "Assault/policy": [0, 0, 0, 1], "global_step": [100, 200, 300, 400]}
    assert {name: columns[name].tolist() for name in expected} == expected
