"""Complete one prompt and a batch: `python examples/generate.py [MODEL]`."""

import sys

from medusa_ext import Engine


def main() -> None:
    """Print texts and how many tokens each pass over the weights gave."""
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    with Engine(model) as engine:
        question = [{"role": "user", "content": "Why is the sky blue?"}]
        result = engine.generate(question, max_new_tokens=64)
        print(result.text)
        print(
            f"-- {len(result.token_ids)} tokens in {result.stats.steps} steps, "
            f"{result.stats.decode_tokens_per_s:.1f} tokens/s"
        )

        # A batch may mix text, messages and ids; with a seed, sampling repeats itself.
        prompts = ["The capital of France is", "One, two, three,"]
        results = engine.generate(prompts, max_new_tokens=16, temperature=0.7, seed=1)
        for prompt, result in zip(prompts, results, strict=True):
            print(f"-- {prompt}{result.text!r}")


if __name__ == "__main__":
    main()
