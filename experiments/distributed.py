# SPDX-License-Identifier: MIT
"""Mythos on several GPUs, or several processes of one CPU: what loop, experts and halting need.

    python -m experiments.distributed                                 one process
    torchrun --nproc_per_node 2 -m experiments.distributed            all weights on every rank
    torchrun --nproc_per_node 2 -m experiments.distributed --ddp      so, too: PyTorch's wrapper
    torchrun --nproc_per_node 2 -m experiments.distributed --shard    each weight cut into parts
    torchrun --nproc_per_node 2 -m experiments.distributed --halt     answers; --shard as well

The first four train the toy of train_tiny.py for a few steps and print the same losses, also when
each step adds up the gradients of several micro-batches (--parts 2).
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mythos import RecurrentDepthTransformer
from train_tiny import Chains, make_optimizers, schedule


def shard(model: RecurrentDepthTransformer) -> None:
    """Each rank keeps 1/ranks of every matrix (experts: of the stack) and fetches the rest for use.

    A block of prelude and coda is fetched, used and dropped. A block of the loop is fetched in the
    first loop and kept: otherwise every loop would fetch the same weights again. That also makes
    halting safe, see `answer`. What is left (embedding, norms, A, B, head) belongs to the model.
    """
    for block in [*model.prelude, *model.coda]:
        fully_shard(block)
    for block in model.recurrent:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model)  # last: it takes what no block has taken


def train(
    wrapped: RecurrentDepthTransformer | DistributedDataParallel,
    task: Chains,
    *,
    steps: int,
    parts: int = 1,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Losses and gradient norms of a data-parallel training: those of one process with the same
    global batch, whatever the number of micro-batches (parts) that a rank makes of its share."""
    ddp = isinstance(wrapped, DistributedDataParallel)
    model = wrapped.module if ddp else wrapped
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), model.head.weight.device
    sharded = hasattr(model, "unshard")
    optimizers = make_optimizers(model, task.prelude_lr)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    generator, history = torch.Generator().manual_seed(seed), []
    frontier = task.train_loops  # no curriculum: a few steps shall see all loop counts
    model.train()
    for step in range(steps):
        # All ranks draw the same global batch, loop count included, and take every ranks-th row.
        tokens, targets, n_loops = task.batch(generator, frontier)
        for group in groups:
            group["lr"] = group["peak_lr"] * schedule(step, steps)
        total = torch.zeros((), device=device)
        for part in range(parts):
            rows = slice(rank + part * ranks, None, parts * ranks)
            mine = targets[rows]
            _, loss = wrapped(tokens[rows].to(device), mine.to(device), n_loops=n_loops)
            # The loss is a mean over these targets, and ranks and parts differ in how many of
            # theirs are scored (not −100): the mean of the means would be another loss. Weighted
            # like this, the *sum* over ranks and parts is the mean over the global batch.
            loss = loss * ((mine != -100).sum() / (targets != -100).sum()).item()
            total += loss.detach()
            # FSDP and DDP average gradients over ranks, hence the factor; without them we sum.
            (loss * ranks if sharded or ddp else loss).backward()
        if not (sharded or ddp):
            sum_over_ranks([p.grad for p in model.parameters()])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if sharded else norm
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # The bias follows the load of the global batch. From its own load alone, each rank would
        # steer its router elsewhere, and the ranks would no longer be copies of one model.
        sum_over_ranks([block.ffn.load for block in model.recurrent])
        model.update_router_bias(speed=0.01)
        sum_over_ranks([total])
        frontier = task.advance(frontier, n_loops, total.item())  # on all ranks at once
        history.append((total.item(), norm.item()))
    return history


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """In place, with one message for all: many small ones would cost more than their bytes."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(summed.view_as(t))


def answer(model: RecurrentDepthTransformer, task: Chains, most_loops: int) -> list[int]:
    """The loops that each rank needed, when the first halts at once and the last never does.

    With all weights at hand a rank never waits for another's loop. With sharded weights a fetch is
    a message in which all ranks take part: if the loop's blocks were fetched in every loop, the
    rank that has halted would ask for the coda's weights, the other for the loop's, and both would
    hang or get garbage. Two remedies: the same number of loops on all ranks (no halt_threshold),
    or, as in `shard`, weights that are fetched before the ranks part and stay for the whole loop.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens = task.test_set()[0][rank : rank + 1].to(model.head.weight.device)
    easy = rank < ranks - 1  # every change is below a huge threshold, and none is below 0
    loops = []
    hook = model.recurrent[0].register_forward_pre_hook(lambda *_: loops.append(1))
    model.eval()(tokens, n_loops=most_loops, halt_threshold=1e9 if easy else 0.0)
    hook.remove()
    counts = torch.zeros(ranks, dtype=torch.int64, device=tokens.device)
    counts[rank] = len(loops)
    sum_over_ranks([counts])
    return counts.tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Mythos on several ranks.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--shard", action="store_true", help="cut the weights into parts")
    how.add_argument("--ddp", action="store_true", help="wrap in DistributedDataParallel")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches for each update")
    parser.add_argument("--halt", action="store_true", help="do not train: answer, with halting")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if cuda else "gloo", **alone)  # torchrun says how many we are
    torch.manual_seed(0)  # the same weights on all ranks
    task = Chains()
    model = RecurrentDepthTransformer(task.config("mla"))
    task.prepare(model)
    model.to("cuda" if cuda else "cpu")
    if args.shard:
        shard(model)
    if args.halt:
        lines = [f"loops used on each rank: {answer(model, task, 64)}"]
    else:
        # By default DDP overwrites buffers with rank 0's before each forward: a rank's load would
        # be lost with each micro-batch but the last.
        wrapped = DistributedDataParallel(model, broadcast_buffers=False) if args.ddp else model
        history = train(wrapped, task, steps=8, parts=args.parts)
        lines = [f"gradient norm {norm:.8f}  loss {loss:.8f}" for loss, norm in history]
        bias = model.recurrent[0].ffn.router_bias.tolist()
        lines.append("router bias " + " ".join(f"{b:.2f}" for b in bias))
    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    dist.barrier()  # a rank that leaves while another still talks to it can abort them both
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
