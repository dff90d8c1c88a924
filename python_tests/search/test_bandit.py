"""The bandit against the formulas of DAS (arXiv 2309.01479), its draws against their exact law."""

import itertools
import json
import math

import pytest
import torch

from petl_ext.search import Bandit


def first(size):
    """A subset is the first `size` arms of an order."""
    return lambda order: tuple(sorted(order[:size])) if len(order) >= size else None


def set_preferences(bandit, preferences):
    bandit.preferences = list(map(float, preferences))
    return bandit


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize(("probability", "temperature"), [("sigmoid", 1.0), ("softmax", 1.0), ("softmax", 0.1)])
def test_updates_are_the_formula(probability, temperature, baseline):
    bandit = Bandit(7, 3, step_size=0.7, probability=probability, temperature=temperature, baseline=baseline)
    gates = torch.zeros(7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        subsets = bandit.draw_distinct(3, first(2))
        rewards = torch.exp(-3 * torch.rand(3, generator=generator, dtype=torch.float64))
        scaled = gates / temperature
        p = torch.sigmoid(scaled) if probability == "sigmoid" else torch.softmax(scaled, 0)
        for subset, reward in zip(subsets, rewards, strict=True):
            chosen = torch.zeros(7, dtype=torch.float64).index_fill_(0, torch.tensor(subset), 1)
            gates = gates + 0.7 * (reward - rewards.mean() * baseline) * p * (1 - p) * chosen
        bandit.update(subsets, rewards.tolist())
    assert gates.abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(bandit.preferences, dtype=torch.float64), gates, rtol=0, atol=1e-7)


def test_an_arm_drawn_several_times_moves_each_time():
    bandit = Bandit(3, probability="softmax", step_size=0.5)
    bandit.update([(1,), (1,), (2,)], [4.0, 1.0, 1.0])
    assert bandit.preferences == pytest.approx([0, 0.5 * (2 - 1) * 2 / 9, 0.5 * -1 * 2 / 9])


def law_without_replacement(weights, size):
    """{subset: probability} when arms are drawn one after the other with these weights."""
    law = dict.fromkeys(itertools.combinations(range(len(weights)), size), 0.0)
    for order in itertools.permutations(range(len(weights)), size):
        probability, left = 1.0, sum(weights)
        for arm in order:
            probability *= weights[arm] / left
            left -= weights[arm]
        law[tuple(sorted(order))] += probability
    return law


def chi_square(drawn, law):
    return sum((drawn.count(subset) - p * len(drawn)) ** 2 / (p * len(drawn)) for subset, p in law.items())


CHI_SQUARE_LIMIT = 20.5  # five degrees of freedom: one seed in a thousand exceeds it
PREFERENCES = [-1.5, 0.0, 0.4, 2.0]
DRAWS = 20_000


def test_draws_without_replacement_follow_the_law_of_multinomial():
    bandit = set_preferences(Bandit(4, seed=1), PREFERENCES)
    law = law_without_replacement(torch.tensor(PREFERENCES).sigmoid().tolist(), 2)
    assert sum(law.values()) == pytest.approx(1)
    assert chi_square([bandit.draw(2) for _ in range(DRAWS)], law) < CHI_SQUARE_LIMIT
    uniform = dict.fromkeys(law, 1 / 6)
    assert chi_square([bandit.draw(2, uniform=True) for _ in range(DRAWS)], uniform) < CHI_SQUARE_LIMIT
    assert chi_square([bandit.draw(2) for _ in range(DRAWS)], uniform) > 10 * CHI_SQUARE_LIMIT


def test_the_law_is_that_of_torch_multinomial():
    weights = torch.tensor(PREFERENCES).sigmoid()
    rows = torch.multinomial(weights.expand(DRAWS, 4), 2, generator=torch.Generator().manual_seed(2))
    law = law_without_replacement(weights.tolist(), 2)
    assert chi_square([tuple(row) for row in rows.sort(dim=1).values.tolist()], law) < CHI_SQUARE_LIMIT


