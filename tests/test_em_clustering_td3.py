"""EM with TD3: tasks and rewards by hand, E- and M-step bookkeeping, TD3 against independent code, gradient surgery."""
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from Box2D import b2Vec2
from gymnasium.envs.box2d import bipedal_walker
from gymnasium.utils.env_checker import check_env

import em_clustering_td3 as em

SMALL = dict(num_policies=2, total_timesteps=1_200, m_step_size=300, learning_starts=50, update_every=5, batch_size=16,
             hidden_sizes=(16, 16), eval_every=1, eval_episodes=1, checkpoint_every=600)


def small(method="em", **settings):
    fixed = {} if method in em.CLUSTERED else dict(num_policies=None)
    return em.Args(**SMALL | fixed | dict(method=method) | settings)


def csv_rows(folder):
    return [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]


def column(folder, name):
    header, *rows = csv_rows(folder)
    return [float(row[header.index(name)]) for row in rows]


# --- pendulum --------------------------------------------------------------------------------------------------------
def test_a_pendulum_of_one_metre_is_gymnasiums():
    ours, stock = em.PendulumEnv([3]), gym.make("Pendulum-v1").unwrapped
    ours.reset(seed=0), stock.reset(seed=0)
    generator, compared = np.random.default_rng(0), 0
    for _ in range(300):
        stock.state = np.array([ours.angle, ours.velocity])
        torque = generator.uniform(-2.5, 2.5, 1).astype(np.float32)
        (obs, reward, *_), (stock_obs, stock_reward, *_) = ours.step(torque), stock.step(torque)
        if abs(ours.velocity) < 8:                                             # at the limit the two versions differ
            assert obs == pytest.approx(stock_obs, abs=1e-5) and reward == pytest.approx(stock_reward, abs=1e-4)
            compared += 1
    assert compared > 200
    check_env(em.PendulumEnv([0]), skip_render_check=True)


def test_pendulum_step_by_hand():
    env = em.PendulumEnv([0])
    env.reset(seed=0)
    env.angle, env.velocity = 3 * math.pi / 2, 1.0                             # wraps to -pi / 2
    _, reward, terminated, _, info = env.step(np.array([5.0]))                 # clipped to 2
    assert reward == pytest.approx(-((math.pi / 2) ** 2 + 0.1 + 0.004)) and not terminated and info["task"] == 0
    velocity = 1 + 0.05 * (3 * 10 / (2 * 0.7) * -1 + 3 / 0.49 * 2)
    assert (env.velocity, env.angle) == (pytest.approx(velocity), pytest.approx(3 * math.pi / 2 + 0.05 * velocity))
    env.angle, env.velocity = math.pi / 2, 8.0
    env.step(np.array([0.0]))
    assert env.velocity == 8 and env.angle == pytest.approx(math.pi / 2 + 0.05 * (8 + 0.05 * 15 / 0.7))     # unclipped
    for angle, upright in ((0.0, True), (2 * math.pi + 0.2, True), (0.4, False), (math.pi, False)):
        env.angle, env.velocity = angle, 0.0
        assert env.step(np.array([0.0]))[4]["success"] == upright


def test_an_environment_draws_only_tasks_that_it_is_allowed():
    env = em.PendulumEnv([1, 5])
    drawn = [env.reset(seed=seed)[1]["task"] for seed in range(40)]
    assert set(drawn) == {1, 5} and 8 < drawn.count(1) < 32
    states = np.array([(env.reset(seed=seed), env.angle, env.velocity)[1:] for seed in range(400)])
    for values, bound in zip(states.T, (math.pi, 1.0)):
        assert np.abs(values).max() <= bound and values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


# --- walkers ---------------------------------------------------------------------------------------------------------
def heuristic_return(event, seed, legs=34):
    """Return of Gymnasium's own hand-made walker."""
    env, walker = em.WalkerEnv([event._replace(leg=legs)], [0]), bipedal_walker.BipedalWalkerHeuristics()
    env.reset(seed=seed)
    total, action, ended = 0.0, np.zeros(4), False
    while not ended:
        obs, reward, ended, _, info = env.step(action)
        total, action = total + reward, walker.step_heuristic(obs)
    return total, info["success"]


EVENT = {event.name: event for event in em.EVENTS["track"] + em.EVENTS["legs"]}


@pytest.mark.parametrize("name, best", [("sprint", 96), ("run", 175), ("marathon", 328), ("jump-long", -8)])
def test_gymnasiums_heuristic_walker_gets_the_known_returns(name, best):
    results = [heuristic_return(EVENT[name], seed) for seed in ((0, 2) if name != "marathon" else range(8))]
    if name == "run":
        results = [heuristic_return(EVENT[name], seed) for seed in range(6)]
    total, success = max(results)
    assert total == pytest.approx(best, abs=3) and success


def test_doing_nothing_and_long_legs():
    env = em.WalkerEnv(em.EVENTS["track"], [2])
    env.reset(seed=0)
    total, ended = 0.0, False
    while not ended:
        _, reward, ended, _, info = env.step(np.zeros(4))
        total += reward
    assert total == pytest.approx(-84, abs=3) and reward == -100 and not info["success"]
    assert heuristic_return(EVENT["sprint"], 0, legs=45)[0] == pytest.approx(-62, abs=5)


