"""What a run leaves behind: metrics.jsonl and a W&B run while it trains, scores, and one HTML page that shows all of it.

Top-down: `Writer`, pure scores, pictures, `write_report`. The report needs nothing but the files in the run's folder:
metrics.jsonl, run.json, config.yaml, eval/step_*/samples.jsonl with the wavs and pngs that it names; any may be missing.
`python metric.py OUT_DIR` writes OUT_DIR/report.html again.
"""

import base64
import contextlib
import io
import json
import math
import os
import re
import string
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import BOUND, Mel, UserError, run_main

PAGE = Path(__file__).parent / "assets" / "report.html"
BLUE, ORANGE, GREY, INK = "#3d7fd9", "#d97b29", "#7d7d7d", "#010203"     # legible on white and black; INK stands for the page's text


class Score(NamedTuple):
    """A figure beside the word error rate, as the report shows it. It is of one sample, and then its mean is shown, or of all of them."""
    title: str
    unit: str = ""
    note: str = ""
    match: bool = False              # 1 where a sample is what its prompt asks for, else 0: against another prompt it falls to chance


SCORES = {"mcd": Score("mel-cepstral distortion", "dB", "from log-mels, time-warped: a scale of its own; 0 is the recording"),
          "lsd": Score("log-spectral distance", "dB", "of the magnitudes at equal loudness; 0 is the recording"),
          "path_distance": Score("distance to the colour path", "", "mean over a picture, whose colours go from 0 to 1"),
          "all_match": Score("everything as asked for", "%", "all that the prompt says, at once", match=True),
          "all_rule": Score("everything, by rule", "%", "the same, by a rule that has learned nothing", match=True),
          **{f"{of}_match": Score(f"{of} as asked for", "%", match=True)
             for of in ("key", "tempo", "timbre")},
          "colour_match": Score("colour as asked for", "%", match=True),
          "colour_rule": Score("colour, by rule", "%", match=True),
          "shape_match": Score("shape as asked for", "%", match=True),
          "shape_rule": Score("shape, by rule", "%", match=True),
          "place_match": Score("place as asked for", "%", match=True),
          "place_rule": Score("place, by rule", "%", match=True),
          "chance": Score("chance", "%", "of everything being as asked for, by a guess"),
          "fad": Score("Fréchet audio distance", "", "of the sets' features; 0 is the recordings"),
          "kad": Score("kernel audio distance", "", "of the sets' features, times 100; 0 is the recordings"),
          "clap": Score("CLAP score", "", "cosine of sound and prompt"),
          "fid": Score("Fréchet inception distance", "", "of the sets' features; 0 is the real pictures"),
          "inception_score": Score("inception score", "", "1 is all alike"),
          **{f"{kind}_{k}": Score(f"R@{k} {title}", "%", f"the right one is among the first {k}") for kind, title in
             (("recall", "speech to picture"), ("recall_back", "picture to speech"), ("recall_made", "made to real")) for k in (1, 5, 10)},
          "cos_matched": Score("cosine of pairs"), "cos_unmatched": Score("cosine of strangers"),
          "modality_gap": Score("modality gap", "", "distance of the mean speech and the mean picture"),
          "language_gap": Score("gap between languages", "%", "best to worst, relative")}


def compare_expected(expected: dict[str, str], metrics: list[dict]) -> tuple[list[str], bool]:
    """A recipe's `expect`, {"eval/wer": "at most 0.1"}, beside what was last measured: a line for each, and whether none was missed.

    What nobody measured, for want of a recogniser say, is neither met nor missed; its line says so.
    """
    lines, all_met = [], True
    for name, wanted in expected.items():
        side, number = BOUND.fullmatch(wanted).groups()
        bound, found = float(number), last(metrics, name)
        aim = f"expected {name} {side} {as_shown(name, bound)}:"
        if found is None:
            lines.append(f"{aim} not measured")
            continue
        met = found <= bound if side == "at most" else found >= bound
        all_met = all_met and met
        lines.append(f"{aim} {'met' if met else 'missed'}, {as_shown(name, found)}, by {as_shown(name, abs(found - bound))}")
    return lines, all_met


