"""Reference scores of pictures are measured again where the picture or the VAE is another."""

import itertools

import config as configs
import system
from tracking import reference_scores


def test_reference_scores_of_pictures_depend_on_the_picture_and_the_vae():
    config = system.load_config("", ["--system=spectrogram"])
    bases = [reference_scores.find_basis(config, "plan", [], ["tiny.en"])]
    for change in ("--picture.hop=128", "--picture.stretch=2", "--klein.base=other", "--klein.vae=patches"):
        changed = configs.overridden(config, [change, "--canvas_width=1600"])
        bases.append(reference_scores.find_basis(changed, "plan", [], ["tiny.en"]))
    assert all(a != b for a, b in itertools.combinations(bases, 2))
