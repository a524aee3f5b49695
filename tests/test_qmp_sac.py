"""QMP: the Q-switch and its baselines by hand, the maze against its acceptance table, SAC against independent code."""
import itertools
import math
from collections import deque
from typing import get_args, get_type_hints

import gymnasium as gym
import metaworld.policies
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import qmp_sac as qmp

SMALL = dict(tasks=(0, 4, 8), total_timesteps=1_800, train_every=100, learning_starts=200, gradient_steps=3,
             hidden_size=16, batch_size=24, eval_every=900, eval_episodes=1, checkpoint_every=900)


def learners_and_batch(method="separated", num_tasks=3, obs_size=4, action_size=2, **settings):
    """Small learners after a seed, with one random batch of 30 transitions per task (of the maze's sizes)."""
    args = qmp.Args(**SMALL | dict(method=method, tasks=tuple(range(num_tasks))) | settings)
    torch.manual_seed(0)
    learners = qmp.Learners(args, num_tasks, obs_size, action_size)
    batch = [torch.randn(num_tasks, 30, 4), torch.rand(num_tasks, 30, 2) * 2 - 1, torch.randn(num_tasks, 30),
             torch.randn(num_tasks, 30, 4), (torch.rand(num_tasks, 30) < 0.3).float()]
    return args, learners, learners.make_optimizers(1e-2), batch


def csv_without_seconds(folder):
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [row[:1] + row[2:] for row in rows]


# --- the Q-switch --------------------------------------------------------------------------------------------------
class Prefers:
    """A critic whose value is known: 1 for the action nearest to `favourite`, less for the others."""

    def __init__(self, favourite):
        self.favourite = torch.tensor(favourite)          # (T, A)

    def __call__(self, obs, actions):
        return 1 - (actions - self.favourite[:, None]).norm(dim=-1)


def test_q_switch_follows_each_tasks_own_critic():
    proposals = torch.tensor([[0.0], [0.5], [-0.5]]).expand(3, 3, 1)           # every task is offered 0, .5, -.5
    critic = Prefers([[-0.6], [0.1], [0.9]])
    assert qmp.q_switch(torch.zeros(3, 4), proposals, critic, None).tolist() == [2, 0, 1]


def test_q_switch_takes_the_smaller_twin_and_breaks_ties_downwards():
    proposals = torch.tensor([[[0.0], [1.0]]])
    optimist, pessimist = lambda o, a: a[..., 0], lambda o, a: -2 * a[..., 0]
    assert qmp.q_switch(torch.zeros(1, 4), proposals, optimist, None).tolist() == [1]
    assert qmp.q_switch(torch.zeros(1, 4), proposals, optimist, pessimist).tolist() == [0]
    constant = lambda o, a: torch.zeros(a.shape[:-1])                                              # noqa: E731
    assert qmp.q_switch(torch.zeros(5, 4), torch.rand(5, 7, 2), constant, constant).tolist() == [0] * 5


def test_proposals_come_from_the_right_policy_in_the_right_state():
    _, learners, _, _ = learners_and_batch()
    obs = torch.randn(3, 4)
    _, means, _ = qmp.propose_actions(learners.actor, obs)                        # (states, policies, A)
    for state, policy in itertools.product(range(3), range(3)):
        hidden = obs[state]
        for layer in range(3):
            net = learners.actor.net
            hidden = hidden @ net.weights[layer][policy] + net.biases[layer][policy, 0]
            hidden = hidden.relu() if layer < 2 else hidden
        torch.testing.assert_close(means[state, policy], hidden[:2].tanh())


@pytest.mark.parametrize("method", ["qmp", "qmp-multihead"])
def test_one_policy_that_all_critics_prefer_acts_everywhere(method, monkeypatch):
    args, learners, _, _ = learners_and_batch(method, switch_action="mean")
    with torch.no_grad():
        learners.actor.net.weights[-1].zero_()
        learners.actor.net.biases[-1][1, 0, 0] = 3.0                           # policy 1 pushes to +1 along x
    monkeypatch.setattr(qmp.Critic, "forward", lambda self, obs, actions: actions[..., 0])
    actions, chosen = qmp.behave(args, learners, torch.randn(3, 4), own_policy=False)
    assert chosen.tolist() == [1, 1, 1]
    _, own = qmp.behave(args, learners, torch.randn(3, 4), own_policy=True)    # warm-up
    assert own.tolist() == [0, 1, 2]


def test_sample_mode_executes_the_scored_sample_and_mean_mode_a_sample_of_the_chosen_policy():
    args, learners, _, _ = learners_and_batch("qmp")
    obs = torch.randn(3, 4)
    torch.manual_seed(5)
    samples, means, _ = qmp.propose_actions(learners.actor, obs)
    for mode, scored in (("sample", samples), ("mean", means)):
        torch.manual_seed(5)
        args.switch_action = mode
        actions, chosen = qmp.behave(args, learners, obs, own_policy=False)
        assert torch.equal(chosen, qmp.q_switch(obs, scored, learners.qf1, learners.qf2))
        assert torch.equal(actions, samples[range(3), chosen])


def test_the_online_twins_score_and_with_q1_the_first_alone():
    args, learners, _, _ = learners_and_batch("qmp")
    with torch.no_grad():
        for target in (learners.qf1_target, learners.qf2_target):              # else they are the online ones
            target.net.weights[-1].normal_()
    choices = []
    for seed, switch_q in itertools.product(range(30), ("min", "q1")):
        torch.manual_seed(seed)
        obs, args.switch_q = torch.randn(3, 4), switch_q
        state = torch.get_rng_state()
        choices.append(qmp.behave(args, learners, obs, own_policy=False)[1])
        torch.set_rng_state(state)
        samples, _, _ = qmp.propose_actions(learners.actor, obs)
        twin = learners.qf2 if switch_q == "min" else None
        assert torch.equal(choices[-1], qmp.q_switch(obs, samples, learners.qf1, twin))
    assert any(not torch.equal(a, b) for a, b in zip(choices[::2], choices[1::2]))


def test_the_later_papers_switch_adds_the_entropy_of_each_policy():
    proposals, value = torch.tensor([[[0.0], [1.0]]]), lambda obs, actions: actions[..., 0]
    for bonus, chosen in ((0.9, 1), (1.1, 0)):                                 # the critic likes action 1 better by 1
        extra = torch.tensor([[bonus, 0.0]])
        assert qmp.q_switch(torch.zeros(1, 4), proposals, value, None, extra).tolist() == [chosen]
    args, learners, _, _ = learners_and_batch("qmp", switch_entropy=True)
    with torch.no_grad():
        learners.actor.net.weights[-1].zero_()
        learners.actor.net.biases[-1][:, 0, 2:] = torch.tensor([[-3.0], [-1.0], [-2.0]])          # log std: 1 is widest
        learners.qf1.net.weights[-1].zero_(), learners.qf2.net.weights[-1].zero_()                 # no preference
    obs = torch.randn(3, 4)
    learners.log_alpha.exp = lambda: torch.tensor([1.0, -1.0, 1.0])            # a negative one turns a preference
    chosen = torch.stack([qmp.behave(args, learners, obs, False)[1] for _ in range(200)])
    assert ((chosen == torch.tensor([1, 0, 1])).double().mean(0) > 0.7).all()
    samples, _, log_prob = qmp.propose_actions(learners.actor, obs)            # by state and policy
    expected = TransformedDistribution(Normal(torch.zeros(1), torch.tensor([-3.0, -1.0, -2.0]).exp()[:, None]),
                                       TanhTransform()).log_prob(samples).sum(-1)
    torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=0)


