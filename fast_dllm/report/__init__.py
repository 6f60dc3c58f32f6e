"""`python -m fast_dllm.report`: summaries in; verdict, alarms, statistics and pictures out. No torch, no model."""
