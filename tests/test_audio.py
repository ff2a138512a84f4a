"""Sound in and out: log-mels against BigVGAN's and AudioLDM2's own, Griffin-Lim, files."""

import math

import librosa
import pytest
import soundfile
import torch
from fuzz import bounded
from torch.utils._python_dispatch import TorchDispatchMode

import audio
from config import Mel, UserError
from corpora import prepare
from corpora.shards import Clip

MEL = Mel()


def bigvgan_mel(wave):
    meldataset = pytest.importorskip("bigvgan.meldataset")
    return meldataset.mel_spectrogram(
        wave[None], MEL.n_fft, MEL.n_mels, MEL.sample_rate, MEL.hop, MEL.n_fft, MEL.fmin, MEL.fmax
    )[0].T


def test_log_mel_is_bigvgans_on_speech(spoken):
    assert torch.allclose(audio.log_mel(spoken, MEL), bigvgan_mel(spoken), atol=1e-5)


def test_log_mel_is_bigvgans_on_real_recordings(recordings):
    for path in sorted((recordings / "wavs").glob("*.wav"))[:8]:
        wave = audio.load_wav(path, MEL.sample_rate)
        assert torch.allclose(audio.log_mel(wave, MEL), bigvgan_mel(wave), atol=1e-5), path.name


