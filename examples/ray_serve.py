#!/usr/bin/env python3
"""An OpenAI-compatible endpoint of engines that come and go with the load (Ray Serve).

    python examples/ray_serve.py --model examples/fox-tiny --min-replicas 1 --max-replicas 4
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "fox-tiny", "prompt": "def main():", "max_tokens": 32}'

Every replica is one engine on --tensor-parallel-size times --pipeline-parallel-size GPUs. Ray Serve starts another
when the running ones have more than --target-requests requests each, and stops one when they have fewer. On a
cluster run it on any node (RAY_ADDRESS); docs/distributed.md has the same as a Kubernetes manifest.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from command_line import Parser, integer, positive_int
from ray_common import ClusterError, add_engine_options, engine_config, parse, start_ray


def llm_config(args: argparse.Namespace, on_gpu: bool) -> Any:
    """What Ray Serve needs to know of one model."""
    from ray.serve.llm import LLMConfig

    machine: dict[str, Any] = {}
    replica: dict[str, Any] = {}
    if not on_gpu:
        machine = {"accelerator_config": {"kind": "cpu"}}
        # With its worker a replica takes one CPU, of which the web front has some.
        replica = {"ray_actor_options": {"num_cpus": 0.1}}
    return LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": args.model},
        deployment_config={
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_requests,
            },
            # Beyond this a replica's queue is full, and requests wait for another.
            "max_ongoing_requests": 4 * args.target_requests,
            **replica,
        },
        **engine_config(args, on_gpu),
        **machine,
    )


def serve(args: argparse.Namespace) -> None:
    """Start, say where, and stay until interrupted."""
    from ray import serve
    from ray.serve.llm import build_openai_app

    try:
        on_gpu = start_ray(args, "--min-replicas", args.min_replicas)
    except ClusterError as error:
        sys.exit(f"ray_serve: {error}")
    serve.start(http_options={"host": args.host, "port": args.port})
    # The web front needs little of a CPU.
    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    config = llm_config(args, on_gpu)
    app = build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
    try:
        serve.run(app, name=args.name)
        print(f"{args.name} at http://{args.host}:{args.port}/v1 (Ctrl-C stops it)", flush=True)
        while True:
            time.sleep(3600)
    except RuntimeError as error:  # after the few attempts that Ray Serve makes
        sys.exit(f"ray_serve: {error} With --verbose the logs of the engines say why.")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        print("stopping", flush=True)
    finally:
        serve.shutdown()


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--name", help="for clients (default: the last part of --model)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=integer(1, 65535), default=8000)
    parser.add_argument("--min-replicas", type=positive_int, default=1)
    parser.add_argument("--max-replicas", type=positive_int, default=1)
    parser.add_argument("--target-requests", type=positive_int, default=64, help="requests at once on a replica")
    add_engine_options(parser)
    args = parse(parser)
    if args.min_replicas > args.max_replicas:
        parser.error(
            f"--min-replicas is {args.min_replicas}: it must be at most --max-replicas {args.max_replicas}."
        )
    args.name = args.name or Path(args.model).name
    serve(args)


if __name__ == "__main__":
    main()
