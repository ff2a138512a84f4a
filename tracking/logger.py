"""The log of a run: one JSON object a line in metrics.jsonl, and the same to W&B.

A line is on disk as soon as it is logged; what reads a log passes over a line that a crash has torn.
"""

import contextlib
import json
import math
import os
from pathlib import Path

from config import UserError
from tracking import checkpoint


class MetricsLogger:
    """One JSON line a call in <out_dir>/metrics.jsonl, and the same to W&B."""

    def __init__(self, out_dir: str, config: dict, wandb_mode: str, project: str, url: str, resume_step: int):
        """wandb_mode: offline (files in <out_dir>/wandb) | online | disabled.

        url: of a W&B server of one's own, or "".
        resume_step: later lines are dropped and the W&B run goes on; 0 begins both anew.
        """
        self.out = Path(out_dir)
        path = self.out / "metrics.jsonl"
        rows = read_lines(path) if resume_step > 0 else []
        rows = [row for row in rows if row.get("step", 0) <= resume_step]
        lines = [json.dumps(row) + "\n" for row in rows]
        self.resumed = set()  # what was logged at resume_step: train, val, eval, ...
        for row in rows:
            if row.get("step") == resume_step:
                self.resumed |= {key.split("/")[0] for key in row}
        checkpoint.write_text(path, "".join(lines))
        self.file = path.open("a", encoding="utf-8")  # noqa: SIM115  (open for as long as the run lasts)
        self.run = None
        if wandb_mode != "disabled":
            self.run = start_wandb(self.out, config, wandb_mode, project, url, resume_step > 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """values: numbers, or strings such as a recogniser's name; NaN and infinity are null in the file.

        Without any there is no line.
        """
        if not values:
            return
        logged = {}
        row = {"step": step}
        for key, value in values.items():
            if not isinstance(value, (str, int)):
                value = float(value)
            logged[key] = value
            is_finite = not isinstance(value, float) or math.isfinite(value)
            row[key] = value if is_finite else None
        try:
            self.check_in_place()
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as e:
            with contextlib.suppress(OSError):
                self.file.close()  # which would else be tried once more, and complain, when Python ends
            good = checkpoint.last_good(self.out)
            raise UserError(f"{self.file.name}: cannot be written ({e.strerror}); {good}") from e
        if self.run:
            self.run.log(logged, step=step)

    def log_files(self, step: int, name: str, paths: list[Path]) -> None:
        """Hand wavs and pngs to W&B; on disk they already are."""
        if not self.run:
            return
        import wandb

        kinds = {".wav": wandb.Audio, ".png": wandb.Image}
        files = [kinds[Path(path).suffix](str(path)) for path in paths]
        self.run.log({name: files}, step=step)

    def check_in_place(self) -> None:
        """raises OSError, UserError where the run's folder was removed, moved, or replaced by another."""
        if not os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.file.name)):
            raise UserError(f"{self.file.name}: was replaced while the run wrote to it")

    def close(self) -> None:
        self.check_in_place()
        self.file.close()
        if self.run:
            self.run.finish()


def start_wandb(out: Path, config: dict, mode: str, project: str, url: str, resumed: bool):
    """A silent W&B run; its id is kept in <out>/wandb_id, so that a resumed run is the same run there."""
    os.environ.setdefault("WANDB_SILENT", "true")
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it calls home even when offline
    import wandb

    known_id = read_text(out / "wandb_id").strip() if resumed else ""
    server = {"base_url": url} if url else {}
    try:
        run = wandb.init(
            project=project,
            dir=str(out),
            config=config,
            mode=mode,
            id=known_id or None,
            resume="allow",
            settings=wandb.Settings(console="off", **server),
        )
    except (wandb.errors.Error, ValueError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"W&B did not start ({reason}): fix it, or --wandb offline") from e
    checkpoint.write_text(out / "wandb_id", run.id + "\n")
    return run


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_lines(path: Path) -> list[dict]:
    """JSON objects, one a line; a line that a crash has torn is passed over."""
    rows = []
    for line in read_text(path).split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
