"""Multi-task A2C: cheetahs against the table and Gymnasium, returns and losses by hand, heads, fine-tuning, runs."""
import copy
import shutil

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import multitask_a2c as a2c

SMALL = dict(tasks=("SmallFoot", "BigLeg", "BigTorso"), num_envs=2, total_timesteps=600, eval_every=300,
             eval_episodes=1, checkpoint_every=10**9, hidden_size=8)
CPU = torch.device("cpu")


def rows_of(folder):
    return [line.split(",")[:1] + line.split(",")[2:] for line in (folder / "metrics.csv").read_text().splitlines()]


# --- cheetahs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant, masses", [
    ("SmallFoot", (6.8067, 1.6809, 1.7288, 0.5033, 1.5661, 1.3078, 0.4064)),
    ("BigFoot", (5.5078, 1.3602, 1.3989, 1.8853, 1.2673, 1.0582, 1.5224)),
    ("SmallLeg", (7.0635, 1.7444, 0.7568, 1.2379, 1.6252, 0.5725, 0.9996)),
    ("SmallThigh", (7.1278, 0.7426, 1.8103, 1.2492, 0.6919, 1.3694, 1.0087)),
    ("SmallTorso", (4.8995, 1.8125, 1.8641, 1.2863, 1.6887, 1.4101, 1.0387)),
    ("BigTorso", (7.5141, 1.2918, 1.3286, 0.9168, 1.2035, 1.0050, 0.7403)),
    ("BigHead", (7.0061, 1.3930, 1.4326, 0.9886, 1.2978, 1.0837, 0.7982)),
    ("BigThigh", (5.1956, 2.5060, 1.3196, 0.9106, 2.3348, 0.9982, 0.7353))])
def test_masses_are_those_of_the_table(variant, masses):
    model = a2c.cheetah_model(variant)
    assert model.body_mass[1:] == pytest.approx(masses, abs=6e-5) and model.body_mass.sum() == pytest.approx(14)


def test_only_the_named_sizes_change():
    base = mujoco.MjModel.from_xml_path(gym.__path__[0] + "/envs/mujoco/assets/half_cheetah.xml")
    assert len(a2c.VARIANTS) == 10 and set(a2c.PAPER) < set(a2c.VARIANTS)
    for variant in a2c.VARIANTS:
        model, part = a2c.cheetah_model(variant), variant[5:] if variant.startswith("Small") else variant[3:]
        for geom in range(base.ngeom):
            factor = 0.75 if variant.startswith("Small") else 1.25
            scaled = base.geom(geom).name in a2c.PARTS[part]
            expected = base.geom_size[geom] * (factor if scaled else 1)
            if scaled and part == "Torso":
                expected[1] = 0.5                                              # its length is given by two ends
            assert model.geom_size[geom] == pytest.approx(expected) and np.allclose(model.geom_pos, base.geom_pos)
        assert np.allclose(model.jnt_pos, base.jnt_pos) and np.allclose(model.body_pos, base.body_pos)


def test_the_pool_is_gymnasiums_cheetah(tmp_path):
    path = tmp_path / "SmallFoot.xml"
    text = open(gym.__path__[0] + "/envs/mujoco/assets/half_cheetah.xml").read()
    path.write_text(text.replace('size="0.046 .094"', 'size="0.0345 .0705"').replace('size="0.046 .07"',
                                                                                     'size="0.0345 .0525"'))
    stock = gym.make("HalfCheetah-v5", xml_file=str(path)).unwrapped
    pool = a2c.CheetahPool(["BigLeg", "SmallFoot"], 2, 0)
    stock.reset(seed=0)
    stock.set_state(pool.state[1, 1, 1:10], pool.state[1, 1, 10:])
    generator = np.random.default_rng(0)
    for _ in range(30):
        actions = generator.uniform(-1.5, 1.5, (2, 2, 6))                      # beyond the limit the cost still grows
        obs, reward, *_ = stock.step(actions[1, 1])
        ours, rewards, ended = pool.step([0, 1], actions)
        assert ours[1, 1] == pytest.approx(obs, abs=1e-5) and rewards[1, 1] == pytest.approx(reward, abs=1e-5)
        assert not ended.any() and ours.shape == (2, 2, 17)
    assert ours.dtype == np.float32 and np.array_equal(pool.observe([1, 0])[0], ours[1])


