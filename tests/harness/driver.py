"""Drive any V1 attention backend the way vLLM's model runner does.

The layer, the config and the cache's spec are vLLM's own (`tests.harness.server`); the builder and
the impl are the backend's. Each candidate works on its own copy of batch and cache.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from fixtures.cases import AttnCase
from fixtures.inputs import AttnInputs
from tests.harness.batch import common_metadata
from tests.harness.memory import check_guards, new_output
from tests.harness.refusals import configuration_reasons, layout_reasons
from tests.harness.server import attention_layer, cache_spec, config_of, in_server, wrapped
from tests.harness.verdicts import Mismatch, Outcome, Refused


@dataclass
class Driver:
    """A candidate set up for one case's shapes: its layer, builder and impl, ready to be called."""

    backend: type[Any]
    case: AttnCase
    device: torch.device
    config: Any = field(repr=False)
    layer: Any = field(repr=False)
    builder: Any = field(repr=False)

    def metadata(self, inputs: AttnInputs, dummy: bool = False) -> Any:
        """The backend's metadata for a batch. dummy: see `common_metadata`."""
        with in_server(self.config):
            return self.builder.build(
                common_prefix_len=0, common_attn_metadata=common_metadata(inputs, dummy)
            )

    def metadata_to_capture(self, inputs: AttnInputs) -> Any:
        """The backend's metadata for a uniform batch whose step is captured in a CUDA graph.

        It states the model's maximum as the longest request, since the graph must serve that too.

        Raises:
            Refused: where the builder says that vLLM must not capture such a batch.
        """
        from vllm.v1.attention.backend import AttentionCGSupport

        single = max(inputs.case.query_lens) == 1
        least = (
            AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
            if single
            else AttentionCGSupport.UNIFORM_BATCH
        )
        support = self.builder.get_cudagraph_support(self.config, self.builder.kv_cache_spec)
        if support.value < least.value:
            raise Refused([f"CUDA graphs: {support.name}"])
        common = common_metadata(inputs, dummy=True)
        common.max_seq_len = self.config.model_config.max_model_len
        with in_server(self.config):
            return self.builder.build_for_cudagraph_capture(common)

    def update_cache(self, inputs: AttnInputs, cache: torch.Tensor) -> None:
        """Write the batch's keys and values, where the backend leaves that to vLLM's layer."""
        if self.backend.forward_includes_kv_cache_update or self.case.kv_sharing:
            return
        if self.case.attention in ("encoder", "cross"):
            return
        with in_server(self.config):
            self.layer.impl.do_kv_cache_update(
                self.layer, inputs.key, inputs.value, cache, inputs.slot_mapping
            )

    def forward(
        self, inputs: AttnInputs, cache: torch.Tensor, metadata: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """One call of the impl's forward; returns the query if the layer quantized it."""
        query, quantized = inputs.query, None
        if self.layer.query_quant is not None:
            query, _ = self.layer.query_quant(query, self.layer._q_scale)
            quantized = query.float() * self.layer._q_scale
        with in_server(self.config):
            self.layer.impl.forward(
                self.layer, query, inputs.key, inputs.value, cache, metadata, output=output
            )
        return quantized

    def run(self, inputs: AttnInputs) -> Outcome:
        """A whole step on the candidate's own copy of batch and cache.

        The outcome's tensors are on the inputs' device.

        Raises:
            Mismatch: see `step`.
        """
        done, to = self.step(inputs.copied(self.device)), inputs.device
        query = None if done.query is None else done.query.to(to)
        return Outcome(done.output.to(to), done.storage.to(to), query, done.given)

    def step(self, given: AttnInputs, metadata: Any = None) -> Outcome:
        """Build, write, attend; the cache is written in place.

        Args:
            metadata: in place of what the builder makes of the batch.

        Raises:
            Mismatch: if the output is written outside its rows, or if the backend raises
                NotImplementedError: it has accepted the layer, and a server would die of it in
                the middle of its service.
        """
        output = new_output(given)
        try:
            metadata = metadata or self.metadata(given)
            self.update_cache(given, given.cache)
            query = self.forward(given, given.cache, metadata, output)
        except NotImplementedError as error:
            raise Mismatch(f"accepted the layer, then refused a batch: {error}") from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        check_guards(output)
        return Outcome(output, given.storage, query, given)


def drive(
    backend: type[Any],
    case: AttnCase,
    device: torch.device,
    sinks: torch.Tensor | None = None,
    config: Any = None,
) -> Driver:
    """Set a backend up for a case.

    Args:
        sinks: [num_heads] in place of the case's own.
        config: a VllmConfig in place of `config_of` the case.

    Raises:
        Refused: with the backend's reasons, from validate_configuration, from the layouts it
            declares, or from its impl's constructor.
    """
    config = config or config_of(case)
    with in_server(config):
        if reasons := configuration_reasons(backend, case, device):
            raise Refused(reasons)
        if reasons := layout_reasons(backend, case):
            raise Refused(reasons)
        used = wrapped(backend, case)
        try:
            layer = attention_layer(used, case, config, device, sinks)
        except (NotImplementedError, ValueError, AssertionError) as error:
            raise Refused([str(error) or type(error).__name__]) from error
        builder = used.get_builder_cls()(cache_spec(case), [layer.layer_name], config, device)
    return Driver(used, case, device, config, layer, builder)
