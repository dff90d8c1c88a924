"""Compiles csrc/tests/hopper_questions.cpp and has this GPU answer it: what the Hopper path takes for granted."""

import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.step_log import record

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))
import cuda_kernels  # noqa: E402
import cuda_toolkit  # noqa: E402

LIMIT = 20  # seconds for the answers: a wrong phase of a barrier hangs


def compiled(folder):
    """The program."""
    toolkit = cuda_toolkit.require(cuda_toolkit.Decision(True, None, "the Hopper path is asked about"))
    name = cuda_kernels.HOPPER
    command = [toolkit.nvcc, "-ccbin", cuda_kernels.choose_host_compiler(toolkit), "-x", "cu", "-std=c++17", "-O3"]
    command += [f"-gencode=arch=compute_{name},code=sm_{name}", "-Icsrc", "-Icsrc/tests"]
    program = folder / "hopper_questions"
    subprocess.run([*command, "csrc/tests/hopper_questions.cpp", "-o", program], cwd=ROOT, check=True)
    return program


def answers_of(program):
    """{question: whether the answer is right}, and why there are no more."""
    process = subprocess.Popen([program], stdout=subprocess.PIPE, text=True)
    try:
        text, why = process.communicate(timeout=LIMIT)[0], ""
    except subprocess.TimeoutExpired:
        process.kill()
        text, why = process.communicate()[0], f", then it hung for {LIMIT} s"
    if not why and process.returncode not in (0, 1):
        why = f", then it ended with {process.returncode}"
    found = (line.partition(": ") for line in text.splitlines())
    return {question: verdict == "right" for verdict, _, question in found if verdict in ("right", "WRONG")}, why


def main():
    with tempfile.TemporaryDirectory() as folder:
        answers, why = answers_of(compiled(Path(folder)))
    record("hopper questions", answers=answers)
    wrong = [question for question, right in answers.items() if not right]
    text = f"{len(answers) - len(wrong)} of {len(answers)} as taken for granted{why}"
    record("summary", text=text + "".join(f"; WRONG: {question}" for question in wrong))
    return 1 if wrong or why or not answers else 0


if __name__ == "__main__":
    sys.exit(main())
