"""The command line."""

import subprocess
import sys

import pytest
import torch

import petl_ext
from petl_ext.cli import main


def test_info(capsys):
    main(["info"])
    printed = capsys.readouterr().out
    assert f"petl_ext {petl_ext.__version__}" in printed and f"torch {torch.__version__}" in printed
    assert "kernels: apt on CPU" in printed and "kernels: adapter on CPU" in printed
    assert ("CUDA kernels: built" if "apt on CPU, CUDA" in printed else "CUDA kernels: none in this build") in printed
    assert f"CPU path: {petl_ext.ops.cpu_path()} of" in printed
    assert f"GPUs: {'none' if not torch.cuda.is_available() else ''}" in printed


def test_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "petl_ext", "info"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"petl_ext {petl_ext.__version__}")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
