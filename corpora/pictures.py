"""Pictures from disk: (3, H, W) in [0, 1]."""

import warnings

import torch
from PIL import Image
from torch import Tensor

from config import UserError

TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_picture(path: str) -> tuple[Tensor, dict]:
    """A PNG, JPEG or WebP, and what is written beside its pixels; raises UserError for what is no picture."""
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image,
        ):
            info = dict(image.info)
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, *TOO_LARGE) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: not a readable picture ({reason})") from e
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(rgb.height, rgb.width, 3)
    return pixels.permute(2, 0, 1) / 255, info