def stumps(env):
    """Left edge, width and height above ground of each stump, from left to right."""
    corners = [np.array(body.fixtures[0].shape.vertices) for body in env.terrain]
    boxes = [box for box in corners if len(box) == 4]
    return np.array(sorted((box[:, 0].min(), np.ptp(box[:, 0]), box[:, 1].max() - 10 / 3) for box in boxes))


@pytest.mark.parametrize("name, count, pitch, mean_height", [
    ("sprint", 0, 0, 0), ("legs25-gap2", 35, 2 + 14 / 30, 0.233), ("legs45-gap4", 19, 4 + 14 / 30, 0.233),
    ("legs35-flat", 19, 4 + 14 / 30, 0.033)])
def test_ground_of_the_walkers(name, count, pitch, mean_height):
    env = em.WalkerEnv([EVENT[name]], [0])
    found = []
    for seed in range(10):
        env.reset(seed=seed)
        found.append(stumps(env))
        assert len(found[-1]) == count and set(env.terrain_y) == {400 / 30 / 4}
    if count:
        found = np.array(found)
        assert np.allclose(found[:, 0, 0], 20 * 14 / 30) and np.allclose(np.diff(found[..., 0]), pitch, atol=1e-4)
        assert np.allclose(found[..., 1], 14 / 30, atol=1e-5)
        assert found[..., 2].mean() == pytest.approx(mean_height, rel=0.12) and found[..., 2].min() > 0.0233


def test_hurdles_are_one_metre_high_and_irregular():
    env, gaps = em.WalkerEnv([EVENT["hurdles"]], [0]), []
    for seed in range(20):
        env.reset(seed=seed)
        found = stumps(env)
        gaps += np.diff(found[:, 0]).tolist()
        assert 11 <= len(found) <= 16 and np.allclose(found[:, 2], 1, atol=1e-5)
    gaps = np.array(gaps) / (14 / 30)
    assert np.allclose(gaps, gaps.round(), atol=1e-3) and gaps.min() >= 9.99 and gaps.max() <= 18.01
    assert gaps.mean() == pytest.approx(14, abs=0.5)


def test_leg_lengths_change_from_episode_to_episode_in_one_environment():
    env, seen = em.WalkerEnv(em.EVENTS["legs"], list(range(9))), {}
    stock = gym.make("BipedalWalker-v3").unwrapped
    for seed in range(30):
        _, info = env.reset(seed=seed)
        heights = [np.ptp(np.array(leg.fixtures[0].shape.vertices)[:, 1]) for leg in env.legs]
        widths = [np.ptp(np.array(leg.fixtures[0].shape.vertices)[:, 0]) for leg in env.legs]
        assert np.allclose(heights, em.EVENTS["legs"][info["task"]].leg / 30) and np.allclose(
            widths, [8 / 30, 0.8 * 8 / 30] * 2)
        seen[info["task"]] = env.hull.position.y
    assert len(seen) == 9 and seen[8] - seen[0] == pytest.approx(2 * 20 / 30, abs=0.1)
    env.allowed = [3]
    assert env.reset()[1]["task"] == 3 and stock.observation_space.shape == env.observation_space.shape == (24,)


class Puppet(em.WalkerEnv):
    """A walker whose body is where a script says: the rewards alone."""

    def __init__(self, event):
        self.events, self.task, self.airborne, self.last_contact_x = [event], 0, False, 0.0

    def put(self, monkeypatch, x, y=6.0, speed=0.0, contact=(True, True), game_over=False, action=(0, 0, 0, 0)):
        self.hull = SimpleNamespace(position=b2Vec2(x, y), linearVelocity=b2Vec2(speed, 0))
        self.legs = [None, *(SimpleNamespace(ground_contact=touching) for touching in (contact[0], None, contact[1]))]
        self.game_over = game_over
        monkeypatch.setattr(bipedal_walker.BipedalWalker, "step", lambda self, action: (None, 7.5, False, False, {}))
        _, reward, ended, _, info = self.step(np.array(action, float))
        return reward, ended, info["success"]


def test_walker_rewards_by_hand(monkeypatch):
    effort = (1.0, -2.0, 0.5, 0.0)                                             # 2.5 after clipping
    for name, price, finish in (("sprint", 0.028, 26.6), ("run", 0.028, 44.333), ("marathon", 0.052, 88.667),
                                ("hurdles", 0.028, 88.667)):
        walker = Puppet(EVENT[name])
        assert walker.put(monkeypatch, 10, speed=3.0, action=effort) == (pytest.approx(0.3 - 2.5 * price), False, False)
        assert walker.put(monkeypatch, finish - 0.01, speed=3.0) == (pytest.approx(0.3), False, False)
        assert walker.put(monkeypatch, finish + 0.01, speed=3.0) == (pytest.approx(0.3), True, True)
        assert walker.put(monkeypatch, 10, speed=3.0, game_over=True, action=effort) == (-100, True, False)
        assert walker.put(monkeypatch, -0.01, speed=3.0) == (-100, True, False)
    for name, reward, finish in (("jump-up", 7.0 - 11.0, 88.667), ("jump-long", 12.5 - 11.0, 26.6)):
        walker = Puppet(EVENT[name])
        assert walker.put(monkeypatch, 10.0, action=effort) == (pytest.approx(-0.07), False, False)
        assert walker.put(monkeypatch, 11.0, contact=(False, True)) == (0, False, False)           # last contact: 11
        assert walker.put(monkeypatch, 11.5, contact=(False, False)) == (0, False, False)
        assert walker.put(monkeypatch, 12.0, contact=(False, False), speed=9.0) == (0, False, False)
        assert walker.put(monkeypatch, 12.5, 7.0, contact=(True, False)) == (pytest.approx(reward), False, False)
        assert walker.put(monkeypatch, 13.0, 7.0, contact=(True, True)) == (0, False, False)       # no second landing
        assert walker.put(monkeypatch, finish - 0.01) == (0, False, False)
        assert walker.put(monkeypatch, finish + 0.01) == (0, True, True)
        walker.airborne = True
        assert walker.put(monkeypatch, 14.0, game_over=True) == (-100, True, False)
    for name in em.TASKS["legs"]:
        assert Puppet(EVENT[name]).put(monkeypatch, 50, game_over=True) == (7.5, True, False)      # the stock reward
        assert Puppet(EVENT[name]).put(monkeypatch, 88.66) == (7.5, False, False)
        assert Puppet(EVENT[name]).put(monkeypatch, 88.67) == (7.5, True, True)


