"""Several training processes as one: who am I, and tensors of all ranks with their gradients.

Under `torchrun` every process sees a part of the global batch. Pairs between slices must not: embeddings are
gathered with gradients, so that loss and gradients do not depend on how the batch is split. Without `torchrun`
everything here does nothing. Called by `train.loop`, `train.device`, `train.refresh` and `train.pretraining`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from supercl_core.errors import SuperCLError

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` or Slurm started, if one did, as WORLD_SIZE and RANK say.

    Tensors on GPUs go through NCCL, others through gloo, which notices at once when a process has died.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        barrier()  # nobody leaves while another still talks
    finally:
        # A DDP module lives in reference cycles; one that outlives the group aborts the interpreter at its exit.
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 being the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    any_rank(False)


def rank_0_first(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` on rank 0, and on the others once that is done: they find the files that it wrote.

    A SuperCLError of rank 0 is raised on all ranks.
    """
    if not dist.is_initialized():
        return function(*arguments)
    failed: list[SuperCLError | None] = [None]
    if rank() == 0:
        try:
            result = function(*arguments)
        except SuperCLError as error:
            failed = [error]
    dist.broadcast_object_list(failed, device=torch.device("cpu"))
    if failed[0] is not None:
        raise failed[0]
    return result if rank() == 0 else function(*arguments)


def parallel(network: nn.Module, device: torch.device, *, uses_all: bool = True) -> nn.Module:
    """The network with its gradients averaged over all processes, and its batch statistics shared on GPUs.

    `uses_all`: whether every parameter takes part in every step; else those that do not are looked for each time.
    """
    if not dist.is_initialized():
        return network
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return DistributedDataParallel(network, device_ids=[device], find_unused_parameters=not uses_all)
    return DistributedDataParallel(network, find_unused_parameters=not uses_all)


def gather(tensor: Tensor) -> Tensor:
    """`tensor` of all ranks, joined along the first axis in the order of ranks; gradients flow back to each.

    All ranks pass equal shapes. The gradient of a rank's part is the sum over ranks: with a loss that every rank
    computes of the gathered whole, and gradients averaged over ranks, that is the gradient of one process.
    """
    if not dist.is_initialized():
        return tensor
    return _Gather.apply(tensor)


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, without gradient."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def share(count: Tensor) -> Tensor:
    """`count` over its mean over ranks: the weight of a rank's own mean in the mean over all ranks."""
    return count / mean(count.float()).clamp_min(1 / world_size())


def any_rank(condition: bool) -> bool:
    """Whether the condition holds on any rank; all ranks get the same answer, without waiting for a GPU."""
    return bool(mean(torch.tensor(float(condition))) > 0)


def of_rank_0(tensor: Tensor) -> Tensor:
    """The `tensor` of rank 0; others pass one of the same shape and dtype, which is overwritten."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.size = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.size : (rank() + 1) * ctx.size]
