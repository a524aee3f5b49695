"""QMP: the Q-switch by hand, its control, one update against plain sums in float64, environments by their facts."""
import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import squashed_gaussian
from torch.distributions import Normal

import qmp_sac as qmp


def make(method="separated", tasks=(0, 1, 2), **settings):
    args = qmp.Args(method=method, tasks=tasks, hidden_size=8, device="cpu", **settings)
    torch.manual_seed(0)
    return args, qmp.make_agent(args, 4, 2)


def deterministic(agent, means, monkeypatch):
    """Policies that always act tanh(means[j]) in both dimensions; returns the list of what they get to see."""
    for param in agent.actor.params:
        param.data.zero_()
    agent.actor.params[-1].data[:, 0, :2] = torch.tensor(means)[:, None]
    agent.actor.params[-1].data[:, 0, 2:], seen, policy = -20.0, [], agent.policy
    monkeypatch.setattr(agent, "policy", lambda obs: seen.append(obs) or policy(obs))
    return seen


def test_the_switch_takes_what_each_tasks_own_critic_prefers(monkeypatch):
    args, agent = make("qmp")
    seen = deterministic(agent, [-1.0, 0.0, 1.0], monkeypatch)
    sign = torch.tensor([1.0, -1.0, 1.0])[:, None]                     # task 1's critic likes what others dislike
    states = np.arange(12, dtype=np.float32).reshape(3, 4)

    def q(critic, obs, actions):
        assert critic is agent.critic and np.array_equal(obs, states[:, None].repeat(3, 1))        # row i is of task i
        return torch.stack([9 - sign * actions[..., 0], sign * actions[..., 0]])         # the second is smaller
    monkeypatch.setattr(agent, "q", q)
    actions, chosen = qmp.behave(args, agent, states, "qmp")
    assert chosen.tolist() == [2, 0, 2] and actions[:, 0] == pytest.approx(np.tanh([1, -1, 1]), abs=1e-4)
    actions, chosen = qmp.behave(args, agent, states, "separated")
    assert chosen.tolist() == [0, 1, 2] and actions[:, 1] == pytest.approx(np.tanh([-1, 0, 1]), abs=1e-4)
    assert np.array_equal(seen[0], states[None].repeat(3, 0)) and np.array_equal(seen[1], states[:, None])   # of all, own
    args.switch_action, args.switch_q = "mean", "q1"                   # the released switch: means, by the first twin
    agent.actor.params[-1].data[:, 0, 2:] = 2.0                        # samples are mostly noise
    assert [qmp.behave(args, agent, states, "qmp")[1].tolist() for _ in range(3)] == [[0, 2, 0]] * 3


def test_the_control_picks_among_samples_of_the_own_policy(monkeypatch):
    args, agent = make("qmp-own")
    states, seen = np.eye(3, 4, dtype=np.float32), deterministic(agent, [-1.0, 0.0, 1.0], monkeypatch)
    agent.actor.params[-1].data[:, 0, 2:] = -3.0                       # a little noise, so that samples differ
    monkeypatch.setattr(agent, "q", lambda critic, obs, actions: actions[..., 0].expand(2, -1, -1))
    torch.manual_seed(1)
    actions, chosen = qmp.behave(args, agent, states, "qmp-own")
    torch.manual_seed(1)
    samples = torch.tanh(torch.tensor([-1.0, 0.0, 1.0])[:, None, None] + np.exp(-3) * torch.randn(3, 3, 2))
    best = samples[..., 0].argmax(1)
    assert chosen.tolist() == [0, 1, 2] and np.array_equal(seen[0], states[:, None].repeat(3, 1))    # nothing borrowed
    assert actions == pytest.approx(samples[torch.arange(3), best].numpy(), abs=1e-5)