def test_the_nine_and_the_six_walkers():
    assert em.TASKS["legs"] == [f"legs{leg}-{ground}" for leg in (25, 35, 45) for ground in ("flat", "gap2", "gap4")]
    assert em.TASKS["track"] == ["jump-up", "jump-long", "sprint", "run", "marathon", "hurdles"]
    assert {event.leg for event in em.EVENTS["track"]} == {45}
    assert em.HORIZON["track"] == em.HORIZON["legs"] == em.EVAL_HORIZON["track"] == em.EVAL_HORIZON["legs"] == 2_000
    check_env(em.WalkerEnv(em.EVENTS["legs"], [4]), skip_render_check=True)
    assert em.WalkerEnv(em.EVENTS["track"], [0]).reset(seed=0)[0].dtype == np.float32


@pytest.mark.parametrize("flat", [False, True])
def test_flat_ground_has_bumps_unless_they_are_switched_off(flat):
    args = em.Args(env="legs", flat_ground=flat)
    for task, name in enumerate(em.TASKS["legs"]):
        walker = em.make_env(args, [task], 10).unwrapped
        walker.reset(seed=0)
        stumps = [body for body in walker.terrain if len(body.fixtures[0].shape.vertices) == 4]
        assert bool(stumps) == (not flat or "flat" not in name), name
        walker.close()


def test_total_timesteps_are_rounded_to_whole_m_steps():
    totals = [em.Args(total_timesteps=total).total_timesteps for total in (1, 299_999, 300_000, 500_000, 1_000_000)]
    assert totals == [200_000, 200_000, 400_000, 600_000, 1_000_000]


# --- E-step and M-step -----------------------------------------------------------------------------------------------
class Probe(gym.Env):
    """One step; reward -5 |action - target|, with opposite targets for even and odd tasks."""

    def __init__(self, allowed):
        self.allowed, self.task, self.played = allowed, allowed[0], []
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task = int(self.np_random.choice(self.allowed))
        self.played.append(self.task)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {"success": False, "task": self.task}

    def step(self, action):
        miss = abs(float(action[0]) - (0.6 if self.task % 2 else -0.6))
        return np.zeros(2, np.float32), -5 * miss, True, False, {"success": miss < 0.15, "task": self.task}


@pytest.fixture
def probes(monkeypatch):
    made = []

    def make(args, allowed, horizon):
        made.append(Probe(list(allowed)))
        return gym.wrappers.RecordEpisodeStatistics(made[-1])
    monkeypatch.setattr(em, "make_env", make)
    return made


def test_em_separates_tasks_that_contradict_each_other_and_one_policy_cannot(probes, tmp_path):
    settings = dict(total_timesteps=3_000, m_step_size=250, learning_starts=50, update_every=2, batch_size=32, lr=1e-2,
                    exploration_noise=0.2, eval_episodes=2)
    folder = em.train(small("em", runs_dir=tmp_path, **settings))
    owners = [column(folder, f"{name}/policy")[-1] for name in em.TASKS["pendulum"]]
    assert owners in ([0, 1] * 3 + [0], [1, 0] * 3 + [1]) and column(folder, "mean_success")[-1] == 1
    alone = em.train(small("sp", runs_dir=tmp_path, **settings | dict(m_step_size=500)))
    assert column(alone, "mean_return")[-1] < -2.5 < -1 < column(folder, "mean_return")[-1]        # at best 5 x 0.6


def test_play_asks_the_right_policy_in_the_right_task(probes):
    args = small(eval_episodes=2)
    learners = em.TD3Learners(args, 2, 1)
    with torch.no_grad():                                                      # policy 0 plays -.6, policy 1 +.6
        learners.actor.weights[-1].zero_()
        learners.actor.biases[-1][:, 0, 0] = torch.tensor([-0.6, 0.6]).atanh()
    tasks, policies = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1])
    result = em.play(args, learners, policies, tasks, np.random.default_rng(0))
    assert result["returns"] == pytest.approx(np.array([[0, 0], [-6, -6], [-6, -6], [0, 0], [-6, -6]]), abs=1e-5)
    assert result["successes"].tolist() == [[1, 1], [0, 0], [0, 0], [1, 1], [0, 0]] and result["steps"] == 10


def test_every_episode_of_a_pair_starts_elsewhere(monkeypatch):
    monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 5)
    args = small(eval_episodes=20)
    pairs = np.array([0, 1, 1]), np.array([3, 3, 4])
    returns = em.play(args, em.TD3Learners(args, 3, 1), *pairs, np.random.default_rng(0))["returns"]
    assert returns.shape == (3, 20) and len(np.unique(returns)) == 60