def test_uniform_mixture_is_uniform():
    args, learners, _, _ = learners_and_batch("qmp-uniform")
    torch.manual_seed(0)
    draws = torch.stack([qmp.behave(args, learners, torch.zeros(3, 4), False)[1] for _ in range(2_000)])
    share = torch.stack([(draws == policy).double().mean(0) for policy in range(3)])
    assert (share - 1 / 3).abs().max() < 0.05                                  # 4.7 standard errors


# --- Divide-and-Conquer --------------------------------------------------------------------------------------------
def test_pairwise_kl_against_torch_distributions_and_its_gradient():
    mean, log_std = torch.randn(3, 5, 2), torch.randn(3, 5, 2) * 0.3
    mean.requires_grad_(), log_std.requires_grad_()
    kl = qmp.pairwise_kl(mean, log_std)
    for i, j in itertools.product(range(3), range(3)):
        expected = kl_divergence(Normal(mean[j], log_std[j].exp()), Normal(mean[i], log_std[i].exp())).mean()
        torch.testing.assert_close(kl[i, j], expected)
    for gradient in torch.autograd.grad(kl[0].sum(), (mean, log_std)):         # policy j is a constant in i's loss
        assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0


def test_the_kl_is_taken_on_as_many_states_as_a_batch_has(monkeypatch):
    args, learners, optimizers, batch = learners_and_batch("dnc-reg")
    states, real = [], qmp.pairwise_kl
    monkeypatch.setattr(qmp, "pairwise_kl", lambda mean, log_std: states.append(mean.shape) or real(mean, log_std))
    qmp.update(args, learners, optimizers, batch)
    assert states == [(3, 30, 2)]                                              # ten of each task, not thirty


@pytest.mark.parametrize("target", ["replay", "policy"])
def test_distillation_makes_policies_equal_and_imitates(target):
    args, learners, optimizers, _ = learners_and_batch("dnc", distill_steps=300, distill_target=target)
    buffer, rng = qmp.ReplayBuffer(3, 50, 4, 2, torch.device("cpu")), np.random.default_rng(0)
    for _ in range(50):                                                        # everyone's behaviour: push to +.5, -.5
        zeros = np.zeros((3, 4), np.float32)
        buffer.add(zeros, np.tile([[0.5, -0.5]], (3, 1)), np.zeros(3), zeros, np.zeros(3))
    with torch.no_grad():
        for policy in (0, 1, 2):                                               # and everyone's policy: +.2 before tanh
            learners.actor.net.biases[-1][policy, 0, :2] = 0.2
    qmp.distill(args, learners, optimizers["centroid"], buffer, rng)
    for param in learners.actor.parameters():
        assert torch.equal(param[0], param[1]) and torch.equal(param[0], param[2])
    mean, _ = learners.actor(torch.zeros(3, 1, 4))
    expected = torch.tensor([0.5, -0.5]) if target == "replay" else torch.full((2,), math.tanh(0.2))
    assert (mean[0, 0].tanh() - expected).abs().max() < 0.05
    assert qmp.pairwise_kl(*learners.actor(torch.randn(1, 7, 4).expand(3, 7, 4))).abs().max() < 1e-6


# --- SAC -----------------------------------------------------------------------------------------------------------
def test_squash_against_torch_distributions():
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 7, 2).double() * 0.5
    actions, log_prob = qmp.squash(mean, log_std, noise)
    assert actions.abs().max() < 0.99                                          # beyond, the 1e-6 in the logarithm shows
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, reference.log_prob(actions).sum(-1), atol=1e-3, rtol=0)


def test_losses_by_hand():
    one = torch.ones(1, 1)
    target = qmp.soft_target(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[10.0, 10.0]]),
                             torch.tensor([[2.0, 2.0]]), 0.5 * one, gamma=0.9)
    assert target.tolist() == [[pytest.approx(1 + 0.9 * (10 - 0.5 * 2)), 1.0]]         # termination cuts the bootstrap
    assert qmp.critic_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), torch.zeros(1, 2)).tolist() == [5.0]
    assert qmp.actor_loss(torch.tensor([[4.0]]), torch.tensor([[-3.0]]), 0.5 * one).tolist() == [-5.5]
    log_alpha = torch.zeros(2, requires_grad=True)
    qmp.temperature_loss(log_alpha, torch.tensor([[5.0], [-5.0]]), -2.0).sum().backward()
    assert log_alpha.grad.tolist() == [-3.0, 7.0]          # too little entropy: alpha grows; too much: it shrinks


class PlainSAC:
    """One SAC learner in ordinary modules: an independent oracle for one task of the ensemble."""

    def __init__(self, learners, task, lr):
        def linear_net(stack):
            layers = []
            for weight, bias in zip(stack.weights, stack.biases):
                layer = torch.nn.Linear(*weight.shape[1:])
                layer.weight.data, layer.bias.data = weight[task].t().clone(), bias[task, 0].clone()
                layers += [layer, torch.nn.ReLU()]
            return torch.nn.Sequential(*layers[:-1])
        self.policy = linear_net(learners.actor.net)
        self.q = [linear_net(critic.net) for critic in (learners.qf1, learners.qf2)]
        self.targets = [linear_net(critic.net) for critic in (learners.qf1_target, learners.qf2_target)]
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.optimizers = [torch.optim.Adam(p, lr=lr) for p in
                           ([*self.q[0].parameters(), *self.q[1].parameters()], self.policy.parameters(),
                            [self.log_alpha])]

    def act(self, obs, noise):
        mean, log_std = self.policy(obs).split(2, dim=-1)
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        raw = normal.mean + normal.stddev * noise
        return raw.tanh(), (normal.log_prob(raw) - torch.log(1 - raw.tanh() ** 2 + 1e-6)).sum(-1)

    def update(self, obs, actions, rewards, next_obs, terminations, next_noise, noise):
        def values(nets, o, a):
            return [net(torch.cat([o, a], -1))[:, 0] for net in nets]
        alpha = self.log_alpha.exp().item()
        with torch.no_grad():
            next_actions, next_log_prob = self.act(next_obs, next_noise)
            bootstrap = torch.minimum(*values(self.targets, next_obs, next_actions)) - alpha * next_log_prob
            goal = rewards + 0.99 * (1 - terminations) * bootstrap
        q_loss = sum(torch.nn.functional.mse_loss(value, goal) for value in values(self.q, obs, actions))
        for number, optimizer in enumerate(self.optimizers):
            if number == 1:
                pi, log_prob = self.act(obs, noise)
                pi_loss = (alpha * log_prob - torch.minimum(*values(self.q, obs, pi))).mean()
            elif number == 2:
                alpha_loss = -(self.log_alpha * (log_prob.detach() - 2).mean())
            loss = q_loss if number == 0 else pi_loss if number == 1 else alpha_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for net, target in zip(self.q, self.targets):
            for p, t in zip(net.parameters(), target.parameters()):
                t.data = 0.995 * t.data + 0.005 * p.data


