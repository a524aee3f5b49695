"""Gradient surgery by hand and by its invariants, the joint SAC step, Meta-World's tasks, whole runs."""
from collections import Counter

import metaworld
import metaworld.policies
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import dgrad_arch_sac as dg
import pcgrad_sac as pc
import qmp_sac

both_scripts = pytest.mark.parametrize("script", [pc, dg])                     # what each has a text of its own of

SMALL = dict(tasks=("reach", "drawer-close", "window-close"), total_timesteps=600, horizon=30, learning_starts=50,
             hidden_sizes=(16, 16), batch_size=8, eval_every=300, eval_episodes=1, checkpoint_every=300)


def learners_and_batch(method="sac", num_tasks=3, seed=0, **settings):
    """Small learners after a seed, with one random batch of 12 transitions per task."""
    args = pc.Args(**SMALL | dict(method=method) | settings)
    torch.manual_seed(seed)
    learners = pc.make_learners(args, num_tasks, 5, 2)
    batch = [torch.randn(num_tasks, 12, 5), torch.rand(num_tasks, 12, 2) * 2 - 1, torch.randn(num_tasks, 12) * 3,
             torch.randn(num_tasks, 12, 5), (torch.rand(num_tasks, 12) < 0.3).float()]
    return learners, learners.make_optimizers(1e-2, 1e-2), batch


def step(learners, optimizers, batch, split=False, orders=None, max_grad_norm=0.0, combine="mean", seed=1):
    torch.manual_seed(seed)
    return pc.joint_update(learners, optimizers, batch, 0.99, 0.005, max_grad_norm, split, lambda: orders, combine)


def distance(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters()))


# --- surgery ---------------------------------------------------------------------------------------------------------
def in_order(*order):
    return np.array([[j - 1 for j in order if j - 1 != i] for i in range(len(order))])


THREE = [[1, 0, 0], [-1, 1, 0], [0, -1, 1]]


@pytest.mark.parametrize("grads, order, projected", [
    ([[1, 0], [-1, 1]], (1, 2), [[0.5, 0.5], [0, 1]]),
    ([[1, 0], [-2, 2]], (1, 2), [[0.5, 0.5], [0, 2]]),                         # tells the paper's misprint apart
    (THREE, (1, 2, 3), [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [-0.5, -0.5, 1]]),
    (THREE, (3, 2, 1), [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, -0.5, 1]]),
    ([[1, 2], [-3, -6]], (1, 2), [[0, 0], [0, 0]]),                            # opposed
    ([[1, 2], [0, 0]], (1, 2), [[1, 2], [0, 0]]),                              # one without a gradient
    ([[1, 2], [2, 1]], (1, 2), [[1, 2], [2, 1]])])                             # no conflict
def test_projection_by_hand(grads, order, projected):
    result = pc.project_conflicts(torch.tensor(grads, dtype=torch.float64), in_order(*order))
    assert result.numpy() == pytest.approx(np.array(projected, float), abs=1e-6)


def test_projection_weights_and_wrong_shapes():
    grads = np.array(THREE, float)
    assert pc.conflict_weights(grads @ grads.T, in_order(1, 2, 3)) == pytest.approx(
        np.array([[1, 0.5, 0.25], [1, 1, 0.5], [0, 0.5, 1]]))
    with pytest.raises(ValueError, match="one row per task"):
        pc.project_conflicts(torch.zeros(3, 4), in_order(1, 2))
    assert pc.fixed_visit_order(3).tolist() == in_order(1, 2, 3).tolist() == [[1, 2], [0, 2], [0, 1]]