def test_e_step_by_hand_with_a_tie_and_an_empty_policy():
    returns = np.array([[1.0, 5.0, 2.0], [3.0, 3.0, -1.0], [0.0, 0.5, 0.4]])   # three tasks, three policies
    assignment = em.assign_tasks(returns)
    assert assignment.tolist() == [1, 0, 1]                                    # the tie goes to policy 0
    assert em.clusters(assignment, 3).tolist() == [[False, True, False], [True, False, True], [True, True, True]]


def test_m_step_trains_each_policy_on_its_own_tasks_and_keeps_what_it_has(probes, tmp_path, monkeypatch):
    """Scripted assignments: tasks played, replay kept across them, generous accounting of steps."""
    script = iter([np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 1, 0, 0, 0, 0]), np.zeros(7, int), np.ones(7, int)])
    monkeypatch.setattr(em, "assign_tasks", lambda returns: next(script))
    logged, add = Counter(), em.Run.add
    monkeypatch.setattr(em.Run, "add", lambda self, group, values: logged.update([group]) or add(self, group, values))
    folder = em.train(small("em", runs_dir=tmp_path, total_timesteps=1_800))
    training = probes[:2]                                                      # the first two environments train
    m_steps = [[set(env.played[start:start + 300]) for start in (2, 303, 604)] for env in training]
    assert m_steps[0] == [{0, 1, 2}, {3, 4, 5, 6}, set(range(7))]              # then everything, having all ...
    assert m_steps[1] == [{3, 4, 5, 6}, {0, 1, 2}, set(range(7))]              # ... or none
    played = Counter(em.TASKS["pendulum"][task] for env in training for start in (1, 302, 603)
                     for task in env.played[start:start + 300])                # each M-step's last start is not played
    assert {name: logged[f"tasks/{name}"] for name in em.TASKS["pendulum"]} == played
    state = em.load_checkpoint(folder)
    assert state["num_added"] == 900 and state["buffer"].shape == (2, 900, 2 + 1 + 1 + 2 + 1)
    assert state["eval_steps"] == 4 * 2 * 7 and column(folder, "eval_steps") == [28, 42, 56]
    assert [step for step, _, _ in state["history"]] == [0, 600, 1_200, 1_800]
    assert column(folder, "empty") == [0, 1, 1] and column(folder, "largest_cluster") == [4, 7, 7]


def test_several_e_steps_per_m_step_and_only_the_last_assigns(probes, tmp_path, monkeypatch):
    calls, assign = [], em.assign_tasks
    monkeypatch.setattr(em, "assign_tasks", lambda returns: calls.append(returns.shape) or assign(returns))
    folder = em.train(small("em", runs_dir=tmp_path, evals_per_m_step=3))
    assert calls == [(7, 2)] * 3 and column(folder, "global_step") == [200, 400, 600, 800, 1_000, 1_200]


@pytest.mark.parametrize("method, policies, pairs", [("em", 2, 14), ("random-clusters", 2, 14), ("sp", 1, 7),
                                                     ("ppt", 7, 7), ("multihead", 7, 7), ("surgery", 7, 7)])
