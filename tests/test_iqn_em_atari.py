"""EM with quantile networks: losses by hand, an update in float64, the replay frame by frame, who plays what."""
import math
import re
from types import SimpleNamespace

import ale_py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ale_py.roms import get_rom_path

import iqn_em_atari as iqn

SMALL = dict(preset="laptop", games=("DemonAttack", "Assault"), total_timesteps=480, m_step_size=80, horizon=30,
             eval_steps=1, eval_episodes=1, learning_starts=20, batch_size=4, width=1 / 16, num_quantiles=(3, 4, 5),
             buffer_size=400, eval_every=1, checkpoint_every=10_000)


def small(**settings):
    return iqn.Args(**SMALL | settings)


def column(folder, name):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [float(row[header.index(name)]) for row in rows]


# --- the games -------------------------------------------------------------------------------------------------------
def area_weights(size):
    """Which share of each of `size` pixels lies in each of 84 equal parts, over a part's length: (84, size)."""
    edges = np.arange(85) * size / 84
    overlap = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(edges[:-1, None], np.arange(size))
    return overlap.clip(0) * 84 / size


def test_pictures_are_the_emulators_own_merged_shrunk_and_stacked():
    arcade = iqn.Arcade(small(horizon=61))
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 3)
    ale.setFloat("repeat_action_probability", 0.25)
    ale.loadROM(get_rom_path("assault"))
    ale.reset_game()
    obs, pictures, total, expected = arcade.reset((0, 1), seed=3), [], 0, 0
    assert obs.shape == (4, 84, 84) and obs.dtype == np.uint8 and not obs[:3].any() and obs[3].any()
    up = ale.getMinimalActionSet()[2]                         # which shoots, in this game
    for _ in range(60):
        screens = []
        for _ in range(4):
            expected += ale.act(up)
            screens.append(ale.getScreenGrayscale())
        pictures.append(area_weights(210) @ np.maximum(screens[2], screens[3]) @ area_weights(160).T)
        obs, rewards, terminations, truncations = arcade.step([(0, 1)], [2])
        total += rewards[0]
    assert obs.shape == (1, 4, 84, 84) and total == expected > 1                  # scores, not signs of scores
    assert np.abs(obs[0] - np.stack(pictures[-4:])).max() < 0.51                   # but for rounding
    assert not truncations[0] and not terminations[0]
    _, _, terminations, truncations = arcade.step([(0, 1)], [2])                   # its picture lacks the last frame
    assert truncations[0] and not terminations[0]                                  # after --horizon steps


def test_a_seed_decides_an_episode_and_actions_stick():
    arcade, other = iqn.Arcade(small(horizon=1_000)), iqn.Arcade(small(horizon=1_000))

    def play(place, seed):
        place.reset((0, 1), seed)
        return np.stack([place.step([(0, 1)], [k % 7])[0] for k in range(60)])

    first = play(arcade, 5)
    assert not np.array_equal(play(arcade, 6), first)                              # sticky actions are random
    assert np.array_equal(play(arcade, 5), first) and np.array_equal(play(other, 5), first)
    assert not np.array_equal(play(arcade, None), first)                           # goes on with its random numbers
    assert arcade.num_actions() == [6, 7]
    assert set(arcade.emulators) == {(0, 1), (0, 0)}


def test_sticking_happens_in_a_quarter_of_the_frames(monkeypatch):
    made = {}
    monkeypatch.setattr(iqn, "AtariVectorEnv", lambda rom, **settings: made.update(settings, rom=rom))
    iqn.Arcade(iqn.Args(games=("ALE/MsPacman-v5",))).emulator((0, 0))
    assert made == dict(rom="ms_pacman", num_envs=1, stack_num=4, repeat_action_probability=0.25, noop_max=0,
                        use_fire_reset=False, reward_clipping=False, max_num_frames_per_episode=108_000)


def test_games_are_found_by_any_spelling():
    assert [iqn.rom_of(name) for name in ("MsPacman", "ms_pacman", "ALE/MsPacman-v5", "Jamesbond", "NoSuchGame")] == [
        "ms_pacman", "ms_pacman", "ms_pacman", "jamesbond", None]
    assert all(iqn.rom_of(game) for game in iqn.SCORES) and len(iqn.SCORES) == 12
    assert iqn.rom_name("ms_pacman") == "MsPacman"
    assert small(games=("ms_pacman", "ALE/Assault-v5")).games == ("MsPacman", "Assault")           # and get one
    assert all(iqn.rom_name(iqn.rom_of(game)) == game for game in iqn.SCORES)


