"""Searches, on a recipe's model and data, what its method needs to know: layers to skip, or where a prompt enters."""

from pathlib import Path
from typing import Any

from petl_ext.hf import SearchCallback
from petl_ext.recipes.recipe import Recipe
from petl_ext.recipes.training import Experiment, begun, run_trainer
from petl_ext.search import DepthSearch, PlacementSearch


def search(
    recipe: Recipe, data: str | Path, output: str | Path, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Runs the search of a recipe to the end, going on from the last complete checkpoint where there is one.

    The folder gets search.json, which the search's `load` reads, a picture, and training.json.

    Returns:
        {"method.skip": layers, "macs": the share of the backbone's that remains} or {"method.insert_layer": layer}:
        settings for the training that follows.

    Raises ValueError or FileNotFoundError for what is wrong with recipe, data or folder, before training starts.
    """
    experiment = Experiment.of(recipe.for_search(), data, searching=True)
    if experiment.splits.validation is None:
        raise ValueError("data.validation or data.held_out must be given for a search, got neither")
    found = _new_search(recipe, experiment)
    callback = SearchCallback(found, experiment.splits.validation, warmup_epochs=recipe.search.warmup_epochs)
    run, arguments = begun(experiment, output, overwrite, progress)
    trainer = experiment.trainer(arguments)
    callback.add_to(trainer)
    measured = run_trainer(trainer, run)
    result = _result(found)
    if arguments.should_save:
        found.save(run.folder / "search.json")
        found.plot(run.folder / "search.png")
        run.finish(measured | {"found": result})
    return result


def _new_search(recipe, experiment):
    given, model, seed = recipe.search, experiment.prepared.model, recipe.training.seed
    if experiment.recipe.model.family.startswith("dvp"):
        return PlacementSearch(model, seed=seed, **given.constants)
    goal = {name: getattr(given, name) for name in ("num_skip", "max_macs") if getattr(given, name) is not None}
    return DepthSearch(model, **goal, inputs=experiment.sample(), seed=seed, **given.constants)


def _result(found):
    if isinstance(found, PlacementSearch):
        return {"method.insert_layer": found.selection()}
    return {"method.skip": list(found.selection()), "macs": round(found.macs(), 4)}
