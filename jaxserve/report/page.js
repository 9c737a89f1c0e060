// Draws the page's plots from the data beside them. No library, nothing fetched.
"use strict";
const NS = "http://www.w3.org/2000/svg";
const charts = JSON.parse(document.getElementById("data").textContent);
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.setAttribute("role", "status");
const color = (place) => `var(--c${((place - 1) % 8) + 1})`;
const el = (parent, name, attributes, text) => {
  const node = document.createElementNS(NS, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};

// Numbers as people read them.
const three = (value) => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(+value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3));
};
const seconds = (value) => {
  const size = Math.abs(value);
  if (!value) return "0 s";
  if (size >= 1) return three(value) + " s";
  return size >= 1e-3 ? three(value * 1e3) + " ms" : three(value * 1e6) + " µs";
};
const clock = (value) => {
  if (value < 60) return +value.toFixed(3) + " s";
  return value < 7200 ? +(value / 60).toFixed(2) + " min" : +(value / 3600).toFixed(2) + " h";
};
const magnitude = (value) => {
  const size = Math.abs(value);
  if (size >= 1e9) return three(value / 1e9) + "G";
  if (size >= 1e6) return three(value / 1e6) + "M";
  return size >= 1e4 ? three(value / 1e3) + "k" : three(value);
};
const FORMATS = { s: seconds, time: clock, share: (v) => three(v * 100) + " %", "": magnitude };
const format = (unit) => FORMATS[unit] || ((value) => magnitude(value) + (unit ? " " + unit : ""));

// Scales: from data to pixels.
const niceStep = (span, most) => {
  const raw = span / most, power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((digit) => digit * power >= raw * 0.999);
};
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400];
function scale(kind, low, high, from, to, unit) {
  const most = Math.max(2, Math.floor(Math.abs(to - from) / (to > from ? 74 : 40)));
  const ticks = [];
  if (kind === "log") {
    const a = Math.log10(low), b = Math.log10(high);
    const decades = b - a, digits = 0.3 * Math.abs(to - from) >= 54 * decades ? [1, 2, 5] : [1];
    const skip = digits.length > 1 ? 1 : Math.max(1, Math.ceil(decades / most));
    for (let power = Math.floor(a); power <= Math.ceil(b); power += 1) {
      if (power % skip) continue;
      for (const digit of digits) {
        const tick = digit * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(+tick.toPrecision(1));
      }
    }
    const map = (v) => from + ((Math.log10(Math.max(v, low)) - a) / (b - a || 1)) * (to - from);
    const back = (p) => 10 ** (a + ((p - from) / (to - from)) * (b - a));
    return { map, back, ticks };
  }
  let step = niceStep(high - low || 1, most);
  if (unit === "time" && step >= 1) step = TIMES.find((each) => each >= (high - low) / most) || step;
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step)
    ticks.push(+tick.toPrecision(10));
  const map = (v) => from + ((v - low) / (high - low || 1)) * (to - from);
  return { map, back: (p) => low + ((p - from) / (to - from)) * (high - low), ticks };
}

