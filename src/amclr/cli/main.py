"""The command line: one function per command, no logic. Errors that a user can put right are one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amclr.utils.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from amclr.config.schema import Config

COMMANDS = {
    "train": "train a dual encoder: with no arguments on generated scenes, in minutes on a laptop",
    "compare": "train the variants of an experiment file over several seeds: one table, figures, a report",
    "evaluate": "retrieval, zero-shot classification, and what paraphrase changes, with a trained model",
    "export": "a trained model for open_clip, as ONNX files or as a Hugging Face folder, compared with ours",
    "paraphrase": "paraphrases of a data set's captions, made once, for training's second text views",
    "inspect": "what is in a data set: counts, caption lengths, bad rows, a contact sheet with both views",
    "index": "embed the images of a folder, archive or data set, to search in; again, it takes up what changed",
    "search": "find images in an index by a text, an image, or both",
    "serve": "search in an index over HTTP: a page and an API, on this machine alone unless told otherwise",
    "label": "name the class of every image, out of classes that you give: a CSV",
    "dedup": "find images of an index that look the same",
}

USAGE = """usage: amclr COMMAND [OPTIONS]

Train your own image-text dual encoder with small batches on modest hardware.

commands:
{commands}

amclr COMMAND --help shows a command's options.
first steps:
  amclr train                                       watch one learn on generated scenes
  amclr inspect --data FOLDER                       look at your captioned images
  amclr paraphrase FOLDER                           one caption each? a model rewords it, for second text views
  amclr train --data FOLDER                         train on them
  amclr evaluate runs/RUN --zeroshot CLASS_FOLDERS  measure the result
  amclr compare EXPERIMENT.yaml --seeds 5           compare objectives, or any settings
  amclr export runs/RUN --to onnx                   use it without any of this
  amclr index runs/RUN FOLDER --out INDEX           make images searchable
  amclr search INDEX "a dog on the beach"           and find some of them
  amclr serve INDEX                                 in the browser, too"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `amclr` and return its exit code: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        from amclr import __version__

        print(f"amclr {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return _fail(f"unknown command '{command}': {hint}choose from {', '.join(COMMANDS)}", 2)
    missing = [p for p in ("jsonargparse", "lightning", "timm", "transformers", "torchvision") if not find_spec(p)]
    if missing:
        return _fail(f"this command needs {', '.join(missing)}: pip install 'amclr[train]'", 1)
    try:
        commands = {"train": _train, "compare": _compare, "evaluate": _evaluate, "export": _export,
                    "paraphrase": _paraphrase, "inspect": _inspect, "index": _index, "search": _search,
                    "serve": _serve, "label": _label, "dedup": _dedup}  # fmt: skip
        return commands[command](rest)
    except UserError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        return _fail("stopped", 128 + getattr(error, "signum", 2))
    except OSError as error:
        if os.environ.get("AMCLR_TRACEBACK"):
            raise
        what = f"'{error.filename}': " if error.filename else ""
        return _fail(f"{what}{error.strerror or error} (AMCLR_TRACEBACK=1 shows where)", 1)


def _fail(message: str, code: int) -> int:
    if not message:  # another of several processes has told
        return code
    # What a name of a file holds must do nothing to the terminal; `printable` of the data package takes long to import.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.splitlines()))
    print(f"amclr: {line}", file=sys.stderr)
    return code


def _train(arguments: list[str]) -> int:
    resume, arguments = _take(arguments, "--resume")
    profile, arguments = _flag(arguments, "--profile")
    changed, arguments = _flag(arguments, "--changed_data") if resume else (False, arguments)
    config = None
    if not resume or _asks_help(arguments):
        config = _configure("train", arguments)
    elif arguments:
        config = _configure("train", arguments, resume)
    import json

    from amclr.evaluation import evaluator as measure
    from amclr.training.loop import Stopped, train

    try:
        run = train(config, resume=Path(resume) if resume else None, changed_data=changed, profile=profile)
    except Stopped as stopped:
        return _fail(str(stopped), stopped.code)
    if not run.verbose:
        return 0
    print(measure.report(json.loads((run.folder / "results.json").read_text())))
    print(f"\nrun folder: {run.folder}  (curves.png, gallery.png, results.json)")
    print(f"use it:     amclr evaluate {run.folder} --zeroshot CLASS_FOLDERS, or amclr.load('{run.folder}') in Python")
    return 0


def _compare(arguments: list[str]) -> int:
    parser = _parser("compare")
    parser.add_argument("file", type=str, help="experiment file, as in experiments/: what to compare")
    parser.add_argument("--data", type=str, default="", help="data set instead of the file's")
    parser.add_argument("--seeds", type=str, default="", help="how many seeds, or which (0,1,7), instead of the file's")
    parser.add_argument("--out", type=str, default="", help="folder; empty makes runs/compare-NAME")
    parser.add_argument(
        "--zeroshot", type=str, nargs="*", default=[], help="folders of images by class instead of the file's"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="so many runs at a time, each with a GPU, or its part of the cores"
    )
    options = _parse(parser, arguments)
    from amclr.compare import runner as compare
    from amclr.training.loop import Stopped

    try:
        found = compare.compare(
            Path(options.file), data=options.data, seeds=options.seeds, out=options.out, zeroshot=options.zeroshot,
            jobs=options.jobs,
        )  # fmt: skip
    except Stopped as stopped:
        return _fail(str(stopped), stopped.code)
    print(f"{found.table}\nreport: {found.folder / 'report.html'}  (table.md, table.csv, results.json, figures)")
    return _fail(f"{found.failed} of {found.runs} runs failed: the table says why", 1) if found.failed else 0


def _evaluate(arguments: list[str]) -> int:
    from amclr.config.schema import SourceConfig, from_dict

    parser = _parser("evaluate")
    parser.add_argument("run", type=str, nargs="?", default="", help="run folder")
    parser.add_argument("--data", type=str, default="", help="data set for retrieval; empty is the run's own")
    parser.add_argument("--split", type=str, default="val", help="train, val, test or all")
    parser.add_argument(
        "--captions", type=int, default=0, metavar="N", help="take the first N captions of each image; 0: all"
    )
    parser.add_argument(
        "--folds", type=int, default=1, metavar="N",
        help="also the means over N folds of the images, in the data set's order: 5 for COCO's 1k figures",
    )  # fmt: skip
    parser.add_argument(
        "--paraphrased", type=str, default="", metavar="rules|STORE|FILE",
        help="also with paraphrased captions, by rules (English), or from a folder that `amclr paraphrase` wrote or a "
        "file with the columns caption,paraphrase: recalls, and how alike the images are that both find",
    )  # fmt: skip
    parser.add_argument(
        "--zeroshot", type=str, nargs="*", default=[], metavar="FOLDER",
        help="folders that hold a folder of images per class",
    )  # fmt: skip
    parser.add_argument(
        "--classnames", type=str, default="", metavar="FILE|NAME",
        help="file of FOLDER<tab>NAME lines, or folders (their own names), imagenet, cifar10, cifar100; empty finds "
        "classnames.txt, or else knows the folders of ImageNet (wnids), CIFAR-10 and CIFAR-100",
    )  # fmt: skip
    parser.add_argument(
        "--templates", type=str, default="", metavar="FILE|NAME",
        help="file with one prompt per line, {} for the class name, or amclr (seven), simple (open_clip's seven), "
        "openai or imagenet (80), cifar10 (18), cifar100 (18), food101, pets or another set that CLIP_benchmark has "
        "prompts for; empty finds templates.txt in the folder, or else takes those of the set that it is, or amclr",
    )  # fmt: skip
    parser.add_argument("--retrieval", type=bool, default=True, help="measure retrieval")
    parser.add_argument(
        "--wise", type=str, default="", metavar="SHARES",
        help="measure between the weights that the run began with (0) and the trained ones (1): 0,0.25,0.5,0.75,1",
    )  # fmt: skip
    parser.add_class_arguments(SourceConfig, "source", skip={"paraphrases", "captions", "duplicates"})
    values = _parse(parser, arguments).as_dict()
    if not values["run"]:  # --zeroshot would take it for one of its own
        raise UserError("name the run first: amclr evaluate RUN, and then --zeroshot FOLDER ...")
    values["folder"], values["source"] = Path(values.pop("run")), from_dict(values["source"], SourceConfig)
    asked = values["wise"]
    try:
        values["wise"] = [float(share) for share in asked.split(",")] if asked else []
    except ValueError:
        values["wise"] = [-1.0]
    if not all(0 <= share <= 1 for share in values["wise"]):
        raise UserError(f"--wise must be numbers between 0 and 1 with commas, as 0,0.5,1, got '{asked}'")
    from amclr.evaluation import evaluator as measure

    print(measure.report(measure.evaluate_run(**values)))
    return 0


def _export(arguments: list[str]) -> int:
    parser = _parser("export")
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("--to", type=str, default="", metavar="FORMAT", help="open_clip, onnx or hf (amclr.load's own)")
    parser.add_argument("--out", type=str, default="", help="folder to write; empty makes RUN/exports/FORMAT")
    parser.add_argument(
        "--precision", type=str, default="fp32",
        help="fp32 or, for onnx, fp16 (weights in half the room) or int8 (products of matrices too)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=str, default="", help="data set whose validation pairs are compared; empty is the run's own"
    )
    values = _parse(parser, arguments).as_dict()
    from amclr.export import formats as export

    print(export.report(*export.export(Path(values.pop("run")), values.pop("to"), **values)))
    return 0


def _paraphrase(arguments: list[str]) -> int:
    from amclr.config.schema import ParaphraseConfig, SourceConfig, from_dict

    parser = _parser("paraphrase")
    parser.add_argument("data", type=str, help="data set: a folder of captioned images")
    parser.add_class_arguments(ParaphraseConfig, as_group=False)
    parser.add_class_arguments(SourceConfig, "source", skip={"paraphrases", "captions", "val_fraction", "fold"})
    values = _parse(parser, arguments).as_dict()
    data, source = values.pop("data"), values.pop("source")
    from amclr.paraphrase import generate as paraphrase

    try:
        told = paraphrase.paraphrase(from_dict(values, ParaphraseConfig), data, from_dict(source, SourceConfig))
    except KeyboardInterrupt:
        return _fail("stopped, with every batch kept that was done; the same command goes on", 130)
    if told:  # of several processes the first alone has something to tell
        print(told)
    return 0


def _inspect(arguments: list[str]) -> int:
    out, arguments = _take(arguments, "--sheet")
    listing, arguments = _take(arguments, "--list")
    scan_all, arguments = _flag(arguments, "--scan")
    config = _configure("inspect", arguments)
    from amclr.evaluation import evaluator as measure

    print(measure.inspect(config, Path(out or "contact-sheet.png"), scan_all, Path(listing) if listing else None))
    return 0


def _index(arguments: list[str]) -> int:
    from amclr.config.schema import SourceConfig, from_dict

    parser = _parser("index")
    _add_model_and_images(parser)
    parser.add_argument(
        "--out", type=str, default="", metavar="INDEX", help="folder of the index, new or there; empty: indexes/NAME"
    )
    parser.add_argument(
        "--thumbnails", type=int, default=256, metavar="PIXELS", help="longer side of the thumbnails; 0 makes none"
    )
    parser.add_argument(
        "--approximate", type=bool | None, default=None,
        help="let a search look at a part of the images alone; empty: from 200,000 images on",
    )  # fmt: skip
    parser.add_argument("--cache", type=str, default="", help="folder for what is kept between runs")
    parser.add_class_arguments(SourceConfig, "source", skip=_OF_TRAINING)
    values = _parse(parser, arguments).as_dict()
    values["source"] = from_dict(values["source"], SourceConfig)
    from amclr.search import index

    try:
        built = index.build(**values)
    except KeyboardInterrupt:
        return _fail("stopped, with every part kept that was done; the same command goes on", 130)
    if built:  # of several processes the first alone has something to tell
        print(index.report(built))
    return 0


def _search(arguments: list[str]) -> int:
    parser = _parser("search")
    parser.add_argument("index", type=str, help="folder that `amclr index` made")
    parser.add_argument(
        "query", type=str, nargs="?", default="",
        help='a text; words or "quoted texts" with a minus before them are not wanted: "a beach -people"',
    )  # fmt: skip
    parser.add_argument("--image", type=str, default="", metavar="FILE", help="an image to find others like")
    parser.add_argument(
        "--image_share", type=float, default=0.5, metavar="SHARE", help="its weight beside a text, 0 to 1"
    )
    parser.add_argument("-k", type=int, default=12, metavar="N", help="results")
    parser.add_argument("--threshold", type=float, default=-1.0, metavar="COSINE", help="leave out what is less alike")
    parser.add_argument("--only", type=str, default="", metavar="TEXT", help="text that name or captions must hold")
    parser.add_argument("--json", action="store_true", help="print JSON, and draw nothing")
    parser.add_argument("--sheet", type=str, default="search.png", metavar="FILE", help="contact sheet; '' draws none")
    values = _parse(parser, arguments).as_dict()
    from amclr.search import query as search

    as_json, sheet = values.pop("json"), values.pop("sheet")
    index, hits = search.search(Path(values.pop("index")), **values)
    print(search.as_json(hits) if as_json else search.table(hits))
    if sheet and not as_json:
        search.draw(index, hits, Path(sheet), search.told(values["query"], values["image"]))
        print(f"\ncontact sheet: {sheet}")
    return 0


def _serve(arguments: list[str]) -> int:
    from amclr.config.schema import ServeConfig, from_dict

    parser = _parser("serve")
    parser.add_argument("index", type=str, help="folder that `amclr index` made")
    parser.add_class_arguments(ServeConfig, as_group=False)
    values = _parse(parser, arguments).as_dict()
    folder = Path(values.pop("index"))
    from amclr.serve import server

    server.serve(folder, from_dict(values, ServeConfig))
    return 0


def _label(arguments: list[str]) -> int:
    from amclr.config.schema import SourceConfig, from_dict

    parser = _parser("label")
    _add_model_and_images(parser)
    parser.add_argument(
        "--classes", type=str, required=True, metavar="NAMES|FILE", help="'dog,cat,horse', or a file with one a line"
    )
    parser.add_argument("--out", type=str, default="labels.csv", metavar="FILE", help="CSV to write")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="classes for each image, the best first")
    parser.add_argument(
        "--templates", type=str, default="amclr", metavar="FILE|NAME",
        help="prompts, as of `amclr evaluate`: amclr, simple, openai, or a file with {} for the class",
    )  # fmt: skip
    parser.add_argument("--cache", type=str, default="", help="folder for what is kept between runs")
    parser.add_class_arguments(SourceConfig, "source", skip=_OF_TRAINING)
    values = _parse(parser, arguments).as_dict()
    values["out"], values["source"] = Path(values["out"]), from_dict(values["source"], SourceConfig)
    from amclr.search import query as search

    counts = search.label(**values)
    print("\n".join(f"{n:8d}  {name}" for name, n in sorted(counts.items(), key=lambda c: -c[1])[:20]))
    print(f"\nlabels: {values['out']}")
    return 0


