"""Corpora: reading and packing them whatever goes wrong, restarting that, which clips are batched, caches."""

import collections
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import config as configs
import data
import system
from config import Mel, UserError, WriteError
from corpora import prepare, shards, speech
from tts import TextToSpeech

MEL = Mel()
ROOT = Path(__file__).resolve().parents[1]


def write_recordings(root: Path, count: int, rate: int = MEL.sample_rate, first: int = 0) -> list[str]:
    """`count` wavs of noise, 0.3 to 1.2 s, under `root`; returns their lines of metadata.csv."""
    (root / "wavs").mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(first, first + count):
        rng = torch.Generator().manual_seed(n)
        wave = torch.randn(int(rate * (0.3 + 0.9 * torch.rand(1, generator=rng).item())), generator=rng) * 0.1
        audio.save_wav(root / "wavs" / f"c{n:04d}.wav", wave, rate)
        lines.append(f"c{n:04d}|Raw {n}|Text number {n}, é.")
    return lines


def write_metadata(root: Path, lines: list[str]) -> None:
    (root / "metadata.csv").write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "CLIPS_PER_SHARD", 5)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """23 good clips in LJSpeech's layout."""
    root = tmp_path_factory.mktemp("raw")
    write_metadata(root, write_recordings(root, 23))
    return root


