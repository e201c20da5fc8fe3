(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const draw = (box) => {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const figure = figures[box.dataset.figure];
    Plotly.newPlot(box, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  };
  for (const box of document.querySelectorAll("[data-figure]")) {
    const details = box.closest("details");
    if (!details || details.open) draw(box);
    else details.addEventListener("toggle", () => draw(box));
  }
})();
