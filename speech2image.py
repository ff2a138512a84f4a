"""Speech to picture without a text in between: both in one embedding space, then pictures generated from it.

Stage 1, system `speech_align`; stage 2, system `speech_image`; then corpus, batches, and the files they need.
A wave is (N,) at 16 kHz, a picture (3, H, W) in [0, 1], an embedding (D,) of length 1; x (B, N) are codes, 0
to K - 1, of a square grid, row by row. Sources: Speak the Art (arXiv 2601.00827), whose stage 1 is SpeechCLIP
(arXiv 2210.00705) and whose stage 2 is VQ-Diffusion for ImageNet (arXiv 2111.14822), see flow.py.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.image import imsave
from torch import Tensor

import data
import flow
import metric
import pretrained
import recogniser
import shapes
from config import Config, Sample, UserError, from_checkpoint
from speech2image_config import SpeechAlignConfig
from model import Batches, Prompt, zero

RATE = recogniser.RATE  # Hz
HOP = recogniser.HOP  # samples a frame, 50 a second


@dataclass
class Artifact:
    """What was found or generated for a spoken prompt."""

    wave: Tensor  # (N,), the prompt
    sample_rate: int
    picture: Tensor  # (3, H, W)
    nearest: Tensor  # (K, 3, S, S), the training pictures nearest to the prompt
    embedding: Tensor  # (D,), of the prompt

    def draw(self, stem: Path) -> dict[str, str]:
        """Write the picture, and the nearest ones in a row; returns file names by kind."""
        row = torch.cat(list(self.nearest), -1)
        names = {"picture": f"{stem.name}.png", "nearest": f"{stem.name}.nearest.png"}
        for kind, picture in (("picture", self.picture), ("nearest", row)):
            pixels = picture.float().cpu().clamp(0, 1)
            pixels = pixels.permute(1, 2, 0).contiguous()
            imsave(stem.with_name(names[kind]), pixels.numpy())
        return names


class Stage(nn.Module):
    """What both systems have in common."""

    makes = ("png",)
    speaks = False
    listens = True
    longest = 0
    frame_rate = RATE / HOP
    tokenizer = None

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @functools.cached_property
    def corpus(self) -> "Corpus":
        """Whose training pictures are searched: opened on first use, not registered as a submodule."""
        return Corpus(self.config)

    def features(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, np.ndarray]:
        """For retrieval: embeddings of speech and image (D,), numbers of picture and label, the group."""
        return {
            "speech": made.embedding.numpy(),
            "image": corpus.embedding(clip).numpy(),
            "picture": np.array(corpus.number(clip)),
            "label": np.array(corpus.label(clip)),
            "group": np.array(clip.group),
        }

    def load_adapter(self, name: str) -> None:
        raise UserError(f"--lora {name}: system {self.config.system} takes no LoRA; leave it out")

    def export(self, folder: Path, facts: dict[str, str]) -> None:
        system = self.config.system
        missing = f"no other software loads system {system}; its checkpoint is all there is"
        raise UserError(f"{folder}: {missing}")


# Stage 1: speech and pictures in one embedding space


class SpeechAlign(Stage):
    """`forward` returns the contrastive loss, `sample` the training pictures nearest to what is said."""

    def __init__(self, config: Config):
        super().__init__(config)
        m = config.model
        a = config.align
        if a.speech == "scratch":
            self.front = recogniser.MelFront(m.width)
        else:
            self.front = recogniser.HubertFront(a.speech)
        width = self.front.width
        cls = torch.randn(1, 1, width)
        self.cls = nn.Parameter(cls)
        layer = nn.TransformerEncoderLayer(
            width, m.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, m.layers, enable_nested_tensor=False)
        # Zero-initialised, so all similarities are 0 and the loss starts at log B
        image_width = flow.tower_width(a.image)
        proj = nn.Linear(width, image_width)
        self.proj = zero(proj)
        log_scale = torch.tensor(-math.log(a.temperature))
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """returns: loss, contrast_loss, of the clips of all ranks; temperature; scalars."""
        speech = self.embed(batch["wave"], batch["wave_mask"], batch["hidden"])
        image = batch["image"]
        label = batch["label"]
        # Negatives from all ranks, but each validation batch is compared with itself alone
        if torch.is_grad_enabled() and dist.is_initialized():
            speech = gather_ranks(speech)
            image = gather_ranks(image)
            label = gather_ranks(label)
        log_scale = self.log_scale.clamp(max=math.log(100))
        scale = log_scale.exp()
        loss = recogniser.info_nce(speech, image, label, scale)
        temperature = (-self.log_scale).exp()
        return {"loss": loss, "contrast_loss": loss, "temperature": temperature.detach()}

    def embed(self, wave: Tensor, wave_mask: Tensor, hidden: Tensor) -> Tensor:
        """wave (B, N), wave_mask (B, N), hidden (B, 2, K, 2), see recogniser.hide -> (B, D), float32."""
        h, mask = self.front(wave, wave_mask, hidden)  # (B, T, W), (B, T)
        cls = self.cls.expand(len(h), -1, -1)
        cls = cls.to(h.dtype)
        h = torch.cat([cls, h], 1)
        mask = F.pad(mask, (1, 0), value=True)
        h = self.encoder(h, src_key_padding_mask=~mask)
        cls = h[:, 0]
        embedding = self.proj(cls).float()
        # Of length 1; 0 as long as proj is 0
        energy = embedding.square().sum(-1, keepdim=True)
        return embedding * (energy + 1e-6).rsqrt()

    @torch.inference_mode()
    def listen(self, waves: Sequence[Tensor]) -> Tensor:
        """Waves (N,) -> (B, D), on the CPU."""
        device = self.proj.weight.device
        waves = [recogniser.standardise(wave) for wave in waves]
        multiple = self.config.data.pad_multiple * HOP
        wave, mask = data.pad(waves, multiple)
        wave = wave.to(device)
        mask = mask.to(device)
        hidden = torch.zeros(len(waves), 2, 0, 2, device=device)
        return self.embed(wave, mask, hidden).cpu()

    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """The nearest training pictures."""
        waves = [prompt.speech for prompt in prompts]
        outputs = []
        embeddings = self.listen(waves)
        for wave, embedding in zip(waves, embeddings):
            found = self.corpus.nearest(embedding)
            picture = found[0]
            output = Artifact(wave, RATE, picture, found[1:], embedding)
            outputs.append(output)
        return outputs

    def reference(self, corpus: "Corpus", clip: data.Clip) -> Artifact:
        """The clip's own picture, as if its speech had found it."""
        wave = corpus.wave(clip)
        embedding = corpus.embedding(clip)
        number = corpus.number(clip)
        picture = corpus.picture(number)
        nearest = corpus.nearest(embedding)
        return Artifact(wave, RATE, picture, nearest, embedding)

    def score(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, float]:
        return {}  # a picture that was found is not judged: `features` has what retrieval is scored by

    def hidden_matrices(self) -> list[nn.Parameter]:
        return []  # AdamW trains everything, as in the paper


