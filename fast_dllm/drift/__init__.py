"""How much what each layer gives changes from one denoising step to the next: measured, drawn, and what it predicts."""
