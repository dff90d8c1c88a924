"""Runs steps as processes of their own, each within a time limit and all within a budget, and keeps what they tell."""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from gpu.step_log import FILE, SECONDS, read_records

POLL = 0.2  # seconds
KEEP = 5  # seconds between two looks at what a step has told so far
GRACE = 3  # seconds between asking a process to end and killing it

OK, FAILED, TIME_LIMIT, SKIPPED, UNFINISHED = "ok", "FAILED", "TIME LIMIT", "skipped", "unfinished"


@dataclass(frozen=True)
class Step:
    """What is run.

    Attributes:
        commands: each a list of words; they run at the same time.
        limit: seconds.
        expected: seconds that it takes on a machine with 16 cores: an estimate until the first run says otherwise.
        least: seconds below which it is pointless to begin.
        environment: variables added to the runner's.
        obstacle: why it cannot run on this machine, if it cannot.
        is_check: whether its failure fails the run.
    """

    name: str
    commands: tuple
    limit: float
    expected: float = 0
    least: float = 10
    environment: dict = field(default_factory=dict)
    obstacle: str = ""
    is_check: bool = True


@dataclass(frozen=True)
class Files:
    """Where a run writes: the JSON and the log are its results, the scratch folder may be thrown away."""

    result: Path
    log: Path
    scratch: Path


class Runner:
    """One run.

    Attributes:
        document: what the JSON holds; "steps", "finished" and "passed" are the runner's, the rest is the caller's.
    """

    def __init__(self, document, files, budget):
        self.document = {**document, "budget_seconds": budget, "finished": False, "passed": True, "steps": []}
        self.files = files
        self.end = time.monotonic() + budget
        files.result.parent.mkdir(parents=True, exist_ok=True)
        files.scratch.mkdir(parents=True, exist_ok=True)
        files.log.write_text("")
        self.write()

    def write(self):
        # Replaced in one go: a run that is killed here leaves the file as it was.
        unfinished = self.files.result.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.document, indent=1) + "\n")
        unfinished.replace(self.files.result)

    def run(self, step):
        """Runs the step and returns its entry in the document."""
        seconds_left = self.end - time.monotonic()
        why_not = step.obstacle
        if not why_not and seconds_left < step.least:
            why_not = f"{max(seconds_left, 0):.0f} s of the budget are left, it needs {step.least:.0f}"
        verdict = SKIPPED if why_not else UNFINISHED
        entry = {
            "name": step.name,
            "verdict": verdict,
            "seconds": 0,
            "expected_seconds": step.expected,
            "why": why_not,
            "records": [],
        }
        self.document["steps"].append(entry)
        if not why_not:
            self._execute(step, min(step.limit, seconds_left), entry)
        if step.is_check and entry["verdict"] in (FAILED, TIME_LIMIT):
            self.document["passed"] = False
        self.write()
        return entry

    def _execute(self, step, limit, entry):
        start = time.monotonic()
        begun = [_Process(step, index, limit, self.files.scratch) for index in range(len(step.commands))]
        try:
            self._wait(begun, start + limit, entry)
            out_of_time = any(process.is_running() for process in begun)
        finally:
            for process in begun:
                process.end()
            entry["seconds"] = round(time.monotonic() - start, 1)
            entry["records"] = _records(begun)
            with open(self.files.log, "a") as log:
                for process in begun:
                    log.write(f"\n$ {process.command}\n{process.output()}\nexit code {process.exit_code()}\n")
        codes = [process.exit_code() for process in begun]
        entry["verdict"] = TIME_LIMIT if out_of_time else FAILED if any(codes) else OK
        entry["why"] = _why(entry, codes, limit, begun)

    def _wait(self, processes, end, entry):
        """Until all have ended, or until `end`; what they have told is kept on the way."""
        kept = time.monotonic()
        while any(process.is_running() for process in processes) and time.monotonic() < end:
            time.sleep(POLL)
            if time.monotonic() > kept + KEEP:
                kept = time.monotonic()
                entry["records"] = _records(processes)
                self.write()

    def finish(self):
        self.document["finished"] = True
        self.write()


def _records(processes):
    return [record for process in processes for record in process.records()]


def _why(entry, codes, limit, processes):
    """The verdict's reason, in one line."""
    reasons = [f"{limit:.0f} s were not enough"] if entry["verdict"] == TIME_LIMIT else []
    reasons += [record["text"] for record in entry["records"] if record["topic"] == "summary"]
    if entry["verdict"] == FAILED:
        failed = [(code, process) for code, process in zip(codes, processes, strict=True) if code]
        reasons += [f"exit code {code}: {process.last_line()}" for code, process in failed]
    return "; ".join(reasons)


class _Process:
    def __init__(self, step, index, limit, scratch):
        words = [str(word) for word in step.commands[index]]
        self.command = " ".join(words)
        name = f"{step.name}-{index}".replace(" ", "-")
        self._records, self._output = scratch / f"{name}.jsonl", scratch / f"{name}.log"
        self._records.unlink(missing_ok=True)
        environment = {**os.environ, **step.environment, FILE: str(self._records), SECONDS: str(limit)}
        self._process = None
        try:
            with open(self._output, "wb") as output:
                # In a group of its own, so that whatever it starts ends with it.
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            self._output.write_text(f"could not be started: {error}")

    def is_running(self):
        return self._process is not None and self._process.poll() is None

    def end(self):
        """Ends the process, if it still runs, and all that it has started and left behind."""
        if self._process is None:
            return
        for signal_, patience in ((signal.SIGTERM, GRACE if self.is_running() else 0), (signal.SIGKILL, GRACE)):
            try:
                os.killpg(self._process.pid, signal_)
            except ProcessLookupError:
                return
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue

    def exit_code(self):
        if self._process is None:
            return 127
        code = self._process.poll()
        return -signal.SIGKILL if code is None else code

    def records(self):
        return read_records(self._records)

    def output(self):
        return self._output.read_text(errors="replace")

    def last_line(self):
        lines = self.output().strip().splitlines()
        return lines[-1].strip()[:200] if lines else "no output"
