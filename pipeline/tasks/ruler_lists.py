"""RULER's variable tracking and its two tasks of aggregation: common words, frequent coded words.

As in RULER, an example with its answer precedes the question of vt and cwe.
"""

from __future__ import annotations

import random
import string

from pipeline.tasks.material import Material
from pipeline.tasks.ruler_needles import NOISE
from pipeline.tasks.sample import Text

VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {count} "
    # RULER's own spelling, which models have been measured with.
    "variables are assgined the value {query}, they are: "
)
HOPS = 4
# Noise lines of the example, which RULER bounds by 500 tokens.
EXAMPLE_LINES = 10

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10
# Prompts under 4,096 tokens have shorter lists: (words, repeats of common and of other words).
SHORT = 4096
EXAMPLE_LISTS = {True: (20, 3, 1), False: (40, 10, 3)}
REPEATS = {True: (6, 1), False: (30, 3)}

FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. "
    "Please ignore the dots '....'. What are the three most frequently appeared words in the above "
    "coded text? Answer: According to the coded text above, the three most frequently appeared "
    "words are:"
)
CODED_LETTERS = 6
# The r-th word appears in proportion to r ** -ALPHA; the first is dots. zeta(2) = pi ** 2 / 6.
ALPHA = 2.0
ZETA = 1.6449340668482264


def _names(rng: random.Random, letters: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < HOPS + 1:
        found.setdefault("".join(rng.choices(string.ascii_uppercase, k=letters)))
    return list(found)


def _chain(rng: random.Random, letters: int, lines: int) -> tuple[str, list[str], str]:
    """(context, names, value) of one chain of assignments in noise."""
    names, value = _names(rng, letters), str(rng.randint(10_000, 99_998))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
    noise = [NOISE + "\n"] * lines
    places = sorted(rng.sample(range(len(noise)), len(chain)))
    for done, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        noise.insert(place + done, assignment)
    return " ".join(noise).replace(". \n", ".\n"), names, value


def variable_tracking(material: Material, length: int, rng: random.Random, units: int) -> Text:
    """One chain of four hops in `units` lines of noise, after an example of shorter names."""
    context, names, value = _chain(rng, 3, EXAMPLE_LINES)
    example = VT.format(context=context, query=value, count=HOPS + 1) + " " + " ".join(names)
    context, names, value = _chain(rng, 5, units)
    asked = VT.format(context=context, query=value, count=HOPS + 1)
    return Text(f" {example}\n\n\n\n{asked}", names)


def _word_list(
    rng: random.Random, words: list[str], repeats: int, other_repeats: int
) -> tuple[str, list[str]]:
    common, others = words[:COMMON], words[COMMON:]
    listed = common * repeats + others * other_repeats
    rng.shuffle(listed)
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), common


def common_words(material: Material, length: int, rng: random.Random, units: int) -> Text:
    """A numbered list of `units` distinct words, ten of them far more often than the others."""
    short, words = length < SHORT, material.words.every
    count, often, seldom = EXAMPLE_LISTS[short]
    context, common = _word_list(rng, rng.sample(words, count), often, seldom)
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
    example = CWE.format(context=context) + answer
    often, seldom = REPEATS[short]
    context, common = _word_list(rng, rng.sample(words, units), often, seldom)
    return Text(f"{example}\n{CWE.format(context=context)}", common)


def frequent_words(material: Material, length: int, rng: random.Random, units: int) -> Text:
    """About `units` coded words by Zipf's law; the three most frequent after the dots count."""
    coded: dict[str, None] = {}
    while len(coded) < max(4, length // 50):
        coded.setdefault("".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS)))
    words = ["...", *list(coded)[1:]]
    listed = []
    for rank, word in enumerate(words, 1):
        listed += [word] * int(units * rank**-ALPHA / ZETA)
    rng.shuffle(listed)
    return Text(FWE.format(context=" ".join(listed)), words[1:4])
