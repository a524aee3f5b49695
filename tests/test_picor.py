"""PiCor: weights, hinge, environments by hand; phase 1, correction and soft modules against plain code; replay."""
import copy

import numpy as np
import pytest
import torch
from conftest import squashed_gaussian
from torch.distributions import Normal

import pcgrad_sac as pcgrad
import picor_sac as picor


def make(method="picor", **settings):
    args = picor.Args(method=method, hidden_sizes=(16, 16), batch_size=16, device="cpu", **settings)
    torch.manual_seed(0)
    agent = picor.make_agent(args, 8, 2)                               # the goals: position, velocity, one-hot of four
    return args, agent, picor.make_optimizers(args, agent)


def filled(rows=40):
    replay, rng = picor.TaskReplay([rows] * 4, 8, 2, "cpu"), np.random.default_rng(0)
    for task in range(4):
        for _ in range(rows):
            obs = np.concatenate([rng.normal(size=4), np.eye(4)[task]])
            replay.add(task, obs, rng.uniform(-1, 1, 2), rng.normal(), obs, False)
    return replay


def test_weights_and_hinge_by_hand():
    alpha = torch.tensor([0.2, 0.05])
    assert picor.task_weights(alpha, 1.0).tolist() == pytest.approx([0.537430, 0.462570], abs=1e-6)
    weights = picor.task_weights(alpha, 0.1)
    assert weights.tolist() == pytest.approx([0.817574, 0.182426], abs=1e-6)
    for advantages, expected in (((-0.05, 0.02), 0.036230), ((0.01, -0.02), 0.0), ((-0.0005, -0.0002), 0.0)):
        assert picor.hinge(torch.tensor(advantages), weights, -0.1, 0.99).item() == pytest.approx(expected, abs=1e-6)
    now = picor.Args(method="soft-modules"), picor.Args(weight_tau=0.1), picor.Args(no_adaptive_weights=True)
    given = [picor.current_weights(args, alpha.log(), [500, 999]).tolist() for args in now]    # warm-up: 500 updates
    assert sum(given, []) == pytest.approx([0.2, 0.8, *weights.tolist(), 0.5, 0.5])
    assert picor.current_weights(now[1], alpha.log(), [499, 999]).tolist() == [0.5, 0.5]


def test_goals_cheetahs_and_the_range_of_deviations(monkeypatch):
    goal = picor.GoalTask("north-east", np.eye(4)[0])
    for offset, reward in ((0.14, 1 - 0.14), (0.16, -0.16)):
        goal.state = goal.goal + (offset - 0.1, 0)
        assert goal.step(np.array([5.0, 0]))[1:] == (pytest.approx(reward), False, {"success": reward > 0})
    cheetah, info = picor.CheetahTask("BigLeg", np.ones(1)), {}
    monkeypatch.setattr(picor.HalfCheetahEnv, "step", lambda *given: (np.zeros(17), 7, False, False, info))
    for info["x_velocity"], success in ((2.9, False), (3.1, True)):
        assert cheetah.step(np.zeros(6))[1:] == (7, False, {"success": success})
    agent = make()[1]
    agent.actor.params[-1].data[..., 2:], agent.actor.params[-2].data[:] = torch.tensor([-99.0, 99.0]), 0
    assert agent.policy(torch.randn(4, 3, 8))[1][2, 1].tolist() == [-5, 2]


def test_ktms_second_phase_begins_with_its_critics_as_targets_and_fresh_optimizers():
    args, agent, optimizers = make("ktm", offline_updates=5)
    teachers = torch.nn.ModuleList(picor.make_agent(args, 8, 2) for _ in range(4))
    for count in (4, 5):
        picor.imitate(args, agent, optimizers, teachers, filled(), count, np.random.default_rng(0))
        pairs = zip(agent.target.parameters(), agent.critic.parameters())
        assert all(torch.equal(*pair) for pair in pairs) == (not optimizers["actor"].state) == (count == 5)


def test_blocks():
    args = picor.Args(total_timesteps=1_000, learning_starts=10, block_steps=50, task_order="cycle")
    schedule = picor.draw_schedule(args)
    assert len(schedule) == 1_000 and schedule[:40].tolist() == sorted([0, 1, 2, 3] * 10)
    assert schedule[40::50][:6].tolist() == [0, 1, 2, 3, 0, 1] and (schedule[40:90] == 0).all()


