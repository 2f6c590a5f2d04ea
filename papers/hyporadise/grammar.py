"""The narrow domain: spoken questions to an air-travel desk, from fragments with slots.

A sentence is an opening, a core and a tail. Fragments are drawn by Zipf's law in the order in which they stand here.
Test sentences use combinations of fragments that no training sentence has; every fragment occurs in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

import numpy as np

CITIES = (
    "boston", "denver", "atlanta", "dallas", "san francisco", "philadelphia", "pittsburgh", "baltimore", "washington",
    "oakland", "new york", "chicago", "los angeles", "houston", "phoenix", "detroit", "seattle", "miami", "orlando",
    "minneapolis", "milwaukee", "saint louis", "cleveland", "charlotte", "memphis", "nashville", "salt lake city",
    "las vegas", "san diego", "san jose", "tampa", "cincinnati", "columbus", "indianapolis", "kansas city", "toronto",
    "montreal", "burbank", "long beach", "westchester county",
)  # fmt: skip
AIRLINES = (
    "united", "american", "delta", "continental", "northwest", "southwest", "lufthansa", "trans world",
    "midwest express", "canadian", "air canada", "alaska",
)  # fmt: skip
AIRPORTS = (
    "logan", "dulles", "la guardia", "kennedy", "newark", "love field", "stapleton", "hartsfield", "ohare", "mitchell",
)  # fmt: skip
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth",
    *(f"twenty {n}" for n in ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")),
    "thirtieth", "thirty first",
)  # fmt: skip
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
HOURS = (*UNITS, *TEENS[:3])
SLOTS: dict[str, tuple[str, ...]] = {
    "city": CITIES,
    "city2": CITIES,
    "airline": AIRLINES,
    "airport": AIRPORTS,
    "weekday": WEEKDAYS,
    "date": tuple(f"{month} {day}" for month, day in product(MONTHS, ORDINALS)),
    "time": tuple(
        [f"{hour} {half}" for hour, half in product(HOURS, ("a m", "p m", "oclock"))]
        + [" ".join(each) for each in product(HOURS, ("fifteen", "thirty", "forty five"), ("a m", "p m"))]
        + ["noon", "midnight", "half past seven", "a quarter to six", "a quarter past nine"]
    ),
    "number": tuple(
        [f"{a} {b} {c}" for a, b, c in product(UNITS, UNITS, UNITS)]
        + [f"{tens} {unit}" for tens, unit in product(TENS, UNITS)]
        + [f"{unit} {tens}" for unit, tens in product(UNITS, (*TENS, *TEENS))]
    ),
    "dollars": tuple(f"{unit} hundred{more}" for unit, more in product(UNITS, ("", " fifty", " twenty five"))),
    "daytime": ("morning", "afternoon", "evening", "night", "early morning", "late afternoon", "late evening"),
    "meal": ("breakfast", "lunch", "dinner", "a snack", "a hot meal", "vegetarian meals", "beverages", "a kosher meal"),
    "transport": (
        "taxi", "limousine", "rental car", "bus", "shuttle", "train", "helicopter", "subway", "ferry",
    ),
    "class": ("first class", "coach", "economy", "business class", "premium", "standby"),
    "fare": (
        "round trip", "one way", "excursion", "unrestricted", "discounted", "weekend", "senior citizen", "student",
    ),
    "aircraft": (
        "boeing seven fifty seven", "seven forty seven", "seven thirty seven", "d c ten", "airbus", "turboprop",
        "mcdonnell douglas eighty", "fokker one hundred", "jet",
    ),
    "service": (
        "a window seat", "an aisle seat", "extra baggage", "wheelchair assistance", "an infant carrier",
        "frequent flyer miles", "travel insurance", "priority boarding", "lounge access", "ski equipment",
        "a bicycle crate", "a pet kennel", "an unaccompanied minor", "a free upgrade", "a full refund",
        "movie headphones", "oversized luggage", "a group discount", "curbside check in", "an emergency exit row",
    ),
    "place": (
        "the convention center", "the university campus", "the football stadium", "the harbor",
        "the financial district", "the museum", "the beach hotel", "the railway station",
        "the cathedral", "the zoo", "the capitol building",
        "the casino", "the hospital", "the shopping mall", "the opera house", "the botanical garden",
    ),
    "occasion": (
        "christmas", "thanksgiving", "easter sunday", "labor day", "memorial day", "new years eve", "independence day",
        "spring break", "the super bowl", "mardi gras", "columbus day weekend", "halloween",
    ),
    "car": (
        "compact", "convertible", "minivan", "sedan", "station wagon", "pickup truck", "luxury", "four wheel drive",
        "camper", "motorcycle",
    ),
    "letters": ("q x", "q", "h", "f", "b h", "y n", "q w", "e a", "h p", "u a", "d l", "a p slash fifty seven"),
}  # fmt: skip
OPENINGS = (
    "show me", "what are", "i would like", "list", "please give me", "i want", "can you tell me about", "i need",
    "could you find", "tell me about", "are there", "please show me", "i am looking for", "do you have", "find me",
    "how about", "let us see", "we would like information on",
)  # fmt: skip
CORES = (
    "flights from {city} to {city2}", "all flights from {city} to {city2}",
    "the cheapest flight from {city} to {city2}",
    "the {fare} fares from {city} to {city2}", "nonstop flights from {city} to {city2}",
    "{airline} flights from {city} to {city2}", "ground transportation in {city}",
    "the earliest flight between {city} and {city2}", "flights from {city} to {city2} with a stopover in {airport}",
    "{airline} airlines flight {number} from {city} to {city2}", "a {fare} ticket from {city} to {city2}",
    "the latest departure from {city} to {city2}", "a {transport} from {airport} airport to downtown {city}",
    "flights that serve {meal} from {city} to {city2}", "the meaning of fare code {letters}",
    "connecting flights between {city} and {city2}", "{class} seats from {city} to {city2}",
    "the price of a {transport} service in {city}", "the schedule of {airline} flights into {airport}",
    "the type of aircraft on flight {number} from {city}", "flights leaving {airport} for {city2}",
    "a {class} reservation on {airline} flight {number}", "the distance from {airport} airport to downtown {city}",
    "the seating capacity of the {aircraft} to {city}", "flights using a {aircraft} from {city} to {city2}",
    "the airports in the {city} area", "the restrictions on fare {letters} to {city2}",
    "the shortest trip from {city} to {city2}", "departure times out of {airport} to {city2}",
    "the airlines that have hubs in {city}",
    "a {car} rental at {airport} airport", "a {transport} from {airport} airport to {place}",
    "hotels near {place} in {city}", "the mileage award for {city} to {city2}",
    "a {car} with unlimited mileage in {city}", "a charter flight to {city} for {occasion}",
)  # fmt: skip
TAILS = (
    "", "on {weekday}", "in the {daytime}", "leaving before {time}", "on {date}", "on {weekday} {daytime}",
    "arriving after {time}", "for less than {dollars} dollars", "on {airline}", "departing around {time} on {weekday}",
    "returning on {date}", "and also {meal} on board", "with at most one stop", "next {weekday} please",
    "between {time} and {time}", "for two adults and one child",
    "with {service}", "around {occasion}", "including {service} and insurance", "before the end of {occasion}",
)  # fmt: skip


@dataclass(frozen=True)
class Sentences:
    """Sentences by split, and the combination of fragments (opening, core, tail) of each."""

    texts: dict[str, list[str]]
    combinations: dict[str, list[tuple[int, int, int]]]


def vocabulary() -> list[str]:
    """All words that the grammar can say, in alphabetical order."""
    phrases = [*OPENINGS, *CORES, *TAILS, *(each for values in SLOTS.values() for each in values)]
    return sorted({word for phrase in phrases for word in re.sub(r"\{\w+\}", " ", phrase).split()})


def zipf(size: int, exponent: float = 1.0) -> np.ndarray:
    """Zipf's probabilities of ranks 1 to `size`."""
    weights = 1.0 / np.arange(1, size + 1) ** exponent
    return weights / weights.sum()


