// The live page: asks /live once a second for the seconds it has not seen, draws them, and tries queries.
// Built from elements and properties only: the Content-Security-Policy allows no inline script or style.

const SPAN_S = 300;
const POLL_MS = 1000;
const GIVE_UP_MS = 5000;
const COLUMNS = ["arrivals", "in_time", "attainment", "accuracy", "waiting", "batch_size", "p50_ms", "p99_ms"];

const CHARTS = [
  { title: "Queries", series: [
    { column: "arrivals", label: "arrived", unit: "/s", quiet: true },
    { column: "in_time", label: "in time", unit: "/s" }] },
  { title: "SLO attainment", range: attainmentRange, series: [
    { column: "attainment", label: "in time, of all that ended", unit: "%", scale: 100 }] },
  { title: "Mean serving accuracy", range: accuracyRange, series: [
    { column: "accuracy", label: "profiled, of answers in time", unit: "%", scale: 100 }] },
  { title: "Latency (logarithmic)", range: decades, logarithmic: true, series: [
    { column: "p50_ms", label: "p50", unit: "ms" },
    { column: "p99_ms", label: "p99", unit: "ms", quiet: true }] },
  { title: "Queue depth", series: [{ column: "waiting", label: "waiting, largest in a second", unit: "", whole: true }] },
  { title: "Batch size", series: [{ column: "batch_size", label: "mean", unit: "" }] },
];

const byId = (id) => document.getElementById(id);
const state = { run: null, now: 0, seconds: new Map(), recent: null, choices: [], profile: null, failures: 0 };

// ------------------------------------------------------------------------------------------------------------ numbers

// Three significant digits, trailing zeros kept so that numbers do not jump; a dash for nothing.
function text(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return (value >= 99.95 && value < 100 ? Math.floor(value * 100) / 100 : value).toFixed(value > 99 && value < 100 ? 2 : 1);
  if (value >= 100 || value === 0) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

const reading = (value, series) => (series.whole && Number.isInteger(value) ? `${value}` : text(value, series.unit));

const scaled = (value, scale) => (value === null || value === undefined ? null : value * (scale ?? 1));

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------------------------------------- polling

// Where the server asks for a key, the address has it after #key=, which browsers do not send. It is kept for this tab and
// taken out of the address, so that it is in no bookmark or picture.
const key = new URLSearchParams(location.hash.slice(1)).get("key") ?? sessionStorage.getItem("key");
if (key) {
  sessionStorage.setItem("key", key);
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
}
addEventListener("hashchange", () => location.reload());
const withKey = (headers = {}) => (key ? { ...headers, "X-API-Key": key } : headers);

async function get(path) {
  const response = await fetch(path, { cache: "no-store", headers: withKey(), signal: AbortSignal.timeout(GIVE_UP_MS) });
  state.locked = response.status === 401;
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

async function poll() {
  try {
    const known = state.run === null ? -1 : state.now - 1;
    const live = await get(`live?since=${known}`);
    if (state.run !== null && live.run !== state.run) {
      Object.assign(state, { run: null, profile: null, seconds: new Map() }); // the server was started anew
      return poll();
    }
    take(live);
    if (state.profile === null && live.status === "ready") await takeProfile();
    state.failures = 0;
  } catch {
    state.failures += 1;
  }
  show();
}

function take(live) {
  Object.assign(state, { run: live.run, now: live.now, recent: live.recent, choices: live.choices, status: live.status, about: live.about });
  live.seconds.second.forEach((second, index) => {
    state.seconds.set(second, Object.fromEntries(COLUMNS.map((column) => [column, live.seconds[column][index]])));
  });
  for (const second of state.seconds.keys()) if (second < live.now - SPAN_S) state.seconds.delete(second);
}

async function takeProfile() {
  const api = await get("openapi.json");
  showKind(api.paths["/predict"].post.requestBody.content);
  state.profile = await get("profile");
  byId("floor").max = state.profile.entries.length;
  const sizes = state.profile.batch_sizes;
  setText(byId("sizes"), `batch sizes ${sizes[0]} to ${sizes.at(-1)}`);
  showSliders();
}

// A hidden page asks for nothing; when it is seen again, it catches up with one request.
async function run() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, POLL_MS);
      document.addEventListener("visibilitychange", () => { clearTimeout(timer); resolve(); }, { once: true });
    });
  }
}

// -------------------------------------------------------------------------------------------------------------- status