def test_random_orders_are_drawn_for_each_task_by_itself():
    rng, grads = np.random.default_rng(0), torch.tensor(THREE, dtype=torch.float64)
    orders = [pc.draw_visit_order(3, rng) for _ in range(2_000)]
    assert all(sorted([i, *row]) == [0, 1, 2] for order in orders for i, row in enumerate(order.tolist()))
    sums = Counter(tuple(pc.project_conflicts(grads, order).sum(0).numpy().round(6)) for order in orders)
    assert sums.keys() == {(0, 0.25, 1.75), (0, 0.5, 1.5), (0.5, 0.25, 1.75), (0.5, 0.5, 1.5)}
    assert all(count / 2_000 == pytest.approx(0.25, abs=0.05) for count in sums.values())


@pytest.mark.parametrize("num_tasks, size", [(2, 3), (3, 3), (5, 4), (10, 1_000)])
def test_invariants_of_surgery(num_tasks, size):
    rng = np.random.default_rng(size)
    for _ in range(30):
        grads, order = torch.from_numpy(rng.normal(size=(num_tasks, size))), pc.draw_visit_order(num_tasks, rng)
        projected = pc.project_conflicts(grads, order)
        direct = grads.clone()                                                 # Algorithm 1 on the vectors themselves
        for i, partners in enumerate(order):
            for j in partners:
                dot = direct[i] @ grads[j]
                direct[i] -= min(dot, 0) / grads[j].square().sum() * grads[j]
        torch.testing.assert_close(projected, direct)
        assert (projected.norm(dim=1) <= grads.norm(dim=1) + 1e-12).all()
        assert all(projected[i] @ grads[order[i, -1]] >= -1e-9 for i in range(num_tasks))
        assert (pc.conflict_weights((grads @ grads.T).numpy(), order).sum(0) >= 1 - 1e-12).all()
        scale, turn = grads.clone(), torch.linalg.qr(torch.from_numpy(rng.normal(size=(size, size))))[0]
        scale[0] *= 7
        torch.testing.assert_close(pc.project_conflicts(scale, order)[1:], projected[1:])  # direction is what counts
        torch.testing.assert_close(pc.project_conflicts(3 * grads, order), 3 * projected)
        torch.testing.assert_close(pc.project_conflicts(grads @ turn, order), projected @ turn)
        if num_tasks == 2 and grads[0] @ grads[1] < 0:
            assert abs(projected[0] @ grads[1]) < 1e-9 and abs(projected[1] @ grads[0]) < 1e-9


def test_conflict_summary_by_hand():
    grads = np.array([[1.0, 0], [-1, 1], [0, 2]])
    summary = pc.conflict_summary(grads @ grads.T, pc.conflict_weights(grads @ grads.T, in_order(1, 2, 3)))
    half = 0.5 ** 0.5
    assert summary["cosine"] == pytest.approx(np.array([[1, -half, 0], [-half, 1, half], [0, half, 1]]))
    assert summary["conflicts"] == pytest.approx(2 / 6)                        # pairs 1-2 and 2-1 of six
    # projected: (.5, .5), (0, 1), (0, 2): sum (.5, 3.5); without: (0, 3); weights .5 more for 2 and 1 more for 1
    assert summary["norm_ratio"] == pytest.approx(12.5 ** 0.5 / 3) and summary["weight"] == pytest.approx(4.5 / 3)
    assert summary["abs_cosine"] == pytest.approx(half * 4 / 6)
    assert summary["weights"].sum(0) == pytest.approx([2, 1.5, 1])             # of each task's gradient, 4.5 together


# --- the joint step --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["sac", "multihead"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_taking_gradients_one_by_one_changes_nothing(method, max_grad_norm):
    runs = [learners_and_batch(method) for _ in range(2)]
    for split, run in zip((False, True), runs):
        for _ in range(3):
            losses, statistics = step(*run, split=split, max_grad_norm=max_grad_norm)
    assert distance(runs[0][0], runs[1][0]) < 2e-5 and losses["critic"].shape == (3,)
    assert statistics["critic"][0].shape == statistics["actor"][1].shape == (3, 3)
    assert distance(runs[0][0], learners_and_batch(method)[0]) > 1e-3


