"""The mel flow Transformer: what it may depend on, and what it may not; batches that are a pure function of
(seed, step, row).
"""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import audio
import config as configs
import data
import system
import tts
from base import Prompt
from config import TTSSample
from corpora import voice
from model import MelPrior, convolve, gaussian_upsample, monotonic_alignment_search
from pretrained import text_encoder

TINY = {
    "model": {"text_encoder": "scratch", "width": 32, "layers": 2, "heads": 2, "frame_stack": 2},
    "train": {"dtype": "fp32"},
}


def make(alignment="learned", predict="x", upsample_text=True, text="bytes", **shape):
    """A tiny network whose zero-initialised layers were filled, so that everything is connected."""
    shape |= {**TINY["model"], "alignment": alignment, "upsample_text": upsample_text, "text": text}
    values = {**TINY, "model": shape, "flow": {"predict": predict}}
    network = system.build(configs.from_dict(configs.TTSConfig, values), -5.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return network


def make_batch(frames=(24, 16), text_lengths=(9, 5), pad=0, text_pad=0):
    """A batch whose valid part does not depend on its padding."""
    rows, generator = len(frames), torch.Generator().manual_seed(1)
    longest, longest_text = max(frames) + pad, max(text_lengths) + text_pad
    batch = {
        "x": torch.zeros(rows, longest, 80),
        "noise": torch.zeros(rows, longest, 80),
        "ids": torch.zeros(rows, longest_text, dtype=torch.long),
        "t": torch.linspace(0.2, 0.8, rows),
        "frames": torch.tensor(frames),
        "tempo": torch.ones(rows),
        "text_dropped": torch.zeros(rows, dtype=torch.bool),
        "x_mask": torch.arange(longest) < torch.tensor(frames)[:, None],
        "text_mask": torch.arange(longest_text) < torch.tensor(text_lengths)[:, None],
    }
    for row, (n, s) in enumerate(zip(frames, text_lengths)):
        batch["x"][row, :n] = -5 + 2 * torch.randn(n, 80, generator=generator)
        batch["noise"][row, :n] = torch.randn(n, 80, generator=generator)
        batch["ids"][row, :s] = torch.randint(3, 200, (s,), generator=generator)
    return batch


def test_a_network_of_phonemes_reads_words_that_sound_alike_alike():
    network = make(text="phonemes")
    outputs = []
    for text in ("I see two boats.", "I sea too boats.", "I see two boots."):
        outputs += network.sample([Prompt(text, seconds=0.5, seed=3)], TTSSample(euler_steps=2))
    alike, same, other = outputs
    assert torch.equal(alike.log_mel, same.log_mel) and alike.symbols == same.symbols == voice.phonemes(
        "I see two boats."
    )
    assert alike.attention.shape[1] == len(alike.symbols) + 1  # a byte each, and the end
    assert not torch.equal(alike.log_mel, other.log_mel[: len(alike.log_mel)])


@pytest.mark.parametrize("alignment", ["mas", "learned", "uniform", "none"])
def test_padding_changes_no_loss_and_no_gradient(alignment):
    network = make(alignment)
    results = []
    for pad, text_pad in ((0, 0), (8, 16)):
        network.zero_grad()
        losses = network(make_batch(pad=pad, text_pad=text_pad))
        losses["loss"].backward()
        results.append(
            (losses, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
        )
    (plain, gradients), (padded, padded_gradients) = results
    for name in plain:
        assert torch.allclose(plain[name], padded[name], atol=1e-5), name
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, padded_gradients[name], atol=1e-4), name


def test_the_batch_is_its_clips():
    network, batch = make(), make_batch()
    both = network(batch)["flow_loss_per_clip"]
    for row in range(2):
        alone = network({name: value[row : row + 1] for name, value in batch.items()})["flow_loss_per_clip"]
        assert torch.allclose(alone[0], both[row], atol=1e-5)


def test_self_attention_has_positions():
    """Without them, the frames of a clip could be permuted, and the output with them (the seed's defect)."""
    network = make("none", upsample_text=False)
    h = torch.randn(1, 6, 32)
    _, context = network.decoder.embed(
        torch.randn(1, 12, 80),
        torch.tensor([0.5]),
        torch.randn(1, 4, 32),
        torch.zeros(1, 4),
        torch.ones(1, 12, dtype=torch.bool),
        torch.ones(1, 4, dtype=torch.bool),
    )
    block, order = network.decoder.blocks[0], torch.tensor([3, 1, 4, 0, 5, 2])
    assert not torch.allclose(
        block.self_attend(h[:, order], context), block.self_attend(h, context)[:, order], atol=1e-3
    )


def test_uniform_alignment_spreads_the_bytes_over_the_clip():
    network = make("uniform")
    text_mask = torch.tensor([[True] * 4 + [False] * 2])
    # 16 frames are 8 tokens
    centres = network.align(torch.rand(1, 6), text_mask, torch.tensor([16]))
    assert torch.allclose(centres[0, :4], torch.tensor([1.0, 3.0, 5.0, 7.0]))


def test_the_flow_loss_moves_the_durations_when_they_are_learned():
    for alignment, moves in (("learned", True), ("uniform", False)):
        network = make(alignment)
        network(make_batch())["flow_loss"].backward()
        gradient = network.text.log_duration.weight.grad
        assert (gradient is not None and gradient.abs().max() > 0) == moves


@pytest.mark.parametrize("alignment", ["mas", "learned"])
def test_a_dropped_text_teaches_no_duration_and_no_prior(alignment):
    network, batch = make(alignment), make_batch()
    losses = network(batch | {"text_dropped": torch.tensor([True, True])})
    (losses["duration_loss"] + losses.get("prior_loss", 0)).backward()
    assert network.text.log_duration.weight.grad.abs().max() == 0
    assert alignment == "learned" or network.prior.mean.weight.grad.abs().max() == 0


def best_path(scores):
    """The durations of the best of all paths, by trying each; scores (S, T)."""
    bytes_, frames = scores.shape
    best, found = -math.inf, None
    for cuts in itertools.combinations(range(1, frames), bytes_ - 1):
        edges = [0, *cuts, frames]
        score = sum(scores[s, edges[s] : edges[s + 1]].sum().item() for s in range(bytes_))
        if score > best:
            best, found = score, [edges[s + 1] - edges[s] for s in range(bytes_)]
    return found


def test_the_search_finds_the_best_of_all_monotonic_paths():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        scores = torch.randn(3, 4, 9, generator=generator)
        bytes_, frames = torch.tensor([4, 3, 1]), torch.tensor([9, 7, 5])
        found = monotonic_alignment_search(scores, bytes_, frames)
        for row, (s, t) in enumerate(zip(bytes_.tolist(), frames.tolist())):
            assert found[row].tolist() == best_path(scores[row, :s, :t]) + [0] * (4 - s)


def test_the_search_gives_all_frames_away_even_where_there_are_fewer_than_bytes():
    found = monotonic_alignment_search(torch.randn(1, 6, 4), torch.tensor([6]), torch.tensor([4]))
    assert found.sum() == 4 and found.min() == 0


def test_before_training_bytes_are_spoken_at_an_even_pace_and_then_where_they_sound():
    prior, mask = MelPrior(3, 80), torch.ones(1, 3, dtype=torch.bool)
    text, frames = torch.eye(3)[None], torch.tensor([12])
    sounds = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    x = sounds.repeat_interleave(torch.tensor([2, 7, 3]), dim=0)[None]
    assert prior.search(text, mask, x, frames)[0].tolist() == [4, 4, 4]
    prior.mean.weight.data = sounds.T
    durations = prior.search(text, mask, x, frames)
    assert durations[0].tolist() == [2, 7, 3]
    assert torch.equal(prior(text, durations, mask, 14)[0, :12], x[0])
    assert torch.equal(prior(text, durations, mask, 14)[0, 12:], sounds[[2, 2]])


def test_a_tempo_scales_what_is_to_be_predicted():
    """A clip that was stretched teaches the durations that it has at its own tempo."""
    network, batch = make("learned"), make_batch()
    tempo = torch.tensor([2.0, 2.0])
    own = batch["frames"] / tempo
    stretched = network(batch | {"tempo": tempo})["duration_loss"]
    assert torch.allclose(stretched, network(batch | {"frames": own})["duration_loss"])


@pytest.mark.parametrize("alignment", ["mas", "learned"])
def test_speech_is_as_much_shorter_as_it_is_faster(alignment):
    network, prompt = make(alignment), Prompt("A long line of text, to be spoken.")
    usual, fast = [
        network.sample_log_mels([prompt], TTSSample(euler_steps=1, speed=speed))[0][0]
        for speed in (1.0, 1.25)
    ]
    assert round(len(usual) / len(fast), 1) == 1.2 or round(len(usual) / len(fast), 1) == 1.3


def test_predicted_length_grows_with_the_text():
    network = system.build(configs.from_dict(configs.TTSConfig, TINY))
    short, long = network.sample_log_mels(
        [Prompt("Hi."), Prompt("Hi there, my dear old friend.")], TTSSample(euler_steps=1)
    )[0]
    assert len(long) > 3 * len(short)


def test_upsampling_gives_every_token_the_text_spoken_there():
    # byte s is the unit vector s
    text = torch.eye(4)[None]
    centres, positions = torch.tensor([[1.0, 3.0, 5.0, 7.0]]), torch.arange(8) + 0.5
    mask = torch.ones(1, 8, dtype=torch.bool)
    weights = gaussian_upsample(text, centres, positions, mask, mask[:, :4])[0]
    assert weights.argmax(-1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and torch.allclose(
        weights.sum(-1), torch.ones(8)
    )


@pytest.mark.parametrize("alignment", ["mas", "learned"])
@pytest.mark.parametrize("predict", ["x", "v"])
def test_a_sample_depends_on_its_own_seed_and_text_alone(alignment, predict):
    network, settings = make(alignment, predict), TTSSample(euler_steps=3, cfg_scale=2.0)
    first, second = (
        Prompt("Two green hats.", seed=1),
        Prompt("A much longer line of text than that.", seed=2),
    )
    together = network.sample_log_mels([first, second], settings)[0]
    alone = network.sample_log_mels([second], settings)[0][0]
    assert torch.allclose(together[1], alone, atol=1e-3)
    other = network.sample_log_mels([dataclasses.replace(second, seed=3)], settings)[0][0]
    assert not torch.allclose(other, alone, atol=1e-1)


def test_without_cross_attention_it_speaks_and_has_no_picture_of_it(tmp_path):
    network = make("mas", cross_attention=False, conv_kernel=3)
    made = network.sample([Prompt("Hello.", seconds=0.5)], TTSSample(euler_steps=2))[0]
    assert made.attention is None and made.draw(tmp_path / "x").keys() == {"picture"}
    assert not [name for name, _ in network.named_parameters() if "cross" in name]


def test_a_convolution_sees_the_neighbours_of_a_token_and_no_padding():
    plain, wide = (make("mas", conv_kernel=kernel).decoder.blocks[0].conv for kernel in (0, 3))
    assert plain is None
    x = torch.zeros(1, 8, 32)
    x[0, 3], x[0, 6] = 1, 1
    mask = (torch.arange(8) < 6)[None]
    change = convolve(wide, x, mask) - convolve(wide, torch.zeros_like(x), mask)
    assert change.abs().sum(2)[0].nonzero().flatten().tolist() == [2, 3, 4]


def test_sampling_speaks_for_as_long_as_it_is_told():
    made = make().sample(
        [Prompt("Hello.", seconds=0.5), Prompt("Hello.", seconds=1.0)], TTSSample(euler_steps=2)
    )
    assert [round(len(a.wave) / a.sample_rate, 1) for a in made] == [0.5, 1.0]
    assert made[1].attention.shape == (43, 7) and torch.allclose(
        made[1].attention.sum(-1), torch.ones(43), atol=1e-4
    )


def test_a_block_starts_as_the_identity():
    network = system.build(configs.from_dict(configs.TTSConfig, TINY))
    h, context = network.decoder.embed(
        torch.randn(2, 8, 80),
        torch.rand(2),
        torch.randn(2, 3, 32),
        torch.rand(2, 3),
        torch.ones(2, 8, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.bool),
    )
    assert torch.equal(network.decoder.blocks[0](h, torch.randn(2, 3, 32), context), h)


def test_muon_gets_hidden_matrices_only():
    network = make()
    names = {id(p): name for name, p in network.named_parameters()}
    hidden = {names[id(p)] for p in network.hidden_matrices()}
    assert "decoder.blocks.0.mlp.up.weight" in hidden and all(p.dim() == 2 for p in network.hidden_matrices())
    for outer in (
        "decoder.in_proj.weight",
        "decoder.out_proj.weight",
        "decoder.modulation.weight",
        "text.log_duration.weight",
        "decoder.blocks.0.table",
    ):
        assert outer not in hidden, outer


def test_a_handful_is_overfit():
    network = system.build(configs.from_dict(configs.TTSConfig, TINY))
    batch, optimizer = make_batch(), torch.optim.AdamW(network.parameters(), lr=1e-2)
    batch["t"] = torch.tensor([0.7, 0.9])
    first = network(batch)["flow_loss"].item()
    for _ in range(60):
        optimizer.zero_grad()
        network(batch)["loss"].backward()
        optimizer.step()
    assert network(batch)["flow_loss"].item() < 0.2 * first


# Batches

VARIED = ("--silence_prob", "0.5", "--max_silence_sec", "0.5", "--text_condition_dropout", "0.3")
MEL, TOKENIZER = configs.Mel(), transformers.ByT5Tokenizer()


@pytest.fixture(scope="module")
def corpus_folder(tiny) -> Path:
    """24 demo sentences to train on, 64 to validate."""
    return tiny["data_dir"]


def config_for(folder: Path, *overrides: str) -> configs.Config:
    return system.load_config(
        "",
        [
            "--corpus",
            "demo",
            "--data_dir",
            str(folder),
            "--voice=espeak:en-us",
            "--text_encoder",
            "scratch",
            "--sentences",
            "24",
            "--batch_size",
            "4",
            *overrides,
        ],
    )


def batches_for(folder: Path, *overrides: str, rank: int = 0, world: int = 1) -> data.Batches:
    config = config_for(folder, *overrides)
    return data.SpeechBatches(config, data.Corpus(config), TOKENIZER, rank, world)


def test_a_split_without_clips_is_named(corpus_folder):
    with pytest.raises(configs.UserError, match="no train clip of at most data.max_seconds 0.1"):
        batches_for(corpus_folder, "--max_seconds", "0.1")


def test_a_batch_is_what_it_says(corpus_folder):
    batches = batches_for(corpus_folder, *VARIED, "--pad_multiple", "16")
    batch = batches.train(3)
    assert {k: v.dtype for k, v in batch.items()} == {
        "x": torch.float16,
        "x_mask": torch.bool,
        "noise": torch.float32,
        "t": torch.float32,
        "ids": torch.int64,
        "text_mask": torch.bool,
        "text_dropped": torch.bool,
        "frames": torch.int64,
        "tempo": torch.float32,
        "number": torch.int64,
    }
    assert (
        batch["x"].shape[1] % 16 == 0
        and batch["ids"].shape[1] % 8 == 0
        and ((batch["t"] > 0) & (batch["t"] < 1)).all()
    )
    clips = {clip.number: clip for clip in batches.corpus.clips("train")}
    for i, number in enumerate(batch["number"].tolist()):
        frames, length = batch["frames"][i].item(), batch["x_mask"][i].sum().item()
        x, tokens = batch["x"][i], batch["ids"][i][batch["text_mask"][i]].tolist()
        assert clips[number].frames == frames <= length
        assert torch.equal(x[:frames].float(), batches.corpus.log_mel(clips[number]))
        assert (
            not x[frames:].any()
            and not batch["noise"][i, length:].any()
            and batch["noise"][i, :length].std() > 0.9
        )
        assert (
            tokens
            == text_encoder.tokenize(TOKENIZER, ["" if batch["text_dropped"][i] else clips[number].text])[0]
        )


def test_the_network_sees_log_mels_normalised_with_silence_behind_them_and_then_nothing(corpus_folder):
    batches = batches_for(corpus_folder, *VARIED)
    batch = batches.train(3)
    network = tts.TextToSpeech(batches.config, *batches.corpus.statistics)
    x = network.normalise(batch["x"], batch["frames"], batch["x_mask"])
    clips = {clip.number: clip for clip in batches.corpus.clips("train")}
    silent = 0
    for i, number in enumerate(batch["number"].tolist()):
        log_mel = batches.corpus.log_mel(clips[number])
        silence = torch.full((batch["x_mask"][i].sum() - len(log_mel), 80), math.log(audio.LOG_FLOOR))
        expected = audio.normalise(torch.cat([log_mel, silence]), *batches.corpus.statistics)
        assert torch.equal(x[i, : len(expected)], expected) and not x[i, len(expected) :].any()
        silent += len(silence)
    assert silent and x.dtype == torch.float32


def test_a_clip_is_stretched_to_a_tempo_drawn_for_it_and_keeps_its_pitch(corpus_folder):
    batches = batches_for(corpus_folder, "--tempo_jitter", "0.2")
    clips = {clip.number: clip for clip in batches.corpus.clips("train")}
    batch = batches.train(3)
    tempi = []
    for i, number in enumerate(batch["number"].tolist()):
        clip, frames = clips[number], batch["frames"][i].item()
        tempi.append(frames / clip.frames)
        assert batch["tempo"][i].item() == pytest.approx(frames / clip.frames)
        assert batch["x_mask"][i].sum() == frames
        # any sound lasts longer, and is where it was in the spectrum
        log_mel = batches.corpus.log_mel(clip)
        stretched = batch["x"][i, :frames].float()
        assert torch.allclose(stretched.mean(0), log_mel.mean(0), atol=0.15)
        middle = torch.tensor(data.stretch(log_mel.numpy(), frames)[frames // 2])
        assert torch.allclose(stretched[frames // 2], middle, atol=1e-2)
    assert 0.8 <= min(tempi) < 0.97 and 1.03 < max(tempi) <= 1.2 or len(set(tempi)) == len(tempi)
    assert all((b["tempo"] == 1).all() for b in batches.validation())


def test_stretching_a_ramp_gives_a_ramp():
    ramp = np.arange(10, dtype=np.float32)[:, None]
    for length in (5, 20):
        stretched = data.stretch(ramp, length)
        assert stretched.shape == (length, 1) and (np.diff(stretched[1:-1, 0], 2) < 1e-5).all()
        assert stretched.mean() == pytest.approx(4.5)
    assert data.stretch(ramp, 10) is ramp


def test_noise_is_drawn_from_seed_step_and_row_alone(corpus_folder):
    batches = batches_for(corpus_folder, "--text_condition_dropout", "0")
    batch = batches.train(5)
    for n, length in enumerate(batch["x_mask"].sum(1).tolist()):
        rng = np.random.default_rng((batches.config.seed, data.TRAIN, 5, n))
        rng.random(3)  # text dropped, silence, its length
        batches.sample_time(rng)
        expected = rng.standard_normal((length, 80), dtype=np.float32)
        assert np.array_equal(batch["noise"][n, :length], expected)


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


def test_two_ranks_and_two_micro_batches_see_what_one_process_sees(corpus_folder):
    alone = batches_for(corpus_folder, *VARIED, "--batch_size", "16")
    ranks = [
        batches_for(corpus_folder, *VARIED, "--batch_size", "4", "--grad_accum", "2", rank=rank, world=2)
        for rank in (0, 1)
    ]
    for step in (0, 1, 7):
        assert_same_rows(
            rows_of([alone.train(step)]), rows_of([r.train(step, micro) for micro in (0, 1) for r in ranks])
        )
    assert_same_rows(rows_of(alone.validation()), rows_of(ranks[0].validation() + ranks[1].validation()))


def test_padding_changes_nothing_but_zeros(corpus_folder):
    tight, loose = (
        batches_for(corpus_folder, *VARIED, "--pad_multiple", "1"),
        batches_for(corpus_folder, *VARIED, "--pad_multiple", "64"),
    )
    for step in (0, 4):
        a, b = tight.train(step), loose.train(step)
        assert a["x"].shape[1] < b["x"].shape[1]
        assert_same_rows(rows_of([a]), rows_of([b]))


def test_batches_are_a_pure_function_of_the_step(corpus_folder):
    batches, again = batches_for(corpus_folder, *VARIED), batches_for(corpus_folder, *VARIED)
    again.train(1), again.validation()
    for key, value in batches.train(2).items():
        assert torch.equal(value, again.train(2)[key])
    assert not torch.equal(batches.train(2)["t"], batches.train(3)["t"])


def test_text_is_dropped_and_silence_added_as_often_as_asked(corpus_folder):
    batches = batches_for(corpus_folder, *VARIED, "--batch_size", "64")
    drawn = [batches.train(step) for step in range(6)]
    dropped = torch.cat([b["text_dropped"] for b in drawn]).float().mean()
    silence = torch.cat([b["x_mask"].sum(1) - b["frames"] for b in drawn])
    assert 0.2 < dropped < 0.4 and 0.4 < (silence > 0).float().mean() < 0.6
    assert silence.max() <= 0.5 * MEL.sample_rate / MEL.hop
    plain = batches_for(corpus_folder, "--text_condition_dropout", "0", "--batch_size", "64").train(0)
    assert not plain["text_dropped"].any() and torch.equal(plain["x_mask"].sum(1), plain["frames"])


def test_validation_covers_every_clip_once_with_times_spread_evenly(corpus_folder):
    batches = batches_for(corpus_folder, *VARIED, "--overfit", "20", "--batch_size", "8")
    found = batches.validation()
    numbers = torch.cat([b["number"] for b in found]).tolist()
    assert [len(b["t"]) for b in found] == [8, 8, 4] and sorted(numbers) == [
        clip.number for clip in batches.corpus.clips("val")
    ]
    t = torch.cat([b["t"] for b in found])
    assert torch.histc(t, 5, 0, 1).min() >= 3 and t.min() >= 0.001 and t.max() <= 0.999
    assert not any(b["text_dropped"].any() or (b["x_mask"].sum(1) != b["frames"]).any() for b in found)
    shares = [
        batches_for(corpus_folder, "--overfit", "20", "--batch_size", "8", rank=rank, world=3).validation()
        for rank in range(3)
    ]
    assert sorted(sum(len(b["t"]) for b in share) for share in shares) == [6, 7, 7]


def test_cached_features_are_what_the_frozen_encoder_makes_of_each_row(corpus_folder, t5_folder, tmp_path):
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    frozen = (*VARIED, "--text_encoder", str(t5_folder), "--device", "cpu")
    with pytest.raises(configs.UserError, match="system.py prepare"):
        batches_for(folder, *frozen)
    tts.TextToSpeech.prepare(config_for(folder, *frozen))
    encoder, tokenizer, width = text_encoder.load_text_encoder(str(t5_folder))
    config = config_for(folder, *frozen)
    batch = data.SpeechBatches(config, data.Corpus(config), tokenizer).train(0)
    assert (
        batch["features"].shape == (*batch["ids"].shape, width) and batch["features"].dtype == torch.float16
    )
    expected = encoder(batch["ids"], batch["text_mask"])
    torch.testing.assert_close(
        batch["features"].float()[batch["text_mask"]], expected[batch["text_mask"]], rtol=2e-3, atol=2e-3
    )
    assert not batch["features"][~batch["text_mask"]].any()
    network = tts.TextToSpeech(config, *data.Corpus(config).statistics)
    with_encoder = {name: value for name, value in batch.items() if name != "features"}
    torch.testing.assert_close(network(batch)["loss"], network(with_encoder)["loss"], rtol=1e-3, atol=0)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("features*")}
    tts.TextToSpeech.prepare(config)
    assert len(times) == 2 and times == {path: path.stat().st_mtime_ns for path in folder.glob("features*")}
    next(path for path in times if "spans" not in path.name).write_bytes(b"half")
    with pytest.raises(configs.UserError, match="missing, or damaged"):
        batches_for(folder, *frozen)
