"""Searches in two processes that form a process group."""

import gc
import json
import socket

import pytest
import torch
import torch.distributed as dist


def in_two_processes(function, folder):
    """What `function(rank)`, of a module that can be imported, returns for each rank, through JSON."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_on_rank, (function, port, folder), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def refusal_of_other_draws(search):
    """The beginning of the message; the search's seed must be another in each process."""
    search.sample()
    with pytest.raises(RuntimeError) as refusal:
        search.update(lambda: 1.0)
    return str(refusal.value).partition(";")[0]


def _on_rank(rank, function, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(function(rank)))
    # What wraps a model must be gone before its process group: as the last owner it would end the process.
    gc.collect()
    dist.destroy_process_group()
