"""The checkpoint's configuration, under the `model_type` it was published with."""

from __future__ import annotations

from transformers import PreTrainedConfig


class FastDLLMConfig(PreTrainedConfig):
    """Sizes and constants of a Fast-dLLM v2 network (arXiv 2509.26328; Qwen2.5 with block-causal attention).

    The field names are the published `config.json`'s. `bd_size` is the block length the model was trained with,
    in tokens; `single_turn` (ours): each question stands alone, interfaces send no earlier turns. Raises ValueError for
    sizes that do not fit together or a RoPE scaling that the network lacks.
    """

    model_type = "Fast_dLLM_Qwen"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    bd_size: int = 32
    single_turn: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if kwargs.get("rope_scaling") or kwargs.get("use_sliding_window"):
            raise ValueError("Fast_dLLM_Qwen has neither RoPE scaling nor sliding-window attention")
        kwargs.pop("rope_scaling", None)  # null in the published file; transformers 5 warns about the very name
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads} and "
                f"num_key_value_heads {self.num_key_value_heads} must each divide the one before"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported; the network uses 'silu'")
        if self.bd_size < 1:
            raise ValueError(f"bd_size must be at least 1, not {self.bd_size}")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads
