"""Random crops of pieces: never silent, of one loudness, as long as asked for."""

import numpy as np
import torch
import torch.nn.functional as F

from music import latents


def test_a_crop_is_a_stretch_of_the_piece_without_its_mean_at_peak_a_half():
    wave = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) + 3
    crop = latents.random_crop(wave, 10_000, np.random.default_rng(0))
    places = {n: latents.random_crop(wave, 10_000, np.random.default_rng(n)) for n in range(20)}
    assert len(crop) == 10_000 and abs(crop.mean()) < 1e-5 and abs(crop.abs().max() - 0.5) < 1e-5
    correlation = F.conv1d((wave - 3)[None, None], crop[None, None])[0, 0]
    start = correlation.argmax()
    inside = wave[start : start + 10_000] - wave[start : start + 10_000].mean()
    torch.testing.assert_close(crop / crop.norm(), inside / inside.norm(), rtol=0, atol=1e-5)
    assert len({tuple(found[:5].tolist()) for found in places.values()}) == 20


def test_a_short_piece_ends_in_silence():
    crop = latents.random_crop(torch.sin(torch.arange(3000) / 10), 10_000, np.random.default_rng(0))
    assert crop[:3000].any() and not crop[3000:].any()


def test_a_crop_is_never_silent():
    wave = torch.zeros(1_000_000)
    wave[400_000:400_050] = 0.7
    for seed in range(20):
        assert latents.random_crop(wave, 1000, np.random.default_rng(seed)).abs().max() > 0.49
