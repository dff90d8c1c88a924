"""LoRA, PEFT's, beside the demo's methods: the same backbone, head, data and steps, and about as many new parameters as
APT with 50 prompts and the adapter have."""

import argparse
from dataclasses import dataclass, replace

from peft import LoraConfig, inject_adapter_in_model
from tqdm.auto import tqdm

from petl_ext import ClassifierOnlyConfig
from petl_ext.counting import count_parameters
from petl_ext.demo.charts import markdown
from petl_ext.demo.training import one_quiet_thread
from petl_ext.demo.vilt.training import Method, ViltRun, groups_of

RATES = (1e-3, 2e-3, 4e-3, 1e-2, 2e-2)


@dataclass(frozen=True)
class Lora:
    """A row of the table. Its learning rate is the one that did best on the validation split (`--tune`); the head's is
    that of the adapters and of APT with 50 prompts.

    Attributes:
        targets: what the names of the linear layers in a block end in, as a regular expression.
    """

    name: str
    rank: int
    targets: str
    learning_rate: float
    head_learning_rate: float


ROWS = (
    Lora("LoRA of rank 16, queries and values", 16, "query|value", 4e-3, 5e-3),
    Lora("LoRA of rank 4, all linear layers", 4, "query|key|value|dense", 4e-3, 5e-3),
)


def train(lora, run):
    """(its new parameters, the Trainer of the trained model)."""
    method = Method(lora.name, ClassifierOnlyConfig(), lora.learning_rate, lora.head_learning_rate)
    attachment = run.attach(method)
    head = list(attachment.parameters())
    targets = rf".*encoder\.layer\.\d+\..*({lora.targets})"
    config = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets)
    model = inject_adapter_in_model(config, attachment.model)  # which freezes the head
    new = count_parameters(model)[0]
    for parameter in head:
        parameter.requires_grad_(True)
    trainer = run.quiet_trainer(model, run.task, groups_of(model, method))
    run.train(trainer)
    return new, trainer


def compare(runs):
    """A table: accuracies on the test split of each run, one for each seed."""
    rows = []
    for lora in tqdm(ROWS, desc="rows", disable=not runs[0].progress):
        trained = [train(lora, run) for run in runs]
        scores = [run.task.score(trainer, "test") for run, (_, trainer) in zip(runs, trained, strict=True)]
        rows.append((lora.name, f"{trained[0][0]:,}", *(f"{score.accuracy:.1%}" for score in scores)))
    return markdown([("method", "new parameters", *(f"seed {run.seed}" for run in runs)), *rows])


def tune(run):
    """A table of learning rates, the head's being as it is."""
    trials = [replace(lora, learning_rate=rate) for lora in ROWS for rate in RATES]
    rows = [("method", "rate", "head rate", "val")]
    for lora in trials:
        score = run.task.score(train(lora, run)[1], "val")
        rows.append((lora.name, f"{lora.learning_rate:g}", f"{lora.head_learning_rate:g}", f"{score.accuracy:.1%}"))
    return markdown(rows)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="demo_out", help="folder for the data (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few steps on little data, to see it run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="compare learning rates, with the first seed")
    parser.add_argument("--no-progress", action="store_true", help="without progress bars")
    options = parser.parse_args(arguments)
    size = ViltRun.size_of(options.quick)
    with one_quiet_thread():
        runs = [ViltRun.prepare(options.output, size, seed, not options.no_progress) for seed in options.seeds]
        print(tune(replace(runs[0], progress=False)) if options.tune else compare(runs))


if __name__ == "__main__":
    main()
