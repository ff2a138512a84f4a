"""Pictures: spectrograms and attention as PNG, charts as SVG.

Matplotlib is imported where something is drawn, for it takes long; backgrounds are transparent, so that a
picture is legible on white and on black.
"""

import io
import math
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Mel

BLUE = "#3d7fd9"
ORANGE = "#d97b29"
GREY = "#7d7d7d"
INK = "#010203"  # stands for the text colour of the page around a chart

# Pictures


def save_spectrogram_png(log_mel: np.ndarray, path: Path, mel: Mel) -> None:
    """Draw log_mel (T, M), natural log, in the same colours for every clip.

    Seconds across, kHz up on the mel scale.
    """
    n_frames, n_mels = log_mel.shape
    seconds = n_frames * mel.hop / mel.sample_rate
    axes = picture_axes(4.6, 1.9, "s", "kHz")
    extent = (0, seconds, 0, n_mels)
    quietest = math.log(1e-5)
    show_matrix(axes, log_mel.T, extent, "magma", quietest, 2)
    rows = rows_of_khz(mel, n_mels)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.figure.savefig(path, transparent=True)


def rows_of_khz(mel: Mel, n_mels: int) -> dict[str, float]:
    """At which rows of a picture with n_mels rows round frequencies are."""
    lowest = slaney_mel(mel.fmin)
    highest = slaney_mel(mel.fmax)
    rows = {}
    for khz in ("0.5", "1", "2", "4", "6", "10", "16"):
        hz = 1000 * float(khz)
        height = (slaney_mel(hz) - lowest) / (highest - lowest)
        row = height * (n_mels + 1) - 0.5
        if 0 <= row <= n_mels:
            rows[khz] = row
    return rows


def save_attention_png(weights: np.ndarray, text: str, path: Path, seconds: float = 0) -> None:
    """Draw weights (frames, bytes): which byte of `text` each frame looks at.

    Bytes across, time up, in seconds where the length is given.
    """
    from matplotlib.colors import LinearSegmentedColormap

    n_frames, n_bytes = weights.shape
    left = -0.5
    right = n_bytes - 0.5
    top = seconds or n_frames
    ink = LinearSegmentedColormap.from_list("ink", [BLUE + "00", BLUE + "ff"])
    strongest = np.median(weights.max(1))
    axes = picture_axes(9.2, 1.9, "", "s" if seconds else "frames")
    show_matrix(axes, weights, (left, right, 0, top), ink, 0, strongest)
    labels = byte_labels(text) + [""] * n_bytes  # an end token has no letter
    labels = labels[:n_bytes]
    font_size = min(8, 880 / n_bytes)
    axes.set_xticks(range(n_bytes), labels, fontsize=font_size, parse_math=False)
    axes.tick_params(axis="x", length=0)
    axes.figure.savefig(path, transparent=True)


def byte_labels(text: str) -> list[str]:
    """A label for each byte of a text: a character at its first byte, nothing at the others."""
    labels = []
    for character in text:
        labels.append(character if character.isprintable() else "")
        n_more = len(character.encode()) - 1
        labels += [""] * n_more
    return labels


def show_matrix(axes, matrix: np.ndarray, extent: tuple, colours, low: float, high: float) -> None:
    """A matrix as a picture, its first row at the bottom. extent: left, right, bottom, top."""
    matrix = np.asarray(matrix, np.float32)
    axes.imshow(matrix, colours, extent=extent, vmin=low, vmax=high, origin="lower", aspect="auto")


def slaney_mel(hz: float) -> float:
    """Slaney's mel scale, as audio.mel_filters: linear to 1 kHz, logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def picture_axes(width: float, height: float, x_label: str, y_label: str):
    """Axes on a bare Agg canvas, without pyplot's global state; grey labels, legible on any background."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(which="both", colors=GREY, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(x_label, color=GREY, fontsize=8, loc="right", labelpad=0)
    axes.set_ylabel(y_label, color=GREY, fontsize=8)
    return axes


# Charts


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    colour: str
    points: np.ndarray  # (2, n): x and y


class Chart(NamedTuple):
    """A chart as the report shows it; svg is an <svg> element."""

    title: str
    note: str
    svg: str


def draw_chart(
    title: str,
    note: str,
    lines: list[Line],
    zero: bool = False,
    band: tuple[np.ndarray, ...] = (),
    x_label: str = "step",
) -> Chart | None:
    """Draw lines, the long ones smoothed over their faint raw selves; returns None where no line has a point.

    zero: the axis begins at zero; else it is logarithmic where the values span enough for that.
    band: two lines (2, n), the space between which is shaded.
    """
    lines = [line for line in lines if line.points.size]
    if not lines:
        return None
    axes = picture_axes(5.2, 2.7, x_label, "")
    drawn = [draw_line(axes, line, x_label == "step") for line in lines]
    if band and band[0].shape == band[1].shape:
        x, low = band[0]
        high = band[1][1]
        axes.fill_between(x, low, high, color=lines[0].colour, alpha=0.2, linewidth=0)
    style_axes(axes, np.concatenate(drawn), zero)
    return Chart(title, note, inline_svg(axes, f"{title}: {note}"))


def draw_line(axes, line: Line, with_last_value: bool) -> np.ndarray:
    """Draw a line of a chart; returns its y (n,). A long one is smoothed and drawn by about 500 points."""
    x, y = line.points
    n = x.size
    some = slice(None, None, n // 500 + 1)
    marker = "o"
    if n > 100:
        axes.plot(x[some], y[some], color=line.colour, alpha=0.25, linewidth=0.8)
        y = smoothed(y, n // 40)
        marker = ""
    label = line.name
    if with_last_value:
        label += f" {short_number(y[-1])}"
    axes.plot(x[some], y[some], color=line.colour, label=label, marker=marker, markersize=3)
    return y


def smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of y (n,) over `width` points around each, of fewer at the ends."""
    box = np.ones(width)
    counts = np.convolve(np.ones(y.size), box, "same")
    return np.convolve(y, box, "same") / counts


def style_axes(axes, values: np.ndarray, zero: bool) -> None:
    """Scale, ticks, grid and legend of a chart with these y values."""
    low = np.nanmin(values)
    high = np.nanmax(values)
    if zero:
        axes.set_ylim(0)
    elif 0 < low < high / 4:
        axes.set_yscale("log", subs=(2, 5))
        axes.set_ylim(0.9 * low, 1.1 * high)
    axes.xaxis.set_major_formatter(short_number)
    axes.yaxis.set_major_formatter(short_number)
    axes.yaxis.set_minor_formatter(short_number)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="y", which="both", color=GREY, alpha=0.25, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def short_number(value: float, position: int | None = None) -> str:
    """A number on a chart, 12k for 12,000; `position` is what matplotlib hands to a formatter."""
    return f"{value / 1000:.4g}k" if value >= 1000 else f"{value:.4g}"


def inline_svg(axes, label: str) -> str:
    """The axes as an <svg> element that takes font and text colour from the page around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        axes.figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = svg.split("<svg", 1)[1].split(">", 1)[1]
    useless = r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\""
    svg = re.sub(useless, "", svg, flags=re.DOTALL)
    # The ids of all charts are in one page: only those that are referred to stay
    ids = re.findall(r' id="([\w.-]+)"', svg)
    used_ids = re.findall(r"#([\w.-]+)", svg)
    for name in set(ids) - set(used_ids):
        svg = svg.replace(f' id="{name}"', "")
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return f'<svg role="img" aria-label="{escape(label)}" {view_box}>{svg}'
