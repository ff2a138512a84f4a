"""Speech to text by openai-whisper: one path for its published models and for the tiny one in assets/, which is trained here.

A machine without a hub still needs an error rate in the loop, so `python recogniser.py train` makes a checkpoint in
Whisper's own format (width 64, Whisper's vocabulary and 30-second window) on the demo voice. Half of what it hears is words in
random order, so that it has to listen: no grammar tells it the answer. `python recogniser.py assess` prints its floors.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import random
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
import whisper
from tqdm import tqdm
from whisper.normalizers import EnglishTextNormalizer
from whisper.timing import find_alignment
from whisper.tokenizer import get_tokenizer

import audio
import data
import metric
import pretrained
from config import Config, Mel, UserError, run_main

TINY = Path(__file__).parent / "assets" / "whisper-demo.pt"
RATE = whisper.audio.SAMPLE_RATE     # Hz: Whisper listens at 16 kHz
normalise = EnglishTextNormalizer()  # Whisper's own: case, punctuation, numbers, British spelling


class Recogniser:
    """A resident Whisper model: `transcribe` waves in batches, at temperature 0, in English."""

    def __init__(self, name: str, device: torch.device):
        self.name = Path(name).stem
        self.model = whisper.load_model(name, device=device)
        self.options = whisper.DecodingOptions(language="en", temperature=0.0, without_timestamps=True, fp16=device.type == "cuda")

    @torch.inference_mode()
    def transcribe(self, waves: list[torch.Tensor], sample_rate: int, batch_size: int = 16) -> list[str]:
        """waves: tensors (N,) at `sample_rate` Hz, up to 30 s each. returns the texts as heard, not normalised."""
        texts = []
        for start in range(0, len(waves), batch_size):
            heard = [whisper.pad_or_trim(audio.resample(w, sample_rate, RATE)) for w in waves[start:start + batch_size]]
            mels = torch.stack([whisper.log_mel_spectrogram(w, self.model.dims.n_mels) for w in heard]).to(self.model.device)
            texts += [result.text for result in whisper.decode(self.model, mels, self.options)]
        return texts

    def align(self, text: str, wave: torch.Tensor, sample_rate: int) -> list[tuple[str, float, float]]:
        """When each word of `text` is spoken in a wave (N,): [(word, start, stop)], seconds, in order; where words join, stop = start.

        Whisper's cross-attention to a known text, timed by dynamic time warping (whisper.timing), says which silence lies between which
        words; where that begins and ends is then read off the wave. raises UserError for what Whisper cannot take in at once.
        """
        tokenizer = get_tokenizer(self.model.is_multilingual, language="en", task="transcribe")
        words, heard = text.split(), audio.resample(wave, sample_rate, RATE)
        tokens = [tokenizer.encode(f" {word}") for word in words]
        if not words or len(heard) > whisper.audio.N_SAMPLES or sum(map(len, tokens)) + 4 > self.model.dims.n_text_ctx:
            raise UserError(f"cannot align {len(words)} words in {len(heard) / RATE:.1f} s")
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(heard), self.model.dims.n_mels).to(self.model.device)
        timings = find_alignment(self.model, tokenizer, sum(tokens, []), mel, len(heard) // whisper.audio.HOP_LENGTH)
        starts, position = {}, 0                               # a word's first piece starts it; Whisper's pieces hold some of its tokens
        for timing in timings:
            starts[position] = timing.start
            position += len(timing.tokens)
        firsts = [sum(map(len, tokens[:n])) for n in range(len(words))]
        return snap(words, [starts.get(first, 0.0) for first in firsts], heard)


def snap(words: list[str], starts: list[float], wave: torch.Tensor) -> list[tuple[str, float, float]]:
    """[(word, start, stop)], seconds, from rough starts and the sound itself: a pause goes to the nearest start, or no start is moved.

    wave (N,) at 16 kHz. A pause is 50 ms and more that are 26 dB below the loud parts; a long one may lie further from the start than a
    short one, because Whisper counts a pause as part of the word before it or after it.
    """
    frame = RATE // 100                                        # 10 ms
    power = F.pad(wave, (0, -len(wave) % frame)).reshape(-1, frame).square().mean(1)
    quiet = (power < power.quantile(0.95) * 10 ** -2.6).tolist()
    edges = [n for n, (a, b) in enumerate(zip([False, *quiet], [*quiet, False])) if a != b]
    begin, end = 0.0, len(quiet) / 100
    gaps = {n: (start, start) for n, start in enumerate(starts) if n}
    for first, last in zip(edges[::2], edges[1::2]):
        first, last = first / 100, last / 100
        if first == 0 or last >= len(quiet) / 100:             # before the first word, after the last
            begin, end = (last if first == 0 else begin), (first if first else end)
            continue
        distance, n = min(((max(first - start, start - last, 0), n) for n, start in enumerate(starts) if n), default=(math.inf, 0))
        if last - first >= 0.05 and distance <= max(0.05, (last - first) / 2) and last - first > gaps[n][1] - gaps[n][0]:
            gaps[n] = first, last
    times = [begin, *(time for n in sorted(gaps) for time in gaps[n]), end]
    times = [min(max(times[:n + 1]), end) for n in range(len(times))]                    # in order, whatever the attention said
    return [(word, times[2 * n], times[2 * n + 1]) for n, word in enumerate(words)]


def cut_clips(config: Config, clips: list[data.Clip], folder: Path) -> list[data.Clip]:
    """Clips, those longer than picture.seconds cut between their words as the Whisper data.align times them; the others as they are.

    folder: words.json in it keeps the lengths and the times; cutting that was interrupted is taken up again.
    """
    if not config.data.align or config.data.corpus == "demo":
        return clips
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror})") from e
    path, known, found = folder / "words.json", {}, []
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = {name: times for name, times in dict(json.loads(path.read_text(encoding="utf-8"))).items()
                 if isinstance(times, dict) and {"text", "words"} <= times.keys() and times.get("seconds")}     # 0 s: to be tried again
    new = [clip for clip in clips if known.get(clip.id, {}).get("text") != clip.text]
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    listener = load_whisper(config.data.align, device, "data.align") if new else None
    for number, clip in enumerate(tqdm(new, desc="words", unit="clip", disable=None), 1):
        known[clip.id] = {"text": clip.text, **time_words(listener, clip, config.picture.seconds)}
        if number % 1000 == 0 or number == len(new):
            with data.replacing(path) as part:
                part.write_text(json.dumps(known), encoding="utf-8")
    for clip in clips:
        pieces = cut(known[clip.id]["words"], config.picture.seconds)
        found += [clip._replace(id=f"{clip.id}_{n}", text=data.sentence(text), start=start, stop=stop)
                  for n, (text, start, stop) in enumerate(pieces)] or [clip]
    return found


def time_words(listener: Recogniser, clip: data.Clip, longest: float) -> dict:
    """{"seconds": of the recording, "words": as `align`}; no words where it is no longer than `longest` or nobody can tell."""
    found = {"seconds": 0.0, "words": []}
    with contextlib.suppress(UserError, soundfile.LibsndfileError):        # what is wrong with the clip, its packing will say
        info = soundfile.info(clip.wav)
        found["seconds"] = info.duration
        if info.duration > longest:
            found["words"] = listener.align(clip.text, audio.load_wav(clip.wav, info.samplerate), info.samplerate)
    return found


def cut(words: list[tuple[str, float, float]], seconds: float) -> list[tuple[str, float, float]]:
    """[(text, start, stop)]: consecutive words, none left out, as pieces of 1 s to `seconds`; [] where there is no such way.

    Of all ways it is the one with the least sum, over its cuts, of 1 / (pause + 20 ms): few cuts, in long pauses. A piece keeps up to
    200 ms of the silence around it, never more than half of a pause.
    """
    halves = [(after[1] + before[2]) / 2 for before, after in zip(words, words[1:])]
    starts = [max(start - 0.2, half, 0.0) for (_, start, _), half in zip(words, [0.0, *halves])]
    stops = [min(stop + 0.2, half) for (_, _, stop), half in zip(words, [*halves, math.inf])]
    price = [0.0, *(1 / (max(0, after[1] - before[2]) + 0.02) for before, after in zip(words, words[1:]))]
    best = [(0.0, 0)]                                          # of words[:n]: the sum, and where its last piece begins
    for n in range(1, len(words) + 1):
        ways = [(best[first][0] + price[first], first) for first in range(n) if 1 <= stops[n - 1] - starts[first] <= seconds]
        best.append(min(ways, default=(math.inf, 0)))
    if not words or best[-1][0] == math.inf:
        return []
    pieces, n = [], len(words)
    while n:
        first = best[n][1]
        pieces.append((" ".join(word for word, _, _ in words[first:n]), starts[first], stops[n - 1]))
        n = first
    return pieces[::-1]


class PocketSphinx:
    """CMU's small recogniser with the English model that its wheel carries: weak, but offline and of open vocabulary."""

    name = "pocketsphinx"

    def __init__(self):
        try:
            import pocketsphinx                # an extra: pip install pocketsphinx
        except ImportError as e:
            raise UserError("eval.recogniser pocketsphinx is not installed: pip install pocketsphinx") from e
        self.decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")

    def transcribe(self, waves: list[torch.Tensor], sample_rate: int) -> list[str]:
        """As Recogniser.transcribe; each wave is scaled to the same peak."""
        texts = []
        for wave in waves:
            wave = audio.resample(wave, sample_rate, RATE)
            pcm = (wave / wave.abs().max().clamp_min(1e-5) * 29000).short().numpy().tobytes()
            self.decoder.start_utt()
            self.decoder.process_raw(pcm, full_utt=True)
            self.decoder.end_utt()
            texts.append(self.decoder.hyp().hypstr if self.decoder.hyp() else "")
        return texts