def test_pool_resets_returns_and_tasks_apart(monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 4)
    pool, zeros = a2c.CheetahPool(["SmallFoot", "BigLeg"], 300, 3), np.zeros((1, 300, 6))
    assert np.abs(pool.state[..., 1:10]).max() <= 0.1 and pool.state[0, :, 10:].std() == pytest.approx(0.1, rel=0.05)
    earned, other = np.zeros(300), pool.state[0].copy()
    for t in range(1, 5):
        _, rewards, ended = pool.step([1], zeros)
        earned += rewards[0]
        assert ended.tolist() == [t == 4]
    assert pool.returns[1] == pytest.approx(earned, abs=1e-4) and np.array_equal(pool.state[0], other)
    saved = pool.get_state()
    pool.reset(1)
    assert pool.steps.tolist() == [0, 0] and (pool.returns == 0).all() and np.abs(pool.state[1, :, 1:10]).max() <= 0.1
    after = pool.state.copy()
    pool.set_state(saved)
    pool.reset(1)
    assert np.array_equal(after, pool.state)                                   # generator included
    assert pool.render(0).shape == (160, 160, 3)


# --- the method ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("terminated, truncated, expected", [
    (None, None, (5.536, 5.04, 5.6)), (1, None, (1.0, 0.0, 5.6)), (None, 1, (3.43, 2.7, 5.6))])
def test_n_step_returns_by_hand(terminated, truncated, expected):
    rewards, terminations, truncations, final_values = torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, 0, 0], [0, 3, 0]])
    if terminated is not None:
        terminations[terminated] = 1
    if truncated is not None:
        truncations[truncated] = 1
    returns = a2c.n_step_returns(rewards, terminations, truncations, final_values, torch.tensor(4.0), 0.9)
    assert returns.tolist() == pytest.approx(expected)


def test_losses_by_hand_and_against_torch_distributions():
    values, log_prob = torch.tensor([[1.0, 3.0]], requires_grad=True), torch.tensor([[-2.0, -1.0]], requires_grad=True)
    losses = a2c.a2c_losses(torch.tensor([[3.0, 2.0]]), values, log_prob, torch.tensor([[4.0, 6.0]]), 0.5, 0.01)
    assert losses["value"].tolist() == [0.5 * (4 + 1) / 2] and losses["policy"].tolist() == [-(2 * -2 + -1 * -1) / 2]
    assert losses["entropy"].tolist() == [pytest.approx(-0.05)]
    losses["policy"].backward()
    assert values.grad is None and log_prob.grad.tolist() == [[-1.0, 0.5]]     # the advantage is a constant
    mean, log_std, actions = torch.randn(3, 5, 4, 6).unbind(0)
    normal = Normal(mean, log_std.exp())
    torch.testing.assert_close(a2c.gaussian_log_prob(actions, mean, log_std), normal.log_prob(actions).sum(-1),
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a2c.gaussian_entropy(log_std), normal.entropy().sum(-1))


def test_observation_filter_by_hand():
    layer = a2c.ObservationFilter(2, 1)
    layer.update(torch.tensor([[[1.0], [3.0]]]), [1])                          # task 1 alone
    count, total, squares = 2.01, 4.0, 10.01
    mean, std = total / count, (squares / count - (total / count) ** 2) ** 0.5
    seen = layer(torch.tensor([[[2.5], [99.0]]]), [1])
    assert seen.flatten().tolist() == pytest.approx([(2.5 - mean) / std, 5.0], rel=1e-5)
    assert layer(torch.tensor([[[0.5]]]), [0]).item() == pytest.approx(0.5)    # 1e-2 / 1e-2: deviation 1
    layer.update(torch.full((1, 1000, 1), 7.0), [0])
    assert layer(torch.tensor([[[7.2]]]), [0]).item() < 5                      # variance is at least 1e-2


