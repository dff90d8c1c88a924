"""DAS on the language model of a model that sees: finds layers that a task does not need, and generates without them.

    python examples/vlm_language_das.py                                    # a tiny LLaVA with random weights, offline
    python examples/vlm_language_das.py --model llava-hf/llava-1.5-7b-hf   # a checkpoint; the task stays a toy

The task is that of vlm_vision_apt.py. While the bypasses train, layers of the language model are skipped at random and
a bandit learns which are missed least; these are then removed, and the model generates with a key-value cache as it
does without one.
"""

import argparse

import torch
from vlm_vision_apt import accuracy, answer_loss, draw_stripes, load_model

import petl_ext


def search_layers(model, search, parameters, steps):
    """Trains while the search draws which layers are skipped."""
    train, validation = torch.Generator().manual_seed(0), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        search.sample()
        answer_loss(model, *draw_stripes(model, 16, train)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if search.is_due:
            batch = draw_stripes(model, 16, validation)
            search.update(lambda batch=batch: answer_loss(model, *batch).item())


@torch.no_grad()
def generate(model, use_cache):
    inputs, _ = draw_stripes(model, 4, torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **settings, use_cache=use_cache)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint that LlavaForConditionalGeneration reads")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--num-skip", type=int, default=1)
    options = parser.parse_args(arguments)
    model = load_model(options)
    config = petl_ext.DASConfig(bypass_bottleneck=24, sites="language")
    attachment = petl_ext.attach(model, config, keep=["multi_modal_projector"])
    search = petl_ext.DepthSearch(model, num_skip=options.num_skip, seed=0, warmup_steps=options.steps // 3)
    search_layers(model, search, attachment.parameters(), options.steps)
    skipped = [attachment.layers[index] for index in search.apply(permanent=True)]
    inputs, _ = draw_stripes(model, 1, torch.Generator().manual_seed(3))
    print(attachment.report(inputs=inputs))
    cached, plain = generate(model.eval(), use_cache=True), generate(model, use_cache=False)
    print(f"skipped: {', '.join(skipped)}; accuracy {accuracy(model, seed=1):.1%}")
    print("generated with and without a cache:", "the same" if torch.equal(cached, plain) else "not the same")
    return {"skipped": attachment.skipped, "cached": cached, "plain": plain}


if __name__ == "__main__":
    main()
