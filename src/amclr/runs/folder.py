"""A run folder: its configuration, metrics, checkpoints, and the model that they hold.

config.yaml        every setting, resolved        metrics.jsonl, .csv   what was measured, by step
environment.json   versions, machine, command     curves.png            loss and recall
rejects.jsonl      rows and images left out     gallery.png           captions and what they find
checkpoints/       last.pt, best.pt, step-*.pt    results.json          the best weights, measured
tokenizer/         of the small text tower        samples.json          its images, by name
queries.npz        what each query found, of the best weights
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from amclr.config.checks import from_dict
from amclr.config.schema import Config, ModelConfig
from amclr.models.averaging import kept_weights
from amclr.models.dual_encoder import DualEncoder, build_tokenizer
from amclr.models.hub import is_export
from amclr.runs.checkpoints import Checkpoints
from amclr.utils import html
from amclr.utils.errors import UserError
from amclr.utils.files import write_text
from amclr.utils.randomness import derive

PACKAGES = ("amclr", "torch", "torchvision", "timm", "transformers", "tokenizers", "lightning", "numpy", "pillow")


CARD = {
    "txt_r1": "text retrieval, R@1", "txt_r5": "text retrieval, R@5", "txt_r10": "text retrieval, R@10",
    "img_r1": "image retrieval, R@1", "img_r5": "image retrieval, R@5", "img_r10": "image retrieval, R@10",
    "zeroshot_top1": "zero-shot classification, top-1",
}  # fmt: skip
"""Measures of results.json that a model's card shows, and what it calls them."""

SHOWN = (
    ({"text retrieval": ("txt_r1", "txt_r5", "txt_r10", "txt_r_mean"),
      "image retrieval": ("img_r1", "img_r5", "img_r10", "img_r_mean")}, ("R@1", "R@5", "R@10", "mean")),
    ({"zero-shot": ("zeroshot_top1", "zeroshot_top3", "zeroshot_top5", "zeroshot_top10")},
     ("top-1", "top-3", "top-5", "top-10")),
)  # fmt: skip
"""Tables that a notebook shows: rows of measures, by name, and what the columns are called."""

FIGURES = {"curves.png": "Loss and recall", "gallery.png": "Held-out captions and the images that they find"}
"""Images that a notebook shows."""

NAMES_KEPT = 1_000_000
"""Of more images, a run keeps no names: it then only tells that they differ."""


