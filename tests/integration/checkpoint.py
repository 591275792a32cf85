"""A small checkpoint on disk, as `transformers` writes it: what any server loads."""

from pathlib import Path

VOCABULARY = 128


def save_llama(folder: Path, *, layers: int, seed: int = 0) -> Path:
    """Write a random Llama in float32 and a tokenizer of words w0, w1, ... to a folder.

    Its weights let attention matter: see `tests.integration.models`.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            deviation *= 2.0 if "q_proj" in name else 1.0
            parameter.data.normal_(std=deviation, generator=generator)
    model.save_pretrained(folder)

    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2"
    ).save_pretrained(folder)
    return folder
