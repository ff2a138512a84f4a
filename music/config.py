"""The config of system `music`: FluxMusic on AudioLDM2's latents.

Source of sizes and defaults: FluxMusic's published checkpoints and programs, AudioLDM2's vae/ and vocoder/.
"""

import dataclasses
from typing import ClassVar, Literal

from pydantic import model_validator

from config import (
    Config,
    Count,
    Data,
    Eval,
    Flow,
    FlowSample,
    Mel,
    Model,
    NonNegative,
    Place,
    Positive,
    Share,
    Text,
    Train,
    require,
    section,
)


@dataclasses.dataclass(frozen=True)
class Size:
    """FluxMusic's network, in FLUX's names."""

    width: int
    depth: int  # blocks of two streams
    depth_single_blocks: int  # blocks of one
    axes_dim: tuple[int, int, int]  # how many numbers of a head turn by nothing, by time, by frequency
    heads: int = 16
    channels: int = 32  # of a token
    bands: int = 8  # tokens of one time: 64 mel bins / 4 (VAE) / 2
    text_width: int = 4096  # of T5-XXL
    vector_width: int = 768  # of CLAP's text tower


SIZES = {
    "small": Size(512, 8, 16, (8, 12, 12)),  # 142,333,984 parameters
    "base": Size(768, 12, 24, (16, 16, 16)),  # 473,971,232
    "large": Size(1024, 12, 24, (16, 24, 24)),  # 840,628,256
    "giant": Size(1408, 16, 32, (16, 36, 36)),  # 2,109,904,928, the paper's
    "giant_full": Size(1408, 12, 24, (16, 36, 36)),  # 1,586,238,752: Giant-Full, trained for longer
}


@section
class MusicMel(Mel):
    """AudioLDM2's, which its VAE and vocoder want."""

    sample_rate: Count = 16000  # Hz
    hop: Count = 160  # samples a frame: 100 frames a second
    n_mels: Count = 64  # bins
    centred: bool = True  # frame m stands at sample m hop, and no 1e-9 beside the magnitude


@section
class MusicData(Data):
    # music: recordings with captions, a JSON list, or a folder with a table | pieces: of known key,
    # tempo and timbre, played on the spot
    corpus: Literal["music", "pieces"] = "music"
    # packed shards, or recordings as published, which are packed on first use
    data_dir: Text = "data/music"
    max_seconds: Positive = 120.0  # the longest piece that is asked for


@section
class MusicModel(Model):
    """Read where music.size is own, but for text_encoder."""

    # T5 hub id or folder, frozen | scratch: a small one, trained along
    text_encoder: Text = "google/t5-v1_1-xxl"


@section
class Music:
    # as published | own: of model.width, heads, layers
    size: Literal["small", "base", "large", "giant", "giant_full", "own"] = "small"
    # own: of model.layers, those with a stream for the text and one for the music
    double_blocks: Count = 2
    weights: Place = ""  # a published checkpoint to start from; "" = random weights
    # hub id or folder of a ClapModel: a text's vector | pooled: the mean of its features
    vector_encoder: Place = "laion/larger_clap_music"
    text_width: Count = 4096  # own: numbers a token of model.text_encoder, if that is not scratch
    vector_width: Count = 768  # own: numbers of a vector, if it is not pooled
    caption_tokens: Count = 256  # of a text; more are cut off
    # masked: nobody attends to it | last: the last token's features to the end, for published weights
    text_padding: Literal["masked", "last"] = "masked"
    # of captions dropped, those that lose features and vector together; FluxMusic: 0
    joint_dropout: Share = 1.0
    # hub id or folder with AudioLDM2's vae/ and vocoder/ | patches: the log-mel as it is
    autoencoder: Place = "cvssp/audioldm2"
    patch_frames: Count = 8  # patches: mel frames of a token
    patch_mels: Count = 8  # patches: mel bins of a token
    crops: Count = 8  # of each piece, whose latents are cached; patches: any, drawn anew each time
    # of music in one go; longer pieces are made of overlapping stretches
    crop_seconds: Positive = 10.24


@section
class MusicFlow(Flow):
    # what the network puts out, published ones v; the loss is in v either way
    predict: Literal["x", "v"] = "v"


@section
class MusicSample(FlowSample):
    euler_steps: Count = 25  # one network call each (guided: one call on a double batch)
    cfg_scale: NonNegative = 7.0  # 1 = no guidance
    vocoder: Text = "own"  # own: that of music.autoencoder | griffinlim
    # the text that guidance steers away from; "" is what training gives dropped captions
    negative: Text = ""


@section
class MusicEval(Eval):
    # hub id or folder of a ClapModel, as laion/larger_clap_music: FAD, KAD, CLAP score
    features: Text = ""


@section
class MusicConfig(Config):
    system: Literal["music"] = "music"
    out_dir: Text = "out/music"
    mel: MusicMel = MusicMel()
    data: MusicData = MusicData()
    model: MusicModel = MusicModel()
    music: Music = Music()
    flow: MusicFlow = MusicFlow()
    sample: MusicSample = MusicSample()
    train: Train = Train()
    eval: MusicEval = MusicEval()

    fixed: ClassVar[tuple[str, ...]] = ("mel", "data.corpus", "model", "music", "flow.predict", "flow.min_t")

    def packed_format(self) -> dict:
        """Of packed clips: waves, in rows of a mel frame."""
        return {"sample_rate": self.mel.sample_rate, "hop": self.mel.hop}

    @model_validator(mode="after")
    def check_network(self):
        double = self.music.double_blocks
        layers = self.model.layers
        own = self.music.size == "own"
        below = f"music.double_blocks {double} must be below model.layers {layers}"
        require(not own or double < layers, below)
        published = (
            "music.weights: a published network puts out v and has a size: give --flow.predict v "
            "and --music.size small, base, ..."
        )
        require(not self.music.weights or not own and self.flow.predict == "v", published)
        return self

    @model_validator(mode="after")
    def check_tokens(self):
        options = self.music
        patches = options.autoencoder == "patches"
        token = options.patch_frames if patches else 8  # mel frames: the VAE makes one of 4, a token has 2
        frames = options.crop_seconds * self.mel.sample_rate / self.mel.hop
        whole = abs(frames - round(frames)) < 1e-6 and round(frames) % (2 * token) == 0
        crop = f"music.crop_seconds {options.crop_seconds} are {frames:.6g} mel frames"
        require(whole, f"{crop}, not a multiple of two tokens' {2 * token}")
        bins = f"mel.n_mels {self.mel.n_mels} is no multiple of music.patch_mels {options.patch_mels}"
        require(not patches or self.mel.n_mels % options.patch_mels == 0, bins)
        return self

    @model_validator(mode="after")
    def check_autoencoder(self):
        patches = self.music.autoencoder == "patches"
        vocoder = self.sample.vocoder
        vocoders = (
            f"sample.vocoder {vocoder}: system music has griffinlim, "
            "and own where music.autoencoder is a folder or hub id"
        )
        require(vocoder == "griffinlim" or not patches and vocoder == "own", vocoders)
        mel = (
            "music.autoencoder: AudioLDM2's VAE wants mel.sample_rate 16000, n_fft 1024, hop 160, n_mels 64, "
            "fmin 0, fmax 8000, centred true"
        )
        require(patches or self.mel == MusicMel(), mel)
        size = self.music.size
        latents = f"music.size {size} takes AudioLDM2's latents: give music.autoencoder, or music.size own"
        require(size == "own" or not patches, latents)
        return self
