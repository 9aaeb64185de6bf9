"""The tasks of RULER (arXiv 2404.06654) by generators of this project, and questions about facts in novels.

Texts have a given number of tokens, for any tokenizer, so tiny models can be asked too. Wording, words and texts are
our own: figures are comparable with each other, not with RULER's published ones. `ruler.py` makes the original's texts
with a package, where it is installed.
"""

import itertools
import typing
import uuid

import numpy as np

import keras_fam


class Sample(typing.NamedTuple):
    """A text and what its completion should say.

    Attributes:
        ids: int32 `[T]`, the text, which ends where the answer begins.
        answers: tuple of str; the score is the share of them that the completion contains.
    """

    ids: np.ndarray
    answers: tuple


NOISE = "The kettle is on. The cat is asleep. The rain has stopped. Nobody is at the door. All is well."
# Keys, values of each, keys asked for, haystack, and whether keys and values are codes.
NEEDLES = {
    "niah_single_1": (1, 1, 1, "noise", "number"),
    "niah_single_2": (1, 1, 1, "novel", "number"),
    "niah_single_3": (1, 1, 1, "novel", "code"),
    "niah_multikey_1": (4, 1, 1, "novel", "number"),
    "niah_multikey_2": (1, 1, 1, "needles", "number"),
    "niah_multikey_3": (1, 1, 1, "needles", "codes"),
    "niah_multivalue": (1, 4, 1, "novel", "number"),
    "niah_multiquery": (4, 1, 4, "novel", "number"),
}
WORDS = ("vt", "cwe", "fwe")
FACTS = {"who_is_where_1": 1, "who_is_where_2": 2, "who_is_where_3": 3}
RULER = (*NEEDLES, *WORDS)
TASKS = (*RULER, *FACTS)
# Tokens of a completion at most, as in RULER (niah, vt, cwe, fwe).
NEW_TOKENS = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, **dict.fromkeys(FACTS, 8)}
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def make(name, tokens, seed, prose, tokenizer):
    """One `Sample` of a task.

    Args:
        name: one of `TASKS`.
        tokens: int, T.
        seed: sequence of int.
        prose: `keras_fam.tasks.Prose`, of novels.
        tokenizer: that of the prose, with `detokenize`.

    Raises:
        ValueError: if question and facts alone have more tokens.
    """
    encode, rng = keras_fam.tasks.encoder(tokenizer), np.random.default_rng([*seed, TASKS.index(name)])
    if name in FACTS:
        return _who_is_where(FACTS[name], tokens, rng, prose, tokenizer)
    if name in NEEDLES:
        return _needles(tokens, rng, prose, encode, *NEEDLES[name])
    return {"vt": _variables, "cwe": _common_words, "fwe": _frequent_words}[name](tokens, rng, encode)


def score(completion, answers):
    """The share of the answers that a completion contains, whatever the case: RULER's `string_match_all`."""
    return float(np.mean([answer.lower() in completion.lower() for answer in answers]))


def _who_is_where(facts, tokens, rng, prose, tokenizer):
    """Somebody's or something's place, by one to three facts at random gaps of a novel."""
    task = keras_fam.tasks.ProseTask(
        prose, tokenizer, keras_fam.tasks.WhoIsWhere(facts, events=4), min_distance=0, early=0.0, again=0.0
    )
    text = task.text(tokens, seed=rng)
    answer = text.answers[-1]
    said = tokenizer.detokenize(text.token_ids[answer.start : answer.stop].tolist())
    return Sample(text.token_ids[: answer.start], (str(said).strip(),))


def _needles(tokens, rng, prose, encode, keys, values, asked, haystack, kind):
    def value():
        code = kind != "number"
        return str(uuid.UUID(bytes=rng.bytes(16), version=4)) if code else str(rng.integers(10**6, 10**7))

    def key():
        return value() if kind == "codes" else f"{_word(rng)}-{_word(rng)}"

    def sentence(name, value):
        return f" One of the secret numbers of {name} is {value}."

    known = {key(): [value() for _ in range(values)] for _ in range(keys)}
    facts = [sentence(name, value) for name, said in known.items() for value in said]
    names = [list(known)[i] for i in rng.permutation(keys)[:asked]]
    listed = " and ".join(names)
    before = encode("Some secret numbers are hidden in this text. Remember them: questions follow.\n\n")
    after = encode(
        f"\n\nWhat are all the secret numbers of {listed} in the text above? The secret numbers of {listed} in the "
        "text above are"
    )
    needles = [encode(fact) for fact in rng.permutation(facts)]
    room = tokens - len(before) - len(after) - sum(map(len, needles))
    if haystack == "novel":
        hay = prose.window(rng, max(room, 0))[:2]
    else:
        hay = _repeated(room, lambda: encode(" " + NOISE) if haystack == "noise" else encode(sentence(key(), value())))
    body = _inserted(rng, *hay, needles, tokens - len(before) - len(after))
    return Sample(np.concatenate([before, body, after]), tuple(value for name in names for value in known[name]))


