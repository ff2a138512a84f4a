"""Diffusion over codes on Metal, which has no float64."""

import torch

from device import widest_float
from speech2image import diffusion


def test_the_posterior_stands_float32():
    """It hangs on small differences."""
    wide = diffusion.MaskAndReplaceDiffusion(codes=16, steps=100, mask_share=0.9)
    narrow = diffusion.MaskAndReplaceDiffusion(codes=16, steps=100, mask_share=0.9)
    narrow = narrow.to(widest_float(torch.device("mps")))
    t = torch.arange(1, 101)
    p0 = torch.rand(100, 5, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    x_t = torch.arange(500).reshape(100, 5) % 17
    for s in (t - 1, t // 2):
        torch.testing.assert_close(
            narrow.posterior(p0, x_t, t, s), wide.posterior(p0, x_t, t, s), rtol=2e-5, atol=1e-9
        )
