"use strict";
// Asks once a second how the run stands and shows it. Everything from the run becomes text, never markup.

const EVERY_MS = 1000, PATIENCE_MS = 6000, MOST_WAIT_MS = 5000;
const at = (id) => document.getElementById(id);
const columns = new Columns();
const charts = PANELS.map((panel) => {
  const chart = new Chart(at("curves"), panel);
  chart.figure.hidden = Boolean(panel.optional || panel.needs);
  return chart;
});
const tables = Object.fromEntries(["Fleet", "Last steps", "Staleness budget", "Alerts so far"].map((title) => {
  const box = make("section", { class: title === "Last steps" ? "table tall" : "table", hidden: "" }, document.querySelector(".tables"));
  make("h2", {}, box, title);
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, box), table = make("table", {}, scroll);
  return [title, { box, head: make("tr", {}, make("thead", {}, table)), body: make("tbody", {}, table), more: make("p", { class: "more" }, box) }];
}));
let failures = 0;

function setText(node, words) { if (node.textContent !== words) node.textContent = words; }

function duration(seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), two = (v) => String(v).padStart(2, "0");
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

function showHead(state) {
  const steps = state.steps ? `${state.step.toLocaleString("en")} of ${state.steps.toLocaleString("en")}` : String(state.step);
  const share = state.steps ? Math.min(1, state.step / state.steps) : 0;
  document.title = `${state.steps ? Math.floor(100 * share) + "% · " : ""}${state.name} · croupier`;
  setText(at("name"), state.name);
  const phase = state.lost ? "lost" : state.phase === "nothing" ? "waiting" : state.phase;
  at("phase").className = `pill ${["running", "evaluating", "finished", "stopped", "waiting", "gone", "lost"].includes(phase) ? phase : ""}`;
  setText(at("phase"), state.lost ? "no word" : phase);
  const waits = state.phase === "gone" || state.lost ? state.says : state.words && !state.over ? `waits for ${state.words}` : "";
  setText(at("waits"), waits);
  setText(at("step"), state.steps ? `${steps} (${Math.floor(100 * share)} %)` : steps);
  setText(at("elapsed"), duration(state.elapsed_s));
  setText(at("eta"), state.over ? "over" : duration(state.eta_s));
  setText(at("version"), state.version === null ? "–" : state.version.toLocaleString("en"));
  at("bar").style.transform = `scaleX(${share})`;
  at("progress").setAttribute("aria-valuemax", String(state.steps || 1));
  at("progress").setAttribute("aria-valuenow", String(state.step));
  setText(at("notes"), state.notes.join("; "));
}

function showTiles(state) {
  const held = state.held_out, f = state.figures;
  const tiles = [
    ["reward", figure(state.reward), "newest batch"],
    ["held-out", held ? figure(held[1]) : "–", held && held[2] !== null ? `${figure(held[2])} to ${figure(held[3])}, v${held[0]}` : held ? `v${held[0]}` : ""],
    ["mean lag", figure(state.lag_mean), `of ${state.budget ?? "–"}${state.budget_auto ? " (auto)" : ""}, max ${state.lag_max ?? "–"}`],
    ["acceptance", f.acceptance === null ? "–" : `${(100 * f.acceptance).toFixed(1)}%`, f.threshold === null ? "rejection is off" : `λ ${figure(f.threshold)}`],
    ["KL after", figure(f.kl_after), f.kl_before === null ? "" : `before ${figure(f.kl_before)}`],
    ["ESS", figure(f.weight_ess ?? f.ess), "share of the batch"],
    ["tokens/s", figure(state.tokens_per_s), "generated"],
    ["queue", `${figure(state.queue_groups)} groups`, state.queue_mb === null ? "" : `${state.queue_mb.toFixed(1)}${state.queue_limit_mb ? " of " + figure(state.queue_limit_mb) : ""} MB`],
  ];
  const box = at("tiles");
  tiles.forEach(([name, value, unit], i) => {
    let tile = box.children[i];
    if (!tile) { tile = make("div", {}, box); make("dt", {}, tile, name); const dd = make("dd", {}, tile); make("span", { class: "value" }, dd); make("span", { class: "unit" }, dd); }
    setText(tile.querySelector(".value"), value);
    setText(tile.querySelector(".unit"), unit);
    tile.querySelector(".unit").title = unit;
  });
}

function showAlerts(state) {
  const wanted = state.raised.join("\n");
  at("alerts").hidden = !state.raised.length;
  if (at("alerts").dataset.said === wanted) return;
  at("alerts").dataset.said = wanted;
  at("alerts").replaceChildren(...state.raised.map((words) => make("p", {}, null, words)));
}

// rows: arrays of cells; a cell is a text, or {words, cls}, or {bar: shares}
function showTable(title, head, rows, more = "", marks = []) {
  const { box, head: top, body, more: below } = tables[title];
  box.hidden = !rows.length;
  if (top.children.length !== head.length) top.replaceChildren(...head.map(([name, cls]) => make("th", { scope: "col", class: cls || "" }, null, name)));
  while (body.children.length > rows.length) body.lastChild.remove();
  rows.forEach((row, i) => {
    const line = body.children[i] || make("tr", {}, body);
    line.className = marks[i] || "";
    row.forEach((cell, j) => {
      const td = line.children[j] || make("td", {}, line);
      td.className = cell.cls || "";
      if (cell.bar) showBar(td, cell.bar);
      else { setText(td, cell.words ?? cell); td.title = cell.cls === "name" ? cell.words : ""; }
    });
  });
  setText(below, more);
}

