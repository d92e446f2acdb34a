"""What ray_batch.py and ray_serve.py share: options of an engine, Ray's start, and what each engine is given."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from command_line import Parser, check_engine_args, json_object, positive_int

from vllm_fox.cpu import prepare_cpu_environment

CPUS_OF_A_WORKER = 0.8
"""Not a whole CPU: what is beside an engine needs a little of it."""
PASSED_ON = ("VLLM_", "HF_", "OMP_")
"""How the names of the environment variables begin that engines get on every machine."""


class ClusterError(Exception):
    """Something about the cluster that the user can mend; shown without a traceback."""


def add_engine_options(parser: Parser) -> None:
    """Add the options that say what an engine is, and --verbose."""
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent / "fox-tiny"))
    parser.add_argument("--tensor-parallel-size", type=positive_int, default=1, help="GPUs of an engine")
    parser.add_argument("--pipeline-parallel-size", type=positive_int, default=1)
    parser.add_argument("--engine-args", type=json_object, default={}, help="more of vLLM's engine arguments, JSON")
    parser.add_argument("--verbose", action="store_true", help="show the logs of Ray and the engines")


def parse(parser: Parser) -> argparse.Namespace:
    """The command line, with the path of a model that is a folder made absolute."""
    args = parser.parse_args()
    check_engine_args(parser, args)
    if Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    return args


def start_ray(args: argparse.Namespace, option: str, engines: int) -> bool:
    """Start Ray, or find its cluster.

    Args:
        option: the one that says how many engines there are at least.
        engines: how many that is.

    Returns:
        Whether engines get GPUs.

    Raises:
        ClusterError: there is no cluster at RAY_ADDRESS, or it has too few GPUs or CPUs for so many engines.
    """
    import ray

    try:
        ray.init(log_to_driver=args.verbose, logging_level=logging.INFO if args.verbose else logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            raise
        raise ClusterError(
            f"RAY_ADDRESS is {address!r}, with which Ray finds no cluster: start one (`ray start --head`), or "
            f"unset RAY_ADDRESS to use this machine alone. Ray says: {' '.join(str(error).split())}"
        ) from None
    found = ray.cluster_resources()
    unit = "GPU" if found.get("GPU", 0) > 0 else "CPU"
    workers = args.tensor_parallel_size * args.pipeline_parallel_size
    if found[unit] < workers * engines:
        raise ClusterError(
            f"{option} {engines} of {workers} {unit}s each are more than the cluster's {found[unit]:.0f} {unit}s."
        )
    return unit == "GPU"


def engine_config(args: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """What an engine is given, as fields that Ray Data's and Ray Serve's configurations both have."""
    if not on_gpu:
        prepare_cpu_environment()
    return {
        "engine_kwargs": {
            "tensor_parallel_size": args.tensor_parallel_size,
            "pipeline_parallel_size": args.pipeline_parallel_size,
            **args.engine_args,
        },
        "placement_group_config": None if on_gpu else {"bundle_per_worker": {"CPU": CPUS_OF_A_WORKER}},
        "runtime_env": {
            "env_vars": {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        },
    }
