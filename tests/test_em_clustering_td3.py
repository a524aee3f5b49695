"""EM with TD3: tasks and rewards by hand, E- and M-step bookkeeping, TD3 and surgery against plain matrices."""
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from Box2D import b2Vec2
from gymnasium.envs.box2d import bipedal_walker
from gymnasium.utils.env_checker import check_env

import em_clustering_td3 as em

EVENT, NAMES = em.TASKS["track"] | em.TASKS["legs"], tuple(em.TASKS["pendulum"])


def small(method="em", **settings):
    own = dict(m_step_size=300, e_step_episodes=1, num_policies=2) if method == "em" else {}
    return em.Args(**dict(method=method, total_timesteps=1_200, learning_starts=100, update_every=5, batch_size=16,
                          hidden_sizes=(16, 16), eval_every=400, eval_episodes=1) | own | settings)


def column(folder, name):
    return np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)[name].tolist()


def test_pendulum_steps_by_hand():
    env = em.PendulumEnv(0.7)
    env.state = 11 * math.pi / 6, 1.0                                  # wraps to -pi / 6; a torque of 5 is cut to 2
    assert env.step(np.array([5.0]))[1] == pytest.approx(-((math.pi / 6) ** 2 + 0.1 + 0.004))
    velocity = 1 + 0.05 * (3 * 10 / (2 * 0.7) * -0.5 + 3 / 0.49 * 2)
    assert env.state == (pytest.approx(11 * math.pi / 6 + 0.05 * velocity), pytest.approx(velocity))
    env.state = math.pi / 2, 8.0
    env.step(np.array([0.0]))                                          # the angle moves before the speed is limited
    assert env.state == (pytest.approx(math.pi / 2 + 0.05 * (8 + 0.05 * 15 / 0.7)), 8.0)
    for angle, upright in ((2 * math.pi + 0.2, True), (0.4, False)):
        env.state = angle, 0.0
        assert env.step(np.array([0.0]))[4]["success"] == upright
    check_env(em.PendulumEnv(0.7), skip_render_check=True)
    assert [em.TASKS["pendulum"][name] for name in NAMES] == [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]


@pytest.mark.parametrize("name, counts, gaps, height", [
    ("sprint", {0}, (0, 0), 0), ("legs25-gap2", {35}, (2, 2), 0.233), ("legs45-gap4", {19}, (4, 4), 0.233),
    ("legs35-flat", {19}, (4, 4), 0.033), ("hurdles", {12, 13, 14, 15}, (9 * 14 / 30, 17 * 14 / 30), 1.0)])
def test_ground_and_legs_of_the_walkers(name, counts, gaps, height):
    tops, env = [], em.WalkerEnv(EVENT[name])
    for seed in range(10):
        env.reset(seed=seed)
        shapes = [np.array(body.fixtures[0].shape.vertices) for body in env.terrain]
        boxes = np.array([(box[:, 0].min(), box[:, 0].max()) for box in shapes if len(box) == 4]).reshape(-1, 2)
        boxes, tops = boxes[boxes[:, 0].argsort()], tops + [box[:, 1].max() - 10 / 3 for box in shapes if len(box) == 4]
        assert len(boxes) in counts and len(shapes) == len(boxes) + 199 and set(boxes[:1, 0]) <= {np.float32(28 / 3)}
        assert all((edge[:, 1] == np.float32(10 / 3)).all() for edge in shapes if len(edge) == 2)
        assert np.allclose(np.diff(boxes), 14 / 30, atol=1e-5)
        between = boxes[1:, 0] - boxes[:-1, 1]
        assert (between > gaps[0] - 1e-4).all() and (between < gaps[1] + 1e-4).all()
        lengths = [np.ptp(np.array(leg.fixtures[0].shape.vertices)[:, 1]) for leg in env.legs]
        assert np.allclose(lengths, EVENT[name].leg / 30)
    assert np.mean(tops or 0) == pytest.approx(height, rel=0.12) and (height < 1 or np.ptp(tops) < 1e-5)
    check_env(env, skip_render_check=True)
    assert em.make_env(em.Args(env="legs", flat_ground=True), "legs35-flat").event.stumps == ""


