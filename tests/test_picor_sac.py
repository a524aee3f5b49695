"""PiCor: weights, hinge and KL by hand, what the correction may touch, blocks, environments, the four-goal toy."""
import copy
import math

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.distributions import Normal, kl_divergence

import multitask_a2c
import picor_sac as pi
import qmp_sac

SMALL = dict(total_timesteps=400, horizon=20, block_steps=30, learning_starts=25, hidden_sizes=(16, 16), batch_size=16,
             eval_every=200, eval_episodes=1, checkpoint_every=10**9, correction_states=8, weight_warmup=2)


def small(**settings):
    return pi.Args(**SMALL | settings)


def parts(num_tasks=3, obs_size=5, seed=0, **settings):
    """Small learners with their optimizers and a filled replay buffer."""
    args = small(tasks=pi.FAMILIES["goals"][:num_tasks], **settings)
    torch.manual_seed(seed)
    learners, = pi.make_picor_learners(args, num_tasks, obs_size, 2)
    args.lr = 1e-2
    optimizers = pi.make_picor_optimizers(args, learners)
    buffer, rng = pi.TaskReplay(num_tasks, 60, obs_size, 2, torch.device("cpu")), np.random.default_rng(seed)
    for _ in range(60):
        for task in range(num_tasks):
            obs, next_obs = rng.normal(size=(2, obs_size))
            buffer.add(task, obs, rng.uniform(-1, 1, 2), rng.normal(), next_obs, False)
    return args, learners, optimizers, buffer


def copy_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def moved(net, before):
    return any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- worked numbers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha, tau, expected", [
    ((0.2, 0.05), 1.0, (0.537430, 0.462570)), ((0.2, 0.05), 0.1, (0.817574, 0.182426)),
    ((0.2, 0.05), 0.05, (0.952574, 0.047426)), ((1, 0.5, 0.1), 1.0, (0.496746, 0.301292, 0.201962)),
    ((1, 0.5, 0.1), 0.5, (0.652240, 0.239946, 0.107815))])
def test_weights_by_hand(alpha, tau, expected):
    assert pi.task_weights(torch.tensor(alpha), tau).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("advantages, shortfall", [((-0.05, 0.02), 0.036230), ((0.01, -0.02), 0),
                                                   ((-0.0005, -0.0002), 0)])
def test_hinge_by_hand(advantages, shortfall):
    weights = pi.task_weights(torch.tensor([0.2, 0.05]), 0.1)
    value = pi.hinge(torch.tensor(advantages), weights, -0.1, 0.99)
    assert value.item() == pytest.approx(shortfall, abs=1e-6)


def test_penalty_and_its_gradient_by_hand():
    advantages = torch.tensor([-0.05, 0.02], requires_grad=True)
    shortfall = pi.hinge(advantages, pi.task_weights(torch.tensor([0.2, 0.05]), 0.1), -0.1, 0.99)
    loss = pi.correction_loss(torch.tensor(0.0), shortfall, 100.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.065631, abs=1e-6)
    assert advantages.grad.tolist() == pytest.approx([-2.962090, -0.660932], abs=1e-5)
    assert pi.correction_loss(torch.tensor(0.3), torch.tensor(0.0), 100.0).item() == pytest.approx(0.3)


def test_kl_by_hand():
    first = torch.tensor([0.1, -0.2]), torch.tensor([0.5, 0.4]).log()
    second = torch.zeros(2), torch.tensor([0.6, 0.4]).log()
    assert pi.gaussian_kl(*first, *second).tolist() == pytest.approx([0.043433, 0.125], abs=1e-6)
    assert pi.gaussian_kl(*second, *first).sum().item() == pytest.approx(0.182678, abs=1e-6)
    expected = kl_divergence(Normal(first[0], first[1].exp()), Normal(second[0], second[1].exp()))
    torch.testing.assert_close(pi.gaussian_kl(*first, *second), expected)


# --- the correction --------------------------------------------------------------------------------------------------
def test_equal_policies_have_no_advantage_and_nothing_happens():
    args, learners, optimizers, buffer = parts(c=0.0)
    states = buffer.sample(np.random.default_rng(0), [0, 1, 2], 8)[0]
    before = copy_of(learners)
    old = learners.actor(states)
    found = pi.correct(args, learners, optimizers["correction"], states, old, torch.full((3,), 1 / 3))
    assert found["advantage"].abs().max() == 0 and found["hinge"] == 0 and found["steps"] == 0
    assert not moved(learners, before)