// The frame of a plot: axes, grid, tooltips.
function frame(host, chart, height, margin) {
  const width = Math.max(240, host.clientWidth);
  host.replaceChildren();
  const svg = el(host, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": chart.summary });
  const left = margin.left, right = width - margin.right, top = margin.top, bottom = height - margin.bottom;
  return { svg, width, height, left, right, top, bottom };
}
function xAxis(f, x, unit, grid) {
  el(f.svg, "line", { class: "axis", x1: f.left, x2: f.right, y1: f.bottom, y2: f.bottom });
  for (const tick of x.ticks) {
    const at = x.map(tick), text = format(unit)(tick);
    if (at < f.left - 1 || at > f.right + 1) continue;
    if (grid) el(f.svg, "line", { class: "grid", x1: at, x2: at, y1: f.top, y2: f.bottom });
    const wide = text.length * 3.2;
    const anchor = at + wide > f.width ? "end" : at - wide < 0 ? "start" : "middle";
    el(f.svg, "text", { x: at, y: f.bottom + 16, "text-anchor": anchor }, text);
  }
}
function yAxis(f, y, unit) {
  for (const tick of y.ticks) {
    const at = y.map(tick);
    el(f.svg, "line", { class: "grid", x1: f.left, x2: f.right, y1: at, y2: at });
    el(f.svg, "text", { x: f.left - 7, y: at + 4, "text-anchor": "end" }, format(unit)(tick));
  }
}
function showTip(event, f, title, rows) {
  tip.replaceChildren();
  tip.appendChild(document.createElement("b")).textContent = title;
  for (const [name, value, hue] of rows) {
    const line = tip.appendChild(document.createElement("div"));
    if (hue) line.appendChild(document.createElement("i")).style.background = color(hue);
    line.append(name);
    line.appendChild(document.createElement("span")).textContent = value;
  }
  tip.style.display = "block";
  const box = f.svg.getBoundingClientRect();
  const x = event.clientX === undefined ? box.left + event.at : event.clientX;
  const y = event.clientY === undefined ? box.top + 20 : event.clientY;
  const flip = x + tip.offsetWidth + 26 > innerWidth;
  tip.style.left = Math.max(6, scrollX + (flip ? x - tip.offsetWidth - 14 : x + 14)) + "px";
  tip.style.top = scrollY + Math.max(6, y - tip.offsetHeight - 8) + "px";
}
function onPoint(f, move) {
  const leave = () => { tip.style.display = "none"; move(null); };
  const at = (event) => {
    const box = f.svg.getBoundingClientRect();
    const ratio = f.width / box.width;
    move(event, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
  };
  f.svg.addEventListener("pointermove", at);
  f.svg.addEventListener("pointerdown", at);
  f.svg.addEventListener("pointerleave", leave);
  f.svg.addEventListener("blur", leave);
  let place = null;
  f.svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    place = Math.min(f.right, Math.max(f.left, (place ?? (f.left + f.right) / 2) + (step * (f.right - f.left)) / 40));
    move({ at: place }, place, (f.top + f.bottom) / 2);
  });
}
const nearest = (values, wanted) => {
  let low = 0, high = values.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; values[mid] < wanted ? (low = mid) : (high = mid); }
  return wanted - values[low] <= values[high] - wanted ? low : high;
};
const finite = (values) => values.filter((value) => value !== null);
const bound = (lists, pick) => lists.reduce((best, list) => list.reduce((b, v) => (v === null ? b : pick(b, v)), best), pick === Math.max ? -Infinity : Infinity);