def test_walker_rewards_by_hand(monkeypatch):
    monkeypatch.setattr(bipedal_walker.BipedalWalker, "step", lambda self, action: (None, 7.5, False, False, {}))

    def put(env, x, y=6.0, speed=3.0, contact=(True, True), fell=False, action=(0.0, 0.0, 0.0, 0.0)):
        env.hull, env.game_over = SimpleNamespace(position=b2Vec2(x, y), linearVelocity=b2Vec2(speed, 0)), fell
        env.legs = [SimpleNamespace(ground_contact=touching) for touching in (None, contact[0], None, contact[1])]
        _, reward, ended, _, info = env.step(np.array(action))
        return pytest.approx(reward), ended, info["success"]
    walkers = {name: em.WalkerEnv(event) for name, event in EVENT.items()}
    effort = (1.0, -2.0, 0.5, 0.0)                                     # 2.5 after clipping
    for name, price, finish in (("sprint", 0.028, 26.6), ("run", 0.028, 44.333), ("marathon", 0.052, 88.667),
                                ("hurdles", 0.028, 88.667), ("jump-up", 0.028, 88.667), ("jump-long", 0.028, 26.6)):
        env = walkers[name]
        env.airborne, env.last_contact_x, earned = False, 0.0, 0.0 if "jump" in name else 0.3
        assert put(env, finish - 0.01, action=effort) == (earned - 2.5 * price, False, False)
        assert put(env, finish + 0.01) == (earned, True, True)
        assert put(env, 10, fell=True, action=effort) == put(env, -0.01) == (-100, True, False)
        assert put(env, 11, contact=(False, True)) == put(env, 12, contact=(False, False)) == (earned, False, False)
        landing = {"jump-up": 7.0 - 11, "jump-long": 12.5 - 11}.get(name, 0.3)             # last contact: 11
        assert put(env, 12.5, 7, contact=(True, False)) == (landing, False, False) and put(env, 13, 7)[0] == earned
    env = walkers["legs25-gap2"]
    env.airborne, env.last_contact_x = False, 0.0
    assert put(env, 50, fell=True) == (7.5, True, False) and put(env, 88.66) == (7.5, False, False)        # Gymnasium's


class Probe(gym.Env):
    """Three steps; reward -5/3 |action - target| each, with opposite targets for even and odd tasks."""

    observation_space, action_space = (gym.spaces.Box(-1.0, 1.0, (size,), np.float32) for size in (2, 1))
    state, started = (0.0, 0.0), []                                    # started: (task, first observation) by episode

    def __init__(self, task):
        self.task, self.left = task, 3

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.started.append((self.task, *self.np_random.uniform(-1, 1, 2)))
        return np.array(self.started[-1][1:], np.float32), {}

    def step(self, action):
        self.left -= 1
        miss = abs(float(action[0]) - (0.6 if self.task % 2 else -0.6))
        obs = np.array([self.task, self.left], np.float32)
        return obs, -5 / 3 * miss, self.left == 0, False, {"success": miss < 0.15}


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.setattr(Probe, "started", [])
    monkeypatch.setattr(em, "make_env", lambda args, name: Probe(args.tasks.index(name)))
    return Probe.started


def test_random_clusters_are_of_equal_size():
    drawn = [em.random_clusters(7, 4, np.random.default_rng(seed)) for seed in range(20)]
    assert all(sorted(np.bincount(a).tolist()) == [1, 2, 2, 2] for a in drawn) and len({tuple(a) for a in drawn}) > 10


