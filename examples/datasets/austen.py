"""Six novels by Jane Austen, from the Debian package r-cran-janeaustenr (1.6 MB, MIT; the texts are free).

The package keeps them in a database of R, which is read here without R: numbered records, each four bytes of length
and a zlib stream that holds one vector of lines.
"""

import pathlib
import re
import struct
import zlib

from examples.datasets.debian import unpack

PACKAGE = "r-cran-janeaustenr"
DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_CHAPTER = re.compile(r"^\s*chapter\s+(\d+|[ivxlc]+)\b", re.IGNORECASE)
_CHARACTERS, _STRINGS = 9, 16  # types of R's serialisation


def austen(folder="out/austen") -> dict[str, list[str]]:
    """The novels, fetched with `apt-get download` at the first call.

    Args:
        folder: where the package is unpacked; nothing is installed.

    Returns:
        Title in lower case to lines, in the package's order.

    Raises:
        RuntimeError: where the package cannot be fetched; the message says how to get it by hand.
    """
    database = pathlib.Path("/") / DATABASE
    if not database.exists():
        database = pathlib.Path(folder) / DATABASE
    if not database.exists():
        unpack([PACKAGE], folder)
    return {lines[0].lower(): lines for lines in read_database(database.read_bytes())}


def chapters(lines) -> list[str]:
    """A novel's chapters, each with its heading; what stands before the first one is left out."""
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
    """One vector of strings in R's binary serialisation, version 3: big-endian words of four bytes."""
    if body[:2] != b"X\n":
        raise ValueError(f"A record starts with the mark of R's binary format, 'X\\n'; received {body[:2]!r}.")
    (name,) = struct.unpack_from(">i", body, 14)
    position = 18 + name
    kind, count = struct.unpack_from(">ii", body, position)
    if kind & 255 != _STRINGS:
        raise ValueError(f"A record holds a vector of strings (type {_STRINGS}); received type {kind & 255}.")
    position, lines = position + 8, []
    for _ in range(count):
        kind, size = struct.unpack_from(">ii", body, position)
        if kind & 255 != _CHARACTERS:
            raise ValueError(f"A line is a string (type {_CHARACTERS}); received type {kind & 255}.")
        position += 8
        lines.append(body[position : position + max(size, 0)].decode("utf-8", "replace"))
        position += max(size, 0)
    return lines