def generate(sizes: dict[str, int], seed: int, *, held_out: float = 0.25, exponent: float = 1.0) -> Sentences:
    """Sentences of each split; combinations of `test` are a share `held_out` of all, which no other split uses."""
    generator = np.random.default_rng([seed, 0])
    shape = (len(OPENINGS), len(CORES), len(TAILS))
    is_test = generator.random(shape) < held_out
    probability = zipf(shape[0], exponent)[:, None, None] * zipf(shape[1], exponent)[:, None] * zipf(shape[2], exponent)
    texts: dict[str, list[str]] = {}
    combinations: dict[str, list[tuple[int, int, int]]] = {}
    for split, size in sizes.items():
        allowed = np.where(is_test == (split == "test"), probability, 0.0).ravel()
        drawn = generator.choice(allowed.size, size=size, p=allowed / allowed.sum())
        combinations[split] = [tuple(map(int, each)) for each in zip(*np.unravel_index(drawn, shape), strict=True)]
        texts[split] = [_fill(combination, generator) for combination in combinations[split]]
    return Sentences(texts, combinations)


def _fill(combination: tuple[int, int, int], generator: np.random.Generator) -> str:
    opening, core, tail = combination
    template = f"{OPENINGS[opening]} {CORES[core]} {TAILS[tail]}".strip()
    city = ""

    def choose(found: re.Match[str]) -> str:
        nonlocal city
        name = found.group(1)
        values = SLOTS[name]
        value = values[int(generator.integers(len(values)))]
        while name == "city2" and value == city:
            value = values[int(generator.integers(len(values)))]
        city = value if name == "city" else city
        return value

    return re.sub(r"\{(\w+)\}", choose, template)