def test_pairs_play_the_right_policy_in_the_right_task_from_common_starts(probes):
    def playing(args, *actions):                                       # policies that do so whatever they see
        agent = em.TD3(args, len(actions), Probe(0))
        agent.actor.params[-2].data.zero_()
        agent.actor.params[-1].data[:, 0, 0] = torch.tensor(actions).atanh()
        return agent
    args, own = small(tasks=NAMES[:3]), small("ppt", tasks=NAMES[:3])
    for common, starts in ((True, 3 * 2), (False, 3 * 2 * 2)):
        del probes[:]
        played = em.play_pairs(args, playing(args, -0.6, 0.6), 2, np.random.default_rng(0), common, lambda: False)
        assert played["return"].mean(-1) == pytest.approx(np.array([[0, -6, 0], [-6, 0, -6]]), abs=1e-5)
        assert played["success"][..., 0].tolist() == [[1, 0, 1], [0, 1, 0]] and played["steps"] == 3 * 12
        assert len(set(probes)) == starts and len(probes) == 12        # two policies, three tasks, two episodes
    for assignment, returned in (([1, 0, 1], -2), ([0, 0, 0], -4)):
        result, columns = em.evaluate(args, playing(args, 0.6, 0.0), np.array(assignment))
        assert result["return"].mean() == pytest.approx(returned) and columns["max_return"] == pytest.approx(-2)
    assert em.evaluate(own, playing(own, -0.6, 0.6, 0.0), np.arange(3))[0]["return"].mean() == pytest.approx(-1)


def test_m_steps_train_each_policy_on_its_own_tasks_and_the_last_one_is_cut(probes, tmp_path, monkeypatch):
    returns, play = np.array([[5, 0, 0, 0, 0, 0, 0], [0, 5, 5, 5, 5, 5, 5]])[..., None], em.play_pairs     # (n, T, 1)
    script = [returns, returns[::-1], np.ones((2, 7, 1))]              # a tie goes to policy 0, and policy 1 has none
    monkeypatch.setattr(em, "play_pairs", lambda *a: play(*a) | ({} if a[4] else {"return": script.pop(0)}))
    folder = em.train(small("em", m_step_size=200, total_timesteps=1_000, common_starts=False, runs_dir=tmp_path))
    state = em.load_checkpoint(folder)
    assert list(state["e_steps"]) == [0, 400, 800] and state["num_added"] == 500
    assert column(folder, "global_step") == [400, 800, 1_000] and column(folder, "e_step_steps") == [84, 126, 126]
    task, left = state["buffer"][..., 4:6].unbind(-1)                  # after each transition, (n, 500)
    for policy, tasks in enumerate([[{0}, {*range(1, 7)}, {*range(7)}], [{*range(1, 7)}, {0}, {*range(7)}]]):
        assert [set(task[policy, a:b].tolist()) for a, b in ((0, 200), (200, 400), (400, 500))] == tasks
        assert left[policy, [0, 200, 400]].tolist() == [2, 2, 2]       # episodes do not outlive their assignment


@pytest.mark.parametrize("method, policies", [("em", 2), ("sp", 1), ("ppt", 7), ("multihead", 7), ("surgery", 7)])
def test_when_a_method_learns_and_what_it_plays(method, policies, probes, tmp_path, monkeypatch):
    calls, update = [], em.td3_update
    monkeypatch.setattr(em, "td3_update", lambda *a: calls.append((len(a[3][0]), a[4])) or update(*a))
    folder = em.train(small(method, total_timesteps=600, eval_every=200, runs_dir=tmp_path))
    first, last = (steps // policies // 5 for steps in (100, 600 + policies - 1))          # in updates
    assert calls == [(policies, turn % 3 == 0) for turn in range(first + 1, last + 1)]
    tried = 14 if method == "em" else 7
    assert column(folder, "eval_steps") == [3 * tried] * 3             # and nothing but that was played:
    assert abs(len(probes) - 600 / 3 - 3 * tried - 2 * tried * (method == "em")) <= 2 * policies
    assert em.Args(method=method).learning_starts == 40_000


def test_an_interrupted_e_step_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setitem(em.HORIZON, "pendulum", 40), monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 20)
    straight, play, calls = em.load_checkpoint(em.train(small(runs_dir=tmp_path / "a"))), em.play_pairs, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:                                            # the E-step at 600 steps
            arguments[-1].__self__.set()
        return play(*arguments)
    monkeypatch.setattr(em, "play_pairs", interrupted)
    with pytest.raises(SystemExit):
        em.train(small(runs_dir=tmp_path / "b"))
    folder = next((tmp_path / "b").iterdir())
    state = em.load_checkpoint(folder)
    assert state["global_step"] == 600 and state["assignment"] == straight["e_steps"][0][0]
    monkeypatch.setattr(em, "play_pairs", play)
    em.train(em.read_args(["--resume", str(folder)]))
    resumed = em.load_checkpoint(folder)
    assert resumed["e_steps"] == straight["e_steps"] and torch.equal(resumed["buffer"], straight["buffer"])