class Likes:
    """A critic of known value: the action's first coordinate, times a sign for each task."""

    def __init__(self, signs):
        self.signs = torch.tensor(signs)[:, None]

    def __call__(self, obs, actions):
        return self.signs * actions[..., 0]

    def parameters(self):
        return []


def test_soft_advantage_by_hand():
    critic, obs = Likes([1.0, -1.0]), torch.zeros(2, 4, 5)
    mean, log_std, noise, alpha = torch.zeros(2, 4, 2), torch.full((2, 4, 2), -1.0), torch.randn(2, 4, 2), torch.tensor(
        [[0.5], [0.0]])
    shifted = mean.clone()
    shifted[..., 0] = 0.3
    old, new = (pi.soft_value(critic, critic, obs, m, log_std, noise, alpha) for m in (mean, shifted))
    a, b = ((m + math.exp(-1) * noise).tanh() for m in (mean, shifted))
    entropy = torch.log(1 - b.square() + 1e-6).sum(-1) - torch.log(1 - a.square() + 1e-6).sum(-1)  # -log pi grows so
    spread = torch.tensor([2.0, 4.0])
    expected = torch.stack([(b - a)[0, :, 0] + 0.5 * entropy[0], -(b - a)[1, :, 0]]).mean(1) / spread
    torch.testing.assert_close(pi.soft_advantage(new, old, spread), expected, atol=1e-5, rtol=1e-4)


def test_a_loss_is_corrected_towards_what_the_weights_ask_for():
    """Phase 1 has moved the policy to what task 0 likes; all weight on task 1, its opposite, brings it back."""
    results = {}
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        args, learners, optimizers, buffer = parts(num_tasks=2, correction_steps=20, penalty=100.0, adv_norm=False,
                                                   hard_advantage=True)
        learners.qf1 = learners.qf2 = None
        del learners.qf1, learners.qf2
        learners.__dict__["qf1"] = learners.__dict__["qf2"] = Likes([1.0, -1.0])
        states = buffer.sample(np.random.default_rng(0), [0, 1], 8)[0]
        with torch.no_grad():
            old = learners.actor(states)
            learners.actor.net.biases[-1][0, 0, 0] += 0.5                      # to the right
            here = learners.actor(states)[0][..., 0].mean().item()
        found = pi.correct(args, learners, optimizers["correction"], states, old, torch.tensor(weights))
        results[weights] = found, learners.actor(states)[0][..., 0].mean().item() - here
    (kept, still), (undone, back) = results.values()
    assert kept["advantage"][0] > 0.1 > -0.1 > kept["advantage"][1]
    assert kept["hinge"] == 0 and kept["steps"] == 0 == still
    assert undone["hinge"] > 0.1 and undone["steps"] > 1 and back < -0.05 and undone["kl"] > 0


def test_the_correction_leaves_critics_and_temperatures_alone_and_stops_when_nothing_is_lost():
    args, learners, optimizers, buffer = parts(c=0.0, correction_steps=3, penalty=1e4)
    states = buffer.sample(np.random.default_rng(0), [0, 1, 2], 8)[0]
    with torch.no_grad():
        old = learners.actor(states)
        for param in learners.actor.parameters():
            param += 0.3 * torch.randn_like(param)
    lost, found = {name: copy_of(getattr(learners, name)) for name in ("actor", "qf1", "qf2")}, None
    for weights in torch.eye(3):
        found = pi.correct(args, learners, optimizers["correction"], states, old, weights)
        if found["hinge"] > 0:
            break
    assert found["hinge"] > 0 and 1 <= found["steps"] <= 3 and moved(learners.actor, lost["actor"])
    assert not moved(learners.qf1, lost["qf1"]) and not moved(learners.qf2, lost["qf2"])
    assert all(param.grad is None for net in (learners.qf1, learners.qf2) for param in net.parameters())
    assert all(param.requires_grad for param in learners.parameters() if param is not None)
    relaxed = pi.correct(small(c=-1e9), learners, optimizers["correction"], states, old, weights)
    assert relaxed["hinge"] == 0 and relaxed["steps"] == 0


