"""The page that `dvc plots show` fills, with the drawing library inside: `python -m plots.offline PATH`.

DVC's own page loads vega from a content network and shows nothing offline. This one is generated at set-up
from the bundle that vl-convert ships, and must not be committed: it is a megabyte of other people's code.
Used through `dvc config plots.html_template PATH`, PATH relative to `.dvc/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import vl_convert

VEGA_LITE = "5.20"  # the major version that DVC's templates and plots/templates.py declare
# DVC's placeholder {scripts} is left out on purpose: it would bring back the links to the network.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>Plumbline: plots</title>
<script>%s</script>
<style>
body { font-family: system-ui, sans-serif; margin: 1rem; background: white; color: #222; }
body > div { overflow-x: auto; margin-bottom: 2rem; }
</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    """The HTML template, with DVC's placeholders `{plot_divs}` and `{refresh_tag}`.

    Raises:
        RuntimeError: the bundle contains something that would break the page.
    """
    # DVC's generated scripts call vegaEmbed as a global.
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    for breaking in ("</script", "{plot_divs}", "{refresh_tag}", "{scripts}"):
        if breaking in bundle.lower():
            raise RuntimeError(f"the vega bundle contains {breaking!r} and cannot be put inside a page")
    return PAGE.replace("%s", bundle)


def main(arguments: list[str]) -> int:
    """Write the page to the path given; 2 when the command line is wrong."""
    if len(arguments) != 1:
        print("usage: python -m plots.offline PATH", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
