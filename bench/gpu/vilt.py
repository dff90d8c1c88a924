"""What APT costs a whole model: ViLT-B's encoder on one picture with its question, with and without it."""

import torch
from clock import cuda_clock, race, speed_up
from transformers import ViltConfig, ViltModel

import petl_ext
from gpu.graphs import captured
from gpu.step_log import record

TOKENS = 240
PROMPTS = (50, 200)
CALLS = 5
ROUNDS = 25


def encoder(device, num_prompts=None, **sizes):
    """In bfloat16, with random weights."""
    model = ViltModel(ViltConfig(**sizes)).eval()
    if num_prompts:
        petl_ext.attach(model, petl_ext.APTConfig(num_prompts=num_prompts))
    return model.to(device, torch.bfloat16).encoder


def calls_of(model, hidden):
    def run():
        with torch.no_grad():
            return [model(hidden)[0] for _ in range(CALLS)]

    return run


def ratios(device, capture, clock, rounds=ROUNDS, **sizes):
    """Seconds of a forward call by name, and how many times as long it takes with APT as without."""
    contenders = {"without APT": encoder(device, **sizes)}
    contenders |= {f"{count} prompts": encoder(device, count, **sizes) for count in PROMPTS}
    hidden = torch.randn(1, TOKENS, ViltConfig(**sizes).hidden_size, device=device, dtype=torch.bfloat16)
    replays = {name: capture(calls_of(model, hidden)) for name, model in contenders.items()}
    seconds = race(replays, rounds, clock)
    middle = {name: sorted(of_one)[rounds // 2] / CALLS for name, of_one in seconds.items()}
    return middle, {name: speed_up(seconds, over=name, of="without APT") for name in replays if "prompts" in name}


def main():
    seconds, times_as_long = ratios("cuda", captured, cuda_clock)
    microseconds = {name: round(1e6 * value, 1) for name, value in seconds.items()}
    record("vilt-b encoder", tokens=TOKENS, batch=1, microseconds=microseconds, times_as_long=times_as_long)
    record("summary", text=", ".join(f"{name}: {ratio['median']} x" for name, ratio in times_as_long.items()))


if __name__ == "__main__":
    main()
