"""Zero-shot, few-shot and base-to-new classification by CLIP with APT, on an image folder or on handwritten digits.

    python examples/clip_few_shot.py --digits    # without a network; first pre-trains a small CLIP, for minutes
    python examples/clip_few_shot.py --model openai/clip-vit-base-patch16 --images photos --test-images more_photos

An image folder has one folder per class. Without --test-images, a seed's runs are all tested on what its largest draw
has left. Every run begins with the same weights. --output gets results.json and, for every run, a folder that
`petl_ext.load` reads.
"""

import argparse
import copy
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import petl_ext
from petl_ext.demo.digits.images import write_digit_images
from petl_ext.demo.digits.pretrain_clip import Schedule, pretrain
from petl_ext.models import CLIPClassifier
from petl_ext.tasks import image_classification as tasks

APT_SITES = {
    "vision": [r"vision_model\..*\.self_attn"],
    "text": [r"text_model\..*\.self_attn"],
    "both": None,  # the family's own
}


@dataclass
class Experiment:
    """A CLIP, the images that shots are drawn from, those to test on, and the command line's options."""

    classifier: CLIPClassifier
    image_processor: Any
    images: list
    test_images: list
    options: argparse.Namespace

    @classmethod
    def load(cls, options):
        if options.digits:
            _make_digits(options)
        images = tasks.read_image_folder(options.images)
        test_images = tasks.read_image_folder(options.test_images) if options.test_images else None
        # A checkpoint's own half precision would train to NaN.
        clip = CLIPModel.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        prompts = tasks.class_prompts((image.class_name for image in images), options.template)
        unknown = {image.class_name for image in test_images or images} - prompts.keys()
        if unknown:
            raise ValueError(f"{options.test_images} must hold the classes of {options.images}, got {sorted(unknown)}")
        image_processor = AutoImageProcessor.from_pretrained(options.model)
        return cls(CLIPClassifier(clip, tokenizer, prompts), image_processor, images, test_images, options)

    def tested(self, seed):
        """The images that the runs of a seed are tested on."""
        if self.test_images is not None:
            return self.test_images
        return tasks.draw_shots(self.images, max(self.options.shots), seed).rest

    def run(self, shots, seed, classes, tested):
        """Trains on `shots` images of each of `classes`; the accuracies on all lists of classes in `tested`."""
        drawn = tasks.draw_shots(tasks.images_of(self.images, classes), shots, seed).shots
        classifier = copy.deepcopy(self.classifier)
        classifier.set_classes(classes)
        set_seed(seed)  # of the new layers
        attachment = self._attach(classifier.clip)
        if self.options.train == "vision":
            classifier.freeze()  # the features of the prompts
        self._trainer(classifier, drawn, seed, cache_images=True).train()
        attachment.save(self.options.output / f"{shots}-shots-of-{len(classes)}-classes-seed-{seed}")
        return [self.accuracy(classifier, of, seed) for of in tested]

    def accuracy(self, classifier, classes, seed):
        """Share of the test images of `classes` that are recognized among these."""
        classifier.set_classes(classes)
        classifier.eval().freeze()
        images = tasks.images_of(self.tested(seed), classes)
        return self._trainer(classifier, images, seed, cache_images=False).evaluate()["eval_accuracy"]

    def _attach(self, clip):
        options = self.options
        if options.train == "projections":
            return petl_ext.attach(clip, petl_ext.ClassifierOnlyConfig(), ["visual_projection", "text_projection"])
        config = petl_ext.APTConfig(options.num_prompts, options.rank, sites=APT_SITES[options.train])
        return petl_ext.attach(clip, config)

    def _trainer(self, classifier, images, seed, cache_images):
        options = self.options
        data = tasks.ImageClassificationDataset(images, classifier.classes, self.image_processor, cache_images)
        arguments = TrainingArguments(
            options.output / "trainer",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=100,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            seed=seed,
            report_to="none",
            dataloader_num_workers=options.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            classifier, arguments, train_dataset=data, eval_dataset=data, compute_metrics=tasks.compute_metrics
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def measure(experiment):
    """A list of {"shots", "seed", "classes", "accuracy"}; zero-shot is 0 shots, base-to-new has the most shots."""
    options, everything = experiment.options, experiment.classifier.classes
    base, new = tasks.base_and_new(everything)
    halves = {"base": base, "new": new}
    results = []

    def add(shots, seed, accuracies):
        results.extend({"shots": shots, "seed": seed, "classes": of, "accuracy": it} for of, it in accuracies.items())
        print(f"seed {seed}, {shots} shots:", *(f"{of} {it:.1%}" for of, it in accuracies.items()), flush=True)

    for seed in options.seeds:
        parts = {"all": everything, **halves}
        add(0, seed, {of: experiment.accuracy(experiment.classifier, classes, seed) for of, classes in parts.items()})
        for shots in options.shots:
            add(shots, seed, {"all": experiment.run(shots, seed, everything, [everything])[0]})
        most = max(options.shots)
        add(most, seed, dict(zip(halves, experiment.run(most, seed, base, halves.values()), strict=True)))
    return results


def table(results):
    """Means over seeds, with the standard deviation of several, in Markdown."""
    cells = defaultdict(list)
    for result in results:
        cells[result["shots"], result["classes"]].append(result["accuracy"])
    for shots in sorted({shots for shots, of in cells if of == "new"}):
        pairs = zip(cells[shots, "base"], cells[shots, "new"], strict=True)
        cells[shots, "harmonic mean"] = [tasks.harmonic_mean(*pair) for pair in pairs]
    columns = ["all", "base", "new", "harmonic mean"]
    lines = ["| shots | all classes | base | new | harmonic mean |", "|---|---:|---:|---:|---:|"]
    for shots in sorted({shots for shots, _ in cells}):
        lines.append(f"| {shots or 'zero-shot'} | {' | '.join(_cell(cells[shots, of]) for of in columns)} |")
    return "\n".join(lines)


def _cell(accuracies):
    if not accuracies:
        return ""
    spread = f" ± {statistics.stdev(accuracies):.1%}" if len(set(accuracies)) > 1 else ""
    return f"{statistics.mean(accuracies):.1%}{spread}"


def _make_digits(options):
    """Digits on a colored ground, to adapt to, and a CLIP that knows digits on black only; once per --output."""
    torch.set_num_threads(1)  # more are slower on matrices this small, and would change the result
    folder = options.output / "digits"
    options.model, options.images, options.test_images = folder / "clip", folder / "val", folder / "test"
    for images, copies in ((options.images, 1), (options.test_images, 4)):
        if not images.exists():
            write_digit_images(images, images.name, "ground", copies, progress=False)
    if not options.model.exists():
        pretrain(options.model, schedule=Schedule(steps=options.pretraining_steps))


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--digits", action="store_true", help="handwritten digits and a CLIP made on the spot")
    what.add_argument("--images", type=Path, help="image folder that shots are drawn from")
    parser.add_argument("--test-images", type=Path, help="image folder to test on")
    parser.add_argument("--model", help="a CLIP of Hugging Face: name or folder")
    parser.add_argument("--template", default=tasks.TEMPLATE, help="prompt of a class, {} being its name")
    parser.add_argument(
        "--train",
        choices=[*APT_SITES, "projections"],
        default="vision",
        help="what trains: APT in an encoder or both, or CLIP's projections",
    )
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--pretraining-steps", type=int, default=Schedule.steps, help="of --digits' CLIP")
    parser.add_argument("--output", type=Path, default=Path("clip_few_shot_out"))
    options = parser.parse_args(arguments)
    if options.images and not options.model:
        parser.error("--images needs --model")
    if options.images and options.test_images and options.images.resolve() == options.test_images.resolve():
        parser.error(
            "--test-images is the folder of --images, of which the shots are: leave it out to test on the rest"
        )
    return options


def main(arguments=None):
    options = parse(arguments)
    results = measure(Experiment.load(options))
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