@pytest.mark.parametrize("method", ["separated", "shared", "shared-multihead", "dnc-reg"])
def test_one_update_against_plain_sums(method):
    """In float64, task by task, through networks that tests/test_dgrad.py compares with plain modules."""
    args, agent = make(method, gamma=0.9, tau=0.1)
    for param in agent.double().parameters():                          # targets, temperatures: nothing is like another
        param.data += 0.3 * torch.randn(param.shape)
    params = {"actor": agent.actor.parameters(), "critic": agent.critic.parameters(), "alpha": [agent.log_alpha]}
    optimizers, plain = {name: torch.optim.SGD(group, 0.1) for name, group in params.items()}, copy.deepcopy(agent)
    batch = [torch.randn(3, 6, 4), torch.rand(3, 6, 2) * 2 - 1, torch.randn(3, 6), torch.randn(3, 6, 4),
             torch.rand(3, 6) < 0.3]
    batch = obs, actions, rewards, next_obs, ends = [column.double() for column in batch]
    torch.manual_seed(5)
    qmp.update(args, agent, optimizers, batch)

    def act(states):
        mean, log_std = plain.policy(states)
        return squashed_gaussian(mean, log_std, torch.randn(mean.shape).double())

    def descend(net, losses):
        for param, grad in zip(net.parameters(), torch.autograd.grad(sum(losses), list(net.parameters()))):
            param.data -= 0.1 * grad
    torch.manual_seed(5)
    ahead, log_prob = act(next_obs)
    values, alpha = plain.q(plain.target, next_obs, ahead), plain.log_alpha.detach().exp().expand(3)
    soft_values = [torch.minimum(*values[:, i]) - alpha[i] * log_prob[i] for i in range(3)]
    targets = [rewards[i] + 0.9 * (1 - ends[i]) * soft_values[i] for i in range(3)]
    q = plain.q(plain.critic, obs, actions)
    descend(plain.critic, [(q[:, i] - targets[i].detach()).square().mean(1).sum() for i in range(3)])
    pi, log_prob = act(obs)
    q = plain.q(plain.critic, obs, pi)
    losses = [(alpha[i] * log_prob[i] - torch.minimum(*q[:, i])).mean() for i in range(3)]
    mean, log_std = plain.policy(obs[:, :2].reshape(6, 4).expand(3, -1, -1))   # all in two states of each task
    for i, j in np.ndindex(3, 3) if method == "dnc-reg" else ():
        there, here = Normal(mean[j].detach(), log_std[j].detach().exp()), Normal(mean[i], log_std[i].exp())
        losses.append(args.kl_weight * torch.distributions.kl_divergence(there, here).mean())
    descend(plain.actor, losses)
    plain.log_alpha.data -= 0.1 * (2 - log_prob.mean(1).detach()).sum_to_size(plain.log_alpha.shape)     # target: -2
    for old, online in zip(plain.target.parameters(), plain.critic.parameters()):
        old.data = 0.9 * old.data + 0.1 * online.data
    for new, expected in zip(agent.parameters(), plain.parameters()):
        torch.testing.assert_close(new, expected)


def test_distillation():
    args, agent = make("dnc")
    buffer = qmp.ReplayBuffer(3, 20, 4, 2, "cpu")
    for _ in range(20):
        buffer.add(np.random.randn(3, 4), np.random.rand(3, 2) * 2 - 1, np.zeros(3), np.zeros((3, 4)), np.zeros(3))
    critic = [param.clone() for param in agent.critic.parameters()]
    qmp.distill(args, agent, torch.optim.Adam(agent.centroid, 1e-3), buffer, np.random.default_rng(0), minibatches=3)
    assert all(torch.equal(param[0], param[2]) for param in agent.actor.params)
    assert all(map(torch.equal, critic, agent.critic.parameters()))


