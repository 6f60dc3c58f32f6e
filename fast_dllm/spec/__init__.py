"""What a run is: tasks, configurations, defaults, files, hashes and locks. Standard library only, Python 3.8 up."""