def gather_ranks(rows: Tensor) -> Tensor:
    """(B, ...) of each rank -> (B of all ranks, ...), with gradients."""
    gathered = dist.nn.functional.all_gather(rows)
    return torch.cat(gathered)


def load_align(path: str, device: torch.device) -> SpeechAlign:
    """A trained stage 1, frozen, with its EMA weights; path: a checkpoint, or a run, for its newest one."""
    try:
        state = torch.load(newest(Path(path)), map_location="cpu", weights_only=True)
        config = from_checkpoint(SpeechAlignConfig, state["config"], path)
        network = SpeechAlign(config)
        network.load_state_dict({**state["model"], **state["ema"]})
    except UserError:
        raise
    except Exception as e:  # a damaged file raises almost anything
        hint = "train that first, and name its out_dir"
        raise UserError(f"{path}: holds no checkpoint of system speech_align; {hint}") from e
    network = network.to(device)
    return network.eval().requires_grad_(False)


# Stage 2: from the embedding of the speech to the codes of a picture, by VQ-Diffusion


class SpeechImage(Stage):
    """`forward` returns losses, `sample` pictures."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config.codes
        self.process = flow.MaskReplace(c.kept, c.diffusion_steps, c.mask_share)
        self.times = flow.ImportantTimes(c.diffusion_steps)
        condition_width = flow.tower_width(config.align.image)
        self.denoiser = flow.Denoiser(config, condition_width)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `ImageBatches`; one to train on has new_update: whether weights have changed.

        returns: loss; flow_loss, the variational bound in nats a code, each step weighted by its share;
        code_loss, the cross-entropy; flow_loss_per_clip (B,).
        """
        x = batch["x"]
        steps = self.process.steps
        is_training = "new_update" in batch

        # Diffusion steps t (B,) from 1 to T, and their probabilities
        uniform = batch["t"]
        if is_training:
            t, p = self.times.draw(uniform, batch["new_update"])
        else:
            t = (uniform * steps).long() + 1
            p = torch.full_like(uniform, 1 / steps)

        # Noisy codes, and the prediction of the clean ones
        x_t = self.process.corrupt(x, t, batch["u"], batch["other"])
        condition = self.denoiser.condition(batch["embedding"], batch["dropped"])
        logits = self.denoiser(x_t, t, condition)  # (B, N, K)
        log_probs = logits.float().log_softmax(-1)

        # Bound and cross-entropy, (B,)
        probs = log_probs.exp()
        divergence = self.process.divergence(probs, x, x_t, t)
        divergence = divergence.mean(1)
        target = x.unsqueeze(-1)
        log_likelihood = log_probs.gather(-1, target).squeeze(-1)
        entropy = -log_likelihood.mean(1)

        if is_training:
            self.times.learn(t, divergence.detach())
        auxiliary_weight = self.config.codes.auxiliary_weight
        weight = auxiliary_weight * (2 - t / steps)
        loss = divergence + weight * entropy
        loss = loss / p
        bound = divergence / p
        return {
            "loss": loss.mean(),
            "flow_loss": bound.mean(),
            "code_loss": entropy.mean(),
            "flow_loss_per_clip": bound.detach(),
        }

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[Artifact]:
        """Pictures of the prompts as one batch; what is random in one depends on its own seed alone."""
        waves = [prompt.speech for prompt in prompts]
        seeds = [prompt.seed for prompt in prompts]
        embeddings = self.stage1.listen(waves)
        codebook = self.autoencoder.module
        codes = self.sample_codes(embeddings, seeds, settings)
        pictures = codebook.decode(codes).cpu()
        outputs = []
        for wave, picture, embedding in zip(waves, pictures, embeddings):
            nearest = self.corpus.nearest(embedding)
            output = Artifact(wave, RATE, picture, nearest, embedding)
            outputs.append(output)
        return outputs

    def sample_codes(self, embeddings: Tensor, seeds: Sequence[int], settings: Sample) -> Tensor:
        """Codes (B, N) for embeddings (B, D)."""
        steps = min(settings.euler_steps, self.process.steps)
        tokens = self.config.codes.grid**2
        u = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            row = torch.rand(steps + 1, tokens, generator=generator)
            u.append(row)
        u = torch.stack(u, 1)  # (steps + 1, B, N)

        # Rows with the condition, then the same rows without it, for guidance
        embeddings = torch.cat([embeddings, embeddings])
        embeddings = embeddings.to(self.device)
        rows = torch.arange(len(embeddings), device=self.device)
        dropped = rows >= len(seeds)
        condition = self.denoiser.condition(embeddings, dropped)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            count = len(x_t)  # B of 2 B rows leave guidance out
            return self.denoiser(x_t, t, condition[:count])

        u = u.to(self.device)
        guidance = (settings.cfg_scale, settings.cfg_from, settings.cfg_to)
        return self.process.sample(network, u, *guidance, settings.truncation)

    def reference(self, corpus: "Corpus", clip: data.Clip) -> Artifact:
        """The clip's own picture through its codes: no network can be better."""
        wave = corpus.wave(clip)
        embedding = corpus.embedding(clip)
        nearest = corpus.nearest(embedding)
        codebook = self.autoencoder.module
        all_codes, _ = read_codes(corpus)
        codes = all_codes[corpus.number(clip)]
        codes = codes.unsqueeze(0).to(self.device)
        picture = codebook.decode(codes)[0].cpu()
        return Artifact(wave, RATE, picture, nearest, embedding)

    @torch.inference_mode()
    def score(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, float]:
        """Whether a picture shows what the clip's label says, part by part: by the classifier, and by rule.

        Only drawn shapes have a rule.
        """
        _, path = picture_of(clip)
        label = corpus.labels[path]
        by_rule = {}
        if self.config.data.corpus == "shapes":
            by_rule = shapes.matches(made.picture, label)
        if not self.config.codes.judge:
            return by_rule
        wanted = label.split("-")
        seen = self.classify(made.picture, corpus)
        matches = {}
        if len(seen) == 3:
            for name, a, b in zip(("colour", "shape", "place"), seen, wanted):
                matches[f"{name}_match"] = float(a == b)
        matches["all_match"] = float(seen == wanted)
        return matches | by_rule

    def classify(self, picture: Tensor, corpus: "Corpus") -> list[str]:
        """What the classifier sees in a picture, for each part of a label."""
        batch = picture[None].to(self.device)
        seen = []
        parts = flow.label_parts(corpus.kinds)
        for names, scores in zip(parts, self.judge(batch)):
            best = scores.argmax()
            seen.append(names[best])
        return seen

    @torch.inference_mode()
    def features(self, made: Artifact, corpus: "Corpus", clip: data.Clip) -> dict[str, np.ndarray]:
        """As stage 1's; and made (D,), the image embedding of the picture itself.

        Where eval.features names a network, also the features of FID and the class shares of IS; where there
        is a classifier, also the chance that a guess is right.
        """
        picture = made.picture.unsqueeze(0)
        picture = picture.to(self.device)
        outputs = {"made": self.tower(picture)}
        if self.config.eval.features:
            number = corpus.number(clip)
            real = corpus.picture(number, picture.shape[-1])
            real = real.unsqueeze(0).to(self.device)
            outputs["seen"], outputs["shares"] = self.inception(picture)
            outputs["seen_real"], _ = self.inception(real)
        features = super().features(made, corpus, clip)
        for key, output in outputs.items():
            features[key] = output[0].float().cpu().numpy()
        if self.config.codes.judge:
            parts = flow.label_parts(corpus.kinds)
            sizes = map(len, parts)
            features["chance"] = np.array(1 / math.prod(sizes))
        return features

    @property
    def device(self) -> torch.device:
        return self.denoiser.null.device

    # Loaded on first use, cached, not registered as submodules: not saved

    @functools.cached_property
    def stage1(self) -> SpeechAlign:
        return load_align(self.config.codes.stage1, self.device)

    @functools.cached_property
    def autoencoder(self) -> pretrained.Frozen:
        network = load_autoencoder(self.corpus)
        _, kept = read_codes(self.corpus)
        codebook = flow.Codebook(network, kept)
        return pretrained.Frozen(codebook).to(self.device)

    @functools.cached_property
    def tower(self) -> pretrained.Frozen:
        return load_tower(self.corpus).to(self.device)

    @functools.cached_property
    def judge(self) -> pretrained.Frozen:
        parts = flow.label_parts(self.corpus.kinds)
        sizes = [len(names) for names in parts]
        network = flow.Judge(sizes)
        path = judge_file(self.corpus)
        return flow.restored(network, path).to(self.device)

    @functools.cached_property
    def inception(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return flow.load_inception(self.config.eval.features, self.device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: matrices and convolutions of blocks, not the modulation by time and condition."""
        hidden = []
        for block in self.denoiser.blocks:
            for name, layer in block.named_children():
                modulates = name.startswith("by_")
                if isinstance(layer, nn.Linear) and not modulates:
                    hidden.append(layer.weight)
        return hidden


# Corpus and batches


class Corpus(data.Packed):
    """Spoken descriptions of pictures; all languages are trained on equally often.

    The id of a clip is LABEL:PICTURE#NUMBER.
    """

    statistics = ()

    def __init__(self, config: Config):
        d = config.data
        longest = d.max_seconds * RATE / HOP
        super().__init__(config, form(config), longest)
        self.config = config
        clips = set()
        for split in data.SPLITS:
            clips.update(self.clips(split))
        self.all_clips = sorted(clips, key=lambda clip: clip.number)
        train = self.clips("train")
        train = balance_languages(train, d.langs)
        self.splits = self.splits | {"train": train}
        self.labels = {}  # by path of the picture
        for clip in self.all_clips:
            label, path = picture_of(clip)
            self.labels[path] = label or path
        self.names = list(self.labels)
        self.numbers = number_values(self.names)
        self.kinds = number_values(self.labels.values())

    def number(self, clip: data.Clip) -> int:
        """Of its picture, in `names`."""
        _, path = picture_of(clip)
        return self.numbers[path]

    def label(self, clip: data.Clip) -> int:
        """The number of its label: the same for pictures that are equally right."""
        _, path = picture_of(clip)
        return self.kinds[self.labels[path]]

    def gallery(self, split: str) -> list[int]:
        """The numbers of a split's pictures."""
        clips = self.clips(split)
        numbers = {self.number(clip) for clip in clips}
        return sorted(numbers)

    def picture(self, number: int, size: int = 0) -> Tensor:
        """(3, size, size), see `flow.resized`; size 0: (3, H, W), as it is."""
        folder = self.config.data.data_dir
        path = Path(folder, self.names[number])
        picture = flow.read_picture(str(path))
        if size:
            return flow.resized(picture, size)
        return picture

    def embedding(self, clip: data.Clip) -> Tensor:
        """The image embedding (D,) of its picture."""
        number = self.number(clip)
        return self.embeddings(number)[0]

    @functools.cached_property
    def embeddings(self) -> Callable[[int], Tensor]:
        """From the number of a picture to its image embedding (1, D)."""
        path = embeddings_file(self)
        return data.open_rows(path, data.PREPARE)

    @functools.cached_property
    def trained(self) -> Tensor:
        """The image embeddings (n, D) of the training pictures."""
        gallery = self.gallery("train")
        rows = [self.embeddings(n) for n in gallery]
        return torch.cat(rows)

    def nearest(self, embedding: Tensor, count: int = 5) -> Tensor:
        """The training pictures nearest to an embedding (D,), best first: (count, 3, S, S).

        S: the shorter side of the best one.
        """
        embedding = embedding.float().cpu()
        similarity = self.trained @ embedding
        count = min(count, len(similarity))
        best = similarity.topk(count).indices
        gallery = self.gallery("train")
        numbers = [gallery[n] for n in best.tolist()]
        best_picture = self.picture(numbers[0])
        size = min(best_picture.shape[1:])
        pictures = [self.picture(n, size) for n in numbers]
        return torch.stack(pictures)


def number_values(values: Iterable[str]) -> dict[str, int]:
    """The distinct values, numbered in the order in which they come first."""
    distinct = dict.fromkeys(values)
    return {value: n for n, value in enumerate(distinct)}


def balance_languages(clips: list[data.Clip], languages: Sequence[str]) -> list[data.Clip]:
    """As many clips of each language, one language after the other: those of the rarer ones are repeated."""
    by_language = []
    for language in languages:
        spoken = [clip for clip in clips if clip.group.startswith(language)]
        by_language.append(spoken)
    most = max(map(len, by_language), default=0)
    balanced = []
    for spoken in by_language:
        repeated = itertools.cycle(spoken)
        balanced += itertools.islice(repeated, most)
    return balanced


class AlignBatches(Batches):
    """wave (B, N), standardised, 0 where wave_mask (B, N) is False; hidden (B, 2, K, 2), see recogniser.hide;
    image (B, D), label, frames, t (B,).

    Clips of all lengths are mixed, so that a description cannot be told from others by its length.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        self.lengths = np.ones_like(self.lengths)

    def validation(self) -> list[dict[str, Tensor]]:
        """Ranks share out whole batches, so a clip has the same negatives for any number of ranks."""
        clips = self.corpus.clips(self.config.eval.split)
        size = self.config.train.batch_size
        starts = range(0, len(clips), size)
        batches = []
        for start in starts[self.rank :: self.world]:
            chosen = clips[start : start + size]
            rows = [self.row(clip, None) for clip in chosen]
            batches.append(self.collate(rows))
        return batches

    def row(self, clip: data.Clip, rng: np.random.Generator | None) -> dict:
        """A clip and what is drawn for it; without rng it is not augmented."""
        a = self.config.align
        wave = self.corpus.wave(clip)
        hidden = torch.zeros(2, a.hidden_spans, 2)
        if rng is not None:
            wave = recogniser.roughened(wave, a, rng)
            hidden = recogniser.draw_spans(a.hidden_spans, a.hidden_share, rng)
        return {
            "wave": recogniser.standardise(wave),
            "hidden": hidden,
            "image": self.corpus.embedding(clip),
            "label": self.corpus.label(clip),
            "frames": clip.frames,
            "t": 0.0,
        }

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = stack_numbers(rows, ("t", "frames", "label"))
        batch |= stack_tensors(rows, ("hidden", "image"))
        waves = [row["wave"] for row in rows]
        samples = self.config.data.pad_multiple * HOP
        batch["wave"], batch["wave_mask"] = data.pad(waves, samples)
        return batch


class ImageBatches(AlignBatches):
    """x (B, N) codes; u, other (B, N) for `flow.MaskReplace.corrupt`; t (B,) uniform in [0, 1); embedding
    (B, D) of the speech; dropped (B,): rows without it; frames (B,); new_update (), in training: whether this
    is the first micro-batch of its step.

    A description is trained on with any training picture of its label, all languages equally often.
    """

    def __init__(self, config: Config, corpus: Corpus, tokenizer, rank: int = 0, world: int = 1):
        super().__init__(config, corpus, tokenizer, rank, world)
        check_stage1(corpus)
        self.codes, _ = read_codes(corpus)
        path = speech_file(corpus)
        self.embeddings = data.open_rows(path, data.PREPARE)
        alike = {}
        for clip in corpus.clips("train"):
            label = corpus.label(clip)
            numbers = alike.setdefault(label, set())
            numbers.add(corpus.number(clip))
        self.alike = {}  # the numbers of the training pictures of a label
        for label, numbers in alike.items():
            self.alike[label] = sorted(numbers)

    def train(self, step: int, micro: int = 0) -> dict[str, Tensor]:
        batch = super().train(step, micro)
        batch["new_update"] = torch.tensor(micro == 0)
        return batch

    validation = Batches.validation  # single clips are shared out, their times spread evenly

    def row(self, clip: data.Clip, rng: np.random.Generator, t: float | None = None) -> dict:
        """A clip and all that is drawn for it.

        t: given, as for validation, the clip keeps its own picture and its embedding.
        """
        dropped = False
        number = self.corpus.number(clip)
        if t is None:
            dropped = rng.random() < self.config.flow.text_condition_dropout
            label = self.corpus.label(clip)
            number = rng.choice(self.alike[label])
            t = rng.random()
        x = self.codes[number]
        u = rng.random(len(x), dtype=np.float32)
        other = rng.integers(self.config.codes.kept, size=len(x))
        return {
            "x": x,
            "u": torch.from_numpy(u),
            "other": torch.from_numpy(other),
            "t": t,
            "dropped": dropped,
            "frames": clip.frames,
            "embedding": self.embeddings(clip.number)[0],
        }

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = stack_numbers(rows, ("t", "frames", "dropped"))
        return batch | stack_tensors(rows, ("x", "u", "other", "embedding"))


def stack_numbers(rows: list[dict], keys: Sequence[str]) -> dict[str, Tensor]:
    """(B,) of each key."""
    batch = {}
    for key in keys:
        batch[key] = torch.tensor([row[key] for row in rows])
    return batch


def stack_tensors(rows: list[dict], keys: Sequence[str]) -> dict[str, Tensor]:
    """(B, ...) of each key."""
    batch = {}
    for key in keys:
        batch[key] = torch.stack([row[key] for row in rows])
    return batch


# What training needs, and where it is kept


def prepare_align(config: Config) -> None:
    """Make what training needs and does not find: the packed corpus, the image embeddings of its pictures."""
    if not is_prepared(config):
        recogniser.run_asset("spoken_pictures.py", config)


def is_prepared(config: Config) -> bool:
    """Whether stage 1 has its files. No, where the recordings are: they may have changed since packing."""
    d = config.data
    root = Path(d.data_dir)
    folder = data.packed_dir(config, form(config))
    if d.corpus != "shapes" and root.exists() and folder != root:
        return False
    if not (folder / "index.json").exists():
        return False
    corpus = Corpus(config)
    return embeddings_file(corpus).exists()


def prepare_image(config: Config) -> None:
    """Make what training needs and does not find.

    That is what stage 1 needs, its embeddings of the speech, the codes of the pictures, the classifier.
    """
    prepare_align(config)
    corpus = Corpus(config)
    needed = [speech_file(corpus), codes_file(corpus)]
    if config.codes.judge:
        needed.append(judge_file(corpus))
    if not all(path.exists() for path in needed):
        recogniser.run_asset("picture_codes.py", config)
    check_stage1(corpus)


def check_stage1(corpus: Corpus) -> None:
    """raises UserError if stage 1 did not learn to find the pictures validated on.

    What it cannot tell apart, stage 2 cannot either.
    """
    c = corpus.config.codes
    path = speech_file(corpus)
    speech_of = data.open_rows(path, data.PREPARE)
    numbers = []
    labels = []
    speech = []
    for clip in corpus.clips(corpus.config.eval.split):
        numbers.append(corpus.number(clip))
        labels.append(corpus.label(clip))
        speech.append(speech_of(clip.number))
    labels = np.array(labels)
    gallery, first = np.unique(numbers, return_index=True)
    pictures = [corpus.embeddings(n) for n in gallery]
    similarity = torch.cat(speech) @ torch.cat(pictures).T
    gallery_labels = labels[first]
    right = labels[:, None] == gallery_labels
    recall = metric.recall_at(similarity.numpy(), right, 1)
    if recall < c.require_r1:
        percent = 100 * recall
        found = f"it finds {percent:.1f} % of the pictures (R@1)"
        needed = f"less than require_r1 {c.require_r1}"
        raise UserError(f"{c.stage1}: {found}, {needed}; train it longer")


def form(config: Config) -> dict:
    """What is packed, and how."""
    d = config.data
    packed = {"sample_rate": RATE, "hop": HOP, "corpus": d.corpus, "langs": list(d.langs)}
    if d.corpus == "shapes":
        packed["sentences"] = d.sentences
    return packed


def picture_of(clip: data.Clip) -> tuple[str, str]:
    """Its label, which may be "", and its picture's path below data_dir."""
    picture = clip.id.rpartition("#")[0]
    label, _, path = picture.partition(":")
    return label, path


def newest(path: Path) -> Path:
    """The newest checkpoint of a run's folder, or the file itself."""
    return max(path.glob("checkpoints/step_*.pt"), default=path)


def cached(corpus: Corpus, name: str, content: list) -> Path:
    """A file beside the corpus, named by all that its content depends on."""
    stem, _, suffix = name.partition(".")
    labels = list(corpus.labels.items())
    digest = data.digest([labels, *content])
    name = f"{stem}_{digest[:8]}.{suffix}"
    return corpus.folder / name


def embeddings_file(corpus: Corpus) -> Path:
    """The image embeddings of the pictures; of a scratch encoder, by the texts too that it is trained on."""
    image = corpus.config.align.image
    texts = []
    if image == "scratch":
        texts = [clip.text for clip in corpus.clips("train")]
    return cached(corpus, "pictures.npy", [image, texts])


def tower_file(corpus: Corpus) -> Path:
    return embeddings_file(corpus).with_suffix(".safetensors")


def speech_file(corpus: Corpus) -> Path:
    """Stage 1's embeddings of all speech, by its weights and the image encoder it was trained against."""
    c = corpus.config
    path = Path(c.codes.stage1)
    try:
        checkpoint = newest(path).read_bytes()
    except OSError as e:
        hint = "no checkpoint of system speech_align there; train that first"
        raise UserError(f"codes.stage1 {path}: {hint}") from e
    weights = hashlib.sha256(checkpoint).hexdigest()
    clips = [clip.id for clip in corpus.all_clips]
    return cached(corpus, "speech.npy", [weights, c.align.image, clips])


def codes_file(corpus: Corpus) -> Path:
    """The pictures' codes; beside it, `vq_file`, the autoencoder that was trained for them."""
    c = corpus.config.codes
    content = [c.vq, c.vq_steps, c.picture_size, c.grid, c.kept]
    return cached(corpus, "codes.safetensors", content)


def vq_file(corpus: Corpus) -> Path:
    c = corpus.config.codes
    return cached(corpus, "vq.safetensors", [c.vq_steps, c.picture_size])


def judge_file(corpus: Corpus) -> Path:
    return cached(corpus, "judge.safetensors", [])


def read_codes(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """The codes (n, N) of all pictures, and which codes of the codebook they number, (K,)."""
    path = codes_file(corpus)
    tensors = flow.read(path)
    codes = tensors["codes"].long()
    kept = tensors["kept"].long()
    return codes, kept


def load_autoencoder(corpus: Corpus) -> nn.Module:
    """That of codes.vq, frozen: methods as flow.SmallVQ's."""
    vq = corpus.config.codes.vq
    if vq == "scratch":
        return flow.restored(flow.SmallVQ(), vq_file(corpus)).module
    return pretrained.Frozen(flow.PublishedVQ(vq)).module


def load_tower(corpus: Corpus) -> pretrained.Frozen:
    """The image encoder of config.align.image: pictures (B, 3, H, W) -> (B, D)."""
    image = corpus.config.align.image
    if image == "scratch":
        return flow.restored(flow.SmallTower(), tower_file(corpus))
    return pretrained.Frozen(flow.ClipTower(image))
