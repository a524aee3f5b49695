"""pcgrad_sac.py, D-Grad(O), and dgrad_arch_sac.py, D-Grad(A); what has the same text in both is tested once."""
import metaworld
import metaworld.policies
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import squashed_gaussian

import dgrad_arch_sac as dg
import em_clustering_td3 as em
import pcgrad_sac as pc

T, B, OBS, A = 3, 5, 6, 2                                 # tasks, transitions per task, sizes of observation and action
METHODS = [(pc, "sac", {}), (pc, "multihead", {}), (pc, "pcgrad", {}), (pc, "pcgrad", {"heads": True}),
           (pc, "pcgrad", {"fixed_order": True}), (dg, "sac", {}), (dg, "dgrad-a", {})]
THREE = [[1, 0, 0], [-1, 1, 0], [0, -1, 1]]


@pytest.mark.parametrize("grads, order, projected", [
    ([[1, 0], [-1, 1]], (0, 1), [[0.5, 0.5], [0, 1]]),
    ([[1, 0], [-2, 2]], (0, 1), [[0.5, 0.5], [0, 2]]),                         # tells the paper's misprint apart
    (THREE, (0, 1, 2), [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [-0.5, -0.5, 1]]),
    (THREE, (2, 1, 0), [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, -0.5, 1]]),
    ([[1, 2], [-3, -6]], (0, 1), [[0, 0], [0, 0]]),                            # opposed
    ([[1, 2], [0, 0]], (0, 1), [[1, 2], [0, 0]]),                              # one without a gradient
    ([[1, 2], [2, 1]], (0, 1), [[1, 2], [2, 1]])])                             # no conflict
def test_projection_by_hand(grads, order, projected):
    visit_order = np.array([[j for j in order if j != i] for i in range(len(order))])
    result = pc.project_conflicts(torch.tensor(grads, dtype=torch.float64), visit_order)
    assert result.numpy() == pytest.approx(np.array(projected, float), abs=1e-6)


class Plain(nn.Module):
    """One copy of a stacked network as modules for loops, in float64: `linears[layer][task]`, or one that is shared."""

    def __init__(self, args, net, copy):
        super().__init__()
        end = 2 * len(args.hidden_sizes) + 2
        params = [param.data.unflatten(0, (net.stack[0], -1))[copy].clone() for param in net.params]
        self.linears = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in stack) for stack in params[:end:2])
        for layer, weights, biases in zip(self.linears, params[:end:2], params[1:end:2]):
            for linear, weight, bias in zip(layer, weights, biases):
                linear.weight.data, linear.bias.data = weight.T, bias[0]
        self.own = nn.ModuleList(nn.ParameterList([*stack]) for stack in params[end:])       # M, beta of each layer
        self.shared = [p for stack in [*self.linears, *self.own] if len(stack) == 1 for p in stack.parameters()]

    def forward(self, x, task):
        for layer, stack in enumerate(self.linears):
            x = stack[task % len(stack)](x)
            if layer == len(self.linears) - 1:
                return x
            x, own = x.clamp(min=0), [stack[task % len(stack)] for stack in self.own[2 * layer:2 * layer + 2]]
            x = x @ own[0] + own[1] if own else x

    def q(self, obs, actions, task):
        return self(torch.cat([obs, actions], -1), task)[:, 0]

    def sample(self, obs, task, noise):
        mean, log_std = self(obs, task).chunk(2, -1)
        return squashed_gaussian(mean, log_std.clamp(-20, 2), noise)