def test_ensemble_equals_independent_learners():
    args, learners, optimizers, batch = learners_and_batch("separated")
    plain = [PlainSAC(learners, task, 1e-2) for task in range(3)]
    for round_ in range(4):
        torch.manual_seed(round_)
        next_noise, noise = torch.randn(3, 30, 2), torch.randn(3, 30, 2)
        torch.manual_seed(round_)
        qmp.update(args, learners, optimizers, batch)
        for task, learner in enumerate(plain):
            learner.update(*(field[task] for field in batch), next_noise[task], noise[task])
    for task, learner in enumerate(plain):
        for net, stack in ((learner.policy, learners.actor.net), (learner.q[1], learners.qf2.net),
                           (learner.targets[0], learners.qf1_target.net)):
            for layer, weight in zip(net[::2], stack.weights):
                torch.testing.assert_close(layer.weight.t(), weight[task], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(learner.log_alpha, learners.log_alpha[task])


def test_tasks_do_not_touch_each_other_unless_they_share_layers():
    for method, touched in (("separated", False), ("shared-multihead", True)):
        args, learners, optimizers, batch = learners_and_batch(method)
        before = learners.actor(batch[0])[0].detach().clone()
        batch[2][0] += 100.0                                                   # only task 0 sees other rewards ...
        other = learners_and_batch(method)
        for everything in ((args, learners, optimizers, batch), other):
            torch.manual_seed(1)
            for _ in range(2):
                qmp.update(*everything)
        changed = (learners.qf1(batch[0], batch[1]) - other[1].qf1(batch[0], batch[1])).abs().amax(1)
        assert changed[0] > 1e-3 and bool(changed[1] > 1e-4) == touched        # ... and only it learns something else
        assert not torch.equal(before, learners.actor(batch[0])[0])


@pytest.mark.parametrize("method, members",
                         [("separated", [3, 3, 3]), ("shared-multihead", [1, 1, 3]), ("shared", [1, 1, 1])])
def test_who_shares_which_layer(method, members):
    _, learners, _, _ = learners_and_batch(method)
    assert [len(weight) for weight in learners.actor.net.weights] == members
    assert [len(weight) for weight in learners.qf1.net.weights] == members
    assert len(learners.log_alpha) == members[-1]


def test_shared_networks_have_about_as_many_parameters_as_ten_separate_ones():
    def size(method):
        args = qmp.Args(method=method)
        return sum(p.numel() for p in qmp.Learners(args, 10, 4, 2).actor.parameters())
    assert size("separated") == 10 * (4 * 256 + 256 + 256 * 256 + 256 + 256 * 4 + 4)
    assert size("shared") / size("separated") == pytest.approx(1, abs=0.05)


def test_xavier_bounds_and_zero_biases():
    torch.manual_seed(0)
    learners = qmp.Learners(qmp.Args(), 10, 4, 2)
    weight = learners.actor.net.weights[1].detach()                                     # U(+-sqrt(6 / (256 + 256)))
    assert weight.abs().max() < math.sqrt(6 / 512)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    assert learners.qf1.net.weights[1].std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)   # Normal
    assert all(bias.abs().max() == 0 for bias in learners.actor.net.biases)


def test_replay_keeps_the_last_transitions_of_each_task_apart():
    buffer = qmp.ReplayBuffer(2, 3, 1, 1, torch.device("cpu"))
    for t in range(5):
        value = np.array([[t], [t + 100.0]])
        buffer.add(value, -value, value[:, 0] * 2, value + 0.5, np.array([t % 2 == 0, False]))
    obs, actions, rewards, next_obs, terminations = buffer.sample(np.random.default_rng(0), 200)
    assert len(buffer) == 3 and obs.shape == (2, 200, 1) and rewards.shape == (2, 200)
    assert set(obs[0].flatten().tolist()) == {2, 3, 4} and set(obs[1].flatten().tolist()) == {102, 103, 104}
    assert torch.equal(actions, -obs) and torch.equal(rewards, 2 * obs[..., 0]) and torch.equal(next_obs, obs + 0.5)
    assert torch.equal(terminations[0], (obs[0, :, 0] % 2 == 0).float()) and not terminations[1].any()


# --- the maze ------------------------------------------------------------------------------------------------------
def test_maze_layout_and_mass():
    assert sum(line.count(".") for line in qmp.MAZE) == 46 and sum(line.count("#") for line in qmp.MAZE) == 62
    assert qmp.maze_model().body_mass[1] == pytest.approx(4.18879, abs=1e-5)
    for start, goal in qmp.MAZE_TASKS:
        assert qmp.MAZE[start[0]][start[1]] == qmp.MAZE[goal[0]][goal[1]] == "."


def test_free_motion_is_the_closed_form():
    env = qmp.MazeEnv((3, 3), (3, 6))
    env.reset(seed=0)
    x, v = env.data.qpos.copy(), env.data.qvel.copy()
    for _ in range(30):
        env.step(np.array([0.0, 0.3]))
        v += 0.01 * (100 * np.array([0.0, 0.3]) - v) / (4 / 3 * math.pi + 0.01)    # implicit damping 1, mass 4.19
        x += 0.01 * v
        assert np.abs(x - env.data.qpos).max() < 1e-12


def test_velocity_is_clipped_before_the_step_and_actions_to_one():
    env = qmp.MazeEnv((3, 3), (3, 6))
    env.reset(seed=0)
    env.data.qvel[:] = [0.0, 50.0]
    env.step(np.array([0.0, 9.0]))
    assert env.data.qvel[1] == pytest.approx(5 + 0.01 * (100 - 5) / (4 / 3 * math.pi + 0.01))


def test_reward_and_termination_at_half_a_metre():
    env = qmp.MazeEnv((3, 3), (3, 6))
    for offset, ends in ((0.51, False), (0.49, True)):
        env.reset(seed=0)
        env.data.qpos[:], env.data.qvel[:] = (3, 6 - offset), 0
        _, reward, terminated, truncated, info = env.step(np.zeros(2))
        assert reward == pytest.approx(math.exp(-offset) - 1) and reward < 0
        assert (terminated, truncated, bool(info["success"])) == (ends, False, ends)


