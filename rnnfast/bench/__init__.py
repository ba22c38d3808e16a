"""Benchmarks: rnnfast beside torch.nn and other libraries, on the machine at hand. `rnnfast bench --help`.

Whatever is timed is first shown to compute the same numbers. Contestants run in one process and take turns, so that a
drifting clock or a busy neighbour meets them all, and what is quoted is a ratio within a run or a share of a limit that
was measured in the same run.
"""