function show() {
  const gone = state.failures > 0;
  const condition = gone ? "unreachable" : state.status === "ready" ? "ready" : "waiting";
  setText(byId("status"), gone && state.locked ? "needs a key" : gone ? "server not reachable" : state.status ?? "connecting");
  byId("status").dataset.state = condition;
  document.body.toggleAttribute("data-stale", gone);
  if (state.about) {
    const { profile, policy, device, version } = state.about;
    setText(byId("about"), `${profile} · ${policy} · ${device} · version ${version}`);
  }
  showNotice(gone);
  showCharts();
  showFrontier();
}

// Live regions are read out on each change, so that what stays the same is not set again.
function setText(target, content) {
  if (target.textContent !== content) target.textContent = content;
}

function showNotice(gone) {
  const notice = byId("notice");
  const traffic = [...state.seconds.values()].some((second) => second.arrivals > 0);
  const sent = { image: "--data-binary @photo.jpg", text: "-H 'Content-Type: text/plain' -d 'a text'" }[kind];
  const curl = `curl ${sent ?? `-H 'Content-Type: application/json' -d '{"inputs": [2, 3]}'`} '${new URL("predict?slo_ms=50", location.href)}'`;
  const content =
    gone && state.locked ? "This server asks for an API key that it knows: open this page with #key= and the key behind its address."
    : gone ? "The server cannot be reached. Trying again every second; the numbers below are the last ones known."
    : state.status === "draining" ? "The server is draining: it finishes what is queued and accepts nothing more."
    : state.status !== "ready" ? `Not ready: ${state.status}. A first start on a new device measures its latencies, which takes a minute or so.`
    : traffic || state.recent?.arrivals ? "" : `No traffic yet. Try ${KINDS[kind].one} below, or: `;
  notice.hidden = content === "";
  if (notice.dataset.content === content) return;
  notice.dataset.content = content;
  notice.replaceChildren(content, ...(content.endsWith("or: ") ? [element("code", { textContent: curl })] : []));
}

// -------------------------------------------------------------------------------------------------------------- charts

function attainmentRange(low) {
  const bottom = Math.max(0, Math.floor(((low ?? 100) - 1) / 5) * 5);
  return [bottom, 100 + (100 - bottom) * 0.04];
}

function accuracyRange(low, high) {
  const entries = state.profile?.entries;
  const [least, most] = entries ? [entries[0].accuracy * 100, entries.at(-1).accuracy * 100] : [low ?? 0, high ?? 100];
  const room = Math.max(0.2, (most - least) * 0.1);
  return [Math.max(0, least - room), Math.min(100 + room, most + room)];
}

function decades(low, high) {
  return [10 ** Math.floor(Math.log10(low || 1)), 10 ** Math.ceil(Math.log10((high || 100) * 1.01))];
}

// Powers of ten, or where there is only one decade, also what lies in between.
function decadeSplits(_, axis, low, high) {
  const powers = [];
  for (let power = low; power <= high * 1.001; power *= 10) powers.push(power);
  return powers.length > 2 ? powers : powers.flatMap((power) => [power, 2 * power, 5 * power]).filter((at) => at <= high);
}

const fromZero = (low, high) => [0, Math.max(1, (high ?? 0) * 1.12)];

function buildChart(chart) {
  chart.readings = chart.series.map((series) => {
    const number = element("span", { textContent: "–" });
    const term = element("dt", { textContent: series.label, className: series.quiet ? "quiet" : "" });
    const row = element("div", {}, term, element("dd", {}, number, element("span", { className: "unit", textContent: series.unit })));
    return { series, number, row };
  });
  chart.holder = element("div", { className: "plot" });
  chart.holder.setAttribute("aria-hidden", "true");
  const readings = element("dl", { className: "readings" }, ...chart.readings.map((reading) => reading.row));
  byId("charts").append(element("figure", { className: "chart" }, element("h3", { textContent: chart.title }), readings, chart.holder));
  new ResizeObserver(() => chart.plot?.setSize(sizeOf(chart.holder))).observe(chart.holder);
}

const sizeOf = (holder) => ({ width: holder.clientWidth, height: holder.clientHeight });

