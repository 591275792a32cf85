"""A small checkpoint on disk, as `transformers` writes it: what any server loads."""

from pathlib import Path

VOCABULARY = 128


def save_llama(
    folder: Path,
    *,
    layers: int,
    dtype: str = "float32",
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    seed: int = 0,
) -> Path:
    """Write a random Llama and a tokenizer of words w0, w1, ... to a folder.

    Its weights let attention matter: see `tests.engine.models`.

    Args:
        heads: of queries, and of keys and values.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width = heads[0] * head_size
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width,
        num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1],
        head_dim=head_size, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, dtype=dtype,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            deviation *= 2.0 if "q_proj" in name else 1.0
            parameter.data.normal_(std=deviation, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)

    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2"
    ).save_pretrained(folder)
    return folder
