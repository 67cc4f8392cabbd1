"""The switches for reproducible results, and the metadata that the bits depend on. Needs no GPU."""

from collections.abc import Callable

import pytest
import torch

from distributed.build import shard_workers
from distributed.config import from_command_line
from distributed.errors import InputError
from distributed.exact.bucket_layout import ReplicatedBucket
from distributed.exact.partition import ALIGNMENT
from distributed.training.determinism import kernel_metadata, make_deterministic, merge_metadata, restored_settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flags(precision: str, *, compile: bool = False) -> list[bool]:
    """Return whether TF32 is on in convolutions and matmuls, cuDNN (and inductor) deterministic, and fast attention on."""
    with restored_settings():
        make_deterministic(CUDA, precision=precision, compile=compile)
        backends = torch.backends
        found = [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.deterministic]
        if compile:
            from torch._inductor import config

            found.append(config.deterministic)
        enabled = (backends.cuda.flash_sdp_enabled, backends.cuda.mem_efficient_sdp_enabled)
        return [*found, any(is_enabled() for is_enabled in (*enabled, backends.cuda.cudnn_sdp_enabled))]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_float32_is_not_tf32(precision: str) -> None:
    assert flags(precision) == [False, False, True, False]


def test_tf32_is_allowed_if_chosen() -> None:
    assert flags("tf32") == [True, True, True, False]


def test_compiled_kernels_are_not_autotuned() -> None:
    assert flags("bfloat16", compile=True) == [False, False, True, True, False]


def test_encoders_are_evaluated_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mha._is_fastpath_enabled", True)  # an earlier test may have left it off
    with restored_settings():
        make_deterministic(CPU, precision="float32")
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_switches_are_restored() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.flash_sdp_enabled()
    flags("float32")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.flash_sdp_enabled()) == before


def precisions() -> dict[str, str]:
    backends = torch.backends
    return {
        "all": backends.fp32_precision,
        "CUDA matmul": backends.cuda.matmul.fp32_precision,
        "cuDNN conv": backends.cudnn.conv.fp32_precision,
        "cuDNN RNN": backends.cudnn.rnn.fp32_precision,
        "oneDNN matmul": backends.mkldnn.matmul.fp32_precision,
        "oneDNN conv": backends.mkldnn.conv.fp32_precision,
        "oneDNN RNN": backends.mkldnn.rnn.fp32_precision,
    }


def set_to_defaults() -> None:
    backends = torch.backends
    backends.mkldnn.enabled, backends.fp32_precision, backends.cudnn.fp32_precision = True, "none", "none"
    torch.set_float32_matmul_precision("highest")
    for part in (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv):
        part.fp32_precision = "none"


def set_everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def set_for_cudnn() -> None:
    torch.backends.cudnn.fp32_precision = "tf32"


def set_for_matmul() -> None:
    torch.set_float32_matmul_precision("medium")


def set_for_convolutions() -> None:
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.backends.mkldnn.enabled = False


@pytest.mark.parametrize("script", [set_everywhere, set_for_cudnn, set_for_matmul, set_for_convolutions])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_script_does_not_affect_float32(script: Callable[[], None], device: torch.device) -> None:
    set_to_defaults()  # an earlier test may have left other switches
    initial = precisions()
    try:
        script()
        before = precisions(), torch.backends.mkldnn.enabled
        with restored_settings():
            make_deterministic(device, precision="float32")
            found = precisions()
            assert torch.backends.mkldnn.enabled
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert (precisions(), torch.backends.mkldnn.enabled) == before
    finally:
        set_to_defaults()
    assert "tf32" not in found.values()
    assert "bf16" not in found.values()
    assert precisions() == initial


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(InputError, match=r"precision = tf32 needs CUDA.*use float32"):
        make_deterministic(CPU, precision="tf32")
    with pytest.raises(InputError, match="precision = tf32 needs CUDA, but device = cpu"):
        from_command_line(["--precision", "tf32", "--device", "cpu"])


def test_variables_that_select_kernels_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    metadata = kernel_metadata(CPU)
    assert metadata["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "SOMETHING_ELSE" not in metadata
    assert metadata["device"]


def test_differences_between_ranks_name_the_ranks() -> None:
    big, small = (
        {"device": "H100", "multiprocessors": "132"},
        {"device": "H100", "multiprocessors": "114", "NCCL_ALGO": "Tree"},
    )
    merged, differences = merge_metadata([big, big, small])
    assert merged == {"device": "H100", "multiprocessors": "114 / 132", "NCCL_ALGO": "Tree / not set"}
    assert differences == [
        "NCCL_ALGO: not set on rank 0, 1; Tree on rank 2",
        "multiprocessors: 132 on rank 0, 1; 114 on rank 2",
    ]
    assert merge_metadata([big, big]) == (big, [])


def test_one_worker_runs_all_shards_on_cuda() -> None:
    assert (shard_workers(CPU, threads=6), shard_workers(CUDA, threads=6)) == (6, 1)


def test_gradients_in_a_bucket_are_aligned() -> None:
    parameters = {index: torch.zeros(shape) for index, shape in enumerate([(3,), (5, 7), (1,), (2, 3, 3, 3)])}
    layout = ReplicatedBucket(parameters)
    views = layout.gradients(torch.zeros(layout.length))
    assert [view.storage_offset() % ALIGNMENT for view in views.values()] == [0] * 4
    assert [view.shape for view in views.values()] == [p.shape for p in parameters.values()]
    assert layout.chunks[-1].stop == layout.length
