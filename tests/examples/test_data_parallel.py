"""examples/data_parallel.py, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

PROCESSES = 2
SIZES = (3, 5, 2)


def exchange(rank: int, folder: str) -> None:
    """Save a process's weights after they are shared, and its gradients after they are averaged."""
    import data_parallel

    data_parallel.BUCKET = 4  # the second weight has more, and two dtypes are never exchanged together
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    model = torch.nn.Module()
    for number, size in enumerate(SIZES):
        dtype = torch.float64 if number == 2 else torch.float32
        model.register_parameter(
            str(number), torch.nn.Parameter(torch.full((size,), 10.0 * rank + number).to(dtype))
        )
    model.register_parameter("unused", torch.nn.Parameter(torch.full((1,), float(rank))))
    model.register_buffer("buffer", torch.full((2,), 7.0 + rank))
    data_parallel.share_weights(model)
    for number, size in enumerate(SIZES):
        weight = model.get_parameter(str(number))
        weight.grad = (torch.arange(size) * (1.0 + rank) + number).to(weight.dtype)
    data_parallel.average_gradients(model.parameters())
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    torch.save({"state": model.state_dict(), "gradients": gradients}, Path(folder) / str(rank))
    distributed.destroy_process_group()


@pytest.mark.parametrize("what", ["state", "gradients"])
def test_processes_agree(what: str, exchanged: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    expected: dict[str, torch.Tensor | None] = {"unused": None}
    for number, size in enumerate(SIZES):
        expected[str(number)] = torch.arange(size) * 1.5 + number
    if what == "state":
        expected = {str(number): torch.full((size,), float(number)) for number, size in enumerate(SIZES)}
        expected |= {"unused": torch.zeros(1), "buffer": torch.full((2,), 7.0)}
    for found in exchanged:
        assert found[what].keys() == expected.keys()
        for name, want in expected.items():
            assert found[what][name] is None if want is None else torch.equal(found[what][name].float(), want)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each process saved."""
    folder = tmp_path_factory.mktemp("exchanged")
    multiprocessing.spawn(exchange, (str(folder),), PROCESSES)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(PROCESSES)]
