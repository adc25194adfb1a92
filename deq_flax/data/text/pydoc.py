"""A small English corpus included in Python: the prose of the language reference in `pydoc_data.topics`.

It allows trying a model without a download. The text differs between Python versions, so scores are comparable only within
one version.
"""

import re
from collections import Counter
from collections.abc import Mapping

from deq_flax.data.text.vocabulary import UNK, Vocabulary, count_words

MIN_COUNT = 2
"""Words that occur fewer times than this in the training text become '<unk>'."""
SHARES = {"valid": 0.09, "test": 0.08}
"""Upper limits on the fraction of the words in each held-out split."""

_WORD = re.compile(r"[^\W\d]\w*(?:-[^\W\d]\w*)*|\d+(?:\.\d+)*|'(?:s|t|re|ve|ll|d|m)\b|[^\w\s]")
_RULE = re.compile(r"[-=*~^\"#+|\s]*")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*]*)\1(?!\w)")
_BULLET = re.compile(r"^(?:\*|\d+\.) ")
_TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "."})


def tokenize(text: str) -> str:
    """Convert text to lower-case words, numbers and punctuation marks with single spaces between them, on one line."""
    return " ".join(_WORD.findall(text.translate(_TYPOGRAPHY).lower()))


def pydoc_corpus() -> tuple[dict[str, str], Vocabulary]:
    """The texts of 'train', 'valid' and 'test', one paragraph a line, and a vocabulary of all their words."""
    from pydoc_data.topics import topics  # a module of half a megabyte that only this corpus needs

    lines = split_topics(unique_paragraphs({name: _paragraphs(text) for name, text in topics.items()}))
    counts = count_words(lines["train"])
    known = {word for word, count in counts.items() if count >= MIN_COUNT}
    texts = {split: _with_unknown(lines[split], known) for split in lines}
    return texts, Vocabulary.from_counts(count_words([texts["train"]]), lower_case=True)


def unique_paragraphs(topics: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Keep each paragraph only in the shortest topic that contains it: long topics repeat short ones word for word."""
    owner: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (sum(map(len, topics[name])), name)):
        for paragraph in topics[name]:
            owner.setdefault(paragraph, name)
    return {
        name: [paragraph for paragraph in dict.fromkeys(topics[name]) if owner[paragraph] == name] for name in sorted(topics)
    }


def split_topics(topics: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Assign whole topics, in order, to splits.

    A topic goes to the held-out split that is furthest below its share, if it fits into that share, else to training.
    """
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    sizes: Counter[str] = Counter()
    seen = 0
    for paragraphs in topics.values():
        size = sum(len(paragraph.split()) for paragraph in paragraphs)
        seen += size
        room = {split: share * seen - sizes[split] for split, share in SHARES.items()}
        held_out = max(room, key=room.__getitem__)
        split = held_out if size <= room[held_out] else "train"
        sizes[split] += size
        lines[split] += paragraphs
    return lines


def _paragraphs(topic: str) -> list[str]:
    """Extract the tokenized prose of a topic, without headings, tables, grammar, signatures or programs."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", topic):
        lines = [line.strip() for line in block.split("\n")]
        text = " ".join(line for line in lines if not _RULE.fullmatch(line))
        if any(mark in text for mark in ("::=", ">>>", "|")):
            continue
        text = re.sub(r"(?<=\w)- (?=[a-z])", "-", text)  # a word broken at the end of a line
        text = _EMPHASIS.sub(r"\2", _BULLET.sub("", text)).replace('"', "").replace("()", "")
        if _is_prose(text):
            paragraphs.append(tokenize(text))
    return paragraphs


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text.split()) >= 4 and letters >= 0.8 * len(text) and text[-1] in ".:;!?)"


def _with_unknown(lines: list[str], known: set[str]) -> str:
    return "".join(" ".join(word if word in known else UNK for word in line.split()) + "\n" for line in lines)
