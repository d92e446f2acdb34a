"""Build a release of the commit that is checked out, and check it as a user would get it. `make release` calls it.

    PIP_ARGS= python .ci/release.py DIST VLLM_PYTHON

DIST is emptied and gets the wheel, the sdist, a bill of materials of the wheel (CycloneDX) and SHA256SUMS. All is
built from an export of the commit, so that no other file can get into it, with the build backend that is installed
beside this Python. VLLM_PYTHON is the Python of an environment with vLLM.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = Path(__file__).with_name("check_installed.py")


def say(text: str) -> None:
    print(f"release: {text}", flush=True)


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Run a program and return what it printed.

    Raises:
        SystemExit: it failed. The message has all that it printed.
    """
    words = [str(word) for word in command]
    # Of a tree on PYTHONPATH a program would import that instead of what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        words, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise SystemExit(f"{text}\nrelease: {shlex.join(words)} ended with {done.returncode}.")
    return text


def version_of(tree: Path) -> str:
    """Return the version of a tree.

    Raises:
        SystemExit: the changelog does not begin with that version.
    """
    text = (tree / "vllm_fox" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    (newest, *_) = re.findall(r"^## (\S+)", (tree / "CHANGELOG.md").read_text(), re.MULTILINE)
    if newest != version:
        raise SystemExit(
            f"release: vllm_fox/__init__.py says {version}, and CHANGELOG.md begins with {newest}: make them agree."
        )
    return str(version)


def export(folder: Path) -> tuple[Path, str]:
    """Write the files of the commit that is checked out, and return their folder and the time of the commit.

    Raises:
        SystemExit: files are not committed, so what is built would not be what is there.
    """
    if changed := run("git", "status", "--porcelain", cwd=ROOT):
        raise SystemExit(f"{changed}release: these files are not as in the commit: commit them, or put them away.")
    archive, tree = folder / "tree.tar", folder / "tree"
    # The modes that files have in an unpacked sdist, so that both give the same wheel.
    run("git", "-c", "tar.umask=0022", "archive", "--output", archive, "HEAD", cwd=ROOT)
    unpack(archive, tree)
    return tree, run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def build(kind: str, tree: Path, output: Path, epoch: str) -> Path:
    """Build a ``kind`` ("sdist" or "wheel") of a tree and return its file. Times in it are ``epoch`` (seconds)."""
    words = ("--no-isolation", f"--{kind}", "--outdir", output, tree)
    run(sys.executable, "-m", "build", *words, SOURCE_DATE_EPOCH=epoch)
    (made,) = output.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def build_both(tree: Path, work: Path, epoch: str) -> tuple[Path, Path]:
    """Build sdist and wheel, and return them.

    Raises:
        SystemExit: the wheel that a user would build from the sdist is not the same, byte for byte.
    """
    sdist = build("sdist", tree, work / "sdist", epoch)
    unpack(sdist, work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()
    again = build("wheel", unpacked, work / "again", epoch)
    wheel = build("wheel", tree, work / "wheel", epoch)
    if again.name != wheel.name or again.read_bytes() != wheel.read_bytes():
        raise SystemExit(f"release: {wheel.name} differs when it is built from {sdist.name}.")
    return sdist, wheel


def install(package: Path, folder: Path, *options: str) -> Path:
    """Make an environment of its own for a wheel or sdist, without pip, and return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check")
    run(*pip, *options, package, cwd=folder)
    return python


def lend(python: Path, lender: Path) -> None:
    """Let an environment import what it does not have from that of the Python ``lender``."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, site = (Path(run(one, "-I", "-c", code).strip()) for one in (python, lender))
    (own / "lent.pth").write_text(f"{site}\n")


def check(python: Path, tree: Path, *options: str) -> None:
    """Run check_installed.py in an environment, outside the tree."""
    run(python, "-I", CHECK, tree, *options, cwd=python.parent, VLLM_LOGGING_LEVEL="ERROR")


def write_bill(python: Path, tree: Path, wheel: Path, version: str, path: Path, epoch: str) -> int:
    """Write the bill of materials of an environment that has only the wheel; return how many packages it needs."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    words = ("--pyproject", tree / "pyproject.toml", "--mc-type", "library", "--output-reproducible")
    run(sys.executable, "-m", "cyclonedx_py", "environment", *words, "-o", path, python, SOURCE_DATE_EPOCH=epoch)
    bill = json.loads(path.read_text())
    # The project's version is no literal in pyproject.toml, so cyclonedx-py does not find it there.
    bill["metadata"]["component"] |= {
        "version": version,
        "purl": f"pkg:pypi/vllm-fox@{version}",
        "hashes": [{"alg": "SHA-256", "content": digest(wheel)}],
    }
    text = json.dumps(bill, indent=2) + "\n"
    error = JsonStrictValidator(SchemaVersion.from_version(bill["specVersion"])).validate_str(text)
    if error is not None:
        raise SystemExit(f"release: the bill of materials is not valid: {error}")
    path.write_text(text)
    return len(bill["components"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS for all files of a folder, as ``sha256sum --check`` reads it."""
    paths = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text("".join(f"{digest(path)}  {path.name}\n" for path in paths))


def release(dist: Path, lender: Path, work: Path, options: Sequence[str]) -> None:
    tree, epoch = export(work)
    version = version_of(tree)
    commit = run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    say(f"vllm-fox {version} of commit {commit}")
    sdist, wheel = build_both(tree, work, epoch)
    say(f"{sdist.name} and {wheel.name} are built; the wheel from the sdist is the same, byte for byte")
    run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", sdist, wheel)
    say("`twine check --strict` passes both")
    pythons = dict[Path, Path]()
    for package in (sdist, wheel):
        python = pythons[package] = install(package, work / f"env{package.suffix}", *options)
        check(python, tree)
        say(f"{package.name} works in an environment of its own: files, imports, entry points, the command")
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir(parents=True)
    bill = dist / f"vllm_fox-{version}.cdx.json"
    count = write_bill(pythons[wheel], tree, wheel, version, bill, epoch)
    say(f"{bill.name} lists {count} packages that pip installs with the wheel")
    lend(pythons[wheel], lender)
    check(pythons[wheel], tree, "--vllm")
    run(pythons[wheel].with_name("vllm-fox"), "doctor", tree / "examples" / "fox-tiny", cwd=work)
    say(f"vLLM finds the plugin in {wheel.name}, and `vllm-fox doctor` finds nothing to mend")
    for package in (sdist, wheel):
        shutil.copy(package, dist / package.name)
    write_sums(dist)
    run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=dist)
    print((dist / "SHA256SUMS").read_text(), end="")


def main() -> None:
    dist, lender = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="vllm-fox-release-") as folder:
        # The lender's Python is a link to another one, and tells by its own path which packages are its.
        release(dist.absolute(), lender.absolute(), Path(folder), shlex.split(os.environ.get("PIP_ARGS", "")))


if __name__ == "__main__":
    main()
