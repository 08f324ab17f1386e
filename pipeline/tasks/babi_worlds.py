"""The worlds of bAbI's first five tasks (Weston et al. 2015, arXiv 1502.05698), simulated.

People walk between places, carry things, and hand them on; every sentence is a fact. Names, verbs
and questions are bAbI's, so that its answers and BABILong's labels apply.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
TRADERS = ("Bill", "Fred", "Jeff", "Mary")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
GO = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
TAKE = ("got", "picked up", "grabbed", "took")
DROP = ("dropped", "put down", "left", "discarded")
GIVE = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    """Facts in order, a question, its one-word answer, and which facts decide it (indices)."""

    facts: tuple[str, ...]
    question: str
    answer: str
    needed: tuple[int, ...]


class World:
    """Where everyone and everything is, and where things have been; acts write facts."""

    def __init__(self, rng: random.Random, people: tuple[str, ...]) -> None:
        self.rng, self.people = rng, people
        self.facts: list[str] = []
        self.place: dict[str, str] = {}
        self.arrived: dict[str, int] = {}
        self.holder: dict[str, str | None] = dict.fromkeys(OBJECTS)
        # Of each thing once taken: (place, fact that brought it there), one after another.
        self.track: dict[str, list[tuple[str, int]]] = {thing: [] for thing in OBJECTS}

    def _tell(self, fact: str) -> int:
        self.facts.append(fact)
        return len(self.facts) - 1

    def _note(self, thing: str, place: str, fact: int) -> None:
        if not self.track[thing] or self.track[thing][-1][0] != place:
            self.track[thing].append((place, fact))

    def go(self, person: str) -> None:
        """To another place than where the person is known to be, with all that is carried."""
        place = self.rng.choice([p for p in PLACES if p != self.place.get(person)])
        fact = self._tell(f"{person} {self.rng.choice(GO)} the {place}.")
        self.place[person], self.arrived[person] = place, fact
        for thing, holder in self.holder.items():
            if holder == person:
                self._note(thing, place, fact)

    def take(self, person: str) -> bool:
        """A thing that nobody holds and that may be where the person is; whether there was one."""
        here = self.place.get(person)
        free = [
            thing
            for thing, holder in self.holder.items()
            if holder is None and (not self.track[thing] or self.track[thing][-1][0] == here)
        ]
        if here is None or not free:
            return False
        thing = self.rng.choice(free)
        self._tell(f"{person} {self.rng.choice(TAKE)} the {thing} there.")
        self.holder[thing] = person
        self._note(thing, here, self.arrived[person])
        return True

    def drop(self, person: str) -> bool:
        """One of the things that the person holds; whether there was one."""
        held = [thing for thing, holder in self.holder.items() if holder == person]
        if not held:
            return False
        thing = self.rng.choice(held)
        self._tell(f"{person} {self.rng.choice(DROP)} the {thing} there.")
        self.holder[thing] = None
        return True

    def live(self, steps: int) -> None:
        """So many acts of chance."""
        done = 0
        while done < steps:
            person, chance = self.rng.choice(self.people), self.rng.random()
            if person not in self.place or chance < 0.5:
                self.go(person)
            elif chance < 0.8:
                if not self.take(person):
                    continue
            elif not self.drop(person):
                continue
            done += 1


def one_fact(rng: random.Random) -> Story:
    """qa1: where is a person who moved about?"""
    world = World(rng, PEOPLE)
    for _ in range(2 * rng.randint(1, 5)):
        world.go(rng.choice(PEOPLE))
    person = rng.choice(sorted(world.place))
    needed = (world.arrived[person],)
    return Story(tuple(world.facts), f"Where is {person}?", world.place[person], needed)


def two_facts(rng: random.Random) -> Story:
    """qa2: where is a thing that was carried?"""
    while True:
        world = World(rng, PEOPLE)
        world.live(rng.randint(4, 14))
        things = [thing for thing, track in world.track.items() if len(track) > 1]
        if things:
            thing = rng.choice(things)
            place, fact = world.track[thing][-1]
            return Story(tuple(world.facts), f"Where is the {thing}?", place, (fact,))


def three_facts(rng: random.Random) -> Story:
    """qa3: where was a thing before it came to a place?"""
    while True:
        world = World(rng, PEOPLE)
        world.live(rng.randint(10, 30))
        choices = []
        for thing, track in world.track.items():
            places = [place for place, _ in track]
            for at in range(1, len(track)):
                # A place that it came to once, so that the question has one answer.
                if places.count(places[at]) == 1:
                    choices.append((thing, track[at - 1], track[at]))
        if choices:
            thing, before, after = rng.choice(choices)
            question = f"Where was the {thing} before the {after[0]}?"
            return Story(tuple(world.facts), question, before[0], (before[1], after[1]))


def two_places(rng: random.Random) -> Story:
    """qa4: which place lies in a direction of another?"""
    first, middle, last = rng.sample(PLACES, 3)
    if rng.random() < 0.5:
        one, other = rng.choice((("north", "south"), ("east", "west")))
        if rng.random() < 0.5:
            one, other = other, one
    else:
        one, other = rng.choice(("north", "south")), rng.choice(("east", "west"))
    facts = [f"The {first} is {one} of the {middle}.", f"The {last} is {other} of the {middle}."]
    at = rng.randrange(2)
    place, direction = ((first, one), (last, other))[at]
    if rng.random() < 0.5:
        question, answer = f"What is {direction} of the {middle}?", place
    else:
        question, answer = f"What is the {middle} {OPPOSITE[direction]} of?", place
    if rng.random() < 0.5:
        facts, at = facts[::-1], 1 - at
    return Story(tuple(facts), question, answer, (at,))


def three_arguments(rng: random.Random) -> Story:
    """qa5: who gave what to whom?"""
    world = World(rng, TRADERS)
    gifts: list[tuple[str, str, str, int]] = []
    steps, wanted = 0, rng.randint(2, 8)
    while steps < wanted or not gifts:
        person = rng.choice(TRADERS)
        held = [thing for thing, holder in world.holder.items() if holder == person]
        chance = rng.random()
        if person not in world.place or chance < 0.3:
            world.go(person)
        elif held and chance < 0.7:
            thing = rng.choice(held)
            to = rng.choice([other for other in TRADERS if other != person])
            # bAbI too lets people give what they carry to anyone, wherever that one was seen last.
            fact = world._tell(f"{person} {rng.choice(GIVE)} the {thing} to {to}.")
            world.holder[thing] = to
            gifts.append((person, thing, to, fact))
        elif not world.take(person):
            continue
        steps += 1
    giver, thing, to, fact = gifts[-1]
    choices = [
        (f"Who did {giver} give the {thing} to?", to),
        (f"What did {giver} give to {to}?", thing),
        (f"Who gave the {thing} to {to}?", giver),
        (f"Who gave the {thing}?", giver),
        (f"Who received the {thing}?", to),
    ]
    question, answer = rng.choice(choices)
    return Story(tuple(world.facts), question, answer, (fact,))


WORLDS = {
    "qa1": one_fact,
    "qa2": two_facts,
    "qa3": three_facts,
    "qa4": two_places,
    "qa5": three_arguments,
}
