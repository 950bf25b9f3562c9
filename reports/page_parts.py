"""What is the same in every page: its looks, and what draws its figures."""

import re
from functools import cache

import altair as alt
import vl_convert

from reports.style import FONT

CSS = f"""
:root {{ color-scheme: light; --ink: #1a1a1a; --soft: #555; --line: #dcdcdc; --blue: #0072B2; }}
* {{ box-sizing: border-box; }}
html {{ scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 {FONT}; }}
main, header {{ max-width: 1180px; margin: 0 auto; padding: 0 24px; }}
header {{ padding-top: 40px; }}
h1 {{ font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; }}
h2 {{ font-size: 1.5rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 2px solid var(--ink);
     letter-spacing: -.01em; }}
h3 {{ font-size: 1.05rem; margin: 2.2rem 0 .6rem; }}
h2, h3, p, li, tbody th, td.text, summary {{ overflow-wrap: anywhere; }}
p {{ margin: .4rem 0; max-width: 75ch; }}
ul {{ margin: .4rem 0 1rem; padding-left: 1.2rem; max-width: 85ch; }}
.soft, figcaption p {{ color: var(--soft); font-size: .875rem; }}
nav {{ position: sticky; top: 0; z-index: 2; background: #fff; border-bottom: 1px solid var(--line);
      margin-top: 1rem; }}
nav div {{ max-width: 1180px; margin: 0 auto; padding: 8px 24px; display: flex; flex-wrap: wrap;
          gap: 4px 20px; }}
a {{ color: var(--blue); }}
nav a {{ padding: 4px 0; text-decoration: none; font-weight: 500; }}
nav a:hover {{ text-decoration: underline; }}
.wide {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4;
        font-variant-numeric: tabular-nums; }}
th, td {{ padding: 6px 12px; text-align: left; vertical-align: top; }}
thead th {{ font-weight: 600; border-bottom: 1px solid var(--ink); white-space: nowrap; }}
td.number, th.number {{ text-align: right; white-space: nowrap; }}
tbody tr + tr td {{ border-top: 1px solid #eee; }}
tbody th {{ background: #f5f6f7; border-top: 1px solid var(--line); font-weight: 600; }}
tbody th span {{ font-weight: 400; color: var(--soft); display: block; font-size: .8125rem; }}
tr.front td:first-child::after {{ content: " \\25C6"; color: var(--blue); }}
tr.broken td:nth-child(2) {{ color: #a63c00; font-weight: 600; }}
td {{ white-space: nowrap; }}
td.text {{ white-space: normal; min-width: 10rem; }}
.figures {{ display: grid; gap: 28px 36px; margin-top: 1.2rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }}
.figures > :first-child:nth-last-child(odd) {{ grid-column: 1 / -1; }}
figure {{ margin: 0; min-width: 0; }}
figcaption b {{ font-weight: 600; }}
figcaption p {{ margin: 0 0 .5rem; line-height: 1.45; }}
.chart {{ width: 100%; min-height: 240px; }}
.chart svg {{ display: block; max-width: 100%; }}
.chart .failed {{ color: #a63c00; }}
details {{ border-top: 1px solid var(--line); padding: .7rem 0; }}
summary {{ cursor: pointer; font-weight: 600; }}
footer {{ margin: 3rem 0 2rem; }}
#vg-tooltip-element {{ font: 13px/1.4 {FONT} !important; color: var(--ink) !important;
                      pointer-events: none; max-width: min(340px, 90vw); overflow-wrap: anywhere; }}
@media (max-width: 640px) {{
  main, header, nav div {{ padding-left: 16px; padding-right: 16px; }}
  header {{ padding-top: 24px; }}
  h1 {{ font-size: 1.6rem; }}
  th, td {{ padding: 6px 9px; }}
  tbody th div {{ position: sticky; left: 9px; max-width: calc(100vw - 52px); }}
  .points td:first-child {{ position: sticky; left: 0; background: #fff; }}
}}
@media print {{ nav {{ display: none; }} }}
"""

SCRIPT = """
const specs = JSON.parse(document.getElementById("specs").textContent);
const draw = async (place) => {
  try {
    await vegaEmbed(place, specs[place.dataset.spec], {actions: false, renderer: "svg"});
    place.dataset.drawn = "yes";
  } catch (error) {
    place.innerHTML = '<p class="failed">This figure could not be drawn.</p>';
    console.error(error);
  }
};
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }
}, {rootMargin: "600px"});
for (const place of document.querySelectorAll(".chart")) watcher.observe(place);
"""
"""A figure is drawn when it comes near the window: hundreds at once would make a phone wait."""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "script-src 'unsafe-inline' 'unsafe-eval'"
)
"""The page may load nothing. Vega makes functions of its expressions."""

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The version that altair writes, as vl_convert names it."""


@cache
def libraries() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script that may stand in HTML."""
    script = vl_convert.javascript_bundle(vl_version=VEGA_LITE)
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)
