"""GQA's questions and SNLI-VE's hypotheses of digit scenes: true, balanced, nothing to learn without looking."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from petl_ext.demo.digits import gqa as digits_gqa
from petl_ext.demo.digits import snli_ve as digits_snli_ve
from petl_ext.demo.digits.scenes import COLORS, POSITIONS, DigitObject, SceneMaker


def rng(*seed):
    return np.random.default_rng([1, *seed])


@pytest.fixture(scope="module")
def scenes():
    """Objects of scenes, enough of them to count answers."""
    return {name: objects_of(SceneMaker(name).make(count, rng(count))) for name, count in COUNTS.items()}


COUNTS = {"train": 2400, "test": 1200}


def objects_of(made):
    return [made.objects(index) for index in range(len(made))]


# A white 3, a red 3 and a red 7; the southwest is dark.
OBJECTS = [
    DigitObject(3, "white", "northwest"),
    DigitObject(3, "red", "northeast"),
    DigitObject(7, "red", "southeast"),
]
# A red 5 and a blue 9 below it.
TWO = [DigitObject(5, "red", "northwest"), DigitObject(9, "blue", "southwest")]


@pytest.mark.parametrize(
    ("question_type", "objects", "expected"),
    [
        ("colorQuery", OBJECTS, {"what color is the 7?": "red"}),
        (
            "colorAtQuery",
            TWO,
            {"what color is the digit in the northwest?": "red", "what color is the digit in the southwest?": "blue"},
        ),
        ("digitQuery", OBJECTS, {"which digit is white?": "3"}),
        (
            "oneOfSeveralDigitQuery",
            OBJECTS,
            {"which red digit is at the top?": "3", "which red digit is at the bottom?": "7"},
        ),
        (
            "oneOfSeveralColorQuery",
            OBJECTS,
            {"what color is the 3 on the left?": "white", "what color is the 3 on the right?": "red"},
        ),
        ("relColorQuery", OBJECTS, {"what color is the digit left of the 7?": "white"}),
        ("relDigitQuery", OBJECTS, {"which digit is below the white digit?": "7"}),
        (
            "colorVerify",
            OBJECTS,
            {f"is the 7 {color}?": "yes" if color == "red" else "no" for color in COLORS},
        ),
        (
            "existVerify",
            OBJECTS,
            {
                "is there a red 3?": "yes",
                "is there a red 7?": "yes",
                "is there a white 3?": "yes",
                "is there a white 7?": "no",
            },
        ),
        (
            "existAtVerify",
            OBJECTS,
            {
                f"is there a digit in the {at}?": "no" if at == "southwest" else "yes"
                for at in ("northwest", "northeast", "southwest", "southeast")
            },
        ),
        (
            "relVerify",
            TWO,
            {
                "is the 5 above the 9?": "yes",
                "is the 5 below the 9?": "no",
                "is the 9 above the 5?": "no",
                "is the 9 below the 5?": "yes",
            },
        ),
        (
            "relChoose",
            TWO,
            {"is the 5 above or below the 9?": "above", "is the 9 above or below the 5?": "below"},
        ),
        (
            "existAnd",
            TWO,
            {
                f"is there a {one} digit and a {two} digit?": "yes" if {one, two} == {"red", "blue"} else "no"
                for one, two in itertools.permutations(COLORS, 2)
            },
        ),
        (
            "existOr",
            TWO,
            {
                f"is there a {one} digit or a {two} digit?": "yes" if {one, two} & {"red", "blue"} else "no"
                for one, two in itertools.permutations(COLORS, 2)
            },
        ),
        ("sameColor", TWO, {"are the 5 and the 9 the same color?": "no", "are the 9 and the 5 the same color?": "no"}),
    ],
)
def test_gqa_questions_of_a_scene(question_type, objects, expected):
    assert dict(digits_gqa.QUESTION_TYPES[question_type].ask(objects)) == expected


def test_gqa_color_choices_name_the_answer_first_or_second():
    asked = dict(digits_gqa.QUESTION_TYPES["colorChoose"].ask(OBJECTS))
    assert set(asked.values()) == {"red"} and len(asked) == 8
    assert "is the 7 red or blue?" in asked and "is the 7 blue or red?" in asked


def test_gqa_positions_are_choices_too():
    beside = [DigitObject(5, "red", "northwest"), DigitObject(9, "blue", "northeast")]
    assert dict(digits_gqa.QUESTION_TYPES["relChoose"].ask(beside)) == {
        "is the 5 to the left or right of the 9?": "left",
        "is the 9 to the left or right of the 5?": "right",
    }


def test_gqa_asks_yes_or_no_only_where_both_could_be_right():
    for seed in range(200):
        asked = digits_gqa.questions_about(TWO, len(digits_gqa.QUESTION_TYPES), rng(seed))
        types = {question_type for question_type, _, _ in asked}
        assert len(types) == len(asked)
        assert "sameColor" not in types and {"relVerify", "existAnd", "existOr", "existVerify"} <= types


def text_only(train, test):
    """Accuracy on `test` of the answer that each key most often has in `train`: rows are (key, answer)."""
    answers = defaultdict(Counter)
    for key, answer in train:
        answers[key][answer] += 1
    overall = Counter(answer for _, answer in train).most_common(1)[0][0]
    known = {key: counts.most_common(1)[0][0] for key, counts in answers.items()}
    return np.mean([known.get(key, overall) == answer for key, answer in test])


@pytest.fixture(scope="module")
def asked(scenes):
    """(type, question, answer) of many questions."""
    generator = rng(5)
    return {
        split: [asked for objects in scenes[split] for asked in digits_gqa.questions_about(objects, 3, generator)]
        for split in COUNTS
    }


def chance_of(question_type, question):
    """All but queries name or imply two answers; a query asks for one of five colors or ten digits."""
    if digits_gqa.QUESTION_TYPES[question_type].structural != "query":
        return 1 / 2
    return 1 / 5 if question.startswith("what color") else 1 / 10


def test_gqa_words_and_answers_are_listed(asked):
    words, answers = set(), set()
    for _, question, answer in asked["train"]:
        words |= set(question.replace("?", " ?").split())
        answers.add(answer)
    assert words == set(digits_gqa.WORDS) and len(words) == len(digits_gqa.WORDS)
    assert answers == set(digits_gqa.ANSWERS)


def test_gqa_answers_are_balanced(asked):
    by_type = defaultdict(Counter)
    for question_type, _, answer in asked["train"] + asked["test"]:
        by_type[question_type][answer] += 1
    assert by_type.keys() == digits_gqa.QUESTION_TYPES.keys()
    for question_type, counts in by_type.items():
        share = 1 / len(counts)
        error = np.sqrt(share * (1 - share) / counts.total())
        # four standard errors, and a digit's frequency among the pictures
        assert max(counts.values()) / counts.total() < share + 4 * error + 0.01, (question_type, counts)


def test_gqa_questions_alone_tell_nothing(asked):
    chance = np.mean([chance_of(question_type, question) for question_type, question, _ in asked["test"]])
    by_text = text_only(*([(question, answer) for _, question, answer in asked[split]] for split in COUNTS))
    by_type = text_only(*([(question_type, answer) for question_type, _, answer in asked[split]] for split in COUNTS))
    # 3600 questions: a standard error of 0.008
    assert by_text < chance + 0.03 and by_type < chance + 0.03
    assert by_text > chance - 0.04  # the chance is what it is said to be


def possible(objects):
    """Every scene that a scene may be: position -> (digit, color) or None, dark cells with any content."""
    seen = {it.position: (it.digit, it.color) for it in objects}
    anything = [None, *itertools.product(range(10), COLORS)]
    choices = [[seen[at]] if at in seen else anything for at in POSITIONS]
    return [dict(zip(POSITIONS, contents, strict=True)) for contents in itertools.product(*choices)]


def holds(hypothesis, scene):
    """Whether a hypothesis is true of a scene of which everything is known; read from its words."""
    words = hypothesis.removeprefix("there is ").replace("one of the digits ", "").split()

    def matches(at, wanted):
        content = scene[at]
        return content is not None and all(
            str(content[0]) == word if word.isdigit() else content[1] == word for word in wanted
        )

    def attributes(part):
        return [word for word in part if word.isdigit() or word in COLORS]

    row_column = {at: (at[:5], at[5:]) for at in POSITIONS}
    sides = {"left": "west", "right": "east", "top": "north", "bottom": "south"}
    if words[0] == "two":
        return sum(matches(at, [words[-1]]) for at in scene) >= 2
    if words[-1] in POSITIONS:
        return matches(words[-1], attributes(words[:-1]))
    if words[0] in ("on", "at"):
        return any(matches(at, attributes(words)) for at in scene if sides[words[2]] in row_column[at])
    first, relation, second = words[: words.index("is")], words[words.index("is") + 1], words[-3:]
    before = {"left": (1, "west"), "right": (1, "east"), "above": (0, "north"), "below": (0, "south")}
    axis, side = before[relation]
    return any(
        row_column[one][axis] == side != row_column[two][axis]
        and matches(one, attributes(first))
        and matches(two, attributes(second))
        for one, two in itertools.permutations(scene, 2)
    )


@pytest.mark.parametrize(
    ("hypothesis", "expected"),
    [
        ("there is a red digit in the northeast", True),
        ("there is an 8 in the northeast", False),
        ("one of the digits on the left is a 3", True),
        ("one of the digits at the bottom is white", False),
        ("two of the digits are red", True),
        ("two of the digits are white", False),
        ("a 3 is left of a 7", True),
        ("a 7 is above a 3", False),
        ("a white digit is left of a red digit", True),
        ("a red 7 is in the southeast", True),
    ],
)
def test_how_hypotheses_are_read_here(hypothesis, expected):
    scene = dict.fromkeys(POSITIONS) | {it.position: (it.digit, it.color) for it in OBJECTS}
    assert holds(hypothesis, scene) == expected


@pytest.mark.parametrize("objects", [OBJECTS, TWO], ids=["one dark cell", "two dark cells"])
def test_hypotheses_are_labeled_by_what_the_dark_cells_may_hold(objects):
    cells = dict.fromkeys(POSITIONS) | {it.position: it for it in objects}
    worlds = possible(objects)
    for template, judge in digits_snli_ve.TEMPLATES.items():
        judged = list(judge(cells))
        assert len(dict(judged)) == len(judged), template
        for index in rng(len(judged)).permutation(len(judged))[:12]:
            hypothesis, truth = judged[index]
            true = {holds(hypothesis, world) for world in worlds}
            label = "neutral" if len(true) == 2 else "entailment" if true == {True} else "contradiction"
            assert digits_snli_ve.LABEL_OF[truth] == label, hypothesis


def test_a_scene_without_a_dark_cell_has_no_hypotheses():
    full = [*OBJECTS, DigitObject(1, "blue", "southwest")]
    assert digits_snli_ve.HypothesisMaker(rng()).about(full, 2) == []


def test_no_more_hypotheses_than_templates():
    made = digits_snli_ve.HypothesisMaker(rng()).about(TWO, 100)
    assert {template for template, _, _ in made} == set(digits_snli_ve.TEMPLATES) and len(made) == 8


@pytest.fixture(scope="module")
def hypotheses(scenes):
    """(scene's objects, template, hypothesis, label) of many hypotheses."""
    made = {}
    for split in COUNTS:
        maker = digits_snli_ve.HypothesisMaker(rng(7))
        made[split] = [(objects, *one) for objects in scenes[split] for one in maker.about(objects, 2)]
    return made


def test_snli_ve_words_are_listed(hypotheses):
    words = {word for _, _, hypothesis, _ in hypotheses["train"] for word in hypothesis.split()}
    assert words == set(digits_snli_ve.WORDS) and len(words) == len(digits_snli_ve.WORDS)


def test_every_template_has_every_label_equally_often(hypotheses):
    counts = Counter((template, label) for _, template, _, label in hypotheses["train"])
    assert len(counts) == 8 * 3
    assert max(counts.values()) - min(counts.values()) <= 3
    assert counts.total() == pytest.approx(2 * 0.75 * COUNTS["train"], rel=0.05)


def test_scenes_that_look_alike_have_every_label_equally_often(hypotheses):
    counts = defaultdict(Counter)
    for objects, _, _, label in hypotheses["train"]:
        counts[len(objects), len({it.color for it in objects})][label] += 1
    assert counts.keys() == {(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)}
    for question_type, labels in counts.items():
        assert max(labels.values()) <= 1.03 * labels.total() / 3 + 3, (question_type, labels)


PARTS = {
    "nothing": lambda objects, template, hypothesis: None,
    "template": lambda objects, template, hypothesis: template,
    "hypothesis": lambda objects, template, hypothesis: hypothesis,
    "number of digits": lambda objects, template, hypothesis: len(objects),
    "number of colors": lambda objects, template, hypothesis: (len(objects), len({it.color for it in objects})),
    "dark cells": lambda objects, template, hypothesis: tuple(it.position for it in objects),
}


@pytest.mark.parametrize("part", PARTS)
def test_neither_hypothesis_nor_scene_alone_tells_the_label(hypotheses, part):
    rows = {split: [(PARTS[part](*row[:3]), row[3]) for row in hypotheses[split]] for split in COUNTS}
    # 1800 hypotheses: a standard error of 0.011
    assert text_only(rows["train"], rows["test"]) < 1 / 3 + 0.035
