"""Records: their text form, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from wsp_compiler.codegen.schedule_records import LayerKey, Record, record_from_json

KEY = LayerKey(
    "GPU", "sm_90", 0, 64, 32, 20, 30, (1, 0), 8, True, False, "float16", "fp16", 2, (16, 16), (32, 32), 64, "relu", "g"
)  # fmt: skip
RECORD = Record(KEY, "fused", {"tiles": 32, "nested": {"a": 1}}, 12.345678)


def test_json_round_trip() -> None:
    for record in (RECORD, Record(KEY, "fused", {}, None, "it did not build")):
        back = record_from_json(json.loads(json.dumps(record.to_json())))
        assert back.key == record.key
        assert back.identity == record.identity
        assert back.error == record.error
        assert back.us == (None if record.us is None else pytest.approx(record.us, rel=1e-5))


def test_output_size() -> None:
    assert KEY.output_size == (20, 28)


def test_identity_is_everything_but_the_result() -> None:
    assert RECORD.identity == dataclasses.replace(RECORD, us=1.0).identity
    assert RECORD.identity != dataclasses.replace(RECORD, kind="cpu").identity
    assert RECORD.identity != dataclasses.replace(RECORD, knobs={"tiles": 16}).identity
    assert RECORD.identity != dataclasses.replace(RECORD, key=dataclasses.replace(KEY, batch=1)).identity


@pytest.mark.parametrize("us", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times(us: float) -> None:
    with pytest.raises(ValueError, match="time"):
        Record(KEY, "fused", {}, us)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("key"),
        lambda data: data["key"].pop("tile"),
        lambda data: data["key"].update(more=1),
        lambda data: data["key"].update(padding=[1]),
        lambda data: data.update(us="fast"),
        lambda data: data.update(us=-1),
        lambda data: data.update(knobs=3),
    ],
)
def test_damaged_records(damage: Any) -> None:
    data = copy.deepcopy(RECORD.to_json())
    damage(data)
    with pytest.raises(ValueError, match=r"."):
        record_from_json(data)
    with pytest.raises(ValueError, match=r"."):
        record_from_json("text")
