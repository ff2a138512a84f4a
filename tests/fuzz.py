"""Ten thousand inputs that nobody means to give: `python tests/fuzz.py [--examples 10000] [--kind sound]`.

Valid inputs are made on the spot and mutated, others are drawn freely, by hypothesis, at a fixed seed. Each
must end its entry point normally, or in one line on stderr and exit code 2: no traceback, nothing written but
in the folder that was named, in bounded memory and time. All of it runs in this process, by entry.run_main;
a kind's docstring says what is called, and where it stops before a network would cost seconds.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import hypothesis
import hypothesis.configuration
import hypothesis.strategies as st
import numpy as np
import safetensors.torch
import soundfile
import torch
import yaml
from conftest import ROOT, call, options
from hypothesis import HealthCheck, Phase
from hypothesis.internal.conjecture import providers

import config as configs
import optim
import sample
import system
import train
from config import TTSConfig
from corpora import prepare
from entry import run_main
from tracking import checkpoint

MEMORY = 2 * 2**30  # bytes that an input may need above what the process has
CPU_SEC = 60  # that it may take
MODEL = {"text_encoder": "scratch", "width": 8, "layers": 1, "heads": 1, "frame_stack": 4, "euler_steps": 1}
KLEIN = {
    "base": "scratch",
    "width": 8,
    "layers": 2,
    "heads": 1,
    "double_layers": 1,
    "rank": 1,
    "alpha": 1,
    "text_tokens": 8,
    "picture.seconds": 0.1,
    "canvas_height": 16,
    "canvas_width": 16,
}
INTEGERS = [0, 1, 2, 3, 16, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
# what texts and keys are mutated with
PIECES = [
    *"0 -1 1.5 1e999 nan 0b_ 2001-99-99 1:99 true null ~ ~x .. ../ /".split(),
    *"\\|,:;'\"#%&*![]{}-",
    *" \n\r\t\0\x1b\x85\u2028\ufeff\ud800éß中𝄞٣",
    *["&a [*a]", "<<: 1", "!!set {a}", "!!python/name:os.system", "? [a]\n: b", "'''", "|\n x"],
    *["", "9" * 5000, "[" * 500, "{a: " * 500, "a" * 10000, "a " * 3000],
]

# Running


class Place:
    """A folder to run in, and what is in it: `here`, the working directory; `given`, the input; `out`."""

    def __init__(self, root: Path):
        self.root = root
        self.home = root / "a" / "b"  # deep enough for ../../..
        self.here = self.home / "here"
        self.given = self.home / "given"
        self.out = self.home / "out"
        self.here.mkdir(parents=True)

    def clear(self) -> None:
        for folder in (self.given, self.out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of everything but what is in `out`."""
        found = {}
        for folder, _, names in os.walk(self.root):
            if Path(folder) != self.out and self.out not in Path(folder).parents:
                found[folder] = (0, 0)
                for name in names:
                    status = os.lstat(os.path.join(folder, name))
                    found[f"{folder}/{name}"] = (status.st_size, status.st_mtime_ns)
        return found


def ends_well(entry: Callable[[], None], may_lack_memory: bool = False) -> bool:
    """Run an entry point: True where it ends normally, False where it refuses, by one line and exit code 2.

    raises whatever else it does.
    """
    code = None
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
        warnings.catch_warnings(record=True) as warned,
        bounded(),
    ):
        try:
            run_main(entry)
        except SystemExit as e:
            code = e.code
    if not code:
        return True
    lines = err.getvalue().splitlines()
    assert may_lack_memory or "not enough memory" not in err.getvalue(), lines
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not warned, (
        f"exit code {code}: {lines}, {[str(warning.message) for warning in warned]}"
    )
    return False


@contextlib.contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """An allocation above that many bytes fails, as on a small machine; so does what takes too long."""

    def stop(_signal, _frame) -> None:
        raise TimeoutError(f"it took {CPU_SEC} s of CPU")

    former = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, former[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SEC)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, former)
        signal.signal(signal.SIGPROF, handler)


