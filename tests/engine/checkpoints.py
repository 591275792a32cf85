"""Tiny checkpoints of real architectures, and the answers that Transformers gives with them.

    python -m tests.engine.checkpoints FOLDER

Each checkpoint is a folder as Transformers saves it: config, weights by their real names, and for
Whisper what reads its audio. Beside it lie Transformers' greedy answers to `PROMPTS`, computed by
its eager attention in float32, over the whole sequence at each step, without a cache.

Facts that are equal in many served models differ here: the softmax scale is unlike
head_size^-0.5 where the config can say so, the width is unlike num_heads * head_size, and windows
are shorter than the prompts. Weights are drawn so that attention leans on few keys (`draw`).
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.engine.call_faults import KEY_FAULTS
from tests.engine.engine import Answers
from tests.engine.models import SAMPLING_RATE, VOCABULARY, noise, prompt

ANSWERS = "answers.json"
WINDOW = 24
# The lengths lie around blocks of 16 and around the window, and past the token budget of a step
# (64). One more prompt begins like the longest.
LENGTHS = (2, 15, 16, 17, 23, 24, 25, 49, 70, 130)
SHARED = 96
PROMPTS = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
PROMPTS.append(PROMPTS[-1][:SHARED] + prompt(len(LENGTHS), 20))
NEW_TOKENS = 12
# Seed of the first checkpoint's weights; each next checkpoint has the next seed. With these seeds
# no best token is a near tie, which rounding could break.
SEED = 1
# `draw` makes queries, keys and the output of attention longer by this factor.
GAIN = 1.6
ATTENTION = (
    r"(\b[qko]_proj|out_proj|query_key_value|Wqkv|self_attention\.dense|self_attn\.dense)\.weight$"
)
DECODE_FAULT = "newest_key_lost_at_decode"


@dataclass(frozen=True)
class Checkpoint:
    """One tiny model.

    config: the name of its config class in Transformers.
    facts: the arguments of that class.
    features: what its attention has, in words.
    faults: names among `call_faults.FAULTS` that change its answers, beside those of every model.
    layers: how many attention layers vLLM's engine has.
    differs: how vLLM's model or config differs from Transformers' apart from attention, and what
        makes them equal here.
    overrides, implementation: as in `models.Model`.
    adapt: changes Transformers' model so that it computes what vLLM's does.
    audio: how many samples the encoder hears with each prompt.
    """

    config: str
    facts: dict[str, Any]
    features: str
    faults: tuple[str, ...] = ()
    layers: int = 2
    differs: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    implementation: str = ""
    adapt: Callable[[Any], None] = lambda model: None
    audio: tuple[int, ...] = ()

    @property
    def all_faults(self) -> tuple[str, ...]:
        return (*KEY_FAULTS, DECODE_FAULT, *self.faults)


_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
# 6 query heads of 32 over 2 KV heads, where the model's width is 96.
_GROUPED: dict[str, Any] = {
    **_TOKENS, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512,
}  # fmt: skip
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_WINDOWED: dict[str, Any] = {
    **_GROUPED, "sliding_window": WINDOW, "layer_types": [_LOCAL, _GLOBAL],
}  # fmt: skip
_SCALE, _WINDOW, _GROUPS = "scale_of_head_size", "window_one_longer", "kv_heads_in_turns"
_SLOPES = "slopes_of_another_schedule"


def _exact_gelu(model: Any) -> None:
    for block in model.transformer.h:
        block.mlp.gelu_impl = torch.nn.GELU()


CHECKPOINTS: dict[str, Checkpoint] = {
    "llama": Checkpoint(
        "LlamaConfig", {**_GROUPED, "tie_word_embeddings": False},
        "grouped heads, RoPE", (_GROUPS,),
    ),
    "gemma2": Checkpoint(
        "Gemma2Config",
        {
            **_WINDOWED, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        "softcap 3, window in every other layer, scale 12^-0.5 with head size 32",
        (_SCALE, _WINDOW, "softcap_ignored"),
    ),
    "gemma3_text": Checkpoint(
        "Gemma3TextConfig",
        {
            **_WINDOWED, "num_hidden_layers": 3, "layer_types": [_LOCAL, _LOCAL, _GLOBAL],
            "query_pre_attn_scalar": 12,
            "rope_parameters": {
                _LOCAL: {"rope_type": "default", "rope_theta": 1e3},
                _GLOBAL: {"rope_type": "default", "rope_theta": 1e6},
            },
        },
        "local and global layers with RoPE bases of their own, queries and keys normed,"
        " scale 12^-0.5 with head size 32",
        (_SCALE, _WINDOW), layers=3,
    ),
    "gpt_oss": Checkpoint(
        "GptOssConfig", {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "sinks, window in every other layer, YaRN, experts", (_WINDOW, "sinks_ignored"),
    ),
    "granite": Checkpoint(
        "GraniteConfig",
        {
            **_GROUPED, "attention_multiplier": 0.31, "residual_multiplier": 0.4,
            "embedding_multiplier": 6.0, "logits_scaling": 0.7, "tie_word_embeddings": False,
        },
        "scale 0.31 with head size 32 (attention_multiplier)", (_SCALE,),
    ),
    "cohere2": Checkpoint(
        "Cohere2Config", {**_WINDOWED, "logit_scale": 0.7},
        "window and RoPE in every other layer, neither in the others", (_WINDOW,),
        differs="vLLM gives a windowed layer sliding_window + 1 keys, Transformers sliding_window:"
        " vLLM is told one less",
        overrides={"sliding_window": WINDOW - 1},
    ),
    "bloom": Checkpoint(
        "BloomConfig",
        {**_TOKENS, "hidden_size": 192, "n_head": 6, "n_layer": 2},
        "ALiBi, 6 heads: slopes of 4 heads and of 8 in between", (_SLOPES,),
        differs="vLLM computes GELU exactly, Transformers by tanh: Transformers' model is given"
        " the exact one",
        adapt=_exact_gelu,
    ),
    "mpt": Checkpoint(
        "MptConfig",
        {
            **_TOKENS, "d_model": 192, "n_heads": 6, "n_layers": 2, "max_seq_len": 512,
            "attn_config": {"clip_qkv": 2.5, "softmax_scale": 0.29},
        },
        "ALiBi, 6 heads: slopes in MPT's own order; scale 0.29 with head size 32",
        (_SLOPES, _SCALE),
        differs="vLLM has no MPT since 0.28: the model's class is tests/engine/mpt.py",
        implementation="tests.engine.mpt:MptForCausalLM",
    ),
    "mistral": Checkpoint(
        "MistralConfig", {**_GROUPED, "sliding_window": WINDOW},
        "window in every layer, grouped heads", (_WINDOW, _GROUPS),
    ),
    "phi": Checkpoint(
        "PhiConfig", {**_GROUPED, "num_attention_heads": 3, "num_key_value_heads": 3,
        "partial_rotary_factor": 0.5},
        "RoPE in half of each head, through vLLM's Transformers backend",
    ),
    "whisper": Checkpoint(
        "WhisperConfig",
        {
            **_TOKENS, "d_model": 128, "encoder_layers": 1, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 192,
            "decoder_ffn_dim": 192, "num_mel_bins": 16, "max_source_positions": 100,
            "max_target_positions": 512, "decoder_start_token_id": 0,
        },
        "cross attention over 100 encoder positions (no backend serves the encoder itself)",
        ("cross_attention_causal",), layers=4,
        # One to two seconds.
        audio=tuple(SAMPLING_RATE + 1600 * index for index in range(len(PROMPTS))),
    ),
}  # fmt: skip


def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    """`PROMPTS`; those of Whisper begin with the token that starts its decoder.

    vLLM would put that token there.
    """
    if checkpoint.audio:
        return [[checkpoint.facts["decoder_start_token_id"], *ids[1:]] for ids in PROMPTS]
    return PROMPTS


def draw(model: torch.nn.Module, seed: int) -> None:
    """Fill a model's weights in place.

    A matrix has rows of unit expected length, so that a layer's output is as large as its input.
    Queries and keys are longer by `GAIN`, so that the softmax leans on few keys. The output of
    attention is longer by `GAIN` too. Norms and biases vary, so that none can be left out
    unnoticed. A sink weighs as much as a few keys.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("sinks"):
            content = 3.0 + drawn
        elif re.search(r"[qk]_norm\.weight$", name):
            content = parameter + (GAIN - 1.0) + 0.2 * drawn
        elif name.endswith("bias"):
            content = 0.2 * drawn
        elif parameter.dim() == 1:
            content = parameter + 0.2 * drawn
        elif "encoder.embed_positions" in name:
            # Whisper's sinusoids.
            continue
        else:
            # Experts are [expert, in, out], all else [out, in, ...].
            expert = re.search(r"experts\.\w+_proj$", name)
            fan_in = parameter.shape[1] if expert else parameter[0].numel()
            attends = re.search(ATTENTION, name)
            content = drawn * (GAIN if attends else 1.0) * fan_in**-0.5
        parameter.data.copy_(content)


