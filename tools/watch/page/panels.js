"use strict";
// The columns that /api/metrics sends, kept and joined; and what each chart is shown of them.

const KL_FLOOR = 1e-7; // nats; below it a divergence is a rounding error

class Columns {
  constructor() { this.reset(); }

  reset() {
    this.key = ""; this.width = 1; this.first = []; this.last = []; this.means = {}; this.levels = {}; this.lags = [];
    this.evaluations = { version: [], reward: [], reward_low: [], reward_high: [] }; this.colours = {};
    this.meanings = this.meanings || {};
  }

  // From which step on the server should tell.
  get since() { return this.first.length ? this.first[this.first.length - 1] : 0; }

  take(sent) {
    if (sent.whole) this.reset();
    Object.assign(this, { key: sent.key, width: sent.width, evaluations: sent.evaluations, colours: sent.colours });
    const keep = sent.first.length ? this.first.findIndex((v) => v >= sent.first[0]) : -1;
    const size = keep < 0 ? this.first.length : keep;
    const join = (old, fresh) => [...(old || Array(size).fill(null)).slice(0, size), ...(fresh || Array(sent.first.length).fill(null))];
    for (const name of ["first", "last", "lags"]) this[name] = join(this[name], sent[name]);
    for (const [name, column] of Object.entries(sent.means)) {
      const old = this.means[name] || {};
      this.means[name] = Object.fromEntries(Object.entries(column).map(([kind, values]) => [kind, join(old[kind], values)]));
    }
    for (const name of new Set([...Object.keys(this.levels), ...Object.keys(sent.levels)])) this.levels[name] = join(this.levels[name], sent.levels[name]);
  }

  get x() { return this.first.map((first, i) => (first + this.last[i]) / 2); }
  get spans() { return this.first.map((first, i) => [first, this.last[i]]); }
  mean(name) { return (this.means[name] || {}).mean || this.first.map(() => null); }
  has(name) { return this.mean(name).some((v) => v !== null); }

  // How far back a rate looks: few bins are noisy, many hide what happened.
  get reach() { return Math.max(1, Math.min(12, Math.floor(this.first.length / 12))); }

  // What a level gained over the last bins; a sum that fell began anew.
  gain(name) {
    const level = this.levels[name] || [], reach = this.reach;
    return this.first.map((_, i) => {
      const now = level[i], before = i >= reach ? level[i - reach] : null;
      if (now === null || now === undefined) return null;
      if (before === null || before === undefined) return i >= reach ? now : null;
      return now >= before ? now - before : now;
    });
  }

  rate(name) {
    const gained = this.gain(name), time = this.gain("time_s");
    return gained.map((v, i) => (v === null || !(time[i] > 0) ? null : v / time[i]));
  }

  // [state, share of each bin...] of a role; the wait for a shard split by its causes.
  shares(role) {
    const prefix = `state ${role} `, states = {};
    for (const name of Object.keys(this.levels)) if (name.startsWith(prefix)) states[name.slice(prefix.length)] = this.gain(name);
    const shard = states["idle.shard"];
    if (role === "learner" && shard) {
      const causes = Object.keys(this.levels).filter((n) => n.startsWith("parked ")).map((n) => [n.slice(7), this.gain(n)]);
      const known = this.first.map((_, i) => causes.reduce((sum, [, v]) => sum + (v[i] || 0), 0));
      for (const [cause, v] of causes) states[`idle.shard:${cause}`] = shard.map((s, i) => (known[i] > 0 ? (s || 0) * (v[i] || 0) / known[i] : 0));
      states["idle.shard"] = shard.map((s, i) => (known[i] > 0 ? 0 : s));
    }
    const total = this.first.map((_, i) => Object.values(states).reduce((sum, v) => sum + (v[i] || 0), 0));
    return Object.entries(states)
      .map(([state, v]) => [state, v.map((s, i) => (total[i] > 0 ? (s || 0) / total[i] : null))])
      .filter(([, v]) => v.some((s) => s > 0.001))
      .sort(([a, va], [b, vb]) => a.startsWith("idle.") - b.startsWith("idle.") || newest(vb) - newest(va));
  }
}

