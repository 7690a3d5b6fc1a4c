"""What memory layouts, vectors, huge logits, long biases and mixed dtypes do to results: nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from thin import pairwise
from torch import Tensor

import attndsl
from attndsl.backend import Problem
from attndsl.conformance import CASES, Case, check
from attndsl.execution import choice, registry
from attndsl.execution.torch_eval import extreme
from attndsl.plugins import sdpa
from attndsl.plugins.torch import chunks, work

BACKENDS = ("reference", "sdpa", "torch")
Named = dict[str, Tensor]


def spaced(x: Tensor, axis: int) -> Tensor:
    """Every second entry along the axis of a tensor of twice the size; NaN lies in between."""
    shape = [*x.shape]
    shape[axis] *= 2
    wide = x.new_full(shape, torch.nan)
    view = wide[(slice(None),) * axis + (slice(None, None, 2),)]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "tokens-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads-last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "batch-last": lambda x: x.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1),
    "every-second-row": lambda x: spaced(x, 2),
    "every-second-number": lambda x: spaced(x, 3),
    "inside": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4), value=torch.nan)[..., 1:-4, 3:-2],
    "windows": lambda x: x[..., 0, 0].repeat(1, x.shape[2] + x.shape[3]).view(*x.shape[:2], -1)[
        ..., : x.shape[2] + x.shape[3] - 1
    ].unfold(2, x.shape[3], 1),
    "one-row": lambda x: x[:, :, :1].expand(x.shape),
    "one-column": lambda x: x[..., :1].expand(x.shape),
    "one-number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}  # fmt: skip


VECTORS = (("float32", 8, 5), ("float64", 4, 1), ("bfloat16", 6, 6), ("float16", 5, 8), ("float32", 1, 1))
"""Their dtype, and how wide those of keys and of values are."""


@pytest.mark.parametrize(
    ("backend", "clauses", "vectors"),
    pairwise(BACKENDS, ("mask full", "mask causal", "mask radius(9) score alibi"), VECTORS),
    ids=str,
)
def test_a_layout_changes_nothing(backend: str, clauses: str, vectors: tuple[str, int, int]) -> None:
    dtype, *sizes = vectors
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    plan = attndsl.compile(
        attention, batch=2, length=40, heads=4, kv_heads=2, head_dim=sizes[0], dtype=dtype,
        backend=backend, training=True, block_size=16,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 40, sizes[0]), (2, 2, 40, sizes[0]), (2, 2, 40, sizes[1]), (2, 4, 40, sizes[1])]
    drawn = [torch.randn(shape, generator=rng).to(getattr(torch, dtype)) for shape in shapes]
    grad_lse = torch.randn(2, 4, 40, 1, generator=rng).to(plan(*drawn[:3], return_lse=True)[1].dtype)
    for name, layout in LAYOUTS.items():
        laid = [layout(x) for x in (*drawn, grad_lse)]
        results = []
        for tensors in (laid, [x.contiguous() for x in laid]):
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            out, lse = plan(*leaves, return_lse=True)
            towards_out = torch.autograd.grad(out, leaves, tensors[3], retain_graph=True)
            towards_both = torch.autograd.grad((out, lse), leaves, (tensors[3], tensors[4].squeeze(3)))
            results.append([out, lse, *towards_out, *towards_both])
        for here, there in zip(*results, strict=True):
            torch.testing.assert_close(here, there, msg=lambda text, name=name: f"{name}: {text}")


def read_right(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> None:
    """What torch's fused kernels on CPU take for granted: scaled_dot_product_attention asks before it calls
    them (sdp_utils_cpp.h), and at::_scaled_dot_product_flash_attention_for_cpu checks no strides."""
    for x in (q, k, v):
        assert x.dtype == q.dtype
        assert x.shape[:2] == q.shape[:2]
        assert x.shape[3] == q.shape[3]
        assert 0 not in x.shape
        assert x.stride(3) == 1
        assert x.stride(2) >= x.shape[3]
    if attn_mask is not None:
        assert attn_mask.dtype == torch.promote_types(q.dtype, torch.float32)
        assert attn_mask.stride(3) in (0, 1)
        assert attn_mask.shape[2:] == (q.shape[2], k.shape[2])
        assert all(mine in (1, there) for mine, there in zip(attn_mask.shape[:2], q.shape[:2], strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
@pytest.mark.parametrize(
    "clauses",
    [
        "mask full",
        "mask causal",
        "mask radius(9) score alibi",
        "inputs z : float[B, H, n, n] mask causal score s + z[q, k]",
        "inputs z : float[B, H, n, n] mask full score s + z[k, q]",
        "inputs z : float[n] mask full score s + z[q]",
        "inputs z : float[n] mask full score s + z[k]",
        "inputs z : float[B, H, n] mask causal score s + z[k] + z[q] * z[k]",
    ],
)
def test_fused_kernels_get_what_they_take_for_granted(
    backend: str, clauses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = {"sdpa": sdpa, "torch": work}[backend]
    calls = []

    def checked(kernel: Callable[..., object], first: int) -> Callable[..., object]:
        def run(*args: object, attn_mask: Tensor | None = None, **options: object) -> object:
            read_right(*args[first : first + 3], attn_mask)  # type: ignore[arg-type]
            calls.append(kernel)
            return kernel(*args, attn_mask=attn_mask, **options)

        return run

    for name, first in {"flash": 0, "flash_backward": 1}.items():
        if name in vars(plugin):
            monkeypatch.setattr(plugin, name, checked(vars(plugin)[name], first))
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    plan = attndsl.compile(
        attention, batch=2, length=40, heads=4, kv_heads=2, head_dim=6, backend=backend, training=True
    )
    drawn = [torch.randn(2, heads, 40, width) for heads, width in ((4, 6), (2, 6), (2, 3), (4, 3))]
    table = {t.name: torch.randn([{"B": 2, "H": 4, "n": 40}[str(d)] for d in t.dims])
             for t in attention.inputs}  # fmt: skip
    for layout in LAYOUTS.values():
        q, k, v, grad = (layout(x) for x in drawn)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        laid = {name: x.mT.contiguous().mT if x.dim() > 1 else spaced(x, 0) for name, x in table.items()}
        torch.autograd.grad(plan(*leaves, **laid), leaves, grad)
    assert calls


@pytest.mark.parametrize(
    ("backend", "clauses", "sizes"),
    pairwise(
        BACKENDS,
        ("mask full", "mask causal", "mask full score alibi"),
        ("0 2 5 5 4 4", "2 2 0 5 4 4", "2 2 0 0 4 4", "2 2 5 5 4 0", "2 2 5 0 4 4"),
    ),
)
def test_axes_without_entries(backend: str, clauses: str, sizes: str) -> None:
    batch, heads, nq, n, d, dv = map(int, sizes.split())
    attention = attndsl.parse(f"attention a {{ {clauses} offset 0 }}")["a"]
    plan = attndsl.compile(
        attention, length=5, q_length=5, heads=heads, head_dim=d, backend=backend, training=True
    )
    leaves = [torch.randn(batch, heads, *shape).requires_grad_() for shape in ((nq, d), (n, d), (n, dv))]
    out, lse = plan(*leaves, return_lse=True)
    assert out.shape == (batch, heads, nq, dv)
    assert bool((lse == -torch.inf).all()) == (n == 0 or lse.numel() == 0)
    for grad, leaf in zip(
        torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), leaves), leaves, strict=True
    ):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()


ROWS: dict[str, tuple[str, Callable[[int, int], tuple[int, ...]]]] = {
    "": ("", lambda q, k: ()),
    "m, ": ("[k // 2]", lambda q, k: (k // 2,)),
    "4, m, ": ("[q mod 4, (k - q) mod 3]", lambda q, k: (q % 4, (k - q) % 3)),
    "9, ": ("[k - q + 4]", lambda q, k: (k - q + 4,)),
    "2, ": ("[1]", lambda q, k: (1,)),
}
"""Axes of a table of vectors before the last, and a look-up that leaves the last."""


@pytest.mark.parametrize(
    ("backend", "axes", "lead"), pairwise(("reference", "torch"), [*ROWS], ("", "H, ", "B, ", "B, H, "))
)
def test_vectors_of_tables_of_every_shape(backend: str, axes: str, lead: str) -> None:
    at, row = ROWS[axes]
    score = f"s + Q @ x{at} - x{at} @ K + 0.5 * (x{at} @ y)"
    text = f"inputs x : float[{lead}{axes}D]  y : float[H, D] mask causal score {score}"
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    b, h, n, d = 2, 4, 5, 3
    plan = attndsl.compile(
        attention, batch=b, length=n, heads=h, kv_heads=2, head_dim=d, dtype="float64", backend=backend,
        training=True, block_size=16,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    sizes = {"B": b, "H": h, "D": d, "m": 3}
    shape = [sizes.get(size) or int(size) for size in f"{lead}{axes}D".split(", ")]
    q, k, v, x_, y = (
        torch.randn(size, generator=rng, dtype=torch.float64, requires_grad=True)
        for size in ((b, h, n, d), (b, 2, n, d), (b, 2, n, d), shape, (h, d))
    )
    logit = torch.stack([
        torch.stack([
            q_ @ k_ / d**0.5 + q_ @ u - u @ k_ + 0.5 * (u @ y[head])
            if j <= i else q_.sum() * 0 - torch.inf
            for j in range(n)
            for q_, k_ in [(q[batch, head, i], k[batch, head // 2, j])]
            for u in [x_[(batch,) * ("B" in lead) + (head,) * ("H" in lead) + row(i, j)]]
        ])
        for batch in range(b) for head in range(h) for i in range(n)
    ]).view(b, h, n, n)  # fmt: skip
    expected = logit.softmax(-1) @ v.repeat_interleave(2, 1)
    leaves = (q, k, v, x_, y)
    found = plan(q, k, v, x=x_, y=y)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.sin().sum(), leaves) for out in (found, expected))
    for mine, value in zip(*grads, strict=True):
        torch.testing.assert_close(mine, value)


SINGLE = torch.finfo(torch.float32).min
HALF = torch.finfo(torch.bfloat16).min


LARGE = (-1e4, -1e9, HALF, SINGLE, -torch.inf, 1e9, 5e3)
SINKS = ("softmax(sink = 0.5)", "softmax(sink = 3e9)")
WAYS = [*product(BACKENDS, ("softmax",)), *product(("reference", "torch"), SINKS)]
"""Backends with norms that they know: SDPA has no sink."""


@pytest.mark.parametrize(
    ("way", "large", "dtype"), pairwise(WAYS, LARGE, ("float32", "float64", "bfloat16")), ids=str
)
def test_large_numbers_in_place_of_infinities(way: tuple[str, str], large: float, dtype: str) -> None:
    """Row 0 is added `large` to everywhere, row 1 twice, other rows at every third key; keys are in parts.
    The loss counts all rows, or leaves the two out."""
    (backend, norm), n, d, kind = way, 96, 8, getattr(torch, dtype)
    wide = torch.promote_types(kind, torch.float32)
    text = f"inputs m : float[n, n]  mask radius(20) | columns(0..2) score s + m[q, k] norm {norm}"
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    plan = attndsl.compile(
        attention, length=n, heads=2, head_dim=d, dtype=dtype, backend=backend, training=True, block_size=16
    )
    rng = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(1, 2, n, d, generator=rng) * 4).round().div(4).to(kind) for _ in range(4)]
    m = torch.zeros(n, n, dtype=wide)
    m[2:, ::3] = m[0] = large
    m[1] = 2 * m[0]
    leaves = [x.double().requires_grad_() for x in (*drawn[:3], m)]
    q, k, v, added = leaves
    position = torch.arange(n)
    mask = ((position[:, None] - position).abs() <= 20) | (position <= 2)
    s = q @ k.mT / d**0.5
    rounded = (s.detach().to(wide) + m).double()
    logit = torch.where(
        mask, torch.where(rounded.isinf(), rounded, rounded + (s - s.detach()) + (added - m)), -torch.inf
    )
    sink = torch.tensor({"softmax": -torch.inf, "softmax(sink = 0.5)": 0.5}.get(norm, 3e9))
    top = logit.detach().amax(-1, keepdim=True)
    empty = top == -torch.inf
    top = torch.maximum(torch.where(empty, 0.0, top), sink)
    weight = torch.where(empty, 0.0, torch.exp(logit - top))
    total = torch.where(empty, 1.0, weight.sum(-1, keepdim=True) + torch.exp(sink - top))
    expected = (weight / total) @ v, torch.where(empty, -torch.inf, top + total.log()).squeeze(-1)
    mine = [x.clone().requires_grad_() for x in (*drawn[:3], m)]
    found = plan(*mine[:3], m=mine[3], return_lse=True)
    tolerance = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 3e-2}[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], expected[1].to(wide), rtol=tolerance, atol=tolerance)
    for counted in (position >= 0, position > 1):
        grad = drawn[3] * counted[:, None]
        grads = (
            torch.autograd.grad(found[0], mine, grad, retain_graph=True),
            torch.autograd.grad(expected[0], leaves, grad.double(), retain_graph=True),
        )
        for here, there in zip(*grads, strict=True):
            torch.testing.assert_close(here.double(), there, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("large", [-1e9, SINGLE, 0.0])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_decay_of_nought_takes_a_pair_out_however_large_its_logit(backend: str, large: float) -> None:
    n, d = 64, 4
    text = "inputs m : float[n]  w : float[n]  mask radius(20) | columns(0..2) score s + m[k] decay w[k]"
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    plan = attndsl.compile(
        attention, length=n, heads=1, head_dim=d, backend=backend, training=True, block_size=16
    )
    rng = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(1, 1, n, d, generator=rng) for _ in range(4))
    position = torch.arange(n)
    out_of = position % 3 == 0
    m, w = torch.where(out_of, 300.0, large), torch.where(out_of, 0.0, 0.5)
    mask = (((position[:, None] - position).abs() <= 20) | (position <= 2)) & ~out_of
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    s = wide[0] @ wide[1].mT / d**0.5
    expected = torch.where(mask, s if large == 0 else 0 * s, -torch.inf).softmax(-1) @ wide[2]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = plan(*leaves, m=m, w=w)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, wide, grad.double())
    # gradients pass through s + m, of which 0 * s knows nothing
    for here, there in list(zip(*grads, strict=True))[0 if large == 0 else 2 :]:
        torch.testing.assert_close(here.double(), there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.n > 100][::5], ids=str)
def test_sdpa_conforms_in_small_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDED", "FORMED", "KEPT"):
        monkeypatch.setattr(sdpa, name, 1)
    if reason := check("sdpa", case):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
def test_look_ups_by_distance_ask_for_what_live_pairs_read(backend: str) -> None:
    text = "inputs z : float[m]  mask (causal & last(4)) | columns([30]) & causal  score s + z[q - k]"
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    plan = attndsl.compile(attention, length=40, heads=1, head_dim=4, backend=backend, block_size=16)
    x = torch.randn(1, 1, 40, 4)
    assert plan(x, x, x, z=torch.zeros(10)).isfinite().all()
    with pytest.raises(attndsl.AttnError, match="but entry 9 is read"):
        plan(x, x, x, z=torch.zeros(9))


@pytest.mark.parametrize("score", ["s + z[q - k]", "s + k / 9 + z[q - k] * (q - k) / 3", "s + z[k] * q"])
@pytest.mark.parametrize("size", [17, 16, 12])
def test_look_ups_of_one_call_do_not_speak_for_the_next(score: str, size: int) -> None:
    text = f"inputs z : float[m]  mask causal  score {score}"
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    plan = attndsl.compile(attention, length=16, heads=1, head_dim=4, backend="sdpa", training=True)
    exact = attndsl.compile(attention, length=16, heads=1, head_dim=4, backend="reference", training=True)
    x = torch.randn(1, 1, 16, 4)
    tables = [torch.randn(16), torch.randn(17), torch.randn(size), torch.randn(size)]
    tables[2][1], tables[3][1:3] = torch.nan, -torch.inf
    for z in tables:
        if len(z) < 16:
            with pytest.raises(attndsl.AttnError, match="but entry"):
                plan(x, x, x, z=z)
            continue
        found = []
        for each in (plan, exact):
            leaf = z.clone().requires_grad_()
            out = each(x, x, x, z=leaf)
            found.append((out, *torch.autograd.grad(out[..., 1].sum(), leaf)))
        torch.testing.assert_close(*found, equal_nan=True)


MEMORY = """
import subprocess
import sys
import torch
import attndsl
from attndsl.backend import Problem
from pathlib import Path

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

