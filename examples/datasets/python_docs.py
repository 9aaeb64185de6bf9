"""Prose of Python's documentation, which every Python ships (PSF license): nothing is downloaded.

`pydoc_data.topics` (the text behind `help("topics")`) holds about half a megabyte of technical English. Its text
differs slightly between Python versions: train and evaluate under the same one.
"""

import re

_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})([^\s*](?:[^*]*[^\s*])?)\1(?![\w*])")
_BULLET = re.compile(r"^(?:[*•-]|\d+[.)]|\(\d+\)|\[\d+\])\s+")
_SENTENCE_END = re.compile(r"[.!?:;][)\"']*$")
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-"})
_MARKS_OF_CODE = ("::=", ">>>", "+--", "---", "===", "...   ")


def clean_paragraph(paragraph):
    """One line of plain prose from a paragraph in Sphinx's text format, or "" if it is code, grammar or a table.

    Line breaks, bullets, footnote marks, emphasis and the double quotes around identifiers are removed.
    """
    if any(mark in paragraph for mark in _MARKS_OF_CODE) or paragraph.lstrip().startswith("|"):
        return ""
    text = paragraph.translate(_QUOTES)
    text = re.sub(r"(\w)-\n\s*(?=\w)", r"\1-", text)
    text = " ".join(text.split())
    text = _BULLET.sub("", text)
    text = _FOOTNOTE.sub("", text)
    text = _EMPHASIS.sub(r"\2", text)
    text = text.replace('"', "").replace("()", "")
    words = re.findall(r"[^\W\d_]{2,}", text)
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(words) < 6 or letters < 0.85 * len(text) or not _SENTENCE_END.search(text):
        return ""
    return text


def topics_text(topics=None):
    """The prose of `pydoc_data.topics`: a list of documents (str), paragraphs separated by a blank line.

    Topics quote each other at length (about a fifth of the text), so a paragraph is kept only in the longest topic
    that contains it: no paragraph occurs in two documents. The result does not depend on the order of the dictionary.

    Args:
        topics: dict from topic names to texts; default `pydoc_data.topics.topics`.

    Raises:
        ImportError: if this Python was built without `pydoc_data`.
    """
    if topics is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError(
                "This Python has no `pydoc_data.topics` (part of the standard library, left out of some slim builds). "
                "Use other documents, or the paper's sentences (`documents=None`)."
            ) from error
    seen = set()
    documents = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        kept = []
        for paragraph in re.split(r"\n[ \t]*\n", topics[name]):
            text = clean_paragraph(paragraph)
            if text and text.casefold() not in seen:
                seen.add(text.casefold())
                kept.append(text)
        if kept:
            documents[name] = "\n\n".join(kept)
    return [documents[name] for name in sorted(documents)]
