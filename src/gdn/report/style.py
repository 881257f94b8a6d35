"""The page's one style sheet: light, dark, narrow and print; colours are from Okabe and Ito's colour-blind safe set."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1d2126; --muted: #626a73; --line: #e3e4df; --axis: #9aa1a8;
  --band: #f5f5f1; --s0: #0068a8; --s1: #c14f00; --s2: #00805f; --quiet: #b9c0c7; --faint: #9cc4de; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1b1f23; --ink: #e7e9ea; --muted: #9ba4ac; --line: #30363c; --axis: #68717a;
  --band: #20252a; --s0: #63b8ee; --s1: #f0934e; --s2: #3fc79c; --quiet: #56606a; --faint: #2f5f80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 56px 0 4px; }
h2 + .card { margin-top: 16px; }
figure { margin: 0; }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 10px; }
p { margin: 0 0 12px; }
.eyebrow { color: var(--muted); font-size: 0.875rem; margin: 0 0 6px; }
.verdict { font-size: 1.1875rem; max-width: 46em; margin: 0; }
.lead { color: var(--muted); max-width: 46em; margin: 0 0 18px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 20px 22px;
  min-width: 0; margin: 0; }
.top { margin-top: 32px; padding: 28px 28px 20px; display: grid; gap: 36px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.big { font-size: 3.5rem; line-height: 1; font-weight: 650; letter-spacing: -0.02em; color: var(--s0); margin: 0;
  font-variant-numeric: tabular-nums; }
.unit { color: var(--muted); margin: 6px 0 20px; }
.caption, figcaption { color: var(--muted); font-size: 0.875rem; line-height: 1.5; margin: 12px 0 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
h2 + figure > svg { max-width: 560px; }  /* a figure alone on its row: its text no larger than the others' */
svg text { fill: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--muted); font-size: 12px; }
svg .muted { fill: var(--muted); }
svg .strong { font-weight: 650; }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--axis); }
svg .reference { stroke: var(--axis); stroke-dasharray: 3 3; }
svg .plot { overflow: hidden; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .faint { fill: none; stroke: var(--faint); stroke-width: 0.9; stroke-linejoin: round; opacity: 0.9; }
svg .line.s0 { stroke: var(--s0); } svg .line.s1 { stroke: var(--s1); } svg .line.s2 { stroke: var(--s2); }
svg .label.s0, svg .dot.s0 { fill: var(--s0); } svg .label.s1, svg .dot.s1 { fill: var(--s1); }
svg .label.s2, svg .dot.s2 { fill: var(--s2); }
svg .hollow { fill: var(--card); stroke: var(--s0); stroke-width: 1.2; }
svg .bar { fill: var(--quiet); } svg .highlight { fill: var(--s0); }
svg .strip { stroke: var(--quiet); stroke-width: 1.4; }
svg .band { fill: var(--band); }
svg .area { fill: var(--faint); } svg .mean { stroke: var(--s0); stroke-width: 1.6; }
.table { max-height: 262px; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--muted); padding: 0 0 6px 12px; position: sticky; top: 0;
  background: var(--card); }
td { text-align: right; padding: 4px 0 4px 12px; border-top: 1px solid var(--line); }
.wide { margin-top: 20px; } .wide td:last-child, .wide td:first-child { white-space: nowrap; }
.wide .table { max-height: none; }
.word, td:first-child:not(:last-child), th:first-child { text-align: left; padding-left: 0; }
pre { font: 0.8125rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.samples > .card { margin-bottom: 20px; }
.samples .grid { gap: 24px; }
.prompt { color: var(--muted); }
.who { font-size: 0.8125rem; font-weight: 600; color: var(--muted); margin: 0 0 4px; }
.after { color: var(--s0); }
dl { display: grid; grid-template-columns: minmax(8em, max-content) minmax(0, 1fr); gap: 0 28px; margin: 0; }
dt { color: var(--muted); padding: 7px 0; border-top: 1px solid var(--line); }
dd { margin: 0; padding: 7px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
dl > :nth-child(-n+2) { border-top: 0; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 14px; }
@media (max-width: 560px) {
  main { padding: 28px 14px 48px; } h1 { font-size: 1.5rem; } .card { padding: 16px 14px; } .big { font-size: 2.75rem; }
  dl { grid-template-columns: 1fr; } dt { padding-bottom: 0; } dd { border-top: 0; padding-top: 0; }
  dl > :nth-child(2) { border-top: 0; } }
@media print { :root { color-scheme: light;
  --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #ddd; --axis: #888;
  --band: #f5f5f1; --s0: #0068a8; --s1: #c14f00; --s2: #00805f; --quiet: #b9c0c7; --faint: #9cc4de; }
  main { padding: 0; max-width: none; } .card { break-inside: avoid; } h2 { break-after: avoid; }
  .table { max-height: none; } body { font-size: 12px; } }
"""
