(() => {
  "use strict";
  const views = JSON.parse(document.getElementById("views").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const box = document.getElementById("chart");
  const buttons = [...document.querySelectorAll("#methods button")];
  const colours = ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7"];
  let shown = 0;
  const draw = () => {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const { data, layout } = views[shown];
    const groups = [...new Set(data.map((t) => t.legendgroup ?? t.name))];
    const traces = data.map((t) => {
      if (t.type === "heatmap") return { ...t, colorscale: "Viridis" };
      const color = t.marker?.color ?? colours[groups.indexOf(t.legendgroup ?? t.name) % colours.length];
      const marker = { ...t.marker, color };
      return t.type === "scatter" ? { ...t, marker, line: { ...t.line, color } } : { ...t, marker };
    });
    const lines = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
    // A picture is one panel or several; each panel has axes of its own, and words unless it says otherwise.
    const axes = Object.entries({ xaxis: {}, yaxis: {}, ...layout }).filter(([name]) => /^[xy]axis/.test(name));
    const styled = axes.map(([name, a]) => [name, { ...(name[0] === "x" && { type: "category" }), ...a, ...lines, fixedrange: true }]);
    Plotly.react(box, traces, {
      height: 480,
      ...layout,
      ...Object.fromEntries(styled),
      margin: { l: 60, r: 8, t: 8, b: 60, ...layout.margin },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", ...layout.legend },
      font: { family: css.fontFamily, size: 12, color: colour("--muted") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
    }, { responsive: true, displayModeBar: false, displaylogo: false });
    buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(i === shown)));
  };
  buttons.forEach((b, i) => b.addEventListener("click", () => { shown = i; draw(); }));
  dark.addEventListener("change", draw);
  if (views.length) draw();
})();
