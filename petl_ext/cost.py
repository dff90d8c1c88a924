"""What a method costs: parameters trained and multiply-accumulates added, as the papers count them.

MACs are those of the added branch alone, for one sequence of `tokens` rows and a batch of one: what does not depend on
the input, such as APT's keys, is computed once per batch and shared by the whole of it.
"""


def count_parameters(model):
    """(parameters that require gradients, all parameters) of `model`, shared ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def apt_parameters(dim, num_prompts, rank):
    """Of one layer: prompts [P, D], down [r, D], up [D, r] and log_scale [1]."""
    return num_prompts * dim + 2 * rank * dim + 1


def apt_macs(tokens, dim, num_prompts, rank):
    """Of one layer: scores and their product with the prompts, 2 N P D, and the keys, 2 P r D."""
    return 2 * tokens * num_prompts * dim + 2 * num_prompts * rank * dim


def deep_prompt_parameters(dim, num_prompts):
    """Of one layer: prompts [P, D]."""
    return num_prompts * dim


def deep_prompt_macs(tokens, dim, num_prompts, projections=2):
    """Of one layer: the prompts' projections, P D^2 each, and N queries' attention to P more rows, 2 N P D.

    Args:
        projections: 2, key and value, is what petl_ext computes. The published total counts 3: it projects the
            prompts to queries as well and drops them.
    """
    return projections * num_prompts * dim**2 + 2 * tokens * num_prompts * dim
