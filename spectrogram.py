"""Text to speech by FLUX.2 Klein, through the RGB picture of a magnitude spectrogram. System `spectrogram`.

Top-down: the system, its batches and caches, LoRA, adapters as files. The transformer is diffusers' own
class; a hand-written LoRA is all that is trained of it, or every weight: klein.tune full. Tokens x are
(B, N, C), one for each 16 x 16 pixels.
Source: the model card of phanerozoic/sonic-plantain; LoRA is arXiv 2106.09685.
"""

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.image import imsave
from tqdm import tqdm

import audio
import data
import flow
import metric
import pretrained
import recogniser
from config import Config, Sample, UserError
from klein_config import Picture
from model import Batches, Prompt

MODEL_CARD = Path(__file__).parent / "assets" / "klein_model_card.md"
CHARACTERS_A_SEC = 15  # of read English speech: how many characters fit on a picture


@dataclass
class Artifact:
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
        audio.save_png(picture, self.picture, self.picture_config, text=self.text)
        confidence = stem.with_name(stem.name + ".confidence.png")
        distance = self.path_distance.numpy()
        # bright is certain; 0.71 is the largest distance there is
        imsave(confidence, distance, vmin=0, vmax=0.71, cmap="magma_r")
        return {"picture": picture.name, "confidence": confidence.name}


