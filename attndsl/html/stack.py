"""The report of a stack as one HTML page that stands alone."""

from __future__ import annotations

from importlib import resources

from attndsl.analysis.units import scaled
from attndsl.html.page import images
from attndsl.pictures.style import DARK, LIGHT, Drawing
from attndsl.stacks.depth import Depth, rows


def of_stack(found: Depth, masks: Drawing, source: str | None) -> str:
    """The page of what was found, with `masks` of the layers and the text of the .attn file."""
    import jinja2
    from markupsafe import Markup

    files = {file.name: file for file in resources.files("attndsl.html").iterdir()}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files[name].read_text("utf-8")),
    )  # fmt: skip
    environment.filters["scaled"] = lambda value, unit="": "—" if value is None else scaled(value, unit)
    return environment.get_template("stack.html.jinja").render(
        found=found, rows=[*rows(found.levels)], masks=images(masks), source=source, light=LIGHT, dark=DARK,
        style=Markup(files["page.css"].read_text("utf-8")),
    )  # fmt: skip