def plain_step(args, nets, loss_of, rng):
    """Descend the mean of `loss_of(task)` by 0.1 times the clipped gradient; returns what is measured on the way."""
    shared, params = [p for net in nets for p in net.shared], [p for net in nets for p in net.parameters()]
    losses = [loss_of(task) for task in range(T)]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]) for loss in losses]
    grads, projected = dict(zip(params, torch.autograd.grad(sum(losses) / T, params))), [row.clone() for row in rows]
    for i in range(T) if args.method == "pcgrad" else ():
        others = [j for j in range(T) if j != i]
        for j in others if args.fixed_order else rng.permutation(others):
            if (dot := (projected[i] * rows[j]).sum()) < 0:
                projected[i] -= dot / (rows[j] * rows[j]).sum() * rows[j]
    parts = (sum(projected) / T).split([p.numel() for p in shared])
    grads |= {p: part.view_as(p) for p, part in zip(shared, parts)}
    norm = sum(grad.square().sum() for grad in grads.values()) ** 0.5
    for param, grad in grads.items():
        param.data -= 0.1 * grad * min(1, args.max_grad_norm / (norm + 1e-6))
    cosines = torch.tensor([[one @ other / one.norm() / other.norm() for other in rows] for one in rows])
    pairs = cosines[~torch.eye(T, dtype=bool)]
    return {"norm_ratio": sum(projected).norm() / sum(rows).norm(), "cosines": cosines, "cosine": pairs.mean(),
            "abs_cosine": pairs.abs().mean(), "conflicts": (pairs < 0).double().mean(), "losses": torch.stack(losses)}


def plain_update(args, nets, log_alpha, batch, rng):
    """One SAC step in loops; returns what `plain_step` does, of critics and policy."""
    (obs, actions, rewards, next_obs, ends), alpha, (actor, *critics) = batch, log_alpha.detach().exp(), nets[:3]
    next_noise, noise, target = torch.randn(T, B, A), torch.randn(T, B, A), []
    for k in range(T):
        action, log_prob = actor.sample(next_obs[k], k, next_noise[k])
        value = torch.minimum(*(qf.q(next_obs[k], action, k) for qf in nets[3:])) - alpha[k] * log_prob
        target.append(rewards[k] + 0.9 * torch.where(ends[k] == 1, 0, value).detach())

    def actor_loss(k):
        action, log_prob = actor.sample(obs[k], k, noise[k])
        return (alpha[k] * log_prob - torch.minimum(*(qf.q(obs[k], action, k) for qf in critics))).mean()
    steps = {"critic": plain_step(args, critics, lambda k: sum(
        (qf.q(obs[k], actions[k], k) - target[k]).square().mean() for qf in critics), rng)}
    log_prob = torch.stack([actor.sample(obs[k], k, noise[k])[1].detach() for k in range(T)])
    steps["actor"] = plain_step(args, [actor], actor_loss, rng)
    temperature_loss = -(log_alpha * (log_prob - A).mean(1)).sum()             # the target entropy is -A
    log_alpha.data -= 0.1 * torch.autograd.grad(temperature_loss, log_alpha)[0]
    for old, new in zip(nets[3:].parameters(), nets[1:3].parameters()):
        old.data = 0.8 * old.data + 0.2 * new.data
    return steps


