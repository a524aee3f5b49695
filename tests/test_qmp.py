"""QMP: the Q-switch by hand, its control, one update against plain loops in float64, environments by their facts."""
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import qmp_sac as qmp


def make(method="separated", tasks=(0, 1, 2), **settings):
    args = qmp.Args(method=method, tasks=tasks, hidden_size=8, device="cpu", **settings)
    torch.manual_seed(0)
    agent = qmp.make_agent(args, 4, 2)
    params = {"actor": agent.actor.parameters(), "critic": agent.critic.parameters(), "alpha": [agent.log_alpha]}
    return args, agent, {name: torch.optim.Adam(group, args.lr) for name, group in params.items()}


def deterministic(agent, means):
    """Policies that always act tanh(means[j]) in both dimensions, whatever they see."""
    for param in agent.actor.params:
        param.data.zero_()
    agent.actor.params[-1].data[:, 0, :2] = torch.tensor(means)[:, None]
    agent.actor.params[-1].data[:, 0, 2:] = -20.0


def test_the_switch_takes_what_each_tasks_own_critic_prefers(monkeypatch):
    args, agent, _ = make("qmp")
    deterministic(agent, [-1.0, 0.0, 1.0])
    sign = torch.tensor([1.0, -1.0, 1.0])[:, None]                     # task 1's critic likes what others dislike

    def q(critic, obs, actions):                                       # only the online critics may be asked
        return torch.stack([sign * actions[..., 0], torch.full(actions.shape[:2], 9.0)]) if critic is agent.critic else None
    monkeypatch.setattr(agent, "q", q)
    actions, chosen = qmp.behave(args, agent, np.zeros((3, 4), np.float32), "qmp")
    assert chosen.tolist() == [2, 0, 2] and actions[:, 0] == pytest.approx(np.tanh([1, -1, 1]), abs=1e-4)
    actions, chosen = qmp.behave(args, agent, np.zeros((3, 4), np.float32), "separated")
    assert chosen.tolist() == [0, 1, 2] and actions[:, 1] == pytest.approx(np.tanh([-1, 0, 1]), abs=1e-4)


def test_the_control_picks_among_samples_of_the_own_policy(monkeypatch):
    args, agent, _ = make("qmp-own")
    deterministic(agent, [-1.0, 0.0, 1.0])
    agent.actor.params[-1].data[:, 0, 2:] = -3.0                       # a little noise, so that samples differ
    monkeypatch.setattr(agent, "q", lambda critic, obs, actions: actions[..., 0].expand(2, -1, -1))
    torch.manual_seed(1)
    actions, chosen = qmp.behave(args, agent, np.zeros((3, 4), np.float32), "qmp-own")
    torch.manual_seed(1)
    samples = torch.tanh(torch.tensor([-1.0, 0.0, 1.0])[:, None, None] + np.exp(-3) * torch.randn(3, 3, 2))
    best = samples[..., 0].argmax(1)
    assert chosen.tolist() == [0, 1, 2]                                # nothing is borrowed
    assert actions == pytest.approx(samples[torch.arange(3), best].numpy(), abs=1e-5)


def plain(params, row, x):
    for layer in range(0, len(params), 2):
        x = x @ params[layer][row] + params[layer + 1][row, 0]
        x = x.relu() if layer < len(params) - 2 else x
    return x


