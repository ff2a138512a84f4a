"""What Klein generates: a picture and the wave decoded from it; and what picture and VAE alone cost."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.image import imsave

from klein import picture as klein_picture
from klein.config import Picture
from klein.picture import decode, reconstruct_wave, save_png
from pretrained import frozen


@dataclass
class PictureOutput:
    """A generated picture (3, H, W) in [0, 1] and the wave (N,) at `sample_rate` Hz that was decoded from it.

    path_distance (F, T): how far each colour lies from the colour path, 0 (certain) to 0.71 (a guess).
    """

    wave: torch.Tensor
    sample_rate: int
    picture: torch.Tensor
    path_distance: torch.Tensor
    picture_config: Picture
    text: str

    def draw(self, stem: Path) -> dict[str, str]:
        """Write the picture, its settings inside, and a confidence map; returns the file names by kind."""
        picture = stem.with_name(stem.name + ".png")
        save_png(picture, self.picture, self.picture_config, text=self.text)
        confidence = stem.with_name(stem.name + ".confidence.png")
        distance = self.path_distance.numpy()
        # bright is certain; 0.71 is the largest distance there is
        imsave(confidence, distance, vmin=0, vmax=0.71, cmap="magma_r")
        return {"picture": picture.name, "confidence": confidence.name}


def decode_picture(picture: torch.Tensor, p: Picture, text: str) -> PictureOutput:
    """Decode a picture (3, H, W) in [0, 1] on the CPU; first rounded to 8 bits, as it is in the PNG."""
    picture = picture.float().cpu()
    picture = (255 * picture).round() / 255
    db, path_distance = decode(picture, p)  # (F, T) both
    wave = reconstruct_wave(db, p)
    return PictureOutput(wave, p.sample_rate, picture, path_distance, p, text)


def vae_roundtrip(vae: frozen.Frozen, wave: torch.Tensor, p: Picture, text: str) -> PictureOutput:
    """Encode a wave (N,) to a picture, pass that through the VAE and decode it."""
    picture = klein_picture.encode(wave, p)  # (3, H, W)
    tokens = vae.module.encode(picture[None])  # (1, N, C)
    pictures = vae.module.decode(tokens, p.canvas_height, p.canvas_width)
    return decode_picture(pictures[0], p, text)