@pytest.mark.parametrize("script, method, settings", METHODS)
def test_update_against_plain_modules(script, method, settings):
    args = script.Args(method=method, hidden_sizes=(8, 7), max_grad_norm=4.5, tau=0.2, gamma=0.9,
                       tasks=("reach", "push", "sweep"), **settings)
    torch.manual_seed(0)
    agent = script.make_agent(args, OBS, A).double()
    for param in agent.parameters():                                           # biases, temperatures, targets differ
        param.data += 0.1 * torch.randn(param.shape)
    optimizers = {name: torch.optim.SGD(params, 0.1) for name, params in (
        ("actor", agent.actor.parameters()), ("critic", agent.critic.parameters()), ("alpha", [agent.log_alpha]))}

    def plain():
        stacks = (agent.actor, 0), (agent.critic, 0), (agent.critic, 1), (agent.target, 0), (agent.target, 1)
        return nn.ModuleList(Plain(args, net, copy) for net, copy in stacks)
    nets, log_alpha = plain(), agent.log_alpha.detach().clone().requires_grad_()
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    for watch in (False, True, False, True):                                   # measuring changes nothing
        rewards, ends = torch.randn(T, B) + torch.tensor([[-4], [0], [4]]), torch.rand(T, B) < 0.3
        batch = [torch.randn(T, B, OBS), torch.rand(T, B, A) * 2 - 1, rewards, torch.randn(T, B, OBS), ends]
        batch, generator = [x.double() for x in batch], torch.random.get_rng_state()
        losses, conflicts = script.update(args, agent, optimizers, batch, *[ours] * (script is pc), watch)
        torch.random.set_rng_state(generator)
        steps = plain_update(args, nets, log_alpha, batch, theirs)
        torch.testing.assert_close(losses["alpha"], log_alpha.exp().detach())
        for network, measured in steps.items():
            torch.testing.assert_close(losses[network], measured["losses"].detach())
        for key, value in conflicts.items():
            network, key = key.split("_", maxsplit=1)
            torch.testing.assert_close(value.double(), steps[network][key], atol=1e-7, rtol=1e-7)
        assert bool(conflicts) == watch and not any(param.requires_grad for param in agent.target.parameters())
    for new, old in zip(plain().parameters(), nets.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-12, rtol=1e-9)


def test_matrices_keep_lengths():
    turns = dg.initial_matrices(4, 64, dg.Args().m_init)
    assert torch.allclose(turns @ turns.mT, torch.eye(64), atol=1e-5)
    for m_init, mean in ((None, 0), ("gaussian", 0), ("identity", 1 / 256)):
        matrices, shifts = dg.make_agent(dg.Args(m_init=m_init, hidden_sizes=(256,)), 9, 4).critic.params[4:6]
        assert not shifts.any() and matrices.mean().item() == pytest.approx(mean, abs=0.005)
        assert matrices.std().item() == pytest.approx(1 / 16, rel=0.03)


@pytest.mark.parametrize("script, settings, layers, policy, critic", [                 # counts of the sheet, for MT10
    (pc, {"method": "sac"}, 6, 138_088, 137_601), (dg, {"method": "sac"}, 6, 138_088, 137_601),
    (pc, {"method": "multihead"}, 6, 138_088 + 9 * 1_288, 137_601 + 9 * 161),
    (pc, {"heads": True}, 6, 138_088 + 9 * 1_288, 137_601 + 9 * 161),
    (dg, {}, 3, 833_608, 60_321 + 772_800)])
def test_shared_layers_and_numbers_of_parameters(script, settings, layers, policy, critic):
    agent = script.make_agent(script.Args(env="mt10", hidden_sizes=(160,) * layers, **settings), 49, 4)
    assert [sum(p.numel() for p in net.parameters()) for net in (agent.actor, agent.critic)] == [policy, 2 * critic]
    assert agent.actor.params[2].abs().max() < (6 / 320) ** 0.5 < agent.critic.params[2].abs().max()          # xavier's
    assert agent.critic.params[2].std().item() == pytest.approx((2 / 320) ** 0.5, rel=0.03)


def test_squash_is_exact_where_the_tanh_is_saturated():
    log_prob = pc.squash(torch.tensor([[-40.0], [40.0]]), torch.zeros(2, 1), torch.zeros(2, 1))[1]
    assert log_prob.tolist() == pytest.approx([80 - np.log(4) - np.log(2 * np.pi) / 2] * 2)   # 1 - tanh^2 = 4 exp(-80)


