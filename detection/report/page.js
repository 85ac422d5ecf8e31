"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUN = DATA.run;
const RUNS = DATA.comparison ? [RUN, DATA.comparison.other] : [RUN];
const NUM_KINDS = DATA.kinds.length;
const MISSED = DATA.kinds.indexOf("missed");
const CORRECT = NUM_KINDS;
const IGNORED = NUM_KINDS + 1;
const FOUND_TRUTH = NUM_KINDS + 2;
// Okabe and Ito's colours, told apart under the common colour blindnesses.
const KIND_STYLES = {
  classification: { color: "#cc79a7", name: "wrong class" },
  localization: { color: "#e69f00", name: "poor box" },
  both: { color: "#f0e442", name: "both wrong" },
  duplicate: { color: "#56b4e9", name: "duplicate" },
  background: { color: "#d55e00", name: "on background" },
  missed: { color: "#2b8fe0", name: "missed", dash: "6 3" },
  correct: { color: "#00b386", name: "right" },
  ignored: { color: "#aaaaaa", name: "on a crowd" },
  truth: { color: "#ffffff", name: "ground truth, found", dash: "2 3" },
};
const KINDS = [...DATA.kinds, "correct", "ignored", "truth"].map((key) => ({ key, ...KIND_STYLES[key] }));
const LINE_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#8c6bd1"];
const PAGE_SIZE = matchMedia("(max-width: 640px)").matches ? 12 : 24;

const $ = (id) => document.getElementById(id);
const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + value.toFixed(3));
const count = (value, one, many = one + "s") => `${value.toLocaleString("en")} ${value === 1 ? one : many}`;
const mean = (values) => {
  const defined = values.filter((value) => value !== null);
  return defined.length ? defined.reduce((a, b) => a + b, 0) / defined.length : null;
};

/** An element; strings among its children become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const isShape = ["svg", "g", "rect", "line", "path", "text", "circle", "title"].includes(tag);
  const element = isShape ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A table whose columns sort; cells are numbers, strings, null or elements with a data-value. */
