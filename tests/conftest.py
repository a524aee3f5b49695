"""What all tests share: one thread for networks this small, a policy of PyTorch's own, no pictures."""
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch.distributions import Normal, TanhTransform, TransformedDistribution

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


def squashed_gaussian(mean, log_std, noise):
    """Actions tanh(mean + std * noise) and their log-probabilities, (..., A) and (...), by PyTorch's own classes."""
    policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    actions = policy.transforms[0](mean + log_std.exp() * noise)
    return actions, policy.log_prob(actions).sum(-1)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than these short runs; whole programs that are started as a user does draw."""
    if request.path.stem != "test_benchmark":
        monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)


def pytest_collection_modifyitems(items):
    """What one script's tests share, its quick run, is made once: all of them go to the same worker."""
    for item in items:
        script = item.callspec.params.get("script") if hasattr(item, "callspec") else None
        item.add_marker(pytest.mark.xdist_group(script or item.path.stem))
