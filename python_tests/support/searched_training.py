"""A depth search of a small ViLT, trained with SearchCallback."""

from tiny_vilt import make_model
from transformers import Trainer
from vilt_training import Questions, make_arguments

import petl_ext
from petl_ext.hf import SearchCallback
from petl_ext.search import DepthSearch

LAYERS = 5


def make_search(num_skip=2, **arguments):
    model = make_model(num_hidden_layers=LAYERS)
    petl_ext.attach(model, petl_ext.DASConfig(bottleneck=4), keep=["classifier", "vilt.pooler"])
    return DepthSearch(model, num_skip, **{"interval": 3, "seed": 1, **arguments})


def train(folder, search, callback=None, recorders=(), train_size=8, resume=None, **changes):
    model = search.model
    callback = callback or SearchCallback(search, Questions(model, 6, seed=2))
    trainer = Trainer(
        model,
        make_arguments(folder, **changes),
        train_dataset=Questions(model, train_size),
        eval_dataset=Questions(model, 4, seed=3),
        callbacks=[callback, *recorders],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