def _variables(tokens, rng, encode):
    """A chain of five variables, each assigned the one before, in noise."""
    names, number = [], str(rng.integers(10**4, 10**5))
    while len(names) < 5:
        name = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 5))
        names += [name] * (name not in names)
    chain = [f" VAR {names[0]} = {number}.", *(f" VAR {b} = VAR {a}." for a, b in itertools.pairwise(names))]
    before = encode("Some variables are assigned in this text. Keep track of them.\n\n")
    after = encode(
        f"\n\nQuestion: Which variables have the value {number} in the text above?\n"
        f"Answer: These five variables have the value {number}:"
    )
    pieces = [encode(link) for link in chain]
    space = tokens - len(before) - len(after)
    hay = _repeated(space - sum(map(len, pieces)), lambda: encode(" " + NOISE))
    return Sample(np.concatenate([before, _inserted(rng, *hay, pieces, space), after]), tuple(names))


def _common_words(tokens, rng, encode, common=10):
    """A numbered list in which ten words come ten times as often as all others (six times in short texts)."""
    often, seldom = (30, 3) if tokens >= 4096 else (6, 1)
    before = encode("This is a numbered list of words. Remember those that appear most often.\n\n")
    after = encode(
        "\n\nQuestion: What are the 10 most common words in the list above?\nAnswer: The 10 words that appear most "
        "often in the list are:"
    )
    words = _different(rng, common)
    entry = len(encode(" 1000. ")) + max(len(encode(word)) for word in words)
    others = max((tokens - len(before) - len(after)) // entry - common * often, seldom) // seldom
    listed = _different(rng, common + others)
    words = listed[:common]
    while True:  # as many as there is room for
        line = rng.permutation([*words * often, *listed[common:] * seldom]).tolist()
        body = encode(" ".join(f"{i + 1}. {word}" for i, word in enumerate(line)))
        if len(before) + len(body) + len(after) <= tokens:
            return Sample(np.concatenate([before, body, after]), tuple(words))
        if len(listed) == common:
            raise ValueError(f"A list of words needs more than {tokens} tokens: it has {len(body)} without the others.")
        listed = listed[: common + max(0, int(0.9 * (len(listed) - common)))]


def _frequent_words(tokens, rng, encode):
    """Coded words whose counts fall with the square of their rank; the most frequent one is noise."""
    codes = ["...", *_different(rng, max(tokens // 50, 8))]
    before = encode("This text is made of code words. Find the three that appear most often; dots do not count.\n\n")
    after = encode(
        "\n\nQuestion: What are the three code words that appear most often in the text above?\nAnswer: The three "
        "code words that appear most often are:"
    )
    count = tokens  # of words, about; fewer until they fit
    while count > 8:
        times = (count / np.arange(1, len(codes) + 1) ** 2 * 6 / np.pi**2).astype(int)
        line = rng.permutation(np.repeat(codes, times)).tolist()
        body = encode(" ".join(line))
        if len(before) + len(body) + len(after) <= tokens:
            return Sample(np.concatenate([before, body, after]), tuple(codes[1:4]))
        count = int(0.93 * count)
    raise ValueError(f"The question alone has more than {tokens} tokens.")


def _word(rng):
    return "".join(rng.choice(_SYLLABLES) for _ in range(int(rng.integers(2, 5))))


def _different(rng, count):
    words = {}
    while len(words) < count:
        words[_word(rng)] = True
    return list(words)


def _repeated(tokens, sentence):
    """`(ids, gaps)` of sentences, at most `tokens` of them in all; the last one may be cut off."""
    parts, size = [np.zeros(0, "int32")], 0
    while size < tokens:
        parts.append(sentence())
        size += len(parts[-1])
    gaps = np.cumsum([len(part) for part in parts])[1:]
    return np.concatenate(parts)[: max(tokens, 0)], gaps[gaps <= tokens]


def _inserted(rng, ids, gaps, pieces, tokens):
    """`ids` with each of the pieces, in order, at a random gap."""
    if sum(map(len, pieces)) > tokens:
        raise ValueError(f"Facts and question alone need more tokens. Received: {tokens} tokens for the text")
    gaps = np.concatenate([[0], gaps])
    places = np.sort(rng.choice(gaps, len(pieces), replace=len(gaps) < len(pieces)))
    parts, read = [], 0
    for place, piece in zip(places, pieces, strict=True):
        parts += [ids[read:place], piece]
        read = place
    return np.concatenate([*parts, ids[read:]]).astype("int32")
