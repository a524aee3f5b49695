"""D-Grad(A): the modular layers against a plain network and by hand, isolation between tasks, whole runs."""
import numpy as np
import pytest
import torch

import dgrad_arch_sac as dg

SMALL = dict(tasks=("reach", "drawer-close", "window-close"), total_timesteps=600, horizon=30, learning_starts=50,
             hidden_sizes=(16, 16), batch_size=8, eval_every=300, eval_episodes=1, checkpoint_every=300, watch_every=4)


def modular(num_tasks=3, sizes=(5, 16, 16, 2), m_init="orthogonal", diagonal=False, task_net_hidden=0, seed=0):
    torch.manual_seed(seed)
    return dg.ModularMLP(num_tasks, list(sizes), m_init, diagonal, task_net_hidden)


# --- the layers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("diagonal", [False, True])
def test_identity_layers_make_the_plain_network(diagonal):
    net, x = modular(m_init="identity", diagonal=diagonal), torch.randn(3, 7, 5)
    assert torch.equal(net(x), net.trunk(x)) or torch.allclose(net(x), net.trunk(x), atol=1e-6)
    assert not torch.allclose(modular(m_init="orthogonal", diagonal=diagonal)(x), net.trunk(x), atol=1e-2)


def test_one_hidden_layer_by_hand():
    net = modular(2, (1, 2, 1), "identity")
    with torch.no_grad():
        net.trunk.weights[0].copy_(torch.tensor([[[1.0, -1.0]]]))
        net.trunk.biases[0].copy_(torch.tensor([[[0.5, 0.5]]]))
        net.trunk.weights[1].copy_(torch.tensor([[[1.0], [10.0]]]))
        net.tables[0][1] = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 4.0]])  # task 1: (a, b) -> (2 b + 3, a + 4)
    # x = 1: relu(1.5, -.5) = (1.5, 0). Task 0: 1.5 * 1 + 0 * 10. Task 1: (3, 5.5) -> 3 + 55
    assert net(torch.ones(2, 1, 1)).flatten().tolist() == [1.5, 58.0]
    film = modular(2, (1, 2, 1), "identity", diagonal=True)
    with torch.no_grad():
        film.trunk.weights[0].fill_(1.0), film.trunk.weights[1].fill_(1.0)
        film.tables[0][1] = torch.tensor([[2.0, -3.0], [0.5, 0.0]])            # task 1: scales, then shifts
    assert film(torch.ones(2, 1, 1)).flatten().tolist() == [2.0, 2 * 1 + 0.5 - 3]


def test_orthogonal_layers_turn_and_gaussian_ones_keep_the_length_on_average():
    drawn = dg.initial_matrices(4, 64, "orthogonal", False)
    assert torch.allclose(drawn @ drawn.transpose(1, 2), torch.eye(64).expand(4, -1, -1), atol=1e-5)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1                             # each task has its own
    assert dg.initial_matrices(4, 64, "gaussian", False).var().item() == pytest.approx(1 / 64, rel=0.05)
    assert set(dg.initial_matrices(4, 64, "orthogonal", True).unique().tolist()) == {-1.0, 1.0}
    assert dg.initial_matrices(2, 3, "identity", True).shape == (2, 1, 3)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_task_network_starts_at_the_same_scale_as_the_table(diagonal):
    torch.manual_seed(0)
    layers = dg.ModularMLP(10, [5, 64, 64, 2], "gaussian", diagonal, 32).task_layers()
    for matrix, beta in layers:
        assert matrix.shape == ((10, 1, 64) if diagonal else (10, 64, 64)) and beta.shape == (10, 1, 64)
        assert matrix.var().item() == pytest.approx(1.0 if diagonal else 1 / 64, rel=0.35) and beta.abs().max() == 0


@pytest.mark.parametrize("task_net_hidden", [0, 4])
@pytest.mark.parametrize("split", [False, True])
def test_frozen_matrices_stay_in_policy_and_critics(task_net_hidden, split):
    """The page's third exercise."""
    args = dg.Args(**SMALL | dict(task_net_hidden=task_net_hidden, m_init="gaussian"))
    learners = dg.make_modular_learners(args, 3, 5, 2)
    optimizers = learners.make_optimizers(1e-2, 1e-2)
    batch = [torch.randn(3, 8, 5), torch.rand(3, 8, 2), torch.randn(3, 8), torch.randn(3, 8, 5), torch.zeros(3, 8)]
    params = {name: param for name, param in learners.named_parameters() if "target" not in name}
    before = {name: param.clone() for name, param in params.items()}
    for net in (learners.actor.net, learners.qf1.net, learners.qf2.net):
        net.tables.requires_grad_(False)
    for _ in range(3):
        dg.joint_update(learners, optimizers, batch, 0.99, 0.005, 1.0, split)
    stayed = {name for name, param in params.items() if torch.equal(param, before[name])}
    assert stayed == {name for name in params if ".tables." in name} and len(stayed) == 6


def test_a_tasks_batch_leaves_the_other_tasks_layers_without_gradient():
    for net in (modular(), modular(diagonal=True, m_init="identity")):
        net(torch.randn(3, 7, 5))[1].square().sum().backward()
        for table in net.tables:
            assert table.grad[[0, 2]].abs().max() == 0 and table.grad[1].abs().max() > 0
        assert all(weight.grad.abs().max() > 0 for weight in net.trunk.weights)
    net = modular(task_net_hidden=8)                                           # its last layer is shared
    net(torch.randn(3, 7, 5))[1].square().sum().backward()
    assert net.embedding.grad[[0, 2]].abs().max() == 0 and net.tables[0].grad.abs().max() > 0


