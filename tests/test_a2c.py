"""A2C and distillation: bodies and steps against Gymnasium, whole updates against plain matrices, and what may move."""
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from torch.distributions import Normal

import distill_a2c as di
import multitask_a2c as a2c

XML = Path(gym.__file__).parent / "envs/mujoco/assets/half_cheetah.xml"
GEOMS = {"Torso": "torso", "Head": "head", "Thigh": "fthigh bthigh", "Leg": "fshin bshin", "Foot": "ffoot bfoot"}
NAMES = ("SmallFoot", "BigLeg", "BigTorso")
SMALL = dict(num_envs=2, eval_episodes=1, hidden_size=8)


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    """7 steps: time limits within rollouts of 5 steps and at their ends."""
    for script in (a2c, di):
        monkeypatch.setattr(script, "HORIZON", 7)


@pytest.mark.parametrize("variant", a2c.VARIANTS)
def test_bodies_and_steps_are_gymnasiums(variant, tmp_path):
    """With gym-extensions' own procedure: every number of the geoms' `size` in the XML times 0.75 or 1.25."""
    tree, xml = ElementTree.parse(XML), str(tmp_path / "body.xml")
    for geom in GEOMS[variant.removeprefix("Small").removeprefix("Big")].split():
        size = tree.find(f".//geom[@name='{geom}']").attrib
        size["size"] = " ".join(str(float(x) * (0.75 if "Small" in variant else 1.25)) for x in size["size"].split())
    tree.write(xml)
    theirs, ours = mujoco.MjModel.from_xml_path(xml), a2c.cheetah_model(variant)
    for field in ("geom_size", "geom_pos", "body_mass", "body_inertia", "body_pos", "jnt_pos", "actuator_gear"):
        assert np.allclose(getattr(theirs, field), getattr(ours, field), atol=1e-12), field
    env, rng = gym.make("HalfCheetah-v5", xml_file=xml).unwrapped, np.random.default_rng(0)
    cheetahs, earned = a2c.Cheetahs(variant, 2, rng), 0
    for _ in range(40):                                                # single steps, or chaos takes over
        env.set_state(cheetahs.state[1, 1:10], cheetahs.state[1, 10:])
        actions = rng.uniform(-1.5, 1.5, (2, 6)).astype(np.float32)
        obs, reward, *_ = env.step(actions[1])
        assert cheetahs.step(torch.from_numpy(actions))[1].item() == pytest.approx(reward, abs=1e-5)
        assert cheetahs.observe()[1].numpy() == pytest.approx(obs, abs=1e-5)
        earned += reward
    assert cheetahs.returns[1] == pytest.approx(earned, abs=1e-3) and cheetahs.steps == 40
    cheetahs.copies = 2_000
    cheetahs.reset()
    time, qpos, qvel = np.split(cheetahs.state, [1, 10], axis=1)
    assert not time.any() and cheetahs.steps == 0 and not cheetahs.returns.any() and np.abs(qpos).max() <= 0.1
    assert [qpos.std(), qvel.std()] == pytest.approx([0.1 / 3**0.5, 0.1], rel=0.03)


