"""The look of report.html, light and dark; kept in the page, which loads nothing."""

CSS = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1d1b; --soft: #5f5e58; --rule: #e2e1dc;
  --first: #2a78d6; --second: #d9601f; --agree: #2a78d6; --differ: #d83c3c; --right: #18794e; --wrong: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1e; --ink: #ececea; --soft: #a3a29b;
  --rule: #34342f; --first: #5a9cec; --second: #ee8144; --agree: #3987e5; --differ: #e0524f; --right: #4cc38a;
  --wrong: #f2686b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 100ch; } small { color: var(--soft); font-weight: 400; }
.tiles, .charts, .columns { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); margin-top: 22px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); margin-top: 14px; }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); align-items: start; }
.tiles > div, figure, .rollout, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
figure, pre { margin: 0; }
.tiles > div { padding: 12px; color: var(--soft); font-size: 12.5px; }
.tiles b { display: block; color: var(--ink); font-size: 25px; line-height: 1.3; font-weight: 600; }
figure { padding: 12px 14px 6px; } figcaption { font-weight: 600; font-size: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); min-height: 24px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.legend b { color: var(--ink); font-weight: 500; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 10.5px; fill: var(--soft); }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
.line, .faint { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: .4; } .hit { opacity: 0; } .hit:hover { opacity: 1; }
.rollout { padding: 12px 14px; } .rollout h3 { font-size: 14px; margin: 0 0 8px; display: flex; gap: 10px; }
.rollout h3 span { font-weight: 400; color: var(--soft); } .rollout h3 span:last-child { margin-left: auto; }
.question { margin: 12px 0; font-size: 16px; } .question small { display: block; font-size: 14px; }
dl { display: grid; grid-template-columns: 62px minmax(0, 1fr); gap: 3px 10px; margin: 0; }
dt { color: var(--soft); font-size: 12.5px; line-height: 22px; } dd { margin: 0; overflow-wrap: anywhere; }
.REASONING { color: var(--soft); } .QUERY { font-weight: 600; } .ANSWER { font-weight: 600; }
.QUERY small { font-weight: 400; color: var(--soft); }
.OBSERVATION { color: var(--soft); border-left: 2px solid var(--rule); padding-left: 8px; font-size: 13.5px; }
.right { color: var(--right) !important; } .wrong { color: var(--wrong) !important; }
pre { padding: 12px 14px; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; border-radius: 3px; padding: 2px; white-space: pre-wrap; }
.key mark { padding: 2px 6px; color: var(--ink); }
.taught { margin-top: 26px; } .taught > h3 { margin: 0; font-size: 15px; } .taught > .columns { margin-top: 14px; }
footer { margin-top: 40px; padding-top: 14px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 13px; }
"""
