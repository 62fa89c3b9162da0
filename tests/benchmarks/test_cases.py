import pytest

from benchmarks.cases import CASES, GROUPS, RESNET18, SUPERRES, TWELVE_JOBS, VGG16, known_names, select


def test_groups_hold_the_shapes_of_their_networks() -> None:
    assert [case.name for case in RESNET18] == ["64@56", "128@28", "256@14", "512@7"]
    assert [case.name for case in VGG16] == ["64@224", "128@112", "256@56", "512@28"]
    assert SUPERRES[0].input_shape(2) == (2, 64, 360, 640)
    assert all(case.group == group for group in ("resnet18", "vgg16", "superres") for case in GROUPS[group])
    assert GROUPS["eight"] == (*RESNET18, *VGG16)


def test_case_names_are_unique() -> None:
    assert len(CASES) == len(RESNET18) + len(VGG16) + len(SUPERRES)
    assert len(set(known_names())) == len(known_names())


def test_twelve_is_resnet_at_32_and_128_and_vgg_at_32() -> None:
    assert len(set(TWELVE_JOBS)) == 12
    assert {(case, 128) for case in RESNET18} < set(TWELVE_JOBS)
    assert {(case, 32) for case in (*RESNET18, *VGG16)} < set(TWELVE_JOBS)


def test_select_crosses_cases_with_batches_and_drops_repeats() -> None:
    jobs = select(["512@7", "resnet18"], [1, 32])
    assert len(jobs) == 8
    assert [(case.name, batch) for case, batch in jobs[:2]] == [("512@7", 1), ("512@7", 32)]


def test_select_twelve_ignores_batches() -> None:
    assert select(["twelve"], [1]) == TWELVE_JOBS


def test_select_of_an_unknown_case_lists_the_names() -> None:
    with pytest.raises(
        ValueError, match=r"unknown case 'alexnet'; known: resnet18, vgg16, eight, .*twelve, 64@56"
    ):
        select(["alexnet"], [1])


def test_direct_multiplies() -> None:
    assert CASES["64@56"].direct_multiplies(2) == 2 * 56 * 56 * 64 * 64 * 9
