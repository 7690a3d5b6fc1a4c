"""What the operator carries: an attention that other processes find again by its content."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attndsl
from attndsl import portable
from attndsl.conformance import MECHANISMS
from attndsl.execution import lowered
from attndsl.execution.operator import attend

EVERY_THIRD = ", ".join(map(str, range(0, 600, 3)))
ATTENTIONS = {
    "window": ("", "mask causal & last(9)"),
    "learned": ("(b = learn[H](-0.3))", "mask radius(7) score s + b * |q - k|"),
    "documents": ("", "inputs doc : int[n] mask causal & documents(doc)"),
    "long": ("", f"mask causal & columns([{EVERY_THIRD}])"),
    "listed": ("", f"mask {{ q, k : [{EVERY_THIRD}][q] >= k }} score s * [0.5, 2, 1][k mod 3]"),
}


def module_of(name: str = "window", **options: Any) -> nn.Module:
    params, clauses = ATTENTIONS[name]
    attention = attndsl.parse(f"attention a{params} {{ {clauses} }}")["a"]
    sizes = {"length": 40, "heads": 2, "head_dim": 8, "block_size": 16}
    return attndsl.compile(attention, **(sizes | options)).module()


class Together(nn.Module):
    """All of ATTENTIONS in one program."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([module_of(name) for name in ATTENTIONS])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        for name, layer in zip(ATTENTIONS, self.layers, strict=True):
            q = q + layer(q, k, v, **({"doc": doc} if name == "documents" else {}))
        return q


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3))


LOAD = """
import sys, warnings, torch, attndsl.torch
warnings.simplefilter("ignore")
folder, others = sys.argv[1], int(sys.argv[2])
if others:
    import attndsl
    texts = [f"attention a {{ mask last({i + 1}) }}" for i in range(others)]
    kept = [attndsl.compile(attndsl.parse(t)["a"], length=40, heads=2, head_dim=8) for t in texts]
*inputs, expected = torch.load(folder + "/tensors.pt")
assert torch.equal(torch.export.load(folder + "/program.pt2").module()(*inputs), expected)
assert torch.equal(torch._inductor.aoti_load_package(folder + "/package.pt2")(*inputs), expected)
print("equal")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program exported, and compiled ahead of time, with its inputs and output."""
    folder, model = tmp_path_factory.mktemp("saved"), Together().requires_grad_(False)
    given = (*inputs(), torch.arange(40) // 7)
    program = torch.export.export(model, given)
    torch.export.save(program, folder / "program.pt2")
    torch.save((*given, model(*given)), folder / "tensors.pt")
    # the headers are precompiled for those who compile more than once
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(folder / "package.pt2"),
        inductor_configs={"aot_inductor.precompile_headers": False},
    )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("others", [0, 12])