class Spectrogram(nn.Module):
    """FLUX.2 Klein with LoRA: losses out of `forward`, pictures and their waves out of `sample`."""

    makes = ("wav", "png")
    speaks = True
    listens = False
    features = None

    def __init__(self, config: Config):
        super().__init__()
        k = config.klein
        p = config.picture
        self.config = config
        self.longest = int(p.seconds * CHARACTERS_A_SEC)
        self.frame_rate = p.sample_rate / p.hop
        self.transformer = pretrained.load_klein(config, "transformer")
        self.tokenizer = pretrained.load_klein_tokenizer(k.base)
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
        if "text" in batch:
            text = batch["text"]  # (B, S, D)
        else:
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
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """Generate the prompts as one batch; a prompt's noise depends on its own seed alone."""
        p = self.config.picture
        if any(prompt.seconds for prompt in prompts):
            raise UserError(
                f"a length in seconds: system spectrogram paints {p.seconds} s always; leave it out"
            )
        outputs = []
        for picture, prompt in zip(self.paint(prompts, settings), prompts):
            outputs.append(listen(picture, p, prompt.text))
        return outputs

    def paint(self, prompts: Sequence[Prompt], settings: Sample) -> torch.Tensor:
        """Sample with guidance; returns: pictures (B, 3, H, W) in [0, 1]."""
        p = self.config.picture
        device = self.picture_ids.device
        texts = [prompt.text for prompt in prompts]
        text = self.encode(texts + [None] * len(texts))  # (2 B, S, D)
        noise = self._draw_noise(prompts).to(device)  # (B, N, C)
        timesteps = self._timesteps(settings)  # (steps + 1,)
        black_picture = torch.zeros(1, 3, p.canvas_height, p.canvas_width, device=device)
        black = self.vae.module.encode(black_picture)  # (1, N, C)
        shown = useful(p).to(device)[:, None]  # (N, 1): tokens that training had a loss on

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = self.velocity(x_t, t, text[: len(x_t)])
            # the other tokens, on which no loss was, are led to black, as they were in training
            v_to_black = (x_t - black) / flow.expand(t, x_t)
            return torch.where(shown, v, v_to_black)

        half = self.transformer.dtype == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            x = flow.euler(network, noise, timesteps, settings.cfg_scale, settings.cfg_from, settings.cfg_to)
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
        return flow.times(settings.euler_steps, settings.sway, shift)

    def encode(self, texts: Sequence[str | None]) -> torch.Tensor:
        """Features (B, S, D) of texts in the config's prompt; None is the empty prompt, for guidance."""
        prompts = []
        for text in texts:
            prompt = "" if text is None else format_prompt(self.config, text)
            prompts.append(prompt)
        ids, mask = pretrained.tokenize_prompts(self.tokenizer, prompts, len(self.text_ids))
        device = self.picture_ids.device
        encoder = self.trained_text_encoder or self.text_encoder
        features = encoder(ids.to(device), mask.to(device))
        return features.float()

    def reference(self, corpus: data.Waves, clip: data.Clip) -> Artifact:
        """A recorded clip as a picture, through the VAE and back: the best that any network can generate."""
        return through_vae(self.vae, corpus.wave(clip), self.config.picture, clip.text)

    def score(self, output: Artifact, corpus: data.Waves, clip: data.Clip) -> dict[str, float]:
        """lsd: log-spectral distance to the recorded clip, at matched gain, dB; path_distance: its mean."""
        recording = corpus.wave(clip)
        db, recording_db = audio.side_by_side(output.wave, recording, self.config.picture)
        return {
            "lsd": audio.log_spectral_distance(db, recording_db),
            "path_distance": output.path_distance.mean().item(),
        }

    @functools.cached_property
    def vae(self) -> pretrained.Frozen:
        """Loaded at first use; cached, not registered as a submodule: not saved."""
        return pretrained.load_frozen_klein(self.config, "vae", self.picture_ids.device)

    @functools.cached_property
    def text_encoder(self) -> pretrained.Frozen:
        """The frozen one, cached as `vae` is; training needs it only where its features are not cached."""
        return pretrained.load_frozen_klein(self.config, "text_encoder", self.picture_ids.device)

    def _load_text_encoder_to_train(self) -> pretrained.KleinText:
        """As it was published, to be wrapped with LoRA; on the CPU."""
        return pretrained.load_klein(self.config, "text_encoder").requires_grad_(False)

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
            layers = adapter.get(part, {})  # without layers, the part becomes as it was published
            apply_adapter(network, layers)
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
            pretrained.save_klein(self.config, self.transformer, folder)
            return
        self._export_lora(folder, facts)
        card = self._model_card(facts)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _export_lora(self, folder: Path, facts: dict[str, str]) -> None:
        layers = loras(self.transformer)
        tensors = {f"transformer.{path}": lora for path, lora in layers.items()}
        settings = {f"transformer.{key}": value for key, value in peft_settings(layers).items()}
        header = facts | {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
        write_tensors(folder / WEIGHTS, tensors, header)
        write_tensors(folder / "comfyui.safetensors", tensors, facts, folded=True)
        if self.trained_text_encoder is not None:
            text_layers = loras(self.trained_text_encoder)
            write_peft(folder / "text_encoder", text_layers, self.config.klein.base)

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
        template = MODEL_CARD.read_text(encoding="utf-8")
        return template.format(
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


def listen(picture: torch.Tensor, p: Picture, text: str) -> Artifact:
    """Decode a picture (3, H, W) in [0, 1] on the CPU; first rounded to 8 bits, as it is in the PNG."""
    picture = picture.float().cpu()
    picture = (255 * picture).round() / 255
    db, path_distance = audio.unpaint(picture, p)  # (F, T) both
    wave = audio.listen(db, p)
    return Artifact(wave, p.sample_rate, picture, path_distance, p, text)


def through_vae(vae: pretrained.Frozen, wave: torch.Tensor, p: Picture, text: str) -> Artifact:
    """Encode a wave (N,) to a picture, pass that through the VAE and decode it."""
    picture = audio.paint(wave, p)  # (3, H, W)
    tokens = vae.module.encode(picture[None])  # (1, N, C)
    pictures = vae.module.decode(tokens, p.canvas_height, p.canvas_width)
    return listen(pictures[0], p, text)


# Batches


class PictureBatches(Batches):
    """Batches of cached latents and text features.

    x, noise (B, N, C); x_mask (B, N): tokens that show the spectrogram, not the rest of the canvas; t (B,);
    frames (B,); number (B,) of the clip; text (B, S, D), the cached features, or, where the text encoder is
    trained, ids, text_mask (B, S).
    """

    def __init__(self, config: Config, corpus: data.Waves, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        latents_path = latents_file(config, corpus)
        self.latents = data.open_rows(latents_path, data.PREPARE)
        clips = all_clips(corpus)
        self.clip_index = {clip.number: n for n, clip in enumerate(clips)}
        features_path, prompts = features_file(config, corpus)
        self.prompt_index = {prompt: n for n, prompt in enumerate(prompts)}
        self.features = None
        if not config.klein.text_rank:
            self.features = data.open_rows(features_path, data.PREPARE)
        self.x_mask = useful(config.picture)

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the text is kept, as for validation."""
        x = self.latents(self.clip_index[clip.number])  # (N, C)
        prompt = format_prompt(self.config, clip.text)
        if t is None:
            if rng.random() < self.config.flow.text_condition_dropout:
                prompt = ""
            t = self.draw_time(rng)
        noise = rng.standard_normal(tuple(x.shape), dtype=np.float32)
        return {
            "x": x,
            "noise": torch.from_numpy(noise),
            "t": t,
            "frames": clip.frames,
            "number": clip.number,
            "prompt": prompt,
        }

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        for key in ("t", "frames", "number"):
            batch[key] = torch.tensor([row[key] for row in rows])  # (B,)
        for key in ("x", "noise"):
            batch[key] = torch.stack([row[key] for row in rows])  # (B, N, C)
        batch["x_mask"] = self.x_mask.expand(len(rows), -1)  # (B, N)
        prompts = [row["prompt"] for row in rows]
        if self.features:
            features = [self.features(self.prompt_index[prompt]) for prompt in prompts]
            batch["text"] = torch.stack(features)  # (B, S, D)
        else:
            length = self.config.klein.text_tokens
            ids, text_mask = pretrained.tokenize_prompts(self.tokenizer, prompts, length)
            batch["ids"] = ids  # (B, S)
            batch["text_mask"] = text_mask
        return batch


def useful(p: Picture) -> torch.Tensor:
    """(N,): which tokens of the canvas show any of the spectrogram."""
    bins = p.n_fft // 2 + 1
    columns = audio.frames(p) * p.stretch
    row_mask = torch.arange(0, p.canvas_height, 16) < bins
    column_mask = torch.arange(0, p.canvas_width, 16) < columns
    mask = row_mask[:, None] & column_mask  # (H / 16, W / 16)
    return mask.flatten()


def format_prompt(config: Config, text: str) -> str:
    return config.klein.prompt.replace("{text}", text)


def all_clips(corpus: data.Waves) -> list[data.Clip]:
    """The clips of all splits, each once, by number."""
    clips = set()
    for split in data.SPLITS:
        clips.update(corpus.clips(split))
    return sorted(clips, key=lambda clip: clip.number)


def latents_file(config: Config, corpus: data.Waves) -> Path:
    """The cache of the clips' latents, named by a digest of all that it depends on."""
    k = config.klein
    picture = asdict(config.picture)
    numbers = [clip.number for clip in all_clips(corpus)]
    digest = data.digest([k.base, k.vae, picture, numbers])
    return corpus.folder / f"latents_{digest[:8]}.npy"


def features_file(config: Config, corpus: data.Waves) -> tuple[Path, list]:
    """The cache of the text encoder's features, and the prompts in it."""
    k = config.klein
    prompts = {""}
    for clip in all_clips(corpus):
        prompt = format_prompt(config, clip.text)
        prompts.add(prompt)
    prompts = sorted(prompts)
    digest = data.digest([k.base, k.text_tokens, prompts])
    name = f"features_{digest[:8]}.npy"
    return corpus.folder / name, prompts


def prepare(config: Config) -> None:
    """Make what training needs and does not find: packed waves, their latents, the prompts' features.

    Prints the ceiling when it makes latents. raises UserError without clips, or if a prompt does not fit.
    """
    k = config.klein
    p = config.picture
    form = data.wave_form(p)
    data.prepare_speech(config, form, recogniser.cut_clips)
    corpus = data.Waves(config)
    clips = all_clips(corpus)
    if not clips:
        longest = config.data.max_seconds
        raise UserError(f"{corpus.folder}: has no clip of at most data.max_seconds {longest}")
    device = torch.device("cpu")
    if torch.cuda.is_available() and config.device != "cpu":
        device = torch.device("cuda")
    latents_path = latents_file(config, corpus)
    features_path, prompts = features_file(config, corpus)
    tokenizer = pretrained.load_klein_tokenizer(k.base)
    ids, mask = pretrained.tokenize_prompts(tokenizer, prompts, k.text_tokens)
    if not latents_path.exists():
        vae = pretrained.load_frozen_klein(config, "vae", device)
        measure_ceiling(config, corpus, vae, device)

        def encode_clips(numbers: list[int]) -> np.ndarray:
            pictures = []
            for n in numbers:
                wave = corpus.wave(clips[n])
                pictures.append(audio.paint(wave, p))
            latents = vae.module.encode(torch.stack(pictures))  # (B, N, C)
            return latents.cpu().numpy()

        tokens = len(useful(p))
        lengths = [tokens] * len(clips)
        data.cache_rows(latents_path, lengths, None, encode_clips, 4, "latents")
    if not k.text_rank and not features_path.exists():
        encoder = pretrained.load_frozen_klein(config, "text_encoder", device)

        def encode_prompts(numbers: list[int]) -> np.ndarray:
            batch_ids = ids[numbers].to(device)
            batch_mask = mask[numbers].to(device)
            features = encoder(batch_ids, batch_mask)  # (B, S, D)
            return features.float().cpu().numpy()

        lengths = [k.text_tokens] * len(prompts)
        data.cache_rows(features_path, lengths, None, encode_prompts, 8, "features of the prompts")


def measure_ceiling(config: Config, corpus: data.Waves, vae: pretrained.Frozen, device: torch.device) -> None:
    """Print the error of recordings after picture, VAE and Griffin-Lim: the best that a network can reach."""
    p = config.picture
    asr = recogniser.load(config.eval.recogniser, device)
    clips = corpus.clips(config.eval.split) or corpus.clips("train")
    clips = clips[:16]
    pictures = []
    outputs = []
    for clip in tqdm(clips, desc="ceiling", unit="clip", disable=None):
        wave = corpus.wave(clip)
        pictures.append(audio.paint(wave, p))
        outputs.append(through_vae(vae, wave, p, ""))
    decoded_pictures = [output.picture for output in outputs]
    db, _ = audio.unpaint(torch.stack(pictures), p)  # (B, F, T)
    decoded_db, _ = audio.unpaint(torch.stack(decoded_pictures), p)
    mse = (decoded_db - db).square().mean()
    rmse = mse.sqrt().item()
    intelligibility = ""
    if asr:
        waves = [output.wave for output in outputs]
        hypotheses = asr.transcribe(waves, p.sample_rate)
        pairs = []
        for clip, hypothesis in zip(clips, hypotheses):
            reference = recogniser.normalise(clip.text)
            pairs.append((reference, recogniser.normalise(hypothesis)))
        wer = metric.word_error_rate(pairs)
        intelligibility = f", word error rate {100 * wer:.1f} % by {asr.name}"
    print(
        f"the ceiling, {len(clips)} clips through picture, VAE and Griffin-Lim: "
        f"{rmse:.2f} dB RMSE{intelligibility}",
        flush=True,
    )


# LoRA


class LoRA(nn.Module):
    """A frozen linear layer W and a low-rank update: W x + alpha / r B A x.

    A and B are kept in fp32 and compute in the precision of x or of autocast.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        """base: (in, out). A (r, in) is random; B (out, r) is zero-initialised, so the update starts at 0."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha = float(alpha)
        self.scale = alpha / rank
        self.original = None  # a copy of W on the CPU while the update is merged into W
        device = base.weight.device
        A = torch.randn(rank, base.in_features, device=device) / rank
        B = torch.zeros(base.out_features, rank, device=device)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        y = self.base(x)  # (..., out)
        if self.original is not None:
            return y  # merged: the update is in W
        A = self.A.to(x.dtype)
        h = F.linear(x, A)  # (..., r)
        B = self.B.to(h.dtype)
        # addmm, so that autograd keeps no second (..., out)
        updated = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.T, alpha=self.scale)
        return updated.view_as(y)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to W: the same outputs without its cost. A copy of W is kept on the CPU."""
        if self.original is None:
            W = self.base.weight
            self.original = W.detach().cpu().clone()
            update = self.scale * self.B @ self.A  # (out, in)
            W += update.to(W.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W, bit for bit."""
        if self.original is not None:
            self.base.weight.copy_(self.original)
            self.original = None

    @property
    def weight(self) -> torch.Tensor:
        """The frozen layer's, for code that takes this for an nn.Linear."""
        return self.base.weight


def add_lora(root: nn.Module, ranks: dict[str, int], alpha: float) -> None:
    """Wrap the linear layers inside `root` at the full paths in `ranks`, each with its rank.

    A layer that is wrapped is wrapped anew.
    """
    for path, rank in ranks.items():
        layer = root.get_submodule(path)
        if isinstance(layer, LoRA):
            layer = layer.base
        root.set_submodule(path, LoRA(layer, rank, alpha))


def add_attention_lora(root: nn.Module, rank: int, alpha: float) -> None:
    """Wrap all attention projections of `root`."""
    ranks = dict.fromkeys(attention_layers(root), rank)
    add_lora(root, ranks, alpha)


def remove_lora(root: nn.Module) -> None:
    """Put the frozen layers back, unmerged."""
    for path, lora in loras(root).items():
        lora.unmerge()
        root.set_submodule(path, lora.base)


def loras(root: nn.Module) -> dict[str, LoRA]:
    """The wrapped layers by their full paths."""
    return {path: module for path, module in root.named_modules() if isinstance(module, LoRA)}


def attention_layers(root: nn.Module) -> list[str]:
    """Full paths of all attention projections.

    root: a transformer: 8 in a double block, 2 in a single one, whose QKV and MLP inputs are one matrix; or a
    KleinText: layers 0 to 26.
    """
    paths = []
    for path, module in root.named_modules():
        if type(module) is nn.Linear and re.search(r"\.(self_)?attn\.", path):
            paths.append(path)
    return paths


# Adapters as files

ATTRIBUTION = {
    "librispeech": "Trained on LibriSpeech train-clean-100 (Panayotov et al. 2015), CC BY 4.0, "
    "https://www.openslr.org/12.",
    "ljspeech": "Trained on LJSpeech 1.1 (Ito, Johnson 2017), public domain.",
}
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' file name
PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIXES = {
    "transformer.": "transformer",
    "diffusion_model.": "transformer",
    "text_encoder.": "text_encoder",
    "base_model.model.": None,
}
ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}


def read_adapter(name: str) -> dict[str, dict]:
    """Read an adapter in diffusers', peft's or kohya's layout, with diffusers' names of modules.

    name: a folder, a .safetensors file or a hub id.
    returns: {"transformer": {path: {"A", "B", "alpha"}}, "text_encoder": the same, if there is one}.
    raises UserError for what is no adapter, or half of one.
    """
    if name.endswith(".safetensors"):
        file = Path(name)
    elif Path(name, PEFT_WEIGHTS).is_file():
        file = pretrained.find_file(name, PEFT_WEIGHTS)
    else:
        file = pretrained.find_file(name, WEIGHTS)
    adapter = read_layers(file, "transformer")
    source = str(file.parent) if Path(name).exists() else name
    try:
        pretrained.find_file(source, "text_encoder/adapter_config.json")
    except UserError:
        return adapter  # most have no text encoder
    text_file = pretrained.find_file(source, f"text_encoder/{PEFT_WEIGHTS}")
    return adapter | read_layers(text_file, "text_encoder")


def read_layers(file: Path, peft_part: str) -> dict[str, dict]:
    """What `read_adapter` returns, of one file.

    peft_part: the part that peft's keys, base_model.model., belong to: they do not say it.
    """
    tensors, header = read_safetensors(file)
    settings = read_peft_settings(file, header, peft_part)
    adapter = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in PREFIXES if key.startswith(p)), "")
        ending = next((e for e in ENDINGS if key.endswith(e)), "")
        if not prefix or not ending:
            raise UserError(
                f"{file}: {key} is no tensor of an adapter that is known here; "
                "keys are transformer.MODULE.lora_A.weight"
            )
        part = PREFIXES[prefix] or peft_part
        path = key[len(prefix) : -len(ending)]
        name = ENDINGS[ending]  # A, B or alpha
        layers = adapter.setdefault(part, {})
        layers.setdefault(path, {})[name] = tensor
    if not adapter:
        raise UserError(f"{file}: holds no adapter")
    for part, layers in adapter.items():
        for path, layer in layers.items():
            complete_layer(file, path, layer, settings.get(part, {}))
    return adapter