def test_tasks_that_agree_completely_make_the_joint_step(monkeypatch):
    plain, draw = torch.randn_like, []

    def same_noise(like):                                                      # for every task
        return plain(like[:1]).expand_as(like).clone()
    monkeypatch.setattr(torch, "randn_like", same_noise)
    runs = [learners_and_batch() for _ in range(2)]
    for (learners, optimizers, batch), orders in zip(runs, (None, in_order(3, 1, 2))):
        batch = [field[:1].expand_as(field) for field in batch]
        _, statistics = step(learners, optimizers, batch, split=orders is not None, orders=orders)
        draw.append(statistics)
    assert distance(runs[0][0], runs[1][0]) < 2e-6
    assert pc.conflict_summary(*draw[1]["actor"])["cosine"] == pytest.approx(np.ones((3, 3)), abs=1e-4)


def test_surgery_changes_the_update_to_the_projected_mean():
    learners, optimizers, batch = learners_and_batch()
    learners.log_alpha.data = torch.tensor([-2.0, 0.0, 1.0])                   # temperatures of their own
    before = [param.detach().clone() for param in learners.qf1.parameters()]
    for optimizer in optimizers.values():                                      # plain gradient descent shows gradients
        optimizer.__class__ = torch.optim.SGD
    optimizers["critic"] = torch.optim.SGD([*learners.qf1.parameters(), *learners.qf2.parameters()], lr=1.0)
    optimizers["actor"] = torch.optim.SGD(learners.actor.parameters(), lr=1.0)
    optimizers["alpha"] = torch.optim.SGD([learners.log_alpha], lr=1.0)
    twin, _, _ = learners_and_batch()
    twin.load_state_dict(learners.state_dict())
    torch.manual_seed(1)
    obs, actions, rewards, next_obs, ends = batch
    with torch.no_grad():
        mean, log_std = twin.actor(next_obs)
        next_actions, log_prob = pc.squash(mean, log_std, torch.randn_like(mean))
        q = torch.min(twin.qf1_target(next_obs, next_actions), twin.qf2_target(next_obs, next_actions))
        target = rewards + 0.99 * (1 - ends) * (q - torch.tensor([-2.0, 0.0, 1.0]).exp()[:, None] * log_prob)
    both, rows = [*twin.qf1.parameters(), *twin.qf2.parameters()], []
    for task in range(3):                                                      # each task's gradient, by itself
        loss = sum(((qf(obs, actions) - target)[task] ** 2).mean() for qf in (twin.qf1, twin.qf2))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, both)]))
    projected = pc.project_conflicts(torch.stack(rows), in_order(2, 3, 1))     # one vector of both critics
    assert not torch.allclose(projected, torch.stack(rows), atol=1e-3)
    for combine, factor in (("mean", 1), ("sum", 3)):
        learners.load_state_dict(twin.state_dict())
        step(learners, optimizers, batch, split=True, orders=in_order(2, 3, 1), combine=combine)
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, learners.qf1.parameters())])
        torch.testing.assert_close(moved, factor * projected.mean(0)[:len(moved)], atol=1e-4, rtol=1e-4)


def test_each_optimizer_has_its_own_step_size():
    learners, _, _ = learners_and_batch()
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in learners.make_optimizers(0.1, 0.2).items()}
    assert rates == {"actor": 0.1, "critic": 0.2, "alpha": 0.2}


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("layer", [0, 2])                             # of the trunk, of the heads
def test_a_frozen_layer_stays_and_the_others_learn(frozen, layer):
    learners, optimizers, batch = learners_and_batch("multihead")
    nets = [learners.actor.net, learners.qf1.net, learners.qf2.net]
    for net in nets:
        net.weights[layer].requires_grad_(not frozen)
    before = [[weight.clone() for weight in net.weights] for net in nets]
    for split in (True, False, True):                                  # the critics pass gradients on in between
        step(learners, optimizers, batch, split=split, orders=in_order(1, 2, 3), max_grad_norm=1.0)
    for net, weights in zip(nets, before):
        stays = [torch.equal(*pair) for pair in zip(weights, net.weights)]
        assert stays == [bool(frozen) and i == layer for i in range(3)]


