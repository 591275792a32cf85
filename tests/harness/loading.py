"""Load the backend that --candidate names. Each complaint is one line."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from xfv1.wording import cause, did_you_mean, shown

XFV1 = "xfv1.backend:XFormersAttentionBackend"


class CandidateError(ValueError):
    """--candidate names nothing that can be tested; the message says why."""


def named(name: str) -> tuple[str, str]:
    """Module and class that ``--candidate`` names: "xfv1", or "package.module:Class".

    Raises:
        CandidateError: for another form.
    """
    module_name, _, class_name = (XFV1 if name == "xfv1" else name).partition(":")
    if module_name and module_name[0] != "." and class_name.isidentifier():
        return module_name, class_name
    # vLLM's own settings have a dot before the class.
    dotted = [":".join(name.rsplit(".", 1))] if "." in name and ":" not in name else []
    near = did_you_mean(name, ("xfv1", *dotted))
    raise CandidateError(f"--candidate={name}: expected xfv1 or package.module:Class{near}")


def load_candidate(name: str) -> type[Any]:
    """The backend class that ``--candidate`` names.

    Raises:
        CandidateError: one clear line, for a wrong form, an import error, a missing name, a class
            that is no AttentionBackend, or one that does not say its name, impl and builder.
    """
    module_name, class_name = named(name)
    with _explained(f"--candidate={name}: cannot import {module_name}"):
        module = importlib.import_module(module_name)
    with _explained(f"--candidate={name}: {module_name} gives no {class_name}"):
        candidate = getattr(module, class_name, None)
    if candidate is None:
        near = did_you_mean(class_name, dir(module))
        raise CandidateError(f"--candidate={name}: {module_name} has no {class_name}{near}")
    from vllm.v1.attention.backend import AttentionBackend

    if not (isinstance(candidate, type) and issubclass(candidate, AttentionBackend)):
        raise CandidateError(f"--candidate={name}: {class_name} is no subclass of AttentionBackend")
    _check_methods(name, candidate)
    return candidate


def _check_methods(name: str, candidate: type[Any]) -> None:
    """A backend says its name, and the classes of its impl and its builder."""
    for method, kind, needs in (
        ("get_name", str, ()),
        ("get_impl_cls", type, ("forward",)),
        ("get_builder_cls", type, ("build",)),
    ):
        with _explained(f"--candidate={name}: {method}() raises"):
            answer = getattr(candidate, method)()
        if not isinstance(answer, kind):
            wanted = "a name" if kind is str else "a class"
            raise CandidateError(
                f"--candidate={name}: {method}()={shown(answer)}: expected {wanted}"
            )
        absent = {need for need in needs if not callable(getattr(answer, need, None))}
        absent |= getattr(answer, "__abstractmethods__", frozenset())
        if absent:
            methods = ", ".join(sorted(absent))
            raise CandidateError(f"--candidate={name}: {method}()={shown(answer)} has no {methods}")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever a candidate raises, but an interrupt by the user, into a CandidateError."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise CandidateError(f"{what}: {cause(error)}") from error
