"""Corpora: packing whatever goes wrong, restarting it, and batches that are a pure function of (seed, step, row)."""

import collections
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import audio
import config as configs
import data
import pretrained
from config import Mel, UserError

MEL = Mel()
ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = transformers.ByT5Tokenizer()


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
    (root / "metadata.csv").write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 5)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """23 good clips in LJSpeech's layout."""
    root = tmp_path_factory.mktemp("raw")
    write_metadata(root, write_recordings(root, 23))
    return root


@pytest.fixture(scope="module")
def packed(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "corpus"
    data.pack_ljspeech(raw, out, MEL, workers=1)
    return out


def config_for(folder: Path, *overrides: str) -> configs.Config:
    return configs.load("", ["--data_dir", str(folder), "--text_encoder", "scratch", "--batch_size", "4", *overrides])


def batches_for(folder: Path, *overrides: str, rank: int = 0, world: int = 1) -> data.Batches:
    config = config_for(folder, *overrides)
    return data.Batches(config, data.Corpus(config), TOKENIZER, rank, world)


def run_cli(*words, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120)


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
    lines[9] = "c0009|two fields"
    lines[10] = "c0010|caf\xe9|caf\xe9".encode("latin-1")
    lines[11] = "../c0011|x|x"
    write_metadata(tmp_path, [*lines, "c0012|again|Another text", "", "\ufeff"])
    data.pack_ljspeech(tmp_path, tmp_path / "out", MEL, workers=2)
    skipped, printed = index_of(tmp_path / "out")["skipped"], capfd.readouterr().out
    expected = {"c0001": "not a readable sound file", "c0002": "is missing", "c0003": "truncated", "c0004": "16000 Hz instead of 22050",
                "c0005": "0.02 s is not between", "c0006": "silent", "line 8 (c0007)": "empty text", "line 10 (c0009)": "2 fields",
                "line 11 (c0010)": "not UTF-8", "line 12 (../c0011)": "no file name", "line 25 (c0012)": "duplicate id"}
    for where, reason in expected.items():
        assert sum(where in line and reason in line for line in skipped) == 1, where
        assert sum(where in line and reason in line for line in printed.splitlines()) == 1, where
    assert len(skipped) == len(expected) + 1                          # the last line is a lone byte order mark
    corpus = data.Corpus(config_for(tmp_path / "out"))
    clips = corpus.clips("train") + corpus.clips("val")
    assert sorted(c.id for c in clips) == ["c0000", "c0008", *(f"c{n:04d}" for n in range(12, 24))]
    for clip in clips:
        number = int(clip.id[1:])
        assert clip.text == ("only the transcript" if number == 8 else f"Text number {number}, é.")
        assert torch.equal(corpus.log_mel(clip), audio.log_mel(audio.load_wav(clip.wav, MEL.sample_rate), MEL).half().float())


def test_strict_refuses_and_a_mended_clip_is_tried_again(tmp_path):
    lines = write_recordings(tmp_path, 8)
    good = (tmp_path / "wavs/c0003.wav").read_bytes()
    (tmp_path / "wavs/c0003.wav").write_bytes(good[:5000])
    write_metadata(tmp_path, lines)
    with pytest.raises(UserError, match="c0003.*truncated"):
        data.pack_ljspeech(tmp_path, tmp_path / "out", MEL, workers=1, strict=True)
    assert not (tmp_path / "out/index.json").exists()
    (tmp_path / "wavs/c0003.wav").write_bytes(good)
    data.pack_ljspeech(tmp_path, tmp_path / "out", MEL, workers=1, strict=True)
    assert index_of(tmp_path / "out")["clips"] == {"train": 7, "val": 1, "test": 0}


def test_more_than_half_skipped_is_refused_and_resampling_saves_it(tmp_path):
    lines = write_recordings(tmp_path, 4) + write_recordings(tmp_path, 6, rate=16000, first=4)
    write_metadata(tmp_path, lines)
    with pytest.raises(UserError, match="6 clips had to be skipped.*--resample"):
        data.pack_ljspeech(tmp_path, tmp_path / "out", MEL, workers=1)
    data.pack_ljspeech(tmp_path, tmp_path / "out", MEL, workers=1, resample=True)
    assert sum(index_of(tmp_path / "out")["clips"].values()) == 10


def test_the_published_split_is_used_by_id(tmp_path):
    write_recordings(tmp_path, 3)
    for name, n in (("LJ001-0110", 0), ("LJ001-0001", 1), ("LJ001-0051", 2)):
        (tmp_path / "wavs" / f"c{n:04d}.wav").rename(tmp_path / "wavs" / f"{name}.wav")
    write_metadata(tmp_path, ["LJ001-0110|a|a", "LJ001-0001|b|b", "LJ001-0051|c|c"])
    clips, _ = data.read_metadata(tmp_path)
    lines = (ROOT / "assets/ljspeech_split.txt").read_text().splitlines()
    splits = collections.Counter(line.split()[0] for line in lines if line[0] != "#")
    assert {c.id: c.split for c in clips} == {"LJ001-0110": "val", "LJ001-0001": "train", "LJ001-0051": "test"}
    assert splits == {"val": 100, "test": 500}


def test_a_rerun_makes_only_what_is_not_whole(raw, tmp_path, small_shards):
    data.pack_ljspeech(raw, tmp_path, MEL, workers=1)
    first, times = index_of(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.glob("*_0*")}
    (tmp_path / "clips_00001.jsonl").unlink()
    (tmp_path / "mel_00003.npy").write_bytes((tmp_path / "mel_00003.npy").read_bytes()[:-100])
    with pytest.raises(UserError, match="shard 1 is missing or damaged"):
        data.Corpus(config_for(tmp_path))
    data.pack_ljspeech(raw, tmp_path, MEL, workers=2)
    changed = {p.name for p, t in times.items() if p.stat().st_mtime_ns != t}
    assert changed == {"clips_00001.jsonl", "mel_00001.npy", "clips_00003.jsonl", "mel_00003.npy"}
    assert index_of(tmp_path) == first
    (tmp_path / "mel_00003.npy").write_bytes(b"")
    with pytest.raises(UserError, match="shard 3 is missing or damaged"):
        data.Corpus(config_for(tmp_path))


def test_shares_of_several_machines_make_what_one_makes(raw, tmp_path, small_shards, capsys):
    data.pack_ljspeech(raw, tmp_path / "one", MEL, workers=2)
    data.pack_ljspeech(raw, tmp_path / "two", MEL, workers=1, share=(0, 2))
    assert not (tmp_path / "two/index.json").exists() and "still to be made" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "two").glob("mel*")} == {"mel_00000.npy", "mel_00002.npy", "mel_00004.npy"}
    data.pack_ljspeech(raw, tmp_path / "two", MEL, workers=1, share=(1, 2))
    assert index_of(tmp_path / "one") == index_of(tmp_path / "two")