def test_one_task_is_the_single_task_sac_of_the_sister_script():
    learners, optimizers, batch = learners_and_batch(num_tasks=1)
    args = qmp_sac.Args(method="separated", tasks=(0,), hidden_size=16)
    torch.manual_seed(0)
    sister = qmp_sac.Learners(args, 1, 5, 2)
    sister.load_state_dict(learners.state_dict())
    sister_optimizers = sister.make_optimizers(1e-2)
    for seed in range(3):
        step(learners, optimizers, batch, seed=seed)
        torch.manual_seed(seed)
        qmp_sac.update(args, sister, sister_optimizers, batch)
    for name, value in sister.state_dict().items():
        torch.testing.assert_close(learners.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_heads_learn_from_their_own_task_only():
    results = []
    for extra in (0.0, 40.0):
        learners, optimizers, batch = learners_and_batch("multihead")
        batch[2][1] += extra                                                   # another reward for task 1 alone
        step(learners, optimizers, batch, split=True, orders=in_order(1, 2, 3))
        results.append(learners.qf1.net)
    changed = [(one != other).flatten(1).any(1).tolist() for one, other in zip(results[0].weights, results[1].weights)]
    assert changed == [[True], [True], [False, True, False]]


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(monkeypatch):
    learners, optimizers, batch = learners_and_batch()
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, limit: norms.append(
        (len(params), clip(params, limit).item(), clip(params, 1e9).item(), limit)))
    step(learners, optimizers, batch, max_grad_norm=0.2)
    assert [count for count, *_ in norms] == [12, 6]                           # both critics together, then the policy
    assert norms[0][1] > 0.2 and norms[0][2] == pytest.approx(0.2, rel=1e-3)


# --- Meta-World ------------------------------------------------------------------------------------------------------
def test_the_families_are_meta_worlds():
    for ours, theirs in ((pc.MT10, metaworld.env_dict.MT10_V3), (pc.MT50, metaworld.env_dict.MT50_V3)):
        assert [f"{name}-v3" for name in ours] == list(theirs)
    assert pc.Args().tasks == ("reach", "drawer-close", "button-press-topdown", "window-close")
    assert set(pc.FAMILIES["mt3"]) < set(pc.MT10)


def metaworld_env(name="reach", num_goals=50, seed=1, reward_version="v2"):
    return pc.MetaWorldEnv(name, np.array([0.0, 1.0]), seed, num_goals, reward_version)


def test_goals_seeds_and_one_hot():
    env = metaworld_env()
    check_env(env, skip_render_check=True)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(30)])
    goals = {tuple(goal) for goal in starts[:, 36:39].round(4)}
    assert 18 < len(goals) <= 30 and (starts[:, 39:] == [0, 1]).all() and starts.dtype == np.float32
    assert (starts[:, :18] == starts[:, 18:36]).all() and np.abs(starts[:, 36:39]).min() > 0          # goal is visible
    assert np.array_equal(env.reset(seed=3)[0], metaworld_env().reset(seed=3)[0])
    assert len({tuple(metaworld_env(num_goals=1).reset(seed=seed)[0]) for seed in range(5)}) == 1
    assert not np.array_equal(metaworld_env(seed=2).reset(seed=3)[0][36:39], starts[3, 36:39])


def test_a_scripted_policy_succeeds_and_success_stays():
    env, policy = metaworld_env("drawer-close"), metaworld.policies.SawyerDrawerCloseV3Policy()
    obs, info = env.reset(seed=0)
    seen = [info["success"]]
    for step_count in range(150):
        action = policy.get_action(obs[:39].astype(np.float64)) if step_count < 120 else np.array([0, -1.0, 1, 0])
        obs, reward, terminated, truncated, info = env.step(action)
        seen.append(info["success"])
        assert not terminated and not truncated and 0 <= reward <= 10
    assert not seen[0] and seen[-1] and seen == sorted(seen)
    assert not env.reset()[1]["success"]


