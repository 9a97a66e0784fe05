"""Captions and things in plain words, from the names and titles that drawings have."""

import re
from functools import cache

TONE = re.compile(r"\b(medium light|medium dark|light|medium|dark) skin tone\b")
TONES = ("medium light", "medium dark", "light", "medium", "dark")
COUNTS = {"one", "two", "three", "four", "five", "six"}  # at the end of an icon's name: a serial



def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that tell variants of a thing apart: colour, size, who does it, how it is drawn
VARIANT = _set("""
    a an the of for in on with and s to red orange yellow green blue purple violet pink brown black
    white grey gray golden gold silver dark light deep pale small large big little medium heavy new
    old simple man men woman women person people boy girl male female face head icon symbol sign
    button emoji flag facing right left fill line outline filled colored coloured color colour
    cartoon""")
# Nouns that have no article, though they are no plural by their spelling
MASS = _set("""
    bread broccoli butter cash cheese coffee coral equipment fire fog garlic ginger golf hail honey
    ice ketchup lava lightning luggage mail mate meat milk money music news paper popcorn rain rice
    salt sand sake sashimi smoke snow soap sushi spaghetti tea tennis water wheat wine wood
    wind pasta""")
MANY = _set("children feet men mice people teeth women")
MAKER = _set("clipart clip art svg vector image drawing icon")


def words(text: str) -> list[str]:
    """Split a name or title in lower-case words, without signs, serial numbers and brackets."""
    text = re.sub(r"\([^)]*\)", " ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text)
    text = re.sub(r"[^a-z0-9' ]+", " ", text.lower().replace("’", "'"))
    return [word.strip("'") for word in text.split() if word.strip("'")]


def is_plural(word: str) -> bool:
    """Return whether a noun looks like a plural: bananas, but not cactus, glass or tennis."""
    return bool(re.fullmatch(r".{2,}(?<![siu'])(?<!ma)s", word))


def article(phrase: str) -> str:
    """Return a noun phrase with "a" or "an" where its noun is singular and countable."""
    head = re.split(r" (?:of|with|in|on|at|from|for|and|to|without) ", phrase)[0].split()
    if not head or head[0] in {"a", "an", "the", "no"} or head[-1] in MASS or head[0] in MANY:
        return phrase
    if any(map(is_plural, head)):
        return phrase
    if head[0].endswith("ing") and len(head) == 1:
        return phrase
    sound = re.match(r"(?!eu|uni|ure|one\b|once|u |us |use|usb|ut)[aeiou8]|hour|x ray", phrase)
    return f"{'an' if sound else 'a'} {phrase}"


def singular(word: str) -> str:
    """Return a plural's singular, as far as its spelling shows it."""
    for end, single in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("toes", "to")):
        if len(word) > 5 and word.endswith(end):
            return word.removesuffix(end) + single
    return word.removesuffix("s") if is_plural(word) else word


def thing(phrase: str) -> str:
    """Return what a phrase shows, the same for all variants: its words in the singular and in
    alphabetical order, less colour, size, skin tone and who does it."""
    parts = [singular(word.removesuffix("'s")) for word in TONE.sub("", phrase).split()]
    kept = sorted({part for part in parts if part not in VARIANT and not part.isdigit()})
    return " ".join(kept or sorted(set(parts)))


class Vocabulary:
    """English words: which titles are English, and where the words of a joined name begin."""

    def __init__(self, entries: list[str]):
        self.known = {entry.lower() for entry in entries}
        # names of people and two letters would fit everywhere inside a joined name
        self.inside = {e for e in entries if e.islower() and len(e) > 2 and e.isalpha()}
        self.inside |= {"up", "of", "tv", "on", "no", "in", "by"}

    def is_english(self, title: list[str]) -> bool:
        """Return whether all words are English, one of them of three letters and no proper name."""
        return any(word in self.inside and len(word) > 2 for word in title) and all(
            word in self.known for word in title
        )

    def parts(self, word: str) -> tuple[str, ...]:
        """Return a word as it is, or the two that it is joined of: ("paper", "clip")."""
        joined = () if word in self.known else self.split(word)
        return joined if len(joined) == 2 and min(map(len, joined)) > 3 else (word,)

    @cache  # noqa: B019 - one vocabulary a process
    def split(self, name: str) -> tuple[str, ...]:
        """Split a name without spaces into the fewest words; () where it is not made of words."""
        if name in self.inside:
            return (name,)
        found: tuple[str, ...] = ()
        for length in range(len(name) - 2, 1, -1):
            rest = self.split(name[length:]) if name[:length] in self.inside else ()
            if rest and (not found or len(rest) + 1 < len(found)):
                found = (name[:length], *rest)
        return found
