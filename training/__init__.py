"""The recipe of models/tiny: a small block-diffusion model that answers toy_math and toy_choice."""