def read_peft_settings(file: Path, header: dict[str, str], peft_part: str) -> dict[str, dict]:
    """The fields of LoraConfig by part, from the file's header or from the adapter_config.json beside it."""
    settings = {}
    try:
        metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
        for key, value in metadata.items():
            part, _, field = key.partition(".")
            fields = settings.setdefault(part, {})
            fields[field] = value
        if file.name == PEFT_WEIGHTS:
            config_file = file.with_name("adapter_config.json")
            fields = json.loads(config_file.read_text(encoding="utf-8"))
            settings[peft_part] = dict(fields)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        reason = pretrained.brief(e)
        raise UserError(f"{file}: the adapter's settings cannot be read ({reason})") from e
    return settings


def complete_layer(file: Path, path: str, layer: dict, settings: dict) -> None:
    """Set the layer's alpha to a float; raises UserError where A and B are not a pair."""
    missing = torch.empty(0)
    A = layer.get("A", missing)  # (r, in)
    B = layer.get("B", missing)  # (out, r)
    are_matrices = A.dim() == B.dim() == 2
    if not are_matrices or not 0 < len(A) == B.shape[1]:
        raise UserError(
            f"{file}: {path} lacks one of its two matrices, or they do not fit each other: half an adapter"
        )
    try:
        default = peft_alpha(settings, path, len(A))
        alpha = layer.get("alpha", default)
        layer["alpha"] = float(alpha)
    except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as e:
        reason = pretrained.brief(e)
        raise UserError(f"{file}: the alpha of {path} cannot be read ({reason})") from e