def test_the_correction_gets_the_policy_before_phase_one_and_its_own_optimizer(monkeypatch):
    args, learners, optimizers, buffer = parts(recent=4)
    with torch.no_grad():
        learners.log_alpha.copy_(torch.tensor([-1.0, -2.0, -3.0]))
    before, seen, critic, policy = copy.deepcopy(learners.actor), {}, pi.critic_phase, pi.actor_loss
    monkeypatch.setattr(pi, "critic_phase", lambda *a: seen.update(alpha=a[3]) or critic(*a))
    monkeypatch.setattr(pi, "actor_loss", lambda *a: seen.update(policy=a[2]) or policy(*a))
    monkeypatch.setattr(pi, "correct", lambda *a: seen.update(call=a) or {})
    monkeypatch.setattr(pi, "policy_phase", lambda *a, phase=pi.policy_phase: seen.update(obs=a[2]) or phase(*a))
    update(args, learners, optimizers, buffer, task=1, weights=torch.tensor([0.2, 0.5, 0.3]))
    assert torch.isin(seen["obs"][0], buffer.data[1, :, :5]).all()             # phase 1 is on the active task
    _, _, optimizer, states, old, weights = seen["call"]
    assert weights.tolist() == pytest.approx([0.2, 0.5, 0.3])
    assert optimizer is optimizers["correction"] is not optimizers["actor"]
    torch.testing.assert_close(torch.stack(old), torch.stack(before(states)))
    assert not torch.allclose(old[0], learners.actor(states)[0], atol=1e-4)
    for task in range(3):
        assert torch.isin(states[task], buffer.data[task, -4:, :5]).all()
    assert seen["alpha"].flatten().log().tolist() == pytest.approx([-1, -2, -3])      # every task its own
    assert seen["policy"].flatten().log().tolist() == pytest.approx([-2])             # the active one's


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("adv_norm", [False, True])
def test_two_steps_of_the_correction_by_hand(hard, adv_norm, monkeypatch):
    args, learners, optimizers, buffer = parts(c=-0.1, correction_steps=2, penalty=50.0, hard_advantage=hard,
                                               adv_norm=adv_norm)
    measured = []
    monkeypatch.setattr(pi, "q_spread", lambda *a: measured.append(a) or torch.tensor([0.5, 2.0, 3.0]))
    optimizer = torch.optim.SGD(learners.actor.parameters(), lr=1e-3)
    states = buffer.sample(np.random.default_rng(0), [0, 1, 2], 8)[0]
    with torch.no_grad():
        old = learners.actor(states)
        for param in learners.actor.parameters():
            param += 0.3 * torch.randn_like(param)
    alpha = torch.tensor([[0.1], [0.3], [0.6]])
    learners.log_alpha.data.copy_(alpha.log().flatten())
    twin, weights = copy.deepcopy(learners), torch.tensor([0.2, 0.5, 0.3])
    spread, alpha = torch.tensor([0.5, 2.0, 3.0]) if adv_norm else torch.ones(3), 0.0 if hard else alpha
    torch.manual_seed(5)
    noise = torch.randn_like(old[0])

    def value(mean, log_std):
        actions, log_prob = pi.squash(mean, log_std, noise)
        return torch.min(twin.qf1(states, actions), twin.qf2(states, actions)) - alpha * log_prob
    with torch.no_grad():
        anchor, base = twin.actor(states), value(*old)
        sign = torch.sign((weights * ((value(*anchor) - base).mean(1) / spread)).sum()).item()
    weights = weights if sign < 0 else None
    if weights is None:
        for net in (learners, twin):                                           # a loss in place of a gain
            for qf in (net.qf1, net.qf2):
                with torch.no_grad():
                    qf.net.weights[-1] *= -1
        weights = torch.tensor([0.2, 0.5, 0.3])
        with torch.no_grad():
            base = value(*old)
    for _ in range(2):
        mean, log_std = twin.actor(states)
        p, q = (torch.distributions.Normal(m, s.exp()) for m, s in ((mean, log_std), anchor))
        kl = torch.distributions.kl_divergence(p, q).sum(-1).mean()
        gap = (-0.001 - (weights * (value(mean, log_std) - base).mean(1) / spread).sum()).clamp(min=0)
        grads = torch.autograd.grad(kl + 25.0 * gap ** 2, list(twin.actor.parameters()))
        with torch.no_grad():
            for param, grad in zip(twin.actor.parameters(), grads):
                param -= 1e-3 * grad
    torch.manual_seed(5)
    found = pi.correct(args, learners, optimizer, states, old, weights)
    assert found["hinge"] > 0 and found["steps"] == 2 and gap > 0
    ends = zip(twin.actor(states), anchor, strict=True)
    (mean, anchor_mean), (log_std, anchor_log_std) = ends
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(anchor_mean, anchor_log_std.exp())).sum(-1).mean()
    torch.testing.assert_close(found["kl"], expected.detach(), atol=1e-6, rtol=1e-4)
    assert len(measured) == adv_norm and all(a[2] is states and a[3] is old[0] and a[4] is old[1] for a in measured)
    for one, other in zip(learners.actor.parameters(), twin.actor.parameters()):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_correction_ends_once_nothing_is_lost():
    args, learners, optimizers, buffer = parts(num_tasks=2, correction_steps=5, penalty=1e3, adv_norm=False, c=0.0,
                                               hard_advantage=True, seed=1)
    del learners.qf1, learners.qf2
    learners.__dict__["qf1"] = learners.__dict__["qf2"] = Likes([1.0, 1.0])
    states = buffer.sample(np.random.default_rng(0), [0, 1], 8)[0]
    with torch.no_grad():
        old = learners.actor(states)
        learners.actor.net.biases[-1][0, 0, 0] -= 0.005                        # a tiny loss: one step is enough
    found = pi.correct(args, learners, optimizers["correction"], states, old, torch.full((2,), 0.5))
    assert found["hinge"] > 0 and found["steps"] == 1


