"""Distillation: divergences by hand, frozen teachers, heads apart, rollouts of student and teacher, whole runs."""
import json

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import distill_a2c as di
import multitask_a2c

SMALL = dict(tasks=("SmallFoot", "BigLeg"), num_envs=2, total_timesteps=400, teacher_timesteps=200, eval_every=200,
             eval_episodes=1, checkpoint_every=10**9, hidden_size=8)
CPU = torch.device("cpu")


def rows_of(folder):
    return [line.split(",")[:1] + line.split(",")[2:] for line in (folder / "metrics.csv").read_text().splitlines()]


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    monkeypatch.setattr(di, "HORIZON", 50)
    monkeypatch.setattr(multitask_a2c, "HORIZON", 50)


# --- the loss --------------------------------------------------------------------------------------------------------
def gaussian(mean, std):
    return torch.tensor([[mean]]), torch.tensor([[std]]).log()


@pytest.mark.parametrize("kl, expected", [("teacher_student", 1.33), ("student_teacher", 1.645)])
def test_both_divergences_by_hand(kl, expected):
    teacher, student = gaussian([0.5, -0.2], [0.5, 1.0]), gaussian([0.0, 0.0], [1.0, 0.5])
    assert di.distillation_loss(teacher, student, "kl", kl).tolist() == [pytest.approx(expected, abs=1e-6)]


def test_divergence_against_torch_and_means_over_states():
    draws = torch.randn(4, 3, 7, 6)
    teacher, student = (draws[0], draws[1] * 0.3), (draws[2], draws[3] * 0.3)
    one, other = (Normal(mean, log_std.exp()) for mean, log_std in (teacher, student))
    for kl, pair in (("teacher_student", (one, other)), ("student_teacher", (other, one))):
        expected = kl_divergence(*pair)
        torch.testing.assert_close(di.distillation_loss(teacher, student, "kl", kl), expected.sum(-1).mean(-1))
    assert di.distillation_loss(teacher, teacher, "kl", "teacher_student").abs().max() < 1e-6


def test_squared_differences_by_hand_and_gradients_reach_the_student_only():
    teacher, student = gaussian([1.0, 3.0], [1.0, 2.0]), gaussian([0.0, 0.0], [2.0, 2.0])
    assert di.distillation_loss(teacher, student, "mse", "").tolist() == [pytest.approx((1 + 9) / 2 + 1 / 2)]
    for loss in ("kl", "mse"):
        leaves = [x.clone().requires_grad_() for x in (*teacher, *student)]
        di.distillation_loss(tuple(leaves[:2]), tuple(leaves[2:]), loss, "student_teacher").sum().backward()
        assert leaves[0].grad is None and leaves[1].grad is None and all(x.grad.abs().max() > 0 for x in leaves[2:])


# --- the update ------------------------------------------------------------------------------------------------------
def actors():
    torch.manual_seed(0)
    student, teachers = di.Student(2, 8), di.ActorCritic(2, 8, "parameter", None)
    teachers.filter.update(torch.randn(2, 500, 17) * 3 + 1, [0, 1])
    return student, teachers, torch.optim.RMSprop(student.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)


def test_an_update_moves_one_head_and_the_trunk_and_no_teacher():
    (student, teachers, optimizer), args = actors(), di.Args(**SMALL)
    for task in (0, 1):
        di.distill_update(args, student, teachers, optimizer, torch.randn(1, 10, 17), [task])
    frozen = {name: value.clone() for name, value in teachers.state_dict().items()}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    memory = {name: optimizer.state[param]["square_avg"].clone() for name, param in student.named_parameters()}
    di.distill_update(args, student, teachers, optimizer, torch.randn(1, 10, 17), [1])
    for name, value in student.state_dict().items():
        other_head = name.startswith("policy") and name.endswith(".0") and ("layers.2" in name or "log_std" in name)
        if name.startswith("filter"):
            assert torch.equal(value[0], before[name][0]) and not torch.equal(value[1], before[name][1])
        else:
            assert torch.equal(value, before[name]) == other_head, name
    for name, param in student.named_parameters():
        assert torch.equal(optimizer.state[param]["square_avg"], memory[name]) == (
            name.endswith(".0") and ("layers.2" in name or "log_std" in name))
    assert all(torch.equal(value, frozen[name]) for name, value in teachers.state_dict().items())


