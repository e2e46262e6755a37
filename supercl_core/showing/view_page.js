"use strict";
// What the page of `supercl view --html` does: one slice is shown, with the layers that are ticked.
const { case: caseId, layers, slices } = JSON.parse(document.getElementById("data").textContent);
const part = (id) => document.getElementById(id);
const slider = part("slice");
const channel = part("channel"); // null where the images have one channel

function show() {
  const z = Number(slider.value);
  const pictures = slices[z];
  part("grey").src = pictures.grey[channel ? Number(channel.value) : 0];
  const shown = [];
  for (const { name, title } of layers) {
    const image = part(`layer-${name}`);
    image.hidden = !part(`show-${name}`).checked;
    image.style.opacity = part(`opacity-${name}`).value / 100;
    if (image.hidden) continue;
    image.src = pictures[name];
    shown.push(title);
  }
  const place = `${z} of 0–${slices.length - 1}`;
  part("place").textContent = place;
  slider.setAttribute("aria-valuetext", place);
  part("stack").setAttribute("aria-label", [`Slice ${z} of ${caseId}`, ...shown].join(", "));
}

function move(steps) {
  slider.value = Number(slider.value) + steps; // the slider keeps to its range
  show();
}

const moves = {
  ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1,
  PageUp: 10, PageDown: -10, Home: -slices.length, End: slices.length,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const layer = layers.find(({ key }) => key === event.key.toLowerCase());
  // Arrows belong to another control that has the focus; the slice's slider is moved here, so that it moves once.
  const elsewhere = event.target.matches("select, input[type=range]") && event.target !== slider;
  if (layer) {
    part(`show-${layer.name}`).click();
  } else if (event.key === "c" && channel) {
    channel.selectedIndex = (channel.selectedIndex + 1) % channel.length;
    show();
  } else if (event.key in moves && !elsewhere) {
    move(moves[event.key]);
  } else {
    return;
  }
  event.preventDefault();
});

let wheeled = 0;
part("stack").addEventListener("wheel", (event) => {
  if (event.ctrlKey) return; // zooms the page
  event.preventDefault();
  // A notch is 100 pixels or a few lines; a touch pad sends many small parts of one.
  wheeled += event.deltaMode ? Math.sign(event.deltaY) : event.deltaY / 100;
  const steps = Math.trunc(wheeled);
  wheeled -= steps;
  if (steps) move(steps);
}, { passive: false });

for (const control of document.querySelectorAll("input, select")) control.addEventListener("input", show);
show();
