"""Two processes beside one: data parallel, sharded parameters, sharded tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import attndsl

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parent.parent / "docs" / "torch.md").read_text()
RANKS, BATCH, HEADS, N, WIDTH = 2, 4, 2, 12, 8
TEXT = "attention a(b = learn[H](0.3)) { mask causal & last(5) score s - b * (q - k) }"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        sizes = {"length": N, "heads": HEADS, "head_dim": WIDTH}
        self.attend = attndsl.compile(attndsl.parse(TEXT)["a"], **sizes, training=True).module()  # type: ignore[arg-type]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(self.project(q), k, v)  # type: ignore[no-any-return]


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, N, WIDTH, generator=g) for _ in range(3)]


def trained(model: nn.Module, given: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(*given).square().mean().backward()
        optimizer.step()


def alone() -> list[Tensor]:
    torch.manual_seed(0)
    model = Layer()
    before = [x.detach().clone() for x in model.parameters()]
    trained(model, tensors())
    assert all(not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))
    return [x.detach() for x in model.parameters()]


def mine(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.chunk(RANKS)[rank] for x in tensors()]


def data_parallel(rank: int) -> list[Tensor]:
    given = mine(rank)
    model = nn.parallel.DistributedDataParallel(Layer())
    trained(model, given)
    return [x.detach() for x in model.parameters()]


def fully_sharded_data_parallel(rank: int) -> list[Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    given = mine(rank)
    model = FullyShardedDataParallel(Layer(), device_id=torch.device("cpu"), use_orig_params=True)
    trained(model, given)
    with FullyShardedDataParallel.summon_full_params(model):
        return [x.detach().clone() for x in model.parameters()]


def fully_shard(rank: int) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    given = mine(rank)
    model = Layer()
    fully_shard(model.attend)
    fully_shard(model)
    trained(model, given)
    return [x.detach().full_tensor() for x in model.parameters()]  # type: ignore[operator]


def of_dtensors(axis: int) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    names: dict[str, Any] = {}
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "local_map" in code)
    exec(code, names)
    mesh = init_device_mesh("cpu", (RANKS,))
    leaves = [distribute_tensor(x, mesh, [Shard(axis)]).requires_grad_() for x in tensors()]
    out = names["sharded"](mesh, axis, HEADS // RANKS if axis == 1 else HEADS)(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(x.placements == (Shard(axis),) for x in (out, *grads))
    return [x.full_tensor().detach() for x in (out, *grads)]


def one_process(axis: int) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in tensors()]
    found = attndsl.parse("attention a { mask causal & last(5) }")["a"]
    out = attndsl.compile(found, length=N, heads=HEADS, head_dim=WIDTH, training=True)(*leaves)
    return [x.detach() for x in (out, *torch.autograd.grad(out.square().sum(), leaves))]


def refused(rank: int) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    model = Layer()
    given = [distribute_tensor(x, mesh, [Shard(0)]) for x in tensors()]
    nn.Module.register_parameter(
        model.attend, "b", nn.Parameter(distribute_tensor(model.attend.get_parameter("b"), mesh, [Shard(0)]))
    )
    for qkv in (given, tensors()):
        with pytest.raises(attndsl.AttnError, match="call it inside `local_map`"):
            model.attend(*qkv)
    return []


def over_batch(rank: int) -> list[Tensor]:
    return of_dtensors(0)


def over_heads(rank: int) -> list[Tensor]:
    return of_dtensors(1)


CASES = {
    "DistributedDataParallel": (data_parallel, alone),
    "FullyShardedDataParallel": (fully_sharded_data_parallel, alone),
    "fully_shard": (fully_shard, alone),
    "DTensor over batch rows": (over_batch, lambda: one_process(0)),
    "DTensor over heads": (over_heads, lambda: one_process(1)),
    "DTensor alone": (refused, list),
}


def work(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    for name, (of_rank, _) in CASES.items():
        torch.save(of_rank(rank), f"{folder}/{name} {rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each rank has of each case: processes take seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), RANKS)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name: str, saved: Path) -> None:
    expected = CASES[name][1]()
    for rank in range(RANKS):
        torch.testing.assert_close(torch.load(saved / f"{name} {rank}"), expected)
