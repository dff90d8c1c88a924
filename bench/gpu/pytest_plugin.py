"""For pytest -p gpu.pytest_plugin: chooses the tests of one device and tells the runner how they went."""

from collections import Counter

from gpu.step_log import record

SHOWN = 8  # names of failures on the terminal


def pytest_addoption(parser):
    parser.addoption("--on", help="run only the tests whose `device` has this name")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--on")
    if not wanted:
        return
    chosen = [item for item in items if _device(item) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _device(item):
    return str(item.callspec.params.get("device")) if hasattr(item, "callspec") else None


class _Outcomes:
    def __init__(self):
        self.counts = Counter()
        self.failures = []

    def pytest_runtest_logreport(self, report):
        # Of setup and teardown only what went wrong counts.
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append(report.nodeid)
            record("failed test", name=report.nodeid, message=str(report.longrepr)[-2000:])
        for topic, values in report.user_properties if report.when == "call" else ():
            record(topic, test=report.nodeid, **values)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failures.append(report.nodeid)

    def pytest_sessionfinish(self):
        counts = {outcome: self.counts[outcome] for outcome in ("passed", "failed", "skipped")}
        record("tests", **counts, failures=self.failures)
        text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        shown = [name.rpartition("/")[2] for name in self.failures[:SHOWN]]
        record("summary", text=": ".join([text, ", ".join(shown)]) if shown else text)


def pytest_configure(config):
    config.pluginmanager.register(_Outcomes())
