"""Evaluation: the same for any number of ranks, repeatable, and complete on disk."""

import json
import math
import shutil

import numpy as np
import pytest
import soundfile
import torch

import config as configs
import evaluator
import system
from conftest import ROOT, finish, start

CPU = torch.device("cpu")


def lines(folder, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "eval" / f"step_{step:07d}" / "samples.jsonl").read_text().splitlines()]


def metrics(folder) -> dict:
    """The last value of every metric."""
    return {key: value for line in (folder / "metrics.jsonl").read_text().splitlines() for key, value in json.loads(line).items()}


@pytest.fixture
def trained(run, tmp_path):
    """A function that opens the trained run with some evaluation knobs: its config, corpus and network."""
    def open_run(**knobs):
        config, network, _ = system.load(str(run), CPU, {"eval": knobs}, out_dir=str(tmp_path))
        return config, system.open_corpus(config), network

    return open_run


# Ranks

def test_two_ranks_speak_and_score_the_prompts_as_one_does(two_ranks, double_batch):
    shared, alone = lines(two_ranks, 3), lines(double_batch, 3)
    assert [row["number"] for row in shared] == [0, 1, 2]
    for a, b in zip(shared, alone, strict=True):
        assert a.pop("mcd") == pytest.approx(b.pop("mcd"), rel=1e-2)
        assert a == b
    assert metrics(two_ranks)["eval/wer_vocoded"] == metrics(double_batch)["eval/wer_vocoded"]
    assert metrics(two_ranks)["eval/wer"] == metrics(double_batch)["eval/wer"]


def test_validation_loss_does_not_depend_on_the_number_of_ranks(two_ranks, double_batch):
    shared, alone = ({key: value for key, value in metrics(folder).items() if key.startswith("val/")}
                     for folder in (two_ranks, double_batch))
    assert len(shared) == 12 and shared == pytest.approx(alone, rel=1e-4)


def test_validation_loss_is_the_same_twice_and_is_the_mean_of_its_bins(trained):
    config, corpus, network = trained()
    batches = system.open_batches(config, corpus, network, 0, 1)
    first, second = (evaluator.validate(network, batches, config, CPU, 1) for _ in range(2))
    assert first == second
    bins = [value for key, value in first.items() if key.startswith("val/flow_loss_t")]
    assert len(bins) == evaluator.BINS and min(bins) < first["val/flow_loss"] < max(bins)
    clips = torch.cat([network(batch)["flow_loss_per_clip"] for batch in batches.validation()])
    assert len(clips) == 64 and first["val/flow_loss"] == pytest.approx(clips.mean().item(), rel=1e-5)


# What an evaluation leaves

def test_every_sample_has_its_line_its_sound_and_its_pictures(run):
    rows, folder = lines(run, 6), run / "eval" / "step_0000006"
    assert len(rows) == 4
    for row in rows:
        for kind in ("audio", "reference_audio", "picture", "reference_picture", "attention"):
            assert (folder / row[kind]).stat().st_size > 500
        assert row["words"] == len(row["text"].split()) and row["errors"] > 0 and row["mcd"] > 0        # six steps teach nobody to speak
    found = metrics(run)
    assert found["eval/wer"] == pytest.approx(sum(row["errors"] for row in rows) / sum(row["words"] for row in rows))
    assert found["eval/wer_low"] <= found["eval/wer"] <= found["eval/wer_high"] and found["eval/recogniser"] == "whisper-demo"
    assert found["eval/mcd"] == pytest.approx(sum(row["mcd"] for row in rows) / 4)
    assert (run / "sample.wav").read_bytes() == (folder / "000.wav").read_bytes()


def test_the_floors_say_that_the_recogniser_understands_the_references(run):
    assert metrics(run)["eval/wer_ground_truth"] <= 0.1 and metrics(run)["eval/wer_vocoded"] <= 0.1


def test_true_durations_speak_as_long_as_the_reference(trained, tmp_path):
    for known, equal in ((True, True), (False, False)):
        config, corpus, network = trained(limit=2, true_durations=known)
        evaluator.Evaluator(config, corpus, CPU).run(network, int(known))
        lengths = [soundfile.info(tmp_path / "eval" / f"step_{int(known):07d}" / f"{n:03d}.wav").frames for n in range(2)]
        assert (lengths == [clip.frames * config.mel.hop for clip in corpus.clips("val")[:2]]) == equal


