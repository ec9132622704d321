"""The style of the HTML report: nothing is fetched, both color schemes, a phone's width."""

STYLE = """
:root{color-scheme:light dark;--paper:#f7f8fa;--card:#fff;--line:#d9dee5;--ink:#18202a;--soft:#566270;
--pass:#14713a;--part:#2f6f57;--warn:#8a5000;--fail:#b3241c;--other:#556070;
--pass-bg:#dff3e6;--part-bg:#eef6f1;--warn-bg:#fdeecf;--fail-bg:#fde3e0;--other-bg:#e8ebef;
--fill-pass:#2f9e5b;--fill-part:#a9dcbf;--fill-warn:#e5a53a;--fill-fail:#cf3f35;--fill-other:#c3cad3;
--r1:#e3edf8;--r2:#b9d3ee;--r3:#86b3e0;--r4:#2f6fb3;--r5:#12427a;--up:#fff;--down:#10243c}
@media (prefers-color-scheme:dark){:root{--paper:#0f1318;--card:#171d24;--line:#2d3641;--ink:#e7ebf0;--soft:#9aa7b5;
--pass:#74d497;--part:#9fd3b6;--warn:#f2bd62;--fail:#ff8d83;--other:#a8b4c1;
--pass-bg:#12311f;--part-bg:#1b2b24;--warn-bg:#36280d;--fail-bg:#3e1917;--other-bg:#272f39;
--fill-pass:#2f9e5b;--fill-part:#2c5f45;--fill-warn:#c98a22;--fill-fail:#c8443b;--fill-other:#4b5664;
--r1:#1a2b40;--r2:#21436b;--r3:#2f6299;--r4:#79aee0;--r5:#d2e6fb;--up:#0c1c2e;--down:#e4effb}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:28px 24px 56px}
section,details{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 24px;
margin:16px 0 0}
h1{font-size:2rem;line-height:1.2;margin:2px 0 8px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.15rem;line-height:1.3;margin:0 0 10px}
h3{font-size:.95rem;margin:18px 0 6px;overflow-wrap:anywhere}
p{margin:0 0 10px;overflow-wrap:anywhere}
.soft{color:var(--soft)}
.verdict{border:1px solid;border-radius:14px;padding:22px 26px}
.verdict p{max-width:70ch}.verdict .soft{margin:0;font-size:.88rem}
.verdict.pass{background:var(--pass-bg);border-color:var(--fill-pass)}.verdict.pass h1{color:var(--pass)}
.verdict.warn{background:var(--warn-bg);border-color:var(--fill-warn)}.verdict.warn h1{color:var(--warn)}
.verdict.fail{background:var(--fail-bg);border-color:var(--fill-fail)}.verdict.fail h1{color:var(--fail)}
.verdict.other{background:var(--other-bg);border-color:var(--other)}.verdict.other h1{color:var(--ink)}
dl{margin:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(min(190px,100%),1fr));gap:12px 28px}
dl.run{grid-template-columns:repeat(auto-fill,minmax(130px,1fr))}
.verdict dl{margin-top:16px}
dt{font-size:.82rem;color:var(--soft)}
.verdict .soft,.verdict dt{color:inherit;opacity:.82}
dd{margin:0;overflow-wrap:anywhere}
dl.terms{grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr))}
.terms dt{font-size:1rem;font-weight:600;color:var(--ink)}.terms dd{color:var(--soft);font-size:.93rem}
pre,td:first-child{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:0 0 12px;padding:10px 14px;background:var(--paper);border:1px solid var(--line);border-radius:8px;
font-size:.88rem;white-space:pre-wrap;overflow-wrap:anywhere}
section>:last-child{margin-bottom:0}
td b{display:inline-block;border-radius:99px;padding:1px 10px;font-size:.82rem;white-space:nowrap}
td:first-child b{padding:0;font-size:inherit}
b.pass{color:var(--pass);background:var(--pass-bg)}b.part{color:var(--part);background:var(--part-bg)}
b.warn{color:var(--warn);background:var(--warn-bg)}b.fail{color:var(--fail);background:var(--fail-bg)}
b.other{color:var(--other);background:var(--other-bg)}
.bar{display:block;width:100%;height:18px;border-radius:9px}
rect.pass{fill:var(--fill-pass)}rect.part{fill:var(--fill-part)}rect.warn{fill:var(--fill-warn)}
rect.fail{fill:var(--fill-fail)}rect.other{fill:var(--fill-other)}
.key,.legend{list-style:none;padding:0;margin:10px 0 0;display:flex;flex-wrap:wrap;gap:4px 20px;font-size:.92rem}
.legend{margin:8px 0 0;color:var(--soft);font-size:.86rem;align-items:center}
i{display:inline-block;font-style:normal;width:13px;height:13px;border-radius:3px;vertical-align:-1px;--b:var(--fill-other)}
i.pass{--b:var(--fill-pass)}i.part{--b:var(--fill-part)}i.warn{--b:var(--fill-warn)}i.fail{--b:var(--fill-fail)}
i{background:var(--b)}
.map{display:grid;grid-template-columns:fit-content(45%) 1fr;gap:3px 12px;align-items:start}
.map p{display:contents}
.map p>:first-child{min-width:178px;overflow-wrap:anywhere;
font:.82rem/22px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.map span+span{display:flex;flex-wrap:wrap;gap:2px}
.map i{width:22px;height:22px;border-radius:4px;font-size:.72rem;line-height:22px;text-align:center;color:#0c1a12;
font-variant-numeric:tabular-nums}
.map .fail{color:#fff;font-weight:700;text-decoration:underline;outline:2px solid var(--fail);outline-offset:-2px}
.map .warn{outline:2px dashed var(--warn);outline-offset:-2px}
.map .other{color:var(--ink)}.map .part{color:var(--ink)}
input{position:absolute;opacity:0}
label{display:inline-block;border:1px solid var(--line);border-radius:99px;padding:3px 13px;margin:0 2px 2px;
font-size:.88rem;cursor:pointer}
:checked+label{background:var(--ink);color:var(--card);border-color:var(--ink)}
:focus-visible+label,summary:focus-visible{outline:2px solid var(--r4);outline-offset:2px}
.of-d,.of-k{display:none;gap:3px}
.of-d i,.of-k i{width:26px}
#show-d:checked~.of-d,#show-k:checked~.of-k{display:flex}
#show-d:checked~.of-s,#show-k:checked~.of-s{display:none}
#show-d:checked~.maps i,#show-k:checked~.maps i{--b:transparent;color:var(--soft);
box-shadow:inset 0 0 0 1px var(--line)}
i.r1,#show-d:checked~.maps .d1,#show-k:checked~.maps .k1{--b:var(--r1);color:var(--down)}
i.r2,#show-d:checked~.maps .d2,#show-k:checked~.maps .k2{--b:var(--r2);color:var(--down)}
i.r3,#show-d:checked~.maps .d3,#show-k:checked~.maps .k3{--b:var(--r3);color:var(--down)}
i.r4,#show-d:checked~.maps .d4,#show-k:checked~.maps .k4{--b:var(--r4);color:var(--up)}
i.r5,#show-d:checked~.maps .d5,#show-k:checked~.maps .k5{--b:var(--r5);color:var(--up)}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:7px 14px 7px 0;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;font-size:.82rem;white-space:nowrap}
tr:last-child td{border-bottom:0}
td{overflow-wrap:anywhere}td:first-child{font-size:.82rem;min-width:14em}
.modules td:first-child{min-width:27em}
.levels td:first-child,.backends td:first-child{white-space:nowrap}
.modules td+td,.probes td:nth-child(4){white-space:nowrap;font-variant-numeric:tabular-nums}
ul{margin:4px 0 0;padding-left:18px}
summary{cursor:pointer;font-weight:600}details[open] summary{margin-bottom:10px}
@media (max-width:820px){main{padding:12px 12px 32px}section,details{padding:16px;border-radius:10px}
.verdict{padding:18px 16px}h1{font-size:1.55rem}
.map{grid-template-columns:1fr}.map p{display:block;margin:0 0 6px}
thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
table,tbody{display:block}
tr{display:flex;flex-wrap:wrap;gap:2px 14px;padding:10px 0;border-bottom:1px solid var(--line)}
tr:last-child{border-bottom:0}td{border:0;padding:0;min-width:0;max-width:100%}td:empty{display:none}
td:first-child,.modules td:first-child{min-width:0;flex-basis:100%}
.levels td:first-child,.backends td:first-child{white-space:normal;flex-basis:auto;flex-grow:1}
.levels td:last-child,.backends td:last-child,.probes td:last-child{flex-basis:100%;color:var(--soft)}
.modules td:nth-child(n+4)::before{color:var(--soft)}
.modules td:nth-child(4)::before{content:"error "}.modules td:nth-child(5)::before{content:"gain "}
.modules td:nth-child(6)::before{content:"row "}.modules td:nth-child(7)::before{content:"column "}
.modules td:nth-child(8)::before{content:"dB "}.modules td:nth-child(9)::before{content:"kernel "}
.probes td:nth-child(4)::before{content:"calc_diff "}}
@media print{body{background:#fff}section,.verdict{break-inside:avoid}}
"""
