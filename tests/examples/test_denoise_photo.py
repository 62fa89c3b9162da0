"""The parts of the example's main job that need no compiler: options, timing, table, picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from examples import denoise_photo, photos
from examples.denoise_photo import Outcome
from examples.denoiser import Denoiser

CPU = torch.device("cpu")


@pytest.fixture
def outcomes() -> list[Outcome]:
    """What the job would have measured on a photo of 40 x 200 pixels."""
    white = torch.full((1, 1, 40, 200), 1.2)  # brighter than white, as a denoised photo may be
    return [
        Outcome("noisy photo", white, 20.17),
        Outcome("PyTorch eager, dense", white, 29.0, [30.0, 10.0, 20.0]),
        Outcome("compiled, pr=0.8", white * 0, 21.5, [5.0, 4.0, 90.0]),
    ]


def test_the_table_compares_with_pytorch(outcomes: list[Outcome]):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(denoise_photo.results_table(outcomes))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    row = {label.strip(): [cell.strip() for cell in cells] for label, *cells in rows}
    assert row["noisy photo"] == ["20.17", "", "", "", ""]
    assert row["PyTorch eager, dense"] == ["29.00", "+8.83", "20.00", "1.00x", "3"]
    assert row["compiled, pr=0.8"] == ["21.50", "+1.33", "5.00", "4.00x", "3"]


def test_the_picture_shows_every_outcome_side_by_side(outcomes: list[Outcome], tmp_path: Path):
    path = tmp_path / "new" / "denoised.png"
    clean = torch.full((1, 1, 40, 200), 0.5)
    denoise_photo.write_picture(clean, outcomes, path)
    with Image.open(path) as picture:
        assert picture.size == (4 * 200 + 3 * 8, 40 + 32)
        assert [picture.getpixel((column * 208 + 100, 60)) for column in range(4)] == [128, 255, 255, 0]
        for column in range(4):  # the label above each
            label = picture.crop((column * 208, 0, column * 208 + 200, 32))
            assert label.getextrema() == (0, 255)


def test_calls_are_timed_in_turns():
    calls: list[str] = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = denoise_photo.time_in_turns(runs, CPU, rounds=5, seconds=60)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in times.values()] == [5, 5]
    assert all(value >= 0 for values in times.values() for value in values)


def test_the_time_budget_leaves_a_few_runs():
    times = denoise_photo.time_in_turns({"a": lambda: None}, CPU, rounds=50, seconds=0)
    assert len(times["a"]) == denoise_photo.FEWEST_RUNS


def test_eager_runs_in_a_layout_of_its_own_and_leaves_the_model_alone():
    model = Denoiser(channels=4, middle_layers=1).eval()
    noisy = torch.rand(1, 1, 24, 24)
    with torch.inference_mode():
        run, layout = denoise_photo.eager_in_faster_layout(model, noisy)
        torch.testing.assert_close(denoise_photo.denoise(run), model(noisy))
    assert layout in {"contiguous_format", "channels_last"}
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_long_step_is_shown():
    console = Console(width=80, record=True, file=io.StringIO())
    with denoise_photo.progress_line(console, "thinking"):
        pass
    assert "thinking" in console.export_text()


def test_the_device_is_described():
    assert denoise_photo.describe(CPU, torch.float32) == f"float32, {torch.get_num_threads()} CPU threads"


def test_defaults_of_the_command():
    options = denoise_photo.parse(["--device", "cpu"])
    assert options.photo == "camera"
    assert options.pr == [0, 0.3, 0.8]
    assert options.out == Path("denoised.png")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--pr 1.5", "less than 1"),
        ("--pr 80", "less than 1"),
        (f"--photo {photos.TRAIN[0]}", "invalid choice"),
        ("--device cpu --dtype float16", "needs a CUDA GPU"),
    ],
)
def test_wrong_options_are_refused(command: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        denoise_photo.parse(command.split())
    assert message in capsys.readouterr().err


def test_json_record_holds_the_table(tmp_path: Path) -> None:
    options = denoise_photo.parse(["--photo", "camera", "--device", "cpu"])
    outcome = denoise_photo.Outcome("compiled, pr=0.3", torch.zeros(1, 1, 4, 4), 21.5, (3.0, 1.0, 2.0))
    options.json = tmp_path / "record.json"
    denoise_photo.write_json(options, [outcome], ["--photo", "camera"])
    record = json.loads(options.json.read_text())
    assert record["command"] == "python -m examples.denoise_photo --photo camera"
    assert record["rows"] == [
        {"label": "compiled, pr=0.3", "psnr_db": 21.5, "median_ms": 2.0, "photo": "camera"}
    ]
