"""EM task clustering in tables: E-step, M-step and environments against numbers worked out by hand."""
import numpy as np
import pytest
import torch

import tabular_em as em


# --- the environments ------------------------------------------------------------------------------------------------
def test_grid_moves_rewards_and_goals():
    tasks = em.grid_tasks()
    assert tasks.start == 24 and tasks.next_state.shape == (49, 4) and len(tasks.goal) == 12
    assert tasks.next_state[24].tolist() == [25, 31, 23, 17]                   # +x, +y, -x, -y
    assert tasks.next_state[0].tolist() == [1, 7, 0, 0]                        # clamped in the corner
    assert [tuple(divmod(int(goal), 7)[::-1]) for goal in tasks.goal] == [
        (0, 0), (1, 0), (0, 1), (0, 6), (1, 6), (0, 5), (6, 6), (5, 6), (6, 5), (6, 0), (5, 0), (6, 1)]
    assert tasks.reward[0, 0] == 10 and tasks.reward[0, 1] == 1
    assert tasks.reward[0, 8] == pytest.approx(1 / np.sqrt(2)) and tasks.reward[6, 0] == pytest.approx(1 / np.sqrt(72))


def test_chain_rewards_of_code_and_paper():
    code, paper = em.chain_tasks("code"), em.chain_tasks("paper")
    right16, left16, right_goal = 0, 1, 2
    assert code.reward[right16, 50] == pytest.approx(19.9) and paper.reward[right16, 50] == 20
    assert paper.reward[right16, 48] == pytest.approx(1 / 2) and code.reward[right16, 48] == pytest.approx(1 / 2 - 0.1)
    assert code.reward[right16, 16] == pytest.approx(-1 / 34 - 0.1)            # wrong half: the sign turns
    assert code.reward[left16, 16] == pytest.approx(1 / 16 - 0.1) and paper.reward[right16, 16] == pytest.approx(1 / 34)
    assert code.reward[right16, 17] == pytest.approx(-0.1) and paper.reward[right16, 17] == 0
    assert (code.reward[right_goal, :50] == -0.1).all()
    assert code.names[:4] == ["right-every16", "left-every16", "right-goal", "left-goal"]
    assert code.next_state[0].tolist() == [0, 1] and code.next_state[50].tolist() == [49, 50]


@pytest.mark.parametrize("tasks, shortest, dawdling", [(em.grid_tasks(), 12.600, 14.267),
                                                       (em.chain_tasks("code"), 18.116, 19.976),
                                                       (em.chain_tasks("paper"), 20.616, 24.141)])
def test_exact_optima(tasks, shortest, dawdling):
    assert em.optimal_returns(tasks).mean() == pytest.approx(shortest, abs=5e-4)
    assert em.optimal_returns(tasks, shortest=False).mean() == pytest.approx(dawdling, abs=5e-4)


def test_exact_optima_of_single_tasks():
    grid, chain = em.optimal_returns(em.grid_tasks()), em.optimal_returns(em.chain_tasks("code"))
    assert grid[:2] == pytest.approx([12.785, 12.508], abs=5e-4)               # corner and offset goal
    assert em.optimal_returns(em.grid_tasks(), shortest=False)[:2] == pytest.approx([13.785, 14.508], abs=5e-4)
    assert chain == pytest.approx([18.0556, 17.5625, 17.5, 17.5, 19.0516, 19.0516, 18.4391, 18.1125, 18.1556, 17.7292],
                                  abs=5e-5)


# --- E-step ----------------------------------------------------------------------------------------------------------
def test_e_step_by_hand_with_a_tie_and_an_empty_policy():
    returns = np.array([[1.0, 5.0, 2.0], [3.0, 3.0, -1.0], [0.0, 0.5, 0.4]])   # three tasks, three policies
    assignment = em.assign_tasks(returns)
    assert assignment.tolist() == [1, 0, 1]                                    # the tie goes to policy 0
    assert em.clusters(assignment, 3).tolist() == [[False, True, False], [True, False, True], [True, True, True]]


def test_e_step_returns_of_known_policies():
    tasks = em.chain_tasks("code")
    q = np.zeros((1, 2, 51, 2))
    q[0, 0, :, 1], q[0, 1, :, 0] = 1.0, 1.0                                    # policy 0 runs right, policy 1 left
    returns, steps = em.e_step(em.Args(env="chain"), tasks, q, [np.random.default_rng(0)])
    assert returns[0, 2] == pytest.approx([17.5, -5.0]) and returns[0, 3] == pytest.approx([-5.0, 17.5])
    assert em.assign_tasks(returns)[0].tolist() == [0, 1] * 5
    assert steps == 3 * 10 * (25 + 50)                                         # 25 to the own goal, else cut off at 50


