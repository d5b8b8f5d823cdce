"""`amclr COMMAND`: finds the command, runs it, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from amclr.cli.commands import COMMANDS, RESUMABLE
from amclr.cli.messages import fail, of_system
from amclr.utils.errors import UserError, did_you_mean, require

USAGE = """usage: amclr COMMAND [OPTIONS]

Train your own image-text dual encoder with small batches on modest hardware.

commands:
{commands}

Run amclr COMMAND --help for the options of a command.

first steps:
  amclr train                                       train on generated scenes, in minutes
  amclr inspect --data FOLDER                       look at your captioned images
  amclr paraphrase FOLDER                           one caption per image? paraphrase them with a language model
  amclr train --data FOLDER                         train on your images
  amclr evaluate runs/RUN --zeroshot CLASS_FOLDERS  measure the result
  amclr compare EXPERIMENT.yaml --seeds 5           compare objectives, or any other settings
  amclr export runs/RUN --to onnx                   use the model without this library
  amclr index runs/RUN FOLDER --out INDEX           make images searchable
  amclr search INDEX "a dog on the beach"           search them
  amclr serve INDEX                                 search them in the browser"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `amclr` and return its exit code: 0 done, 1 failed, 2 unknown command, 128 + n stopped by signal n."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["help"]
    if name in ("-h", "--help", "help"):
        summaries = {name: (command.__doc__ or "").partition("\n")[0] for name, command in COMMANDS.items()}
        print(USAGE.format(commands="\n".join(f"  {name:10} {summary}" for name, summary in summaries.items())))
        return 0
    if name in ("-V", "--version"):
        from amclr import __version__

        print(f"amclr {__version__}")
        return 0
    if name not in COMMANDS:
        return fail(f"unknown command '{name}': {did_you_mean(name, COMMANDS)}", 2)
    try:
        require("this command", "train", "jsonargparse", "lightning", "timm", "transformers", "torchvision")
        from amclr.cli.parsing import parse

        return COMMANDS[name](**parse(COMMANDS[name], rest)) or 0
    except UserError as error:
        return fail(str(error), 1)
    except KeyboardInterrupt as error:
        resumable = COMMANDS[name] in RESUMABLE
        advice = "; finished batches are kept: rerun the same command to resume" if resumable else ""
        return fail(f"interrupted{advice}", 128 + getattr(error, "signum", 2))
    except OSError as error:
        return fail(of_system(error), 1)
