"""What a plan refuses of backends, of kernels and of callers, and that it can be copied."""

import copy
import inspect
import io
import json
import pickle
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import attndsl
from attndsl import conformance
from attndsl.command.cli import main
from attndsl.conformance import CASES, MECHANISMS
from attndsl.execution import leaks, registry
from attndsl.execution.lowered import KEPT
from attndsl.execution.session import STEP, Session
from attndsl.tiles import lowering

RESULT = "(call.q[..., :1] * call.v[:, :1, :1], torch.zeros(call.q.shape[:3]))"
GOOD = f"""
import torch
from attndsl.backend import Features

class Mine:
    features = Features(modes={{"training"}})
    def supports(self, attention, problem):
        return "it has no gradients" if problem.training else None
    def cost(self, attention, problem, block_mask):
        return 1.0
    def lower(self, attention, problem):
        return lambda call: {RESULT}

backend = Mine()
"""


def attention_of(text="mask causal", params=""):
    return attndsl.parse(f"attention a{params} {{ {text} }}")["a"]


def compiled(backend=None, attention=None, **options):
    sizes = {"length": 8, "heads": 2, "head_dim": 4}
    return attndsl.compile(attention or attention_of(), **sizes, backend=backend, **options)


def qkv(**options):
    return [torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(i), **options) for i in range(3)]


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("features =", "knows =", "it has no `features` of type Features"),
        ("def supports(", "def support(", "it has no method `supports`"),
        ("def cost(", "def price(", "it has no method `cost`"),
        ("def lower(", "def lowered(", "it has no method `lower`"),
        ("problem, block_mask)", "problem)", "its `cost` does not take 3 arguments: too many"),
        ("= Mine()", "= Mine", "it is a class: register an instance"),
        ("(modes=", "(clauses='score', modes=", "its `clauses` are not a set of names: 'score'"),
        ("(modes=", "(norms=['relu'], modes=", "its `norms` are not a set of names: ['relu']"),
        ("(modes=", "(tables={1}, modes=", "its `tables` are not a set of names: {1}"),
        ("(modes=", "(clauses={'scores'}, modes=", "attndsl has no clause `scores`: did you mean `score`?"),
        (
            "(modes=",
            "(operations={'erf'}, modes=",
            "attndsl has no operation `erf`: there are `abs`, `add`, ",
        ),
        ("(modes=", "(dtypes={'fp16'}, modes=", "attndsl has no dtype `fp16`: there are `bfloat16`, "),
        (
            "(modes=",
            "(tables={'painted'}, modes=",
            "attndsl has no table `painted`: there are `bool`, `drawn`, `float`, ",
        ),
        ("import torch", "import torhc", "ModuleNotFoundError: No module named 'torhc'"),
        ("= Mine()", "= Yours()", "NameError: name 'Yours' is not defined"),
    ],
)
def test_a_plugin_without_the_interface_is_listed_and_declined_with_the_reason(
    register, right, wrong, reason
):
    name = register(GOOD.replace(right, wrong))
    listed = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).stdout)["plugins"]
    (error,) = (row["error"] for row in listed if row["name"] == name)
    assert error.startswith(reason)
    plan = compiled()
    assert plan.backend != name
    assert plan.considered[name] == f"the plugin `{name}` of {name} cannot be used: {error}"
    with pytest.raises(attndsl.AttnError) as caught:
        compiled(name)
    assert str(caught.value) == f"error: {plan.considered[name]}"


def test_names_and_groups_that_cannot_be_are_listed_with_the_reason(register):
    register(GOOD, name="my-tiny")
    register(GOOD, "backend", name="lost")
    (register.folder / "empty_files").mkdir()
    register("", "libraries", "_files", name="empty")
    register("", "layouts", "", name="other")
    rows = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).stdout)["plugins"]
    assert {row["name"]: row["error"] for row in rows if row["owner"] != "attndsl"} == {
        "my-tiny": "its name is not one of letters, digits and `_`",
        "lost": "attndsl reads no group `attndsl.backend`: did you mean `backends`?",
        "empty": "`empty_files` holds no .attn file",
        "other": "attndsl reads no group `attndsl.layouts`: there are `analyses`, `backends`, "
        "`libraries`, `selections`, `stages`",
    }


