"""APT on a ViLT for VQAv2: train what is new, measure, save.

    python examples/vqa_apt.py --digits     # without a network: a small ViLT, questions about handwritten digits
    python examples/vqa_apt.py --model dandelin/vilt-b32-mlm --train questions.json annotations.json train2014 \\
        --test questions.json annotations.json val2014

--output gets what `petl_ext.load` reads. `examples/das_search.py` and `examples/dvp_bert.py` use the same data.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer, TrainingArguments, ViltForQuestionAnswering, ViltProcessor, set_seed

import petl_ext
from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.digits.write import write_digits
from petl_ext.tasks.vqa import AnswerVocabulary, VQACollator, VQADataset, compute_metrics

COCO = "COCO_{folder}_{{image_id:012d}}.jpg"
KEEP = ["classifier", "pooler"]  # trained beside what is new


class Data(NamedTuple):
    """A task, and what makes a model for it: `make_model(num_labels=...)`."""

    make_model: Callable
    processor: Any
    vocabulary: AnswerVocabulary
    train: VQADataset
    test: VQADataset

    def new_model(self, **options):
        return self.make_model(num_labels=len(self.vocabulary), **options)

    def trainer(self, model, options, learning_rate):
        arguments = TrainingArguments(
            str(options.output / "trainer"),
            learning_rate=learning_rate,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
        )
        collator = VQACollator(self.processor)
        return Trainer(model, arguments, collator, self.train, self.test, compute_metrics=compute_metrics)


def read_vilt(options):
    """The `Data` of the command line, for a ViLT."""
    name = BACKBONE if options.digits else options.model
    return read(options, ViltProcessor.from_pretrained(name), partial(ViltForQuestionAnswering.from_pretrained, name))


def read(options, processor, make_model):
    """The `Data` of the command line, as the processor makes them."""
    if options.digits:
        digits = write_digits(options.output / "digits", {"train": options.scenes, "test": max(1, options.scenes // 5)})
        files = [(of.questions, of.annotations, of.images, of.image_name) for of in digits.values()]
        least = 1
    else:
        files = [(*given, COCO.format(folder=Path(given[2]).name)) for given in (options.train, options.test)]
        least = 9
    vocabulary = AnswerVocabulary.from_annotations([files[0][1]], least)
    train, test = (
        VQADataset(questions, images, processor, vocabulary, annotations, image_name=image_name)
        for questions, annotations, images, image_name in files
    )
    return Data(make_model, processor, vocabulary, train, test)


def vilt_parser(description):
    made = parser(description)
    made.add_argument("--model", default="dandelin/vilt-b32-mlm")
    return made


def parser(description):
    """Of what every example on these data asks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--digits", action="store_true", help="write and use questions about handwritten digits")
    made.add_argument("--scenes", type=int, default=2000, help="of the digits' training split")
    for split in ("train", "test"):
        made.add_argument(f"--{split}", nargs=3, metavar=("QUESTIONS", "ANNOTATIONS", "IMAGES"))
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--output", type=Path, default=Path("vqa_out"))
    return made


def parsed(made, arguments):
    options = made.parse_args(arguments)
    if not options.digits and not (options.train and options.test):
        made.error("--train and --test must be given, or --digits")
    set_seed(0)
    return options


def main(arguments=None):
    made = vilt_parser(__doc__)
    made.add_argument("--num-prompts", type=int, default=50)
    options = parsed(made, arguments)
    data = read_vilt(options)
    model = data.new_model()
    apt = petl_ext.attach(model, petl_ext.APTConfig(num_prompts=options.num_prompts), keep=KEEP)
    print(apt.report(inputs=VQACollator(data.processor)([data.train[0]])))
    trainer = data.trainer(model, options, learning_rate=5e-3 if options.digits else 5e-4)
    trainer.train()
    score = trainer.evaluate()["eval_vqa_score"]
    apt.save(options.output / "apt")
    print(f"VQA score {score:.1%} with {options.num_prompts} prompts; saved to {options.output / 'apt'}")
    return {"attachment": apt, "score": score}


if __name__ == "__main__":
    main()
