"""What system speech_image trains on: `python assets/picture_codes.py --config FILE [--key value]`.

It makes, for a packed corpus, what does not exist yet: stage 1's embeddings of the speech; the autoencoder,
where codes.vq is scratch; the codes of the pictures; the classifier of codes.judge. When any of these is
missing, `python system.py prepare` runs it.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from config import UserError, run_main
from speech2image_config import Codes
from system import config_from_command_line
from flow import Judge, SmallVQ, label_parts, nearest
from speech2image import (
    Corpus,
    check_stage1,
    codes_file,
    judge_file,
    load_align,
    load_autoencoder,
    speech_file,
    vq_file,
)


def main() -> None:
    config = config_from_command_line(sys.argv[1:])
    use_cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda" if use_cuda else "cpu")
    c = config.codes
    corpus = Corpus(config)
    if not speech_file(corpus).exists():
        hear(corpus, device)
    check_stage1(corpus)
    if c.vq == "scratch" and not vq_file(corpus).exists():
        pictures = training_pictures(corpus, c.picture_size)
        autoencoder = train_vq(pictures, c.vq_steps)
        save(vq_file(corpus), autoencoder.state_dict())
    if not codes_file(corpus).exists():
        autoencoder = load_autoencoder(corpus).to(device)
        codes = find_codes(corpus, autoencoder)
        save(codes_file(corpus), codes)
    if c.judge and not judge_file(corpus).exists():
        judge = train_judge(corpus, c.vq_steps // 3)
        save(judge_file(corpus), judge.state_dict())


def hear(corpus: Corpus, device: torch.device) -> None:
    """Cache stage 1's embeddings of all speech."""
    c = corpus.config
    path = c.codes.stage1
    stage1 = load_align(path, device)
    trained_against = stage1.config.align.image
    if trained_against != c.align.image:
        raise UserError(
            f"align.image {c.align.image}: stage 1 at {path} was trained against {trained_against}"
        )

    def encode(numbers: list[int]) -> np.ndarray:
        clips = [corpus.all_clips[n] for n in numbers]
        waves = [corpus.wave(clip) for clip in clips]
        embeddings = stage1.listen(waves).numpy()  # (n, D)
        return embeddings[:, None]

    lengths = [1] * len(corpus.all_clips)
    what = f"speech by {path}"
    data.cache_rows(speech_file(corpus), lengths, None, encode, 16, what)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    on_cpu = {}
    for name, value in tensors.items():
        on_cpu[name] = value.contiguous().cpu()
    with data.replacing(path) as part:
        safetensors.torch.save_file(on_cpu, part)


@torch.no_grad()
def find_codes(corpus: Corpus, autoencoder: nn.Module) -> dict[str, Tensor]:
    """codes (n, N) of all pictures, as numbers of the used codes; kept (K,): their rows in the codebook.

    The used codes are the K most frequent in training; any other is replaced by the nearest of them. Most of
    a large codebook is not in use: of ImageNet's 16,384 codes 974 are.
    """
    c = corpus.config.codes
    codebook = autoencoder.book  # (K', d)
    numbers = range(len(corpus.names))
    codes = []
    for n in tqdm(numbers, desc="codes", unit="picture", disable=None):
        picture = corpus.picture(n, c.picture_size)
        picture = picture.to(codebook.device)
        vectors = autoencoder.encode(picture[None])  # (1, N, d)
        indices = nearest(vectors[0], codebook)
        codes.append(indices.cpu())
    codes = torch.stack(codes)
    check_size(c, codes.shape[1], len(codebook))

    trained_on = corpus.gallery("train")
    count = codes[trained_on].flatten().bincount(minlength=len(codebook))
    most_frequent = count.argsort(descending=True, stable=True)[: c.kept]
    kept = most_frequent.sort().values
    print_usage(count, kept)
    to_used = nearest(codebook, codebook[kept])  # (K',)
    codes = to_used.cpu()[codes]
    return {"codes": codes.to(torch.int16), "kept": kept.to(torch.int32)}


def check_size(c: Codes, tokens: int, codebook_size: int) -> None:
    """raises UserError for an autoencoder that makes another number of tokens, or has too few codes"""
    if tokens != c.grid**2 or codebook_size < c.kept:
        raise UserError(
            f"codes.vq {c.vq}: makes {tokens} of {codebook_size} codes of a picture of "
            f"{c.picture_size} pixels; codes.grid {c.grid} and codes.kept {c.kept} do not fit"
        )


