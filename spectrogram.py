"""Speech painted by FLUX.2 Klein: a text becomes the RGB picture of a magnitude spectrogram, the picture becomes sound.

Top-down: the system, its batches and caches, LoRA, adapters as files. The transformer is diffusers' own class; a
hand-written LoRA is all that is trained of it (or every weight: klein.tune full). Tokens x are (B, N, C): 16 x 16 pixels each.
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
CHARACTERS_A_SEC = 15                # of read English speech, to know what fits on a picture


@dataclass
class Artifact:
    """What was painted: a wave (N,) at `sample_rate` Hz, its picture (3, H, W) in [0, 1], the colours' distance to the path (F, T)."""
    wave: torch.Tensor
    sample_rate: int
    picture: torch.Tensor
    distance: torch.Tensor
    form: Picture
    text: str

    def draw(self, stem: Path) -> dict[str, str]:
        """Writes the picture with its parameters inside, and where it can be trusted; returns their names by kind."""
        picture, confidence = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".confidence.png")
        audio.save_png(picture, self.picture, self.form, text=self.text)
        imsave(confidence, self.distance.numpy(), vmin=0, vmax=0.71, cmap="magma_r")   # bright is sure; 0.71 is as far as it gets
        return {"picture": picture.name, "confidence": confidence.name}


