"""The network: model, cache, kernels, recorded and compiled forwards, tokenizer."""
