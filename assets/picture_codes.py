"""What system speech_image trains on: `python assets/picture_codes.py --config FILE [--key value]` lets stage 1 hear a packed corpus's
speech, finds the codes of its pictures, and trains what is small and made here: the autoencoder of codes.vq scratch, the judge.
`python system.py prepare` does it where it is due.
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from config import UserError, run_main
from flow import Judge, SmallVQ, label_parts, nearest
from speech2image import Corpus, check_stage1, codes_file, judge_file, load_align, load_autoencoder, speech_file, vq_file
from system import config_from_command_line


def main() -> None:
    config = config_from_command_line(sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    c, corpus = config.codes, Corpus(config)
    if not speech_file(corpus).exists():
        hear(corpus, device)
    check_stage1(corpus)
    if c.vq == "scratch" and not vq_file(corpus).exists():
        save(vq_file(corpus), train_vq(training_pictures(corpus, c.picture_size), c.vq_steps).state_dict())
    if not codes_file(corpus).exists():
        save(codes_file(corpus), find_codes(corpus, load_autoencoder(corpus).to(device)))
    if c.judge and not judge_file(corpus).exists():
        save(judge_file(corpus), train_judge(corpus, c.vq_steps // 3).state_dict())


def hear(corpus: Corpus, device: torch.device) -> None:
    """Stage 1's embeddings of all speech."""
    c, stage1 = corpus.config, load_align(corpus.config.codes.stage1, device)
    if stage1.config.align.image != c.align.image:
        raise UserError(f"align.image {c.align.image}: stage 1 at {c.codes.stage1} was trained against {stage1.config.align.image}")

    def encode(numbers: list[int]) -> np.ndarray:
        return stage1.listen([corpus.wave(corpus.all_clips[n]) for n in numbers]).numpy()[:, None]

    data.cache_rows(speech_file(corpus), [1] * len(corpus.all_clips), None, encode, 16, f"speech by {c.codes.stage1}")


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with data.replacing(path) as part:
        safetensors.torch.save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, part)


@torch.no_grad()
def find_codes(corpus: Corpus, autoencoder: nn.Module) -> dict[str, torch.Tensor]:
    """codes (n, N) of all pictures, in numbers of the codes that are kept (K,): the most used in training; others become their nearest.

    Most of a large codebook lies idle: of ImageNet's 16,384 codes 974 are in use.
    """
    c, book = corpus.config.codes, autoencoder.book
    found = []
    for n in tqdm(range(len(corpus.names)), desc="codes", unit="picture", disable=None):
        found.append(nearest(autoencoder.features(corpus.picture(n, c.picture_size)[None].to(book.device))[0], book).cpu())
    found = torch.stack(found)
    if found.shape[1] != c.grid ** 2 or len(book) < c.kept:
        raise UserError(f"codes.vq {c.vq}: makes {found.shape[1]} of {len(book)} codes of a picture of {c.picture_size} pixels; "
                        f"codes.grid {c.grid} and codes.kept {c.kept} do not fit")
    count = found[corpus.gallery("train")].flatten().bincount(minlength=len(book))
    kept = count.argsort(descending=True, stable=True)[:c.kept].sort().values
    share = count[count > 0] / count.sum()
    perplexity, covered = (-(share * share.log()).sum()).exp(), count[kept].sum() / count.sum()
    print(f"codes: training uses {len(share)} of {len(book)}, perplexity {perplexity:.0f}; the {c.kept} kept make {100 * covered:.2f} %")
    return {"codes": nearest(book, book[kept]).cpu()[found].to(torch.int16), "kept": kept.to(torch.int32)}


def train_vq(pictures: torch.Tensor, steps: int, batch: int = 16) -> SmallVQ:
    """On pictures (n, 3, H, W); the first fifth of the steps without rounding. What differs from a picture's ground counts five times."""
    rng, ground = np.random.default_rng(0), pictures.flatten(2).median(2).values[:, :, None, None]
    weights = 1 + 4 * ((pictures - ground).abs().amax(1, keepdim=True) > 0.1).float()

    def loss(network: SmallVQ, step: int) -> torch.Tensor:
        chosen = rng.integers(len(pictures), size=batch)
        z = network.features(pictures[chosen])
        rounded = z + (network.book[nearest(z.flatten(0, 1), network.book)].view_as(z) - z).detach()
        error = network.pictures(rounded if step > steps / 5 else z) - pictures[chosen]
        return (weights[chosen] * (error.square() + 0.1 * error.abs())).mean()

    return fit(SmallVQ, loss, steps, 3e-3, "vq")


def train_judge(corpus: Corpus, steps: int, batch: int = 32) -> Judge:
    """On the training pictures, moved by a pixel, noisy, and every other time blurred, as what is made may be."""
    rng, parts, pictures = np.random.default_rng(0), label_parts(corpus.kinds), training_pictures(corpus, 32)
    labels = [corpus.labels[corpus.names[n]].split("-") for n in corpus.gallery("train")[:len(pictures)]]
    labels = torch.tensor([[names.index(name) for names, name in zip(parts, label)] for label in labels])

    def loss(network: Judge, step: int) -> torch.Tensor:
        chosen = rng.integers(len(pictures), size=batch)
        x = pictures[chosen].roll(tuple(rng.integers(-1, 2, 2).tolist()), (2, 3))
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) if step % 2 else x
        x = x + 0.025 * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        return sum(F.cross_entropy(scores, wanted) for scores, wanted in zip(network(x), labels[chosen].T))

    return fit(functools.partial(Judge, list(map(len, parts))), loss, steps, 5e-3, "judge")


def fit(make: Callable[[], nn.Module], loss: Callable[[nn.Module, int], torch.Tensor], steps: int, peak: float, what: str) -> nn.Module:
    """make() trained by AdamW on loss(network, step), its rate falling from `peak` to 0; the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak)
    for step in tqdm(range(steps), desc=what, disable=None):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * (1 - step / steps)
        found = loss(network, step)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    print(f"{what}: {steps} steps, loss {found.item():.4f}", flush=True)
    return network.eval()


def training_pictures(corpus: Corpus, size: int) -> torch.Tensor:
    """(n, 3, size, size), the first 10,000."""
    return torch.stack([corpus.picture(n, size) for n in corpus.gallery("train")[:10_000]])


if __name__ == "__main__":
    run_main(main)
