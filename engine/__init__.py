"""Everything under the training script.

The policies, part of the algorithm: policy.py (log-probabilities and sampling by ordinary calls of
the model) and tree.py (the same numbers, each distinct prefix of a batch computed once).
What any run needs: startup.py (checks before the first iteration), run.py, resume.py, metrics.py,
checkpoint.py and files.py (a run that cannot be lost), report.py (the page that replays it),
models.py, prompt.py and problems.py (what is trained, asked and scored), presets.py, machine.py,
distributed.py and cli.py.
"""