def test_the_students_gradient_is_not_clipped():
    (student, teachers, _), args = actors(), di.Args(**SMALL)
    for log_std in student.policy.log_std:
        log_std.data.fill_(-2.0)                                       # sure of what it does, and wrong
    before = [param.detach().clone() for param in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    di.distill_update(args, student, teachers, optimizer, torch.randn(1, 10, 17), [0])
    moves = [(old - new).norm() for old, new in zip(before, student.parameters())]
    assert torch.stack(moves).norm() > 2                               # teachers and A2C are clipped to 0.5


def test_both_hidden_layers_are_shared():
    student = di.Student(6, 64)
    sizes = {name: value.numel() for name, value in student.policy.named_parameters()}
    assert sum(sizes.values()) == 17 * 64 + 64 + 64 * 64 + 64 + 6 * (64 * 6 + 6 + 6)


def test_the_student_comes_to_do_what_the_teachers_do():
    (student, teachers, _), args = actors(), di.Args(**SMALL)
    optimizer = torch.optim.RMSprop(student.parameters(), lr=3e-3, alpha=0.99, eps=1e-5)
    with torch.no_grad():
        for task in (0, 1):                                                    # sure of what they want
            teachers.policy.net.layers[2]["biases"][task].uniform_(-1, 1)
            teachers.policy.log_std[task].fill_(-1.0)
    updates = [di.distill_update(args, student, teachers, optimizer, torch.randn(1, 80, 17) * 3 + 1, [step % 2])
               for step in range(600)]
    losses = [update["kl"].item() for update in updates]
    assert updates[-1]["sigma"].item() == pytest.approx(np.exp(-1), abs=0.1)
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:4])
    obs = torch.randn(2, 50, 17) * 3 + 1
    assert (student(obs, [0, 1])[0] - teachers(obs, [0, 1])[0]).abs().mean() < 0.1


def test_states_are_those_of_whoever_acts():
    student, teachers, _ = actors()
    with torch.no_grad():
        teachers.policy.net.layers[2]["biases"][1].fill_(0.9)
    seen = []
    for actor in (student, teachers):
        torch.manual_seed(3)
        pool = di.CheetahPool(["SmallFoot", "BigLeg"], 3, 0)
        start = pool.observe([1])
        obs, finished = di.visit_states(pool, actor, [1], 5, CPU)
        assert obs.shape == (1, 15, 17) and np.array_equal(obs[0, :3].numpy(), start[0]) and finished == []
        assert pool.steps.tolist() == [0, 5]
        seen.append(obs)
    assert not torch.allclose(seen[0][:, 3:], seen[1][:, 3:], atol=1e-2)
    di.visit_states(pool, student, [1], 44, CPU)
    obs, finished = di.visit_states(pool, student, [1], 2, CPU)
    assert [task for task, _ in finished] == [1] and finished[0][1].shape == (3,) and pool.steps.tolist() == [0, 1]


def test_whoever_acts_explores(monkeypatch):
    student, teachers, _ = actors()
    monkeypatch.setattr(torch, "randn", torch.ones)
    for actor in (student, teachers):
        actor.policy.log_std[1].data.fill_(-1.0)
        pool, taken = di.CheetahPool(["SmallFoot", "BigLeg"], 3, 0), []
        step = pool.step
        monkeypatch.setattr(pool, "step", lambda tasks, actions, step=step, taken=taken: taken.append(actions)
                            or step(tasks, actions))
        obs, _ = di.visit_states(pool, actor, [1], 1, CPU)
        assert taken[0] == pytest.approx(actor(obs, [1])[0].detach().numpy() + np.exp(-1), abs=1e-5)


# --- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [multitask_a2c, di])
def test_evaluation_plays_each_task_with_its_own_head_of_the_checkpoint(script, tmp_path, monkeypatch):
    settings = {key: value for key, value in SMALL.items() if script is di or key != "teacher_timesteps"}
    folder = script.train(script.Args(**settings, runs_dir=tmp_path))
    state, tables = script.load_checkpoint(folder), []
    for head in (0, 1):
        state["learners"][f"policy.net.layers.2.biases.{head}"][:] = 0.8 * head - 0.4
    torch.save(state, folder / "checkpoint.pt")
    monkeypatch.setattr(script, "print_table", lambda names, evaluation: tables.append(evaluation["returns"]))
    script.train(script.read_args(script.Args, ["--evaluate", str(folder), "--eval-episodes", "3"]))
    nets = di.Student(2, 8) if script is di else multitask_a2c.ActorCritic(2, 8, "parameter", "paper")
    nets.load_state_dict(state["learners"])
    pool = script.CheetahPool(list(SMALL["tasks"]), 3, 10_001)
    for _ in range(50):
        obs = torch.from_numpy(pool.observe([0, 1]))
        with torch.no_grad():
            actions = torch.cat([nets(obs[task:task + 1], [task])[0] for task in (0, 1)])
        pool.step([0, 1], actions.numpy())
    assert tables[0] == pytest.approx(pool.returns, abs=1e-3) and len(tables) == 1


