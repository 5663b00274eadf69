"""The style of the page, light and dark."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #22252b; --faint: #6b7079; --rule: #e3e1da;
  --c0: #2563c9; --c1: #c8501a; --c2: #16806a; --c3: #8546b8; --c4: #9a7400; --c5: #c02b52; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --card: #1e2126; --ink: #e6e6e3; --faint: #9aa0aa; --rule: #343840;
  --c0: #79a8f5; --c1: #f0935f; --c2: #57c7ae; --c3: #c297ea; --c4: #d9b44a; --c5: #f0809c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 36px 0 6px; }
p { margin: 4px 0 10px; }
.facts, .notes, details p { color: var(--faint); font-size: 13px; }
.notes { padding-left: 18px; margin: 10px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th:first-child { text-align: left; }
thead th { color: var(--faint); font-weight: 500; font-size: 12px; white-space: normal; }
tbody th { font-weight: 500; }
details { margin: 6px 0; }
summary { cursor: pointer; color: var(--faint); font-size: 13px; }
.plots { display: grid; gap: 16px; margin-top: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; padding: 14px 14px 8px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 6px;
  padding: 0; font-size: 12px; color: var(--faint); }
.key { display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid var(--colour); }
.key.dashed { border-top-style: dashed; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--faint); stroke-width: 1; }
.tick, .label { fill: var(--faint); font-size: 11px; }
.mid { text-anchor: middle; }
.end { text-anchor: end; }
.line { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; }
.area { fill: var(--colour); opacity: 0.14; }
.dot { fill: var(--colour); stroke: var(--card); stroke-width: 1.5; }
.c0 { --colour: var(--c0); } .c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); }
.c3 { --colour: var(--c3); } .c4 { --colour: var(--c4); } .c5 { --colour: var(--c5); }
"""