def test_reward_scale_divides_by_the_deviation_of_discounted_returns():
    scale = a2c.RewardScale(2, 400, 0.9)
    rewards = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (100, 1, 400)).astype(np.float32))
    scaled = scale(rewards, torch.zeros_like(rewards), [1])
    deviation = 3 * (1 / (1 - 0.81)) ** 0.5                                    # of sum 0.9^k r_k
    assert (rewards[-1] / scaled[-1]).mean() == pytest.approx(deviation, rel=0.1) and scale.running[0].abs().max() == 0
    scale(rewards[:1], torch.ones_like(rewards[:1]), [1])
    assert scale.running.abs().max() == 0                                      # an episode's end starts anew
    assert a2c.RewardScale(1, 2, 0.9)(torch.full((1, 1, 2), 1e3), torch.zeros(1, 1, 2), [0]).max() <= 10


@pytest.mark.parametrize("shared, policy, value", [(None, 2 * 7, 2 * 6), ("paper", 4 + 2 * 3, 2 + 2 * 4),
                                                   ("first-layer", 2 + 2 * 5, 2 + 2 * 4)])
def test_what_is_shared(shared, policy, value):
    nets = a2c.ActorCritic(2, 8, "parameter", shared)
    assert len(list(nets.policy.parameters())) == policy and len(list(nets.value.parameters())) == value
    both = {id(p) for p in nets.parameters_of(0)} & {id(p) for p in nets.parameters_of(1)}
    assert len(both) == {None: 0, "paper": 6, "first-layer": 4}[shared]
    assert len(nets.parameters_of(1)) == 13


def test_initial_weights_and_outputs():
    torch.manual_seed(0)
    nets = a2c.ActorCritic(2, 64, "parameter", None)
    weight = nets.policy.net.layers[1]["weights"][1]
    assert torch.allclose(weight.norm(dim=0), torch.ones(64)) and nets.policy.log_std[0].abs().max() == 0
    assert torch.allclose(nets.policy.net.layers[2]["weights"][0].norm(dim=0), torch.full((6,), 0.01))
    x = torch.randn(2, 5, 17)
    mean, log_std, values = nets(x, [0, 1])
    for task in range(2):                                                      # an ordinary network says the same
        hidden = nets.filter(x, [0, 1])[task]
        for layer in range(3):
            weight, bias = nets.value.own(layer, task)
            hidden = hidden @ weight + bias
            hidden = hidden.tanh() if layer < 2 else hidden
        torch.testing.assert_close(values[task], hidden[:, 0])
    torch.testing.assert_close(nets(x[1:], [1])[0], mean[1:])
    assert mean.shape == log_std.shape == (2, 5, 6) and a2c.ActorCritic(1, 8, "network", None)(x[:1], [0])[1].std() > 0


def one_update(nets, optimizer, tasks, args, seed=0):
    torch.manual_seed(seed)
    pool = a2c.CheetahPool(["SmallFoot", "BigLeg", "BigTorso"], 2, seed)
    rollout, _ = a2c.collect(pool, nets, tasks, 5, CPU)
    return a2c.a2c_update(args, nets, optimizer, rollout, tasks, None)


def test_an_update_of_one_task_leaves_the_other_heads_and_their_memory_alone():
    args = a2c.Args(**SMALL)
    nets = a2c.ActorCritic(3, 8, "parameter", "paper")
    optimizer = torch.optim.RMSprop(nets.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)
    for task in range(3):
        one_update(nets, optimizer, [task], args)
    before = [p.detach().clone() for p in nets.parameters()]
    memory = {id(p): optimizer.state[p]["square_avg"].clone() for p in nets.parameters()}
    one_update(nets, optimizer, [1], args, seed=1)
    used = {id(p) for p in nets.parameters_of(1)}
    for param, old in zip(nets.parameters(), before):
        assert torch.equal(param, old) == (id(param) not in used)
        assert torch.equal(optimizer.state[param]["square_avg"], memory[id(param)]) == (id(param) not in used)


def test_networks_that_share_nothing_learn_side_by_side_as_they_would_alone(monkeypatch):
    args, results = a2c.Args(**SMALL | dict(max_grad_norm=0.05)), []
    for groups in ([[0, 1, 2]], [[0], [1], [2]]):
        torch.manual_seed(0)
        nets = a2c.ActorCritic(3, 8, "parameter", None)
        optimizer = torch.optim.RMSprop(nets.parameters(), lr=1e-2, alpha=0.99, eps=1e-5)
        monkeypatch.setattr(torch, "randn", torch.ones)                        # the same actions, whoever asks first
        pool = a2c.CheetahPool(["SmallFoot", "BigLeg", "BigTorso"], 2, 0)
        for _ in range(3):
            for tasks in groups:
                rollout, _ = a2c.collect(pool, nets, tasks, 5, CPU)
                losses = a2c.a2c_update(args, nets, optimizer, rollout, tasks, None)
                assert losses["value"].shape == (len(tasks),)
        results.append([p.detach() for p in nets.parameters()])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_policy_and_critic_together_is_clipped(monkeypatch):
    calls, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, limit: calls.append((len(params), limit)) or
                        clip(params, limit))
    nets = a2c.ActorCritic(3, 8, "parameter", None)
    one_update(nets, torch.optim.RMSprop(nets.parameters(), lr=1e-3), [0, 1, 2], a2c.Args(**SMALL))
    assert calls == [(13, 0.5)] * 3
    for task in range(3):
        assert torch.cat([p.grad.flatten() for p in nets.parameters_of(task)]).norm() <= 0.5 + 1e-5


def test_an_update_keeps_returns_with_their_states_and_bootstraps_time_limits():
    args, nets = a2c.Args(**SMALL), a2c.ActorCritic(1, 8, "parameter", None)
    obs, actions, rewards = torch.randn(2, 1, 3, 17), torch.randn(2, 1, 3, 6), torch.randn(2, 1, 3)
    final, last, cut = torch.full((2, 1, 3), 7.0), torch.full((1, 3), 5.0), torch.zeros(2, 1, 3)
    cut[0] = 1                                                                 # the first step ended an episode
    probe, value, policy = copy.deepcopy(nets), 0.0, 0.0
    probe.filter.update(obs.reshape(1, 6, 17), [0])
    for step in range(2):
        for env in range(3):
            mean, log_std, v = probe(obs[step, :, env:env + 1], [0])
            advantage = (rewards[step, 0, env] + 0.99 * (7.0 if step == 0 else 5.0) - v[0, 0]).item()
            value += 0.5 * advantage ** 2 / 6
            policy -= advantage * Normal(mean, log_std.exp()).log_prob(actions[step, :, env:env + 1]).sum().item() / 6
    rollout = obs, actions, rewards, cut, final, last
    twin = copy.deepcopy(nets)
    out = a2c.a2c_update(args, nets, torch.optim.RMSprop(nets.parameters()), rollout, [0])
    assert out["value"].item() == pytest.approx(value, rel=1e-4)
    assert out["policy"].item() == pytest.approx(policy, rel=1e-4)
    doubled = [a2c.a2c_update(args, copy.deepcopy(twin), torch.optim.RMSprop(nets.parameters()), given, [0], scale)
               for given, scale in (((obs, actions, 2 * rewards, *rollout[3:]), None),
                                    (rollout, lambda rewards, truncations, tasks: 2 * rewards))]
    assert doubled[0]["value"] == doubled[1]["value"] != out["value"]


@pytest.mark.parametrize("ends", [False, True])
def test_the_update_descends_the_papers_loss(ends):
    settings = dict(max_grad_norm=0.0, value_coef=0.3, entropy_coef=0.2, gamma=0.9, timeout_is_terminal=ends)
    args, nets = a2c.Args(**SMALL | settings), a2c.ActorCritic(1, 8, "parameter", None)
    obs, actions, rewards = torch.randn(1, 1, 4, 17), torch.randn(1, 1, 4, 6), torch.randn(1, 1, 4)
    cut, final, last = torch.tensor([[[0.0, 1, 0, 1]]]), torch.randn(1, 1, 4), torch.randn(1, 4)
    following = torch.where(cut[0] > 0, final[0] * (not ends), last)   # of an episode that the time limit has cut
    probe = copy.deepcopy(nets)
    probe.filter.update(obs[0], [0])
    mean, log_std, values = probe(obs[0], [0])
    normal, advantage = Normal(mean, log_std.exp()), rewards[0] + 0.9 * following - values
    loss = (0.3 * advantage.square() - advantage.detach() * normal.log_prob(actions[0]).sum(-1)
            - 0.2 * normal.entropy().sum(-1)).mean()
    loss.backward()
    before = [param.detach().clone() for param in nets.parameters()]
    a2c.a2c_update(args, nets, torch.optim.SGD(nets.parameters(), lr=1.0), (obs, actions, rewards, cut, final, last),
                   [0])
    for old, new, param in zip(before, nets.parameters(), probe.parameters()):
        torch.testing.assert_close(old - new, param.grad, atol=2e-6, rtol=1e-4)