def test_ties_between_actions_are_broken_uniformly():
    allowed = np.array([True, False, True, True])
    picks = em.pick(np.broadcast_to(allowed, (3_000, 4)), np.random.default_rng(0).random(3_000))
    assert picks.tolist().count(1) == 0 and (np.bincount(picks, minlength=4)[[0, 2, 3]] / 3_000
                                             == pytest.approx(1 / 3, abs=0.03))
    assert em.pick(allowed, np.array(0.999999)) == 3 and em.pick(allowed, np.array(0.0)) == 0


def test_random_clusters_have_equal_rows():
    for num_tasks, n, sizes in ((12, 4, [3, 3, 3, 3]), (12, 2, [6, 6]), (7, 4, [2, 2, 2, 1]), (10, 2, [5, 5])):
        drawn = [em.random_clusters(num_tasks, n, np.random.default_rng(seed)) for seed in range(20)]
        assert all(sorted(np.bincount(a).tolist(), reverse=True) == sizes for a in drawn)
        assert len({tuple(a) for a in drawn}) > 10
    sizes = np.array([np.bincount(em.random_clusters(12, 5, np.random.default_rng(seed)), minlength=5)
                      for seed in range(300)])
    assert sizes.max() == 3 and (sizes.mean(0) == pytest.approx(12 / 5, abs=0.15))      # 3 void slots of 15, anywhere


def test_separates():
    group = np.array([0, 0, 1, 1])
    assert em.separates(np.array([[2, 2, 0, 0], [2, 2, 2, 2], [0, 1, 2, 2]]), group).tolist() == [True, False, False]


# --- M-step ----------------------------------------------------------------------------------------------------------
def test_one_q_update_with_and_without_the_terminal_mask():
    q, reward, next_values = np.array([1.0, 1.0]), np.array([10.0, 0.5]), np.array([4.0, 4.0])
    terminal = np.array([True, False])
    assert em.q_update(q, reward, next_values, terminal, 0.2, 0.9, True) == pytest.approx([2.8, 1.62])
    assert em.q_update(q, reward, next_values, terminal, 0.2, 0.9, False) == pytest.approx([3.52, 1.62])


@pytest.mark.parametrize("env", ["grid", "chain"])
@pytest.mark.parametrize("mask", [False, True])
def test_m_step_against_a_plain_loop(env, mask):
    """The same numbers through a loop over steps of one policy: what the arrays must equal."""
    args = em.Args(env=env, epsilon=0.8, mask_terminals=mask)
    tasks, before, size = em.make_tasks(args), 700_000, 1_500
    num_states, num_actions = tasks.next_state.shape
    q, steps = np.zeros((1, 1, num_states, num_actions)), np.full((1, 1), before)
    em.m_step(args, tasks, q, np.ones((1, 1, len(tasks.goal)), bool), steps, size, [np.random.default_rng(3)])
    numbers = np.random.default_rng(3).random((size + 50, 4, 1))[:, :, 0]
    table, taken, length, state, task, ended = np.zeros((num_states, num_actions)), 0, 0, None, None, 0
    for explore, random_action, tie, new_task in numbers:
        if length == 0:
            if taken >= size:
                break
            state, task = tasks.start, int(new_task * len(tasks.goal))
        best = np.flatnonzero(table[state] == table[state].max())
        explores = explore < 0.8 * (1 - 1e-6) ** (before + taken)              # 0.4: the decay shows
        action = int(random_action * num_actions) if explores else best[int(tie * len(best))]
        after = tasks.next_state[state, action]
        at_goal = after == tasks.goal[task]
        target = tasks.reward[task, after] + 0.9 * (0 if mask and at_goal else table[after].max())
        table[state, action] += 0.2 * (target - table[state, action])
        taken, length, state = taken + 1, length + 1, after
        if at_goal or length == 50:
            length, ended = 0, ended + 1
    assert steps.item() == before + taken and taken >= size and ended > 20 and np.allclose(q[0, 0], table)


def test_each_policy_learns_from_its_own_tasks_only():
    args, tasks = em.Args(num_policies=2), em.grid_tasks()
    member = np.zeros((1, 2, 12), bool)
    member[0, 0, 0] = member[0, 1, 6] = True                                   # opposite corners
    q, steps = np.zeros((1, 2, 49, 4)), np.zeros((1, 2), int)
    em.m_step(args, tasks, q, member, steps, 3_000, [np.random.default_rng(0)])
    rngs = [np.random.default_rng(1)]
    returns, _ = em.e_step(args, tasks, q, rngs)
    assert returns[0, 0].argmax() == 0 and returns[0, 6].argmax() == 1
    assert (returns[0, [0, 6], [0, 1]] > 2 * returns[0, [0, 6], [1, 0]]).all()             # own above the other's
    assert (3_000 <= steps).all() and (steps < 3_050).all()                    # overshoot: at most one episode


# --- whole runs ------------------------------------------------------------------------------------------------------
def rows(folder):
    return np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="", ndmin=1)