function sortableTable(header, rows, { format = () => (value) => fixed(value), sorted = null } = {}) {
  const body = make("tbody");
  const valueOf = (cell) => (cell instanceof Element ? cell.dataset.value : cell);
  const fill = () => body.replaceChildren(...rows.map((row) => make("tr", {}, ...row.map((cell, column) =>
    make("td", typeof cell === "number" || cell === null ? {} : { class: "text" },
      cell instanceof Element || typeof cell === "string" ? cell : format(column)(cell))))));
  const heads = header.map((name, column) => {
    const isText = rows.length && typeof valueOf(rows[0][column]) === "string";
    const head = make("th", { scope: "col", class: isText ? "text" : null });
    const sort = () => {
      const down = head.ariaSort ? head.ariaSort === "ascending" : !isText;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((one, other) => {
        const [a, b] = [valueOf(one[column]), valueOf(other[column])];
        if (a === null || b === null) return (a === null) - (b === null);
        return (typeof a === "string" ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
      });
      fill();
    };
    head.append(make("button", { type: "button", onclick: sort }, name));
    head.sort = sort;
    return head;
  });
  if (sorted === null) fill();
  else heads[sorted].sort();
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
}

/** The next of 1, 2, 4 or 8 times a power of ten, so that a quarter of it is a short number. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 8, 10].find((step) => step * power >= value * 0.999);
}

function showTip(event, text) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${Math.max(4, event.clientY - height - 12)}px`;
}
const hideTip = () => { $("tip").hidden = true; };

/**
 * A chart of lines {name, points, color, width, faint, dash, dots} and bars {from, to, value}.
 * x and y are {label, min, max}; a null y breaks the line.
 */
function chart({ lines, bars = [], x, y, mark = null, label }) {
  const [width, height, left, right, top, bottom] = [520, 300, 46, 12, 10, 40];
  const toX = (value) => left + ((value - x.min) / (x.max - x.min || 1)) * (width - left - right);
  const toY = (value) => height - bottom - ((value - y.min) / (y.max - y.min || 1)) * (height - top - bottom);
  const svg = make("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const text = (value, span) => (span >= 1000 ? value.toLocaleString("en") : span < 0.05 ? String(+value.toPrecision(2)) : String(+value.toFixed(2)));
  for (let i = 0; i <= 4; i++) {
    const [atX, atY] = [x.min + ((x.max - x.min) * i) / 4, y.min + ((y.max - y.min) * i) / 4];
    svg.append(
      make("line", { class: i ? "grid" : "axis", x1: left, x2: width - right, y1: toY(atY), y2: toY(atY) }),
      make("text", { x: left - 6, y: toY(atY) + 4, "text-anchor": "end" }, text(atY, y.max - y.min)),
      make("text", { x: toX(atX), y: height - bottom + 16, "text-anchor": i === 4 ? "end" : "middle" }, text(atX, x.max - x.min)),
    );
  }
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.label));
  for (const bar of bars) {
    svg.append(make("rect", {
      x: toX(bar.from) + 1, width: Math.max(0, toX(bar.to) - toX(bar.from) - 2),
      y: toY(bar.value), height: Math.max(0, toY(y.min) - toY(bar.value)), fill: LINE_COLORS[0], "fill-opacity": 0.55,
    }));
  }
  if (mark !== null) svg.append(make("line", { class: "mark", x1: toX(mark), x2: toX(mark), y1: top, y2: height - bottom }));
  for (const line of lines) {
    const parts = line.points.map(([px, py], i) =>
      py === null ? "" : `${i && line.points[i - 1][1] !== null ? "L" : "M"}${toX(px).toFixed(1)},${toY(py).toFixed(1)}`);
    svg.append(make("path", {
      d: parts.join(""), fill: "none", stroke: line.color, "stroke-width": line.width ?? 2, "stroke-linejoin": "round",
      "stroke-opacity": line.faint ? 0.35 : 1, "stroke-dasharray": line.dash,
    }));
    if (line.points.length < 30 && !line.faint && !line.dash)
      for (const [px, py] of line.points) if (py !== null) svg.append(make("circle", { cx: toX(px), cy: toY(py), r: 2.5, fill: line.color }));
  }
  const named = lines.filter((line) => line.name && !line.faint);
  const cursor = svg.appendChild(make("line", { class: "mark", y1: top, y2: height - bottom, x1: -9, x2: -9 }));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = x.min + ((((event.clientX - box.left) / box.width) * width - left) / (width - left - right)) * (x.max - x.min);
    if (at < x.min || at > x.max) return;
    cursor.setAttribute("x1", toX(at));
    cursor.setAttribute("x2", toX(at));
    const rows = named.map((line) => {
      const near = line.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      return `${line.name}: ${near[1] === null ? "–" : +near[1].toPrecision(3)}`;
    });
    showTip(event, [`${x.label} ${text(at, x.max - x.min)}`, ...rows].join("\n"));
  });
  svg.addEventListener("pointerleave", () => { hideTip(); cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); });
  const legend = named.length > 1 ? make("div", { class: "legend" }, ...named.map((line) =>
    make("span", {}, make("i", { style: { background: line.color } }), line.name))) : null;
  return make("div", {}, svg, legend);
}