def test_every_method_runs_learns_and_tries_the_pairs_it_needs(method, policies, pairs, probes, tmp_path):
    args = small(method, runs_dir=tmp_path, m_step_size=1_200 // policies // 2, update_every=2, learning_starts=20)
    folder = em.train(args)
    state = em.load_checkpoint(folder)
    torch.manual_seed(args.seed)
    before = em.TD3Learners(args, 2, 1).state_dict()
    for name, value in before.items():
        assert not torch.equal(value, state["learners"][name]) and torch.isfinite(state["learners"][name]).all(), name
    assert state["num_added"] * policies == state["global_step"] and state["eval_steps"] == 3 * pairs
    assignments = [a.tolist() for _, a, _ in state["history"]]
    if method != "em":
        assert assignments[0] == assignments[-1] and sorted(set(assignments[0])) == list(range(policies))
    if policies == 7:
        assert assignments[0] == list(range(7))
        assert [set(env.played[2:]) for env in probes[:7]] == [{task} for task in range(7)]


def test_random_clusters_are_equal_rows_and_differ_by_seed():
    drawn = [em.random_clusters(7, 4, np.random.default_rng(seed)) for seed in range(20)]
    assert all(sorted(np.bincount(a).tolist()) == [1, 2, 2, 2] for a in drawn) and len({tuple(a) for a in drawn}) > 10


def test_time_limits_bootstrap_unless_asked_not_to(tmp_path, monkeypatch):
    monkeypatch.setitem(em.HORIZON, "pendulum", 7)
    for flag, expected in ((False, 0), (True, 1)):
        folder = em.train(small(runs_dir=tmp_path / str(flag), total_timesteps=600, timeout_is_terminal=flag))
        obs, _, _, next_obs, ends = em.load_checkpoint(folder)["buffer"].split([3, 1, 1, 3, 1], -1)
        limits = ends[:, 6:299:7, 0]
        assert (limits == expected).all() and ends.sum() == limits.numel() * expected
        jumps = (obs[:, 1:] != next_obs[:, :-1]).any(-1)                       # the true last observation is stored
        assert torch.equal(jumps, (torch.arange(1, 300) % 7 == 0).expand(2, -1))


# --- TD3 -------------------------------------------------------------------------------------------------------------
class PlainTD3:
    """One TD3 learner in ordinary modules: an independent oracle for one row of the stack."""

    def __init__(self, learners, row, args):
        def linear_net(stack):
            layers = []
            for weight, bias in zip(stack.weights, stack.biases):
                layers += [torch.nn.Linear(*weight.shape[1:]), torch.nn.ReLU()]
                layers[-2].weight.data, layers[-2].bias.data = weight[row].t().clone(), bias[row, 0].clone()
            return torch.nn.Sequential(*layers[:-1])
        self.args, names = args, ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target")
        self.nets = {name: linear_net(getattr(learners, name)) for name in names}
        self.optimizers = [torch.optim.Adam(self.nets["actor"].parameters(), lr=args.lr, eps=1e-7),
                           torch.optim.Adam([*self.nets["qf1"].parameters(), *self.nets["qf2"].parameters()],
                                            lr=args.lr, eps=1e-7)]

    def clip(self, name):
        for p in self.nets[name].parameters() if self.args.max_grad_norm else ():
            torch.nn.utils.clip_grad_norm_([p], self.args.max_grad_norm)

    def update(self, obs, actions, rewards, next_obs, terminations, noise, update_policy):
        def q(name, a, o=obs):
            return self.nets[name](torch.cat([o, a], 1))[:, 0]
        with torch.no_grad():
            smooth = (self.args.smoothing_noise * noise).clamp(-0.5, 0.5)
            next_actions = (self.args.action_scale * self.nets["actor_target"](next_obs).tanh() + smooth).clamp(-2, 2)
            bootstrap = torch.minimum(q("qf1_target", next_actions, next_obs), q("qf2_target", next_actions, next_obs))
            goal = rewards + 0.99 * (1 - terminations) * bootstrap
        self.optimizers[1].zero_grad()
        sum(torch.nn.functional.mse_loss(q(name, actions), goal) for name in ("qf1", "qf2")).backward()
        self.clip("qf1"), self.clip("qf2")
        self.optimizers[1].step()
        if update_policy:
            self.optimizers[0].zero_grad()
            pi = self.args.action_scale * self.nets["actor"](obs).tanh()
            (1e-3 * (pi ** 2).mean() - q("qf1", pi).mean()).backward()
            self.clip("actor")
            self.optimizers[0].step()
            for name in ("actor", "qf1", "qf2"):
                for p, t in zip(self.nets[name].parameters(), self.nets[name + "_target"].parameters()):
                    t.data = 0.995 * t.data + 0.005 * p.data


def batch_of(rows, size=20, obs_size=3):
    torch.manual_seed(0)
    return [torch.randn(rows, size, obs_size), torch.rand(rows, size, 1) * 4 - 2, 10 * torch.randn(rows, size),
            torch.randn(rows, size, obs_size), (torch.rand(rows, size) < 0.3).float()]


def test_twins_and_policies_begin_different_and_targets_as_their_networks():
    torch.manual_seed(0)
    learners = em.TD3Learners(em.Args(), 3, 1)
    for one, other in zip(learners.qf1.weights, learners.qf2.weights):
        assert not torch.equal(one, other) and not torch.equal(one[0], one[1])
    for name in ("actor", "qf1", "qf2"):
        for one, other in zip(getattr(learners, name).parameters(), getattr(learners, name + "_target").parameters()):
            assert torch.equal(one, other) and one is not other


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_the_stack_equals_independent_td3_learners(max_grad_norm):
    args = small(lr=1e-2, action_scale=2.0, smoothing_noise=0.4, num_policies=3, max_grad_norm=max_grad_norm)
    torch.manual_seed(1)
    learners = em.TD3Learners(args, 3, 1)
    for name in ("actor", "qf1", "qf2"):                                       # or a slip in the targets would not show
        for param in getattr(learners, name + "_target").parameters():
            param.data += 0.1 * torch.randn_like(param)
    learners.actor_target.biases[-1].data += 2                                 # target actions must meet the limit
    optimizers, batch = learners.make_optimizers(args.lr), batch_of(3)
    plain = [PlainTD3(learners, row, args) for row in range(3)]
    for count in range(1, 8):
        torch.manual_seed(count)
        noise = torch.randn(3, 20, 1)
        torch.manual_seed(count)
        losses = em.td3_update(args, learners, optimizers, batch, 2.0, count % 3 == 0, np.random.default_rng(0))
        assert losses["critic"].shape == (3,) and ("actor" in losses) == (count % 3 == 0)
        for row, learner in enumerate(plain):
            learner.update(*(field[row] for field in batch), noise[row], count % 3 == 0)
    for row, name in itertools.product(range(3), ("actor", "qf1", "qf2", "actor_target", "qf2_target")):
        for layer, weight, bias in zip(plain[row].nets[name][::2], getattr(learners, name).weights,
                                       getattr(learners, name).biases):
            torch.testing.assert_close(layer.weight.t(), weight[row], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(layer.bias, bias[row, 0], atol=2e-5, rtol=1e-4)


def test_losses_by_hand():
    target = em.td_target(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[10.0, 10.0]]), 0.9)
    assert target.tolist() == [[10.0, 1.0]]                                    # termination cuts the bootstrap
    assert em.policy_loss(torch.tensor([[4.0, 2.0]]), torch.tensor([[[2.0], [0.0]]]), 0.1).tolist() == [
        pytest.approx(-3 + 0.1 * 2)]
    noise = em.clipped_noise(torch.zeros(10_000), 0.4)
    assert noise.abs().max() == 0.5 and 0.15 < (noise.abs() == 0.5).float().mean() < 0.27      # 2 (1 - Phi(1.25))


