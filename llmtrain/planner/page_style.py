"""The style sheet of a plan's page: the house's colours and sizes, light and dark, from a telephone up."""

FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'
STYLE = (
    """
:root {
  --page: #f6f6f3; --card: #ffffff; --ink: #1b1f27; --muted: #5d6472; --line: #e2e2dc; --soft: #efefea;
  --blue: #1f5fbf; --blue-2: #6f9fe0; --orange: #c8501b; --orange-2: #e39a6f;
  --green: #2f7f6d; --green-2: #7fb8a8; --grey: #b9bdc6; --bad: #b3261e; --bad-soft: #fbe3e1;
  --inside: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121419; --card: #1b1e25; --ink: #e7e9ee; --muted: #a0a7b4; --line: #31363f; --soft: #252932;
    --blue: #76a9ff; --blue-2: #3f6cb0; --orange: #ff9a66; --orange-2: #a35a35;
    --green: #63c2ab; --green-2: #35705f; --grey: #666d7a; --bad: #ff8c84; --bad-soft: #40211f;
    --inside: #0e1116;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 FONT; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
p { margin: 0; }
.verdict { font-size: 19px; line-height: 1.4; margin: 10px 0 20px; max-width: 96ch; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; margin-bottom: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; min-width: 0; }
.wide { margin-bottom: 16px; }
.tile .name, .note { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
p.note { margin-top: 10px; max-width: 110ch; }
.tile .value { font-size: 25px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .value small { font-size: 13px; font-weight: 400; color: var(--muted); white-space: nowrap; }
.halves { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin-bottom: 16px; }
.on-narrow { display: none; }
@media (max-width: 960px) {
  .halves { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px FONT; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.tick, svg text.spread.silent, svg text.amount { fill: var(--muted); }
svg text.unit { fill: var(--muted); font-style: italic; }
svg text.strong, svg text.spread.this, svg text.choice-label, svg text.point-label.chosen {
  font-weight: 650; }
svg text.amount.strong { fill: var(--ink); }
svg text.halo, svg text.curve-label {
  paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg text.inside { fill: var(--inside); }
svg text.limit-label { fill: var(--bad); }
svg text.choice-label, svg text.point-label.chosen { fill: var(--orange); }
svg text.band-label, svg text.spread.this, svg text.curve-label.this { fill: var(--blue); }
svg text.curve-label.this { font-weight: 650; }
svg text.curve-label.around { fill: var(--muted); }
svg text.curve-label.limited { fill: var(--orange); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; }
svg .mark { stroke: var(--orange); stroke-width: 1; stroke-dasharray: 4 3; }
svg .limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .leader { stroke: var(--muted); stroke-width: 0.8; }
svg .curve { fill: none; stroke-width: 1.4; stroke: var(--grey); }
svg .curve.this { stroke: var(--blue); stroke-width: 2.4; }
svg .curve.limited { stroke: var(--orange); stroke-width: 2; stroke-dasharray: 6 4; }
svg .low { fill: var(--grey); }
svg .low.this { fill: var(--blue); }
svg circle.choice { fill: var(--orange); stroke: var(--card); stroke-width: 2; }
svg rect.band { fill: var(--blue); opacity: 0.11; }
svg .whisker { stroke: var(--grey); stroke-width: 3; }
svg .whisker-mid { stroke: var(--muted); stroke-width: 2; }
svg .whisker.this, svg .whisker-mid.this { stroke: var(--blue); }
svg .whisker.silent { stroke-dasharray: 3 2; }
svg .whisker.ink, svg .whisker-mid.ink { stroke: var(--ink); stroke-width: 1.5; }
svg circle.ink { fill: var(--ink); }
svg rect.over { fill: var(--bad-soft); opacity: 0.6; }
svg rect.part { stroke: var(--card); stroke-width: 1; }
svg rect.row { stroke: none; }
.useful { fill: var(--blue); background: var(--blue); }
.useful-2 { fill: var(--blue-2); background: var(--blue-2); }
.side { fill: var(--green); background: var(--green); }
.side-2 { fill: var(--green-2); background: var(--green-2); }
.wire { fill: var(--orange); background: var(--orange); }
.wire-2 { fill: var(--orange-2); background: var(--orange-2); }
.idle, .rest, .instant { fill: var(--grey); background: var(--grey); }
.fullest { fill: var(--muted); }
.group { white-space: nowrap; margin-right: 10px; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
svg polyline.front { fill: none; stroke: var(--blue); stroke-width: 1.4; }
svg circle.point { stroke: var(--card); stroke-width: 1.5; }
svg circle.kept { fill: var(--grey); }
svg circle.rival { fill: var(--blue); }
svg circle.chosen { fill: var(--orange); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 13px; vertical-align: bottom; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.right { text-align: right; }
td.right { white-space: nowrap; }
tr.strong td { font-weight: 650; }
td small { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.scroll { overflow-x: auto; }
dl { display: grid; grid-template-columns: 110px minmax(0, 1fr); gap: 6px 12px; margin: 0; font-size: 14px; }
.scroll + dl { margin-top: 12px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
ul.notes { margin: 0; padding-left: 18px; display: grid; gap: 6px; font-size: 14px; overflow-wrap: anywhere; }
details { margin-top: 12px; font-size: 14px; }
summary { cursor: pointer; color: var(--blue); margin-bottom: 8px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
footer { color: var(--muted); font-size: 13px; margin-top: 20px; }
@media (max-width: 640px) {
  main { padding: 20px 16px 40px; } .card { padding: 14px; } .verdict { font-size: 17px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } .tile .value { font-size: 21px; }
  table { font-size: 13px; } th, td { padding-right: 8px; } .wide table { min-width: 700px; }
  dl { grid-template-columns: 84px minmax(0, 1fr); }
  .on-wide { display: none; } .on-narrow { display: block; max-width: 420px; }
}
@media print { body { background: none; } .card { break-inside: avoid; } }
"""
).replace("FONT", FONT)