def test_a_temperature_that_rests_keeps_its_optimizers_memory():
    args, learners, optimizers, buffer = parts(correction=False)
    update(args, learners, optimizers, buffer, task=1)
    state = {key: value.clone() for key, value in optimizers["alpha1"].state[learners.log_alpha].items()}
    for seed in range(5):
        update(args, learners, optimizers, buffer, task=0, seed=seed)
    assert all(torch.equal(value, state[key]) for key, value in optimizers["alpha1"].state[learners.log_alpha].items())
    assert optimizers["alpha0"].state[learners.log_alpha]["step"] == 5


def test_alpha_all_moves_every_temperature_by_its_own_entropy():
    args, learners, optimizers, buffer = parts(alpha_all=True, num_tasks=2)
    optimizers["alpha"] = torch.optim.SGD([learners.log_alpha], lr=0.1)
    learners.target_entropy, before = -2.0, learners.log_alpha.detach().clone()
    log_prob = torch.tensor([[5.0, 1.0], [-2.0, -2.0]])                        # means 3 and -2
    pi.temperature_phase(learners, optimizers, log_prob, [0, 1])
    torch.testing.assert_close(learners.log_alpha.detach() - before, torch.tensor([0.1, -0.4]))    # 0.1 (mean - 2)


def test_alpha_all_takes_the_entropy_of_the_policy_before_phase_one(monkeypatch):
    args, learners, optimizers, buffer = parts(alpha_all=True, correction_states=500)
    for param in learners.actor.parameters():
        param.data.zero_()                                                     # mean 0, log std -1.5
    optimizers["actor"] = torch.optim.SGD(learners.actor.parameters(), lr=100.0)               # far from it in a step
    seen = []
    monkeypatch.setattr(pi, "temperature_phase", lambda learners, optimizers, log_prob, rows: seen.append(log_prob))
    before = copy_of(learners.actor)
    update(args, learners, optimizers, buffer)
    assert moved(learners.actor, before) and seen[0].shape == (3, 500)
    gaussian = 1.5 - 0.5 * math.log(2 * math.pi * math.e)                      # E log N, of one action
    assert seen[0].mean().item() == pytest.approx(2 * (gaussian + 0.0486), abs=0.08)      # - E log(1 - tanh^2) = 0.0486


def test_the_spread_of_q_is_that_of_its_actions():
    critic, obs = Likes([1.0, 10.0]), torch.zeros(2, 500, 5)
    mean, log_std = torch.zeros(2, 500, 2), torch.full((2, 500, 2), -2.0)
    torch.manual_seed(0)
    spread = pi.q_spread(critic, critic, obs, mean, log_std)
    assert spread.tolist() == pytest.approx([math.exp(-2) * 0.91, 10 * math.exp(-2) * 0.91], rel=0.1)  # of 4 draws
    steep, flat = Likes([5.0, 5.0]), lambda obs, actions: 5 * actions[..., 0].clamp(max=-1)             # always less
    assert pi.q_spread(steep, flat, obs, mean, log_std).max() <= 1e-6          # of the smaller twin, a constant here


# --- updates ---------------------------------------------------------------------------------------------------------
def update(args, learners, optimizers, buffer, task=1, seed=3, weights=None):
    torch.manual_seed(seed)
    weights = torch.full((len(buffer.data),), 1 / len(buffer.data)) if weights is None else weights
    return pi.picor_update(args, learners, optimizers, buffer, task, weights, np.random.default_rng(seed))


