"""A case's batch, described as vLLM's model runner describes it to every backend."""

import dataclasses
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs


def common_metadata(inputs: AttnInputs, dummy: bool = False) -> Any:
    """vLLM's CommonAttentionMetadata of a batch, with the fields that the installed vLLM has.

    Args:
        dummy: whether the batch is vLLM's own dummy batch, in which no request is a prompt's.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    case = inputs.case
    # The host keeps its own copies: a test may write to the batch's tensors later.
    starts_cpu = inputs.query_start_loc.to("cpu", copy=True)
    lengths_cpu = inputs.seq_lens.to("cpu", copy=True)
    cross = case.attention == "cross"
    query_lens = starts_cpu[1:] - starts_cpu[:-1]
    # The decoder's own lengths. With cross attention nothing is cached for the decoder before the
    # first step, which this is.
    own = query_lens if cross else lengths_cpu
    # A graph's batch counts its padding as tokens; other batches do not.
    rows = inputs.query.shape[0] if case.pad_reqs else case.num_tokens
    positions = [
        torch.arange(int(k) - int(q), int(k)) for q, k in zip(query_lens, own, strict=True)
    ]
    prefilling, bound = _known_to_the_host(case, query_lens, own)
    if dummy:
        prefilling = torch.zeros_like(prefilling)
    fields: dict[str, Any] = {
        "query_start_loc": inputs.query_start_loc,
        "query_start_loc_cpu": starts_cpu,
        # The batch's own tensor: a captured graph reads what is written to it later.
        "seq_lens": own.to(inputs.seq_lens.device) if cross else inputs.seq_lens,
        "_seq_lens_cpu": None if case.drafts else own,
        "seq_lens_cpu_upper_bound": bound,
        "num_reqs": inputs.num_reqs,
        "num_actual_tokens": rows,
        "max_query_len": max(case.query_lens),
        "max_seq_len": int(bound.max()),
        "block_table_tensor": inputs.block_table,
        "slot_mapping": inputs.slot_mapping[:rows],
        "causal": case.attention != "noncausal",
        "positions": torch.cat(positions).to(inputs.seq_lens.device),
        "is_prefilling": prefilling,
    }
    if cross:
        fields["encoder_seq_lens"] = inputs.seq_lens
        fields["encoder_seq_lens_cpu"] = lengths_cpu.numpy()
    known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
    return CommonAttentionMetadata(**{k: v for k, v in fields.items() if k in known})


def _known_to_the_host(
    case: AttnCase, query_lens: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which requests are still in their prompts, and upper bounds on the lengths, both [num_reqs].

    With drafts only the device knows how many of the step before were accepted. The host assumes
    that all were: the bounds of requests past their prompts are higher by the rejected drafts.
    """
    if not case.drafts:
        return query_lens > 1, seq_lens
    prefilling = (query_lens > 1 + case.drafts) | ((query_lens == seq_lens) & (seq_lens > 0))
    rejected = torch.arange(len(seq_lens), dtype=seq_lens.dtype).flip(0) % (1 + case.drafts)
    bound = torch.where(prefilling | (query_lens == 0), seq_lens, seq_lens + rejected)
    return prefilling, bound
