"""What every script promises, whatever its algorithm (one table of quick runs, one test per promise)."""
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import tyro
from conftest import ROOT

# A run of seconds that passes the first update, several evaluations and several checkpoints
META_WORLD = ("--tasks reach drawer-close --horizon 30 --total-timesteps 480 --learning-starts 60 --batch-size 8 "
              "--hidden-sizes 16 16 --eval-every 160 --eval-episodes 1 --checkpoint-every 120 --watch-every 3")
CHEETAHS = ("--tasks SmallFoot BigLeg --num-envs 2 --total-timesteps 3200 --eval-every 1280 --eval-episodes 1 "
            "--checkpoint-every 800 --hidden-size 8")
QUICK = {
    "tabular_em": "--trials 3 --total-timesteps 40000 --eval-every 10000 --checkpoint-every 10000",
    "em_clustering_td3": "--num-policies 2 --total-timesteps 3600 --m-step-size 600 --e-step-episodes 2 "
                         "--learning-starts 100 --update-every 3 --batch-size 16 --hidden-sizes 16 16 "
                         "--eval-every 1200 --eval-episodes 1 --checkpoint-every 400",
    "iqn_em_atari": "--preset laptop --games DemonAttack Assault --total-timesteps 480 --m-step-size 120 --horizon 40 "
                    "--eval-steps 1 --eval-episodes 1 --learning-starts 20 --batch-size 4 --width 0.0625 "
                    "--eval-every 160 --checkpoint-every 120 --num-quantiles 4 4 4 --buffer-size 300",
    "qmp_sac": "--tasks 0 4 8 --total-timesteps 6000 --train-every 100 --learning-starts 200 --gradient-steps 3 "
               "--hidden-size 16 --batch-size 16 --eval-every 2700 --eval-episodes 1 --checkpoint-every 600",
    "pcgrad_sac": META_WORLD, "dgrad_arch_sac": META_WORLD,
    "picor_sac": "--total-timesteps 540 --horizon 20 --block-steps 30 --learning-starts 25 --hidden-sizes 16 16 "
                 "--batch-size 16 --eval-every 170 --eval-episodes 1 --checkpoint-every 110 --correction-states 8 "
                 "--weight-warmup 2",
    "multitask_a2c": CHEETAHS, "distill_a2c": CHEETAHS + " --p-student 0.5",
}
OWN = {"seconds", "commands"}                              # what differs between checkpoints of equal runs,
FRESH = {"rng", "torch_rng"}                               # and where first observations of fresh episodes are drawn
EXACT = ("tabular_em", "multitask_a2c", "distill_a2c")     # their environments' whole state is in the checkpoint
ONLY_FOR = {("qmp_sac", "qmp-domain"): "--env reacher --tasks 0 1 3",      # what a method needs beside the quick flags
            ("picor_sac", "soft-modules"): "--update-every 20", ("picor_sac", "ktm"): "--offline-updates 50"}
WITHOUT = {"em_clustering_td3": ("--num-policies 2 ", "--m-step-size 600 --e-step-episodes 2 "),     # only the first
           "iqn_em_atari": ("--m-step-size 120 ", "--eval-steps 1 "),                               # method has them
           "picor_sac": ("--correction-states 8 ", "--weight-warmup 2", "--block-steps 30 ")}
every_script, MADE = pytest.mark.parametrize("script", QUICK), {}       # MADE: runs that tests share


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """A run of single-task networks, which distillation needs."""
    a2c = importlib.import_module("multitask_a2c")
    flags = f"{CHEETAHS} --method scratch --runs-dir {shlex.quote(str(tmp_path_factory.mktemp('teachers')))}"
    return a2c.train(a2c.read_args(shlex.split(flags)))


@pytest.fixture
def run(request):
    """Train in this process with the quick settings and more flags; the run folder."""
    def start(script: str, flags: str = "", quick: bool = True) -> Path:
        if script == "distill_a2c" and "--teachers" not in flags and quick:
            flags += f" --teachers {shlex.quote(str(request.getfixturevalue('teachers')))}"
        module = importlib.import_module(script)
        return module.train(module.read_args(shlex.split(f"{QUICK[script] if quick else ''} {flags}")))
    return start


@pytest.fixture
def alone(request, tmp_path_factory):
    """A quick run of a script by itself in an empty folder, made when first asked for: its process, and the folder."""
    def get(script: str) -> tuple[subprocess.CompletedProcess, Path]:
        if script not in MADE:
            folder = tmp_path_factory.mktemp("empty")
            shutil.copy(ROOT / f"{script}.py", folder)
            extra = ["--teachers", str(request.getfixturevalue("teachers"))] if script == "distill_a2c" else []
            MADE[script] = subprocess.run(
                [sys.executable, f"{script}.py", *QUICK[script].split(), *extra, "--runs-dir", "my runs"], cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, capture_output=True, text=True,
                encoding="utf-8"), folder
        return MADE[script]
    return get