def test_reward_versions_differ():
    rewards = []
    for reward_version in ("v2", "v1"):
        env = metaworld_env("push", reward_version=reward_version)
        env.reset(seed=0)
        rewards.append(env.step(np.zeros(4))[1])
    assert 0 <= rewards[0] < 1 and rewards[0] != rewards[1]


# --- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["pcgrad", "multihead", pytest.param("sac", marks=pytest.mark.slow)])
def test_every_method_runs_and_counts_conflicts(method, tmp_path):
    args = pc.Args(**SMALL | dict(method=method, runs_dir=tmp_path, watch_every=4))
    folder = pc.train(args)
    state = pc.load_checkpoint(folder)
    assert state["num_updates"] == (600 - 150) // 3 and state["num_added"] == 200
    torch.manual_seed(1)
    for name, value in pc.make_learners(args, 3, 42, 4).state_dict().items():
        assert not torch.equal(value, state["learners"][name]), name
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="")
    for network in ("critic", "actor"):
        assert (np.abs(table[f"{network}_cosine"]) <= 1).all() and (table[f"{network}_conflicts"] <= 1).all()
        weight = table[f"{network}_weight"]
        assert (weight >= 1).all() and (weight > 1).any() == (method == "pcgrad")
        assert (table[f"{network}_norm_ratio"] != 1).any() == (method == "pcgrad")
        for row, (_, matrices) in zip(table, state["history"]):
            assert matrices[f"{network}_weights"].sum() / 3 == pytest.approx(row[f"{network}_weight"], rel=1e-4)
            assert matrices[network].diag() == pytest.approx(torch.ones(3), rel=1e-6)
    assert (folder / "conflicts.png").exists() and len(state["history"]) == 2
    assert (folder / "metrics.csv").read_text().count("\n") == 3


@both_scripts
def test_what_is_stored_at_a_time_limit_and_while_filling(script, tmp_path):
    folder = script.train(script.Args(**SMALL | dict(runs_dir=tmp_path, horizon=7, total_timesteps=300)))
    obs, actions, _, next_obs, ends = pc.load_checkpoint(folder)["buffer"].split([42, 4, 1, 42, 1], -1)
    assert not ends.any()                                                      # a time limit bootstraps
    jumps = (obs[:, 1:] != next_obs[:, :-1]).any(-1)                           # the true last observation is stored
    assert torch.equal(jumps, (torch.arange(1, 100) % 7 == 0).expand(3, -1))
    assert actions[:, :50].std() == pytest.approx(3 ** -0.5, abs=0.05)         # uniform at first
    assert torch.equal(obs[1, :, 39:], torch.tensor([0.0, 1, 0]).expand(100, -1))


def test_fixed_order_and_sum_reach_the_update(tmp_path, monkeypatch):
    seen, update = [], pc.joint_update

    def listening(*arguments):
        seen.append((arguments[7](), arguments[8]))
        assert arguments[3:6] == (0.99, 0.005, 1.0)                            # gamma, tau, clipping
        assert [arguments[1][name].param_groups[0]["lr"] for name in ("actor", "critic")] == [3e-4, 1e-3]
        return update(*arguments)
    monkeypatch.setattr(pc, "joint_update", listening)
    pc.train(pc.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=180, fixed_order=True, combine="sum")))
    assert len(seen) == 10 and all(order.tolist() == [[1, 2], [0, 2], [0, 1]] and c == "sum" for order, c in seen)