def test_a_killed_run_leaves_no_half_shard_and_is_taken_up(tmp_path):
    write_metadata(tmp_path, write_recordings(tmp_path, 120))
    out = tmp_path / "out"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; from data import Path as P; data.SHARD = 2; " \
           f"data.pack_ljspeech(P({str(tmp_path)!r}), P({str(out)!r}), data.Mel(), workers=1)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(out.glob("clips*.jsonl"))) < 4:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = len(list(out.glob("clips*.jsonl")))
    assert 4 <= made < 60 and not (out / "index.json").exists()
    plan = json.loads((out / "clips_00000.jsonl").read_text().split("\n")[0])["plan"]
    assert all(data.read_shard(out, int(path.stem[-5:]), plan) for path in out.glob("clips*.jsonl"))
    (out / "mel_00059.npy.123.part").write_bytes(b"half")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert sum(index_of(out)["clips"].values()) == 120 and not list(out.glob("*.part"))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), data.replacing(tmp_path / "x") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_another_corpus_is_not_packed_over_this_one(packed, tmp_path):
    write_metadata(tmp_path, write_recordings(tmp_path, 4))
    with pytest.raises(UserError, match="already holds another corpus"):
        data.pack_ljspeech(tmp_path, packed, MEL, workers=1)


def test_statistics_are_those_of_the_training_clips(packed):
    corpus = data.Corpus(config_for(packed))
    values = torch.cat([corpus.log_mel(clip) for clip in corpus.clips("train")]).double()
    assert corpus.mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert corpus.std == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_real_recordings_are_packed_as_their_log_mel(recordings, tmp_path):
    data.pack_ljspeech(recordings, tmp_path, MEL, workers=2, strict=True)
    corpus = data.Corpus(config_for(tmp_path))
    lines = dict(line.split("|")[::2] for line in (recordings / "metadata.csv").read_text().splitlines())
    clips = sum((corpus.clips(split) for split in data.SPLITS), [])
    assert len(clips) == 64 and len(corpus.clips("val")) == 2 and len(corpus.clips("test")) == 16
    for clip in clips:
        wave = audio.load_wav(recordings / "wavs" / f"{clip.id}.wav", MEL.sample_rate)
        assert clip.text == lines[clip.id].strip() and clip.wav == str(recordings / "wavs" / f"{clip.id}.wav")
        torch.testing.assert_close(corpus.log_mel(clip), audio.log_mel(wave, MEL), rtol=1e-3, atol=1e-3)


