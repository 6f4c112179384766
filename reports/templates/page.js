// Figures are drawn when they come into view, so that a page of thousands of trials opens at once.
const root = getComputedStyle(document.documentElement);
const colour = (name) => root.getPropertyValue(name).trim();
const look = () => ({
  "font.color": colour("--ink"), "font.family": "system-ui, sans-serif", "font.size": 12,
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  "hoverlabel.bgcolor": colour("--card"), "hoverlabel.font.color": colour("--ink"),
  "hoverlabel.align": "left",
});
const axes = (layout) => {
  const found = {};
  (layout.annotations ?? []).forEach((_, i) => { found[`annotations[${i}].font.color`] = colour("--ink"); });
  Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).forEach((key) => {
    found[`${key}.gridcolor`] = found[`${key}.zerolinecolor`] = colour("--line");
    found[`${key}.linecolor`] = colour("--soft");
  });
  return found;
};

const hovers = JSON.parse(document.getElementById("hovers").textContent);

function draw(box) {
  if (box.dataset.drawn) return;
  box.dataset.drawn = "yes";
  const { data, layout } = JSON.parse(document.getElementById(box.dataset.figure).textContent);
  data.filter((trace) => trace.meta === "trials")
    .forEach((trace) => { trace.text = trace.customdata.map((number) => hovers[number]); });
  const shown = {
    margin: { l: 60, r: 20, t: 12, b: 50 }, height: 340, hovermode: "closest", ...layout,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...layout.legend },
  };
  shown.xaxis = { automargin: true, ...shown.xaxis };
  shown.yaxis = { automargin: true, ...shown.yaxis };
  if (shown.yaxis2) shown.yaxis2 = { automargin: true, ...shown.yaxis2 };
  Plotly.newPlot(box, data, shown, { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg", filename: box.dataset.figure } })
    .then(() => Plotly.relayout(box, { ...look(), ...axes(box.layout) }));
}

const boxes = [...document.querySelectorAll(".figure")];
const watcher = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting)
  .forEach((e) => { watcher.unobserve(e.target); draw(e.target); }), { rootMargin: "300px" });
boxes.forEach((box) => watcher.observe(box));
addEventListener("beforeprint", () => boxes.forEach(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => boxes
  .filter((box) => box.layout).forEach((box) => Plotly.relayout(box, { ...look(), ...axes(box.layout) })));

const table = document.getElementById("table-of-trials");
if (table) {
  const body = table.tBodies[0], rows = [...body.rows];
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const sign = head.ariaSort === "descending" ? 1 : -1;
    table.querySelectorAll("th").forEach((other) => { other.ariaSort = null; });
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const value = (row) => row.cells[column].dataset.v;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) {  // a cell without a number is last
        if (x !== y) return x === undefined ? 1 : -1;
        return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      }
      return sign * (x - y);
    });
    body.append(...rows);
  }));
  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    rows.forEach((row) => {
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      n += !row.hidden;
    });
    document.getElementById("n-shown").textContent = n;
  });
}
const seconds = Number(document.getElementById("refresh").textContent);
if (seconds) setTimeout(() => location.reload(), 1000 * seconds);
