"""Local response normalization against torch's."""

import pytest
import torch
from torch import Tensor, nn

from distributed.models.local_response_norm import LocalResponseNorm


def outcome(layer: nn.Module, images: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(images)
    y.backward(grad)
    return y.detach(), images.grad


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_matches_torch(memory_format, size, beta):
    torch.manual_seed(0)
    # More pixels than one block, and values large enough for the denominators to matter.
    images = (torch.randn(3, 7, 30, 31, dtype=torch.float64) * 20).contiguous(memory_format=memory_format)
    grad = torch.randn_like(images)
    options = {"alpha": 1e-2, "beta": beta, "k": 2.0}
    own, torchs = (outcome(layer(size, **options), images, grad) for layer in (LocalResponseNorm, nn.LocalResponseNorm))
    for found, expected in zip(own, torchs, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(own[0], images / 2**beta, rtol=1e-2), "the denominators have no effect"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_matches_torch_on_cuda(memory_format):
    torch.manual_seed(0)
    images = (torch.randn(3, 7, 30, 31, dtype=torch.float64) * 20).contiguous(memory_format=memory_format)
    grad = torch.randn_like(images)
    own = outcome(LocalResponseNorm(5, 1e-2, 0.75, 2.0), images.cuda(), grad.cuda())
    torchs = outcome(nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0), images, grad)
    for found, expected in zip(own, torchs, strict=True):
        assert torch.allclose(found.cpu(), expected, rtol=1e-10, atol=1e-10)


def test_gradients_match_finite_differences():
    torch.manual_seed(0)
    images = (torch.randn(2, 6, 2, 2, dtype=torch.float64) * 10).requires_grad_()
    assert torch.autograd.gradcheck(LocalResponseNorm(5, 1e-2, 0.75, 2.0), (images,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    images = (torch.randn(2, 16, 5, 5) * 10).to(dtype)
    grad = torch.randn_like(images)
    y, gradient = outcome(LocalResponseNorm(5, 1e-2, 0.75, 2.0), images, grad)
    wide, wide_gradient = outcome(LocalResponseNorm(5, 1e-2, 0.75, 2.0), images.float(), grad.float())
    assert y.dtype == gradient.dtype == dtype
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_autocast_does_not_round_intermediates():
    torch.manual_seed(0)
    images = torch.randn(2, 16, 5, 5) * 10
    layer = LocalResponseNorm(5, 1e-2, 0.75, 2.0)
    plain = outcome(layer, images, torch.ones_like(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, outcome(layer, images, torch.ones_like(images)), plain))


def test_empty_batch():
    images = torch.empty(0, 4, 3, 3, requires_grad=True)
    assert LocalResponseNorm(5)(images).shape == images.shape


def test_keeps_channels_last():
    images = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    assert LocalResponseNorm(5)(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_matches_eager(dtype):
    torch.manual_seed(0)
    images = (torch.randn(4, 8, 9, 9) * 10).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(images)
    layer = LocalResponseNorm(5, 1e-2, 0.75, 2.0)
    eager, compiled = outcome(layer, images, grad), outcome(torch.compile(layer, fullgraph=True), images, grad)
    for found, expected in zip(compiled, eager, strict=True):
        assert torch.allclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert bool(found.abs().sum() > 0)
