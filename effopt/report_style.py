"""The style sheet of the report page: light and dark, screen and paper."""

STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#1d1f23;--soft:#656a73;
--line:#e3e3df;--accent:#2a66d9;--base:#c3c8d1;--inside:#fff;--warn:#8a5a00;--warnbg:#fff4dc;
--good:#1c7a45;--goodbg:#e4f4ea}
@media (prefers-color-scheme:dark){:root{--page:#131518;--card:#1b1e22;--ink:#e9eaec;
--soft:#9aa0aa;--line:#2d3138;--accent:#6b9cf5;--base:#4b525d;--inside:#10131a;--warn:#f0c26a;
--warnbg:#332810;--good:#74cf9b;--goodbg:#16301f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:960px;margin:0 auto;padding:32px 20px 8px}
p{margin:0}
h1{font-size:26px;line-height:1.25;margin:2px 0 8px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 14px;font-weight:650}
code{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.kicker{color:var(--accent);font-size:13px;font-weight:600;letter-spacing:.02em}
.soft{color:var(--soft);font-weight:400}
.small{font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;
margin:22px 0 12px}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:14px 16px;min-width:0;overflow-wrap:anywhere}
.big{font-size:26px;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums}
.pending,.note{border-radius:8px;padding:10px 14px;margin:12px 0;overflow-wrap:anywhere}
.pending{background:var(--warnbg);color:var(--warn)}
.note{border:1px solid var(--line);color:var(--soft)}
section{padding:18px 20px;margin:14px 0}
.wide{overflow-x:auto}
.wide+.wide,.wide+p,p+.wide,.said{margin-top:14px}
.said+.wide{margin-top:20px}
.picture{display:block;width:100%;min-width:560px;height:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-size:12.5px;font-weight:550;color:var(--soft);white-space:nowrap}
th,td{padding:7px 14px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
th:last-child,td:last-child{padding-right:0}
tbody tr:last-child td{border-bottom:0}
.word{text-align:left;min-width:84px;overflow-wrap:anywhere}
.figure{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.mark{display:inline-block;font-size:12px;padding:1px 8px;border-radius:9px;white-space:nowrap;
border:1px solid var(--line);color:var(--soft)}
.mark.changed{background:var(--goodbg);color:var(--good);border-color:transparent}
.mark.skipped{background:var(--warnbg);color:var(--warn);border-color:transparent}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;background:var(--accent);
margin:0 6px 0 0;vertical-align:-1px}
.key.base{background:var(--base)}
.key:not(.base){margin-left:14px}
.value{white-space:pre}
text{font-family:inherit;fill:var(--ink);font-size:13px;font-variant-numeric:tabular-nums}
.group{font-weight:600}.gain{font-weight:650;fill:var(--accent)}
.value,.tick{fill:var(--soft)}.tick{font-size:12px}.inside{fill:var(--inside);font-size:12px}
.bar{fill:var(--accent)}.bar.base{fill:var(--base)}
.curve{fill:none;stroke:var(--accent);stroke-width:2}.curve.base{stroke:var(--soft)}
.key.base.line{background:var(--soft)}
.dot{fill:var(--accent)}.limit{stroke:var(--warn);stroke-width:1.4;stroke-dasharray:6 4}
.whisker{stroke:var(--ink);stroke-width:1.4}.grid{stroke:var(--line);stroke-width:1}
footer{max-width:960px;margin:0 auto;padding:8px 20px 36px;color:var(--soft);font-size:13px}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
""".replace("\n", "")
