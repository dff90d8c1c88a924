"""Statements about scenes, judged once more by patterns of their own, and the recipes' backbone, which learned them."""

import contextlib
import re

import numpy as np
import pytest
import torch
from transformers import ViltModel, ViltProcessor

from petl_ext.demo.digits import BACKBONE, RECIPES_BACKBONE, pretrain_statements
from petl_ext.demo.digits.pretrain_vilt import save
from petl_ext.demo.digits.scenes import SceneMaker
from petl_ext.demo.digits.statements import TEMPLATES, TOLD_WORDS, statement

ROW_AND_COLUMN = {"northwest": (0, 0), "northeast": (0, 1), "southwest": (1, 0), "southeast": (1, 1)}
SIDES = {"on the left": (1, 0), "on the right": (1, 1), "at the top": (0, 0), "at the bottom": (0, 1)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes():
    return SceneMaker("train").make(300, np.random.default_rng(7))


def having(objects, words):
    """The objects of which all words are true: of their color, digit and position."""
    said = [word for word in words.split() if word not in ("a", "digit", "digits", "the", "in")]
    return [it for it in objects if set(said) <= {str(it.digit), it.color, it.position}]


def is_left_of(it, other):
    return ROW_AND_COLUMN[it.position][1] < ROW_AND_COLUMN[other.position][1]


def is_above(it, other):
    return ROW_AND_COLUMN[it.position][0] < ROW_AND_COLUMN[other.position][0]


def related(objects, first, relation, second):
    (it,), (other,) = having(objects, first), having(objects, second)
    holds = {"left of": is_left_of, "above": is_above}.get(relation)
    if holds:
        return holds(it, other)
    return {"right of": is_left_of, "below": is_above}[relation](other, it)


def at_side(objects, words, side, value):
    axis, wanted = SIDES[side]
    (it,) = [it for it in having(objects, words) if ROW_AND_COLUMN[it.position][axis] == wanted]
    return value in (str(it.digit), it.color)


def same_color(objects, first, second):
    return having(objects, first)[0].color == having(objects, second)[0].color


# By the first pattern that fits the whole statement.
JUDGES = {
    r"the (.+) and the (.+) are the same color": same_color,
    r"(.+) is (left of|right of|above|below) (.+)": related,
    r"the (.+?) (on the left|on the right|at the top|at the bottom) is (\w+)": at_side,
    r"the (.+) is (\w+)": lambda objects, words, value: having(objects, words) == having(objects, f"{words} {value}"),
    r"there is a (\w+ digit) and a (\w+ digit)": lambda objects, a, b: all(having(objects, it) for it in (a, b)),
    r"there is (.+)": lambda objects, words: bool(having(objects, words)),
    r"there are (\d) ((?:\w+ )?digits)": lambda objects, count, words: len(having(objects, words)) == int(count),
}


def judge(text, objects):
    for pattern, is_true in JUDGES.items():
        match = re.fullmatch(pattern, text)
        if match:
            return is_true(objects, *match.groups())
    raise AssertionError(text)


def test_every_statement_of_every_template_is_true(scenes):
    for name, template in TEMPLATES.items():
        told = [(index, text) for index in range(300) for text in template(scenes.objects(index))]
        assert len(told) > 20, name
        for index, text in told:
            assert judge(text, scenes.objects(index)), (text, scenes.objects(index))


def test_a_judge_of_another_scene_says_no(scenes):
    """So that it would have said so of a wrong statement."""
    rng = np.random.default_rng(3)
    told = [statement(scenes.objects(index), rng) for index in range(300)]
    wrong = 0
    for index, text in enumerate(told):
        with contextlib.suppress(ValueError, IndexError):  # what it speaks of is not there
            wrong += not judge(text, scenes.objects(index - 1))
    assert wrong > 100


def test_all_templates_are_drawn_and_none_asks(scenes):
    rng = np.random.default_rng(0)
    told = [statement(scenes.objects(index), rng) for index in range(300)]
    words = {word for text in told for word in text.split()}
    assert words <= set(pretrain_statements.WORDS) and words >= TOLD_WORDS
    assert not words & {"?", "how", "what", "where", "which", "question", "holds", "options"}


def test_a_masked_word_makes_a_statement_true(scenes):
    statements = pretrain_statements.make_statements(scenes, np.random.default_rng(2))
    masked = statements.labels != pretrain_statements.IGNORED
    assert len(statements.input_ids) == 300 and (masked.sum(dim=1) == 1).all()
    assert (statements.input_ids[masked] == pretrain_statements.WORD_ID["[MASK]"]).all()
    for index, row in enumerate(torch.where(masked, statements.labels, statements.input_ids).tolist()):
        words = [pretrain_statements.WORDS[word] for word in row]
        assert judge(" ".join(words[1 : words.index("[SEP]")]), scenes.objects(index))


def test_it_begins_as_the_demos_backbone():
    model, before = pretrain_statements.new_model().eval(), ViltModel.from_pretrained(BACKBONE).eval()
    assert len(pretrain_statements.WORDS) > before.config.vocab_size
    text = torch.tensor([[2, 10, 20, 3]])
    image = torch.randn(1, 5, before.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [vilt(text, image_embeds=image, pixel_mask=torch.ones(1, 5)) for vilt in (model.vilt, before)]
    assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)


def test_it_is_the_same_for_a_seed(tmp_path):
    schedule = pretrain_statements.Schedule(steps=3, captions=6, statements=6)
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        torch.manual_seed(seed)
        model = pretrain_statements.new_model()
        pretrain_statements.train(model, schedule, seed, progress=False)
        save(model, tmp_path / name, pretrain_statements.WORD_ID)
    first, second, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second", "other")
    )
    assert first == second != other


def test_the_shipped_backbone_knows_the_words_of_all_tasks():
    tokenizer = ViltProcessor.from_pretrained(RECIPES_BACKBONE).tokenizer
    assert tokenizer.get_vocab() == pretrain_statements.WORD_ID
    assert tokenizer.model_max_length == pretrain_statements.NUM_TOKENS
    model, report = ViltModel.from_pretrained(RECIPES_BACKBONE, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.vocab_size == len(tokenizer) and model.dtype == torch.float32
