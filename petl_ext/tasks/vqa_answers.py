"""How answers are compared: the normalization of the official VQA evaluation (visualqa.org)."""

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_PERIOD_NOT_DECIMAL = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# Those of the official script. It lacks those whose bare form is another word (she'd, he'll, we're, it's), and looks
# for those of "I" in upper case after it has lowered all.
_CONTRACTIONS = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've could've
might've must've not've should've they've we've what've where've who've would've you've he'd how'd it'd someone'd
something'd there'd they'd where'd who'd you'd he'd've it'd've she'd've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've you'd've how'll it'll somebody'll someone'll something'll they'll what'll
who'll why'll you'll there're they're what're why're you're he's how's somebody's someone's that's there's what's
when's where's who's why's ma'am o'clock y'all y'all'll y'all'd've 'twas
"""
_WITH_APOSTROPHE = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS.split() for at, mark in enumerate(word) if mark == "'"
}
_WITH_APOSTROPHE |= {"somebody'd": "somebodyd"}  # so there
_WITH_APOSTROPHE |= dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at")


@lru_cache(maxsize=200_000)
def normalize_answer(answer: str) -> str:
    """`answer` as the official evaluation compares it (VQA evaluation, visualqa.org).

    Lower case; no punctuation but apostrophe and colon; no period outside a decimal number; number words as digits; no
    articles; missing apostrophes of contractions restored.
    """
    text = _PERIOD_NOT_DECIMAL.sub("", _without_punctuation(answer.lower()))
    words = (_NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """As the evaluation script does it: a mark separates words, unless the answer has it beside a space somewhere, or
    has a comma between digits."""
    joins = _COMMA_BETWEEN_DIGITS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if joins or beside_space else " ")
    return cleaned