text = f"attention a(table = learn[H, 32](0.1)) {{ mask {sys.argv[2]} score t5(table) }}"
plan = attndsl.compile(
    attndsl.parse(text)["a"], length=8192, heads=1, head_dim=64, backend=sys.argv[1], training=True
)
module = plan.module()
q, k, v, grad = (torch.randn(1, 1, 8192, 64, requires_grad=True) for _ in range(4))
short = [x[:, :, :64] for x in (q, k, v, grad)]
module(*short[:3]).backward(short[3])
before = peak()
module(q, k, v).backward(grad)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("mask", ["full", "radius(256) | global([0, 5000])"])
@pytest.mark.parametrize("backend", ["sdpa", "torch"])
def test_memory_of_a_bias_by_distance_is_linear(backend: str, mask: str) -> None:
    """An array of a number for each pair is 256 MiB here."""
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, backend, mask], capture_output=True, text=True, check=True
    )
    assert float(child.stdout) < 150


def test_some_rows_of_a_mask() -> None:
    blocks = attndsl.parse("attention a { mask radius(20) | columns([3]) }")["a"].block_mask(100, 16)
    whole = blocks.to_dense()
    for start, stop in ((0, 100), (5, 90), (16, 32), (96, 100), (40, 41), (50, 50)):
        assert (blocks.to_dense(start, stop) == whole[:, :, start:stop]).all()