function drawLine(host, chart) {
  const { series } = chart;
  const labelled = series.length > 1 && chart.ends && host.clientWidth > 460;
  const longest = Math.max(...series.map((s) => s.name.length));
  const f = frame(host, chart, chart.height || 230, { left: 50, right: labelled ? Math.min(150, 14 + longest * 6.6) : 12, top: chart.cdf ? 24 : 12, bottom: 24 });
  let low = bound(series.map((s) => s.x), Math.min), high = bound(series.map((s) => s.x), Math.max);
  for (const ref of chart.refs || []) { low = Math.min(low, ref.x ?? low); high = Math.max(high, ref.x ?? high); }
  if (chart.x.log && !(low > 0)) low = Math.min(...series.flatMap((s) => s.x.filter((v) => v > 0)));
  const log = chart.x.log && high / low > 4;
  if (chart.x.log && !log) { low *= 0.98; high *= 1.02; }
  if (chart.x.unit === "time") low = 0;
  const x = scale(log ? "log" : "linear", low, high, f.left, f.right, log ? "s" : chart.x.unit);
  // Stacked from the last to the first, so that the first lies on top.
  const base = series.map((s) => s.y.map(() => 0));
  if (chart.stack) for (let k = series.length - 2; k >= 0; k--) base[k] = base[k + 1].map((v, i) => v + series[k + 1].y[i]);
  const tops = series.map((s, k) => s.y.map((v, i) => (v === null ? null : v + base[k][i])));
  const top = chart.y.max ?? (bound(tops, Math.max) * 1.04 || 1);
  const y = scale("linear", 0, top, f.bottom, f.top, "");
  if (chart.window) {
    const [a, b] = chart.window.map((v) => Math.min(f.right, Math.max(f.left, x.map(v))));
    for (const [from, to] of [[f.left, a], [b, f.right]]) if (to - from > 1)
      el(f.svg, "rect", { class: "outside", x: from, y: f.top, width: to - from, height: f.bottom - f.top });
  }
  yAxis(f, y, chart.y.unit);
  xAxis(f, x, chart.x.unit);
  const ends = [];
  series.forEach((s, k) => {
    let path = "", open = false;
    s.x.forEach((v, i) => {
      if (tops[k][i] === null) { open = false; return; }
      path += `${open ? "L" : "M"}${x.map(v).toFixed(1)} ${y.map(tops[k][i]).toFixed(1)}`;
      open = true;
    });
    if (chart.stack) {
      const back = s.x.map((v, i) => `L${x.map(v).toFixed(1)} ${y.map(base[k][i]).toFixed(1)}`).reverse().join("");
      el(f.svg, "path", { d: path + back + "Z", fill: color(s.color), "fill-opacity": 0.32 });
    }
    el(f.svg, "path", { d: path, fill: "none", stroke: color(s.color), "stroke-width": 1.8, "stroke-linejoin": "round", ...(s.dash ? { "stroke-dasharray": "6 4" } : {}) });
    const last = finite(tops[k]).at(-1);
    if (labelled && last !== undefined) ends.push({ y: y.map(last), s });
  });
  ends.sort((a, b) => a.y - b.y);
  for (let k = 1; k < ends.length; k++) ends[k].y = Math.max(ends[k].y, ends[k - 1].y + 14);
  if (ends.length) ends.at(-1).y = Math.min(ends.at(-1).y, f.bottom + 2);
  for (let k = ends.length - 2; k >= 0; k--) ends[k].y = Math.min(ends[k].y, ends[k + 1].y - 14);
  for (const end of ends) el(f.svg, "text", { x: f.right + 7, y: end.y + 4, style: `fill:${color(end.s.color)}` }, end.s.name);
  for (const ref of chart.refs || []) {
    const at = x.map(ref.x), last = at > (f.left + f.right) / 2;
    el(f.svg, "line", { class: "ref", x1: at, x2: at, y1: f.top, y2: f.bottom });
    el(f.svg, "text", { x: at + (last ? -5 : 5), y: f.bottom - 7, "text-anchor": last ? "end" : "start" }, ref.label);
  }
  for (const point of chart.points || []) {
    const at = x.map(point.x), up = y.map(point.y), last = at > f.right - 92;
    el(f.svg, "circle", { cx: at, cy: up, r: 3.4, fill: color(point.color || 1), stroke: "var(--panel)", "stroke-width": 1.5 });
    el(f.svg, "text", { class: "mark", x: at + (last ? -7 : 8), y: up + (last ? -6 : 14), "text-anchor": last ? "end" : "start" }, point.label);
  }
  const cursor = el(f.svg, "line", { class: "cursor", y1: f.top, y2: f.bottom, visibility: "hidden" });
  const dots = series.map((s) => el(f.svg, "circle", { r: 3.6, fill: color(s.color), stroke: "var(--panel)", "stroke-width": 1.5, visibility: "hidden" }));
  onPoint(f, (event, px, py) => {
    const show = event && px >= f.left - 4 && px <= f.right + 4;
    cursor.setAttribute("visibility", show ? "visible" : "hidden");
    if (!show) { dots.forEach((dot) => dot.setAttribute("visibility", "hidden")); if (event) tip.style.display = "none"; return; }
    const byShare = chart.cdf; // then the cursor follows the share, and tells the value there
    const rows = series.map((s, k) => {
      const i = byShare ? nearest(s.y, y.back(Math.min(f.bottom, Math.max(f.top, py)))) : nearest(s.x, x.back(px));
      const shown = tops[k][i] !== null;
      dots[k].setAttribute("visibility", shown ? "visible" : "hidden");
      if (shown) { dots[k].setAttribute("cx", x.map(s.x[i])); dots[k].setAttribute("cy", y.map(tops[k][i])); }
      return { i, name: s.name, value: byShare ? format(chart.x.unit)(s.x[i]) : s.y[i] === null ? "-" : format(chart.y.unit)(s.y[i]), hue: s.color };
    });
    const first = series[0], i = rows[0].i;
    if (byShare) cursor.setAttribute("visibility", "hidden");
    else { const at = x.map(first.x[i]); cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); }
    const title = byShare ? `${three(first.y[i] * 100)} % within` : format(chart.x.unit)(first.x[i]);
    showTip(event, f, title, rows.map((row) => [row.name, row.value, row.hue]));
  });
}

