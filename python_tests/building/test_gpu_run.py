"""`make gpu` where there is no GPU: steps that go wrong, and what is measured, on the emulator at small sizes."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clock import host_clock
from counting import h200
from devices import emulation
from gpu import __main__ as command
from gpu import calls, every_kernel, hopper_questions, hopper_speed, speed, summary, traffic, vilt
from gpu.bounds import bound_of, counted_launches
from gpu.runner import FAILED, OK, SKIPPED, TIME_LIMIT, Files, Runner, Step
from gpu.step_log import read_records
from gpu.steps import PYTHON_PATH, find_tool, steps
from problems import OPS, draw_rows, forward, forward_backward

ROOT = Path(__file__).parents[2]
RECORDS = "from gpu.step_log import record; record('number', value={}); record('summary', text='{} found');"


def python(code):
    return [sys.executable, "-c", code]


def telling(value):
    return RECORDS.format(value, value)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the steps within a budget; returns the exit code and the files."""
    monkeypatch.setenv("PYTHONPATH", PYTHON_PATH)

    def run(*all_steps, budget=60):
        files = Files(tmp_path / "out" / "result.json", tmp_path / "out" / "result.log", tmp_path / "scratch")
        return command.run(all_steps, Runner({"gpu": "none"}, files, budget)), files

    return run


def entries(files):
    return {entry["name"]: entry for entry in json.loads(files.result.read_text())["steps"]}


def test_every_step_is_run_and_kept_whatever_becomes_of_the_others(start, capsys):
    code, files = start(
        Step("good", (python(telling(1)),), 30),
        Step("bad", (python(telling(2) + "raise SystemExit(3)"),), 30),
        Step("silent", (python("raise ValueError('what it died of')"),), 30),
        Step("slow", (python(telling(3) + "import time; time.sleep(60)"),), 3, least=1),
        Step("crash", (python(telling(4) + "import os; os.abort()"),), 30),
        Step("missing", (["/nowhere/program"],), 30),
        Step("elsewhere", (python("raise SystemExit(1)"),), 30, obstacle="no such tool"),
        Step("last", (python(telling(5)),), 30),
    )
    assert code == 1
    found = entries(files)
    verdicts = {name: entry["verdict"] for name, entry in found.items()}
    assert verdicts == {
        "good": OK,
        "bad": FAILED,
        "silent": FAILED,
        "slow": TIME_LIMIT,
        "crash": FAILED,
        "missing": FAILED,
        "elsewhere": SKIPPED,
        "last": OK,
    }
    told = {name: entry["records"][0]["value"] for name, entry in found.items() if entry["records"]}
    assert told == {"good": 1, "bad": 2, "slow": 3, "crash": 4, "last": 5}
    assert (
        found["bad"]["why"] == "2 found; exit code 3: no output"
        and found["slow"]["why"] == "3 s were not enough; 3 found"
    )
    assert found["silent"]["why"] == "exit code 1: ValueError: what it died of"
    assert "could not be started" in found["missing"]["why"] and found["elsewhere"]["why"] == "no such tool"
    document = json.loads(files.result.read_text())
    assert document["finished"] and not document["passed"]
    log, shown = files.log.read_text(), capsys.readouterr().out
    assert "what it died of" in log and "exit code 3" in log and f"exit code {-6}" in log
    assert str(files.result) in shown and "slow               TIME LIMIT" in shown


def test_what_passes(start):
    code, files = start(
        Step("good", (python(telling(1)), python(telling(2))), 30),
        Step("no check", (python("raise SystemExit(1)"),), 30, is_check=False),
    )
    assert code == 0 and entries(files)["good"]["why"] == "1 found; 2 found"


def test_commands_of_a_step_run_at_the_same_time_and_all_count(start):
    wait = "import time; time.sleep(2);"
    code, files = start(Step("pair", (python(wait), python(wait + "raise SystemExit(4)")), 30))
    assert code == 1 and entries(files)["pair"]["seconds"] < 3.9


def test_steps_that_do_not_fit_the_budget(start):
    code, files = start(
        Step("first", (python("import time; time.sleep(60)"),), 30, least=0),
        Step("second", (python("pass"),), 30, least=10),
        budget=1,
    )
    found = entries(files)
    assert code == 1 and found["first"]["verdict"] == TIME_LIMIT and found["second"]["verdict"] == SKIPPED
    assert found["second"]["why"] == "0 s of the budget are left, it needs 10"