def test_reset_distribution():
    env = qmp.MazeEnv((7, 4), (4, 10))
    states = np.array([env.reset(seed=seed)[0] for seed in range(500)])
    offset = states[:, :2] - [7, 4]
    assert np.abs(offset).max() <= 0.1 and offset.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.1)
    assert states[:, 2:].std() == pytest.approx(0.1, rel=0.1)


def test_gymnasium_accepts_the_maze_and_the_time_limit_is_600():
    check_env(qmp.MazeEnv((3, 3), (3, 6)), skip_render_check=True)
    env = qmp.make_env(qmp.Args(), 8)
    env.reset(seed=0)
    for t in range(1, 601):
        _, _, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
        assert not terminated and truncated == (t == 600)


def shortest_path(start, goal):
    previous, queue = {start: None}, deque([start])
    while goal not in previous:
        row, col = queue.popleft()
        for cell in ((row, col + 1), (row + 1, col), (row, col - 1), (row - 1, col)):
            if qmp.MAZE[cell[0]][cell[1]] == "." and cell not in previous:
                previous[cell] = (row, col)
                queue.append(cell)
    path = [goal]
    while previous[path[-1]] is not None:
        path.append(previous[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("task, moves, steps", list(zip(range(10), [9, 9, 9, 9, 11, 11, 11, 12, 14, 15],
                                                        [219, 201, 214, 195, 251, 265, 256, 254, 321, 356])))
def test_a_pd_controller_along_the_shortest_path_needs_the_known_number_of_steps(task, moves, steps):
    start, goal = qmp.MAZE_TASKS[task]
    path = shortest_path(start, goal)
    assert len(path) - 1 == moves
    waypoints, env = [np.array(cell) - 0.2 for cell in path[1:-1]] + [np.array(goal)], qmp.MazeEnv(start, goal)
    obs, _ = env.reset(seed=0)
    taken, terminated = 0, False
    while not terminated and taken < 600:
        if len(waypoints) > 1 and np.linalg.norm(obs[:2] - waypoints[0]) < 0.3:
            waypoints.pop(0)
        obs, _, terminated, _, _ = env.step(10 * (waypoints[0] - obs[:2]) - obs[2:])
        taken += 1
    assert terminated and taken == pytest.approx(steps, rel=0.1)


def test_time_limits_bootstrap_and_store_the_last_observation(monkeypatch):
    monkeypatch.setitem(qmp.HORIZON, "maze", 7)
    args = qmp.Args(tasks=(0, 1))
    envs = qmp.make_envs(args, [0, 1])
    obs, _ = envs.reset(seed=0)
    for t in range(1, 8):
        obs, _, terminations, truncations, infos = envs.step(np.ones((2, 2), np.float32))
        led_to = qmp.true_next_obs(obs, infos)
        assert not terminations.any() and truncations.all() == (t == 7)
        assert np.array_equal(led_to, obs) == (t < 7)
    start = [task[0] for task in qmp.MAZE_TASKS[:2]]
    assert np.abs(obs[:, :2] - start).max() <= 0.1 < np.abs(led_to[:, :2] - start).max()
    ended = [(task, episode["episodic_length"], episode["success"]) for task, episode in qmp.finished_episodes(infos)]
    assert ended == [(0, 7, 0), (1, 7, 0)]


# --- the reacher ---------------------------------------------------------------------------------------------------
def reach(env, goals, steps=200):
    """Operational-space PD control of the hand through `goals`: steps taken, or stages done if time runs out."""
    jacobian, gears, hand = np.zeros((3, 6)), env.model.actuator_gear[:, 0], env.model.body("hand").id
    for taken in range(1, steps + 1):
        mujoco.mj_jacBody(env.model, env.data, jacobian, None, hand)
        goal = goals[min(env.stage, len(goals) - 1)]
        force = 150 * (goal - env.data.xpos[hand]) - 20 * jacobian @ env.data.qvel
        _, _, terminated, _, _ = env.step((jacobian.T @ force + env.data.qfrc_bias) / gears)
        if terminated:
            return taken
    return None


def test_reacher_start_and_sizes():
    env = qmp.ReacherEnv(0, "strong", "code")
    obs, _ = env.reset(seed=0)
    assert env.data.body("hand").xpos == pytest.approx([0.410, 0.119, 0.239], abs=0.02)
    assert obs.shape == (15,) and obs[12:].tolist() == [1, 0, 0] and obs[4] == pytest.approx(-2.8, abs=0.011)
    assert env.model.body_mass[2:] == pytest.approx([0.613151, 1.85031, 0.70372, 0.227408, 0.227408, 0.58074])
    assert env.model.actuator_gear[:, 0].tolist() == [5, 20, 10, 10, 10, 10]
    assert qmp.reacher_model("official").actuator_gear[:, 0].tolist() == [5, 10, 10, 10, 10, 10]
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize("task, steps", [(0, 44), (1, 52), (2, 48), (3, 37)])
def test_a_controller_touches_the_reachers_goals_in_about_the_known_number_of_steps(task, steps):
    goals = qmp.REACHER_GOALS[list(qmp.REACHER_TASKS[task])]
    env = qmp.ReacherEnv(task, "strong", "code")
    env.reset(seed=0)
    assert reach(env, goals) == pytest.approx(steps, rel=0.25)
    env = qmp.ReacherEnv(task, "official", "code")
    env.reset(seed=0)
    assert reach(env, goals) is None and env.stage <= 2                        # its shoulder is too weak


def test_the_strong_reacher_can_hold_still_and_the_official_one_cannot():
    for variant, ends in (("strong", True), ("official", False)):
        env = qmp.ReacherEnv(4, variant, "code")
        env.reset(seed=0)
        taken = reach(env, [env.hold_still])
        assert (taken is not None and taken < 110) == ends and env.held == (90 if ends else pytest.approx(2, abs=3))


@pytest.mark.parametrize("task, kind, expected", [
    (0, "code", -0.03 - 0.8), (1, "code", -0.03 + 200 - 2), (2, "code", -0.03 - 0.8), (3, "code", -0.8),
    (4, "code", -0.03), (0, "paper", -0.03 + 1), (1, "paper", -0.03 + 1), (2, "paper", -0.03 + 1), (3, "paper", 1.0),
    (4, "paper", -0.03)])
def test_reacher_rewards_by_hand(task, kind, expected):
    env = qmp.ReacherEnv(task, "strong", kind)
    env.reset(seed=0)
    env.stage, env.data.qvel[:], env.data.qacc[:] = 1, 0, 0                    # a goal has just been touched at 3 cm
    assert env._reward(np.zeros(6), 0.03, True) == pytest.approx(expected)
    env.data.qvel[:], env.data.qacc[:] = [6, -6, 0, 0, 0, 0], [0, 0, 60, 0, 0, 0]
    effort = 0.01 * 1.5 + 0.001 * 2 + 1e-5 * 10 if kind == "code" else 0.01 * 1.5 * (task < 3)
    assert env._reward(np.array([1, 0.5, -0.5, 0, 0, 0]), 0.03, True) == pytest.approx(expected - effort)


def test_the_reachers_goals_and_their_size(monkeypatch):
    assert qmp.REACHER_GOALS.tolist() == [[0.2, 0.3, 0.5], [0.3, 0.0, 0.3], [0.4, -0.3, 0.4], [0.4, 0.3, 0.2]]
    assert qmp.REACHER_TASKS == ((0, 1, 2), (0, 1, 3), (1, 3, 2), (1, 2, 0), None)
    scout = qmp.ReacherEnv(4, "strong", "code")
    scout.reset(seed=0)
    scout.step(np.zeros(6))
    for distance, stages in ((0.049, 1), (0.051, 0)):
        env = qmp.ReacherEnv(0, "strong", "code")
        env.reset(seed=0)
        monkeypatch.setattr(qmp, "REACHER_GOALS", np.tile(scout.data.body("hand").xpos + (0, 0, distance), (4, 1)))
        assert env.step(np.zeros(6))[4]["stages"] == stages


@pytest.mark.parametrize("env, steps", [("maze", 600), ("reacher", 200), ("metaworld", 500)])
def test_episodes_are_as_long_as_the_papers(env, steps):
    assert qmp.make_env(qmp.Args(env=env), 0).get_wrapper_attr("_max_episode_steps") == steps


def test_reacher_stages_and_termination(monkeypatch):
    env, scout = qmp.ReacherEnv(2, "strong", "code"), qmp.ReacherEnv(4, "strong", "code")
    for each in (env, scout):
        each.reset(seed=0)
    seen = []
    for goal in (3, 1, 3, 2):                                                # the order is 1, 3, 2: the first is early
        scout.step(np.zeros(6))
        goals = np.full((4, 3), 9.0)
        goals[goal] = scout.data.body("hand").xpos                             # where the hand is about to be
        monkeypatch.setattr(qmp, "REACHER_GOALS", goals)
        obs, _, terminated, truncated, info = env.step(np.zeros(6))
        seen.append((info["stages"], obs[12:].tolist(), terminated, truncated, bool(info["success"])))
    assert seen == [(0, [1, 0, 0], False, False, False), (1, [0, 1, 0], False, False, False),
                    (2, [0, 0, 1], False, False, False), (3, [0, 0, 0], True, False, True)]


def test_the_reachers_reward_has_the_stage_after_the_touch_and_the_clipped_effort(monkeypatch):
    env = qmp.ReacherEnv(3, "strong", "code")                                  # the sparse task pays for time only
    env.reset(seed=0)
    monkeypatch.setattr(qmp, "REACHER_GOALS", np.full((4, 3), 9.0))
    assert env.step(np.zeros(6))[1] == pytest.approx(-0.4 * 3, abs=0.05)
    twin = qmp.ReacherEnv(3, "strong", "code")
    twin.reset(seed=0), twin.step(np.zeros(6))
    twin.step(np.zeros(6))
    monkeypatch.setattr(qmp, "REACHER_GOALS", np.tile(twin.data.body("hand").xpos, (4, 1)))
    assert env.step(np.zeros(6))[1] == pytest.approx(-0.4 * 2, abs=0.05)
    rewards = []
    for push in (1.0, 9.0):
        env.reset(seed=0)
        rewards.append(env.step(np.full(6, push))[1])
    assert rewards[0] == rewards[1]


def test_domain_mixture_follows_the_table_of_shared_stretches():
    args, learners, _, _ = learners_and_batch("qmp-domain", env="reacher", tasks=(0, 1, 4), num_tasks=3, obs_size=15,
                                              action_size=6)
    torch.manual_seed(0)
    draws = torch.stack([qmp.behave(args, learners, torch.zeros(3, 15), False)[1] for _ in range(3_000)])
    share = torch.stack([(draws == policy).double().mean(0) for policy in range(3)], 1)
    assert share.numpy() == pytest.approx(np.array([[0.6, 0.4, 0], [0.4, 0.6, 0], [0, 0, 1]]), abs=0.04)
    sixths = [[3, 2, 0, 1, 0], [2, 3, 1, 0, 0], [0, 1, 3, 1, 0], [1, 0, 1, 3, 0], [0, 0, 0, 0, 1]]
    assert qmp.DOMAIN_WEIGHTS.tolist() == sixths
    learners = qmp.Learners(args, 5, 15, 6)
    args.tasks = None                                                          # all of them
    draws = torch.stack([qmp.behave(args, learners, torch.zeros(5, 15), False)[1] for _ in range(3_000)])
    share = torch.stack([(draws == policy).double().mean(0) for policy in range(5)], 1)
    assert share.numpy() == pytest.approx(np.array([np.array(row) / sum(row) for row in sixths]), abs=0.04)


# --- the door and the drawer ---------------------------------------------------------------------------------------
def scripted(task, env, episodes):
    """How many episodes Meta-World's own scripted policy of that task solves."""
    policy = (metaworld.policies.SawyerDoorOpenV3Policy, metaworld.policies.SawyerDoorCloseV3Policy,
              metaworld.policies.SawyerDrawerOpenV3Policy, metaworld.policies.SawyerDrawerCloseV3Policy)[task]()
    solved = 0
    for episode in range(episodes):
        obs, info = env.reset(seed=0 if episode == 0 else None)
        for _ in range(500):
            seen = np.concatenate([obs[:18], np.zeros(18), obs[18:]], dtype=np.float64)
            seen[4:11] = obs[11:18] if task < 2 else obs[4:11]
            seen[6] += 0.05 * (task == 3)                                      # the script was made for another handle
            obs, _, terminated, truncated, info = env.step(policy.get_action(seen))
            assert not terminated and not truncated
            if info["success"]:
                break
        solved += info["success"]
    return solved


@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("task, episodes, least", [(0, 10, 3), (1, 3, 3), (2, 3, 3), (3, 3, 3)])
def test_scripted_policies_solve_the_four_tasks(task, episodes, least):
    assert scripted(task, qmp.DoorDrawerEnv(task), episodes) >= least


def test_the_scene_and_its_start_positions():
    model = qmp.door_drawer_model()
    assert [model.joint(i).name for i in range(7, 11)] == ["r_close", "l_close", "goal_slidey", "doorjoint"]
    assert model.nq == 11 and model.nu == 2 and model.opt.timestep * qmp.DoorDrawerEnv(0).stock.frame_skip == 0.0125
    for task in range(4):
        env = qmp.DoorDrawerEnv(task)
        starts = np.array([env.reset(seed=seed)[0] for seed in range(8)])
        angle, slide = env.stock.data.joint("doorjoint").qpos[0], env.stock.data.joint("goal_slidey").qpos[0]
        assert (angle, slide) == (pytest.approx((0, -1.5708, 0, 0)[task], abs=1e-3),
                                  pytest.approx((0, 0, 0, -0.15)[task], abs=1e-3))
        drawer, door, goal = starts[:, 4:7], starts[:, 11:14], starts[:, 18:]
        assert np.allclose(starts[:, 0], -0.588 if task == 1 else 0.005, atol=0.02)
        assert np.allclose(drawer[:, 1:], (0.58 if task == 3 else 0.73, 0.09), atol=1e-3)
        moved, still = (door, drawer) if task < 2 else (drawer, door)
        assert np.ptp(moved[:, 0]) > 0.05 and np.ptp(still, 0).max() == 0
        if task < 2:
            place = goal - ((-0.3, -0.45, 0), (0.2, -0.2, 0))[task]            # of the door's frame
            assert np.allclose(drawer[:, 0], 0.4) and np.ptp(place[:, 1]) > 0.05
            assert (place > [-0.10001, 0.84999, 0.149]).all() and (place < [0.00001, 0.95001, 0.151]).all()
            assert np.allclose(np.ptp(door - place, 0), 0, atol=1e-5)
        else:
            assert np.allclose(goal - drawer * (1, 0, 1), (0, 0.54 if task == 2 else 0.74, 0), atol=1e-3)
            assert 0.3 <= drawer[:, 0].min() and drawer[:, 0].max() <= 0.4


def test_success_and_reward_follow_the_object_of_the_task_and_success_stays():
    for task, joint, solved, elsewhere in ((0, "doorjoint", -1.57, "goal_slidey"), (1, "doorjoint", 0, "goal_slidey"),
                                           (2, "goal_slidey", -0.19, "doorjoint"), (3, "goal_slidey", 0, "doorjoint")):
        env = qmp.DoorDrawerEnv(task)
        env.reset(seed=1)
        other = env.stock.data.joint(elsewhere)
        other.qpos[0] = -0.1                                                   # none of this task's business
        _, reward, _, _, info = env.step(np.zeros(4))
        assert not info["success"] and 0 <= reward < 8
        before, env.stock.data.joint(joint).qpos[0] = env.stock.data.joint(joint).qpos[0], solved
        mujoco.mj_forward(env.stock.model, env.stock.data)
        _, reward, _, _, info = env.step(np.zeros(4))
        assert info["success"] and reward > 5
        env.stock.data.joint(joint).qpos[0] = before
        assert env.step(np.zeros(4))[4]["success"] and not env.reset()[1]["success"]
        assert not env.step(np.zeros(4))[4]["success"]


def test_seeds_decide_where_things_start_and_an_episode_has_500_steps():
    check_env(qmp.DoorDrawerEnv(2), skip_render_check=True)
    env, twin = (qmp.make_env(qmp.Args(env="metaworld"), 2) for _ in range(2))
    first = [env.reset(seed=3)[0], env.reset()[0]]
    np.random.seed(0)                                                          # Meta-World's usual source of chance
    assert np.array_equal(first, [twin.reset(seed=3)[0], twin.reset()[0]]) and not np.array_equal(*first)
    for t in range(1, 501):
        _, _, terminated, truncated, _ = env.step(np.zeros(4, np.float32))
        assert not terminated and truncated == (t == 500)


def test_metaworld_goes_on_with_fresh_episodes(tmp_path, capsys):
    settings = SMALL | dict(env="metaworld", tasks=(0, 3), total_timesteps=600, eval_every=600, runs_dir=tmp_path)
    folder = qmp.train(qmp.Args(**settings))
    first = qmp.load_checkpoint(folder)["buffer"][:, 0, :21]
    qmp.train(qmp.read_args(qmp.Args, ["--resume", str(folder), "--total-timesteps", "1200"]))
    assert "fresh episodes" in capsys.readouterr().out
    buffer = qmp.load_checkpoint(folder)["buffer"]
    assert buffer.shape[1] == 600 and not torch.equal(buffer[:, 300, 4:21], first[:, 4:21])     # other start positions
    assert [row[0] for row in csv_without_seconds(folder)[1:]] == ["600", "1200"]


def test_ray_cast_shows_the_nearest_thing_in_its_colour():
    model = mujoco.MjModel.from_xml_string("""<mujoco><worldbody>
        <geom type="sphere" size=".2" rgba="1 0 0 1"/><geom type="box" size=".3 .3 .3" pos="1 0 0" rgba="0 1 0 1"/>
        <geom type="sphere" size=".1" pos="0 .5 0" rgba="0 0 1 1"/></worldbody></mujoco>""")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    image = qmp.ray_cast(model, data, (0, 0, 0), 3, 0, 0, size=61).astype(int)  # along +x: red hides green
    assert image.shape == (61, 61, 3) and image[0, 0].tolist() == [255] * 3
    red, blue = image[30, 30], image[30, 30 - round(30 * 0.5 / 3 / 0.4)]        # +y is to the left
    assert red[0] > 80 and red[1:].max() == 0 and blue[2] > 80 and blue[:2].max() == 0
    assert (image[..., 1] > image[..., 0]).any()                               # the box behind is larger


# --- whole runs ----------------------------------------------------------------------------------------------------
class Probe(gym.Env):
    """One step, reward -(distance to a target that differs by task)^2: SAC must find the target."""
    targets = np.array([[0.6, -0.4], [-0.5, 0.1]])

    def __init__(self, task):
        self.target = self.targets[task]
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {"success": False}

    def step(self, action):
        reward = -5 * float(np.square(action - self.target).sum())
        return np.zeros(2, np.float32), reward, True, False, {"success": reward > -0.2}


@pytest.mark.parametrize("method", ["qmp", "separated", "shared-multihead"])
def test_a_probe_task_is_learnt(method, monkeypatch, tmp_path):
    monkeypatch.setattr(qmp, "make_env", lambda args, task: gym.wrappers.RecordEpisodeStatistics(Probe(task)))
    args = qmp.Args(method=method, tasks=(0, 1), total_timesteps=3_000, train_every=10, learning_starts=100,
                    gradient_steps=5 if method != "shared-multihead" else 3, hidden_size=32, batch_size=64, lr=3e-3,
                    eval_every=3_000, runs_dir=tmp_path)
    first = qmp.train(args)
    rows = csv_without_seconds(first)
    assert float(rows[-1][rows[0].index("mean_success")]) == 1.0


@pytest.mark.parametrize("method", get_args(get_type_hints(qmp.Args)["method"]))
def test_every_method_runs_and_updates(method, tmp_path, monkeypatch):
    calls, distillations, update, distill = [], [], qmp.update, qmp.distill
    monkeypatch.setattr(qmp, "update", lambda *a: calls.append(a[3][0]) or update(*a))
    monkeypatch.setattr(qmp, "distill", lambda *a: distillations.append(a) or distill(*a))
    env = dict(env="reacher", tasks=(0, 1, 3)) if method == "qmp-domain" else {}
    args = qmp.Args(**SMALL | dict(method=method, runs_dir=tmp_path, distill_steps=5, mixture_warmup=1) | env)
    folder = qmp.train(args)
    checkpoint = qmp.load_checkpoint(folder)
    torch.manual_seed(args.seed)
    untrained = qmp.Learners(args, 3, *((15, 6) if env else (4, 2))).state_dict()
    for name in ("actor.net.weights.1", "qf1.net.weights.1", "qf2_target.net.weights.1", "log_alpha"):
        assert not torch.equal(untrained[name], checkpoint["learners"][name]), name
    counts = checkpoint["counts"]
    assert counts.sum(1).tolist() == [600, 600, 600] and checkpoint["num_added"] == 600
    share = np.loadtxt(folder / "mixture.csv", delimiter=",")
    assert np.allclose(share.sum(1), 1, atol=1e-5)
    assert np.array_equal(share, np.eye(3)) == ("qmp" not in method)
    assert len(calls) == (3 * 4 * 3 if method in qmp.TIED_LAYERS else 3 * 4)   # rounds 300, ..., 600 of 100 steps
    assert {tuple(obs.shape[:2]) for obs in calls} == {(3, 8 if method in qmp.TIED_LAYERS else 24)}
    assert len(distillations) == (9 if method == "dnc" else 0)                 # the tenth falls due at the end
    assert {path.name for path in folder.iterdir()} >= {"args.json", "metrics.csv", "checkpoint.pt", "curves.png",
                                                        "mixture.png", "stages.png" if env else "paths.png"}


def test_stored_action_is_the_executed_one(monkeypatch, tmp_path):
    executed, step = [], qmp.MazeEnv.step

    def listening_step(self, action):
        executed.append(action.copy())
        return step(self, action)
    monkeypatch.setattr(qmp.MazeEnv, "step", listening_step)
    folder = qmp.train(qmp.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=300, eval_every=300)))
    training = np.array(executed[:300]).reshape(100, 3, 2).transpose(1, 0, 2)  # the rest is the evaluation's
    assert np.array_equal(training, qmp.load_checkpoint(folder)["buffer"][:, :100, 4:6])       # (T, steps, A)


