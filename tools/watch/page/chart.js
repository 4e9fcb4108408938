"use strict";
// One chart: axes, curves with bands, stacked areas or a heat map, a cross with a read-out. It knows nothing of runs.

const SVG = "http://www.w3.org/2000/svg";
const PAD = { left: 46, right: 10, top: 8, bottom: 20 };

function make(tag, attributes = {}, parent = null, words = null) {
  const svg = ["svg", "path", "line", "g", "text", "rect", "pattern"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (words !== null) node.textContent = words;
  if (parent) parent.appendChild(node);
  return node;
}

function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(1).replace("e+", "e");
  if (size === 0) return "0";
  if (size >= 1e4) return Math.round(value / 100) / 10 + "k";
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9) + 0; i * step <= high + step * 1e-9; i++) found.push(i * step + 0);
  return found;
}

class Chart {
  // options: title, unit, y: [low, high] that is always shown, log, whole (axis of whole numbers)
  constructor(parent, options) {
    this.options = options;
    this.figure = make("figure", {}, parent);
    const caption = make("figcaption", {}, this.figure);
    this.title = make("h2", {}, caption, options.title);
    this.legend = make("div", { class: "legend" }, caption);
    this.plot = make("div", { class: "plot", role: "img", tabindex: "0", "aria-label": options.title }, this.figure);
    if (options.heat) this.canvas = make("canvas", { "aria-hidden": "true" }, this.plot);
    this.svg = make("svg", { "aria-hidden": "true" }, this.plot);
    this.axes = make("g", {}, this.svg);
    this.marks = make("g", {}, this.svg);
    this.cross = make("line", { class: "cross", visibility: "hidden" }, this.svg);
    this.empty = make("div", { class: "empty" }, this.plot, options.empty || "no step yet");
    this.readout = make("div", { class: "readout", hidden: "" }, this.plot);
    this.data = null;
    this.at = null;
    this.paths = new Map();
    this.plot.addEventListener("pointermove", (e) => this.point(e));
    this.plot.addEventListener("pointerdown", (e) => this.point(e));
    this.plot.addEventListener("pointerleave", () => this.hide());
    this.plot.addEventListener("blur", () => this.hide());
    this.plot.addEventListener("keydown", (e) => this.key(e));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  // data: {x: [...], spans: [[first, last]...], series: [{name, kind, color, y, low, high, dash, x}], heat, says}
  show(data) {
    this.data = data;
    this.draw();
  }

  draw() {
    const data = this.data, width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!data || !width) return;
    const drawn = data.x.length > 0 && (data.heat || data.series.some((s) => s.y.some((v) => v !== null)));
    this.empty.hidden = drawn;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.box = { width, height, right: width - PAD.right, bottom: height - PAD.bottom };
    this.scale();
    this.drawAxes();
    this.drawMarks();
    if (this.canvas) this.drawHeat();
    this.drawLegend();
    this.plot.setAttribute("aria-label", `${this.options.title}. ${data.says || ""}`);
    if (this.at !== null) this.tell();
  }

  scale() {
    const { data, options } = this;
    const xs = [data.x, ...data.series.map((s) => s.x || [])].flat();
    this.x0 = xs.length ? Math.min(data.spans[0] ? data.spans[0][0] : Infinity, ...xs) : 0;
    this.x1 = xs.length ? Math.max(...xs) : 1;
    if (this.x1 <= this.x0) this.x1 = this.x0 + 1;
    let low = Infinity, high = -Infinity;
    for (const s of data.series) {
      for (const column of s.kind === "area" ? [s.top] : [s.y, s.low || [], s.high || []]) {
        for (const v of column) if (v !== null && (!options.log || v > 0)) { low = Math.min(low, v); high = Math.max(high, v); }
      }
    }
    const open = options.y && high > options.y[1];
    if (options.y) { low = Math.min(low, options.y[0]); high = Math.max(high, options.y[1]); }
    if (data.y) [low, high] = data.y;
    if (!Number.isFinite(low)) { low = options.log ? 1e-4 : 0; high = 1; }
    if (options.log) {
      low = Math.max(options.floor || 1e-9, low);
      low = 10 ** Math.floor(Math.log10(low)); high = 10 ** Math.ceil(Math.log10(Math.max(high, low * 10)));
    } else if (high <= low) {
      high = low + 1;
    } else if (!data.y && (open || !options.y)) {
      const room = (high - low) * 0.06; high += room;
      if (!options.y && low !== 0) low -= room;
    }
    this.y0 = low; this.y1 = high;
  }

  px(x) { return PAD.left + (x - this.x0) / (this.x1 - this.x0) * (this.box.right - PAD.left); }

