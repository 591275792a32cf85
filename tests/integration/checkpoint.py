"""A small random checkpoint whose greedy tokens depend on attention."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Checkpoint:
    """A Llama, or a Mistral where it has a window. Everything random comes from the seed.

    query_gain: factor on the query projection; the logits' standard deviation. A sharper softmax
    leans on few keys, so that one key wrong moves the output.
    """

    seed: int = 0
    num_layers: int = 2
    hidden_size: int = 256
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    intermediate_size: int = 256
    vocab_size: int = 96
    sliding_window: int | None = None
    max_position_embeddings: int = 1024
    query_gain: float = 2.0

    @property
    def architecture(self) -> str:
        """vLLM's name of the model's class."""
        return "LlamaForCausalLM" if self.sliding_window is None else "MistralForCausalLM"

    def config(self) -> dict[str, object]:
        """Hugging Face's config.json."""
        windowed = self.sliding_window is not None
        return {
            "model_type": "mistral" if windowed else "llama",
            "architectures": [self.architecture],
            "hidden_size": self.hidden_size,
            "head_dim": self.head_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_hidden_layers": self.num_layers,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "sliding_window": self.sliding_window,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name in the checkpoint: float32, rows of unit expected length."""
        generator = torch.Generator().manual_seed(self.seed)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
            scale = gain * columns**-0.5
            return torch.randn(rows, columns, generator=generator).mul_(scale)

        hidden, heads = self.hidden_size, self.num_heads * self.head_size
        kv_heads = self.num_kv_heads * self.head_size
        tensors = {
            "model.embed_tokens.weight": torch.randn(self.vocab_size, hidden, generator=generator),
            "model.norm.weight": torch.ones(hidden),
            "lm_head.weight": matrix(self.vocab_size, hidden),
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            tensors |= {
                f"{prefix}.input_layernorm.weight": torch.ones(hidden),
                f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
                f"{prefix}.self_attn.q_proj.weight": matrix(heads, hidden, self.query_gain),
                f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads, hidden),
                f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads, hidden),
                f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads),
                f"{prefix}.mlp.gate_proj.weight": matrix(self.intermediate_size, hidden),
                f"{prefix}.mlp.up_proj.weight": matrix(self.intermediate_size, hidden),
                f"{prefix}.mlp.down_proj.weight": matrix(hidden, self.intermediate_size),
            }
        return tensors

    def save(self, folder: Path) -> Path:
        """Write config.json and model.safetensors into a folder, made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1))
        save_file(self.weights(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def prompt(seed: int, length: int, vocab_size: int = Checkpoint.vocab_size) -> list[int]:
    """Random token ids, none of them the first two, which are special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(2, vocab_size, (length,), generator=generator).tolist()
    return ids
