"""Text to speech by FLUX.2 Klein, through the RGB picture of a magnitude spectrogram. System `spectrogram`.

The transformer is diffusers' own class; a hand-written LoRA (lora.py) is all that is trained of it, or every
weight: klein.tune full. Tokens x are (B, N, C), one for each 16 x 16 pixels.
Source: the model card of phanerozoic/sonic-plantain.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn

import flow
from base import Prompt, System
from config import Config, Sample, UserError
from corpora import shards
from klein import picture, pipeline, prepare
from klein.adapter import (
    LORA_WEIGHTS,
    apply_adapter,
    check_adapter,
    peft_settings,
    read_adapter,
    write_peft,
    write_tensors,
)
from klein.config import SpectrogramConfig
from klein.data import PictureBatches, WaveCorpus, format_prompt, token_mask
from klein.lora import add_attention_lora, lora_layers
from klein.output import PictureOutput, decode_picture, vae_roundtrip
from klein.picture import at_matched_gain, log_spectral_distance
from metric import Score
from pretrained import frozen

MODEL_CARD = Path(__file__).parent / "model_card.md"
ATTRIBUTION = {  # of the model card, by data.corpus
    "librispeech": "Trained on LibriSpeech train-clean-100 (Panayotov et al. 2015), CC BY 4.0, "
    "https://www.openslr.org/12.",
    "ljspeech": "Trained on LJSpeech 1.1 (Ito, Johnson 2017), public domain.",
}
CHARACTERS_PER_SEC = 15  # of read English speech: how many characters fit on a picture


class Spectrogram(System):
    """FLUX.2 Klein with LoRA: losses out of `forward`, pictures and their waves out of `sample`."""

    config_class = SpectrogramConfig
    corpus_class = WaveCorpus
    batches_class = PictureBatches
    output_kinds = ("wav", "png")
    speaks = True
    scores = {
        "lsd": Score(
            "log-spectral distance", "dB", "of the magnitudes at equal loudness; 0 is the recording"
        ),
        "path_distance": Score(
            "distance to the colour path", "", "mean over a picture, whose colours go from 0 to 1"
        ),
    }
    fetch = staticmethod(prepare.fetch)
    prepare = staticmethod(prepare.prepare)
    commands = staticmethod(picture.main)

    def __init__(self, config: Config):
        super().__init__()
        k = config.klein
        p = config.picture
        self.config = config
        self.max_characters = int(p.seconds * CHARACTERS_PER_SEC)
        self.frame_rate = p.sample_rate / p.hop
        self.transformer = pipeline.load_klein(config, "transformer")
        self.tokenizer = pipeline.load_klein_tokenizer(k.base)
        if k.tune == "lora":
            self.transformer.requires_grad_(False)
            add_attention_lora(self.transformer, k.rank, k.alpha)
        elif k.base == "scratch":
            nn.init.zeros_(self.transformer.proj_out.weight)  # zero-initialised: the first output is 0
        self.trained_text_encoder = None
        if k.text_rank:
            self.trained_text_encoder = self._load_text_encoder_to_train()
            add_attention_lora(self.trained_text_encoder, k.text_rank, k.text_rank)
        if k.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        picture_ids = position_ids(p.canvas_height // 16, p.canvas_width // 16, 1)  # (N, 4)
        text_ids = position_ids(1, 1, k.text_tokens)  # (S, 4)
        self.register_buffer("picture_ids", picture_ids, persistent=False)
        self.register_buffer("text_ids", text_ids, persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch of `PictureBatches`.

        returns: loss, flow_loss, scalars; flow_loss_per_clip (B,).
        """
        x = batch["x"]  # (B, N, C)
        noise = batch["noise"]  # (B, N, C)
        t = batch["t"]  # (B,)
        text = batch.get("text")  # (B, S, D)
        if text is None:
            text = self.trained_text_encoder(batch["ids"], batch["text_mask"])
        x_t = flow.interpolate(x, noise, t)
        v = self.velocity(x_t, t, text)  # (B, N, C)
        flow_loss = flow.loss(v, x, noise, batch["x_mask"])  # (B,)
        return {
            "loss": flow_loss.mean(),
            "flow_loss": flow_loss.mean(),
            "flow_loss_per_clip": flow_loss.detach(),
        }

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """x_t (B, N, C), t (B,), text (B, S, D) -> v (B, N, C), float32."""
        f = self.config.flow
        output = self.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=text,
            img_ids=self.picture_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return flow.velocity(output.float(), x_t, t, f.predict, f.min_t)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[PictureOutput]:
        """Generate the prompts as one batch; a prompt's noise depends on its own seed alone."""
        p = self.config.picture
        if any(prompt.seconds for prompt in prompts):
            raise UserError(
                f"a length in seconds: system spectrogram paints {p.seconds} s always; leave it out"
            )
        pictures = self.generate_pictures(prompts, settings)
        return [decode_picture(picture, p, prompt.text) for picture, prompt in zip(pictures, prompts)]

    def generate_pictures(self, prompts: Sequence[Prompt], settings: Sample) -> torch.Tensor:
        """Sample with guidance; returns: pictures (B, 3, H, W) in [0, 1]."""
        p = self.config.picture
        device = self.picture_ids.device
        texts = [prompt.text for prompt in prompts]
        text = self.encode_text(texts + [None] * len(texts))  # (2 B, S, D)
        noise = self._draw_noise(prompts).to(device)  # (B, N, C)
        timesteps = self._timesteps(settings)  # (steps + 1,)
        black = torch.zeros(1, 3, p.canvas_height, p.canvas_width, device=device)
        black = self.vae.module.encode(black)  # (1, N, C)
        shown = token_mask(p).to(device)[:, None]  # (N, 1): tokens that training had a loss on

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = self.velocity(x_t, t, text[: len(x_t)])
            # the other tokens, on which no loss was, are led to black, as they were in training
            v_to_black = (x_t - black) / flow.expand_dims(t, x_t)
            return torch.where(shown, v, v_to_black)

        half = self.transformer.dtype == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            x = flow.sample_euler(
                network, noise, timesteps, settings.cfg_scale, settings.cfg_from, settings.cfg_to
            )
        return self.vae.module.decode(x, p.canvas_height, p.canvas_width)

    def _draw_noise(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B, N, C), on the CPU, each row from its prompt's seed."""
        shape = (len(self.picture_ids), self.transformer.config.in_channels)
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(prompt.seed)
            rows.append(torch.randn(shape, generator=generator))
        return torch.stack(rows)

    def _timesteps(self, settings: Sample) -> torch.Tensor:
        """(steps + 1,) from 1 to 0, with Klein's own shift, which depends on the size and the steps."""
        # takes seconds to import
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        mu = compute_empirical_mu(len(self.picture_ids), settings.euler_steps)
        shift = math.exp(mu) * settings.shift  # two shifts in a row multiply
        return flow.timesteps(settings.euler_steps, settings.sway, shift)

    def encode_text(self, texts: Sequence[str | None]) -> torch.Tensor:
        """Features (B, S, D) of texts in the config's prompt; None is the empty prompt, for guidance."""
        prompts = ["" if text is None else format_prompt(self.config, text) for text in texts]
        ids, mask = pipeline.tokenize_prompts(self.tokenizer, prompts, len(self.text_ids))
        device = self.picture_ids.device
        encoder = self.trained_text_encoder or self.text_encoder
        return encoder(ids.to(device), mask.to(device)).float()

    def reference(self, corpus: WaveCorpus, clip: shards.Clip) -> PictureOutput:
        """A recorded clip as a picture, through the VAE and back: the best that any network can generate."""
        return vae_roundtrip(self.vae, corpus.wave(clip), self.config.picture, clip.text)

    def score(self, output: PictureOutput, corpus: WaveCorpus, clip: shards.Clip) -> dict[str, float]:
        """lsd: log-spectral distance to the recorded clip, at matched gain, dB; path_distance: its mean."""
        db, recording_db = at_matched_gain(output.wave, corpus.wave(clip), self.config.picture)
        return {
            "lsd": log_spectral_distance(db, recording_db),
            "path_distance": output.path_distance.mean().item(),
        }

    @functools.cached_property
    def vae(self) -> frozen.Frozen:
        """Loaded at first use; cached, not registered as a submodule: not saved."""
        return pipeline.load_frozen_klein(self.config, "vae", self.picture_ids.device)

    @functools.cached_property
    def text_encoder(self) -> frozen.Frozen:
        """The frozen one, cached as `vae` is; training needs it only where its features are not cached."""
        return pipeline.load_frozen_klein(self.config, "text_encoder", self.picture_ids.device)

    def _load_text_encoder_to_train(self) -> pipeline.KleinTextEncoder:
        """As it was published, to be wrapped with LoRA; on the CPU."""
        return pipeline.load_klein(self.config, "text_encoder").requires_grad_(False)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices if every weight is tuned; not a LoRA, which AdamW trains."""
        matrices = []
        for blocks in (self.transformer.transformer_blocks, self.transformer.single_transformer_blocks):
            for layer in blocks.modules():
                if type(layer) is nn.Linear and layer.weight.requires_grad:
                    matrices.append(layer.weight)
        return matrices

    def load_adapter(self, name: str) -> None:
        """Put a published adapter, a folder or hub id, in place of the LoRA; see `read_adapter`."""
        adapter = read_adapter(name)
        text_encoder = self.trained_text_encoder
        if "text_encoder" in adapter and text_encoder is None:
            text_encoder = self._load_text_encoder_to_train().to(self.picture_ids.device)
        networks = {"transformer": self.transformer}
        if text_encoder is not None:
            networks["text_encoder"] = text_encoder
        for part, layers in adapter.items():
            check_adapter(networks[part], layers, f"{name}: {part}")
        for part, network in networks.items():
            apply_adapter(network, adapter.get(part, {}))  # without layers it becomes as it was published
        self.trained_text_encoder = text_encoder

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write what diffusers, peft and ComfyUI load: the adapter, or, tuned in full, the whole pipeline.

        facts: for the files' headers and the model card: step, commit, corpus.
        """
        folder.mkdir(parents=True, exist_ok=True)
        k = self.config.klein
        if k.vae != "own" or self.config.flow.predict != "v":
            print(
                "note: others paint with klein.vae own and flow.predict v only; "
                "this is for nanoaudio's klein.base and --lora"
            )
        if k.tune == "full":
            pipeline.save_klein(self.config, self.transformer, folder)
            return
        self._export_lora(folder, facts)
        (folder / "README.md").write_text(self._model_card(facts), encoding="utf-8")

    def _export_lora(self, folder: Path, facts: dict[str, str]) -> None:
        layers = lora_layers(self.transformer)
        tensors = {f"transformer.{path}": lora for path, lora in layers.items()}
        settings = {f"transformer.{key}": value for key, value in peft_settings(layers).items()}
        header = facts | {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
        write_tensors(folder / LORA_WEIGHTS, tensors, header)
        write_tensors(folder / "comfyui.safetensors", tensors, facts, folded=True)
        if self.trained_text_encoder is not None:
            write_peft(
                folder / "text_encoder", lora_layers(self.trained_text_encoder), self.config.klein.base
            )

    def _model_card(self, facts: dict[str, str]) -> str:
        k = self.config.klein
        p = self.config.picture
        settings = self.config.sample
        load_text_encoder = ""
        if self.trained_text_encoder is not None:
            load_text_encoder = 'pipe.text_encoder.load_adapter(folder + "/text_encoder")'
        # max_sequence_length belongs to the model: the padding is attended to
        arguments = (
            f"height={p.canvas_height}, width={p.canvas_width}, max_sequence_length={k.text_tokens}, "
            f"num_inference_steps={settings.euler_steps}, guidance_scale={settings.cfg_scale}"
        )
        return MODEL_CARD.read_text(encoding="utf-8").format(
            base=k.base,
            rank=k.rank,
            attribution=ATTRIBUTION.get(self.config.data.corpus, ""),
            prompt=k.prompt,
            picture=p,
            size=arguments,
            text=load_text_encoder,
            facts="\n".join(f"- {key}: {value}" for key, value in facts.items()),
        )


def position_ids(rows: int, columns: int, text_tokens: int) -> torch.Tensor:
    """(rows * columns * text_tokens, 4), for Klein's RoPE: time (0), row, column and place in the text."""
    axes = [torch.arange(length) for length in (1, rows, columns, text_tokens)]
    return torch.cartesian_prod(*axes)