function drawBars(host, chart) {
  const f = frame(host, chart, 200, { left: 50, right: 12, top: 12, bottom: 24 });
  const { edges, counts } = chart, total = counts.reduce((a, b) => a + b, 0);
  const even = chart.x.even; // bars of one width each, named by their edges
  const x = even ? { map: (v) => f.left + (v / counts.length) * (f.right - f.left), ticks: [] } : scale("log", edges[0], edges.at(-1), f.left, f.right, chart.x.unit);
  const y = scale("linear", 0, Math.max(...counts) / total * 1.04, f.bottom, f.top, "share");
  yAxis(f, y, "share");
  const spans = counts.map((_, i) => (even ? [x.map(i), x.map(i + 1)] : [x.map(edges[i]), x.map(edges[i + 1])]));
  const bars = counts.map((count, i) => {
    const up = y.map(count / total);
    return el(f.svg, "rect", { x: spans[i][0] + 0.5, y: up, width: Math.max(0.5, spans[i][1] - spans[i][0] - 1), height: Math.max(0, f.bottom - up), fill: color(chart.color || 1), rx: 1 });
  });
  xAxis(f, x, chart.x.unit);
  const name = (i) => (edges[i + 1] - edges[i] === 1 && even ? `${edges[i]}` : even ? `${edges[i]} to ${edges[i + 1] - 1}` : `${seconds(edges[i])} to ${seconds(edges[i + 1])}`);
  if (even) counts.forEach((_, i) => {
    const room = (spans[i][1] - spans[i][0]) / 7;
    const text = [name(i).replace(" to ", "–"), `${edges[i]}+`, `${edges[i]}`].find((each) => each.length <= room) || "";
    el(f.svg, "text", { x: (spans[i][0] + spans[i][1]) / 2, y: f.bottom + 16, "text-anchor": "middle" }, text);
  });
  onPoint(f, (event, px) => {
    const i = event ? spans.findIndex(([a, b]) => px >= a && px < b) : -1;
    bars.forEach((bar, k) => bar.setAttribute("fill-opacity", i < 0 || k === i ? 1 : 0.55));
    if (i < 0) { tip.style.display = "none"; return; }
    showTip(event, f, name(i) + (chart.what ? " " + chart.what : ""), [[chart.counted, `${counts[i].toLocaleString("en")} (${three((counts[i] / total) * 100)} %)`]]);
  });
}

function drawHeat(host, chart) {
  const rows = chart.names.length, each = Math.max(6, Math.min(20, 300 / rows)), longest = Math.max(...chart.names.map((n) => n.length));
  const f = frame(host, chart, each * rows + 30, { left: 12 + longest * 7, right: 12, top: 4, bottom: 24 });
  const bins = chart.percent[0].length;
  const x = scale("linear", 0, bins * chart.bin_s, f.left, f.right, "time");
  const wide = (f.right - f.left) / bins, paths = Array(9).fill("");
  chart.percent.forEach((row, k) => {
    for (let i = 0; i < bins; ) {
      const level = Math.ceil(row[i] / 12.5);
      let end = i + 1;
      while (end < bins && Math.ceil(row[end] / 12.5) === level) end++;
      paths[level] += `M${(f.left + i * wide).toFixed(1)} ${(f.top + k * each).toFixed(1)}h${((end - i) * wide).toFixed(1)}v${(each - 1).toFixed(1)}h${(-(end - i) * wide).toFixed(1)}z`;
      i = end;
    }
  });
  paths.forEach((d, level) => d && el(f.svg, "path", { d, fill: level ? "var(--c1)" : "var(--soft)", "fill-opacity": level ? 0.1 + 0.9 * (level / 8) ** 1.5 : 1 }));
  const every = Math.ceil(14 / each);
  chart.names.forEach((name, k) => k % every || el(f.svg, "text", { x: f.left - 7, y: f.top + (k + 0.5) * each + 4, "text-anchor": "end" }, name));
  xAxis(f, x, "time");
  onPoint(f, (event, px, py) => {
    const k = Math.floor((py - f.top) / each), i = Math.floor((px - f.left) / wide);
    if (!event || k < 0 || k >= rows || i < 0 || i >= bins) { tip.style.display = "none"; return; }
    showTip(event, f, `replica ${chart.names[k]}`, [["at " + clock(i * chart.bin_s), `${chart.percent[k][i]} % busy`]]);
  });
}

