"""What app.py shows and the state behind it: cells, layers, a comparison, controls, turns."""
