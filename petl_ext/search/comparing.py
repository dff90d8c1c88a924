"""Measures options of a search on validation data, on one process or several, and makes rewards of the measures."""

import logging
import math
from contextlib import contextmanager

import torch
import torch.distributed as dist

logger = logging.getLogger("petl_ext")


def measured(search, options, compute):
    """What `compute` returns with each option in the model, averaged over the processes: one float per option.

    Equal options are measured once. Afterwards the model's option, torch's generators and the modules' training flags
    are as they were, after an exception too.

    Raises:
        RuntimeError: the processes have drawn different options.
        TypeError: `compute` returns no number.
    """
    different = list(dict.fromkeys(options))
    values = _mean_over_processes(search, options, _measured_here(search, different, compute))
    return [values[different.index(option)] for option in options]


def rewards_of(search, values):
    """A finite number for each measured value, larger for a better option."""
    rewards = [_reward_of(search, value) if math.isfinite(value) else None for value in values]
    # NaN must not be the best, even where all rewards are negative.
    lowest = min([0.0, *(reward for reward in rewards if reward is not None)])
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        names = (search.name, search.step, search.choice.measure_name, wrong, lowest)
        logger.warning("%s: step %d: a %s is %s; its reward is %s", *names)
    return [lowest if reward is None else reward for reward in rewards]


def check_callable(name, argument, value):
    """Raises TypeError where the value of this argument cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}: {argument} must be a function, got {value!r}")


def _measured_here(search, options, compute):
    model, devices = search.model, _cuda_devices(search.model)
    values = []
    with _as_it_was(search.choice):
        if search.constants.evaluation_mode == "eval":
            model.eval()
        for option in options:
            search.choice.choose(option)
            with torch.no_grad(), torch.random.fork_rng(devices, device_type="cuda"):
                values.append(_number_of(compute(), f"{search.name}: compute_{search.choice.measure_name}"))
    return values


@contextmanager
def _as_it_was(choice):
    training = {module: module.training for module in choice.model.modules()}
    chosen = choice.chosen()
    choice.choose(chosen)  # a model that refuses an option does so here, before anything has changed
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        choice.choose(chosen)


def _cuda_devices(model):
    if not torch.cuda.is_initialized():
        return set()
    return {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}


def _mean_over_processes(search, options, values):
    group = search.process_group
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return values
    everyones = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, (options, search.bandit.preferences, values), group)
    if any(other[:2] != everyones[0][:2] for other in everyones):
        raise RuntimeError(
            f"{search.name}: the processes have drawn different {search.choice.options_key}; give each the same seed "
            "and call sample and update equally often"
        )
    return [_mean(each) for each in zip(*(other[2] for other in everyones), strict=True)]


def _mean(values):
    # fsum rounds once, so that the order of the processes does not matter; it refuses inf - inf.
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _reward_of(search, value):
    try:
        reward = _number_of(search.reward(value), f"{search.name}: reward")
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        raise ValueError(
            f"{search.name}: the reward of the {search.choice.measure_name} {value} is {reward}; give another "
            "reward=..."
        )
    return reward


def _number_of(value, function):
    """The float that a function has returned, also as a tensor; any other thing raises TypeError."""
    several = isinstance(value, torch.Tensor) and value.numel() != 1
    if several or isinstance(value, str):
        found = f"a tensor of shape {tuple(value.shape)}" if several else repr(value)
        raise TypeError(f"{function} must return one number, got {found}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must return one number, got {value!r}") from error