def test_the_archive_is_fetched_and_unpacked_as_the_root(raw, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar.bz2", "w:bz2") as tar:
        tar.add(raw, "LJSpeech-1.1")
    monkeypatch.setattr(data, "LJSPEECH_URL", (tmp_path / "x.tar.bz2").as_uri())
    data.download_ljspeech(tmp_path / "new/lj")
    assert (tmp_path / "new/lj/metadata.csv").read_bytes() == (raw / "metadata.csv").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["lj"]
    monkeypatch.setattr(data, "LJSPEECH_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match="cannot be had"):
        data.download_ljspeech(tmp_path / "other")


# The demo


@pytest.mark.parametrize("grammar", ["matrix", "open"])
def test_the_demo_trains_on_nothing_that_is_held_out(grammar):
    train, held_out = data.distinct_sentences(grammar, 200, False), data.distinct_sentences(grammar, 128, True)
    assert len(set(train)) == 200 and len(set(held_out)) == 128 and not set(train) & set(held_out)
    assert all(map(data.is_held_out, held_out)) and not any(map(data.is_held_out, train))
    assert train[:50] == data.distinct_sentences(grammar, 50, False)


def test_the_demo_is_spoken_trimmed_and_kept_to_listen_to(tmp_path):
    config = configs.load("", ["--corpus", "demo", "--data_dir", str(tmp_path / "demo"), "--sentences", "70", "--text_encoder", "scratch"])
    data.prepare(config)
    corpus = data.Corpus(config)
    assert [len(corpus.clips(split)) for split in data.SPLITS] == [70, 64, 64]
    assert [c.text for c in corpus.clips("train")] == data.distinct_sentences("matrix", 70, False)
    assert [bool(c.wav) for c in corpus.clips("train")] == [True] * 64 + [False] * 6
    for clip in corpus.clips("val") + corpus.clips("train")[:64]:
        wave = audio.load_wav(clip.wav, MEL.sample_rate)
        loud = (wave.abs() > 0.01).nonzero()
        assert max(loud[0].item(), len(wave) - 1 - loud[-1].item()) <= 0.05 * MEL.sample_rate
        assert torch.equal(corpus.log_mel(clip), audio.log_mel(wave, MEL).half().float())
    started = time.perf_counter()
    data.prepare(config)
    assert time.perf_counter() - started < 1
    with pytest.raises(UserError, match="already holds another corpus"):
        data.prepare(configs.load("", ["--corpus", "demo", "--data_dir", str(tmp_path / "demo"), "--sentences", "71"]))
    shutil.move(tmp_path / "demo", tmp_path / "moved")                 # recordings of the demo move along with it
    moved = data.Corpus(dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=str(tmp_path / "moved"))))
    assert Path(moved.clips("val")[0].wav).exists()


# Reading


