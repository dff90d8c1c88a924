"""The committed table, and what differs from it."""

import json

from results import RESULTS

from counting.cases import CASES

JSON_FILE, MARKDOWN_FILE = RESULTS / "cuda-counts.json", RESULTS / "cuda-counts.md"
HOPPER_JSON_FILE, HOPPER_MARKDOWN_FILE = RESULTS / "hopper-counts.json", RESULTS / "hopper-counts.md"


def as_text(compilers, cases):
    """JSON with one line for each launch.

    Args:
        compilers: {"host": name and version, "device": the same}, of what the counts are.
        cases: {case: {rows: [entry]}}.
    """
    lines = ["{", f' "compilers": {json.dumps(compilers)},', ' "cases": {']
    for case, sizes in cases.items():
        lines.append(f"  {json.dumps(str(case))}: {{")
        for rows, entries in sizes.items():
            lines.append(f"   {json.dumps(str(rows))}: [")
            lines.append(",\n".join(f"    {json.dumps(entry)}" for entry in entries))
            lines.append("   ]" + "," * (rows != list(sizes)[-1]))
        lines.append("  }" + "," * (case != list(cases)[-1]))
    return "\n".join([*lines, " }", "}", ""])


def load(file=JSON_FILE, all_cases=CASES):
    """The compilers and the cases of the committed table, as `as_text` takes them."""
    document = json.loads(file.read_text())
    named = {str(case): case for case in all_cases}
    cases = {
        named[name]: {int(rows): entries for rows, entries in sizes.items()}
        for name, sizes in document["cases"].items()
        if name in named
    }
    return document["compilers"], cases


def _flat(value, path=""):
    """{"block/barriers": 49}: every number and every word of an entry."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = enumerate(value)
    else:
        return {path: value}
    return {inner: leaf for key, item in pairs for inner, leaf in _flat(item, f"{path}/{key}".lstrip("/")).items()}


def differences(before, after):
    """What changed between two lists of entries, in words: kernel, count, before, after."""
    kernels = [[entry["kernel"] for entry in entries] for entries in (before, after)]
    if kernels[0] != kernels[1]:
        return [f"launches: {', '.join(kernels[0])} -> {', '.join(kernels[1])}"]
    found = []
    for old, new in zip(before, after, strict=True):
        flat_old, flat_new = _flat(old), _flat(new)
        for name in dict.fromkeys([*flat_old, *flat_new]):
            pair = flat_old.get(name, 0), flat_new.get(name, 0)
            if pair[0] != pair[1]:
                found.append(f"{old['kernel']}: {name} {pair[0]} -> {pair[1]}")
    return found


def without_code(entry):
    """Of an entry what the emulator alone counts."""
    bounds = {name: time for name, time in entry["bounds"].items() if name != "stall counts"}
    return {**entry, "code": None, "bounds": bounds}