@both_scripts
def test_training_explores_and_evaluation_does_not(script, tmp_path, monkeypatch):
    seen, evaluate = [], script.evaluate

    def listening(args, task_ids, act, **more):
        obs = np.zeros((3, 42), np.float32)
        seen.append((act(obs), act(obs)))
        return evaluate(args, task_ids, act, **more)
    monkeypatch.setattr(script, "evaluate", listening)
    state = pc.load_checkpoint(script.train(script.Args(**SMALL | dict(runs_dir=tmp_path))))
    assert len(seen) == 3 and all(np.array_equal(*pair) for pair in seen)
    actions = state["buffer"][:, 60:, 42:46]
    assert actions.std() > 0.3 and len(actions.unique()) > 1_000               # not the mean of a policy that is new


@both_scripts
@pytest.mark.parametrize("total", [150, 153])
def test_a_run_too_short_for_an_update_says_so(script, total, tmp_path, capsys):
    folder = script.train(script.Args(**SMALL | dict(total_timesteps=total, runs_dir=tmp_path)))
    assert ("only fills the buffers: updates begin after 150 steps" in capsys.readouterr().out) == (total == 150)
    assert pc.load_checkpoint(folder)["num_updates"] == (total > 150)


def test_orders_are_random_by_default_and_settings_reach_the_environments(tmp_path, monkeypatch):
    seen, update = [], pc.joint_update
    monkeypatch.setattr(pc, "joint_update", lambda *a: seen.append((a[7](), a[8])) or update(*a))
    pc.train(pc.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=180)))
    assert len({order.tobytes() for order, _ in seen}) > 3 and {combine for _, combine in seen} == {"mean"}


@both_scripts
def test_settings_reach_the_environments_and_the_update(script, tmp_path, monkeypatch):
    env = script.make_env(script.Args(num_goals=3, reward_version="v1", tasks=("push", "reach"), horizon=77), 0)
    assert len(env.unwrapped.goals) == 3 and env.unwrapped.stock.reward_function_version == "v1"
    assert env.get_wrapper_attr("_max_episode_steps") == 77 and "Push" in type(env.unwrapped.stock).__name__
    seen, update = [], script.joint_update
    monkeypatch.setattr(script, "joint_update", lambda *a: seen.append(a) or update(*a))
    script.train(script.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=165, gamma=0.9, tau=0.1, lr=0.01)))
    assert len(seen) == 5 and all(a[3:6] == (0.9, 0.1, 1.0) for a in seen)
    assert [seen[0][1][name].param_groups[0]["lr"] for name in ("actor", "critic", "alpha")] == [0.01, 1e-3, 1e-3]
    assert all([*obs.shape] == [3, 8, 42] for obs, *_ in (a[2] for a in seen))


