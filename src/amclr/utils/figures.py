"""Figures of runs, data sets and comparisons. They draw what they are given, and know nothing of models or runs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# Okabe and Ito's palette, which can be distinguished with any colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
VARIANTS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000", "#808080")
MARKERS, DASHES = "osD^vP*Xh<>d", ("-", "--", ":", "-.")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
}


def _pyplot() -> Any:
    """Matplotlib, which is slow to import, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # captions are text, dollar signs included
    return plt


def curves(rows: Sequence[dict[str, Any]], file: Path, title: str, chance: float) -> None:
    """Draw the loss and the validation recall of a run by epoch, and zero-shot accuracy if it was monitored."""
    plt = _pyplot()
    steps = [r for r in rows if r["kind"] == "train"]
    evals = [r for r in rows if r["kind"] == "eval"]
    monitored = [r for r in evals if "zeroshot_top1" in r]
    with plt.rc_context(STYLE):
        panels = 3 if monitored else 2
        figure, (left, right, *more) = plt.subplots(1, panels, figsize=(4.75 * panels, 3.6), layout="constrained")
        for panel in more:
            start = monitored[-1]["zeroshot_top1_start"]
            epochs, tops = zip((0.0, start), *((r["epoch"], r["zeroshot_top1"]) for r in monitored), strict=True)
            panel.plot(epochs, tops, marker="D", markersize=4, color=PURPLE, label="weights kept")
            panel.axhline(start, color="0.5", linestyle="--", linewidth=1, label=f"at the start {start:.1f} %")
            panel.set(xlabel="epoch", ylabel="top-1 (%)", title="Zero-shot accuracy")
            panel.set_ylim(bottom=0)
            panel.legend(frameon=False)
        if steps:
            x = np.array([r["epoch"] for r in steps])
            y = np.array([r["loss"] for r in steps])
            width = len(y) // 25
            left.plot(x, y, color=BLUE, alpha=0.3 if width > 1 else 1, linewidth=1.2, label="every tenth step")
            if width > 1:
                smooth = np.convolve(y, np.ones(width) / width, mode="valid")
                left.plot(x[width - 1 :], smooth, color=BLUE, linewidth=2, label="running mean")
            left.legend(frameon=False)
        left.set(xlabel="epoch", ylabel="training loss", title="Objective")
        if evals:
            x = np.array([r["epoch"] for r in evals])
            for key, label, colour, marker in (
                ("txt_r_mean", "text retrieval", ORANGE, "o"),
                ("img_r_mean", "image retrieval", GREEN, "s"),
            ):
                right.plot(x, [r[key] for r in evals], marker=marker, markersize=4, color=colour, label=label)
            right.axhline(chance, color="0.5", linestyle="--", linewidth=1, label=f"chance {chance:.1f} %")
            right.set_ylim(bottom=0)
            right.legend(frameon=False)
        right.set(xlabel="epoch", ylabel="mean of R@1, R@5, R@10 (%)", title="Validation recall")
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def interpolation(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Draw measures of weights interpolated between the initial and the trained ones (WiSE-FT).

    rows: `wise`, and r_mean, zeroshot_top1 or both, in percent. With both, a second panel plots one against the other.
    """
    plt = _pyplot()
    rows = sorted(rows, key=lambda row: float(row["wise"]))
    x = [row["wise"] for row in rows]
    measures = [
        (key, label, colour, marker)
        for key, label, colour, marker in (
            ("txt_r_mean", "text retrieval", ORANGE, "o"), ("img_r_mean", "image retrieval", GREEN, "s"),
            ("zeroshot_top1", "zero-shot top-1", PURPLE, "D"),
        )
        if key in rows[0]
    ]  # fmt: skip
    both = len(measures) == 3
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 1 + both, figsize=(5.2 + 4.4 * both, 3.8), layout="constrained", squeeze=False
        )  # fmt: skip
        panel = axes[0, 0]
        for key, label, colour, marker in measures:
            panel.plot(x, [row[key] for row in rows], marker=marker, markersize=5, color=colour, label=label)
        panel.set(xlabel="share of the way (0 start, 1 trained)", ylabel="%", title="Weight interpolation")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
        if both:
            other = axes[0, 1]
            points = [(row["r_mean"], row["zeroshot_top1"]) for row in rows]
            other.plot(*zip(*points, strict=True), marker="o", markersize=5, color=BLUE)
            for share, point in zip(x, points, strict=True):
                other.annotate(f"{share:g}", point, xytext=(5, 5), textcoords="offset points", fontsize=9)
            other.margins(0.12)
            other.set(xlabel="retrieval: mean recall (%)", ylabel="zero-shot top-1 (%)", title="Trade-off")
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def gallery(
    queries: Sequence[str], hits: Sequence[Sequence[tuple[Tensor, float, bool]]], file: Path, title: str
) -> None:
    """Draw captions and the images that they find, best first, with a frame around the right one.

    hits[q]: (image uint8 (3, S, S), cosine similarity, whether it is the caption's image) per rank.
    """
    plt = _pyplot()
    columns = len(hits[0])
    with plt.rc_context({"font.size": 9}):
        figure = plt.figure(figsize=(2.6 + 1.35 * columns, 0.5 + 1.55 * len(queries)))
        grid = figure.add_gridspec(
            len(queries), columns + 2, left=0.01, right=0.99, bottom=0.01, top=1 - 0.45 / (0.5 + 1.55 * len(queries)),
            hspace=0.22, wspace=0.08,
        )  # fmt: skip
        for q, query in enumerate(queries):
            cell = figure.add_subplot(grid[q, :2])
            cell.axis("off")
            cell.text(0.02, 0.5, "\n".join(textwrap.wrap(query, 30)[:6]), va="center", ha="left", fontsize=9.5)
            for k, (image, score, right) in enumerate(hits[q]):
                cell = figure.add_subplot(grid[q, k + 2])
                cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="antialiased")
                cell.set(xticks=[], yticks=[])
                mark = "✓ " if right else ""
                cell.set_title(f"{mark}{score:.2f}", fontsize=8, pad=2, color=GREEN if right else "0.35",
                               fontweight="bold" if right else "normal")  # fmt: skip
                for side in cell.spines.values():
                    side.set(color=GREEN if right else "0.8", linewidth=3.5 if right else 0.6)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, y=0.995, va="top")
        figure.savefig(file, dpi=110)
        plt.close(figure)


def results(hits: Sequence[tuple[Tensor, str]], file: Path, title: str) -> None:
    """Draw the results of a query, best first. hits: (image uint8 (3, H, W), the text above it) each."""
    plt = _pyplot()
    across = min(6, max(3, len(hits)))
    rows = max(1, -(-len(hits) // across))
    height = 0.5 + 1.75 * rows
    with plt.rc_context({"font.size": 9}):
        figure = plt.figure(figsize=(1.75 * across, height))
        grid = figure.add_gridspec(rows, across, left=0.01, right=0.99, bottom=0.01, top=1 - 0.55 / height,
                                   hspace=0.16, wspace=0.05)  # fmt: skip
        for n, (image, text) in enumerate(hits):
            cell = figure.add_subplot(grid[n // across, n % across])
            cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="antialiased")
            cell.axis("off")
            cell.set_title(text if len(text) < 25 else f"{text[:22]}...", fontsize=7.5, pad=2, color="0.3")
        if not hits:
            figure.text(0.5, 0.4, "nothing found", ha="center", color="0.4")
        figure.suptitle(textwrap.shorten(title, 90), x=0.01, ha="left", fontsize=11, y=0.995, va="top")
        figure.savefig(file, dpi=110)
        plt.close(figure)


def contact_sheet(cards: Sequence[tuple[Sequence[tuple[str, Tensor]], str, str]], file: Path, title: str) -> None:
    """Draw samples: on each card, named images side by side, with the caption and its second view below.

    cards: ((name, uint8 (3, S, S)) per image, caption, second view) per sample.
    """
    plt = _pyplot()
    across = 2
    rows = -(-len(cards) // across)
    views = max(len(images) for images, _, _ in cards)
    with plt.rc_context({"font.size": 8}):
        height = 0.45 + 2.35 * rows
        figure = plt.figure(figsize=(across * (1.55 * views + 0.3), height))
        grid = figure.add_gridspec(rows, across, left=0.01, right=0.99, bottom=0.01, top=1 - 0.4 / height,
                                   hspace=0.12, wspace=0.06)  # fmt: skip
        for n, (images, text, second) in enumerate(cards):
            inner = grid[n // across, n % across].subgridspec(
                2, views, height_ratios=(2.4, 1), hspace=0.02, wspace=0.05
            )
            for k, (name, image) in enumerate(images):
                cell = figure.add_subplot(inner[0, k])
                cell.imshow(image.permute(1, 2, 0).numpy(), interpolation="antialiased")
                cell.set(xticks=[], yticks=[])
                cell.set_title(name, fontsize=7.5, pad=2, color="0.3")
            cell = figure.add_subplot(inner[1, :])
            cell.axis("off")
            wrap = 22 * views
            lines = textwrap.wrap(text, wrap)[:2], textwrap.wrap(second, wrap)[:2]
            cell.text(0, 0.95, "\n".join(lines[0]), va="top", fontsize=8)
            cell.text(0, 0.42, "\n".join(lines[1]), va="top", fontsize=8, color=BLUE, style="italic")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, y=0.997, va="top")
        figure.savefig(file, dpi=110)
        plt.close(figure)


def caption_statistics(
    words: np.ndarray, tokens: np.ndarray | None, cut: int, counts: np.ndarray, file: Path, title: str
) -> None:
    """Draw the lengths of captions and the frequencies of words.

    words: per caption (T,); tokens: per caption, or None; cut: how many tokens the text tower sees at most; counts:
    occurrences of each word, most frequent first.
    """
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
        top = int(max(np.quantile(words, 0.999), np.quantile(tokens, 0.999) if tokens is not None else 0, 2))
        edges = np.arange(0.5, top + 1.5, max(1, top // 60))
        left.hist(words, edges, weights=np.full(len(words), 100 / len(words)), color=BLUE, alpha=0.75, label="words")
        if tokens is not None:
            left.hist(tokens, edges, weights=np.full(len(tokens), 100 / len(tokens)), color=ORANGE, histtype="step",
                      linewidth=1.8, label="tokens")  # fmt: skip
            if cut <= top:
                left.axvline(cut, color="0.3", linestyle="--", linewidth=1, label=f"cut at {cut} tokens")
        left.set(xlabel="length of a caption", ylabel="captions (%)", title="Lengths")
        left.set_ylim(0, 1.2 * left.get_ylim()[1])
        left.legend(frameon=False, ncols=3, loc="upper center", columnspacing=1.2, handlelength=1.4)
        right.loglog(np.arange(1, len(counts) + 1), np.maximum(counts, 1), color=GREEN, linewidth=2)
        right.set(xlabel="word, most frequent first", ylabel="occurrences", title="Words: the long tail")
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def _names(keys: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The variants and the groups, without duplicates, in order."""
    return list(dict.fromkeys(v for v, _ in keys)), list(dict.fromkeys(g for _, g in keys))


def points(
    panels: Sequence[tuple[str, Mapping[tuple[str, str], Sequence[float]]]], file: Path, title: str, label: str,
    legend: str = "",
) -> None:  # fmt: skip
    """Draw measures of variants: the mean with its standard deviation, and every value as a small dot.

    panels: title, and (variant, group) -> values. label: that of the values; legend: the title of the groups.
    """
    plt = _pyplot()
    variants, groups = _names([key for _, cells in panels for key in cells])
    rows = len(variants) * max(1.0, 0.62 * len(groups))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(1.4 + 3.1 * len(panels), 1.5 + 0.34 * rows), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for panel, (name, cells) in zip(axes[0], panels, strict=True):
            for k, group in enumerate(groups):
                colour, marker = VARIANTS[k % len(VARIANTS)], MARKERS[k % len(MARKERS)]
                shift = 0.64 * ((k + 0.5) / len(groups) - 0.5)
                for y, variant in enumerate(variants):
                    values = cells.get((variant, group), ())
                    if not len(values):
                        continue
                    sd = np.std(values, ddof=1) if len(values) > 1 else 0.0
                    below = [y + shift + 0.16 / len(groups)] * len(values)  # where the whiskers do not hide them
                    panel.scatter(values, below, s=16, color=colour, alpha=0.5, linewidths=0)
                    panel.errorbar(np.mean(values), y + shift, xerr=sd, color=colour, marker=marker, markersize=6,
                                   capsize=3, linewidth=1.6)  # fmt: skip
                if len(groups) > 1:
                    panel.plot([], [], color=colour, marker=marker, label=group)
            panel.set(xlabel=label, title=name, yticks=range(len(variants)), yticklabels=variants)
            panel.margins(x=0.08)
            panel.xaxis.set_major_locator(plt.MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes[0, 0].set_ylim(len(variants) - 0.4, -0.6)
        if len(groups) > 1:
            handles, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(handles, labels, title=legend, frameon=False, loc="outside right upper")
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def many_curves(
    groups: Mapping[str, Mapping[str, tuple[Sequence[float], np.ndarray]]], file: Path, title: str, label: str,
    across: str = "epoch",
) -> None:  # fmt: skip
    """Draw learning curves of variants, a panel per group: the mean over runs, plus and minus one standard deviation.

    groups: group -> variant -> x (E,), epochs or what `across` says, and values (runs, E).
    """
    plt = _pyplot()
    variants, _ = _names([(v, g) for g, by_variant in groups.items() for v in by_variant])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(groups), figsize=(1.9 + max(5.6, 3.9 * len(groups)), 3.8), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for panel, (group, by_variant) in zip(axes[0], groups.items(), strict=True):
            for variant, (x, values) in by_variant.items():
                k = variants.index(variant)
                colour, mean = VARIANTS[k % len(VARIANTS)], values.mean(axis=0)
                panel.plot(x, mean, color=colour, linestyle=DASHES[k // len(VARIANTS) % len(DASHES)],
                           marker=MARKERS[k % len(MARKERS)], markersize=4, linewidth=1.5, label=variant)  # fmt: skip
                if len(values) > 1:
                    sd = values.std(axis=0, ddof=1)
                    panel.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)
            panel.set(xlabel=across, title=group)
            panel.xaxis.set_major_locator(plt.MaxNLocator(6, steps=[1, 2, 5, 10], integer=across == "epoch"))
        axes[0, 0].set(ylabel=label)
        handles = {t: h for panel in axes[0] for h, t in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, frameon=False, loc="outside right center")
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def cost(
    cells: Sequence[tuple[str, str, Sequence[tuple[float, float, float]]]], file: Path, title: str, label: str,
    legend: str = "",
) -> None:  # fmt: skip
    """Draw the cost of runs against their quality, with the spread of both.

    cells: variant, group, and (encoder passes, seconds, quality) per run.
    """
    plt = _pyplot()
    variants, groups = _names([(v, g) for v, g, _ in cells])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.8, 3.9), sharey=True, layout="constrained")
        most = max(passes for _, _, runs in cells for passes, _, _ in runs) / 1e3
        longest = max(seconds for _, _, runs in cells for _, seconds, _ in runs)

        def style(v: int, g: int) -> dict[str, Any]:
            marker, colour = MARKERS[(g if len(groups) > 1 else v) % len(MARKERS)], VARIANTS[v % len(VARIANTS)]
            return {"linestyle": "", "marker": marker, "color": colour, "markersize": 6,
                    "markerfacecolor": colour if v < len(VARIANTS) else "white"}  # fmt: skip

        for variant, group, runs in cells:
            v, g = variants.index(variant), groups.index(group)
            passes, seconds, quality = np.array(runs).T
            # Many variants have the same passes, and would hide each other.
            offset = 0.025 * most * (v - (len(variants) - 1) / 2)
            for panel, x, shift in zip(axes, (passes / 1e3, seconds), (offset, 0), strict=True):
                spread = [np.std(a, ddof=1) if len(a) > 1 else 0.0 for a in (x, quality)]
                panel.errorbar(x.mean() + shift, quality.mean(), xerr=spread[0] or None, yerr=spread[1] or None,
                               capsize=2, linewidth=1.2, **style(v, g))  # fmt: skip
        for v, variant in enumerate(variants):
            axes[0].plot([], [], **style(v, 0), label=variant)
        for g, group in enumerate(groups if len(groups) > 1 else ()):
            axes[0].plot([], [], **{**style(0, g), "color": "0.4", "markerfacecolor": "0.4"}, label=f"{legend} {group}")
        axes[0].set(xlabel="encoder passes (thousands)\nside by side where equal", ylabel=label)
        axes[0].set_xlim(0, 1.25 * most)
        axes[1].set_xlim(0, 1.15 * longest)
        axes[1].set(xlabel="seconds of training")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
        figure.suptitle(title)
        figure.savefig(file, dpi=110)
        plt.close(figure)