def test_human_normalised_scores_by_hand():
    assert iqn.human_normalised("Assault", 222.4) == 0 and iqn.human_normalised("Assault", 742.0) == 1
    assert iqn.human_normalised("BankHeist", 383.65) == pytest.approx(0.5)
    assert math.isnan(iqn.human_normalised("Pong", 3))
    means = iqn.normalised(["BankHeist", "Assault", "Pong"], np.array([[383.65, 383.65], [2_000, 4_000], [9, 9]]),
                           np.array([[14.2, 753.1], [222.4, 222.4], [1, 1]]))
    assert means == {"mean_normalised": pytest.approx(0.75), "max_normalised": pytest.approx(0.5)}       # clipped at 1
    assert math.isnan(iqn.normalised(["Pong"], np.ones((1, 2)), np.ones((1, 1)))["mean_normalised"])


# --- networks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width, trunk", [(1.0, 4_546_784), (2.0, None), (3 ** -0.5, None)])
def test_sizes_are_the_papers(width, trunk):
    net = iqn.IQN([18, 6], width)
    if trunk:
        assert sum(p.numel() for p in net.parameters()) == trunk + 513 * 24
    filters = {1.0: (32, 64, 64, 512), 2.0: (64, 128, 128, 1024), 3 ** -0.5: (18, 36, 36, 295)}[width]
    assert (net.conv1.out_channels, net.conv2.out_channels, net.conv3.out_channels, net.dense.out_features) == filters
    assert net.features(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape == (2, 121 * filters[2])
    for layer in (net.conv1, net.conv2, net.conv3, net.embedding, net.dense, net.heads[0]):
        limit = math.sqrt(math.sqrt(3) / layer.weight[0].numel())
        assert 0.97 * limit < layer.weight.abs().max() <= limit and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.12)


def same_padding(x, kernel, stride):
    """TensorFlow's rule: as many outputs as inputs over stride, the odd pixel goes to the right and below."""
    total = max(0, (-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1])
    return F.pad(x, (total // 2, total - total // 2) * 2)


def quantiles64(params, obs, taus, head):
    """The network once more, in float64 and from its parameters by name."""
    x = obs.double() / 255
    for name, kernel, stride in (("conv1", 8, 4), ("conv2", 4, 2), ("conv3", 3, 1)):
        x = torch.relu(F.conv2d(same_padding(x, kernel, stride), params[f"{name}.weight"], params[f"{name}.bias"],
                                stride))
    features = x.reshape(len(x), -1)
    cosines = torch.stack([torch.cos(math.pi * i * taus) for i in range(1, 65)], dim=-1)
    embedded = torch.relu(cosines @ params["embedding.weight"].T + params["embedding.bias"])
    hidden = torch.relu((features[:, None] * embedded) @ params["dense.weight"].T + params["dense.bias"])
    return hidden @ params[f"heads.{head}.weight"].T + params[f"heads.{head}.bias"]


def test_an_update_equals_one_in_float64():
    torch.manual_seed(0)
    args, generator = small(num_quantiles=(3, 4, 5), lr=1e-3), torch.Generator().manual_seed(1)
    online, target = iqn.IQN([6, 7], 1 / 8), iqn.IQN([6, 7], 1 / 8)
    obs, next_obs = torch.randint(256, (2, 8, 4, 84, 84), dtype=torch.uint8, generator=generator)
    actions, returns = torch.randint(7, (8,), generator=generator), torch.randn(8, generator=generator) * 2
    discounts = torch.tensor([0.9, 0.0] * 4)
    params = {name: p.detach().double().requires_grad_() for name, p in online.named_parameters()}
    fixed = {name: p.detach().double() for name, p in target.named_parameters()}
    optimizer = torch.optim.Adam(online.parameters(), lr=args.lr, eps=3.125e-4)
    torch.manual_seed(9)
    loss = iqn.iqn_update(args, online, target, optimizer, [obs, actions, returns, discounts, next_obs], game=1)

    torch.manual_seed(9)
    taus_next, taus = torch.rand(8, 9).double(), torch.rand(8, 3).double()
    following, total = quantiles64(fixed, next_obs, taus_next, 1), 0.0
    now = quantiles64(params, obs, taus, 1)
    for b in range(8):
        best = following[b, :5].mean(0).argmax()
        for i in range(3):
            for j in range(4):
                error = returns[b].double() + discounts[b].double() * following[b, 5 + j, best] - now[b, i, actions[b]]
                size = abs(error)
                huber = error**2 / 2 if size <= 1 else size - 0.5
                total = total + (1 - taus[b, i] if error < 0 else taus[b, i]) * huber / (4 * 8)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    for name, param in online.named_parameters():
        if name.startswith("heads.0"):
            assert params[name].grad is None and torch.equal(param.double(), params[name])   # another game's head
        else:
            grad = params[name].grad                                       # Adam's first step, by its definition
            expected = params[name].detach() - args.lr * grad / (grad.abs() + 3.125e-4)
            assert torch.allclose(param.double(), expected, atol=3e-6) and not torch.equal(param.double(), params[name])


def test_adam_forgets_nothing_of_a_game_while_others_are_played():
    args, net = small(), iqn.IQN([6, 7], 1 / 16)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    batch = [torch.zeros(4, 4, 84, 84, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), torch.ones(4),
             torch.zeros(4), torch.zeros(4, 4, 84, 84, dtype=torch.uint8)]
    iqn.iqn_update(args, net, net, optimizer, batch, 0)
    before = net.heads[0].weight.clone()
    iqn.iqn_update(args, net, net, optimizer, batch, 1)
    assert torch.equal(net.heads[0].weight, before)                        # no momentum of the other game's step


def test_quantile_huber_loss_by_hand():
    loss = iqn.quantile_huber_loss(torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.25, 0.5], [0.1, 0.9]]),
                                   torch.tensor([[1.0, -3.0], [1.0, 1.0]]))
    first = (0.25 * 0.5 + 0.75 * 2.5) / 2 + (0.5 * 0.5 + 0.5 * 4.5) / 2
    assert loss.tolist() == pytest.approx([first, 0.0])


