"""Results of evaluations as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amclr.data.sources.rows import printable
from amclr.evaluation import metrics

SIDES = {"txt": "text retrieval", "img": "image retrieval"}
RECALL_HEADER = f"{'':18}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>8}{'median rank':>14}"


def format_results(results: dict[str, Any]) -> str:
    """What `amclr.evaluation.run.evaluate_run` or a training run found, as tables."""
    if "wise" in results:
        return _interpolation_table(results)
    parts = [_retrieval_table(results)] if "r_mean" in results else []
    parts += [_paraphrased_table(results["paraphrased"])] if "paraphrased" in results else []
    parts += [_zeroshot_table(results)] if "zeroshot_top1" in results else []
    parts += [_zeroshot_sets_table(results["zeroshot_sets"])] if "zeroshot_sets" in results else []
    return "\n\n".join(parts)


def _retrieval_table(results: dict[str, Any]) -> str:
    left_out = f", {results['rejects']} left out" if results.get("rejects") else ""
    lines = [f"{results['split']} split: {results['images']} images, {results['captions']} captions{left_out}"]
    lines += [RECALL_HEADER, *(_recall_line(results, side, name) for side, name in SIDES.items())]
    chances = metrics.chance_recalls(results["images"])
    lines.append(f"{'chance (image)':18}" + _columns([*chances, float(np.mean(chances))])
                 + f"{(results['images'] + 1) / 2:14.0f}")  # fmt: skip
    if folds := results.get("folds"):
        size = results["images"] / folds["count"]
        lines += ["", f"means over {folds['count']} folds of {size:g} images"]
        lines += [RECALL_HEADER, *(_recall_line(folds, side, name) for side, name in SIDES.items())]
    return "\n".join(lines)


def _recall_line(recalls: dict[str, Any], side: str, name: str) -> str:
    values = [recalls[f"{side}_r{k}"] for k in metrics.RECALLS] + [recalls[f"{side}_r_mean"]]
    return f"{name:18}{_columns(values)}{recalls[f'{side}_median_rank']:14.0f}"


def _columns(values: Sequence[float]) -> str:
    return "".join(f"{v:8.1f}" for v in values)


def _paraphrased_table(results: dict[str, Any]) -> str:
    total = results["captions"] + results["without"]
    left_out = f", {results['without']} without one left out" if results["without"] else ""
    lines = [f"paraphrased by {printable(results['by'])}: {results['captions']} of {total} captions{left_out}"]
    lines += [RECALL_HEADER]
    as_is, paraphrased = results["as_is"], results["paraphrased"]
    drop = {name: as_is[name] - paraphrased[name] for name in as_is}
    for side, name in SIDES.items():
        lines += [_recall_line(as_is, side, name), _recall_line(paraphrased, side, "  paraphrased")]
        lines += [_recall_line(drop, side, "  drop")]
    lines.append(
        f"images that a caption and its paraphrase find: {results['overlap']:.1f} % of the first {results['places']} "
        f"in common, rank-biased overlap {results['rbo']:.3f} (p = {metrics.RBO_PERSISTENCE})"
    )
    return "\n".join(lines)


def _interpolation_table(results: dict[str, Any]) -> str:
    names = {"txt_r_mean": "text retr.", "img_r_mean": "image retr.", "r_mean": "mean", "zeroshot_top1": "top-1"}
    columns = {key: name for key, name in names.items() if key in results["wise"][0]}
    lines = [f"{'wise (0 start, 1 trained)':26}" + "".join(f"{name:>13}" for name in columns.values())]
    for row in results["wise"]:
        lines.append(f"{row['wise']:<26g}" + "".join(f"{row[key]:13.1f}" for key in columns))
    return "\n".join([*lines, "", f"curves: {results['curves']}"])


def _zeroshot_table(results: dict[str, Any]) -> str:
    classes, tops = results["zeroshot_classes"], [k for k in metrics.TOPS if f"zeroshot_top{k}" in results]
    return "\n".join([
        f"zero-shot: {results['zeroshot_images']} images, {classes} classes",
        f"{'':18}" + "".join(f"{f'top-{k}':>8}" for k in tops) + f"{'per class':>12}",
        f"{'accuracy':18}" + _columns([results[f"zeroshot_top{k}"] for k in tops])
        + f"{results['zeroshot_class_recall']:12.1f}",
        f"{'chance':18}" + _columns([100 * min(1, k / classes) for k in tops]) + f"{100 / classes:12.1f}",
        *_about(results),
    ])  # fmt: skip


def _zeroshot_sets_table(sets: dict[str, dict[str, Any]]) -> str:
    width = max(18, *(len(printable(label)) + 2 for label in sets))
    header = "".join(f"{f'top-{k}':>8}" for k in metrics.TOPS)
    lines = [f"{'zero-shot':{width}}{'images':>10}{'classes':>9}{header}{'per class':>12}"]
    for label, results in sets.items():
        tops = [f"{results[k]:.1f}" if k in results else "–" for k in (f"zeroshot_top{k}" for k in metrics.TOPS)]
        lines.append(
            f"{printable(label):{width}}{results['zeroshot_images']:10}{results['zeroshot_classes']:9}"
            + "".join(f"{top:>8}" for top in tops) + f"{results['zeroshot_class_recall']:12.1f}"
        )  # fmt: skip
    about = [f"{printable(label)}: {line}" for label, results in sets.items() for line in _about(results)]
    return "\n".join([*lines, *about])


def _about(results: dict[str, Any]) -> list[str]:
    """Which names and prompts were used, how many images were left out, and what to install for other prompts."""
    left_out = f"; {results['zeroshot_rejects']} images left out" if results["zeroshot_rejects"] else ""
    lines = [f"{results['zeroshot_about']}{left_out}", results["zeroshot_advice"]]
    return [printable(line) for line in lines if line]