def try_kind(name: str, examples: int, counts: Counter) -> None:
    """Try inputs of a kind and count those accepted and refused; raises a fault with its smallest input."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(hypothesis_in(folder / "hypothesis"))
        kind = KINDS[name](folder)
        place = Place(folder / "place")
        stack.enter_context(contextlib.chdir(place.here))

        @hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        )
        @hypothesis.given(kind.inputs())
        def every_input_ends_well(content):
            place.clear()
            entries = kind.entries(content, place)
            before = place.files()
            accepted = [ends_well(entry, kind.may_lack_memory) for entry in entries]
            assert place.files() == before, "something was written outside the folder that was named"
            counts["accepted" if all(accepted) else "refused"] += 1

        every_input_ends_well()


@contextlib.contextmanager
def hypothesis_in(folder: Path) -> Iterator[None]:
    """What hypothesis keeps goes there, not into the working directory.

    It draws from the numbers in all modules that happen to be loaded; without them inputs are always the
    same.
    """
    hypothesis.configuration.set_hypothesis_home_dir(folder)
    no_constants = lambda: providers._local_constants  # noqa: E731
    try:
        with mock.patch.object(providers, "_get_local_constants", no_constants, create=True):
            yield
    finally:
        hypothesis.configuration.set_hypothesis_home_dir(None)


# Mutations


@st.composite
def mutated(draw, seeds: list[bytes], most: int = 4) -> bytes:
    """One of the contents with up to `most` edits: half of them in its header."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        reach = draw(st.sampled_from([64, len(content)]))
        start = draw(st.integers(0, min(reach, len(content))))
        edit = draw(st.sampled_from(["number", "byte", "insert", "drop", "repeat", "cut"]))
        if edit == "number":
            number = draw(st.sampled_from(INTEGERS))
            order = draw(st.sampled_from(["<", ">"]))
            width = draw(st.sampled_from("HI"))
            packed = struct.pack("<Q", number)[: struct.calcsize(width)]
            content[start : start + len(packed)] = packed if order == "<" else packed[::-1]
        elif edit == "byte":
            content[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
        elif edit == "insert":
            content[start:start] = draw(st.binary(max_size=8))
        else:
            stop = start + draw(st.integers(0, 64))
            if edit == "repeat":
                content[start:start] = content[start:stop]
            else:
                del content[start : stop if edit == "drop" else None]
    return bytes(content)


@st.composite
def mutated_text(draw, seeds: list[str], most: int = 4) -> bytes:
    """One of the texts with up to `most` words, blanks or marks replaced, left out, repeated."""
    tokens = re.findall(r"\w+|\s|[^\w\s]", draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        n = draw(st.integers(0, len(tokens)))
        removed = draw(st.integers(0, 2))
        piece = draw(st.sampled_from(PIECES) | st.text(max_size=5) | st.sampled_from(tokens or [""]))
        tokens[n : n + removed] = [piece]
    return "".join(tokens).encode("utf-8", "surrogatepass")


def texts(seeds: list[str]) -> st.SearchStrategy[bytes]:
    """Files of text: mutated, free, and bytes of other kinds."""
    free = st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    encoded = [seed.encode() for seed in seeds] + [seeds[0].encode("utf-16")]
    return mutated_text(seeds) | mutated(encoded) | free | st.binary(max_size=200)


def values() -> st.SearchStrategy:
    """Whatever JSON and YAML can say."""
    scalars = st.none() | st.booleans() | st.integers() | st.sampled_from(INTEGERS) | st.floats()
    scalars |= st.text(max_size=5) | st.sampled_from(PIECES)
    scalars = scalars.filter(lambda value: not isinstance(value, str) or "\ud800" not in value)
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )


def edits(tree, leaves: st.SearchStrategy, most: int = 2) -> st.SearchStrategy[list[tuple]]:
    """Of a tree of dicts and lists: which of its entries become another, or have another name, or none."""
    kinds = st.sampled_from(["replace", "rename", "drop"])
    return st.lists(st.tuples(st.sampled_from(paths(tree)), kinds, leaves), max_size=most)


def edited(tree, edits: list[tuple]):
    """The tree with those edits."""
    for path, edit, leaf in edits:
        with contextlib.suppress(LookupError, TypeError, AttributeError):  # an edit before it took the entry
            tree = edited_at(tree, path, edit, leaf)
    return tree


def paths(tree, path: tuple = ()) -> list[tuple]:
    """Of all entries of a tree, its own first."""
    found = [path]
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += paths(value, (*path, key))
    elif isinstance(tree, list):
        for n, value in enumerate(tree):
            found += paths(value, (*path, n))
    return found


def edited_at(tree, path: tuple, edit: str, leaf):
    """A copy of the tree in which the entry at `path` is another; the rest is shared."""
    if not path:
        return leaf
    key, *rest = path
    tree = tree.copy()
    if rest:
        tree[key] = edited_at(tree[key], tuple(rest), edit, leaf)
    elif edit == "replace":
        tree[key] = leaf
    else:
        value = tree.pop(key)
        if edit == "rename" and isinstance(tree, dict):
            tree[leaf if isinstance(leaf, (str, int)) else str(leaf)[:20]] = value
    return tree


# Kinds


class Kind(ABC):
    """A kind of input. In `folder` it keeps what does not change from one input to the next."""

    system = "tts"  # to which it belongs
    may_lack_memory = False  # where its numbers are the sizes of networks

    def __init__(self, folder: Path):
        self.folder = folder

    @abstractmethod
    def inputs(self) -> st.SearchStrategy:
        """What hypothesis draws them from."""

    @abstractmethod
    def entries(self, content, place: Place) -> list[Callable[[], None]]:
        """Writes the input into place.given; returns what is run on it."""


class Recipe(Kind):
    """A YAML: `train.py --config FILE --help`, which reads, checks and prints it."""

    def inputs(self):
        recipes = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
        names = st.sampled_from(["system", "data", "corpus", "model", "width", "train", "lr", "expect", "x"])
        tables = st.dictionaries(names, values() | st.dictionaries(names, values(), max_size=3), max_size=3)
        return texts(recipes) | tables.map(lambda table: yaml.safe_dump(table).encode())

    def entries(self, content, place):
        path = place.given / "x.yaml"
        path.write_bytes(content)
        return [lambda: call(train, f"--config={path}", "--help")]


class Override(Kind):
    """Words of a command line: of `train.py ... --help`, and of `sample.py` without a checkpoint."""

    def inputs(self):
        names = set()
        for name in system.SYSTEMS:
            for key in configs.keys(system.find(name).config_class):
                names |= {key, key.split(".")[-1]}
        odd = [
            "",
            "-",
            "=",
            "x",
            "-lr",
            "config",
            "system",
            "seed=",
            "text",
            "snr",
            "seeds",
            "png",
            "out_dir",
        ]
        keys = st.sampled_from(sorted(names)) | st.sampled_from(odd)
        typed = st.sampled_from(PIECES) | st.text(max_size=5) | st.integers().map(str) | st.floats().map(str)
        typed |= st.sampled_from([*system.SYSTEMS, "[en, ar]", "{eval/wer: at most 0.1}"])
        typed = typed.filter(lambda word: "\0" not in word)  # no command line holds one
        usual = [
            "--lr=1e-3",
            "--batch_size=4",
            f"--config={ROOT}/configs/demo.yaml",
            "--dtype=bf16",
            "--seed=5",
        ]
        pairs = st.tuples(keys, typed).map(lambda pair: [f"--{pair[0]}", pair[1]])
        groups = pairs | pairs.map("=".join).map(lambda word: [word])
        groups |= st.tuples(typed | st.sampled_from(usual)).map(list)
        words = st.lists(st.sampled_from(usual), max_size=2)
        return st.tuples(st.sampled_from(["train", "sample"]), words, st.lists(groups, max_size=2))

    def entries(self, content, place):
        script, usual, groups = content
        words = [*usual, *sum(groups, [])]
        if script == "train":
            return [lambda: call(train, *words, "--help")]
        words = [word for word in words if word not in ("-h", "--help")]
        return [
            lambda: call(
                sample, *words, f"--ckpt={place.here}/none.pt", "--text=a", f"--out={place.out}/x.wav"
            )
        ]


class Sound(Kind):
    """A sound file: `audio.py encode FILE PNG`; what sample.py reads of a prompt, and what packing reads."""

    system = "spectrogram"

    def inputs(self):
        rng = np.random.default_rng(0)
        wave = 0.1 * rng.standard_normal((3000, 2))
        forms = [
            "WAV PCM_16",
            "WAV FLOAT",
            "WAVEX PCM_24",
            "RF64 PCM_16",
            "FLAC PCM_16",
            "OGG VORBIS",
            "AIFF PCM_16",
        ]
        forms += ["AU PCM_16", "W64 DOUBLE", "CAF PCM_16", "WAV ULAW", "WAV IMA_ADPCM", "MP3 MPEG_LAYER_III"]
        seeds = []
        for n, form in enumerate(forms):
            kind, subtype = form.split()
            f = io.BytesIO()
            soundfile.write(f, wave[:, : 1 + n % 2], (8000, 22050, 44100)[n % 3], subtype, format=kind)
            seeds.append(f.getvalue())
        return mutated(seeds) | st.binary(max_size=200)

    def entries(self, content, place):
        path = place.given / "x.wav"
        path.write_bytes(content)
        small = ["--n_fft=64", "--hop=32", "--canvas_height=32", "--canvas_width=16"]
        mel = TTSConfig().packed_format()
        clip = prepare.Clip("x", "x", "train", str(path))
        packed = {"name": "ljspeech", "resample": True}
        return [
            lambda: command(
                system.find("spectrogram").commands, "encode", str(path), f"{place.out}/x.png", *small
            ),
            lambda: sample.read_speech(str(path), longest=20.0),
            lambda: prepare.read_clip(place.out, packed, mel, clip),
        ]


class SpectrogramPng(Kind):
    """A PNG with our parameters in it: `audio.py decode FILE WAV`, with further parameters or without."""

    system = "spectrogram"

    def inputs(self):
        from klein import picture

        wave = torch.randn(800, generator=torch.Generator().manual_seed(0))
        seeds = []
        for height, stretch in ((32, 1), (48, 2)):
            p = picture.Picture(8000, 64, 32, 0.1, height, 64, stretch)
            path = self.folder / f"{height}.png"
            picture.save_spectrogram_png(path, wave, p)
            seeds.append(path.read_bytes())
        _, p, facts = picture.load_png(path)
        facts = {"picture": dataclasses.asdict(p), **facts}
        chunks = edits(facts, values()).map(
            lambda drawn: with_text(seeds[1], json.dumps(edited(facts, drawn)))
        )
        chunks |= texts([json.dumps(facts)]).map(lambda content: with_text(seeds[1], content))
        known = [f"--{field}" for field in facts["picture"]]
        typed = st.sampled_from(INTEGERS).map(str) | st.sampled_from(
            ["-1", "0.1", "nan", "inf", "fixed", "x", "1e300"]
        )
        knobs = st.lists(st.tuples(st.sampled_from(known), typed), max_size=2)
        return st.tuples(chunks | mutated(seeds) | mutated(seeds).map(with_sums), st.just([]) | knobs)

    def entries(self, content, place):
        png, knobs = content
        path = place.given / "x.png"
        path.write_bytes(png)
        words = [f"{key}={value}" for key, value in knobs]
        codec = system.find("spectrogram").commands
        return [lambda: command(codec, "decode", str(path), f"{place.out}/x.wav", *words)]


def with_text(png: bytes, text: str | bytes) -> bytes:
    """A PNG whose tEXt chunk `nanoaudio` is another."""
    text = text.encode() if isinstance(text, str) else text
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in png_chunks(png):
        data = b"nanoaudio\0" + text if name == b"tEXt" else data
        parts.append(png_chunk(name, data))
    return b"".join(parts)


def with_sums(png: bytes) -> bytes:
    """A damaged PNG whose checksums are right again, as far as it has chunks."""
    return png[:8] + b"".join(png_chunk(name, data) for name, data in png_chunks(png))


def png_chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found = []
    rest = png[8:]
    while len(rest) >= 12:
        size = int.from_bytes(rest[:4], "big")
        found.append((rest[4:8], rest[8 : 8 + size]))
        rest = rest[12 + size :]
    return found


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


class Table(Kind):
    """A corpus's table beside four good recordings: `data.py ljspeech | librispeech | music --root --out`."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.sounds = folder / "sounds"
        self.sounds.mkdir()
        rng = np.random.default_rng(0)
        for n in range(4):
            wave = 0.1 * rng.standard_normal(2500)
            for ending in ("wav", "flac"):
                soundfile.write(self.sounds / f"a{n}.{ending}", wave, 22050)

    def inputs(self):
        published = ["a{}|The {} hats.|The {} hats.", "a{}|{} hats.", "wavs/a{}.wav|A hat|a hat"]
        tables = [("metadata.csv", [lines(form) for form in published])]
        tables.append(("a.trans.txt", [lines("a{} THE HAT")]))
        if "music" in system.SYSTEMS:
            listed = [{"wav": f"wavs/a{n}.wav", "label": "A slow flute."} for n in range(4)]
            tables.append(("captions.csv", ["file,caption\n" + lines('wavs/a{}.wav,"A slow, sad flute"')]))
            tables.append(("clips.json", [json.dumps(listed, indent=1)]))
        drawn = [st.tuples(st.just(name), texts(seeds)) for name, seeds in tables]
        return st.one_of(drawn)

    def entries(self, content, place):
        name, table = content
        (place.given / name).write_bytes(table)
        (place.given / "wavs").symlink_to(self.sounds)
        for path in self.sounds.glob("*.flac"):
            (place.given / path.name).symlink_to(path)
        corpus = {"metadata.csv": "ljspeech", "a.trans.txt": "librispeech"}.get(name, "music")
        root = place.given / name if name.endswith(".json") else place.given
        words = [f"--root={root}", f"--out={place.out}", "--workers=1"]
        reader = lambda: prepare.main(system.reader_of)  # noqa: E731
        return [lambda: command(reader, corpus, *words)]


def lines(form: str) -> str:
    return "".join(form.format(n, n, n) + "\n" for n in range(4))


def command(entry: Callable[[], None], *words: str) -> None:
    """As conftest.call, of a function that is no module's main."""
    holder = type(sys)("command")
    holder.main = entry
    call(holder, *words)


class Adapter(Kind):
    """A LoRA's file, or a folder of peft's: read and put on top of a tiny Klein, as by `sample.py --lora`."""

    system = "spectrogram"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.network = system.build(system.load_config("", ["--system=spectrogram", *options(KLEIN)])).eval()

    def inputs(self):
        from klein.lora import lora_layers

        layers = {}
        for path, lora in list(lora_layers(self.network.transformer).items())[:3]:
            layers[path] = {"A": lora.A.detach(), "B": lora.B.detach()}
        tensors = {}
        for path, layer in layers.items():
            tensors[f"transformer.{path}.lora_A.weight"] = layer["A"]
            tensors[f"transformer.{path}.lora_B.weight"] = layer["B"]
        peft = {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}
        bfl = {
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(2, 8),
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(24, 2),
        }
        kohya = {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 8),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(24, 2),
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
        }
        first = next(iter(layers))
        settings = {"r": 1, "lora_alpha": 1.0, "use_rslora": False, "alpha_pattern": {first: 2.0}}
        header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
        seeds = [safetensors.torch.save(tensors, header)]
        seeds += [safetensors.torch.save(layout) for layout in (peft, bfl, kohya)]
        self.layouts = {"diffusers": tensors, "peft": peft, "bfl": bfl, "kohya": kohya}
        self.settings = settings
        layouts = [
            st.tuples(st.just(name), edits(tree, odd_tensors())) for name, tree in self.layouts.items()
        ]
        names = st.sampled_from(["x.safetensors", "adapter_model.safetensors"])
        peft_file = edits(settings, values()) | texts([json.dumps(settings)])
        return st.tuples(names, st.one_of(layouts) | mutated(seeds), peft_file)

    def entries(self, content, place):
        name, adapter, settings = content
        if isinstance(settings, list):
            settings = json.dumps(edited(self.settings, settings)).encode()
        if isinstance(adapter, tuple):
            layout, drawn = adapter
            adapter = as_safetensors(edited(self.layouts[layout], drawn), settings.decode("utf-8", "replace"))
        (place.given / name).write_bytes(adapter)
        (place.given / "adapter_config.json").write_bytes(settings)
        return [
            lambda: self.network.load_adapter(str(place.given / name)),
            lambda: self.network.load_adapter(str(place.given)),
        ]