def test_actions_are_those_of_the_filtered_policy_with_its_deviation(monkeypatch):
    nets, pool = a2c.ActorCritic(2, 8, "parameter", None), a2c.CheetahPool(["SmallFoot", "BigLeg"], 3, 0)
    nets.filter.update(torch.randn(2, 50, 17) * 3 + 1, [0, 1])
    for layer, log_std in zip(nets.policy.net.layers[2]["weights"], nets.policy.log_std):
        layer.data.normal_(), log_std.data.fill_(-1.0)
    monkeypatch.setattr(torch, "randn", torch.ones)
    start = torch.from_numpy(pool.observe([0, 1]))
    (_, actions, *_), _ = a2c.collect(pool, nets, [0, 1], 1, CPU)
    mean = nets.policy(nets.filter(start, [0, 1]), [0, 1])[0]
    torch.testing.assert_close(actions[0], mean + np.exp(-1), atol=1e-5, rtol=1e-5)
    assert (mean - nets.policy(start, [0, 1])[0]).abs().max() > 0.1


@pytest.mark.parametrize("method, turns", [("vanilla", [[0], [1], [2]] * 2), ("scratch", [[0, 1, 2]] * 2)])
def test_whose_turn_it_is(method, turns, tmp_path, monkeypatch):
    seen, collect = [], a2c.collect
    monkeypatch.setattr(a2c, "HORIZON", 50)
    monkeypatch.setattr(a2c, "collect", lambda pool, nets, tasks, *a: seen.append(tasks) or collect(pool, nets, tasks,
                                                                                                    *a))
    a2c.train(a2c.Args(**SMALL | dict(method=method, total_timesteps=60, runs_dir=tmp_path)))
    assert seen == turns


def test_evaluating_more_often_changes_no_training_number_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 50)
    runs = [a2c.load_checkpoint(a2c.train(a2c.Args(**SMALL | dict(eval_every=every, runs_dir=tmp_path / str(every)))))
            for every in (300, 60)]
    assert all(torch.equal(value, runs[1]["learners"][name]) for name, value in runs[0]["learners"].items())
    assert torch.equal(runs[0]["torch"], runs[1]["torch"])
    rows = [len(next(tmp_path.glob(f"{every}/*/metrics.csv")).read_text().splitlines()) for every in (300, 60)]
    assert rows[1] > rows[0] + 3


def test_time_upside_down_is_counted_per_cheetah(monkeypatch, capsys):
    reset = a2c.CheetahPool.reset

    def thrown(pool, task):
        reset(pool, task)
        pool.state[task, 1, 3] = np.pi * task                          # the second copy of the second task

    monkeypatch.setattr(a2c, "HORIZON", 20)
    monkeypatch.setattr(a2c.CheetahPool, "reset", thrown)
    evaluation = a2c.evaluate_cheetahs(lambda obs: torch.zeros(2, 3, 6), ["SmallFoot", "BigLeg"], 3, 1)
    assert evaluation["upside_down"] == pytest.approx(np.array([[0, 0, 0], [0, 1, 0]]))
    a2c.print_gaits(["SmallFoot", "BigLeg"], evaluation)
    assert capsys.readouterr().out == "share of steps upside down: SmallFoot 0.00  BigLeg 0.33\n"
    made_up = {"returns": np.array([[1.0, 3.0, 8.0]]), "upside_down": np.array([[0.5, 0.25, 0.0]])}
    assert a2c.over_episodes(["A"], made_up) == pytest.approx({"A/median": 3, "A/std": np.sqrt(26 / 3),
                                                               "A/upside_down": 0.25})


