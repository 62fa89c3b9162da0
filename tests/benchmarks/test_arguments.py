import argparse
import os

import pytest
import torch

from benchmarks.arguments import (
    DTYPES,
    add_common,
    check_device,
    fraction,
    no_less_precise,
    positive,
    prepare,
)


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.8", 0.8)])
def test_fraction(text: str, value: float) -> None:
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["1", "-0.1", "80", "x", "nan"])
def test_fraction_outside_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a fraction in \[0, 1\)"):
        fraction(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x"])
def test_positive_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a positive integer"):
        positive(text)


def test_precisions_are_ordered() -> None:
    assert no_less_precise("fp32", than="fp16")
    assert no_less_precise("fp16", than="fp16")
    assert not no_less_precise("fp16", than="tf32")


@pytest.mark.parametrize(
    ("device", "dtype", "message"), [("cuda", "fp32", "no CUDA GPU"), ("cpu", "fp16", "choose from fp32")]
)
def test_check_device_ends_with_a_message(
    device: str,
    dtype: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    add_common(parser, tuple(DTYPES))
    with pytest.raises(SystemExit):
        check_device(parser, device, dtype, on_cpu=("fp32",))
    assert message in capsys.readouterr().err


def test_prepare_gives_tvm_the_threads_of_pytorch() -> None:
    prepare("cpu", 2)
    assert torch.get_num_threads() == 2
    assert os.environ["TVM_NUM_THREADS"] == "2"
