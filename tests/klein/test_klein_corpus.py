"""TODO."""

import pytest
import test_demo_corpus
import torch

import data as model
import system
from config import UserError
from corpora import demo, prepare
from klein.data import WaveCorpus, wave_format


def test_the_demo_speaks_with_another_voice_into_waves(tmp_path):
    made = {}
    for name in ("espeak:en-us", "espeak:en-us+m3"):
        config = system.load_config(
            "",
            [
                "--system=spectrogram",
                "--corpus=demo",
                f"--data_dir={tmp_path / name}",
                "--sentences=3",
                f"--voice={name}",
            ],
        )
        prepare.prepare_speech(config, wave_format(config.picture), lambda config, clips, out: clips)
        made[name] = WaveCorpus(config)
    clips = [corpus.clips("train")[0] for corpus in made.values()]
    assert clips[0].text == clips[1].text == demo.distinct_sentences("matrix", 1, held_out=False)[0]
    a, b = (corpus.wave(corpus.clips("train")[0]) for corpus in made.values())
    assert len(a) / 16000 == pytest.approx(len(b) / 16000, abs=0.5) and (
        len(a) != len(b) or not torch.allclose(a, b, atol=0.1)
    )
    with pytest.raises(UserError, match="packed with n_fft None, but 1024 is wanted"):
        model.Corpus(test_demo_corpus.config_for(tmp_path / "espeak:en-us", "--mel.sample_rate=16000"))
