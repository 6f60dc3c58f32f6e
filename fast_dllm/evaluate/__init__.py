"""lm-evaluation-harness: the adapter, scoring, tasks and processes. The only package that imports lm_eval."""
