"""Token ids are written once and found again; what is much stays out of memory."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.data import encoding, rows
from lorakit.data.cache import Chunk, entry
from lorakit.data.encoding import encode, fingerprint
from lorakit.data.rows import Rows, Stored
from lorakit.disk import cache_root


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def given(*texts: str) -> Rows:
    return Rows([(text,) for text in texts], ["x"] * len(texts), [], "here")


def encoded(tokenizer: Any, *texts: str, max_length: int = 8) -> Any:
    labels = torch.zeros(len(texts), dtype=torch.long)
    return encode(given(*texts), labels, tokenizer, max_length, "train")


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "rows").iterdir() if not p.name.startswith("."))


# rows


@pytest.mark.parametrize("limit", [0, 40, 2**26])
def test_rows_are_the_same_in_memory_and_on_disk(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY", limit)
    items: list[Any] = [("a", "b"), "caf\u00e9 \U0001f600", "", ("x",) * 40, "lone \ud800", ()]
    stored: Stored[Any] = Stored()
    for i, item in enumerate(items):
        stored.append(item)
        assert stored[i // 2] == items[i // 2]  # reading in between does no harm
    assert list(stored) == items
    assert stored[1:4] == items[1:4]
    assert stored[-1] == ()
    taken = stored.take(np.array([4, 0, 3])).take(np.array([2, 0]))
    assert list(taken) == [items[3], items[4]]
    with pytest.raises(IndexError):
        stored[6]


def test_what_is_taken_of_rows_keeps_texts_labels_and_places_together() -> None:
    whole = rows.empty("here")
    for i in range(6):
        whole.texts.append((f"text {i}",))
        whole.labels.append(str(i))
        whole.places.append(f"line {i}")
    taken = whole.take([5, 2])
    assert list(zip(taken.texts, taken.labels, taken.places, strict=True)) == [
        (("text 5",), "5", "line 5"),
        (("text 2",), "2", "line 2"),
    ]
    assert not whole._replace(labels=[]).take([1]).labelled


# token ids


def test_a_second_run_finds_the_first_ones_ids_and_says_so(tokenizer: Any, folder: Path) -> None:
    first = encoded(tokenizer, "one two", "three")
    assert first.notes == ()
    again = encoded(tokenizer, "one two", "three")
    (note,) = again.notes
    assert note.startswith(f"2 training rows: tokens reused from {folder} (")
    assert note.endswith(" s)")
    want = tokenizer(["one two", "three"])
    for found in (first, again):
        assert [list(row) for row in found.columns["input_ids"]] == want["input_ids"]
        assert found.lengths.tolist() == [len(row) for row in want["input_ids"]]


def test_other_texts_lengths_and_tokenizers_have_ids_of_their_own(
    tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    encoded(tokenizer, "one two", "three")
    for other in (
        encoded(tokenizer, "one", "two three"),
        encoded(tokenizer, "three", "one two"),
        encoded(tokenizer, "one two three"),
        encoded(tokenizer, "one two", "three", max_length=4),
    ):
        assert not any("reused" in note for note in other.notes)
    tokenizer.add_tokens(["newword"])
    assert encoded(tokenizer, "one two", "three").notes == ()
    assert len(entries(folder)) == 6


def test_what_a_tokenizer_did_last_does_not_change_what_it_is(tokenizer: Any) -> None:
    first = fingerprint(tokenizer)
    tokenizer(["a b c", "d"], truncation=True, max_length=3, padding=True)
    assert fingerprint(tokenizer) == first
    tokenizer.truncation_side = "left"
    assert fingerprint(tokenizer) != first


def broken_by_cutting(path: Path) -> None:
    ids = path / "input_ids.i32"
    ids.write_bytes(ids.read_bytes()[:-4])


def broken_by_a_bit(path: Path) -> None:
    ids = path / "input_ids.i32"
    ids.write_bytes(b"\x07" + ids.read_bytes()[1:])


def broken_header(path: Path) -> None:
    (path / "header.json").write_text('{"format": 1')


def missing_file(path: Path) -> None:
    (path / "lengths.npy").unlink()


def of_another_format(path: Path) -> None:
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps({**header, "format": 0}))


@pytest.mark.parametrize(
    "harm",
    [broken_by_cutting, broken_by_a_bit, broken_header, missing_file, of_another_format],
)
def test_a_broken_entry_is_made_anew(tokenizer: Any, folder: Path, harm: Any) -> None:
    encoded(tokenizer, "one two", "three")
    (path,) = entries(folder)
    harm(path)
    again = encoded(tokenizer, "one two", "three")
    assert again.notes == ()
    assert [list(row) for row in again.columns["input_ids"]] == tokenizer(["one two", "three"])[
        "input_ids"
    ]
    assert "reused" in encoded(tokenizer, "one two", "three").notes[0]


def test_an_entry_that_fails_on_the_way_leaves_nothing(folder: Path) -> None:
    def make() -> Iterator[Chunk]:
        yield Chunk({"input_ids": [[1, 2]]})
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError):
        entry("0" * 64, make)
    assert entries(folder) == []
    assert [*entry("0" * 64, lambda: iter([Chunk({"input_ids": [[3]]})])).columns["input_ids"]] == [
        3
    ]


def test_rows_stay_readable_when_the_cache_is_emptied(tokenizer: Any, folder: Path) -> None:
    import shutil

    found = encoded(tokenizer, "one two", "three")
    shutil.rmtree(folder)
    (expected,) = tokenizer(["three"])["input_ids"]
    assert found.columns["input_ids"][1].tolist() == expected


def test_a_tokenizer_without_a_file_is_used_and_nothing_is_kept(folder: Path) -> None:
    class Words:
        pad_token_id = 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    for _ in range(2):
        found = encoded(Words(), "one two", "three")
        assert found.notes == ()
        assert found.batch([1, 0]).inputs["input_ids"].tolist() == [[5, 0], [3, 3]]
    assert [path.name for path in folder.rglob("*")] == ["rows", ".lock"]


def test_a_cache_that_cannot_be_written_is_done_without(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert encoded(tokenizer, "one two").lengths.tolist() == [4]
    assert not str(cache_root()).startswith(str(tmp_path))


# what is said


def test_rows_that_are_cut_are_counted(tokenizer: Any) -> None:
    texts = ["one two three four", "one", "one two three", "five"]
    told = "1 of 4 training rows are longer than 5 tokens and are cut"
    assert encoded(tokenizer, *texts, max_length=5).notes == (told,)
    assert encoded(tokenizer, *texts, max_length=5).notes[0] == told  # the cache knows
    assert encoded(tokenizer, *texts, max_length=6).notes == ()


def test_pairs_that_are_cut_are_counted(tokenizer: Any) -> None:
    pairs = Rows([("one two", "three four"), ("one", "two")], ["x", "x"], [], "here")
    found = encode(pairs, torch.zeros(2), tokenizer, 6, "validation")
    assert found.notes == ("1 of 2 validation rows are longer than 6 tokens and are cut",)


def test_a_tokenizer_that_does_not_tell_is_asked_again(tokenizer: Any) -> None:
    class Untold:
        def __call__(self, *texts: Any, **settings: Any) -> dict[str, Any]:
            return dict(tokenizer(*texts, **settings))

        pad_token_id, pad_token_type_id = 0, 0

    texts = ["one two three four", "one", "one two three", "five"]
    told = "1 of 4 training rows are longer than 5 tokens and are cut"
    assert encoded(Untold(), *texts, max_length=5).notes == (told,)


def test_long_work_tells_how_far_it_has_come(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 2)
    with caplog.at_level(logging.INFO, "lorakit"):
        found = encoded(tokenizer, *[f"row {i}" for i in range(5)])
    assert caplog.messages == [f"{n} of 5 rows tokenized" for n in (2, 4, 5)]
    assert [list(row) for row in found.columns["input_ids"]] == tokenizer(
        [f"row {i}" for i in range(5)]
    )["input_ids"]


# processes


def test_of_two_processes_one_works_and_the_other_takes_it(folder: Path) -> None:
    code = """
