"""Check an installed vllm-fox against the tree that it was made from. .ci/release.py runs it, outside that tree.

    PYTHON -I .ci/check_installed.py TREE [--vllm]

PYTHON is that of the environment. The exit code is 1, and a line says why, if a file differs from that of the tree,
is missing or is too much, if anything is imported from the tree, or if an entry point or the command does not work.
With --vllm also if vLLM, which must be there then, does not find the plugin.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import distribution, entry_points
from pathlib import Path


def files_of(tree: Path) -> dict[str, Path]:
    """The files that have to be installed, by the names that they have there."""
    # Path.rglob does not follow the link vllm_fox/kernels, which stands for files that are installed.
    found = {"plugin_setup.py": tree / "plugin_setup.py"}
    for folder, inside in ((tree / "vllm_fox", "vllm_fox"), (tree / "vllm_fox" / "kernels", "vllm_fox/kernels")):
        paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found |= {f"{inside}/{path.relative_to(folder).as_posix()}": path for path in paths}
    return found


def installed_files() -> dict[str, Path]:
    """The files that are installed, without scripts, which are elsewhere, metadata and bytecode."""
    files = distribution("vllm-fox").files or []
    names = [name for name in files if name.parts[0] != ".." and not name.parts[0].endswith(".dist-info")]
    found = {name.as_posix(): Path(str(name.locate())) for name in names if "__pycache__" not in name.parts}
    return {name: path for name, path in found.items() if path.is_file()}


def check_files(tree: Path) -> None:
    wanted, found = files_of(tree), installed_files()
    if wanted.keys() != found.keys():
        raise SystemExit(
            f"missing: {sorted(wanted.keys() - found.keys())}; too much: {sorted(found.keys() - wanted.keys())}"
        )
    for name, path in wanted.items():
        if path.read_bytes() != found[name].read_bytes():
            raise SystemExit(f"{name} is not as in the tree")


def check_imports(tree: Path) -> None:
    import vllm_fox

    site = Path(str(distribution("vllm-fox").locate_file(""))).resolve()
    (plugin,) = entry_points(group="vllm.general_plugins", name="fox")
    register = plugin.load()
    for module in (vllm_fox, sys.modules[register.__module__]):
        path = Path(str(module.__file__)).resolve()
        if not path.is_relative_to(site):
            raise SystemExit(f"{module.__name__} is imported from {path}, not from {site}")
    inside = [path for path in sys.path if path and Path(path).resolve().is_relative_to(tree)]
    if inside:
        raise SystemExit(f"the tree is on the path: {inside}")
    if distribution("vllm-fox").version != vllm_fox.__version__:
        raise SystemExit(f"the metadata say {distribution('vllm-fox').version}, the package {vllm_fox.__version__}")


def run(*words: str) -> str:
    """Run the installed command, and return what it printed."""
    command = [str(Path(sysconfig.get_path("scripts")) / "vllm-fox"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vllm-fox {' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def check_command() -> None:
    text = run("--help")
    if "Usage: vllm-fox" not in text or "\n  inspect " not in text:
        raise SystemExit(f"vllm-fox --help prints {text!r}")
    if (text := run("--version").strip()) != f"vllm-fox {distribution('vllm-fox').version}":
        raise SystemExit(f"vllm-fox --version prints {text!r}")


def check_vllm() -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if "ForgettingTransformerForCausalLM" not in ModelRegistry.get_supported_archs():
        raise SystemExit("vLLM does not know Forgetting Transformers: it did not find the plugin")
    module = type(AutoConfig.for_model("forgetting_transformer")).__module__
    if module != "vllm_fox.families.fox.config":
        raise SystemExit(f"the config of Forgetting Transformers is one of {module}")


def main() -> None:
    tree, *options = sys.argv[1:]
    folder = Path(tree).resolve()
    check_files(folder)
    check_imports(folder)
    check_command()
    if options == ["--vllm"]:
        check_vllm()


if __name__ == "__main__":
    main()
