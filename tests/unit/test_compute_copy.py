"""A compute copy share the model's weights, and low-precision weights follow the model's."""

import pytest
import torch
from torch import Tensor, nn

from distributed.errors import InputError
from distributed.exact.compute_copy import ComputeCopy

LOW = torch.bfloat16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("constants", torch.arange(3), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(images)).mean((2, 3))) * self.scale


CAST = {"conv.weight", "conv.bias", "out.weight"}


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.norm.bias.requires_grad_(False)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def copy_of(model: nn.Module, low: torch.dtype | None) -> ComputeCopy:
    return ComputeCopy(model, low=low, cast_layers=["conv", "out"])


@pytest.mark.parametrize("low", [None, LOW])
def test_tensors_that_are_not_cast_share_memory(low: torch.dtype | None) -> None:
    model = net()
    copy, own = copy_of(model, low).model, tensors_of(model)
    assert type(copy) is Net
    assert list(tensors_of(copy)) == list(own)
    for name, tensor in tensors_of(copy).items():
        assert tensor.requires_grad == own[name].requires_grad
        cast = bool(low) and name in CAST
        assert (tensor.data_ptr() == own[name].data_ptr()) == (not cast), name
        assert tensor.dtype == (low if cast else own[name].dtype), name
    with torch.no_grad():
        model.scale.add_(1)
        copy.norm.running_mean.add_(2)
    assert torch.equal(copy.scale, model.scale)
    assert torch.equal(model.norm.running_mean, torch.full((4,), 2.0))


class CopiesItself(Net):
    def __deepcopy__(self, memo: dict[int, object]) -> "CopiesItself":
        copied = CopiesItself()
        copied.load_state_dict(self.state_dict())
        return copied


def test_a_copy_with_weights_of_its_own_is_refused() -> None:
    """It would compute with the initial weights for ever."""
    with pytest.raises(
        InputError, match=r"a copy of the network does not share its scale, .* remove that, or set exact"
    ):
        copy_of(CopiesItself(), None)


@pytest.mark.parametrize("low", [None, LOW])
def test_the_copy_has_its_own_gradients(low: torch.dtype | None) -> None:
    model = net()
    copy = copy_of(model, low).model
    with torch.autocast("cpu", LOW, enabled=bool(low)):
        copy(torch.ones(2, 3, 4, 4)).sum().backward()
    assert {name for name, p in copy.named_parameters() if p.grad is None} == {"norm.bias"}
    for name, parameter in copy.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == (LOW if low and name in CAST else torch.float32)
    assert all(p.grad is None for p in model.parameters())


def test_refresh_casts_changed_weights_again() -> None:
    model = net()
    copy = copy_of(model, LOW)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        copy.mark_stale()
        copy.refresh()
        for name, parameter in copy.model.named_parameters():
            expected = dict(model.named_parameters())[name]
            assert torch.equal(parameter, expected.to(LOW) if name in CAST else expected), name


def test_passes_are_bit_identical_to_autocast() -> None:
    model, images = net(), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    copy = copy_of(model, LOW).model
    with torch.autocast("cpu", LOW):
        outputs = [each(images) for each in (model.eval(), copy.eval())]
    assert torch.equal(*outputs)
    for each in outputs:
        each.float().square().sum().backward()
    found, expected = dict(copy.named_parameters()), dict(model.named_parameters())
    for name in expected:
        if expected[name].grad is not None:
            assert torch.equal(found[name].grad.float(), expected[name].grad), name