@pytest.fixture(scope="module")
def packed(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "corpus"
    pack_recordings(raw, out, workers=1)
    return out


def config_for(folder: Path, *overrides: str) -> configs.Config:
    return system.load_config(
        "", ["--data_dir", str(folder), "--text_encoder", "scratch", "--batch_size", "4", *overrides]
    )


def pack_recordings(
    root: Path, out: Path, workers: int = 1, resample: bool = False, strict: bool = False, share=(0, 1)
) -> None:
    """What `python data.py ljspeech` does."""
    clips, skipped = speech.read_ljspeech(root)
    corpus = {"name": "ljspeech", "resample": resample}
    format = dataclasses.asdict(MEL)
    read = functools.partial(prepare.read_clip, out, corpus, format)
    shards.pack(out, corpus, clips, skipped, format, read, workers, strict, share)


def two_frames(_clip: shards.Clip) -> np.ndarray:
    return np.ones((2, 3), np.float16)


def test_a_text_with_half_a_letter_is_left_out_by_name(tmp_path):
    """JSON can say it, as \\ud800; a file cannot hold it."""
    texts = {"a": "A hat.", "b": "\ud800", "c": "Two hats."}
    clips = [shards.Clip(name, text, "val" if name == "c" else "train") for name, text in texts.items()]
    shards.pack(tmp_path, {"name": "x"}, clips, [], {"hop": 3}, two_frames, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["skipped"] == ["'b': not Unicode"] and index["clips"] == {"train": 1, "val": 1, "test": 0}


def run_cli(*words, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "data.py", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
    )


def index_of(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())


# Packing


def test_what_is_wrong_with_a_clip_is_named_and_the_others_keep_their_own_text_and_sound(tmp_path, capfd):
    lines = write_recordings(tmp_path, 24)
    wavs = tmp_path / "wavs"
    (wavs / "c0001.wav").write_bytes(b"RIFF, not really")
    (wavs / "c0002.wav").unlink()
    (wavs / "c0003.wav").write_bytes((wavs / "c0003.wav").read_bytes()[:9000])
    audio.save_wav(wavs / "c0004.wav", torch.rand(16000), 16000)
    audio.save_wav(wavs / "c0005.wav", torch.rand(500), MEL.sample_rate)
    audio.save_wav(wavs / "c0006.wav", torch.zeros(20000), MEL.sample_rate)
    lines[7] = "c0007|| "
    lines[8] = "c0008|only the transcript|"
    lines[9] = "c0009|more|than|three fields"
    lines[10] = "c0010|caf\xe9|caf\xe9".encode("latin-1")
    lines[11] = "../c0011|x|x"
    write_metadata(tmp_path, [*lines, "c0012|again|Another text", "", "\ufeff"])
    pack_recordings(tmp_path, tmp_path / "out", workers=2)
    skipped, printed = index_of(tmp_path / "out")["skipped"], capfd.readouterr().out
    expected = {
        "c0001": "not a readable sound file",
        "c0002": "is missing",
        "c0003": "truncated",
        "c0004": "16000 Hz instead of 22050",
        "c0005": "0.02 s is below",
        "c0006": "silent",
        "line 8 (c0007)": "empty text",
        "line 10 (c0009)": "4 fields",
        "line 11 (c0010)": "not UTF-8",
        "line 12 (../c0011)": "no file name",
        "line 25 (c0012)": "duplicate id",
    }
    for where, reason in expected.items():
        assert sum(where in line and reason in line for line in skipped) == 1, where
        assert sum(where in line and reason in line for line in printed.splitlines()) == 1, where
    # the last line is a lone byte order mark
    assert len(skipped) == len(expected) + 1
    corpus = data.Corpus(config_for(tmp_path / "out"))
    clips = corpus.clips("train") + corpus.clips("val")
    assert sorted(c.id for c in clips) == ["c0000", "c0008", *(f"c{n:04d}" for n in range(12, 24))]
    for clip in clips:
        number = int(clip.id[1:])
        assert clip.text == ("only the transcript" if number == 8 else f"Text number {number}, é.")
        assert torch.equal(
            corpus.log_mel(clip), audio.log_mel(audio.load_wav(clip.wav, MEL.sample_rate), MEL).half().float()
        )


def test_a_clip_without_a_sample_is_skipped_by_name(tmp_path):
    write_metadata(tmp_path, write_recordings(tmp_path, 6))
    audio.save_wav(tmp_path / "wavs/c0002.wav", torch.zeros(0), MEL.sample_rate)
    pack_recordings(tmp_path, tmp_path / "out")
    (line,) = index_of(tmp_path / "out")["skipped"]
    assert line.startswith("c0002: ") and "not a single sample" in line
    assert sum(index_of(tmp_path / "out")["clips"].values()) == 5


def test_a_clip_of_the_wrong_scale_is_skipped_by_name(tmp_path):
    write_metadata(tmp_path, write_recordings(tmp_path, 6))
    wave = 3000 * torch.randn(20000).numpy()
    soundfile.write(tmp_path / "wavs/c0002.wav", wave, MEL.sample_rate, subtype="FLOAT")
    pack_recordings(tmp_path, tmp_path / "out")
    (line,) = index_of(tmp_path / "out")["skipped"]
    assert line.startswith("c0002: ") and "peaks at" in line


def with_lengths(path: Path, whole: int, samples: int) -> None:
    """Put other lengths into the header of a wav: of the file, and of its samples; bytes."""
    content = bytearray(path.read_bytes())
    start = content.find(b"data") + 4
    content[4:8] = whole.to_bytes(4, "little")
    content[start : start + 4] = samples.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    "whole, samples",
    [
        (2**32 - 1, 2**32 - 1),  # ffmpeg
        (2**32 - 1, 2**32 - 37),
        (2**31 + 36, 2**31),
        (2**31 - 1, 2**31 - 37),
        (2**31 - 4096 + 36, 2**31 - 4096),  # sox
        (0, 0),
        (36, 0),
        (2**32 - 1, 0),
    ],
)
def test_a_length_that_means_unknown_is_no_truncation_and_every_sample_is_read(tmp_path, whole, samples):
    write_recordings(tmp_path, 1)
    path = tmp_path / "wavs/c0000.wav"
    expected = audio.load_wav(path, MEL.sample_rate)
    with_lengths(path, whole, samples)
    clip = shards.Clip("c0000", "x", "train", str(path))
    assert torch.equal(prepare.read_recording(clip, MEL.sample_rate, resample=False), expected)


@pytest.mark.parametrize("kind", ["wav", "w64", "aiff", "au"])
def test_a_length_that_is_not_met_is_a_truncation(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, 0.1 * torch.randn(20000).numpy(), MEL.sample_rate, subtype="PCM_16")
    clip = shards.Clip("a", "x", "train", str(path))
    assert len(prepare.read_recording(clip, MEL.sample_rate, resample=False)) == 20000
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match="truncated"):
        prepare.read_recording(clip, MEL.sample_rate, resample=False)


def test_an_empty_wav_with_a_tag_behind_it_is_empty(tmp_path):
    path = tmp_path / "a.wav"
    audio.save_wav(path, torch.zeros(0), 22050)
    tag = b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf59.27.100\0"
    path.write_bytes(path.read_bytes() + tag)
    with_lengths(path, path.stat().st_size - 8, 0)
    with pytest.raises(UserError, match="not a single sample"):
        audio.load_wav(path, 22050)