def test_what_a_step_started_ends_with_it(start, tmp_path):
    child = f"import time; time.sleep(4); open({str(tmp_path / 'left over')!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start(Step("slow", (python(parent),), 1.5, least=0))
    time.sleep(3.5)
    assert not (tmp_path / "left over").exists()


def test_a_run_that_is_killed_leaves_what_it_has(tmp_path, monkeypatch, start):
    """Also of the step that was under way."""
    monkeypatch.setattr("gpu.runner.KEEP", 0)
    seen = []
    monkeypatch.setattr("time.sleep", lambda _: seen.append(json.loads((tmp_path / "out/result.json").read_text())))
    start(Step("good", (python(telling(1) + "import time; time.sleep(2)"),), 30))
    (step,) = seen[-1]["steps"]
    assert step["verdict"] == "unfinished" and step["records"][0]["value"] == 1 and not seen[-1]["finished"]


def test_records_cut_off_in_the_middle(tmp_path):
    path = tmp_path / "records"
    path.write_text('{"topic": "number"}\n{"topic": "num')
    assert read_records(path) == [{"topic": "number"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    result = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0 and not list(tmp_path.iterdir())
    assert f"make gpu needs an NVIDIA GPU that torch can use; this is torch {torch.__version__}" in result.stderr
    assert "Traceback" not in result.stderr


def test_steps_name_files_and_modules_that_exist(tmp_path):
    for step in steps(tmp_path / "counters.txt"):
        for words in step.commands:
            for before, word in itertools.pairwise(words):
                if before == "-m" and str(word).startswith("gpu."):
                    assert (ROOT / "bench" / "gpu" / f"{word.removeprefix('gpu.')}.py").exists(), word
                if str(word).endswith(".py"):
                    assert Path(word).exists(), word


def test_answers_about_the_hopper_path(tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho right: a copy\necho WRONG: a: product\nexit $1\n")
    program.chmod(0o755)
    assert hopper_questions.answers_of(program) == ({"a copy": True, "a: product": False}, "")
    program.write_text("#!/bin/sh\necho right: a copy\nkill -9 $$\n")
    assert hopper_questions.answers_of(program) == ({"a copy": True}, ", then it ended with -9")


def test_a_program_that_hangs_is_ended(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho right: a copy\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(hopper_questions, "LIMIT", 1)
    assert hopper_questions.answers_of(program) == ({"a copy": True}, ", then it hung for 1 s")


def test_finds_tools_beside_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("compute-sanitizer") == ""
    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    assert find_tool("compute-sanitizer") == str(tool)


def test_pytest_plugin_chooses_a_device_and_counts(tmp_path):
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cuda', 'emulated'])\n"
        "def test_device(device, record_property):\n"
        "    record_property('measured', {'value': 7})\n"
        "    assert device == 'cuda'\n"
        "@pytest.mark.parametrize('device', ['cuda'])\n"
        "def test_bad(device): assert not device\n"
        "@pytest.mark.parametrize('device', ['cuda'])\n"
        "def test_left_out(device): pytest.skip('not here')\n"
        "def test_anywhere(): assert False\n"
    )
    records = tmp_path / "records"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "gpu.pytest_plugin", "--on", "cuda", "-q", tmp_path],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, "PETL_RECORDS": str(records)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout
    measured, failed, counted, summary = read_records(records)
    assert measured["topic"] == "measured" and measured["value"] == 7 and measured["test"].endswith("test_device[cuda]")
    assert failed["name"].endswith("test_bad[cuda]") and "assert not" in failed["message"]
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 1, 1)
    assert summary["text"] == "1 passed, 1 failed, 1 skipped: test_sample.py::test_bad[cuda]"


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_problems_hold_what_the_op_takes(op):
    problem = draw_rows(op, 6, 16, 5, torch.float64)
    results, expected = (forward_backward(problem, function) for function in (op.ours, op.reference))
    assert list(results) == ["out", *(f"d{name}" for name in problem.tensors)]
    assert all(torch.equal(result, expected[name]) for name, result in results.items())
    assert torch.equal(forward(problem, op.ours)["out"], results["out"])
    assert {*op.rows} <= problem.tensors.keys() <= {*op.rows, *op.weights} and op.out_like in problem.tensors
    copy = problem.to(dtype=torch.float32)
    assert copy.dout.dtype is torch.float32
    assert all(tensor.dtype is torch.float32 and tensor.requires_grad for tensor in copy.tensors.values())


def run_once(run):
    """In the place of captured(), which a GPU needs."""
    run()
    return run


BENCH = speed.Bench("cpu", capture=run_once, clock=host_clock, cold_bytes=600_000, rounds=3, fewest_calls=4)


def small_case(op, direction):
    return speed.Case(op, direction, rows=400, dim=64, inner=24, weight_dtype=torch.float32)


@pytest.mark.parametrize("direction", speed.DIRECTIONS)
@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_comparison(op, direction):
    with emulation():
        result = speed.compare(small_case(op, direction), {"ours": op.ours, "eager": op.reference}, BENCH)
    assert result["wrong"] == {} and result["failures"] == {}
    assert result["calls_per_graph"] >= 4
    assert set(result["microseconds"]) == {"ours", "eager", "copy", "copy kernel"}
    copies = min(result["microseconds"]["copy"], result["microseconds"]["copy kernel"])
    assert result["share_of_least"] == pytest.approx(copies / result["microseconds"]["ours"], rel=0.1, abs=0.01)
    json.dumps(result)


@pytest.mark.parametrize("direction", [traffic.FORWARD, traffic.FORWARD_BACKWARD])
@pytest.mark.parametrize("op", hopper_speed.SIZES, ids=str)
def test_comparison_of_both_paths(op, direction):
    with emulation():
        result = hopper_speed.compare(small_case(op, direction), BENCH)
    assert result["wrong"] == {"lean": {}, "hopper": {}} and result["microseconds"].keys() == {"lean", "hopper"}
    assert result["hopper over lean"]["median"] > 0


def test_comparison_tells_wrong_results_and_contenders_that_fail():
    op = OPS["apt"]
    case = small_case(op, speed.FORWARD_BACKWARD)

    def failing(**_):
        raise RuntimeError("cannot compile this")

    contenders = {"ours": op.ours, "eager": op.reference, "compile": failing}
    result = speed.compare(case, contenders, BENCH)
    assert result["failures"] == {"compile": "RuntimeError: cannot compile this"}
    assert "vs eager" in result["speed_up"] and "vs compile" not in result["speed_up"]
    assert "vs compile" not in summary.of_comparison(result)
    problem = draw_rows(op, 40, 64, 24, torch.bfloat16, torch.float32)
    for ours in (
        lambda **arguments: 1.5 * op.reference(**arguments),
        lambda **arguments: torch.nan * op.reference(**arguments),
    ):
        wrong = speed.wrong_results(case, problem, ours)
        assert "out" in wrong


def test_inputs_exceed_the_cache_and_none_is_used_twice_in_a_row():
    case = small_case(OPS["apt"], speed.FORWARD)
    problems = speed.draw_cold(case, BENCH)
    tensors = [problem.tensors[name] for problem in problems for name in problem.op.rows]
    assert sum(tensor.nbytes for tensor in tensors) >= BENCH.cold_bytes
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_traffic_and_goals():
    assert traffic.LEAST["apt", traffic.FORWARD].bytes(15360, 768, 50) == 3 * 15360 * 768 * 2
    assert traffic.Passes(1, 2).bytes(10, 64, 50) == 2 * 10 * (64 + 2 * 56)
    for key, least in traffic.LEAST.items():
        assert traffic.OWN[key].bytes(100, 768, 200) >= least.bytes(100, 768, 200)
    # 312 images of 197 tokens, which four blocks share, and 12 heads.
    tokens, heads = 312 * 197 * 768 * 2, 312 * 12 * 768
    pool = "attention_pool", traffic.FORWARD
    assert traffic.LEAST[pool].bytes(312 * 197, 768, 12) == tokens + 2 * 2 * heads
    assert traffic.OWN[pool].bytes(312 * 197, 768, 12) == tokens + 2 * 2 * heads + 2 * 4 * 4 * heads
    ratios = {"vs eager": {"median": 2.6}, "vs compile": {"median": 1.3}}
    found = traffic.verdicts("apt", traffic.FORWARD, 50, 0.66, ratios)
    assert {name: goal["met"] for name, goal in found.items()} == {
        "share of own traffic": True,
        "vs eager": True,
        "vs compile": False,
    }
    assert traffic.verdicts("apt", traffic.FORWARD_BACKWARD, 50, 0.66, ratios) == {}


def test_cases_have_goals_and_begin_with_the_layers_own_weights():
    cases = list(speed.cases())
    assert {(case.op.name, case.direction) for case in cases} <= traffic.GOALS.keys()
    assert {case.op for case in cases} == set(OPS.values())
    rows = {case.rows for case in cases if case.op is OPS["attention_pool"]}
    assert rows == {312 * 197, 78 * 197}
    usual, tuned = (cases[: -len(OPS)], cases[-len(OPS) :])
    half = len(usual) // 2
    assert all(case.weight_dtype is torch.float32 for case in usual[:half])
    assert all(case.weight_dtype is torch.bfloat16 for case in usual[half:])
    assert [case.is_tuned for case in cases] == [False] * len(usual) + [True] * len(tuned)
    assert {case.op for case in tuned} == set(OPS.values())


def test_every_case_stands_beside_what_was_counted():
    for case in speed.cases():
        bound = bound_of(case.op.name, case.direction, case.rows, case.inner, case.weights)
        least = traffic.LEAST[case.op.name, case.direction].bytes(case.rows, case.dim, case.inner)
        assert bound > 0.9 * least / (1e3 * h200.MEMORY_SPEED), case  # microseconds
    assert bound_of("apt", traffic.FORWARD, 7, 50, "float32") is None


def test_launches_are_compared_with_what_was_counted():
    for op, rows in itertools.product(OPS.values(), (calls.FEW_ROWS, calls.MANY_ROWS)):
        for inner in op.sizes:
            assert len(counted_launches(op.name, "forward", op.whole(rows), inner, "float32")) in (2, 3)


def test_the_expected_steps_fit_the_budget():
    found = steps(Path("counters.txt"))
    assert all(step.least <= step.expected + 15 and step.expected <= step.limit for step in found)
    assert sum(step.expected for step in found) <= command.BUDGET + 100 and command.BUDGET < 480
    hoppers = ["hopper questions", "hopper tests", "hopper speed"]
    assert [step.name for step in found][:6] == ["build", *hoppers, "op tests", "speed"]
    assert sum(step.expected for step in found[:4]) < 180 and sum(step.expected for step in found[:6]) < command.BUDGET


def test_every_kernel_is_run():
    with emulation():
        solved, flawed = every_kernel.run_all(
            rows=5,
            dims=[72],
            dtypes=every_kernel.DTYPES,
            measured_sizes=False,
            every_activation=True,
            device="cpu",
        )
    calls = sum(len(op.activations) * len(op.every_size) for op in OPS.values())
    assert solved == calls * len(every_kernel.DTYPES) and flawed == []


def test_vilt_with_and_without_apt():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    seconds, times_as_long = vilt.ratios("cpu", run_once, host_clock, rounds=3, **sizes)
    assert set(seconds) == {"without APT", "50 prompts", "200 prompts"}
    assert set(times_as_long) == {"50 prompts", "200 prompts"}


def test_summary_shows_comparisons_goals_and_steps():
    comparison = {
        "topic": "comparison",
        "name": "apt forward",
        "wrong": {"dx": 0.5},
        "microseconds": {"ours": 21.5},
        "bound_microseconds": 17.9,
        "speed_up": {"vs eager": {"median": 3.1}},
        "own_gigabytes_per_second": 3290.0,
        "share_of_own": 0.77,
        "goals": {"vs eager": {"goal": 2.5, "reached": 3.1, "met": True}},
    }
    entry = {
        "name": "speed",
        "verdict": FAILED,
        "seconds": 9.0,
        "expected_seconds": 110,
        "why": "dx",
        "records": [comparison],
    }
    measured, goals, step = summary.lines({"steps": [entry]})
    assert "21.5 us (counted 17.9)" in measured and "vs eager  3.10" in measured and "0.77 of a copy  WRONG" in measured
    assert goals == "goals: apt forward: vs eager 3.10 of 2.50 met"
    assert step.split() == ["speed", "FAILED", "9.0", "s", "of", "110", "expected", "dx"]