def test_one_task_without_correction_is_plain_sac():
    args, learners, optimizers, buffer = parts(num_tasks=1, correction=False, batch_size=16)
    sister_args = qmp_sac.Args(method="separated", tasks=(0,), hidden_size=16)
    sister = qmp_sac.Learners(sister_args, 1, 5, 2)
    sister.load_state_dict(learners.state_dict())
    sister.actor.forward = pi.BoundedActor.forward.__get__(sister.actor)
    sister_optimizers = sister.make_optimizers(1e-2)
    for seed in range(3):
        found = update(args, learners, optimizers, buffer, task=0, seed=seed)
        torch.manual_seed(seed)
        batch = buffer.sample(np.random.default_rng(seed), [0], 16)
        losses = qmp_sac.update(sister_args, sister, sister_optimizers, batch)
        torch.testing.assert_close(found["critic"], losses["critic"])
    for name, value in sister.state_dict().items():
        torch.testing.assert_close(learners.state_dict()[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings, critic_tasks, policy_tasks", [
    (dict(), 3, 1), (dict(critic_batch="active"), 1, 1), (dict(method="mtsac"), 3, 3),
    (dict(method="mtsac", mtsac_batch="active"), 1, 1), (dict(method="mtmhsac"), 3, 3),
    (dict(critic_heads=True), 3, 1), (dict(alpha_all=True), 3, 1)])