def test_an_error_that_nobody_foresaw_in_one_clip_names_it_and_leaves_the_others(tmp_path, capfd):
    clips = [shards.Clip(f"c{n}", "x", "train") for n in range(4)]

    def read(clip: shards.Clip) -> np.ndarray:
        if clip.id == "c2":
            raise ZeroDivisionError("two\nlines")
        return np.ones((5, MEL.n_mels), np.float16)

    assert shards.pack_shard(tmp_path, "plan", read, 0, clips) == 4
    header, packed, _ = shards.read_shard(tmp_path, 0, "plan")
    assert [clip.id for clip in packed] == ["c0", "c1", "c3"]
    assert header["skipped"] == ["c2: ZeroDivisionError('two\\nlines')"]
    assert "skipped c2: ZeroDivisionError" in capfd.readouterr().out


def test_the_column_in_words_is_kept_and_the_typed_one_is_normalised_where_there_is_no_other(tmp_path):
    write_metadata(tmp_path, ["a|$5|5  Dollars, “é”", "b|It's 3 p.m.|", "c|Dr. Li & Co."])
    texts, skipped = speech.read_transcripts([tmp_path / "metadata.csv"], "|", 3)
    assert {name: words for name, (words, _) in texts.items()} == {
        "a": "5  Dollars, “é”",
        "b": "It's three p.m.",
        "c": "Doctor Li and Company.",
    }
    assert not skipped


@pytest.mark.parametrize(
    "written", ["{}.wav", "wavs/{}", "wavs/{}.wav", "./wavs/{}.wav", "wavs\\{}.wav", "{root}/wavs/{}.wav"]
)
def test_an_id_may_be_written_as_the_path_of_its_recording(tmp_path, written):
    names = [line.split("|")[0] for line in write_recordings(tmp_path, 4)]
    write_metadata(tmp_path, [written.format(name, root=tmp_path.resolve()) + "|It is 5." for name in names])
    clips, skipped = speech.read_ljspeech(tmp_path)
    assert [clip.id for clip in clips] == names and not skipped
    assert [Path(clip.wav) for clip in clips] == [tmp_path.resolve() / f"wavs/{name}.wav" for name in names]
    assert {clip.text for clip in clips} == {"It is five."}


def test_recordings_may_lie_beside_the_table_or_in_folders_and_be_flac(tmp_path):
    wave = 0.1 * torch.randn(20000).numpy()
    for place in ("a.wav", "clips/b.flac", "wavs/f3/c.flac", "wavs/d.WAV", "wavs/e.wav", "e.wav"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, MEL.sample_rate, format=path.suffix[1:].upper())
    names = ["a", "clips/b.flac", "f3/c", "d", "e", "f"]
    write_metadata(tmp_path, [f"{name}|Some words." for name in names])
    clips, skipped = speech.read_ljspeech(tmp_path)
    found = [Path(clip.wav).relative_to(tmp_path.resolve()).as_posix() for clip in clips]
    assert found == ["a.wav", "clips/b.flac", "wavs/f3/c.flac", "wavs/d.WAV", "wavs/e.wav", "wavs/f.wav"]
    assert not skipped


def test_tabs_separate_where_every_line_has_one_and_none_a_bar(tmp_path):
    names = [line.split("|")[0] for line in write_recordings(tmp_path, 4)]
    write_metadata(tmp_path, [f"{name}\tIt is 5.\tIt is five." for name in names])
    clips, skipped = speech.read_ljspeech(tmp_path)
    assert {clip.text for clip in clips} == {"It is five."} and len(clips) == 4 and not skipped
    write_metadata(tmp_path, [f"{name}|It\tis 5." for name in names])
    assert [clip.id for clip in speech.read_ljspeech(tmp_path)[0]] == names


def test_the_same_recording_under_two_names_is_taken_once(tmp_path):
    write_recordings(tmp_path, 1)
    write_metadata(tmp_path, ["c0000|One.", "wavs/c0000.wav|Two."])
    clips, skipped = speech.read_ljspeech(tmp_path)
    assert [clip.text for clip in clips] == ["One."] and "line 2 (c0000): duplicate id" in skipped[0]


@pytest.mark.parametrize("last", ["anna", "en", "1.52"])
def test_a_last_column_that_is_no_transcript_is_refused_and_not_spoken(tmp_path, last):
    names = [line.split("|")[0] for line in write_recordings(tmp_path, 4)]
    write_metadata(tmp_path, [f"{name}|A sentence of several words.|{last}" for name in names])
    with pytest.raises(UserError, match=r"metadata.csv: its last column is too short .*id\|transcript"):
        speech.read_ljspeech(tmp_path)
    write_metadata(tmp_path, [f"{name}|{last}|A sentence of several words." for name in names])
    assert {clip.text for clip in speech.read_ljspeech(tmp_path)[0]} == {"A sentence of several words."}