function fillOverview() {
  document.title = `${DATA.title} – detection report`;
  $("title").textContent = DATA.title;
  $("facts").append(...DATA.facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  $("headline").append(...DATA.metricNames.map((name, i) =>
    make("div", { class: i < 1 ? "card first" : "card" }, make("b", {}, fixed(RUN.metrics[name])), make("span", {}, name))));
  const { correct, false: wrong, missed } = RUN.totals;
  $("operating").textContent =
    `At score ${RUN.score.toFixed(2)}, where the mean F1 over the classes is highest, ` +
    `${count(correct, "detection")} of ${count(correct + wrong, "detection")} are right (IoU 0.50 or more with an object of the class), ` +
    `and ${count(missed, "object")} of ${count(correct + missed, "object")} are missed, ` +
    `in ${count(DATA.numImages, "image")}.`;
}

function fillErrors() {
  const largest = Math.max(...RUN.costs.map((cost) => cost ?? 0), 1e-9);
  $("error-bars").append(...DATA.kinds.map((kind, k) => {
    const total = RUN.counts[k].reduce((a, b) => a + b, 0);
    return make("div", { class: "bar-row" }, make("span", {}, KINDS[k].name),
      make("div", { class: "track" }, make("div", { class: "fill", style: { width: `${(100 * (RUN.costs[k] ?? 0)) / largest}%`, background: KINDS[k].color } })),
      make("span", { class: "number" }, `${fixed(RUN.costs[k])} AP50, ${count(total, kind === "missed" ? "object" : "detection")}`));
  }));
  const header = ["class", ...KINDS.slice(0, NUM_KINDS).flatMap(({ name }) => [`${name}: AP50`, "count"])];
  const rows = DATA.classes.map((name, c) => [name, ...DATA.kinds.flatMap((_, k) => [RUN.classCosts[k][c], RUN.counts[k][c]])]);
  $("error-classes").append(sortableTable(header, rows, { format: (column) => (value) => fixed(value, column % 2 ? 3 : 0) }));
}

function fillClasses() {
  const names = Object.keys(RUN.columns);
  const rows = DATA.classes.map((name, c) => [name, ...names.map((column) => RUN.columns[column][c])]);
  const format = (column) => (value) => fixed(value, column === 1 ? 0 : 3);
  $("class-table").append(sortableTable(["class", ...names], rows, { format, sorted: 2 }));
}

function fillClassPicker(select, all) {
  select.append(make("option", { value: -1 }, all), ...DATA.classes.map((name, c) => make("option", { value: c }, name)));
}

function fillCurves() {
  const steps = RUN.f1.length ? RUN.f1[0].map((_, i) => i / (RUN.f1[0].length - 1)) : [];
  const zip = (values) => steps.map((step, i) => [step, values[i]]);
  const average = (rows) => steps.map((_, i) => mean(rows.map((row) => row[i])));
  const unit = (label) => ({ label, min: 0, max: 1 });
  fillClassPicker($("curve-class"), "all (mean)");
  const draw = () => {
    const chosen = +$("curve-class").value;
    const few = DATA.classes.length <= LINE_COLORS.length;
    const lines = DATA.classes.map((name, c) => ({
      name, points: zip(RUN.precisionRecall[c]), color: few ? LINE_COLORS[c] : "var(--soft)",
      faint: chosen >= 0 ? c !== chosen : !few, width: c === chosen ? 3 : few ? 2 : 1,
    }));
    if (chosen >= 0) lines.push({ ...lines.splice(chosen, 1)[0], color: few ? LINE_COLORS[chosen] : LINE_COLORS[1] });
    lines.push({ name: "mean", points: zip(average(RUN.precisionRecall)), color: "var(--ink)", width: 2.5, dash: chosen >= 0 ? "5 4" : null });
    $("precision-recall").replaceChildren(chart({
      lines, x: unit("recall"), y: unit("precision"), label: "Precision by recall: AP50 of each class is in the table of classes",
    }));
    const rows = ["precision", "recall", "f1"].map((key) => (chosen < 0 ? average(RUN[key]) : RUN[key][chosen]));
    const mark = chosen < 0 ? RUN.score : RUN.columns["at score"][chosen];
    const best = chosen < 0 ? Math.max(...rows[2].map((v) => v ?? 0)) : RUN.columns["best F1"][chosen];
    $("by-score-title").textContent = `By score, IoU 0.50: best F1 ${fixed(best)} at score ${fixed(mark, 2)}`;
    $("by-score").replaceChildren(chart({
      lines: [["precision", rows[0], 0], ["recall", rows[1], 1], ["F1", rows[2], 2]].map(([name, values, i]) =>
        ({ name, points: zip(values), color: LINE_COLORS[i] })),
      x: unit("score"), y: unit(""), mark, label: $("by-score-title").textContent,
    }));
  };
  $("curve-class").addEventListener("change", draw);
  draw();
}

function fillConfusion() {
  const last = DATA.classes.length;
  const table = RUN.confusion;
  const nameOf = (c, side) => (c === last ? (side ? "nothing" : "background") : DATA.classes[c]);
  const used = [...table.keys()].filter((c) => c === last || table[c].some(Boolean) || table.some((row) => row[c]));
  const dense = used.length > 12;
  $("confusion-text").textContent =
    `At score ${RUN.score.toFixed(2)} and IoU 0.50. A row tells what became of the objects of a class; ` +
    "the last row holds detections where nothing is, the last column objects that nobody found." +
    (used.length < last + 1 ? ` ${last + 1 - used.length} classes with neither objects nor detections are left out.` : "");
  const rowSums = table.map((row) => row.reduce((a, b) => a + b, 0));
  const cell = (r, c) => {
    const share = rowSums[r] ? table[r][c] / rowSums[r] : 0;
    const tip = `${r === last ? "nothing there" : nameOf(r, 0)}, detected as ${nameOf(c, 1)}: ${table[r][c]}` + (rowSums[r] ? ` (${(100 * share).toFixed(0)} % of the row)` : "");
    const alpha = table[r][c] ? 0.08 + 0.82 * share : 0;
    return make("td", {
      style: { background: `rgba(var(--heat), ${alpha})`, color: alpha > 0.5 ? "#fff" : "inherit" },
      onpointermove: (event) => showTip(event, tip), onpointerleave: hideTip,
    }, String(table[r][c] || (dense ? "" : "·")));
  };
  $("confusion-matrix").append(make("table", { class: dense ? "matrix dense" : "matrix" },
    make("caption", {}, "true class by detected class"),
    make("thead", {}, make("tr", {}, make("td"), ...used.map((c) => make("th", { scope: "col", title: nameOf(c, 1) }, nameOf(c, 1))))),
    make("tbody", {}, ...used.map((r) => make("tr", {}, make("th", { scope: "row", title: nameOf(r, 0) }, nameOf(r, 0)),
      ...used.map((c) => (r === last && c === last ? make("td") : cell(r, c))))))));
  const rows = used.flatMap((r) => used.filter((c) => c !== r && table[r][c]).map((c) => [nameOf(r, 0), nameOf(c, 1), table[r][c]]));
  rows.sort((a, b) => b[2] - a[2]);
  $("confusion-table").append(sortableTable(["true", "detected", "count"], rows.slice(0, 200), { format: () => String, sorted: 2 }));
}

function fillCalibration() {
  const { edges, counts, mean_scores: scores, precision, error } = RUN.calibration;
  $("calibration-text").textContent =
    `Where scores are calibrated, half of the detections of score 0.5 are right. The mean distance from that, ` +
    `the expected calibration error, is ${fixed(error)}; detections of low scores weigh most, since there are most of them.`;
  $("calibration-chart").append(chart({
    bars: counts.flatMap((n, i) => (n ? [{ from: edges[i], to: edges[i + 1], value: precision[i] }] : [])),
    lines: [{ points: [[0, 0], [1, 1]], color: "var(--soft)", dash: "5 4" }],
    x: { label: "score", min: 0, max: 1 }, y: { label: "right", min: 0, max: 1 },
    label: "Share of right detections in ten bins of score; the numbers are in the table beside",
  }));
  const rows = counts.map((n, i) => [`${edges[i].toFixed(1)} to ${edges[i + 1].toFixed(1)}`, n, scores[i], precision[i]]);
  const format = (column) => (value) => fixed(value, column === 1 ? 0 : 3);
  $("calibration-table").append(sortableTable(["score", "detections", "mean score", "right"], rows, { format }));
}

function fillTraining() {
  if (!DATA.training.length) return;
  $("training").hidden = false;
  $("training-charts").append(...DATA.training.map(({ title, lines }) => {
    const points = Object.values(lines).flat();
    const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
    const highest = ys.reduce((a, b) => Math.max(a, b), 0);
    return make("figure", {}, make("figcaption", {}, title), chart({
      lines: Object.entries(lines).map(([name, own], i) => ({ name, points: own, color: LINE_COLORS[i % LINE_COLORS.length] })),
      x: { label: "step", min: 0, max: xs.reduce((a, b) => Math.max(a, b), 1) },
      y: { label: "", min: 0, max: /^Average/.test(title) ? 1 : highest ? roundUp(highest) : 1 }, label: `${title} by step`,
    }));
  }));
}

function fillComparison() {
  if (!DATA.comparison) return;
  const { other, differences, onlyFirst, onlySecond, falseDifference, imageIds } = DATA.comparison;
  $("comparison").hidden = false;
  $("comparison-text").textContent = `${RUN.name} and ${other.name}, each at its own best score (${RUN.score.toFixed(2)} and ${other.score.toFixed(2)}).`;
  const delta = (value) => make("span", { "data-value": value ?? -9 }, signed(value));
  const minus = (a, b) => (a === null || b === null ? null : b - a);
  $("comparison-metrics").append(sortableTable(["metric", RUN.name, other.name, "difference"],
    DATA.metricNames.map((name) => [name, RUN.metrics[name], other.metrics[name], minus(RUN.metrics[name], other.metrics[name])]),
    { format: (column) => (column === 3 ? signed : (value) => fixed(value)) }));
  const keys = ["AP", "AP50", "AP75", "AR100"];
  $("comparison-classes").append(sortableTable(["class", ...keys],
    DATA.classes.map((name, c) => [name, ...keys.map((key) => differences[key][c])]), { format: () => signed, sorted: 1 }));
  const shown = new Map(DATA.images.map((image, i) => [image.id, i]));
  const rows = imageIds.slice(0, 200).map((id, i) => {
    const at = shown.get(id);
    const name = at === undefined ? `image ${id}` : DATA.images[at].name;
    return [at === undefined ? name : make("button", { type: "button", "data-value": name, onclick: () => openViewer(at) }, name),
      onlyFirst[i], onlySecond[i], falseDifference[i]];
  });
  $("comparison-images").append(sortableTable(
    ["image", `found by ${RUN.name} only`, `found by ${other.name} only`, `false detections of ${other.name} more`], rows, { format: () => String }));
}

function fillSections() {
  DATA.sections.forEach((section, i) => {
    const isNumber = (value) => typeof value === "number";
    const format = () => (value) => (Number.isInteger(value) ? String(value) : fixed(value));
    $("content").append(make("section", { id: `section-${i}`, "data-title": section.title },
      make("h2", {}, section.title),
      ...section.warnings.map((text) => make("p", { class: "warning" }, text)),
      ...section.text.map((text) => make("p", {}, text)),
      make("div", { class: "columns figures" }, ...section.figures.map(({ caption, source }) =>
        make("figure", {}, make("figcaption", {}, caption), make("img", { src: source, alt: caption })))),
      section.header.length ? make("div", { class: "scroll tall" }, sortableTable(section.header, section.rows, { format })) : null));
  });
}

/* The gallery: what the filters let through, drawn over the images. */

const filters = { score: RUN.score, label: -1, kinds: new Set(KINDS.keys()), run: 0 };
let order = [...DATA.images.keys()];
let visible = [];
let numTiles = PAGE_SIZE;
let opened = -1;

/** The boxes of an image that pass the filters: [x, y, w, h, label, kind, score]. */
function shownBoxes(image) {
  const run = image.runs[filters.run];
  const boxes = [];
  image.truths.forEach(([x, y, w, h, label, counts], g) => {
    const found = run.found[g] !== null && run.found[g] >= filters.score;
    boxes.push([x, y, w, h, label, !counts ? IGNORED : found ? FOUND_TRUTH : MISSED, null]);
  });
  // The surest are drawn last, on top.
  for (const [x, y, w, h, score, label, kind] of [...run.detections].reverse())
    if (score >= filters.score) boxes.push([x, y, w, h, label, kind, score]);
  return boxes.filter((box) => filters.kinds.has(box[5]) && (filters.label < 0 || box[4] === filters.label));
}

const textOf = ([, , , , label, kind, score]) =>
  `${DATA.classes[label]}${score === null ? "" : " " + score.toFixed(2)} (${KINDS[kind].name})`;

function drawBoxes(svg, image, { labels = false, scale = 1 } = {}) {
  const boxes = shownBoxes(image);
  const size = 12 * scale;
  svg.replaceChildren(...boxes.map((box) => {
    const [x, y, w, h, label, kind, score] = box;
    const { color, dash } = KINDS[kind];
    const group = make("g", {}, make("title", {}, textOf(box)),
      make("rect", { x, y, width: w, height: h, class: "halo" }),
      make("rect", { x, y, width: w, height: h, class: "box", stroke: color, "stroke-dasharray": dash }));
    if (labels && (score !== null || kind === MISSED)) {
      const text = score === null ? DATA.classes[label] : `${DATA.classes[label]} ${score.toFixed(2)}`;
      const width = Math.min(text.length * size * 0.58 + size * 0.6, image.width);
      const left = Math.max(0, Math.min(x, image.width - width));
      const top = y - size * 1.35 < 0 ? Math.min(y, image.height - size * 1.35) : y - size * 1.35;
      group.append(make("rect", { x: left, y: top, width, height: size * 1.35, style: { fill: color } }),
        make("text", { x: left + size * 0.3, y: top + size * 1.02, "font-size": size, fill: "#111", textLength: width - size * 0.6, lengthAdjust: "spacingAndGlyphs" }, text));
    }
    return group;
  }));
  return boxes;
}

function makePicture(image, className = "picture") {
  const svg = make("svg", { viewBox: `0 0 ${image.width} ${image.height}`, "aria-hidden": "true" });
  const size = { width: image.width, height: image.height };
  const content = image.source
    ? make("img", { src: image.source, alt: "", loading: "lazy", decoding: "async", ...size })
    : make("div", { class: "broken", style: { aspectRatio: `${image.width} / ${image.height}` } }, "cannot be read");
  return [make("span", { class: className }, content, svg), svg];
}

function summarize(image) {
  const run = image.runs[filters.run];
  const wrong = run.detections.filter((d) => d[4] >= filters.score && d[6] < NUM_KINDS).length;
  const missed = image.truths.filter((truth, g) => truth[5] && !(run.found[g] !== null && run.found[g] >= filters.score)).length;
  return `${wrong} false, ${missed} missed`;
}

function makeTile(i) {
  const image = DATA.images[i];
  const [picture, svg] = makePicture(image);
  const summary = make("span");
  const tile = make("button", { type: "button", class: "tile", onclick: () => openViewer(i) }, picture,
    make("span", { class: "tile-text" }, make("span", { title: image.name }, image.name), summary));
  tile.redraw = () => {
    drawBoxes(svg, image);
    summary.textContent = summarize(image);
    tile.setAttribute("aria-label", `${image.name}: ${summary.textContent}. Open`);
  };
  return tile;
}

const tiles = new Map();

function updateGallery() {
  $("score-value").textContent = filters.score.toFixed(2);
  let numBoxes = 0;
  visible = order.filter((i) => {
    const own = shownBoxes(DATA.images[i]).length;
    numBoxes += own;
    return own > 0;
  });
  const shown = visible.slice(0, numTiles);
  for (const i of shown) if (!tiles.has(i)) tiles.set(i, makeTile(i));
  const wanted = shown.map((i) => tiles.get(i));
  wanted.forEach((tile) => tile.redraw());
  // Tiles that stay are left alone: focus and scroll would be lost.
  const gallery = $("gallery");
  if (wanted.length !== gallery.children.length || wanted.some((tile, at) => gallery.children[at] !== tile)) gallery.replaceChildren(...wanted);
  $("more").hidden = visible.length <= numTiles;
  $("shown").textContent = `${count(numBoxes, "box", "boxes")} in ${count(visible.length, "image")}` +
    (visible.length > shown.length ? `, of which the first ${shown.length} are here` : "");
  if ($("viewer").open) drawViewer();
}

function sortImages() {
  const key = $("order").value;
  const valueOf = {
    worst: (image) => -(image.runs[filters.run].false + image.runs[filters.run].missed),
    false: (image) => -image.runs[filters.run].false,
    missed: (image) => -image.runs[filters.run].missed,
    different: (image) => {
      const [one, other] = image.runs.map((run, r) => run.found.map((score) => score !== null && score >= RUNS[r].score));
      return -(one.filter((found, g) => found !== other[g]).length + Math.abs(image.runs[0].false - image.runs[1].false));
    },
  }[key];
  order = [...DATA.images.keys()];
  if (valueOf) order.sort((a, b) => valueOf(DATA.images[a]) - valueOf(DATA.images[b]));
  else order.sort((a, b) => DATA.images[a].name.localeCompare(DATA.images[b].name));
}

function fillGallery() {
  const all = DATA.images.length === DATA.numImages;
  $("images-text").textContent = (all ? `All ${count(DATA.numImages, "image")}.` :
    `${DATA.images.length} of ${count(DATA.numImages, "image")}: half are those ${DATA.comparison ? "where the two disagree most" : "with most missed and false detections"}, half are spread evenly over the others.`) +
    " Choose one to see it large.";
  const score = $("score");
  score.value = Math.max(filters.score, 0.01);
  filters.score = +score.value;
  score.addEventListener("input", () => { filters.score = +score.value; updateGallery(); });
  fillClassPicker($("class"), "all");
  $("class").addEventListener("change", () => { filters.label = +$("class").value; updateGallery(); });
  const orders = [["worst", "most errors"], ["missed", "most missed"], ["false", "most false"], ["name", "by name"]];
  if (DATA.comparison) orders.unshift(["different", "most disagreement"]);
  $("order").append(...orders.map(([value, text]) => make("option", { value }, text)));
  $("order").addEventListener("change", () => { sortImages(); updateGallery(); });
  $("which-label").hidden = RUNS.length < 2;
  $("which").append(...RUNS.map((run, r) => make("option", { value: r }, run.name)));
  $("which").addEventListener("change", () => { filters.run = +$("which").value; sortImages(); updateGallery(); });
  const present = new Set(DATA.images.flatMap((image) => [
    ...image.runs.flatMap((run) => run.detections.map((d) => d[6])), ...image.truths.filter((truth) => !truth[5]).map(() => IGNORED)]));
  [CORRECT, ...DATA.kinds.keys(), IGNORED, FOUND_TRUTH].forEach((k) => {
    if (k === IGNORED && !present.has(k)) return;
    const { name, color, dash, key } = KINDS[k];
    const toggle = (event) => { filters.kinds[event.target.checked ? "add" : "delete"](k); updateGallery(); };
    const swatch = { borderColor: color, borderStyle: dash ? "dashed" : "solid", background: key === "truth" ? "#777" : "none" };
    $("kinds").append(make("label", {}, make("input", { type: "checkbox", checked: true, "data-kind": key, onchange: toggle }), make("span", { class: "key", style: swatch }), name));
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", () => {
    const first = numTiles;
    numTiles += PAGE_SIZE;
    updateGallery();
    $("gallery").children[first]?.focus();
  });
  sortImages();
  updateGallery();
}

function drawViewer() {
  const image = DATA.images[opened];
  const svg = $("viewer-picture").querySelector("svg");
  const scale = image.width / (svg.clientWidth || image.width);
  const boxes = drawBoxes(svg, image, { labels: $("viewer-labels").checked, scale });
  $("viewer-name").textContent = `${image.name}: ${summarize(image)}`;
  const groups = [...svg.children];
  const rows = boxes.map((box, i) => {
    const { name, color, dash } = KINDS[box[5]];
    const swatch = make("span", { class: "key", style: { display: "inline-block", verticalAlign: "-2px", marginRight: "8px", borderColor: color, borderStyle: dash ? "dashed" : "solid" } });
    const cell = make("span", { "data-value": name, "data-box": i }, swatch, name);
    return [cell, DATA.classes[box[4]], box[6], `${box[2].toFixed(0)} × ${box[3].toFixed(0)}`];
  }).reverse();
  const table = sortableTable(["what", "class", "score", "size"], rows, { format: () => (value) => fixed(value, 2) });
  table.addEventListener("pointerover", (event) => {
    const own = event.target.closest("tr")?.querySelector("[data-box]")?.dataset.box;
    groups.forEach((group, i) => group.querySelector(".box").classList.toggle("chosen", String(i) === own));
  });
  $("viewer-table").replaceChildren(table);
}

function openViewer(i) {
  opened = i;
  const image = DATA.images[i];
  const viewer = $("viewer");
  if (!viewer.open) viewer.showModal();
  const [picture] = makePicture(image);
  // As large as fits: the width, or the height less what stands around it.
  picture.style.width = `min(100%, calc((100vh - 330px) * ${image.width / image.height}))`;
  picture.style.minWidth = "min(100%, 280px)";
  $("viewer-picture").replaceChildren(picture);
  drawViewer();
}

function stepViewer(by) {
  const among = visible.includes(opened) ? visible : order;
  openViewer(among[(among.indexOf(opened) + by + among.length) % among.length]);
}

function startViewer() {
  const viewer = $("viewer");
  $("close").addEventListener("click", () => viewer.close());
  $("previous").addEventListener("click", () => stepViewer(-1));
  $("next").addEventListener("click", () => stepViewer(1));
  $("viewer-labels").addEventListener("change", drawViewer);
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); stepViewer(by); }
  });
  addEventListener("resize", () => { if (viewer.open) drawViewer(); });
}

function startTheme() {
  const media = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const show = () => {
    const dark = chosen ? chosen === "dark" : media.matches;
    document.documentElement.style.colorScheme = chosen ?? "";
    $("theme").textContent = dark ? "☀" : "☾";
    $("theme").setAttribute("aria-pressed", dark);
  };
  $("theme").addEventListener("click", () => { chosen = (chosen ? chosen === "dark" : media.matches) ? "light" : "dark"; show(); });
  media.addEventListener("change", show);
  show();
}

function fillMenu() {
  const parts = [...document.querySelectorAll("main > section:not([hidden])")];
  const links = new Map(parts.map((part) => [part, make("a", { href: `#${part.id}` }, part.dataset.title)]));
  $("menu").append(...links.values());
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      links.get(target).classList.toggle("here", isIntersecting);
    }
  }, { rootMargin: "-64px 0px -80% 0px" });
  parts.forEach((part) => observer.observe(part));
}

fillOverview();
fillComparison();
fillErrors();
fillClasses();
fillCurves();
fillConfusion();
fillCalibration();
fillTraining();
fillSections();
fillGallery();
startViewer();
startTheme();
fillMenu();
