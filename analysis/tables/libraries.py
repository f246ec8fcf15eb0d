"""The libraries that make the page interactive, as text to embed: Vega-Lite for figures, DataTables for tables.

Both come from installed packages (`vl-convert-python`, BSD-3-Clause; `itables`, MIT) and not from the network, so a page
works from a file for as long as there are browsers, and the same versions give the same bytes.
"""

import re
from functools import cache
from importlib.resources import files


@cache  # bundling takes seconds
def vega() -> str:
    """The script that defines `vegaEmbed`, with Vega and Vega-Lite in it."""
    import vl_convert  # a native library, which only a page needs

    return _embeddable(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@cache
def datatables() -> tuple[str, str]:
    """The script that defines `DataTable`, with its extensions and jQuery in it, and its style sheet.

    Raises:
        RuntimeError: the installed version of itables exports no DataTable.
    """
    bundle = files("itables") / "html"
    module = (bundle / "dt_bundle.js").read_text(encoding="utf-8")
    # The bundle is a module. A page cannot import from a script that it embeds, so the export becomes a global name.
    script, found = re.subn(r"export\{[^}]*?\b([\w$]+) as default\b[^}]*\}", r"window.DataTable=\1", module)
    if found != 1:
        raise RuntimeError("itables has another layout than that of versions 2.9: install itables>=2.9,<3")
    return _embeddable(script), (bundle / "dt_bundle.css").read_text(encoding="utf-8")


def _embeddable(script: str) -> str:
    """The script without what would end its element in HTML; in a string or a pattern, backslash and slash are a slash."""
    return re.sub(r"<(/script|!--)", r"<\\\1", script, flags=re.IGNORECASE)
