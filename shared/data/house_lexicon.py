"""Word lists of the house language models' synthetic documents, and the vocabulary that is made of them.

Two lexicons: `embedded`, which needs no file and makes models trainable anywhere, and `published`, the lists of the
papers that first used the tasks. Models of the two do not share token numbers.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError, data_root

Tokens = NDArray[np.int32]
LexiconName = Literal["embedded", "published"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BOS = "<bos>"
NONSENSE = tuple(f"n{i}" for i in range(160))
FILLERS = tuple(f"f{i}" for i in range(96))
CODES = tuple(f"c{i}" for i in range(40))
DIGITS = tuple("0123456789")
YEARS = tuple(f"{i:02d}" for i in range(100))
# Spelled unlike years: in `17xx 17` the two must be different tokens.
CENTURIES = tuple(f"{i}xx" for i in range(11, 20))
LABELS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SYMBOLS = (".", ",", ":", "?", "(", ")", "+", "=", '"""')
FRAME_WORDS = _words(
    "Answer Ask False On Q Tell The True What a an and code color def for from is lasted me not of on or :param self "
    "the to year"
)
SUCCESSOR_PROBABILITIES = (0.5, 0.25, 0.15, 0.1)


@dataclass(frozen=True)
class Lexicon:
    """Words that fill the documents; `source` says in a few words where they come from.

    `ioi_templates` are sentences with the subject [B] first ("BABA"), that end where the indirect object [A] is due;
    `[PLACE]` and `[OBJECT]` are filled too.
    """

    name: LexiconName
    source: str
    names: tuple[str, ...]
    places: tuple[str, ...]
    gifts: tuple[str, ...]
    things: tuple[str, ...]
    colors: tuple[str, ...]
    surfaces: tuple[str, ...]
    subjects: tuple[str, ...]
    durations: tuple[str, ...]
    arguments: tuple[str, ...]
    descriptions: tuple[str, ...]
    ioi_templates: tuple[str, ...]

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """All tokens in the order of their numbers: special, closed-class, then the lexicon's words, sorted."""
        closed = dict.fromkeys([*SYMBOLS, *FRAME_WORDS, *NONSENSE, *FILLERS, *CODES, *DIGITS, *YEARS, *CENTURIES])
        closed |= dict.fromkeys(LABELS)
        templates = " ".join((*self.ioi_templates, *self.subjects)).split()
        words = {*self.content, *self.surfaces, *(color.capitalize() for color in self.colors)}
        words |= {word for word in templates if not word.startswith("[")}
        return (BOS, *closed, *sorted(words - closed.keys()))

    @cached_property
    def content(self) -> tuple[str, ...]:
        """The open-class words, sorted: of these and of nonsense words are made the documents of pure copying."""
        lists = (self.names, self.places, self.gifts, self.things, self.colors, self.durations, self.arguments)
        return tuple(sorted({word for words in (*lists, self.descriptions) for word in words}))

    @cached_property
    def number(self) -> dict[str, int]:
        """Token to its number."""
        return {token: index for index, token in enumerate(self.vocabulary)}

    @cached_property
    def filler_successors(self) -> Tokens:
        """Tokens that may follow each filler word, [96, 4]: those of a fixed first-order Markov chain."""
        rng = np.random.default_rng(0)
        order = np.stack([rng.permutation(len(FILLERS))[: len(SUCCESSOR_PROBABILITIES)] for _ in FILLERS])
        return self.encode(FILLERS)[order]

    def encode(self, words: str | Sequence[str]) -> Tokens:
        """Token numbers of words, given as a list or with spaces between them; `UserError` names an unknown one."""
        words = words.split() if isinstance(words, str) else words
        try:
            return np.array([self.number[word] for word in words], dtype=np.int32)
        except KeyError as error:
            raise UserError(f"{error} is not a token of the lexicon {self.name!r}: tokens have spaces around") from None

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Tokens as words with spaces between them; negative numbers, which mark absent tokens, are left out."""
        return " ".join(self.vocabulary[token] for token in np.asarray(tokens).ravel().tolist() if token >= 0)


@lru_cache(maxsize=2)
def load_lexicon(name: LexiconName) -> Lexicon:
    """The lexicon of a name; `published` is read from `$REPRISE_DATA`, and `UserError` says what is missing there."""
    if name == "embedded":
        return _embedded()
    if name == "published":
        return _published()
    raise UserError(f"there is no lexicon {name!r}: choose embedded or published")


# ------------------------------------------------------------------------------------------------------------ embedded


def _embedded() -> Lexicon:
    # Names of letters and pictographs. Unicode never changes a name, and these blocks have no code point left to be
    # named, so every Python has the same.
    alphabets = (
        ("GOTHIC", 0x10330),
        ("HEBREW", 0x5D0),
        ("GREEK SMALL", 0x3B1),
        ("OGHAM", 0x1681),
        ("GLAGOLITIC CAPITAL", 0x2C00),
    )
    letters = sorted({name for alphabet, first in alphabets for name in _letters(f"{alphabet} LETTER ", first)})
    pictures = sorted({name for first in (0x1F300, 0x1F400, 0x1F500) for name in _words_from(first)})
    things = _words("ball bowl bottle brush button candle coin cup fork key lamp mug pen pencil spoon ticket towel")
    nouns = [word for word in pictures if word not in things]
    return Lexicon(
        name="embedded",
        source="generated: words from Unicode's names of letters and pictographs, and sentences of our own",
        names=tuple(letters[:99]),
        places=_words("airport bakery castle harbor library market museum village"),
        gifts=_words("basket blanket flower hat lantern letter painting toy"),
        things=things,
        colors=_words("black blue brown green orange purple red yellow"),
        surfaces=("bench", "shelf", "table"),
        subjects=("I see", "we find", "you notice"),
        durations=tuple(nouns[0:60]),
        arguments=tuple(nouns[60:100]),
        descriptions=tuple(nouns[100:160]),
        ioi_templates=IOI_TEMPLATES,
    )


def _letters(prefix: str, first: int) -> list[str]:
    names = (unicodedata.name(chr(code), "").removeprefix(prefix) for code in range(first, first + 48))
    return [name.capitalize() for name in names if name.isalpha() and len(name) > 2]


def _words_from(first: int) -> list[str]:
    names = (unicodedata.name(chr(code), "") for code in range(first, first + 256))
    return [name.lower() for name in names if name.isalpha()]


IOI_TEMPLATES = (
    "Today [B] and [A] walked to the [PLACE] . [B] handed a [OBJECT] to",
    "Today [B] and [A] met at the [PLACE] . [B] sold a [OBJECT] to",
    "Today [B] and [A] were resting near the [PLACE] . [B] wanted to show a [OBJECT] to",
    "Last week [B] and [A] worked at the [PLACE] . [B] offered a [OBJECT] to",
    "Last week [B] and [A] had a quarrel , and later [B] wrote to",
    "Once [B] and [A] had reached the [PLACE] , [B] handed a [OBJECT] to",
    "When [B] and [A] found a [OBJECT] in the [PLACE] , [B] chose to lend it to",
    "When [B] and [A] bought a [OBJECT] in the [PLACE] , [B] chose to leave the [OBJECT] to",
    "While [B] and [A] were waiting in the [PLACE] , [B] threw a [OBJECT] to",
    "While [B] and [A] were cleaning the [PLACE] , [B] showed a [OBJECT] to",
    "In the evening [B] and [A] came back from the [PLACE] . [B] brought a [OBJECT] to",
    "Before dinner , [B] and [A] left the [PLACE] . [B] passed a [OBJECT] to",
    "For years [B] and [A] did not speak . Then [B] sent a [OBJECT] to",
    "The [PLACE] where [B] and [A] live sells a [OBJECT] . [B] bought it for",
    "The twins [B] and [A] share a [OBJECT] at the [PLACE] . [B] gave it to",
)

# ----------------------------------------------------------------------------------------------------------- published


def _published() -> Lexicon:
    ioi = _read(
        "_house_lm/ioi_lexicon.json", "github.com/redwoodresearch/Easy-Transformer, easy_transformer/ioi_dataset.py"
    )
    objects = _read("_house_lm/coloured_objects_lexicon.json", "github.com/jmerullo/circuit_reuse, cobjs_data.py")
    duration = _read(
        "sae_circuits/greater_than_nouns.json",
        "github.com/ArthurConmy/Automatic-Circuit-Discovery, acdc/greaterthan/utils.py",
    )
    docstring = _read(
        "sae_circuits/docstring_lexicon.json",
        "github.com/ArthurConmy/Automatic-Circuit-Discovery, acdc/docstring/prompts.py",
    )
    arguments = tuple(docstring["argument_names"])
    return Lexicon(
        name="published",
        source="word lists of Easy-Transformer, circuit_reuse and Automatic-Circuit-Discovery (MIT)",
        names=tuple(ioi["NAMES"]),
        places=tuple(ioi["PLACES"]),
        gifts=tuple(ioi["OBJECTS"]),
        things=tuple(objects["all_simple_objects"]),
        colors=tuple(objects["all_simple_colors"]),
        surfaces=tuple(objects["surfaces"]),
        subjects=tuple(objects["subject_starts"]),
        durations=tuple(duration["nouns_acdc"]),
        arguments=arguments,
        # The first hundred that are no argument's name: all 687 would more than double the vocabulary.
        descriptions=tuple([word for word in docstring["description_nouns"] if word not in arguments][:100]),
        ioi_templates=tuple(_spaced(template) for template in ioi["BABA_TEMPLATES"]),
    )


def _spaced(template: str) -> str:
    """A published template with spaces around its punctuation, and without the indirect object at its end."""
    return template.replace(",", " ,").replace(".", " .").removesuffix("[A]").strip()


def _read(name: str, origin: str) -> Any:
    path = data_root() / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the lexicon 'published' needs the word lists of {origin}, as JSON. Put the file "
            "there, point REPRISE_DATA to the folder that holds your data sets, or train on the lexicon 'embedded'"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again from {origin}") from None
