"""Tables of captions: encodings, column names, bad rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from amclr.utils.errors import UserError
from tests.conftest import make_folder
from tests.data.manifest.test_loading import prepared, read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(folder: Path, encoding: str) -> None:
    file = folder / "captions.txt"
    file.write_bytes((file.read_text() + "001.png,un café\n").encode(encoding))
    found = read(folder, encoding="latin-1" if encoding == "latin-1" else "utf-8")
    assert not found.rejects and "un café" in found.samples[1].captions


def test_a_file_in_another_encoding_says_which_option_to_give(folder: Path) -> None:
    file = folder / "captions.txt"
    file.write_bytes(file.read_text().replace("patch", "caché").encode("latin-1"))
    with pytest.raises(UserError, match="--source.encoding latin-1"):
        prepared(folder, 0.02)
    with pytest.raises(UserError, match="unknown encoding 'klingon'"):
        read(folder, encoding="klingon")


@pytest.mark.parametrize(
    ("written", "given", "message"),
    [
        ("utf-16", "utf-8", r"not utf-16 text \(truncated data\): give the right --source.encoding"),
        ("utf-16-le", "utf-8", "try --source.encoding utf-16-le"),
        ("utf-8", "punycode", "--source.encoding"),
    ],
)
def test_files_that_no_decoder_gets_through(folder: Path, written: str, given: str, message: str) -> None:
    file = folder / "captions.txt"
    file.write_bytes(file.read_text().encode(written) + b"x")  # for UTF-16 half a character
    with pytest.raises(UserError, match=message):
        read(folder, encoding=given)


def test_columns_by_other_names_and_tabs(folder: Path) -> None:
    rows = [r.split(",") for r in (folder / "captions.txt").read_text().splitlines()[1:]]
    (folder / "captions.txt").unlink()
    table = ["Title\tFile_Name\tid"] + [f"{caption}\t{name}\t{k}" for k, (name, caption) in enumerate(rows)]
    (folder / "captions.tsv").write_text("\n".join(table) + "\n")
    assert len(read(folder).samples) == 40
    (folder / "captions.tsv").write_text("\n".join(["words\tphotograph\tid", *table[1:]]) + "\n")
    with pytest.raises(
        UserError, match=r"no column 'image': it has 'words', 'photograph', 'id'.*--source.image_column"
    ):
        read(folder)
    assert len(read(folder, image_column="photograph", caption_column="words").samples) == 40


def test_paraphrase_column(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "patches", lists=False)
    (folder / "captions.txt").write_text("image,caption,paraphrase\n001.png,a dog,one dog\n001.png,a dog,a hound\n")
    (sample,) = read(folder).samples
    assert sample.captions == ("a dog",) and sample.paraphrases == (("one dog", "a hound"),)
