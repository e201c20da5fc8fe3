(() => {
  "use strict";
  const $ = (id) => document.getElementById(id);
  const copy = $("copy");
  if (copy) copy.addEventListener("click", async () => {
    const range = document.createRange();
    range.selectNodeContents($("command"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try { await navigator.clipboard.writeText($("command").textContent); } catch { document.execCommand("copy"); }
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  });

  const { figure, scales } = JSON.parse($("figure").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const box = $("map");
  const buttons = [...document.querySelectorAll("#methods button")];
  let shown = 0;
  const draw = () => {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const layout = structuredClone(figure.layout);
    layout.font = { family: css.fontFamily, size: 12, color: colour("--muted") };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.coloraxis.colorscale = scales[dark.matches ? "dark" : "light"];
    layout.hoverlabel = { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" };
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    for (const shape of layout.shapes || []) shape.line.color = colour("--muted");
    const data = figure.data.map((trace, i) => ({ ...trace, visible: i === shown }));
    Plotly.react(box, data, layout, { responsive: true, displayModeBar: false, displaylogo: false, showTips: false });
    buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(i === shown)));
  };
  buttons.forEach((b, i) => b.addEventListener("click", () => { shown = i; draw(); }));
  dark.addEventListener("change", draw);
  draw();
})();