def test_evaluation_asks_no_policy_but_the_tasks_own(tmp_path, monkeypatch):
    """Spoil one policy in a checkpoint: `--evaluate` may see it in that policy's own task only."""
    folder, seen = qmp.train(qmp.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=300))), {}
    state = qmp.load_checkpoint(folder)
    monkeypatch.setattr(qmp, "print_table", lambda names, result: seen.update({spoilt: result["returns"][:, 0]}))
    for spoilt in (None, 0, 2):
        changed = {name: value.clone() for name, value in state["learners"].items()}
        for name, value in changed.items():
            if spoilt is not None and name.startswith("actor.net.biases.2"):
                value[spoilt] += 5.0                                           # push to the upper right, always
        torch.save(state | {"learners": changed}, folder / "checkpoint.pt")
        qmp.train(qmp.read_args(qmp.Args, ["--evaluate", str(folder)]))
    for spoilt in (0, 2):
        assert [seen[spoilt][task] != seen[None][task] for task in range(3)] == [task == spoilt for task in range(3)]


def test_what_is_stored_at_a_time_limit(monkeypatch, tmp_path):
    monkeypatch.setitem(qmp.HORIZON, "maze", 7)
    folder = qmp.train(qmp.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=300)))
    obs, _, _, next_obs, terminations = qmp.load_checkpoint(folder)["buffer"].split([4, 2, 1, 4, 1], -1)
    assert not terminations.any()                                              # a time limit bootstraps ...
    moved = (next_obs - obs)[..., :2].norm(dim=-1)
    assert moved.max() < 0.06                                                  # ... from where the action led to,
    jumps = (obs[:, 1:] - next_obs[:, :-1])[..., :2].norm(dim=-1) > 0          # not from the new episode's start
    assert torch.equal(jumps, (torch.arange(1, 100) % 7 == 0).expand(3, -1))


