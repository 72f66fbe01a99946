"""The singular of a noun by its spelling, as far as CHAIR's objects need it.

CHAIR takes singulars from the library `pattern`, which can hardly be installed today. It looks only for the words
of its table of objects, so these rules agree with that library wherever one of those words comes out, and no
further. Its slips decide which words count, and are kept: a word that is the end of a word without a plural stays
as it is ("ers" of "clippers"), "cookies" and "ties" of two kinds differ, and "glass" becomes "glas".
"""

from __future__ import annotations

import re
from functools import lru_cache

_NO_PLURAL = (
    "bison bream breeches britches carp chassis clippers cod contretemps corps debris diabetes djinn eland elk "
    "flounder gallows graffiti headquarters herpes high-jinks homework innings jackanapes mackerel measles mews mumps "
    "news pincers pliers proceedings rabies salmon scissors series shears species swine trout tuna whiting wildebeest "
    "advice bread butter cheese electricity equipment fruit furniture garbage gravel happiness information ketchup "
    "knowledge love luggage mathematics mayonnaise meat mustard progress research rice sand software understanding "
    "water christmas georgia moose swiss cannabis"
)
_STAY = frozenset(word[start:] for word in _NO_PLURAL.split() for start in range(len(word)))

# the plurals of these stay, too
_IN_IE = (
    "aunties beanies birdies bogies bookies collies cookies cuties doggies eyries freebies groupies hankies hippies "
    "hoagies hotties indies junkies laddies lingeries meanies nighties oldies pixies quickies reveries rookies softies "
    "sorties stoolies sweeties techies toughies veggies weenies yuppies zombies"
)
_STAY_IN_IE = tuple(_IN_IE.split())

_ENDINGS = {
    "children": "child", "people": "person", "men": "man", "geese": "goose", "teeth": "tooth", "feet": "foot",
    "leaves": "leaf", "loaves": "loaf", "oxen": "ox", "axes": "axe", "moves": "move", "monies": "money", "our": "my",
}  # fmt: skip
"""Endings of words, tried in this order, and what they become."""

_RULES = tuple(
    (re.compile(pattern), singular)
    for pattern, singular in (
        (r"^oxen", "ox"),
        (r"(?<=alias)es$|(?<=status)es$", ""),
        (r"(?<=cris)es$|(?<=test)es$|(?<=ax)es$", "is"),
        (r"(?<=shoe)s$", ""),
        (r"(?<=o)es$", ""),
        (r"(?<=bus)es$", ""),
        (r"(?<=[ml|])ice$", "ouse"),
        (r"(?<=x)es$|(?<=ch|ss|sh)es$", ""),
        (r"(?<=[^aeiouy])ies$|(?<=qu)ies$", "y"),
        (r"(?<=[aeo]l)ves$|(?<=[^d]ea)ves$|(?<=ar)ves$", "f"),
        (r"(?<=erve)s$", ""),
        (r"(?<=[nlw]i)ves$", "fe"),
        (r"(?<=[lr])ves$", "f"),
        (r"(?<=[aeo]ve)s$", ""),
        (r"(?<=sive)s$|(?<=tive)s$|(?<=hive)s$", ""),
        (r"(?<=[^f])ves$", "fe"),
        (r"(?<=[ti])a$", "um"),
        (r"s$", ""),
    )
)


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """The singular of a word in lower case; of a singular, what the rules make of it."""
    if word in _STAY or word.endswith(_STAY_IN_IE):
        return word
    for ending, becomes in _ENDINGS.items():
        if word.endswith(ending):
            return word.removesuffix(ending) + becomes
    for pattern, becomes in _RULES:
        if pattern.search(word):
            return pattern.sub(becomes, word)
    return word
