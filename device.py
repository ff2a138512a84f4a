"""The device: CPU, CUDA, or the GPU of a Mac (mps); and the precision that it is fastest in.

GPUs that are there and cannot be used are an error.
A CUDA build of torch needs a driver that supports its major version of CUDA or a newer one:
525 and newer for CUDA 12, 580 and newer for CUDA 13 (source: docs.nvidia.com/deploy/cuda-compatibility).
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn

from config import UserError

# The builds of torch 2.11, newest first, by the version of CUDA that the driver supports at least
TORCH_BUILDS = (((13, 0), "cu130"), ((12, 8), "cu128"), ((12, 0), "cu126"))


def pick_device(wanted: str) -> torch.device:
    """auto | cpu | cuda | mps -> the device of this process, of several GPUs that of LOCAL_RANK.

    auto is CUDA where there are GPUs that CUDA_VISIBLE_DEVICES does not hide, else the CPU.
    raises UserError if the device, or a GPU that auto found, cannot be used.
    """
    if wanted == "mps":
        check_mps()
    if wanted in ("cpu", "mps"):
        return torch.device(wanted)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    error = cuda_error(device)
    if not error:
        return device
    gpus = count_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip()[:1] in ("", "-")
    if wanted == "auto" and (hidden or gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        reason = f"nvidia-smi lists no GPU, and torch says: {error}"
    elif hidden:
        reason = f"CUDA_VISIBLE_DEVICES={visible} hides every GPU"
    else:
        reason = explain_cuda_error(f"{error} (CUDA_VISIBLE_DEVICES={visible})" if visible else error)
    raise UserError(f"device {wanted}: {reason}; to use the CPU: --device cpu, or ./run.sh --gpus 0")


def preparing_device(config_device: str) -> torch.device:
    """Where frozen networks compute what training will read: on a GPU that torch sees, else on the CPU.

    config_device: auto | cpu | cuda | mps; Metal is not used here. A GPU that cannot be used is no error:
    `pick_device` has refused it by then.
    """
    on_gpu = config_device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def pick_dtype(device: torch.device) -> str:
    """bf16 on a GPU that has it, and on a CPU whose instructions make it a quarter faster; else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    if not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        return "fp32"
    return "bf16" if 1.25 * time_matmul(torch.bfloat16) < time_matmul(torch.float32) else "fp32"


def time_matmul(dtype: torch.dtype) -> float:
    """The fastest of five matrix products, of the size of a small Transformer's."""
    a = torch.ones(1024, 192, dtype=dtype)
    b = torch.ones(192, 768, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return min(times)


def worker_count(wanted: int) -> int:
    """data.workers, or, where that is 0, the cores that this process may use, shared with its other ranks.

    At most 8: a rank's network takes in no more, and each worker holds a batch.
    """
    if wanted:
        return wanted
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, usable_cores() // ranks), 8)


def usable_cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it: cores given by taskset, SLURM, ...
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def compiler_fault(device: torch.device) -> str:
    """What torch.compile lacks for a device, and what helps, in one line; "" where it lacks nothing.

    For a GPU Triton builds C against Python.h, for the CPU Inductor builds C++: so does this.
    """
    compiler = find_compiler(device)
    language = "c" if device.type == "cuda" else "c++"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as Triton does
    headers = sysconfig.get_path("include", scheme)
    words = [compiler, "-x", language, "-", "-shared", "-fPIC", f"-I{headers}"]
    with tempfile.TemporaryDirectory() as folder:
        words += ["-o", f"{folder}/empty.so"]
        try:
            done = subprocess.run(words, input="#include <Python.h>\n", capture_output=True, text=True)
        except OSError as e:
            reason = e.strerror
        else:
            if done.returncode == 0:
                return ""
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "without a reason")
    packages = f"{Path(compiler).name} python3.{sys.version_info.minor}-dev"
    return f"{compiler} cannot build what needs Python.h ({reason}); `apt install {packages}` helps"


def find_compiler(device: torch.device) -> str:
    """The compiler that torch.compile takes."""
    if device.type == "cuda":
        return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def hardware_name(device: torch.device, world: int) -> str:
    """How runs name what they ran on."""
    if device.type == "cuda":
        return f"{world} x {torch.cuda.get_device_name(device)}"
    return f"{platform.machine()}, {usable_cores()} cores"


def move(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its float64 buffers as wide as they can be there."""
    if device.type == "mps":
        return network.to(device, widest_float(device))
    return network.to(device)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Metal, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_mps() -> None:
    """raises UserError where Metal cannot be used."""
    if not torch.backends.mps.is_available():
        built = torch.backends.mps.is_built()
        lack = "does not find Metal on this machine" if built else "is built without Metal"
        raise UserError(f"device mps: torch {torch.__version__} {lack}; use --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("device mps: one GPU is one process; start it without launch.py and --nodes")


def cuda_error(device: torch.device) -> str:
    """What torch says against computing there, its first line; "" if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as e:  # AssertionError: a build without CUDA
        return str(e).split("\n")[0]
    return ""


def count_gpus() -> int:
    """How many GPUs nvidia-smi lists, hidden ones too; 1 if it cannot list them: its driver was replaced."""
    return len(re.findall("^GPU |version mismatch", nvidia_smi("-L"), re.MULTILINE))


def explain_cuda_error(error: str) -> str:
    """Why GPUs that are there cannot be used, and what helps. error: what torch says."""
    report = nvidia_smi()
    if "version mismatch" in report:
        return f"nvidia-smi says: {report.splitlines()[0]}: its driver was replaced; restart the machine"
    toolkit = torch.version.cuda  # "12.8", or None
    build = f"CUDA {toolkit}" if toolkit else "the CPU only"
    ours = f"torch {torch.__version__} is built for {build}"
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", report)
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+)\.(\d+)", report)
    if not driver or not cuda:
        return f"{ours} and says: {error}"
    major = int(cuda[1])
    minor = int(cuda[2])
    facts = f"{ours}, driver {driver[1]} supports CUDA up to {major}.{minor}"
    if toolkit and major >= int(toolkit.split(".")[0]):
        return f"{facts}, and yet torch says: {error}"
    builds = [name for least, name in TORCH_BUILDS if (major, minor) >= least]
    if not builds:
        return f"{facts}: install driver 580 or newer"
    return f"{facts}: install the matching build by {install_command(builds[0])}"


def install_command(build: str) -> str:
    """What replaces torch by another build of its version; without `uninstall` pip would keep this one."""
    pip = f"{sys.executable} -m pip"
    version = torch.__version__.split("+")[0]
    return (
        f"`{pip} uninstall -y torch torchaudio && {pip} install torch=={version} torchaudio=={version} "
        f"--index-url https://download.pytorch.org/whl/{build}`"
    )


def nvidia_smi(*words: str) -> str:
    """What it prints, errors too; "" where it is not installed."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr
