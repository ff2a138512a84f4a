"""The configs of `speech_align` and `speech_image`: speech and pictures in one space, pictures from that.

Source of defaults: Speak the Art (arXiv 2601.00827), SpeechCLIP (arXiv 2210.00705), VQ-Diffusion for ImageNet
(arXiv 2111.14822).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from config import (
    MOVABLE,
    Config,
    Count,
    Data,
    Eval,
    Model,
    NonNegative,
    Place,
    Positive,
    Sample,
    Share,
    Text,
    Train,
    Whole,
    section,
)

Languages = Annotated[tuple[Literal["en", "ar"], ...], Field(strict=False, min_length=1)]


@section
class PictureData(Data):
    # shapes: drawn and described on the spot | flickr8k: and its audio captions | s2igan: CUB-200 or
    # Oxford-102 with spoken captions, as S2IGAN lays them out | listed: see speech2image/corpora.py
    corpus: Literal["shapes", "flickr8k", "s2igan", "listed"] = "flickr8k"
    # packed shards, or a folder as published, which is packed on first use
    data_dir: Text = "data/flickr8k"
    langs: Languages = ("en",)  # of the descriptions, drawn equally often: [en, ar]


# Stage 1: speech beside pictures


@section
class AlignData(PictureData):
    # frames: batches are padded to a multiple, so torch.compile meets few shapes
    pad_multiple: Count = 16


@section
class AlignModel(Model):
    """Width: where align.speech is scratch."""

    layers: Count = 1  # 1 in the paper


@section
class ImageTower:
    # hub id or folder of a CLIPVisionModelWithProjection, frozen | scratch: a small one, made by
    # prepare, that learns to tell pictures by the words of their descriptions
    image: Text = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@section
class Align(ImageTower):
    """SpeechCLIP's parallel branch, as Speak the Art has it."""

    # hub id or folder of a HubertModel, frozen | scratch: log-mels, trained along
    speech: Text = "facebook/hubert-large-ll60k"
    temperature: Positive = 0.07  # at the start: it is trained
    crop_sec: Positive = 6.4  # of a description, at random, when it is trained on
    noise_prob: Share = 0.5  # chance that a description is trained on under white noise
    min_snr_db: NonNegative = 5.0  # the loudest of it; the softest is 30 dB above
    # how much louder or softer, at most, a description is made, before the noise
    gain_db: NonNegative = 6.0
    hidden_spans: Whole = 2  # stretches of time, and of channels, that are hidden in training
    hidden_share: Share = 0.1  # of the whole, the longest of them


@section
class SpeechAlignConfig(Config):
    system: Literal["speech_align"] = "speech_align"
    out_dir: Text = "out/speech_align"
    data: AlignData = AlignData()
    align: Align = Align()
    model: AlignModel = AlignModel()
    train: Train = Train()
    eval: Eval = Eval()

    fixed: ClassVar[tuple[str, ...]] = ("data.corpus", "align", "model")


# Stage 2: pictures from stage 1's embedding of the speech


@section
class Codes:
    """Pictures as codes, and the diffusion that makes them."""

    # a run of system speech_align, or a checkpoint: its embedding of the speech is the condition
    stage1: Place = "out/speech_align"
    # R@1 below which stage 1 did not learn, and stage 2 is not begun
    require_r1: Annotated[NonNegative, MOVABLE] = 0.35
    # hub id or folder of a diffusers VQModel | scratch: a small one of 64 codes, made by prepare
    vq: Place = "amused/amused-256"
    vq_steps: Count = 1200  # in which prepare trains that one; the classifier takes a third of them
    picture_size: Count = 256  # pixels
    grid: Count = 16  # codes in a row and in a column
    # codes of the codebook, the most used; 974 is what ImageNet's 16,384 shrink to
    kept: Annotated[int, Field(gt=0, lt=2**15)] = 974
    # prepare trains a small classifier of what pictures show, by the parts of labels like red-circle-left
    judge: bool = False
    # adaln: learned projection to scale and shift | sta: its halves are these, as published | concat:
    # a token | cross: attention to four
    condition: Literal["adaln", "sta", "concat", "cross"] = "adaln"
    # of the embedding, of length 1 as published; 0: the root of its width, so variance 1
    condition_scale: NonNegative = 0.0
    conv_ratio: Count = 4  # how much wider a block is between its two convolutions
    diffusion_steps: Count = 100
    # gamma_T: codes that are MASK at the last step; the others are random ones
    mask_share: Annotated[float, Field(gt=0, le=0.99999)] = 0.99999
    auxiliary_weight: NonNegative = 1.0e-3  # of the cross-entropy beside the bound


@section
class ImageModel(Model):
    """As published."""

    width: Count = 512
    layers: Count = 24
    heads: Count = 16


@section
class ImageFlow:
    # of training descriptions, which the network must do without
    text_condition_dropout: Share = 0.1
    timestep_shift: ClassVar[float] = 1.0  # diffusion's own steps: validation takes them evenly


@section
class ImageSample(Sample):
    # of each code's distribution, the likeliest part that is drawn from; guidance wants 1
    truncation: Annotated[float, Field(gt=0, le=1)] = 0.86


@section
class ImageEval(Eval):
    features: Text = ""  # a TorchScript file of Inception, for FID and IS


@section
class SpeechImageConfig(Config):
    system: Literal["speech_image"] = "speech_image"
    out_dir: Text = "out/speech_image"
    data: PictureData = PictureData()
    align: ImageTower = ImageTower()
    codes: Codes = Codes()
    model: ImageModel = ImageModel()
    flow: ImageFlow = ImageFlow()
    sample: ImageSample = ImageSample()
    train: Train = Train()
    eval: ImageEval = ImageEval()

    fixed: ClassVar[tuple[str, ...]] = ("data.corpus", "align", "codes", "model")