def test_exploration_noise_is_that_of_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(em, "policy_actions", lambda args, actor, obs: torch.zeros(*obs.shape[:2], 1))
    args = small(runs_dir=tmp_path, exploration_noise=0.3, smoothing_noise=0.1, learning_starts=10_000)
    actions = em.load_checkpoint(em.train(args))["buffer"][..., 3]
    assert actions.std() == pytest.approx(0.278, rel=0.05) and actions.abs().max() == 0.5      # 0.3, clipped


def test_exploration_stays_within_the_torque_limit_and_scales_actions(tmp_path):
    for scale, high in ((1.0, 1.5), (2.0, 2.0)):
        args = small(runs_dir=tmp_path / str(scale), action_scale=scale, exploration_noise=0.3, total_timesteps=600)
        actions = em.load_checkpoint(em.train(args))["buffer"][..., 3]
        assert actions.abs().max() <= high and actions.std() > 0.1
    args = small(action_scale=2.0)
    learners = em.TD3Learners(args, 3, 1)
    learners.actor.biases[-1].data.fill_(100)
    assert em.policy_actions(args, learners.actor, torch.zeros(2, 5, 3)).unique().item() == 2


# --- heads and surgery -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["multihead", "surgery"])
def test_a_tasks_loss_reaches_its_own_head_and_the_shared_layers_only(method):
    args, changed = small(method, lr=1e-2), {}
    for extra in (0.0, 50.0):                                                  # rewards of task 2 alone
        torch.manual_seed(1)
        learners = em.TD3Learners(args, 3, 1)
        optimizers, batch = learners.make_optimizers(args.lr), batch_of(7)
        batch[2][2] += extra
        em.td3_update(args, learners, optimizers, batch, 2.0, False, np.random.default_rng(0))
        changed[extra] = learners.qf1
    for layer, (one, other) in enumerate(zip(changed[0.0].weights, changed[50.0].weights)):
        rows = (one != other).flatten(1).any(1).tolist()
        assert rows == ([True] if layer in em.TIED_LAYERS[method] else [row == 2 for row in range(7)])


def test_gradients_of_shared_layers_are_those_of_each_task():
    args = small("surgery")
    torch.manual_seed(0)
    net = em.TaskMLP(4, [3, 5, 6, 1], (0, 1))
    (call, copies), goal = em.per_task(net, 4), torch.tensor([3.0, -3.0, 3.0, -3.0])[:, None, None]
    x, names = torch.randn(4, 8, 3), ["weights.0", "weights.1", "biases.0", "biases.1"]
    assert torch.allclose(call(x), net(x), atol=1e-6) and list(copies) == names
    assert em.per_task(em.TaskMLP(4, [3, 1]), 4)[1] == {}
    (call(x) - goal).square().mean((1, 2)).sum().backward()
    for task in range(4):
        alone = torch.autograd.grad((net(x) - goal).square().mean((1, 2))[task], [net.get_parameter(n) for n in names])
        for gradient, name in zip(alone, names):
            torch.testing.assert_close(copies[name].grad[task], gradient[0])
    stacked = torch.cat([copies[name].grad.flatten(1) for name in names], 1)
    gram, weights = em.gather_gradients([(net, copies)], None)
    torch.testing.assert_close(net.weights[0].grad[0].flatten(), stacked[:, :15].mean(0))
    assert gram == pytest.approx((stacked @ stacked.T).numpy(), rel=1e-5) and np.array_equal(weights, np.eye(4))
    _, weights = em.gather_gradients([(net, copies)], em.draw_visit_order(4, np.random.default_rng(3)))
    projected = em.project_conflicts(stacked, em.draw_visit_order(4, np.random.default_rng(3))).mean(0)
    torch.testing.assert_close(net.biases[1].grad.flatten(), projected[-6:])
    assert (weights >= np.eye(4)).all() and weights.sum() > 4
    assert not torch.allclose(projected, stacked.mean(0)) and args.method == "surgery"


# --- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env, method, count", [
    ("pendulum", "em", 54_284), ("pendulum", "sp", 13_571), ("pendulum", "ppt", 94_997),
    ("pendulum", "multihead", 29_397), ("pendulum", "surgery", 54_037),
    ("track", "em", 1_583_624), ("track", "multihead", 694_836), ("track", "surgery", 1_529_836),
    ("legs", "ppt", 3_563_154), ("legs", "multihead", 801_654),
    ("legs", "surgery", 1_540_654)])
def test_parameter_counts_are_the_papers(env, method, count):
    learners = em.TD3Learners(em.Args(env=env, method=method), *((3, 1) if env == "pendulum" else (24, 4)))
    assert sum(p.numel() for name, p in learners.named_parameters() if "target" not in name) == count


