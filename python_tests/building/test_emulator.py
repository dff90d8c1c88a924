"""The module petl_emulated; what the emulator computes and finds is tested in csrc/tests/emulator_test.cpp."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clear_masks import WEIGHTS_OF, pre_activations, with_clear_mask
from devices import emulated_module, emulation
from gpu.every_kernel import DTYPES
from problems import OPS, draw_rows

from petl_ext import ops

DEFAULTS = {"order": "forward", "copies": "lazy", "threads": 0, "shared_memory_limit": 227 * 1024}


def settings_under(**environment):
    script = "import json, torch, petl_emulated; print(json.dumps(petl_emulated.settings()))"
    folder = Path(emulated_module().__file__).parent
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_settings_come_from_the_environment():
    assert json.loads(settings_under().stdout) == DEFAULTS
    changed = settings_under(PETL_EMULATOR_ORDER="reverse", PETL_EMULATOR_COPIES="eager")
    assert json.loads(changed.stdout) == {**DEFAULTS, "order": "reverse", "copies": "eager"}
    wrong = settings_under(PETL_EMULATOR_ORDER="sideways")
    assert "ValueError: the emulator's order must be forward or reverse, not sideways" in wrong.stderr


def test_configure():
    module = emulated_module()
    before = module.settings()
    try:
        module.configure(order="reverse", copies="eager", threads=3, shared_memory_limit=1 << 16)
        assert module.settings() == {
            "order": "reverse",
            "copies": "eager",
            "threads": 3,
            "shared_memory_limit": 1 << 16,
        }
        with pytest.raises(ValueError, match="copies must be lazy or eager, not late"):
            module.configure(copies="late")
        module.configure()
        assert module.settings() == DEFAULTS
    finally:
        module.configure(**before)


def apt_outputs_and_gradients():
    generator = torch.Generator().manual_seed(0)
    x, y, prompts, keys = (torch.randn(size, 72, generator=generator) for size in (150, 150, 20, 20))
    arguments = [tensor.requires_grad_() for tensor in (x, y, prompts, keys, torch.zeros(1))]
    out = ops.apt(*arguments)
    return [out, *torch.autograd.grad(out.square().sum(), arguments)]


def test_results_do_not_depend_on_order_copies_and_threads():
    results = []
    for order, copies, threads in itertools.product(("forward", "reverse"), ("lazy", "eager"), (1, 3)):
        with emulation(order=order, copies=copies, threads=threads):
            results.append(apt_outputs_and_gradients())
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [72, 768])
@pytest.mark.parametrize(("name", "inner"), [(name, inner) for name in WEIGHTS_OF for inner in OPS[name].every_size])
def test_a_clear_mask_keeps_away_from_zero(name, inner, dim, dtypes):
    """What test_cuda_device.py compares GPU and emulator on."""
    problem = draw_rows(OPS[name], 131, dim, inner, *dtypes, activation="relu")
    before, after = (pre_activations(each) for each in (problem, with_clear_mask(problem)))
    assert before.abs().min() < 1e-3 * before.abs().max()
    assert after.abs().min() > 0.25 * after.abs().max() and 0.4 < (after > 0).double().mean() < 0.6
