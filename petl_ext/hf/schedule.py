"""When a search begins to compare and when it ends, in epochs of the training."""

import math


def check_epochs(name, epochs, steps):
    """Raises ValueError unless `epochs` is None, or a number of 0 or more where the search's own `steps` are None."""
    if epochs is None:
        return
    if type(epochs) not in (int, float) or not 0 <= epochs < math.inf:
        raise ValueError(f"SearchCallback: {name}_epochs must be a number of 0 or more, got {epochs!r}")
    if steps is not None:
        raise ValueError(f"SearchCallback: {name}_epochs={epochs}, but the search has {name}_steps={steps}")


def set_schedule(search, warmup_epochs, search_epochs, train_dataloader):
    """Gives a search that has not begun its warmup_steps and search_steps, where it has none of its own.

    Raises:
        ValueError: the training data have no length, or the search would end before its first update.
    """
    constants = search.constants
    warmup, end = constants.warmup_steps, constants.search_steps
    if warmup is None:
        epochs = constants.default_warmup_epochs if warmup_epochs is None else warmup_epochs
        warmup = _micro_batches(epochs, train_dataloader, "warmup", search)
    if search_epochs is not None:
        end = _micro_batches(search_epochs, train_dataloader, "search", search)
    try:
        search.schedule(warmup, end)
    except ValueError as error:
        raise ValueError(
            f"SearchCallback: {error}; change warmup_epochs (now {warmup_epochs!r}) or search_epochs (now "
            f"{search_epochs!r}), or those constants of the search"
        ) from error


def check_time(search, args, state):
    """Raises ValueError where the training ends before the first update."""
    if search.finished or search.history:
        return
    constants = search.constants
    # At most: the last optimizer step of an epoch may have fewer micro-batches.
    end = search.step + (state.max_steps - state.global_step) * args.gradient_accumulation_steps
    if end < constants.first_update:
        raise ValueError(
            f"SearchCallback: training ends at micro-batch {end}, but the first update comes with micro-batch "
            f"{constants.first_update} (warmup_steps={constants.warmup_steps}, interval={constants.interval}), so "
            "nothing would be found; train for more epochs, or give a smaller warmup_epochs or interval"
        )


def _micro_batches(epochs, train_dataloader, name, search):
    try:
        return round(epochs * len(train_dataloader)) if epochs else 0
    except TypeError as error:
        raise ValueError(
            f"SearchCallback: the training data have no length, so {name}_epochs has no meaning; "
            f"give {search.name}({name}_steps=...)"
        ) from error
