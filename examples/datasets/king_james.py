"""The King James Bible, from the Debian packages bible-kjv and bible-kjv-text (4.4 MB of text, which is free)."""

import pathlib
import re
import shutil
import subprocess

from examples.datasets.debian import unpack

PACKAGES = ("bible-kjv", "bible-kjv-text")
_VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$")


def king_james(folder="out/king_james") -> dict[str, str]:
    """The books of the Bible, printed by the package's own program, downloaded by the first call.

    Args:
        folder: path to unpack the packages into, unless they are installed.

    Returns:
        dict from the short name of each book (`"Ge"`, `"1Sm"`, `"Rev"`) to its text, in order: one line per verse, an
        empty line between chapters.

    Raises:
        RuntimeError: if the packages cannot be downloaded; the message says how to get them manually.
    """
    command, root = ["bible"], pathlib.Path(folder)
    if not shutil.which("bible"):
        program = root / "usr/bin/bible"
        if not program.exists():
            unpack(PACKAGES, root)
        command = [str(program), "-p", str(root / "usr/lib")]
    printed = subprocess.run([*command, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    return read_verses(printed.splitlines())


def read_verses(lines) -> dict[str, str]:
    """Books from lines such as `Ge1:1 In the beginning …`.

    Raises:
        ValueError: for any other line.
    """
    books, before = {}, None  # before: book and chapter of the last verse
    for line in lines:
        verse = _VERSE.match(line)
        if verse is None:
            raise ValueError(f"A line must be a verse, as in 'Ge1:1 In the beginning'. Received: {line[:60]!r}")
        book, chapter, _, text = verse.groups()
        if book in books and before != (book, chapter):
            books[book].append("")
        before = book, chapter
        books.setdefault(book, []).append(text.strip())
    return {book: "\n".join(text) + "\n" for book, text in books.items()}
