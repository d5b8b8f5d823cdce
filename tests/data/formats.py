"""Writers of one captioned set in every format that is read; genuinely apart from the readers."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """An image of a set: its name, its file's bytes, captions, split."""

    name: str
    content: bytes
    captions: tuple[str, ...]
    split: str


def items_of(folder: Path) -> list[Item]:
    """The items of a folder in the Kaggle Flickr8k layout with train and val lists."""
    captions: dict[str, list[str]] = {}
    with (folder / "captions.txt").open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            captions.setdefault(row["image"], []).append(row["caption"])
    split = {n: s for s in ("train", "val") for n in (folder / f"{s}.txt").read_text().split("\n") if n}
    return [
        Item(name, (folder / "Images" / name).read_bytes(), tuple(texts), split[name])
        for name, texts in captions.items()
        if name in split
    ]


def _images(root: Path, items: Sequence[Item], folder: str) -> None:
    (root / folder).mkdir(parents=True)
    for item in items:
        (root / folder / item.name).write_bytes(item.content)


def _lists(root: Path, items: Sequence[Item]) -> None:
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("".join(f"{i.name}\n" for i in items if i.split == split))


def write_csv(root: Path, items: Sequence[Item]) -> Path:
    _images(root, items, "Images")
    _lists(root, items)
    with (root / "captions.txt").open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["image", "caption"])
        table.writerows([i.name, c] for i in items for c in i.captions)
    return root


def write_tsv(root: Path, items: Sequence[Item]) -> Path:
    """Other column names, a split column, rows in another order, absolute paths."""
    _images(root, items, "images")
    with (root / "metadata.tsv").open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, delimiter="\t")
        table.writerow(["Title", "split", "filepath"])
        table.writerows(
            [c, i.split, str((root / "images" / i.name).resolve())] for i in reversed(items) for c in i.captions
        )
    return root / "metadata.tsv"


def write_jsonl(root: Path, items: Sequence[Item]) -> Path:
    _images(root, items, "images")
    rows = [{"file_name": f"images/{i.name}", "captions": i.captions, "split": i.split} for i in items]
    (root / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def write_json(root: Path, items: Sequence[Item]) -> Path:
    """The paper's list: an entry per caption."""
    _images(root, items, "images")
    _lists(root, items)
    rows = [
        {"image": f"./images/{i.name}", "caption": c, "image_id": n} for n, i in enumerate(items) for c in i.captions
    ]
    (root / "captions.json").write_text(json.dumps(rows))
    return root


def write_coco(root: Path, items: Sequence[Item]) -> Path:
    _images(root, items, "images")
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        own = [(n, i) for n, i in enumerate(items) if i.split == split]
        notes = [{"image_id": n, "id": 7 * n + k, "caption": c} for n, i in own for k, c in enumerate(i.captions)]
        data = {"info": {}, "images": [{"id": n, "file_name": i.name} for n, i in own], "annotations": notes}
        (root / "annotations" / f"captions_{split}2014.json").write_text(json.dumps(data))
    return root


def write_karpathy(root: Path, items: Sequence[Item]) -> Path:
    _images(root, items, "images")
    images = [
        {"filename": i.name, "split": "restval" if n % 2 and i.split == "train" else i.split, "imgid": n,
         "sentences": [{"raw": c, "tokens": c.split()} for c in i.captions]}
        for n, i in enumerate(items)
    ]  # fmt: skip
    (root / "dataset_flickr8k.json").write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    return root


def write_parquet(root: Path, items: Sequence[Item]) -> Path:
    """Bytes with their name, in two files by split, as the Hub converts data sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    for split, called in (("train", "train"), ("val", "validation")):
        rows = [
            {"image": {"bytes": i.content, "path": i.name}, "caption": list(i.captions)}
            for i in items
            if i.split == split
        ]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{called}-00000-of-00001.parquet", row_group_size=7)
    return root


def write_parquet_rows(root: Path, items: Sequence[Item]) -> Path:
    """Plain bytes, a row per caption, the name in a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    _lists(root, items)
    rows = [{"image": i.content, "text": c, "filename": i.name} for i in items for c in i.captions]
    pq.write_table(pa.Table.from_pylist(rows), root / "captions.parquet")
    return root


def write_parquet_paths(root: Path, items: Sequence[Item]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _images(root, items, "images")
    rows = [{"path": i.name, "caption": list(i.captions), "split": i.split} for i in items]
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    return root


def write_parquet_numbered(root: Path, items: Sequence[Item]) -> Path:
    """A column per caption, as some sets of the Hub have it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    rows = [
        {"image": {"bytes": i.content, "path": i.name}, "split": i.split, "id": n, "caption_9": "",
         **{f"caption_{k}": c for k, c in enumerate(i.captions)}}
        for n, i in enumerate(items)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "all.parquet")
    return root


def tar_of(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_tars(root: Path, items: Sequence[Item], per_shard: int = 13) -> Path:
    root.mkdir(parents=True)
    _lists(root, items)
    for k, start in enumerate(range(0, len(items), per_shard)):
        members = []
        for item in items[start : start + per_shard]:
            stem, _, suffix = item.name.partition(".")
            members.append((f"{stem}.{suffix}", item.content))
            members.append((f"{stem}.json", json.dumps({"captions": item.captions}).encode()))
        tar_of(root / f"shard-{k:06d}.tar", members)
    return root


def write_tars_by_split(root: Path, items: Sequence[Item]) -> Path:
    """A folder per split, a text member per caption, given as a pattern."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        members = []
        for item in (i for i in items if i.split == split):
            stem, _, suffix = item.name.partition(".")
            members += [(f"{stem}.{k}.txt", c.encode()) for k, c in enumerate(item.captions)]
            members.append((f"{stem}.{suffix}", item.content))
            members.append((f"{stem}.pkl", b"cos\nsystem\n(S'touch owned'\ntR."))
        tar_of(root / split / "000.tar", members)
    return Path(f"{root}/{{train,val}}/*.tar")


def write_saved_dataset(root: Path, items: Sequence[Item]) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))})
    parts = {}
    for split, called in (("train", "train"), ("val", "validation")):
        rows = [i for i in items if i.split == split]
        data = {
            "image": [{"bytes": i.content, "path": i.name} for i in rows],
            "caption": [list(i.captions) for i in rows],
        }
        parts[called] = datasets.Dataset.from_dict(data, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


WRITERS: dict[str, Callable[[Path, Sequence[Item]], Path]] = {
    f.__name__.removeprefix("write_"): f
    for f in (
        write_csv, write_tsv, write_jsonl, write_json, write_coco, write_karpathy, write_parquet, write_parquet_rows,
        write_parquet_paths, write_parquet_numbered, write_tars, write_tars_by_split, write_saved_dataset,
    )
}  # fmt: skip


def copy_to(root: Path, target: Path) -> Path:
    return Path(shutil.copytree(root, target))
