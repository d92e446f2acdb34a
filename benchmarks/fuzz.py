"""Send a server requests made up from its own OpenAPI description: right ones, and wrong ones of all kinds.

    python -m benchmarks.fuzz examples/fox-tiny --schemathesis PATH_TO_COMMAND

It starts `vllm serve MODEL` and lets Schemathesis make requests to all of its paths, with fields bounded so that
none asks for much. The exit code is 1 if the server answered with a status of 500 or more where --known does not
name the path, has ended, answers otherwise than before, or holds pages or requests at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.options import Parser, positive_float, refuse, seed_number
from benchmarks.record import prepare, save
from vllm_fox.cli.metrics import sample_of, view

if TYPE_CHECKING:
    from local_server import Server

LEFT_OUT = ("/scale_elastic_ep",)
"""Paths that change how many engines there are."""
IN_USE = ("requests_running", "requests_waiting", "pages_live", "kv_usage")
IDLE_S = 60.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template: what is said, no more. The shipped checkpoints have none."""
TOKENS = 16
"""Most tokens of an answer."""
GREEDY = {"prompt": "import os\n", "max_tokens": TOKENS, "temperature": 0}


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """A server's description without the paths of :data:`LEFT_OUT`."""
    return schema | {"paths": {path: ways for path, ways in schema["paths"].items() if path not in LEFT_OUT}}


def answered(metrics: str) -> Counter[tuple[str, str]]:
    """How many requests were answered, by path and by the first digit of the status."""
    found = Counter[tuple[str, str]]()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "http_requests_total":
                found[sample.labels["handler"], sample.labels["status"]] += int(sample.value)
    return found


def text_of(server: Server) -> str:
    from local_server import MODEL_NAME

    found: str = json.loads(server.get("/v1/completions", {"model": MODEL_NAME, **GREEDY}))["choices"][0]["text"]
    return found


def idle(server: Server) -> dict[str, Any]:
    """What the server holds when it is idle, or when that has taken too long."""
    limit = time.monotonic() + IDLE_S
    while True:
        sample = sample_of(server.get("/metrics").decode(), server.url, time.monotonic())
        state = {name: view(sample, sample)[name] for name in IN_USE}
        if not any(state.values()) or time.monotonic() > limit:
            return state
        time.sleep(0.5)


def send(server: Server, command: str, minutes: float, seed: int, folder: Path) -> int:
    """Let Schemathesis send requests for some minutes; return its exit code. What it says is in report.txt."""
    from local_server import MODEL_NAME

    schema = bounded(json.loads(server.get("/openapi.json")))
    (folder / "openapi.json").write_text(json.dumps(schema))
    words = [command, "run", str(folder / "openapi.json"), "--url", server.url, "--seed", str(seed)]
    words += ["--checks", "not_a_server_error", "--max-time", str(round(60 * minutes)), "--workers", "4"]
    words += ["--phases", "coverage,fuzzing", "--continue-on-failure", "--no-shrink", "--no-color"]
    words += ["--generation-database", "none", "--request-timeout", "120", "--suppress-health-check", "all"]
    environment = dict(os.environ, SCHEMATHESIS_HOOKS="fuzz_hooks", PYTHONPATH=str(Path(__file__).parent))
    environment["FUZZ_MODEL"] = MODEL_NAME
    with (folder / "report.txt").open("wb") as output:
        return subprocess.run(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
        ).returncode


def main() -> None:
    import local_server

    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--schemathesis", help="the command, if it is not on the PATH")
    parser.add_argument("--minutes", type=positive_float, default=6.0, help="how long requests are sent")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument(
        "--known", nargs="*", default=[], metavar="PATH", help="paths of which a status of 500 is known"
    )
    parser.add_argument("--json", type=Path, default=Path("results/fuzz.json"))
    args = parser.parse_args()
    prepare("--json", args.json)
    command = args.schemathesis or shutil.which("schemathesis")
    if command is None or shutil.which(command) is None:
        refuse("schemathesis is not there: pipx install schemathesis, or give --schemathesis its path.")
    folder, model_folder = Path(tempfile.mkdtemp(prefix="vllm-fox-fuzz-")), args.model.resolve()
    try:
        model = local_server.Checkpoint.of(model_folder, local_server.read_config(model_folder))
        print(f"server log: {folder / 'server.log'}\nSchemathesis: {folder / 'report.txt'}", flush=True)
        (folder / "template").write_text(TEMPLATE)
        options = ["--chat-template", str(folder / "template")]
        options += ["--override-generation-config", json.dumps({"max_new_tokens": TOKENS})]
        with local_server.running_server(model, folder / "server.log", *options) as server:
            local_server.wait_until_healthy(server, timeout=600)
            before = text_of(server)
            exit_code = send(server, command, args.minutes, args.seed, folder)
            server.check()
            state = idle(server)
            same = text_of(server) == before
            counts = answered(server.get("/metrics").decode())
    except (local_server.ServerError, OSError) as error:
        raise SystemExit(f"fuzz: {error}") from None
    failed = {path: count for (path, status), count in counts.items() if status == "5xx"}
    figures = {
        "requests": sum(counts.values()),
        "by_status": dict(sum((Counter({status: count}) for (_, status), count in counts.items()), Counter())),
        "failed_by_path": failed,
        "errors_in_log": errors_in((folder / "server.log").read_text(errors="replace")),
        "idle": state,
        "same_answer": same,
        "schemathesis_exit_code": exit_code,
    }
    print(json.dumps(figures, indent=1))
    save(args.json, {"options": {key: str(value) for key, value in vars(args).items()}, **figures})
    wrong = [f"{count} requests to {path} failed." for path, count in failed.items() if path not in args.known]
    if left := {name: value for name, value in state.items() if value}:
        wrong.append(f"The server is not idle at the end: {left}.")
    if not same:
        wrong.append("The server answers otherwise than before.")
    if wrong:
        raise SystemExit("\n".join(wrong))


def errors_in(log: str) -> dict[str, int]:
    """The last line of each traceback in a log, and how often it is there."""
    found = re.findall(
        r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?((?:[\w.]+\.)?\w+(?:Error|Exception)(?:: .*)?)$", log, re.M
    )
    return dict(Counter(line[:160] for line in found).most_common(40))


if __name__ == "__main__":
    main()
