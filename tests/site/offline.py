"""A user's script: vLLM's engine, in processes of its own, answers prompts.

    python -m offline request.json answer.json

request.json: "engine", the arguments of vLLM's LLM; "prompts", lists of token ids; "max_tokens";
"before", methods of `observed.Worker` to call first, each with its arguments. answer.json: tokens
and logprobs of each answer, and what each worker says of itself.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**request["engine"], worker_extension_cls="observed.Worker")
    for method, arguments in request["before"].items():
        llm.collective_rpc(method, args=tuple(arguments))
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=2
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False
    )
    answer = {
        "pid": os.getpid(),
        "workers": llm.collective_rpc("attention"),
        "answers": [_answer(output.outputs[0]) for output in outputs],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


def _answer(output: Any) -> dict[str, Any]:
    steps = [sorted((e.logprob for e in step.values()), reverse=True) for step in output.logprobs]
    return {
        "tokens": list(output.token_ids),
        "logprobs": [
            step[token].logprob
            for token, step in zip(output.token_ids, output.logprobs, strict=True)
        ],
        "margins": [step[0] - step[1] for step in steps],
    }


if __name__ == "__main__":
    main()
