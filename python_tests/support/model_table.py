"""Which method goes where in each tiny model, and docs/models.md, which says so.

python python_tests/support/model_table.py    # writes docs/models.md anew
"""

import functools
from pathlib import Path

import modern_models

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig
from petl_ext.attaching.families import family_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
METHODS = {
    "APT": APTConfig,
    "sequential adapter": AdapterConfig,
    "parallel adapter": lambda **options: AdapterConfig("parallel", **options),
    "DAS": DASConfig,
}
COLUMNS = tuple(enumerate(METHODS, start=3))
SIZES = {"APT": {"num_prompts": 5, "rank": 2}, "DAS": {"bottleneck": 4, "bypass_bottleneck": 4}}
# Models one of whose towers is refused, and the towers that the refusal says to name.
TOWERS = {"bridgetower": ["text", "fusion"]}


def config_of(method, **options):
    return METHODS[method](**SIZES.get(method, {"bottleneck": 4, "activation": "gelu"}), **options)


def attached(name, method):
    """(the model, what is attached to it) with the towers that can take the method.

    Raises:
        ValueError: no tower can.
    """
    model = modern_models.make(name)
    return model, petl_ext.attach(model, config_of(method, sites=TOWERS.get(name)))


@functools.cache
def entries():
    """{name: what `entry` says}; of a model that the installed libraries lack, what the page said."""
    return {name: (_written if modern_models.lacking(name) else entry)(name) for name in modern_models.TINY}


def _written(name):
    """What `entry` said of a model when the page was written."""
    lines = PAGE.read_text(encoding="utf-8").split("\n")
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| `")]
    cells = next((row for row in rows if row[1] == modern_models.TINY[name].model), None)
    if cells is None:
        raise LookupError(f"{PAGE.name} must have a row of {name}: {modern_models.lacking(name)}")
    limits = [line.removeprefix("- ").partition(": ") for line in lines if line.startswith("- `")]
    return tuple(cells), [limit.removesuffix(".") for names, _, limit in limits if cells[0] in names.split(", ")]


def entry(name):
    """(cells of the table, lines below it) of one model."""
    cells, lines = [], []
    for method in METHODS:
        try:
            _, attachment = attached(name, method)
        except ValueError as error:
            cells.append("")
            lines.append(f"{method}: {reason_of(error)}")
            continue
        is_whole = attachment.config.row not in attachment.family.limits
        cells.append(", ".join(TOWERS.get(name, ["✓" if is_whole else "in part"])))
        lines += attachment.report().limits
    model = modern_models.make(name)
    family = family_of(model)
    if name in TOWERS:
        lines += [f"{tower}: {limit}" for tower, limit in family.limits.items()]
    towers = ", ".join(family.towers)
    return (f"`{family.name}`", type(model).__name__, towers, *cells), list(dict.fromkeys(lines))


def reason_of(error):
    return str(error).split("\n")[0].partition(": ")[2].partition(": ")[2]


def page(entries):
    """docs/models.md, of {name: what `entry` says}."""
    counted = ",\n".join(
        _counted(method, [cells[column] for cells, _ in entries.values()]) for column, method in COLUMNS
    )
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells, _ in entries.values())
    limits = {}
    for cells, lines in entries.values():
        for line in lines:
            limits.setdefault(line, []).append(cells[0])
    below = "\n".join(f"- {', '.join(names)}: {line}." for line, names in limits.items())
    return HEAD + TABLE.format(number=len(entries), counted=counted, rows=rows, below=below)


def _counted(method, cells):
    whole, some = sum(cell == "✓" for cell in cells), sum(bool(cell) for cell in cells)
    return f"{method} in {some}" + (f", {some - whole} of these in part" if some > whole else "")


HEAD = """# Models

`attach` knows these families by their `config.model_type`, or by their class where there is none. In each of them every
new layer gets gradients, `disable()` gives the backbone bit for bit, a saved folder loads into a fresh model, and
decoders that skip layers decode with a cache as without: `python_tests/attaching/test_modern_models.py` runs all of it
on tiny models with random weights. Trained checkpoints have not been run. With skipped layers `generate` also searches
by beams, with texts padded on the left, with static caches and by prompt lookup, the last not in transformers 5.17,
which cannot crop a cache with a slot that no layer uses.

## Towers

`sites` takes the name of a tower, or several, in place of regular expressions; `parameter_groups` gives each its own
learning rate, and the report counts by tower.

```python
import torch
from transformers import CLIPConfig, CLIPModel

import petl_ext

sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
model = CLIPModel(CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 16}))
apt = petl_ext.attach(model, petl_ext.APTConfig(num_prompts=20, sites=["text", "vision"]), keep=["visual_projection"])
groups = apt.parameter_groups(vision=1e-4, text=5e-5, kept=1e-3)
optimizer = torch.optim.AdamW(groups)  # Trainer(..., optimizers=(optimizer, None)) takes it
print(apt.report())
```

A language model that sees takes the families of what stands in its towers: a LLaVA around a Mistral or a Qwen2 needs no
entry of its own. Layers that the model does not use, such as the last of a LLaVA's vision tower, get none; nor does
what is neither language nor vision, such as Gemma 4's audio tower. Adapters go behind the sum of a mixture of experts.
Where Gemma 4's last layers take the keys and values of earlier ones, these cannot be skipped: `attach` says which, and
takes the others by `sites`.

"""
TABLE = """## Table

Written by `python python_tests/support/model_table.py`. Of {number} families:
{counted}.

| family | tested as | towers | APT | sequential adapter | parallel adapter | DAS |
|---|---|---|---|---|---|---|
{rows}

Where a method goes in part, or not at all, and why; `attach` and the report say the same:

{below}

Rows of models that the installed libraries lack stay as they were written; those of timm's were with timm 1.0.31, which
`make test` does not install: it brings torchvision, whose wheels on the package index are for a CUDA torch and fail
beside one for the CPU. `pip install timm` beside a torchvision that fits the torch runs their tests.
"""

if __name__ == "__main__":
    PAGE.write_text(page(entries()), encoding="utf-8")