class Spectrogram(nn.Module):
    """Losses out of `forward`, pictures and their sound out of `sample`."""

    makes, speaks, listens, features = ("wav", "png"), True, False, None

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        k, p = config.klein, config.picture
        self.longest, self.frame_rate = int(p.seconds * CHARACTERS_A_SEC), p.sample_rate / p.hop
        self.transformer = pretrained.load_klein(config, "transformer")
        self.tokenizer = pretrained.load_klein_tokenizer(k.base)
        if k.tune == "lora":
            self.transformer.requires_grad_(False)
            add_lora(self.transformer, dict.fromkeys(attention_layers(self.transformer), k.rank), k.alpha)
        elif k.base == "scratch":
            nn.init.zeros_(self.transformer.proj_out.weight)   # starts by saying nothing, as every residual network here
        self.trained_text_encoder = None
        if k.text_rank:
            self.trained_text_encoder = pretrained.load_klein(config, "text_encoder").requires_grad_(False)
            add_lora(self.trained_text_encoder, dict.fromkeys(attention_layers(self.trained_text_encoder), k.text_rank), k.text_rank)
        if k.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        position = functools.partial(torch.cartesian_prod, torch.arange(1))
        rows, columns, one = torch.arange(p.canvas_height // 16), torch.arange(p.canvas_width // 16), torch.arange(1)
        self.register_buffer("picture_ids", position(rows, columns, one), persistent=False)          # (N, 4): time, y, x, letter
        self.register_buffer("text_ids", position(one, one, torch.arange(k.text_tokens)), persistent=False)      # (S, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch of `PictureBatches`. returns: loss, flow_loss, scalars; flow_loss_per_clip (B,)."""
        x, noise, t = batch["x"], batch["noise"], batch["t"]
        text = batch["text"] if "text" in batch else self.trained_text_encoder(batch["ids"], batch["text_mask"])
        v = self.velocity(flow.interpolate(x, noise, t), t, text)
        flow_loss = flow.loss(v, x, noise, batch["x_mask"])
        return {"loss": flow_loss.mean(), "flow_loss": flow_loss.mean(), "flow_loss_per_clip": flow_loss.detach()}

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """x_t (B, N, C), t (B,), text (B, S, D) -> v (B, N, C), float32."""
        output = self.transformer(hidden_states=x_t, timestep=t, encoder_hidden_states=text, img_ids=self.picture_ids,
                                  txt_ids=self.text_ids, return_dict=False)[0]
        return flow.velocity(output.float(), x_t, t, self.config.flow.predict, self.config.flow.min_t)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """Paint the prompts as one batch and listen to the pictures; a prompt's noise depends on its own seed alone."""
        if any(prompt.seconds for prompt in prompts):
            raise UserError(f"a length in seconds: system spectrogram paints {self.config.picture.seconds} s always; leave it out")
        pictures = self.paint(prompts, settings)
        return [listen(picture, self.config.picture, prompt.text) for picture, prompt in zip(pictures, prompts)]

    def paint(self, prompts: Sequence[Prompt], settings: Sample) -> torch.Tensor:
        """returns: pictures (B, 3, H, W) in [0, 1]."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu        # seconds to import
        p, device = self.config.picture, self.picture_ids.device
        text = self.encode([prompt.text for prompt in prompts] + [None] * len(prompts))
        shape = len(self.picture_ids), self.transformer.config.in_channels
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed)) for prompt in prompts]).to(device)
        shift = math.exp(compute_empirical_mu(len(self.picture_ids), settings.euler_steps))       # Klein's own, by size and steps
        grid = flow.times(settings.euler_steps, settings.sway, shift * settings.shift)            # two shifts multiply
        black = self.vae.module.encode(torch.zeros(1, 3, p.canvas_height, p.canvas_width, device=device))
        inside = useful(p).to(device)[:, None]

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = self.velocity(x_t, t, text[:len(x_t)])         # no loss was on the rest of the canvas: it goes to black, as in training
            return torch.where(inside, v, (x_t - black) / flow.expand(t, x_t))

        with torch.autocast(device.type, torch.bfloat16, enabled=self.transformer.dtype == torch.bfloat16):
            x = flow.euler(network, noise, grid, settings.cfg_scale, settings.cfg_from, settings.cfg_to)
        return self.vae.module.decode(x, p.canvas_height, p.canvas_width)

    def encode(self, texts: Sequence[str | None]) -> torch.Tensor:
        """Features (B, S, D) of texts in the config's prompt; None is the empty prompt, which guidance steers away from."""
        prompts = ["" if text is None else self.config.klein.prompt.replace("{text}", text) for text in texts]
        ids, mask = (part.to(self.picture_ids.device) for part in pretrained.tokenize_prompts(self.tokenizer, prompts, len(self.text_ids)))
        return (self.trained_text_encoder or self.text_encoder)(ids, mask).float()

    def reference(self, corpus: data.Waves, clip: data.Clip) -> Artifact:
        """A recorded clip, painted by the codec and passed through the VAE: no network can be better."""
        return through_vae(self.vae, corpus.wave(clip), self.config.picture, clip.text)

    def score(self, made: Artifact, corpus: data.Waves, clip: data.Clip) -> dict[str, float]:
        """lsd: log-spectral distance to the recorded clip, equally loud, dB. path_distance: mean distance of the colours to the path."""
        lsd = audio.log_spectral_distance(*audio.side_by_side(made.wave, corpus.wave(clip), self.config.picture))
        return {"lsd": lsd, "path_distance": made.distance.mean().item()}

    @functools.cached_property
    def vae(self) -> pretrained.Frozen:
        """Resident after its first use; held beside the module, not in it, so checkpoints know nothing of it."""
        return pretrained.load_frozen_klein(self.config, "vae", self.picture_ids.device)

    @functools.cached_property
    def text_encoder(self) -> pretrained.Frozen:
        """As `vae`; training needs it only where its features are not cached."""
        return pretrained.load_frozen_klein(self.config, "text_encoder", self.picture_ids.device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices where every weight is tuned; a LoRA has none, AdamW trains it as everybody does."""
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        return [layer.weight for block in blocks for layer in block.modules() if type(layer) is nn.Linear and layer.weight.requires_grad]

    def load_adapter(self, name: str) -> None:
        """Put a published adapter, a folder or hub id, in place of the LoRA; see `read_adapter`."""
        adapter, text_encoder = read_adapter(name), self.trained_text_encoder
        if "text_encoder" in adapter and text_encoder is None:
            text_encoder = pretrained.load_klein(self.config, "text_encoder").requires_grad_(False).to(self.picture_ids.device)
        parts = {"transformer": self.transformer} | ({"text_encoder": text_encoder} if text_encoder else {})
        for part, layers in adapter.items():
            check_adapter(parts[part], layers, f"{name}: {part}")
        for part, root in parts.items():
            apply_adapter(root, adapter.get(part, {}))         # none of a part: it is as it came
        self.trained_text_encoder = text_encoder

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        """Write what diffusers, peft and ComfyUI load: the adapter, or, where every weight was tuned, the whole pipeline.

        facts: for the files' headers and the model card: step, commit, corpus.
        """
        folder.mkdir(parents=True, exist_ok=True)
        k, p = self.config.klein, self.config.picture
        if k.vae != "own" or self.config.flow.predict != "v":
            print("note: others paint with klein.vae own and flow.predict v only; this is for nanoaudio's klein.base and --lora")
        if k.tune == "full":
            pretrained.save_klein(self.config, self.transformer, folder)
            return
        adapter = {f"transformer.{path}": lora for path, lora in loras(self.transformer).items()}
        settings = {f"transformer.{key}": value for key, value in peft_settings(loras(self.transformer)).items()}
        write_tensors(folder / WEIGHTS, adapter, facts | {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)})
        write_tensors(folder / "comfyui.safetensors", adapter, facts, folded=True)
        if self.trained_text_encoder is not None:
            write_peft(folder / "text_encoder", loras(self.trained_text_encoder), k.base)
        attribution, settings = ATTRIBUTION.get(self.config.data.corpus, ""), self.config.sample
        card = MODEL_CARD.read_text(encoding="utf-8").format(
            base=k.base, rank=k.rank, attribution=attribution, prompt=k.prompt, picture=p,
            size=f"height={p.canvas_height}, width={p.canvas_width}, max_sequence_length={k.text_tokens}, "   # the padding is attended to
                 f"num_inference_steps={settings.euler_steps}, guidance_scale={settings.cfg_scale}",
            text='pipe.text_encoder.load_adapter(folder + "/text_encoder")' if self.trained_text_encoder else "",
            facts="\n".join(f"- {key}: {value}" for key, value in facts.items()))
        (folder / "README.md").write_text(card, encoding="utf-8")


def listen(picture: torch.Tensor, p: Picture, text: str) -> Artifact:
    """A picture (3, H, W) in [0, 1] -> what is heard in it, on the CPU: in 8 bits, so that the PNG sounds the same."""
    picture = (255 * picture.float().cpu()).round() / 255
    level, distance = audio.unpaint(picture, p)
    return Artifact(audio.listen(level, p), p.sample_rate, picture, distance, p, text)


def through_vae(vae: pretrained.Frozen, wave: torch.Tensor, p: Picture, text: str) -> Artifact:
    """A wave (N,) painted, encoded, decoded and heard again."""
    tokens = vae.module.encode(audio.paint(wave, p)[None])
    return listen(vae.module.decode(tokens, p.canvas_height, p.canvas_width)[0], p, text)


# Batches

class PictureBatches(Batches):
    """x, noise (B, N, C); x_mask (B, N): tokens that show the spectrogram, not the rest of the canvas; t (B,); frames (B,);
    number (B,) of the clip; text (B, S, D), cached features, or ids, text_mask (B, S) where the text encoder is trained.
    """

    def __init__(self, config: Config, corpus: data.Waves, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.latents = data.open_rows(latents_file(config, corpus), data.PREPARE)
        self.places = {clip.number: n for n, clip in enumerate(all_clips(corpus))}
        path, texts = features_file(config, corpus)
        self.text_numbers = {text: n for n, text in enumerate(texts)}
        self.features = data.open_rows(path, data.PREPARE) if not config.klein.text_rank else None
        self.x_mask = useful(config.picture)

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, the text is kept, as for validation."""
        x = self.latents(self.places[clip.number])
        dropped = t is None and rng.random() < self.config.flow.text_condition_dropout
        t = self.draw_time(rng) if t is None else t
        noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32))
        return {"x": x, "noise": noise, "t": t, "frames": clip.frames, "number": clip.number,
                "prompt": "" if dropped else self.config.klein.prompt.replace("{text}", clip.text)}

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("t", "frames", "number")}
        batch |= {key: torch.stack([row[key] for row in rows]) for key in ("x", "noise")}
        batch["x_mask"] = self.x_mask.expand(len(rows), -1)
        prompts = [row["prompt"] for row in rows]
        if self.features:
            batch["text"] = torch.stack([self.features(self.text_numbers[prompt]) for prompt in prompts])
        else:
            batch["ids"], batch["text_mask"] = pretrained.tokenize_prompts(self.tokenizer, prompts, self.config.klein.text_tokens)
        return batch


