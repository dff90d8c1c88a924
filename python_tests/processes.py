"""Runs a function in two processes that are connected by gloo."""

import gc
import socket

import torch
import torch.distributed as dist


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two_processes(function, *arguments):
    """Calls function(rank, *arguments) in each, one thread per process; an exception in one is raised here."""
    torch.multiprocessing.spawn(_run, (free_port(), function, arguments), nprocs=2)


def _run(rank, port, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        function(rank, *arguments)
    finally:
        # Whatever else still holds the group would destroy it with the interpreter's lock held, for which gloo's thread
        # may be waiting.
        gc.collect()
        dist.destroy_process_group()
