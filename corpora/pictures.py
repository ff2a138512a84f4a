"""Pictures from disk: (3, H, W) in [0, 1]."""

import contextlib
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
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
            rgb = as_seen(image)
    except (OSError, SyntaxError, ValueError, *TOO_LARGE) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: not a readable picture ({reason})") from e
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(rgb.height, rgb.width, 3)
    return pixels.permute(2, 0, 1) / 255, info


def as_seen(image: Image.Image) -> Image.Image:
    """A picture in RGB as a viewer shows it: turned as EXIF says, in the colours that its profile means, 16
    bits as 8, transparency on white.
    """
    image.load()
    with contextlib.suppress(SyntaxError, ValueError):  # EXIF that is damaged turns nothing
        image = ImageOps.exif_transpose(image)
    image = in_srgb(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert would clip
        grey = np.asarray(image) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def in_srgb(image: Image.Image) -> Image.Image:
    """A picture in RGB whose ICC profile says that its numbers are other colours than sRGB's, in sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode != "RGB":
        return image
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):  # a profile that is damaged changes nothing
        return image
