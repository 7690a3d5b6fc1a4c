"""parameters: the number of live pairs as a polynomial in n and a parameter that is left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attndsl.analysis.counting import InParameter, in_parameter
from attndsl.analysis.part import Part, Subject, masks_of
from attndsl.analysis.text import line
from attndsl.errors import fail
from attndsl.expr import var


@dataclass(frozen=True)
class InParameters:
    """The polynomial in each of the parameters that were asked for."""

    in_parameters: Mapping[str, InParameter]


def in_parameters(subject: Subject) -> InParameters:
    """Raises AttnError where the count is no such polynomial."""
    found: dict[str, InParameter] = {}
    if subject.parameters and subject.attention.streams:
        raise fail("it is about keys that are tokens, and here they are streams")
    for name in subject.parameters:
        # a name of its own: the parameter may be called as a variable is
        masks = masks_of(subject.bound(**{name: var(f"?{name}")}).attention, subject.problem)
        if len(masks) > 1:
            raise fail(f"the heads differ: there is no one formula in `{name}`")
        ((mask, times),) = masks.items()
        form = in_parameter(mask, f"?{name}", times)
        if form is None:
            raise fail(f"the count is not known as one polynomial in n and `{name}`", help="give it a value")
        found[name] = form
    return InParameters(found)


def _text(found: InParameters) -> Iterator[str]:
    for name, form in found.in_parameters.items():
        yield line(f"in {name}", f"{form.formula}, for {form.valid_for}")


SECTION = """
{% for name, it in report.in_parameters.items() %}
<div class="formula" data-field="/in_parameters/{{ name }}/formula">{{ it.formula | math }}</div>
<p>in <var>{{ name }}</var>, for {{ it.valid_for | relation }}. As text: <code>{{ it.formula }}</code></p>
{% endfor %}
"""

part = Part(
    in_parameters, _text, ("in_parameters",), known=lambda found: bool(found.in_parameters), place=20,
    title="Live pairs", section=SECTION, streams=True,
)  # fmt: skip