def print_usage(count: Tensor, kept: Tensor) -> None:
    """count (K',): how often training uses each code. kept (K,): the codes that stay."""
    total = count.sum()
    share = count[count > 0] / total
    entropy = -(share * share.log()).sum()
    perplexity = entropy.exp()
    percent = 100 * (count[kept].sum() / total)
    print(
        f"codes: training uses {len(share)} of {len(count)}, perplexity {perplexity:.0f}; "
        f"the {len(kept)} kept make {percent:.2f} %"
    )


def train_vq(pictures: Tensor, steps: int, batch: int = 16) -> SmallVQ:
    """An autoencoder of pictures (n, 3, H, W).

    The first fifth of the steps is without rounding. Pixels that differ from their picture's background, its
    median, count five times.
    """
    rng = np.random.default_rng(0)
    background = pictures.flatten(2).median(2).values  # (n, 3)
    difference = pictures - background[:, :, None, None]
    is_object = difference.abs().amax(1, keepdim=True) > 0.1
    weights = 1 + 4 * is_object.float()  # (n, 1, H, W)

    def loss(network: SmallVQ, step: int) -> Tensor:
        chosen = rng.integers(len(pictures), size=batch)
        x = pictures[chosen]
        vectors = network.encode(x)  # (B, N, d)
        if step > steps / 5:
            vectors = round_to_codes(vectors, network.book)
        error = network.decode(vectors) - x
        error = error.square() + 0.1 * error.abs()
        return (weights[chosen] * error).mean()

    return fit(SmallVQ, loss, steps, 3e-3, "vq")


def round_to_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Each vector (B, N, d) replaced by its nearest code; gradients pass unchanged (straight-through)."""
    codes = nearest(vectors.flatten(0, 1), codebook)
    rounded = codebook[codes].view_as(vectors)
    return vectors + (rounded - vectors).detach()


def train_judge(corpus: Corpus, steps: int, batch: int = 32) -> Judge:
    """A classifier of the training pictures' labels.

    The pictures are moved by up to a pixel, noisy, and every other time blurred, as generated ones may be.
    """
    rng = np.random.default_rng(0)
    attributes = label_parts(corpus.kinds)
    pictures = training_pictures(corpus, 32)
    numbers = corpus.gallery("train")[: len(pictures)]
    targets = attribute_targets(corpus, attributes, numbers)

    def loss(network: Judge, step: int) -> Tensor:
        chosen = rng.integers(len(pictures), size=batch)
        x = augment_picture(pictures[chosen], step % 2 == 1, rng)
        total = 0
        for logits, target in zip(network(x), targets[chosen].T):
            total = total + F.cross_entropy(logits, target)
        return total

    sizes = [len(values) for values in attributes]
    judge = functools.partial(Judge, sizes)
    return fit(judge, loss, steps, 5e-3, "judge")


def attribute_targets(corpus: Corpus, attributes: list[list[str]], numbers: list[int]) -> Tensor:
    """The class of each attribute of the pictures of these numbers, (n, attributes)."""
    targets = []
    for n in numbers:
        label = corpus.labels[corpus.names[n]]
        target = []
        for values, value in zip(attributes, label.split("-")):
            target.append(values.index(value))
        targets.append(target)
    return torch.tensor(targets)


def augment_picture(x: Tensor, blur: bool, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, H, W), all moved alike by up to a pixel, with noise. blur: by a mean of 3 x 3."""
    move = rng.integers(-1, 2, 2)
    move = tuple(move.tolist())
    x = x.roll(move, (2, 3))
    if blur:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        x = F.avg_pool2d(padded, 3, 1)
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    noise = torch.from_numpy(noise)
    return x + 0.025 * noise


def fit(
    make: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    peak: float,
    what: str,
) -> nn.Module:
    """make() trained by AdamW on loss(network, step), with a learning rate from `peak` down to 0.

    It is the same network every time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak)
    for step in tqdm(range(steps), desc=what, disable=None):
        warmup = min(1, (step + 1) / 50)
        decay = 1 - step / steps
        optimizer.param_groups[0]["lr"] = peak * warmup * decay
        value = loss(network, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    print(f"{what}: {steps} steps, loss {value.item():.4f}", flush=True)
    return network.eval()


def training_pictures(corpus: Corpus, size: int) -> Tensor:
    """The first 10,000 training pictures, (n, 3, size, size)."""
    numbers = corpus.gallery("train")[:10_000]
    pictures = [corpus.picture(n, size) for n in numbers]
    return torch.stack(pictures)


if __name__ == "__main__":
    run_main(main)
