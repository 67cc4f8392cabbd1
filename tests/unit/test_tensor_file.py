import hashlib

import pytest
import torch
from safetensors.torch import load_file

from distributed.checkpoint.tensor_file import tensor_digest, write_tensors
from distributed.files import Written, digest_of

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.uint64, torch.uint32, torch.uint16,
]  # fmt: skip


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].shape == tensor.shape, name
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_every_dtype(tmp_path, dtype):
    tensors = {"a": torch.arange(24).view(2, 3, 4).to(dtype), "b": torch.tensor([1, 0, 1]).to(dtype)}
    write_tensors(tmp_path / "t", tensors)
    assert_same(load_file(tmp_path / "t"), tensors)


def test_tensors_of_any_layout_are_written_in_row_major_order(tmp_path):
    images = torch.randn(2, 3, 4, 5)
    tensors = {
        "channels_last": images.to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 5).T,
        "strided": torch.arange(20.0)[::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    write_tensors(tmp_path / "t", tensors)
    assert_same(load_file(tmp_path / "t"), tensors)
    assert torch.equal(load_file(tmp_path / "t")["channels_last"], images)


def test_empty_tensors_and_scalars_are_written(tmp_path):
    tensors = {"empty": torch.empty(0, 3), "scalar": torch.tensor(7), "after": torch.ones(2), "end": torch.empty(0)}
    write_tensors(tmp_path / "t", tensors)
    assert_same(load_file(tmp_path / "t"), tensors)


def test_a_file_without_tensors_is_valid(tmp_path):
    write_tensors(tmp_path / "t", {})
    assert load_file(tmp_path / "t") == {}


def test_odd_sizes_and_names_are_written(tmp_path):
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        'ä "quoted" 名': torch.randn(5),
        "f": torch.randn(1).double(),
    }
    write_tensors(tmp_path / "t", tensors)
    assert_same(load_file(tmp_path / "t"), tensors)


def test_nan_bits_are_preserved(tmp_path):
    tensors = {"a": torch.tensor([float("nan"), float("inf"), -0.0])}
    write_tensors(tmp_path / "t", tensors)
    assert torch.equal(load_file(tmp_path / "t")["a"].view(torch.int32), tensors["a"].view(torch.int32))


def test_size_and_digest_are_those_of_the_file(tmp_path):
    written = write_tensors(tmp_path / "t", {"a": torch.randn(100), "b": torch.randn(3, 3).bfloat16()})
    content = (tmp_path / "t").read_bytes()
    assert written == Written(len(content), hashlib.blake2b(content, digest_size=16).hexdigest())
    assert digest_of(tmp_path / "t") == written


def test_equal_tensors_produce_equal_bytes(tmp_path):
    tensors = {"b": torch.randn(5), "a": torch.randn(5)}
    assert write_tensors(tmp_path / "one", tensors) == write_tensors(tmp_path / "other", dict(tensors))


def test_a_digest_does_not_depend_on_the_layout():
    numbers = torch.randn(4, 3, 5, 5)
    assert tensor_digest(numbers) == tensor_digest(numbers.contiguous(memory_format=torch.channels_last))
    assert tensor_digest(numbers) != tensor_digest(-numbers)
    assert tensor_digest(torch.tensor(0.0)) != tensor_digest(torch.tensor(-0.0)), "bits, not values"
    ones = hashlib.blake2b(b"\x80\x3f" * 3, digest_size=8).hexdigest()
    assert tensor_digest(torch.ones(3).bfloat16()) == ones