def test_returns_by_hand():
    """Rewards 1, 0, 2, V = 4 after them; the episodes go on, end, or are cut off at V = 3 after the second step."""
    rewards, last = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([4.0])
    for final, expected in ((None, (5.536, 5.04, 5.6)), (torch.zeros(1), (1, 0, 5.6)), (last - 1, (3.43, 2.7, 5.6))):
        returns = a2c.n_step_returns(rewards, [None, final, None], last, gamma=0.9)
        assert returns[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


class Plain:
    """One Agent's networks as matrices, obs -> mean, log-std (B, 6) and value (B,); `trunk`: whose trunk it has."""

    def __init__(self, agent, trunk=None):
        self.seen, self.w = torch.zeros(0, 17), {k: v.clone().requires_grad_() for k, v in agent.state_dict().items()
                                                 if not k.startswith("filter")}
        self.w |= {k: v for k, v in trunk.w.items() if k[:2] == "v1" or k[:3] in ("pi1", "pi2")} if trunk else {}

    def __call__(self, obs):
        count, seen, w = len(self.seen) + 0.01, self.seen.double(), self.w
        mean = seen.sum(0) / count
        pi = v = ((obs - mean) / ((seen.square().sum(0) + 0.01) / count - mean**2).clamp(min=0.01).sqrt()).clamp(-5, 5)
        for k in "123":
            pi, v = (x.float() @ w[f"{net}{k}.weight"].T + w[f"{net}{k}.bias"] for net, x in (("pi", pi), ("v", v)))
            pi, v = (pi, v) if k == "3" else (pi.tanh(), v.tanh())
        return (pi, w["log_std"].expand_as(pi), v[:, 0]) if "log_std" in w else (pi[:, :6], pi[:, 6:], v[:, 0])


@pytest.mark.parametrize("log_std, shared, ends", [("parameter", 1, 0), ("network", 1, 1), ("parameter", 0, 0)])
def test_rollouts_and_updates_are_those_of_plain_matrices(log_std, shared, ends, monkeypatch):
    args, agents, plain = a2c.Args(gamma=0.9, entropy_coef=0.03, timeout_is_terminal=ends), [], []
    for _ in NAMES:
        agents.append(a2c.Agent(8, log_std, agents[0] if shared and agents else None))
        plain.append(Plain(agents[-1], plain[0] if shared and plain else None))
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.linspace(-1, 1, 18).view(*shape))
    optimizer = torch.optim.RMSprop(torch.nn.ModuleList(agents).parameters(), lr=7e-4, alpha=0.99, eps=1e-5)
    memory = {param: torch.zeros_like(param) for net in plain for param in net.w.values()}
    ours, twins = ([a2c.Cheetahs(name, 3, np.random.default_rng(5)) for name in NAMES] for _ in range(2))
    for task in [0, 1, 2, 1, 1, 0, 2, 2]:
        *rollout, earned = a2c.collect(args, ours[task], agents[task])
        a2c.a2c_update(args, agents[task], optimizer, *rollout)
        net, env, steps, ended = plain[task], twins[task], [], None
        with torch.no_grad():
            for t in range(5):
                mean, deviation, _ = net(env.observe())
                action = mean + deviation.exp() * torch.randn(3, 6)
                steps.append([env.observe(), action, env.step(action), None])
                if env.steps == 7:
                    steps[t][3], ended = net(env.observe())[2] * (not ends), env.returns
                    env.reset()
            obs, actions, rewards, finals = zip(*steps)
            targets = a2c.n_step_returns(torch.stack(rewards), finals, net(env.observe())[2], 0.9).flatten()
        assert (ended is None and earned is None) or np.allclose(earned, ended, atol=1e-4)
        net.seen = torch.cat([net.seen, *obs])
        mean, deviation, values = net(torch.cat(obs))
        noise = (torch.cat(actions) - mean) / deviation.exp()
        log_prob = (-0.5 * noise**2 - deviation - 0.5 * np.log(2 * np.pi)).sum(1)
        entropy = (deviation + 0.5 * np.log(2 * np.pi * np.e)).sum(1)
        loss = (0.5 * (targets - values)**2 - (targets - values).detach() * log_prob - 0.03 * entropy).mean()
        grads = torch.autograd.grad(loss, list(net.w.values()))
        clip = min(1, 0.5 / torch.cat([grad.flatten() for grad in grads]).norm())
        for param, grad in zip(net.w.values(), grads):
            memory[param] = 0.99 * memory[param] + 0.01 * (clip * grad)**2         # of other tasks' heads: untouched
            param.data -= 7e-4 * clip * grad / (memory[param].sqrt() + 1e-5)
    for agent, net in zip(agents, plain):
        for name, param in agent.named_parameters():
            torch.testing.assert_close(param, net.w[name], atol=5e-6, rtol=1e-5)


def spy(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: (calls.append((args, more)), original(*args, **more))[1])
    return calls