def test_a_name_that_two_register_is_listed_twice_with_the_reason(register):
    names = [register(GOOD.replace("1.0", seconds)) for seconds in ("1.0", "2.0")]
    for name in names:
        points = register.folder / f"{name}-0.1.dist-info" / "entry_points.txt"
        points.write_text(f"[attndsl.backends]\ntwin = {name}:backend\n")
    listed = CliRunner().invoke(main, ["plugins"]).stdout
    twins = [line.split(maxsplit=6) for line in listed.splitlines() if " twin " in line]
    assert {(owner, target) for _, _, owner, target, *_ in twins} == {(x, f"{x}:backend") for x in names}
    assert all(said[-1].startswith("used: `twin` is registered twice under ") for said in twins)
    assert "attndsl.plugins.reference:backend" in listed
    assert compiled().considered["twin"].startswith("`twin` is registered twice under attndsl.backends: by ")
    with pytest.raises(attndsl.AttnError, match="registered twice"):
        compiled("twin")


@pytest.mark.parametrize("cost", ["'1'", "float('nan')", "float('inf')", "-1.0", "True"])
def test_a_cost_that_is_no_number_declines(register, cost):
    name = register(GOOD.replace("return 1.0", f"return {cost}"))
    plan = compiled()
    assert plan.backend != name
    assert plan.considered[name].startswith("its cost is not a number of seconds: ")


@pytest.mark.parametrize("verdict", ["True", "False", "''"])
def test_a_verdict_that_is_no_reason_declines(register, verdict):
    name = register(GOOD.replace("else None", f"else {verdict}"))
    assert compiled().considered[name].endswith("which is neither None nor a reason")
    with pytest.raises(AssertionError, match="neither None nor a reason"):
        conformance.supported(name)


def test_any_real_number_is_a_cost(register):
    name = register("import numpy\n" + GOOD.replace("return 1.0", "return numpy.float32(0)"))
    assert compiled().backend == name


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return 1.0", "return 1 / 0"),
        ("else None", "else 1 / 0"),
        (f"return lambda call: {RESULT}", "return 1 / 0"),
        (RESULT, "1 / 0"),
    ],
)
def test_what_a_backend_raises_is_not_hidden(register, right, wrong):
    name = register(GOOD.replace(right, wrong))
    with pytest.raises(ZeroDivisionError) as caught:
        called(name)
    assert caught.value.__notes__ == [f"raised by the backend `{name}`"]


def called(name):
    return compiled(name)(*qkv())


SELECTION = """
import torch


class Own:
    kind = "order"
    def signature(self): ...
    def check(self, origin): ...
    def rounds(self, origin): return 1
    def relates(self, origin):
        from attndsl.selection import Chunks
        return Chunks(4)
    def reads(self, origin): return "past"
    def counts(self, origin, problem): return {"products": 1.0, "sorted": 0.0}
    def choose(self, origin, offered):
        return torch.arange(offered.k.shape[2]).expand(*offered.q.shape[:2], 1, -1)
    reference = choose


selection = Own()
"""


def chosen_by(name):
    """Each method is asked something."""
    program = attndsl.parse(f"attention a {{ mask causal & {name}() }}")
    compiled(attention=program["a"]).choices(*qkv()[:2])
    return leaks.unstable(program["a"].attention), attndsl.analyze(
        program["a"], length=8, parts=["cost"]
    ).choosing


@pytest.mark.parametrize("method", ["check", "rounds", "relates", "reads", "counts", "choose"])
def test_what_a_selection_raises_is_not_hidden(register, method):
    assert chosen_by(register(SELECTION, "selections", ":selection"))
    wrong = SELECTION.replace(f"def {method}(", f"def {method}(self, *_): 1 / 0\n    def other(")
    name = register(wrong, "selections", ":selection")
    with pytest.raises(ZeroDivisionError) as caught:
        chosen_by(name)
    assert caught.value.__notes__ == [f"raised by the selection `{name}`"]


def test_a_kernel_is_a_function(register):
    name = register(GOOD.replace(f"return lambda call: {RESULT}", "pass"))
    with pytest.raises(attndsl.AttnError, match=f"the backend `{name}` returned no kernel"):
        compiled(name)


OUT = "output as"
LSE = "log-sum-exp as"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("call.q + 1", "returned float32[1, 2, 8, 4] on cpu, not (output, log-sum-exp)"),
        ("None", "returned NoneType, not (output, log-sum-exp)"),
        ("(call.q + 1,)", "not (output, log-sum-exp)"),
        ("(call.q + 1, None)", "not (output, log-sum-exp)"),
        ("(call.q[:, :1] + 1, torch.zeros(1, 2, 8))", OUT),
        ("(call.q.double(), torch.zeros(1, 2, 8))", OUT),
        ("(call.q + 1, torch.zeros(1, 2, 8, 1))", LSE),
        ("(call.q + 1, torch.zeros(1, 2, 8).half())", LSE),
        ("(call.q + 1, torch.zeros(1, 2, 8).double())", LSE),
    ],
)
def test_a_result_of_another_form_names_the_backend(register, result, said):
    name = register(GOOD.replace(RESULT, result))
    with pytest.raises(attndsl.AttnError) as caught:
        compiled(name)(*qkv())
    assert f"the backend `{name}` returned " in str(caught.value)
    assert said in str(caught.value)


