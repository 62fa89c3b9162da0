"""errors: every class says what, where and what to do, and can be caught as the builtin it specialises."""

from __future__ import annotations

import pickle

import pytest

from wsp_compiler import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.WspError) and value is not errors.WspError
]


@pytest.mark.parametrize("kind", CLASSES)
def test_message_has_what_where_and_fix(kind: type[errors.WspError]) -> None:
    error = kind("it broke", where="layer1.conv", fix="mend it")
    assert str(error) == "layer1.conv: it broke\n  fix: mend it"
    assert (error.what, error.where, error.fix) == ("it broke", "layer1.conv", "mend it")


@pytest.mark.parametrize("kind", CLASSES)
def test_is_a_wsp_error_and_a_builtin_error(kind: type[errors.WspError]) -> None:
    assert issubclass(kind, (ValueError, RuntimeError))
    with pytest.raises(errors.WspError, match="it broke"):
        raise kind("it broke")


def test_parts_may_be_missing() -> None:
    assert str(errors.WspError("it broke")) == "it broke"
    assert str(errors.WspError("it broke", fix="mend it")) == "it broke\n  fix: mend it"
    assert str(errors.WspError("it broke", where="here")) == "here: it broke"


def test_survives_pickling() -> None:
    error = errors.OptionError("it broke", where="here", fix="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.OptionError
    assert str(copy) == str(error)
    assert (copy.what, copy.where, copy.fix) == (error.what, error.where, error.fix)


def test_there_is_a_class_for_every_kind_of_bad_input() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert names >= {
        "OptionError",
        "RuleError",
        "ModelError",
        "InputError",
        "TargetError",
        "PassError",
        "PlanError",
    }
