"""run.sh in a real bash: its options, and its installation in a small project that depends on nothing, so
needs no network.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if key not in ("VENV", "NUM_GPUS", "BATCH_SIZE", "CONFIG", "OMP_WAIT_POLICY")
} | {"CUDA_VISIBLE_DEVICES": "", "NUM_CPUS": "1"}


def start(*arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(root / "run.sh"), *arguments],
        env=CLEAN | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,
    )


def printed(*arguments: str, **environment: str) -> list[list[str]]:
    """The commands that run.sh would run, in words."""
    done = start("--print", *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def write_script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def four_gpus(tmp_path) -> dict[str, str]:
    """The environment of a machine with four GPUs, as far as run.sh asks: what `nvidia-smi -L` prints."""
    write_script(tmp_path / "nvidia-smi", 'for i in 0 1 2 3; do echo "GPU $i: H100 (UUID: GPU-$i)"; done')
    return {"PATH": f"{tmp_path}:{CLEAN['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def test_help_is_the_header_and_names_every_option():
    done = start("--help")
    assert done.returncode == 0 and done.stdout == start("--gpus", "0", "-h").stdout
    for word in (
        "--gpus",
        "--cpus",
        "--device",
        "--config",
        "--batch_size",
        "--global_batch",
        "--wandb-url",
        "--nodes",
        "--node_rank",
        "--master",
        "--print",
        "test",
        "lock",
        "NUM_GPUS",
    ):
        assert word in done.stdout


@pytest.mark.parametrize("shell", ["sh", "bash --posix"])
def test_another_shell_and_a_link_run_it_too(shell, tmp_path):
    (tmp_path / "real").symlink_to(ROOT / "run.sh")
    (tmp_path / "link").symlink_to("real")
    wanted = start("--print", "--lr", "2").stdout
    assert "configs/demo.yaml" in wanted
    for path in (ROOT / "run.sh", tmp_path / "link"):
        words = [*shell.split(), str(path), "--print", "--lr", "2"]
        assert subprocess.run(words, env=CLEAN, cwd="/", capture_output=True, text=True).stdout == wanted


def test_without_gpus_the_demo_is_prepared_and_trained_on_the_cpu():
    calm, prepare, train = printed()
    assert calm == ["export", "OMP_WAIT_POLICY=PASSIVE"]
    assert prepare == [
        ".venv/bin/python",
        "system.py",
        "prepare",
        "--config",
        "configs/demo.yaml",
        "--device",
        "cpu",
    ]
    assert train == [
        "exec",
        ".venv/bin/python",
        "train.py",
        "--config",
        "configs/demo.yaml",
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize("cores, ranks", [(1, 1), (2, 2), (3, 2), (6, 4), (64, 8)])
def test_without_gpus_there_are_as_many_ranks_as_cores_up_to_eight(cores, ranks, tmp_path):
    (tmp_path / "nproc").write_text(f"#!/bin/sh\necho {cores}\n")
    (tmp_path / "nproc").chmod(0o755)
    _, prepare, train = printed(PATH=f"{tmp_path}:{os.environ['PATH']}", NUM_CPUS="")
    launcher = ["launch.py", "--ranks", str(ranks)] if ranks > 1 else []
    assert train[2:] == [*launcher, "train.py", "--config", "configs/demo.yaml", "--device", "cpu"]
    assert ("--ranks" in prepare) == (ranks > 1)


def test_ranks_on_a_cpu_are_as_many_as_asked_for_and_at_least_one(four_gpus):
    assert printed("--cpus=3")[-1][2:5] == ["launch.py", "--ranks", "3"]
    assert start("--cpus", "0").stderr == "error: --cpus 0: at least 1\n"
    refused = start("--cpus", "2", "--gpus", "1", **four_gpus)
    assert refused.stderr == "error: --cpus 2 and --gpus 1: only one of them\n"


def test_gpus_train_ljspeech_on_all_of_them_a_rank_on_each(four_gpus):
    prepare, train = printed(**four_gpus)
    words = ["--config", "configs/ljspeech.yaml", "--device", "cuda"]
    assert prepare[1:] == ["system.py", "prepare", "--ranks", "4", *words]
    assert train[2:] == ["launch.py", "--ranks", "4", "train.py", *words]


def test_one_gpu_needs_no_launcher_and_hidden_ones_do_not_count(four_gpus):
    assert printed("--gpus", "1", **four_gpus)[-1][2:] == [
        "train.py",
        "--config",
        "configs/ljspeech.yaml",
        "--device",
        "cuda",
    ]
    assert printed(**four_gpus | {"CUDA_VISIBLE_DEVICES": "2"})[-1][2] == "train.py"
    assert "configs/demo.yaml" in printed(**four_gpus | {"CUDA_VISIBLE_DEVICES": ""})[-1]
    assert "configs/demo.yaml" in printed("--gpus", "0", **four_gpus)[-1]


def test_the_device_that_is_asked_for_is_the_only_one_that_is_named(four_gpus):
    words = ["train.py", "--config", "configs/demo.yaml", "--device", "cpu"]
    assert printed("--device", "cpu", **four_gpus | {"NUM_GPUS": "2"})[-1][2:] == words
    # a GPU that nvidia-smi does not know
    assert printed("--device=cuda")[-1][2:] == [*words[:-1], "cuda"]
    refused = start("--gpus", "2", "--device", "cpu", **four_gpus)
    assert (
        refused.returncode == 2 and refused.stderr == "error: --gpus 2 and --device cpu: only one of them\n"
    )
    commands = printed("--device", "mps")
    assert ["export", "PYTORCH_ENABLE_MPS_FALLBACK=1"] in commands and commands[-1][2:] == [
        *words[:-1],
        "mps",
    ]


def test_a_driver_that_was_replaced_under_its_kernel_module_is_a_gpu(tmp_path):
    """Which device.py refuses, in words; counted as none, it would be hours on the CPU."""
    write_script(
        tmp_path / "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    )
    hidden = {key: value for key, value in CLEAN.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        ["bash", str(ROOT / "run.sh"), "--print"],
        env=hidden | {"PATH": f"{tmp_path}:{CLEAN['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("--device cuda \n")


def test_several_machines_meet_at_the_master_to_prepare_and_to_train(four_gpus):
    words = ["--nodes", "2", "--node-rank", "1", "--master", "alpha", "--lr", "1e-3"]
    prepare, train = printed(*words, **four_gpus)
    together = ["launch.py", "--nodes", "2", "--node_rank", "1", "--master", "alpha:29500"]
    arguments = ["--config", "configs/ljspeech.yaml", "--device", "cuda", "--lr", "1e-3"]
    assert prepare[1:] == [*together, "system.py", "prepare", "--ranks", "8", *arguments]
    assert train[2:] == [*together, "--ranks", "4", "train.py", *arguments]
    assert "alpha:1234" in printed("--nodes=2", "--master=alpha:1234", **four_gpus)[-1]


def test_other_options_reach_preparation_and_training_as_typed():
    _, prepare, train = printed("--config", "a b.yaml", "--train.lr=1e-3", "--data-dir", "x 'y' $z *")
    words = ["--config", "a b.yaml", "--device", "cpu", "--train.lr", "1e-3", "--data-dir", "x 'y' $z *"]
    assert prepare[3:] == words and train[3:] == words


@pytest.mark.parametrize("word", ["--wandb-url", "--wandb_url"])
def test_a_wandb_url_turns_wandb_online(word):
    assert printed(word, "http://host:8080")[-1][-4:] == [
        "--wandb_url",
        "http://host:8080",
        "--wandb",
        "online",
    ]


def test_the_environment_says_the_same_and_options_win(four_gpus):
    environment = four_gpus | {"BATCH_SIZE": "64", "NUM_GPUS": "2", "CONFIG": "x.yaml", "VENV": "/v"}
    train = printed(**environment)[-1]
    assert train[1] == "/v/bin/python" and train[4] == "2"
    assert train[-6:] == ["--config", "x.yaml", "--device", "cuda", "--batch_size", "64"]
    train = printed("--gpus", "3", "--config", "y.yaml", "--batch_size", "8", **environment)[-1]
    assert train[4] == "3" and train[-8:-6] == ["--config", "y.yaml"]
    assert train[-4:] == ["--batch_size", "64", "--batch_size", "8"]  # the last one counts


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--gpus", "99"], "--gpus 99"),
        (["--gpus", "two"], "whole numbers"),
        (["--gpus", "-1"], "whole numbers"),
        (["--gpus"], "missing"),
        (["32"], "expected --key value"),
        (["--nodes", "2"], "--master"),
        (["--nodes", "0"], "--nodes"),
        (["--node_rank", "1"], "--node_rank"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, complaint):
    done = start(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and complaint in done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with run.sh, no dependencies, and entry points that say what they were given; not yet
    installed.
    """
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "small"\ndependencies = []\n')
    (folder / "requirements.lock").touch()
    (folder / "system.py").write_text("import sys\nprint('system.py', *sys.argv[1:])\n")
    (folder / "train.py").write_text("import sys\nprint('train.py', *sys.argv[1:], sys.prefix)\n")
    return folder


def test_the_first_start_installs_and_the_second_gets_to_work_at_once(project):
    first = start("--lr", "2", root=project)
    assert first.returncode == 0, first.stderr
    assert "==> making .venv" in first.stdout and "==> installing" in first.stdout
    second = start("--lr", "2", root=project)
    assert second.stdout.splitlines() == [
        "system.py prepare --config configs/demo.yaml --device cpu --lr 2",
        f"train.py --config configs/demo.yaml --device cpu --lr 2 {project}/.venv",
    ]
    assert first.stdout.endswith(second.stdout)


@pytest.mark.parametrize("file", ["pyproject.toml", "requirements.lock"])
def test_changed_dependencies_are_installed(project, file):
    start(root=project)
    with open(project / file, "a") as f:
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
    assert (
        again.returncode == 0
        and "starting over" in again.stdout
        and not (venv / "half").exists()
        and not (venv / "unfinished").exists()
    )


def test_a_failed_installation_stops_and_is_tried_again(project):
    folder = project / "failing"
    folder.mkdir()
    for name in ("run.sh", "system.py", "train.py", "requirements.lock"):
        shutil.copy(project / name, folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "small"\ndependencies = ["./absent.whl"]\n')
    for _ in range(2):
        failed = start(root=folder, VENV=str(project / ".venv"))
        assert (
            failed.returncode != 0 and "==> installing" in failed.stdout and "train.py" not in failed.stdout
        )


def test_a_voice_or_a_judge_that_cannot_be_installed_is_told_in_a_line_and_done_without(project):
    before = (project / "pyproject.toml").read_text()
    extra = '[project.optional-dependencies]\ndemo = ["./absent.whl", "./missing.whl"]\n'
    (project / "pyproject.toml").write_text(before + extra)
    first = start(root=project)
    second = start(root=project)
    (project / "pyproject.toml").write_text(before)
    assert first.returncode == 0 and first.stderr == "" and "train.py" in first.stdout
    assert (
        "==> going on without what cannot be installed: ./absent.whl ./missing.whl (why: .venv/demo.log)\n"
        in first.stdout
    )
    assert (project / ".venv" / "demo.log").read_text()
    assert second.returncode == 0 and "==>" not in second.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_uv_installs_where_it_is_and_pip_where_it_cannot(project, tmp_path, code):
    (project / "pyproject.toml").open("a").write(f"# for uv, {code}\n")
    write_script(tmp_path / "uv", f'echo "$UV_DEFAULT_INDEX $*" >>{tmp_path}/calls; exit {code}')
    done = start(root=project, PATH=f"{tmp_path}:{CLEAN['PATH']}", PIP_INDEX_URL="http://localhost/simple")
    command = "pip install --python .venv/bin/python -c requirements.lock -r .venv/requirements.txt"
    assert (tmp_path / "calls").read_text() == f"http://localhost/simple {command}\n"
    assert done.returncode == 0 and ("==> uv could not: trying pip" in done.stdout) == (code == 1)


def test_the_lock_has_an_exact_version_of_all_that_pyproject_lists_and_names_no_index():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[a-z0-9.]+( ; |$)", pin) for pin in pins)
    versions = {name: version.split(" ; ")[0] for name, version in (pin.split("==", 1) for pin in pins)}
    with open(ROOT / "pyproject.toml", "rb") as f:
        listed = tomllib.load(f)["project"]
    for line in listed["dependencies"] + sum(listed["optional-dependencies"].values(), []):
        requirement = Requirement(line)
        assert versions[requirement.name.replace("_", "-")] in requirement.specifier, "./run.sh lock"
    assert lines[1].startswith("#    uv pip compile --universal ")


def test_a_folder_that_is_no_environment_is_left_alone(project, tmp_path):
    (tmp_path / "precious").touch()
    refused = start(root=project, VENV=str(tmp_path))
    assert refused.returncode == 2 and "delete it" in refused.stderr and (tmp_path / "precious").exists()


def test_a_machine_without_a_new_enough_python_is_told_so(project, tmp_path):
    for tool in ("bash", "dirname", "grep", "tr", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    # as an older Python answers the question for 3.11
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    refused = start(root=project, VENV=str(project / "nowhere"), PATH=str(tmp_path))
    assert (
        refused.returncode == 2
        and refused.stderr.startswith("error: no Python 3.11")
        and refused.stderr.count("\n") == 1
    )


def test_a_failed_preparation_stops_before_training(project):
    start(root=project)
    (project / "system.py").write_text("import sys\nsys.exit('no corpus')\n")
    failed = start(root=project)
    assert failed.returncode == 1 and failed.stderr == "no corpus\n" and failed.stdout == ""


def test_sigterm_reaches_train(project):
    start(root=project)
    (project / "system.py").write_text("")
    (project / "train.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        ["bash", str(project / "run.sh")], env=CLEAN, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 7


def installed_here(venv: Path) -> Path:
    """This interpreter's packages in the place of an environment that an earlier start finished."""
    (venv / "bin").mkdir(parents=True)
    write_script(venv / "bin" / "python", f'exec "{sys.executable}" "$@"')
    files = [(ROOT / name).read_text().rstrip("\n") for name in ("pyproject.toml", "requirements.lock")]
    for stamp in ("installed", "installed-test"):
        (venv / stamp).write_text("\n".join(files))
    return venv


def test_gpus_2_under_a_driver_too_old_for_torch_is_an_error_before_anything_is_prepared(tmp_path):
    import torch

    if torch.cuda.is_available() or not (torch.version.cuda or "").startswith("13"):
        pytest.skip("torch can use a GPU here, or is not built for CUDA 13")
    report = 'echo "Driver Version: 535.129.03  CUDA Version: 12.2"'
    gpus = 'for i in 0 1; do echo "GPU $i: H100 (UUID: GPU-$i)"; done'
    write_script(tmp_path / "nvidia-smi", f'if [ "$1" = -L ]; then {gpus}; else {report}; fi')
    venv = installed_here(tmp_path / "venv")
    environment = {"PATH": f"{tmp_path}:{CLEAN['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1", "VENV": str(venv)}
    made = tmp_path / "made"
    done = start("--gpus", "2", "--data_dir", str(made), "--out_dir", str(made), **environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "driver 535.129.03 supports CUDA up to 12.2" in done.stderr
    assert f"torch {torch.__version__} is built for CUDA 13" in done.stderr and "whl/cu126`" in done.stderr
    assert not made.exists()


def test_test_runs_pytest_with_its_arguments(project):
    venv = installed_here(project / "finished")
    done = start("test", "tests/test_config.py", "-k", "unknown_key", VENV=str(venv))
    assert done.returncode == 0 and "1 passed" in done.stdout and "==>" not in done.stdout