def test_warm_up_acts_with_the_own_policy_until_its_rounds_are_over(tmp_path, monkeypatch):
    counts, own, behave = {}, [], qmp.behave
    monkeypatch.setattr(qmp, "behave", lambda args, learners, obs, own_policy: own.append(own_policy) or behave(
        args, learners, obs, own_policy))
    for warmup in (0, 2, 100):                                                 # fill 200, rounds of 100 steps per task
        args = qmp.Args(**SMALL | dict(method="qmp-multihead", mixture_warmup=warmup, runs_dir=tmp_path / str(warmup)))
        own.clear()
        counts[warmup] = qmp.load_checkpoint(qmp.train(args))["counts"].diagonal().float().mean() / 600
        assert sum(own) == {0: 0, 2: 400, 100: 600}[warmup] and own == sorted(own, reverse=True)
    assert counts[100] == 1 and 400 / 600 < counts[2] < 1 and counts[0] < 0.9


@pytest.mark.parametrize("method, expected", [
    ("qmp", (3_000, 600, 100, 256, 3e-4, 256, 0.0, 0)), ("shared", (3_000, 600, 100, 256, 3e-4, 834, 0.0, 0)),
    ("qmp-multihead", (3_000, 600, 100, 256, 3e-4, 834, 0.0, 100)), ("dnc", (3_000, 600, 100, 256, 3e-4, 256, 1e-3, 0)),
    ("dnc-reg", (3_000, 600, 100, 256, 3e-4, 256, 1e-4, 0)),
    ("reacher separated", (10_000, 200, 200, 32, 3e-4, 256, 0, 0)),
    ("reacher shared", (10_000, 200, 200, 32, 3e-4, 600, 0, 0)),
    ("reacher qmp-multihead", (10_000, 200, 200, 32, 1e-3, 512, 0, 0)),
    ("reacher dnc", (10_000, 200, 200, 32, 3e-4, 256, 1e-3, 0)),
    ("shared-multihead", (3_000, 600, 100, 256, 3e-4, 834, 0.0, 0)),
    ("reacher shared-multihead", (10_000, 200, 200, 32, 1e-3, 512, 0, 0)),
    ("reacher dnc-reg", (10_000, 200, 200, 32, 3e-4, 256, 1e-3, 0)),
    ("metaworld shared-multihead", (10_000, 500, 50, 256, 1e-3, 512, 0, 0)),
    ("metaworld qmp-multihead", (10_000, 500, 50, 256, 1e-3, 512, 0, 0)),
    ("metaworld dnc", (10_000, 500, 50, 256, 1.5e-3, 256, 1e-3, 0)),
    ("metaworld qmp", (10_000, 500, 50, 256, 1.5e-3, 256, 0, 0)),
    ("metaworld shared", (10_000, 500, 50, 256, 1e-3, 512, 0, 0)),
    ("metaworld dnc-reg", (10_000, 500, 50, 256, 1.5e-3, 256, 1e-3, 0))])
