"""The short table at the end."""


def of_step(entry):
    seconds = f"{entry['seconds']:6.1f} s of {entry['expected_seconds']:.0f} expected"
    return f"{entry['name']:18} {entry['verdict']:10} {seconds}  {entry['why']}".rstrip()


def _of_goals(comparison):
    return ", ".join(
        f"{name} {goal['reached']:.2f} of {goal['goal']:.2f} {'met' if goal['met'] else 'NOT met'}"
        for name, goal in comparison.get("goals", {}).items()
    )


def triton_in_words(comparison):
    """Where a page of Triton beats our kernels; "" where it does not, or did not run."""
    ratio = comparison.get("speed_up", {}).get("vs triton")
    return f"Triton is faster, {1 / ratio['median']:.2f} times" if ratio and ratio["median"] < 1 else ""


def of_comparison(comparison):
    if "microseconds" not in comparison:
        return f"{comparison['name']:62} not measured: {comparison['failures']}"
    ratios = "  ".join(f"{name} {ratio['median']:5.2f}" for name, ratio in comparison["speed_up"].items())
    words, bound = triton_in_words(comparison), comparison["bound_microseconds"]
    return (
        f"{comparison['name']:62} {comparison['microseconds']['ours']:8.1f} us"
        f"{f' (counted {bound})' if bound else ''}  {ratios}  "
        f"own traffic {comparison['own_gigabytes_per_second']:6.0f} GB/s = {comparison['share_of_own']:.2f} of a copy"
        f"{'  WRONG' if comparison['wrong'] else ''}{f'  {words}' if words else ''}"
    )


def lines(document):
    comparisons = [
        record for step in document["steps"] for record in step["records"] if record["topic"] == "comparison"
    ]
    goals = [(comparison["name"], _of_goals(comparison)) for comparison in comparisons]
    return [
        *(of_comparison(comparison) for comparison in comparisons),
        *(f"goals: {name}: {text}" for name, text in goals if text),
        *(of_step(step) for step in document["steps"]),
    ]
