"""Little stories from a grammar, to train and to test a small model on.

All of it is synthetic text. A story has six to ten sentences; all stories together have about 150 different words. What
a story says is drawn at random, but it keeps to itself: the hero's name, the pronouns, the thing, its colour and the
animal stay the same, an animal moves as its kind does, and what is learned in the end follows from what went wrong.
Every choice is uniform, so the information in a story is known: no model can predict these stories better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["Teller", "can_tell", "story", "tell"]

NAMES = {"boy": ("Tom", "Ben", "Max", "Sam"), "girl": ("Lily", "Mia", "Anna", "Sue")}
PRONOUNS = {"boy": ("he", "him", "his"), "girl": ("she", "her", "her")}
THINGS = ("ball", "kite", "boat", "hat", "book", "drum")
COLOURS = ("red", "blue", "green", "yellow")
PLACES = ("park", "garden", "forest", "beach")
NATURES = ("big", "small", "old", "funny")
MOVES = {"dog": "ran", "cat": "climbed", "bird": "flew", "frog": "jumped", "duck": "swam", "rabbit": "hopped"}
PARENTS = ("mom", "dad")
DAYS = ("sunny", "warm", "cold", "windy")
SPOTS = ("under a tree", "behind a rock", "in the grass", "near the river")
OPENINGS, OWNING, PLOTS = ("once", "was"), ("had", "loved", "got"), ("lost", "fell", "taken", "hurt")
_HIDDEN = {*OPENINGS, *OWNING, *PLOTS}  # choices that a text does not hold word by word


class Teller:
    """Draws choices and adds up what they tell: ``nats``, the information in all of them."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        self._random = np.random.default_rng(seed)
        self.nats = 0.0

    def pick(self, *options: str) -> str:
        """One of the options, each as likely as the others."""
        self.nats += math.log(len(options))
        return options[self._random.integers(len(options))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def story(teller: Teller) -> str:
    """One story. Different choices give different texts, so ``teller.nats`` is its information."""
    pick = teller.pick
    kind = pick(*NAMES)
    name = pick(*NAMES[kind])
    he, him, his = PRONOUNS[kind]
    if pick(*OPENINGS) == "once":
        said = [f"Once upon a time there was a little {kind} named {name}."]
    else:
        said = [f"{name} was a {pick('good', 'brave', 'happy')} little {kind}."]
    thing, colour = pick(*THINGS), pick(*COLOURS)
    owning = pick(*OWNING)
    whose = {"had": f"{he} had a", "loved": f"{he} loved {his}"}.get(owning)
    said.append(f"{_capital(whose or f'{his} {pick(*PARENTS)} gave {him} a')} {colour} {thing}.")
    said.append(f"One {pick(*DAYS)} day {he} took the {thing} to the {pick(*PLACES)}.")
    animal, nature = pick(*MOVES), pick(*NATURES)
    an = "an" if nature == "old" else "a"
    plot = pick(*PLOTS)
    if plot == "hurt":
        said += [f"There {he} saw {an} {nature} {animal} {pick(*SPOTS)}.",
                 f"The {animal} was {pick('hurt', 'lost', 'hungry')} and {pick('sad', 'cold', 'afraid')}.",
                 f"{name} {pick(f'took the {animal} home', f'gave the {animal} food', f'gave the {animal} water')}."]
        lesson, thankful = "be kind", f"the {animal}"
    elif plot == "taken":
        said += [f"{_capital(an)} {nature} {animal} came and took the {thing}.", f"{name} was {pick('sad', 'angry')}.",
                 pick(f'"Please give it back!" said {name}.', f'"We can play together!" said {name}.'),
                 f"The {animal} gave the {thing} back."]
        lesson, thankful = "share", ""
    else:
        if plot == "lost":
            said += [f"{_capital(he)} put it {pick(*SPOTS)} and played.", f"But then the {thing} was gone."]
            lesson = "be careful"
        else:
            said += [f"But the {thing} fell into the {pick('river', 'mud', 'hole')}.",
                     f"{_capital(he)} could not get it."]
            lesson = "ask for help"
        said += [f"{name} was very sad.", f"Then {an} {nature} {animal} came.",
                 f'"{pick("Do not cry", "I can help you")}!" said the {animal}.',
                 f"The {animal} {MOVES[animal]} and got the {thing}."]
        thankful = name
    if thankful:
        said.append(pick(f'"Thank you!" said {thankful}.', f"{_capital(thankful)} was very happy."))
    said.append(pick(f"{name} and the {animal} played with the {colour} {thing} all day.",
                     f"From that day on, {name} and the {animal} were best friends."))
    said.append(pick(f"{name} learned to {lesson}.", f"Then {he} went home."))
    return " ".join(said)


def tell(count: int, seed: int = 0) -> Iterator[tuple[str, float]]:
    """``count`` stories, each with its information in nats; the same seed tells the same stories."""
    for index in range(count):
        teller = Teller((seed, index))
        yield story(teller), teller.nats


class _Following(Teller):
    """Takes given choices, then the first of every further one that the text could hold; ``open`` : the others."""

    def __init__(self, text: str, choices: Sequence[str]) -> None:
        self.nats, self._text, self._choices = 0.0, text.lower(), choices
        self.taken: list[str] = []
        self.open: list[list[str]] = []

    def pick(self, *options: str) -> str:
        if len(self.taken) < len(self._choices):
            chosen = self._choices[len(self.taken)]
        else:
            fitting = [option for option in options if option.lower() in self._text or option in _HIDDEN]
            self.open += [[*self.taken, option] for option in fitting[1:]]
            chosen = (fitting or options)[0]
        self.taken.append(chosen)
        return chosen


def can_tell(text: str) -> bool:
    """Whether the grammar tells ``text``: its sentences in their order, and true to each other."""
    waiting: list[list[str]] = [[]]
    while waiting:
        teller = _Following(text, waiting.pop())
        if story(teller) == text:
            return True
        waiting += teller.open
    return False
