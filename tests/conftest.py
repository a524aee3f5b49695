"""What all tests share: where the scripts are, and one thread for networks this small."""
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


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
