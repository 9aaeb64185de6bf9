"""Texts of the examples: read from their own formats, and a clear message where they cannot be fetched."""

import shutil
import struct
import zlib

import pytest
from support import on_one_backend

from examples.datasets import austen, debian, king_james

pytestmark = on_one_backend


def record(lines):
    """One vector of strings as R keeps it in a database."""
    body = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    for line in lines:
        data = line.encode()
        body += struct.pack(">ii", 9, len(data)) + data
    packed = zlib.compress(body)
    return struct.pack(">i", len(body)) + packed


def test_r_database():
    books = [["Emma", "CHAPTER I", "Emma Woodhouse, handsome,", "", "CHAPTER II", "Mr. Weston"], ["é", ""]]
    assert austen.read_database(b"".join(map(record, books))) == books
    assert austen.chapters(books[0]) == ["CHAPTER I\nEmma Woodhouse, handsome,\n", "CHAPTER II\nMr. Weston\n"]


def test_r_database_of_another_kind():
    with pytest.raises(ValueError, match="binary format"):
        austen.read_database(struct.pack(">i", 2) + zlib.compress(b"A\n" + bytes(30)))


def test_verses():
    lines = ["Ge1:1 In the beginning", "Ge1:2 And the earth ", "Ge2:1 Thus", "1Sm1:1 Now there was"]
    assert king_james.read_verses(lines) == {
        "Ge": "In the beginning\nAnd the earth\n\nThus\n",
        "1Sm": "Now there was\n",
    }
    with pytest.raises(ValueError, match="A line must be a verse"):
        king_james.read_verses(["In the beginning"])


def test_no_packages_here(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install some-book"):
        debian.unpack(["some-book"], tmp_path / "texts")
    assert not (tmp_path / "texts").exists()