def test_quantiles_are_learnt():
    """One state, one action, returns 0 and 8 equally often: the lower quantiles go to 0 and the upper ones to 8."""
    torch.manual_seed(0)
    args, net = small(num_quantiles=(16, 1, 1)), iqn.IQN([6, 7], 1 / 8)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    obs = torch.full((32, 4, 84, 84), 100, dtype=torch.uint8)
    batch = [obs, torch.zeros(32, dtype=torch.int64), torch.tensor([0.0, 8.0] * 16), torch.zeros(32), obs]
    for _ in range(150):
        iqn.iqn_update(args, net, net, optimizer, batch, 0)
    with torch.no_grad():
        low, high = net.heads[0](net(net.features(obs[:1]), torch.tensor([[0.2, 0.8]])))[0, :, 0].tolist()
    assert low < 1.5 and high > 6.5


def test_the_greedy_action_is_that_of_each_rows_own_head():
    net = iqn.IQN([3, 5], 1 / 16)
    with torch.no_grad():
        net.heads[0].bias[2], net.heads[1].bias[4] = 1e3, 1e3
    assert iqn.greedy_actions(net, torch.zeros(3, 4, 84, 84, dtype=torch.uint8), [0, 1, 0], 4) == [2, 4, 2]
    state = torch.get_rng_state()
    iqn.greedy_actions(net, torch.zeros(3, 4, 84, 84, dtype=torch.uint8), [0, 1, 0], 4, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


# --- replay ----------------------------------------------------------------------------------------------------------
def frame(number):
    return np.full((84, 84), number, np.uint8)


def fill(replay, lengths):
    """Episodes of frames 1, 2, 3, ...; action k, reward k / 10 at frame k. `lengths`: steps, whether it terminated."""
    number, ends = 0, {}
    for steps, terminated in lengths:
        number += 1
        first = number
        replay.begin(np.stack([frame(number)] * 4))
        for k in range(steps):
            number += 1
            replay.add(number - 1, (number - 1) / 10, terminated and k == steps - 1, np.stack([frame(number)] * 4))
        ends |= {k: (first, number, terminated) for k in range(first, number + 1)}
    return ends


@pytest.mark.parametrize("capacity", [1_000, 37])
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_replay_returns_what_was_put_in(capacity, n_step):
    replay, rng = iqn.FrameReplay(capacity), np.random.default_rng(0)
    ends = fill(replay, [(1, True), (2, False), (9, True), (5, False), (30, True), (12, True), (6, False)])
    newest = max(ends)
    obs, actions, returns, discounts, next_obs = (x.numpy() for x in replay.sample(rng, 3_000, n_step, 0.9))
    assert obs.dtype == np.uint8 and obs.shape == next_obs.shape == (3_000, 4, 84, 84) and actions.dtype == np.int64
    oldest = max(1, newest - capacity + 1)
    for b in range(len(obs)):
        k, (first, last, terminated) = int(actions[b]), ends[int(actions[b])]
        assert oldest <= k < last                                              # no action was taken at the last frame
        m = min(n_step, last - k)
        assert returns[b] == pytest.approx(sum(0.9**i * (k + i) / 10 for i in range(m)), rel=1e-5)
        assert discounts[b] == pytest.approx(0.0 if terminated and k + m == last else 0.9**m)
        for stack, top in ((obs[b], k), (next_obs[b], k + m)):
            shown = [j if j >= first else 0 for j in range(top - 3, top + 1)]
            assert [int(picture.max()) for picture in stack] == shown
            assert all(picture.min() == picture.max() for picture in stack)
    possible = {k for k, (first, last, _) in ends.items() if k < last and max(first, k - 3) >= oldest}
    assert set(actions.tolist()) == possible                                   # and each of them is drawn
    assert replay.num_steps == 65


def test_draws_are_uniform():
    replay = iqn.FrameReplay(100)
    fill(replay, [(3, True), (1, False), (16, True)])
    replay.stacks = lambda index: None                                         # 20,000 pictures are not needed
    actions = replay.sample(np.random.default_rng(0), 20_000, 3, 0.9)[1]
    counts = torch.bincount(actions)[torch.bincount(actions) > 0]
    assert len(counts) == 20 and counts.min() > 850 and counts.max() < 1_150


def test_a_restored_replay_is_the_same_and_its_episode_has_ended():
    replay, copy = iqn.FrameReplay(37), iqn.FrameReplay(37)
    fill(replay, [(30, True), (12, False)])
    copy.set_state(replay.get_state())
    copy.begin(np.stack([frame(200)] * 4))
    copy.add(200, 1.0, False, np.stack([frame(201)] * 4))
    for place in (replay, copy):
        assert place.num_steps - (place is copy) == 42
    obs, actions, returns, discounts, next_obs = copy.sample(np.random.default_rng(0), 500, 3, 0.9)
    assert {43, 200} <= set(actions.tolist()) and returns[actions == 43].allclose(torch.tensor(4.3))
    assert (next_obs[actions == 43][:, -1] == 44).all() and discounts[actions == 43].allclose(torch.tensor(0.9))
    assert (obs[actions == 200][:, :3] == 0).all()


def test_frames_take_memory_only_once_they_are_written():
    replay = iqn.FrameReplay(3_000_000)                                        # 21 GB of addresses
    fill(replay, [(5, True)])
    assert replay.sample(np.random.default_rng(0), 8, 3, 0.9)[0].shape == (8, 4, 84, 84)
    assert sum(array.numel() for array in replay.get_state()["arrays"][:1]) == 6 * 7_056


def test_the_replays_size_is_reported_and_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(iqn, "memory_bytes", lambda: 16 * 10**9)
    assert [iqn.replay_frames(iqn.Args(method=method)) for method in ("em", "multihead", "ppt")] == [
        48 * 300_000, 12 * 300_000, 12 * 300_000]
    assert iqn.replay_frames(iqn.Args(total_timesteps=2_000_000)) == 2_000_000
    assert iqn.replay_frames(iqn.Args(total_timesteps=1_000)) == 1_000_000     # that is one M-step of four policies
    with pytest.raises(iqn.Failure, match=r"grow to 102 GB, and there are 16 GB of .* --buffer-size 37792 would fit"):
        iqn.train(iqn.Args(runs_dir=tmp_path))
    assert not list(tmp_path.iterdir()) and 48 * 37_792 * 7_056 < 0.81 * 16e9
    with pytest.raises(iqn.Failure) as refused:                                # here the steps limit what is needed
        iqn.train(iqn.Args(total_timesteps=10_000_000, runs_dir=tmp_path))
    fits = int(re.search(r"--buffer-size (\d+) would fit", str(refused.value))[1])
    assert "the replay grows to" in iqn.plan_memory(iqn.Args(total_timesteps=10_000_000, buffer_size=fits))
    with pytest.raises(iqn.Failure, match=r"would fit$"):                      # laptop is what was asked for
        iqn.plan_memory(iqn.Args(preset="laptop", total_timesteps=10_000_000, buffer_size=10_000_000))
    iqn.train(small(total_timesteps=20, m_step_size=10, runs_dir=tmp_path))
    assert "the replay grows to 0.00 GB, of 16 GB" in capsys.readouterr().out


def test_memory_is_the_machines_or_the_containers():
    assert 10**8 < iqn.memory_bytes() < 10**14


# --- the schedule ----------------------------------------------------------------------------------------------------
def test_least_steps_sampling_by_hand():
    rng, mine = np.random.default_rng(0), np.array([1, 3, 4])
    first = [iqn.next_game(mine, np.zeros(6, int), rng) for _ in range(60)]
    assert set(first) == {1, 3, 4} and min(map(first.count, (1, 3, 4))) > 8
    assert iqn.next_game(mine, np.array([0, 50, 0, 20, 30, 0]), rng) == 3
    assert iqn.next_game(mine, np.array([0, 50, 0, 20, 20, 0]), rng) == 3                  # the first of equals
    assert iqn.next_game(mine, np.array([0, 50, 0, 0, 0, 0]), rng) == 3


def test_exploration_by_hand():
    args = iqn.Args()
    assert [iqn.exploration(step, args) for step in (0, 20_000, 145_000, 270_000, 10**7)] == pytest.approx(
        [1, 1, 0.505, 0.01, 0.01])


def test_presets_and_policies_are_the_papers():
    gin, code, laptop = (iqn.Args(preset=name) for name in ("gin", "code", "laptop"))
    assert (gin.num_quantiles, gin.n_step, gin.lr) == ((64, 64, 32), 3, 5e-5)
    assert (code.num_quantiles, code.n_step, code.lr) == ((32, 32, 32), 1, 2.5e-4)
    for args in (gin, code):
        assert (args.num_policies, args.m_step_size, args.eval_steps, args.learning_starts, args.epsilon_period,
                args.target_period, args.buffer_size, args.batch_size, args.update_every, args.gamma, args.horizon,
                args.epsilon, args.eval_epsilon) == (4, 250_000, 27_000, 20_000, 250_000, 8_000, 300_000, 32, 4, 0.99,
                                                     27_000, 0.01, 0.001)
    assert (iqn.Args(method="multihead").num_policies, iqn.Args(method="ppt").num_policies) == (1, 12)
    assert iqn.Args(method="ppt").width == pytest.approx(math.sqrt(1 / 3)) and laptop.width == 0.25
    assert iqn.Args(games=("Alien", "Zaxxon")).num_policies == 2


def watched(monkeypatch, tmp_path, scores=None, **settings):
    """A small run; what was played, which games were learnt from and when targets were copied."""
    seen = SimpleNamespace(played=[], learnt=[], steps=[0], arcades=[])
    step, update = iqn.Arcade.step, iqn.iqn_update

    def watched_step(arcade, pairs, actions):
        if arcade is seen.arcades[0]:                                          # the training games
            seen.steps.append(seen.steps[-1] + 1)
            seen.played.append(tuple(pairs))
        return step(arcade, pairs, actions)

    def watched_update(args, online, target, optimizer, batch, game):
        seen.learnt.append((seen.steps[-1], game, id(online), next(online.parameters()).sum().item(),
                            next(target.parameters()).sum().item()))
        return update(args, online, target, optimizer, batch, game)

    make = iqn.Arcade.__init__
    monkeypatch.setattr(iqn.Arcade, "__init__", lambda self, args: (make(self, args), seen.arcades.append(self))[0])
    monkeypatch.setattr(iqn.Arcade, "step", watched_step)
    monkeypatch.setattr(iqn, "iqn_update", watched_update)
    if scores is not None:                                                     # G[t, i] of each E-step
        script = iter(scores)

        def scripted(args, arcade, nets, pairs, rng, min_steps=0, min_episodes=1, frames=False):
            table = next(script) if min_steps else np.zeros((9, 9))
            assert min_steps in (0, args.eval_steps)
            around = np.array([-3.0, 3.0]) if min_steps else np.zeros(min_episodes)                # means count
            return {"returns": [around + table[game][policy] for policy, game in pairs], "steps": 7 * len(pairs),
                    "frames": []}
        monkeypatch.setattr(iqn, "play_games", scripted)
    seen.folder = iqn.train(small(runs_dir=tmp_path, **settings))
    return seen


def test_games_go_to_the_best_policy_and_idle_policies_play_all(monkeypatch, tmp_path):
    ours, theirs = [[1, 2], [5, 3]], [[4, 2], [3, 1]]
    seen = watched(monkeypatch, tmp_path, scores=[ours, theirs, ours, theirs], games=("DemonAttack", "Assault"),
                   eval_steps=11, learning_starts=5)
    first, second, third = (seen.played[k:k + 80] for k in (0, 80, 160))
    assert {game for (a, b) in first + third for game in (a, b)} == {(0, 1), (1, 0)}       # each its own
    assert {a for a, _ in second} == {(0, 0), (0, 1)} == {(0, game) for _, (_, game) in second}
    assert {b for _, b in second} == {(1, 0), (1, 1)}                           # policy 1 got none: it plays both
    learnt = [{(net, game) for step, game, net, *_ in seen.learnt if low < step <= low + 80} for low in (0, 80, 160)]
    assert [len(pairs) for pairs in learnt] == [2, 4, 2] and learnt[0] == learnt[2] < learnt[1]
    assert column(seen.folder, "empty") == [1, 0, 1] and column(seen.folder, "largest_cluster") == [2, 1, 2]
    assert column(seen.folder, "DemonAttack/policy") == [0, 1, 0] and column(seen.folder, "Assault/policy") == [0, 0, 0]
    assert column(seen.folder, "eval_steps") == [56, 84, 112]                   # the E-step before training counts
    normal = [iqn.human_normalised(game, best) for game, best in (("DemonAttack", 4), ("Assault", 3))]
    assert column(seen.folder, "max_normalised")[0] == pytest.approx(sum(normal) / 2, abs=1e-4)


def test_episodes_go_to_the_game_with_the_fewest_steps(monkeypatch, tmp_path):
    seen = watched(monkeypatch, tmp_path, method="multihead", games=("DemonAttack", "Assault", "Phoenix"),
                   total_timesteps=400, m_step_size=200, horizon=25)
    for m_step in (seen.played[:200], seen.played[200:]):
        games = [pairs[0][1] for pairs in m_step[::25]]
        assert sorted(games[:3]) == sorted(games[3:6]) == [0, 1, 2] and len(set(games[6:])) == 2
        assert games[1] == min({0, 1, 2} - {games[0]})
    assert column(seen.folder, "largest_cluster") == [3, 3]


def test_a_policy_learns_only_from_games_it_has_played_enough_and_every_four_steps(monkeypatch, tmp_path):
    seen = watched(monkeypatch, tmp_path, method="multihead", total_timesteps=240, m_step_size=240, horizon=60,
                   learning_starts=70, target_period=40, games=("DemonAttack", "Assault"))
    games = [pairs[0][1] for pairs in seen.played]
    assert all(step % 4 == 0 for step, *_ in seen.learnt)
    for step, game, *_ in seen.learnt:
        assert games[:step].count(game) > 70
    both = [step for step, *_ in seen.learnt if step > 220]
    assert both == list(range(224, 241, 4))                                    # no update is skipped at the end ...
    assert min(step for step, *_ in seen.learnt) > 120                         # ... and 60 steps of a game are too few
    drawn = [game for step, game, *_ in seen.learnt]
    assert set(drawn) == {0, 1}
    assert any(games[step - 1] != game for step, game, *_ in seen.learnt)      # not only the one that is being played
    targets = {step: target for step, _, _, _, target in seen.learnt}
    changes = [step for step, before in zip(list(targets)[1:], list(targets)) if targets[step] != targets[before]]
    online = {step: value for step, _, _, value, _ in seen.learnt}
    assert changes and all((step - 4) % 40 == 0 for step in changes)           # copied after the update at 160, 200
    assert all(targets[step] == pytest.approx(online[step], abs=1e-6) for step in changes)


def test_each_policy_of_ppt_plays_and_learns_its_own_game(monkeypatch, tmp_path):
    seen = watched(monkeypatch, tmp_path, method="ppt", total_timesteps=320, m_step_size=160)
    assert set(seen.played) == {((0, 0), (1, 1))}
    learnt = {(game, net) for _, game, net, *_ in seen.learnt}
    assert len(learnt) == 2 and {game for game, _ in learnt} == {0, 1}         # two networks, a game each
    assert column(seen.folder, "DemonAttack/policy") == [0] and column(seen.folder, "Assault/policy") == [1]


def test_rewards_are_clipped_for_learning_only(monkeypatch, tmp_path):
    rewards, scores, add, log = [], [], iqn.FrameReplay.add, iqn.Run.add
    monkeypatch.setattr(iqn.FrameReplay, "add", lambda self, action, reward, *rest: (
        rewards.append(float(reward)), add(self, action, reward, *rest))[0])
    monkeypatch.setattr(iqn.Run, "add", lambda self, group, values: (
        scores.append((group, values)), log(self, group, values))[1])
    iqn.train(small(runs_dir=tmp_path, method="multihead", total_timesteps=240, m_step_size=240, horizon=60,
                    games=("Assault",), eval_steps=100))
    assert set(rewards) == {0.0, 1.0}
    scores = [values["episodic_return"] for group, values in scores if group == "tasks/Assault"]
    assert max(scores) >= 21 and all(score % 21 == 0 for score in scores)      # its targets are worth 21


def test_whole_episodes_are_played_until_there_are_enough(monkeypatch):
    args, played = small(games=("DemonAttack", "Assault", "Phoenix")), []

    class Clock:
        """Games that last 10, 20 and 40 steps and score one point a step."""
        emulators = {}

        def reset(self, pair, seed=None):
            played.append((pair, seed))
            self.emulators[pair] = 0
            return np.zeros((4, 84, 84), np.uint8)

        def step(self, pairs, actions):
            for pair in pairs:
                self.emulators[pair] += 1
            ended = np.array([self.emulators[pair] == 10 * 2 ** pair[1] for pair in pairs])
            return np.zeros((len(pairs), 4, 84, 84), np.uint8), np.ones(len(pairs)), ended, np.zeros(len(pairs), bool)

    nets = torch.nn.ModuleList(iqn.IQN([6, 7, 8], 1 / 16) for _ in range(2))
    pairs = [(0, 0), (1, 0), (1, 2), (0, 1)]
    result = iqn.play_games(args, Clock(), nets, pairs, np.random.default_rng(0), min_steps=25)
    assert [values.tolist() for values in result["returns"]] == [[10] * 3, [10] * 3, [40], [20] * 2]
    assert result["steps"] == 30 + 30 + 40 + 40
    assert sum(seed is not None for _, seed in played) == 4 and len(played) == 3 + 3 + 1 + 2      # a seed per pair
    result = iqn.play_games(args, Clock(), nets, pairs, np.random.default_rng(0), min_episodes=2, frames=True)
    assert [len(values) for values in result["returns"]] == [2, 2, 2, 2] and len(result["frames"]) == 10


def test_a_parameter_that_is_not_finite_stops_the_run(tmp_path):
    folder = iqn.train(small(runs_dir=tmp_path))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    key = next(key for key in state["learners"] if key.endswith("weight"))
    state["learners"][key].view(-1)[0] = float("nan")
    torch.save(state, folder / "checkpoint.pt")
    before, steps = (folder / "checkpoint.pt").read_bytes(), str(2 * state["global_step"])
    with pytest.raises(iqn.Failure, match=r"is not finite at step [\d,]+"):
        iqn.train(iqn.read_args(iqn.Args, ["--resume", str(folder), "--total-timesteps", steps]))
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_evaluating_more_often_changes_no_training_number(tmp_path):
    often, seldom = (iqn.train(small(runs_dir=tmp_path / str(every), eval_every=every, eval_episodes=1 + (every == 1)))
                     for every in (1, 10**6))
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (often, seldom)]
    assert all(torch.equal(value, states[1]["learners"][key]) for key, value in states[0]["learners"].items())
    assert len(column(often, "mean_return")) == 3 and len(column(seldom, "mean_return")) == 1