# The rest runs in a process that imports Transformers.


def make(checkpoint: Checkpoint, seed: int, folder: Path) -> Any:
    """Save a checkpoint, and give Transformers' model of it."""
    import transformers

    config = getattr(transformers, checkpoint.config)(**checkpoint.facts)
    kind = (
        transformers.AutoModelForSpeechSeq2Seq
        if checkpoint.audio
        else transformers.AutoModelForCausalLM
    )
    model = kind.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    if checkpoint.audio:
        _audio_processor(config).save_pretrained(folder)
    draw(model, seed)
    model.tie_weights()
    model.save_pretrained(folder)
    checkpoint.adapt(model)
    return model


def _audio_processor(config: Any) -> Any:
    """A Whisper processor: its tokenizer's tokens are words of no meaning."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    # A mel frame each 10 ms, two to a position of the encoder.
    seconds = config.max_source_positions * 2 // 100
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    words = {f"w{token}": token for token in range(2, config.vocab_size)}
    vocabulary = {"<|startoftranscript|>": 0, "<|endoftext|>": 1, **words}
    return WhisperProcessor(features, WhisperTokenizer(vocab=vocabulary, merges=[]))


Logprobs = Callable[[list[int]], torch.Tensor]


def _logprobs(checkpoint: Checkpoint, model: Any) -> Iterator[Logprobs]:
    """One function for each prompt: it gives the logprobs [len(ids), vocab_size] after each token
    of a sequence, computed in the dtype that the model has when it is called."""
    if not checkpoint.audio:
        for _ in PROMPTS:
            yield lambda ids: model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return
    extractor = _audio_processor(model.config).feature_extractor
    for samples in checkpoint.audio:
        sound = noise(samples).numpy()
        heard = extractor(sound, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features

        def heard_logprobs(ids: list[int], heard: torch.Tensor = heard) -> torch.Tensor:
            output = model(
                input_features=heard.to(model.dtype), decoder_input_ids=torch.tensor([ids])
            )
            logprobs: torch.Tensor = output.logits[0].log_softmax(-1)
            return logprobs

        yield heard_logprobs


def answer(checkpoint: Checkpoint, model: Any) -> tuple[Answers, float]:
    """Transformers' greedy answers in float32, and the largest difference of any of their
    positions' logprobs from those of the same model in float64."""
    tokens, logprobs, margins, prompt_logprobs = [], [], [], []
    rounding = 0.0
    for ids, after in zip(prompts(checkpoint), _logprobs(checkpoint, model), strict=True):
        sequence = list(ids)
        for _ in range(NEW_TOKENS):
            sequence.append(int(after(sequence)[-1].argmax()))
        single = after(sequence)
        given = single[:-1].gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].tolist()
        best = single[len(ids) - 1 : -1].topk(2).values
        tokens.append(sequence[len(ids) :])
        prompt_logprobs.append(given[: len(ids) - 1])
        logprobs.append(given[len(ids) - 1 :])
        margins.append((best[:, 0] - best[:, 1]).tolist())
        double = _in_double(model, after, sequence)
        rounding = max(rounding, float((single - double).abs().max()))
    numbers = list(range(len(tokens)))
    answers = Answers(
        prompts=numbers, times=[1] * len(numbers), tokens=tokens, logprobs=logprobs,
        margins=margins, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip
    return answers, rounding


def _in_double(model: Any, after: Logprobs, sequence: list[int]) -> torch.Tensor:
    """The logprobs by the same model in float64; afterwards it is in float32 again."""
    model.double()
    try:
        return after(sequence)
    finally:
        model.float()


def write(folder: Path) -> None:
    """Every checkpoint and its answers, in a folder of its name."""
    for seed, (name, checkpoint) in enumerate(CHECKPOINTS.items(), SEED):
        model = make(checkpoint, seed, folder / name)
        answers, rounding = answer(checkpoint, model)
        content = {"answers": dataclasses.asdict(answers), "rounding": rounding}
        (folder / name / ANSWERS).write_text(json.dumps(content))


def read(folder: Path) -> tuple[Answers, float]:
    """A checkpoint's answers and their rounding, as `write` left them."""
    content = json.loads((folder / ANSWERS).read_text())
    return Answers(**content["answers"]), content["rounding"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    from tests.harness.environment import prepare

    prepare()
    torch.set_num_threads(1)
    with torch.no_grad():
        write(args.folder)


if __name__ == "__main__":
    main()
