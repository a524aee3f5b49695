"""EM task clustering in tables: environments, E-step and M-step against numbers worked by hand and a plain loop."""
import random

import numpy as np
import pytest

import tabular_em as em

RIGHT, LEFT = [[0.0, 1.0]] * 51, [[1.0, 0.0]] * 51                     # tables of the chain


def trial(env="grid", number=0, **settings):
    """A fresh trial on a family of tasks."""
    return em.Trial(em.Args(env=env, **settings), em.grid_tasks() if env == "grid" else em.chain_tasks(), number)


def test_moves_and_rewards():
    grid, chain, printed = em.grid_tasks(), em.chain_tasks(), em.chain_tasks(as_printed=True).rewards
    coded = chain.rewards
    assert grid.goal == [0, 1, 7, 42, 43, 35, 48, 47, 41, 6, 5, 13] and grid.start == 24   # x + 7 y
    assert grid.moves[24] == [25, 31, 23, 17] and grid.moves[0] == [1, 7, 0, 0]            # +x, +y, -x, -y, or stay
    assert grid.rewards[6][0] == pytest.approx(1 / np.sqrt(72)) and grid.rewards[0][0] == 10
    assert grid.rewards[1][9] == pytest.approx(1 / np.sqrt(2)) and {len(rewards) for rewards in grid.rewards} == {49}
    assert chain.names[:4] == ["right-every16", "left-every16", "right-goal", "left-goal"] and chain.start == 25
    assert chain.moves[0] == [0, 1] and chain.moves[25] == [24, 26] and chain.moves[50] == [49, 50]
    assert coded[0][0] == pytest.approx(-0.02 - 0.1) and coded[0][1] == -0.1               # 1 / 50 on the wrong side
    assert coded[0][50] == 19.9 and printed[0][50] == 20 and chain.goal == [50, 0] * 5
    assert coded[0][48] == pytest.approx(0.4) and printed[0][48] == 0.5
    assert coded[1][48] == pytest.approx(-1 / 48 - 0.1) and printed[1][48] == pytest.approx(1 / 48)
    assert set(coded[2][:50]) == {-0.1}                                # only the goal pays


def test_e_step_and_evaluation_of_known_policies():
    pair = trial("chain")
    pair.q = [RIGHT, LEFT]
    pair.e_step(global_step=5)
    step, assignment, returns = pair.history[-1]
    assert step == 5 and returns[2] == pytest.approx([17.5, -5.0]) and returns[3] == pytest.approx([-5.0, 17.5])
    assert assignment == pair.assignment == [0, 1] * 5 and pair.tasks_of(1) == [1, 3, 5, 7, 9] and pair.separates()
    pair.assignment = [0, 1] * 4 + [0, 2]
    assert not pair.separates()                                        # one side has two policies
    pair.q = [LEFT, LEFT]
    pair.e_step(6)                                                     # a tie in every task goes to the lowest index
    assert pair.assignment == [0] * 10 and pair.tasks_of(1) == list(range(10)) and not pair.separates()
    other = trial("chain")
    pair.assignment, other.q, other.assignment = [0] * 10, [LEFT, RIGHT], [1] * 10
    result = em.evaluate(pair.args, [pair, other])                     # (T, trials): what the assigned policies get
    assert result["return"][2:4] == pytest.approx(np.array([[-5.0, 17.5], [17.5, -5.0]]))
    assert result["success"].tolist() == [[0, 1], [1, 0]] * 5


def test_columns_over_trials():
    three = [trial(num_policies=3, number=number) for number in range(3)]
    for number, one in enumerate(three):
        one.history, one.assignment = [(0, [], [[number, 1.0]] * 12)], [0] * 12            # best: 1, 1, 2
    columns = em.compare(three, np.array([1.0, 2.0, 6.0]))
    assert columns == {"ci95": pytest.approx(1.96 * np.sqrt(7 / 3)), "max_return": pytest.approx(4 / 3), "empty": 2,
                       "max_ci95": pytest.approx(1.96 / 3), "separated": 0,
                       "trial0/return": 1, "trial1/return": 2, "trial2/return": 6}


