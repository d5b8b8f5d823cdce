"""A run folder: its configuration, metrics, checkpoints, and the model that they hold.

config.yaml        every setting, resolved        metrics.jsonl, .csv   metrics by step
environment.json   versions, machine, command     curves.png            loss and recall
rejects.jsonl      rows and images left out       gallery.png           captions and the images they retrieve
checkpoints/       last.pt, best.pt, step-*.pt    results.json          metrics of the best weights
tokenizer/         of the small text tower        samples.json          the images by name
queries.npz        what each query retrieved with the best weights
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from amclr.config.checks import from_dict
from amclr.config.schema import Config
from amclr.models.averaging import result_weights
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.runs.checkpoints import Checkpoints
from amclr.runs.environment import environment
from amclr.runs.notebook import run_html
from amclr.runs.samples import Pinned
from amclr.utils.errors import UserError
from amclr.utils.files import write_text

CARD_METRICS = {
    "txt_r1": "text retrieval, R@1", "txt_r5": "text retrieval, R@5", "txt_r10": "text retrieval, R@10",
    "img_r1": "image retrieval, R@1", "img_r5": "image retrieval, R@5", "img_r10": "image retrieval, R@10",
    "zeroshot_top1": "zero-shot classification, top-1",
}  # fmt: skip
"""Metrics of results.json that a model card shows, and their names there."""


class Run:
    """A run folder: `Run.create` starts one, `Run.open` opens an existing one. A notebook shows metrics and figures."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        self.checkpoints = Checkpoints(folder / "checkpoints", sync_first=folder / "metrics.jsonl")
        self.verbose = True
        """Whether this process prints messages: of several, the first."""

    @classmethod
    def create(cls, folder: Path, config: Config) -> Run:
        """Start a run in a new or empty folder. Raises UserError if the folder is in use."""
        cls.check_unused(folder)
        try:
            (folder / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot create the run folder '{folder}': {error.strerror}") from None
        run = cls(folder, config)
        write_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
        write_text(folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        return run

    @staticmethod
    def check_unused(folder: Path) -> None:
        """Raise UserError if a folder is not empty."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            hint = f"resume it with: amclr train --resume {folder}; or " if (folder / "config.yaml").is_file() else ""
            raise UserError(f"'{folder}' is in use: {hint}choose another --out")

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open an existing run folder. Raises UserError if it is not one."""
        folder = Path(folder)
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"'{folder}' is not a run folder (no config.yaml): give the --out of an `amclr train`")
        try:
            return cls(folder, from_dict(yaml.safe_load(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read '{file}': {error}") from None

    def write_config(self) -> None:
        """Update config.yaml, for a run that is resumed with other settings."""
        text = yaml.safe_dump(asdict(self.config), sort_keys=False)
        if (self.folder / "config.yaml").read_text(encoding="utf-8") != text:
            write_text(self.folder / "config.yaml", text)

    def record_samples(self, samples: Pinned) -> None:
        """Write samples.json, which `check_samples` compares with when the run is resumed."""
        write_text(self.folder / "samples.json", json.dumps(samples.record(), indent=1) + "\n")

    def check_samples(self, samples: Pinned) -> None:
        """Raise UserError, naming what has changed, where the images are not those in samples.json."""
        file = self.folder / "samples.json"
        if file.is_file() and (difference := samples.difference(json.loads(file.read_text(encoding="utf-8")))):
            raise UserError(
                f"{difference}: restore the data that '{self.folder}' started with, or resume with the present data: "
                f"amclr train --resume {self.folder} --changed_data"
            )

    # -- display ------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        epochs, metrics = self._progress()
        recall = f", mean recall {metrics['r_mean']:.1f} %" if "r_mean" in metrics else ""
        # The quotes of repr show unprintable characters as escapes.
        what = f"{self.config.objective} on {self.config.data!r}"
        return f"<amclr run {str(self.folder)!r}: {what}, {epochs} epochs{recall}>"

    def _repr_html_(self) -> str:
        return run_html(self.folder, self.config, *self._progress())

    def _progress(self) -> tuple[str, dict[str, float]]:
        """How many epochs are done, and the metrics of the best weights, or else of the last evaluation."""
        rows = [row for row in self.metrics() if isinstance(row, dict)]
        metrics = _read_json(self.folder / "results.json")
        epochs = f"{self.config.epochs}"
        if not metrics:
            metrics = next((row for row in reversed(rows) if row.get("kind") == "eval"), {})
            done = max((e for row in rows if isinstance(e := row.get("epoch"), int | float)), default=0)
            epochs = f"{done:.1f} of {epochs}"
        return epochs, {k: v for k, v in metrics.items() if isinstance(v, int | float)}

    # -- metrics ------------------------------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without a last line that a kill has truncated."""
        file = self.folder / "metrics.jsonl"
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def drop_metrics_after(
        self, step: int, step_scale: float = 1.0, evaluated: bool = True, skipped: Collection[int] = ()
    ) -> None:
        """Drop the rows of steps that a resumed run will repeat.

        step_scale: steps per epoch now over those before, by which the other rows are renumbered. evaluated: false
        where the evaluation at `step` will be repeated too. skipped: steps that will be skipped again; their faults
        stay.
        """

        def keeps(row: dict[str, Any]) -> bool:
            if row["kind"] == "fault":  # belongs to the next step, not to one that is done
                return row["step"] < step or ("done" in row and row["step"] in skipped)
            return row["step"] < step or (row["step"] == step and (evaluated or row["kind"] != "eval"))

        rows = [{**row, "step": round(row["step"] * step_scale)} for row in self.metrics() if keeps(row)]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_csv(self) -> None:
        """Write metrics.csv from metrics.jsonl: a column per metric."""
        rows = self.metrics()
        columns = list(dict.fromkeys(k for row in rows for k in row))
        with (self.folder / "metrics.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(rows)

    # -- the model ----------------------------------------------------------------------------------

    def load_last(self) -> dict[str, Any] | None:
        """The newest intact checkpoint, or None where there is none yet."""
        return self.checkpoints.load_last(verbose=self.verbose)

    def load_best(self) -> dict[str, Any]:
        """The checkpoint with the best recall, or the last one where none has been evaluated."""
        return self.checkpoints.load_best()

    def check_tokenizer(self) -> None:
        """Raise UserError where the run's own tokenizer is missing."""
        if self.config.model.text_tower == "small" and not (self.folder / "tokenizer").is_dir():
            raise UserError(f"'{self.folder}' has lost its folder tokenizer/, which its text tower cannot do without")

    def load_model(self) -> DualEncoder:
        """The model with its best weights, in evaluation mode."""
        state = self.load_best()
        self.check_tokenizer()
        tokenizer = build_tokenizer(self.config.model, [], self.folder / "tokenizer")
        model = DualEncoder(self.config.model, tokenizer, from_checkpoint=True)
        model.load_saved(result_weights(state))
        model.about = self.about(int(state["step"]))
        return model.merge_adapters().eval()

    def about(self, step: int) -> dict[str, Any]:
        """What a model card says about the training: data, method, command and results."""
        c = self.config
        facts: dict[str, Any] = {
            "name": self.folder.resolve().name, "data": Path(c.data).name or c.data, "objective": c.objective,
            "batch size": c.batch_size, "steps": step, "seed": c.seed,
        }  # fmt: skip
        if c.loss.temperature is not None:
            facts["temperature"] = c.loss.temperature
        recorded, results = (_read_json(self.folder / f"{n}.json") for n in ("environment", "results"))
        if command := recorded.get("command"):
            # Absolute paths are private to whoever trained the model.
            words = [Path(w).name if w.startswith("/") else w for w in shlex.split(command)]
            facts["command"] = shlex.join(["amclr", *words[1:]])
        measured = {name: results[key] for key, name in CARD_METRICS.items() if key in results}
        return facts | ({"measured": measured} if measured else {})


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