def test_replay_keeps_the_newest_also_from_a_checkpoint():
    replay = picor.TaskReplay([3, 2], 1, 1, "cpu")
    for value in range(5):
        replay.add(0, [value], [0], float(value), [value], False)
    assert sorted(set(replay.sample(np.random.default_rng(0), [0], 50)[2].flatten().tolist())) == [2, 3, 4]
    assert set(replay.sample(np.random.default_rng(0), [0], 50, recent=1)[2].flatten().tolist()) == {4}
    other = picor.TaskReplay([3, 2], 1, 1, "cpu")
    other.restore(replay.get_state())
    other.add(0, [5], [0], 5.0, [5], False)
    assert sorted(other.data[0][:, 2].tolist()) == [3, 4, 5]           # the oldest has made room


def test_soft_modules_against_a_plain_forward_pass():
    """The lines of the Soft Modularization sheet for one network, one observation at a time."""
    torch.manual_seed(0)
    net = picor.SoftModules(2, 3, 4, [7, 50, 50, 5]).double()
    for param in [*net.logits.parameters(), *net.output.parameters()]:
        param.data *= 300                                              # they start near 0, where all mixtures are even
    x = torch.randn(3, 4, 7).double()
    out = net(x)
    assert out.shape == (2, 3, 4, 5)

    def run(mlp, row, value):                                          # one network of a stack
        return mlp(value.expand(mlp.stack[1], 1, -1)).flatten(0, 1)[row, 0]
    for c in range(2):
        for obs, expected in zip(x.reshape(-1, 7), out[c].reshape(-1, 5)):
            base = run(net.base, c, torch.cat([obs[:4], obs[7:]]))
            gate = run(net.gate, c, (base * run(net.embed, c, obs[4:7])).relu())
            modules, earlier = [run(net.layers[0], 4 * c + m, base.relu()) for m in range(4)], []
            for layer in range(4):
                u = gate if layer == 0 else gate * run(net.conditions[layer - 1], c, torch.cat(earlier))
                weights = run(net.logits[layer], c, u.relu()).view(-1, 4).softmax(1)
                earlier.append(weights.flatten())
                mixed = [sum(w * module for w, module in zip(row, modules)).relu() for row in weights]
                if layer < 3:
                    modules = [run(net.layers[layer + 1], 4 * c + m, mixed[m]) for m in range(4)]
            torch.testing.assert_close(run(net.output, c, mixed[0]), expected)


def test_a_correction_of_two_steps_against_plain_sums():
    args, agent, _ = make(correction_steps=2)
    args.c, before = 300.0, torch.randn(2, 4, 6, 2).double() / 2      # so much is never gained
    for param in agent.double().parameters():
        param.data += 0.1 * torch.randn(param.shape)
    states, weights, plain = torch.randn(4, 6, 8).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]), copy.deepcopy(agent)
    torch.manual_seed(5)
    descent = torch.optim.SGD(agent.actor.parameters(), 1e-4)
    found = picor.correct(args, agent, descent, states, before, weights.double())
    torch.manual_seed(5)
    noise, *draws = [torch.randn(4, 6, 2).double() for _ in range(5)]

    def value(policy):
        actions, log_prob = squashed_gaussian(*policy, noise)
        return torch.minimum(*plain.q(plain.critic, states, actions)) - plain.log_alpha.exp()[:, None].detach() * log_prob
    q = torch.stack([torch.minimum(*plain.q(plain.critic, states, squashed_gaussian(*before, draw)[0])) for draw in draws])
    old_value, old, params = value(before), [each.detach() for each in plain.policy(states)], list(plain.actor.parameters())
    for step in range(2):
        mean, log_std = plain.policy(states)
        gains = [(value((mean, log_std))[z] - old_value[z]).mean() / q[:, z].std(0).mean() for z in range(4)]
        missing = 300 * (1 - args.gamma) - sum(w * gain for w, gain in zip(weights, gains))
        if step == 0:
            assert found["hinge"].item() == pytest.approx(missing.item()) and missing > 0
        kl = torch.distributions.kl_divergence(Normal(mean, log_std.exp()), Normal(old[0], old[1].exp())).sum(-1).mean()
        for param, grad in zip(params, torch.autograd.grad(kl + args.penalty / 2 * missing**2, params)):
            param.data -= 1e-4 * grad
    for new, expected in zip(agent.parameters(), plain.parameters()):  # nothing but the policy has moved
        torch.testing.assert_close(new, expected, atol=1e-12, rtol=1e-9)
    args.c = -1e9                                                      # everything may be lost
    again = picor.correct(args, agent, descent, states, before, weights.double())
    assert [found["steps"], again["steps"], again["hinge"]] == [2, 0, 0] and found["kl"] > again["kl"] == 0


