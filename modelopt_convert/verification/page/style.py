"""Style and script of the HTML report: nothing is fetched, both color schemes, a phone's width."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--line:#d9dde3;--ink:#1b2129;--soft:#5b6673;
--pass:#17733a;--warn:#8a5300;--fail:#b3261e;--other:#56616e;
--pass-bg:#e3f4e8;--warn-bg:#fdf0d8;--fail-bg:#fce5e3;--other-bg:#e9ecf0}
@media (prefers-color-scheme:dark){:root{--paper:#12161b;--card:#1a2027;--line:#323b46;--ink:#e6eaef;--soft:#9aa6b3;
--pass:#6fd08f;--warn:#f0b95a;--fail:#ff8a80;--other:#a9b4c0;
--pass-bg:#12301d;--warn-bg:#34260c;--fail-bg:#3b1715;--other-bg:#262e37}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.15rem;margin:32px 0 10px}
h3{font-size:.95rem;margin:18px 0 4px;font-weight:600}
p{margin:4px 0 8px}
.soft{color:var(--soft)}
.verdict{border-radius:10px;border:1px solid var(--line);border-left-width:8px;padding:16px 18px;background:var(--card)}
.verdict h1{overflow-wrap:anywhere}
.verdict.pass{border-left-color:var(--pass)}.verdict.pass h1{color:var(--pass)}
.verdict.warn{border-left-color:var(--warn)}.verdict.warn h1{color:var(--warn)}
.verdict.fail{border-left-color:var(--fail)}.verdict.fail h1{color:var(--fail)}
.verdict.other{border-left-color:var(--warn)}.verdict.other h1{color:var(--warn)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(210px,100%),1fr));gap:8px 20px;margin:12px 0 0}
dt{color:var(--soft);font-size:.82rem}
dd{margin:0;overflow-wrap:anywhere}
.badge{display:inline-block;border-radius:99px;padding:0 9px;font-size:.82rem;font-weight:600;white-space:nowrap}
.badge.pass{color:var(--pass);background:var(--pass-bg)}.badge.warn{color:var(--warn);background:var(--warn-bg)}
.badge.fail{color:var(--fail);background:var(--fail-bg)}.badge.other{color:var(--other);background:var(--other-bg)}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;vertical-align:top;padding:6px 10px;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:600;white-space:nowrap;background:var(--card)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.name,td.long{overflow-wrap:anywhere;min-width:13em}td.long{width:50%}
td.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem}
td ul{margin:4px 0 0;padding-left:18px}
summary{cursor:pointer;padding:6px 0}
select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:4px 8px;
max-width:100%;text-overflow:ellipsis}
.controls{display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center}
.controls label{max-width:100%;min-width:0}
.scale{display:inline-flex;gap:8px;align-items:center;font-size:.82rem;color:var(--soft)}
.scale i{display:inline-block;width:110px;height:12px;border-radius:3px;border:1px solid var(--line)}
.marks{font-size:.82rem;color:var(--soft)}
.figure{overflow-x:auto}
@media (max-width:600px){main{padding:10px}h1{font-size:1.5rem}th,td{padding:5px 7px}
td.name,td.long{min-width:10em}}
"""

# Colors are chosen here and not in the figures, so that the page can follow a change of the color scheme.
SCRIPT = """
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const pick = document.getElementById("metric");
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const scales = {
    light: [[0, "#dfeaf6"], [0.5, "#5b9bd0"], [1, "#0b2f63"]],
    dark: [[0, "#17304b"], [0.5, "#3d86c6"], [1, "#d3e8ff"]],
  };
  const steps = () => ["--pass-bg", "--other-bg", "--warn-bg", "--fail-bg"].flatMap((name, place) =>
    [[place / 4, color(name)], [(place + 1) / 4, color(name)]]);
  const draw = () => {
    const chosen = Number(pick.value);
    const metric = data.metrics[chosen];
    const colorscale = metric.status ? steps() : scales[dark.matches ? "dark" : "light"];
    document.getElementById("low").textContent = metric.legend[0];
    document.getElementById("high").textContent = metric.legend[1];
    document.getElementById("ramp").style.background =
      "linear-gradient(90deg," + colorscale.map(([at, shade]) => shade + " " + 100 * at + "%").join(",") + ")";
    data.figures.forEach((figure, place) => {
      const [heat, ...marks] = figure.metrics[chosen];
      const traces = [{...heat, ...figure.shared, colorscale}];
      for (const mark of marks) {
        const shade = color("--" + mark.name);
        const edge = {color: color("--paper"), width: mark.name === "other" ? 0 : 1};
        traces.push({...mark, marker: {...mark.marker, color: shade, line: edge}});
      }
      const axis = {color: color("--soft")};
      Plotly.react("figure-" + place, traces, {
        ...figure.layout,
        xaxis: {...figure.layout.xaxis, ...axis},
        yaxis: {...figure.layout.yaxis, ...axis},
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: color("--card"),
        font: {family: "system-ui, sans-serif", size: 11.5, color: color("--ink")},
        hoverlabel: {bgcolor: color("--card"), bordercolor: color("--soft"), align: "left",
          font: {color: color("--ink"), family: "system-ui, sans-serif", size: 12.5}},
      }, {displayModeBar: false, doubleClick: false, scrollZoom: false, typesetMath: false, showTips: false});
    });
  };
  pick.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  draw();
})();
"""
