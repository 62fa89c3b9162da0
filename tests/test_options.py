"""options: every value that cannot be is refused with what, where and what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from wsp_compiler.errors import OptionError, RuleError, WspError
from wsp_compiler.options import METHODS, PRECISIONS, CompileOptions, PruneRule

BAD_PR = [
    -0.1,
    1.0,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    "0.5",
    None,
    True,
    1j,
    [0.5],
    torch.tensor([0.5, 0.6]),
]


def assert_explains(error: WspError, what: str, where: str) -> None:
    assert what in error.what
    assert where in error.where
    assert error.fix


@pytest.mark.parametrize("pr", BAD_PR)
def test_pr_outside_0_to_1_is_refused(pr: Any) -> None:
    with pytest.raises(OptionError) as caught:
        CompileOptions(pr=pr)
    assert_explains(caught.value, repr(pr), "compile")
    assert "[0, 1)" in caught.value.what


@pytest.mark.parametrize("pr", [0, 0.0, 0.8, 0.999999, np.float64(0.5), np.float32(0.5)])
def test_pr_may_be_any_real_number_from_0_to_1(pr: Any) -> None:
    assert CompileOptions(pr=pr).pr == pr


@pytest.mark.parametrize(
    ("name", "value", "choice"),
    [
        ("method", "bswp", "bwsp"),
        ("method", "BWSP", "wsp"),
        ("method", None, "wsp"),
        ("method", ["wsp"], "wsp"),
        ("direction", "rows", "row"),
        ("direction", 0, "column"),
        ("tile", 3, "4"),
        ("tile", 2.0, "2"),  # equal to 2, and breaks every shape computed from it
        ("tile", "2", "2"),
        ("tile", True, "2"),
        ("tile", np.array([2, 4]), "2"),
        ("importance", "l3", "l2"),
        ("precision", "fp64", "fp32"),
        ("precision", torch.float16, "fp16"),
    ],
)
def test_an_unknown_choice_is_refused_and_the_choices_are_listed(name: str, value: Any, choice: str) -> None:
    with pytest.raises(OptionError) as caught:
        CompileOptions(**{name: value})
    assert_explains(caught.value, f"unknown {name}", "compile")
    assert choice in caught.value.fix


def test_a_typing_error_gets_a_suggestion() -> None:
    with pytest.raises(OptionError, match="did you mean 'bwsp'"):
        CompileOptions(method="bswp")


def test_every_listed_choice_is_accepted() -> None:
    for method in METHODS:
        for precision in (None, *PRECISIONS):
            assert CompileOptions(method=method, precision=precision).method == method


@pytest.mark.parametrize("threshold", [-1, 1.5, True, "16"])
def test_channel_threshold_is_a_number_of_channels(threshold: Any) -> None:
    with pytest.raises(OptionError, match="channel_threshold"):
        CompileOptions(channel_threshold=threshold)


def test_rules_must_be_rules() -> None:
    with pytest.raises(OptionError, match="'layer1'") as caught:
        CompileOptions(rules=("layer1",))  # pyright: ignore[reportArgumentType]
    assert "PruneRule" in caught.value.fix


@pytest.mark.parametrize("match", ["layer[", "(", "*", "a{99999999999999999999}", None, 5, b"layer1"])
def test_a_malformed_expression_is_refused(match: Any) -> None:
    with pytest.raises(RuleError, match="not a regular expression") as caught:
        PruneRule(match)
    assert repr(match) in caught.value.where
    assert "re.fullmatch" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": "none"}, "method"),
        ({"direction": "diagonal"}, "direction"),
        ({"tile": 6}, "tile"),
        ({"tile": 4.0}, "tile"),
        ({"pr": 1}, "pr=1"),
        ({"pr": math.nan}, "pr=nan"),
        ({"skip": "no"}, "skip='no'"),
    ],
)
def test_a_rule_checks_its_options_and_names_itself(options: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError) as caught:
        PruneRule("layer1", **options)
    assert_explains(caught.value, word, "PruneRule('layer1')")


def test_a_rule_matches_whole_paths() -> None:
    rule = PruneRule(r"layer1\.\d+\.conv1")
    assert rule.matches("layer1.0.conv1")
    assert not rule.matches("layer1.0.conv1.weight")
    assert not rule.matches("net.layer1.0.conv1")


def test_the_first_matching_rule_wins() -> None:
    special, general = PruneRule("a.b", pr=0.1), PruneRule("a.*", pr=0.2)
    assert CompileOptions(rules=(special, general)).rule_for("a.b") is special
    assert CompileOptions(rules=(general, special)).rule_for("a.b") is general
    assert CompileOptions(rules=(special,)).rule_for("c") is None


def test_a_rule_that_matches_nothing_lists_near_names() -> None:
    options = CompileOptions(rules=(PruneRule("layer1.*"), PruneRule(r"layer2\.0\.conv9")))
    paths = ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "stem"]
    with pytest.raises(RuleError, match="matches no convolution") as caught:
        options.check_rules_used(paths)
    assert repr(r"layer2\.0\.conv9") in caught.value.where
    assert "near names: layer2.0.conv" in caught.value.fix
    assert "stem" not in caught.value.fix


def test_without_near_names_the_first_names_are_listed() -> None:
    options = CompileOptions(rules=(PruneRule("zzz"),))
    with pytest.raises(RuleError, match=r"the first names: features\.0, features\.3"):
        options.check_rules_used(["features.3", "features.0"])
    with pytest.raises(RuleError, match="the model has no Conv2d"):
        options.check_rules_used([])


def test_rules_that_match_something_pass() -> None:
    CompileOptions(rules=(PruneRule("a"), PruneRule("b|a"))).check_rules_used(["a"])


@pytest.mark.parametrize("tile", [2, 4, "auto"])
@pytest.mark.parametrize("tune", ["off", "fast", "full"])
def test_speed_options(tile: Any, tune: str) -> None:
    options = CompileOptions(tile=tile, tune=tune, keep_slower=True, block=64)
    assert (options.tile, options.tune, options.keep_slower, options.block) == (tile, tune, True, 64)
    assert PruneRule("a", tile=tile, block=1).tile == tile


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tile", "Auto", "unknown tile 'Auto'"),
        ("tile", "2", "unknown tile '2'"),
        ("tune", "slow", "unknown tune 'slow'"),
        ("tune", True, "unknown tune True"),
        ("keep_slower", "no", "keep_slower='no'"),
        ("block", 0, "block=0 is not a number of filters"),
        ("block", 2.0, r"block=2\.0"),
        ("block", True, "block=True"),
    ],
)
def test_bad_speed_options(option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CompileOptions(**{option: value})
    if option in ("tile", "block"):
        with pytest.raises(OptionError, match=message):
            PruneRule("a", **{option: value})
