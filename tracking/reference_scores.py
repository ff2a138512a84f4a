"""Reference scores of a recogniser, stored beside the corpus whose recordings they are of.

They take minutes and no training changes them. A file floors_*.json has them and their basis, all that they
depend on; its name is that of the basis, so what is measured for another one lies beside it.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from config import Config, UserError
from corpora import shards

VERSION = 3  # of how they are measured: raise it, and those that are stored are measured again


def find_basis(config: Config, plan: str, clips: Sequence[shards.Clip], recogniser: list) -> dict:
    """What makes a reference, which clips, and who transcribes them.

    plan, recogniser: what identifies the corpus and the recogniser.
    """
    settings = config.reference_settings()
    described = [[clip.id, clip.text, clip.frames] for clip in clips]
    return {
        "version": VERSION,
        "recogniser": recogniser,
        "system": config.system,
        "settings": settings,
        "files": [list_files(value) for value in settings.values() if isinstance(value, str)],
        "corpus": plan,
        "clips": shards.digest(described),
        "recordings": sum(bool(clip.wav) and Path(clip.wav).exists() for clip in clips),
    }


def list_files(folder: str) -> list[list]:
    """Names, sizes and times of a folder's files, so that none changes unnoticed; [] for a hub id."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.append([path.name, stat.st_size, stat.st_mtime_ns])
    return found


def read(folder: Path, basis: dict) -> dict[str, float] | None:
    """Those that a corpus's folder has; None where there are none, or none of this basis."""
    try:
        stored = json.loads(path_of(folder, basis).read_text(encoding="utf-8"))
        return stored["floors"] if stored["basis"] == basis else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def store(folder: Path, basis: dict, scores: dict[str, float]) -> None:
    """Where the folder cannot be written to, they are measured again next time."""
    content = json.dumps({"basis": basis, "floors": scores}, indent=1)
    with contextlib.suppress(UserError, OSError), shards.atomic_write(path_of(folder, basis)) as part:
        part.write_text(content, encoding="utf-8")


def path_of(folder: Path, basis: dict) -> Path:
    return folder / f"floors_{shards.digest(basis)[:8]}.json"