def test_strict_refuses_and_a_mended_clip_is_tried_again(tmp_path):
    lines = write_recordings(tmp_path, 8)
    good = (tmp_path / "wavs/c0003.wav").read_bytes()
    (tmp_path / "wavs/c0003.wav").write_bytes(good[:5000])
    write_metadata(tmp_path, lines)
    with pytest.raises(UserError, match="c0003.*truncated"):
        pack_recordings(tmp_path, tmp_path / "out", workers=1, strict=True)
    assert not (tmp_path / "out/index.json").exists()
    (tmp_path / "wavs/c0003.wav").write_bytes(good)
    pack_recordings(tmp_path, tmp_path / "out", workers=1, strict=True)
    assert index_of(tmp_path / "out")["clips"] == {"train": 7, "val": 1, "test": 0}


def test_more_than_half_skipped_is_refused_and_resampling_saves_it(tmp_path):
    lines = write_recordings(tmp_path, 4) + write_recordings(tmp_path, 6, rate=16000, first=4)
    write_metadata(tmp_path, lines)
    with pytest.raises(UserError, match="6 clips had to be skipped.*--resample"):
        pack_recordings(tmp_path, tmp_path / "out", workers=1)
    pack_recordings(tmp_path, tmp_path / "out", workers=1, resample=True)
    assert sum(index_of(tmp_path / "out")["clips"].values()) == 10


def test_the_published_split_is_used_by_id(tmp_path):
    write_recordings(tmp_path, 3)
    for name, n in (("LJ001-0110", 0), ("LJ001-0001", 1), ("LJ001-0051", 2)):
        (tmp_path / "wavs" / f"c{n:04d}.wav").rename(tmp_path / "wavs" / f"{name}.wav")
    write_metadata(tmp_path, ["LJ001-0110|a|a", "LJ001-0001|b|b", "LJ001-0051|c|c"])
    clips, _ = speech.read_ljspeech(tmp_path)
    lines = (ROOT / "assets/ljspeech_split.txt").read_text().splitlines()
    splits = collections.Counter(line.split()[0] for line in lines if line[0] != "#")
    assert {c.id: c.split for c in clips} == {
        "LJ001-0110": "val",
        "LJ001-0001": "train",
        "LJ001-0051": "test",
    }
    assert splits == {"val": 100, "test": 500}


def test_a_split_beside_the_table_comes_before_the_published_one(tmp_path):
    write_recordings(tmp_path, 3)
    write_metadata(tmp_path, ["c0000|a|a", "c0001|b|b", "c0002|c|c"])
    (tmp_path / "split.txt").write_text("# mine\nval c0001\ntest c0002\n")
    clips, _ = speech.read_ljspeech(tmp_path)
    assert [clip.split for clip in clips] == ["train", "val", "test"]


@pytest.mark.parametrize(
    "line, message", [("val c0009", "c0009 is in no line"), ("c0001", "expected `val <id>`")]
)
def test_a_split_of_other_lines_or_clips_is_refused(tmp_path, line, message):
    write_recordings(tmp_path, 1)
    write_metadata(tmp_path, ["c0000|a|a"])
    (tmp_path / "split.txt").write_text(line)
    with pytest.raises(UserError, match=message):
        speech.read_ljspeech(tmp_path)


def test_a_rerun_makes_only_what_is_not_whole(raw, tmp_path, small_shards):
    pack_recordings(raw, tmp_path, workers=1)
    first, times = index_of(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.glob("*_0*")}
    (tmp_path / "clips_00001.jsonl").unlink()
    (tmp_path / "rows_00003.npy").write_bytes((tmp_path / "rows_00003.npy").read_bytes()[:-100])
    with pytest.raises(UserError, match="shard 1 is missing or damaged"):
        data.Corpus(config_for(tmp_path))
    pack_recordings(raw, tmp_path, workers=2)
    changed = {p.name for p, t in times.items() if p.stat().st_mtime_ns != t}
    assert changed == {"clips_00001.jsonl", "rows_00001.npy", "clips_00003.jsonl", "rows_00003.npy"}
    assert index_of(tmp_path) == first
    (tmp_path / "rows_00003.npy").write_bytes(b"")
    with pytest.raises(UserError, match="shard 3 is missing or damaged"):
        data.Corpus(config_for(tmp_path))


