"""Pronunciations and how far they are apart: rules from letters to phones, features of phones, weighted edit distances.

Phones are those of ARPAbet without stress. Distances are whole numbers, thousandths of one inserted consonant, so that
no processor rounds them otherwise than another.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError

IntArray = NDArray[np.int64]
PAD = -1

# Height (0 high to 4 low), backness (0 front to 4 back), rounding, and whether the vowel glides.
VOWELS: dict[str, tuple[float, float, float, float]] = {
    "IY": (0, 0, 0, 0),
    "IH": (1, 1, 0, 0),
    "EY": (1.5, 0, 0, 1),
    "EH": (2, 0, 0, 0),
    "AE": (3.5, 0, 0, 0),
    "AA": (4, 3, 0, 0),
    "AO": (3, 4, 1, 0),
    "OW": (2, 4, 1, 1),
    "UH": (1, 3, 1, 0),
    "UW": (0, 4, 1, 0),
    "AH": (3, 2, 0, 0),
    "ER": (2, 2, 0.5, 0),
    "AY": (3.5, 2, 0, 1),
    "AW": (3.5, 3, 0.5, 1),
    "OY": (2.5, 3.5, 1, 1),
}
# Place (0 lips to 5 glottis), manner (0 stop, 1 affricate, 2 fricative, 3 nasal, 4 liquid, 5 glide), voice.
CONSONANTS: dict[str, tuple[float, float, float]] = {
    "P": (0, 0, 0),
    "B": (0, 0, 1),
    "T": (2, 0, 0),
    "D": (2, 0, 1),
    "K": (4, 0, 0),
    "G": (4, 0, 1),
    "CH": (3, 1, 0),
    "JH": (3, 1, 1),
    "F": (0.5, 2, 0),
    "V": (0.5, 2, 1),
    "TH": (1.5, 2, 0),
    "DH": (1.5, 2, 1),
    "S": (2, 2, 0),
    "Z": (2, 2, 1),
    "SH": (3, 2, 0),
    "ZH": (3, 2, 1),
    "HH": (5, 2, 0),
    "M": (0, 3, 1),
    "N": (2, 3, 1),
    "NG": (4, 3, 1),
    "L": (2, 4, 1),
    "R": (2.5, 4, 1),
    "W": (0, 5, 1),
    "Y": (3.5, 5, 1),
}
PHONES = (*VOWELS, *CONSONANTS)
NUMBER = {phone: number for number, phone in enumerate(PHONES)}
# What each feature weighs: two vowels differ by 1 at most, and so do two consonants.
VOWEL_WEIGHTS = (0.13, 0.09, 0.06, 0.08)
CONSONANT_WEIGHTS = (0.09, 0.08, 0.15)
VOWEL_FOR_CONSONANT = 1600
OF_VOWEL, OF_REDUCED_VOWEL, OF_CONSONANT = 850, 600, 1000  # inserted or deleted

# Words that the rules would get wrong and that are said often.
EXCEPTIONS: dict[str, str] = {
    word: phones
    for line in """
    a AH | an AE N | the DH AH | of AH V | to T AH | too T UW | two T UW | do D UW | does D AH Z | one W AH N
    once W AH N S | won W AH N | four F AO R | for F ER | eight EY T | ate EY T | you Y UW | your Y AO R
    are AA R | our AW ER | hour AW ER | was W AA Z | is IH Z | as AE Z | has HH AE Z | his HH IH Z | have HH AE V
    give G IH V | live L IH V | said S EH D | says S EH Z | some S AH M | come K AH M | done D AH N | none N AH N
    there DH EH R | their DH EH R | they DH EY | where W EH R | were W ER | who HH UW | what W AH T | want W AA N T
    would W UH D | could K UH D | should SH UH D | been B IH N | be B IY | he HH IY | she SH IY | we W IY | me M IY
    i AY | my M AY | by B AY | buy B AY | no N OW | know N OW | go G OW | so S OW | am AE M | any EH N IY
    many M EH N IY | people P IY P AH L | only OW N L IY | into IH N T UW | through TH R UW | though DH OW
    thought TH AO T | enough IH N AH F | these DH IY Z | those DH OW Z | this DH IH S | that DH AE T | than DH AE N
    then DH EH N | them DH EH M | with W IH DH | other AH DH ER | another AH N AH DH ER | put P UH T
    eleven IH L EH V AH N | seven S EH V AH N | second S EH K AH N D | first F ER S T | third TH ER D | ninth N AY N TH
    wednesday W EH N Z D EY | tuesday T UW Z D EY | thursday TH ER Z D EY | monday M AH N D EY | sunday S AH N D EY
    saturday S AE T ER D EY | friday F R AY D EY | minutes M IH N IH T S | business B IH Z N IH S | air EH R
    fare F EH R | fair F EH R | fares F EH R Z | airport EH R P AO R T | airline EH R L AY N | airlines EH R L AY N Z
    meal M IY L | meals M IY L Z | york Y AO R K | los L AO S | angeles AE N JH AH L AH S | houston HH Y UW S T AH N
    phoenix F IY N IH K S | detroit D IH T R OY T | chicago SH IH K AA G OW | louis L UW IH S | diego D IY EY G OW
    san S AE N | jose HH OW Z EY | seattle S IY AE T AH L | miami M AY AE M IY | atlanta AE T L AE N T AH
    philadelphia F IH L AH D EH L F IY AH | minneapolis M IH N IY AE P AH L IH S | orlando AO R L AE N D OW
    tampa T AE M P AH | ontario AA N T EH R IY OW | nashville N AE SH V IH L | memphis M EH M F IH S
    coach K OW CH | limousine L IH M AH Z IY N | breakfast B R EH K F AH S T | vegetarian V EH JH AH T EH R IY AH N
    reservation R EH Z ER V EY SH AH N | schedule S K EH JH UH L | aircraft EH R K R AE F T | code K OW D
    """.replace("\n", "|").split("|")
    if line.strip()
    for word, _, phones in [line.strip().partition(" ")]
}

# Letters and their phones, the first that fits; patterns may look at what stands around. Empty phones are silence.
RULES: tuple[tuple[str, str], ...] = (
    (r"tion", "SH AH N"),
    (r"ss(?!ion)", "S"),
    (r"ssion", "SH AH N"),
    (r"sion", "ZH AH N"),
    (r"cian", "SH AH N"),
    (r"tial|cial", "SH AH L"),
    (r"cious|tious", "SH AH S"),
    (r"ture(?=s?$)", "CH ER"),
    (r"sure(?=s?$)", "ZH ER"),
    (r"que(?=s?$)", "K"),
    (r"augh|ough(?=t)", "AO"),
    (r"ough", "AH F"),
    (r"eigh", "EY"),
    (r"igh", "AY"),
    (r"tch", "CH"),
    (r"sch", "S K"),
    (r"dge", "JH"),
    (r"^kn|^gn|^pn", "N"),
    (r"^wr", "R"),
    (r"^wh(?=o)", "HH"),
    (r"wh", "W"),
    (r"^ps", "S"),
    (r"^x", "Z"),
    (r"mb(?=s?$)", "M"),
    (r"ck", "K"),
    (r"ch", "CH"),
    (r"sh", "SH"),
    (r"ph", "F"),
    (r"th", "TH"),
    (r"gh", "G"),
    (r"ng(?=$|s$|l)", "NG"),
    (r"ng", "NG G"),
    (r"nk", "NG K"),
    (r"qu", "K W"),
    (r"sc(?=[eiy])", "S"),
    (r"cc(?=[eiy])", "K S"),
    (r"c(?=[eiy])", "S"),
    (r"g(?=e$|es$|ed$|ing$|y|em|in)", "JH"),
    (r"(?<=[dt])ed$", "IH D"),
    (r"(?<=[pkfsxc])ed$|(?<=sh)ed$|(?<=ch)ed$", "T"),
    (r"(?<=.)ed$", "D"),
    (r"(?<=[sxz])es$|(?<=sh)es$|(?<=ch)es$|(?<=[cg])es$", "IH Z"),
    (r"(?<=[bdglmnrvw])s$|(?<=[aeiouy])s$", "Z"),
    (r"(?<=[bcdfgkptz])les?$", "AH L"),
    (r"(?<=[^aeiou]r)e$|(?<=[^aeiouy])e$", ""),
    (r"(?<=[^aeiou])e(?=s$)", ""),
    (r"(?<=[aeiou][^aeiou])e(?=ly$|ment$|less$|ful$)", ""),
    (r"oor|our|oar|ore", "AO R"),
    (r"air|are(?=s?$)", "EH R"),
    (r"ear(?=[nlt])", "ER"),
    (r"ear|eer", "IH R"),
    (r"ire(?=s?$)", "AY ER"),
    (r"ar(?=[^aeiouy]|$)", "AA R"),
    (r"or(?=[^aeiouy]|$)", "AO R"),
    (r"(?:er|ir|ur)(?=[^aeiouy]|$)", "ER"),
    (r"ee|ea|ie(?=[^t])|ei", "IY"),
    (r"ai|ay|ey(?=[^$])", "EY"),
    (r"ey$|ie$", "IY"),
    (r"oa|oe", "OW"),
    (r"oo(?=k|d)", "UH"),
    (r"oo|ue|ew|ui", "UW"),
    (r"ou|ow(?=n|l|d|e)", "AW"),
    (r"ow", "OW"),
    (r"oi|oy", "OY"),
    (r"au|aw", "AO"),
    (r"al(?=l|k)", "AO"),
    (r"a(?=[bcdfgklmnpstvz](?:e$|es$|ed$|ing$))", "EY"),
    (r"i(?=[bcdfgklmnpstvz](?:e$|es$|ed$|ing$))", "AY"),
    (r"o(?=[bcdfgklmnpstvz](?:e$|es$|ed$|ing$))", "OW"),
    (r"u(?=[bcdfgklmnpstvz](?:e$|es$|ed$|ing$))", "UW"),
    (r"e(?=[bcdfgklmnpstvz]e$)", "IY"),
    (r"(?<=[^aeiou])y$", "IY"),
    (r"^y|(?<=[aeiou])y(?=[aeiou])", "Y"),
    (r"y", "IH"),
    (r"o$", "OW"),
    (r"a$", "AH"),
    (r"i$|e$", "IY"),
    (r"u$", "UW"),
    (r"x", "K S"),
    (r"j", "JH"),
    (r"(?<=[aeiou])s(?=[aeiou])", "Z"),
    (r"h(?=[aeiouy])", "HH"),
    (r"h", ""),
    *((letter, phone) for letter, phone in zip("bcdfgklmnpqrstvwz", "BKDFGKLMNPKRSTVWZ", strict=True)),
    ("a", "AE"),
    ("e", "EH"),
    ("i", "IH"),
    ("o", "AA"),
    ("u", "AH"),
)
_RULES = tuple((re.compile(pattern), tuple(NUMBER[phone] for phone in phones.split())) for pattern, phones in RULES)
_DOUBLED = re.compile(r"([bdfgklmnprtz])\1")

# espeak-ng's Kirshenbaum-like names of American English, longest first.
ESPEAK = {
    "aI@": "AY ER", "aU@": "AW ER", "i@": "IH R", "e@": "EH R", "U@": "UH R", "A@": "AA R", "O@": "AO R", "o@": "AO R",
    "aI": "AY", "aU": "AW", "eI": "EY", "oU": "OW", "OI": "OY", "tS": "CH", "dZ": "JH", "3:": "ER", "i:": "IY",
    "u:": "UW", "A:": "AA", "O:": "AO", "@L": "AH L", "I2": "IH", "I#": "IH", "a#": "AH", "aa": "AE", "@5": "AH",
    "i": "IY", "u": "UW", "3": "ER", "@": "AH", "I": "IH", "E": "EH", "a": "AE", "A": "AA", "0": "AA", "O": "AO",
    "V": "AH", "U": "UH", "p": "P", "b": "B", "t": "T", "d": "D", "k": "K", "g": "G", "f": "F", "v": "V", "T": "TH",
    "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH", "h": "HH", "m": "M", "n": "N", "N": "NG", "l": "L", "r": "R",
    "w": "W", "j": "Y", "x": "K", "?": "T",
}  # fmt: skip
_ESPEAK = re.compile("|".join(re.escape(name) for name in sorted(ESPEAK, key=len, reverse=True)))


@lru_cache(maxsize=100_000)
def pronounce(word: str) -> tuple[int, ...]:
    """Numbers of a word's phones by the rule table; letters of other alphabets are silent, and no word is mute."""
    if word in EXCEPTIONS:
        return tuple(NUMBER[phone] for phone in EXCEPTIONS[word].split())
    letters = _DOUBLED.sub(r"\1", re.sub(r"[^a-z]", "", word.lower()))
    phones: list[int] = []
    place = 0
    while place < len(letters):
        for pattern, sounds in _RULES:
            found = pattern.match(letters, place)
            if found and found.end() > place:
                phones += sounds
                place = found.end()
                break
        else:
            place += 1
    return tuple(phones) or (NUMBER["AH"],)


