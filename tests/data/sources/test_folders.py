"""Folders by class, and the lists of splits in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from amclr.data.sources import folders
from amclr.utils.errors import UserError
from tests.data.manifest.test_loading import read


def test_split_lists(folder: Path) -> None:
    names = (folder / "val.txt").read_text().split()
    (folder / "val.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(f" {n} " for n in names).encode() + b"\r\n\r\n")
    assert read(folder).splits["val"] == set(names), "a mark of byte order, Windows line ends and spaces do not count"
    (folder / "val.txt").write_text("\n".join(n.removesuffix(".png") for n in names))
    with pytest.raises(UserError, match=r"none of the 8 names in '.*val.txt' has a usable caption, such as '000'"):
        read(folder)
    (folder / "val.txt").write_bytes("caf\xe9.png\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"'.*val.txt' is not UTF-8 text .*: save it as UTF-8"):
        read(folder)


def test_class_folders(tmp_path: Path) -> None:
    for wnid, count in (("n02", 2), ("n01", 1), ("n03", 0)):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "val" / wnid / f"{k}.png")
    (tmp_path / "classnames.txt").write_text("n01\ttench, Tinca tinca\nn02\tgoldfish\n")
    paths, labels, names = folders.class_folders(tmp_path / "val")
    assert (
        names == ["tench", "goldfish"]
        and labels == [0, 1, 1]
        and [p.parent.name for p in paths] == ["n01", "n02", "n02"]
    )
    (tmp_path / "classnames.txt").write_bytes("n01\tcaf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="classnames.txt' is not UTF-8 text"):
        folders.class_folders(tmp_path / "val")
    with pytest.raises(UserError, match="needs a folder with one folder per class"):
        folders.class_folders(tmp_path / "absent")
    with pytest.raises(UserError, match="expected .*CLASS/IMAGE.jpg"):
        folders.class_folders(tmp_path / "val" / "n01")
