"""MPT for vLLM: vLLM had it until 0.27, and Transformers' MPT does not go through vLLM's attention.

vLLM takes such a model from whoever registers a class for its architecture. The attention layer is
vLLM's, so that an attention backend serves it; all else is PyTorch's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import AutoWeightsLoader


class MptAttention(nn.Module):
    def __init__(self, config: Any, cache_config: Any, prefix: str) -> None:
        super().__init__()
        self.num_heads = config.n_heads
        self.head_size = config.d_model // config.n_heads
        self.clip = config.attn_config.clip_qkv
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        # [num_heads, 1, 2]: the bias of the key before a query, and of its own.
        bias = build_mpt_alibi_tensor(self.num_heads, 2, config.attn_config.alibi_bias_max)
        self.attn = Attention(
            self.num_heads,
            self.head_size,
            config.attn_config.softmax_scale or self.head_size**-0.5,
            alibi_slopes=(-bias[:, 0, 0]).tolist(),
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = self.Wqkv(hidden)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        out: torch.Tensor = self.out_proj(self.attn(*qkv.chunk(3, dim=-1)))
        return out


class MptBlock(nn.Module):
    def __init__(self, config: Any, cache_config: Any, prefix: str) -> None:
        super().__init__()
        width = config.d_model
        self.norm_1 = nn.LayerNorm(width, config.layer_norm_epsilon, bias=False)
        self.attn = MptAttention(config, cache_config, f"{prefix}.attn")
        self.norm_2 = nn.LayerNorm(width, config.layer_norm_epsilon, bias=False)
        self.ffn = nn.ModuleDict({
            "up_proj": nn.Linear(width, 4 * width, bias=False),
            "down_proj": nn.Linear(4 * width, width, bias=False),
        })  # fmt: skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm_1(hidden))
        wide = nn.functional.gelu(self.ffn["up_proj"](self.norm_2(hidden)))
        down: torch.Tensor = self.ffn["down_proj"](wide)
        return hidden + down


class MptModel(nn.Module):
    def __init__(self, config: Any, cache_config: Any, prefix: str) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            MptBlock(config, cache_config, f"{prefix}.blocks.{index}")
            for index in range(config.n_layers)
        )
        self.norm_f = nn.LayerNorm(config.d_model, config.layer_norm_epsilon, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        normed: torch.Tensor = self.norm_f(hidden)
        return normed


class MptForCausalLM(nn.Module):
    """For one rank, with the output tied to the embedding, as every MPT has it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        name = f"{prefix}.transformer" if prefix else "transformer"
        self.transformer = MptModel(config, vllm_config.cache_config, name)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.transformer.wte(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.transformer(input_ids)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.transformer.wte.weight)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        return loaded
