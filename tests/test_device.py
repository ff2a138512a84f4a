"""GPUs that are there and cannot be used: what `nvidia-smi` prints is faked, everything else is this
machine's.
"""

import os
import shutil
import sys

import pytest
import torch

import device
import system
from config import UserError

TABLE = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}     |
+-----------------------------------------------------------------------------------------+
"""
NEWER_TABLE = "| NVIDIA-SMI {driver}   KMD Version: {driver}   CUDA UMD Version: {cuda} |\n"
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95\n"
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
cuda_13 = pytest.mark.skipif(
    (torch.version.cuda or "").split(".")[0] != "13", reason="torch is not built for CUDA 13"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that gives this machine an `nvidia-smi` which lists `gpus` and prints `report`."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(gpus: str, report: str) -> None:
        (tmp_path / "gpus").write_text(gpus)
        (tmp_path / "report").write_text(report)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = -L ]; then cat {tmp_path}/gpus; else cat {tmp_path}/report; fi\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return make


def two_gpus(driver: str, cuda: str, table: str = TABLE) -> tuple[str, str]:
    return "GPU 0: H100 (UUID: GPU-0)\nGPU 1: H100 (UUID: GPU-1)\n", table.format(driver=driver, cuda=cuda)


def complaint(wanted: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        device.pick_device(wanted)
    assert "\n" not in str(error.value) and "--device cpu" in str(error.value)
    return str(error.value)


@no_cuda
@cuda_13
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    "cuda, build", [("12.0", "cu126"), ("12.2", "cu126"), ("12.8", "cu128"), ("12.9", "cu128")]
)
def test_a_driver_that_is_too_old_is_told_with_the_command_that_helps(machine, wanted, cuda, build):
    machine(*two_gpus("535.129.03", cuda))
    said = complaint(wanted)
    assert f"is built for CUDA 13.0, driver 535.129.03 supports CUDA up to {cuda}" in said
    version = torch.__version__.split("+")[0]
    wheels = f"torch=={version} torchaudio=={version} --index-url https://download.pytorch.org/whl/{build}"
    assert f"{sys.executable} -m pip install {wheels}`" in said


@no_cuda
@cuda_13
def test_a_driver_older_than_every_build_must_be_replaced(machine):
    machine(*two_gpus("470.82", "11.4"))
    assert "driver 470.82 supports CUDA up to 11.4: install driver 580" in complaint()


@no_cuda
@pytest.mark.parametrize("table", [TABLE, NEWER_TABLE])
def test_where_the_driver_is_new_enough_torch_itself_is_quoted(machine, table):
    machine(*two_gpus("595.10", "99.1", table))
    if torch.version.cuda:
        assert "driver 595.10 supports CUDA up to 99.1, and yet torch says: " in complaint()
    else:
        assert "is built for the CPU only" in complaint() and "whl/cu130" in complaint()


@no_cuda
def test_a_driver_that_was_replaced_under_its_kernel_module_is_told(machine):
    machine(MISMATCH, MISMATCH)
    assert "Driver/library version mismatch" in complaint() and "restart" in complaint()


@no_cuda
@pytest.mark.parametrize("visible", ["", "-1"])
def test_gpus_that_are_hidden_on_purpose_leave_auto_on_the_cpu(machine, monkeypatch, visible):
    machine(*two_gpus("535.129.03", "12.2"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.pick_device("auto") == torch.device("cpu")
    assert f"CUDA_VISIBLE_DEVICES={visible} hides every GPU" in complaint("cuda")


@no_cuda
def test_a_number_that_no_gpu_has_is_named(machine, monkeypatch):
    machine(*two_gpus("580.95", "99.0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES=7" in complaint()


@no_cuda
def test_the_cpu_is_used_on_purpose_and_where_there_is_no_gpu(machine):
    machine("No devices were found\n", "No devices were found\n")
    assert device.pick_device("auto") == torch.device("cpu")
    assert "lists no GPU" in complaint("cuda")
    machine(*two_gpus("535.129.03", "12.2"))
    assert device.pick_device("cpu") == torch.device("cpu")


@no_cuda
def test_nothing_is_prepared_for_gpus_that_cannot_be_used(machine, refusal, tmp_path):
    machine(*two_gpus("535.129.03", "12.2"))
    words = ["--config=configs/demo.yaml", f"--data_dir={tmp_path / 'data'}"]
    assert "driver 535.129.03" in refusal(system, "prepare", *words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name, variable", [("cpu", "CXX"), ("cuda", "CC")])
def test_a_compiler_that_is_missing_or_finds_no_python_h_is_told_with_what_helps(
    name, variable, tmp_path, monkeypatch
):
    where = torch.device(name)
    compiler = shutil.which(os.environ.get(variable) or device.find_compiler(where))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    if compiler:
        assert "Python.h" in device.compiler_fault(where)
        (tmp_path / "Python.h").touch()
        assert device.compiler_fault(where) == ""
    monkeypatch.setenv(variable, str(tmp_path / "g++-99"))
    fault = device.compiler_fault(where)
    assert fault.startswith(f"{tmp_path / 'g++-99'} cannot build") and "No such file" in fault
    assert f"apt install g++-99 python3.{sys.version_info.minor}-dev" in fault and "\n" not in fault


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac")
def test_metal_that_is_not_there_is_an_error_in_words():
    assert "device mps: torch" in complaint("mps")


def test_on_metal_nothing_is_wider_than_float32():
    assert device.widest_float(torch.device("mps")) == torch.float32
    assert device.widest_float(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("has_gpu", [True, False])
def test_what_training_reads_is_prepared_on_a_gpu_unless_the_config_says_cpu(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert device.preparing_device("cpu") == torch.device("cpu")
    for wanted in ("auto", "cuda"):
        assert device.preparing_device(wanted) == torch.device("cuda" if has_gpu else "cpu")


@pytest.mark.parametrize("cores, ranks, count", [(2, "", 2), (12, "4", 3), (4, "8", 1), (192, "8", 8)])
def test_workers_are_as_many_as_there_are_cores_for_a_rank(cores, ranks, count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks or "1")
    assert device.worker_count(0) == count and device.worker_count(5) == 5
