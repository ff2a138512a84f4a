"""The losses of the first three updates of every demo recipe: `python tests/first_losses.py [FILE]` prints
them as JSON, or writes them.

A change that moves code and is to change no number leaves them bit for bit as they are in
tests/first_losses.json. The recipes train as they stand, but on a few recordings that are computed here, on a
batch of four, in fp32, on one thread, with the instructions of AVX2: any CPU that has them repeats the
figures.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

SAME_ANYWHERE = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "HF_HUB_OFFLINE": "1",
}
TESTS = Path(__file__).resolve().parent
RATE = 22050
WORDS = "the river runs over seven old stones and nobody counts them twice before the evening".split()
FEW = {
    "batch_size": 4,
    "steps": 3,
    "log_interval": 1,
    "val_interval": 3,
    "eval_interval": 0,
    "limit": 4,
    "workers": 1,
    "device": "cpu",
    "dtype": "fp32",
    "wandb": "disabled",
}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in SAME_ANYWHERE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SAME_ANYWHERE)
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = losses_of_all(Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text)


def losses_of_all(root: Path) -> dict[str, dict[str, list[float]]]:
    """{recipe: {loss: its values at updates 1, 2, 3}}; `root`: an empty folder to work in."""
    from conftest import call

    import system

    speech = {"corpus": "ljspeech", "data_dir": write_speech(root / "speech")}
    music = {"corpus": "music", "data_dir": write_music(root / "music")}
    pictures = {
        "corpus": "listed",
        "data_dir": write_pictures(root / "pictures"),
        "image": write_tower(root / "tower"),
    }
    few_clips = {"overfit": 4}
    found = {}
    for name in ("demo", "demo_long"):
        found[name] = losses(name, root, speech)
    found["demo_overfit64"] = losses("demo_overfit64", root, speech | few_clips)
    found["spectrogram_demo"] = losses("spectrogram_demo", root, speech | few_clips)
    klein = root / "klein"
    call(system, "export", f"--ckpt={root / 'spectrogram_demo'}", f"--out={klein}")
    found["spectrogram_demo_lora"] = losses(
        "spectrogram_demo_lora", root, speech | few_clips | {"base": klein}
    )
    found["music_demo"] = losses("music_demo", root, music)
    for name in ("speech_align_demo", "speech_align_demo_ar"):
        found[name] = losses(name, root, pictures)
    codes = {"stage1": root / "speech_align_demo", "require_r1": 0, "vq_steps": 30}
    found["speech_image_demo"] = losses("speech_image_demo", root, pictures | codes)
    return found


def losses(name: str, root: Path, knobs: dict) -> dict[str, list[float]]:
    """What a recipe logs as losses in its first updates, and when it validates after them."""
    from conftest import call, options

    import system
    import train

    out = root / name
    words = [f"--config={TESTS.parent / 'configs' / name}.yaml", *options(FEW | knobs)]
    call(system, "prepare", *words)
    with contextlib.suppress(SystemExit):  # how a run ends that has something to expect
        call(train, *words, f"--out_dir={out}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        for key, value in row.items():
            if "loss" in key or key == "train/grad_norm":
                found.setdefault(key, []).append(value)
    return found


def tone(seconds: float, pitch: float, seed: int, rate: int = RATE):
    """A buzz of a few harmonics whose loudness comes and goes, and a little noise, float32 (N,)."""
    import numpy as np

    time = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 9))
    loudness = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time + seed)
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.1 * wave * loudness + 0.005 * noise).astype(np.float32)


def write_speech(folder: Path) -> Path:
    """Twelve clips of one to two seconds in LJSpeech's layout."""
    import soundfile

    (folder / "wavs").mkdir(parents=True)
    lines = []
    for n in range(12):
        soundfile.write(folder / "wavs" / f"clip-{n:02d}.wav", tone(1.0 + 0.1 * n, 100 + 8 * n, n), RATE)
        text = " ".join(WORDS[n % 5 : n % 5 + 3 + n // 2])
        lines.append(f"clip-{n:02d}|{text}|{text}\n")
    (folder / "metadata.csv").write_text("".join(lines))
    return folder


def write_music(folder: Path) -> Path:
    """Eight captioned recordings of six seconds."""
    import soundfile

    folder.mkdir()
    lines = ["file,caption\n"]
    for n in range(8):
        soundfile.write(folder / f"{n}.wav", tone(6.0, 120 * (n + 1), n, 16000), 16000)
        lines.append(f"{n}.wav,A slow {WORDS[n]} in D minor.\n")
    (folder / "captions.csv").write_text("".join(lines))
    return folder


def write_pictures(folder: Path) -> Path:
    """Twenty-four small pictures of a coloured block, each described twice, by sounds, in two languages."""
    import numpy as np
    import soundfile
    from PIL import Image

    folder.mkdir()
    kinds = (("red", "blue"), ("square", "bar"), ("left", "right"))
    lines = {"en": [], "ar": []}
    for n in range(24):
        label = "-".join(names[n >> k & 1] for k, names in enumerate(kinds))
        picture = np.zeros((32, 32, 3), np.uint8)
        rows = slice(8, 24 if n & 2 else 14)
        columns = slice(18, 32) if n & 4 else slice(0, 14)
        picture[rows, columns] = (30, 30, 220) if n & 1 else (220, 30, 30)
        Image.fromarray(picture + np.uint8(n)).save(folder / f"{n}.png")
        for k, language in enumerate(lines):
            wav = f"{n}-{language}.wav"
            soundfile.write(folder / wav, tone(1.5, 90 + 10 * n + 3 * k, n, 16000), 16000)
            lines[language].append(
                {
                    "picture": f"{n}.png",
                    "wav": wav,
                    "text": label,
                    "split": "train" if n < 16 else "val",
                    "voice": "",
                    "label": label,
                }
            )
    for language, found in lines.items():
        (folder / f"captions-{language}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def write_tower(folder: Path) -> Path:
    """A small random image tower of CLIP, saved as published ones are."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    transformers.CLIPVisionModelWithProjection(shape).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
