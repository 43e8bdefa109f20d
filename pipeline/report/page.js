"use strict";
// Values under the pointer, read back from the drawing itself: its axes say what a place means.
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg[data-axes]");
  if (!svg) continue;
  const [left, right, xLow, xHigh, bottom, top, yLow, yHigh] = svg.dataset.axes.split(" ").map(Number);
  const curves = [...svg.querySelectorAll("path[data-name]")].map((path) => ({
    name: path.dataset.name,
    colour: getComputedStyle(path).stroke,
    points: path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(",").map(Number)),
  }));
  if (!curves.length) continue;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const rule = document.createElementNS(svg.namespaceURI, "path");
  rule.setAttribute("class", "r");
  svg.append(rule);
  const percent = figure.dataset.percent === "1";
  const shown = (value) => (percent ? (value * 100).toFixed(1) + " %" : Number(value.toPrecision(3)).toLocaleString("en"));
  const hide = () => { tip.hidden = true; rule.removeAttribute("d"); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    if (x < left - 6 || x > right + 6) return hide();
    tip.replaceChildren();
    let at = null;
    for (const curve of curves) {
      const near = curve.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      if (Math.abs(near[0] - x) > 14) continue;
      if (at === null) at = near[0];
      const line = document.createElement("div");
      const key = document.createElement("i");
      key.className = "key";
      key.style.background = curve.colour;
      line.append(key, curve.name + " " + shown(yLow + ((bottom - near[1]) / (bottom - top)) * (yHigh - yLow)));
      tip.append(line);
    }
    if (at === null) return hide();
    const head = document.createElement("div");
    head.textContent = figure.dataset.x + " " + Number((xLow + ((at - left) / (right - left)) * (xHigh - xLow)).toPrecision(4)).toLocaleString("en");
    tip.prepend(head);
    rule.setAttribute("d", `M${at},${top}L${at},${bottom}`);
    tip.hidden = false;
    const frame = figure.getBoundingClientRect();
    const place = event.clientX - frame.left + 14;
    tip.style.left = Math.max(4, Math.min(place, frame.width - tip.offsetWidth - 6)) + "px";
    tip.style.top = event.clientY - frame.top + 16 + "px";
  });
  svg.addEventListener("pointerleave", hide);
}
