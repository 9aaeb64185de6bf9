"""Who is where: people who move, take things along and leave them, and questions that need one to three facts."""

import typing

from keras_fam.tasks import phrases
from keras_fam.tasks.facts import Exercise, Facts, Question


class _Stay(typing.NamedTuple):
    """A place at which something is or was, and the statements that say so."""

    place: str
    needs: tuple


class World:
    """People, things and places. Every method makes one statement true and notes which statements it follows from.

    Attributes:
        people: dict from each person to the list of their `_Stay`s.
        things: dict from each thing to the list of its `_Stay`s, without the same place twice in a row.
        holder: dict from each thing that somebody has to `(person, statement)`.
    """

    def __init__(self, people, things):
        self.people = {person: [] for person in people}
        self.things = {thing: [] for thing in things}
        self.holder = {}

    def move(self, statement, person, place):
        self.people[person].append(_Stay(place, (statement,)))
        for thing, (holder, taken) in self.holder.items():
            if holder == person:
                self._found(thing, _Stay(place, (taken, statement)))

    def take(self, statement, person, thing):
        self.holder[thing] = (person, statement)
        if self.people[person]:  # it is where the person is, which an earlier statement said
            stay = self.people[person][-1]
            self._found(thing, _Stay(stay.place, (*stay.needs, statement)))

    def drop(self, person, thing):
        self.holder.pop(thing)

    def _found(self, thing, stay):
        if not self.things[thing] or self.things[thing][-1].place != stay.place:
            self.things[thing].append(stay)

    def here(self, person):
        """The place of a person, or None as long as nothing was said."""
        return self.people[person][-1].place if self.people[person] else None


class WhoIsWhere(Facts):
    """A small world of people who go to places, take things and leave them, and a question about it.

    With one fact the question is where somebody is, with two where a thing is (who has or had it, and where that person
    went), with three where a thing was before it came to a place. The other statements are about other people, things
    and times; the world never contradicts itself, and a thing that was left stays there until somebody takes it.

    Args:
        facts: 1, 2 or 3.
        events: int, statements in a text, at least 4; where no question of this kind has an answer, there are more.
        people, things, places: int, how many of each there are.
        questions: int, how many different questions are asked, as far as there are so many.
        name: see `Facts`; None means `"1 fact"`, `"2 facts"` or `"3 facts"`.

    Raises:
        ValueError: for options outside their range.

    Example:

    ```python
    exercise = keras_fam.tasks.WhoIsWhere(facts=2).draw(np.random.default_rng(0))
    exercise.questions[0].needs  # the two statements that it follows from
    ```
    """

    def __init__(self, facts=1, events=6, people=3, things=2, places=5, questions=1, name=None):
        super().__init__(name or f"{facts} fact{'s' if facts > 1 else ''}")
        if facts not in (1, 2, 3):
            raise ValueError(f"`facts` must be 1, 2 or 3. Received: facts={facts!r}")
        sizes = {"people": (people, phrases.PEOPLE), "things": (things, phrases.OBJECTS)}
        for key, (size, words) in {**sizes, "places": (places, phrases.PLACES)}.items():
            least = 3 if key == "places" else 1
            if not least <= size <= len(words):
                raise ValueError(f"`{key}` must be from {least} to {len(words)}. Received: {key}={size}")
        if events < 4 or questions < 1:
            raise ValueError(
                "`events` must be at least 4 and `questions` at least 1. Received: "
                f"events={events}, questions={questions}"
            )
        self.facts, self.events, self.questions = facts, events, questions
        self.people, self.things, self.places = people, things, places

    def draw(self, rng, phrasings="all"):
        events = self.events
        while True:
            world, statements = self._live(rng, events, phrasings)
            asked = self._questions(rng, world, phrasings)
            if asked:
                return Exercise(tuple(statements), tuple(asked))
            events += 1  # a longer story has an answer in the end

    def _live(self, rng, events, phrasings):
        people = phrases.some(rng, phrases.PEOPLE, self.people)
        things = phrases.some(rng, phrases.OBJECTS, self.things)
        places = phrases.some(rng, phrases.PLACES, self.places)
        world, statements = World(people, things), []
        for number in range(events):
            person, chance = people[rng.integers(len(people))], rng.random()
            here = world.here(person)
            held = [thing for thing, (holder, _) in world.holder.items() if holder == person]
            # A thing can be taken by somebody whose place is known, where it lies or where nothing was said of it.
            free = [t for t in things if t not in world.holder and _lies_at(world, t) in (None, here)]
            if here is not None and free and chance < 0.4:
                thing = free[rng.integers(len(free))]
                statements.append(phrases.choose(rng, phrases.TAKES, phrasings).format(person=person, object=thing))
                world.take(number, person, thing)
            elif held and chance > 0.85:
                thing = held[rng.integers(len(held))]
                statements.append(phrases.choose(rng, phrases.DROPS, phrasings).format(person=person, object=thing))
                world.drop(person, thing)
            else:
                others = [place for place in places if place != here]
                place = others[rng.integers(len(others))]
                statements.append(phrases.choose(rng, phrases.MOVES, phrasings).format(person=person, place=place))
                world.move(number, person, place)
        return world, statements

    def _questions(self, rng, world, phrasings):
        found = []
        if self.facts == 1:
            for person, stays in world.people.items():
                if stays:
                    text = phrases.choose(rng, phrases.WHERE_PERSON, phrasings).format(person=person)
                    found.append(Question(text, f"the {stays[-1].place}", stays[-1].needs))
        else:
            for thing, stays in world.things.items():
                if self.facts == 2 and stays and len(stays[-1].needs) == 2:
                    text = phrases.choose(rng, phrases.WHERE_OBJECT, phrasings).format(object=thing)
                    found.append(Question(text, f"the {stays[-1].place}", stays[-1].needs))
                # Only a place at which the thing was once has one place before it.
                if self.facts == 3 and len(stays) > 1:
                    now, before = stays[-1], stays[-2]
                    needs = tuple(sorted({*now.needs, *before.needs}))
                    if len(needs) == 3 and sum(stay.place == now.place for stay in stays) == 1:
                        text = phrases.choose(rng, phrases.WHERE_BEFORE, phrasings)
                        text = text.format(object=thing, place=now.place)
                        found.append(Question(text, f"the {before.place}", needs))
        return [found[i] for i in rng.permutation(len(found))[: self.questions]]


def _lies_at(world, thing):
    """Where a thing that nobody has lies, or None as long as nothing was said."""
    stays = world.things[thing]
    return stays[-1].place if stays else None