def test_draws_with_replacement_are_independent():
    bandit = set_preferences(Bandit(3, seed=1, probability="softmax"), [0.0, 1.0, -1.0])
    p = bandit.probabilities
    assert sum(p) == pytest.approx(1)
    law = {(i, j): (1 + (i != j)) * p[i] * p[j] for i in range(3) for j in range(i, 3)}
    assert chi_square([bandit.draw(2, replacement=True) for _ in range(DRAWS)], law) < CHI_SQUARE_LIMIT


def test_an_order_has_every_arm_and_a_draw_is_ascending():
    bandit = Bandit(9)
    assert all(sorted(bandit.order()) == list(range(9)) for _ in range(20))
    assert all(list(subset) == sorted(set(subset)) for subset in (bandit.draw(4) for _ in range(20)))
    with pytest.raises(ValueError, match="10 different arms asked for, there are 9"):
        bandit.draw(10)
    draws = bandit.draws
    for size in (0, -1, 1.5, True, None):
        for replacement in (False, True):
            with pytest.raises(ValueError, match="size must be a positive integer, got"):
                bandit.draw(size, replacement=replacement)
    assert bandit.draws == draws


def test_draws_depend_on_seed_and_count_alone():
    first_run, second_run = Bandit(6, seed=5), Bandit(6, seed=5)
    torch.manual_seed(0)
    drawn = [first_run.draw(3) for _ in range(20)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert [second_run.draw(3) for _ in range(20)] == drawn
    assert torch.equal(torch.get_rng_state(), state)
    other = Bandit(6, seed=6)
    assert [other.draw(3) for _ in range(20)] != drawn


ORDERS = [[0, 1, 3, 4, 2], [1, 4, 0, 2, 3], [0, 1, 4, 3, 2]]


def test_draws_are_the_same_on_every_machine():
    # Written down once: a change of this list breaks the resuming of searches.
    bandit = set_preferences(Bandit(5, seed=7), [0.0, 1.0, -1.0, 0.5, 0.0])
    assert [bandit.order() for _ in range(3)] == ORDERS


@pytest.mark.parametrize(("arms", "size"), [(4, 2), (5, 1), (5, 4), (3, 3)])
def test_all_different_subsets_can_be_asked_for_and_not_one_more(arms, size):
    everything = set(itertools.combinations(range(arms), size))
    for preferences in ([0.0] * arms, [50.0] + [-50.0] * (arms - 1)):
        bandit = set_preferences(Bandit(arms), preferences)
        drawn = bandit.draw_distinct(len(everything), first(size))
        assert len(drawn) == len(everything) and set(drawn) == everything
        assert set(bandit.best_distinct(len(everything) + 1, first(size))) == everything
        with pytest.raises(ValueError, match=f"{len(everything) + 1} different .* only {len(everything)}"):
            bandit.draw_distinct(len(everything) + 1, first(size))


@pytest.mark.parametrize("size", [50, 800])
@pytest.mark.parametrize("probability", ["sigmoid", "softmax"])
def test_extreme_preferences_are_drawn_in_bounded_time(size, probability):
    bandit = set_preferences(Bandit(32, probability=probability), [size] * 4 + [-size + arm for arm in range(28)])
    before = bandit.draws
    subsets = bandit.draw_distinct(5, first(4))
    # What redrawing cannot find is taken by preference: the next best arms in the place of the fourth.
    assert subsets == [(0, 1, 2, 3), (0, 1, 2, 31), (0, 1, 2, 30), (0, 1, 2, 29), (0, 1, 2, 28)]
    assert bandit.draws - before == 1 + 4 * 100
    assert all(0 <= p <= 1 for p in bandit.probabilities)
    bandit.update(subsets, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(map(math.isfinite, bandit.preferences))


def test_of_extreme_preferences_the_larger_comes_first():
    bandit = set_preferences(Bandit(3), [-800.0, -780.0, -760.0])
    orders = [bandit.order() for _ in range(200)]
    assert orders.count([2, 1, 0]) == 200  # not so where the probabilities have underflowed to equal ones


def test_best_distinct_goes_by_preference():
    bandit = set_preferences(Bandit(5), [0.1, 0.5, 0.3, 0.2, 0.4])
    assert bandit.ranking() == [1, 4, 2, 3, 0]
    assert bandit.best_distinct(4, first(2)) == [(1, 4), (1, 2), (1, 3), (0, 1)]
    assert Bandit(4).ranking() == [0, 1, 2, 3]


def test_state_goes_through_json_and_has_the_same_future():
    bandit = Bandit(8, seed=2, step_size=0.3)
    for _ in range(5):
        bandit.update(bandit.draw_distinct(3, first(3)), [0.1, 0.7, 0.3])
    state = json.loads(json.dumps(bandit.state_dict()))
    again = Bandit(8, seed=2, step_size=0.3)
    again.load_state_dict(state)
    for _ in range(5):
        subsets = bandit.draw_distinct(3, first(3))
        assert again.draw_distinct(3, first(3)) == subsets
        bandit.update(subsets, [0.5, 0.2, 0.9])
        again.update(subsets, [0.5, 0.2, 0.9])
    assert again.preferences == bandit.preferences
    other = Bandit(8, seed=3, step_size=0.3)
    with pytest.raises(ValueError, match=r"state must be of .*'seed': 3.*got .*'seed': 2"):
        other.load_state_dict(state)
    assert (other.preferences, other.draws) == ([0.0] * 8, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferences": ["1", "2", "3"]}, "preferences must be 3 finite numbers"),
        ({"preferences": [1.0, 2.0, math.nan]}, "preferences must be 3 finite numbers"),
        ({"preferences": [1.0, 2.0, None]}, "preferences must be 3 finite numbers"),
        ({"preferences": [1.0, 2.0]}, "preferences must be 3 finite numbers"),
        ({"preferences": None}, "preferences must be 3 finite numbers"),
        ({"draws": -1}, "draws must be an integer of 0 or more, got -1"),
        ({"draws": None}, "draws must be an integer of 0 or more, got None"),
        ({"seed": None}, "state must be of"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message):
    bandit = Bandit(3)
    bandit.draw()
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=message):
        bandit.load_state_dict({**before, "preferences": [1.0, 2.0, 3.0], **change})
    with pytest.raises(ValueError, match="state must be a dict"):
        bandit.load_state_dict([])
    assert bandit.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_arms": 0}, "num_arms must be a positive integer, got 0"),
        ({"num_arms": 3, "seed": "a"}, "seed must be an integer, got 'a'"),
        ({"num_arms": 3, "step_size": 0}, "step_size must be a positive number, got 0"),
        ({"num_arms": 3, "temperature": math.inf}, "temperature must be a positive number, got inf"),
        ({"num_arms": 3, "probability": "relu"}, 'probability must be "sigmoid" or "softmax", got \'relu\''),
        ({"num_arms": 3, "probability": []}, 'probability must be "sigmoid" or "softmax", got'),
        ({"num_arms": 3, "baseline": 1}, "baseline must be True or False, got 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Bandit(**arguments)


@pytest.mark.parametrize(
    ("subsets", "rewards", "message"),
    [
        ([(0,), (1,)], [1.0], "rewards must be one per subset, got 1 for 2"),
        ([], [], "rewards must be one per subset"),
        ([(0,), (1,)], [1.0, math.nan], "rewards must be finite"),
        ([(0,), (3,)], [1.0, 2.0], "arms must be 0 to 2"),
    ],
)
def test_a_refused_update_changes_nothing(subsets, rewards, message):
    bandit = Bandit(3)
    with pytest.raises(ValueError, match=message):
        bandit.update(subsets, rewards)
    assert bandit.preferences == [0.0, 0.0, 0.0]
