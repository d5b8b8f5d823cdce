"""`train`: assembly, the loop and the end of a run. The only file that knows the training engine (Lightning Fabric)."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from amclr import figures
from amclr.clock import WAIT_MATTERS, Clock
from amclr.config import Config, problems
from amclr.data import manifest as manifests
from amclr.data.batches import Batch, BatchPlan, PictureBatches
from amclr.data.duplicates import Duplicates
from amclr.data.manifest import Manifest, Sample
from amclr.data.pictures import PictureStore
from amclr.data.rows import Reject, append_rejects, write_rejects
from amclr.data.views import policies
from amclr.errors import UserError
from amclr.features import FeatureBatches
from amclr.files import write_text
from amclr.measure import Evaluator, draw_gallery, measure_classes, model_reads_pictures
from amclr.model import DualEncoder, build_tokenizer
from amclr.objectives import Objective, backward_in_chunks, build
from amclr.optim import build_optimizer, choose_optimizer, learning_rate, set_lr
from amclr.randomness import derive
from amclr.run import Loggers, Pinned, Run

LOG_EVERY = 10


class Stopped(Exception):
    """A run stopped by a signal; it can go on from its folder."""

    def __init__(self, signum: int, folder: Path) -> None:
        super().__init__(f"stopped; go on by: amclr train --resume {folder}")
        self.code = 128 + signum


@dataclass
class Training:
    """Everything that a run is made of, on its device."""

    fabric: Fabric
    config: Config
    run: Run
    manifest: Manifest
    pinned: Pinned
    plan: BatchPlan
    model: DualEncoder
    """The bare model: for states, evaluation and checkpoints."""
    wrapped: Any
    """The model as Fabric wraps it: for the forward pass under its precision."""
    objective: Objective
    optimizer: Any
    batches: Dataset[Batch]
    evaluator: Evaluator
    step: int = 0
    """Steps done."""
    best: float = -math.inf
    """Best mean recall so far."""
    clock: Clock = field(default_factory=Clock)
    """What this process spent its time on."""
    lost: set[str] = field(default_factory=set)
    """Samples whose pictures were found bad while training, since it was last taken up."""
    listed: set[str] = field(default_factory=set)
    """Samples whose pictures were found bad while training before that."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.steps_per_epoch * self.config.epochs

    def save(self, *, is_best: bool = False, renumbered: bool = False) -> None:
        """Write a checkpoint. renumbered: its steps are counted otherwise than in those before it."""
        state = {
            "model": self.model.state_to_save(), "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(), "step": self.step, "best": self.best,
            "samples": torch.from_numpy(self.plan.samples), "steps_per_epoch": self.plan.steps_per_epoch,
            "held_out": self.pinned.val_digest,
        }  # fmt: skip
        self.run.save(state, self.step, best=is_best, keep=self.config.keep, renumbered=renumbered)

    def lose(self, name: str, reason: str) -> None:
        """List a sample whose picture went bad. Raises UserError beyond the limit on bad pictures."""
        if name in self.lost:
            return
        self.lost.add(name)
        if name not in self.listed:
            self.list_lost({name: reason})
        if len(self.lost) > self.config.source.max_bad * len(self.plan.samples):
            raise UserError(
                f"{len(self.lost)} of {len(self.plan.samples)} training pictures can no longer be read, over the limit "
                f"of {self.config.source.max_bad:.1%}; the last: {name}: {reason}. Mend them, then go on by: "
                f"amclr train --resume {self.run.folder}"
            )

    def list_lost(self, reasons: Mapping[str, str]) -> None:
        """Add samples whose pictures went bad, and why, to rejects.jsonl."""
        rejects = [Reject("", 0, f"while training: {reason}", name) for name, reason in reasons.items()]
        append_rejects(rejects, self.run.folder / "rejects.jsonl")

    def restore(self, changed_data: bool = False) -> None:
        """Take up the run's newest checkpoint, if it has one. Raises UserError where it is of other samples.

        changed_data: take it up even so. As many epochs are done as were, of the samples that there are now.
        """
        state = self.run.load_last()
        if state:
            before = state.get("samples", torch.from_numpy(self.plan.samples)).numpy()
            same = np.array_equal(before, self.plan.samples)
            stretch = self.stretch(state)
            if not (changed_data or (same and stretch == 1)):
                raise UserError(
                    f"the newest checkpoint in '{self.run.checkpoints}' is of other training pictures, or weights of "
                    f"them: put those back, or go on by: amclr train --resume {self.run.folder} --changed_data"
                )
            self.model.load_saved(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if same:
                self.objective.load_state_dict(state["objective"])
            else:
                self.objective.load_rows(state["objective"], rows_among(before, self.plan.samples))
            self.step, held_out = round(state["step"] * stretch), self.pinned.val_digest
            # Recalls on other pictures are no measure of the best.
            self.best = state["best"] if state.get("held_out", held_out) == held_out else -math.inf
            if not same or stretch != 1:
                # Before the metrics are numbered anew: a kill in between may lose some, but never counts twice.
                self.save(renumbered=True)
            self.run.forget_metrics_after(state["step"], stretch)
        else:
            self.run.forget_metrics_after(0)
        # What went bad before stays listed, but counts towards the limit only if it is found bad again.
        found = {row["sample"]: row["reason"] for row in self.run.metrics() if row["kind"] == "replaced"}
        trained = frozenset(self.pinned.train)
        self.list_lost({name: reason for name, reason in found.items() if name in trained})
        self.listed = set(found)

    def stretch(self, state: dict[str, Any]) -> float:
        """Steps an epoch now, by those that a checkpoint was counted in."""
        return self.plan.steps_per_epoch / float(state.get("steps_per_epoch", self.plan.steps_per_epoch))


def rows_among(before: np.ndarray, now: np.ndarray) -> Tensor:
    """Where each of the ids `now` stands among the ids `before`: (N,) int64, -1 where it does not."""
    order = np.argsort(before)
    place = np.minimum(np.searchsorted(before, now, sorter=order), len(before) - 1)
    return torch.from_numpy(np.where(before[order[place]] == now, order[place], -1))


def train(config: Config, *, resume: Path | None = None, changed_data: bool = False, progress: bool = True) -> Run:
    """Train a dual encoder and leave a run folder; the Python form of `amclr train`.

    resume: a run folder to go on with; `config` is then its own. changed_data: go on even where samples
    were added or removed since; the others keep their estimates. Raises UserError for what the user
    can put right, and Stopped after a signal (Ctrl-C, SIGTERM), with a checkpoint written.
    """
    former = Run.open(resume) if resume else None
    folder = former.folder if former else Path(config.out or default_folder(config))
    try:
        with kept_random_state():
            training = assemble(former.config if former else config, folder, former, progress, changed_data)
            if former:
                training.restore(changed_data)
            # Not before the checkpoint has been taken up: what could not be must be asked for again.
            training.run.pin_samples(training.pinned)
            fit(training, progress)
            finish(training, progress)
    except KeyboardInterrupt:
        if (folder / "config.yaml").is_file():  # features and checkpoints so far are there to go on from
            raise Stopped(signal.SIGINT, folder) from None
        raise
    return training.run


def fit(t: Training, progress: bool) -> None:
    """The loop: from the steps done to the last."""
    config, per_epoch = t.config, t.plan.steps_per_epoch
    loader = DataLoader(
        t.batches, batch_size=None, sampler=range(t.step, t.steps), num_workers=config.workers,
        pin_memory=t.fabric.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
    )  # fmt: skip
    written = time.monotonic()
    bar = tqdm(total=t.steps, initial=t.step, desc=config.objective, unit="step", disable=not progress)
    with bar, Loggers(t.run, config) as logs, stop_on_signals() as signals:
        t.clock = Clock()
        for batch in loader:
            t.clock.lap("loader")
            epoch = t.step // per_epoch
            t.objective.start_epoch(epoch, config.epochs)
            rate = learning_rate(config.optim, t.step, t.steps)
            set_lr(t.optimizer, rate)
            torch.manual_seed(derive(config.seed, "dropout", t.step))
            t.wrapped.train()

            t.objective.diagnose = t.step % LOG_EVERY == 0
            loss, metrics = backward(t, batch)
            if config.optim.clip:
                t.fabric.clip_gradients(t.wrapped, t.optimizer, max_norm=config.optim.clip)
            t.optimizer.step()
            t.optimizer.zero_grad()
            t.clock.lap("optimiser")

            t.step += 1
            t.clock.steps += 1
            bar.update()
            for name, reason in batch.replaced.items():
                t.run.log({"kind": "replaced", "step": t.step, "sample": name, "reason": reason})
                t.lose(name, reason)
            due = time.monotonic() - written > 60 * config.checkpoint_minutes
            measures = t.step == t.steps or t.step % (per_epoch * config.eval_every) == 0
            if (t.step - 1) % LOG_EVERY == 0 or measures or due or signals:
                refuse_infinite(loss, t)
            if (t.step - 1) % LOG_EVERY == 0 or t.step == t.steps:
                values = {k: float(v) for k, v in metrics.items()}
                time_spent = t.clock.since_last()
                values |= {"lr": rate, "gamma": t.objective.gamma, **time_spent}
                logs.write("train", t.step, t.step / per_epoch, values)
                shown = {"loss": f"{values['loss']:.3f}"}
                if time_spent["wait_share"] > WAIT_MATTERS:
                    shown["waits"] = f"{time_spent['wait_share']:.0%}"
                bar.set_postfix(shown, refresh=False)
            if measures:
                recalls = t.evaluator()
                # Where nothing aligns pictures with captions, recall is chance: the last is as good as any.
                is_best = recalls["r_mean"] > t.best or not t.objective.pairs
                t.best = max(t.best, recalls["r_mean"])
                logs.write("eval", t.step, t.step / per_epoch, recalls)
                t.save(is_best=is_best)
                if progress:
                    bar.write(_recall_line(epoch + 1, config.epochs, recalls), file=sys.stderr)
            elif signals or due:
                t.save()
            if measures or due:
                written = time.monotonic()
            if signals and t.step < t.steps:
                raise Stopped(signals[0], t.run.folder)
            t.clock.lap("evaluation, logs and checkpoints")
    if progress and t.clock.steps:
        store = getattr(t.batches, "store", None)
        advice = t.clock.advice(config.workers, kept=store is None or store.kept != "none")
        print("\n".join([t.clock.report(), *advice]), file=sys.stderr)


def backward(t: Training, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, metrics and gradient of a batch, embedded at once or in parts."""
    device, size = t.fabric.device, t.config.micro_batch
    if 0 < size < len(batch.ids):
        made = backward_in_chunks(
            lambda part: embed(t.wrapped, part.to(device)), batch.chunks(size), t.objective, batch.ids.to(device),
            groups=batch.groups, model=t.model, backward=t.fabric.backward,
            no_sync=lambda: t.fabric.no_backward_sync(t.wrapped),
        )  # fmt: skip
        t.clock.lap("forward and backward")
        return made
    batch = batch.to(device)
    views = embed(t.wrapped, batch)
    t.clock.lap("forward")
    loss, metrics = t.objective(views, batch.ids, batch.groups)
    t.clock.lap("objective")
    t.fabric.backward(loss)
    t.clock.lap("backward")
    return loss, metrics


def refuse_infinite(loss: Tensor, t: Training) -> None:
    """Stop before a checkpoint or a log would record a loss that is NaN or infinite."""
    if not math.isfinite(loss.item()):
        raise UserError(
            f"the loss is not finite at step {t.step}: lower --optim.lr or raise --loss.temperature; "
            f"{t.run.checkpoints} holds what was learned before"
        )


def embed(model: Any, batch: Batch) -> dict[str, Tensor]:
    """One pass per modality, its views stacked; a dict view -> (B, D) unit rows."""
    image, text = model(batch.images, batch.tokens)
    parts = ((batch.image_views, image), (batch.text_views, text))
    return {v: e for views, rows in parts if views for v, e in zip(views, rows.chunk(len(views)), strict=True)}


def assemble(config: Config, folder: Path, former: Run | None, progress: bool, changed_data: bool = False) -> Training:
    """Put a run together from its settings. Makes its folder only once all of it fits together."""
    if wrong := problems(config):
        raise UserError("; ".join(wrong))
    try:
        fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        what = f"--accelerator {config.accelerator} --precision {config.precision}"
        raise UserError(f"{what} will not do here: {' '.join(str(error).split())[:200]}") from None
    build_objective(config, 1)  # a slip in the settings should show before the data is read
    policies(config)
    choose_optimizer(config.optim)
    if not former:
        Run.refuse_used(folder)
    if config.wandb and not find_spec("wandb"):
        raise UserError("--wandb needs the package: pip install 'amclr[wandb]'")
    cache = manifests.cache_folder(config)
    manifest = manifests.prepare(config, cache, progress)
    samples, held_out = manifest.split("train"), manifest.split("val")
    weights = [s.weight for s in samples] if manifest.parts else []
    plan = BatchPlan(
        np.array([s.id for s in samples], dtype=np.int64), config.batch_size, config.seed,
        np.array(weights) if weights else None,
    )  # fmt: skip
    objective = build_objective(config, len(samples))
    if objective.pairs and len({t for s in samples for t in s.captions}) == 1:
        raise UserError(
            f"every training caption of '{config.data}' is '{samples[0].captions[0][:60]}': none tells pictures apart"
        )
    tokenizer = build_tokenizer(config.model, [t for s in samples for t in s.texts], folder / "tokenizer")
    torch.manual_seed(derive(config.seed, "weights"))
    model = DualEncoder(config.model, tokenizer)
    optimizer = build_optimizer(config.optim, model, objective)
    if not held_out:
        raise UserError(f"{manifest.root} has no validation pictures: give it a val.txt or raise --source.val_fraction")

    pinned = Pinned([s.name for s in samples], [s.name for s in held_out], weights)
    if former and not changed_data:
        former.refuse_others(pinned)
    run = former or Run.create(folder, _with_store(config, manifest))
    if config.model.text_tower == "small" and not (folder / "tokenizer").is_dir():
        tokenizer.save_pretrained(folder / "tokenizer.part")  # a kill here must leave none, or a whole one
        (folder / "tokenizer.part").rename(folder / "tokenizer")
    write_rejects(manifest.rejects, folder / "rejects.jsonl")
    if manifest.rejects and progress:
        print(f"{len(manifest.rejects)} rows or pictures left out: {folder / 'rejects.jsonl'}", file=sys.stderr)
    for note in manifest.notes if progress else ():
        print(f"note: {note}", file=sys.stderr)
    fabric.to_device(model)
    fabric.to_device(objective)
    places, views = [s.picture for s in samples], objective.required_views
    same = duplicates(samples, manifest, config)
    batches: Dataset[Batch]
    if model_reads_pictures(model):
        store = PictureStore.as_set(places, config, cache, progress)
        on_gpu = config.views.where == "auto" and fabric.device.type == "cuda"
        edited = not (on_gpu or config.views.where == "device")
        batches = PictureBatches(samples, store, plan, views, model.tokenize, config, same, edited)
    else:
        store = PictureStore(places, config.model.image_size)
        batches = FeatureBatches(model, samples, store, plan, views, config, cache, progress, same)
    evaluator = Evaluator(model, held_out, config, cache, progress, again=True)
    wrapped, optimizer = fabric.setup(model, optimizer)
    return Training(
        fabric, config, run, manifest, pinned, plan, model, wrapped, objective, optimizer, batches, evaluator
    )


def _with_store(config: Config, manifest: Manifest) -> Config:
    """The settings with the paraphrases that were found, so that a run that is gone on with has no others."""
    if config.source.paraphrases or (manifest.parts and manifest.paraphrases):
        return config
    return replace(config, source=replace(config.source, paraphrases=(*manifest.paraphrases, "none")[0]))


def duplicates(samples: Sequence[Sample], manifest: Manifest, config: Config) -> Duplicates:
    """What stands more than once among the training samples, as far as `source.duplicates` wants it known."""
    what = config.source.duplicates
    if what == "negatives":
        return Duplicates()
    looks = [manifest.looks.get(s.picture) for s in samples]
    return Duplicates.find([s.texts for s in samples], looks if what == "positives" and any(looks) else None)


def build_objective(config: Config, samples: int) -> Objective:
    """The objective that the settings name. Raises UserError naming what is wrong with them."""
    c = config.loss
    try:
        return build(
            config.objective, samples, temperature=c.temperature, gamma=c.gamma, gamma_schedule=c.gamma_schedule,
            temperature_mode=c.temperature_mode, temperature_lr=c.temperature_lr, rho=c.rho, pairs=c.pairs,
            weights={"cross": c.cross_weight, "image": c.image_weight, "text": c.text_weight}, estimator=c.estimator,
            storage=c.storage, folder=manifests.cache_folder(config) / "tables", products=c.products, averaged=True,
            validate=False,  # embeddings made here are unit rows, and ids are the plan's own
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def default_folder(config: Config) -> Path:
    """runs/DATA-OBJECTIVE-seedN, with a number behind it where that is taken."""
    name = f"{manifests.label(config.data)}-{config.objective}-seed{config.seed}"
    taken = (Path("runs") / f"{name}{suffix}" for suffix in ("", *(f"-{k}" for k in range(2, 10_000))))
    return next(folder for folder in taken if not folder.exists())


def finish(t: Training, progress: bool) -> None:
    """Put the best weights back and leave results.json, curves.png, gallery.png and metrics.csv."""
    best = t.run.load_best()
    t.model.load_saved(best["model"])
    t.model.eval()
    images, texts = t.evaluator.embeddings()
    results = {"split": "val", "best_step": round(best["step"] * t.stretch(best)), **t.evaluator.figures(images, texts)}
    if t.manifest.zeroshot:
        results |= measure_classes(t.model, t.manifest.zeroshot, t.config, progress=progress)
    write_text(t.run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    title = f"{t.config.objective} on {manifests.label(t.config.data)}"
    figures.curves(t.run.metrics(), t.run.folder / "curves.png", title, t.evaluator.chance())
    draw_gallery(t.model, t.evaluator, images, texts, t.run.folder / "gallery.png", title)
    append_rejects(t.evaluator.rejects, t.run.folder / "rejects.jsonl")


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave torch's global generator as it was found."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let processes that prepare batches go on until the loop ends: Ctrl-C and schedulers reach every process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list instead of dying at once; a second acts as usual."""
    caught: list[int] = []
    former: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def handle(signum: int, frame: Any) -> None:
        caught.append(signum)
        print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr)
        put_back()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: leave signals alone
        pass
    try:
        yield caught
    finally:
        put_back()


def _recall_line(epoch: int, epochs: int, recalls: dict[str, float]) -> str:
    return (
        f"epoch {epoch}/{epochs}: text retrieval {recalls['txt_r_mean']:.1f}, "
        f"image retrieval {recalls['img_r_mean']:.1f}, mean {recalls['r_mean']:.1f}"
    )
