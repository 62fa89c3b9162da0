"""The JSON record of a run: what ran where, on which versions, and its rows."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "unknown"
Row = dict[str, Any]


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    found = list(values)
    if not found or min(found) <= 0:
        raise ValueError(f"a geometric mean needs positive numbers, got {found}")
    return math.exp(math.fsum(math.log(v) for v in found) / len(found))


def minimum(values: Iterable[tuple[str, float]]) -> tuple[str, float]:
    """The pair (name, value) of the smallest value; the first of equals."""
    found = list(values)
    if not found:
        raise ValueError("a minimum needs at least one value")
    return min(found, key=lambda pair: pair[1])


def _output(command: Sequence[str]) -> str | None:
    """What `command` prints, stripped; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_commit(root: Path = ROOT) -> str:
    """$WSP_COMMIT if set, else HEAD's hash with `-dirty` after it if tracked files differ, else `unknown`."""
    given = os.environ.get("WSP_COMMIT")
    if given:
        return given
    git = ["git", "--no-optional-locks", "-C", str(root)]
    commit = _output([*git, "rev-parse", "--verify", "HEAD"])
    if not commit:
        return UNKNOWN
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if changed else commit


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def own_version(root: Path = ROOT) -> str:
    """The version of wsp_compiler: the installed one, else what the repository's pyproject.toml says."""
    try:
        written = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    except OSError:
        written = None
    installed = _version("wsp_compiler")
    return written.group(1) if installed == UNKNOWN and written else installed


def cpu_model() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or UNKNOWN


def environment(device: str) -> dict[str, Any]:
    """Device, CPU and versions, as found on this machine."""
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    variables = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TVM_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    found: dict[str, Any] = {
        "device": cpu_model(),
        "cpu": cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "onednn": onednn.group(1) if onednn and torch.backends.mkldnn.is_available() else "absent",
        "tvm": _version("apache-tvm"),
        "wsp_compiler": own_version(),
        "variables": {name: os.environ[name] for name in variables if name in os.environ},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties("cuda")
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": (driver or UNKNOWN).partition("\n")[0],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass
class Record:
    """One run of one benchmark; `rows` grows as it goes, times in microseconds."""

    command: str
    environment: dict[str, Any]
    commit: str = field(default_factory=git_commit)
    date: str = field(default_factory=_now)
    rows: list[Row] = field(default_factory=list[Row])

    def save(self, path: str | Path) -> None:
        """Writes JSON in one step: a reader sees the old file or the new one, never half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def load(path: str | Path) -> Record:
    """The record that `Record.save` wrote."""
    return Record(**json.loads(Path(path).read_text()))


def new_record(module: str, arguments: Sequence[str], device: str) -> Record:
    """A record without rows of `python -m module arguments`, started now."""
    return Record(shlex.join(["python", "-m", module, *arguments]), environment(device))
