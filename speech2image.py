"""Pictures of what is said, without a text in between: speech and pictures in one space by contrast, then pictures from that space.

Top-down: stage 1, system `speech_align`; stage 2, system `speech_image`; corpora, batches, caches. A wave is (N,) at 16 kHz, a picture
(3, H, W) in [0, 1], an embedding (D,) of length 1; x (B, N) are codes 0 ... K - 1 of a square grid, row by row. Source: Speak the Art
(arXiv 2601.00827); its stage 1 is SpeechCLIP (arXiv 2210.00705), its stage 2 VQ-Diffusion for ImageNet (arXiv 2111.14822), see flow.py.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.image import imsave

import data
import flow
import metric
import pretrained
import recogniser
import shapes
from config import Config, Sample, UserError, from_checkpoint
from speech2image_config import SpeechAlignConfig
from model import Batches, Prompt, zero

RATE, HOP = recogniser.RATE, recogniser.HOP                    # Hz; samples a frame, 50 a second


@dataclass
class Artifact:
    """A picture (3, H, W) of a spoken prompt (N,), the training pictures (K, 3, S, S) that are nearest, and the prompt's embedding (D,)."""
    wave: torch.Tensor
    sample_rate: int
    picture: torch.Tensor
    nearest: torch.Tensor
    embedding: torch.Tensor

    def draw(self, stem: Path) -> dict[str, str]:
        """Write the picture, and the nearest ones in a row; returns their names by kind."""
        names = {"picture": f"{stem.name}.png", "nearest": f"{stem.name}.nearest.png"}
        for name, picture in zip(names.values(), (self.picture, torch.cat([*self.nearest], -1))):
            imsave(stem.with_name(name), picture.float().cpu().clamp(0, 1).permute(1, 2, 0).contiguous().numpy())
        return names