function showBar(cell, { shares, colours }) {
  const bar = cell.querySelector(".share") || make("span", { class: "share", role: "img" }, cell);
  bar.setAttribute("aria-label", shares.map((s) => `${s.state} ${Math.round(100 * s.share)} %`).join(", ") || "not told");
  bar.title = bar.getAttribute("aria-label");
  while (bar.children.length > shares.length) bar.lastChild.remove();
  shares.forEach((s, i) => {
    const part = bar.children[i] || make("i", {}, bar);
    part.style.width = `${100 * s.share}%`;
    const color = colours[s.state];
    part.style.background = s.state.startsWith("idle.") ? `repeating-linear-gradient(135deg, ${color} 0 2px, color-mix(in srgb, ${color} 50%, transparent) 2px 4px)` : color;
  });
}

function largestWait(shares) {
  const most = shares.filter((s) => s.state.startsWith("idle.")).sort((a, b) => b.share - a.share)[0];
  return most ? `${Math.round(100 * most.share)}% ${most.state.slice(5)}` : shares.length ? "busy" : "–";
}

function showTables(state) {
  const dropped = Object.entries(state.dropped).sort((a, b) => b[1] - a[1]).map(([why, n]) => `${n.toLocaleString("en")} ${why}`).join(", ");
  const colours = state.colours, span = state.span_s === null ? "so far" : `last ${Math.round(state.span_s)} s`;
  showTable("Fleet", [["process"], ["role", "left"], ["version"], ["heard"], ["tok/s"], [span, "left"], ["waits for", "left"]], state.peers.map((p) => [
    { words: `${p.peer}${p.servers ? " " + p.servers : ""}`, cls: "name" }, { words: p.role, cls: "left" }, p.version === null ? "frozen" : p.version.toLocaleString("en"),
    `${p.silent_s.toFixed(1)} s`, p.tokens_per_s === null ? "–" : figure(p.tokens_per_s), { bar: { shares: p.shares, colours }, cls: "left" }, { words: largestWait(p.shares), cls: "left" },
  ]), state.hidden ? `and ${state.hidden.toLocaleString("en")} more; ${state.roles.map((r) => `${r.count ?? 0} ${r.role}`).join(", ")}` : "", state.peers.map((p) => (p.silent_s > 3 ? "silent" : "")));
  showTable("Last steps", [["step"], ["reward"], ["lag"], ["accepted"], ["KL before"], ["KL after"], ["ESS"], ["λ"], ["tokens"], ["dropped"]], state.receipts.map((r) => [
    r.step.toLocaleString("en"), figure(r.reward), `${figure(r.lag_mean)}, max ${r.lag_max ?? "–"}`, r.acceptance === null ? "–" : `${(100 * r.acceptance).toFixed(1)}%`,
    figure(r.kl_before), figure(r.kl_after), figure(r.ess), figure(r.threshold), figure(r.tokens), Object.entries(r.dropped).map(([why, n]) => `${n} ${why}`).join(", ") || "·",
  ]), `${figure(state.trained)} trajectories trained, ${dropped ? "dropped " + dropped : "none dropped"}`);
  showTable("Staleness budget", [["step"], ["move"], ["reason", "words"]], state.moves.map((m) => [
    m.step.toLocaleString("en"), `${m.before ?? "–"} → ${m.budget}`, { words: m.reason, cls: "words" },
  ]));
  showTable("Alerts so far", [["step"], ["sign"], ["", ""], ["what", "words"]], state.alerts.map((a) => [
    a.step.toLocaleString("en"), a.sign, a.state, { words: a.text, cls: "words" },
  ]));
}

function showCharts() {
  PANELS.forEach((panel, i) => {
    const missing = panel.optional ? !Object.keys(columns.levels).some((n) => n.startsWith(`state ${panel.optional} `)) : panel.needs && !columns.has(panel.needs);
    charts[i].figure.hidden = Boolean(missing);
    if (!missing) charts[i].show(panel.data(columns));
  });
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

function showConnection(ok) {
  if (ok) { failures = 0; at("lost").hidden = true; return; }
  failures += 1;
  if (failures === 1) setText(at("lost"), `Connection lost at ${new Date().toLocaleTimeString()}: what is shown is from then. Trying again …`);
  at("lost").hidden = false;
}

async function turn() {
  try {
    const state = await ask("/api/state");
    showHead(state);
    showTiles(state);
    showAlerts(state);
    showTables(state);
    const sent = await ask(`/api/metrics?since=${columns.since}&key=${encodeURIComponent(columns.key)}`);
    columns.take(sent);
    columns.meanings = state.meanings;
    showCharts();
    showConnection(true);
  } catch (error) {
    showConnection(false);
    if (!(error instanceof TypeError || error instanceof DOMException || /^\/api/.test(error.message))) console.error(error);
  }
  setTimeout(turn, Math.min(MOST_WAIT_MS, EVERY_MS * 2 ** Math.min(3, Math.max(0, failures - 1))));
}

turn();
