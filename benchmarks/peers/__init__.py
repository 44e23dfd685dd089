"""This engine and other engines on the same model file, prompts, threads and token counts.

`python -m benchmarks.peers` runs all that are installed, each in a process of its own and one at a
time, prompt by prompt. `contestants.py` knows how each is called, `worker.py` is its process,
`contest.py` decides who runs when, `figures.py` makes numbers of it and `report.py` shows them.
"""