def test_a_checkpoint_without_replay_is_small_and_resumes(tmp_path, capsys):
    folder = iqn.train(small(runs_dir=tmp_path, save_replay=False, total_timesteps=160))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["replay"] == {}
    settings = SMALL | dict(total_timesteps=320, save_replay=False, resume=folder)
    assert iqn.train(iqn.Args(**settings)) == folder
    assert "with an empty replay" in capsys.readouterr().out and len(column(folder, "mean_return")) == 2


def test_every_policy_sees_and_stores_its_own_pictures(monkeypatch, tmp_path):
    """Also: a cut episode is no terminal one, and the settings reach sampling and optimizer."""
    shown, stored, acted, settings = {}, [], [], []
    step, add, act = iqn.Arcade.step, iqn.FrameReplay.add, iqn.greedy_actions
    sample, update, reset = iqn.FrameReplay.sample, iqn.iqn_update, iqn.Arcade.reset

    def watched_step(arcade, pairs, actions):
        result = step(arcade, pairs, actions)
        shown.update({pair: obs.copy() for pair, obs in zip(pairs, result[0])})
        return result

    def watched_reset(arcade, pair, seed=None):
        obs = reset(arcade, pair, seed)
        shown[pair] = obs.copy()
        return obs

    def watched_add(replay, action, reward, terminated, next_obs):
        stored.append((len(stored) % 2, bool(terminated), next_obs.copy(), dict(shown)))
        add(replay, action, reward, terminated, next_obs)

    def watched_act(net, obs, games, num_quantiles, generator=None):
        if generator is None:
            acted.append((games[0], num_quantiles, np.array_equal(obs[0].numpy(), shown[games[0], games[0]])))
        return act(net, obs, games, num_quantiles, generator)

    def watched_update(args, online, target, optimizer, batch, game):
        settings.append((optimizer.defaults["lr"], optimizer.defaults["eps"]))
        return update(args, online, target, optimizer, batch, game)

    monkeypatch.setattr(iqn.Arcade, "step", watched_step)
    monkeypatch.setattr(iqn.Arcade, "reset", watched_reset)
    monkeypatch.setattr(iqn.FrameReplay, "add", watched_add)
    monkeypatch.setattr(iqn, "greedy_actions", watched_act)
    monkeypatch.setattr(iqn, "iqn_update", watched_update)
    monkeypatch.setattr(iqn.FrameReplay, "sample", lambda self, rng, batch, n, gamma: (
        settings.append((batch, n, gamma)), sample(self, rng, batch, n, gamma))[1])
    iqn.train(small(runs_dir=tmp_path, method="ppt", total_timesteps=160, epsilon=0.25, epsilon_period=1, n_step=2,
                    lr=1e-3, gamma=0.9))
    for policy, terminated, obs, at_that_time in stored:
        assert np.array_equal(obs, at_that_time[policy, policy]) and not terminated
    assert 80 < len(acted) < 125                                               # 0.75 of 60 steps by two policies
    assert {(game, number) for game, number, _ in acted} == {(0, 5), (1, 5)} and all(right for *_, right in acted)
    assert set(settings) == {(1e-3, 3.125e-4), (4, 2, 0.9)}


