"""Every family in two processes over gloo: DDP and FSDP2 of an accelerated model train like the unmodified one."""
import copy
import os
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STEPS = 2
ORDERS = ("accelerate, then ddp", "ddp, then accelerate", "accelerate, then fsdp", "fsdp, then accelerate")


def mine(value, rank, dim=0):
    """One of the two samples."""
    if isinstance(value, dict):
        return {key: mine(entry, rank, dim=1 if key.endswith("llama3") else 0) for key, entry in value.items()}
    batched = isinstance(value, torch.Tensor) and value.dim() > dim and value.shape[dim] == 2
    return value.narrow(dim, rank, 1) if batched else value


def train(model, inputs):
    """The losses of a few steps of plain gradient descent."""
    from benchmarks.families.proofs import tensors
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(STEPS):
        loss = tensors(model(**inputs))[0].square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    return losses / dist.get_world_size()


def shard(model, paths):
    """FSDP2 over the blocks and over the rest."""
    from torch.distributed.fsdp import fully_shard
    embedders = [path for path, _ in model.named_modules() if path.endswith("norm1.emb")]
    for path in [*embedders, *paths]:  # diffusers' DiT calls its first block's embedder without the block
        fully_shard(model.get_submodule(path))
    return fully_shard(model)


def one_order(order, model, inputs, paths):
    """The losses of an accelerated copy, distributed in this order."""
    import difuse
    model = copy.deepcopy(model)
    if order.endswith("ddp"):
        difuse.accelerate(model)
    if "ddp" in order:
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        difuse.accelerate(model)
        return train(model, inputs)
    if order.startswith("fsdp"):
        model = shard(model, paths)
    report = difuse.accelerate(model)
    assert set(paths) <= set(report.accelerated), str(report)
    if order.startswith("accelerate"):
        model = shard(model, paths)
    return train(model, inputs)


def worker(rank, place, names):
    """One of two processes; writes what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    import difuse
    from benchmarks.families import load
    problems = []
    for name in names:
        family = load(name)
        model, inputs = family.build(), mine(family.inputs(torch.float32), rank)
        twin = copy.deepcopy(model)
        report = difuse.accelerate(twin)
        paths = [path for path in report.accelerated if path and report.kind(path) == "block"]
        plain = copy.deepcopy(model)
        eager = train(torch.nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True), inputs)
        for order in ORDERS:
            try:
                found = one_order(order, model, inputs, paths)
            except Exception as error:  # noqa: BLE001  the other process waits in the next collective: say it and go
                print(f"{name}, {order}, process {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                raise
            if not torch.allclose(found, eager, rtol=1e-5):
                problems.append(f"{name}, {order}: losses {found.tolist()}, eager {eager.tolist()}")
    dist.destroy_process_group()
    if rank == 0:
        with open(os.path.join(place, "problems"), "w") as file:
            file.write("\n".join(problems))


@pytest.mark.slow
def test_ddp_and_fsdp2_in_two_processes():
    pytest.importorskip("diffusers")
    from benchmarks.families import NAMES
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(worker, args=(place, NAMES), nprocs=2)
        with open(os.path.join(place, "problems")) as file:
            assert file.read() == ""
