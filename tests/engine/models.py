"""Random models whose greedy tokens depend on attention: real configs, weights drawn at load.

vLLM's dummy weights are so small that attention is nearly uniform and no fault in it shows. Here
every matrix has rows of unit expected length, so that each layer hands on what it was given at the
same size, and the query's are longer, so that the softmax leans on few keys.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

LOAD_FORMAT = "drawn"
# Few tokens: the best is ahead by more, and an n-gram speculator finds every token in the prompt.
VOCABULARY = 32
# Audio has so many samples a second.
SAMPLING_RATE = 16000


@dataclass(frozen=True)
class Weights:
    """How weights are drawn; everything random comes from the seed.

    query_gain: deviation of attention's logits, and offset what all of them have in common, which
    only a softcap can tell from nothing. embedding: deviation of the embedding's elements, where
    they enter the first layer. logits: of the model's logits.
    """

    seed: int = 0
    query_gain: float = 2.0
    offset: float = 0.0
    embedding: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Model:
    """A model that vLLM serves.

    config: Hugging Face's config.json.
    dtype: the dtype that it is served in.
    weights: how its weights are drawn.
    folder: a checkpoint whose weights vLLM loads; "" if they are drawn.
    overrides: entries of config.json for which vLLM takes other values.
    implementation: "module:class" of the model, if vLLM has none; else "".
    """

    config: Mapping[str, Any]
    dtype: str = "float16"
    weights: Weights = field(default_factory=Weights)
    folder: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    implementation: str = ""

    @property
    def architecture(self) -> str:
        """vLLM's name of the model's class."""
        name: str = self.config["architectures"][0]
        return name

    @property
    def num_layers(self) -> int:
        layers: int = self.config.get("num_hidden_layers") or self.config["n_layer"]
        return layers

    def sized(self, **config: Any) -> "Model":
        """The same with other entries in its config."""
        return replace(self, config={**self.config, **config})

    def save(self, folder: Path) -> str:
        """Return the checkpoint's folder; if there is none, write config.json to a folder, which
        needs no more where weights are drawn, and return that folder."""
        if self.folder:
            return self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        return str(folder)


def _model(architecture: str, model_type: str, /, **config: Any) -> dict[str, Any]:
    # Logits in float32: in bfloat16 every tenth token would be a tie.
    return {
        "architectures": [architecture], "model_type": model_type, "head_dtype": "float32",
        "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1,
        "tie_word_embeddings": False, **config,
    }  # fmt: skip


LLAMA = Model(
    _model(
        "LlamaForCausalLM", "llama", hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_hidden_layers=4,
        max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
    )
)  # fmt: skip
SOFTCAP = 50.0
# Gemma 2's window is 4096: cut, so that prompts of some hundred tokens are past it. Input and
# output share the embedding, so it enters small: each token would otherwise repeat itself.
GEMMA2 = Model(
    _model(
        "Gemma2ForCausalLM", "gemma2", hidden_size=3584, intermediate_size=14336,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, num_hidden_layers=2,
        query_pre_attn_scalar=256, sliding_window=128, attn_logit_softcapping=SOFTCAP,
        final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh", attention_bias=True,
        max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    # vLLM refuses Gemma 2 in float16; few layers, as bfloat16's errors grow from one to the next.
    "bfloat16",
    # Without the cap the softmax would be more than twice as sharp.
    Weights(query_gain=4.0, offset=SOFTCAP, embedding=0.05, logits=6.0),
)  # fmt: skip
STABLELM = Model(
    _model(
        "StableLmForCausalLM", "stablelm", hidden_size=2560, intermediate_size=6912,
        num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=4,
        partial_rotary_factor=0.25, max_position_embeddings=4096, layer_norm_eps=1e-5,
    )
)  # fmt: skip
BLOOM = Model(
    _model(
        "BloomForCausalLM", "bloom", hidden_size=4096, n_head=32, n_layer=4,
        layer_norm_epsilon=1e-5,
    )
)  # fmt: skip
MODELS = {
    "llama-3.1-8b": LLAMA,
    "gemma-2-9b": GEMMA2,
    "stablelm-3b": STABLELM,
    "bloom-7b1": BLOOM,
}


def tiny(model: Model) -> Model:
    """The same model, head size apart in width only, for a CPU."""
    sizes = {
        "llama": {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128,
                  "num_attention_heads": 4, "num_key_value_heads": 2},
        "gemma2": {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4,
                   "num_key_value_heads": 2},
        "stablelm": {"hidden_size": 320, "intermediate_size": 320, "num_attention_heads": 4,
                     "num_key_value_heads": 4},
        "bloom": {"hidden_size": 256, "n_head": 4},
    }  # fmt: skip
    return model.sized(**sizes[model.config["model_type"]])


def prompt(seed: int, length: int, vocab_size: int = VOCABULARY) -> list[int]:
    """Random token ids, none of them the first two, which are special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(2, vocab_size, (length,), generator=generator).tolist()
    return ids


def noise(samples: int) -> torch.Tensor:
    """White noise [samples], each number of samples with a noise of its own."""
    return torch.randn(samples, generator=torch.Generator().manual_seed(samples))


# What follows runs where vLLM is imported.


def loading(model: Model) -> dict[str, Any]:
    """Arguments of vLLM's LLM by which it loads a checkpoint, or draws weights and reads none."""
    if model.folder:
        return {"hf_overrides": dict(model.overrides)}
    _register_loader()
    return {"load_format": LOAD_FORMAT, "model_loader_extra_config": asdict(model.weights)}


@functools.cache
def _register_loader() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class DrawingLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to download."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            draw(model, Weights(**self.load_config.model_loader_extra_config))


def draw(model: torch.nn.Module, weights: Weights) -> None:
    """Fill a model's matrices in place, and its biases with zeros; norms stay as they are built."""
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    tied = not any(isinstance(module, ParallelLMHead) for module in model.modules())
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(weights.seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.data.zero_()
                if weights.offset and isinstance(module, QKVParallelLinear):
                    # In the dimension that RoPE hardly turns: 1e-4 a token.
                    heads = parameter.data.unflatten(0, (-1, module.head_size))
                    shared = slice(module.num_heads + module.num_kv_heads)
                    heads[shared, module.head_size // 2 - 1] = (
                        weights.offset * module.head_size**0.5
                    ) ** 0.5
            elif parameter.dim() == 2:
                columns = parameter.shape[1]
                # In float32 whatever the model's dtype: weights of two dtypes differ by rounding.
                content = torch.randn(
                    parameter.shape, generator=generator, device=device, dtype=torch.float32
                )
                if not isinstance(module, VocabParallelEmbedding):
                    content *= columns**-0.5
                elif isinstance(module, ParallelLMHead):
                    content *= weights.logits * columns**-0.5
                else:
                    # Gemma multiplies its tied embedding by the root of its width.
                    content *= weights.embedding * (columns**-0.5 if tied else 1.0)
                if isinstance(module, QKVParallelLinear):
                    queries = content[: module.num_heads * module.head_size]
                    queries *= weights.query_gain
                    # All ranks draw the same, as keys that they share must be; their heads differ.
                    queries.copy_(queries.roll(module.tp_rank, 1))
                parameter.data.copy_(content)
    if tied:
        # The last norm makes the logits as large as they shall be; Gemma's weight is one less.
        last = model.get_parameter("model.norm.weight")
        last.data.fill_(weights.logits / weights.embedding - 1.0)