@pytest.mark.parametrize("method", ["separated", "dnc-reg"])
def test_one_update_against_plain_loops(method, monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        args, agent, optimizers = make(method, gamma=0.9, tau=0.1)
        agent.log_alpha.data = torch.tensor([0.1, -0.4, 0.3])
        for param in agent.target.parameters():
            param += 0.3 * torch.randn_like(param)                     # targets must not be mistaken for what they follow
        batch = [torch.randn(3, 6, 4), torch.rand(3, 6, 2) * 2 - 1, torch.randn(3, 6), torch.randn(3, 6, 4),
                 (torch.rand(3, 6) < 0.3).double()]
        actor, critic, target = ([p.detach().clone().requires_grad_() for p in net.parameters()]
                                 for net in (agent.actor, agent.critic, agent.target))
        torch.manual_seed(5)
        noise = torch.randn(3, 6, 2), torch.randn(3, 6, 2)
        torch.manual_seed(5)
        log_alpha = agent.log_alpha.detach().clone()
        qmp.update(args, agent, optimizers, batch)
        obs, actions, rewards, next_obs, ends = batch

        def act(row, states, eps):
            mean, log_std = plain(actor, row, states).chunk(2, -1)
            law = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
            before = mean + log_std.exp() * eps
            return before.tanh(), (law.base_dist.log_prob(before) - torch.log(1 - before.tanh().square())).sum(-1), mean, log_std

        def q(params, row, states, act):
            pair = torch.cat([states, act], -1)
            return [plain(params, row, pair)[:, 0], plain(params, row + 3, pair)[:, 0]]
        critic_loss = actor_loss = 0
        entropies = []
        for i in range(3):
            with torch.no_grad():
                a, log_prob, *_ = act(i, next_obs[i], noise[0][i])
                y = rewards[i] + 0.9 * (1 - ends[i]) * (torch.min(*q(target, i, next_obs[i], a)) - log_alpha[i].exp() * log_prob)
            critic_loss = critic_loss + sum((value - y).square().mean() for value in q(critic, i, obs[i], actions[i]))
        adam = torch.optim.Adam(critic, args.lr)
        critic_loss.backward()
        adam.step()
        states = obs[:, :2].reshape(6, 4)
        for i in range(3):
            a, log_prob, *_ = act(i, obs[i], noise[1][i])
            entropies.append(-log_prob.mean().item())
            actor_loss = actor_loss + (log_alpha[i].exp() * log_prob - torch.min(*q(critic, i, obs[i], a))).mean()
            for j in range(3) if method == "dnc-reg" else ():
                laws = [Normal(mean, log_std.exp()) for *_, mean, log_std in (act(k, states, torch.zeros(6, 2)) for k in (j, i))]
                there = Normal(laws[0].loc.detach(), laws[0].scale.detach())
                actor_loss = actor_loss + args.kl_weight * torch.distributions.kl_divergence(there, laws[1]).mean()
        adam = torch.optim.Adam(actor, args.lr)
        for param, grad in zip(actor, torch.autograd.grad(actor_loss, actor)):
            param.grad = grad
        adam.step()
        for net, params in ((agent.actor, actor), (agent.critic, critic)):
            for ours, theirs in zip(net.parameters(), params):
                torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
        for ours, old, new in zip(agent.target.parameters(), target, critic):
            torch.testing.assert_close(ours, 0.9 * old + 0.1 * new, atol=1e-9, rtol=0)
        assert agent.log_alpha.grad.tolist() == pytest.approx([entropy + 2 for entropy in entropies])
    finally:
        torch.set_default_dtype(torch.float32)


def test_divergence_by_hand_and_distillation():
    mean, log_std = torch.tensor([0.0, 1.0])[:, None, None], torch.zeros(2, 1, 1)
    assert qmp.pairwise_kl(mean, log_std).tolist() == [[0.0, 0.5], [0.5, 0.0]]             # KL(N(0, 1), N(1, 1))
    args, agent, _ = make("dnc")
    buffer = qmp.ReplayBuffer(3, 20, 4, 2, "cpu")
    for _ in range(20):
        buffer.add(np.random.randn(3, 4), np.random.rand(3, 2) * 2 - 1, np.zeros(3), np.zeros((3, 4)), np.zeros(3))
    critic = [param.clone() for param in agent.critic.parameters()]
    qmp.distill(args, agent, torch.optim.Adam(agent.centroid, 1e-3), buffer, np.random.default_rng(0), minibatches=3)
    assert all(torch.equal(param[0], param[2]) for param in agent.actor.params)
    assert all(map(torch.equal, critic, agent.critic.parameters()))


def test_maze_and_reacher_are_the_papers():
    rng = np.random.default_rng(0)
    maze = qmp.make_envs(qmp.Args(env="maze", device="cpu"), rng)
    assert maze.obs.shape == (10, 4) and maze.horizon == 600
    assert maze.envs[0].model.body_mass.max() == pytest.approx(4.18879, abs=1e-4)
    before = maze.obs[0].astype(float)
    next_obs, rewards, terminations, _ = maze.step(np.ones((10, 2)))
    assert (rewards < 0).all() and not terminations.any()
    speed = (before[2:] + 0.01 * 100 / 4.18879) / (1 + 0.01 * 1 / 4.18879)     # implicit damping of 1
    assert next_obs[0, 2:] == pytest.approx(speed, abs=1e-3)
    reacher = qmp.make_envs(qmp.Args(env="reacher", device="cpu"), rng)
    assert reacher.obs.shape == (5, 15) and reacher.horizon == 200
    assert reacher.envs[0].data.body("hand").xpos == pytest.approx([0.410, 0.119, 0.239], abs=0.02)
    still = reacher.envs[4]
    for touches, stage in ((0, 0), (28, 0), (29, 1), (88, 2), (89, 3)):        # thirty steps near the start are a stage
        still.reset(rng)
        still.touches = touches
        _, _, over, info = still.step(np.zeros(6))
        assert info == {"success": stage == 3, "touched": True, "stages": stage} and over == (stage == 3)
    reacher.reset()
    episodes = {}
    for _ in range(200):
        episodes |= reacher.step(np.zeros((5, 6)))[-1]
    assert episodes[4]["touched"] == 1 and episodes[4]["success"] == 0         # the authors' success at its first step
    assert episodes[0].keys() >= {"success", "touched", "stages"}