def test_constants_are_those_of_the_sister_script():
    for name in ("PARTS", "FACTORS", "VARIANTS", "PAPER", "GOOD_RETURN", "LOG_EVERY"):
        assert getattr(di, name) == getattr(multitask_a2c, name)
    assert di.GOOD_RETURN == 1_000 and di.TABLE_2.items() <= multitask_a2c.TABLE_2.items()
    source = (di.__file__, multitask_a2c.__file__)
    assert all("HORIZON, GOOD_RETURN, LOG_EVERY = 1_000, 1_000, 20_000" in open(path).read() for path in source)


def test_teachers_and_student_have_the_authors_rmsprop(tmp_path, monkeypatch):
    made, rmsprop = [], torch.optim.RMSprop
    monkeypatch.setattr(torch.optim, "RMSprop", lambda params, **settings: made.append(settings) or rmsprop(params,
                                                                                                       **settings))
    di.train(di.Args(**SMALL, runs_dir=tmp_path))
    assert made == [dict(lr=7e-4, alpha=0.99, eps=1e-5)] * 2


@pytest.mark.parametrize("settings", [dict(), dict(loss="mse"), dict(kl="student_teacher", p_student=0.0),
                                      dict(method="single", tasks=("BigLeg",))])
def test_every_variant_runs_and_resumes_exactly(settings, tmp_path):
    settings = SMALL | settings
    straight = di.train(di.Args(**settings, runs_dir=tmp_path / "straight"))
    loss, name = settings.get("loss", "kl"), settings["tasks"][0]
    header, *rows = rows_of(straight)
    assert f"{name}/{loss}" in header and len(rows) == 2 and (straight / "divergence.png").exists()
    torch.manual_seed(1)
    untrained = di.Student(len(settings["tasks"]), 8).state_dict()
    learnt = di.load_checkpoint(straight)["learners"]
    assert all(not torch.equal(value, untrained[key]) for key, value in learnt.items())
    folder = di.train(di.Args(**settings | dict(total_timesteps=200), runs_dir=tmp_path / "parts"))
    di.train(di.read_args(di.Args, ["--resume", str(folder), "--total-timesteps", "400"]))
    assert rows_of(folder) == rows_of(straight)


def test_teachers_trained_here_can_be_read_by_the_sister_script_and_its_own_be_given(tmp_path):
    folder = di.train(di.Args(**SMALL, runs_dir=tmp_path))
    sister = multitask_a2c.train(multitask_a2c.Args(
        tasks=SMALL["tasks"], method="scratch", num_envs=2, total_timesteps=200, eval_every=200, eval_episodes=1,
        hidden_size=8, runs_dir=tmp_path))
    nets, tasks = multitask_a2c.load_actor_critic(folder / "teachers")         # no third format
    assert tuple(tasks) == SMALL["tasks"]
    again = di.train(di.Args(**SMALL | dict(tasks=("BigLeg", "SmallFoot")), teachers=(sister,), runs_dir=tmp_path))
    given = di.load_checkpoint(again)["teachers"]
    theirs = di.load_checkpoint(sister)["learners"]
    assert torch.equal(given["policy.net.layers.1.weights.0"], theirs["policy.net.layers.1.weights.1"])  # by name
    assert torch.equal(given["filter.total"][1], theirs["filter.total"][0])
    loaded = di.load_teachers(di.Args(**SMALL | dict(tasks=("BigLeg", "SmallFoot")), teachers=(sister,)))
    obs = torch.randn(2, 9, 17)
    source, _ = multitask_a2c.load_actor_critic(sister)
    for ours, other in zip(loaded(obs, [0, 1]), source(obs, [1, 0])):          # filters and all
        torch.testing.assert_close(ours, other)
    assert not (again / "teachers").exists()
    about = json.loads((again / "args.json").read_text())
    assert about["args"]["teachers"] == [str(sister)]
    di.train(di.read_args(di.Args, ["--resume", str(again), "--total-timesteps", "600"]))