def peft_alpha(settings: dict, path: str, rank: int) -> float:
    """A layer's alpha by peft's settings; where they say nothing it is the rank, as everywhere."""
    patterns = settings.get("alpha_pattern", {})
    matches = [value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    alpha = matches[0] if matches else settings.get("lora_alpha", rank)
    if settings.get("use_rslora"):
        return alpha * math.sqrt(rank)
    return alpha


def check_adapter(root: nn.Module, layers: dict[str, dict], where: str) -> None:
    """raises UserError where `root` has no such layer or one of another size."""
    linear_layers = {}
    for path, module in root.named_modules():
        if type(module) is nn.Linear:
            path = path.removesuffix(".base")
            linear_layers[path] = module
    for path, layer in layers.items():
        if path not in linear_layers:
            raise UserError(f"{where} has no linear layer {path}: an adapter of another network")
        weight = linear_layers[path].weight
        shape = tuple(weight.shape)
        A = layer["A"]  # (r, in)
        B = layer["B"]  # (out, r)
        adapter_shape = (B.shape[0], A.shape[1])
        if shape != adapter_shape:
            raise UserError(f"{where}: {path} is {shape}, the adapter's {adapter_shape}: one of another size")


def apply_adapter(root: nn.Module, layers: dict[str, dict]) -> None:
    """Put the layers of `read_adapter` in place of the LoRA of `root`."""
    remove_lora(root)
    for path, layer in layers.items():
        A = layer["A"]
        ranks = {path: len(A)}
        add_lora(root, ranks, layer["alpha"])
        lora = root.get_submodule(path)
        with torch.no_grad():
            lora.A.copy_(A)
            lora.B.copy_(layer["B"])


def peft_settings(layers: dict[str, LoRA]) -> dict:
    """Rank and alpha as fields of peft's LoraConfig: without these a reader takes alpha to be the rank."""
    first = next(iter(layers.values()))
    rank = len(first.A)
    rank_pattern = {path: len(lora.A) for path, lora in layers.items() if len(lora.A) != rank}
    alpha_pattern = {path: lora.alpha for path, lora in layers.items() if lora.alpha != first.alpha}
    return {
        "r": rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(layers),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def write_tensors(path: Path, layers: dict[str, LoRA], header: dict, folded: bool = False) -> None:
    """folded: alpha / r multiplied into B, for ComfyUI, which reads no settings."""
    tensors = {}
    for name, lora in layers.items():
        A = lora.A.detach().cpu()
        B = lora.B.detach().cpu()
        if folded:
            B = B * lora.scale
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
    metadata = {"format": "pt", **header}
    with data.replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata)


def write_peft(folder: Path, layers: dict[str, LoRA], base: str) -> None:
    """The text encoder's adapter as a folder of peft, since diffusers' own format has no place for it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{path}": lora for path, lora in layers.items()}
    write_tensors(folder / PEFT_WEIGHTS, tensors, {})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        **peft_settings(layers),
    }
    with data.replacing(folder / "adapter_config.json") as part:
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_safetensors(path: Path) -> tuple[dict, dict]:
    """All tensors of a file by their keys, and the metadata in its header, texts by keys."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            keys = f.keys()
            tensors = {key: f.get_tensor(key) for key in keys}
            metadata = f.metadata() or {}
    except (OSError, safetensors.SafetensorError) as e:
        reason = pretrained.brief(e)
        raise UserError(f"{path}: not a safetensors file ({reason})") from e
    return tensors, metadata
