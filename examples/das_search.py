"""DAS on a ViLT for VQAv2: find the layers that the task does not need, then train without them.

    python examples/das_search.py --digits --num-skip 1    # without a network
    python examples/das_search.py --model dandelin/vilt-b32-mlm --train ... --test ... --num-skip 4

The data are those of `examples/vqa_apt.py`; the search compares its choices on the test split's batches here, which a
real task keeps apart. --output gets the search, its picture, and what `petl_ext.load` reads.
"""

from vqa_apt import KEEP, VQACollator, parsed, read_vilt, vilt_parser

import petl_ext


def find_layers(data, options):
    """The finished search, after as many steps as the training has."""
    model = data.new_model()
    petl_ext.attach(model, petl_ext.DASConfig(), keep=KEEP)
    search = petl_ext.DepthSearch(model, num_skip=options.num_skip, seed=0)
    trainer = data.trainer(model, options, learning_rate=1e-3)
    petl_ext.hf.SearchCallback(search).add_to(trainer)
    trainer.train()
    search.plot(options.output / "gates.png")
    search.save(options.output / "search.json")
    return search


def main(arguments=None):
    made = vilt_parser(__doc__)
    made.add_argument("--num-skip", type=int, default=1)
    options = parsed(made, arguments)
    data = read_vilt(options)
    options.output.mkdir(parents=True, exist_ok=True)
    skipped = find_layers(data, options).selection()
    model = data.new_model()
    das = petl_ext.attach(model, petl_ext.DASConfig(skip=skipped, permanent=True), keep=KEEP)
    print(das.report(inputs=VQACollator(data.processor)([data.train[0]])))
    trainer = data.trainer(model, options, learning_rate=1e-3)
    trainer.train()
    score = trainer.evaluate()["eval_vqa_score"]
    das.save(options.output / "das")
    print(f"VQA score {score:.1%} without layers {', '.join(map(str, skipped))}; saved to {options.output / 'das'}")
    return {"attachment": das, "skipped": skipped, "score": score}


if __name__ == "__main__":
    main()