def test_a_backend_without_gradients_refuses_the_backward_pass(register):
    name = register(GOOD)
    out = compiled(name)(*qkv(requires_grad=True))
    with pytest.raises(attndsl.AttnError, match="has no gradients for this: it has no gradients"):
        out.sum().backward()


def test_the_suite_holds_a_backend_without_gradients_to_its_results(register):
    name = register(GOOD)
    mine = conformance.supported(name)
    assert {case.mechanism.name for case in mine} >= {"causal", "window"}
    with pytest.raises(AssertionError):
        conformance.check(name, next(case for case in mine if case.mechanism.name == "causal"))


def test_a_backend_that_supports_no_case_shows_nothing(register):
    name = register(GOOD.replace("else None", "else 'it is lazy'"))
    assert conformance.check(name, CASES[0]) == "it is lazy"
    assert not conformance.supported(name)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_an_attention_is_the_same_after_pickling(mechanism):
    attention = attndsl.parse(mechanism.text)["a"]
    assert pickle.loads(pickle.dumps(attention)) == attention


def test_a_deep_attention_is_the_same_after_pickling():
    deep = attention_of(
        f"score {'tanh(' * 60}s{')' * 60} mask {' | '.join(f'shift({i}, causal)' for i in range(60))}"
    )
    assert pickle.loads(pickle.dumps(deep)) == deep


def test_a_pickled_attention_is_not_bound_anew():
    attention = attndsl.parse("attention a(w = 4) { mask last(w) }")["a"]
    copied = pickle.loads(pickle.dumps(attention))
    with pytest.raises(attndsl.AttnError, match="load the program again"):
        copied(w=2)
    assert (copy.deepcopy(attention)(w=2).mask(4) == attention(w=2).mask(4)).all()


