"""Gains by rank, and what is done to scores: against enumeration and by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterolora.errors import DegenerateScoreError, ScoreError
from heterolora.search.gains import (
    Gains,
    averaged,
    by_layer,
    divided,
    numbers,
    renumbered,
    shuffled,
)
from heterolora.search.pools import Pool, choose_ranks
from heterolora.search.sites import Site

RANKS = (0, 1, 2, 4)
spectra = st.lists(st.floats(0.0, 1.0), min_size=0, max_size=6).map(
    lambda values: sorted(values, reverse=True)
)


def chosen(sites, scores, parameters, ranks=RANKS, **options):
    scales = {site.name: 2.0 for site in sites}
    return choose_ranks([Pool(tuple(sites), parameters)], scores, scales, ranks, **options)


@given(
    shapes=st.lists(st.tuples(st.integers(8, 20), st.integers(8, 20)), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_best_of_all_allocations_is_found(shapes, data):
    sites = [Site(f"m{i}", *shape) for i, shape in enumerate(shapes)]
    found = {site.name: data.draw(spectra) for site in sites}
    found["m0"] = [1.0, *found["m0"]]
    budget = 2 * sum(site.unit_cost for site in sites)
    ranks = chosen(sites, Gains(found), budget)

    def worth(choice):
        cost = sum(site.unit_cost * rank for site, rank in zip(sites, choice, strict=True))
        total = sum(
            value
            for site, rank in zip(sites, choice, strict=True)
            for value in found[site.name][:rank]
        )
        return (cost, total) if cost <= budget else (-1, 0.0)

    best = max(map(worth, itertools.product(RANKS, repeat=len(sites))))
    cost, total = worth([ranks[site.name] for site in sites])
    assert cost == best[0] and total == pytest.approx(best[1], rel=1e-8)


def test_gains_are_compared_as_they_are_and_scores_per_unit_of_scale():
    sites = [Site("a", 8, 8), Site("b", 8, 8)]
    scales = {"a": 1.0, "b": 2.0}
    pools = [Pool(tuple(sites), 4 * 16)]
    gains = Gains({"a": (1.0,) * 4, "b": (1.5,) * 4})
    assert choose_ranks(pools, gains, scales, (0, 4)) == {"a": 0, "b": 4}
    assert choose_ranks(pools, dict(gains), scales, (0, 4)) == {"a": 4, "b": 0}


def test_a_rank_beyond_the_spectrum_adds_nothing():
    gains = Gains({"a": (3.0, 1.0), "b": ()})
    assert gains == {"a": 4.0, "b": 0.0}
    assert [gains.upto("a", rank) for rank in (0, 1, 2, 3, 99)] == [0.0, 3.0, 4.0, 4.0, 4.0]
    assert gains.upto("b", 8) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_unusable_gains_are_refused(bad):
    sites = [Site("a", 8, 8), Site("b", 8, 8)]
    with pytest.raises(ScoreError, match="'b'"):
        chosen(sites, Gains({"a": (1.0,), "b": (bad,)}), 64)
    with pytest.raises(DegenerateScoreError):
        chosen(sites, Gains({"a": (0.0,), "b": ()}), 64)


NAMES = ("x.layer.0.a", "x.layer.0.b", "x.layer.1.a", "x.layer.1.b", "pooler")


def test_by_layer():
    scores = dict(zip(NAMES, (1.0, 3.0, 30.0, 10.0, 11.0), strict=True))
    equal = by_layer(scores)
    # 44 in two layers: outside of them 22 counts 1.
    assert equal == dict(zip(NAMES, (0.25, 0.75, 0.75, 0.25, 0.5), strict=True))
    shares = [sum(s[n] for n in NAMES[4:]) / sum(s.values()) for s in (scores, equal)]
    assert shares[0] == pytest.approx(shares[1])
    spectrum = by_layer(Gains({name: (s / 2, s / 4, s / 4) for name, s in scores.items()}))
    assert spectrum == pytest.approx(equal)
    assert spectrum.marginal["x.layer.1.a"] == (0.375, 0.1875, 0.1875)


def test_by_layer_of_a_layer_without_scores_and_of_no_layers():
    assert by_layer({"l.0.a": 0.0, "l.1.a": 4.0}) == {"l.0.a": 0.0, "l.1.a": 1.0}
    assert by_layer({"l.0.a": 0.0, "a": 4.0}) == {"l.0.a": 0.0, "a": 4.0}
    assert by_layer({"a": 1.0, "b": 3.0}) == {"a": 1.0, "b": 3.0}


def test_a_layer_is_named_by_its_first_number():
    """Of an expert, and of the two stacks of an encoder-decoder."""
    names = (
        *("layers.0.mlp.experts.1.up", "layers.0.mlp.experts.2.up"),
        *("encoder.block.0.layer.1.wi", "decoder.block.0.layer.1.wi"),
        "encoder.block.0.layer.0.o:in-attn",
    )
    equal = by_layer(dict.fromkeys(names, 1.0))
    assert list(equal.values()) == [0.5, 0.5, 0.5, 1.0, 0.5]


def test_choose_ranks_by_layer():
    sites = [Site(name, 8, 8) for name in NAMES[:4]]
    scores = dict(zip(NAMES[:4], (1.0, 3.0, 30.0, 20.0), strict=True))
    for found in (scores, Gains({name: (s,) * 4 for name, s in scores.items()})):
        assert list(chosen(sites, found, 128, (0, 4)).values()) == [0, 0, 4, 4]
        equal = chosen(sites, found, 128, (0, 4), equal_layers=True)
        assert list(equal.values()) == [0, 4, 4, 0]


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_what_is_required_gets_a_rank_although_it_gains_nothing(score):
    sites = [Site(name, 8, 8) for name in NAMES[:4]]
    scores = dict(zip(NAMES[:4], (score, 3.0, 3.0, 3.0), strict=True))
    for found in (scores, Gains({name: (s,) * 4 for name, s in scores.items()})):
        assert chosen(sites, found, 192, (0, 4))[NAMES[0]] == 0
        assert chosen(sites, found, 192, (0, 4), required={NAMES[0]})[NAMES[0]] == 4


@pytest.mark.parametrize("gains", [False, True])
def test_shuffled(gains):
    sites = [Site(f"s{i}", 8, 8) for i in range(6)] + [Site(f"t{i}", 8, 24) for i in range(6)]
    scores = {site.name: float(i) for i, site in enumerate(sites)}
    if gains:
        scores = Gains({name: (s, 1.0) for name, s in scores.items()})
    first, again, other = (shuffled(scores, sites, seed) for seed in (1, 1, 2))
    assert first == again != other and type(first) is type(scores)
    assert list(first) == list(scores) and first != scores
    for kind in "st":
        before, after = (
            sorted(numbers({n: s[n] for n in s if n[0] == kind})) for s in (scores, first)
        )
        assert before == after


def test_averaged_and_divided():
    a, b = {"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 6.0}
    assert averaged([a, b]) == {"x": 2.0, "y": 4.0}
    mean = averaged([Gains({"x": (4.0, 1.0), "y": ()}), Gains({"x": (2.0, 0.0), "y": ()})])
    assert isinstance(mean, Gains) and mean.marginal == {"x": (3.0, 0.5), "y": ()}
    assert divided(b, {"y": 2.0}) == {"y": 3.0}
    assert divided(mean, {"x": 0.5}).marginal == {"x": (6.0, 1.0)}


def test_numbers_survive_a_broadcast():
    """Names in another order on each side, as `agreed_scores` sends them."""
    gains = Gains({"b": (4.0, 1.0), "a": (3.0,), "d": (), "c": (2.0,)})
    assert numbers(gains) == [3.0, 4.0, 1.0, 2.0]
    other = Gains({"c": (0.0,), "d": (), "a": (0.0,), "b": (0.0, 0.0)})
    back = renumbered(other, numbers(gains))
    assert back == gains and back.marginal == gains.marginal and list(back) == list(other)
    assert renumbered({"b": 0.0, "a": 0.0}, [1.0, 2.0]) == {"b": 2.0, "a": 1.0}