class Stage(nn.Module):
    """What both systems have in common."""

    makes, speaks, listens = ("png",), False, True
    longest, frame_rate, tokenizer = 0, RATE / HOP, None

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @functools.cached_property
    def corpus(self) -> "Corpus":
        """Whose training pictures are shown beside: opened on first use, held beside the module."""
        return Corpus(self.config)

    def features(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, np.ndarray]:
        """For retrieval: speech, image (D,), numbers of the picture and its label, the group."""
        return {"speech": made.embedding.numpy(), "image": corpus.embedding(clip).numpy(), "picture": np.array(corpus.number(clip)),
                "label": np.array(corpus.label(clip)), "group": np.array(clip.group)}

    def load_adapter(self, name: str) -> None:
        raise UserError(f"--lora {name}: system {self.config.system} takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        raise UserError(f"{folder}: no other software loads system {self.config.system}; its checkpoint is all there is")


# Stage 1: speech beside pictures

class SpeechAlign(Stage):
    """Loss out of `forward`; out of `sample` the training picture that is nearest to what is said."""

    def __init__(self, config: Config):
        super().__init__(config)
        m, a = config.model, config.align
        self.front = recogniser.MelFront(m.width) if a.speech == "scratch" else recogniser.HubertFront(a.speech)
        width = self.front.width
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, m.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, m.layers, enable_nested_tensor=False)
        self.proj = zero(nn.Linear(width, flow.tower_width(a.image)))    # nothing is like anything yet: the loss starts at log B
        self.log_scale = nn.Parameter(torch.tensor(-math.log(a.temperature)))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """returns: loss, contrast_loss, of the clips of all ranks; temperature; scalars."""
        speech, image, label = self.embed(batch["wave"], batch["wave_mask"], batch["hidden"]), batch["image"], batch["label"]
        if torch.is_grad_enabled() and dist.is_initialized():       # a validation batch is compared with itself alone
            speech, image, label = (torch.cat(dist.nn.functional.all_gather(part)) for part in (speech, image, label))
        loss = recogniser.info_nce(speech, image, label, self.log_scale.clamp(max=math.log(100)).exp())
        return {"loss": loss, "contrast_loss": loss, "temperature": (-self.log_scale).exp().detach()}

    def embed(self, wave: torch.Tensor, wave_mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """wave (B, N), wave_mask (B, N), hidden (B, 2, K, 2), see recogniser.hide -> (B, D), float32."""
        h, mask = self.front(wave, wave_mask, hidden)                                    # (B, T, W), (B, T)
        h = torch.cat([self.cls.expand(len(h), -1, -1).to(h.dtype), h], 1)
        h = self.encoder(h, src_key_padding_mask=~F.pad(mask, (1, 0), value=True))
        h = self.proj(h[:, 0]).float()
        return h * (h.square().sum(-1, keepdim=True) + 1e-6).rsqrt()                     # length 1, and 0 where it starts

    @torch.inference_mode()
    def listen(self, waves: Sequence[torch.Tensor]) -> torch.Tensor:
        """Waves (N,) -> (B, D), on the CPU."""
        wave, mask = data.pad([recogniser.standardise(wave) for wave in waves], self.config.data.pad_multiple * HOP)
        device = self.proj.weight.device
        return self.embed(wave.to(device), mask.to(device), torch.zeros(len(waves), 2, 0, 2, device=device)).cpu()

    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """The nearest training pictures."""
        return [Artifact(prompt.speech, RATE, (found := self.corpus.nearest(embedding))[0], found[1:], embedding)
                for prompt, embedding in zip(prompts, self.listen([prompt.speech for prompt in prompts]))]

    def reference(self, corpus: "Corpus", clip: data.Clip) -> Artifact:
        """The clip's own picture, as if speech had found it."""
        embedding = corpus.embedding(clip)
        return Artifact(corpus.wave(clip), RATE, corpus.picture(corpus.number(clip)), corpus.nearest(embedding), embedding)

    def score(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, float]:
        return {}                              # a picture that was found is not judged: retrieval has its figures in `features`

    def hidden_matrices(self) -> list[nn.Parameter]:
        return []                              # AdamW trains all of it, as in the paper


def load_align(path: str, device: torch.device) -> SpeechAlign:
    """A trained stage 1, frozen, with its averaged weights; path: a checkpoint, or the folder of a run, whose newest is taken."""
    try:
        state = torch.load(newest(Path(path)), map_location="cpu", weights_only=True)
        network = SpeechAlign(from_checkpoint(SpeechAlignConfig, state["config"], path))
        network.load_state_dict({**state["model"], **state["ema"]})
    except UserError:
        raise
    except Exception as e:                                     # garbage fails in every way there is
        raise UserError(f"{path}: holds no checkpoint of system speech_align; train that first, and name its out_dir") from e
    return network.to(device).eval().requires_grad_(False)


# Stage 2: codes of a picture, by VQ-Diffusion, from what stage 1 makes of the speech

class SpeechImage(Stage):
    """Losses out of `forward`, pictures out of `sample`."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config.codes
        self.process = flow.MaskReplace(c.kept, c.diffusion_steps, c.mask_share)
        self.times = flow.ImportantTimes(c.diffusion_steps)
        self.denoiser = flow.Denoiser(config, flow.tower_width(config.align.image))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch of `ImageBatches`; a training batch says by new_update whether the weights have changed since the last.

        returns: loss; flow_loss, the bound in nats a code, by its steps' share; code_loss, the cross-entropy; flow_loss_per_clip (B,).
        """
        x, steps = batch["x"], self.process.steps
        if "new_update" in batch:
            t, p = self.times.draw(batch["t"], batch["new_update"])
        else:
            t, p = (batch["t"] * steps).long() + 1, torch.full_like(batch["t"], 1 / steps)
        x_t = self.process.corrupt(x, t, batch["u"], batch["other"])
        log_p = self.denoiser(x_t, t, self.denoiser.condition(batch["embedding"], batch["dropped"])).float().log_softmax(-1)
        divergence = self.process.divergence(log_p.exp(), x, x_t, t).mean(1)                       # (B,)
        entropy = -log_p.gather(-1, x[..., None])[..., 0].mean(1)
        if "new_update" in batch:
            self.times.learn(t, divergence.detach())
        loss = (divergence + self.config.codes.auxiliary_weight * (2 - t / steps) * entropy) / p
        bound = divergence / p
        return {"loss": loss.mean(), "flow_loss": bound.mean(), "code_loss": entropy.mean(), "flow_loss_per_clip": bound.detach()}

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """Pictures of the prompts as one batch; what is random in one depends on its own seed alone."""
        embeddings = self.stage1.listen([prompt.speech for prompt in prompts])
        pictures = self.autoencoder.module.decode(self.make(embeddings, [prompt.seed for prompt in prompts], settings)).cpu()
        return [Artifact(prompt.speech, RATE, picture, self.corpus.nearest(embedding), embedding)
                for prompt, picture, embedding in zip(prompts, pictures, embeddings)]

    def make(self, embeddings: torch.Tensor, seeds: Sequence[int], settings: Sample) -> torch.Tensor:
        """Codes (B, N) for embeddings (B, D)."""
        count, steps, tokens = len(seeds), min(settings.euler_steps, self.process.steps), self.config.codes.grid ** 2
        u = torch.stack([torch.rand(steps + 1, tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds], 1)
        unconditional = torch.arange(2 * count, device=self.device) >= count
        condition = self.denoiser.condition(torch.cat([embeddings] * 2).to(self.device), unconditional)

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.denoiser(x_t, t, condition[:len(x_t)])

        return self.process.sample(network, u.to(self.device), settings.cfg_scale, settings.cfg_from, settings.cfg_to, settings.truncation)

    def reference(self, corpus: "Corpus", clip: data.Clip) -> Artifact:
        """The clip's own picture through its codes: no network can be better."""
        codes, embedding = read_codes(corpus)[0], corpus.embedding(clip)
        picture = self.autoencoder.module.decode(codes[corpus.number(clip)][None].to(self.device))[0].cpu()
        return Artifact(corpus.wave(clip), RATE, picture, corpus.nearest(embedding), embedding)

    @torch.inference_mode()
    def score(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, float]:
        """Whether a picture shows what the clip's label says, part by part: by the judge, and by rule.

        Only drawn shapes have a rule.
        """
        label = corpus.labels[corpus.names[corpus.number(clip)]]
        by_rule = shapes.matches(made.picture, label) if self.config.data.corpus == "shapes" else {}
        if not self.config.codes.judge:
            return by_rule
        parts, wanted = flow.label_parts(corpus.kinds), label.split("-")
        seen = [names[scores.argmax()] for names, scores in zip(parts, self.judge(made.picture[None].to(self.device)))]
        names = ("colour", "shape", "place") if len(parts) == 3 else ()
        matches = {f"{name}_match": float(a == b) for name, a, b in zip(names, seen, wanted)}
        return matches | {"all_match": float(seen == wanted)} | by_rule

    @torch.inference_mode()
    def features(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, np.ndarray]:
        """As stage 1's, and made (D,), the picture by the image tower; where eval.features names a network, also what FID and IS are of."""
        picture, own = (p[None].to(self.device) for p in (made.picture, corpus.picture(corpus.number(clip), made.picture.shape[-1])))
        found = {"made": self.tower(picture)}
        if self.config.eval.features:
            (found["seen"], found["shares"]), (found["seen_real"], _) = self.inception(picture), self.inception(own)
        found = {key: value[0].float().cpu().numpy() for key, value in found.items()}
        found |= {"chance": np.array(1 / math.prod(map(len, flow.label_parts(corpus.kinds))))} if self.config.codes.judge else {}
        return found | super().features(made, corpus, clip)

    @property
    def device(self) -> torch.device:
        return self.denoiser.null.device

    @functools.cached_property
    def stage1(self) -> SpeechAlign:
        """Resident after its first use, as what follows; held beside the module, not in it, so checkpoints know nothing of it."""
        return load_align(self.config.codes.stage1, self.device)

    @functools.cached_property
    def autoencoder(self) -> pretrained.Frozen:
        return pretrained.Frozen(flow.Codebook(load_autoencoder(self.corpus), read_codes(self.corpus)[1])).to(self.device)

    @functools.cached_property
    def tower(self) -> pretrained.Frozen:
        return load_tower(self.corpus).to(self.device)

    @functools.cached_property
    def judge(self) -> pretrained.Frozen:
        sizes = [len(names) for names in flow.label_parts(self.corpus.kinds)]
        return flow.restored(flow.Judge(sizes), judge_file(self.corpus)).to(self.device)

    @functools.cached_property
    def inception(self) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        return flow.load_inception(self.config.eval.features, self.device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: the blocks' matrices, 3 x 3 convolutions among them; what tells time and condition stays with AdamW."""
        return [layer.weight for block in self.denoiser.blocks for name, layer in block.named_children()
                if isinstance(layer, nn.Linear) and not name.startswith("by_")]


# Corpora and batches

class Corpus(data.Packed):
    """Spoken descriptions of pictures, to train on as many of each language: the fewer come again. A clip's id is LABEL:PICTURE#NUMBER."""

    statistics = ()

    def __init__(self, config: Config):
        super().__init__(config, form(config), config.data.max_seconds * RATE / HOP)
        self.config, self.all_clips = config, sorted({c for split in data.SPLITS for c in self.clips(split)}, key=lambda clip: clip.number)
        spoken = [[clip for clip in self.clips("train") if clip.group.startswith(language)] for language in config.data.langs]
        self.splits = self.splits | {"train": [clips[n % len(clips)] for clips in spoken if clips for n in range(max(map(len, spoken)))]}
        self.labels = {name: label or name for label, name in map(picture_of, self.all_clips)}     # by picture
        self.names, kinds = list(self.labels), list(dict.fromkeys(self.labels.values()))
        self.numbers, self.kinds = ({name: n for n, name in enumerate(names)} for names in (self.names, kinds))

    def number(self, clip: data.Clip) -> int:
        """Of its picture, in `names`."""
        return self.numbers[picture_of(clip)[1]]

    def label(self, clip: data.Clip) -> int:
        """The same for pictures that are as right as each other."""
        return self.kinds[self.labels[picture_of(clip)[1]]]

    def gallery(self, split: str) -> list[int]:
        """The numbers of a split's pictures."""
        return sorted({self.number(clip) for clip in self.clips(split)})

    def picture(self, number: int, size: int = 0) -> torch.Tensor:
        """(3, size, size), see `flow.resized`; size 0: (3, H, W), as it is."""
        picture = flow.read_picture(str(Path(self.config.data.data_dir, self.names[number])))
        return flow.resized(picture, size) if size else picture

    def embedding(self, clip: data.Clip) -> torch.Tensor:
        """What the image tower makes of its picture: (D,)."""
        return self.embeddings(self.number(clip))[0]

    @functools.cached_property
    def embeddings(self) -> Callable[[int], torch.Tensor]:
        """The embedding (1, D) of a picture by its number."""
        return data.open_rows(embeddings_file(self), data.PREPARE)

    @functools.cached_property
    def trained(self) -> torch.Tensor:
        """The embeddings (n, D) of the training pictures."""
        return torch.cat([self.embeddings(n) for n in self.gallery("train")])

    def nearest(self, embedding: torch.Tensor, count: int = 5) -> torch.Tensor:
        """The training pictures nearest to an embedding (D,), best first: (count, 3, S, S), S the best one's shorter side."""
        order = (self.trained @ embedding.float().cpu()).topk(min(count, len(self.trained))).indices.tolist()
        found = [self.gallery("train")[n] for n in order]
        return torch.stack([self.picture(n, min(self.picture(found[0]).shape[1:])) for n in found])


class AlignBatches(Batches):
    """wave (B, N), standardised, 0 where wave_mask (B, N) is False; hidden (B, 2, K, 2), see recogniser.hide; image (B, D); label, frames,
    t (B,).

    Lengths are mixed, lest a description be told from others by its length.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.lengths = np.ones_like(self.lengths)

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """Whole batches are shared out, so that a clip has the same negatives however many ranks there are."""
        clips, size = self.corpus.clips(self.config.eval.split), self.config.train.batch_size
        return [self.collate([self.row(clip, None) for clip in clips[start:start + size]])
                for start in range(0, len(clips), size)[self.rank::self.world]]

    def row(self, clip: data.Clip, rng: np.random.Generator | None) -> dict:
        """A clip and what is drawn for it; without rng it stays as it is."""
        a, wave = self.config.align, self.corpus.wave(clip)
        hidden = np.zeros((2, a.hidden_spans, 2), np.float32)
        if rng is not None:
            wave, hidden = recogniser.roughened(wave, a, rng)
        return {"wave": recogniser.standardise(wave), "hidden": torch.from_numpy(hidden).float(), "image": self.corpus.embedding(clip),
                "label": self.corpus.label(clip), "frames": clip.frames, "t": 0.0}

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("t", "frames", "label")}
        batch |= {key: torch.stack([row[key] for row in rows]) for key in ("hidden", "image")}
        batch["wave"], batch["wave_mask"] = data.pad([row["wave"] for row in rows], self.config.data.pad_multiple * HOP)
        return batch


class ImageBatches(AlignBatches):
    """x (B, N) codes; u, other (B, N) for `flow.MaskReplace.corrupt`; t (B,) uniform in [0, 1); embedding (B, D) of the speech;
    dropped (B,): rows that must do without it; frames (B,); new_update (), in training: this is the first micro-batch of its step.

    A description is trained on with any training picture that has its label; each language is drawn equally often.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        check_stage1(corpus)
        self.codes, self.embeddings = read_codes(corpus)[0], data.open_rows(speech_file(corpus), data.PREPARE)
        self.alike = {}
        for clip in corpus.clips("train"):
            self.alike.setdefault(corpus.label(clip), set()).add(corpus.number(clip))
        self.alike = {label: sorted(numbers) for label, numbers in self.alike.items()}

    def train(self, step: int, micro: int = 0) -> dict[str, torch.Tensor]:
        return super().train(step, micro) | {"new_update": torch.tensor(micro == 0)}

    validation = Batches.validation            # whole clips by themselves, their times spread evenly

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it. t: given, it keeps its own picture and its embedding, as for validation."""
        dropped = t is None and rng.random() < self.config.flow.text_condition_dropout
        picture = rng.choice(self.alike[self.corpus.label(clip)]) if t is None else self.corpus.number(clip)
        t, x = rng.random() if t is None else t, self.codes[picture]
        u, other = rng.random(len(x), dtype=np.float32), rng.integers(self.config.codes.kept, size=len(x))
        return {"x": x, "u": torch.from_numpy(u), "other": torch.from_numpy(other), "t": t, "dropped": dropped, "frames": clip.frames,
                "embedding": self.embeddings(clip.number)[0]}

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("t", "frames", "dropped")}
        return batch | {key: torch.stack([row[key] for row in rows]) for key in ("x", "u", "other", "embedding")}


# What training reads, and who makes it

def prepare_align(config: Config) -> None:
    """Make what training needs and does not find: the packed corpus, and what the image tower makes of its pictures."""
    folder, root = data.packed_dir(config, form(config)), Path(config.data.data_dir)
    may_have_changed = config.data.corpus != "shapes" and root.exists() and folder != root
    if may_have_changed or not (folder / "index.json").exists() or not embeddings_file(Corpus(config)).exists():
        recogniser.run_asset("spoken_pictures.py", config)


def prepare_image(config: Config) -> None:
    """Make what training needs and does not find: all of stage 1's, its embeddings of the speech, the codes of the pictures, the judge."""
    prepare_align(config)
    corpus = Corpus(config)
    if not (speech_file(corpus).exists() and codes_file(corpus).exists() and (judge_file(corpus).exists() or not config.codes.judge)):
        recogniser.run_asset("picture_codes.py", config)
    check_stage1(corpus)


def check_stage1(corpus: Corpus) -> None:
    """raises UserError where stage 1 did not learn to find the pictures validated on: what it cannot tell apart, nor can stage 2."""
    c, rows, clips = corpus.config, data.open_rows(speech_file(corpus), data.PREPARE), corpus.clips(corpus.config.eval.split)
    numbers, labels = (np.array([ask(clip) for clip in clips]) for ask in (corpus.number, corpus.label))
    speech, first = torch.cat([rows(clip.number) for clip in clips]), np.unique(numbers, return_index=True)[1]
    pictures = torch.cat([corpus.embeddings(numbers[n]) for n in first])
    found = metric.recall_at((speech @ pictures.T).numpy(), labels[:, None] == labels[first], 1)
    if found < c.codes.require_r1:
        raise UserError(f"{c.codes.stage1}: it finds {100 * found:.1f} % of the pictures (R@1), less than require_r1 {c.codes.require_r1}; "
                        "train it longer")


def form(config: Config) -> dict:
    """What is packed, and how."""
    spoken = {"sentences": config.data.sentences} if config.data.corpus == "shapes" else {}
    return {"sample_rate": RATE, "hop": HOP, "corpus": config.data.corpus, "langs": list(config.data.langs), **spoken}


def picture_of(clip: data.Clip) -> tuple[str, str]:
    """Its label, which may be "", and its picture's path below data_dir."""
    label, _, name = clip.id.rpartition("#")[0].partition(":")
    return label, name


def cached(corpus: Corpus, name: str, content: list) -> Path:
    """A file beside the corpus, named by all that its content depends on."""
    what, _, ending = name.partition(".")
    return corpus.folder / f"{what}_{data.digest([list(corpus.labels.items()), *content])[:8]}.{ending}"


def embeddings_file(corpus: Corpus) -> Path:
    """The image tower's embeddings of the pictures; those of a scratch one also depend on what it learned from."""
    image, texts = corpus.config.align.image, [clip.text for clip in corpus.clips("train")]
    return cached(corpus, "pictures.npy", [image, texts if image == "scratch" else []])


def tower_file(corpus: Corpus) -> Path:
    return embeddings_file(corpus).with_suffix(".safetensors")


def speech_file(corpus: Corpus) -> Path:
    """Stage 1's embeddings of all speech, by its weights and by what it must have been trained against."""
    stage1 = Path(corpus.config.codes.stage1)
    try:
        weights = hashlib.sha256(newest(stage1).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"codes.stage1 {stage1}: no checkpoint of system speech_align there; train that first") from e
    return cached(corpus, "speech.npy", [weights, corpus.config.align.image, [clip.id for clip in corpus.all_clips]])


def codes_file(corpus: Corpus) -> Path:
    """The pictures' codes; beside it, `vq_file`, the autoencoder that was trained for them."""
    c = corpus.config.codes
    return cached(corpus, "codes.safetensors", [c.vq, c.vq_steps, c.picture_size, c.grid, c.kept])


def vq_file(corpus: Corpus) -> Path:
    return cached(corpus, "vq.safetensors", [corpus.config.codes.vq_steps, corpus.config.codes.picture_size])


def judge_file(corpus: Corpus) -> Path:
    return cached(corpus, "judge.safetensors", [])


def read_codes(corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (n, N) of all pictures, and which codes of the codebook they number, (K,)."""
    found = flow.read(codes_file(corpus))
    return found["codes"].long(), found["kept"].long()


def load_autoencoder(corpus: Corpus) -> nn.Module:
    """That of codes.vq, frozen: methods as flow.SmallVQ's."""
    vq = corpus.config.codes.vq
    return (flow.restored(flow.SmallVQ(), vq_file(corpus)) if vq == "scratch" else pretrained.Frozen(flow.PublishedVQ(vq))).module


def load_tower(corpus: Corpus) -> pretrained.Frozen:
    """The image tower of config.align.image: pictures (B, 3, H, W) -> (B, D)."""
    image = corpus.config.align.image
    return flow.restored(flow.SmallTower(), tower_file(corpus)) if image == "scratch" else pretrained.Frozen(flow.ClipTower(image))


def newest(path: Path) -> Path:
    """The newest checkpoint of a run's folder, or the file itself."""
    return max(path.glob("checkpoints/step_*.pt"), default=path)
