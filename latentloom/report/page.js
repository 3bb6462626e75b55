"use strict";

/* Charts: step and values under the pointer. Curves are thinned each for itself, so each gives its own nearest point. */
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
    places: curve.querySelector("polyline").getAttribute("points").split(" ").map((place) => Number(place.split(",")[0])),
  }));
  const digits = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });

  const nearest = (places, x) => {
    let low = 0;
    let high = places.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - places[low - 1] < places[low] - x ? low - 1 : low;
  };

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const found = curves.map((curve) => ({ curve, i: nearest(curve.places, x) }));
    if (!found.length) return;
    const off = ({ curve, i }) => Math.abs(curve.places[i] - x);
    const near = found.reduce((a, b) => (off(b) < off(a) ? b : a));
    const step = near.curve.steps[near.i];
    const place = near.curve.places[near.i];
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.style.visibility = "visible";
    tip.replaceChildren(document.createElement("b"));
    tip.firstChild.textContent = "step " + step.toLocaleString("en");
    for (const { curve, i } of found) {
      const own = curve.steps[i] === step ? "" : " at step " + curve.steps[i].toLocaleString("en");
      const row = tip.appendChild(document.createElement("div"));
      if (curves.length > 1) row.style.setProperty("--tone", curve.colour);
      row.textContent = curve.name + " " + digits(curve.values[i]) + unit + own;
    }
    const frame = figure.getBoundingClientRect();
    const at = box.left - frame.left + (place / svg.viewBox.baseVal.width) * box.width;
    /* Above the drawing, where it hides no curve. */
    tip.style.left = Math.max(4, Math.min(at - tip.offsetWidth / 2, frame.width - tip.offsetWidth - 4)) + "px";
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

/* Grids of samples: a slider over the steps, and a button that goes through them. */
for (const player of document.querySelectorAll("figure.player")) {
  const controls = player.querySelector(".controls");
  if (!controls) continue;
  const steps = player.dataset.steps.split(" ").map(Number);
  const frames = player.querySelectorAll("img");
  const slider = controls.querySelector("input");
  const button = controls.querySelector("button");
  const shown = player.querySelector("output");
  let timer = 0;

  const show = (index) => {
    frames.forEach((frame, i) => {
      frame.hidden = i !== index;
    });
    slider.value = index;
    shown.textContent = steps[index].toLocaleString("en");
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
  show(frames.length - 1); /* a reloaded page may bring back where the slider was */
}