// Points without neighbours would be invisible as a line.
function lonely(plot, index) {
  const values = plot.data[index];
  return values.flatMap((value, at) => (value !== null && (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null ? [at] : []));
}

function plotOptions(chart) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const axis = { stroke: colour("muted"), font: "11px system-ui, sans-serif", grid: { stroke: colour("line"), width: 1 }, ticks: { show: false } };
  const range = chart.range ?? fromZero;
  return {
    ...sizeOf(chart.holder),
    legend: { show: false },
    cursor: { sync: { key: "minutes" }, drag: { x: false, y: false }, y: false, points: { size: 6 } },
    padding: [6, 12, 0, 0],
    scales: { x: { time: false, range: [-SPAN_S, 0] }, y: { distr: chart.logarithmic ? 3 : 1, range: (_, low, high) => range(low, high) } },
    axes: [
      { ...axis, size: 22, gap: 4, splits: [-300, -240, -180, -120, -60, 0], values: (_, splits) => splits.map((at) => (at === null ? "" : at ? `−${-at / 60} min` : "now")),
        filter: (plot, splits) => splits.map((at) => (plot.width > 420 || at % 120 === 0 ? at : null)) },
      { ...axis, size: 42, gap: 4, space: 26, ...(chart.logarithmic ? { splits: decadeSplits, filter: (_, splits) => splits } : {}) },
    ],
    series: [{}, ...chart.series.map((series) => ({
      stroke: colour(series.quiet ? "muted" : "accent"), width: 1.5, fill: series.column === "in_time" ? colour("accent-soft") : undefined,
      points: { show: true, size: 4, filter: lonely, fill: colour(series.quiet ? "muted" : "accent") },
    }))],
    hooks: { setCursor: [(plot) => { if (plot.cursor.event) hover(plot.cursor.idx); }] },
  };
}

let hovered = null; // the second under the pointer, if any

function hover(index) {
  const second = index === null || index === undefined ? null : chartSeconds[index];
  if (second === hovered) return;
  hovered = second;
  showReadings();
}

let chartSeconds = [];

function showCharts() {
  chartSeconds = [...state.seconds.keys()].sort((a, b) => a - b);
  const ago = chartSeconds.map((second) => second - state.now + 1);
  for (const chart of CHARTS) {
    const data = [ago, ...chart.series.map((series) => chartSeconds.map((second) => scaled(state.seconds.get(second)[series.column], series.scale)))];
    if (chart.plot) chart.plot.setData(data);
    else chart.plot = new uPlot(plotOptions(chart), data, chart.holder);
  }
  showReadings();
}

function showReadings() {
  const second = hovered === null ? null : state.seconds.get(hovered);
  const figures = second ?? state.recent ?? {};
  for (const chart of CHARTS) {
    for (const { series, number } of chart.readings) setText(number, reading(scaled(figures[series.column], series.scale), series));
  }
  setText(byId("figures-when"), second ? `${state.now - hovered} seconds ago` : "the last 10 seconds");
}

function rebuild() {
  for (const chart of CHARTS) {
    chart.plot?.destroy();
    chart.plot = null;
  }
  if (state.run !== null) showCharts();
}

// ------------------------------------------------------------------------------------------------------------ frontier

const TICKS_MS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];

// Planned latency of a subnet at any batch size, between the profiled ones on a straight line.
function latencyOf(entry, size) {
  const sizes = state.profile.batch_sizes;
  const above = sizes.findIndex((each) => each >= size);
  if (above < 0) return entry.latency_ms.at(-1);
  if (sizes[above] === size || above === 0) return entry.latency_ms[above];
  const share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1]);
  return entry.latency_ms[above - 1] + share * (entry.latency_ms[above] - entry.latency_ms[above - 1]);
}

function showFrontier() {
  const holder = byId("frontier");
  const { width, height } = sizeOf(holder);
  if (width === 0) return;
  if (state.profile === null) {
    const empty = svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "empty" }, "No profile table yet");
    holder.replaceChildren(svg("svg", { width, height, role: "img", "aria-label": "No profile table yet" }, empty));
    return;
  }
  const place = frontierPlaces(width, height);
  const drawing = svg("svg", { width, height, role: "img", "aria-label": "Accuracy of each subnet by its latency" });
  drawing.append(...frontierAxes(place), ...frontierAsked(place), ...frontierSubnets(place), ...frontierLit(place));
  holder.replaceChildren(drawing);
}

function frontierPlaces(width, height) {
  const { entries } = state.profile;
  const area = { left: 48, right: width - 16, top: 16, bottom: height - 40 };
  const latencies = entries.flatMap((entry) => entry.latency_ms);
  const [fastest, slowest] = [Math.log(Math.min(...latencies) * 0.8), Math.log(Math.max(...latencies) * 1.25)];
  const [least, most] = [entries[0].accuracy, entries.at(-1).accuracy];
  const room = Math.max(0.002, (most - least) * 0.08);
  return {
    ...area,
    within: (ms) => Math.log(ms) >= fastest && Math.log(ms) <= slowest,
    range: [least - room, most + room],
    x: (ms) => area.left + ((Math.log(ms) - fastest) / (slowest - fastest)) * (area.right - area.left),
    y: (accuracy) => area.bottom - ((accuracy - least + room) / (most - least + 2 * room)) * (area.bottom - area.top),
  };
}

