"""The bundled search corpus: 1,200 invented people, one passage each, generated from a fixed seed.

Names are combined from 40 first and 40 family names, so a person held out for evaluation is a new combination of parts
that training has seen; the facts of that person stand nowhere but in the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

_CORPUS_SEED = 20250514
TRAIN_PEOPLE, HELD_OUT_PEOPLE = 900, 300

FIRST_NAMES = (
    "Ada Bela Cleo Dario Edda Falk Gita Hanno Ines Jaro Kaia Lev Mira Nilo Olga Pavel Quin Rhea Sven Tova "
    "Ulla Vito Wanda Xenia Yara Zeno Alma Bruno Carla Dunja Emil Freya Goran Hilda Ivo Jana Kurt Lotte Marek Nora"
).split()
FAMILY_NAMES = (
    "Abrell Bostan Corvin Delmar Eskild Fontan Grabow Hallik Istrat Jandel Korbat Lindau Morvan Nestor Oskam Pelzer "
    "Quirin Rostow Sandel Tolvan Umbreit Vasko Wendel Xanten Yorick Zabel Arlund Brandis Cassel Dornik Elbing Farkas "
    "Gollan Hessel Ivarsson Jessen Kolman Lazar Mertens Novik"
).split()
CITIES = (
    "Oslo Porto Riga Turin Lyon Ghent Bergen Cadiz Dublin Essen Genoa Haifa Izmir Jaen Kyoto Lima Minsk Nagoya "
    "Odessa Perth Quito Rabat Sofia Tunis"
).split()
JOBS = (
    "baker pilot farmer nurse tailor judge potter sailor welder miner dancer painter plumber barber butcher carpenter "
    "doctor editor florist gardener jeweller lawyer mason waiter"
).split()

CITY_QUESTION = "Where was {name} born?"
JOB_QUESTION = "What does {name} work as?"
PASSAGE = "The person {name} was born in {city} and is a {job} by trade."


@dataclass(frozen=True, kw_only=True)
class Person:
    """One invented person and the two facts that the corpus tells."""

    name: str
    city: str
    job: str

    @property
    def passage(self) -> str:
        return PASSAGE.format(name=self.name, city=self.city, job=self.job)


@cache
def people() -> Sequence[Person]:
    """All people; the first ``TRAIN_PEOPLE`` may be trained on, the others are for evaluation only."""
    rng = Random(_CORPUS_SEED)
    names = [f"{first} {family}" for first in FIRST_NAMES for family in FAMILY_NAMES]
    chosen = rng.sample(names, TRAIN_PEOPLE + HELD_OUT_PEOPLE)
    return tuple(Person(name=name, city=rng.choice(CITIES), job=rng.choice(JOBS)) for name in chosen)


def corpus_passages() -> list[tuple[str, str]]:
    """(title, text) of every passage: what the search index is built from."""
    return [(person.name, person.passage) for person in people()]
