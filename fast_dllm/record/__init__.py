"""What a run leaves: its summary, what each question got, the answers so far, shards. Standard library only."""
