"""What reading a program does and does not do: each definition is read once, and only where it is used."""

import gc

import pytest

import attndsl
from attndsl import syntax
from attndsl.errors import Source
from attndsl.language import elaborate
from attndsl.syntax import nodes as ast


def test_definitions_are_parsed_when_asked_for():
    text = "pattern a = full\n## the rest\nscore b(t = 1) = s * t\nlet c = (\nattention d { mask a }"
    definitions = syntax.Definitions(Source("text", text))
    assert list(definitions) == ["a", "b", "c", "d"]
    assert "c" in definitions
    assert "full" not in definitions
    assert isinstance(definitions["d"], ast.AttentionDef)
    assert definitions["b"].doc == "the rest"
    assert definitions["b"] is definitions["b"]
    with pytest.raises(AssertionError, match="never closed"):
        definitions["c"]


def test_a_file_shadows_the_prelude():
    assert attndsl.parse("pattern causal = full\nattention a { mask causal }")["a"].mask(3).all()


def test_an_attention_is_written_out_once(monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []

    def attention_of(elaborator: object, definition: ast.AttentionDef, env: object) -> object:
        written.append(definition.name)
        return original(elaborator, definition, env)

    original = elaborate.attention_of
    monkeypatch.setattr(elaborate, "attention_of", attention_of)
    program = attndsl.parse("attention a(w = 3) { mask last(w) }\nassert a <= causal\nassert every_row(a)")
    assert program["a"] is not None
    assert program.warnings == []
    assert written == ["a"]
    program["a"](w=5)
    assert written == ["a", "a"]


@pytest.mark.parametrize("text", ["attention a { mask causal }", "attention a { mask casual }"])
@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(text: str, collects: bool):
    (gc.enable if collects else gc.disable)()
    try:
        attndsl.parse(text)
    except attndsl.AttnError:
        assert "casual" in text
    finally:
        left = gc.isenabled()
        gc.enable()
    assert left is collects


def test_a_check_proves_though_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch):
    program, proved = attndsl.parse("pattern p = causal  assert p <= causal  assert every_row(p)"), []
    monkeypatch.setattr("attndsl.program.prove", lambda assertion: proved.append(assertion))
    program.check()
    assert proved == program.assertions


EMPTY = """
attention lm(w = 4) { mask causal & last(w) }
pattern near(w) = last(w)
attention two(w = 4) { heads 0 { mask last(w) } else { mask last(w + 4) } }
attention pooled(w = 3) { keys pool(4)  mask causal & last(w) }
attention added(w = 3) = lm(w) + 2.0 * lm(w)
attention packed(w = 3) { inputs doc : int[n]  mask last(w) & documents(doc) }
attention far(d = 1) { mask { q, k : q - k == d } }
"""


@pytest.mark.parametrize(
    ("name", "value"), [("lm", -4), ("lm", "2 - 2"), ("near", 0), ("two", -4), ("pooled", 0), ("added", 0)]
)
def test_a_number_that_leaves_no_pair_is_told_where_it_is_bound(name: str, value: object):
    definition, shown = attndsl.parse(EMPTY)[name], 0 if value == "2 - 2" else value
    told = rf"`{name}\(w = {shown}\)` relates no pair at any length"
    with pytest.warns(UserWarning, match=told) as caught:
        definition(w=value)
    assert [found.filename for found in caught] == [__file__]
    with pytest.warns(UserWarning, match=told):
        assert definition(w=3)(value) == definition(3)(w=value)


@pytest.mark.parametrize(
    ("name", "value"), [("lm", 1), ("near", "1..3"), ("two", 0), ("packed", 0), ("far", 100_000)]
)
def test_what_may_have_pairs_is_bound_without_a_word(name: str, value: object):
    """Tables may say anything, and a pair may be far off; warnings are errors here."""
    definition = attndsl.parse(EMPTY.replace("near(w) = last(w)", "near(w = 0..1) = columns(w)"))[name]
    definition(value)