@pytest.mark.parametrize("flag", [False, True])
def test_time_limits_bootstrap_unless_asked_not_to(flag, tmp_path, monkeypatch):
    monkeypatch.setitem(em.HORIZON, "pendulum", 7), monkeypatch.setitem(em.EVAL_HORIZON, "pendulum", 5)
    args = small("sp", runs_dir=tmp_path, timeout_is_terminal=flag, exploration_noise=0.3, learning_starts=5_000)
    state, limits = em.load_checkpoint(folder := em.train(args)), torch.arange(1_200) % 7 == 6
    obs, actions, _, next_obs, ends = state["buffer"].split([3, 1, 1, 3, 1], -1)
    assert torch.equal(ends[0, :, 0], (limits & flag).float()) and column(folder, "eval_steps")[0] == 7 * 5
    assert torch.equal((obs[0, 1:] != next_obs[0, :-1]).any(-1), limits[:-1])              # what the action led to
    agent = em.TD3(args, 1, em.PendulumEnv(1.0))
    agent.load_state_dict(state["agent"])
    noise = actions.numpy() - agent.act(obs.numpy())
    assert noise.std() == pytest.approx(0.278, rel=0.1) and abs(noise).max() == pytest.approx(0.5, abs=1e-5)   # clipped


def plain(stack):
    """A stack's networks as lists of matrices and biases, [copy][row]; layers that rows share are the same tensors."""
    leaves = [[one.detach().clone().requires_grad_() for one in param] for param in stack.params]
    rows, each = range(stack.stack[1]), [len(leaf) // stack.stack[0] for leaf in leaves]
    return [[[leaf[c * k + r % k] for leaf, k in zip(leaves, each)] for r in rows] for c in range(stack.stack[0])]


def run(net, *inputs):
    x = torch.cat(inputs, 1)
    for layer in range(0, 6, 2):
        x = x @ net[layer] + net[layer + 1] if layer == 0 else x.relu() @ net[layer] + net[layer + 1]
    return x


def descend(args, nets, optimizer, losses, rng):
    """Each row's gradients alone; those of layers that rows share meet in surgery or not, then in their mean."""
    for rows in nets:
        grads = [list(torch.autograd.grad(loss, row, retain_graph=True)) for loss, row in zip(losses, rows)]
        shared = [k for k in range(6) if rows[0][k] is rows[1][k]]
        tasks = [torch.cat([row[k].flatten() for k in shared] or [torch.zeros(1)]) for row in grads]
        moved = [task.clone() for task in tasks]
        for i, partners in enumerate(em.draw_visit_order(len(rows), rng) if args.method == "surgery" else ()):
            for j in partners:
                moved[i] -= min(moved[i] @ tasks[j], 0) / (tasks[j] @ tasks[j]) * tasks[j]
        mean = (sum(moved) / len(rows)).split([rows[0][k].numel() for k in shared] or [1])
        for row, own in zip(rows, grads):
            for k in range(6):
                grad = mean[shared.index(k)].view_as(row[k]) if k in shared else own[k]
                row[k].grad = grad * (min(1, args.max_grad_norm / grad.norm()) if args.max_grad_norm else 1)
    optimizer.step()


@pytest.mark.parametrize("method, norm", [("em", 0.5), ("em", 0.0), ("multihead", 0.5), ("surgery", 0.5)])
def test_updates_equal_those_of_plain_matrices_one_by_one(method, norm):
    args = small(method, lr=1e-2, action_scale=2.0, smoothing_noise=0.4, max_grad_norm=norm, preactivation_penalty=0.02)
    torch.manual_seed(1)
    env = SimpleNamespace(observation_space=gym.spaces.Box(-1, 1, (3,)), action_space=gym.spaces.Box(-2, 2, (2,)))
    agent, rngs = em.TD3(args, 3, env).double(), [np.random.default_rng(2) for _ in range(2)]
    for param in [*agent.actor_target.params, *agent.critic_target.params]:
        param.data += 0.1 * torch.randn_like(param)                    # or a slip in the targets would not show
    agent.actor_target.params[-1].data += 1                            # target actions must meet the limit
    nets = {name: plain(getattr(agent, name)) for name in ("actor", "critic", "actor_target", "critic_target")}
    ours = {name: torch.optim.Adam(getattr(agent, name).parameters(), 1e-2, eps=1e-7) for name in ("actor", "critic")}
    theirs = {name: torch.optim.Adam(set(sum(sum(nets[name], []), [])), 1e-2, eps=1e-7) for name in ours}
    for count in range(1, 8):
        batch = [torch.randn(3, 20, 3), 4 * torch.rand(3, 20, 2) - 2, 10 * torch.randn(3, 20), torch.randn(3, 20, 3),
                 torch.rand(3, 20) < 0.3]
        batch, state = [field.double() for field in batch], torch.get_rng_state()
        smooth, losses = (0.4 * torch.randn(3, 20, 2)).clamp(-0.5, 0.5), []
        torch.set_rng_state(state)
        found = em.td3_update(args, agent, ours, batch, count % 3 == 0, rngs[0])
        for i, (obs, actions, rewards, next_obs, ends) in enumerate(zip(*batch)):
            next_actions = (2 * run(nets["actor_target"][0][i], next_obs).tanh() + smooth[i]).clamp(-2, 2)
            q = torch.minimum(*(run(rows[i], next_obs, next_actions)[:, 0] for rows in nets["critic_target"])).detach()
            goal = rewards + 0.99 * (1 - ends) * q
            losses.append(sum(((run(rows[i], obs, actions)[:, 0] - goal) ** 2).mean() for rows in nets["critic"]))
        assert torch.allclose(found["critic"], torch.stack(losses)) and ("actor" in found) == (count % 3 == 0)
        descend(args, nets["critic"], theirs["critic"], losses, rngs[1])
        if count % 3:
            continue
        raw = [run(net, obs) for net, obs in zip(nets["actor"][0], batch[0])]
        descend(args, nets["actor"], theirs["actor"], [
            1e-3 * (4 * u.tanh() ** 2).mean() + 0.02 * (u**2).mean() - run(net, obs, 2 * u.tanh()).mean()
            for net, obs, u in zip(nets["critic"][0], batch[0], raw)], rngs[1])
        for name in ours:
            pairs = zip(sum(sum(nets[name + "_target"], []), []), sum(sum(nets[name], []), []))
            for target, online in dict(pairs).items():
                target.data = 0.995 * target.data + 0.005 * online.data
    for name, expected in nets.items():
        torch.testing.assert_close(plain(getattr(agent, name)), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("env, method, count", [
    ("pendulum", "em", 54_284), ("pendulum", "sp", 13_571), ("pendulum", "multihead", 29_397),
    ("pendulum", "surgery", 54_037), ("track", "em", 1_583_624), ("legs", "ppt", 3_563_154)])
def test_networks_have_the_papers_numbers_of_parameters(env, method, count):
    args = em.Args(env=env, method=method)
    agent = em.TD3(args, args.num_policies or {"sp": 1}.get(method, len(args.tasks)), em.make_env(args, args.tasks[0]))
    assert sum(p.numel() for net in (agent.actor, agent.critic) for p in net.parameters()) == count
