"""Assignments of a round: distinct, without earlier winners, and the same again for the same seed."""

from __future__ import annotations

from wsp_compiler.abwsp.sampling import BWSP, WSP, assignment, draw


def test_few_layers_are_enumerated() -> None:
    assert draw(2, 10, 0, 0, ()) == ["00", "01", "10", "11"]
    assert draw(2, 3, 0, 1, ["01"]) == ["00", "10", "11"]
    assert draw(1, 5, 0, 2, ["0", "1"]) == []


def test_without_a_choice_there_is_one_assignment() -> None:
    assert draw(0, 5, 0, 0, ()) == [""]
    assert draw(0, 5, 0, 1, [""]) == []
    assert assignment(5, 4) == "0101"


def test_many_layers_are_sampled() -> None:
    used = ["0" * 13, "01" * 6 + "0"]
    for index in range(3):
        found = draw(13, 100, 4, index, used)
        assert len(set(found)) == len(found) == 100
        assert {len(name) for name in found} == {13}
        assert not set(found) & set(used)
        assert found == draw(13, 100, 4, index, used)
        ones = sum(name.count(BWSP) for name in found) / 1300
        assert 0.45 < ones < 0.55


def test_rounds_and_seeds_draw_differently() -> None:
    sets = [frozenset(draw(20, 50, seed, index, ())) for seed in (0, 1) for index in (0, 1)]
    assert len(set(sets)) == 4


def test_the_first_round_begins_with_both_ends() -> None:
    assert draw(20, 50, 0, 0, ())[:2] == [WSP * 20, BWSP * 20]
    assert not {WSP * 20, BWSP * 20} & set(draw(20, 50, 0, 1, ()))
    assert len(draw(20, 1, 0, 0, ())) == 1


def test_nearly_everything_can_be_drawn() -> None:
    found = draw(6, 62, 0, 1, ["000000"])
    assert len(set(found)) == 62
    assert "000000" not in found
