"""Facts to state in a text, and questions about them: needles, several of them, and records of keys and values."""

import typing

from keras_fam.tasks import phrases


class Question(typing.NamedTuple):
    """A question about the statements of an `Exercise`.

    Attributes:
        text: str.
        answer: str, without white space around it.
        needs: tuple of int, the statements that answer it, in the order of the text.
    """

    text: str
    answer: str
    needs: tuple


class Exercise(typing.NamedTuple):
    """Statements in the order in which a text makes them, and questions about them.

    Attributes:
        statements: tuple of str, sentences.
        questions: tuple of `Question`s, in the order in which they are asked, after all statements.
    """

    statements: tuple
    questions: tuple


class Facts:
    """Base of what `ProseTask` states and asks. A subclass implements `draw`, or `write` for another kind of text.

    Args:
        name: str, under which `ProseTask` reports its answers; None means the name of the class.
    """

    def __init__(self, name=None):
        self.name = name or type(self).__name__

    def draw(self, rng, phrasings="all"):
        """An `Exercise`.

        Args:
            rng: `numpy.random.Generator`.
            phrasings: `"all"`, `"train"` or `"held_out"`: which of the phrasings are used.
        """
        raise NotImplementedError

    def write(self, rng, total, prose, layout):
        """A `TaskText` of `total` tokens.

        Args:
            rng: `numpy.random.Generator`.
            total: int, T.
            prose: `Prose`, the text around the facts.
            layout: `Layout`, where facts and questions stand.
        """
        return layout.place(rng, self.draw(rng, layout.phrasings), prose, total, self.name)


class Needle(Facts):
    """Named values ("The lucky number is 4715."), and questions about some of them, in many phrasings.

    A value is a number, or a city where somebody was born. Names differ within a text, so that it never contradicts
    itself.

    Args:
        count: int, facts in a text.
        questions: int, how many of them are asked for, at most `count`.
        digits: int, of a number; the first digit is not 0.
        cities: float from 0 to 1, the share of texts with cities in place of numbers.
        name: see `Facts`; None means `"Needle"`, or `"3 needles"` and so on.

    Raises:
        ValueError: for options outside their range.

    Example:

    ```python
    exercise = keras_fam.tasks.Needle(count=2).draw(np.random.default_rng(0))
    len(exercise.statements)  # 2
    ```
    """

    def __init__(self, count=1, questions=1, digits=4, cities=0.2, name=None):
        super().__init__(name or (f"{count} needles" if count > 1 else None))
        if not 1 <= questions <= count <= len(phrases.CITIES):
            raise ValueError(
                f"1 <= `questions` <= `count` <= {len(phrases.CITIES)} must hold. Received: questions={questions}, "
                f"count={count}"
            )
        if not 1 <= digits <= 18 or not 0 <= cities <= 1:
            raise ValueError(
                f"`digits` must be from 1 to 18 and `cities` from 0 to 1. Received: digits={digits}, cities={cities}"
            )
        self.count, self.questions, self.digits, self.cities = count, questions, digits, cities

    def draw(self, rng, phrasings="all"):
        if rng.random() < self.cities:
            names = phrases.some(rng, phrases.PEOPLE, self.count)
            values, bank = phrases.some(rng, phrases.CITIES, self.count), phrases.CITY
        else:
            words = phrases.some(rng, (*phrases.ADJECTIVES, *phrases.THINGS), self.count)
            names, bank = words, phrases.NEEDLE
            values = [phrases.digits(rng, self.digits) for _ in names]
        return _stated(rng, bank, names, values, self.questions, phrasings)


class KeyValue(Facts):
    """Records of keys and values ("Record silver-heron: 90.", "[late-tiger] = 4."), and questions for some values.

    Args:
        pairs: int, records in a text. No two of them have the same key.
        questions: int, how many values are asked for, at most `pairs`.
        digits: int, of a value; the first digit is not 0.
        name: see `Facts`.

    Raises:
        ValueError: for options outside their range.

    Example:

    ```python
    exercise = keras_fam.tasks.KeyValue(pairs=4).draw(np.random.default_rng(0))
    exercise.questions[0].answer  # three digits
    ```
    """

    def __init__(self, pairs=4, questions=1, digits=3, name=None):
        super().__init__(name)
        if not 1 <= questions <= pairs <= len(phrases.THINGS) or not 1 <= digits <= 18:
            raise ValueError(
                f"1 <= `questions` <= `pairs` <= {len(phrases.THINGS)} and 1 <= `digits` <= 18 must hold. Received: "
                f"questions={questions}, pairs={pairs}, digits={digits}"
            )
        self.pairs, self.questions, self.digits = pairs, questions, digits

    def draw(self, rng, phrasings="all"):
        things = phrases.some(rng, phrases.THINGS, self.pairs)
        keys = [f"{phrases.ADJECTIVES[rng.integers(len(phrases.ADJECTIVES))]}-{thing}" for thing in things]
        values = [phrases.digits(rng, self.digits) for _ in keys]
        return _stated(rng, phrases.RECORD, keys, values, self.questions, phrasings)


def _stated(rng, bank, names, values, questions, phrasings):
    """An `Exercise` of named values, of which some are asked for in random order."""
    statements, asked = [], []
    for name, value in zip(names, values, strict=True):
        statements.append(phrases.choose(rng, bank["statements"], phrasings).format(name=name, value=value))
    for i in rng.permutation(len(names))[:questions].tolist():
        text = phrases.choose(rng, bank["questions"], phrasings).format(name=names[i])
        asked.append(Question(text, values[i], (i,)))
    return Exercise(tuple(statements), tuple(asked))