def as_shown(name: str, value: float) -> str:
    """A value of eval/<score>, for reading."""
    key = name.removeprefix("eval/").split("/")[0]
    if key.startswith("wer"):
        return percent(value)
    return with_unit(key, value) if key in SCORES else f"{value:.4g}"


class Writer:
    """One JSON line a call in <out_dir>/metrics.jsonl, and the same to W&B: offline (files in <out_dir>/wandb) | online | disabled.

    url: of one's own W&B server, or "". resume_step: later lines are dropped and the W&B run goes on; 0 begins both anew.
    """

    def __init__(self, out_dir: str, config: dict, wandb_mode: str, project: str, url: str, resume_step: int):
        out = Path(out_dir)
        out.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_lines(out / "metrics.jsonl") if resume_step > 0 and row.get("step", 0) <= resume_step]
        write_atomically(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(out / "metrics.jsonl", "a", encoding="utf-8")
        self.run = start_wandb(out, config, wandb_mode, project, url, resume_step > 0) if wandb_mode != "disabled" else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """values: numbers, or strings such as a recogniser's name; NaN and infinity become null in the file."""
        values = {key: value if isinstance(value, (str, int)) else float(value) for key, value in values.items()}
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        if self.run:
            self.run.log(values, step=step)

    def media(self, step: int, name: str, paths: list[Path]) -> None:
        """Hand wavs and pngs to W&B; on disk they already are."""
        if not self.run:
            return
        import wandb
        kinds = {".wav": wandb.Audio, ".png": wandb.Image}
        self.run.log({name: [kinds[Path(path).suffix](str(path)) for path in paths]}, step=step)

    def close(self) -> None:
        self.file.close()
        if self.run:
            self.run.finish()


def start_wandb(out: Path, config: dict, mode: str, project: str, url: str, resumed: bool):
    """A silent W&B run; its id is kept in <out>/wandb_id, so that a resumed run is the same run there."""
    os.environ.setdefault("WANDB_SILENT", "true")
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")          # else it calls home even when offline
    import wandb
    known = read_text(out / "wandb_id").strip() if resumed else ""
    try:
        settings = wandb.Settings(console="off", **({"base_url": url} if url else {}))
        run = wandb.init(project=project, dir=str(out), config=config, mode=mode, id=known or None, resume="allow", settings=settings)
    except (wandb.errors.Error, ValueError) as e:
        raise UserError(f"W&B did not start ({' '.join(str(e).split())}): mend it, or --wandb offline") from e
    write_atomically(out / "wandb_id", run.id + "\n")
    return run


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(substitutions + deletions + insertions, words in the reference); both already normalised, either may be empty."""
    import jiwer
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, len(found.references[0])


def word_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Corpus WER of (reference, hypothesis) pairs: all errors over all words, not a mean of ratios; NaN without words."""
    counts = [word_errors(reference, hypothesis) for reference, hypothesis in pairs]
    words = sum(n for _, n in counts)
    return sum(e for e, _ in counts) / words if words else math.nan


def bootstrap_interval(errors: list[int], words: list[int], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(words) by drawing utterances with replacement; NaN without utterances."""
    if not errors:
        return math.nan, math.nan
    picks = np.random.default_rng(seed).integers(len(errors), size=(draws, len(errors)))
    ratios = np.asarray(errors)[picks].sum(1) / np.maximum(np.asarray(words)[picks].sum(1), 1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def mel_cepstral_distortion(log_mel_a: np.ndarray, log_mel_b: np.ndarray, order: int = 13) -> float:
    """Distance of the spectral envelopes of two log-mels (T, M), (S, M) in dB, after dynamic time warping, averaged over the path.

    Cepstra c1 to c_order are the DCT-II of the log-mel, not WORLD's or SPTK's: compare it with itself only, never with published
    figures. Scaled as the classical formula, 10 / ln 10 sqrt(2 sum d^2) (Kubichek 1993; Sakoe, Chiba 1978).
    """
    a, b = np.asarray(log_mel_a, np.float64), np.asarray(log_mel_b, np.float64)
    bins = a.shape[1]
    cosines = np.cos(np.pi / bins * np.outer(np.arange(bins) + 0.5, np.arange(1, order + 1))) * 2 / bins   # (M, order)
    a, b = a @ cosines, b @ cosines
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T                                        # (T, S)
    return warped_mean(10 / math.log(10) * np.sqrt(2 * squares.clip(0)))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of features (n, D), (m, D) as Gaussians: |mean - mean|^2 + tr(A + B - 2 (A B)^1/2) (Heusel et al. 2017)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    covariances = [np.cov(side, rowvar=False).reshape(side.shape[1], -1) for side in (a, b)]
    crossed = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)              # those of a product of two PSD matrices
    return float(np.square(a.mean(0) - b.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * np.sqrt(crossed).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KAD: 100 times the unbiased squared MMD of features (n, D) to real ones (m, D); below 0 by chance where they are alike.

    A Gaussian kernel as wide as the median distance between two real ones (Chung et al. 2025, arXiv 2502.15602).
    """
    def squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T).clip(0)

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    width = 2 * np.median(squares(b, b)[np.triu_indices(len(b), 1)])
    within = [(np.exp(-squares(x, x) / width).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(100 * (sum(within) - 2 * np.exp(-squares(a, b) / width).mean()))


def inception_score(shares: np.ndarray) -> float:
    """exp of the mean divergence of class probabilities (n, K) from their mean (Salimans et al. 2016): 1 to K."""
    shares = np.asarray(shares, np.float64).clip(1e-16)
    return float(np.exp((shares * (np.log(shares) - np.log(shares.mean(0)))).sum(1).mean()))


def recall_at(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    """Share of the rows of similarity (n, m) of whose k greatest at least one is right (n, m) bool."""
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    return float(((similarity > best).sum(1) < k).mean())


def warped_mean(distance: np.ndarray) -> float:
    """Mean of distance (T, S) along the cheapest monotonic path from corner to corner; NaN if a side is empty."""
    rows, columns = distance.shape
    if not rows or not columns:
        return math.nan
    flipped = distance[:, ::-1]
    cost, before = np.full(rows + 1, np.inf), np.full(rows + 1, np.inf)    # of diagonals d - 1 and d - 2, at index i + 1
    length, length_before = np.zeros(rows + 1), np.zeros(rows + 1)         # cells on the path that led there
    before[0] = 0
    for d in range(rows + columns - 1):                                    # whose cells depend on those of the two before only
        low, high = max(0, d - columns + 1), min(rows, d + 1)
        both, down, along = before[low:high], cost[low:high], cost[low + 1:high + 1]
        best = np.minimum(both, np.minimum(down, along))
        steps = np.where(both == best, length_before[low:high], np.where(down == best, length[low:high], length[low + 1:high + 1]))
        before, length_before = cost, length
        cost, length = np.full(rows + 1, np.inf), np.zeros(rows + 1)
        cost[low + 1:high + 1] = best + flipped.diagonal(columns - 1 - d)
        length[low + 1:high + 1] = steps + 1
    return float(cost[rows] / length[rows])


def spectrogram_png(log_mel: np.ndarray, path: str, mel: Mel) -> None:
    """log_mel (T, M), natural log, as a picture: seconds across, kHz up on the mel scale, the same colours for every clip."""
    frames, bins = log_mel.shape
    axes = picture_axes(4.6, 1.9, "s", "kHz")
    axes.imshow(np.asarray(log_mel, np.float32).T, origin="lower", aspect="auto", cmap="magma", vmin=math.log(1e-5), vmax=2,
                extent=(0, frames * mel.hop / mel.sample_rate, 0, bins))
    low, high = slaney_mel(mel.fmin), slaney_mel(mel.fmax)
    rows = {khz: (slaney_mel(1000 * khz) - low) / (high - low) * (bins + 1) - 0.5 for khz in (0.5, 1, 2, 4, 6, 10, 16)}
    rows = {f"{khz:g}": row for khz, row in rows.items() if 0 <= row <= bins}
    axes.set_yticks(list(rows.values()), list(rows))
    axes.figure.savefig(path, transparent=True)


def attention_png(weights: np.ndarray, text: str, path: str, seconds: float = 0) -> None:
    """weights (frames, bytes): which byte of `text` each frame looks at. Bytes across, time up, in seconds where the length is given."""
    from matplotlib.colors import LinearSegmentedColormap
    frames, count = weights.shape
    labels = []
    for character in text:
        labels += [character if character.isprintable() else ""] + [""] * (len(character.encode()) - 1)
    labels = (labels + [""] * count)[:count]                               # an end token has no letter
    axes = picture_axes(9.2, 1.9, "", "s" if seconds else "frames")
    ink = LinearSegmentedColormap.from_list("ink", [BLUE + "00", BLUE + "ff"])
    weights = np.asarray(weights, np.float32)
    axes.imshow(weights, origin="lower", aspect="auto", cmap=ink, vmin=0, vmax=np.median(weights.max(1)),
                extent=(-0.5, count - 0.5, 0, seconds or frames))
    axes.set_xticks(range(count), labels, fontsize=min(8, 880 / count), parse_math=False)
    axes.tick_params(axis="x", length=0)
    axes.figure.savefig(path, transparent=True)


def slaney_mel(hz: float) -> float:
    """Slaney's mel scale, as audio.mel_filters: linear to 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def picture_axes(width: float, height: float, x_label: str, y_label: str):
    """Axes on a bare Agg canvas, without pyplot's global state; grey labels, legible on any background."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(width, height), dpi=140, layout="constrained").add_subplot()
    axes.tick_params(which="both", colors=GREY, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x_label, color=GREY, fontsize=8, loc="right", labelpad=0)
    axes.set_ylabel(y_label, color=GREY, fontsize=8)
    return axes


def write_report(out_dir: str, shown: int = 8) -> Path:
    """Write <out_dir>/report.html: one self-contained page, sounds and pictures of `shown` samples inside, from what the run has left."""
    out = Path(out_dir)
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; give the out_dir of a run")
    metrics = [row for row in read_lines(out / "metrics.jsonl") if "step" in row]
    config = read_text(out / "config.yaml")
    try:
        run = json.loads(read_text(out / "run.json") or "{}")
    except ValueError as e:
        raise UserError(f"{out / 'run.json'}: not JSON ({e}); mend or delete it") from e
    evaluations = {int(path.parent.name.removeprefix("step_")): path for path in out.glob("eval/step_*/samples.jsonl")}
    step = max(evaluations, default=0)
    entries = read_lines(evaluations[step]) if evaluations else []
    samples = "".join(sample(evaluations[step].parent, entry) for entry in entries[:shown])
    maps = "".join(map(figure, sorted(evaluations[step].parent.glob("summary*.png")))) if evaluations else ""
    charts, system = all_charts(metrics), re.search(r"^system:\s*(\S+)", config, re.MULTILINE)
    facts = {"command": run.get("command"), "commit": run.get("commit"), **(run.get("versions") or {})}
    facts = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(str(value))}</code></dd>" for name, value in facts.items() if value)
    title = escape(f"{system[1] if system else 'nanoaudio'} · {out.resolve().name}")
    key = "<mark>Marked</mark>: heard, not in the text. <del>Struck</del>: in the text, not heard." if "<p class=heard>" in samples else ""
    body = headline(title, metrics, run)
    body += f"<section><h2>Samples</h2><p>From step {step:,}. {key}</p>{samples}</section>" if samples else ""
    body += f"<section><h2>All at once</h2><div class=charts>{maps}</div></section>" if maps else ""
    body += f"<section><h2>Curves</h2><div class=charts>{charts}</div></section>" if charts else ""
    body += f"<section><h2>All samples</h2>{table(entries)}</section>" if entries else ""
    body += f"<section><h2>To run it again</h2><dl class=facts>{facts}</dl></section>" if facts else ""
    body += f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>" if config else ""
    write_atomically(out / "report.html", string.Template(PAGE.read_text(encoding="utf-8")).substitute(title=title, body=body))
    return out / "report.html"


def headline(title: str, metrics: list[dict], run: dict) -> str:
    """Name, length, hardware; then the word error rate beside its floors."""
    minutes, size = last(metrics, "perf/train_minutes"), run.get("parameters")
    facts = [f"{metrics[-1]['step']:,} steps" if metrics else "", f"{minutes:,.1f} minutes of training" if minutes else "",
             f"{size / 1e6:,.1f} M parameters" if isinstance(size, int) else size, run.get("hardware"), run.get("started")]
    low, high, heard = (last(metrics, f"eval/{key}") for key in ("wer_low", "wer_high", "recogniser"))
    notes = ([f"95 % interval {percent(low)} to {percent(high)}"] if low is not None else []) + ([f"heard by {heard}"] if heard else [])
    tiles = [(percent(last(metrics, "eval/wer")), "word error rate", "; ".join(notes)),
             (percent(last(metrics, "eval/wer_vocoded")), "floor: vocoded", "recordings through all but the network"),
             (percent(last(metrics, "eval/wer_ground_truth")), "floor: recordings", "the recordings themselves")]
    for key, score in SCORES.items():
        notes = "; ".join(filter(None, [score.note, *(f"{name}: {with_unit(key, found)}" for name, found in compared_with(metrics, key))]))
        tiles.append((with_unit(key, last(metrics, f"eval/{key}")), score.title, notes))
    cells = "".join(f"<div><dt>{label}</dt><dd>{number}<small>{escape(note)}</small></dd></div>" for number, label, note in tiles if number)
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    return f"<header><h1>{title}</h1><p>{line}</p>{f'<dl class=tiles>{cells}</dl>' if cells else ''}</header>"


def compared_with(metrics: list[dict], key: str) -> list[tuple[str, float]]:
    """What stands beside a score: that of the recordings through all but the network, of another's prompt, and by language and voice."""
    ends = {"_vocoded": "at best", "_shuffled": "shuffled prompts"}
    ends |= {name.removeprefix(f"eval/{key}"): name.split("/")[2] for row in metrics for name in row if name.startswith(f"eval/{key}/")}
    return [(name, found) for end, name in ends.items() if (found := last(metrics, f"eval/{key}{end}")) is not None]


def sample(folder: Path, entry: dict) -> str:
    """One entry with whatever text, sounds and pictures it has."""
    name, text, heard, errors = (entry.get(key) for key in ("id", "text", "hypothesis", "errors"))
    wrong = f"{errors} error{'s' * (errors != 1)} in {entry.get('words')} words" if errors else "every word right"
    known = {key: score for key, score in SCORES.items() if entry.get(key) is not None}
    missed = [key.removesuffix("_match").replace("_", " by ")
              for key, score in known.items() if score.match and entry[key] < 1]
    scores = ([wrong] if errors is not None else []) + [f"not as asked for: {', '.join(missed)}"] * bool(missed)
    scores += [f"{score.title} {with_unit(key, entry[key])}" for key, score in known.items() if not score.match]
    lines = f"<p class=text>{escape(text)}</p>" if text else ""
    lines += f"<p class=heard><b>heard</b> {compared(text or '', heard, errors)}</p>" if heard is not None else ""
    clips = ""
    for kind, sound, picture in (("generated", "audio", "picture"), ("reference", "reference_audio", "reference_picture"),
                                 ("nearest in training", "", "nearest"), ("confidence", "", "confidence"),
                                 ("reference confidence", "", "reference_confidence"), ("attention", "", "attention")):
        sound, picture = (folder / entry[key] if entry.get(key) else None for key in (sound, picture))
        clips += figure(picture, sound, kind, f"{kind} {name}")
    return f"<article><h3>{escape(str(name))} <span>{' · '.join(scores)}</span></h3>{lines}<div class=clips>{clips}</div></article>"


def figure(picture: Path | None, sound: Path | None = None, kind: str = "", label: str = "") -> str:
    """A picture and a sound, those that there are, inside a <figure>."""
    inside = ""
    if picture and picture.is_file():
        inside += f'<img alt="{escape(label)}" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
    if sound and sound.is_file():
        source = f"data:audio/wav;base64,{base64.b64encode(sound.read_bytes()).decode()}"
        inside += f'<audio controls preload="metadata" aria-label="{escape(label)}" src="{source}"></audio>'
    return f'<figure class="{kind}"><figcaption>{kind}</figcaption>{inside}</figure>' if inside else ""


def compared(text: str, heard: str, errors: int | None) -> str:
    """What was heard, as HTML, errors marked. Case and punctuation do not count, and nothing is marked where none were counted."""
    def plain(word: str) -> str:
        return re.sub(r"[\W_]", "", word.casefold())

    said, got = ([word for word in side.split() if plain(word)] for side in (text, heard))
    if errors == 0 or not said:
        return escape(heard)
    import jiwer
    pieces = []
    for chunk in jiwer.process_words(" ".join(map(plain, said)), " ".join(map(plain, got))).alignments[0]:
        gone = f"<del>{escape(' '.join(said[chunk.ref_start_idx:chunk.ref_end_idx]))}</del>"
        found = escape(" ".join(got[chunk.hyp_start_idx:chunk.hyp_end_idx]))
        pieces.append({"equal": found, "delete": gone, "insert": f"<mark>{found}</mark>",
                       "substitute": f"{gone} <mark>{found}</mark>"}[chunk.type])
    return " ".join(pieces)


def table(entries: list[dict]) -> str:
    """Every sample, the worst first."""
    rows, measured = "", [key for key in SCORES if any(entry.get(key) is not None for entry in entries)]
    heard = ("heard", "errors") if any(entry.get("errors") is not None for entry in entries) else ()
    for entry in sorted(entries, key=lambda e: (-(e.get("errors") or 0) / max(e.get("words") or 0, 1), e.get("all_match") or 0)):
        text, errors = entry.get("text") or "", entry.get("errors")
        said = (compared(text, entry.get("hypothesis") or "", errors), f"{errors}/{entry.get('words')}" if errors is not None else "")
        cells = [escape(str(entry.get("id", ""))), escape(text), *(said if heard else ()),
                 *(with_unit(key, entry.get(key)) for key in measured)]
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th scope=col>{name}</th>" for name in ("id", "text", *heard, *(key.replace("_", " ") for key in measured)))
    return (f"<details><summary>{len(entries)} samples, the worst first</summary>"
            f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>")


def all_charts(metrics: list[dict]) -> str:
    """Losses, word error rate with its floors, loss by t, scores, throughput: those that the run logged."""
    def losses(key: str) -> list[tuple]:
        return [("training", BLUE, series(metrics, f"train/{key}")), ("validation", ORANGE, series(metrics, f"val/{key}"))]

    def level(name: str, colour: str, over: np.ndarray, value: float | None, scale: float = 1) -> tuple:
        """A floor: the same value at every step of another line; an empty line where there is none."""
        return name, colour, np.zeros((2, 0)) if value is None else np.stack([over[0], np.full_like(over[0], scale * value)])

    low, wer, high = (series(metrics, key) * [[1], [100]] for key in ("eval/wer_low", "eval/wer", "eval/wer_high"))   # in %
    floors = [level(name, colour, wer, last(metrics, key), 100) for name, colour, key in
              (("vocoded", ORANGE, "eval/wer_vocoded"), ("recordings", GREY, "eval/wer_ground_truth"))]
    rows = [row for row in metrics if any(key.startswith("val/flow_loss_t") and value is not None for key, value in row.items())]
    bins = [(f"step {row['step']:,}", colour, np.array([(i / 10 + 0.05, row.get(f"val/flow_loss_t{i}")) for i in range(10)], float).T)
            for row, colour in zip(rows[:1] + rows[1:][-1:], (GREY, BLUE), strict=False)]
    flow = any("train/flow_loss" in row or "val/flow_loss" in row for row in metrics)
    step_ms = series(metrics, "perf/step_ms")[1]
    pace = f"{np.median(step_ms):,.0f} ms a step, the median" if step_ms.size else ""
    return "".join([
        chart("Flow loss", "training is smoothed", losses("flow_loss")) if flow else chart("Loss", "training is smoothed", losses("loss")),
        chart("Duration loss", "", losses("duration_loss")),
        chart("Word error rate, %", "shaded: 95 % interval", [("generated", BLUE, wer), *floors], zero=True, band=(low, high)),
        chart("Validation loss by t", "0 is data, 1 is noise", bins, zero=True, x_label="t"),
        *(chart(", ".join(filter(None, (score.title.capitalize(), score.unit))), "",
                [("generated", BLUE, found := series(metrics, f"eval/{key}") * [[1], [100 if score.unit == "%" else 1]]),
                 *(level(name, colour, found, value, 100 if score.unit == "%" else 1)
                   for colour, (name, value) in zip((ORANGE, GREY), compared_with(metrics, key)))], zero=True)
          for key, score in SCORES.items()),
        chart("Throughput, frames/s", pace, [("smoothed", BLUE, series(metrics, "perf/frames_per_sec"))], zero=True)])


def chart(title: str, note: str, lines: list[tuple], zero: bool = False, band: tuple = (), x_label: str = "step") -> str:
    """A <figure> of lines (name, colour, (2, n) x and y) as inline SVG; long ones are smoothed over their faint raw selves.

    zero: the axis begins at zero; else it is logarithmic where the values span enough for that.
    band: two lines with the space between them shaded.
    """
    def short(value: float, _=None) -> str:
        return f"{value / 1000:.4g}k" if value >= 1000 else f"{value:.4g}"

    lines = [line for line in lines if line[2].size]
    if not lines:
        return ""
    axes, smoothed = picture_axes(5.2, 2.7, x_label, ""), []
    for name, colour, (x, y) in lines:
        thin, long = slice(None, None, x.size // 500 + 1), x.size > 100
        if long:
            axes.plot(x[thin], y[thin], color=colour, alpha=0.25, linewidth=0.8)
            box = np.ones(x.size // 40)
            y = np.convolve(y, box, "same") / np.convolve(np.ones(x.size), box, "same")
        label = f"{name} {short(y[-1])}" if x_label == "step" else name
        axes.plot(x[thin], y[thin], color=colour, label=label, marker="" if long else "o", markersize=3)
        smoothed.append(y)
    if band and band[0].shape == band[1].shape:
        axes.fill_between(band[0][0], band[0][1], band[1][1], color=lines[0][1], alpha=0.2, linewidth=0)
    low, high = np.nanmin(np.concatenate(smoothed)), np.nanmax(np.concatenate(smoothed))
    if zero:
        axes.set_ylim(0)
    elif 0 < low < high / 4:
        axes.set_yscale("log", subs=(2, 5))
        axes.set_ylim(0.9 * low, 1.1 * high)
    for set_format in (axes.xaxis.set_major_formatter, axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_format(short)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="y", which="both", color=GREY, alpha=0.25, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{inline_svg(axes, f'{title}: {note}')}</figure>"


def inline_svg(axes, label: str) -> str:
    """The axes as an <svg> element that takes font and text colour from the page around it."""
    import matplotlib
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        axes.figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)     # ids are global in a page
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg.replace(INK, "currentColor"))
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    return f'<svg role="img" aria-label="{escape(label)}" {view_box}>' + svg[svg.index(">") + 1:]


def series(metrics: list[dict], key: str) -> np.ndarray:
    """(2, n): steps and values of the rows that have a number under `key`."""
    return np.array([(row["step"], row[key]) for row in metrics if isinstance(row.get(key), (int, float))], float).reshape(-1, 2).T


def last(metrics: list[dict], key: str):
    return next((row[key] for row in reversed(metrics) if row.get(key) is not None), None)


def with_unit(key: str, value: float | None) -> str:
    """A value of SCORES for reading, "5.43 dB"; nothing for None."""
    return "" if value is None else percent(value) if SCORES[key].unit == "%" else f"{value:.3g} {SCORES[key].unit}".strip()


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_lines(path: Path) -> list[dict]:
    """JSON objects, one a line; a line that a crash has torn is passed over."""
    rows = []
    for line in read_text(path).split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python metric.py OUT_DIR")
    print(write_report(sys.argv[1]))


if __name__ == "__main__":
    run_main(main)