def test_the_papers_settings_are_the_defaults(method, expected):
    env, method = method.split() if " " in method else ("maze", method)
    args = qmp.Args(env=env, method=method)
    assert (args.learning_starts, args.train_every, args.gradient_steps, args.batch_size, args.lr, args.hidden_size,
            args.kl_weight, args.mixture_warmup) == expected
    assert (args.gamma, args.tau, args.buffer_size, args.eval_episodes) == (0.99, 0.005, 1_000_000, 10)
    paper = qmp.Args(env="reacher", reacher_preset="paper")
    assert (paper.train_every, paper.gradient_steps, paper.batch_size) == (1_000, 100, 32)
    assert qmp.Args(method="qmp", lr=1.0).lr == 1.0                            # what is given stays


def test_the_kl_weight_pulls_policies_together():
    distances = []
    for kl_weight in (0.0, 10.0):
        args, learners, optimizers, batch = learners_and_batch("dnc-reg", kl_weight=kl_weight)
        for _ in range(30):
            losses = qmp.update(args, learners, optimizers, batch)
        distances.append(losses["kl"].mean())
    assert losses["kl"].shape == (3,) and distances[1] < 0.2 * distances[0]


def test_activation_is_the_one_asked_for():
    learners = qmp.Learners(qmp.Args(**SMALL, activation="tanh"), 3, 4, 2)
    for net in (learners.actor, learners.qf1, learners.qf2_target):
        assert net.net.activation is torch.tanh_
    with torch.no_grad():
        learners.actor.net.weights[-1].zero_()
        learners.actor.net.biases[-1][:, :, 2:] = torch.tensor([-99.0, 99.0])
    assert learners.actor(torch.zeros(3, 1, 4))[1][0, 0].tolist() == [-20, 2]  # within which log std is kept
    x = torch.randn(2, 5, 3)
    for name, function in (("relu", torch.relu), ("tanh", torch.tanh)):
        net = qmp.TaskMLP(2, [3, 4, 1], activation=name)
        expected = function(x @ net.weights[0]) @ net.weights[1]
        torch.testing.assert_close(net(x), expected)
    with pytest.raises(RuntimeError):
        qmp.TaskMLP(3, [3, 4, 1])(x)                                           # two rows for three tasks


