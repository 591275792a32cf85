"""Transformers' answers to the prompts, and what it makes of the text, in float32.

python -m tests.engine.real.answers CHECKPOINT DRAFTS.json FILE.json
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tests.engine.engine import Answers
from tests.engine.real import texts

NEW_TOKENS = 64


def greedy(model: Any, prompts: list[list[int]], drafts: list[list[int]]) -> Answers:
    """Greedy answers, each alone, without a cache.

    drafts: tokens that each answer may begin with. One pass over a prompt and its draft shows how
    many drafted tokens are the model's own greedy tokens, and which token follows. The others are
    dropped, so drafts save passes and change no answer.
    """
    tokens, logprobs, margins = [], [], []
    for ids, draft in zip(prompts, drafts, strict=True):
        answer: list[int] = []
        sure: list[float] = []
        ahead: list[float] = []
        while len(answer) < NEW_TOKENS:
            drafted = draft[len(answer) : NEW_TOKENS - 1]
            best = _logprobs(model, ids + answer + drafted)[-len(drafted) - 1 :].topk(2)
            found = best.indices[:, 0].tolist()
            wrong = [n for n, token in enumerate(drafted) if token != found[n]]
            count = wrong[0] + 1 if wrong else len(found)
            answer += found[:count]
            sure += best.values[:count, 0].tolist()
            ahead += (best.values[:count, 0] - best.values[:count, 1]).tolist()
        tokens.append(answer)
        logprobs.append(sure)
        margins.append(ahead)
    return Answers(
        prompts=list(range(len(prompts))), times=[1] * len(prompts), tokens=tokens,
        logprobs=logprobs, margins=margins,
    )  # fmt: skip


def scored(model: Any, text: list[int]) -> tuple[Answers, float]:
    """The logprob of each of a text's tokens, and of the best to follow it; and the largest
    difference of any of them from the same in float64."""
    single = _logprobs(model, text)
    double = _logprobs(model.double(), text)
    model.float()
    best = single[-1].topk(2)
    given = torch.tensor(text)[1:, None]
    answers = Answers(
        prompts=[0], times=[1], tokens=[[int(best.indices[0])]],
        logprobs=[[float(best.values[0])]], margins=[[float(best.values[0] - best.values[1])]],
        prompt_logprobs=[single[:-1].gather(1, given)[:, 0].tolist()],
    )  # fmt: skip
    first, second = (logprobs[:-1].gather(1, given) for logprobs in (single, double))
    return answers, float((first - second).abs().max())


def _logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab_size]: after each token of a sequence."""
    logprobs: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("drafts", type=Path, help="a list of token ids for each prompt")
    parser.add_argument("file", type=Path, help="where the answers go")
    args = parser.parse_args()
    from tests.harness.environment import prepare

    prepare()
    from transformers import AutoModelForCausalLM

    drafts = json.loads(args.drafts.read_text())
    tokenizer = texts.load_tokenizer(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        answers = greedy(model, texts.prompts(tokenizer), drafts)
        text, rounding = scored(model, texts.text(tokenizer))
    content = {
        "answers": dataclasses.asdict(answers),
        "text": dataclasses.asdict(text),
        "rounding": rounding,
    }
    args.file.write_text(json.dumps(content))


if __name__ == "__main__":
    main()
