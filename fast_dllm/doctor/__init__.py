"""`python -m fast_dllm.doctor`: what would make a job fail, before it waits in a queue."""
