"""Text sources: disjoint sides, exact protocols, errors that say what to do."""

from __future__ import annotations

import gzip
import json

import pytest

from gptq.texts import HELDOUT_DOCUMENTS, MAX_CALIBRATION_DOCUMENTS, documents
from marlin_kernel.errors import DataError
from tests.eval_cases import write_jsonl


def both(source, **options):
    return [set(documents(str(source), s, **options).texts) for s in ("calibration", "heldout")]


def test_pydoc_is_disjoint_by_paragraph_and_needs_no_file():
    sides = [documents("pydoc", side) for side in ("calibration", "heldout")]
    paragraphs = [
        {" ".join(p.split()) for text in side.texts for p in text.split("\n\n")} for side in sides
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert all(len(side.text()) > 50_000 and side.joined for side in sides)
    assert sides[0].sha256 != sides[1].sha256
    assert sides[0] == documents("pydoc", "calibration")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json.gz", "parquet", "blocks"])
def test_unsplit_file_is_divided_by_a_fixed_permutation(tmp_path, suffix):
    texts = [f"document number {i}" for i in range(40)]
    file = tmp_path / f"corpus.{suffix}"
    if suffix == "txt":
        file.write_text("\n".join(texts))
    elif suffix == "blocks":
        file = tmp_path / "corpus.txt"
        texts = [f"first line {i}\nsecond line" for i in range(40)]
        file.write_text("\n\n".join(texts))
    elif suffix == "jsonl":
        write_jsonl(file, [{"text": t} for t in texts])
    elif suffix == "json.gz":
        with gzip.open(file, "wt") as stream:
            stream.writelines(json.dumps({"text": t}) + "\n" for t in texts)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=7)
    calibration, heldout = both(file)
    assert not calibration & heldout
    assert calibration | heldout == set(texts)
    assert len(heldout) == 10
    assert documents(str(file), "heldout") == documents(str(file), "heldout")


def test_every_format_divides_alike(tmp_path):
    texts = [f"document number {i}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in texts])
    assert (
        documents(str(tmp_path / "a.txt"), "heldout").texts
        == documents(str(tmp_path / "b.jsonl"), "heldout").texts
    )


def test_equal_documents_never_stand_on_both_sides(tmp_path):
    file = write_jsonl(tmp_path / "c.jsonl", [{"text": f"text {i % 90}"} for i in range(200)])
    calibration, heldout = both(file)
    assert not calibration & heldout


def test_red_holds_out_1024_documents(tmp_path):
    count = 5000
    write_jsonl(tmp_path / "red" / "train.jsonl", [{"text": f"d{i}"} for i in range(count)])
    calibration, heldout = both("red", data_dir=str(tmp_path))
    assert len(heldout) == HELDOUT_DOCUMENTS
    assert len(calibration) == count - HELDOUT_DOCUMENTS
    assert not calibration & heldout
    assert not documents("red", "heldout", data_dir=str(tmp_path)).joined


def test_calibration_is_a_bounded_prefix(tmp_path, monkeypatch):
    monkeypatch.setattr("gptq.texts.MAX_CALIBRATION_DOCUMENTS", 12)
    assert MAX_CALIBRATION_DOCUMENTS > 12
    file = write_jsonl(tmp_path / "c.jsonl", [{"text": f"d{i}"} for i in range(100)])
    assert len(documents(str(file), "calibration").texts) == 12


def test_split_words_in_a_folder(tmp_path):
    write_jsonl(tmp_path / "my_train.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "my_valid.txt").write_text("one\n\ntwo\n", newline="")
    (tmp_path / "README.txt").write_text("not data")
    assert documents(str(tmp_path), "calibration").texts == ("a", "b")
    assert documents(str(tmp_path), "heldout").texts == ("one\n\ntwo\n",)  # verbatim


def test_wikitext2_from_local_raw_and_parquet_is_the_same_string(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    raw = " \n = Title = \n \n Text . \n"
    folder = tmp_path / "a" / "wikitext2"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text(raw, newline="")
    rows = ["", " = Title = \n", "", " Text . \n"]
    other = tmp_path / "b" / "wikitext2"
    other.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": rows}), other / "test-00000-of-00001.parquet")
    found = [documents("wikitext2", "heldout", data_dir=str(tmp_path / x)) for x in "ab"]
    assert found[0].text() == found[1].text() == "\n\n".join(rows)
    assert found[0].joined


def test_data_dir_from_the_environment(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "c4_sample.jsonl", [{"text": f"d{i}"} for i in range(8)])
    monkeypatch.setenv("MARLIN_DATA_DIR", str(tmp_path))
    assert len(documents("c4", "heldout").texts) == 2


@pytest.mark.parametrize(
    ("name", "content", "split", "message"),
    [
        ("gone.txt", None, "heldout", "neither one of"),
        ("short.txt", "only one line", "heldout", "too few to divide"),
        ("train.txt", "a\nb\nc\nd\ne", "heldout", "no heldout text.*rename"),
        ("bad.jsonl", "{not json}\n" * 9, "heldout", "document 1: not one JSON object"),
        ("field.jsonl", '{"body": "x"}\n' * 9, "heldout", "no string field named 'text'"),
        ("empty.valid.txt", "  \n ", "heldout", "holds no text"),
        ("array.json", '[{"text": "a"}, {"text": "b"}]', "heldout", "JSON one object per line"),
        ("latin.jsonl", b'{"text": "\xe9"}\n' * 9, "heldout", "latin.jsonl is no readable UTF-8"),
        ("plain.jsonl.gz", b"not gzip", "heldout", "plain.jsonl.gz is no readable gzipped UTF-8"),
        ("cut.json.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "heldout", "no readable gzip"),
        ("damaged.json.gz", gzip.compress(b"x" * 99)[:10] + b"\xff" * 99, "heldout", "no readable"),
        ("readme.md", "a\n\nb\n\nc\n\nd\n", "heldout", "ends in none of .txt.*rename it"),
    ],
)
def test_errors_say_what_and_where(tmp_path, name, content, split, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        documents(str(file), split)


def test_missing_named_source_says_how_to_provide_it(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(DataError, match=r"no heldout text for 'red'.*DATA_DIR/red/.*pydoc"):
        documents("red", "heldout", data_dir=str(tmp_path))


def test_unknown_split_is_rejected():
    with pytest.raises(DataError, match="split='test'"):
        documents("pydoc", "test")
