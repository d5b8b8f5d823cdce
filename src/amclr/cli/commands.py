"""The commands of `amclr`: one function each. Signature and docstring are the command line (see `amclr.cli.parsing`).

Libraries are imported where they are used, so that help and errors in the arguments come at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from amclr.cli.messages import fail
from amclr.config.schema import Config, ParaphraseConfig, ServeConfig, SourceConfig
from amclr.utils.errors import UserError


@dataclass(frozen=True)
class Fields:
    """Marks a dataclass parameter: its fields but `without` are options; the help lists those of `listed`, or all."""

    without: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()


DATA = ("config", "data", "seed", "cache", "source", "scenes", "views", "model.image_size")
FOR_TRAINING = ("captions", "paraphrases", "val_fraction", "fold", "duplicates", "max_bad", "scan_up_to")
ImageSource = Annotated[SourceConfig, Fields(without=FOR_TRAINING)]


def train(
    *, recipe: str = "", resume: Path | None = None, changed_data: bool = False, profile: bool = False, settings: Config
) -> int:
    """Train a dual encoder: without options on generated scenes, in minutes on a laptop.

    Usage:
        amclr train [--data FOLDER] [--recipe NAME] [--config FILE.yaml] [OPTIONS]
        amclr train --resume RUN [--epochs N] [--changed_data]
        torchrun --nproc-per-node N -m amclr train [OPTIONS]

    Args:
        recipe (NAME): Full set of defaults, listed below. Empty: scenes, or frozen with --data.
        resume (RUN): Run folder to resume, or to train further with a larger --epochs. Settings that change what the
            run learns stay as they are.
        changed_data: With --resume, accept that images, or the weights of a mix, have changed since.
        profile: Write a trace of a few steps to RUN/profile.
    """
    if changed_data and not resume:
        raise UserError("--changed_data belongs to --resume RUN: give it too")
    from amclr.evaluation.tables import format_results
    from amclr.training import loop

    try:
        run = loop.train(settings, resume=resume, changed_data=changed_data, profile=profile)
    except loop.Stopped as stopped:
        return fail(str(stopped), stopped.code)
    if run.verbose:
        print(format_results(json.loads((run.folder / "results.json").read_text())))
        print(f"\nrun folder: {run.folder}  (curves.png, gallery.png, results.json)")
        print(f"use it:     amclr evaluate {run.folder} --zeroshot CLASS_FOLDERS")
        print(f"            amclr.load('{run.folder}') in Python")
    return 0


def compare(
    file: Path, *, data: str = "", seeds: str = "", out: str = "", zeroshot: Sequence[str] = (), jobs: int = 1
) -> int:
    """Train the variants of an experiment file over several seeds: a table, figures and a report.

    Args:
        file: Experiment file: what to compare, as in experiments/.
        data: Data set instead of the file's.
        seeds: Number of seeds, or a list such as 0,1,7, instead of the file's.
        out (FOLDER): Folder to write; empty is runs/compare-NAME.
        zeroshot (FOLDER): Folders of images by class instead of the file's.
        jobs (N): Runs at a time, each on its own GPU or with its share of the cores.
    """
    from amclr.compare import runner
    from amclr.training import loop

    try:
        result = runner.compare(file, data=data, seeds=seeds, out=out, zeroshot=zeroshot, jobs=jobs)
    except loop.Stopped as stopped:
        return fail(str(stopped), stopped.code)
    print(f"{result.table}\nreport: {result.folder / 'report.html'}  (table.md, table.csv, results.json, figures)")
    return fail(f"{result.failed} of {result.runs} runs failed: the table says why", 1) if result.failed else 0


def evaluate(
    run: Path, *, data: str = "", split: str = "val", captions: int = 0, folds: int = 1, paraphrased: str = "",
    zeroshot: Sequence[str] = (), classnames: str = "", templates: str = "", retrieval: bool = True, wise: str = "",
    source: Annotated[SourceConfig, Fields(without=("paraphrases", "captions", "duplicates"))],
) -> None:  # fmt: skip
    """Evaluate a trained model: retrieval, zero-shot classification, and robustness to paraphrased captions.

    Args:
        run: Run folder.
        data: Data set for retrieval; empty is the run's own.
        split: train, val, test or all.
        captions (N): Use the first N captions of each image; 0 is all.
        folds (N): Also report means over N folds of the images, in the data set's order: 5 for COCO's 1k figures.
        paraphrased (rules|STORE|FILE): Also evaluate with paraphrased captions: by rules (English), from a folder that
            `amclr paraphrase` wrote, or from a file with the columns caption,paraphrase. Reports recalls, and how
            similar the retrieved images are.
        zeroshot (FOLDER): Folders that hold one folder of images per class.
        classnames (FILE|NAME): File of FOLDER<tab>NAME lines, or one of: folders (their own names), imagenet, cifar10,
            cifar100. Empty: classnames.txt in the folder, or the names of ImageNet (wnids), CIFAR-10 or CIFAR-100 if
            the folders are theirs.
        templates (FILE|NAME): File with one prompt per line, {} for the class name; or amclr (7), simple (open_clip's
            7), openai or imagenet (80), cifar10 (18), cifar100 (18), food101, pets or another set of CLIP_benchmark.
            Empty: templates.txt in the folder, or the prompts of the known set, or amclr.
        retrieval: Evaluate retrieval.
        wise (SHARES): Evaluate weights interpolated between the initial (0) and the trained ones (1), such as
            0,0.25,0.5,0.75,1.
    """
    try:
        shares = [float(share) for share in wise.split(",")] if wise else []
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"--wise must be numbers between 0 and 1 with commas, as 0,0.5,1, got '{wise}'")
    from amclr.evaluation.run import evaluate_run
    from amclr.evaluation.tables import format_results

    results = evaluate_run(
        run, data=data, source=source, split=split, captions=captions, folds=folds, paraphrased=paraphrased,
        zeroshot=zeroshot, classnames=classnames, templates=templates, retrieval=retrieval, wise=shares,
    )  # fmt: skip
    print(format_results(results))


def export(run: Path, *, to: str = "", out: str = "", precision: str = "fp32", data: str = "") -> None:
    """Export a trained model to open_clip, ONNX or a Hugging Face folder, and compare the export with the original.

    Args:
        run: Run folder.
        to (FORMAT): open_clip, onnx or hf (the format of amclr.load).
        out (FOLDER): Folder to write; empty is RUN/exports/FORMAT.
        precision: fp32 or, for onnx, fp16 (weights of half the size) or int8 (matrix products in int8 too).
        data: Data set whose validation pairs are compared; empty is the run's own.
    """
    from amclr.export import exporter

    print(exporter.report(*exporter.export(run, to, out=out, precision=precision, data=data)))


def paraphrase(
    data: str, *, settings: ParaphraseConfig,
    source: Annotated[SourceConfig, Fields(without=("paraphrases", "captions", "val_fraction", "fold"))],
) -> None:  # fmt: skip
    """Paraphrase the captions of a data set, once, as second text views for training.

    Args:
        data: Folder of captioned images.
    """
    from amclr.paraphrase import generate

    if summary := generate.paraphrase(settings, data, source):  # None in all but the first of several processes
        print(summary)


def inspect(
    *, recipe: str = "", sheet: Path = Path("contact-sheet.png"), list: Path | None = None, scan: bool = False,
    settings: Annotated[Config, Fields(listed=DATA)],
) -> None:  # fmt: skip
    """Show what is in a data set: counts, caption lengths, bad rows, and a contact sheet with both views.

    Usage:
        amclr inspect [--data FOLDER] [--recipe NAME] [--config FILE.yaml] [OPTIONS]

    Args:
        recipe (NAME): Full set of defaults, listed below. Empty: scenes, or frozen with --data.
        sheet (FILE): Contact sheet to write.
        list (FILE.jsonl): Write every sample: its id, where its image is, captions, paraphrases.
        scan: Decode every image, however many there are. If interrupted, rerun the same command to resume.
    """
    from amclr.inspection import dataset

    print(dataset.inspect(settings, sheet, scan, list))


def index(
    run: str, data: str, *, out: str = "", thumbnails: int = 256, approximate: bool | None = None, cache: str = "",
    source: ImageSource,
) -> None:  # fmt: skip
    """Index the images of a folder, archive or data set for search; rerun to update the index.

    Args:
        run: Run folder, folder written by `amclr export --to hf`, or a name on the Hub.
        data: Images: a folder, tar files, or any data set.
        out (INDEX): Folder of the index, new or existing; empty is indexes/NAME.
        thumbnails (PIXELS): Longer side of the thumbnails; 0 makes none.
        approximate: Search only part of the images. Empty: from 200,000 images.
        cache (FOLDER): Folder for what is kept between runs.
    """
    from amclr.search import builder

    built = builder.build(
        run, data, out=out, source=source, thumbnails=thumbnails, approximate=approximate, cache=cache
    )  # fmt: skip
    if built:  # None in all but the first of several processes
        print(builder.report(built))


def search(
    index: Path, query: str = "", *, image: str = "", image_share: float = 0.5, k: int = 12, threshold: float = -1.0,
    only: str = "", json: bool = False, sheet: str = "search.png",
) -> None:  # fmt: skip
    """Find images in an index by text, by image, or by both.

    Args:
        index: Folder written by `amclr index`.
        query: Text to search for. A minus excludes a word or "quoted text": "a beach -people".
        image (FILE): Image to find similar ones to.
        image_share (SHARE): Weight of the image against the text, 0 to 1.
        k (N): Number of results.
        threshold (COSINE): Leave out results below this similarity.
        only: Text that the name or captions of a result must contain.
        json: Print JSON, and write no contact sheet.
        sheet (FILE): Contact sheet to write; '' writes none.
    """
    from amclr.search import query as queries

    opened, hits = queries.search(index, query, image, k, threshold, only, image_share)
    print(queries.to_json(hits) if json else queries.format_table(hits))
    if sheet and not json:
        queries.draw_hits(opened, hits, Path(sheet), queries.title(query, image))
        print(f"\ncontact sheet: {sheet}")


def serve(index: Path, *, settings: ServeConfig) -> None:
    """Serve search in an index over HTTP: a page and an API, on this machine only by default.

    Args:
        index: Folder written by `amclr index`.
    """
    from amclr.serve import server

    server.serve(index, settings)


def label(
    run: str, data: str, *, classes: str, out: Path = Path("labels.csv"), top: int = 1, templates: str = "amclr",
    cache: str = "", source: ImageSource,
) -> None:  # fmt: skip
    """Label every image with one of your classes, and write a CSV.

    Args:
        run: Run folder, folder written by `amclr export --to hf`, or a name on the Hub.
        data: Images: a folder, tar files, or any data set.
        classes (NAMES|FILE): 'dog,cat,horse', or a file with one class per line.
        out (FILE): CSV to write.
        top (N): Classes per image, best first.
        templates (FILE|NAME): Prompts, as for `amclr evaluate`: amclr, simple, openai, or a file with {} for the class.
        cache (FOLDER): Folder for what is kept between runs.
    """
    from amclr.search import label as write_labels

    counts = write_labels(run, data, classes, out, templates, top, source, cache)
    print("\n".join(f"{n:8d}  {name}" for name, n in sorted(counts.items(), key=lambda c: -c[1])[:20]))
    print(f"\nlabels: {out}")


def dedup(
    index: Path, *, out: Path = Path("duplicates.csv"), sheet: str = "duplicates.png", threshold: float | None = None
) -> None:
    """Find near-duplicate images in an index.

    Args:
        index: Folder written by `amclr index`.
        out (FILE): CSV to write.
        sheet (FILE): Contact sheet to write; '' writes none.
        threshold (COSINE): Group images whose embeddings have this similarity, such as 0.9. Empty: only the same image,
            saved again or resized.
    """
    from amclr.search import near_duplicates

    opened, groups = near_duplicates.dedup(index, out, threshold)
    print(f"{sum(map(len, groups))} of {len(opened)} images, in {len(groups)} groups, look the same: {out}")
    if sheet and near_duplicates.draw_groups(opened, groups, Path(sheet)):
        print(f"the largest groups: {sheet}")


COMMANDS = {
    f.__name__: f for f in (train, compare, evaluate, export, paraphrase, inspect, index, search, serve, label, dedup)
}
RESUMABLE = (paraphrase, index)
"""Commands that resume when they are run again."""
