"""System `speech_image`, stage 2: from stage 1's embedding of speech to the codes of a picture.

x (B, N) are codes, 0 to K - 1, of a square grid, row by row. Source: Speak the Art (arXiv 2601.00827), whose
stage 2 is VQ-Diffusion for ImageNet (arXiv 2111.14822).
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import metric
from base import Prompt
from config import Config, Sample, UserError
from corpora import shards
from device import preparing_device
from metric import Score
from pretrained import frozen
from speech2image import diffusion, retrieval, vision
from speech2image.align import SpeechAlign, load_stage1
from speech2image.batches import ImageBatches, check_stage1
from speech2image.codes import (
    DiffusersVQ,
    PictureDecoder,
    codes_file,
    encode_pictures,
    load_autoencoder,
    read_codes,
    train_vq,
    vq_file,
)
from speech2image.config import SpeechImageConfig
from speech2image.data import (
    RATE,
    SpokenImageCorpus,
    classifier_file,
    load_weights_frozen,
    parse_clip_id,
    save_tensors,
    speech_embeddings_file,
)
from speech2image.model import CodeTransformer
from speech2image.shapes import attribute_matches
from speech2image.stage import PictureOutput, Stage

SCORES = {
    "all_match": Score("everything as asked for", "%", "all that the prompt says, at once", is_match=True),
    "all_rule": Score(
        "everything, by rule", "%", "the same, by a rule that has learned nothing", is_match=True
    ),
    "colour_match": Score("colour as asked for", "%", is_match=True),
    "colour_rule": Score("colour, by rule", "%", is_match=True),
    "shape_match": Score("shape as asked for", "%", is_match=True),
    "shape_rule": Score("shape, by rule", "%", is_match=True),
    "place_match": Score("place as asked for", "%", is_match=True),
    "place_rule": Score("place, by rule", "%", is_match=True),
    "chance": Score("chance", "%", "that a guess has everything as asked for"),
    "fid": Score(
        "Fréchet inception distance", "", "of the sets' features; 0 is the real pictures", of_outputs=True
    ),
    "inception_score": Score("inception score", "", "1 where all pictures are alike", of_outputs=True),
    **retrieval.recall_scores("recall_made", "generated to real", of_outputs=True),
    **retrieval.SCORES,
}


class SpeechImage(Stage):
    """`forward` returns losses, `sample` pictures."""

    config_class = SpeechImageConfig
    batches_class = ImageBatches
    scores = SCORES

    @staticmethod
    def fetch(config: Config) -> None:
        """Stage 1, CLIP, the VQ; for evaluations the network of FID."""
        cpu = torch.device("cpu")
        load_stage1(config.codes.stage1, cpu)
        if config.align.image != "scratch":
            vision.ClipImageEncoder(config.align.image)
        if config.codes.vq != "scratch":
            DiffusersVQ(config.codes.vq)
        if config.train.eval_interval and config.eval.features:
            vision.load_fid_network(config.eval.features, cpu)

    @staticmethod
    def prepare(config: Config) -> None:
        """Make what is missing.

        That is what stage 1 needs, its embeddings of the speech, the codes of the pictures, the classifier.
        """
        SpeechAlign.prepare(config)
        corpus = SpokenImageCorpus(config)
        needed = [speech_embeddings_file(corpus), codes_file(corpus)]
        if config.codes.judge:
            needed.append(classifier_file(corpus))
        if not all(path.exists() for path in needed):
            prepare_codes(config)
        check_stage1(corpus)

    def __init__(self, config: Config):
        super().__init__(config)
        c = config.codes
        self.process = diffusion.MaskAndReplaceDiffusion(c.kept, c.diffusion_steps, c.mask_share)
        self.times = diffusion.LossSecondMomentResampler(c.diffusion_steps)
        condition_width = vision.image_encoder_width(config.align.image)
        self.denoiser = build_transformer(config, condition_width)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch of `ImageBatches`; one to train on has new_update: whether weights have changed.

        returns: loss; flow_loss, the variational bound in nats a code, each step weighted by its share;
        code_loss, the cross-entropy; flow_loss_per_clip (B,).
        """
        x = batch["x"]
        steps = self.process.num_steps
        is_training = "new_update" in batch

        # Diffusion steps t (B,) from 1 to T, and their probabilities
        uniform = batch["t"]
        if is_training:
            t, p = self.times.sample(uniform, batch["new_update"])
        else:
            t = (uniform * steps).long() + 1
            p = torch.full_like(uniform, 1 / steps)

        # Noisy codes, and the prediction of the clean ones
        x_t = self.process.q_sample(x, t, batch["u"], batch["other"])
        condition = self.denoiser.embed_condition(batch["embedding"], batch["dropped"])
        logits = self.denoiser(x_t, t, condition)  # (B, N, K)
        log_probs = logits.float().log_softmax(-1)

        # Bound and cross-entropy, (B,)
        probs = log_probs.exp()
        kl = self.process.kl(probs, x, x_t, t)
        kl = kl.mean(1)
        target = x.unsqueeze(-1)
        log_likelihood = log_probs.gather(-1, target).squeeze(-1)
        entropy = -log_likelihood.mean(1)

        if is_training:
            self.times.update(t, kl.detach())
        auxiliary_weight = self.config.codes.auxiliary_weight
        weight = auxiliary_weight * (2 - t / steps)
        loss = kl + weight * entropy
        loss = loss / p
        bound = kl / p
        return {
            "loss": loss.mean(),
            "flow_loss": bound.mean(),
            "code_loss": entropy.mean(),
            "flow_loss_per_clip": bound.detach(),
        }

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], settings: Sample) -> list[PictureOutput]:
        """Pictures of the prompts as one batch; what is random in one depends on its own seed alone."""
        waves = [prompt.speech for prompt in prompts]
        seeds = [prompt.seed for prompt in prompts]
        embeddings = self.stage1.embed_speech(waves)
        codes = self.sample_codes(embeddings, seeds, settings)
        pictures = self.autoencoder.module.decode(codes).cpu()
        outputs = []
        for wave, picture, embedding in zip(waves, pictures, embeddings):
            nearest = self.corpus.nearest_pictures(embedding)
            outputs.append(PictureOutput(wave, RATE, picture, nearest, embedding))
        return outputs

    def sample_codes(self, embeddings: Tensor, seeds: Sequence[int], settings: Sample) -> Tensor:
        """Codes (B, N) for embeddings (B, D)."""
        steps = min(settings.euler_steps, self.process.num_steps)
        tokens = self.config.codes.grid**2
        u = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            u.append(torch.rand(steps + 1, tokens, generator=generator))
        u = torch.stack(u, 1)  # (steps + 1, B, N)

        # Rows with the condition, then the same rows without it, for guidance
        embeddings = torch.cat([embeddings, embeddings])
        embeddings = embeddings.to(self.device)
        rows = torch.arange(len(embeddings), device=self.device)
        dropped = rows >= len(seeds)
        condition = self.denoiser.embed_condition(embeddings, dropped)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            count = len(x_t)  # B of 2 B rows leave guidance out
            return self.denoiser(x_t, t, condition[:count])

        u = u.to(self.device)
        guidance = (settings.cfg_scale, settings.cfg_from, settings.cfg_to)
        return self.process.sample(network, u, *guidance, settings.truncation)

    def reference(self, corpus: SpokenImageCorpus, clip: shards.Clip) -> PictureOutput:
        """The clip's own picture through its codes: no network can be better."""
        wave = corpus.wave(clip)
        embedding = corpus.image_embedding(clip)
        nearest = corpus.nearest_pictures(embedding)
        all_codes, _ = read_codes(corpus)
        codes = all_codes[corpus.picture_number(clip)]
        codes = codes.unsqueeze(0).to(self.device)
        picture = self.autoencoder.module.decode(codes)[0].cpu()
        return PictureOutput(wave, RATE, picture, nearest, embedding)

    @torch.inference_mode()
    def score(self, output: PictureOutput, corpus: SpokenImageCorpus, clip: shards.Clip) -> dict[str, float]:
        """Whether a picture shows what the clip's label says, part by part: by the classifier, and by rule.

        Only drawn shapes have a rule.
        """
        _, path = parse_clip_id(clip)
        label = corpus.labels[path]
        by_rule = {}
        if self.config.data.corpus == "shapes":
            by_rule = attribute_matches(output.picture, label)
        if not self.config.codes.judge:
            return by_rule
        wanted = label.split("-")
        seen = self.classify(output.picture, corpus)
        matches = {}
        if len(seen) == 3:
            for name, a, b in zip(("colour", "shape", "place"), seen, wanted):
                matches[f"{name}_match"] = float(a == b)
        matches["all_match"] = float(seen == wanted)
        return matches | by_rule

    def classify(self, picture: Tensor, corpus: SpokenImageCorpus) -> list[str]:
        """What the classifier sees in a picture, for each part of a label."""
        batch = picture[None].to(self.device)
        seen = []
        parts = vision.label_attributes(corpus.label_numbers)
        for names, scores in zip(parts, self.classifier(batch)):
            seen.append(names[scores.argmax()])
        return seen

    @torch.inference_mode()
    def features(
        self, output: PictureOutput, corpus: SpokenImageCorpus, clip: shards.Clip
    ) -> dict[str, np.ndarray]:
        """As stage 1's; and generated (D,), the image embedding of the picture itself.

        Where eval.features names a network, also the features of FID and the class shares of IS; where there
        is a classifier, also the chance that a guess is right.
        """
        picture = output.picture.unsqueeze(0)
        picture = picture.to(self.device)
        embeddings = {"generated": self.image_encoder(picture)}
        if self.config.eval.features:
            number = corpus.picture_number(clip)
            real = corpus.read_picture(number, picture.shape[-1])
            real = real.unsqueeze(0).to(self.device)
            embeddings["seen"], embeddings["shares"] = self.inception(picture)
            embeddings["seen_real"], _ = self.inception(real)
        features = super().features(output, corpus, clip)
        for key, rows in embeddings.items():
            features[key] = rows[0].float().cpu().numpy()
        if self.config.codes.judge:
            parts = vision.label_attributes(corpus.label_numbers)
            features["chance"] = np.array(1 / math.prod(map(len, parts)))
        return features

    def summarize(self, features: dict[str, np.ndarray], folder: Path | None) -> dict[str, float]:
        """As stage 1's, of the speech and of what was generated; FID and IS where their network is named."""
        scores = super().summarize(features, folder)
        generated = retrieval.retrieval(features, "generated")
        for k in (1, 5, 10):
            scores[f"recall_made_{k}"] = generated[f"recall_{k}"]
        if "chance" in features:
            scores["chance"] = float(features["chance"].mean())
        if "seen" in features:
            scores["fid"] = metric.frechet_distance(features["seen"], features["seen_real"])
            if features["shares"].size:
                scores["inception_score"] = metric.inception_score(features["shares"])
        return scores

    @property
    def device(self) -> torch.device:
        return self.denoiser.null.device

    # Loaded on first use, cached, not registered as submodules: not saved

    @functools.cached_property
    def stage1(self) -> SpeechAlign:
        return load_stage1(self.config.codes.stage1, self.device)

    @functools.cached_property
    def autoencoder(self) -> frozen.Frozen:
        network = load_autoencoder(self.corpus)
        _, kept = read_codes(self.corpus)
        decoder = PictureDecoder(network, kept)
        return frozen.Frozen(decoder).to(self.device)

    @functools.cached_property
    def image_encoder(self) -> frozen.Frozen:
        return vision.load_image_encoder(self.corpus).to(self.device)

    @functools.cached_property
    def classifier(self) -> frozen.Frozen:
        parts = vision.label_attributes(self.corpus.label_numbers)
        sizes = [len(names) for names in parts]
        network = load_weights_frozen(vision.AttributeClassifier(sizes), classifier_file(self.corpus))
        return network.to(self.device)

    @functools.cached_property
    def inception(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return vision.load_fid_network(self.config.eval.features, self.device)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """What Muon trains: matrices and convolutions of blocks, not the modulation by time and condition."""
        hidden = []
        for block in self.denoiser.blocks:
            for name, layer in block.named_children():
                modulates = name.startswith("by_")
                if isinstance(layer, nn.Linear) and not modulates:
                    hidden.append(layer.weight)
        return hidden


def build_transformer(config: SpeechImageConfig, condition_width: int) -> CodeTransformer:
    """raises UserError for codes.condition sta where the embedding is not twice as wide as the network"""
    c = config.codes
    m = config.model
    if c.condition == "sta" and condition_width != 2 * m.width:
        raise UserError(
            f"codes.condition sta: model.width {m.width} must be half of the embeddings' "
            f"{condition_width}; or take adaln"
        )
    return CodeTransformer(
        num_codes=c.kept,
        grid=c.grid,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        conv_ratio=c.conv_ratio,
        num_steps=c.diffusion_steps,
        condition_mode=c.condition,
        condition_width=condition_width,
        condition_scale=c.condition_scale or math.sqrt(condition_width),
    )


# What training needs


def prepare_codes(config: Config) -> None:
    """Embed the speech, train the VQ where it is scratch, encode the pictures, train the classifier."""
    device = preparing_device(config.device)
    c = config.codes
    corpus = SpokenImageCorpus(config)
    if not speech_embeddings_file(corpus).exists():
        cache_speech_embeddings(corpus, device)
    check_stage1(corpus)
    if c.vq == "scratch" and not vq_file(corpus).exists():
        pictures = vision.training_pictures(corpus, c.picture_size)
        autoencoder = train_vq(pictures, c.vq_steps)
        save_tensors(vq_file(corpus), autoencoder.state_dict())
    if not codes_file(corpus).exists():
        autoencoder = load_autoencoder(corpus).to(device)
        codes = encode_pictures(corpus, autoencoder)
        save_tensors(codes_file(corpus), codes)
    if c.judge and not classifier_file(corpus).exists():
        classifier = vision.train_attribute_classifier(corpus, c.vq_steps // 3)
        save_tensors(classifier_file(corpus), classifier.state_dict())


def cache_speech_embeddings(corpus: SpokenImageCorpus, device: torch.device) -> None:
    """Cache stage 1's embeddings of all speech."""
    c = corpus.config
    path = c.codes.stage1
    stage1 = load_stage1(path, device)
    trained_against = stage1.config.align.image
    if trained_against != c.align.image:
        raise UserError(
            f"align.image {c.align.image}: stage 1 at {path} was trained against {trained_against}"
        )

    def encode(numbers: list[int]) -> np.ndarray:
        clips = [corpus.all_clips[n] for n in numbers]
        waves = [corpus.wave(clip) for clip in clips]
        embeddings = stage1.embed_speech(waves).numpy()  # (n, D)
        return embeddings[:, None]

    lengths = [1] * len(corpus.all_clips)
    what = f"speech by {path}"
    shards.cache_features(speech_embeddings_file(corpus), lengths, None, encode, 16, what)
