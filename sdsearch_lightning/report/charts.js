// The legend of a chart tells the values under the pointer, or at the step that the arrow keys chose.
"use strict";

for (const [index, figure] of [...document.querySelectorAll(".charts figure")].entries()) {
  const {left, width} = Object.fromEntries(Object.entries(figure.parentElement.dataset).map(([name, value]) => [name, Number(value)]));
  const {last, curves} = DATA.charts[index];
  const svg = figure.querySelector("svg[role=img]");
  const values = [...figure.querySelectorAll(".legend b")];
  const ends = values.map((value) => value.textContent);
  const known = [...new Set(curves.flat().map(([step]) => step))].sort((a, b) => a - b);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  svg.append(line);
  let at = null;

  const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  const told = (value) => (Math.abs(value) < 100 ? value.toFixed(3) : Math.round(value).toLocaleString("en"));

  function show(step) {
    at = step;
    const x = left + (width * step) / last;
    for (const [name, value] of Object.entries({x1: x, x2: x, y1: 8, y2: 166})) line.setAttribute(name, value);
    line.classList.add("on");
    figure.querySelector("output").textContent = `step ${step}`;
    values.forEach((value, curve) => {
      const [found, number] = nearest(curves[curve], step);
      value.textContent = told(number) + (found === step ? "" : ` (${found})`);
    });
  }

  function hide() {
    at = null;
    line.classList.remove("on");
    figure.querySelector("output").textContent = "";
    values.forEach((value, curve) => { value.textContent = ends[curve]; });
  }

  const under = (event) => {
    const box = svg.getBoundingClientRect();
    const step = (((event.clientX - box.left) / box.width) * 340 - left) / width * last;
    show(nearest(known.map((one) => [one]), step)[0]);
  };
  svg.addEventListener("pointermove", under);
  svg.addEventListener("pointerdown", under);
  svg.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const place = at === null ? known.length - 1 : known.indexOf(at) + (event.key === "ArrowRight" ? 1 : -1);
    show(known[Math.min(known.length - 1, Math.max(0, place))]);
    event.preventDefault();
  });
}