import time
from lorakit.data.cache import Chunk, entry

def make():
    time.sleep(0.5)
    yield Chunk({"input_ids": [[1, 2]]})

print(entry("ab" * 32, make).reused)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sorted(run.communicate()[0].strip() for run in runs) == ["False", "True"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its memory")
def test_what_killed_processes_have_left_goes_and_what_others_write_stays(folder: Path) -> None:
    """Of any key, since the same one may never be asked for again."""
    rows = folder / "rows"
    dead, other = (rows / f".{letter * 64}.1.tmp" for letter in "ab")
    code = "import fcntl, sys\nfile = open(sys.argv[1], 'wb')\n"
    code += f"fcntl.lockf(file, fcntl.LOCK_EX, 1, {0xBBBBBBBB}); print(flush=True); input()"
    for left in (dead, other):
        left.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, rows / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        entry("c" * 64, lambda: iter([Chunk({"input_ids": [[1]]})]))
        assert (dead.exists(), other.exists()) == (False, True)
        writer.communicate(b"\n")
    entry("d" * 64, lambda: iter([Chunk({"input_ids": [[1]]})]))
    assert not other.exists()


def test_rows_that_are_not_kept_are_swept_where_their_process_was_killed(folder: Path) -> None:
    code = """
import os, signal
from lorakit.data.cache import Chunk, entry

def make():
    yield Chunk({"input_ids": [[1, 2]]})
    os.kill(os.getpid(), signal.SIGKILL)

entry(None, make)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = entries_left(folder)
    assert list(left.iterdir())
    entry("a" * 64, lambda: iter([Chunk({"input_ids": [[1]]})]))
    assert entries_left(folder) == []


def entries_left(folder: Path) -> list[Path]:
    return [*(folder / "rows").glob(".*.tmp")]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """From 1,000 rows to 10,000, 10 MB of texts and 13 MB of ids, by a few bytes a row."""
    code = """
import sys
from pathlib import Path
from lorakit.data import columns, labels, rows, splitting
from lorakit.data.cache import Chunk, entry
from lorakit.data.sources import Record

rows.IN_MEMORY = 2**16

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def given(count):
    for i in range(count):
        yield Record(f"line {i}", {"text": f"{i} " + "word " * 200, "label": "ab"[i % 2]})

def ids(texts):
    for i in range(0, len(texts), 500):
        part = texts[i : i + 500]
        yield Chunk({"input_ids": [[len(text[0])] * 400 for text in part]})

def through(count):
    found = columns.read_rows(
        given(count), columns.Asked(None, None, labels.ONE), "here", "data.train"
    )
    found, _ = splitting.without_duplicates(found)
    train, held = splitting.split(found, 0.2, 0)
    tokens = entry(f"{count:064x}", lambda: ids(train.texts)).columns["input_ids"]
    for i in range(0, len(tokens), 7):
        tokens[i].sum()
    return resident()

through(1000)
less = through(1000)
print(through(10_000) - less)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LORAKIT_CACHE": str(tmp_path / "cache")},
    )
    assert int(ended.stdout) < 5e6
