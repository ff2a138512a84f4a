"""All that training a Klein needs and does not find: packed waves, their latents, the prompts' features.

It prints how intelligible recordings are after picture, VAE and Griffin-Lim: no network can do better.
"""

from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import metric
from config import Config, UserError
from corpora import shards
from corpora.prepare import prepare_recordings
from device import preparing_device
from klein import picture, pipeline, segment
from klein.data import WaveCorpus, all_clips, features_file, latents_file, token_mask, wave_format
from klein.output import vae_roundtrip
from pretrained import frozen
from pretrained.asr import load, normalize_transcript


def fetch(config: Config) -> None:
    """The parts of klein.base, one after the other, in the precision that takes the least memory."""
    small = replace(config, train=replace(config.train, dtype="bf16"))
    pipeline.load_klein_tokenizer(config.klein.base)
    for part in ("vae", "text_encoder", "transformer"):
        pipeline.load_klein(small, part)


def prepare(config: Config) -> None:
    """Make what training needs and does not find: packed waves, their latents, the prompts' features.

    Prints the ceiling when it makes latents.
    raises UserError without clips, or if a prompt does not fit.
    """
    k = config.klein
    p = config.picture
    prepare_recordings(config, wave_format(p), cut=segment.segment_clips)
    corpus = WaveCorpus(config)
    clips = all_clips(corpus)
    if not clips:
        longest = config.data.max_seconds
        raise UserError(f"{corpus.folder}: has no clip of at most data.max_seconds {longest}")
    device = preparing_device(config.device)
    latents_path = latents_file(config, corpus)
    features_path, prompts = features_file(config, corpus)
    tokenizer = pipeline.load_klein_tokenizer(k.base)
    ids, mask = pipeline.tokenize_prompts(tokenizer, prompts, k.text_tokens)
    if not latents_path.exists():
        vae = pipeline.load_frozen_klein(config, "vae", device)
        measure_ceiling(config, corpus, vae, device)

        def encode_clips(numbers: list[int]) -> np.ndarray:
            pictures = [picture.encode(corpus.wave(clips[n]), p) for n in numbers]
            latents = vae.module.encode(torch.stack(pictures))  # (B, N, C)
            return latents.cpu().numpy()

        lengths = [len(token_mask(p))] * len(clips)
        shards.cache_features(latents_path, lengths, None, encode_clips, 4, "latents")
    if not k.text_rank and not features_path.exists():
        encoder = pipeline.load_frozen_klein(config, "text_encoder", device)

        def encode_prompts(numbers: list[int]) -> np.ndarray:
            features = encoder(ids[numbers].to(device), mask[numbers].to(device))  # (B, S, D)
            return features.float().cpu().numpy()

        lengths = [k.text_tokens] * len(prompts)
        shards.cache_features(features_path, lengths, None, encode_prompts, 8, "features of the prompts")


def measure_ceiling(config: Config, corpus: WaveCorpus, vae: frozen.Frozen, device: torch.device) -> None:
    """Print the error of recordings after picture, VAE and Griffin-Lim: the best that a network can reach."""
    p = config.picture
    asr = load(config.eval.recogniser, device)
    clips = (corpus.clips(config.eval.split) or corpus.clips("train"))[:16]
    pictures = []
    outputs = []
    for clip in tqdm(clips, desc="ceiling", unit="clip", disable=None):
        wave = corpus.wave(clip)
        pictures.append(picture.encode(wave, p))
        outputs.append(vae_roundtrip(vae, wave, p, ""))
    db, _ = picture.decode(torch.stack(pictures), p)  # (B, F, T)
    decoded_db, _ = picture.decode(torch.stack([output.picture for output in outputs]), p)
    rmse = (decoded_db - db).square().mean().sqrt().item()
    intelligibility = ""
    if asr:
        waves = [output.wave for output in outputs]
        hypotheses = asr.transcribe(waves, p.sample_rate)
        texts = [normalize_transcript(clip.text) for clip in clips]
        pairs = list(zip(texts, map(normalize_transcript, hypotheses)))
        wer = metric.word_error_rate(pairs)
        intelligibility = f", word error rate {100 * wer:.1f} % by {asr.name}"
    print(
        f"the ceiling, {len(clips)} clips through picture, VAE and Griffin-Lim: "
        f"{rmse:.2f} dB RMSE{intelligibility}",
        flush=True,
    )