@pytest.mark.parametrize("method, distinct", [("vanilla", 3 * 7 + 6), ("scratch", 3 * 13)])
def test_turns_sharing_and_rmsprop(method, distinct, tmp_path, monkeypatch):
    seen, made = spy(monkeypatch, a2c, "collect"), spy(monkeypatch, torch.optim, "RMSprop")
    a2c.train(a2c.Args(tasks=NAMES, method=method, total_timesteps=60, runs_dir=tmp_path, **SMALL))
    turns = [[id(x) for x in args[1:]] for args, _ in seen]            # environment and agent
    assert turns == turns[:3] * 2 and len(set(map(tuple, turns))) == 3
    assert [made[0][0][1], made[0][1]] == [7e-4, dict(alpha=0.99, eps=1e-5)] and len(made[0][0][0]) == distinct


@pytest.mark.parametrize("layers, moves", [(None, ("pi2", "pi3", "log", "v3")), ("paper", ("pi3", "log", "v3"))])
def test_fine_tuning(layers, moves, tmp_path):
    small = SMALL | dict(total_timesteps=300, runs_dir=tmp_path)
    source = a2c.train(a2c.Args(tasks=NAMES, method="vanilla", **small))
    folder = a2c.train(args := a2c.Args(tasks=("SmallThigh",), method="finetune", finetune_from=source,
                                        source_task="BigLeg", finetune_layers=layers, **small))
    old, saved = a2c.load_checkpoint(source)["agents"]["BigLeg"], a2c.load_checkpoint(folder)
    for name, value in saved["agents"]["SmallThigh"].items():
        assert torch.equal(value, old[name]) != name.startswith(("filter", *moves)), name
    agent = a2c.Agent(8, "parameter")
    for weights, row in ((old, 0), (saved["agents"]["SmallThigh"], -1)):                   # before and after
        agent.load_state_dict(weights)
        result = a2c.evaluate(args, {"SmallThigh": agent.policy, "BigLeg": agent.policy})
        assert saved["rows"][row]["mean_return"] == pytest.approx(result["return"].mean(), rel=1e-4)


def test_evaluation_is_by_the_mean_action_from_the_same_starts(monkeypatch):
    args, rng, reset = a2c.Args(seed=3, eval_episodes=4), np.random.default_rng([3, 1]), a2c.Cheetahs.reset
    monkeypatch.setattr(a2c.Cheetahs, "reset", lambda env: (reset(env), env.state.__setitem__((0, 3), np.pi)))
    policies = {name: a2c.Agent(8, "parameter").policy for name in NAMES}
    monkeypatch.setattr(a2c, "GOOD_RETURN", np.median(a2c.evaluate(args, policies)["return"]))
    result = a2c.evaluate(args, policies)
    for i, (name, policy) in enumerate(policies.items()):
        env = a2c.Cheetahs(name, 4, rng)
        for _ in range(7):
            env.step(policy(env.observe()).mean.detach())
        assert np.allclose(result["return"][i], env.returns) and result["success"].sum() == 6
        assert np.allclose(result["upside_down"][i], [1, 0, 0, 0])     # the first one starts on its back


def test_equation_4_by_hand():
    teacher = Normal(torch.tensor([[0.5, -0.2]] * 3), torch.tensor([0.5, 1.0]))            # three states
    student = Normal(torch.zeros(3, 2), torch.tensor([1.0, 0.5]))
    for loss, expected in (("kl_teacher_student", 1.33), ("kl_student_teacher", 1.645), ("mse", (0.29 + 0.5) / 2)):
        assert di.distillation_loss(teacher, student, loss).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["kl_teacher_student", "kl_student_teacher", "mse"])
