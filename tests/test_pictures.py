"""Pictures from disk, as a viewer shows them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from corpora.pictures import read_picture

ORIENTATION = 0x112  # EXIF's tag
# what a viewer does, by the orientation: (3, H, W) as stored -> as seen
AS_SEEN = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}


def stored() -> torch.Tensor:
    """(3, 4, 6) in [0, 1], 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 4, 6), generator=generator) / 255


def as_image(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("orientation", AS_SEEN)
def test_a_picture_is_turned_as_its_exif_says(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    as_image(stored()).save(tmp_path / f"x.{kind}", exif=exif, lossless=True)
    picture, _ = read_picture(str(tmp_path / f"x.{kind}"))
    assert torch.equal(picture, AS_SEEN[orientation](stored()))


@pytest.mark.parametrize("exif", [b"junk", b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_is_damaged_turns_nothing(tmp_path, exif):
    as_image(stored()).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read_picture(str(tmp_path / "x.png"))[0], stored())


def swapped_profile(name: str) -> bytes:
    """sRGB's ICC profile under another name, in which red is what sRGB calls green, and green red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"****").replace(b"gXYZ", b"rXYZ").replace(b"****", b"gXYZ")


@pytest.mark.parametrize(
    "profile, seen",
    [
        (swapped_profile("Mine"), 1),
        (swapped_profile("sRGB"), 0),
        (b"junk", 0),
        (swapped_profile("Mine")[:200], 0),
    ],
    ids=["another", "sRGB", "junk", "cut"],
)
def test_the_colours_are_those_that_the_profile_means(tmp_path, profile, seen):
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "x.png", icc_profile=profile)
    picture, _ = read_picture(str(tmp_path / "x.png"))
    assert picture.argmax(0).item() == seen and picture[seen].item() > 0.98 and picture.sum() < 1.05


def test_sixteen_bits_of_grey_are_the_same_grey(tmp_path):
    grey = np.arange(24).reshape(4, 6) * 10
    Image.fromarray((257 * grey).astype(np.uint16)).save(tmp_path / "x.png")
    picture, _ = read_picture(str(tmp_path / "x.png"))
    assert torch.equal(picture, torch.from_numpy(grey / 255).float().expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_white_and_what_is_not_keeps_its_colour(tmp_path, mode):
    """Black beside grey; the black is transparent."""
    grey = Image.fromarray(np.array([[0, 100]], np.uint8))
    image = grey.convert(mode)
    options = {}
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    else:
        options["transparency"] = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))
    image.save(tmp_path / "x.png", **options)
    picture, _ = read_picture(str(tmp_path / "x.png"))
    assert (255 * picture).round().int().tolist() == [[[255, 100]]] * 3


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "x.webp", lossless=True)
    picture, _ = read_picture(str(tmp_path / "x.webp"))
    assert (255 * picture).round().int().flatten().tolist() == [255, 127, 127]
