"""Which queries can be inverted: those with a verb, in English."""

import functools
import re
from typing import NamedTuple

from engine.words.text import encodable
from engine.words.verbs import load_spacy, mask_queries, root, verb_tables


class Coverage(NamedTuple):
    """How many queries inversion cannot be trained on; one can be both without a verb and not English."""

    queries: int
    without_verb: int
    not_english: int

    def __str__(self):
        return (f"{self.without_verb} of {self.queries} queries have no verb; {self.not_english} look not English and "
                "train grounding alone")


def count_coverage(queries) -> Coverage:
    """Count the queries without a verb and those that look not English."""
    queries = list(queries)
    without_verb = sum(not gold for _, gold in mask_queries(queries))
    not_english = sum(not looks_english(query) for query in queries)
    return Coverage(len(queries), without_verb, not_english)


WORD = re.compile(r"[^\W\d_]+")


@functools.lru_cache(maxsize=1 << 16)
def looks_english(text: str) -> bool:
    """Whether a text can be tagged by the English model, which takes "die" of "die person öffnet die tür" for a verb.

    It must know more than three fifths of the words, which holds for all but a few misspelt or foreign ones of the
    34,000 queries of Charades-STA, ActivityNet Captions, QVHighlights, Time-R1 and TVGBench; and at most a fifth of the
    letters may be other than a to z.
    """
    words = WORD.findall(encodable(text).lower())
    letters = "".join(words)
    if sum(not letter.isascii() for letter in letters) > len(letters) / 5:
        return False
    # Words of two letters that are not everyday ones tell nothing: "la" is a note, "de" a state, "tv" is not listed.
    everyday = load_spacy().Defaults.stop_words
    telling = [word for word in words if word in everyday or len(word) > 2]
    return not telling or sum(map(is_known, telling)) > 0.6 * len(telling)


@functools.lru_cache(maxsize=1 << 16)
def is_known(word: str) -> bool:
    """Whether a word, or what is left of it without its ending, is in the lemmatizer's index of English words."""
    if word in load_spacy().Defaults.stop_words or root(word) in verb_tables()[0]:
        return True
    for index, endings in word_tables():
        if word in index or any(word.endswith(old) and word.removesuffix(old) + new in index for old, new in endings):
            return True
    return False


@functools.cache
def word_tables():
    """[(English words, their endings as pairs such as ("ies", "y"))] for nouns, verbs, adjectives and adverbs."""
    lookups = load_spacy().get_pipe("lemmatizer").lookups
    endings = lookups.get_table("lemma_rules")
    irregular = lookups.get_table("lemma_exc")
    index = lookups.get_table("lemma_index")
    return [(frozenset(words) | frozenset(irregular[kind]), endings.get(kind, ())) for kind, words in index.items()]
