"""Writes refused.md: what is refused, the message of each refusal as it is raised, and why.

python docs/refused.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # noqa: TID253

import attndsl

PAGE = Path(__file__).with_suffix(".md")
WORDS = ("attention", "let", "pattern", "score", "use")
PROGRAM = """
attention lm(w = 8) { mask causal & last(w) }
attention both { mask radius(4) }
attention packed { inputs doc : int[n]  mask causal & documents(doc) }
attention sunk { mask causal  norm softmax(sink = learn[H]) }
attention first { mask causal }
attention less = first - 0.5 * sunk
attention means { approx nystrom(8) }
attention drawn { mask causal & random(4) }
attention half { mask causal & { q, k : k < n // 2 } }
attention kept { mask causal & topk(4, of = causal) }
attention ahead { mask causal & topk(4) }
attention duo { heads 0..5 { mask causal } else { mask last(8) } }
"""
SECTIONS: dict[str, list[tuple[str, str]]] = {
    "In a text": [
        ("pattern p = window(4)", "there are two meanings, and papers differ: the name says which"),
        ("pattern p = { q, k : q >= 3 & k < 3 }", "`&` is tighter than a comparison"),
        ("pattern p = { q, k : 2 * k == q / 2 }", "masks are made of integers: their tiles are exact"),
        ("pattern p = { q, k : q mod k == 0 }", "the divisor would differ from position to position"),
        ("pattern p = { q, k : q < 9000000000 * 9000000000 }", "integers never wrap"),
        ("pattern a = b  pattern b = a", "definitions are written out, and end"),
        ("pattern blocks = causal", "what is built in means the same in every file"),
        ("attention a(g = learn[4](0.0)) { mask { q, k : g[0] > 0.0 } }", "a mask has no gradient"),
        ("attention a { heads 0..3 { mask causal } 3..7 { mask full } }", "each head does one thing"),
        ("attention a { mask causal  norm softmax(temperature = 2.0) }", "scale the score: `score s / 2.0`"),
        ("attention a { keys proj(learn[8, n])  mask causal }", ""),
        ("attention a { mask causal  approx nystrom(8) }", ""),
        ("attention a { approx shen  score alibi }", ""),
        ("use \"masks.attn\"", "only a file has a folder; nothing is read outside of it"),
    ],
    "When a plan is made": [
        ("compile(program['lm'], length=64, heads=4, kv_heads=3)", "query heads share key heads evenly"),
        ("compile(program['duo'], length=64, heads=4)", "the text names more heads"),
        ("compile(program['lm'], length=64, dtype='int8')", "kernels are of real numbers"),
        ("compile(program['lm'], length=64, backend='linear')", "what is asked for is never replaced"),
        ("compile(program['lm'], length=64, block_size=100)", "tiles are packed in bytes"),
        ("program['lm'](width=4)", "a misspelt parameter would change nothing"),
    ],
    "In a call": [
        ("plan(q[..., :4], k, v)", "sizes of a plan are fixed, but for lengths"),
        ("plan(long, long, long)", "the plan serves up to its length; compile a longer one"),
        ("plan(q, k[:, :, :8], v[:, :, :8])", "queries are the last positions, if no offset is said"),
        ("plan(q.int(), k.int(), v.int())", ""),
        ("plan(q, k, v.double())", "nothing is converted silently"),
        ("plan(q.to_sparse(), k, v)", ""),
        ("plan(q, k, v, doc=[0] * 64)", "a table that the text does not declare"),
        ("packed(q, k, v)", "tables are given at each call, or bound"),
        ("packed(q, k, v, doc=[0] * 60)", ""),
        ("packed(q, k, v, doc=[0.5] * 64)", ""),
        ("plan(q, k, v, q_positions=[0] * 60)", ""),
        ("plan_of('sunk', training=True)(q, k, v)", ""),
        ("plan_of('less')(q, k, v, return_lse=True)", "each part has a denominator of its own"),
        ("plan_of('means')(q, k, v, return_lse=True)", ""),
        ("plan_of('lm', length=8192)(many, many, many, return_weights=True)", "they are formed, all pairs"),
        ("twice(plan)", "no backend has second derivatives"),
    ],
    "Of a session": [
        ("session('both')", "later keys would change what earlier queries got"),
        ("session('half')", "so would a longer text"),
        ("session('drawn')", "as `random(4, of = causal)` it lasts"),
        ("session('ahead')", "as `topk(4, of = causal)` it lasts"),
        ("session('means')", ""),
        ("session('lm').step(q.clone().requires_grad_(), k, v)", "caches are for decoding"),
        ("session('first', capacity=40).step(q, k, v)", "no token has been added"),
        ("rolled().truncate(20)", "the slots of older keys have been taken"),
        ("session('lm').step(q.bfloat16(), k.bfloat16(), v.bfloat16())", ""),
    ],
    "Of an analysis": [
        ("program['lm'].graph(10_000)", "`by=\"block\"` serves longer ones"),
        ("program['kept'].mask(64)", "what is chosen depends on q and k"),
        ("program['lm'].mask(-1)", ""),
    ],
}  # fmt: skip
ABOUT = """# What is refused, and why

A wrong result that looks right is the worst that can happen. So what cannot be done right is an
`AttnError`: one message, at most one line of help. These are the refusals that are met most, each as it is
raised; the last column says why, where the message does not. The [limits](language.md#limits) have a table
of their own, [torch](torch.md) says what of torch is refused, and `print(plan)` why a backend declined.
`attndsl check` warns of what is legal and probably not meant.

In the calls `plan_of` makes plans of `length=64, heads=2, head_dim=8` of the program below, and `session`
sessions of them; `rolled()` is one whose cache holds 8 keys and that has had 64. `plan` is of `lm`,
`packed` of `packed`; q, k and v are of 64 tokens. `twice` differentiates a gradient.
"""


def namespace() -> dict[str, Any]:
    """What the calls of the table are made with."""
    program = attndsl.parse(PROGRAM)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))

    def plan_of(name: str, length: int = 64, **more: Any) -> Any:
        return attndsl.compile(program[name], length=length, heads=2, head_dim=8, **more)

    def session(name: str, capacity: int = 64) -> Any:
        return plan_of(name).session(1, capacity)

    def rolled() -> Any:
        found = session("lm", capacity=10_000)
        found.prefill(q, k, v)
        return found

    def twice(plan: Any) -> Any:
        x = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(plan(x, k, v).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.sum(), x)

    plan, packed = plan_of("lm", training=True), plan_of("packed")
    long, many = torch.zeros(1, 2, 65, 8), torch.zeros(1, 2, 8192, 8)
    return {"attndsl": attndsl, "compile": attndsl.compile, **locals()}


def refusal(code: str, names: dict[str, Any]) -> str:
    """The message, and its help, of a text or a call."""
    try:
        attndsl.parse(code) if code.startswith(WORDS) else eval(code, dict(names))
    except attndsl.AttnError as error:
        first = error.diagnostics[0]
        return first.message + (f"; {first.help}" if first.help else "")
    except RuntimeError as error:  # autograd wants one
        return str(error)
    raise AssertionError(f"not refused: {code}")


def page() -> str:
    names, lines = namespace(), [ABOUT, f"```attn\n{PROGRAM.strip()}\n```\n"]
    for section, rows in SECTIONS.items():
        lines.append(f"## {section}\n\n| refused | message | why |\n|---|---|---|")
        for code, why in rows:
            cells = f"`{code}`", refusal(code, names), why
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