def test_tilings_are_kept_for_the_last_few_calls_and_found_again():
    attention = attention_of("inputs doc : int[n]  mask causal & documents(doc)  score s + 0.125 * k")
    plan = compiled("torch", attention)
    assert not plan.lowered.masks.values
    docs = [torch.arange(8) // size for size in range(1, 9)] + [torch.arange(8) % size for size in (2, 3)]
    assert len(docs) > KEPT
    for kept, doc in [*enumerate(docs, 1), *((KEPT, doc) for doc in docs)]:
        q, k, v = qkv()
        live = torch.from_numpy(attention.mask(8, doc=doc)[0])
        torch.testing.assert_close(
            plan(q, k, v, doc=doc),
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=torch.where(live, 0.125 * torch.arange(8), -torch.inf)
            ),
        )
        assert len(plan.lowered.masks.values) == min(kept, KEPT)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [saved, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copied_plan_is_the_same(copied):
    attention = attention_of("inputs doc : int[n] mask causal & documents(doc)")
    plan = compiled("torch", attention, block_size=8).bind(doc=torch.arange(8) // 3)
    again = copied(plan)
    assert (again.problem, again.backend) == (plan.problem, "torch")
    assert again.block_masks.nnz == plan.block_masks.nnz
    assert torch.equal(again(*qkv()), plan(*qkv()))


@pytest.mark.parametrize("copied", [saved, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copied_module_keeps_what_was_learned(copied):
    module = compiled(
        attention=attention_of("mask causal score s + b * q", "(b = learn[H](0.1))"), training=True
    ).module()
    torch.nn.init.normal_(module.b)
    again = copied(module)
    assert torch.equal(again(*qkv()), module(*qkv()))
    torch.nn.init.zeros_(again.b)
    assert not torch.equal(again(*qkv()), module(*qkv()))


def test_a_call_of_a_plan_for_training_leaves_nothing_untrained():
    attention = attention_of("mask causal score s + b * q", "(b = learn[H](0.1))")
    with pytest.raises(attndsl.AttnError, match=r"use plan\.module\(\), which owns `b`"):
        compiled(attention=attention, training=True)(*qkv())
    plan = compiled(attention=attention)
    assert torch.equal(plan(*qkv()), plan.module()(*qkv()))


def test_what_is_learned_is_no_input():
    plan = compiled(attention=attention_of("mask causal score s + b * q", "(b = learn[H](0.1))"))
    for use in (plan.bind, lambda b: plan(*qkv(), b=b), lambda b: plan.module()(*qkv(), b=b)):
        with pytest.raises(attndsl.AttnError, match=r"(?s)`b` is learned.*plan\.module\(\) owns `b`"):
            use(b=torch.zeros(2))


def test_values_of_parameters_are_checked():
    text = "attention a(b = learn[H](0.5)) { mask causal score s + b * (q - k) }"
    plan = attndsl.compile(attndsl.parse(text)["a"], length=8, heads=2, head_dim=4, training=True)
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    value = torch.tensor([0.1, -0.2], requires_grad=True)
    (grad,) = torch.autograd.grad(plan(q, k, v, learned={"b": value}).sum(), value)
    assert grad.shape == (2,)
    with pytest.raises(attndsl.AttnError, match=r"`b` is \[2\], and was given as \[3\]"):
        plan(q, k, v, learned={"b": torch.zeros(3)})
    with pytest.raises(attndsl.AttnError, match="`learned` lacks `b`"):
        plan(q, k, v, learned={})
    for names in (("c",), ("b", "c")):
        with pytest.raises(attndsl.AttnError, match="`learned` has `c`, and there are `b`"):
            plan(q, k, v, learned=dict.fromkeys(names, value))


@pytest.mark.parametrize("added", ["", "attention other { mask causal } attention both = a + weight * other"])
def test_first_values_are_told_of_once_where_a_module_owns_others(added):
    text = "let b = learn[1](0.5) let weight = learn[H](1.0) attention a { mask causal score s * b[0] }"
    program = attndsl.parse(f"{text} {added}")
    plan = attndsl.compile(program["both" if added else "a"], length=8, head_dim=4)
    q = torch.randn(1, 1, 8, 4)
    plan(q, q, q)
    module = plan.module()
    module(q, q, q)
    with pytest.warns(UserWarning, match="first values of `(b|weight)`: call the module, or pass") as told:
        plan.session(1, 8).step(q, q, q)
    plan(q, q, q)
    assert [str(found.message).split("`")[3] for found in told] == (["b", "weight"] if added else ["b"])


def test_a_call_that_asks_for_gradients_and_trains_nothing_is_told():
    text = "attention a(b = learn[H](1.0)) { mask causal  score s * b }"
    plan = attndsl.compile(attndsl.parse(text)["a"], length=8, heads=2, head_dim=4)
    q = torch.randn(1, 2, 8, 4)
    plan(q, q, q)
    asked = q.clone().requires_grad_()
    with torch.no_grad():
        plan(asked, q, q)
    plan.module()(asked, q, q)
    plan(asked, q, q, learned={"b": torch.ones(2)})
    with pytest.warns(
        UserWarning, match=r"no gradients for `b`: call `plan.module\(\)`, or pass `learned=`"
    ) as told:
        plan(q, asked, q)
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("index", "said"), [("[1, 2, 3, 4, 5, 6][h]", "behind entry 3"), ("[1, 2, 3][h // 2]", "behind entry 1")]
)
def test_a_list_with_more_entries_than_heads_is_told(index, said):
    bound = attndsl.parse(f"attention a {{ mask causal  score s * {index} }}")["a"]
    with pytest.warns(UserWarning, match=f"{said} are read by none of 4 heads") as told:
        attndsl.compile(bound, length=8, heads=4, head_dim=4)
    assert told[0].filename == __file__
    attndsl.compile(bound, length=8, heads=6, head_dim=4)


def test_a_plan_whose_backend_was_not_asked_for_takes_another_in_a_dtype_that_it_declines(monkeypatch):
    backend = registry.plugin("backends", "torch")
    monkeypatch.setattr(backend, "features", replace(backend.features, dtypes={"float32"}))
    bound = attndsl.parse("attention lm { mask causal & last(5) }")["lm"]
    asked = attndsl.compile(bound, length=64, head_dim=16, backend="torch")
    chosen = replace(asked, asked=False, others={})
    q = torch.randn(1, 1, 64, 16, dtype=torch.float16)
    with pytest.raises(attndsl.AttnError, match="declines: it knows nothing of the dtype `float16`"):
        asked(q, q, q)
    for plan in (chosen, pickle.loads(pickle.dumps(chosen))):
        assert plan.backend == "torch"
        wanted = plan(q.float(), q.float(), q.float())
        torch.testing.assert_close(plan(q, q, q).float(), wanted, atol=5e-3, rtol=5e-3)


def test_a_wrong_name_may_be_near_any_argument_of_a_call():
    calls = {
        attndsl.Plan.__call__: ("self q k v inputs", lowering.ARGUMENTS),
        lowering.sizes_of: ("attention", lowering.SIZES),
        Session.prefill: ("self q k v inputs", STEP),
    }
    for call, (others, beside) in calls.items():
        assert inspect.signature(call).parameters.keys() - {*others.split()} <= {*beside}