def useful(p: Picture) -> torch.Tensor:
    """(N,): which tokens of the canvas show any of the spectrogram."""
    rows = torch.arange(p.canvas_height // 16) * 16 < p.n_fft // 2 + 1
    columns = torch.arange(p.canvas_width // 16) * 16 < audio.frames(p) * p.stretch
    return (rows[:, None] & columns).flatten()


def all_clips(corpus: data.Waves) -> list[data.Clip]:
    return sorted({clip for split in data.SPLITS for clip in corpus.clips(split)}, key=lambda clip: clip.number)


def latents_file(config: Config, corpus: data.Waves) -> Path:
    """The cache of the clips' latents, named by what is in it."""
    content = [config.klein.base, config.klein.vae, asdict(config.picture), [clip.number for clip in all_clips(corpus)]]
    return corpus.folder / f"latents_{data.digest(content)[:8]}.npy"


def features_file(config: Config, corpus: data.Waves) -> tuple[Path, list[str]]:
    """The cache of the text encoder's features, and the prompts in it."""
    k, prompts = config.klein, sorted({"", *(config.klein.prompt.replace("{text}", clip.text) for clip in all_clips(corpus))})
    return corpus.folder / f"features_{data.digest([k.base, k.text_tokens, prompts])[:8]}.npy", prompts


def prepare(config: Config) -> None:
    """Make whatever training needs and does not find: packed waves, their latents, the prompts' features; measure the ceiling."""
    data.prepare_speech(config, data.wave_form(config.picture), recogniser.cut_clips)
    corpus, p = data.Waves(config), config.picture
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    path, clips, (prompts_path, prompts) = latents_file(config, corpus), all_clips(corpus), features_file(config, corpus)
    if not clips:
        raise UserError(f"{corpus.folder}: has no clip of at most data.max_seconds {config.data.max_seconds}")
    ids, mask = pretrained.tokenize_prompts(pretrained.load_klein_tokenizer(config.klein.base), prompts, config.klein.text_tokens)
    if not path.exists():
        vae = pretrained.load_frozen_klein(config, "vae", device)
        measure_ceiling(config, corpus, vae, device)

        def to_latents(numbers: list[int]) -> np.ndarray:
            return vae.module.encode(torch.stack([audio.paint(corpus.wave(clips[n]), p) for n in numbers])).cpu().numpy()

        data.cache_rows(path, [len(useful(p))] * len(clips), None, to_latents, 4, "latents")
    if not config.klein.text_rank and not prompts_path.exists():
        encoder = pretrained.load_frozen_klein(config, "text_encoder", device)

        def to_features(numbers: list[int]) -> np.ndarray:
            return encoder(ids[numbers].to(device), mask[numbers].to(device)).float().cpu().numpy()

        data.cache_rows(prompts_path, [len(row) for row in ids], None, to_features, 8, "features of the prompts")


def measure_ceiling(config: Config, corpus: data.Waves, vae: pretrained.Frozen, device: torch.device) -> None:
    """Print what is left of recordings after codec, VAE and Griffin-Lim: what a perfect network would reach, before any is trained."""
    p, listener = config.picture, recogniser.load(config.eval.recogniser, device)
    clips = (corpus.clips(config.eval.split) or corpus.clips("train"))[:16]
    waves = [corpus.wave(clip) for clip in clips]
    made = [through_vae(vae, wave, p, "") for wave in tqdm(waves, desc="ceiling", unit="clip", disable=None)]
    painted, kept = (audio.unpaint(torch.stack(pictures), p)[0]
                     for pictures in ([audio.paint(wave, p) for wave in waves], [artifact.picture for artifact in made]))
    rmse = (kept - painted).square().mean().sqrt().item()
    understood = ""
    if listener:
        heard = listener.transcribe([artifact.wave for artifact in made], p.sample_rate)
        pairs = [(recogniser.normalise(clip.text), recogniser.normalise(h)) for clip, h in zip(clips, heard)]
        understood = f", word error rate {100 * metric.word_error_rate(pairs):.1f} % by {listener.name}"
    print(f"the ceiling, {len(clips)} clips through picture, VAE and Griffin-Lim: "
          f"{rmse:.2f} dB RMSE{understood}", flush=True)


# LoRA

class LoRA(nn.Module):
    """A frozen linear layer W and a low-rank update: W x + alpha / r B A x. A, B stay fp32 and compute in x's or autocast's precision."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        """base: (in, out). A (r, in) starts random, B (out, r) at 0, so that the layer starts as it was."""
        super().__init__()
        self.base, self.alpha, self.scale, self.original = base.requires_grad_(False), float(alpha), alpha / rank, None
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=device) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        y = self.base(x)
        if self.original is not None:
            return y                                           # merged: the update is in W
        h = F.linear(x, self.A.to(x.dtype))                    # (..., r)
        added = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.B.to(h.dtype).T, alpha=self.scale)     # no second (..., out) is kept
        return added.view_as(y)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to W: the same outputs without its cost. The original W waits on the CPU."""
        if self.original is None:
            self.original = self.base.weight.detach().cpu().clone()
            self.base.weight += (self.scale * self.B @ self.A).to(self.base.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Bit for bit the W that was frozen."""
        if self.original is not None:
            self.base.weight.copy_(self.original)
            self.original = None

    @property
    def weight(self) -> torch.Tensor:
        """Of the frozen layer, for code that takes this for an nn.Linear."""
        return self.base.weight


def add_lora(root: nn.Module, ranks: dict[str, int], alpha: float) -> None:
    """Wrap the linear layers at the full paths `ranks` inside `root`, each with its rank; one that is wrapped is wrapped anew."""
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        owner = root.get_submodule(parent)
        layer = getattr(owner, name)
        setattr(owner, name, LoRA(layer.base if isinstance(layer, LoRA) else layer, rank, alpha))


def remove_lora(root: nn.Module) -> None:
    for path, lora in loras(root).items():
        lora.unmerge()
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, lora.base)


def loras(root: nn.Module) -> dict[str, LoRA]:
    """The wrapped layers by their full paths."""
    return {path: module for path, module in root.named_modules() if isinstance(module, LoRA)}


def attention_layers(root: nn.Module) -> list[str]:
    """Full paths of all attention projections.

    root: a transformer: 8 a double block, 2 a single one, whose QKV and MLP inputs are one matrix; or a KleinText: layers 0 to 26.
    """
    return [path for path, module in root.named_modules() if type(module) is nn.Linear and re.search(r"\.(self_)?attn\.", path)]


# Adapters as files

ATTRIBUTION = {"librispeech": "Trained on LibriSpeech train-clean-100 (Panayotov et al. 2015), CC BY 4.0, https://www.openslr.org/12.",
               "ljspeech": "Trained on LJSpeech 1.1 (Ito, Johnson 2017), public domain."}
WEIGHTS, PEFT_WEIGHTS = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PREFIXES = {"transformer.": "transformer", "diffusion_model.": "transformer", "text_encoder.": "text_encoder", "base_model.model.": None}
ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora.down.weight": "A", ".lora.up.weight": "B",
           ".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"}


def read_adapter(name: str) -> dict[str, dict[str, dict]]:
    """An adapter from a folder, a .safetensors file or a hub id, with diffusers' names of modules, in diffusers', peft's or kohya's layout.

    returns: {"transformer": {path: {"A", "B", "alpha"}}, "text_encoder": the same, if there is one}.
    raises UserError for what is no adapter, or half of one.
    """
    wanted = PEFT_WEIGHTS if Path(name, PEFT_WEIGHTS).is_file() else WEIGHTS
    file = Path(name) if name.endswith(".safetensors") else pretrained.find_file(name, wanted)
    adapter, where = read_layers(file, "transformer"), str(file.parent) if Path(name).exists() else name
    try:
        pretrained.find_file(where, "text_encoder/adapter_config.json")
    except UserError:
        return adapter                                         # most have none
    return adapter | read_layers(pretrained.find_file(where, f"text_encoder/{PEFT_WEIGHTS}"), "text_encoder")


def read_layers(file: Path, peft_part: str) -> dict[str, dict[str, dict]]:
    """What `read_adapter` returns, of one file. peft_part: whose the keys of peft are, base_model.model., which do not say it."""
    tensors, header = read_safetensors(file)
    found, settings = {}, {}
    try:
        for key, value in json.loads(header.get("lora_adapter_metadata", "{}")).items():
            settings.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
        if file.name == PEFT_WEIGHTS:
            settings[peft_part] = dict(json.loads(file.with_name("adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: the adapter's settings cannot be read ({pretrained.brief(e)})") from e
    for key, value in tensors.items():
        prefix = next((p for p in PREFIXES if key.startswith(p)), "")
        ending = next((e for e in ENDINGS if key.endswith(e)), "")
        if not prefix or not ending:
            raise UserError(f"{file}: {key} is no tensor of an adapter that is known here; keys are transformer.MODULE.lora_A.weight")
        layers = found.setdefault(PREFIXES[prefix] or peft_part, {})
        layers.setdefault(key[len(prefix):-len(ending)], {})[ENDINGS[ending]] = value
    if not found:
        raise UserError(f"{file}: holds no adapter")
    for part, layers in found.items():
        for path, layer in layers.items():
            a, b = layer.get("A", torch.empty(0)), layer.get("B", torch.empty(0))
            if not a.dim() == b.dim() == 2 or not 0 < len(a) == b.shape[1]:
                raise UserError(f"{file}: {path} lacks one of its two matrices, or they do not fit each other: half an adapter")
            try:
                layer["alpha"] = float(layer.get("alpha", peft_alpha(settings.get(part, {}), path, len(a))))
            except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as e:
                raise UserError(f"{file}: the alpha of {path} cannot be read ({pretrained.brief(e)})") from e
    return found


def peft_alpha(settings: dict, path: str, rank: int) -> float:
    """A layer's alpha by peft's settings; where they say nothing it is the rank, as everywhere."""
    own = [value for pattern, value in settings.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    alpha = own[0] if own else settings.get("lora_alpha", rank)
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def check_adapter(root: nn.Module, layers: dict[str, dict], where: str) -> None:
    """raises UserError where `root` has no such layer or one of another size."""
    frozen = {path.removesuffix(".base"): module for path, module in root.named_modules() if type(module) is nn.Linear}
    for path, layer in layers.items():
        if path not in frozen:
            raise UserError(f"{where} has no linear layer {path}: an adapter of another network")
        shape = (layer["B"].shape[0], layer["A"].shape[1])
        if frozen[path].weight.shape != shape:
            raise UserError(f"{where}: {path} is {tuple(frozen[path].weight.shape)}, the adapter's {shape}: one of another size")


def apply_adapter(root: nn.Module, layers: dict[str, dict]) -> None:
    """Put the layers of `read_adapter` in place of the LoRA of `root`."""
    remove_lora(root)
    for path, layer in layers.items():
        add_lora(root, {path: len(layer["A"])}, layer["alpha"])
        lora = root.get_submodule(path)
        with torch.no_grad():
            lora.A.copy_(layer["A"])
            lora.B.copy_(layer["B"])


def peft_settings(layers: dict[str, LoRA]) -> dict:
    """Rank and alpha as peft's LoraConfig has them: without these a reader would take alpha for the rank."""
    sizes = {path: (len(lora.A), lora.alpha) for path, lora in layers.items()}
    rank, alpha = next(iter(sizes.values()))
    return {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers),
            "rank_pattern": {path: own for path, (own, _) in sizes.items() if own != rank},
            "alpha_pattern": {path: own for path, (_, own) in sizes.items() if own != alpha}}


def write_tensors(path: Path, layers: dict[str, LoRA], header: dict[str, str], folded: bool = False) -> None:
    """folded: alpha / r multiplied into B, for ComfyUI, which reads no settings."""
    tensors = {f"{name}.lora_A.weight": lora.A.detach().cpu() for name, lora in layers.items()}
    tensors |= {f"{name}.lora_B.weight": lora.B.detach().cpu() * (lora.scale if folded else 1) for name, lora in layers.items()}
    with data.replacing(path) as part:
        safetensors.torch.save_file(tensors, part, {"format": "pt", **header})


def write_peft(folder: Path, layers: dict[str, LoRA], base: str) -> None:
    """The text encoder's adapter as a folder of peft, since diffusers' own format has no place for it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / PEFT_WEIGHTS, {f"base_model.model.{path}": lora for path, lora in layers.items()}, {})
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "bias": "none", "inference_mode": True, **peft_settings(layers)}
    with data.replacing(folder / "adapter_config.json") as part:
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a file, and its header's own words."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: not a safetensors file ({pretrained.brief(e)})") from e