def test_a_raw_folder_is_packed_beside_and_found_again(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_for(raw)
    with pytest.raises(UserError, match="no packed corpus there.*data.py prepare --config"):
        data.Corpus(config)
    data.prepare(config)
    assert data.packed_dir(config).parent == Path("data/packed") and len(data.Corpus(config).clips("train")) == 22
    assert data.packed_dir(config) != data.packed_dir(config_for(raw, "--n_mels", "64"))


def test_another_mel_or_format_is_refused_by_name(packed, tmp_path):
    with pytest.raises(UserError, match="packed with n_mels 80, but 64 is wanted"):
        data.Corpus(config_for(packed, "--n_mels", "64"))
    shutil.copytree(packed, tmp_path / "p")
    (tmp_path / "p/index.json").write_text(json.dumps(index_of(packed) | {"format": 7}))
    with pytest.raises(UserError, match="packed with format 7, but 1 is wanted"):
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
    with pytest.raises(UserError, match="no train clip of at most data.max_seconds 0.1"):
        batches_for(packed, "--max_seconds", "0.1")


def speech_like_lengths() -> np.ndarray:
    """13,100 clips of 1.1 to 10.1 s, 6.6 s on average, in frames: LJSpeech's."""
    seconds = 1.1 + 9 * np.random.default_rng(0).beta(3.2, 2.0, 13_100)
    assert 6.5 < seconds.mean() < 6.7
    return np.round(seconds * MEL.sample_rate / MEL.hop).astype(int)


@pytest.mark.parametrize("count, batch", [(13_100, 64), (64, 64), (64, 16), (10, 16), (1, 3)])
def test_an_epoch_shows_every_clip_once_and_fills_up_its_last_batch(count, batch):
    lengths, steps = speech_like_lengths()[:count], -(-count // batch)
    for epoch in (0, 1):
        shown = np.concatenate([data.schedule(lengths, epoch * steps + step, batch, seed=1) for step in range(steps)])
        times = np.bincount(shown, minlength=count)
        assert len(shown) == steps * batch and times.min() >= 1 and times.max() - times.min() <= 1
    assert count < 2 or not np.array_equal(shown, np.concatenate([data.schedule(lengths, step, batch, seed=1) for step in range(steps)]))


def test_the_schedule_is_a_function_of_its_arguments_and_sorted():
    lengths = speech_like_lengths()
    picks = [data.schedule(lengths, step, 64, seed=3) for step in (5, 1000, 5)]
    assert np.array_equal(picks[0], picks[2]) and not np.array_equal(picks[0], picks[1])
    assert not np.array_equal(picks[0], data.schedule(lengths, 5, 64, seed=4))
    assert all((np.diff(lengths[pick]) >= 0).all() for pick in picks)


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("multiple", [1, 16])
def test_at_most_a_twentieth_of_what_is_computed_is_padding(batch, multiple):
    lengths, valid, computed = speech_like_lengths(), 0, 0
    for step in range(100):
        for part in data.schedule(lengths, step, batch, seed=0).reshape(-1, 16):
            valid += lengths[part].sum()
            computed += 16 * -(-lengths[part].max() // multiple) * multiple
    assert valid / computed >= 0.95


VARIED = ("--silence_prob", "0.5", "--max_silence_sec", "0.5", "--text_condition_dropout", "0.3")


def test_a_batch_is_what_it_says(packed):
    batches = batches_for(packed, *VARIED, "--pad_multiple", "16")
    batch = batches.train(3)
    assert {k: v.dtype for k, v in batch.items()} == {
        "x": torch.float32, "x_mask": torch.bool, "noise": torch.float32, "t": torch.float32, "ids": torch.int64, "text_mask": torch.bool,
        "text_dropped": torch.bool, "frames": torch.int64, "number": torch.int64}
    assert batch["x"].shape[1] % 16 == 0 and batch["ids"].shape[1] % 8 == 0 and ((batch["t"] > 0) & (batch["t"] < 1)).all()
    clips = {clip.number: clip for clip in batches.corpus.clips("train")}
    for i, number in enumerate(batch["number"].tolist()):
        frames, length = batch["frames"][i].item(), batch["x_mask"][i].sum().item()
        x, tokens = batch["x"][i] * batches.corpus.std + batches.corpus.mean, batch["ids"][i][batch["text_mask"][i]].tolist()
        assert clips[number].frames == frames <= length
        torch.testing.assert_close(x[:frames], batches.corpus.log_mel(clips[number]))
        torch.testing.assert_close(x[frames:length], torch.full((length - frames, 80), np.log(audio.LOG_FLOOR)))
        assert not batch["x"][i, length:].any() and not batch["noise"][i, length:].any() and batch["noise"][i, :length].std() > 0.9
        assert tokens == pretrained.tokenize(TOKENIZER, ["" if batch["text_dropped"][i] else clips[number].text])[0]


def rows_of(batches: list[dict]) -> dict[tuple, list]:
    """Every row without its padding, keyed by its clip and t."""
    rows = {}
    for b in batches:
        for i in range(len(b["t"])):
            x_mask, text_mask = b["x_mask"][i], b["text_mask"][i]
            key = b["number"][i].item(), b["t"][i].item()
            rows[key] = [b["x"][i][x_mask], b["noise"][i][x_mask], b["ids"][i][text_mask], b["frames"][i]]
    return rows


def assert_same_rows(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(u, v) for key in a for u, v in zip(a[key], b[key], strict=True))


def test_two_ranks_and_two_micro_batches_see_what_one_process_sees(packed):
    alone = batches_for(packed, *VARIED, "--batch_size", "16")
    ranks = [batches_for(packed, *VARIED, "--batch_size", "4", "--grad_accum", "2", rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 1, 7):
        assert_same_rows(rows_of([alone.train(step)]), rows_of([r.train(step, micro) for micro in (0, 1) for r in ranks]))
    assert_same_rows(rows_of(alone.validation()), rows_of(ranks[0].validation() + ranks[1].validation()))


def test_padding_changes_nothing_but_zeros(packed):
    tight, loose = batches_for(packed, *VARIED, "--pad_multiple", "1"), batches_for(packed, *VARIED, "--pad_multiple", "64")
    for step in (0, 4):
        a, b = tight.train(step), loose.train(step)
        assert a["x"].shape[1] < b["x"].shape[1]
        assert_same_rows(rows_of([a]), rows_of([b]))


def test_batches_are_a_pure_function_of_the_step(packed):
    batches, again = batches_for(packed, *VARIED), batches_for(packed, *VARIED)
    again.train(1), again.validation()
    for key, value in batches.train(2).items():
        assert torch.equal(value, again.train(2)[key])
    assert not torch.equal(batches.train(2)["t"], batches.train(3)["t"])


def test_text_is_dropped_and_silence_added_as_often_as_asked(packed):
    batches = batches_for(packed, *VARIED, "--batch_size", "64")
    drawn = [batches.train(step) for step in range(6)]
    dropped = torch.cat([b["text_dropped"] for b in drawn]).float().mean()
    silence = torch.cat([b["x_mask"].sum(1) - b["frames"] for b in drawn])
    assert 0.2 < dropped < 0.4 and 0.4 < (silence > 0).float().mean() < 0.6
    assert silence.max() <= 0.5 * MEL.sample_rate / MEL.hop
    plain = batches_for(packed, "--text_condition_dropout", "0", "--batch_size", "64").train(0)
    assert not plain["text_dropped"].any() and torch.equal(plain["x_mask"].sum(1), plain["frames"])


def test_validation_covers_every_clip_once_with_times_spread_evenly(packed):
    batches = batches_for(packed, *VARIED, "--overfit", "20", "--batch_size", "8")
    found = batches.validation()
    numbers = torch.cat([b["number"] for b in found]).tolist()
    assert [len(b["t"]) for b in found] == [8, 8, 4] and sorted(numbers) == [clip.number for clip in batches.corpus.clips("val")]
    t = torch.cat([b["t"] for b in found])
    assert torch.histc(t, 5, 0, 1).min() >= 3 and 0.001 <= t.min() and t.max() <= 0.999
    assert not any(b["text_dropped"].any() or (b["x_mask"].sum(1) != b["frames"]).any() for b in found)
    shares = [batches_for(packed, "--overfit", "20", "--batch_size", "8", rank=rank, world=3).validation() for rank in range(3)]
    assert sorted(sum(len(b["t"]) for b in share) for share in shares) == [6, 7, 7]


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


# Features of a frozen encoder


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("t5")
    shape = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(shape).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_cached_features_are_what_the_frozen_encoder_makes_of_each_row(packed, tiny_t5, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "corpus")
    frozen = (*VARIED, "--text_encoder", tiny_t5, "--device", "cpu")
    with pytest.raises(UserError, match="data.py prepare"):
        batches_for(folder, *frozen)
    data.prepare(config_for(folder, *frozen))
    encoder, tokenizer, width = pretrained.load_text_encoder(tiny_t5)
    config = config_for(folder, *frozen)
    batch = data.Batches(config, data.Corpus(config), tokenizer).train(0)
    assert batch["features"].shape == (*batch["ids"].shape, width) and batch["features"].dtype == torch.float32
    expected = encoder(batch["ids"], batch["text_mask"])
    torch.testing.assert_close(batch["features"][batch["text_mask"]], expected[batch["text_mask"]], rtol=2e-3, atol=2e-3)
    assert not batch["features"][~batch["text_mask"]].any()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("features*")}
    data.prepare(config)
    assert len(times) == 2 and times == {path: path.stat().st_mtime_ns for path in folder.glob("features*")}
    next(path for path in times if "offsets" not in path.name).write_bytes(b"half")
    with pytest.raises(UserError, match="missing, or damaged"):
        batches_for(folder, *frozen)


# The command line


def test_the_commands_pack_and_prepare(raw, tmp_path):
    done = run_cli("ljspeech", "--root", raw, "--out", tmp_path / "a", "--workers", "2")
    assert done.returncode == 0 and "22 train, 1 val, 0 test clips; 0 skipped" in done.stdout and not done.stderr
    done = run_cli("prepare", "--text-encoder=scratch", "--data_dir", tmp_path / "a", cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout and not done.stderr


@pytest.mark.parametrize("words, message", [
    (["ljspeech", "--root", "nowhere", "--out", "x"], "--download"),
    (["prepare", "--data_dir", "nowhere"], "nowhere"),
    (["demo", "--out", "/proc/nowhere"], "cannot be made"),
], ids=str)
def test_a_user_error_is_one_line_and_exit_code_2(words, message, tmp_path):
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
