"use strict";
const $ = (selector, from = document) => from.querySelector(selector);
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
const data = id => { const there = document.getElementById(id); return there && JSON.parse(there.textContent); };
const make = (name, text, within) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (within) within.append(element);
  return element;
};

// Tables sort by the column whose heading is clicked; cells without a figure stay last.
for (const table of $$("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => $("button", head).addEventListener("click", () => {
    const numeric = head.classList.contains("number");
    const down = head.getAttribute("aria-sort") === (numeric ? null : "ascending");
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => numeric ? row.cells[column].dataset.order : row.cells[column].textContent;
    const keyed = [...body.rows].map(row => [key(row), row]);
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const [one, other] = down ? [b, a] : [a, b];
      return numeric ? one - other : one.localeCompare(other, undefined, { numeric: true });
    });
    body.append(...keyed.map(([, row]) => row));
  }));
}

// The overview shows the lines that have the chosen label on each axis, or none that matters there.
const filters = $("#filters"), overview = $("#overview");
if (filters && overview) {
  const keys = [...overview.tHead.rows[0].cells].map(head => head.dataset.key);
  const chosen = $$("select", filters).map(select => [select, keys.indexOf(select.dataset.axis)]).filter(([, at]) => at >= 0);
  const search = $("input", filters), rows = [...overview.tBodies[0].rows];
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = chosen.every(([select, at]) => {
        const label = row.cells[at].textContent.trim();
        return !select.value || label === select.value || label === "\u2013";
      }) && words.every(word => text.includes(word));
      row.hidden = !fits;
      count += fits;
    }
    $("output", filters).textContent = `${count} of ${rows.length} lines`;
  };
  filters.addEventListener("input", apply);
  filters.addEventListener("submit", event => event.preventDefault());
  filters.hidden = false;
  apply();
}

// A run's details are put together when it is opened first.
const details = data("details"), list = $("#list");
if (details && list) {
  const text = number => details.texts[number], runs = $$("details", list);
  const fill = (run, [sections, notes, spec]) => {
    const inside = make("div", undefined, run), left = make("div", undefined, inside);
    inside.className = "inside";
    for (const [heading, pairs] of sections) {
      make("h4", text(heading), left);
      const terms = make("dl", undefined, left);
      terms.className = "pairs";
      pairs.forEach((number, at) => make(at % 2 ? "dd" : "dt", text(number), terms));
    }
    notes.forEach(number => make("p", text(number), left).className = "soft");
    if (spec.length) {
      const right = make("div", undefined, inside);
      make("h4", "Spec", right);
      make("pre", spec.map(text).join("\n"), right).tabIndex = 0;
    }
  };
  runs.forEach((run, at) => run.addEventListener("toggle", () => {
    if (run.open && run.children.length === 1) fill(run, details.runs[at]);
  }));
  const find = $("#find"), said = runs.map(run => run.textContent.toLowerCase());
  find.addEventListener("submit", event => event.preventDefault());
  find.addEventListener("input", () => {
    const words = $("input", find).value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    runs.forEach((run, at) => { run.hidden = !words.every(word => said[at].includes(word)); count += !run.hidden; });
    $("output", find).textContent = `${count} of ${runs.length} runs`;
  });
  find.hidden = runs.length < 8;
}

