"""What all tests share: the scripts as modules, and a way to run one as a user does."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if path.read_text().startswith("# /// script")]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                  # small networks: a second thread costs more than it gives


@pytest.fixture
def command_line(tmp_path):
    """Start `python SCRIPT ARGUMENTS` in an empty folder that holds a copy of the script and nothing else."""
    def start(script: str, *arguments: str, wait: bool = True, **options):
        (tmp_path / script).write_text((ROOT / script).read_text())
        command = [sys.executable, script, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "COLUMNS": "200"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, **options)
        if not wait:
            return process
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)
    return start