def _dedup(arguments: list[str]) -> int:
    parser = _parser("dedup")
    parser.add_argument("index", type=str, help="folder that `amclr index` made")
    parser.add_argument("--out", type=str, default="duplicates.csv", metavar="FILE", help="CSV to write")
    parser.add_argument("--sheet", type=str, default="duplicates.png", metavar="FILE", help="image; '' draws none")
    parser.add_argument(
        "--threshold", type=float | None, default=None, metavar="COSINE",
        help="join what the model finds so much alike, 0.9 say; empty: the same images, saved anew or resized",
    )  # fmt: skip
    values = _parse(parser, arguments)
    from amclr.search import query as search

    index, groups = search.dedup(Path(values.index), Path(values.out), values.threshold)
    print(f"{sum(map(len, groups))} of {len(index)} images, in {len(groups)} groups, look the same: {values.out}")
    if values.sheet and search.draw_groups(index, groups, Path(values.sheet)):
        print(f"the largest groups: {values.sheet}")
    return 0


_OF_TRAINING = {"captions", "paraphrases", "val_fraction", "fold", "duplicates", "max_bad", "scan_up_to"}
"""Settings of a data set that matter where it is trained on alone."""


def _add_model_and_images(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="run folder, what `amclr export --to hf` wrote, or a name on the Hub")
    parser.add_argument("data", type=str, help="images: a folder of them, tars, or any data set")


def _configure(command: str, arguments: list[str], run: str = "") -> Config:
    """The recipe's settings, or those of a run folder, overlaid by a YAML file (--config) and the options given."""
    from dataclasses import asdict

    from amclr.config.recipes import RECIPES
    from amclr.config.schema import Config, flat, from_dict

    name, rest = _take(arguments, "--recipe")
    data = _peek(rest, "--data")
    if not name:
        name = "scenes" if data in (None, "scenes") and not _peek(rest, "--config") else "frozen"
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}': choose from {', '.join(RECIPES)}")
    parser = _parser(command)
    parser.add_argument("--config", action="config", help="YAML file of settings, such as a run's config.yaml")
    parser.add_class_arguments(Config, as_group=False)
    if command == "inspect":
        _show_help_of(parser, ("config", "data", "seed", "cache", "source", "scenes", "views", "model.image_size"))
    if run:
        from amclr.runs.folder import Run

        base = asdict(Run.open(Path(run)).config)
    else:
        base = asdict(RECIPES[name]())
    parser.set_defaults(flat(base))
    options = _parse(parser, rest)
    values = options.as_dict()
    values.pop("config", None)
    config: Config = from_dict(values)
    return config


def _show_help_of(parser: ArgumentParser, shown: tuple[str, ...]) -> None:
    """Leave other options out of the help. They still parse, so that a run's own config.yaml can be given."""
    import argparse

    for action in parser._actions:
        if action.dest not in ("help", *shown) and not action.dest.startswith(tuple(f"{s}." for s in shown)):
            action.help = argparse.SUPPRESS


def _parser(command: str) -> ArgumentParser:
    import jsonargparse
    from jsonargparse import ArgumentParser

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    epilog, usage = "", None
    if command in ("train", "inspect"):
        from amclr.config.recipes import RECIPES

        summaries = "\n".join(f"  {n:10} {(f.__doc__ or '').strip().splitlines()[0]}" for n, f in RECIPES.items())
        epilog = f"recipes, full sets of defaults; without --recipe: scenes or, with --data, frozen\n{summaries}\n"
        usage = f"amclr {command} [--data FOLDER] [--recipe NAME] [--config FILE.yaml] [OPTIONS]"
        if command == "train":
            usage += "\n       amclr train --resume RUN [--epochs N] [--changed_data]"
            usage += "\n       torchrun --nproc-per-node N -m amclr train [OPTIONS]"
            epilog += (
                "\n--resume RUN goes on with a run that was stopped, or further with a larger --epochs; settings that "
                "change what it learns stay as they are. --changed_data lets it, where images, or the weights of a "
                "mix, are others since.\n--profile leaves a trace of some steps under RUN/profile.\n"
            )
        else:
            epilog += (
                "\n--sheet FILE names the contact sheet (contact-sheet.png).\n"
                "--list FILE.jsonl writes every sample: its id, where its image lies, captions, paraphrases.\n"
                "--scan decodes every image, however many there are; stopped, it goes on where it was.\n"
            )
    import argparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    description = COMMANDS[command][0].upper() + COMMANDS[command][1:] + "."
    return ArgumentParser(
        prog=f"amclr {command}",
        usage=usage,
        description=description,
        epilog=epilog,
        exit_on_error=False,
        formatter_class=Formatter,
    )