@pytest.mark.parametrize("p_student, expected", [(1.0, {"Student"}), (0.0, {"ActorCritic"}),
                                                 (0.5, {"Student", "ActorCritic"})])
def test_who_acts(p_student, expected, tmp_path, monkeypatch):
    actors, turns, visit = set(), [], di.visit_states

    def watched(pool, actor, tasks, *a):
        actors.add(type(actor).__name__), turns.extend(tasks)
        return visit(pool, actor, tasks, *a)
    monkeypatch.setattr(di, "visit_states", watched)
    di.train(di.Args(**SMALL | dict(p_student=p_student, runs_dir=tmp_path)))
    assert actors == expected and turns == [0, 1] * 20                 # heads take turns: 40 rollouts of 2 x 5 steps


def test_evaluating_more_often_changes_no_training_number(tmp_path):
    runs = [di.load_checkpoint(di.train(di.Args(**SMALL | dict(eval_every=every, runs_dir=tmp_path / str(every)))))
            for every in (200, 40)]
    assert all(torch.equal(value, runs[1]["learners"][name]) for name, value in runs[0]["learners"].items())
    rows = [len(next(tmp_path.glob(f"{every}/*/metrics.csv")).read_text().splitlines()) for every in (200, 40)]
    assert rows[1] > rows[0] + 3


def test_a_run_stopped_among_the_teachers_goes_on_with_them(tmp_path, monkeypatch):
    settings = SMALL | dict(teacher_timesteps=800, runs_dir=tmp_path)
    straight = di.train(di.Args(**settings | dict(runs_dir=tmp_path / "straight")))
    update, calls = di.a2c_update, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 20:
            di.signal.raise_signal(di.signal.SIGTERM)
        return update(*arguments)
    monkeypatch.setattr(di, "a2c_update", stopping)
    with pytest.raises(SystemExit) as stop:
        di.train(di.Args(**settings))
    folder, = (path for path in tmp_path.iterdir() if path.name != "straight")
    assert stop.value.code == 143 and di.load_checkpoint(folder)["teacher_step"] == 400
    with pytest.raises(di.Failure, match="not done yet"):
        di.train(di.read_args(di.Args, ["--evaluate", str(folder)]))
    assert not (folder / "teachers").exists()
    di.train(di.read_args(di.Args, ["--resume", str(folder)]))
    assert rows_of(folder) == rows_of(straight) and len(calls) == 40
    ours, theirs = (di.load_checkpoint(run / "teachers")["learners"] for run in (folder, straight))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_teachers_that_do_not_fit_together_are_refused(tmp_path):
    runs = [multitask_a2c.train(multitask_a2c.Args(
        tasks=(task,), method="scratch", num_envs=2, total_timesteps=20, eval_every=20, eval_episodes=1,
        hidden_size=size, runs_dir=tmp_path / task)) for task, size in (("SmallFoot", 8), ("BigLeg", 16))]
    with pytest.raises(di.Failure, match="same --hidden-size"):
        di.load_teachers(di.Args(**SMALL, teachers=tuple(runs)))
    assert di.load_teachers(di.Args(**SMALL | dict(tasks=("BigLeg",)), teachers=tuple(runs))).policy.log_std is not None
    with pytest.raises(di.Failure, match="none of those runs has BigLeg"):
        di.load_teachers(di.Args(**SMALL, teachers=tuple(runs[:1])))


def test_the_papers_settings_are_the_defaults():
    args = di.Args()
    assert (args.total_timesteps, args.teacher_timesteps, args.p_student) == (6_000_000, 18_000_000, 1.0)
    alone = di.Args(method="single", tasks=("BigLeg",))
    assert (alone.total_timesteps, alone.teacher_timesteps, alone.p_student) == (5_000_000, 3_000_000, 0.0)
    assert di.Args(method="single", tasks=("BigLeg",), p_student=0.5).p_student == 0.5
    assert (args.loss, args.kl, args.lr, args.num_envs, args.num_steps) == ("kl", "teacher_student", 7e-4, 16, 5)