@pytest.mark.parametrize("env, method, expected", [
    ("pendulum", "em", (4, 50_000, 10_000, 1, 128, 3e-3, 0.05, 0.1, 2_000_000)),
    ("pendulum", "sp", (1, 200_000, 10_000, 1, 128, 3e-3, 0.05, 0.1, 2_000_000)),
    ("pendulum", "multihead", (7, 28_571, 14_300, 1, 128, 3e-3, 0.05, 0.1, 2_000_000)),
    ("pendulum", "surgery", (7, 28_571, 14_300, 1, 128, 3e-3, 0.05, 0.1, 2_000_000)),
    ("track", "surgery", (6, 133_333, 16_700, 5, 1_000, 1e-3, 0.1, 0.2, 5_000_000)),
    ("legs", "multihead", (9, 88_888, 11_100, 5, 1_000, 1e-3, 0.1, 0.2, 5_000_000)),
    ("legs", "surgery", (9, 88_888, 11_100, 5, 1_000, 1e-3, 0.1, 0.2, 5_000_000)),
    ("track", "em", (4, 200_000, 10_000, 3, 1_000, 1e-3, 0.1, 0.2, 5_000_000)),
    ("track", "multihead", (6, 133_333, 16_700, 5, 1_000, 1e-3, 0.1, 0.2, 5_000_000)),
    ("legs", "ppt", (9, 88_888, 10_000, 3, 1_000, 1e-3, 0.1, 0.2, 5_000_000))])
def test_the_papers_settings_are_the_defaults(env, method, expected):
    args = em.Args(env=env, method=method)
    assert (args.num_policies, args.m_step_size, args.learning_starts, args.update_every, args.batch_size, args.lr,
            args.exploration_noise, args.smoothing_noise, args.buffer_size) == expected
    assert (args.gamma, args.tau, args.policy_delay) == (0.99, 0.005, 3)
    assert (args.max_grad_norm, args.action_penalty) == (0.5, 1e-3)
    assert args.eval_episodes == 20 and em.HORIZON["pendulum"] == 500 and em.EVAL_HORIZON["pendulum"] == 200


def test_a_parameter_that_is_not_finite_stops_the_run(tmp_path, capsys):
    folder = em.train(small(runs_dir=tmp_path))
    state = em.load_checkpoint(folder)
    state["learners"]["qf1.weights.1"][0, 0, 0] = float("nan")
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(em.Failure, match="not finite at step"):
        em.train(em.read_args(em.Args, ["--resume", str(folder), "--total-timesteps", "12000"]))
    state["learners"] = {name: value.nan_to_num(0) for name, value in state["learners"].items()}
    state["learners"]["actor.weights.2"][:] = float("nan")
    torch.save(state, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(em.Failure, match="action is not finite at step 1,200"):
        em.train(em.read_args(em.Args, ["--resume", str(folder), "--total-timesteps", "12000"]))
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_walkers_go_on_with_fresh_episodes(tmp_path, capsys):
    settings = SMALL | dict(env="track", total_timesteps=400, m_step_size=100, num_policies=2, runs_dir=tmp_path)
    em.EVAL_HORIZON["track"], kept = 30, em.EVAL_HORIZON["track"]
    try:
        folder = em.train(em.Args(**settings))
        em.train(em.read_args(em.Args, ["--resume", str(folder), "--total-timesteps", "450"]))     # less than an M-step
        assert "nothing to train: 400 steps are done" in capsys.readouterr().out
        em.train(em.read_args(em.Args, ["--resume", str(folder), "--total-timesteps", "800"]))
    finally:
        em.EVAL_HORIZON["track"] = kept
    said = capsys.readouterr().out
    assert "fresh episodes" in said and "nothing to train" not in said
    assert column(folder, "global_step") == [200, 400, 600, 800] and em.load_checkpoint(folder)["num_added"] == 400


# --- what mutations got past ----------------------------------------------------------------------------------------
def test_updates_begin_after_the_warm_up_every_u_steps_and_policies_every_third(probes, tmp_path, monkeypatch):
    calls, update = [], em.td3_update
    monkeypatch.setattr(em, "td3_update", lambda *a: calls.append(a[5]) or update(*a))
    em.train(small(runs_dir=tmp_path, total_timesteps=600, learning_starts=50, update_every=5))
    assert calls == ([False, False, True] * 17)[:50]                            # at 55, 60, ..., 300


def test_time_limits_of_training_and_of_e_steps(monkeypatch):
    monkeypatch.setitem(em.HORIZON, "pendulum", 11), monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 7)
    args = small(eval_episodes=2)
    pairs = np.array([0, 1]), np.array([3, 3])
    assert em.play(args, em.TD3Learners(args, 3, 1), *pairs, np.random.default_rng(0))["steps"] == 2 * 2 * 7
    assert {env.get_wrapper_attr("_max_episode_steps") for env in em.make_envs(args, [0]).envs} == {11}


def test_columns_of_a_scripted_e_step(probes, tmp_path, monkeypatch):
    table = np.random.default_rng(0).uniform(-9, 0, (7, 2))

    def scripted(args, learners, policies, tasks, rng, frames=False):
        spread = np.array([-1.0, 0.0, 4.0])                                     # mean 1, first -1
        returns = table[tasks, policies][:, None] + spread
        return {"returns": returns, "successes": np.ones_like(returns), "steps": returns.size, "frames": []}
    monkeypatch.setattr(em, "play", scripted)
    folder = em.train(small("random-clusters", runs_dir=tmp_path, eval_episodes=3))
    owners = np.array([column(folder, f"{name}/policy")[-1] for name in em.TASKS["pendulum"]], int)
    mine = table[range(7), owners] + 1
    assert column(folder, "max_return")[-1] == pytest.approx(table.max(1).mean() + 1, abs=1e-4)
    assert column(folder, "mean_return")[-1] == pytest.approx(mine.mean(), abs=1e-4)
    assert em.load_checkpoint(folder)["history"][-1][2].numpy() == pytest.approx(mine)
    assert (folder / "assignment.png").exists() and not np.allclose(mine, table.max(1) + 1)


