"""What every test gets: a kernel cache of its own, a fixed seed, one or two threads; CUDA tests need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `cuda` on a machine without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The session's kernel cache, which the workers of pytest-xdist share; the user's stays as it is."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "wsp_kernels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSP_CACHE_DIR", str(folder))
        patch.setenv("WSP_TABLE_DIR", "")  # decisions must not depend on the machine's speed
        patch.delenv("WSP_DUMP", raising=False)
        yield folder


@pytest.fixture(autouse=True)
def _torch_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed, and two intra-op threads; one where pytest-xdist runs tests side by side."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1 if hasattr(request.config, "workerinput") else 2)
    yield
    torch.set_num_threads(threads)