  py(y) {
    const [a, b, v] = this.options.log ? [this.y0, this.y1, Math.max(y, this.y0)].map((w) => Math.log10(w)) : [this.y0, this.y1, y];
    return this.box.bottom - (v - a) / (b - a) * (this.box.bottom - PAD.top);
  }

  drawAxes() {
    const { box, options } = this, lines = [];
    let marks;
    if (options.log) {
      const from = Math.log10(this.y0), to = Math.log10(this.y1), every = Math.ceil((to - from) / 5);
      marks = []; for (let p = from; p <= to + 1e-9; p += every) marks.push(10 ** p);
    } else {
      marks = ticks(this.y0, this.y1, options.whole ? Math.min(5, this.y1 - this.y0) : 4);
      if (options.whole) marks = marks.filter((v) => Number.isInteger(v));
    }
    for (const v of marks) lines.push([PAD.left, box.right, this.py(v), options.percent ? Math.round(v * 100) + "%" : figure(v), "end", PAD.left - 6, 4]);
    const found = [];
    for (const [a, b, y, words, anchor, x, dy] of lines) {
      if (!options.heat) found.push(make("line", { class: "grid", x1: a, x2: b, y1: y, y2: y }));
      found.push(make("text", { x, y: y + dy, "text-anchor": anchor }, null, words));
    }
    for (const v of ticks(this.x0, this.x1, Math.max(2, Math.floor(box.width / 75)))) {
      if (!Number.isInteger(v)) continue;
      const anchor = this.px(v) > box.right - 14 ? "end" : this.px(v) < PAD.left + 8 ? "start" : "middle";
      found.push(make("text", { x: this.px(v), y: box.height - 4, "text-anchor": anchor }, null, v.toLocaleString("en")));
    }
    this.axes.replaceChildren(...found);
  }

  path(key, attributes) {
    let node = this.paths.get(key);
    if (!node) { node = make("path", {}, this.marks); this.paths.set(key, node); }
    for (const [name, value] of Object.entries(attributes)) if (node.getAttribute(name) !== value) node.setAttribute(name, value);
    node.dataset.fresh = "1";
  }

  drawMarks() {
    for (const node of this.paths.values()) node.dataset.fresh = "";
    for (const s of this.data.series) {
      const x = s.x || this.data.x, n = (v) => v.toFixed(1);
      if (s.kind === "area") {
        let up = "", down = "";
        x.forEach((v, i) => { if (s.top[i] !== null) { up += `${up ? "L" : "M"}${n(this.px(v))} ${n(this.py(s.top[i]))}`; down = `L${n(this.px(v))} ${n(this.py(s.base[i]))}${down}`; } });
        this.path(s.name, { d: up && up + down + "Z", fill: s.hatched ? hatch(s.color) : s.color, stroke: "none" });
        continue;
      }
      if (s.low && s.high) {
        let up = "", down = "";
        x.forEach((v, i) => { if (s.low[i] !== null && s.high[i] !== null) { up += `${up ? "L" : "M"}${n(this.px(v))} ${n(this.py(s.high[i]))}`; down = `L${n(this.px(v))} ${n(this.py(s.low[i]))}${down}`; } });
        this.path(s.name + " band", { d: up && up + down + "Z", fill: s.color, "fill-opacity": "0.17", stroke: "none" });
      }
      let d = "", pen = false, last = null;
      x.forEach((v, i) => {
        const y = s.y[i];
        if (y === null || y === undefined) { pen = false; return; }
        const px = n(this.px(v)), py = n(this.py(y));
        d += !pen ? `M${px} ${py}` : s.kind === "step" ? `L${px} ${last}L${px} ${py}` : `L${px} ${py}`;
        if (s.dots || (!pen && x.length === 1)) d += `m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0M${px} ${py}`;
        pen = true; last = py;
      });
      this.path(s.name, {
        d, fill: s.dots ? s.color : "none", "fill-opacity": s.dots ? "1" : "0", stroke: s.color, "stroke-width": s.thin ? "1" : "2",
        "stroke-opacity": s.thin ? "0.4" : "1", "stroke-dasharray": s.dash || "none", "stroke-linejoin": "round", "stroke-linecap": "round",
      });
    }
    for (const [key, node] of this.paths) if (!node.dataset.fresh) { node.remove(); this.paths.delete(key); }
  }