def test_rmsprop_and_reward_scale_reach_the_run(tmp_path, monkeypatch):
    made, rmsprop = [], torch.optim.RMSprop
    monkeypatch.setattr(a2c, "HORIZON", 50)
    monkeypatch.setattr(torch.optim, "RMSprop", lambda params, **kw: made.append(kw) or rmsprop(params, **kw))
    folder = a2c.train(a2c.Args(**SMALL | dict(norm_reward=True, lr=1e-3, runs_dir=tmp_path)))
    assert made == [dict(lr=1e-3, alpha=0.99, eps=1e-5)]
    assert (a2c.load_checkpoint(folder)["scale"][1][:, 0] > 100).all()         # counted every reward


def test_a_rollout_bootstraps_from_the_last_observation_of_an_episode(monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 3)
    pool, nets = a2c.CheetahPool(["SmallFoot", "BigLeg"], 2, 0), a2c.ActorCritic(2, 8, "parameter", None)
    pool.step([1], np.zeros((1, 2, 6)))                                        # task 1 is a step ahead
    led_to, step = [], pool.step
    monkeypatch.setattr(pool, "step", lambda *a: led_to.append(step(*a)) or led_to[-1])
    (obs, actions, rewards, truncations, final_values, last), finished = a2c.collect(pool, nets, [0, 1], 5, CPU)
    assert truncations[..., 0].tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]]
    torch.testing.assert_close(final_values[2, 0], nets(torch.from_numpy(led_to[2][0]), [0, 1])[2][0])
    assert [task for task, _ in finished] == [1, 0, 1]
    assert finished[1][1] == pytest.approx(rewards[:3, 0].sum(0).numpy(), abs=1e-4)
    assert not np.allclose(obs[3, 0].numpy(), led_to[2][0][0], atol=1e-3)      # a new episode has begun
    torch.testing.assert_close(obs[2, 0], torch.from_numpy(led_to[1][0][0]))
    torch.testing.assert_close(last, nets(torch.from_numpy(pool.observe([0, 1])), [0, 1])[2])


# --- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [dict(), dict(method="scratch"), dict(share="first-layer"),
                                      dict(log_std="network"), dict(method="scratch", norm_reward=True)])
def test_every_variant_runs_and_resumes_exactly(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 50)                                    # episodes end within the run
    settings = SMALL | settings
    straight = a2c.train(a2c.Args(**settings, runs_dir=tmp_path / "straight"))
    torch.manual_seed(1)
    nets = a2c.ActorCritic(3, 8, settings.get("log_std", "parameter"),
                           None if settings.get("method") else settings.get("share", "paper"))
    for name, value in a2c.load_checkpoint(straight)["learners"].items():
        assert not torch.equal(value, nets.state_dict()[name]), name
    folder = a2c.train(a2c.Args(**settings | dict(total_timesteps=300), runs_dir=tmp_path / "parts"))
    a2c.train(a2c.read_args(a2c.Args, ["--resume", str(folder), "--total-timesteps", "600"]))
    assert rows_of(folder) == rows_of(straight) and len(rows_of(folder)) == 3
    assert {"tasks.png", "curves.png"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["scratch", "vanilla"])
def test_fine_tuning_starts_from_all_that_the_source_task_had(method, tmp_path, monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 50)
    source = a2c.train(a2c.Args(**SMALL | dict(method=method, runs_dir=tmp_path)))
    args = a2c.Args(**SMALL | dict(method="finetune", tasks=("SmallThigh",), finetune_from=source, source_task="BigLeg",
                                   hidden_size=99))
    nets, name = a2c.take_task(args)
    theirs, _ = a2c.load_actor_critic(source)
    assert name == "BigLeg" and args.hidden_size == 8
    assert all(torch.equal(a, b) for a, b in zip(nets.parameters_of(0), theirs.parameters_of(1)))
    obs = torch.randn(1, 5, 17)
    assert all(torch.equal(a, b) for a, b in zip(nets(obs, [0]), theirs(obs, [1])))            # filter included


@pytest.mark.parametrize("layers, trained", [("code", {"policy.net.layers.1", "policy.net.layers.2", "policy.log_std",
                                                       "value.layers.2"}),
                                             ("paper", {"policy.net.layers.2", "policy.log_std", "value.layers.2"})])