def pronounce_by_espeak(words: Sequence[str]) -> list[tuple[int, ...]]:
    """The same by espeak-ng, all words in one call; `UserError` where it is not installed."""
    command = ["espeak-ng", "-q", "-x", "-v", "en-us", "--stdin"]
    try:
        said = subprocess.run(command, input="\n".join(words) + "\n", capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise UserError(
            "pronunciations are to come from espeak-ng, which is not installed: install it (apt install espeak-ng), or "
            "set pronunciations: rules in params.yaml"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"espeak-ng failed: {error.stderr.strip() or error}") from None
    lines = said.strip("\n").split("\n")
    if len(lines) != len(words):
        raise UserError(f"espeak-ng gave {len(lines)} pronunciations for {len(words)} words: use pronunciations: rules")
    return [read_espeak(line) or pronounce(word) for word, line in zip(words, lines, strict=True)]


def read_espeak(mnemonics: str) -> tuple[int, ...]:
    """Numbers of the phones that espeak-ng's names say; stress marks are passed over."""
    names = _ESPEAK.findall(re.sub(r"[',%=_|! ]", "", mnemonics))
    return tuple(NUMBER[phone] for name in names for phone in ESPEAK[name].split())


def substitution_costs() -> IntArray:
    """Cost of hearing one phone for another, [phones, phones], symmetric and 0 on the diagonal."""
    costs = np.full((len(PHONES), len(PHONES)), VOWEL_FOR_CONSONANT)
    for table, weights in ((VOWELS, VOWEL_WEIGHTS), (CONSONANTS, CONSONANT_WEIGHTS)):
        places = [NUMBER[phone] for phone in table]
        features = np.array(list(table.values()), dtype=float) * weights
        between = 150 + np.rint(1000 * np.abs(features[:, None] - features[None]).sum(axis=2)).astype(np.int64)
        costs[np.ix_(places, places)] = np.minimum(between, 1000) * (1 - np.eye(len(places), dtype=np.int64))
    return costs


def gap_costs() -> IntArray:
    """Cost of a phone that is heard though nobody said it, or the reverse, [phones]."""
    reduced = ("AH", "IH", "ER")
    return np.array(
        [OF_REDUCED_VOWEL if p in reduced else OF_VOWEL if p in VOWELS else OF_CONSONANT for p in PHONES],
        dtype=np.int64,
    )


def pad(strings: Sequence[Sequence[int]], width: int | None = None) -> IntArray:
    """Phone strings as rows, [strings, longest or width], -1 behind."""
    table = np.full((len(strings), max(map(len, strings), default=0) if width is None else width), PAD, np.int64)
    for row, string in enumerate(strings):
        table[row, : len(string)] = string
    return table


def edit_distances(heard: IntArray, said: IntArray) -> NDArray[np.int32]:
    """Weighted edit distances of phone strings, heard [P, L] and said [P, K, M] (both padded by -1), as [P, K]."""
    substitution, gap = substitution_costs().astype(np.int32), gap_costs().astype(np.int32)
    # A pad costs nothing to pass, and nothing stands behind it.
    substitution = np.pad(substitution, ((0, 1), (0, 1)))
    gap = np.pad(gap, (0, 1))
    gap_said = gap[said]  # [P, K, M]
    row = np.concatenate(
        [np.zeros((*said.shape[:2], 1), np.int32), np.cumsum(gap_said, axis=2, dtype=np.int32)], axis=2
    )
    row = np.moveaxis(row, 2, 0).copy()  # [M + 1, P, K]
    said_first, gap_first = np.moveaxis(said, 2, 0), np.moveaxis(gap_said, 2, 0).copy()
    for place in range(heard.shape[1]):
        phones = heard[:, place]
        there = (phones >= 0)[:, None]
        if not there.any():
            break
        costs = substitution[phones]  # [P, phones + 1]
        gap_heard = gap[phones][:, None]
        rows = np.arange(len(phones))[:, None]
        new = row.copy()
        new[0] += gap_heard
        for other in range(said.shape[2]):
            diagonal = row[other] + costs[rows, said_first[other]]
            np.minimum(diagonal, row[other + 1] + gap_heard, out=diagonal)
            np.minimum(diagonal, new[other] + gap_first[other], out=diagonal)
            new[other + 1] = np.where(said_first[other] >= 0, diagonal, new[other])
        row = np.where(there, new, row)
    return row[-1]