@pytest.fixture
def straight(alone):
    """The run folder of the uninterrupted quick run, with which those in this process are compared."""
    return lambda script: next((alone(script)[1] / "my runs").iterdir())


def metrics(folder: Path) -> list[list[str]]:
    """metrics.csv without the column `seconds`, the one thing that differs between equal runs."""
    rows = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    return [row.split(",")[:1] + row.split(",")[2:] for row in rows]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(one, other) -> bool:
    """Whether two parts of checkpoints hold the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items() if key != "lr")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    return one == other or one != one and other != other


# --- a script alone --------------------------------------------------------------------------------------------------
@every_script
def test_alone_in_an_empty_folder(script, alone):
    result, empty = alone(script)
    assert result.returncode == 0, result.stderr
    folder, = (empty / "my runs").iterdir()
    assert re.fullmatch(rf"[\w-]+__{script}__[\w-]+__s1__[\d-]+", folder.name)
    assert all(any(folder.glob(name)) for name in ("args.json", "metrics.csv", "checkpoint.pt", "curves.png", "events.*"))
    assert folder.name in result.stdout.splitlines()[-1]
    assert metrics(folder)[0][:2] == ["global_step", "mean_return"] and len(metrics(folder)) >= 4
    about = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    assert shlex.split(about["commands"][0])[2:] == result.args[2:] and about["versions"]["torch"]


# --- stop and go on --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, where", [*((script, "evaluation") for script in QUICK),
                                           *((script, "checkpoint") for script in EXACT)])
def test_stopped_and_resumed(script, where, run, straight, tmp_path, monkeypatch):
    """A signal during the second evaluation, or after the third checkpoint, costs no row and changes no number."""
    module, calls = importlib.import_module(script), []
    owner, name, when = {"evaluation": (module, "evaluate", 2), "checkpoint": (module.Run, "save", 3)}[where]
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(SystemExit) as stop:
        run(script, f"--runs-dir {shlex.quote(str(tmp_path / 'my runs'))}")
    monkeypatch.undo()
    folder, = (tmp_path / "my runs").iterdir()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert 0 < checkpoint(folder)["global_step"] < checkpoint(straight(script))["global_step"]
    command = shlex.split(re.fullmatch(r"stopped; go on with: (.+)", stop.value.code)[1])
    assert command[-2:] == ["--resume", str(folder)]
    run(script, shlex.join(command[-2:]), quick=False)
    straight_rows = metrics(straight(script))
    assert [row[0] for row in metrics(folder)] == [row[0] for row in straight_rows]
    if script in EXACT:
        assert metrics(folder) == straight_rows
        assert same(*({k: v for k, v in checkpoint(f).items() if k not in {"rows", *OWN}}
                      for f in (folder, straight(script))))


@every_script
def test_resuming_restores_all_that_was_saved(script, run, straight, tmp_path, monkeypatch):
    """A run that is resumed and stopped before its first step saves what it has loaded; one that begins, its seed."""
    module, folder = importlib.import_module(script), tmp_path / "run"
    shutil.copytree(straight(script), folder)
    original = module.Run.__init__

    def stopped(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.stop.set()
    monkeypatch.setattr(module.Run, "__init__", stopped)

    def begun(seed: str) -> dict:
        with pytest.raises(SystemExit):
            run(script, f"--seed {seed} --runs-dir {shlex.quote(str(tmp_path / seed))}")
        return checkpoint(max((tmp_path / seed).iterdir()))
    before = checkpoint(folder)
    with pytest.raises(SystemExit):
        run(script, f"--resume {shlex.quote(str(folder))} --total-timesteps 99999999 --lr 1e-5", quick=False)
    first, second = map(begun, "17")                                   # Meta-World has goals of these two already
    assert not all(same(first[key], second[key]) for key in first.keys() - OWN)
    after = checkpoint(folder)
    assert "'lr': 1e-05" in str(after) or script in ("tabular_em", "em_clustering_td3")   # these two save no step size
    drawn_anew = set() if script in EXACT else FRESH
    assert before.keys() == after.keys()
    for key in before.keys() - OWN - drawn_anew:
        assert same(before[key], after[key]), key


def test_one_process_per_run_and_whole_checkpoints(run, straight, tmp_path, monkeypatch):
    module, folder = importlib.import_module("tabular_em"), tmp_path / "run"
    shutil.copytree(straight("tabular_em"), folder)
    args, handler = module.read_args(["--resume", str(folder), "--total-timesteps", "60000"]), signal.getsignal(2)
    writing = module.Run(args, "grid", ["a"], {})
    with pytest.raises(SystemExit, match="another process"):
        module.train(args)
    writing.log("losses", {"x": float("nan")})
    with pytest.raises(SystemExit, match="losses/x is not finite at step 7"):
        writing.save(7, {})
    assert signal.getsignal(2) is handler                              # a notebook can be interrupted again
    writing.pending.clear()
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda state, path: Path(path).write_bytes(b"half"))
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):                             # killed between writing and renaming
        writing.save(7, {})
    assert (folder / "checkpoint.pt").read_bytes() == before


# --- evaluate and measure --------------------------------------------------------------------------------------------
@every_script
def test_evaluating_a_run(script, run, straight, capsys):
    folder = straight(script)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    tables, _ = [], capsys.readouterr()
    for seed in (1, 1, 7):
        run(script, f"--evaluate {shlex.quote(str(folder))} --eval-episodes 2 --seed {seed}", quick=False)
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "return" in tables[0]
    assert script in ("tabular_em", "iqn_em_atari") or tables[2] != tables[0]              # other starts, few scores
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@every_script
def test_in_a_notebook_and_measured_more_often_it_learns_the_same(script, straight, tmp_path):
    """Settings as Python objects, paths as text, in a thread that may not listen to signals."""
    module, made = importlib.import_module(script), []
    settings = json.loads((straight(script) / "args.json").read_text(encoding="utf-8"))["args"]
    settings |= {name: settings[name] // 2 for name in ("eval_every", "checkpoint_every")} | {"runs_dir": str(tmp_path)}
    args = module.Args(**settings | ({"watch_every": 1} if "watch_every" in settings else {}))
    thread = threading.Thread(target=lambda: made.append(module.train(args)))
    thread.start()
    thread.join()
    often, seldom = checkpoint(made[0]), checkpoint(straight(script))
    assert made[0].parent == tmp_path and len(often["rows"]) > len(seldom["rows"])
    for key in often.keys() - {"rows", "history", "recent", *OWN}:
        assert same(often[key], seldom[key]), key
    returns = {row["global_step"]: row["mean_return"] for row in often["rows"]}
    assert all(same(returns[row["global_step"]], row["mean_return"]) for row in seldom["rows"])


METHODS = [(script, method) for script in QUICK
           for method in get_args(get_type_hints(importlib.import_module(script).Args)["method"])[1:]]


@pytest.mark.parametrize("script, method", METHODS)
def test_every_method_learns_something(script, method, run, straight, tmp_path, monkeypatch):
    """Parameters are finite and others than at the start after a short run; the first method has all other tests."""
    module, saved, original = importlib.import_module(script), [], importlib.import_module(script).Run.save
    monkeypatch.setattr(module.Run, "save", lambda self, step, state: (saved.append(tensors(state)),
                                                                       original(self, step, state)))
    flags = f"--method {method} --eval-every 99999999 --runs-dir {tmp_path} {ONLY_FOR.get((script, method), '')}"
    for flag in WITHOUT.get(script, ()):
        monkeypatch.setitem(QUICK, script, QUICK[script].replace(flag, ""))
    if (script, method) == ("picor_sac", "ktm"):
        flags += f" --teachers {run(script, f'--method independent --runs-dir {tmp_path}')}"
        saved.clear()
    if (script, method) == ("multitask_a2c", "finetune"):
        flags += f" --tasks BigLeg --finetune-from {shlex.quote(str(straight(script)))}"
    folder = run(script, flags)
    assert len(saved[0]) and not same(saved[0], saved[-1]) and len(metrics(folder)) == 2 + (method == "finetune")
    assert all(torch.isfinite(tensor).all() for tensor in tensors(checkpoint(folder)))


def tensors(state) -> list[torch.Tensor]:
    """All tensors of floating-point numbers in a checkpoint."""
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    found = [tensor for value in values for tensor in tensors(value)]
    return found + ([state.clone()] if isinstance(state, torch.Tensor) and state.is_floating_point() else [])


# --- bad input -------------------------------------------------------------------------------------------------------
HUGE = "--buffer-size 100000000000 --total-timesteps 1000000000000"
BAD = {"--method nothing": "nothing", "--seed -1": "seed", "--total-timesteps 0": "total_timesteps",
       "--gamma 1.5": "gamma", "--lr 0": "lr", "--no-such-flag 1": "no-such-flag", "--resume {missing}": "missing",
       "--evaluate {other}": "other_script", "--resume {damaged} --total-timesteps 99999999": "damaged",
       "--resume {run} --seed 5": "--seed 1", "--resume {run} --total-timesteps 1": "--total-timesteps"}
BAD_FOR = {
    "tabular_em": {"--num-policies 0": "num_policies", "--method sp --num-policies 2": "--num-policies"},
    "em_clustering_td3": {"--method sp --num-policies 2": "--num-policies", HUGE: "--buffer-size"},
    "iqn_em_atari": {"--preset laptop --games MsPacMen": "MsPacman", "--method ppt --num-policies 4": "--num-policies",
                     HUGE: "--buffer-size"},
    "qmp_sac": {"--tasks 0 10": "tasks", "--capture-video": "--evaluate", "--kl-weight 1": "--kl-weight",
                "--env maze --method qmp-domain": "reacher", HUGE: "--buffer-size"},
    "pcgrad_sac": {"--tasks reach-v3": "tasks", "--tasks reach": "--tasks", "--method sac --heads": "--heads",
                   HUGE: "--buffer-size"},
    "dgrad_arch_sac": {"--tasks reach reach": "--tasks", "--horizon 501": "horizon"},
    "picor_sac": {"--tasks nowhere": "tasks", "--method mtsac --adaptive-weights": "--adaptive-weights",
                  "--method ktm": "--method independent"},
    "multitask_a2c": {"--tasks SmallNose": "tasks", "--method finetune": "--finetune-from",
                      "--source-task SmallFoot": "--source-task"},
    "distill_a2c": {"--tasks SmallNose": "tasks", "--method distill": "python multitask_a2c.py --method scratch",
                    "--p-student 1.5": "p_student"},
}


@pytest.mark.parametrize("script, flags, word", [(script, *case) for script in QUICK
                                                 for case in (BAD | BAD_FOR[script]).items()])
def test_bad_input_gets_one_sentence(script, flags, word, run, straight, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("missing", "other", "damaged", "run")}
    for name in ("other", "damaged", "run"):
        shutil.copytree(straight(script), places[name])
    about = json.loads((places["other"] / "args.json").read_text(encoding="utf-8")) | {"script": "other_script"}
    (places["other"] / "args.json").write_text(json.dumps(about), encoding="utf-8")
    (places["damaged"] / "checkpoint.pt").write_bytes(b"PK")
    flags = flags.format(**{name: shlex.quote(str(path)) for name, path in places.items()})
    with pytest.raises(SystemExit) as stop:
        run(script, f"{flags} --runs-dir {shlex.quote(str(tmp_path / 'runs'))}", quick=False)
    message = f"{stop.value.code} {capsys.readouterr().err}"
    assert stop.value.code not in (0, None) and word in re.sub(r"[│\s]+", " ", message) and "Traceback" not in message
    assert not (tmp_path / "runs").exists()


# --- the house: copies, pins, order ----------------------------------------------------------------------------------
def test_same_name_means_same_text():
    texts = {}
    for script in QUICK:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                texts.setdefault(node.name, {}).setdefault(ast.get_source_segment(source, node), []).append(script)
    different = {name for name, copies in texts.items() if len(copies) > 1}
    assert different <= {"Args", "make_envs", "make_agent", "evaluate", "update", "train"}


@every_script
def test_header_pins_what_is_imported_and_importing_runs_nothing(script):
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    header = tomllib.loads(re.search(r"# /// script\n(.*?)# ///", source, re.S)[1].replace("\n# ", "\n")[2:])
    pins = {re.split(r"[=\[]", pin)[0]: pin for pin in header["dependencies"]}
    assert set(pins.values()) <= {*(ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines(),
                                  "gymnasium[mujoco]==1.4.0", "gymnasium[box2d]==1.4.0", "gymnasium==1.4.0"}
    assert header["requires-python"] == ">=3.11,<3.14"
    tree, imported = ast.parse(source), set()
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, allowed) for node in tree.body[1:-1]) and isinstance(tree.body[-1], ast.If)
    for node in ast.walk(tree):
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    packages = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) | {"tensorboard"}
    assert {{"PIL": "pillow", "ale_py": "ale-py"}.get(name, name) for name in packages} == set(pins)


def test_every_script_is_in_the_table_and_every_command_on_a_page_parses():
    assert {path.stem for path in ROOT.glob("*.py")} == set(QUICK)
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmark" / "README.md"]:
        commands = re.findall(r"python (?:benchmark/)?(\w+)\.py ?([^`\n#|]*)", page.read_text(encoding="utf-8"))
        for program, flags in commands:
            module, words = importlib.import_module(program), shlex.split(flags)
            if program != "speed" and not {"--resume", "--evaluate", "--help"} & set(words):
                tyro.cli(module.Args, args=words)