function drawGantt(host, chart) {
  const lanes = Math.max(...chart.replica) + 1, each = lanes > 8 ? 17 : 24;
  const f = frame(host, chart, each * lanes + 32, { left: 30, right: 12, top: 4, bottom: 24 });
  const low = bound([chart.begin], Math.min), first = Math.max(...chart.rows);
  // Up to where the first lane runs out of slices, and no more bars than can be told apart.
  const ends = Array(lanes).fill(0);
  chart.end.forEach((v, i) => { ends[chart.replica[i]] = v; });
  let high = Math.min(...ends.filter((v) => v));
  const longest = chart.replica.map((r, i) => (r === chart.replica[0] ? chart.end[i] : 0)).filter((v) => v);
  high = Math.min(high, longest[Math.min(longest.length, Math.floor((f.right - f.left) / 14)) - 1]);
  const x = scale("linear", low, high, f.left, f.right, "time");
  const paths = { decode: ["", "", "", ""], prefill: ["", "", "", ""] };
  const shown = [];
  chart.begin.forEach((begin, i) => {
    if (begin >= high) return;
    const a = x.map(begin), b = x.map(Math.min(high, chart.end[i])), top = f.top + chart.replica[i] * each;
    const level = Math.min(3, Math.floor((chart.rows[i] / (first + 1)) * 4));
    paths[chart.prefill[i] ? "prefill" : "decode"][level] += `M${a.toFixed(1)} ${top + 2}h${Math.max(0.8, b - a - 0.8).toFixed(1)}v${each - 4}H${a.toFixed(1)}z`;
    shown.push([a, b, i]);
  });
  for (const [kind, hue] of [["decode", 1], ["prefill", 2]]) paths[kind].forEach((d, level) => d && el(f.svg, "path", { d, fill: color(hue), "fill-opacity": 0.4 + level * 0.2 }));
  for (let k = 0; k < lanes; k++) el(f.svg, "text", { x: f.left - 7, y: f.top + (k + 0.5) * each + 4, "text-anchor": "end" }, k);
  xAxis(f, x, "time");
  onPoint(f, (event, px, py) => {
    const lane = Math.floor((py - f.top) / each);
    const hit = event && shown.find(([a, b, i]) => chart.replica[i] === lane && px >= a && px < b);
    if (!hit) { tip.style.display = "none"; return; }
    const i = hit[2];
    showTip(event, f, `replica ${lane}, at ${clock(chart.begin[i])}`, [["took", seconds(chart.end[i] - chart.begin[i])], ["steps", chart.steps[i]], ["rows", chart.rows[i]], ["prompt tokens", magnitude(chart.prefill[i])], ["output tokens", magnitude(chart.output[i])], ...(chart.pad[i] ? [["pad tokens", magnitude(chart.pad[i])]] : [])]);
  });
}

function drawRanges(host, chart) {
  const each = 22, rows = chart.names.length, wide = Math.min(host.clientWidth * 0.36, 16 + Math.max(...chart.names.map((n) => n.length)) * 7);
  const f = frame(host, chart, each * rows + 34, { left: wide, right: 14, top: 4, bottom: 24 });
  const low = Math.min(...chart.low.filter((v) => v > 0)), high = Math.max(...chart.high);
  const log = high / low > 4;
  const x = scale(log ? "log" : "linear", log ? low * 0.9 : 0, high * 1.05, f.left, f.right, "s");
  xAxis(f, x, "s", true);
  chart.names.forEach((name, k) => {
    const y = f.top + (k + 0.5) * each, most = Math.floor((wide - 10) / 6.6);
    el(f.svg, "text", { x: f.left - 8, y: y + 4, "text-anchor": "end" }, name.length > most ? name.slice(0, most - 1) + "…" : name);
    el(f.svg, "line", { x1: x.map(chart.low[k]), x2: x.map(chart.high[k]), y1: y, y2: y, stroke: "var(--c1)", "stroke-opacity": 0.4, "stroke-width": 4 });
    el(f.svg, "circle", { cx: x.map(chart.low[k]), cy: y, r: 4, fill: "var(--c1)" });
    el(f.svg, "circle", { cx: x.map(chart.high[k]), cy: y, r: 4, fill: "var(--c2)" });
  });
  onPoint(f, (event, px, py) => {
    const k = Math.floor((py - f.top) / each);
    if (!event || k < 0 || k >= rows) { tip.style.display = "none"; return; }
    showTip(event, f, chart.names[k], [["P50", seconds(chart.low[k]), 1], ["P99", seconds(chart.high[k]), 2]]);
  });
}

const DRAW = { line: drawLine, bars: drawBars, heat: drawHeat, gantt: drawGantt, ranges: drawRanges };
const watch = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const width = target.clientWidth;
    if (+target.dataset.width === width) continue;
    target.dataset.width = width;
    const chart = charts[target.id];
    DRAW[chart.type](target, chart);
  }
});
for (const id in charts) watch.observe(document.getElementById(id));