def test_random_layers_turn_conflict_into_indifference():
    """The paper's reason for random matrices: gradients of shared weights behind them hardly overlap."""
    cosines = {}
    for m_init in ("identity", "orthogonal"):
        torch.manual_seed(0)
        net = dg.ModularMLP(6, [20, 64, 64, 64, 1], m_init, False)
        call, copies = dg.per_task(net, 6)
        x = torch.randn(1, 200, 20).expand(6, -1, -1)                          # the same states, other targets
        (call(x) - torch.randn(6, 200, 1)).square().mean((1, 2)).sum().backward()
        grads = copies["trunk.weights.2"].grad.flatten(1)
        unit = grads / grads.norm(dim=1, keepdim=True)
        cosines[m_init] = ((unit @ unit.T).abs().sum() - 6).item() / 30
        assert set(copies) == {f"trunk.{kind}.{i}" for kind in ("weights", "biases") for i in range(4)}
    assert cosines["orthogonal"] < 0.05 < 0.15 < cosines["identity"]


@pytest.mark.parametrize("method, num_tasks, hidden, policy, critic", [
    ("dgrad-a", 10, (160,) * 3, 833_608, 60_321 + 772_800), ("dgrad-a", 50, (160,) * 3, 3_931_208, 66_721 + 3_864_000),
    ("sac", 10, (160,) * 6, 138_088, 137_601), ("film", 10, (160,) * 3, 60_808 + 9_600, 60_321 + 9_600)])
def test_parameter_counts_are_the_papers(method, num_tasks, hidden, policy, critic):
    args = dg.Args(env="mt10", method=method, hidden_sizes=hidden)
    learners = dg.make_modular_learners(args, num_tasks, 39 + num_tasks, 4)
    assert sum(p.numel() for p in learners.actor.parameters()) == policy
    assert sum(p.numel() for p in learners.qf1.parameters()) == critic


def test_a_task_network_is_smaller_than_its_table():
    args = dg.Args(env="mt10", task_net_hidden=8, hidden_sizes=(16, 16))
    actor = dg.make_modular_learners(args, 10, 49, 4).actor
    shared = 49 * 16 + 16 + 16 * 17 + 8 * 17
    assert sum(p.numel() for p in actor.parameters()) == shared + 2 * (10 * 8 + 8 * 17 * 16) - 10 * 8


def test_critics_start_as_those_of_the_plain_network():
    for method in ("sac", "dgrad-a", "film"):
        args = dg.Args(env="mt10", method=method)
        learners = dg.make_modular_learners(args, 10, 49, 4)
        for name, bounded in (("actor", True), ("qf1", False), ("qf2_target", False)):                 # uniform; normal
            net = getattr(learners, name).net
            weight = getattr(net, "trunk", net).weights[1]
            assert (weight.abs().max() <= (6 / 800) ** 0.5) == bounded
            assert weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)


def test_identity_layers_learn_like_the_plain_network_at_first():
    """Before the layers have moved, the trunk of dgrad-a gets the gradients of plain SAC."""
    results = []
    for method in ("sac", "dgrad-a"):
        args = dg.Args(**SMALL | dict(method=method, m_init="identity"))
        torch.manual_seed(0)
        learners = dg.make_modular_learners(args, 3, 5, 2)
        if method == "dgrad-a":
            for name in ("actor", "qf1", "qf2", "qf1_target", "qf2_target"):
                getattr(learners, name).net.trunk.load_state_dict(getattr(results[0], name).net.state_dict())
        else:
            results.append(dg.make_modular_learners(args, 3, 5, 2))
            results[0].load_state_dict(learners.state_dict())
        torch.manual_seed(1)
        batch = [torch.randn(3, 8, 5), torch.rand(3, 8, 2), torch.randn(3, 8), torch.randn(3, 8, 5), torch.zeros(3, 8)]
        losses, _ = dg.joint_update(learners, learners.make_optimizers(1e-3, 1e-3), batch, 0.99, 0.005, 0.0, True)
        results.append((losses, (learners.qf1.net.trunk if method == "dgrad-a" else learners.qf1.net).weights[1]))
    torch.testing.assert_close(results[1][0]["critic"], results[2][0]["critic"])
    torch.testing.assert_close(results[1][1], results[2][1], atol=1e-5, rtol=1e-4)


# --- whole runs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [
    dict(method="dgrad-a"), pytest.param(dict(method="sac"), marks=pytest.mark.slow),
    pytest.param(dict(method="film"), marks=pytest.mark.slow), dict(task_net_hidden=8, m_init="gaussian")])
def test_every_method_runs_and_counts_conflicts(settings, tmp_path, capsys):
    args = dg.Args(**SMALL | dict(runs_dir=tmp_path) | settings)
    folder = dg.train(args)
    state = dg.load_checkpoint(folder)
    torch.manual_seed(1)
    for name, value in dg.make_modular_learners(args, 3, 42, 4).state_dict().items():
        assert not torch.equal(value, state["learners"][name]), name
    table = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True, deletechars="")
    for network in ("critic", "actor"):
        assert (np.abs(table[f"{network}_cosine"]) <= 1).all() and (table[f"{network}_weight"] == 1).all()
    assert (folder / "conflicts.png").exists() and state["num_updates"] == 150
    output = capsys.readouterr().out
    assert "parameters of sac: policy" in output and f"parameters of {args.method}: policy" in output


def test_settings():
    assert dg.Args().m_init == "orthogonal" and dg.Args(method="film").m_init == "identity"
    assert dg.Args(method="film", m_init="gaussian").m_init == dg.Args(task_net_hidden=8).m_init == "gaussian"
    assert dg.Args(tasks=("reach",)).tasks == ("reach",)                       # one task is fine without surgery
