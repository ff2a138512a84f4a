"""The training of the tiny Whisper beside this file: a checkpoint in Whisper's own format for machines without a hub.

`python assets/whisper_demo.py train` makes it (width 64, Whisper's vocabulary and 30-second window) on the demo voice. Half of
what it hears is words in random order, so that it has to listen: no grammar tells it the answer. `assess` prints its floors.
"""

import argparse
import dataclasses
import functools
import json
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import whisper
from whisper.tokenizer import get_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import audio
import metric
from config import Mel, run_main
from recogniser import RATE, TINY, load, normalise


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the tiny recogniser is trained; found by trial, see docs/log.md."""
    clips: int = 7000                # spoken once, heard again and again under fresh noise
    steps: int = 2000
    batch_size: int = 32
    lr: float = 3e-3
    ctc_weight: float = 0.5          # letters read off the encoder: it learns to listen before the decoder learns to speak
    full_window: float = 0.05        # share of steps, and the last ones, that hear the 30-second window of whisper.decode


DIMS = whisper.model.ModelDimensions(n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=4, n_audio_layer=5,
                                     n_vocab=51864, n_text_ctx=96, n_text_state=64, n_text_head=4, n_text_layer=2)


def train(out: str, init: str, recipe: Recipe, seed: int) -> None:
    """Train the tiny recogniser, from the checkpoint `init` or from nothing (""), and write it to `out` in Whisper's format."""
    torch.manual_seed(seed)
    started = time.time()
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        clips = list(pool.map(functools.partial(speak_clip, seed), range(recipe.clips), chunksize=50))
    print(f"{len(clips)} clips spoken in {time.time() - started:.0f} s", flush=True)
    model, letters = whisper.model.Whisper(DIMS), torch.nn.Linear(DIMS.n_audio_state, 28)
    model.decoder.token_embedding = torch.nn.Embedding(len(known_tokens()) + 1, DIMS.n_text_state)     # the last row: any other token
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    if init:
        restore(model, init)
    parameters = [*model.parameters(), *letters.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    rng = random.Random(seed)
    for step in range(recipe.steps):
        full = rng.random() < recipe.full_window or step >= recipe.steps * (1 - recipe.full_window)
        batch = [clips[rng.randrange(len(clips))] for _ in range(recipe.batch_size // (4 if full else 1))]
        loss, ctc = losses(model, letters, batch, rng, full)
        optimizer.zero_grad()
        (loss + recipe.ctc_weight * ctc).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = time.time() - started
            print(f"step {step}/{recipe.steps}  loss {loss.item():.3f}  letters {ctc.item():.3f}  {seconds:.0f} s", flush=True)
        if (step + 1) % 250 == 0 or step == recipe.steps - 1:
            save(model, out)
    print(f"{out}: {Path(out).stat().st_size / 1e6:.2f} MB", flush=True)


def save(model, out: str) -> None:
    """Write a model in Whisper's format, float16, with Whisper's whole vocabulary: tokens that never occur share one row."""
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    table = weights["decoder.token_embedding.weight"]
    full = table[-1].repeat(DIMS.n_vocab, 1)
    full[known_tokens()] = table[:-1]
    weights["decoder.token_embedding.weight"] = full
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"dims": dataclasses.asdict(DIMS), "model_state_dict": weights}, f"{out}.part")
    Path(f"{out}.part").replace(out)


def restore(model, path: str) -> None:
    """Load what `save` wrote into a model that has rows for the known tokens only."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    table = weights["decoder.token_embedding.weight"]
    unknown = min(set(range(DIMS.n_vocab)) - set(known_tokens()))
    weights["decoder.token_embedding.weight"] = table[[*known_tokens(), unknown]]
    model.load_state_dict(weights)


def losses(model, letters, batch: list, rng: random.Random, full: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the next token and the CTC loss of the letters, for clips (text, wave at 16 kHz)."""
    tokenizer = get_tokenizer(multilingual=False)
    waves = [disturb(wave, rng) for _, wave in batch]
    width = 480000 if full else max(map(len, waves)) + rng.randrange(RATE)
    mels = torch.stack([whisper.log_mel_spectrogram(whisper.pad_or_trim(w, width)) for w in waves])
    mels = mels[:, :, :mels.shape[2] // 2 * 2]
    number = {token: i for i, token in enumerate(known_tokens())}
    tokens = [[tokenizer.sot, tokenizer.no_timestamps, *tokenizer.encode(" " + text), tokenizer.eot] for text, _ in batch]
    rows = [torch.tensor([number[token] for token in row]) for row in tokens]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    targets = padded[:, 2:]
    heard = encode(model.encoder, mels)
    logits = model.decoder(padded[:, :-1].clamp_min(0), heard)[:, 1:]
    scores = letters(heard)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=0.05)
    spelled = [torch.tensor([ord(c) - 95 for c in text.lower().replace(" ", "`") if c == "`" or "a" <= c <= "z"]) for text, _ in batch]
    lengths = torch.tensor([len(s) for s in spelled])
    frames = torch.tensor([min(len(w) // 320 + 1, heard.shape[1]) for w in waves])
    ctc = F.ctc_loss(scores.log_softmax(-1).transpose(0, 1), torch.cat(spelled), frames, lengths, zero_infinity=True)
    return loss, ctc


@functools.cache
def known_tokens() -> list[int]:
    """The tokens that the demo's words are made of, at the end of a sentence or not, and the special ones, sorted.

    Only these have rows while training: the other 50,000 of Whisper's table share one.
    """
    tokenizer = get_tokenizer(multilingual=False)
    known = {tokenizer.sot, tokenizer.no_timestamps, tokenizer.eot}
    for word in vocabulary():
        for form in (word, word.capitalize()):
            known |= {token for end in ("", ".", "?") for token in tokenizer.encode(f" {form}{end}")}
    return sorted(known)


def encode(encoder, mels: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on fewer than 30 seconds: mels (B, M, T) -> (B, T / 2, D). Its own forward insists on the full window."""
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mels)))).permute(0, 2, 1)
    x = x + encoder.positional_embedding[:x.shape[1]]
    for block in encoder.blocks:
        x = block(x)
    return encoder.ln_post(x)


def speak_clip(seed: int, index: int) -> tuple[str, torch.Tensor]:
    """Clip `index` of the training set: (text, wave at 16 kHz); half of them words in random order, half of them vocoded."""
    rng = random.Random(f"{seed} {index}")
    text = salad(rng) if rng.random() < 0.5 else training_sentence(rng)
    mel = Mel()
    rate, pitch = rng.choice((160, 160, rng.randint(135, 190))), rng.choice((50, rng.randint(35, 65)))       # the demo's is 160, 50
    wave = audio.espeak(text, mel.sample_rate, rate=rate, pitch=pitch)
    if rng.random() < 0.5:
        x = audio.log_mel(wave, mel)
        blur = rng.choice((1, 1, 3, 5))                        # frames: what a voice that has not converged sounds like
        x = F.avg_pool1d(x.T[None], blur, 1, blur // 2, count_include_pad=False)[0].T
        x = x + rng.uniform(0, 0.5) * torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        wave = audio.griffin_lim(x, mel, iterations=rng.choice((8, 16, 32)))
    return text, audio.resample(wave, mel.sample_rate, RATE)


def training_sentence(rng: random.Random) -> str:
    grammar = rng.choice(("matrix", "open", "open"))
    while True:
        sentence = audio.make_sentence(grammar, rng)
        if not audio.is_held_out(sentence):
            return sentence


@functools.cache
def vocabulary() -> list[str]:
    """All words of the demo's grammars, sorted."""
    words = set()
    for grammar in (audio.load_grammar("matrix"), audio.load_grammar("open")):
        for entries in grammar.values():
            for entry in entries:
                words |= set(re.findall(r"[A-Za-z]+", re.sub(r"\{.*?\}", " ", entry)))
    return sorted(words)


def salad(rng: random.Random) -> str:
    """Three to seven words of the vocabulary in random order, as a sentence."""
    words = " ".join(rng.choice(vocabulary()) for _ in range(rng.randint(3, 7)))
    return words[0].upper() + words[1:] + "."


def disturb(wave: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Fresh gain, leading and trailing silence and white noise (15 to 50 dB) on a wave."""
    wave = F.pad(wave, (rng.randrange(RATE // 4), rng.randrange(RATE // 4))) * 10 ** rng.uniform(-0.7, 0.1)
    if rng.random() < 0.5:
        level = wave.square().mean().sqrt() * 10 ** (-rng.uniform(15, 50) / 20)
        wave = wave + level * torch.randn(len(wave), generator=torch.Generator().manual_seed(rng.randrange(2 ** 31)))
    return wave


def assess(name: str, sentences: int = 200) -> dict[str, float]:
    """Word error rates of a recogniser on held-out sentences of each grammar and on word salad, as spoken and vocoded."""
    torch.set_num_threads(2)
    listener, mel, rates = load(name, torch.device("cpu")), Mel(), {}
    for kind in ("matrix", "open", "salad"):
        rng, texts = random.Random(f"assess {kind}"), []
        while len(texts) < sentences:
            text = salad(rng) if kind == "salad" else audio.make_sentence(kind, rng)
            if kind == "salad" or audio.is_held_out(text):
                texts.append(text)
        spoken = [audio.espeak(text, mel.sample_rate) for text in texts]
        vocoded = [audio.griffin_lim(audio.log_mel(w, mel), mel) for w in spoken]
        for how, waves in (("spoken", spoken), ("vocoded", vocoded)):
            heard = listener.transcribe(waves, mel.sample_rate)
            rates[f"{kind}/{how}"] = metric.word_error_rate([(normalise(t), normalise(h)) for t, h in zip(texts, heard)])
            print(f"{kind:7s}{how:8s} WER {100 * rates[f'{kind}/{how}']:.1f} %   e.g. {texts[0]!r} heard as {heard[0]!r}", flush=True)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "assess"))
    parser.add_argument("--out", default=str(TINY), help="train: where the checkpoint goes")
    parser.add_argument("--init", default="", help="train: go on from this checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="train: updates")
    parser.add_argument("--seed", type=int, default=0, help="train: of sentences, noise and weights")
    parser.add_argument("--model", default=str(TINY), help="assess: a Whisper name or .pt file")
    parser.add_argument("--sentences", type=int, default=200, help="assess: sentences of each kind")
    options = parser.parse_args()
    if options.command == "train":
        train(options.out, options.init, Recipe(steps=options.steps), options.seed)
    else:
        print(json.dumps(assess(options.model, options.sentences)))


if __name__ == "__main__":
    run_main(main)