READ = (
    "inputs z : float[n] mask causal score s + z[k]",
    "inputs z : float[n] mask causal score s + z[q - k]",
    "inputs z : float[n] mask causal score tanh(s) + z[q - k]",
    "inputs z : float[n, D] mask causal score s + Q @ z[k]",
    "inputs z : float[n, D] mask causal score s + K @ z[q - k]",
    "inputs z : float[n] mask causal decay 1.0 / z[k]",
    "inputs z : float[n] mask causal norm softmax(sink = z[3])",
)
DIGITS = [*product(("bfloat16", "float16", "float32"), (torch.float32, torch.float64, torch.float16))]
"""Dtypes of vectors and of a table."""


@pytest.mark.parametrize(("backend", "clauses", "digits"), pairwise(BACKENDS, READ, DIGITS), ids=str)
def test_tables_keep_their_digits(backend: str, clauses: str, digits: tuple[str, torch.dtype]) -> None:
    """A table of 100 and a bit, beside vectors of 16 bits, is what it is in float64."""
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"].attention
    (dtype, kind), n, d, found = digits, 24, 4, []
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, n, d, generator=rng).to(getattr(torch, dtype)) for _ in range(4)]
    table = (100 + torch.randn(n, d, generator=rng)).to(kind)
    table = table if "D]" in clauses else table[:, 0].contiguous()
    for name, wide in ((backend, dtype), ("reference", "float64")):
        options = {"length": n, "heads": 2, "head_dim": d, "dtype": wide, "training": True}
        if reason := choice.declined(
            registry.plugin("backends", name), attention, Problem(q_length=n, **options)
        ):
            pytest.skip(reason)
        plan = attndsl.compile(attention, backend=name, **options)
        leaves = [x.to(getattr(torch, wide)).requires_grad_() for x in drawn[:3]]
        z = table.to(
            torch.promote_types(kind, getattr(torch, wide)) if wide == "float64" else kind
        ).requires_grad_()
        out = plan(*leaves, z=z)
        grads = torch.autograd.grad(out, [*leaves, z], drawn[3].to(out.dtype))
        assert grads[3].dtype == z.dtype
        found.append([x.double() for x in (out.detach(), *grads)])
    loose = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2}[dtype]
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).abs().max() <= loose * exact.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("score", ["s * z[k mod 2] norm sigmoid", "s + z[q mod 2] norm sigmoid"])
def test_gradients_of_a_table_of_16_bits_are_summed_in_more(
    score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts have gradients of one sign; to 256 times as much bfloat16 adds nothing."""
    monkeypatch.setattr(chunks, "FORMED", 2**8)
    text = f"inputs z : float[2] mask radius(7) score {score}"
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    n, d, found = 6_000, 4, []
    x = torch.linspace(1, 2, n * d).view(1, 1, n, d)
    for backend, dtype in (("torch", "bfloat16"), ("torch", "float64")):
        plan = attndsl.compile(
            attention, length=n, head_dim=d, dtype=dtype, backend=backend, training=True, block_size=16
        )
        z = torch.zeros(2, dtype=getattr(torch, dtype), requires_grad=True)
        plan(*(x.to(z.dtype) for _ in "qkv"), z=z).sum().backward()
        assert z.grad is not None
        assert z.grad.dtype == z.dtype
        found.append(z.grad.double())
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)


def test_max_and_min_share_gradients_as_torch_does() -> None:
    """All of the slope to the greater, even an infinite one, and nothing to the other."""
    inf = torch.inf
    a = torch.tensor([-1.0, 0.0, 2.0, inf, -inf, 3.0, inf], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, 0.0, 0.0, inf, 0.0, inf, 1.0], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([inf, 1.0, 0.5, 1.0, inf, -inf, 2.0], dtype=torch.float64)
    for sign, torchs in ((1, torch.maximum), (-1, torch.minimum)):
        mine = torch.autograd.grad(extreme(a, b, sign), (a, b), slope)
        wanted = torch.autograd.grad(torchs(a, b), (a, b), slope)
        for one, other in zip(mine, wanted, strict=True):
            assert torch.equal(one, other)
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (4,)))
    assert torch.autograd.gradgradcheck(lambda x, y: extreme(x, y, 1) ** 2, (x, y))