function frontierAxes(place) {
  const drawn = [];
  for (const ms of TICKS_MS.filter(place.within)) {
    drawn.push(svg("line", { class: "axis", x1: place.x(ms), x2: place.x(ms), y1: place.top, y2: place.bottom }));
    drawn.push(svg("text", { x: place.x(ms), y: place.bottom + 15, "text-anchor": "middle" }, `${ms}`));
  }
  const [low, high] = place.range;
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1].find((each) => (high - low) / each <= 6) ?? 0.2;
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) {
    drawn.push(svg("line", { class: "axis", x1: place.left, x2: place.right, y1: place.y(at), y2: place.y(at) }));
    drawn.push(svg("text", { x: place.left - 6, y: place.y(at) + 4, "text-anchor": "end" }, `${(at * 100).toFixed(step < 0.01 ? 1 : 0)} %`));
  }
  drawn.push(svg("text", { x: place.right, y: place.bottom + 32, "text-anchor": "end" }, "planned latency of a batch, ms (logarithmic)"));
  return drawn;
}

// What the sliders of the try-it box ask for.
function frontierAsked(place) {
  const drawn = [];
  const slo = sloMs();
  if (place.within(slo)) {
    drawn.push(svg("line", { class: "asked", x1: place.x(slo), x2: place.x(slo), y1: place.top, y2: place.bottom }));
    drawn.push(svg("text", { x: place.x(slo) - 5, y: place.top + 8, "text-anchor": "end" }, `SLO ${slo} ms`));
  }
  const floor = floorAccuracy();
  if (floor > 0) drawn.push(svg("line", { class: "asked", x1: place.left, x2: place.right, y1: place.y(floor), y2: place.y(floor) }));
  return drawn;
}

function frontierSubnets(place) {
  return state.profile.entries.flatMap((entry) => {
    const y = place.y(entry.accuracy);
    const xs = entry.latency_ms.map(place.x);
    const line = svg("line", { class: "subnet", x1: xs[0], x2: xs.at(-1), y1: y, y2: y });
    return [line, ...xs.map((x) => svg("circle", { class: "choice", cx: x, cy: y, r: 1.8 }))];
  });
}

function frontierLit(place) {
  const total = state.choices.reduce((sum, choice) => sum + choice.batches, 0);
  const known = new Map(state.profile.entries.map((entry) => [entry.name, entry]));
  const lit = state.choices.filter((choice) => known.has(choice.subnet)).sort((a, b) => b.batches - a.batches);
  const share = (choice) => `${Math.round((choice.batches / total) * 100)} %`;
  const told = lit.slice(0, 3).map((choice) => `${choice.subnet} × ${choice.batch_size} (${share(choice)})`);
  setText(byId("choices"), total ? `Subnet × batch size, share of batches: ${told.join(", ")}` : "No batches in the last 5 seconds.");
  return lit.map((choice) => {
    const entry = known.get(choice.subnet);
    const ms = latencyOf(entry, choice.batch_size);
    const label = `${choice.subnet}, batch of ${choice.batch_size}: ${share(choice)} of batches, ${text(ms)} ms planned, ${text(entry.accuracy * 100, "%")} %`;
    const radius = 4 + 7 * Math.sqrt(choice.batches / total);
    return svg("circle", { class: "lit", cx: place.x(ms), cy: place.y(entry.accuracy), r: radius }, svg("title", {}, label));
  });
}

// -------------------------------------------------------------------------------------------------------------- try it

const SLOS_MS = [5, 2000]; // the ends of the slider, which is logarithmic
let image = null;

function sloMs() {
  const ms = SLOS_MS[0] * (SLOS_MS[1] / SLOS_MS[0]) ** (byId("slo").valueAsNumber / 100);
  return Number(ms.toPrecision(2));
}

// The floors on offer are the accuracies of the subnets, so that each is one that can be reached.
function floorAccuracy() {
  const step = byId("floor").valueAsNumber;
  return step === 0 || state.profile === null ? 0 : state.profile.entries[step - 1].accuracy;
}

function showSliders() {
  const floor = floorAccuracy();
  const told = { slo: `${sloMs()} ms`, floor: floor ? `${(floor * 100).toFixed(2)} %` : "none" };
  for (const [id, content] of Object.entries(told)) {
    byId(`${id}-value`).textContent = content;
    byId(id).setAttribute("aria-valuetext", content);
  }
  showFrontier();
}