def test_who_learns_from_which_tasks(settings, critic_tasks, policy_tasks, monkeypatch):
    args, learners, optimizers, buffer = parts(**settings)
    seen, before = [], learners.log_alpha.detach().clone()
    for name, position in (("critic_phase", 2), ("policy_phase", 2)):
        phase = getattr(pi, name)
        monkeypatch.setattr(pi, name, lambda *a, phase=phase, position=position: seen.append(a[position]) or phase(*a))
    found = update(args, learners, optimizers, buffer)
    assert seen[0][0].shape == (critic_tasks, 16 // critic_tasks, 5)
    assert seen[1].shape == (policy_tasks, 16 // policy_tasks, 5)
    changed = (learners.log_alpha.detach() != before).tolist()
    all_move = policy_tasks == 3 or args.alpha_all
    assert changed == ([True] * 3 if all_move else [False, True, False])               # temperatures of others rest
    update(args, learners, optimizers, buffer, task=0)
    assert all_move or learners.log_alpha[2] == before[2]
    assert ("advantage" in found) == (args.method == "picor")
    if "advantage" in found:
        assert found["advantage"].shape == (3,)


def test_weights_without_correction_scale_the_policys_loss(monkeypatch):
    args, learners, optimizers, buffer = parts(correction=False)
    scales, phase = [], pi.policy_phase
    monkeypatch.setattr(pi, "policy_phase", lambda *a: scales.append(a[4]) or phase(*a))
    update(args, learners, optimizers, buffer, task=1, weights=torch.tensor([0.1, 0.7, 0.2]))
    update(small(tasks=args.tasks), learners, optimizers, buffer, task=1, weights=torch.tensor([0.1, 0.7, 0.2]))
    assert scales == [pytest.approx(2.1), 1.0]


def test_the_scale_multiplies_the_policys_gradient():
    moves = []
    for scale in (1.0, 3.0):
        _, learners, optimizers, buffer = parts()
        before, optimizers["actor"] = copy_of(learners.actor), torch.optim.SGD(learners.actor.parameters(), lr=1.0)
        torch.manual_seed(0)
        states = buffer.sample(np.random.default_rng(0), [1], 8)[0]
        pi.policy_phase(learners, optimizers["actor"], states, [1], scale)
        moves.append(torch.cat([(value - before[name]).flatten() for name, value in copy_of(learners.actor).items()]))
    torch.testing.assert_close(moves[1], 3 * moves[0], atol=1e-5, rtol=1e-4)


def test_with_heads_phase_one_asks_the_active_tasks_critic_and_moves_all_targets():
    gradients = []
    for sign in (1, -1):                                                       # turn the other tasks' heads round
        _, learners, optimizers, buffer = parts(critic_heads=True)
        for qf in (learners.qf1, learners.qf2):
            qf.net.weights[-1].data[:2] *= sign
        torch.manual_seed(0)
        pi.policy_phase(learners, optimizers["actor"], buffer.sample(np.random.default_rng(0), [2], 8)[0], [2])
        gradients.append(torch.cat([param.grad.flatten() for param in learners.actor.parameters()]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    before = copy_of(learners)
    for param in [*learners.qf1.parameters(), *learners.qf2.parameters()]:
        param.data += 1
    pi.move_targets(learners, 0.5)
    after = copy_of(learners)
    assert all(not torch.equal(after[name], before[name]) for name in after if "target" in name)


def test_acting_asks_the_active_tasks_head(tmp_path, monkeypatch):
    """One head pushes to one side with all its force; its task is the only one that goes there."""
    make = pi.make_picor_learners

    def biased(*a):
        learners = make(*a)
        with torch.no_grad():
            learners[0].actor.net.weights[-1].zero_()
            learners[0].actor.net.biases[-1][:, 0, 2:] = -5.0                  # next to no noise
            learners[0].actor.net.biases[-1][2, 0, :2] = 5.0
        return learners
    monkeypatch.setattr(pi, "make_picor_learners", biased)
    monkeypatch.setattr(pi, "picor_update", lambda *a: {})
    state = pi.load_checkpoint(pi.train(small(method="mtmhsac", runs_dir=tmp_path, task_order="cycle")))
    pushed = [rows[25:, 6:8].mean().item() > 0.9 for rows in state["buffer"]]
    assert pushed == [False, False, True, False]


def test_heads_are_each_tasks_own():
    _, learners, _, _ = parts(critic_heads=True)
    assert [len(weight) for weight in learners.qf1.net.weights] == [1, 1, 3]
    x, a = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    torch.testing.assert_close(pi.of_tasks(learners.qf1, [2])(x[2:], a[2:]), learners.qf1(x, a)[2:])
    multihead = parts(method="mtmhsac")[1]
    for net in (multihead.actor, multihead.qf1, multihead.qf2_target):
        assert [len(weight) for weight in net.net.weights] == [1, 1, 3]
    assert len(pi.make_picor_learners(small(method="independent"), 3, 5, 2)) == 3


def test_replay_keeps_tasks_apart_and_knows_the_recent_past():
    buffer, rng = pi.TaskReplay(2, 5, 1, 1, torch.device("cpu")), np.random.default_rng(0)
    for t in range(8):
        buffer.add(0, [t], [-t], 2 * t, [t + 0.5], t == 6)
    buffer.add(1, [100], [0], 0, [0], False)
    obs, actions, rewards, next_obs, ends = buffer.sample(rng, [0, 1], 200)
    assert set(obs[0].flatten().tolist()) == {3, 4, 5, 6, 7} and set(obs[1].flatten().tolist()) == {100}
    assert torch.equal(rewards[0], -2 * actions[0, :, 0]) and torch.equal(next_obs[0], obs[0] + 0.5)
    assert torch.equal(ends[0] == 1, obs[0, :, 0] == 6)
    assert set(buffer.sample(rng, [0], 100, recent=2)[0].flatten().tolist()) == {6, 7}


# --- environments ----------------------------------------------------------------------------------------------------
def test_goals_by_hand():
    env = pi.GoalEnv((1.0, -1.0), np.array([0.0, 1.0]))
    check_env(env, skip_render_check=True)
    obs, _ = env.reset(seed=0)
    assert np.abs(obs[:2]).max() <= 0.2 and obs[2:].tolist() == [0, 1]
    env.position = np.array([0.9, -0.75])
    obs, reward, terminated, truncated, info = env.step(np.array([5.0, -0.5]))       # clipped to 1
    assert obs[:2].tolist() == pytest.approx([1.0, -0.8]) and not terminated and not truncated
    assert reward == pytest.approx(-0.2) and not info["success"]
    assert env.step(np.array([0.0, -0.6]))[1] == pytest.approx(-0.14 + 1)            # within 0.15
    env.position = np.array([0.9, -0.9])
    assert env.step(np.array([1.0, -1.0]))[1] == pytest.approx(1.0) and env.step(np.zeros(2))[4]["success"]
    assert set(pi.GOALS.values()) == {(1, 1), (-1, -1), (1, -1), (-1, 1)}


def test_cheetahs_are_those_of_the_sister_script_and_gymnasiums():
    env, pool = pi.CheetahEnv("BigFoot", np.array([1.0, 0.0])), multitask_a2c.CheetahPool(["BigFoot"], 1, 0)
    check_env(env, skip_render_check=True)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (19,) and obs[17:].tolist() == [1, 0]
    pool.state[0, 0, 1:10], pool.state[0, 0, 10:] = env.data.qpos, env.data.qvel
    generator = np.random.default_rng(0)
    for _ in range(20):
        action = generator.uniform(-1.5, 1.5, 6)
        obs, reward, terminated, _, _ = env.step(action)
        theirs, rewards, _ = pool.step([0], action[None, None])
        assert obs[:17] == pytest.approx(theirs[0, 0], abs=1e-5) and reward == pytest.approx(rewards[0, 0], abs=1e-5)
        assert not terminated
    assert pi.FAMILIES["halfcheetah"] == ("SmallFoot", "BigFoot", "SmallLeg", "BigLeg", "SmallThigh", "BigThigh",
                                          "SmallTorso", "BigTorso")


# --- whole runs ------------------------------------------------------------------------------------------------------
def rows_of(folder):
    return [line.split(",")[:1] + line.split(",")[2:] for line in (folder / "metrics.csv").read_text().splitlines()]


ARMS = [dict(), dict(correction=False), dict(adaptive_weights=False), dict(critic_batch="active"), dict(method="mtsac"),
        dict(critic_heads=True, hard_advantage=True, adv_norm=False, recent=20),
        dict(method="mtsac", mtsac_batch="active"), dict(method="mtmhsac"),
        dict(method="independent"), dict(env="halfcheetah", tasks=("BigFoot", "SmallFoot"))]


@pytest.mark.parametrize("settings", [arm if i in (0, 1, 5, 8) else pytest.param(arm, marks=pytest.mark.slow)
                                      for i, arm in enumerate(ARMS)])
def test_every_arm_runs_and_resumes_exactly(settings, tmp_path):
    straight = pi.train(small(**settings, runs_dir=tmp_path / "straight"))
    state = pi.load_checkpoint(straight)
    args = small(**settings)
    torch.manual_seed(1)
    obs_size, action_size = (19, 6) if "env" in settings else (6, 2)
    untrained = pi.make_picor_learners(args, len(args.tasks), obs_size, action_size).state_dict()
    for name, value in state["learners"].items():
        resting = args.method == "independent" and state["updates"][int(name.split(".")[0])] == 0
        assert torch.equal(value, untrained[name]) == resting or "alpha" in name, name
    assert state["updates"].sum() == 400 - 25 * len(args.tasks) and state["num_added"].sum() == 400
    folder = pi.train(small(**settings | dict(total_timesteps=230), runs_dir=tmp_path / "parts"))
    pi.train(pi.read_args(pi.Args, ["--resume", str(folder), "--total-timesteps", "400"]))
    theirs = pi.load_checkpoint(folder)
    assert all(torch.equal(value, theirs["learners"][name]) for name, value in state["learners"].items())
    assert all(torch.equal(one, other) for one, other in zip(state["buffer"], theirs["buffer"]))
    assert rows_of(folder)[-1][:4] == rows_of(straight)[-1][:4] and (folder / "weights.png").exists()


def test_meta_world_runs_and_goes_on_with_fresh_episodes(tmp_path, capsys):
    settings = dict(env="mt4", tasks=("reach", "drawer-close"), total_timesteps=120, runs_dir=tmp_path)
    folder = pi.train(small(**settings))
    pi.train(pi.read_args(pi.Args, ["--resume", str(folder), "--total-timesteps", "200"]))
    state = pi.load_checkpoint(folder)
    assert "fresh episodes" in capsys.readouterr().out
    assert state["updates"].sum() == 150 and state["num_added"].sum() == 200
    assert len(pi.make_env(small(env="mt4", num_goals=3, tasks=("reach",)), 0).unwrapped.goals) == 3


def test_blocks_last_k_steps_and_do_not_reset_on_a_switch(tmp_path, monkeypatch):
    stepped, resets, step, reset = [], [], pi.GoalEnv.step, pi.GoalEnv.reset
    monkeypatch.setattr(pi.GoalEnv, "step", lambda self, a: stepped.append(int(self.one_hot.argmax())) or step(self, a))
    monkeypatch.setattr(pi.GoalEnv, "reset", lambda self, **k: resets.append(len(stepped)) or reset(self, **k))
    monkeypatch.setattr(pi, "evaluate", lambda args, task_ids, act, frames=False: {
        "returns": np.zeros((4, 1)), "successes": np.zeros((4, 1)), "frames": []})
    pi.train(small(runs_dir=tmp_path, total_timesteps=400, task_order="cycle", horizon=40))
    assert stepped == [0] * 25 + [1] * 25 + [2] * 25 + [3] * 25 + ([0] * 30 + [1] * 30 + [2] * 30 + [3] * 30) * 2 + (
        [0] * 30 + [1] * 30)
    assert resets[4:8] == [115, 145, 175, 205]                                 # 25 + 15 steps of a task, not at 100
    blocks = []
    for method in ("picor", "mtsac"):
        stepped.clear()
        pi.train(small(runs_dir=tmp_path / method, method=method))
        blocks.append(stepped[:400])
    assert blocks[0] == blocks[1] and blocks[0][100:] != sorted(blocks[0][100:])


def test_weights_stay_equal_until_every_task_has_had_its_updates(tmp_path):
    for warmup, equal in ((10**6, True), (1, False)):
        args = small(runs_dir=tmp_path / str(warmup), weight_warmup=warmup, task_order="cycle", alpha_init=0.5, lr=0.01)
        folder = pi.train(args)
        header, *rows = rows_of(folder)
        weights = [float(rows[-1][header.index(f"{name}/weight")]) for name in pi.GOALS]
        assert sum(weights) == pytest.approx(1, abs=1e-4) and (weights == [0.25] * 4) == equal


@pytest.mark.parametrize("method, adaptive", [("picor", True), ("picor", False), ("mtsac", True)])
def test_weights_follow_the_temperatures_once_every_task_is_trained(method, adaptive, tmp_path, monkeypatch):
    seen, update = [], pi.picor_update

    def listening(args, learners, optimizers, buffer, task, weights, rng):
        alpha = learners.log_alpha.detach().exp()
        seen.append((task, weights, torch.softmax(alpha / 0.05, 0)))
        return update(args, learners, optimizers, buffer, task, weights, rng)
    monkeypatch.setattr(pi, "picor_update", listening)
    pi.train(small(method=method, adaptive_weights=adaptive, runs_dir=tmp_path, weight_warmup=30, weight_tau=0.05,
                   task_order="cycle", lr=0.01))
    equal = [bool((weights == 0.25).all()) for _, weights, _ in seen]
    if method == "picor" and adaptive:
        assert equal == [True] * 120 + [False] * 180                           # four blocks of 30
        assert all(torch.allclose(weights, expected) for _, weights, expected in seen[120:])
    else:
        assert all(equal) and len(seen) == 300


def test_truncation_is_stored_as_no_end(tmp_path):
    folder = pi.train(small(runs_dir=tmp_path, horizon=7))
    for rows in pi.load_checkpoint(folder)["buffer"]:
        obs, _, _, next_obs, ends = rows.split([6, 2, 1, 6, 1], -1)
        jumps = (obs[1:] != next_obs[:-1]).any(-1)
        assert not ends.any() and torch.equal(jumps, torch.arange(1, len(rows)) % 7 == 0)


@pytest.mark.parametrize("env, expected", [
    ("halfcheetah", (1_000, 1_000, 256, 200_000)), ("mt10", (500, 500, 256, 5_000_000)),
    ("mt4", (200, 200, 256, 200_000)), ("goals", (50, 500, 64, 12_000))])
def test_presets(env, expected):
    args = pi.Args(env=env)
    assert (args.horizon, args.block_steps, args.batch_size, args.total_timesteps) == expected
    assert (args.c, args.penalty, args.weight_tau, args.correction_steps, args.gamma) == (-0.1, 10, 0.1, 5, 0.99)


# --- learning --------------------------------------------------------------------------------------------------------
def test_four_goals_are_learnt_faster_with_correction(tmp_path):
    """The toy after a block of 500 steps of each task; nothing learnt is -75. Margins from what three seeds showed."""
    arms = {"picor": {}, "cor-only": dict(adaptive_weights=False), "ada-only": dict(correction=False),
            "neither": dict(correction=False, adaptive_weights=False), "mtsac": dict(method="mtsac"),
            "as-published": dict(critic_batch="active")}
    reached = {}
    for name, settings in arms.items():
        args = pi.Args(env="goals", task_order="cycle", total_timesteps=4_000, eval_every=4_000, weight_warmup=50,
                       runs_dir=tmp_path / name, **settings)
        header, row = ((pi.train(args)) / "metrics.csv").read_text().splitlines()
        reached[name] = float(row.split(",")[header.split(",").index("mean_return")])
    assert min(reached["picor"], reached["cor-only"]) > max(reached["ada-only"], reached["neither"]) + 10      # 21 seen
    assert reached["picor"] > reached["as-published"] + 12 and reached["mtsac"] > reached["neither"] + 15  # 28, 32 seen