def _parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    import difflib
    import re
    from argparse import ArgumentError

    try:
        return parser.parse_args(arguments)
    except (ArgumentError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        if found := re.search(r"arguments are required: ([\w, ]+)", message):
            options = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
            message = f"it needs {', '.join(options.get(n, n.upper()) for n in found[1].split(', '))}"
        elif option := _unknown_option(message):
            known = [o for action in parser._actions for o in action.option_strings]
            near = difflib.get_close_matches(option, known, n=1)
            message = f"unknown option '{option}'" + (f": did you mean {near[0]}?" if near else "")
        elif found := re.search(r'key "([\w.]+)": (.*)(?:Got|Given) value: (.*)', message):
            choices = re.search(r"Literal\[(.*?)\]", found[2])
            kind = re.search(r"<class '(\w+)'>", found[2])
            wanted = "of another type"
            if choices:
                wanted = f"one of {choices[1].replace(chr(39), '')}"
            elif kind:
                wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(kind[1], kind[1])
            message = f"--{found[1]} must be {wanted}, got '{found[3]}'"
        raise UserError(f"{message.rstrip()} (amclr {parser.prog.split()[-1]} --help lists the options)") from None


def _unknown_option(message: str) -> str | None:
    """The option that the parser's message calls unknown, as it would be typed; it may be a key of a YAML file."""
    import re

    if found := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        return f"--{found[1]}.{found[2]}"
    if found := re.search(r"Option '(\S+)' is not accepted", message):
        return f"--{found[1]}"
    found = re.search(r"(?:Unrecognized arguments|Unknown option): ([^\s=]+)", message, re.I)
    return found[1] if found else None


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """Take `option VALUE` or `option=VALUE` out of the arguments."""
    rest = list(arguments)
    for k, a in enumerate(rest):
        if a == option:
            if k + 1 == len(rest):
                raise UserError(f"{option} needs a value")
            value = rest[k + 1]
            del rest[k : k + 2]
            return value, rest
        if a.startswith(f"{option}="):
            del rest[k]
            return a.partition("=")[2], rest
    return None, rest


def _flag(arguments: list[str], option: str) -> tuple[bool, list[str]]:
    """Whether an option without a value is among the arguments, and the others."""
    return option in arguments, [a for a in arguments if a != option]


def _peek(arguments: list[str], option: str) -> str | None:
    return _take(arguments, option)[0]


def _asks_help(arguments: list[str]) -> bool:
    return any(a in ("-h", "--help") for a in arguments)
