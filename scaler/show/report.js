// Draws the report's curves from the JSON in the page: one small plot a metric, all with the same runs and the same
// stretch of the x axis. Hover reads values, dragging zooms, a double click shows everything again.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const view = {x: "step", range: null, smooth: 0, log: new Set(), hidden: new Set(), at: null};
  const margin = {left: 56, right: 20, top: 8, bottom: 22};
  const panels = [];
  const FEW = 40;  // points of a curve that are drawn as dots and never smoothed

  // ------------------------------------------------------------------ numbers

  function text(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e9) return +(value / 1e9).toPrecision(4) + " G";
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + " M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(4) + " k";
    if (size < 1e-3) return value.toExponential(2).replace("e", "e").replace(/\.?0+e/, "e");
    return String(+value.toPrecision(4));
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
    const found = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) {
      found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
    }
    return found;
  }

  function logTicks(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
    const factors = last - first <= 2 ? [1, 2, 5] : [1];
    for (let power = first; power <= last; power++) {
      for (const factor of factors) found.push(factor * 10 ** power);
    }
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    return inside.length >= 2 ? inside : ticks(low, high, 4).filter((value) => value > 0);
  }

  // Steps of a run as what the x axis counts: linear between the points of its table.
  function position(run, step) {
    if (view.x === "step") return step;
    const table = data.runs[run].axis, keys = table.step, values = table[view.x];
    if (!values) return NaN;
    let low = 0, high = keys.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (keys[middle] <= step) low = middle; else high = middle;
    }
    if (keys[high] === keys[low]) return values[low];
    return values[low] + (values[high] - values[low]) * (step - keys[low]) / (keys[high] - keys[low]);
  }

  // An exponential average that is right from its first value on (Adam's correction).
  function smoothed(values) {
    if (!view.smooth || values.length <= FEW) return values;
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = view.smooth * sum + (1 - view.smooth) * value;
      weight = view.smooth * weight + (1 - view.smooth);
      return sum / weight;
    });
  }

  const escaped = (word) => String(word).replace(/[&<>"]/g, (c) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
  const color = (run) => `var(--run${run % 8})`;
  const dash = (run) => (run >= 4 ? ' stroke-dasharray="6 3"' : "");

  // ------------------------------------------------------------------ drawing

  function prepare(panel) {
    panel.shown = panel.series
      .filter((series) => !view.hidden.has(series.run))
      .map((series) => ({
        run: series.run,
        x: series.step.map((step) => position(series.run, step)),
        y: series.value,
        smooth: smoothed(series.value),
        bad: series.bad.map((step) => position(series.run, step)),
      }))
      .filter((series) => series.x.some((x) => !Number.isNaN(x)));
  }

  function extent(panel) {
    if (view.range) return view.range;
    let low = Infinity, high = -Infinity;
    for (const other of panels) {
      for (const series of other.shown || []) {
        for (const x of [...series.x, ...series.bad]) { if (x < low) low = x; if (x > high) high = x; }
      }
    }
    for (const strip of panel.strips || []) {
      for (const [from, to] of strip.spans) {
        low = Math.min(low, position(strip.run, from)); high = Math.max(high, position(strip.run, to));
      }
    }
    if (!(low < high)) { high = low + 1; low -= 1; }
    return [low, high];
  }

  function draw(panel, range) {
    const plot = panel.plot, width = plot.clientWidth, height = plot.clientHeight;
    if (!width) return;
    const [x0, x1] = range, logarithmic = view.log.has(panel.name);
    let low = Infinity, high = -Infinity;
    for (const series of panel.shown) {
      series.x.forEach((x, i) => {
        const y = series.y[i];
        if (y === null || x < x0 || x > x1 || (logarithmic && y <= 0)) return;
        if (y < low) low = y;
        if (y > high) high = y;
      });
    }
    if (low > high) {
      const why = logarithmic ? "nothing above 0 here" : "nothing in this stretch";
      plot.innerHTML = `<svg><text class="message" x="${width / 2}" y="${height / 2}" text-anchor="middle">${why}</text></svg>`;
      panel.frame = null;
      return;
    }
    if (low === high) { const room = Math.abs(low) / 10 || 1; low -= logarithmic ? low / 10 : room; high += room; }
    const up = logarithmic ? Math.log : (value) => value;
    const pad = (up(high) - up(low)) * 0.05, bottom = up(low) - pad, top = up(high) + pad;
    const inner = {w: width - margin.left - margin.right, h: height - margin.top - margin.bottom};
    const px = (x) => margin.left + (x - x0) / (x1 - x0) * inner.w;
    const clipped = (x) => px(x) - margin.left + 4;  // inside of a frame that leaves dots at its ends whole
    const py = (y) => margin.top + (top - up(y)) / (top - bottom) * inner.h;
    const out = [];
    for (const y of logarithmic ? logTicks(Math.exp(bottom), Math.exp(top)) : ticks(bottom, top, 4)) {
      const at = py(y).toFixed(1);
      out.push(`<line class="grid" x1="${margin.left}" x2="${width - margin.right}" y1="${at}" y2="${at}"/>`);
      out.push(`<text x="${margin.left - 6}" y="${at}" dy="4" text-anchor="end">${text(y)}</text>`);
    }
    out.push(xAxis(x0, x1, px, width, height));
    out.push(`<svg x="${margin.left - 4}" y="0" width="${inner.w + 8}" height="${height - margin.bottom}" style="overflow:hidden">`);
    for (const series of panel.shown) {
      const line = (values) => {
        let path = "", pen = "M";
        series.x.forEach((x, i) => {
          const y = values[i];
          if (y === null || (logarithmic && y <= 0)) { pen = "M"; return; }
          path += `${pen}${clipped(x).toFixed(1)} ${py(y).toFixed(1)}`;
          pen = "L";
        });
        return path;
      };
      const style = `fill="none" stroke="${color(series.run)}" stroke-linejoin="round"`;
      if (view.smooth) out.push(`<path ${style} stroke-width="1" opacity=".25" d="${line(series.y)}"/>`);
      out.push(`<path ${style} stroke-width="1.6"${dash(series.run)} d="${line(series.smooth)}"/>`);
      const dots = series.x.length <= FEW;
      series.x.forEach((x, i) => {
        const y = series.smooth[i];
        if (!dots || y === null || (logarithmic && y <= 0)) return;
        out.push(`<circle cx="${clipped(x).toFixed(1)}" cy="${py(y).toFixed(1)}" r="2.2" fill="${color(series.run)}"/>`);
      });
      for (const x of series.bad) {
        const at = clipped(x);
        out.push(`<path d="M${at - 3} 3l6 6m0-6l-6 6" stroke="var(--bad)" stroke-width="1.6"><title>not finite</title></path>`);
      }
    }
    out.push("</svg>", '<g class="over"></g>');
    plot.innerHTML = `<svg>${out.join("")}</svg>`;
    panel.frame = {px, py, x0, x1, height, left: margin.left, width: inner.w, logarithmic};
  }

  function xAxis(x0, x1, px, width, height) {
    const y = height - margin.bottom, out = [];
    out.push(`<line class="axis" x1="${margin.left}" x2="${width - margin.right}" y1="${y}" y2="${y}"/>`);
    for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 90)))) {
      out.push(`<line class="axis" x1="${px(x)}" x2="${px(x)}" y1="${y}" y2="${y + 4}"/>`);
      out.push(`<text x="${px(x)}" y="${y + 16}" text-anchor="middle">${text(x)}</text>`);
    }
    return out.join("");
  }

  // Alarms: a row for each sign and run, a bar where it was on.
  function drawStrips(panel, range) {
    const plot = panel.plot, strips = panel.strips.filter((strip) => !view.hidden.has(strip.run));
    const left = 240, row = 22, width = plot.clientWidth;
    if (!width) return;
    const height = Math.max(1, strips.length) * row + margin.bottom + 6;
    plot.style.height = `${height}px`;
    const px = (x) => left + (x - range[0]) / (range[1] - range[0]) * (width - left - margin.right);
    const out = [`<svg x="${left}" y="0" width="${width - left}" height="${height}" style="overflow:hidden">`];
    strips.forEach((strip, i) => {
      for (const [from, to] of strip.spans) {
        const a = px(position(strip.run, from)) - left, b = px(position(strip.run, to)) - left;
        out.push(`<rect x="${a - 1}" y="${i * row + 5}" width="${Math.max(3, b - a + 2)}" height="12" rx="2" fill="${color(strip.run)}"><title>${escaped(strip.name)}, steps ${from} to ${to}</title></rect>`);
      }
    });
    out.push("</svg>");
    strips.forEach((strip, i) => {
      const words = `${strip.name} · ${data.runs[strip.run].name}`;
      out.push(`<text x="${left - 8}" y="${i * row + 15}" text-anchor="end">${escaped(words.length > 36 ? "…" + words.slice(-35) : words)}</text>`);
    });
    const shift = margin.left;
    margin.left = left;
    out.push(xAxis(range[0], range[1], px, width, height));
    margin.left = shift;
    plot.innerHTML = `<svg>${out.join("")}</svg>`;
  }

  function drawAll() {
    for (const panel of panels) if (panel.series) prepare(panel);
    for (const panel of panels) {
      const range = extent(panel);
      if (panel.strips) drawStrips(panel, range); else draw(panel, range);
    }
    document.getElementById("reset").hidden = !view.range;
    cursor(null);
  }

  // ------------------------------------------------------------------ reading values

  function nearest(series, x) {
    let best = -1, distance = Infinity;
    let low = 0, high = series.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (series.x[middle] <= x) low = middle; else high = middle;
    }
    for (const i of [low - 1, low, high, high + 1]) {
      if (series.y[i] === undefined || series.y[i] === null) continue;
      if (Math.abs(series.x[i] - x) < distance) { distance = Math.abs(series.x[i] - x); best = i; }
    }
    return best;
  }

  function cursor(x, owner, drag) {
    for (const panel of panels) {
      if (!panel.frame) { if (panel.tip) panel.tip.hidden = true; continue; }
      const {px, py, height} = panel.frame, over = panel.plot.querySelector(".over");
      const out = [], rows = [];
      if (x !== null) {
        out.push(`<line class="cursor" x1="${px(x)}" x2="${px(x)}" y1="${margin.top}" y2="${height - margin.bottom}"/>`);
        if (drag) {
          const [a, b] = [px(Math.min(x, drag)), px(Math.max(x, drag))];
          out.push(`<rect class="chosen" x="${a}" y="${margin.top}" width="${b - a}" height="${height - margin.top - margin.bottom}"/>`);
        }
        for (const series of panel.shown) {
          const i = nearest(series, x);
          if (i < 0) continue;
          const value = series.smooth[i];
          if (!(panel.frame.logarithmic && value <= 0)) {
            out.push(`<circle cx="${px(series.x[i])}" cy="${py(value)}" r="3.2" fill="${color(series.run)}"/>`);
          }
          const raw = view.smooth ? ` (${text(series.y[i])})` : "";
          rows.push(`<div><i style="background:${color(series.run)}"></i>${text(value)}${raw} · ${escaped(data.runs[series.run].name)}</div>`);
        }
      }
      over.innerHTML = out.join("");
      panel.tip.hidden = x === null || panel !== owner || !rows.length;
      if (!panel.tip.hidden) {
        panel.tip.innerHTML = `<div class="faint">${view.x} ${text(x)}</div>${rows.join("")}`;
        const right = px(x) > panel.plot.clientWidth / 2;
        panel.tip.style.left = right ? "" : `${px(x) + 20}px`;
        panel.tip.style.right = right ? `${panel.plot.clientWidth - px(x) + 20}px` : "";
        panel.tip.style.top = "40px";
      }
    }
  }

  function listen(panel) {
    let start = null;
    const at = (event) => {
      const frame = panel.frame;
      if (!frame) return null;
      const share = (event.clientX - panel.plot.getBoundingClientRect().left - frame.left) / frame.width;
      return frame.x0 + Math.min(1, Math.max(0, share)) * (frame.x1 - frame.x0);
    };
    panel.plot.addEventListener("pointermove", (event) => {
      const x = at(event);
      if (x !== null) cursor(x, panel, start);
    });
    panel.plot.addEventListener("pointerleave", () => { if (start === null) cursor(null); });
    panel.plot.addEventListener("pointerdown", (event) => {
      start = at(event);
      panel.plot.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    panel.plot.addEventListener("pointerup", (event) => {
      const end = at(event), from = start;
      start = null;
      if (from === null || end === null) return;
      const span = panel.frame.x1 - panel.frame.x0;
      if (Math.abs(end - from) > span / 100) { view.range = [Math.min(from, end), Math.max(from, end)]; drawAll(); }
      else cursor(end, panel);
    });
    panel.plot.addEventListener("dblclick", () => { view.range = null; drawAll(); });
  }

  // ------------------------------------------------------------------ the page

  for (const node of document.querySelectorAll(".plot")) {
    const found = data.panels[node.dataset.panel];
    const panel = {...found, plot: node, tip: node.parentElement.querySelector(".tip"), shown: []};
    panels.push(panel);
    if (panel.strips) continue;
    if (panel.log) view.log.add(panel.name);
    const button = node.parentElement.querySelector("button");
    button.setAttribute("aria-pressed", view.log.has(panel.name));
    button.addEventListener("click", () => {
      if (!view.log.delete(panel.name)) view.log.add(panel.name);
      button.setAttribute("aria-pressed", view.log.has(panel.name));
      drawAll();
    });
    listen(panel);
  }
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const run = Number(chip.dataset.run);
      if (!view.hidden.delete(run)) view.hidden.add(run);
      chip.setAttribute("aria-pressed", !view.hidden.has(run));
      drawAll();
    });
  }
  document.getElementById("axis").addEventListener("change", (event) => {
    view.x = event.target.value;
    view.range = null;
    drawAll();
  });
  const slider = document.getElementById("smooth");
  slider.addEventListener("input", () => {
    view.smooth = Number(slider.value) && 1 - 10 ** -Number(slider.value);
    drawAll();
  });
  document.getElementById("reset").addEventListener("click", () => { view.range = null; drawAll(); });
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = (on) => { root.dataset.theme = on ? "dark" : "light"; };
  paint(dark.matches);
  dark.addEventListener("change", (event) => paint(event.matches));
  document.getElementById("theme").addEventListener("click", () => paint(root.dataset.theme !== "dark"));
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; drawAll(); }
  }).observe(document.body);
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", drawAll);
})();
