"""The one form in which queries and answers are compared. Pure text: no tagger and no tensors."""



def normalize_query(text: str) -> str:
    """The one form of a query in training and evaluation: stripped, on one line, lower case, no final full stop.

    Answers are put in the same form before their verbs are tagged: spaCy tags "Person opening box." otherwise.
    """
    return " ".join(encodable(text).split()).lower().rstrip(". ")


def encodable(text: str) -> str:
    """Lone surrogates, which neither spaCy nor the tokenizer can store, become question marks."""
    return text.encode("utf-8", "replace").decode()