// Any two figures of the lines of a block, and what no other line beats in both.
const pareto = data("measures"), scatter = $("#scatter");
if (pareto && scatter) {
  const { measures, blocks, lines } = pareto, form = $("form", scatter), names = measures.map(([name]) => name);
  const options = (select, titles) => titles.forEach((title, at) => { make("option", title, select).value = at; });
  options(form.x, measures.map(measure => measure[1]));
  options(form.y, measures.map(measure => measure[1]));
  options(form.block, blocks.map(([title]) => title));
  const start = (select, ...wanted) => { select.value = Math.max(0, ...wanted.map(name => names.indexOf(name)).filter(at => at >= 0).slice(0, 1)); };
  start(form.x, "trainable", "disk", "seconds", names[1]);
  start(form.y, "score");

  const shape = (name, within, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    within.append(element);
    return element;
  };
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  const scale = (values, logarithmic, from, to) => {
    const log = logarithmic && Math.min(...values) > 0, bend = value => log ? Math.log10(value) : value;
    let low = Math.min(...values.map(bend)), high = Math.max(...values.map(bend));
    const room = (high - low) * .08 || Math.abs(high) * .1 || 1;
    low -= room; high += room;
    const step = niceStep((high - low) / 5, log), ticks = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9; tick += step) ticks.push(log ? 10 ** tick : tick);
    return [value => from + (to - from) * (bend(value) - low) / (high - low), ticks];
  };
  const niceStep = (rough, log) => {
    if (log && rough > .5) return Math.ceil(rough);
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 2.5, 5, 10].map(factor => factor * power).find(step => step >= rough);
  };
  const draw = () => {
    const x = +form.x.value, y = +form.y.value, [, members] = blocks[form.block.value] || ["", []];
    const points = members
      .map(([line, name]) => ({ name, colour: lines[line][0], mark: lines[line][1], x: lines[line][2][x], y: lines[line][2][y] }))
      .filter(point => point.x !== null && point.y !== null);
    const better = (a, b, at, key) => measures[at][2] ? a[key] >= b[key] : a[key] <= b[key];
    const beats = (a, b) => better(a, b, x, "x") && better(a, b, y, "y") && (a.x !== b.x || a.y !== b.y);
    const front = points.filter(point => !points.some(other => beats(other, point)));
    const plot = $(".plot", scatter), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    plot.replaceChildren(svg);
    const width = 720, height = 400, box = { left: 64, right: width - 24, top: 14, bottom: height - 52 };
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${measures[y][1]} against ${measures[x][1]}`);
    const status = $("[role=status]", scatter);
    if (!points.length) { status.textContent = "No line of this block has both figures."; return; }
    const [across, ticksAcross] = scale(points.map(point => point.x), measures[x][3], box.left, box.right);
    const [up, ticksUp] = scale(points.map(point => point.y), measures[y][3], box.bottom, box.top);
    const faint = { stroke: "currentColor", "stroke-opacity": .12 }, soft = { fill: "currentColor", "fill-opacity": .75 };
    for (const tick of ticksAcross) {
      shape("line", svg, { x1: across(tick), x2: across(tick), y1: box.top, y2: box.bottom, ...faint });
      shape("text", svg, { x: across(tick), y: box.bottom + 18, "text-anchor": "middle", ...soft }, compact.format(tick));
    }
    for (const tick of ticksUp) {
      shape("line", svg, { x1: box.left, x2: box.right, y1: up(tick), y2: up(tick), ...faint });
      shape("text", svg, { x: box.left - 8, y: up(tick) + 4, "text-anchor": "end", ...soft }, compact.format(tick));
    }
    const arrow = at => measures[at][2] ? "more is better" : "less is better";
    shape("text", svg, { x: box.right, y: height - 12, "text-anchor": "end", fill: "currentColor" }, `${measures[x][1]}, ${arrow(x)}`);
    shape("text", svg, { x: 0, y: 0, transform: `translate(16 ${box.top}) rotate(-90)`, "text-anchor": "end", fill: "currentColor" }, `${measures[y][1]}, ${arrow(y)}`);
    const sorted = [...front].sort((a, b) => a.x - b.x || a.y - b.y);
    shape("polyline", svg, { points: sorted.map(point => `${across(point.x)},${up(point.y)}`).join(" "), fill: "none", stroke: "currentColor", "stroke-opacity": .45 });
    const taken = points.map(point => ({ y: up(point.y) + 2, from: across(point.x) - 7, long: 14 }));
    for (const point of [...front, ...points.filter(point => !front.includes(point))]) {
      const left = across(point.x), low = up(point.y), mark = shape("text", svg, { x: left, y: low + 5, "text-anchor": "middle", "font-size": 15, fill: point.colour }, point.mark);
      shape("title", mark, {}, `${point.name}: ${measures[x][1]} ${point.x}, ${measures[y][1]} ${point.y}`);
      const half = 3.4 * point.name.length, end = left + 10 + 2 * half > box.right;
      const name = { x: end ? left - 10 : left + 10, y: low - 6, from: end ? left - 10 - 2 * half : left + 10 };
      const free = taken.every(other => Math.abs(other.y - name.y) > 12 || other.from > name.from + 2 * half || name.from > other.from + other.long);
      if (points.length > 40 || !free) continue;
      taken.push({ ...name, long: 2 * half });
      shape("text", svg, { x: name.x, y: name.y, "text-anchor": end ? "end" : "start", fill: "currentColor", "fill-opacity": front.includes(point) ? 1 : .65 }, point.name);
    }
    status.textContent = `On the front: ${sorted.map(point => point.name).join("; ")}.`;
  };
  form.addEventListener("input", draw);
  form.addEventListener("submit", event => event.preventDefault());
  scatter.hidden = false;
  draw();
}
