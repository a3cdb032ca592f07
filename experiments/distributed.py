# SPDX-License-Identifier: MIT
"""Trains the toy of train_tiny.py for 4 steps on several ranks: GPUs, or processes of one CPU. Loss
and gradient are those of one process (python -m experiments.distributed), also with --ddp, --shard
and --parts. Example: torchrun --nproc_per_node 2 -m experiments.distributed --shard --parts 2
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mythos import RecurrentDepthTransformer
from train_tiny import Chains, make_optimizers, schedule


def shard(model: RecurrentDepthTransformer) -> None:
    """Each rank keeps 1/ranks of every matrix (experts: of the stack) and fetches the rest for use.

    A block of the loop is fetched in the first loop and kept, which makes halting safe: a fetch is
    a message in which all ranks take part, but a rank that has halted asks for the coda's weights,
    another for the loop's. (Otherwise run equally many loops on all ranks.)"""
    for block in [*model.prelude, *model.coda]:
        fully_shard(block)
    for block in model.recurrent:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model)  # last: it takes what no block has taken (embedding, norms, A, B, head)


def train(model, wrapped, task: Chains, *, averages: bool, parts: int, steps: int) -> list[str]:
    """Norms and losses of a data-parallel training: those of one process with the same global
    batch, whatever the number of micro-batches (parts) that a rank makes of its share."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), model.head.weight.device
    optimizers = make_optimizers(model, task.prelude_lr)
    generator, lines = torch.Generator().manual_seed(0), []
    for step in range(steps):
        # All ranks draw the same global batch, loop count included, and take every ranks-th row.
        tokens, targets, n_loops = task.batch(generator, task.train_loops)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * schedule(step, steps)
        total = torch.zeros((), device=device)
        for part in range(parts):
            rows = slice(rank + part * ranks, None, parts * ranks)
            mine = targets[rows]
            _, loss = wrapped(tokens[rows].to(device), mine.to(device), n_loops=n_loops)
            # A loss is a mean over its targets, and ranks and parts differ in how many of theirs
            # are scored (not −100). With these weights the *sum* is the mean of the global batch.
            loss = loss * ((mine != -100).sum() / (targets != -100).sum()).item()
            total += loss.detach()
            (loss * ranks if averages else loss).backward()
        # FSDP and DDP average gradients over ranks, hence the factor; without them we sum. We also
        # sum the experts' loads: from its own load alone, each rank would steer its router
        # elsewhere, and the ranks would no longer be copies of one model.
        loads = [block.ffn.load for block in model.recurrent]
        for summed in [total, *loads, *(p.grad for p in model.parameters() if not averages)]:
            dist.all_reduce(summed)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.update_router_bias(speed=0.01)
        lines.append(f"gradient norm {norm.item():.8f}  loss {total.item():.8f}")
    return [*lines, f"router bias {model.recurrent[0].ffn.router_bias.tolist()}"]


def answer(model: RecurrentDepthTransformer, task: Chains) -> list[str]:
    """The loops that each rank needs: the last never halts (no change is below 0), the others at
    once. None waits for another's loop, with all weights at hand or sharded as in `shard`."""
    rank, last, loops = dist.get_rank(), dist.get_world_size() - 1, []
    tokens = task.test_set()[0][rank : rank + 1].to(model.head.weight.device)
    model.recurrent[0].register_forward_pre_hook(lambda *_: loops.append(1))
    model.eval()(tokens, n_loops=64, halt_threshold=1e9 if rank < last else 0.0)
    used = [0] * (last + 1)
    dist.all_gather_object(used, len(loops))
    return [f"loops used on each rank: {used}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(epilog=__doc__)
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--shard", action="store_true", help="cut the weights into parts")
    layout.add_argument("--ddp", action="store_true", help="wrap in DistributedDataParallel")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches a step (default: 1)")
    parser.add_argument("--halt", action="store_true", help="do not train: answer, with halting")
    args = parser.parse_args(arguments)
    cuda, task = torch.cuda.is_available(), Chains()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if cuda else "gloo", **alone)  # torchrun says how many we are
    torch.manual_seed(0)  # the same weights on all ranks
    model = RecurrentDepthTransformer(task.config("mla"))
    task.prepare(model)
    model.to("cuda" if cuda else "cpu")
    if args.shard:
        shard(model)
    # Otherwise DDP overwrites buffers with rank 0's before each forward, and loads would be lost.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if args.ddp else model
    how = dict(averages=args.shard or args.ddp, parts=args.parts, steps=4)
    lines = answer(model, task) if args.halt else train(model, wrapped, task, **how)
    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    dist.barrier()  # a rank that leaves while another still talks to it can abort them both
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
