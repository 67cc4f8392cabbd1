"""PowerSGD: the sum of all ranks' gradients as products of two thin matrices, which are far less to send than the sum.

Vogels, Karimireddy, Jaggi 2019 (arXiv 1905.13727): one step of power iteration a training step, begun where the last one ended
(warm start), and what a product leaves out is added to the next gradient (error feedback). Here for sums over ranks, not means.
What is applied depends on the sums of gradients and errors alone, so that the curve is the same on any number of processes
but for rounding; that is why a single process approximates too, though it has nobody to send to.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from distributed import rng
from distributed.comm.collectives import rank, world_size

PREFIX = "compression."


def pays(shape: Sequence[int], columns: int) -> bool:
    """Whether two factors with so many columns are at most half of a parameter of this shape, seen as a matrix."""
    rows, length = _as_matrix(shape)
    return 2 * columns * (rows + length) <= rows * length


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, length): a filter or a unit a row; anything that is no matrix has a length of 0."""
    return (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, 0)


@dataclass
class _Factored:
    """A parameter that is sent as P @ Q.T; of this rank, `error` [rows, length] is what was not applied yet, and `q`
    [length, columns] is the same on all ranks."""

    name: str
    parameter: Tensor
    error: Tensor
    q: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{self.name}.error": self.error, f"{PREFIX}{self.name}.q": self.q}

    def begin(self, seed: int) -> None:
        """As before the first step."""
        self.error.zero_()
        rng.fill_uniform_(q := torch.empty_like(self.q, device="cpu"), 1.0, seed=seed, name=PREFIX + self.name)
        self.q.copy_(q)


class PowerSgd:
    """Puts the sum over ranks in place of each parameter's gradient: of matrices for which that pays, approximately.

    All ranks must compute alike: each makes the same basis and product of the same sums, as each makes the same update.

    Args:
        parameters: by canonical name; the first dimension is a matrix's rows, all others its columns.
        columns: of the factors, at least 1; the rank of what is applied.
        seed: of the first factors.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, columns: int, seed: int) -> None:
        self.seed, self.reduced_bytes = seed, 0
        self._factored: list[_Factored] = []
        self._plain: list[Tensor] = []
        for name, parameter in parameters.items():
            if not pays(parameter.shape, columns):
                self._plain.append(parameter)
                continue
            error = parameter.detach().new_zeros(_as_matrix(parameter.shape))
            self._factored.append(_Factored(name, parameter, error, error.new_zeros(error.shape[1], columns)))
        self._begin()

    def _begin(self) -> None:
        for factored in self._factored:
            factored.begin(self.seed)

    @torch.no_grad()
    def reduce(self) -> None:
        """After a step's last backward pass; a collective. `reduced_bytes` grows by what was all-reduced."""
        for factored in self._factored:
            factored.error += _gradient(factored.parameter).reshape_as(factored.error)
        lefts = [factored.error @ factored.q for factored in self._factored]
        self._sum_over_ranks_([_gradient(parameter) for parameter in self._plain] + lefts)
        # Householder's: orthonormal to the last digits in float32 even where columns are nearly or wholly dependent, of
        # which the paper's Gram-Schmidt makes noise; where the sum was zero it gives axes, from which to begin again.
        bases = [torch.linalg.qr(left).Q for left in lefts]
        for factored, basis in zip(self._factored, bases, strict=True):
            torch.mm(factored.error.T, basis, out=factored.q)
            # By this rank's own factor, not by its share of the sum: so the error has no part of what ranks differ in.
            factored.error.addmm_(basis, factored.q.T, alpha=-1)
        self._sum_over_ranks_([factored.q for factored in self._factored])
        for factored, basis in zip(self._factored, bases, strict=True):
            gradient = _gradient(factored.parameter)
            gradient.copy_((basis @ factored.q.T).view(gradient.shape))

    def _sum_over_ranks_(self, tensors: list[Tensor]) -> None:
        if world_size() == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        self.reduced_bytes += flat.nbytes
        for tensor, part in zip(tensors, flat.split_with_sizes([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """`compression.NAME.error` [world_size, rows, length], those of all ranks, and `compression.NAME.q`; a collective."""
        for factored in self._factored:
            for name, tensor in factored.tensors.items():
                yield name, _of_all_ranks(tensor) if tensor is factored.error else tensor

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """What of a state cannot be loaded here, in words."""
        own = {name: tensor for factored in self._factored for name, tensor in factored.tensors.items()}
        return [
            f"{name}: here {tuple(own[name].shape) if name in own else 'nothing'}, there {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if name not in own or tensor.shape[tensor.dim() - 2 :] != own[name].shape
        ]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, on any number of ranks; without it, as at the start. Has no misfits."""
        self._begin()
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".error")}
        for factored in self._factored:
            for name, own in factored.tensors.items():
                if name not in tensors:
                    continue
                found = tensors[name]
                if own is factored.error:
                    # Only their sum counts for what will be applied, so it may be dealt out anew.
                    found = found[rank()] if len(found) == world_size() else found.sum(0) / world_size()
                own.copy_(found)
        if ranks - {world_size()}:
            logger.info(
                "compression: the errors of {} ranks are shared out among {}, their sum stays",
                *ranks, world_size(),
            )  # fmt: skip


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _of_all_ranks(tensor: Tensor) -> Tensor:
    """[world_size, ...]; a collective."""
    whole = tensor.new_empty(world_size(), *tensor.shape)
    if world_size() == 1:
        return whole.copy_(tensor)
    dist.all_gather(list(whole.unbind()), tensor)
    return whole
