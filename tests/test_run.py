"""run.sh in a real bash: its options, and its installation in a small project that depends on nothing, so needs no network."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {key: value for key, value in os.environ.items()
         if key not in ("VENV", "NUM_GPUS", "BATCH_SIZE", "CONFIG", "OMP_WAIT_POLICY")} | {"CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(root / "run.sh"), *arguments], env=CLEAN | environment, cwd="/",
                          capture_output=True, text=True, timeout=120)


def printed(*arguments: str, **environment: str) -> list[list[str]]:
    """The commands that run.sh would run, in words."""
    done = start("--print", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.fixture
def four_gpus(tmp_path) -> dict[str, str]:
    """The environment of a machine with four GPUs, as far as run.sh asks: what `nvidia-smi -L` prints."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo \"GPU $i: H100 (UUID: GPU-$i)\"; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{tmp_path}:{CLEAN['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def test_help_is_the_header_and_names_every_option():
    done = start("--help")
    assert done.returncode == 0 and done.stdout == start("--gpus", "0", "-h").stdout
    for word in ("--gpus", "--config", "--batch_size", "--wandb-url", "--nodes", "--node_rank", "--master", "--print", "test", "NUM_GPUS"):
        assert word in done.stdout


def test_without_gpus_the_demo_is_prepared_and_trained_on_the_cpu():
    calm, prepare, train = printed()
    assert calm == ["export", "OMP_WAIT_POLICY=PASSIVE"]
    assert prepare == [".venv/bin/python", "system.py", "prepare", "--config", "configs/demo.yaml", "--device", "cpu"]
    assert train == ["exec", ".venv/bin/python", "train.py", "--config", "configs/demo.yaml", "--device", "cpu"]


def test_gpus_train_ljspeech_by_torchrun_on_all_of_them(four_gpus):
    prepare, train = printed(**four_gpus)
    assert prepare[1:] == ["system.py", "prepare", "--config", "configs/ljspeech.yaml"]
    assert train[2:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert train[7:] == ["train.py", "--config", "configs/ljspeech.yaml"]


def test_one_gpu_needs_no_torchrun_and_hidden_ones_do_not_count(four_gpus):
    assert printed("--gpus", "1", **four_gpus)[-1][2:] == ["train.py", "--config", "configs/ljspeech.yaml"]
    assert printed(**four_gpus | {"CUDA_VISIBLE_DEVICES": "2"})[-1][2] == "train.py"
    assert "configs/demo.yaml" in printed(**four_gpus | {"CUDA_VISIBLE_DEVICES": ""})[-1]
    assert "configs/demo.yaml" in printed("--gpus", "0", **four_gpus)[-1]


def test_several_machines_meet_at_the_master(four_gpus):
    train = printed("--nodes", "2", "--node-rank", "1", "--master", "alpha", "--lr", "1e-3", **four_gpus)[-1]
    launch, arguments = train[4:train.index("train.py")], train[train.index("train.py") + 1:]
    assert dict(zip(launch[::2], launch[1::2])) == {
        "--nnodes": "2", "--node_rank": "1", "--master_addr": "alpha", "--master_port": "29500", "--nproc_per_node": "4"}
    assert arguments == ["--config", "configs/ljspeech.yaml", "--lr", "1e-3"]
    assert "1234" in printed("--nodes=2", "--master=alpha:1234", **four_gpus)[-1]


def test_other_options_reach_preparation_and_training_as_typed():
    _, prepare, train = printed("--config", "a b.yaml", "--train.lr=1e-3", "--data-dir", "x 'y' $z *")
    words = ["--config", "a b.yaml", "--device", "cpu", "--train.lr", "1e-3", "--data-dir", "x 'y' $z *"]
    assert prepare[3:] == words and train[3:] == words


@pytest.mark.parametrize("word", ["--wandb-url", "--wandb_url"])
def test_a_wandb_url_turns_wandb_online(word):
    assert printed(word, "http://host:8080")[-1][-4:] == ["--wandb_url", "http://host:8080", "--wandb", "online"]


def test_the_environment_says_the_same_and_options_win(four_gpus):
    environment = four_gpus | {"BATCH_SIZE": "64", "NUM_GPUS": "2", "CONFIG": "x.yaml", "VENV": "/v"}
    train = printed(**environment)[-1]
    assert train[1] == "/v/bin/python" and train[6] == "2" and train[-4:] == ["--config", "x.yaml", "--batch_size", "64"]
    train = printed("--gpus", "3", "--config", "y.yaml", "--batch_size", "8", **environment)[-1]
    assert train[6] == "3" and train[-6:] == ["--config", "y.yaml", "--batch_size", "64", "--batch_size", "8"]     # the last one counts


@pytest.mark.parametrize("arguments, complaint", [
    (["--gpus", "99"], "--gpus 99"), (["--gpus", "two"], "whole numbers"), (["--gpus", "-1"], "whole numbers"), (["--gpus"], "missing"),
    (["32"], "expected --key value"), (["--nodes", "2"], "--master"), (["--nodes", "0"], "--nodes"), (["--node_rank", "1"], "--node_rank")])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, complaint):
    done = start(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and complaint in done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with run.sh, no dependencies, and entry points that say what they were given; not yet installed."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "small"\ndependencies = []\n')
    (folder / "system.py").write_text("import sys\nprint('system.py', *sys.argv[1:])\n")
    (folder / "train.py").write_text("import sys\nprint('train.py', *sys.argv[1:], sys.prefix)\n")
    return folder


def test_the_first_start_installs_and_the_second_gets_to_work_at_once(project):
    first = start("--lr", "2", root=project)
    assert first.returncode == 0, first.stderr
    assert "==> making .venv" in first.stdout and "==> installing" in first.stdout
    began = time.perf_counter()
    second = start("--lr", "2", root=project)
    assert time.perf_counter() - began < 3
    assert second.stdout.splitlines() == ["system.py prepare --config configs/demo.yaml --device cpu --lr 2",
                                          f"train.py --config configs/demo.yaml --device cpu --lr 2 {project}/.venv"]
    assert first.stdout.endswith(second.stdout)


def test_changed_dependencies_are_installed(project):
    start(root=project)
    with open(project / "pyproject.toml", "a") as f:
        f.write("# changed\n")
    again = start(root=project)
    assert "==> installing" in again.stdout and "==> making" not in again.stdout
    assert "==>" not in start(root=project).stdout


def test_an_interrupted_installation_starts_over(project):
    """What a kill leaves behind: the marker, and no finished stamp."""
    venv = project / "interrupted"
    venv.mkdir()
    (venv / "unfinished").touch()
    (venv / "half").touch()
    again = start(root=project, VENV=str(venv))
    assert again.returncode == 0 and "starting over" in again.stdout and not (venv / "half").exists() and not (venv / "unfinished").exists()


def test_a_failed_installation_stops_and_is_tried_again(project):
    folder = project / "failing"
    folder.mkdir()
    for name in ("run.sh", "system.py", "train.py"):
        shutil.copy(project / name, folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "small"\ndependencies = ["./absent.whl"]\n')
    for _ in range(2):
        failed = start(root=folder, VENV=str(project / ".venv"))
        assert failed.returncode != 0 and "==> installing" in failed.stdout and "train.py" not in failed.stdout


def test_a_folder_that_is_no_environment_is_left_alone(project, tmp_path):
    (tmp_path / "precious").touch()
    refused = start(root=project, VENV=str(tmp_path))
    assert refused.returncode == 2 and "delete it" in refused.stderr and (tmp_path / "precious").exists()


def test_a_machine_without_a_new_enough_python_is_told_so(project, tmp_path):
    for tool in ("bash", "dirname", "grep", "tr", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")      # as an older Python answers the question for 3.11
    (tmp_path / "python3").chmod(0o755)
    refused = start(root=project, VENV=str(project / "nowhere"), PATH=str(tmp_path))
    assert refused.returncode == 2 and refused.stderr.startswith("error: no Python 3.11") and refused.stderr.count("\n") == 1


def test_a_failed_preparation_stops_before_training(project):
    start(root=project)
    (project / "system.py").write_text("import sys\nsys.exit('no corpus')\n")
    failed = start(root=project)
    assert failed.returncode == 1 and failed.stderr == "no corpus\n" and failed.stdout == ""


def test_sigterm_reaches_train(project):
    start(root=project)
    (project / "system.py").write_text("")
    (project / "train.py").write_text("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
                                      "print('ready', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(["bash", str(project / "run.sh")], env=CLEAN, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 7


def test_test_runs_pytest_with_its_arguments(project):
    """With this interpreter's packages in the place of an environment that an earlier start finished."""
    venv = project / "finished"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "pyproject.toml", venv / "installed-test")
    done = start("test", "tests/test_config.py", "-k", "unknown_key", VENV=str(venv))
    assert done.returncode == 0 and "1 passed" in done.stdout and "==>" not in done.stdout
