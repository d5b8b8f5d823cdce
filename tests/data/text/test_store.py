"""Stores of paraphrases: those that people write, those of `amclr paraphrase`, and how they meet the captions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.images.decode import Location
from amclr.data.text.store import Store, attach, find_store, read_store
from amclr.data.text.version import ParaphrasedCaption, Version, sample_sheet
from amclr.inspection.dataset import inspect
from amclr.utils.errors import UserError

SETTINGS = {"model": "rules", "k": 2}


def written(store: Path, texts: dict[str, tuple[str, ...]], **settings: object) -> Version:
    """A complete version, as `amclr paraphrase` leaves it."""
    version = Version(store, SETTINGS | settings)
    version.append([ParaphrasedCaption(c, p, {"same": 1}) for c, p in texts.items()])
    version.finish()
    return version


# -- what people write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'caption,paraphrase\n"a dog, wet",a wet dog\na cat,one cat\n"a dog, wet",dog that is wet\n'),
        ("p.csv", '\ufeffid,Paraphrase,Caption\n1,a wet dog,"a  dog, wet"\n2,one cat,a cat\n3,dog that is wet,"a dog, wet"\n'),
        ("p.tsv", "caption\tparaphrase\na dog, wet\ta wet dog\na cat\tone cat\na dog, wet\tdog that is wet\n"),
        ("p.jsonl", '{"caption": "a dog, wet", "paraphrase": "a wet dog"}\n\n{"caption": "a cat", "paraphrase": "one cat"}\n'
                    '{"caption": "a dog,\\twet", "paraphrases": ["dog that is wet", "a wet dog"]}\n'),
    ],
)  # fmt: skip
def test_tables_that_people_write(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_store(tmp_path / name)
    assert found.texts == {"a dog, wet": ("a wet dog", "dog that is wet"), "a cat": ("one cat",)}
    assert found.rows == 3 and not found.rejects and found.version == ""
    assert found.of(" a dog,  wet\n") == ("a wet dog", "dog that is wet") and found.of("a fox") == ()


def test_rows_that_cannot_be_used_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_bytes(
        b"caption,paraphrase\na,one\nb\nc,\n,two\nd,three,four\ne,caf\xe9\nf," + b"x" * 2_000_000 + b"\ng,five\n"
    )
    found = read_store(file)
    assert found.texts == {"a": ("one",), "g": ("five",)} and found.rows == 8
    reasons = {r.line: r.reason for r in found.rejects}
    assert reasons[3] == "row has 1 columns: expected 2" and reasons[4] == "empty paraphrase"
    assert reasons[5] == "empty caption" and reasons[6] == "row has 3 columns: expected 2"
    assert reasons[7] == "paraphrase is not valid Unicode"
    assert reasons[8] == "paraphrase of 2000000 characters: over the limit of 20000" and len(reasons) == 6

    lines = tmp_path / "p.jsonl"
    rows = ['{"caption": "a", "paraphrase": "one"}', "{", "[]", '{"caption": "b"}', '{"caption": 3, "paraphrase": "x"}',
            '{"caption": "c", "paraphrase": ["x", 4]}', '{"caption": "d", "paraphrase": "\\ud83d"}', "[" * 100_000,
            json.dumps({"caption": "e", "paraphrase": "y" * 9_000_000}), '{"caption": "f", "paraphrase": "two"}']  # fmt: skip
    lines.write_text("\n".join(rows) + "\n")
    found = read_store(lines)
    assert found.texts == {"a": ("one",), "f": ("two",)} and found.rows == 10
    assert [r.line for r in found.rejects] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found.rejects[7].reason == "row of more than 4194304 characters"


def test_a_huge_field_of_a_csv_loses_no_row_silently(tmp_path: Path) -> None:
    """Longer than any line that is read at once, and than the largest field that the reader takes."""
    file = tmp_path / "p.csv"
    file.write_text(f'caption,paraphrase\na,one\nb,"{"x" * 20_000_000}"\nc,three\n')
    found = read_store(file)
    assert found.of("a") == ("one",) and found.rejects and "field larger" in found.rejects[0].reason
    assert found.of("c") == ("three",) or any(r.line == 4 for r in found.rejects)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(
        b"caption,paraphrase\na,<script>alert(1)</script>\nb,nul\0 and \x1b[31mred\nc,=cmd()\n"
    )
    found = read_store(tmp_path / "p.csv").texts
    assert found == {"a": ("<script>alert(1)</script>",), "b": ("nul\ufffd and [31mred",), "c": ("=cmd()",)}
    sheet = sample_sheet([ParaphrasedCaption("a\nb", ("<b>",)), ParaphrasedCaption("c", ())])
    assert "    <b>" in sheet and "(none)" in sheet


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "image,caption\n1.png,a dog\n", "needs a header line with the columns caption,paraphrase: it has 'image', 'caption'"),
        ("p.csv", "", "needs a header line with the columns caption,paraphrase: it has nothing"),
        ("p.jsonl", '{"text": "a", "reworded": "b"}\n', "has no caption and paraphrase: it has 'text', 'reworded'. Rename them"),
        ("p.parquet", "PAR1", "is not a table of paraphrases: expected a .csv, .tsv or .jsonl file"),
    ],
)  # fmt: skip
def test_tables_that_are_none(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_store(tmp_path / name)
    assert message in str(error.value)


# -- which store is used --------------------------------------------------------------------------


def test_the_latest_complete_version_is_used_unless_one_is_named(tmp_path: Path) -> None:
    root = tmp_path / "data"
    assert find_store(root, "") is None and find_store(root, "none") is None
    (root / "paraphrases" / "images").mkdir(parents=True)
    assert find_store(root, "") is None, "a folder of that name with other things in it"
    old = written(root / "paraphrases", {"a": ("1",)}, seed=0)
    new = written(root / "paraphrases", {"a": ("2",)}, seed=1)
    begun = Version(root / "paraphrases", SETTINGS | {"seed": 2})
    begun.append([ParaphrasedCaption("a", ("3",))])
    assert len({old.name, new.name, begun.name}) == 3

    def used(setting: str) -> tuple[str, tuple[str, ...]]:
        found = find_store(root, setting)
        assert found is not None
        return found.version, found.of("a")

    assert used("") == (new.name, ("2",)) and used(old.name) == (old.name, ("1",))
    assert used(str(old.folder)) == (old.name, ("1",)) and used(str(root / "paraphrases")) == (new.name, ("2",))
    with pytest.raises(UserError, match=r"are not complete: give the same `amclr paraphrase` command again"):
        find_store(root, begun.name)
    begun.finish()
    assert used("") == (begun.name, ("3",))
    (begun.folder / "paraphrases.jsonl").unlink()
    with pytest.raises(UserError, match="are not complete"):
        find_store(root, "")
    (root / "paraphrases" / "latest").write_text("gone\n")
    with pytest.raises(UserError, match="does not say which version is the latest"):
        find_store(root, "")
    (root / "paraphrases" / "latest").unlink()
    with pytest.raises(UserError, match=f"does not say which version is the latest: name one of .*{old.name}"):
        find_store(root, "")
    with pytest.raises(UserError, match=r"no paraphrases at 'nowhere': give a file or a folder"):
        find_store(root, "nowhere")
    with pytest.raises(UserError, match=r"holds no paraphrases: make some with: amclr paraphrase DATA --out"):
        find_store(root, str(root))


def test_only_an_incomplete_store_is_not_used_silently(folder: Path) -> None:
    version = Version(folder / "paraphrases", SETTINGS)
    version.append([ParaphrasedCaption("a red patch number 0", ("patch 0, red",))])
    with pytest.raises(UserError, match="are not complete"):
        manifests.load(Config(data=str(folder)), folder.parent)
    assert manifests.load(Config(data=str(folder), source=SourceConfig(paraphrases="none")), folder.parent).samples


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    version = written(tmp_path, {"a": ("1",), "b": ("2",), "c": ()})
    rows = version.folder / "paraphrases.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"caption": "d", "paraphrases": ["by hand"]}\n')
    assert read_store(tmp_path).of("d") == ("by hand",), "people may add rows and mend them"
    for damaged, message in ((whole[:-40], "is damaged"), (whole.replace('"b"', "b"), "jsonl:2: row is not JSON"),
                             ("".join(whole.splitlines(True)[:2]), "2 rows are left of 3")):  # fmt: skip
        rows.write_text(damaged)
        with pytest.raises(UserError, match=message):
            read_store(tmp_path)
    rows.write_text(whole)
    about = version.folder / "store.json"
    for text, message in (('{"format": 99}', "by another version of amclr"), ("{", "cannot be read")):
        about.write_text(text)
        with pytest.raises(UserError, match=message):
            read_store(tmp_path)


def test_a_folder_that_cannot_be_written_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"give a folder with --out, and later --source.paraphrases"):
        Version(tmp_path / "file", SETTINGS)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="Permission denied"):
            Version(tmp_path / "closed" / "paraphrases", SETTINGS)


# -- captions meet paraphrases --------------------------------------------------------------------


def test_paraphrases_join_captions_by_their_text(folder: Path, tmp_path: Path) -> None:
    captions = folder / "captions.txt"
    captions.write_text(captions.read_text().replace("a green patch number 5", "a green  patch number 5"))
    mine = tmp_path / "mine.csv"
    mine.write_text("caption,paraphrase\na green patch number 5,five\none green patch number 5,V\nnobody says this,x\n")
    config = Config(data=str(folder), source=SourceConfig(paraphrases=str(mine)))
    found = manifests.load(config, tmp_path)
    assert found.samples[5].paraphrases == (("five",), ("V",)) and not any(found.samples[4].paraphrases)
    assert found.rows == 83 and not found.rejects
    with mine.open("a") as handle:
        handle.write("bad row\n")
    found = manifests.load(config, tmp_path)
    assert [str(r) for r in found.rejects] == ["mine.csv:5: row has 1 columns: expected 2"]
    told = inspect(config, tmp_path / "sheet.png", progress=False)
    assert f"paraphrases  of 2 captions, from {mine}" in told and "mine.csv:5: row has 1 columns" in told
    mine.write_text("caption,paraphrase\n" + "bad row\n" * 50)
    with pytest.raises(UserError, match="50 of 130 rows cannot be used, over the limit of 2.0%"):
        manifests.prepare(config, tmp_path / "cache", progress=False)


def test_a_store_comes_after_what_the_data_bring_and_says_nothing_twice(tmp_path: Path) -> None:
    samples = [
        manifests.Sample("1", Location(str(tmp_path)), ("a", "b"), (("one", "uno"), ())),
        manifests.Sample("2", Location(str(tmp_path)), ("c",)),
        manifests.Sample("3", Location(str(tmp_path)), ("d",), (("four",),)),
    ]
    store = Store(tmp_path, {"a": ("un", "one"), "c": ("three",)}, 2)
    joined = attach(samples, store)
    assert joined[0].paraphrases == (("one", "uno", "un"), ()) and joined[1].paraphrases == (("three",),)
    assert joined[2] is samples[2] and attach(samples, None) == tuple(samples)