def test_fine_tuning_moves_the_last_layers_only_and_watches_the_source(layers, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 50)
    source = a2c.train(a2c.Args(**SMALL | dict(method="scratch", runs_dir=tmp_path)))
    args = a2c.Args(**SMALL | dict(method="finetune", tasks=("SmallThigh",), finetune_from=source, source_task="BigLeg",
                                   finetune_layers=layers, runs_dir=tmp_path, total_timesteps=300))
    pools, pool = [], a2c.CheetahPool
    monkeypatch.setattr(a2c, "CheetahPool", lambda names, *a: pools.append(names) or pool(names, *a))
    folder = a2c.train(args)
    assert pools[0] == ["SmallThigh"] and pools[1:] == [["SmallThigh", "BigLeg"]] * 3           # training; evaluations
    old, new = (a2c.load_checkpoint(run)["learners"] for run in (source, folder))
    for name, value in new.items():
        theirs = old[name.replace("weights.0", "weights.1").replace("biases.0", "biases.1").replace("std.0", "std.1")]
        moved = not torch.equal(value, theirs[1:2] if name.startswith("filter") else theirs)
        assert moved == (name.startswith("filter") or any(name.startswith(prefix) for prefix in trained)), name
    nets, _ = a2c.load_actor_critic(source)
    untouched = a2c.evaluate_cheetahs(lambda obs: nets(obs, [1, 1])[0], ["SmallThigh", "BigLeg"], 1, 1)["returns"]
    columns = dict(zip(*rows_of(folder)[:2]))
    assert float(columns["SmallThigh/before"]) == pytest.approx(untouched[0, 0], rel=1e-4)
    assert float(columns["BigLeg/before"]) == pytest.approx(untouched[1, 0], rel=1e-4)
    assert float(columns["BigLeg/return"]) != pytest.approx(untouched[1, 0], rel=1e-4)
    shutil.rmtree(source)                                                      # no longer needed
    a2c.train(a2c.read_args(a2c.Args, ["--resume", str(folder), "--total-timesteps", "600"]))
    assert rows_of(folder)[-1][0] == "600" and rows_of(folder)[-1][-2:] == rows_of(folder)[1][-2:]


def test_fine_tuning_is_drawn_beside_table_1(tmp_path, monkeypatch):
    monkeypatch.setattr(a2c, "HORIZON", 50)
    drawn, plot = [], a2c.plot_tasks
    monkeypatch.setattr(a2c, "plot_tasks", lambda *a: drawn.append(a[3]) or plot(*a))
    source = a2c.train(a2c.Args(**SMALL | dict(tasks=("SmallFoot",), method="scratch", runs_dir=tmp_path)))
    for target in ("SmallLeg", "BigLeg"):
        a2c.train(a2c.Args(**SMALL | dict(method="finetune", tasks=(target,), finetune_from=source, runs_dir=tmp_path)))
    assert drawn[0] is a2c.TABLE_2 and list(drawn[2]) == ["before fine-tuning"]        # the paper has no such pair
    assert set(drawn[2]["before fine-tuning"]) == {"BigLeg", "SmallFoot"}
    assert drawn[1]["paper, fine-tuned 5M"] == {"SmallFoot": 1500.76, "SmallLeg": 1568.66}


def test_the_papers_settings_are_the_defaults():
    args = a2c.Args()
    assert args.tasks == ("SmallFoot", "BigFoot", "SmallLeg", "SmallThigh", "SmallTorso", "BigTorso")
    assert (args.num_envs, args.num_steps, args.hidden_size, args.lr, args.gamma) == (16, 5, 64, 7e-4, 0.99)
    assert (args.value_coef, args.entropy_coef, args.max_grad_norm, args.eval_episodes) == (0.5, 0.01, 0.5, 20)
    assert args.lr == 7e-4 and not args.timeout_is_terminal
    assert (args.total_timesteps, a2c.Args(method="scratch").total_timesteps) == (6_000_000, 18_000_000)
    assert a2c.HORIZON == 1_000 and sum(p.numel() for p in a2c.Policy(1, 64, (), "parameter").parameters()) == 5_708


@pytest.mark.slow
def test_a_cheetah_learns_to_run(tmp_path):
    folder = a2c.train(a2c.Args(method="scratch", tasks=("SmallTorso",), total_timesteps=400_000, runs_dir=tmp_path))
    header, *rows = rows_of(folder)
    assert float(rows[-1][header.index("mean_return")]) > 400                  # at random: -300