def test_a_resumed_run_has_all_that_was_saved(tmp_path, capsys):
    folder = iqn.train(small(runs_dir=tmp_path, total_timesteps=160, target_period=8))
    assert "nothing to train" not in capsys.readouterr().out
    before = torch.load(folder / "checkpoint.pt", weights_only=True)
    iqn.train(iqn.Args(**SMALL | dict(total_timesteps=160, target_period=8, resume=folder)))
    assert "nothing to train: 160 steps are done" in capsys.readouterr().out
    after = torch.load(folder / "checkpoint.pt", weights_only=True)

    def same(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
        return all(map(same, x, y)) if isinstance(x, (list, tuple)) else x == y
    for key in ("learners", "targets", "optimizers", "steps_in", "eval_steps", "assignment", "history", "global_step"):
        assert same(before[key], after[key]), key
    for pair, saved in before["replay"].items():
        for old, new in zip(saved["arrays"], after["replay"][pair]["arrays"]):
            assert torch.equal(old, new[:len(old)])                            # a new episode may have begun
        assert saved["num_steps"] == after["replay"][pair]["num_steps"]
    assert before["learners"].keys() and before["optimizers"][0]["state"] and len(before["replay"]) >= 2


def test_each_policys_target_is_a_copy_of_itself(tmp_path):
    folder = iqn.train(small(runs_dir=tmp_path, method="ppt", total_timesteps=160, learning_starts=5, target_period=4))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(value, state["targets"][key]) for key, value in state["learners"].items())
    assert not torch.equal(state["learners"]["0.dense.weight"], state["learners"]["1.dense.weight"])


def test_games_without_a_human_score_are_drawn_too(tmp_path):
    folder = iqn.train(small(runs_dir=tmp_path, games=("Assault", "Pong"), total_timesteps=160))
    assert (folder / "assignment.png").exists() and (folder / "games.png").exists()
    assert math.isfinite(column(folder, "mean_normalised")[0]) and column(folder, "Pong/success") == [0]