// What the server reads: images, texts, or, where it has no tokenizer, token ids.
const KINDS = {
  image: { one: "an image", name: "image" },
  text: { one: "a text", name: "text", hint: "Write a text to classify" },
  ids: { one: "token ids", name: "text as token ids", hint: "Token ids with commas between them, such as 101, 2204, 102" },
};
let kind = "image";

function showKind(content) {
  kind = "text/plain" in content ? "text" : Object.keys(content).some((type) => type.startsWith("image/")) ? "image" : "ids";
  setText(byId("kind"), KINDS[kind].name);
  for (const id of ["drop", "file"]) byId(id).hidden = kind !== "image";
  Object.assign(byId("text"), { hidden: kind === "image", placeholder: KINDS[kind].hint ?? "" });
  showReady();
}

function showReady() {
  byId("send").disabled = kind === "image" ? image === null : byId("text").value.trim() === "";
}

// The body of a query, and its type.
function query() {
  const written = byId("text").value;
  if (kind === "text") return [written, "text/plain"];
  if (kind === "ids") return [JSON.stringify({ inputs: written.split(",").map(Number) }), "application/json"];
  return [image, image.type || "application/octet-stream"];
}

function choose(file) {
  if (!file || kind !== "image") return;
  image = file;
  const preview = byId("preview");
  URL.revokeObjectURL(preview.src);
  Object.assign(preview, { src: URL.createObjectURL(file), alt: file.name || "the image", hidden: false });
  byId("drop-text").textContent = file.name || "pasted image";
  showReady();
}

async function classify(event) {
  event.preventDefault();
  const parameters = new URLSearchParams({ slo_ms: sloMs(), top_k: Math.min(3, await classCount()) });
  if (floorAccuracy()) parameters.set("min_accuracy", floorAccuracy());
  byId("send").disabled = true;
  const began = performance.now();
  try {
    const [body, type] = query();
    const headers = withKey({ "Content-Type": type });
    const response = await fetch(`predict?${parameters}`, { method: "POST", body, headers });
    const reply = await response.json();
    byId("answer").replaceChildren(...(response.ok ? answered(reply, performance.now() - began) : refused(reply, response.status)));
  } catch {
    byId("answer").replaceChildren(element("p", { textContent: "The server could not be reached." }));
  }
  byId("send").disabled = false;
}

let classes = null; // how many there are, once asked

async function classCount() {
  classes ??= get("openapi.json").then((api) => api.paths["/predict"].post.parameters.find((each) => each.name === "top_k").schema.maximum);
  return classes.catch(() => { classes = null; return 1; });
}

function answered(reply, roundTripMs) {
  const best = element("table", { className: "classes" }, ...reply.predictions.map(({ label, probability }) =>
    element("tr", {}, element("th", { scope: "row", textContent: label }),
      element("td", {}, element("meter", { min: 0, max: 1, value: probability })),
      element("td", { textContent: `${(probability * 100).toFixed(1)} %` }))));
  const facts = [
    ["Deadline", reply.deadline_met ? `met, SLO ${reply.slo_ms} ms` : `missed, SLO ${reply.slo_ms} ms`, "verdict"],
    ["Latency", `${text(reply.latency_ms)} ms, of which ${text(reply.queue_ms)} ms before the batch began`],
    ["Round trip", `${text(roundTripMs)} ms as this browser saw it`],
    ["Subnet", reply.subnet],
    ["Its accuracy", `${(reply.accuracy * 100).toFixed(2)} %`],
    ["Batch size", `${reply.batch_size}`],
  ];
  return [best, element("table", { className: "facts" }, ...facts.map(([name, content, className = ""]) =>
    element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: content, className }))))];
}

function refused(error, status) {
  const predicted = error.predicted_ms ? ` The answer would have come after ${text(error.predicted_ms)} ms.` : "";
  return [element("p", { className: "verdict", textContent: `No answer (${status}, ${error.reason})` }),
    element("p", { textContent: `${error.error}.${predicted}` })];
}

function listen() {
  const drop = byId("drop");
  byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
  byId("text").addEventListener("input", showReady);
  byId("try").addEventListener("submit", classify);
  for (const id of ["slo", "floor"]) byId(id).addEventListener("input", showSliders);
  for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    drop.addEventListener(name, (event) => { event.preventDefault(); drop.toggleAttribute("data-over", over); });
  }
  drop.addEventListener("drop", (event) => choose(event.dataTransfer.files[0]));
  document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
  byId("charts").addEventListener("pointerleave", () => hover(null));
  new ResizeObserver(showFrontier).observe(byId("frontier"));
}

CHARTS.forEach(buildChart);
listen();
showSliders();
run();
