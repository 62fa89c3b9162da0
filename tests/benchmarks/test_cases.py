import pytest

from benchmarks.cases import (
    CASES,
    GROUPS,
    NETWORKS,
    RESNET18,
    SUPERRES,
    TWELVE_JOBS,
    VGG16,
    known_names,
    select,
)


def test_groups_hold_the_shapes_of_their_networks() -> None:
    assert [case.name for case in RESNET18] == ["64@56", "128@28", "256@14", "512@7"]
    assert [case.name for case in VGG16] == ["64@224", "128@112", "256@56", "512@28"]
    assert SUPERRES[0].input_shape(2) == (2, 64, 360, 640)
    assert all(case.group == group for group in ("resnet18", "vgg16", "superres") for case in GROUPS[group])
    assert GROUPS["eight"] == (*RESNET18, *VGG16)


def test_networks_are_the_rest_of_vgg16_and_the_denoiser() -> None:
    import torch
    import torchvision

    from examples.denoiser import Denoiser
    from wsp_compiler import find_sites

    def shapes(model: torch.nn.Module, x: torch.Tensor) -> set[tuple[int, ...]]:
        sites = find_sites(model.eval(), x)
        return {
            (s.channels, s.filters, *s.input_shapes[0][2:]) for s in sites if min(s.channels, s.filters) >= 16
        }

    with torch.device("meta"):
        vgg = torchvision.models.vgg16(weights=None).features
    small = shapes(vgg.to_empty(device="cpu"), torch.zeros(1, 3, 32, 32))
    sides = {32: 224, 16: 112, 8: 56, 4: 28, 2: 14}
    wanted = {(c, n, sides[h], sides[w]) for c, n, h, w in small}
    wanted |= shapes(Denoiser(middle_layers=1), torch.zeros(1, 1, 512, 512))
    known = (*VGG16, *NETWORKS)
    assert {(case.channels_in, case.channels_out, case.height, case.width) for case in known} == wanted


def test_case_names_are_unique() -> None:
    assert len(CASES) == len(RESNET18) + len(VGG16) + len(SUPERRES) + len(NETWORKS)
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
