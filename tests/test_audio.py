"""Sound in and out, against BigVGAN's own mel and real recordings."""

import time

import pytest
import soundfile
import torch

import audio
from config import Mel, UserError

MEL = Mel()


@pytest.fixture(scope="module")
def spoken() -> torch.Tensor:
    return audio.espeak("Julia ordered thirty purple umbrellas.", MEL.sample_rate)


def bigvgan_mel(wave):
    meldataset = pytest.importorskip("bigvgan.meldataset")
    return meldataset.mel_spectrogram(wave[None], MEL.n_fft, MEL.n_mels, MEL.sample_rate, MEL.hop, MEL.n_fft, MEL.fmin, MEL.fmax)[0].T


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
    errors = {shift: (rebuilt[8 + shift:len(x) - 8 + shift] - x[8:-8]).abs().mean().item() for shift in (-1, 0, 1)}
    assert errors[0] < 0.2 and errors[0] < 0.5 * min(errors[-1], errors[1])


def test_griffin_lim_is_ten_times_faster_than_speech_on_one_core(spoken):
    threads, x = torch.get_num_threads(), audio.log_mel(spoken.repeat(3), MEL)
    torch.set_num_threads(1)
    audio.griffin_lim(x[:50], MEL)
    started = time.process_time()              # of this process: other processes on the machine do not count
    audio.griffin_lim(x, MEL)
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    assert seconds / (len(x) * MEL.hop / MEL.sample_rate) < 0.1


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


def test_espeak_says_what_it_is_told(spoken):
    assert 1.5 < len(spoken) / MEL.sample_rate < 4 and 0.2 < spoken.abs().max() <= 1
    assert len(audio.espeak("No.", MEL.sample_rate)) < len(spoken)
    slow = audio.espeak("Julia ordered thirty purple umbrellas.", MEL.sample_rate, rate=90)
    assert len(slow) > 1.3 * len(spoken)


def test_espeak_refuses_a_voice_that_it_does_not_have():
    with pytest.raises(UserError, match="klingonese"):
        audio.espeak("Hello.", MEL.sample_rate, voice="klingonese")
