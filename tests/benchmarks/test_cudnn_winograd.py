import pytest
import torch
import torch.nn.functional as F

from benchmarks import cudnn_winograd
from benchmarks.cudnn_winograd import CudnnError, CudnnUnavailableError, WinogradNonfused

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_cpu_tensors_give_a_clear_error() -> None:
    with pytest.raises(CudnnUnavailableError, match="WINOGRAD_NONFUSED needs tensors on a CUDA GPU; got cpu"):
        WinogradNonfused(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))


def test_a_missing_library_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_winograd, "_open", lambda name, mode: None)
    cudnn_winograd.library.cache_clear()
    try:
        with pytest.raises(CudnnUnavailableError, match=r"libcudnn\.so\.9 is neither loaded by PyTorch"):
            cudnn_winograd.library()
    finally:
        cudnn_winograd.library.cache_clear()


def test_a_refusal_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def cudnnGetErrorString(self, status: int) -> bytes:
            return b"CUDNN_STATUS_NOT_SUPPORTED"

        def cudnnGetVersion(self) -> int:
            return 91900

    monkeypatch.setattr(cudnn_winograd, "library", Library)
    with pytest.raises(
        CudnnError, match="cuDNN 91900, algorithm 6 on NCHW: CUDNN_STATUS_NOT_SUPPORTED"
    ) as it:
        cudnn_winograd._check(3000, "algorithm 6 on NCHW")
    assert it.value.status == 3000
    cudnn_winograd._check(0, "nothing")


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float16, 5e-2)])
def test_it_computes_the_convolution(dtype: torch.dtype, limit: float) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 64, 28, 28, dtype=dtype, device="cuda", generator=generator)
    w = torch.randn(64, 64, 3, 3, dtype=dtype, device="cuda", generator=generator) / 24
    expected = F.conv2d(x.double(), w.double(), padding=1)
    error = (WinogradNonfused(x, w)(x).double() - expected).norm() / expected.norm()
    assert error.item() < limit


@needs_cuda
@pytest.mark.cuda
def test_wrong_shapes_and_names_are_refused() -> None:
    x, w = torch.randn(1, 8, 8, 8, device="cuda"), torch.randn(8, 8, 3, 3, device="cuda")
    with pytest.raises(ValueError, match="unknown algorithm 'FFT9'; known: WINOGRAD"):
        WinogradNonfused(x, w, "FFT9")
    with pytest.raises(ValueError, match=r"weight must be \[k, 8, 3, 3\]"):
        WinogradNonfused(x, torch.randn(8, 8, 5, 5, device="cuda"))
    with pytest.raises(ValueError, match="made for contiguous"):
        WinogradNonfused(x, w)(x[:, :, :4])