def test_the_sum_reaches_the_policy_as_well():
    moves = []
    for combine in ("mean", "sum"):
        learners, _, batch = learners_and_batch()
        before = [param.detach().clone() for param in learners.actor.parameters()]
        nets = {"critic": [*learners.qf1.parameters(), *learners.qf2.parameters()], "alpha": [learners.log_alpha],
                "actor": learners.actor.parameters()}
        optimizers = {name: torch.optim.SGD(params, lr=1.0 if name == "actor" else 1e-30)
                      for name, params in nets.items()}
        step(learners, optimizers, batch, split=True, orders=in_order(1, 2, 3), combine=combine)
        moves.append(torch.cat([(a - b).flatten() for a, b in zip(before, learners.actor.parameters())]))
    torch.testing.assert_close(moves[1], 3 * moves[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("env, expected", [
    ("mt4", (200, (256, 256), 64, 3e-4, 1e-3, 1_000)), ("mt10", (500, (400, 400, 400), 128, 3e-4, 3e-4, 4_000))])
@both_scripts
def test_the_recommended_settings_are_the_defaults(script, env, expected):
    args = script.Args(env=env)
    assert (args.horizon, args.hidden_sizes, args.batch_size, args.lr, args.critic_lr, args.learning_starts) == expected
    assert (args.num_goals, args.reward_version, args.gamma, args.tau) == (50, "v2", 0.99, 0.005)
    assert (args.max_grad_norm, args.buffer_size, args.watch_every) == (1.0, 100_000, 10)
    assert (pc.Args().combine, pc.Args().fixed_order, args.tasks) == ("mean", False, pc.FAMILIES[env])
    assert (args.total_timesteps, args.eval_every) == {"mt4": (200_000, 20_000), "mt10": (5_000_000, 200_000)}[env]
    assert script.Args(env=env, total_timesteps=7).total_timesteps == 7


@pytest.mark.parametrize("num_tasks, hidden, policy, critic", [
    (10, (160,) * 6, 138_088, 137_601), (50, (160,) * 6, 144_488, 144_001), (10, (400,) * 3, 344_008, 342_801),
    (50, (400,) * 3, 360_008, 358_801)])
def test_parameter_counts_are_the_papers(num_tasks, hidden, policy, critic, capsys):
    learners = pc.make_learners(pc.Args(env="mt10", hidden_sizes=hidden), num_tasks, 39 + num_tasks, 4)
    assert sum(p.numel() for p in learners.actor.parameters()) == policy
    assert sum(p.numel() for p in learners.qf1.parameters()) == critic
    heads = pc.make_learners(pc.Args(env="mt10", hidden_sizes=hidden, heads=True), num_tasks, 39 + num_tasks, 4)
    assert sum(p.numel() for p in heads.actor.parameters()) == policy + (num_tasks - 1) * 8 * (hidden[-1] + 1)


@pytest.mark.parametrize("method, heads", [("pcgrad", False), ("pcgrad", True), ("multihead", False)])
def test_parameter_counts_are_printed_beside_the_baselines(method, heads, tmp_path, capsys):
    pc.train(pc.Args(**SMALL | dict(method=method, heads=heads, total_timesteps=60, runs_dir=tmp_path)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters of ")]
    plain = 42 * 16 + 16 + 16 * 17 + 8 * 17
    sizes = [int(line.split("policy ")[1].split(", each")[0].replace(",", "")) for line in lines]
    assert sizes == [plain + 2 * 8 * 17 * (heads or method == "multihead"), plain]


@both_scripts
def test_means_since_the_last_evaluation_survive_a_stop(script, tmp_path, monkeypatch):
    settings, counts = SMALL | dict(total_timesteps=300, checkpoint_every=180, watch_every=5), []
    log, save = script.log_conflicts, script.Run.save

    def note(run, names, conflicts, *rest):
        counts.append(conflicts["critic"]["cosine"][1])
        return log(run, names, conflicts, *rest)
    monkeypatch.setattr(script, "log_conflicts", note)
    monkeypatch.setattr(script.Run, "save", lambda run, state: (
        save(run, state), setattr(run, "stop_signal", 15 if state["global_step"] == 180 else None)))
    with pytest.raises(SystemExit):
        script.train(script.Args(**settings | dict(runs_dir=tmp_path / "stopped")))
    monkeypatch.setattr(script.Run, "save", save)
    folder, = (tmp_path / "stopped").iterdir()
    assert counts == []                                                        # stopped before the evaluation
    script.train(script.read_args(script.Args, ["--resume", str(folder)]))
    script.train(script.Args(**settings | dict(runs_dir=tmp_path / "straight")))
    assert counts[0] == counts[1] > 5


@pytest.mark.slow
@pytest.mark.parametrize("env", ["mt10", "mt50"])
def test_the_large_families_run_evaluate_and_resume(env, tmp_path):
    settings = SMALL | dict(env=env, tasks=None, runs_dir=tmp_path, total_timesteps=3_000, eval_every=3_000)
    folder = pc.train(pc.Args(**settings))
    pc.train(pc.read_args(pc.Args, ["--resume", str(folder), "--total-timesteps", "4000"]))
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="")
    assert table["global_step"].tolist() == [3_000, 4_000] and "window-close/success" in table.dtype.names