def test_prompts_of_a_file_are_spoken_without_a_corpus(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("Anna bought two green baskets.\n\n  2 hats.  \nNot this one.\n")
    config, _, network = trained(prompts=str(tmp_path / "prompts.txt"), limit=2)
    found = evaluator.Evaluator(config, None, CPU).run(network, 9)
    rows = lines(tmp_path, 9)
    assert [row["text"] for row in rows] == ["Anna bought two green baskets.", "Two hats."]
    assert all("mcd" not in row and row["reference_audio"] is None for row in rows)
    assert "eval/wer" in found and not {"eval/wer_vocoded", "eval/wer_ground_truth", "eval/mcd"} & found.keys()


def test_captions_of_music_stay_as_they_were_typed(tmp_path):
    (tmp_path / "prompts.txt").write_text("120 bpm, 3/4 time\n")
    config = configs.load(str(ROOT / "configs/music_demo.yaml"), [f"--eval.prompts={tmp_path / 'prompts.txt'}"])
    assert evaluator.Evaluator(config, None, CPU).prompts == ["120 bpm, 3/4 time"]


def test_the_command_repeats_what_the_loop_measured(run, tiny, tmp_path):
    out = finish(start("evaluator.py", f"--ckpt={run}", "--limit=4", f"--recogniser={tiny['recogniser']}", f"--out_dir={tmp_path}"))
    found = json.loads(out.splitlines()[-1])
    assert "word error rate" in out and {key: value for key, value in metrics(run).items() if key in found} == found
    assert lines(tmp_path, 6) == lines(run, 6)


# Figures of whole sets

def spoken(kinds: int = 4) -> list[dict]:
    """Features of eight descriptions, two of each of four pictures, as far apart as can be; the last one is heard as another's."""
    space, rows = np.eye(8)[:kinds], []
    for n in range(2 * kinds):
        heard = space[0] if n == 2 * kinds - 1 else space[n // 2]
        rows.append({"number": n, "speech": heard, "image": space[n // 2], "picture": np.array(n // 2), "label": np.array(n // 2),
                     "group": np.array("en f3" if n % 2 == 0 else "ar m3")})
    return rows


def test_retrieval_counts_right_pictures_by_language_and_voice_and_each_picture_once(tmp_path):
    found = evaluator.figures(spoken(), tmp_path)
    assert found["eval/recall_1"] == 7 / 8 and found["eval/recall_10"] == 1
    assert found["eval/recall_1/en"] == found["eval/recall_1/f3"] == 1 and found["eval/recall_1/ar"] == found["eval/recall_1/m3"] == 3 / 4
    assert found["eval/language_gap"] == 1 / 4 and found["eval/recall_back_1"] == 1
    assert found["eval/cos_matched"] == 7 / 8 and found["eval/cos_unmatched"] == pytest.approx(1 / 24)      # 1 of 8 * 3 strangers is heard
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_that_were_made_are_found_again_and_sounds_are_compared_as_sets():
    rows = [row | {"made": row["image"], "chance": np.array(1 / 120)} for row in spoken()]
    found = evaluator.figures(rows)
    assert found["eval/recall_made_1"] == 1 and found["eval/chance"] == pytest.approx(1 / 120)
    rng = np.random.default_rng(0)
    rows = [{"number": n, "made": x, "real": x, "text": x / (x @ x)} for n, x in enumerate(rng.normal(size=(16, 4)))]
    found = evaluator.figures(rows)
    assert found["eval/fad"] == pytest.approx(0, abs=1e-6) and found["eval/clap"] == pytest.approx(1) and found["eval/kad"] < 0.1
    assert found.keys() == {"eval/fad", "eval/kad", "eval/clap"}


def test_noise_is_as_loud_as_asked_and_none_at_infinity():
    wave = torch.randn(16000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(evaluator.add_noise(wave, math.inf, 0), wave)
    for snr in (20, 10, 0):
        noise = evaluator.add_noise(wave, snr, 0) - wave
        assert 10 * math.log10(wave.square().mean() / noise.square().mean()) == pytest.approx(snr, abs=0.1)


# Bad input

def test_prompts_that_are_missing_empty_or_no_text_are_named(run, tmp_path, refusal):
    for name, content, complaint in (("empty", b"\n \n", "has no prompt"), ("binary", b"\xff\xfe\x00", "not a readable text file")):
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name}: {complaint}" in refusal(evaluator, f"--ckpt={run}", f"--prompts={tmp_path / name}")
    assert f"{tmp_path / 'none'}: not a readable text file" in refusal(evaluator, f"--ckpt={run}", f"--prompts={tmp_path / 'none'}")


def test_a_corpus_that_moved_is_named_and_found_again(run, tiny, tmp_path, refusal):
    line = refusal(evaluator, f"--ckpt={run}", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}")
    assert str(tmp_path) in line
    moved = shutil.copytree(tiny["data_dir"], tmp_path / "moved")
    config, _, _ = system.load(str(run), CPU, {"data": {"data_dir": str(moved)}})
    assert system.open_corpus(config).folder == moved


def test_a_limit_of_nothing_is_an_error(run, refusal):
    assert "eval.limit must be positive" in refusal(evaluator, f"--ckpt={run}", "--limit=0")