def test_a_wave_has_a_frame_for_every_whole_hop():
    for samples in (256, 1000, 22050):
        assert audio.log_mel(torch.randn(samples), MEL).shape == (samples // 256, 80)


def test_silence_is_the_floor():
    assert torch.allclose(audio.log_mel(torch.zeros(5000), MEL).exp(), torch.full((19, 80), audio.LOG_FLOOR))


def test_normalise_and_back():
    x = torch.randn(5, 80)
    assert torch.allclose(audio.denormalise(audio.normalise(x, -5.0, 2.0), -5.0, 2.0), x, atol=1e-6)


def test_the_inverted_mel_has_the_same_mel(spoken):
    x = audio.log_mel(spoken, MEL)
    magnitude = audio.invert_mel(x, MEL)
    assert magnitude.min() >= 0
    assert ((audio.mel_filters(MEL) @ magnitude).clamp_min(1e-5).log().T - x).abs().mean() < 0.01


def test_griffin_lim_keeps_the_spectrogram_and_its_place_in_time(spoken):
    x = audio.log_mel(spoken, MEL)
    wave = audio.griffin_lim(x, MEL)
    assert len(wave) == len(x) * MEL.hop
    rebuilt = audio.log_mel(wave, MEL)
    errors = {
        shift: (rebuilt[8 + shift : len(x) - 8 + shift] - x[8:-8]).abs().mean().item() for shift in (-1, 0, 1)
    }
    assert errors[0] < 0.2 and errors[0] < 0.5 * min(errors[-1], errors[1])


def test_griffin_lim_lets_the_magnitudes_follow_the_wave(spoken):
    """It comes nearer to the log-mel than where they stay what the log-mel alone tells of them."""
    x = audio.log_mel(spoken, MEL)
    kept = audio.reconstruct_phase(audio.invert_mel(x, MEL), MEL.n_fft, MEL.hop, 32)
    kept = torch.nn.functional.pad(kept, (MEL.hop // 2, MEL.hop // 2))
    errors = [(audio.log_mel(wave, MEL) - x).abs().mean() for wave in (audio.griffin_lim(x, MEL), kept)]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("hertz", [440, 3000.5])
def test_the_first_phases_of_a_steady_tone_turn_as_its_own(hertz):
    """From frame to frame; and the bins about the peak are in phase."""
    wave = torch.sin(2 * math.pi * hertz * torch.arange(8192) / 22050)
    spectrum = torch.stft(wave, 1024, 256, window=torch.hann_window(1024), return_complex=True)[:, 4:-4]
    guessed = audio.advance_phases(spectrum.abs()[None], 256)[0]
    peak = spectrum.abs()[:, 0].argmax()
    rest = (spectrum / torch.polar(torch.ones_like(guessed), guessed))[peak - 1 : peak + 2]
    assert (rest[:, 1:] / rest[:, :-1]).angle().abs().max() < 0.05
    assert (rest[1:] / rest[:-1]).angle().abs().max() < 0.05


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += 1
        return operation(*arguments, **(keywords or {}))


def test_griffin_lim_loops_over_its_iterations_and_not_over_frames(spoken):
    x = audio.log_mel(spoken.repeat(3), MEL)
    # what is made once: the window, the filters
    audio.griffin_lim(x[:50], MEL)
    with Operations() as short:
        audio.griffin_lim(x[:50], MEL)
    with Operations() as long:
        audio.griffin_lim(x, MEL)
    assert 0 < long.count < 1.01 * short.count


def test_griffin_lim_makes_clips_of_any_lengths_in_a_batch_as_alone(spoken):
    x = audio.log_mel(spoken, MEL)
    clips = [x[: len(x) - cut] for cut in (0, 1, 3, 60, len(x) - 1, len(x) - 2, len(x))]
    for mel in (MEL, MUSIC_MEL):
        clips = [clip[:, : mel.n_mels] for clip in clips]
        for found, clip in zip(audio.griffin_lim_batch(clips, mel), clips, strict=True):
            alone = audio.griffin_lim(clip, mel)
            assert found.shape == alone.shape == (len(clip) * mel.hop,)
            if len(clip) > 1:
                assert (found - alone).abs().max() < 1e-3 * alone.abs().max()


def test_one_frame_and_no_frame_can_be_vocoded():
    assert len(audio.griffin_lim(torch.zeros(1, 80), MEL)) == 256
    assert len(audio.griffin_lim(torch.zeros(0, 80), MEL)) == 0


def test_wavs_of_any_rate_and_channels_are_read(tmp_path, spoken):
    audio.save_wav(tmp_path / "mono.wav", spoken, MEL.sample_rate)
    assert torch.allclose(audio.load_wav(tmp_path / "mono.wav", MEL.sample_rate), spoken, atol=1e-4)
    soundfile.write(tmp_path / "stereo.flac", torch.stack([spoken, 0 * spoken], 1).numpy(), MEL.sample_rate)
    assert torch.allclose(audio.load_wav(tmp_path / "stereo.flac", MEL.sample_rate), spoken / 2, atol=1e-4)
    assert abs(len(audio.load_wav(tmp_path / "mono.wav", 16000)) - len(spoken) * 16000 / 22050) < 2


@pytest.mark.parametrize("content", [b"", b"RIFF no wave", None])
def test_what_is_no_sound_is_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="broken.wav"):
        audio.load_wav(path, 22050)


@pytest.mark.parametrize("rate", [1, 999, 2**31 - 1])
def test_a_rate_that_is_damage_is_refused_and_not_resampled_to_gigabytes(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", torch.zeros(1000).numpy(), rate)
    with bounded(), pytest.raises(UserError, match=f"x.wav: a sample rate of {rate} Hz"):
        audio.load_wav(tmp_path / "x.wav", 16000)


def test_a_sound_at_a_rate_that_has_nothing_in_common_with_ours_is_the_same_sound():
    """The filter of all phases would take 3 GB."""
    time = torch.arange(44099, dtype=torch.float64) / 44099
    wave = torch.sin(2 * math.pi * 440 * time).float()
    with bounded():
        found = audio.resample(wave, 44099, 16000)
    wanted = torch.sin(2 * math.pi * 440 * torch.arange(16000, dtype=torch.float64) / 16000).float()
    assert len(found) == 16000 and (found - wanted)[100:-100].abs().max() < 0.01


def test_a_sound_of_many_channels_takes_no_more_memory_than_it_has_samples(tmp_path):
    soundfile.write(tmp_path / "x.wav", 0.1 * torch.randn(50, 1000).numpy(), 16000)
    with bounded(2**29):
        assert len(audio.load_wav(tmp_path / "x.wav", 16000)) == 50


def test_a_sound_without_a_sample_is_refused_by_name(tmp_path):
    soundfile.write(tmp_path / "empty.wav", torch.zeros(0).numpy(), 22050)
    for rate in (22050, 16000):
        with pytest.raises(UserError, match="empty.wav: there is not a single sample"):
            audio.load_wav(tmp_path / "empty.wav", rate)


@pytest.mark.parametrize("gain", [-1.0, -0.7, -1.3])
def test_of_channels_that_cancel_the_loudest_is_taken(tmp_path, spoken, gain):
    channels = torch.stack([spoken, gain * spoken], 1) / 2
    soundfile.write(tmp_path / "x.wav", channels.numpy(), 22050, subtype="FLOAT")
    loudest = channels[:, int(abs(gain) > 1)]
    assert torch.equal(audio.load_wav(tmp_path / "x.wav", 22050), loudest)


@pytest.mark.parametrize("count", [1, 2, 6, 8])
def test_channels_that_do_not_cancel_are_averaged(count):
    noise = torch.randn(5000, count)
    assert torch.equal(audio.mix_channels(noise), noise.mean(1))
    alone = noise * (torch.arange(count) == 0)
    assert torch.equal(audio.mix_channels(alone), alone.mean(1))


@pytest.mark.parametrize("full_scale", [128, 32768, 2**31])
def test_a_float_wav_with_the_numbers_of_integers_is_refused_by_name(tmp_path, full_scale):
    wave = 0.2 * torch.randn(5000, 2)
    soundfile.write(tmp_path / "x.wav", wave.numpy(), 22050, subtype="FLOAT")
    assert len(audio.load_wav(tmp_path / "x.wav", 22050)) == 5000
    soundfile.write(tmp_path / "x.wav", (full_scale * wave).numpy(), 22050, subtype="FLOAT")
    with pytest.raises(UserError, match="x.wav: peaks at .* 32768"):
        audio.load_wav(tmp_path / "x.wav", 22050)


def test_a_float_wav_that_peaks_above_full_scale_is_read(tmp_path):
    wave = 2 * torch.sin(torch.arange(5000) / 9)
    soundfile.write(tmp_path / "hot.wav", wave.numpy(), 22050, subtype="FLOAT")
    assert torch.equal(audio.load_wav(tmp_path / "hot.wav", 22050), wave)


@pytest.mark.parametrize("samples", [1, 5000, audio.BLOCK, audio.BLOCK + 1])
def test_a_flac_that_does_not_say_how_long_it_is_is_read_to_its_end(tmp_path, samples):
    soundfile.write(tmp_path / "piped.flac", 0.1 * torch.randn(samples).numpy(), 22050)
    expected = audio.load_wav(tmp_path / "piped.flac", 22050)
    assert len(expected) == samples
    content = bytearray((tmp_path / "piped.flac").read_bytes())
    content[21] &= 0xF0  # 36 bits of STREAMINFO: how many samples, 0 = unknown
    content[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(content)
    assert torch.equal(audio.load_wav(tmp_path / "piped.flac", 22050), expected)
    clip = Clip("piped", "x", "train", str(tmp_path / "piped.flac"))
    if samples > 1:
        assert torch.equal(prepare.read_recording(clip, 22050, resample=False), expected)
        (tmp_path / "piped.flac").write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="piped.flac: not a readable sound file"):
            audio.load_wav(tmp_path / "piped.flac", 22050)


# Music

MUSIC_MEL = Mel(sample_rate=16000, n_fft=1024, hop=160, n_mels=64, fmin=0.0, fmax=8000.0, centred=True)


def test_centred_log_mels_are_those_of_audioldm2():
    """The recipe as FluxMusic has it: magnitudes of a centred, reflected STFT, librosa's Slaney filters, ln
    above 1e-5, one frame cut.
    """
    wave = (
        0.3 * torch.randn(163840, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 163840)
    )
    magnitude = torch.stft(
        wave, 1024, 160, window=torch.hann_window(1024), center=True, pad_mode="reflect", return_complex=True
    ).abs()
    filters = torch.from_numpy(librosa.filters.mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000))
    wanted = (filters @ magnitude).clamp(min=1e-5).log().T[:1024]
    found = audio.log_mel(wave, MUSIC_MEL)
    assert found.shape == (1024, 64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 159, 160, 512, 513, 1600])
def test_a_centred_log_mel_of_any_length_has_a_frame_a_hop(samples):
    assert audio.log_mel(torch.ones(samples), MUSIC_MEL).shape == (max(1, samples // 160), 64)


def test_silence_is_the_floor_of_a_centred_log_mel():
    assert torch.allclose(audio.log_mel(torch.zeros(1600), MUSIC_MEL), torch.tensor(math.log(1e-5)))


def test_griffin_lim_puts_centred_frames_where_they_were():
    wave = torch.zeros(16000)
    wave[8000:8160] = torch.sin(torch.arange(160) / 160 * 2 * math.pi * 20)
    back = audio.griffin_lim(audio.log_mel(wave, MUSIC_MEL), MUSIC_MEL)
    centre = (back.square() * torch.arange(len(back))).sum() / back.square().sum()
    assert len(back) == 16000 and abs(centre - 8080) < 60
