"""Six novels by Jane Austen, from the Debian package r-cran-janeaustenr (1.6 MB, MIT; the texts are free).

The package stores them in an R database, which is read here without R: records of four bytes of length and a zlib
stream with one vector of lines.
"""

import pathlib
import re
import struct
import zlib

from examples.datasets.debian import unpack

PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_CHAPTER = re.compile(r"^\s*chapter\s+(\d+|[ivxlc]+)\b", re.IGNORECASE)
_CHARACTERS, _STRINGS = 9, 16  # types of R's serialization


def austen(folder="out/austen") -> dict[str, list[str]]:
    """The novels, downloaded with `apt-get download` by the first call.

    Args:
        folder: path to unpack the package into; nothing is installed.

    Returns:
        dict from each title in lower case to its lines, in the package's order.

    Raises:
        RuntimeError: if the package cannot be downloaded; the message says how to get it manually.
    """
    database = pathlib.Path("/") / DATABASE
    if not database.exists():
        database = pathlib.Path(folder) / DATABASE
    if not database.exists():
        unpack([PACKAGE], folder)
    return {lines[0].lower(): lines for lines in read_database(database.read_bytes())}


def chapters(lines) -> list[str]:
    """A novel's chapters, each with its heading, without the text before the first one."""
    starts = [i for i, line in enumerate(lines) if _CHAPTER.match(line)]
    return ["\n".join(lines[a:b]).strip() + "\n" for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


def read_database(data: bytes) -> list[list[str]]:
    """Lines of every record of an R database (`.rdb`) that holds vectors of strings."""
    texts, position = [], 0
    while position < len(data):
        record = zlib.decompressobj()
        body = record.decompress(data[position + 4 :])
        texts.append(_read_strings(body))
        position = len(data) - len(record.unused_data)
    return texts


def _read_strings(body):
    """One vector of strings in R's binary serialization, version 3: big-endian words of four bytes."""
    if body[:2] != b"X\n":
        raise ValueError(f"A record must start with the mark of R's binary format, 'X\\n'. Received: {body[:2]!r}")
    (name,) = struct.unpack_from(">i", body, 14)
    position = 18 + name
    kind, count = struct.unpack_from(">ii", body, position)
    if kind & 255 != _STRINGS:
        raise ValueError(f"A record must hold a vector of strings (type {_STRINGS}). Received: type {kind & 255}")
    position, lines = position + 8, []
    for _ in range(count):
        kind, size = struct.unpack_from(">ii", body, position)
        if kind & 255 != _CHARACTERS:
            raise ValueError(f"A line must be a string (type {_CHARACTERS}). Received: type {kind & 255}")
        position += 8
        lines.append(body[position : position + max(size, 0)].decode("utf-8", "replace"))
        position += max(size, 0)
    return lines