def test_the_maze_is_the_papers():
    maze = qmp.make_envs(qmp.Args(env="maze", device="cpu"), np.random.default_rng(0))
    assert maze.obs.shape == (10, 4) and maze.horizon == 600
    assert maze.envs[0].model.body_mass.max() == pytest.approx(4.18879, abs=1e-4)
    assert "".join(qmp.MAZE).count("#") == maze.envs[0].model.ngeom - 2 == 62              # without floor and point
    assert all(qmp.MAZE[row][column] == "." for places in qmp.MAZE_TASKS for row, column in places)
    before = maze.obs[0].astype(float)
    next_obs, rewards, terminations, _ = maze.step(np.ones((10, 2)))
    assert (rewards < 0).all() and not terminations.any()
    speed = (before[2:] + 0.01 * 100 / 4.18879) / (1 + 0.01 * 1 / 4.18879)     # implicit damping of 1
    assert next_obs[0, 2:] == pytest.approx(speed, abs=1e-3)
    maze.envs[0].data.qvel[:] = 9
    assert maze.envs[0].step(np.zeros(2))[0][2:] == pytest.approx(5 / (1 + 0.01 / 4.18879), abs=1e-3)
    for distance, over in ((0.49, True), (0.51, False)):
        task = maze.envs[0]
        task.data.qpos[:], task.data.qvel[:] = task.goal + (distance, 0), 0
        assert task.step(np.zeros(2))[1:] == (pytest.approx(np.exp(-distance) - 1), over, {"success": over})


def test_the_reacher_is_the_papers():
    rng = np.random.default_rng(0)
    reacher = qmp.make_envs(qmp.Args(env="reacher", device="cpu"), rng)
    assert reacher.obs.shape == (5, 15) and reacher.horizon == 200
    assert reacher.envs[0].data.body("hand").xpos == pytest.approx([0.410, 0.119, 0.239], abs=0.02)
    for variant, gear in (("strong", 20), ("official", 10)):
        assert qmp.ReacherTask(0, variant).model.actuator_gear[:3, 0].tolist() == [5, gear, 10]
    for i, task in enumerate(reacher.envs):                                    # where the first goal is touched
        task.goals, body = task.goals.copy(), task.data.body("hand")
        task.goals[0] = body.xpos
        _, reward, over, info = task.step(np.full(6, 0.5))
        assert info == {"success": False, "touched": True, "stages": i < 4} and not over
        effort = 0.01 * 6 * 0.25 + 0.001 * np.abs(task.data.qvel).mean() + 1e-5 * np.abs(task.data.qacc).mean()
        d = np.linalg.norm(body.xpos - task.goals[0])
        assert reward + effort == pytest.approx([-d - 0.8, 198 - d, -d - 0.8, -0.8, -d][i])
    still = qmp.ReacherTask(4, "strong")
    for touches, stage in ((0, 0), (28, 0), (29, 1), (88, 2), (89, 3)):        # thirty steps near the start are a stage
        still.reset(rng)
        still.touches = touches
        _, _, over, info = still.step(np.zeros(6))
        assert info == {"success": stage == 3, "touched": True, "stages": stage} and over == (stage == 3)


def test_rewards_of_door_and_drawer_look_at_what_is_to_be_moved():
    for task, handle in zip(qmp.make_envs(qmp.Args(env="metaworld"), np.random.default_rng(0)).envs, (11, 11, 4, 4)):
        task.stock.evaluate_state = Mock(wraps=task.stock.evaluate_state)
        obs, reward, over, info = task.step(np.zeros(4))
        assert task.stock.evaluate_state.call_args[0][0][4:11] == pytest.approx(obs[handle:handle + 7])
        assert 0 <= reward < 10 and not over and info == {"success": 0}


def test_when_policies_mix_are_updated_and_distilled(tmp_path, monkeypatch):
    for name in ("update", "behave", "distill"):
        monkeypatch.setattr(qmp, name, Mock(wraps=getattr(qmp, name)))
    short = dict(tasks=(0, 1, 2), hidden_size=8, total_timesteps=300, learning_starts=40, train_every=20,
                 gradient_steps=2, batch_size=12, eval_episodes=1, device="cpu", runs_dir=tmp_path)
    qmp.train(qmp.Args(method="dnc", **short))
    assert qmp.distill.call_count == 4                                 # of every tenth, those after the first update
    qmp.behave.reset_mock(), qmp.update.reset_mock()
    qmp.train(qmp.Args(method="qmp-multihead", mixture_warmup=0.5, **short))
    acted = [call[0][3] for call in qmp.behave.call_args_list if not call[1]]
    assert acted == ["separated"] * 50 + ["qmp-multihead"] * 50
    batches = [call[0][3][0].shape for call in qmp.update.call_args_list]      # after 60, 80 and 100 steps of a task
    assert batches == [(3, 4, 4)] * (3 * 2 * 3)