def as_safetensors(tree: dict, settings: str) -> bytes:
    tensors = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            if torch.is_tensor(value):
                tensors[str(key).encode("utf-8", "replace").decode()] = value.clone()
    return safetensors.torch.save(tensors, {"lora_adapter_metadata": settings})


def odd_tensors() -> st.SearchStrategy:
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 24]), max_size=4)
    fills = st.sampled_from([0.0, 1.0, -1.0, 1e30, float("inf"), float("nan")])
    kinds = st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
        + [torch.complex64, torch.float8_e4m3fn]
    )
    tensors = st.tuples(shapes, fills, kinds).map(lambda drawn: odd_tensor(*drawn))
    names = st.sampled_from(
        [
            "x",
            "",
            "transformer.x.lora_A.weight",
            ".alpha",
            "text_encoder.x.lora_A.weight",
            "transformer..alpha",
            "\0",
        ]
    )
    return tensors | names


def odd_tensor(shape: list[int], fill: float, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.full(shape, fill)
    return tensor.nan_to_num(0).to(dtype) if not dtype.is_floating_point else tensor.to(dtype)


class Checkpoint(Kind):
    """A checkpoint of a tiny text-to-speech: loaded as by sample.py, and resumed from as by train.py."""

    may_lack_memory = True

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config = configs.load(TTSConfig, "", options(MODEL))
        self.network = system.build(self.config)
        self.ema = optim.EMA(self.network, 0.9)
        self.optimizers = optim.make_optimizers(self.network, 0.1, 0.1, 0.1)
        for p in self.network.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        for optimizer in self.optimizers:
            optimizer.step()
        self.state = {
            "step": 1,
            "seconds": 1.0,
            "config": configs.to_dict(self.config),
            "model": checkpoint.trained_weights(self.network),
            "ema": self.ema.shadow,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def inputs(self):
        leaves = values() | odd_tensors() | st.sampled_from(PIECES[:40])
        whole = as_checkpoint(self.state)
        small = as_checkpoint({"config": {"system": "tts"}, "model": {}, "ema": {}, "step": 1})
        return edits(self.state, leaves) | mutated([whole, small]) | st.binary(max_size=200)

    def entries(self, content, place):
        if isinstance(content, list):
            content = as_checkpoint(edited(self.state, content))
        path = place.given / "run" / "checkpoints" / "step_0000001.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        config = configs.overridden(self.config, [f"--out_dir={place.given / 'run'}"])
        return [
            lambda: system.load(str(path), torch.device("cpu")) and None,
            lambda: checkpoint.resume(config, self.network, self.ema, self.optimizers) and None,
        ]


def as_checkpoint(state) -> bytes:
    f = io.BytesIO()
    torch.save(state, f)
    return f.getvalue()


class Prompts(Kind):
    """A file of prompts, or a --text: all that `sample.py` does with them before the network speaks."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config = configs.load(TTSConfig, "", options(MODEL))
        self.network = system.build(self.config)

    def inputs(self):
        seeds = ["Anna bought two hats.\nDr. Jones paid $1,234.50 at 3:45 p.m. on 12/31/1999.\n"]
        seeds += ["3.5 % of 10^6 & MCMXCIX, 1st-2nd; 1,000,000,000,000 km/h; https://x.org/?a=1 a@b.c\n"]
        return texts(seeds)

    def entries(self, content, place):
        path = place.given / "prompts.txt"
        path.write_bytes(content)

        def read() -> None:
            texts = [sample.check_text(text) for text in sample.evaluator.read_prompts(str(path))]
            asked = argparse.Namespace(seconds=0.0, speech=[], seed=0, seeds=1)
            sample.make_prompts(asked, self.config, self.network, texts)

        return [read]


ALL = {
    "recipe": Recipe,
    "override": Override,
    "sound": Sound,
    "png": SpectrogramPng,
    "table": Table,
    "adapter": Adapter,
    "checkpoint": Checkpoint,
    "prompts": Prompts,
}
KINDS = {name: kind for name, kind in ALL.items() if kind.system in system.SYSTEMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10000, help="inputs in all, as many of each kind")
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    o = parser.parse_args()
    print("| inputs of | accepted | refused | peak memory, MB |\n|---|---|---|---|", flush=True)
    failed = False
    for name in o.kind:
        counts = Counter()
        try:
            try_kind(name, max(1, o.examples // len(o.kind)), counts)
        except Exception:  # those of several faults come as a group
            traceback.print_exc()
            failed = True
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"| {name} | {counts['accepted']} | {counts['refused']} | {peak} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
