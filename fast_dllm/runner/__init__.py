"""What sbatch/*.sh ask: configurations, tasks, summaries, states, failures. Standard library alone, Python 3.8 up.

The scripts call `python3 -m fast_dllm.runner` (__main__.py) with whatever python3 a login node has, before any venv is
there; eval.py, the doctor and the report import the same modules, so that a configuration, a task and a default are
described once.
"""