def test_ties_and_random_clusters_are_uniform():
    picks = [em.greedy([2.0, 0.0, 2.0, 2.0], rng) for rng in [random.Random(0)] for _ in range(3_000)]
    assert np.bincount(picks) / 3_000 == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.03)
    for n, sizes in ((4, {3}), (5, {0, 1, 2, 3})):                     # n = 5: 3 of 15 slots stay empty, anywhere
        drawn = [trial(method="random-clusters", num_policies=n, seed=seed).assignment for seed in range(50)]
        counts = np.array([np.bincount(assignment, minlength=n) for assignment in drawn])
        assert set(counts.flat) <= sizes and len(set(map(tuple, drawn))) == 50
        assert counts.mean(0) == pytest.approx(12 / n, abs=0.4)


@pytest.mark.parametrize("env, mask", [("grid", False), ("grid", True), ("chain", False)])
def test_m_step_is_q_learning_on_own_tasks(env, mask):
    one = trial(env, epsilon=0.8, mask_terminals=mask, num_policies=2, m_step_size=3_000)
    one.assignment, one.steps = [0, 1] * (len(one.assignment) // 2), [700_000, 0]
    rng, table, step = random.Random(), np.zeros((len(one.q[0]), len(one.q[0][0]))), 0
    rng.setstate(one.rng.getstate())
    one.m_step(policy=0)
    while step < 3_000:                                                # the last episode is finished
        task, state = rng.choice(list(range(0, len(one.assignment), 2))), one.tasks.start
        for _ in range(50):
            explores = rng.random() < 0.8 * np.exp((700_000 + step) * np.log(1 - 1e-6))    # 0.4: the decay shows
            ties = np.flatnonzero(table[state] == table[state].max()).tolist()
            action = rng.randrange(table.shape[1]) if explores else ties[0] if len(ties) == 1 else rng.choice(ties)
            after, goal = one.tasks.moves[state][action], one.tasks.goal[task]
            bootstrap = 0 if mask and after == goal else table[after].max()
            target = one.tasks.rewards[task][after] + 0.9 * bootstrap
            table[state, action] = 0.8 * table[state, action] + 0.2 * target
            state, step = after, step + 1
            if after == goal:
                break
    assert np.allclose(one.q[0], table) and one.steps == [700_000 + step, 0] and not np.any(one.q[1])


@pytest.mark.parametrize("env, method, rounds, low, high", [
    ("grid", "em", 60, 11.8, 13.3), ("chain", "em", 20, 18.1, 18.13), ("grid", "sp", 20, 1.5, 4),
    ("grid", "ppt", 3, 2, 9)])
def test_who_reaches_the_optimum(env, method, rounds, low, high):
    best = []
    for one in [trial(env, method=method, number=number) for number in range(4)]:
        for step in range(rounds):
            for policy in range(len(one.q)):
                one.m_step(policy)
            one.e_step(step)
        best += [np.max(returns, 1).mean() for _, _, returns in one.history[-3:]]
        moved = len({tuple(assignment) for _, assignment, _ in one.history}) > 1
        assert moved == one.separates() == (method == "em") and len(set(one.assignment)) == len(one.q)
    assert low < np.mean(best) < high


def test_a_run_is_its_trials_in_turns(tmp_path):
    folder, one = em.train(em.Args(total_timesteps=3_000, trials=2, runs_dir=tmp_path)), trial(number=1)
    assert one.assignment == np.argmax(one.history[0][2], 1).tolist()  # of untrained policies
    for step in (2_000, 4_000):                                        # whole M-steps
        for policy in range(4):
            one.m_step(policy)
        one.e_step(step)
    zeroth, first = em.load_checkpoint(folder)["trials"]
    assert first["q"].tolist() == one.q != zeroth["q"].tolist() and first["history"] == one.history