@pytest.mark.parametrize("method, settings, offline", [
    ("picor", {}, False), ("picor", {"no_correction": True}, False), ("picor", {"critic_batch": "active"}, False),
    ("mtsac", {}, False), ("mtmhsac", {}, False), ("g-surgery", {}, False), ("soft-modules", {}, False),
    ("independent", {}, False), ("ktm", {}, False), ("ktm", {"offline_updates": 9}, True)])
def test_phase_one_against_plain_sums(method, settings, offline, monkeypatch):
    """An update of task 2 in float64, loss by loss and task by task, through networks that other tests know."""
    args, agent, optimizers = make(method, **settings)
    monkeypatch.setattr(picor, "correct", lambda *given: {})           # that is phase 2
    for param in agent.double().parameters():                          # targets, temperatures: nothing is like another
        param.data += 0.1 * torch.randn(param.shape)
    optimizers = {name: torch.optim.SGD(each.param_groups[0]["params"], 0.1) for name, each in optimizers.items()}
    plain, replay, everyone = copy.deepcopy(agent), filled(), [0, 1, 2, 3]
    replay.data = [rows.double() for rows in replay.data]
    teacher = picor.make_agent(args, 8, 2).double() if method == "ktm" else None
    judges = [plain.critic] * (not offline) + [teacher.critic for _ in range(method == "ktm")]         # of the policy
    active = [2] if method in ("picor", "independent", "ktm") else everyone
    judged = everyone if method == "picor" and "critic_batch" not in settings else active  # what critics learn from
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4] if method in ("picor", "soft-modules") else [0.25] * 4).double()
    corrected = method == "picor" and not args.no_correction           # then weights serve phase 2 alone
    ours, theirs = np.random.default_rng(1), np.random.default_rng(1)
    torch.manual_seed(5)
    picor.update(args, agent, optimizers, replay, 2, weights, ours, teacher, offline)

    def act(states):
        mean, log_std = plain.policy(states)
        return squashed_gaussian(mean, log_std, torch.randn(mean.shape).double())

    def descend(net, losses):
        params = list(net.parameters())
        each = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        rows = torch.stack([torch.cat([grad.flatten() for grad in grads]) for grads in each])
        if method == "g-surgery":
            rows = pcgrad.project_conflicts(rows, pcgrad.draw_visit_order(4, theirs))
        grads = [part.view_as(p) for p, part in zip(params, rows.mean(0).split([p.numel() for p in params]))]
        for c in range(net.output.stack[0]) if method == "soft-modules" else ():           # each network to a norm of 1
            parts = [grad.view(net.output.stack[0], -1)[c] for grad in grads]
            norm = torch.cat(parts).norm()
            for part in parts:
                part /= max(norm, 1)
        for param, grad in zip(params, grads):
            param.data -= 0.1 * grad
    torch.manual_seed(5)
    obs, actions, rewards, next_obs, ends = replay.sample(theirs, judged, 16 // len(judged))
    losses, alpha = [], plain.log_alpha.detach().exp()
    if offline:
        targets = teacher.q(teacher.critic, obs, actions).detach().unbind(1)               # (2, B) of each task
    else:
        ahead, log_prob = act(next_obs)
        values = plain.q(plain.target, next_obs, ahead).unbind(1)
        soft_values = [torch.minimum(*values[k]) - alpha[z] * log_prob[k] for k, z in enumerate(judged)]
        targets = [(rewards[k] + args.gamma * (1 - ends[k]) * value).detach() for k, value in enumerate(soft_values)]
    for z, q, target in zip(judged, plain.q(plain.critic, obs, actions).unbind(1), targets):
        losses.append((4 * weights[z] if method == "soft-modules" else 1) * (q - target).square().mean(1).sum())
    descend(plain.critic, losses)
    if corrected:
        replay.sample(theirs, everyone, args.correction_states, args.recent)
    obs = obs if active == judged else replay.sample(theirs, active, 16)[0]
    pi, log_prob = act(obs)
    q = sum(torch.minimum(*agent.q(critic, obs, pi)) for critic in judges)
    descend(plain.actor, [(1 if corrected else 4 * weights[z]) * (alpha[z] * log_prob[k] - q[k]).mean() for k, z in enumerate(active)])
    for k, z in enumerate(active):                                     # down where the entropy is above its target, -2
        plain.log_alpha.data[z] -= 0.1 * (2 - log_prob[k].mean().item())
    for old, online in zip(plain.target.parameters(), plain.critic.parameters()):
        old.data += 0.005 * (online.data - old.data)
    for new, expected in zip(agent.parameters(), plain.parameters()):
        torch.testing.assert_close(new, expected)
    assert not any(param.requires_grad for param in agent.target.parameters())
