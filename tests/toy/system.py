"""A whole system, for the tests and as an example: it learns how high to whistle for each word of a text."""

from pathlib import Path

import torch

import audio
from base import MelOutput, System
from config import Config, Mel, Positive, require, section
from corpora.shards import Clip
from metric import Score

MEL = Mel()


@section
class ToyConfig(Config):
    hertz: Positive = 100.0  # that a word adds


class Whistles:
    """Texts of one to three words."""

    fingerprint = "whistles"
    statistics = ()

    def __init__(self, config):
        self.folder = Path(config.data.data_dir)
        self.hertz = config.hertz
        require(self.folder.is_dir(), f"{self.folder}: made by `python system.py prepare`")

    def clips(self, split):
        return [Clip(f"{split}-{n}", "la " * n, split, wav=None, frames=43) for n in (1, 2, 3)]

    def recording(self, clip):
        return whistle(clip.text, self.hertz).wave, MEL.sample_rate


class WordBatches:
    def __init__(self, config, corpus, tokenizer, rank, world):
        words = torch.arange(1.0, 1 + config.train.batch_size)
        self.batch = {"words": words, "t": torch.zeros_like(words), "frames": torch.full_like(words, 43)}

    def train(self, step, micro=0):
        return self.batch  # what is random in others is drawn here, from (config.seed, step, micro, rank)

    def validation(self):
        return [self.batch]


class Toy(System):
    config_class = ToyConfig
    corpus_class = Whistles
    batches_class = WordBatches
    scores = {"pitch_error": Score("pitch error", "Hz")}
    frame_rate = MEL.sample_rate / MEL.hop

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.pitch = torch.nn.Parameter(torch.zeros(()))  # of a word, as a fraction of config.hertz

    @staticmethod
    def prepare(config):
        Path(config.data.data_dir).mkdir(parents=True, exist_ok=True)

    def forward(self, batch):
        error = (self.pitch - 1) * batch["words"]
        return {"loss": error.square().mean(), "pitch_loss": error.abs().mean()}

    def sample(self, prompts, settings):
        hertz = self.config.hertz * self.pitch.item()
        return [whistle(prompt.text, hertz) for prompt in prompts]

    def reference(self, corpus, clip):
        return whistle(clip.text, corpus.hertz)

    def score(self, output, corpus, clip):
        measured = 2 * torch.fft.rfft(output.wave).abs().argmax().item()  # Hz: half a second is measured
        return {"pitch_error": abs(measured - corpus.hertz * len(clip.text.split()))}


def whistle(text, hertz):
    """Half a second, `hertz` higher for every word."""
    seconds = torch.arange(MEL.sample_rate // 2) / MEL.sample_rate
    wave = torch.sin(2 * torch.pi * hertz * len(text.split()) * seconds)
    return MelOutput(text, wave, MEL.sample_rate, audio.log_mel(wave, MEL), MEL)
