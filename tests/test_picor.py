"""PiCor: weights and hinge by hand, phase 1 and both new rows against plain code, blocks, replay, environments."""
import numpy as np
import pytest
import torch

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


def test_blocks():
    args = picor.Args(total_timesteps=1_000, learning_starts=10, block_steps=50, task_order="cycle")
    schedule = picor.draw_schedule(args)
    assert len(schedule) == 1_000 and schedule[:40].tolist() == sorted([0, 1, 2, 3] * 10)
    assert schedule[40::50][:6].tolist() == [0, 1, 2, 3, 0, 1] and (schedule[40:90] == 0).all()


def test_replay_keeps_the_newest_and_restores():
    replay = picor.TaskReplay([3, 2], 1, 1, "cpu")
    for value in range(5):
        replay.add(0, [value], [0], float(value), [value], False)
    assert sorted(set(replay.sample(np.random.default_rng(0), [0], 50)[2].flatten().tolist())) == [2, 3, 4]
    assert set(replay.sample(np.random.default_rng(0), [0], 50, recent=1)[2].flatten().tolist()) == {4}
    other = picor.TaskReplay([3, 2], 1, 1, "cpu")
    other.restore(replay.get_state())
    assert [rows.tolist() for rows in other.get_state()] == [rows.tolist() for rows in replay.get_state()]


def test_surgery_is_that_of_pcgrad(monkeypatch):
    """The same batch, noise and order of projections give the same networks as pcgrad_sac.py's update."""
    args, agent, optimizers = make("g-surgery", lr=1e-3)
    monkeypatch.setattr(agent, "policy", lambda obs, *p: pcgrad.SAC.policy(agent, obs, *p))
    theirs = pcgrad.Args(env="mt4", gamma=args.gamma, tau=args.tau, lr=1e-3, critic_lr=1e-3, max_grad_norm=1e9)
    def sgd(params):                                                   # unlike Adam it sees the length of a gradient
        return torch.optim.SGD(params, 1e-2)
    twin = pcgrad.SAC(*(pcgrad.TaskMLP(c, 4, sizes, 3) for c, sizes in ((1, [8, 16, 16, 4]), (2, [10, 16, 16, 1]))), 4)
    for name, param in twin.named_parameters():
        param.data = agent.get_parameter(name).detach().clone()
    theirs_opt = {"actor": sgd(twin.actor.parameters()), "alpha": sgd([twin.log_alpha]), "critic": sgd(twin.critic.parameters())}
    optimizers = {name: sgd(each.param_groups[0]["params"]) for name, each in optimizers.items()}
    replay, rngs = filled(), [np.random.default_rng(1), np.random.default_rng(1)]
    for step in range(5):
        torch.manual_seed(step)
        picor.update(args, agent, optimizers, replay, 0, torch.full((4,), 0.25), rngs[0])
        torch.manual_seed(step)
        batch = replay.sample(rngs[1], [0, 1, 2, 3], 4)
        pcgrad.update(theirs, twin, theirs_opt, batch, rngs[1])
    for name in ("actor", "critic", "target"):
        for ours, other in zip(getattr(agent, name).parameters(), getattr(twin, name).parameters()):
            torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_soft_modules_against_a_plain_forward_pass():
    """The lines of the Soft Modularization sheet for one network, one observation at a time."""
    torch.manual_seed(0)
    net = picor.SoftModules(2, 3, 4, [7, 50, 50, 5])
    for param in [*net.logits.parameters(), *net.output.parameters()]:
        param.data *= 300                                              # they start near 0, where all mixtures are even
    x = torch.randn(3, 4, 7)
    out = net(x)
    assert out.shape == (2, 3, 4, 5)

    def run(mlp, row, value):                                          # linear layers with relu in between
        params = list(mlp.params)
        for i in range(0, len(params), 2):
            value = value @ params[i][row] + params[i + 1][row, 0]
            value = value.relu() if i < len(params) - 2 else value
        return value
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
            torch.testing.assert_close(run(net.output, c, mixed[0]), expected, atol=1e-5, rtol=1e-4)


def test_correction_undoes_a_loss_stops_when_nothing_is_lost_and_moves_only_the_policy(monkeypatch):
    args, agent, optimizers = make(correction_steps=3, hard_advantage=True)
    monkeypatch.setattr(agent, "q", lambda critic, obs, actions: -actions.square().sum(-1).expand(2, -1, -1))
    states, weights, last = torch.randn(4, 6, 8), torch.full((4,), 0.25), agent.actor.params[-1]
    with torch.no_grad():
        last[..., :2] = 0.0
        before = agent.policy(states)
    found = picor.correct(args, agent, optimizers["correction"], states, before, weights)
    assert found["steps"].item() == 0 and found["kl"].item() == pytest.approx(0, abs=1e-6)       # nothing has moved
    with torch.no_grad():
        last[..., :2] += 1.0                                           # phase 1 moves all actions away from 0
        spoilt = agent.policy(states)[0].tanh().abs().mean()
    critic = [param.detach().clone() for param in agent.critic.parameters()]
    found = picor.correct(args, agent, optimizers["correction"], states, before, weights)
    assert (found["advantage"] < 0).all() and found["hinge"] > 0 and found["steps"].item() == 3
    assert agent.policy(states)[0].tanh().abs().mean() < spoilt and found["kl"] > 0
    assert all(map(torch.equal, critic, agent.critic.parameters()))
    args.c = -1e9                                                      # everything may be lost
    assert picor.correct(args, agent, optimizers["correction"], states, before, weights)["steps"].item() == 0


@pytest.mark.parametrize("method", ["picor", "mtsac", "mtmhsac"])
def test_targets_follow_and_carry_no_graph(method):
    args, agent, optimizers = make(method)
    old = [param.detach().clone() for param in agent.target.parameters()]
    picor.update(args, agent, optimizers, filled(), 1, torch.full((4,), 0.25), np.random.default_rng(0))
    for target, was, now in zip(agent.target.parameters(), old, agent.critic.parameters()):
        assert target.is_leaf and not target.requires_grad
        torch.testing.assert_close(target, was + args.tau * (now - was), atol=1e-6, rtol=1e-5)


def test_only_the_active_tasks_temperature_moves():
    args, agent, optimizers = make("picor")
    before = agent.log_alpha.detach().clone()
    picor.update(args, agent, optimizers, filled(), 2, torch.full((4,), 0.25), np.random.default_rng(0))
    assert (agent.log_alpha != before).tolist() == [False, False, True, False]
    assert agent.log_alpha[2] < before[2]                              # the entropy, -0.2, is above its target of -2
    with torch.no_grad():
        agent.actor.params[-1][..., 2:] = -3.0                         # nearly deterministic: entropy of about -7
    before = agent.log_alpha.detach().clone()
    picor.update(args, agent, optimizers, filled(), 0, torch.full((4,), 0.25), np.random.default_rng(0))
    assert agent.log_alpha[0] > before[0]