def load(name: str, device: torch.device) -> Recogniser | PocketSphinx:
    """A Whisper model by name ("base.en") or .pt file, or "pocketsphinx".

    A Whisper that cannot be downloaded is replaced by the tiny one, with one line that says so.
    raises UserError for a file that is missing or is no Whisper checkpoint, and for an unknown name.
    """
    if name == "pocketsphinx":
        return PocketSphinx()
    try:
        return load_whisper(name, device, "eval.recogniser")
    except NotDownloaded as e:
        print(f"recogniser: {e}; {TINY.name} listens instead, which knows only the demo's voice and words", flush=True)
        return Recogniser(str(TINY), device)


def load_whisper(name: str, device: torch.device, knob: str) -> Recogniser:
    """As `load`, but nothing replaces what cannot be had: raises UserError, which names the knob, or NotDownloaded."""
    is_file = name.endswith(".pt")
    if is_file and not Path(name).exists():
        raise UserError(f"{knob} {name}: no such file")
    if not is_file and name not in whisper.available_models():
        raise UserError(f"{knob} {name!r} is neither a .pt file{', pocketsphinx,' if knob == 'eval.recogniser' else ''} nor one of "
                        f"{', '.join(whisper.available_models())}")
    try:
        return Recogniser(name, device)
    except Exception as e:                     # a network and a damaged file fail in every way there is
        if is_file:
            raise UserError(f"{name}: not a Whisper checkpoint ({pretrained.brief(e)})") from e
        raise NotDownloaded(f"Whisper {name} cannot be downloaded ({pretrained.brief(e)})") from e


class NotDownloaded(UserError):
    """A published model that is neither kept here nor to be had."""


# Training the tiny one


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