def test_rows_more_often_change_no_training_number(tmp_path, monkeypatch):
    monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 20)
    runs = [em.train(small(runs_dir=tmp_path / str(p), eval_every=p, eval_episodes=2)) for p in (1, 1_200)]
    a, b = map(em.load_checkpoint, runs)
    assert all(torch.equal(a["learners"][k], b["learners"][k]) for k in a["learners"])
    assert all(torch.equal(x[2], y[2]) for x, y in zip(a["history"], b["history"]))
    assert [len(csv_rows(run)) for run in runs] == [3, 2] and torch.equal(a["buffer"], b["buffer"])


@pytest.mark.parametrize("buffer_size", [100, 10_000])
def test_resumed_within_an_m_step_goes_on_with_its_own_tasks(buffer_size, tmp_path, monkeypatch):
    monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 20), monkeypatch.setitem(em.HORIZON, "pendulum", 40)
    save = em.Run.save

    def keep(self, state):
        save(self, state)
        (tmp_path / f"{state['global_step']}.pt").write_bytes((self.dir / "checkpoint.pt").read_bytes())
    monkeypatch.setattr(em.Run, "save", keep)
    args = small("random-clusters", runs_dir=tmp_path / "runs", checkpoint_every=700, buffer_size=buffer_size)
    folder = em.train(args)
    straight = em.load_checkpoint(folder)
    (folder / "checkpoint.pt").write_bytes((tmp_path / "700.pt").read_bytes())
    em.train(em.read_args(em.Args, ["--resume", str(folder)]))
    again = em.load_checkpoint(folder)
    assert torch.equal(straight["buffer"], again["buffer"]) and again["buffer"].shape[1] == min(buffer_size, 600)
    assert all(torch.equal(straight["learners"][k], again["learners"][k]) for k in again["learners"])
    assert str(straight["history"]) == str(again["history"]) and len(again["history"]) == 3


def test_evaluate_plays_the_stored_policies_in_the_stored_assignment(tmp_path, monkeypatch, capsys):
    """Spoil one policy in a checkpoint: only the tasks that are assigned to it may come out otherwise."""
    monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 20)

    def table():
        return [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("length")]
    folder = em.train(small("random-clusters", runs_dir=tmp_path, eval_episodes=3))
    tables, state = [table()], em.load_checkpoint(folder)
    other = 1 - state["assignment"]                                            # not what the seed gives
    for spoilt, assignment in ((None, state["assignment"]), (None, other), (0, other), (1, other)):
        changed = {name: value.clone() for name, value in state["learners"].items()}
        if spoilt is not None:
            changed["actor.biases.2"][spoilt] += 50                            # full torque to one side
        torch.save(state | {"learners": changed, "assignment": assignment}, folder / "checkpoint.pt")
        em.train(em.read_args(em.Args, ["--evaluate", str(folder)]))
        tables.append(table())
    assert tables[0] == tables[1] != tables[2] and len(tables[0]) == 7
    for spoilt, spoilt_table in enumerate(tables[3:]):
        assert [a != b for a, b in zip(spoilt_table, tables[2])] == (other == spoilt).tolist()


@pytest.mark.parametrize("method", ["multihead", "surgery"])
def test_only_surgery_projects(method, monkeypatch):
    args, calls, weights = small(method), [], em.conflict_weights
    monkeypatch.setattr(em, "conflict_weights", lambda *a: calls.append(1) or weights(*a))
    learners = em.TD3Learners(args, 3, 1)
    em.td3_update(args, learners, learners.make_optimizers(1e-3), batch_of(7), 2.0, True, np.random.default_rng(0))
    assert len(calls) == (3 if method == "surgery" else 0)                      # two critics and the actor


@pytest.mark.parametrize("method", ["em", "multihead", "surgery"])
def test_a_frozen_layer_stays_and_the_others_learn(method):
    args = small(method)
    learners = em.TD3Learners(args, 3, 1)
    optimizers, nets = learners.make_optimizers(1e-3), [learners.actor, learners.qf1, learners.qf2]
    for net in nets:
        net.weights[1].requires_grad_(False)                                    # one matrix for all tasks, with heads
    before = [[weight.clone() for weight in net.weights] for net in nets]
    for _ in range(3):
        em.td3_update(args, learners, optimizers, batch_of(args.num_policies), 2.0, True, np.random.default_rng(0))
    for net, weights in zip(nets, before):
        assert [torch.equal(*pair) for pair in zip(weights, net.weights)] == [False, True, False]


def test_no_episode_survives_its_assignment(probes, tmp_path, monkeypatch):
    class Long(Probe):                                                          # never ends by itself
        def step(self, action):
            self.played.append(self.task)
            return np.zeros(2, np.float32), -1.0, False, False, {"success": False, "task": self.task}
    made = []

    def make(args, allowed, horizon):
        made.append(Long(list(allowed)))
        return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(made[-1], 7))
    monkeypatch.setattr(em, "make_env", make)
    script = iter([np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 1, 0, 0, 0, 0]), np.zeros(7, int)])
    monkeypatch.setattr(em, "assign_tasks", lambda returns: next(script))
    em.train(small("em", runs_dir=tmp_path, total_timesteps=1_200))
    # second M-step's first episode: after 2 resets + 300 steps + 42 autoresets + 1 reset
    played = made[0].played[2 + 300 + 42:2 + 300 + 42 + 8]
    assert set(played) <= {3, 4, 5, 6}, played