  // heat: {rows, values(i) -> [[row, share]...], color}
  drawHeat() {
    const { canvas, box, data } = this, sharp = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(box.width * sharp) || canvas.height !== Math.round(box.height * sharp)) {
      canvas.width = Math.round(box.width * sharp); canvas.height = Math.round(box.height * sharp);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    if (!data.heat) return;
    pen.fillStyle = getComputedStyle(this.figure).getPropertyValue(data.heat.color);
    data.spans.forEach(([first, last], i) => {
      const left = Math.max(PAD.left, this.px(first - 0.5)), right = Math.min(box.right, this.px(last + 0.5));
      for (const [row, share] of data.heat.values(i)) {
        const top = this.py(row + 0.5), bottom = this.py(row - 0.5);
        pen.globalAlpha = 0.06 + 0.94 * Math.sqrt(share);
        if (share > 0) pen.fillRect(left, top, Math.max(0.75, right - left + 0.3), bottom - top);
      }
    });
    pen.globalAlpha = 1;
  }

  drawLegend() {
    const wanted = this.data.series.filter((s) => !s.thin && !s.unnamed).map((s) => `${s.name}|${s.color}|${s.dash || ""}|${s.title || ""}`).join();
    if (wanted === this.named) return;
    this.named = wanted;
    this.legend.replaceChildren(...this.data.series.filter((s) => !s.thin && !s.unnamed).map((s) => {
      const item = make("span", { title: s.title || "" });
      item.append(swatch(s), document.createTextNode(s.name));
      return item;
    }));
  }

  point(event) {
    if (!this.data || !this.data.x.length || !this.box) return;
    const place = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    this.data.x.forEach((v, i) => { if (Math.abs(this.px(v) - place) < Math.abs(this.px(this.data.x[best]) - place)) best = i; });
    this.at = this.data.x[best];
    this.tell();
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.hide();
    if (!move || !this.data || !this.data.x.length) return;
    event.preventDefault();
    const x = this.data.x, now = this.at === null ? x.length - (move < 0 ? 0 : 1) : x.indexOf(this.at);
    this.at = x[Math.min(x.length - 1, Math.max(0, now + move))];
    this.tell();
  }

  hide() {
    this.at = null;
    this.readout.hidden = true;
    this.cross.setAttribute("visibility", "hidden");
  }

  tell() {
    const { data, box } = this;
    let i = data.x.indexOf(this.at);
    if (i < 0) i = data.x.findLastIndex((v) => v <= this.at);
    if (i < 0) { this.hide(); return; }
    const px = this.px(data.x[i]), [first, last] = data.spans[i];
    const rows = [make("b", {}, null, first === last ? `step ${first.toLocaleString("en")}` : `steps ${first.toLocaleString("en")} to ${last.toLocaleString("en")}`)];
    for (const s of data.series) {
      if (s.thin) continue;
      const j = s.x ? s.x.findLastIndex((v) => v <= data.x[i]) : i;
      if (j < 0 || s.y[j] === null || s.y[j] === undefined) continue;
      const row = make("div");
      const range = s.low && s.high && s.low[j] !== null ? ` (${figure(s.low[j])} to ${figure(s.high[j])})` : "";
      row.append(swatch(s), make("span", {}, null, s.name), make("span", {}, null, (this.options.percent ? `${(100 * s.y[j]).toFixed(1)}%` : figure(s.y[j])) + range));
      rows.push(row);
    }
    for (const [name, words] of data.more ? data.more(i) : []) {
      const row = make("div");
      row.append(make("span", {}, null, name), make("span", {}, null, words));
      rows.push(row);
    }
    this.readout.replaceChildren(...rows);
    this.readout.hidden = false;
    const right = px < box.width / 2;
    this.readout.style.left = right ? `${px + 12}px` : "auto";
    this.readout.style.right = right ? "auto" : `${box.width - px + 12}px`;
    for (const [name, value] of Object.entries({ x1: px, x2: px, y1: PAD.top, y2: box.bottom, visibility: "visible" })) this.cross.setAttribute(name, value);
  }
}

// Waiting is hatched: it is told from work without colours too. One pattern for each colour, for the whole document.
function hatch(color) {
  const id = `hatch${color.replace(/[^0-9a-z]/gi, "")}`;
  if (!document.getElementById(id)) {
    const home = document.getElementById("hatches") || make("svg", { id: "hatches", width: 0, height: 0, "aria-hidden": "true" }, document.body);
    const pattern = make("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, home);
    make("rect", { width: 6, height: 6, fill: color, "fill-opacity": 0.5 }, pattern);
    make("rect", { width: 2, height: 6, fill: color, "fill-opacity": 0.6 }, pattern);
  }
  return `url(#${id})`;
}

function swatch(series) {
  const svg = make("svg", { class: "swatch", viewBox: "0 0 16 10", "aria-hidden": "true" });
  if (series.kind === "area") make("rect", { width: 16, height: 10, rx: 2, fill: series.hatched ? hatch(series.color) : series.color }, svg);
  else make("path", { d: "M0 5H16", stroke: series.color, "stroke-width": 2.4, "stroke-dasharray": series.dash || "none" }, svg);
  return svg;
}