def test_shares_of_several_machines_make_what_one_makes(raw, tmp_path, small_shards, capsys):
    pack_recordings(raw, tmp_path / "one", workers=2)
    pack_recordings(raw, tmp_path / "two", workers=1, share=(0, 2))
    assert not (tmp_path / "two/index.json").exists() and "still to be made" in capsys.readouterr().out
    made = {p.name for p in (tmp_path / "two").glob("rows*")}
    assert made == {f"rows_0000{n}.npy" for n in (0, 2, 4)}
    pack_recordings(raw, tmp_path / "two", workers=1, share=(1, 2))
    assert index_of(tmp_path / "one") == index_of(tmp_path / "two")


def test_a_killed_run_leaves_no_half_shard_and_is_taken_up(tmp_path):
    write_metadata(tmp_path, write_recordings(tmp_path, 120))
    out = tmp_path / "out"
    words = ["ljspeech", f"--root={tmp_path}", f"--out={out}", "--workers=1"]
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    start += "import system; from corpora import prepare, shards; shards.CLIPS_PER_SHARD = 2\n"
    # at the first shard
    kill = "import os\nclass Bar(shards.tqdm):\n    def update(self, count):\n        os.killpg(0, 9)\n"
    kill += "shards.tqdm = Bar\n"
    work = f"sys.argv[1:] = {words!r}; prepare.main(system.reader_of)"
    killed = subprocess.run(
        [sys.executable, "-c", start + kill + work], capture_output=True, start_new_session=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert list(out.glob("clips*.jsonl")) and not (out / "index.json").exists()
    plan = json.loads((out / "clips_00000.jsonl").read_text().split("\n")[0])["plan"]
    assert all(shards.read_shard(out, int(path.stem[-5:]), plan) for path in out.glob("clips*.jsonl"))
    (out / "rows_00059.npy.123.part").write_bytes(b"half")
    subprocess.run([sys.executable, "-c", start + work], check=True, capture_output=True)
    assert sum(index_of(out)["clips"].values()) == 120 and not list(out.glob("*.part"))


def kill_itself(clip: shards.Clip) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def say_so_and_outlive(pipe: int, clip: shards.Clip) -> None:
    os.write(pipe, b"packing")
    time.sleep(30)
    os.write(pipe, b"still")


def find_no_room(clip: shards.Clip) -> None:
    raise WriteError("no room for its wave")


def pack_one(out: Path, read: Callable) -> None:
    clips = [shards.Clip("a", "A.", "train")]
    shards.pack(out, {"name": "ljspeech"}, clips, [], {"sample_rate": 8000}, read, 1)


def test_a_process_that_is_killed_while_it_packs_ends_it_in_one_line(tmp_path):
    with pytest.raises(UserError, match="a process that packed was killed.*pack again, which goes on"):
        pack_one(tmp_path, kill_itself)


def test_no_process_outlives_the_one_that_packs(tmp_path):
    reading, writing = os.pipe()
    packing = multiprocessing.get_context("fork").Process(
        target=pack_one, args=(tmp_path, functools.partial(say_so_and_outlive, writing))
    )
    packing.start()
    os.close(writing)
    assert os.read(reading, 7) == b"packing"
    packing.kill()
    # which ends once nobody can write any more
    assert os.read(reading, 7) == b""
    os.close(reading)


def test_a_clip_is_not_skipped_for_want_of_room(tmp_path):
    with pytest.raises(WriteError, match="no room"):
        pack_one(tmp_path, find_no_room)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), shards.atomic_write(tmp_path / "x") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_another_corpus_is_not_packed_over_this_one(packed, tmp_path):
    write_metadata(tmp_path, write_recordings(tmp_path, 4))
    with pytest.raises(UserError, match="already holds another corpus"):
        pack_recordings(tmp_path, packed, workers=1)


def test_statistics_are_those_of_the_training_clips(packed):
    corpus = data.Corpus(config_for(packed))
    values = torch.cat([corpus.log_mel(clip) for clip in corpus.clips("train")]).double()
    assert corpus.mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert corpus.std == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_real_recordings_are_packed_as_their_log_mel(recordings, tmp_path):
    pack_recordings(recordings, tmp_path, workers=2, strict=True)
    corpus = data.Corpus(config_for(tmp_path))
    lines = dict(line.split("|")[::2] for line in (recordings / "metadata.csv").read_text().splitlines())
    clips = sum((corpus.clips(split) for split in shards.SPLITS), [])
    assert len(clips) == 64 and len(corpus.clips("val")) == 2 and len(corpus.clips("test")) == 16
    for clip in clips:
        wav = recordings / "wavs" / f"{clip.id}.wav"
        wave = audio.load_wav(wav, MEL.sample_rate)
        assert clip.text == lines[clip.id].strip() and clip.wav == str(wav.resolve())
        torch.testing.assert_close(corpus.log_mel(clip), audio.log_mel(wave, MEL), rtol=1e-3, atol=1e-3)


