"use strict";

/* Charts: show the step and the values under the pointer. Each curve is thinned separately, so each has its own nearest step. */
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg");
  const line = svg.querySelector(".pointer");
  const unit = svg.dataset.unit && " " + svg.dataset.unit;
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  const curves = Array.from(figure.querySelectorAll(".curve"), (curve) => ({
    name: curve.dataset.name,
    colour: getComputedStyle(curve).getPropertyValue("--tone"),
    steps: curve.dataset.steps.split(" ").map(Number),
    values: curve.dataset.values.split(" ").map(Number),
    positions: curve.querySelector("polyline").getAttribute("points").split(" ").map((pair) => Number(pair.split(",")[0])),
  }));
  const format = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });

  const nearest = (positions, x) => {
    let low = 0;
    let high = positions.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (positions[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - positions[low - 1] < positions[low] - x ? low - 1 : low;
  };

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const points = curves.map((curve) => ({ curve, i: nearest(curve.positions, x) }));
    if (!points.length) return;
    const distance = ({ curve, i }) => Math.abs(curve.positions[i] - x);
    const closest = points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const step = closest.curve.steps[closest.i];
    const position = closest.curve.positions[closest.i];
    line.setAttribute("x1", position);
    line.setAttribute("x2", position);
    line.style.visibility = "visible";
    tip.replaceChildren(document.createElement("b"));
    tip.firstChild.textContent = "step " + step.toLocaleString("en");
    for (const { curve, i } of points) {
      const otherStep = curve.steps[i] === step ? "" : " at step " + curve.steps[i].toLocaleString("en");
      const row = tip.appendChild(document.createElement("div"));
      if (curves.length > 1) row.style.setProperty("--tone", curve.colour);
      row.textContent = curve.name + " " + format(curve.values[i]) + unit + otherStep;
    }
    const frame = figure.getBoundingClientRect();
    const center = box.left - frame.left + (position / svg.viewBox.baseVal.width) * box.width;
    /* Above the plot, so that it hides no curve. */
    tip.style.left = Math.max(4, Math.min(center - tip.offsetWidth / 2, frame.width - tip.offsetWidth - 4)) + "px";
    tip.style.top = box.top - frame.top + 12 - tip.offsetHeight + "px";
    tip.style.visibility = "visible";
  };
  const hide = () => {
    line.style.visibility = "hidden";
    tip.style.visibility = "hidden";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

/* Grids of samples: a slider over the steps, and a button that plays them in order. */
for (const player of document.querySelectorAll("figure.player")) {
  const controls = player.querySelector(".controls");
  if (!controls) continue;
  const steps = player.dataset.steps.split(" ").map(Number);
  const frames = player.querySelectorAll("img");
  const slider = controls.querySelector("input");
  const button = controls.querySelector("button");
  const stepLabel = player.querySelector("output");
  let timer = 0;

  const show = (index) => {
    frames.forEach((frame, i) => {
      frame.hidden = i !== index;
    });
    slider.value = index;
    stepLabel.textContent = steps[index].toLocaleString("en");
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  };
  const next = () => {
    const index = Number(slider.value) + 1;
    show(index);
    if (index === frames.length - 1) stop();
  };

  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  button.addEventListener("click", () => {
    if (timer) {
      stop();
      return;
    }
    if (Number(slider.value) === frames.length - 1) show(0);
    button.textContent = "Pause";
    timer = setInterval(next, 700);
  });
  controls.hidden = false;
  show(frames.length - 1); /* a browser restores the slider's position when it reloads the page */
}