def test_a_saved_program_is_the_same_in_a_process_with_so_many_other_plans(saved: Path, others: int) -> None:
    command = [sys.executable, "-c", LOAD, str(saved), str(others)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


def graphs_of(modules: list[nn.Module]) -> int:
    """How many graphs torch.compile makes of them, one after the other; each is checked."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for module in modules:
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        assert torch.equal(compiled(*inputs()), module(*inputs()))
    return len(graphs)


def test_twelve_layers_with_an_equal_plan_each_are_one_graph() -> None:
    assert graphs_of([module_of("learned") for _ in range(12)]) == 1


def test_deep_copies_are_one_graph() -> None:
    first = module_of("learned")
    assert graphs_of([first, *(copy.deepcopy(first) for _ in range(11))]) == 1


def test_layers_that_differ_are_graphs_of_their_own() -> None:
    assert graphs_of([module_of(), module_of("learned"), module_of(block_size=8)]) == 3


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_text_and_back(mechanism: Any) -> None:
    attention = attndsl.parse(mechanism.text)["a"].attention
    written = portable.write(attention)
    again, _ = portable.read(written.text, written.constants)
    assert portable.write(again).text == written.text
    assert [group.relation for group in again.groups] == [group.relation for group in attention.groups]


def test_equal_attentions_are_one_text_whatever_stands_before_them() -> None:
    text = "attention a(b = learn[H, 5]) { mask causal @ last(3) | random(2) score s + b[2] }"
    alone = attndsl.parse(text)["a"].attention
    other = attndsl.parse("attention z(b = learn[H](0.2)) { score s + b }" + text)
    assert other["z"].learned
    assert portable.write(alone).text == portable.write(other["a"].attention).text


def test_long_sets_travel_as_tensors() -> None:
    (short, none), (text, constants) = (
        (written.text, written.constants)
        for written in (portable.write(module_of(name).plan.attention) for name in ("window", "long"))
    )
    assert not none
    assert [array.shape for array in constants] == [(200, 2)]
    assert len(text) < len(short) + 200
    other = attndsl.parse(f"attention a {{ mask causal & columns([{EVERY_THIRD}, 601]) }}")["a"].attention
    assert portable.write(other).text != text
    (entries,) = portable.write(module_of("listed").plan.attention).constants
    assert entries.tolist() == [*range(0, 600, 3)]


def identity(**changes: Any) -> str:
    return json.dumps({**json.loads(module_of().plan.lowered.identity), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "absent"}, "needs the backend `absent`, which is not installed"),
        ({"attndsl": 99}, "saved in format 99 of attndsl, and this version reads 5"),
    ],
)
def test_a_program_that_cannot_run_here_says_why(changes: dict[str, Any], said: str) -> None:
    q, k, v = inputs()
    with pytest.raises(attndsl.AttnError, match=said):
        attend(q, k, v, [q.new_empty(0)], *[None] * 5, identity(**changes))


def test_a_backend_that_declines_a_loaded_program_says_why() -> None:
    plan = module_of("learned", backend="torch").plan
    text = plan.lowered.identity.replace('"norm":"softmax"', '"norm":"relu"').replace('"torch"', '"sdpa"')
    q, k, v = inputs()
    with pytest.raises(attndsl.AttnError, match="`sdpa`, which declines here: it knows nothing of"):
        attend(q, k, v, [torch.zeros(2)], *[None] * 5, text)


def test_equal_plans_share_what_was_lowered_and_what_is_dropped_is_collected() -> None:
    first, second = module_of(), module_of()
    assert first.plan.lowered is second.plan.lowered
    gone = weakref.ref(first.plan.lowered)
    text = first.plan.lowered.identity
    first(*inputs())
    del first, second
    gc.collect()
    assert gone() is None
    assert lowered.alive(text) is None


def test_a_plan_that_is_dropped_before_the_backward_pass() -> None:
    q, k, v = inputs()
    q.requires_grad_()
    module = module_of(training=True)
    gone, out = weakref.ref(module.plan.lowered), module(q, k, v)
    (expected,) = torch.autograd.grad(module(q, k, v).sum(), q)
    del module
    gc.collect()
    (found,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(found, expected)
    del out
    gc.collect()
    assert gone() is None


def run_pickled(data: bytes) -> Tensor:
    found: Tensor = pickle.loads(data)(*inputs())
    return found.detach()


def test_a_pickled_module_runs_in_a_spawned_worker() -> None:
    module = module_of("learned")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(run_pickled, (pickle.dumps(module),))
    assert torch.equal(found, module(*inputs()))


def test_the_operator_keeps_the_rules_of_torch() -> None:
    module = module_of("learned", training=True)
    q, k, v = (x.requires_grad_() for x in inputs())
    plan = module.plan.lowered
    tensors = plan.tensors(dict(module.named_parameters()))
    torch.library.opcheck(attend, (q, k, v, tensors, None, None, [0], None, None, plan.identity))


def test_importing_attndsl_torch_is_enough_and_attndsl_alone_is_free_of_it() -> None:
    code = """
import sys, attndsl
assert "torch" not in sys.modules
import attndsl.torch, torch
print(torch.ops.attndsl.attend)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "attndsl.attend\n", done.stderr