def test_one_head_and_the_trunk_descend_and_the_teacher_stays(loss):
    obs, other, teacher = torch.randn(20, 17) * 3 + 1, di.Policy(8, "parameter"), di.Policy(8, "network")
    student, twin = di.Policy(8, "parameter", other), di.Policy(8, "parameter")
    teacher.filter.update(torch.randn(500, 17) * 3 + 1)
    student.log_std.data.normal_(std=0.5)
    twin.load_state_dict(student.state_dict())
    twin.filter.update(obs)                                            # before the loss
    expected = di.distillation_loss(teacher(obs), twin(obs), loss)
    expected.backward()
    stay = [(value, value.clone()) for value in [*teacher.state_dict().values(), *other.filter.state_dict().values(),
                                                 *other.pi3.state_dict().values(), other.log_std]]
    optimizer = torch.optim.SGD(torch.nn.ModuleList([other, student]).parameters(), lr=1.0)
    logged = di.distill_update(di.Args(loss=loss), student, teacher, optimizer, obs)
    assert logged[loss] == pytest.approx(expected.item(), rel=1e-5)
    for param, theirs in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(param, theirs - theirs.grad, atol=1e-6, rtol=1e-4)      # not clipped
    assert torch.equal(student.filter.sums, twin.filter.sums) and all(torch.equal(*pair) for pair in stay)


def test_states_follow_each_other_under_noise(monkeypatch):
    policy = di.Policy(8, "parameter")
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.ones(*shape))
    env, twin = (di.Cheetahs("SmallFoot", 3, np.random.default_rng(0)) for _ in range(2))
    for rollout in range(3):                                           # 15 steps, with two ends of episodes
        states, earned = di.visit_states(di.Args(), env, policy)
        for obs in states.split(3):
            torch.testing.assert_close(obs, twin.observe(), atol=1e-3, rtol=1e-3)
            twin.step((policy(obs).mean + 1).detach())                 # the noise is 1, the deviation, too
            if twin.steps == 7:
                assert np.allclose(twin.returns, earned, atol=1e-3)
                twin.reset()
        assert (earned is None) == (rollout == 0)


@pytest.mark.parametrize("method, p, taught", [("distill", None, [0]), ("single", None, [20]),
                                               ("distill", 0.5, range(2, 19))])
def test_who_acts_and_teachers_by_name_from_two_runs(method, p, taught, tmp_path, monkeypatch):
    small = SMALL | dict(total_timesteps=400, runs_dir=tmp_path)
    runs = [a2c.train(a2c.Args(method="scratch", tasks=NAMES[:i], seed=i, **small)) for i in (3, 1)]
    visits, updates = spy(monkeypatch, di, "visit_states"), spy(monkeypatch, di, "distill_update")
    optimizers = spy(monkeypatch, torch.optim, "RMSprop")
    di.train(di.Args(method=method, tasks=("BigTorso", "SmallFoot"), teachers=runs, p_student=p, **small))
    assert [optimizers[0][0][1], optimizers[0][1]] == [7e-4, dict(alpha=0.99, eps=1e-5)]
    assert (updates[0][0][1].pi2 is updates[1][0][1].pi2) == (method == "distill")
    for task, (name, run) in enumerate((("BigTorso", runs[0]), ("SmallFoot", runs[1]))):
        turns = [(*visit[0][1:], *update[0][1:3]) for visit, update in zip(visits[task::2], updates[task::2])]
        assert len(turns) == 20 and len({(env, student, teacher) for env, _, student, teacher in turns}) == 1
        assert {actor for _, actor, _, _ in turns} <= set(turns[0][2:])
        assert sum(actor is teacher for _, actor, _, teacher in turns) in taught
        weights = a2c.load_checkpoint(run)["agents"][name]
        assert all(torch.equal(value, weights[key]) for key, value in turns[0][3].state_dict().items())


def test_the_papers_lengths_and_how_networks_begin():
    settings = a2c.Args(), a2c.Args(method="scratch"), di.Args(), di.Args(method="single")
    assert [args.total_timesteps // len(args.tasks) for args in settings] == [1e6, 3e6, 1e6, 5e6]
    for name, param in a2c.Agent(64, "parameter").named_parameters():
        lengths = torch.tensor(0.01 if name == "pi3.weight" else float("weight" in name))
        assert torch.allclose(param.norm(dim=-1), lengths), name
