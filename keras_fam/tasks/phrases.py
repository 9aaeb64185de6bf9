"""Words and phrasings of the tasks in natural text. `{…}` are filled in by `facts.py` and `who_is_where.py`.

Each list of phrasings is divided in two: `choose` takes the last quarter, at least one, for `"held_out"`.
"""

import numpy as np

WHICH = ("all", "train", "held_out")

ADJECTIVES = (
    *("secret", "lucky", "private", "hidden", "magic", "special", "silver", "golden", "crimson", "ancient", "northern"),
    *("southern", "royal", "broken", "quiet", "double", "final", "second", "spare", "winter", "summer", "midnight"),
)
THINGS = (
    *("falcon", "garden", "ladder", "harbour", "lantern", "orchard", "violin", "compass", "bridge", "tower", "window"),
    *("anchor", "mirror", "kettle", "saddle", "candle", "statue", "cellar", "wagon", "fountain", "chimney", "basket"),
    *("stable", "library", "meadow", "parcel", "cabinet", "pigeon", "tiger", "badger", "heron", "beaver", "rabbit"),
)
CITIES = (
    *("Paris", "London", "Rome", "Madrid", "Vienna", "Berlin", "Lisbon", "Athens", "Dublin", "Oslo", "Cairo", "Delhi"),
    *("Tokyo", "Boston", "Geneva", "Moscow", "Prague", "Warsaw", "Lima", "Havana", "Venice", "Naples", "Sydney"),
)
PEOPLE = (
    *("Alice", "Peter", "Martha", "Oscar", "Julia", "Simon", "Clara", "Victor", "Helen", "Robert", "Laura", "Daniel"),
    *("Sophie", "Walter", "Nina", "Frank", "Irene", "Max", "Rosa", "Hugo", "Vera", "Paul", "Ellen", "Carl", "Ada"),
)
PLACES = (
    *("kitchen", "garden", "office", "hallway", "bathroom", "bedroom", "cellar", "attic", "library", "garage", "park"),
    *(
        "school",
        "market",
        "station",
        "church",
        "bakery",
        "theatre",
        "museum",
        "hospital",
        "harbour",
        "stable",
        "forest",
    ),
)
OBJECTS = (
    *("apple", "football", "milk", "lamp", "book", "hammer", "umbrella", "guitar", "ring", "letter", "camera", "key"),
    *("coat", "basket", "clock", "bottle", "map", "candle", "knife", "mirror", "suitcase", "blanket", "coin", "pencil"),
)

NEEDLE = {
    "statements": (
        "The {name} number is {value}.",
        "Remember this: the {name} number is {value}.",
        "{value} is the {name} number.",
        "By the way, the {name} number is {value}.",
        "One thing must not be forgotten, namely that the {name} number is {value}.",
        "Here is something important: the {name} number is {value}.",
        "Please keep in mind that {value} is the {name} number.",
        "Somebody had written on the wall that the {name} number was {value}.",
        "As for the {name} number, it is {value}.",
        "Let it be noted that the {name} number is {value}.",
        "The number they call the {name} number is {value}.",
        "If anyone asks for the {name} number, say {value}.",
    ),
    "questions": (
        "What is the {name} number?",
        "Which number is the {name} number?",
        "What was the {name} number that the text mentioned?",
        "Can you tell me the {name} number?",
        "Do you remember the {name} number?",
        "Earlier there was a {name} number. What was it?",
        "Please repeat the {name} number.",
        "I forgot the {name} number. Which one was it?",
    ),
}
CITY = {
    "statements": (
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
        "It was in {value} that {name} was born.",
        "Everybody knows that {name} was born in {value}.",
        "Remember this: {name} was born in {value}.",
        "{name}, who was born in {value}, sends regards.",
        "By the way, {name} was born in {value}.",
        "{value} is the city in which {name} was born.",
    ),
    "questions": (
        "Where was {name} born?",
        "In which city was {name} born?",
        "What is the birthplace of {name}?",
        "Which city does {name} come from by birth?",
        "Do you remember where {name} was born?",
        "The text said where {name} was born. Where was it?",
    ),
}
RECORD = {
    "statements": (
        "Record {name}: {value}.",
        "[{name}] = {value}.",
        "Entry {name} has the value {value}.",
        "Set {name} to {value}.",
        "{name} -> {value}.",
        "Under {name} the register says {value}.",
        "The table has {value} for {name}.",
        "{name} stands for {value}.",
    ),
    "questions": (
        "What is the value of {name}?",
        "What does the register say under {name}?",
        "Look up {name}.",
        "Which value belongs to {name}?",
        "What was recorded for {name}?",
        "{name}?",
    ),
}
MOVES = (
    "{person} went to the {place}.",
    "{person} walked to the {place}.",
    "{person} is now in the {place}.",
    "Then {person} moved to the {place}.",
    "After a while {person} entered the {place}.",
    "{person} hurried off to the {place}.",
)
TAKES = (
    "{person} picked up the {object}.",
    "{person} took the {object}.",
    "{person} has got the {object} now.",
    "There {person} grabbed the {object}.",
)
DROPS = (
    "{person} put down the {object}.",
    "{person} left the {object} there.",
    "{person} dropped the {object}.",
)
WHERE_PERSON = (
    "Where is {person}?",
    "Where is {person} now?",
    "In which place is {person}?",
    "Do you know where {person} is?",
)
WHERE_OBJECT = (
    "Where is the {object}?",
    "Where is the {object} now?",
    "In which place is the {object}?",
    "Do you know where the {object} is?",
)
WHERE_BEFORE = (
    "Where was the {object} before the {place}?",
    "Where was the {object} before it came to the {place}?",
    "In which place was the {object} before it was in the {place}?",
    "The {object} is or was in the {place}. Where was it directly before?",
)
# Around a question and its answer; the answer follows with a space in front.
FRAMES = (
    ("\n\nQuestion: {question}\nAnswer:", ".\n\n"),
    ("\n\nQ: {question}\nA:", ".\n\n"),
    ("\n\n{question} The answer is", ".\n\n"),
    ("\n\n{question}\n\nThe correct answer:", ".\n\n"),
)
REPEAT = (
    "\n\n[repeat random segment]:",
    "\n\nOnce more, as it stood above:",
    "\n\nHere is a passage of the text again:",
    "\n\nRepeat:",
)


def choose(rng, phrasings, which="all"):
    """One of several phrasings, drawn with a `numpy.random.Generator`: from all of them, or from one part."""
    held_out = max(1, len(phrasings) // 4)
    if which == "train":
        phrasings = phrasings[:-held_out]
    elif which == "held_out":
        phrasings = phrasings[-held_out:]
    return phrasings[rng.integers(len(phrasings))]


def some(rng, words, count):
    """A list of `count` different words."""
    return [words[i] for i in rng.permutation(len(words))[:count]]


def check_which(which):
    """Raises ValueError unless `which` is one of `WHICH`."""
    if which not in WHICH:
        raise ValueError(f"`phrasings` must be one of {WHICH}. Received: phrasings={which!r}")


def digits(rng, count):
    """A number of `count` digits as a str, the first of which is not 0."""
    return str(rng.integers(10 ** (count - 1), 10**count, dtype=np.int64))