def test_the_archive_is_fetched_and_unpacked_as_the_root(raw, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar.bz2", "w:bz2") as tar:
        tar.add(raw, "LJSpeech-1.1")
    monkeypatch.setitem(speech.ARCHIVES, "ljspeech", ((tmp_path / "x.tar.bz2").as_uri(), "LJSpeech-1.1"))
    speech.download("ljspeech", tmp_path / "new/lj")
    assert (tmp_path / "new/lj/metadata.csv").read_bytes() == (raw / "metadata.csv").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["lj"]
    monkeypatch.setitem(speech.ARCHIVES, "ljspeech", ((tmp_path / "nowhere").as_uri(), "LJSpeech-1.1"))
    with pytest.raises(UserError, match="cannot be had"):
        speech.download("ljspeech", tmp_path / "other")


# LibriSpeech


def write_librispeech(root: Path, speakers: int, utterances: int = 3, rate: int = 16000) -> None:
    """Noise of 0.4 to 0.8 s in LibriSpeech's layout: `speakers` of one chapter each."""
    for speaker in range(100, 100 + speakers):
        folder = root / "LibriSpeech/train-clean-100" / str(speaker) / "7"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(speaker)
        lines = [f"{speaker}-7-{n:04d} I SAID IT'S NUMBER {speaker} I'M {n}\n" for n in range(utterances)]
        (folder / f"{speaker}-7.trans.txt").write_text("".join(lines))
        for n in range(utterances):
            wave = 0.1 * rng.standard_normal(int(rate * rng.uniform(0.4, 0.8)))
            soundfile.write(folder / f"{speaker}-7-{n:04d}.flac", wave, rate)


def test_librispeech_is_read_from_any_folder_above_it_as_sentences(tmp_path):
    write_librispeech(tmp_path, 2)
    clips, skipped = speech.read_librispeech(tmp_path)
    assert not skipped and [clip.id for clip in clips] == [
        f"{speaker}-7-{n:04d}" for speaker in (100, 101) for n in range(3)
    ]
    assert clips[1].text == "I said it's number 100 I'm 1." and Path(clips[1].wav).name == "100-7-0001.flac"
    # too few speakers to hold one out
    assert [clip.split for clip in clips] == ["train"] * 5 + ["val"]
    assert speech.read_librispeech(tmp_path / "LibriSpeech/train-clean-100") == (clips, [])


def test_librispeech_holds_speakers_out_whole(tmp_path):
    write_librispeech(tmp_path, 60, utterances=2)
    clips, _ = speech.read_librispeech(tmp_path)
    speakers = {
        split: {clip.id.split("-")[0] for clip in clips if clip.split == split} for split in shards.SPLITS
    }
    assert [len(speakers[split]) for split in shards.SPLITS] == [58, 1, 1]
    assert sum(len(found) for found in speakers.values()) == len(set.union(*speakers.values())) == 60


# Reading


def test_a_raw_folder_is_packed_beside_and_found_again(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_for(raw)
    with pytest.raises(UserError, match="no packed corpus there.*system.py prepare --config"):
        data.Corpus(config)
    TextToSpeech.prepare(config)
    corpus, other = data.Corpus(config), config_for(raw, "--n_mels", "64")
    assert corpus.folder.parent == Path("data/packed") and len(corpus.clips("train")) == 22
    assert corpus.folder != shards.packed_dir(other, dataclasses.asdict(other.mel))


def test_another_mel_or_format_is_refused_by_name(packed, tmp_path):
    with pytest.raises(UserError, match="packed with n_mels 80, but 64 is wanted"):
        data.Corpus(config_for(packed, "--n_mels", "64"))
    shutil.copytree(packed, tmp_path / "p")
    (tmp_path / "p/index.json").write_text(json.dumps(index_of(packed) | {"format": 7}))
    with pytest.raises(UserError, match="packed with format 7, but 2 is wanted"):
        data.Corpus(config_for(tmp_path / "p"))
    (tmp_path / "p/index.json").write_text(json.dumps(index_of(packed) | {"plan": "x"}))
    with pytest.raises(UserError, match="shard 0 is missing or damaged"):
        data.Corpus(config_for(tmp_path / "p"))
    (tmp_path / "p/index.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="damaged index.json"):
        data.Corpus(config_for(tmp_path / "p"))


def test_overfit_makes_every_split_the_first_clips_and_long_ones_are_left_out(packed):
    corpus = data.Corpus(config_for(packed, "--overfit", "5"))
    assert corpus.clips("val") == corpus.clips("train") == data.Corpus(config_for(packed)).clips("train")[:5]
    assert len(data.Corpus(config_for(packed, "--overfit", "23")).clips("test")) == 23
    short = data.Corpus(config_for(packed, "--max_seconds", "0.7")).clips("train")
    assert 0 < len(short) < 22 and max(c.frames for c in short) * MEL.hop <= 0.7 * MEL.sample_rate


def speech_like_lengths() -> np.ndarray:
    """13,100 clips of 1.1 to 10.1 s, 6.6 s on average, in frames: LJSpeech's."""
    seconds = 1.1 + 9 * np.random.default_rng(0).beta(3.2, 2.0, 13_100)
    assert 6.5 < seconds.mean() < 6.7
    return np.round(seconds * MEL.sample_rate / MEL.hop).astype(int)


@pytest.mark.parametrize("count, batch", [(13_100, 64), (64, 64), (64, 16), (10, 16), (1, 3)])
def test_an_epoch_shows_every_clip_once_and_fills_up_its_last_batch(count, batch):
    lengths, steps = speech_like_lengths()[:count], -(-count // batch)
    epochs = []
    for first in (0, steps):
        batches = [data.length_bucketed_batch(lengths, first + n, batch, seed=1) for n in range(steps)]
        shown = np.concatenate(batches)
        times = np.bincount(shown, minlength=count)
        assert len(shown) == steps * batch and times.min() >= 1 and times.max() - times.min() <= 1
        epochs.append(shown)
    assert count < 2 or not np.array_equal(*epochs)


def test_the_schedule_is_a_function_of_its_arguments_and_sorted():
    lengths = speech_like_lengths()
    picks = [data.length_bucketed_batch(lengths, step, 64, seed=3) for step in (5, 1000, 5)]
    assert np.array_equal(picks[0], picks[2]) and not np.array_equal(picks[0], picks[1])
    assert not np.array_equal(picks[0], data.length_bucketed_batch(lengths, 5, 64, seed=4))
    assert all((np.diff(lengths[pick]) >= 0).all() for pick in picks)


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("multiple", [1, 16])
def test_at_most_a_twentieth_of_what_is_computed_is_padding(batch, multiple):
    lengths, valid, computed = speech_like_lengths(), 0, 0
    for step in range(100):
        for part in data.length_bucketed_batch(lengths, step, batch, seed=0).reshape(-1, 16):
            valid += lengths[part].sum()
            computed += 16 * -(-lengths[part].max() // multiple) * multiple
    assert valid / computed >= 0.95


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_passes_errors_on_and_can_be_closed(workers):
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3))
        return 100 // (7 - step)

    stream = data.prefetch(make, range(20), workers)
    assert [next(stream) for _ in range(7)] == [100 // (7 - step) for step in range(7)]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    stream = data.prefetch(make, range(6), workers)
    next(stream)
    stream.close()
    assert list(data.prefetch(make, range(6), workers)) == [100 // (7 - step) for step in range(6)]


# Caches of rows


def cache(
    path: Path, items: list[np.ndarray], batches: list, width: int | None = None, fail_after: int = 1000
) -> None:
    def encode(numbers: list[int]) -> list[np.ndarray]:
        if len(batches) == fail_after:
            raise KeyboardInterrupt
        batches.append(numbers)
        return [items[n] for n in numbers]

    shards.cache_features(path, [len(item) for item in items], width, encode, 4, "items")


@pytest.fixture
def items() -> list[np.ndarray]:
    """30 items of 0 to 8 rows of 5 numbers that float16 has."""
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal((rng.integers(9), 5)).astype(np.float16).astype(np.float32) for _ in range(30)
    ]


@pytest.mark.parametrize("width", [None, 5])
def test_cached_rows_are_what_was_encoded(items, tmp_path, width):
    cache(tmp_path / "x.npy", items, batches := [], width)
    rows = shards.open_features(tmp_path / "x.npy", "pack")
    for n, item in enumerate(items):
        assert rows(n).dtype == torch.float16 and np.array_equal(rows(n).numpy(), item)
    lengths = [len(items[n]) for batch in batches for n in batch]
    assert lengths == sorted(lengths) and sorted(sum(batches, [])) == list(range(30))
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.spans.npy"}
    cache(tmp_path / "x.npy", items, again := [])
    assert not again


@pytest.mark.parametrize("fail_after", [0, 1, 3, 7])
def test_a_cache_that_was_interrupted_is_taken_up_where_it_was(items, tmp_path, fail_after):
    path, first, second = tmp_path / "x.npy", [], []
    with pytest.raises(KeyboardInterrupt):
        cache(path, items, first, fail_after=fail_after)
    (tmp_path / "x.done.77.part").touch()  # of a process that was killed
    with pytest.raises(UserError, match="missing, or damaged.*; pack"):
        shards.open_features(path, "pack")
    cache(path, items, second)
    rows = shards.open_features(path, "pack")
    assert all(np.array_equal(rows(n).numpy(), item) for n, item in enumerate(items))
    # nothing was encoded twice
    assert len(first) == fail_after and sorted(sum(first + second, [])) == list(range(30))
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.spans.npy"}


def test_an_unfinished_cache_of_something_else_is_not_taken_up(items, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "x.npy", [np.zeros((len(item), 6)) for item in items], [], fail_after=5)
    cache(tmp_path / "x.npy", items, [], width=5)
    rows = shards.open_features(tmp_path / "x.npy", "pack")
    assert all(np.array_equal(rows(n).numpy(), item) for n, item in enumerate(items))


@pytest.mark.parametrize("cut", [1, 200, 10_000])
def test_an_unfinished_cache_that_was_cut_short_is_made_anew(items, tmp_path, cut):
    path = tmp_path / "x.npy"
    with pytest.raises(KeyboardInterrupt):
        cache(path, items, [], fail_after=5)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(unfinished.read_bytes()[:-cut])
    cache(path, items, [])
    rows = shards.open_features(path, "pack")
    assert all(np.array_equal(rows(n).numpy(), item) for n, item in enumerate(items))


def test_rows_of_the_wrong_shape_or_beyond_float16_are_refused(items, tmp_path):
    with pytest.raises(UserError, match="too large for float16"):
        shards.cache_features(tmp_path / "x.npy", [1], None, lambda _: [np.full((1, 2), 1e6)], 4, "items")
    with pytest.raises(UserError, match=r"item 0 is \(2, 2\) instead of"):
        shards.cache_features(tmp_path / "y.npy", [1], None, lambda _: [np.zeros((2, 2))], 4, "items")
    nowhere = tmp_path / "nowhere" / "x.npy"
    with pytest.raises(UserError, match="cannot be written"):
        shards.cache_features(nowhere, [1], None, lambda _: [np.zeros((1, 2))], 4, "items")


def test_a_cache_tells_its_size_and_is_refused_where_the_disk_has_no_room(items, tmp_path, capsys):
    cache(tmp_path / "x.npy", items, [])
    assert "items need 0.0 GB, the disk has " in capsys.readouterr().out
    lengths = [1] * 4 + [10**13]
    with pytest.raises(UserError, match=r"y.npy: items need 100000.0 GB, the disk has [\d.]+ GB left; make"):
        shards.cache_features(tmp_path / "y.npy", lengths, 5, lambda _: [np.ones((1, 5))] * 4, 4, "items")
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.spans.npy"}


def test_times_of_validation_are_spread_evenly_wherever_one_begins():
    for first in (0, 5, 1000):
        times = [data.low_discrepancy_time(n) for n in range(first, first + 20)]
        counts, _ = np.histogram(times, 5, (0, 1))
        assert counts.min() >= 3
    assert 0 < data.low_discrepancy_time(0) < 1


# The command line


def test_the_command_packs(raw, tmp_path):
    done = run_cli("ljspeech", "--root", raw, "--out", tmp_path / "a", "--workers", "2")
    assert (
        done.returncode == 0 and "22 train, 1 val, 0 test clips; 0 skipped" in done.stdout and not done.stderr
    )


def test_a_tilde_is_the_home_folder_where_a_corpus_is_packed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_metadata(tmp_path / "raw", write_recordings(tmp_path / "raw", 4))
    done = run_cli("ljspeech", "--root=~/raw", "--out=~/packed", "--workers=1", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "packed/index.json").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["ljspeech", "--root", "nowhere", "--out", "x"], "--download"),
        (["librispeech", "--root", "nowhere", "--out", "x"], "nowhere: no <speaker>/<chapter>"),
        (["demo", "--out", "x", "--shard", "2/2"], "--shard 2/2"),
        (["demo", "--out", "x", "--sentence", "5"], "did you mean"),
        (["demo", "--out", "/proc/nowhere"], "cannot be written"),
    ],
    ids=str,
)
def test_a_user_error_is_one_line_and_exit_code_2(words, message, tmp_path):
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
