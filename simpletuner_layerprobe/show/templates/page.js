"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const T = data.edges.length - 1, L = data.blocks.length;
const tip = document.getElementById("tip");
const MAPS = {
viridis: ["440154","482878","3e4a89","31688e","26828e","1f9e89","35b779","6ece58","b5de2b","fde725"],
change: ["053061","2166ac","4393c3","92c5de","d1e5f0","fddbc7","f4a582","d6604d","b2182b","67001f"]};
const stops = Object.fromEntries(Object.entries(MAPS).map(([name, list]) => [name, list.map(hex => [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16)))]));
const colour = (name, share) => {
const at = Math.min(1, Math.max(0, share)) * 9, low = Math.min(8, Math.floor(at)), part = at - low;
return "rgb(" + stops[name][low].map((v, i) => Math.round(v + (stops[name][low + 1][i] - v) * part)).join() + ")";};
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, attributes = {}, text = "") => {const e = document.createElement(tag); for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); e.textContent = text; return e;};
const short = v => v === 0 ? "0" : Math.abs(v) < 1e-3 ? v.toExponential(2) : v.toPrecision(3);
const starts = [];
data.blocks.forEach((b, i) => {const list = b.replace(/\.?[^.]*$/, ""); if (!starts.length || starts[starts.length - 1][1] !== list) starts.push([i, list]);});
function hideTip() {tip.hidden = true;}
function showTip(title, lines, x, y) {
tip.replaceChildren(make("b", {}, title), ...lines.flatMap((l, i) => i ? [make("br"), l] : [l]));
tip.hidden = false;
const w = tip.offsetWidth, h = tip.offsetHeight;
tip.style.left = Math.max(8, Math.min(innerWidth - w - 8, x + 14)) + "px";
tip.style.top = (y + h + 26 > innerHeight ? Math.max(8, y - h - 14) : y + 16) + "px";}
function sized(canvas, width, height) {
const ratio = Math.min(devicePixelRatio || 1, 16000 / width);
canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
canvas.style.width = width + "px"; canvas.style.height = height + "px";
const g = canvas.getContext("2d"); g.setTransform(ratio, 0, 0, ratio, 0, 0); return g;}
function axis(g, width, top) {
g.fillStyle = css("--soft"); g.font = "11px system-ui,'DejaVu Sans',sans-serif"; g.textAlign = "center"; g.textBaseline = "top";
const cell = width / L, every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find(s => s * cell >= 24) || 1000;
for (let i = 0; i < L; i += every) g.fillText(i, Math.max(4, (i + .5) * cell), top + 5);
starts.forEach(([first, name], k) => {
const last = k + 1 < starts.length ? starts[k + 1][0] : L;
if (k) {g.fillStyle = css("--ink"); g.fillRect(first * cell - .5, 0, 1, top + 4); g.fillStyle = css("--soft");}
const room = (last - first) * cell - 6;
if (g.measureText(name).width <= room) g.fillText(name, (first + last) / 2 * cell, top + 21);
});}
const changeLines = (map, k, t) => {
const pair = `A ${short(map.a[t][k])}, B ${short(map.b[t][k])}`, samples = `${map.counts[0][t].toLocaleString("en")} and ${map.counts[1][t].toLocaleString("en")} samples`;
if (!map.count[t]) return ["not enough samples", samples];
const p = map.p[t][k];
return [`change ${short(map.mean[t][k])}, ${map.sure[t][k] ? "beyond chance" : "not beyond chance"}`, `95% interval ${short(map.low[t][k])} to ${short(map.high[t][k])}`, p < 1e-6 ? "p < 1e-6" : `p = ${p.toPrecision(2)}`, pair, samples];};
const views = [];
function build(map) {
const figure = make("figure", {id: "map-" + map.id}), caption = make("figcaption");
const scale = make("div", {class: "scale"}), low = make("span"), bar = make("canvas", {"aria-hidden": "true"}), high = make("span");
scale.append(low, bar, high);
caption.append(make("strong", {}, map.title[0].toUpperCase() + map.title.slice(1)), scale);
const plot = make("div", {class: "plot"}), y = make("div", {class: "y", "aria-hidden": "true"}), wide = make("div", {class: "wide"});
const canvas = make("canvas", {tabindex: "0", role: "application", "aria-roledescription": "heatmap", "aria-label": `Heatmap of the ${map.title}: ${map.own.length} blocks by ${T} parts of sigma. Arrow keys move from cell to cell.`, "aria-describedby": "said-" + map.id});
const said = make("p", {class: "said", id: "said-" + map.id, "aria-live": "polite"});
wide.append(canvas); plot.append(y, wide); figure.append(caption, plot, said);
document.getElementById(map.at || "maps").append(figure);
const column = new Map(map.own.map((block, i) => [block, i]));
const filled = [];
map.mean.forEach((row, t) => {if (map.count[t]) filled.push(...(map.change ? row.map(Math.abs) : row));});
filled.sort((a, b) => a - b);
const at = (filled.length - 1) * .9, lo = Math.floor(at);
const limit = filled.length ? filled[lo] + ((filled[lo + 1] ?? filled[lo]) - filled[lo]) * (at - lo) : 1;
const view = {map, figure, canvas, wide, cursor: null, marks: null};
let width = 0, height = 0;
view.draw = () => {
const clipped = document.querySelector("input[name=scale]:checked").value === "clipped", colours = map.change ? "change" : "viridis";
let least = filled[0] ?? 0, most = filled[filled.length - 1] ?? 1;
if (clipped) most = limit || most;
if (map.change) least = -most;
const share = v => (v - least) / (most - least || 1);
low.textContent = (clipped && map.change ? "≤ " : "") + short(least); high.textContent = (clipped ? "≥ " : "") + short(most);
const b = sized(bar, 120, 10);
for (let i = 0; i < 120; i++) {b.fillStyle = colour(colours, i / 119); b.fillRect(i, 0, 1.5, 10);}
width = Math.max(wide.clientWidth, Math.min(L * 4, 12000)); height = Math.max(150, Math.min(260, 22 * T));
const foot = starts.length > 1 || starts[0][1] ? 38 : 22, g = sized(canvas, width, height + foot);
g.clearRect(0, 0, width, height + foot);
const w = width / L, h = height / T;
for (let t = 0; t < T; t++) for (let i = 0; i < L; i++) {
const k = column.get(i), top = height - (t + 1) * h;
if (k === undefined) {g.fillStyle = css("--stroke"); g.fillRect((i + .5) * w - 1, top + h / 2 - 1, 2, 2); continue;}
if (map.count[t]) g.fillStyle = colour(colours, share(map.mean[t][k])); else g.fillStyle = css("--empty");
g.fillRect(i * w, top, w + .4, h + .4);
if (map.change && map.count[t] && map.sure[t][k]) {const d = Math.max(2, Math.min(6, w / 3, h / 3)); g.fillStyle = Math.abs(share(map.mean[t][k]) - .5) > .3 ? "#fff" : "#000"; g.fillRect((i + .5) * w - d / 2, top + h / 2 - d / 2, d, d);}
if (!map.count[t]) {g.strokeStyle = css("--stroke"); g.lineWidth = 1; g.beginPath(); g.moveTo(i * w, top + h); g.lineTo((i + 1) * w, top); g.stroke();}}
g.clearRect(0, height, width, foot);
axis(g, width, height);
const box = (first, last, from, to, ring) => {
const x = first * w, top = height - (to + 1) * h, bw = (last - first + 1) * w, bh = (to - from + 1) * h;
g.lineWidth = 4; g.strokeStyle = "#000"; g.strokeRect(x + 1.5, top + 1.5, Math.max(1, bw - 3), Math.max(1, bh - 3));
g.lineWidth = 2; g.strokeStyle = ring; g.strokeRect(x + 1.5, top + 1.5, Math.max(1, bw - 3), Math.max(1, bh - 3));};
if (view.marks) box(...view.marks, "#ff6a3d");
if (view.cursor) box(view.cursor[0], view.cursor[0], view.cursor[1], view.cursor[1], "#fff");
const labels = [0, .2, .4, .6, .8, 1];
y.replaceChildren(...labels.map(v => {const s = make("span", {}, v ? String(v) : "0"); s.style.top = Math.min(height - 5, Math.max(6, height * (1 - v))) + "px"; return s;}));
const name = make("em", {}, "sigma"); name.style.top = height / 2 + 18 + "px"; name.style.left = "-4px"; y.append(name);};
const lines = (i, t) => {
const k = column.get(i), range = `sigma ${short(data.edges[t])} to ${short(data.edges[t + 1])}`;
if (k === undefined) return [range, `not in the ${map.title}`];
if (map.change) return [range, ...changeLines(map, k, t)];
if (!map.count[t]) return [range, "no samples"];
const mean = map.mean[t][k], error = map.error[t][k];
const interval = error === null ? "no interval" : `95% interval ${short(map.loss ? mean - 1.96 * error : Math.max(0, mean - 1.96 * error))} to ${short(mean + 1.96 * error)}`;
return [range, `${map.loss ? "loss increase" : "mean"} ${short(mean)}`, interval, `${map.count[t].toLocaleString("en")} sample${map.count[t] === 1 ? "" : "s"}`];};
view.show = (i, t, x, y2) => {
const text = lines(i, t), title = `${i}: ${data.blocks[i]}`;
said.textContent = [title, ...text].join(", ");
showTip(title, text, x, y2);};
const cellAt = event => {
const r = canvas.getBoundingClientRect(), x = event.clientX - r.left, yy = event.clientY - r.top;
if (x < 0 || x >= width || yy < 0 || yy >= height) return null;
return [Math.min(L - 1, Math.floor(x / width * L)), Math.min(T - 1, Math.floor((height - yy) / height * T))];};
canvas.addEventListener("pointermove", event => {
const cell = cellAt(event);
if (!cell) {hideTip(); if (view.cursor) {view.cursor = null; view.draw();} return;}
if (!view.cursor || view.cursor[0] !== cell[0] || view.cursor[1] !== cell[1]) {view.cursor = cell; view.draw();}
view.show(...cell, event.clientX, event.clientY);});
canvas.addEventListener("pointerdown", event => {const cell = cellAt(event); if (cell) {view.cursor = cell; view.draw(); view.show(...cell, event.clientX, event.clientY);}});
const leave = () => {hideTip(); view.cursor = null; view.draw();};
canvas.addEventListener("pointerleave", leave); canvas.addEventListener("blur", leave);
view.go = cell => {
view.cursor = cell; view.draw();
const w = width / L, x = (cell[0] + .5) * w;
if (x < wide.scrollLeft + 20 || x > wide.scrollLeft + wide.clientWidth - 20) wide.scrollLeft = x - wide.clientWidth / 2;
const r = canvas.getBoundingClientRect();
view.show(...cell, r.left + x, r.top + height - (cell[1] + .5) * height / T);};
canvas.addEventListener("keydown", event => {
const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]}[event.key];
const ends = {Home: 0, End: L - 1};
if (event.key === "Escape") {view.marks = null; leave(); return;}
if (!step && !(event.key in ends)) return;
event.preventDefault();
const from = view.cursor || [view.marks ? view.marks[0] : 0, view.marks ? view.marks[2] : 0];
const moved = !view.cursor ? from : step ? [Math.min(L - 1, Math.max(0, from[0] + step[0])), Math.min(T - 1, Math.max(0, from[1] + step[1]))] : [ends[event.key], from[1]];
view.go(moved);});
views.push(view);}
data.maps.forEach(build);
const drawAll = () => views.forEach(view => view.draw());
drawAll();
let seen = innerWidth, waiting = 0;
addEventListener("resize", () => {if (innerWidth === seen) return; seen = innerWidth; cancelAnimationFrame(waiting); waiting = requestAnimationFrame(drawAll);});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("beforeprint", () => {document.querySelectorAll("details").forEach(d => d.open = true); drawAll();});
addEventListener("afterprint", drawAll);
addEventListener("scroll", hideTip, {passive: true});
document.querySelectorAll("input[type=radio]").forEach(input => input.addEventListener("change", drawAll));
document.querySelectorAll("a[data-map]").forEach(link => link.addEventListener("click", event => {
const view = views.find(v => v.map.id === link.dataset.map); if (!view) return;
event.preventDefault();
const d = link.dataset, from = data.edges.findIndex((e, i) => i === T - 1 || data.edges[i + 1] > +d.low + 1e-9);
let to = T - 1; while (to > from && data.edges[to] >= +d.high - 1e-9) to--;
const own = document.querySelector(`input[name=reading][value="${data.reading}"]`); if (own) own.checked = true;
views.forEach(v => {v.marks = null;});
view.marks = [+d.first, +d.last, from, to];
drawAll();
const x = (+d.first + .5) * view.canvas.clientWidth / L;
view.wide.scrollLeft = x - view.wide.clientWidth / 2;
view.figure.scrollIntoView({block: "center"}); view.canvas.focus({preventScroll: true});}));
if (navigator.clipboard) document.querySelectorAll("button.copy").forEach(copy => {
copy.hidden = false;
copy.addEventListener("click", async () => {try {await navigator.clipboard.writeText(copy.previousElementSibling.textContent); copy.textContent = "Copied";} catch {copy.textContent = "Select the text to copy it";}});});
})();
