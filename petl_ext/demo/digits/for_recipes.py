"""The data and the model of the digits recipes: `petl-ext demo digits`."""

from pathlib import Path

import torch
from transformers import BertTokenizer, ViltModel, ViltProcessor

from petl_ext.demo.digits import BACKBONE, gqa, nlvr2, retrieval, scienceqa, snli_ve
from petl_ext.demo.digits.write import WRITERS, new_folder, write_digits
from petl_ext.demo.training import one_quiet_thread

SCENES = {"train": 5000, "val": 500, "test": 1000}
QUICK_SCENES = {"train": 160, "val": 40, "test": 40}
TOKENS = 160  # the longest prompt of ScienceQA has 120


def write_for_recipes(output: str | Path, quick: bool = False, seed: int = 0, progress: bool = True) -> str:
    """Writes scenes in the official format of every task and, in `backbone`, the demo's ViLT with a row for every word
    of theirs. The words that it has not seen in its pre-training have random rows.

    Args:
        output: folder that must not exist yet.
        quick: few scenes, to see it run.

    Returns:
        What was written, in words.

    Raises FileExistsError if the folder exists.
    """
    output = Path(output)
    with one_quiet_thread(), new_folder(output) as unfinished:
        scenes = QUICK_SCENES if quick else SCENES
        write_digits(unfinished / "digits", scenes, 2, seed, progress, tuple(WRITERS))
        for path in (unfinished / "digits").iterdir():
            path.rename(unfinished / path.name)
        (unfinished / "digits").rmdir()
        _write_backbone(unfinished / "backbone", seed)
    return f"{output}: {sum(scenes.values()):,} scenes for {', '.join(WRITERS)}, and a ViLT in {output / 'backbone'}"


def _write_backbone(folder, seed):
    model = ViltModel.from_pretrained(BACKBONE)
    processor = ViltProcessor.from_pretrained(BACKBONE)
    words = dict(processor.tokenizer.get_vocab())
    for module in (nlvr2, retrieval, scienceqa, gqa, snli_ve):
        for word in module.WORDS:
            words.setdefault(word, len(words))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        _grow(model, len(words))
    model.save_pretrained(folder)
    processor.tokenizer = BertTokenizer(vocab=words, model_max_length=TOKENS)
    processor.save_pretrained(folder)


def _grow(model, num_words):
    """Rows for new words and positions, as large as those that are there."""
    embeddings = model.embeddings.text_embeddings
    for name, count in (("word_embeddings", num_words), ("position_embeddings", TOKENS)):
        before = getattr(embeddings, name)
        weight = torch.randn(count, before.embedding_dim) * before.weight.std()
        weight[: before.num_embeddings] = before.weight.detach()
        grown = torch.nn.Embedding(count, before.embedding_dim, padding_idx=before.padding_idx, _weight=weight)
        setattr(embeddings, name, grown)
    model.config.vocab_size, model.config.max_position_embeddings = num_words, TOKENS
