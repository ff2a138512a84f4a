"""CLAP: captions and sounds as vectors in one space; the network is conditioned with it, and judged by it.

Vectors leave it on the CPU. Source: transformers' ClapModel; LAION-CLAP (arXiv 2211.06687).
"""

import functools

import numpy as np
import torch
import transformers
from torch import Tensor

import audio
from config import UserError
from pretrained import frozen


class Clap:
    """A ClapModel: captions as its text tower encodes them, and captions and sounds as vectors in one space.

    The whole model is loaded and its text tower taken from it: ClapTextModel.from_pretrained finds none of
    its weights in such a checkpoint, and FluxMusic, which calls it, encodes captions with random ones.
    """

    def __init__(self, option: str, name: str, device: torch.device):
        """option: what errors call the name. raises UserError for what cannot be loaded."""
        self.device = device
        self.model = frozen.load_frozen(transformers.ClapModel, name, "", option, device)
        try:
            offline = frozen.local_files_only(name)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=offline)
            self.extractor = transformers.ClapFeatureExtractor.from_pretrained(name, local_files_only=offline)
        except Exception as e:  # a damaged file raises almost anything
            missing = "its tokenizer or feature extractor cannot be loaded"
            raise UserError(f"{option} {name}: {missing} ({frozen.one_line(e)})") from e

    def text_hidden(self, text: str) -> Tensor:
        """(1, V), what the text tower's pooler puts out."""
        output = self.model.text_model(**self.tokenize(text))
        return output.pooler_output.cpu()

    def embed_text(self, text: str) -> np.ndarray:
        """(D,), comparable with sounds."""
        output = self.model.get_text_features(**self.tokenize(text))
        return output.pooler_output[0].cpu().numpy()

    def tokenize(self, text: str) -> dict:
        inputs = self.tokenizer([text], truncation=True, max_length=77, return_tensors="pt")
        return inputs.to(self.device)

    def embed_audio(self, wave: Tensor, sample_rate: int) -> np.ndarray:
        """(D,), comparable with captions: the first ten seconds of a wave (N,)."""
        rate = self.extractor.sampling_rate
        wave = audio.resample(wave, sample_rate, rate)
        wave = wave[: self.extractor.nb_max_samples].numpy()
        inputs = self.extractor(wave, sampling_rate=rate, return_tensors="pt").to(self.device)
        output = self.model.get_audio_features(**inputs)
        return output.pooler_output[0].cpu().numpy()


load_clap = functools.cache(Clap)  # (option, hub id or folder, device): each loaded once
