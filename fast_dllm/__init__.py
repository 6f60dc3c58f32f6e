"""Fast-dLLM v2: block-diffusion decoding with layer reuse, and the experiments on it."""

__version__ = "0.1.0"