function newest(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

// The running mean, of logarithms where the axis has them.
function smooth(values, half, log) {
  const [into, out] = log ? [(v) => Math.log(Math.max(v, KL_FLOOR)), Math.exp] : [(v) => v, (v) => v];
  return values.map((v, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter((w) => w !== null && w !== undefined).map(into);
    return v === null || !near.length ? null : out(near.reduce((a, b) => a + b) / near.length);
  });
}

// A noisy column: its own line thin, its running mean, and as a band an interval or the extremes of each bin.
function noisy(columns, name, label, color, more = {}, interval = null) {
  const mean = columns.mean(name), extremes = columns.means[name] || {};
  const band = interval || { low: extremes.low, high: extremes.high };
  if (mean.length < 18) return [{ name: label, y: mean, color, ...band, ...more }];
  return [{ name: `${label} each`, y: mean, color, thin: true, ...band }, { name: label, y: smooth(mean, 4, more.log), color, ...more }];
}

function base(columns, series, says) { return { x: columns.x, spans: columns.spans, series, says }; }

function areas(columns, role) {
  const shares = columns.shares(role);
  let floor = columns.first.map(() => 0);
  const series = shares.map(([state, y]) => {
    const bottom = floor, top = y.map((v, i) => (v === null ? null : bottom[i] + v));
    floor = top.map((v, i) => v ?? bottom[i]);
    return { name: state, kind: "area", y, base: bottom, top, color: columns.colours[state] || "#78818c", hatched: state.startsWith("idle."), title: columns.meanings[`${role} ${state}`] || "" };
  });
  const says = shares.map(([state, y]) => `${state} ${Math.round(100 * (newest(y) || 0))} %`).join(", ");
  return { ...base(columns, series, says), y: [0, 1] };
}

const PANELS = [
  { title: "Reward", y: [0, 1], data: (c) => base(c, [
    ...noisy(c, "reward", "batches", "var(--blue)"),
    { name: "held-out, 95 %", x: c.evaluations.version, y: c.evaluations.reward, low: c.evaluations.reward_low, high: c.evaluations.reward_high, color: "var(--orange)", dots: true },
  ], `Batches ${figure(newest(c.mean("reward")))}, held-out ${figure(newest(c.evaluations.reward))}`) },
  { title: "Lag of trained tokens", whole: true, heat: true, data: (c) => {
    const most = Math.max(1, ...c.lags.map((l) => (l.length ? l[l.length - 1][0] : 0)), ...c.mean("budget").map((v) => v || 0));
    const totals = c.lags.map((l) => l.reduce((sum, [, n]) => sum + n, 0));
    const budget = c.has("budget") ? [{ name: "budget", kind: "step", y: c.mean("budget"), color: "var(--red)", dash: "6 4" }] : [];
    return {
      ...base(c, [{ name: "mean", y: c.mean("lag_mean"), color: "var(--ink)" }, ...budget], `Mean ${figure(newest(c.mean("lag_mean")))} versions, budget ${figure(newest(c.mean("budget")))}`),
      y: [-0.5, most + 0.5],
      heat: { color: "--blue", values: (i) => c.lags[i].map(([lag, n]) => [lag, n / (totals[i] || 1)]) },
      more: (i) => c.lags[i].slice(-6).map(([lag, n]) => [`lag ${lag}`, `${(100 * n / (totals[i] || 1)).toFixed(1)}%`]),
    };
  } },
  { title: "Acceptance", percent: true, data: (c) => base(c, [
    ...noisy(c, "acceptance", "accepted, 95 %", "var(--green)", {}, { low: c.mean("acceptance_low"), high: c.mean("acceptance_high") }),
  ], `Newest ${figure(newest(c.mean("acceptance")))}`) },
  { title: "KL to the learner, nats a token", log: true, floor: KL_FLOOR, data: (c) => base(c, [
    ...noisy(c, "kl_before", "before rejection", "var(--red)", { dash: "5 3", log: true }), ...noisy(c, "kl_after", "after it", "var(--green)", { log: true }),
  ], `After rejection ${figure(newest(c.mean("kl_after")))}`) },
  { title: "Effective sample size and λ", y: [0, 1], data: (c) => base(c, [
    ...noisy(c, c.has("weight_ess") ? "weight_ess" : "ess", "ESS of weights", "var(--blue)"),
    { name: "λ", kind: "step", y: c.mean("threshold"), color: "var(--violet)", dash: "5 3" },
  ], `ESS ${figure(newest(c.mean("weight_ess")))}, lambda ${figure(newest(c.mean("threshold")))}`) },
  { title: "Tokens a second", y: [0, 1], data: (c) => base(c, [
    { name: "generated", y: c.rate("tokens_generated"), color: "var(--blue)" },
    { name: "accepted", y: c.rate("tokens_accepted"), color: "var(--green)", dash: "6 3" },
    { name: "through the learner", y: c.rate("through_learner"), color: "var(--orange)", dash: "2 3" },
  ], `Generated ${figure(newest(c.rate("tokens_generated")))}`) },
  { title: "Learner's time", percent: true, data: (c) => areas(c, "learner") },
  { title: "Actors' time", percent: true, data: (c) => areas(c, "actor"), optional: "actor" },
  { title: "Replica's time", percent: true, data: (c) => areas(c, "replica"), optional: "replica" },
  { title: "Broker's time", percent: true, data: (c) => areas(c, "broker"), optional: "broker" },
  { title: "Groups waiting", y: [0, 1], whole: true, data: (c) => base(c, [
    { name: "queued", y: c.mean("queue_groups"), color: "var(--blue)" }, { name: "in flight", y: c.mean("in_flight_groups"), color: "var(--orange)", dash: "6 3" },
  ], `Queued ${figure(newest(c.mean("queue_groups")))}`) },
  { title: "Entropy, nats a token", y: [0, 0.1], data: (c) => base(c, noisy(c, "entropy", "policy", "var(--violet)"), `Newest ${figure(newest(c.mean("entropy")))}`), needs: "entropy" },
];