def test_tensorboard_has_each_evaluation_at_its_own_step(tmp_path):
    folder = qmp.train(qmp.Args(**SMALL | dict(runs_dir=tmp_path, eval_every=450)))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/mean_return")] == [450, 900, 1350, 1800]
    assert [event.value for event in events.Scalars("eval/mean_return")] == pytest.approx(
        [float(row[1]) for row in csv_without_seconds(folder)[1:]], rel=1e-5)


def test_the_reacher_resumes_in_the_middle_of_an_episode(tmp_path):
    settings = SMALL | dict(env="reacher", tasks=(0, 4), total_timesteps=1_800, checkpoint_every=10**6)
    straight = qmp.train(qmp.Args(**settings, runs_dir=tmp_path / "straight"))
    folder = qmp.train(qmp.Args(**settings | dict(total_timesteps=900), runs_dir=tmp_path / "parts"))
    qmp.train(qmp.read_args(qmp.Args, ["--resume", str(folder), "--total-timesteps", "1800"]))
    assert csv_without_seconds(folder) == csv_without_seconds(straight)
    states = [qmp.load_checkpoint(run) for run in (straight, folder)]
    assert torch.equal(states[0]["buffer"], states[1]["buffer"])
    assert "task4/stages" in csv_without_seconds(folder)[0]


def test_a_run_whose_last_step_overshoots_can_be_resumed(tmp_path):
    folder = qmp.train(qmp.Args(**SMALL | dict(runs_dir=tmp_path, total_timesteps=1_000)))
    assert qmp.load_checkpoint(folder)["global_step"] == 1_002
    qmp.train(qmp.read_args(qmp.Args, ["--resume", str(folder)]))


@pytest.mark.parametrize("one, other", [
    (dict(method="qmp", tasks=(4,)), dict(method="separated", tasks=(4,))),
    (dict(method="dnc-reg", kl_weight=0.0), dict(method="separated")),
    (dict(method="dnc", kl_weight=0.0, distill_every=10**6), dict(method="separated"))])
def test_methods_that_must_coincide_do(one, other, tmp_path):
    folders = [qmp.train(qmp.Args(**SMALL | settings | dict(runs_dir=tmp_path / name)))
               for name, settings in (("one", one), ("other", other))]
    assert csv_without_seconds(folders[0]) == csv_without_seconds(folders[1])
    states = [qmp.load_checkpoint(folder)["learners"] for folder in folders]
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=0, atol=0)


def test_evaluating_more_often_changes_no_training_number(tmp_path):
    runs = [qmp.load_checkpoint(qmp.train(qmp.Args(**SMALL | settings))) for settings in
            (dict(runs_dir=tmp_path / "a"), dict(runs_dir=tmp_path / "b", eval_every=150, eval_mixture=True))]
    for name, value in runs[0]["learners"].items():
        assert torch.equal(value, runs[1]["learners"][name])
    assert torch.equal(runs[0]["buffer"], runs[1]["buffer"]) and torch.equal(runs[0]["counts"], runs[1]["counts"])
    header, *rows = csv_without_seconds(next((tmp_path / "b").iterdir()))
    own, mixture = ([row[header.index(name)] for row in rows] for name in ("mean_return", "mixture/return"))
    assert all(a != b for a, b in zip(own, mixture))                           # sampling and switching, not greedy


def test_a_run_too_short_for_an_update_says_so(tmp_path, capsys):
    for total, enough in ((897, False), (900, True)):                          # fill 600, rounds of 300: 900
        args = qmp.Args(**SMALL | dict(total_timesteps=total, runs_dir=tmp_path / str(total)))
        state = qmp.load_checkpoint(qmp.train(args))
        assert ("only fills the buffers: the first updates come at step 900" in capsys.readouterr().out) != enough
        assert bool(state["optimizers"]["actor"]["state"]) == enough


def test_evaluation_has_starts_of_its_own():
    args, seen = qmp.Args(**SMALL | dict(seed=3)), []
    qmp.evaluate(args, [0, 4], lambda obs: seen.append(obs.copy()) or np.ones((2, 2), np.float32))
    expected, _ = qmp.make_envs(args, [0, 4]).reset(seed=10_003)
    assert np.array_equal(seen[0], expected)
