"""Runs functions in two processes that form a process group."""

import gc
import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def in_two_processes(function, *arguments):
    """What `function(rank, *arguments)`, of a module that can be imported, returns for each rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (port, Path(folder), function, arguments), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def refusal_of_other_draws(search):
    """The beginning of the message; the search's seed must be another in each process."""
    search.sample()
    with pytest.raises(RuntimeError) as refusal:
        search.update(lambda: 1.0)
    return str(refusal.value).partition(";")[0]


def _on_rank(rank, port, folder, function, arguments):
    torch.set_num_threads(1)
    # As torchrun would; transformers' Trainer reads it too.
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in environment.items()})
    dist.init_process_group("gloo")
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    # What wraps a model must be gone before its process group: as the last owner it would end the process.
    gc.collect()
    dist.destroy_process_group()