@dataclass(frozen=True)
class Pinned:
    """The images of a run. The order of its batches and every row of the estimators follow from them.

    train, val: their names. weights: how often an epoch visits each training image; empty is once.
    """

    train: Sequence[str]
    val: Sequence[str]
    weights: Sequence[float] = ()

    @property
    def val_digest(self) -> str:
        """A hash of the validation images' names."""
        return _digest(self.val)

    def record(self) -> dict[str, Any]:
        """What is kept of it: counts and hashes, and names where they are not too many."""
        return {
            "training images": len(self.train), "sha256 of their names": _digest(self.train),
            "sha256 of their weights": _digest(map(str, self.weights)),
            "validation images": len(self.val), "sha256 of validation names": self.val_digest,
            "names": {k: v if len(v) <= NAMES_KEPT else [] for k, v in (("train", self.train), ("val", self.val))},
        }  # fmt: skip

    def unlike(self, before: dict[str, Any]) -> str:
        """How the images differ from those of a record, in a few words; empty where they do not."""
        now = self.record()
        # Records of earlier versions have fewer entries.
        differ = {key for key, value in now.items() if key in before and before[key] != value}
        for split, names, count, digest in (
            ("train", "training images", "training images", "sha256 of their names"),
            ("val", "validation images", "validation images", "sha256 of validation names"),
        ):
            if digest in differ:
                then, new = before.get("names", {}).get(split, []), now["names"][split]
                changes = [
                    f"{what}: {_some(sorted(some))}"
                    for what, some in (("gone", {*then} - {*new}), ("new", {*new} - {*then}))
                    if some and then and new
                ]
                told = "; ".join([f"{now[count]} now, {before[count]} then", *changes])
                return f"the {names} are not those of before ({told})"
        return "the weights of the mix are not those of before" if "sha256 of their weights" in differ else ""


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Run:
    """A run folder. `Run.create` starts one, `Run.open` finds one again; a notebook shows its measures and figures."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        self.checkpoints = folder / "checkpoints"
        self.saved = Checkpoints(self.checkpoints, before=folder / "metrics.jsonl")
        self.speaks = True
        """Whether this process is the one of a run's that tells of it."""

    @classmethod
    def create(cls, folder: Path, config: Config) -> Run:
        """Start a run in a new or empty folder. Raises UserError if the folder is in use."""
        cls.refuse_used(folder)
        try:
            (folder / "checkpoints").mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder '{folder}': {error.strerror}") from None
        run = cls(folder, config)
        write_text(folder / "environment.json", json.dumps(_environment(), indent=2) + "\n")
        write_text(folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        return run

    @staticmethod
    def refuse_used(folder: Path) -> None:
        """Raise UserError if a folder holds something already."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            hint = f"go on with it by: amclr train --resume {folder}; or " if (folder / "config.yaml").is_file() else ""
            raise UserError(f"'{folder}' is in use: {hint}choose another --out")

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open an existing run folder. Raises UserError if it is none."""
        folder = Path(folder)
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"'{folder}' is no run folder (it has no config.yaml): give the --out of an `amclr train`")
        try:
            return cls(folder, from_dict(yaml.safe_load(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read '{file}': {error}") from None

    def write_config(self) -> None:
        """Write the settings anew, for a run that is gone on with under others."""
        text = yaml.safe_dump(asdict(self.config), sort_keys=False)
        if (self.folder / "config.yaml").read_text(encoding="utf-8") != text:
            write_text(self.folder / "config.yaml", text)

    def pin_samples(self, samples: Pinned) -> None:
        """Record the images of a run, which one that goes on is held to."""
        write_text(self.folder / "samples.json", json.dumps(samples.record(), indent=1) + "\n")

    def refuse_others(self, samples: Pinned) -> None:
        """Raise UserError, naming what differs, for other images than those that the run was pinned to, if it was."""
        file = self.folder / "samples.json"
        if file.is_file() and (differs := samples.unlike(json.loads(file.read_text(encoding="utf-8")))):
            raise UserError(
                f"{differs}: put back what '{self.folder}' began with, or go on with what there is now by: "
                f"amclr train --resume {self.folder} --changed_data"
            )

    # -- what it shows ----------------------------------------------------------------------------

    def __repr__(self) -> str:
        told, measured = self._stand()
        recall = f", mean recall {measured['r_mean']:.1f} %" if "r_mean" in measured else ""
        # With the quotes of repr, which show what is no letter as an escape.
        return (
            f"<amclr run {str(self.folder)!r}: {self.config.objective} on {self.config.data!r}, {told} epochs{recall}>"
        )

    def _repr_html_(self) -> str:
        told, measured = self._stand()
        name = html.escape(self.folder.resolve().name)
        facts = (("data", self.config.data), ("objective", self.config.objective), ("epochs", told))
        parts = [f"<h3>{name}</h3>", html.table(["run", str(self.folder)], facts)]
        for rows, columns in SHOWN:
            body = [
                [row, *(f"{measured[key]:.1f}" if key in measured else "–" for key in keys)]
                for row, keys in rows.items() if any(key in measured for key in keys)
            ]  # fmt: skip
            if body:
                parts.append(html.table(["%", *columns], body))
        parts += [html.image(self.folder / f, about, "max-width: 100%") for f, about in FIGURES.items()]
        return "<div>" + "\n".join(parts) + "</div>"

    def _stand(self) -> tuple[str, dict[str, float]]:
        """How many epochs have been made, and the measures of its best weights, or else its last ones."""
        rows = [row for row in self.metrics() if isinstance(row, dict)]
        measured = _read_json(self.folder / "results.json")
        told = f"{self.config.epochs}"
        if not measured:
            measured = next((row for row in reversed(rows) if row.get("kind") == "eval"), {})
            done = max((e for row in rows if isinstance(e := row.get("epoch"), int | float)), default=0)
            told = f"{done:.1f} of {told}"
        return told, {k: v for k, v in measured.items() if isinstance(v, int | float)}

    # -- metrics ----------------------------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl. A last line cut off by a kill is left out."""
        file = self.folder / "metrics.jsonl"
        rows = []
        for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                rows.append(json.loads(text))
            except ValueError:
                continue
        return rows

    def forget_metrics_after(
        self, step: int, stretch: float = 1.0, measured: bool = True, left_out: Collection[int] = ()
    ) -> None:
        """Drop the rows of steps that a resumed run will do again.

        stretch: steps an epoch now, by those that the rows were counted in; the others are numbered anew.
        measured: false where the evaluation at that step will be done again too. left_out: steps that it will pass
        over, after faults that stay listed.
        """

        def stays(row: dict[str, Any]) -> bool:
            if row["kind"] == "fault":  # of the step to be made, not of one that was
                return row["step"] < step or ("done" in row and row["step"] in left_out)
            return row["step"] < step or (row["step"] == step and (measured or row["kind"] != "eval"))

        kept = [{**row, "step": round(row["step"] * stretch)} for row in self.metrics() if stays(row)]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def write_csv(self) -> None:
        """Write metrics.csv from metrics.jsonl: a column per metric."""
        rows = self.metrics()
        columns = list(dict.fromkeys(k for row in rows for k in row))
        with (self.folder / "metrics.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(rows)

    # -- checkpoints ------------------------------------------------------------------------------

    def save(
        self, state: dict[str, Any], step: int, *, best: bool, keep: int, renumbered: bool = False, wait: bool = False,
        passing: bool = False,
    ) -> None:  # fmt: skip
        """Write a checkpoint of a step while the caller goes on, or with `wait` at once: `Checkpoints.save`."""
        self.saved.save(state, step, best=best, keep=keep, renumbered=renumbered, wait=wait, passing=passing)

    def wait_saved(self, raises: bool = True) -> None:
        """Wait for the checkpoint that is being written. Raises UserError if it could not be, unless that is enough."""
        self.saved.wait(raises)

    def pace(self) -> float:
        """Seconds that should lie between two checkpoints, so that writing them costs little."""
        return self.saved.pace()

    def load_last(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None where there is none yet."""
        return self.saved.load_last(tells=self.speaks)

    def load_best(self) -> dict[str, Any]:
        """The checkpoint with the best recall, or the last one where no evaluation has been made."""
        return self.saved.load_best()

    def best_is_sound(self) -> bool:
        """Whether the checkpoint with the best recall is there, and what was written."""
        return self.saved.best_is_sound()

    def refuse_without_tokenizer(self) -> None:
        """Raise UserError where the run's own tokenizer has gone."""
        if self.config.model.text_tower == "small" and not (self.folder / "tokenizer").is_dir():
            raise UserError(
                f"'{self.folder}' has lost its folder tokenizer/, without which its captions have no meaning"
            )

    def load_model(self) -> DualEncoder:
        """The model with its best weights, in evaluation mode."""
        state = self.load_best()
        self.refuse_without_tokenizer()
        tokenizer = build_tokenizer(self.config.model, [], self.folder / "tokenizer")
        model = DualEncoder(self.config.model, tokenizer, from_checkpoint=True)
        model.load_saved(kept_weights(state))
        model.about = self.about(int(state["step"]))
        return model.merge_adapters().eval()

    def about(self, step: int) -> dict[str, Any]:
        """What a model's card says of how it was trained: data, method, command, and what it reached."""
        c = self.config
        told: dict[str, Any] = {
            "name": self.folder.resolve().name, "data": Path(c.data).name or c.data, "objective": c.objective,
            "batch size": c.batch_size, "steps": step, "seed": c.seed,
        }  # fmt: skip
        if c.loss.temperature is not None:
            told["temperature"] = c.loss.temperature
        environment, results = (_read_json(self.folder / f"{n}.json") for n in ("environment", "results"))
        if command := environment.get("command"):
            # Where files lie at who trained it is nobody's business.
            words = [Path(w).name if w.startswith("/") else w for w in shlex.split(command)]
            told["command"] = shlex.join(["amclr", *words[1:]])
        measured = {name: results[key] for key, name in CARD.items() if key in results}
        return told | ({"measured": measured} if measured else {})


class Loggers:
    """metrics.jsonl, TensorBoard and, where asked for, Weights & Biases."""

    def __init__(self, run: Run, config: Config, step: int = 0, writes: bool = True) -> None:
        """step: those done before. writes: false on a process that leaves it to another."""
        self.run, self.writes = run, writes
        self.wandb: Any = None
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # What a killed run drew of later steps is to be hidden.
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1 if step else None)
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project="amclr", name=run.folder.name, config=asdict(config), resume="allow",
                                    id=f"{derive(str(run.folder.resolve())):x}")  # fmt: skip

    def write(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Log values of a step everywhere."""
        if not self.writes:
            return
        self.run.log({"kind": kind, "step": step, "epoch": round(epoch, 4), **values})
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.writes:
            return
        self.board.close()
        self.run.write_csv()
        if self.wandb is not None:
            self.wandb.finish()


SHAPING = ("image_tower", "image_pretrained", "text_tower", "text_pretrained", "text_pooling", "head", "hidden", "dim")
"""Settings of a model that decide which weights fit it."""


def begin(config: Config, captions: Sequence[str], folder: Path) -> DualEncoder:
    """The model that a run begins with: published and random weights, or those of the run `config.init_from`.

    captions: for the tokenizer of a small text tower, where neither `folder` nor the other run has one.
    Raises UserError, saying what to type, where the other run is not there, or its model is another one.
    """
    other = None
    if config.init_from:
        if not (Path(config.init_from) / "config.yaml").is_file():
            raise UserError(
                f"--init_from: there is no run folder '{config.init_from}' (any more): its weights are those that this "
                "run begins with, so put it back, or give the folder of another run"
            )
        other = Run.open(Path(config.init_from))
        _refuse_unlike(config.model, other.config.model, config.init_from)
    places = [folder / "tokenizer", *([other.folder / "tokenizer"] if other else [])]
    tokenizer = build_tokenizer(config.model, captions, next((p for p in places if p.is_dir()), None))
    torch.manual_seed(derive(config.seed, "weights"))
    model = DualEncoder(config.model, tokenizer)
    if other:
        model.begin_with(other.load_model().state_to_save())
    return model


def _refuse_unlike(own: ModelConfig, other: ModelConfig, start: str) -> None:
    needed = {n: getattr(other, n) for n in SHAPING if getattr(own, n) != getattr(other, n)}
    if own.head == other.head == "linear":
        needed.pop("hidden", None)
    if needed:
        typed = " ".join(f"--model.{n} {str(v).lower() if isinstance(v, bool) else v}" for n, v in needed.items())
        raise UserError(f"the model of '{start}' is another one than this run's: give {typed}")


def load(path: str | Path) -> DualEncoder:
    """Load a trained model: from a run folder, from what `save_pretrained` wrote, or by its name on the Hub.

    It comes in evaluation mode, on a GPU where there is one, for `encode_image` and `encode_text`. Raises UserError,
    saying what would do, where `path` is none of these.
    """
    folder = Path(path).expanduser()
    if is_export(folder):
        model = DualEncoder.from_folder(folder)
    elif not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("runs/"):
        model = _from_hub(str(path))
    else:
        model = Run.open(folder).load_model()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _from_hub(name: str) -> DualEncoder:
    try:
        return DualEncoder.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"there is no folder '{name}', and no such model can be had from the Hub ({reason}): give a "
                        "run folder, or what `amclr export RUN --to hf` wrote") from None  # fmt: skip


def _read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is absent or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _environment() -> dict[str, Any]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{os.cpu_count()} x {_processor()}",
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": _commit(),
        "packages": {p: of(p) for p in PACKAGES},
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the code, where it runs from a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
