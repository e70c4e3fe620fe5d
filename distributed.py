"""One batch over several processes (torchrun): exact batch norm, gathered logits, votes.

Each of W processes takes every W-th row of the batch. Batch norm sees all rows, the logits are gathered before the
loss (so Dice is over the whole batch), and the losses equal those of one process but for rounding.
"""
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def start():
    """Join torchrun's processes, if it started this one. OSError where something else has half set its variables."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        if "RANK" not in os.environ:
            raise OSError("WORLD_SIZE is set, RANK is not; start by torchrun, or unset it")
        # Alone, nccl would also carry what is not on a GPU: the run's name, and everything of a run on CPUs.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))                         # a validation's patience


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code):
    """End the script. Under torchrun at once: as the interpreter ends, torch's threads have been seen to abort."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def world():
    """(rank, number of processes): of torchrun, or of this process alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_gpu():
    """The GPU of this process under torchrun; None for one process, or without GPUs."""
    if dist.is_initialized() and torch.cuda.is_available():
        return int(os.environ.get("LOCAL_RANK", world()[0]))
    return None


def shared(value):
    """Rank 0's value of an object."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def barrier():
    if dist.is_initialized():
        dist.barrier()


def any_of(flag, device):
    """Whether the flag is true in one of the processes: all stop, or none."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0


def own_rows(x):
    """This process' rows of a batch, rank::world."""
    rank, size = world()
    return x if size == 1 else x[rank::size]


def gather(logits):
    """This process' rows, rank::world of the batch -> the whole batch; a gradient flows into its own rows only."""
    rank, size = world()
    if size == 1:
        return logits
    logits = logits.float().contiguous()
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.detach())
    parts[rank] = logits
    return torch.stack(parts, 1).flatten(0, 1)                                   # (B / W, W, C, H, W) -> (B, C, H, W)


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is the gradient's."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all processes on CPUs, where SyncBatchNorm refuses."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        (rank, size), f = world(), x.float()
        n = x.numel() / x.shape[1] * size
        own = torch.stack(torch.var_mean(f, (0, 2, 3), correction=0))                                         # (2, C)
        every = _Sum.apply(torch.stack([own if i == rank else torch.zeros_like(own) for i in range(size)]))
        between, mean = torch.var_mean(every[:, 1], 0, correction=0)
        var = every[:, 0].mean(0) + between                    # no difference of squares, which would cancel
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (f * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def add_up(dtype, bucket):
    """Sums gradients over the processes, each of which holds its rows' share, where DistributedDataParallel would
    take a mean: the loss keeps its weights to the bit, for any number of processes."""
    grads = bucket.buffer()
    sent = dist.all_reduce(grads.to(dtype), async_op=True).get_future()
    return sent.then(lambda done: grads.copy_(done.value()[0]))


def parallel(net, device, autocast=None):
    """The network for one of several processes: batch norm and gradients over all of them.

    On GPUs torch's SyncBatchNorm: it waits for the device in each layer, but moves 10 tensors of an activation's size
    where GlobalBatchNorm moves 70. Under autocast to bf16 the gradients travel in bf16: those of convolutions, nearly
    all, have just been computed in it. fp16's travel in fp32, as they are scaled and their infinities must stay rare.
    """
    if device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)                            # torch 2.13 renames the option
        net = DistributedDataParallel(net, broadcast_buffers=False)               # equal in all: of the whole batch
    net.register_comm_hook(torch.bfloat16 if autocast is torch.bfloat16 else torch.float32, add_up)
    return net