@pytest.mark.parametrize("settings, optimum", [(dict(total_timesteps=60_000, trials=2), 12.6),
                                               (dict(env="chain", total_timesteps=30_000, trials=2), 18.116)])
def test_clusters_are_recovered(settings, optimum, tmp_path):
    table = rows(em.train(em.Args(**settings, runs_dir=tmp_path)))
    assert table["separated"][-1] == 1 and table["separated"][0] < 1
    assert table["max_return"][-3:].mean() == pytest.approx(optimum, abs=0.7)
    assert table["mean_return"][-3:].mean() == pytest.approx(optimum, abs=0.7)


@pytest.mark.parametrize("method", ["ppt", "random-clusters"])
def test_only_em_changes_the_assignment_and_a_finished_run_resumes(method, tmp_path):
    folder = em.train(em.Args(method=method, total_timesteps=8_000, trials=2, runs_dir=tmp_path))  # overshoots: 12,000
    history = em.load_checkpoint(folder)["history"]
    assert len(history) > 2 and all(torch.equal(assignment, history[0][1]) for _, assignment, _ in history)
    em.train(em.read_args(em.Args, ["--resume", str(folder)]))
    assert len(em.load_checkpoint(folder)["history"]) == len(history)


def test_em_assigns_before_training_and_after_whole_m_steps_only(tmp_path):
    folder = em.train(em.Args(total_timesteps=12_000, trials=2, m_step_size=501, evals_per_m_step=3, runs_dir=tmp_path))
    steps, assignments, _ = zip(*em.load_checkpoint(folder)["history"])
    assert steps[:5] == (0, 668, 1_336, 2_004, 2_672) and len(assignments[0].unique()) > 1
    changed = [not torch.equal(one, other) for one, other in zip(assignments, assignments[1:])]
    assert not any(change for step, change in zip(steps[1:], changed) if step % 2_004) and any(changed)


def test_the_assigned_policy_is_the_one_evaluated():
    tasks = em.chain_tasks("code")
    q = np.zeros((1, 2, 51, 2))
    q[0, 0, :, 1], q[0, 1, :, 0] = 1.0, 1.0                                    # policy 0 runs right, policy 1 left
    for assignment, returns in (([0, 1] * 5, [17.5, 17.5]), ([1, 0] * 5, [-5.0, -5.0])):
        own, success, states = em.evaluate_assigned(em.Args(env="chain"), tasks, q, np.array([assignment]),
                                                    [np.random.default_rng(0)])
        assert own[0, 2:4, 0] == pytest.approx(returns) and success.all() == (returns[0] > 0)
        assert states.shape == (51, 1, 10, 3) and (states[-1] == -1).all() == (returns[0] > 0)


def test_one_policy_for_all_tasks_fails(tmp_path):
    table = rows(em.train(em.Args(method="sp", total_timesteps=20_000, trials=2, runs_dir=tmp_path)))
    assert table["mean_return"][-1] < 5


def test_trials_in_one_process_equal_trials_run_one_by_one(tmp_path):
    settings = dict(total_timesteps=8_000, runs_dir=tmp_path / "all")
    together = em.load_checkpoint(em.train(em.Args(**settings, trials=3)))
    alone = em.load_checkpoint(em.train(em.Args(**settings | dict(runs_dir=tmp_path / "one"), trials=1)))
    assert torch.equal(together["q"][:1], alone["q"]) and torch.equal(together["assignment"][:1], alone["assignment"])
    assert not torch.equal(together["q"][0], together["q"][1])


def test_rows_more_often_change_no_training_number(tmp_path):
    runs = [em.load_checkpoint(em.train(em.Args(total_timesteps=8_000, trials=2, eval_every=period,
                                                runs_dir=tmp_path / str(period)))) for period in (2_000, 8_000)]
    assert torch.equal(runs[0]["q"], runs[1]["q"])
    assert [len(list(tmp_path.glob(f"{period}/*/metrics.csv"))[0].read_text().splitlines())
            for period in (2_000, 8_000)] == [5, 2]


def test_runs_are_rounded_up_to_whole_m_steps(tmp_path):
    args = em.Args(total_timesteps=1_000, m_step_size=501, evals_per_m_step=3, trials=1, runs_dir=tmp_path)
    assert args.total_timesteps == 2_004                                       # four policies
    assert em.load_checkpoint(em.train(args))["global_step"] == 2_004


def test_both_counters(tmp_path):
    table = rows(em.train(em.Args(total_timesteps=6_000, trials=2, runs_dir=tmp_path)))
    assert table["global_step"].tolist() == [2_000, 4_000, 6_000]
    overshoot, evaluation = table["train_steps"] / table["global_step"], np.diff(table["eval_steps"])
    assert (overshoot >= 1).all() and (overshoot < 1.1).all()                  # the M-step's last episodes are finished
    assert (evaluation <= 12 * 4 * 3 * 7).all() and (evaluation > 12 * 4 * 3 * 5).all()
