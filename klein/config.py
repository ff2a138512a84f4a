"""The config of system `spectrogram`: speech as pictures, by FLUX.2 Klein.

Source of the picture's form and the LoRA's size: the model card of phanerozoic/sonic-plantain.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from config import (
    MOVABLE,
    Config,
    Count,
    Flow,
    FlowSample,
    Model,
    Place,
    Positive,
    SpeechData,
    SpeechEval,
    Text,
    Train,
    Whole,
    require,
    section,
)


@section
class Picture:
    """A clip as an RGB picture of its magnitude spectrogram, top-left on a canvas."""

    sample_rate: Annotated[int, Field(gt=0, le=1_000_000)] = 16000  # Hz
    # samples: rows are its frequencies, 0 Hz the first
    n_fft: Annotated[int, Field(gt=0, le=65536)] = 1024
    hop: Count = 256  # samples a frame
    # of a clip; shorter ones end in silence
    seconds: Annotated[float, Field(gt=0, le=1_000_000)] = 5.0
    canvas_height: Count = 768  # pixels; 512 leaves out the highest of 513 frequencies
    canvas_width: Count = 768  # pixels; 320 x 512 is 640 tokens, 768 x 768 is 2304
    stretch: Count = 1  # columns a frame: 2 survives the VAE better
    # 0 dB is: peak (the clip's own) | fixed (a sine of full scale)
    reference: Literal["peak", "fixed"] = "peak"

    def check(self) -> None:
        """raises UserError for what does not fit; no validator, since the codec finds the width last."""
        columns = (int(self.seconds * self.sample_rate) // self.hop + 1) * self.stretch
        height = self.canvas_height
        width = self.canvas_width
        require(
            self.hop <= self.n_fft / 2,
            f"picture.hop {self.hop} is above half of picture.n_fft {self.n_fft}: "
            "no phase fits such a spectrogram",
        )
        require(
            height % 16 == width % 16 == 0,
            f"picture.canvas_height {height} and picture.canvas_width {width} must be multiples of 16",
        )
        require(
            columns <= width,
            f"picture.canvas_width {width} is too narrow for picture.seconds {self.seconds} "
            f"at hop {self.hop} and stretch {self.stretch}",
        )


@section
class SpectrogramData(SpeechData):
    corpus: Literal["ljspeech", "librispeech", "demo"] = "librispeech"  # demo: spoken on the spot
    # packed shards, or a folder as published, which is packed on first use
    data_dir: Text = "data/LibriSpeech"
    align: Text = ""  # Whisper that cuts long clips between words; "" = leave out what is too long


@section
class Klein:
    # hub id or folder of a Flux2KleinPipeline | scratch: random weights of the size of model.width,
    # heads, layers
    base: Place = "black-forest-labs/FLUX.2-klein-base-4B"
    # own: the pipeline's | patches: 16 x 16 pixels are a token, nothing is lost
    vae: Literal["own", "patches"] = "own"
    tune: Literal["lora", "full"] = "lora"  # full: every weight of the transformer
    rank: Count = 256  # of the LoRA on all attention projections of the transformer
    alpha: Positive = 256.0  # the LoRA's output is scaled by alpha / rank
    # of a LoRA on the layers of the text encoder that are read; 0 = frozen, its features cached
    text_rank: Whole = 0
    text_tokens: Count = 512  # Klein attends to the padding too, so this is part of the model
    # scratch: of model.layers, those with a stream for the text and one for the picture
    double_layers: Count = 5
    # what Klein reads of a text
    prompt: Text = 'Generate a magnitude spectrogram of speech reading: "{text}"'
    # compute activations again in the backward pass instead of keeping them
    checkpointing: Annotated[bool, MOVABLE] = False

    @model_validator(mode="after")
    def check_prompt(self):
        message = f"klein.prompt {self.prompt!r} must have {{text}} in it, once"
        require(self.prompt.count("{text}") == 1, message)
        return self


@section
class SpectrogramConfig(Config):
    system: Literal["spectrogram"] = "spectrogram"
    out_dir: Text = "out/spectrogram"
    picture: Picture = Picture()
    data: SpectrogramData = SpectrogramData()
    model: Model = Model()  # of klein.base scratch
    klein: Klein = Klein()
    flow: Flow = Flow()  # published Kleins predict v
    sample: FlowSample = FlowSample()
    train: Train = Train()
    eval: SpeechEval = SpeechEval()

    fixed: ClassVar[tuple[str, ...]] = (
        "picture",
        "data.corpus",
        "data.voice",
        "model",
        "klein",
        "flow.predict",
        "flow.min_t",
    )

    @model_validator(mode="after")
    def check_picture(self):
        self.picture.check()
        return self

    @model_validator(mode="after")
    def check_layers(self):
        double = self.klein.double_layers
        layers = self.model.layers
        message = f"klein.double_layers {double} must be below model.layers {layers}"
        require(self.klein.base != "scratch" or double < layers, message)
        return self

    def reference_settings(self) -> dict:
        picture = dataclasses.asdict(self.picture)
        return {"picture": picture, "vae": self.klein.vae, "base": self.klein.base}
