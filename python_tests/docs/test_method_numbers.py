"""What the pages of the methods say of the demo is what its files hold."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "demo"


def table_of(name, column):
    """Of a file's first table with that column, {first cell of a row: the first numbers of its cells from there on}."""
    for block in (RESULTS / name).read_text(encoding="utf-8").split("\n\n"):
        header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()] + [[], []]
        if column in header:
            start = header.index(column)
            return {row[0]: list(map(first_number, row[start:])) for row in rows if row}
    raise AssertionError(f"{name} has no column {column}")


def first_number(cell):
    found = re.search(r"\d[\d,.]*", cell)
    return found and float(found[0].replace(",", ""))


def page(method):
    """Its words, with one blank between any two."""
    return " ".join((ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8").split())


def differences(table, better, worse):
    return [round(ours - theirs, 1) for ours, theirs in zip(table[better], table[worse], strict=True)]


def test_over_three_seeds():
    seeds = table_of("seeds.md", "seed 0")
    adapter = differences(seeds, "adapter", "APT, 50 prompts")
    full = differences(seeds, "full tuning", "APT, 50 prompts")
    more = differences(seeds, "APT, 200 prompts", "APT, 50 prompts")
    parallel = differences(seeds, "adapter", "parallel adapter")
    skipping = differences(seeds, "DAS, 1 of 4 layers skipped", "adapter")
    assert f"is {min(adapter)} to {max(adapter)} points better over" in page("apt")
    assert f"full tuning is {min(full)} to {max(full)} points above" in page("apt")
    assert f"gained {more[0]}, {more[1]} and {more[2]} points" in page("apt")
    assert f"{min(parallel)} to {max(parallel)} points less" in page("adapters")
    assert f"between {-min(skipping)} points below and {max(skipping)} above the adapter" in page("das")
    ahead = max(differences(seeds, "APT, 200 prompts", "adapter"))
    assert f"APT with 200 prompts is {ahead} points better" in page("adapters")


def test_beside_lora():
    seeds, lora = table_of("seeds.md", "seed 0"), table_of("lora.md", "seed 0")

    def ahead_of(method):
        pairs = [pair for row in lora.values() for pair in zip(row, seeds[method], strict=True)]
        found = [theirs - ours for theirs, ours in pairs]
        return f"{min(found):.1f} to {max(found):.1f} points more accurate"

    assert ahead_of("APT, 50 prompts") in page("apt")
    assert ahead_of("adapter") in page("adapters")
    assert ahead_of("DAS, 1 of 4 layers skipped") in page("das")


def test_of_one_seed():
    accuracy = {method: numbers[0] for method, numbers in table_of("report.md", "accuracy").items()}
    macs = {method: numbers[0] for method, numbers in table_of("report.md", "all MACs").items()}
    added = {method: round(share - 100, 1) for method, share in macs.items()}
    assert f"reach {accuracy['APT, 50 prompts']} % in place of {accuracy['deep prompts, 16']} %" in page("apt")
    assert added["APT, 50 prompts"] < added["deep prompts, 16"] / 2
    assert f"adds {added['adapter']} % to the backbone's" in page("adapters")
    assert f"{added['parallel adapter']} %, and" in page("adapters")


def test_of_visual_prompts():
    above = table_of("dvp-seeds.md", "seed 0")["DVP - control"]
    assert f"is {min(above):.0f} to {max(above):.0f} points above a prompt" in page("dvp")
    rows = table_of("dvp-report.md", "MACs")
    chosen, tokens = rows["**DVP, layer 2** (the search's choice)"], rows["all visual tokens as prompts"]
    first, best = rows["DVP, layer 0"], rows["DVP, layer 5"]
    assert f"{chosen[1] - tokens[1]:.0f} above all of the image's five tokens" in page("dvp")
    assert f"at {100 * chosen[0] / tokens[0]:.0f} % of their multiply-accumulates" in page("dvp")
    assert f"{first[1]} % in the demo, the best layer has {best[1]} %" in page("dvp")
    assert f"its choice is {best[1] - chosen[1]:.0f} points below the best" in page("dvp")