@pytest.mark.parametrize("replay", [pc.ReplayBuffer, em.PolicyReplay])
def test_replay_is_a_ring_with_transitions_of_each_task(replay):
    buffer = replay(2, 3, 1, 1, "cpu")
    for t in range(1, 6):
        obs = np.array([[t], [10 + t]])
        buffer.add(obs, np.array([[0], [7]]), obs[:, 0] * 2, obs + 1, np.array([t == 4, False]))
        assert set(buffer.sample(np.random.default_rng(0), 50)[0][0, :, 0].tolist()) == set(range(max(1, t - 2), t + 1))
    obs, actions, rewards, next_obs, ends = buffer.sample(np.random.default_rng(0), 200)
    assert [set(row.flatten().tolist()) for row in obs] == [{3, 4, 5}, {13, 14, 15}] and len(buffer) == 3
    assert torch.equal(next_obs, obs + 1) and torch.equal(rewards, 2 * obs[..., 0]) and (actions[1] == 7).all()
    assert torch.equal(ends, (obs[..., 0] == 4).float())


def test_tasks_are_meta_worlds_and_success_is_that_of_any_step():
    benchmark, policy = metaworld.MT1("reach-v3", seed=3), metaworld.policies.SawyerReachV3Policy()
    stock = benchmark.train_classes["reach-v3"](reward_function_version="v2")
    stock.set_task(benchmark.train_tasks[0])
    args = pc.Args(tasks=("push", "reach"), seed=3, num_goals=1, horizon=100)
    envs = pc.MetaWorldTasks(args, np.random.default_rng(0))
    obs, total = stock.reset()[0], 0.0
    for t in range(100):
        action = policy.get_action(obs) if t < 80 else np.array([0, -3.0, 1, 0])                  # arrives, then leaves
        assert envs.obs[1] == pytest.approx([*obs, 0, 1], abs=1e-6) and envs.obs.dtype == np.float32
        next_obs, rewards, ended = envs.step(np.array([np.zeros(4), action], action.dtype))
        obs, reward, _, _, info = stock.step(action.clip(-1, 1))
        total += reward
        assert next_obs[1] == pytest.approx([*obs, 0, 1], abs=1e-6) and rewards[1] == reward
        assert bool(ended) == (t == 99)
    assert {key: values[1] for key, values in ended.items()} == {"episodic_return": pytest.approx(total),
                                                                 "episodic_length": 100, "success": 1}
    assert info["success"] == 0 and envs.obs[1] == pytest.approx([*stock.reset()[0], 0, 1], abs=1e-6)


def test_fifty_episodes_meet_fifty_goals_once():
    args, seen = dg.Args(tasks=("reach",), eval_episodes=50, horizon=1), []
    result = dg.evaluate(args, lambda obs: seen.append(tuple(obs[0, 36:39])) or np.zeros((1, 4)))
    assert len(seen) == len(set(seen)) == 50 and result["return"].shape == result["success"].shape == (1, 50)


@pytest.mark.parametrize("script, tasks, method", [(pc, ("reach", "push"), "pcgrad"), (dg, ("reach",), "dgrad-a")])
def test_what_a_short_run_stores_updates_and_measures(script, tasks, method, tmp_path):
    state = pc.load_checkpoint(script.train(script.Args(
        method=method, tasks=tasks, total_timesteps=40 * len(tasks), learning_starts=10, update_every=2, horizon=8,
        eval_episodes=1, batch_size=4, hidden_sizes=(8, 8), watch_every=3, runs_dir=tmp_path)))
    obs, _, _, next_obs, ends = state["buffer"].split([39 + len(tasks), 4, 1, 39 + len(tasks), 1], -1)
    jumps = (obs[:, 1:] != next_obs[:, :-1]).any(-1)                           # the true last observation is stored
    assert torch.equal(jumps, (torch.arange(1, 40) % 8 == 0).expand(len(tasks), -1)) and not ends.any()
    for name, lr in (("actor", 3e-4), ("critic", 1e-3), ("alpha", 1e-3)):
        optimizer = state["optimizers"][name]
        assert optimizer["param_groups"][0]["lr"] == lr and optimizer["state"][0]["step"] == 15
    assert len(state["history"]) == len(tasks) - 1                             # one alone has no other to conflict with
    for _, measured in state["history"]:
        assert (measured["critic_cosines"].diag() - 1).abs().max() < 1e-5
